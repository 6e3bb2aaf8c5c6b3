"""What HTTP costs: one recommendation over the server beside the same call in Python, beside a control endpoint.

    python benchmarks/serve.py [--items 100000] [--rounds 200] [--output benchmarks/results/serve.json]

100,000 items, ComiRec-SA (4 interests of width 64) -> 500 candidates -> DIN -> diversity, untrained. In each
round every user is asked for once in this process (`Funnel.recommend`, one thread), once over a kept connection
(POST /v1/recommend) and once at /healthz, so that a busy machine slows all three. Then 8 connections ask at the same
time, of a server with one thread and of one with two, which take turns with /healthz. Last, questions answered
together in this process against one by one: what micro-batching could gain. Read the ratios.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psutil
import torch

from funnelrec.core.schema import Category, Number, Schema
from funnelrec.data.dataset import Dataset
from funnelrec.data.tables import Tables
from funnelrec.match.comirec_sa import ComiRecSA
from funnelrec.rank.din import DIN
from funnelrec.rerank.diversity import ControllableDiversity
from funnelrec.serve.funnel import Funnel
from funnelrec.serve.request import Request

USERS, EVENTS = 20_000, 400_000
TOGETHER = (1, 2, 4, 8)
CONNECTIONS = 8


def make_funnel(items: int, folder: Path) -> Path:
    """An artifact of the right size; what its weights say does not matter to the time."""
    rng = np.random.default_rng(0)
    events = pl.DataFrame(
        {
            "user": rng.integers(0, USERS, EVENTS),
            "item": np.concatenate([np.arange(items), rng.integers(0, items, EVENTS - items)]),
            "time": np.sort(rng.integers(0, 10**6, EVENTS)),
            "click": np.ones(EVENTS, dtype=np.int64),
            "device": np.where(rng.random(EVENTS) < 0.5, "phone", "desktop"),
        }
    )
    catalogue = pl.DataFrame(
        {
            "item": np.arange(items),
            "title": [f"Item {i}" for i in range(items)],
            "kind": [f"kind {i % 37}" for i in range(items)],
            "brand": [f"brand {i % 503}" for i in range(items)],
            "price": rng.random(items),
        }
    )
    schema = Schema(
        user="user",
        item="item",
        time="time",
        label="click",
        context=(Category("device"),),
        items=(Category("kind"), Category("brand"), Number("price")),
    )
    dataset = Dataset.build(Tables(events, schema, items=catalogue), folder / "data")
    torch.manual_seed(0)
    matcher = ComiRecSA(dataset.spec, embedding_dim=64, num_interests=4, max_len=50)
    torch.nn.init.normal_(matcher.items.weight[2:])
    return Funnel.build(
        dataset,
        matcher=matcher,
        ranker=DIN(dataset.spec, embedding_dim=16, hidden=(80, 40), attention_hidden=(36,)),
        reranker=ControllableDiversity(diversity=0.01),
        diversity_field="kind",
        candidates=500,
        max_len=50,
    ).save(folder / "shop.funnel")


@contextmanager
def server(folder: Path, threads: int) -> Iterator[tuple[int, psutil.Process]]:
    """The port of a server, and its process."""
    words = ["serve", str(folder), "--port", "0", "--threads", str(threads), "--queue", "64", "--deadline-ms", "60000"]
    words += ["--drain", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "funnelrec", *words], stderr=subprocess.PIPE, text=True, env={**os.environ, **ONE_THREAD}
    )
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r":(\d+)$", line.strip()):
            break
    else:
        raise RuntimeError("the server did not start")
    lines = process.stderr
    threading.Thread(target=lambda: [None for _ in lines], daemon=True).start()  # or its log would fill the pipe
    try:
        yield int(found[1]), psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(120)


ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def asker(port: int) -> Callable[[str | None], float]:
    """Asks for a user on a kept connection, or /healthz for None, and gives the seconds."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    sent = {"Content-Type": "application/json"}

    def ask(user: str | None) -> float:
        started = time.perf_counter()
        if user is None:
            connection.request("GET", "/healthz")
        else:
            connection.request("POST", "/v1/recommend", json.dumps({"user_id": user}), sent)
        answer = connection.getresponse()
        answer.read()
        if answer.status != 200:
            raise RuntimeError(f"status {answer.status}")
        return time.perf_counter() - started

    return ask


