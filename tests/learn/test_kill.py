from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def kills(harness: ModuleType, folder: Path, number: int, seed: int, *options: str) -> dict[str, Any]:
    """harness.py imports torch once and forks, so that a kill costs a fraction of a second."""
    done = subprocess.run(
        [sys.executable, str(harness.__file__), "kills", str(folder), str(number), str(seed), *options],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_forty_kills_at_random_instants(harness: ModuleType, tmp_path: Path) -> None:
    report = kills(harness, tmp_path, 40, 1)
    assert report["kills"] >= 40
    assert report["equal"] == report["runs"] > 0, report
    assert report["resumed_from_checkpoint"] >= 20, report


@pytest.mark.parametrize("fault", ["rng", "position"])
def test_planted_faults_are_caught(harness: ModuleType, tmp_path: Path, fault: str) -> None:
    report = kills(harness, tmp_path, 16, 2, "--fault", fault)  # one unlucky kill may fall where nothing is at stake
    assert report["equal"] < report["runs"], report


@pytest.mark.slow
def test_two_hundred_kills(harness: ModuleType, tmp_path: Path) -> None:
    report = kills(harness, tmp_path, 200, 3)
    assert report["equal"] == report["runs"] > 0, report
