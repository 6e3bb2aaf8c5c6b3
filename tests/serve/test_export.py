"""Export to ONNX: every network of the zoo agrees with torch, and one that does not is refused."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from funnelrec import zoo
from funnelrec.core.batch import Batch
from funnelrec.data.dataset import Dataset
from funnelrec.match.item_cf import ItemCF
from funnelrec.match.popularity import Popularity
from funnelrec.serve.export import ParityError, export
from funnelrec.serve.funnel import Funnel
from tests.serve.funnels import small_dataset, small_funnel

pytest.importorskip("onnxruntime", reason="needs the extra export")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return small_dataset(tmp_path_factory.mktemp("data") / "d")


def run(code: str, *arguments: Path | str) -> None:
    """Python without the shape checks of this test run: they would fix the batch size of a graph."""
    subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], check=True, timeout=600, cwd=Path(__file__).parents[2]
    )


def test_the_graphs_stand_alone(dataset: Dataset, tmp_path: Path) -> None:
    """What a server without Python would do: interests from ids, then the vectors' dot products."""
    import onnxruntime

    funnel = small_funnel(dataset)
    folder, out = funnel.save(tmp_path / "shop.funnel"), tmp_path / "onnx"
    run("import sys; from funnelrec.cli.app import run; sys.exit(run(sys.argv[1:]))", "export", folder, "-o", out)
    facts = json.loads((out / "export.json").read_text(encoding="utf-8"))
    graphs = {g["file"]: g for g in facts["graphs"]}
    assert set(graphs) == {"ranker.onnx", "user_tower.onnx"}
    assert all(g["difference"] < 1e-5 for g in graphs.values())
    assert graphs["user_tower.onnx"]["inputs"]["history"] == ["B", funnel.pipeline.max_len]
    tower = onnxruntime.InferenceSession(str(out / "user_tower.onnx"))
    store, length = funnel.store, funnel.pipeline.max_len
    person, now = store.persons(["u03"]), torch.tensor([store.now])
    history, times, mask = store.histories.before(person, now, length)
    given = {"history": history, "mask": mask, "user": person, "time": now, "history_times": times}
    interests, valid = tower.run(["interests", "valid"], {i.name: given[i.name].numpy() for i in tower.get_inputs()})
    scores = np.where(valid[0][:, None], interests[0] @ np.load(out / "items.npy").T, -np.inf).max(0)
    answer = funnel.recommend("u03", k=5, exclude_seen=False, diversity=0)
    rows = torch.cat(store.item_rows([answer.ids]))
    assert scores[rows] == pytest.approx([r.match_score for r in answer.items], abs=1e-4)


EVERY = """
import sys
from pathlib import Path
from funnelrec import zoo
from funnelrec.data.dataset import Dataset
from funnelrec.match.popularity import Popularity
from funnelrec.serve.export import export
from funnelrec.serve.funnel import Funnel

data, out = Dataset.open(sys.argv[1]), Path(sys.argv[2])
popular = Popularity(data.spec)
popular.fit(*data.taken())
for name in sys.argv[3:]:
    model = zoo.load(name)(data.spec)
    stages = {"matcher": popular, "ranker": model} if name.startswith("rank/") else {"matcher": model}
    export(Funnel.build(data, **stages, max_len=20), out / name.replace("/", "_"))
"""
WITHOUT = {
    "rank/gbdt_lr": "trees",
    "rank/dsin": "as many sessions as the data has",
    "match/mgnm": "a stable sort",
    "match/mind": "infinite routing logits",
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", ["rank", "match"])
def test_every_network_has_an_onnx_form(stage: str, dataset: Dataset, tmp_path: Path) -> None:
    names = [n for n in zoo.names(stage) if n not in WITHOUT and not hasattr(zoo.load(n), "fit")]
    run(EVERY, dataset.folder, tmp_path, *names)
    assert len(list(tmp_path.glob("*/*.onnx"))) == len(names)


class Drifts(nn.Module):
    """Another answer at every call, which a traced graph cannot know."""

    def __init__(self) -> None:
        super().__init__()
        self.config: dict[str, object] = {}
        self.calls = itertools.count()

    def forward(self, batch: Batch) -> Tensor:
        return batch.user.float() + next(self.calls)


def test_a_graph_that_differs_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    popular = Popularity(dataset.spec)
    popular.fit(*dataset.taken())
    funnel = Funnel.build(dataset, matcher=popular, ranker=Drifts())
    with pytest.raises(ParityError, match=r"ranker\.onnx differs from torch by .*; do not serve it"):
        export(funnel, tmp_path / "onnx")
    assert not list(tmp_path.iterdir())


def test_bad_calls(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exists; name a new folder"):
        export(small_funnel(dataset), tmp_path)
    cf = ItemCF(dataset.spec)
    cf.fit(*dataset.taken())
    with pytest.raises(ValueError, match="no network to export"):
        export(Funnel.build(dataset, matcher=cf), tmp_path / "onnx")