def times(seconds: list[float]) -> dict[str, float]:
    """In milliseconds."""
    return {
        "p50_ms": round(1e3 * statistics.median(seconds), 3),
        "p99_ms": round(1e3 * float(np.quantile(seconds, 0.99)), 3),
        "min_ms": round(1e3 * min(seconds), 3),
    }


def one_at_a_time(funnel: Funnel, port: int, process: psutil.Process, rounds: int) -> dict[str, Any]:
    """Python, HTTP and the control, taking turns: seconds by the clock, and of the processor."""
    ask = asker(port)
    clock: dict[str, list[float]] = {"python": [], "http": [], "healthz": []}
    processor: dict[str, list[float]] = {"python": [], "http": []}
    for n in range(rounds + 20):
        user = str(n % USERS)
        started, used = time.perf_counter(), time.process_time()
        funnel.recommend(user)
        python, cpu = time.perf_counter() - started, time.process_time() - used
        used = sum(process.cpu_times()[:2])
        over_http = ask(user)
        cpu_http = sum(process.cpu_times()[:2]) - used
        control = ask(None)
        if n >= 20:
            for name, seconds in (("python", python), ("http", over_http), ("healthz", control)):
                clock[name].append(seconds)
            processor["python"].append(cpu)
            processor["http"].append(cpu_http)
    return {
        **{name: times(seconds) for name, seconds in clock.items()},
        "http_over_python": round(statistics.median(clock["http"]) / statistics.median(clock["python"]), 3),
        # The system counts a process in steps of 10 ms, so only the mean over all rounds says something.
        "processor_ms": {name: round(1e3 * statistics.mean(s), 3) for name, s in processor.items()},
        "processor_http_over_python": round(sum(processor["http"]) / sum(processor["python"]), 3),
    }


def many_at_a_time(port: int, seconds: float) -> dict[str, Any]:
    """8 connections that always ask, and the same of the control."""
    found: dict[str, Any] = {}
    for name, user in (("healthz", None), ("recommend", "7")):
        each: list[list[float]] = [[] for _ in range(CONNECTIONS)]
        until = time.perf_counter() + seconds

        def work(own: list[float], user: str | None = user, until: float = until) -> None:
            ask = asker(port)
            while time.perf_counter() < until:
                own.append(ask(user))

        workers = [threading.Thread(target=work, args=(own,)) for own in each]
        started = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        took = time.perf_counter() - started
        taken = [t for own in each for t in own]
        found[name] = {"per_second": round(len(taken) / took, 1), **times(taken)}
    return found


def together(funnel: Funnel, rounds: int) -> dict[str, float]:
    """Milliseconds of the processor a question when so many are answered in one go, in turns."""
    taken: dict[int, list[float]] = {size: [] for size in TOGETHER}
    for n in range(rounds):
        for size in TOGETHER:
            requests = [Request(user=str((n * 8 + i) % USERS)) for i in range(size)]
            started = time.process_time()
            funnel.recommend_many(requests)
            taken[size].append((time.process_time() - started) / size)
    return {str(size): round(1e3 * statistics.median(seconds), 3) for size, seconds in taken.items()}


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--artifact", type=Path, help="one that an earlier run made; it is not made anew")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement with 8 connections")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        artifact = options.artifact or make_funnel(options.items, Path(folder))
        funnel = Funnel.load(artifact)
        found: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "machine": platform.machine()}
        found |= {"items": options.items, "candidates": 500}
        found["cores"], found["torch"] = len(os.sched_getaffinity(0)), torch.__version__
        found["load_before"] = round(os.getloadavg()[0], 1)
        with server(artifact, threads=1) as (port, process):
            found["one_at_a_time"] = one_at_a_time(funnel, port, process, options.rounds)
            found["connections_8_threads_1"] = many_at_a_time(port, options.seconds)
        with server(artifact, threads=2) as (port, _):
            found["connections_8_threads_2"] = many_at_a_time(port, options.seconds)
        found["together_processor_ms_each"] = together(funnel, max(10, options.rounds // 8))
    text = json.dumps(found, indent=1)
    sys.stdout.write(text + "\n")
    if options.output is not None:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
