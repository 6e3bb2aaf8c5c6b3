"""Throughput of ResNet-18 on small pictures: `fit` beside a plain torch loop over the same layers.

    python benchmarks/images.py [--width 32] [--batch 64] [--rounds 5] [--compile] [--output FILE]

Ours is `learn.transfer.train` and `predict`, batches and normalisation included. The plain loop draws its batches from
a TensorDataset with a DataLoader, divides by 255, normalises, and has the same network, loss, clipping and AdamW. Sides
take turns, a round of steps each. Time is processor time of one thread, which another process beside this one cannot
take away, though it can slow the caches; read the ratios, medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from funnelrec.data.images import Images
from funnelrec.encode.image.classifier import Classifier
from funnelrec.encode.image.resnet import ResNet
from funnelrec.learn.transfer import Training, predict, train

STEPS = 3


def pictures(batch: int) -> Images:
    """Random pixels for STEPS batches."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (STEPS * batch, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.arange(STEPS * batch) % 10, tuple("0123456789"))


class Plain:
    """The loop one would write: float32 or bfloat16, planes or channels last."""

    def __init__(self, images: Images, width: int, batch: int, *, bf16: bool, last: bool) -> None:
        torch.manual_seed(0)
        self.net = ResNet(width=width, num_classes=10, stem="cifar")
        self.format = torch.channels_last if last else torch.contiguous_format
        self.net.to(memory_format=self.format)  # type: ignore[call-overload]
        self.loader = DataLoader(TensorDataset(images.pixels, images.labels), batch, shuffle=True)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), 1e-3, fused=True)
        self.bf16 = bf16

    def content(self, pixels: Tensor) -> Tensor:
        """Pixels as the network reads them."""
        return ((pixels.float() / 255 - 0.5) / 0.25).contiguous(memory_format=self.format)

    def train(self) -> None:
        """One epoch."""
        self.net.train()
        for pixels, labels in self.loader:
            self.optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                loss = F.cross_entropy(self.net(self.content(pixels)).float(), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), 5.0)
            self.optimizer.step()
            loss.item()

    @torch.no_grad()
    def infer(self) -> None:
        """All logits."""
        self.net.eval()
        for pixels, _ in self.loader:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                self.net(self.content(pixels))


class Ours:
    """The library's own functions; `compiled`: the network through torch.compile."""

    def __init__(self, images: Images, width: int, batch: int, *, bf16: bool, compiled: bool = False) -> None:
        torch.manual_seed(0)
        network = ResNet(width=width, num_classes=10, stem="cifar")
        self.model = Classifier(network, (0.5,) * 3, (0.25,) * 3)
        if compiled:
            network.compile()
        self.images, self.rows = images, torch.arange(len(images))
        self.how = Training(1, 1e-3, batch, bf16=bf16)

    def train(self) -> None:
        """One epoch."""
        train(self.model, self.images, self.rows, self.how)

    def infer(self) -> None:
        """All logits."""
        predict(self.model, self.images, self.rows, bf16=self.how.bf16)


def seconds(work: Callable[[], None]) -> float:
    """Processor time."""
    started = time.process_time()
    work()
    return time.process_time() - started


def main() -> None:
    """Measure, write JSON, and a table to standard output."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="also torch.compile, which takes a minute or more first")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    images = pictures(options.batch)
    common = (images, options.width, options.batch)
    sides: dict[str, Any] = {
        "plain, float32": Plain(*common, bf16=False, last=False),
        "plain, float32, channels last": Plain(*common, bf16=False, last=True),
        "plain, bfloat16": Plain(*common, bf16=True, last=False),
        "plain, bfloat16, channels last": Plain(*common, bf16=True, last=True),
        "ours, float32": Ours(*common, bf16=False),
        "ours, bfloat16": Ours(*common, bf16=True),
    }
    if options.compile:
        sides["ours, bfloat16, compiled"] = Ours(*common, bf16=True, compiled=True)
    found: dict[str, dict[str, list[float]]] = {name: {"train": [], "infer": []} for name in sides}
    first: dict[str, float] = {}
    for number in range(options.rounds + 1):
        for name, side in sides.items():
            for kind in ("train", "infer"):
                took = seconds(getattr(side, kind))
                if number:  # the first round warms up, and compiles
                    found[name][kind].append(took)
                else:
                    first[name] = first.get(name, 0.0) + took
    rate = {
        name: {kind: len(images) / statistics.median(times) for kind, times in kinds.items()}
        for name, kinds in found.items()
    }
    lines = ["| loop | pictures/s, training | pictures/s, inference | first round, s |", "|---|---:|---:|---:|"]
    for name, kinds in rate.items():
        lines.append(f"| {name} | {kinds['train']:.0f} | {kinds['infer']:.0f} | {first[name]:.0f} |")
    for kind in ("train", "infer"):
        same = rate["ours, bfloat16"][kind] / rate["plain, bfloat16, channels last"][kind]
        plain = rate["ours, bfloat16"][kind] / rate["plain, float32"][kind]
        lines.append(f"\n{kind}: ours is {same:.2f} x the plain loop of the same precision, {plain:.2f} x float32")
    sys.stdout.write("\n".join(lines) + "\n")
    if options.output:
        command = f"python benchmarks/images.py --width {options.width} --batch {options.batch}"
        command += f" --rounds {options.rounds}" + " --compile" * options.compile
        text = {"command": command, "processor": platform.processor(), "torch": torch.__version__, "rate": rate}
        options.output.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
