"""Export: the ranker and the user tower as ONNX, for servers without Python, checked against torch on real requests.

    ranker.onnx       the columns of a batch -> logits [B]
    user_tower.onnx   the columns of a batch -> interests [B, K, D], valid [B, K]
    items.npy         float32 [N, D], the vectors of the item rows: an interest's score of an item is the dot product
    export.json       inputs and outputs of each graph with their shapes, and the largest difference to torch

Inputs carry the names, types and shapes of core/batch.py; B may be anything, L is the funnel's `max_len`.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.core.contracts import VectorMatcher
from funnelrec.core.shapes import FIRST_KNOWN, UNKNOWN
from funnelrec.match.retriever import item_vectors
from funnelrec.serve.funnel import Funnel

__all__ = ["TOLERANCE", "Exported", "ParityError", "export"]

TOLERANCE = 1e-4  #: largest difference to torch, relative to the largest value of the output
EXAMPLES = 64


class ParityError(ValueError):
    """An exported graph answers otherwise than the model it was made from."""


@dataclass(frozen=True)
class Exported:
    """One graph that was written: its file, what goes in and out, and how far from torch it is on other inputs."""

    file: str
    inputs: Mapping[str, Sequence[int | str]]
    outputs: Sequence[str]
    difference: float


class _Graph(nn.Module):
    """A model whose arguments and answers are tensors."""

    outputs: tuple[str, ...]

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def answer(self, batch: Batch) -> tuple[Tensor, ...]:
        """What the graph gives for a batch, in the order of `outputs`."""
        raise NotImplementedError

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.answer(Batch(**dict(zip(self.names, tensors, strict=True))))


class _Ranker(_Graph):
    """A ranker's logits."""

    outputs = ("logits",)

    def answer(self, batch: Batch) -> tuple[Tensor, ...]:
        return (self.model(batch),)


class _UserTower(_Graph):
    """The users' side of a vector matcher."""

    outputs = ("interests", "valid")

    def answer(self, batch: Batch) -> tuple[Tensor, ...]:
        return cast(VectorMatcher, self.model).encode_users(batch)


def export(funnel: Funnel, folder: Path | str) -> list[Exported]:
    """Write what of `funnel` are networks to `folder`, which appears only when every graph agrees with torch.

    Raises ValueError when there is nothing to export or the folder exists, ParityError when a graph differs by more
    than `TOLERANCE`, ModuleNotFoundError without the extra `export`.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"export needs {', '.join(missing)}: pip install 'funnelrec[export]'")
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists; name a new folder, or remove that one")
    graphs: list[tuple[str, _Graph, Batch, Batch]] = []
    if isinstance(funnel.ranker, nn.Module):
        names = ["ids", "numbers", "user", "item", "time", "history", "mask", "history_times", "history_ids"]
        graphs.append(("ranker.onnx", _Ranker(funnel.ranker, names), *_examples(funnel, names)))
    if isinstance(funnel.matcher, VectorMatcher) and isinstance(funnel.matcher, nn.Module):
        names = ["user", "time", "history", "mask", "history_times"]
        graphs.append(("user_tower.onnx", _UserTower(funnel.matcher, names), *_examples(funnel, names)))
    if not graphs:
        raise ValueError(f"{funnel!r} has no network to export; its matcher is no vectors and it has no ranker")
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        exported = [_write(made / file, model, *batches) for file, model, *batches in graphs]
        if isinstance(funnel.matcher, VectorMatcher):
            np.save(made / "items.npy", item_vectors(funnel.matcher, funnel.store.spec.num_items).numpy())
        facts = {"max_len": funnel.pipeline.max_len, "graphs": [vars(e) for e in exported]}
        (made / "export.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
        made.chmod(0o755)
        os.replace(made, folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return exported


def _examples(funnel: Funnel, names: Sequence[str]) -> tuple[Batch, Batch]:
    """Two batches of different sizes with histories of all lengths, from the funnel's own tables."""
    return _draw(funnel, names, 5, seed=1), _draw(funnel, names, EXAMPLES, seed=2)


def _draw(funnel: Funnel, names: Sequence[str], size: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    store, length = funnel.store, funnel.pipeline.max_len
    spec, features = store.spec, store.features

    def rows(stop: int, *shape: int) -> Tensor:
        return torch.randint(min(FIRST_KNOWN, stop - 1), stop, shape, generator=generator)

    user, item = rows(max(spec.num_users, FIRST_KNOWN), size), rows(spec.num_items, size)
    user[0] = UNKNOWN
    real = torch.randint(1, length + 1, (size, 1), generator=generator)
    mask = torch.arange(length) >= length - real  # (B, L), newest last
    history = rows(spec.num_items, size, length) * mask
    ago = torch.randint(0, 10**6, (size, length), generator=generator).sort(1, descending=True).values
    time = torch.full((size,), store.now)
    columns = {
        **features.gather(user, item),
        "user": user,
        "item": item,
        "time": time,
        "history": history,
        "mask": mask,
        "history_times": (time[:, None] - 1 - ago) * mask,
        "history_ids": features.history_ids(history),
    }
    return Batch(**{name: columns[name] for name in names})


def _write(file: Path, model: _Graph, small: Batch, large: Batch) -> Exported:
    """Trace on one batch, compare on another of another size."""
    model.eval()
    batch_size = torch.export.Dim("B", min=1)
    with warnings.catch_warnings(), _quiet("torch.onnx", "onnxscript"):  # they warn about their own internals
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                model,
                tuple(small.values()),
                dynamo=True,
                input_names=list(model.names),
                output_names=list(model.outputs),
                dynamic_shapes=(tuple({0: batch_size} for _ in model.names),),
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            reason = str(error.__cause__ or error).strip().partition("\n")[0]
            raise ValueError(
                f"{type(model.model).__name__} has no ONNX form ({reason}); serve it with `funnelrec serve`"
            ) from error
    assert program is not None
    program.save(str(file))
    used = [i.name for i in program.model.graph.inputs]
    difference = _difference(file, model, large)
    inputs: dict[str, Sequence[int | str]] = {n: ["B", *small[n].shape[1:]] for n in used if n is not None}
    return Exported(file.name, inputs, model.outputs, difference)


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Only errors of these loggers."""
    before = [(logger := logging.getLogger(name), logger.level) for name in names]
    for logger, _ in before:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in before:
            logger.setLevel(level)


def _difference(file: Path, model: _Graph, batch: Batch) -> float:
    """Largest difference of an output, relative to its largest value. Raises ParityError above TOLERANCE."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    answers: list[Any] = session.run(None, {i.name: batch[i.name].numpy() for i in session.get_inputs()})
    with torch.inference_mode():
        wanted = model(*batch.values())
    worst = 0.0
    for ours, theirs in zip(wanted, answers, strict=True):
        a, b = ours.numpy().astype(np.float64), np.asarray(theirs, dtype=np.float64)
        if a.shape != b.shape or not np.isfinite(b).all():
            raise ParityError(f"{file.name} answers with shape {b.shape} and torch with {a.shape}, or not finitely")
        worst = max(worst, float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-12)))
    if worst > TOLERANCE:
        raise ParityError(f"{file.name} differs from torch by {worst:.1e}, above {TOLERANCE:.0e}; do not serve it")
    return worst
