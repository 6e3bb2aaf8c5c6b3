"""The demo, on a world small enough for a test."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from funnelrec.cli.app import run
from funnelrec.serve.funnel import Funnel


def test_the_demo_holds_the_funnel_against_the_truth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo.funnel"
    assert run(["demo", "-o", str(out), "--users", "600", "--items", "200", "--no-progress"]) == 0
    shown = capsys.readouterr().out
    for row in ("popularity (baseline)", "item_cf (baseline)", "comirec_sa", "din", "fm (baseline)", "oracle"):
        assert re.search(rf"^{re.escape(row)} ", shown, flags=re.MULTILINE), f"no row '{row}'"
    for stage in ("match → rank → rerank", "who truly likes", "normalised mutual information"):
        assert stage in shown
    assert len(re.findall(r"^Person \d+, who truly likes", shown, flags=re.MULTILINE)) == 3
    gap = re.search(r"DIN's AUC is (-?\d\.\d+) below the oracle's", shown)
    assert gap is not None
    assert 0 < float(gap[1]) < 0.25, "nobody beats the oracle, and a trained model is not far from it"
    funnel = Funnel.load(out)
    assert len(funnel.recommend(1, k=5).items) == 5
    assert funnel.item_map is not None  # the page draws these two
    assert funnel.store.picture(2) is not None
    assert (out / "report" / "match.png").is_file()
