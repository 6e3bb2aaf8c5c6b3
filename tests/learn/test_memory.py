from __future__ import annotations

import resource

import pytest
import torch

from funnelrec.learn import memory
from funnelrec.learn.memory import kept_memory

if memory._glibc() is None:
    pytest.skip("this C library is not glibc", allow_module_level=True)


def faults(size: int) -> int:
    """Pages that the system has to bring while 64 MB are made, written and freed for the third time."""
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(size).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_what_was_freed_is_used_again() -> None:
    """Without it, the control, each of these buffers comes anew from the system."""
    anew = faults(2**24)
    with kept_memory():
        again = faults(2**24)
    assert anew > 20
    assert again < anew / 5
    assert faults(2**24) > anew / 2  # and afterwards all is as it was


def test_the_end_gives_back_after_an_error_too() -> None:
    with pytest.raises(RuntimeError, match="stop"), kept_memory():
        raise RuntimeError("stop")
    assert faults(2**24) > 20


def test_elsewhere_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    with kept_memory():
        assert faults(2**24) > 20
