from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from funnelrec.learn import memory
from funnelrec.learn.memory import kept_memory

if memory._glibc() is None:
    pytest.skip("this C library is not glibc", allow_module_level=True)

MEASURE = """
import json, resource, torch
from funnelrec.learn.memory import kept_memory

def faults(times):  # pages the system has to bring for the last of so many buffers of 64 MB, each written and freed
    for _ in range(times):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(2**24).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

found = {"without": faults(30)}
with kept_memory():
    found["inside"] = faults(30)
    with kept_memory():
        pass
    found["after an inner block"] = faults(30)
found["given back"] = faults(1)
print(json.dumps(found))
"""


def measured(**settings: str) -> dict[str, int]:
    """In a process of its own, whose heap no other test has used."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], env=plain | settings, capture_output=True, text=True, check=True
    )
    faults: dict[str, int] = json.loads(done.stdout)
    return faults


def test_what_was_freed_is_used_again() -> None:
    found = measured()
    assert found["without"] > 20
    assert found["inside"] < found["without"] / 5
    assert found["after an inner block"] < found["without"] / 5
    assert found["given back"] > found["without"] / 2


def test_the_users_own_setting_stands() -> None:
    """It is also the control: without the policy the buffers come anew each time."""
    found = measured(MALLOC_ARENA_MAX="2")
    assert found["inside"] > found["without"] / 2 > 10


def test_an_error_ends_it_too() -> None:
    with pytest.raises(RuntimeError, match="stop"), kept_memory():
        assert memory._inside == 1
        raise RuntimeError("stop")
    assert memory._inside == 0


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    with kept_memory():
        assert memory._inside == 0
