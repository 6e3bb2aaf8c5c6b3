from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from funnelrec.learn.checkpoint import MANIFEST, STATE, TENSORS, CheckpointError, Checkpoints, difference


def groups(value: float) -> dict[str, dict[str, Tensor]]:
    return {
        "weights": {"a.b": torch.full((3, 2), value), "scalar": torch.tensor(value)},
        "rng": {"cpu": torch.arange(9)},
    }


def three(folder: Path) -> Checkpoints:
    with Checkpoints(folder) as store:
        for step in (1, 2, 3):
            store.save(step, groups(step), {"step": step, "pi": 0.1 + 0.2})
    return store


def test_round_trip_and_the_last_two_are_kept(tmp_path: Path) -> None:
    store = three(tmp_path)
    assert [path.name for path in store.all()] == ["step-000000000002", "step-000000000003"]
    found = store.load()
    assert found is not None
    assert found[1] == {"step": 3, "pi": 0.1 + 0.2}
    assert torch.equal(found[0]["weights"]["a.b"], torch.full((3, 2), 3.0))
    assert torch.equal(found[0]["weights"]["scalar"], torch.tensor(3.0))
    assert torch.equal(found[0]["rng"]["cpu"], torch.arange(9))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "step-000000000002", "step-000000000003"]


def test_nothing_there(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "new") as store:
        assert store.load() is None


def test_views_and_shared_memory_are_saved(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    with Checkpoints(tmp_path) as store:
        store.save(1, {"g": {"part": whole[1:], "turned": whole.T, "whole": whole}}, {})
        found = store.load()
    assert found is not None
    assert torch.equal(found[0]["g"]["part"], whole[1:])
    assert torch.equal(found[0]["g"]["turned"], whole.T)


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    store = three(tmp_path)
    newest = store.all()[-1]
    flips = 0
    for name in (TENSORS, STATE, MANIFEST):
        path = newest / name
        good = path.read_bytes()
        for offset in range(len(good)):
            bad = bytearray(good)
            bad[offset] ^= 1 << (offset % 8)
            path.write_bytes(bad)
            with pytest.warns(UserWarning, match="damaged checkpoint passed over, step-000000000003"):
                found = store.load()
            assert found is not None
            assert found[1]["step"] == 2
            flips += 1
        path.write_bytes(good)
    found = store.load()
    assert found is not None
    assert found[1]["step"] == 3, "undamaged again"
    assert flips > 500


@pytest.mark.parametrize("name", [TENSORS, STATE, MANIFEST])
def test_a_missing_or_cut_file_falls_back(tmp_path: Path, name: str) -> None:
    store = three(tmp_path)
    path = store.all()[-1] / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="step-000000000003"):
        found = store.load()
    assert found is not None
    path.unlink()
    with pytest.warns(UserWarning, match="step-000000000003"):
        found = store.load()
    assert found is not None
    assert found[1]["step"] == 2


@pytest.mark.filterwarnings("ignore:damaged checkpoint")
def test_all_damaged_is_refused_with_every_reason(tmp_path: Path) -> None:
    store = three(tmp_path)
    (store.all()[0] / STATE).write_text("{}")
    (store.all()[1] / TENSORS).unlink()
    with pytest.raises(
        CheckpointError, match=r"every checkpoint .*step-000000000003: .*step-000000000002: SHA-256"
    ) as e:
        store.load()
    assert "pass resume=False" in str(e.value)


def test_a_step_can_be_saved_again(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as store:
        store.save(1, groups(1), {"which": "first"})
        store.save(1, groups(2), {"which": "second"})
        found = store.load()
    assert found is not None
    assert found[1] == {"which": "second"}


def test_leftovers_are_removed_on_entry_and_never_read(tmp_path: Path) -> None:
    three(tmp_path)
    for name in (".writing-000000000009", ".deleting-step-000000000001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / TENSORS).write_bytes(b"half")
    with Checkpoints(tmp_path) as store:
        found = store.load()
    assert found is not None
    assert found[1]["step"] == 3
    assert not list(tmp_path.glob(".*"))


def test_two_trainers_in_one_folder(tmp_path: Path) -> None:
    with Checkpoints(tmp_path), pytest.raises(CheckpointError, match=rf"another trainer .*pid {os.getpid()} on "):
        Checkpoints(tmp_path).__enter__()
    with Checkpoints(tmp_path):
        pass  # free again


def test_the_lock_of_a_dead_process_is_no_obstacle(tmp_path: Path) -> None:
    code = f"""
import sys, time
from funnelrec.learn.checkpoint import Checkpoints
with Checkpoints({str(tmp_path)!r}):
    print("held", flush=True)
    time.sleep(100)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match=rf"pid {other.pid} on "):
            Checkpoints(tmp_path).__enter__()
        other.kill()
        other.wait()
    assert f"pid {other.pid}" in (tmp_path / "lock").read_text()
    with Checkpoints(tmp_path):
        assert f"pid {os.getpid()}" in (tmp_path / "lock").read_text()


def test_a_failed_write_leaves_the_earlier_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = three(tmp_path)
    from funnelrec.learn import checkpoint

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_flush", full)
    with pytest.raises(CheckpointError, match=r"could not write the checkpoint of step 4 .*No space left on device"):
        store.save(4, groups(4), {"step": 4})
    monkeypatch.undo()
    found = store.load()
    assert found is not None
    assert found[1]["step"] == 3
    assert not list(tmp_path.glob(".*"))


def test_difference() -> None:
    saved = {"model": "A", "fit": {"lr": 0.1, "seed": 1}, "same": [1, 2]}
    current = {"model": "B", "fit": {"lr": 0.1, "seed": 2, "new": None}, "same": [1, 2]}
    assert difference(saved, current) == ["fit.new: (absent) -> None", "fit.seed: 1 -> 2", "model: A -> B"]
    assert difference(saved, json.loads(json.dumps(saved))) == []


def test_keep_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep must be at least 1, received 0"):
        Checkpoints(tmp_path, keep=0)
