"""GBDT+LR — boosted trees cut the space into cells; a logistic regression weighs the cell that each tree puts us in.

Paper: He et al. Practical Lessons from Predicting Clicks on Ads at Facebook. ADKDD 2014. doi:10.1145/2648584.2648589
Idea:  trees find crossings and thresholds but are slow to retrain; a linear model over their leaves keeps up with the
       newest rows. Grow the trees on an earlier slice of time, train the regression on a later one.

         x = (e_i1, …, e_in), one-hot vectors    leaves: the leaf i_t that each of n trees gives, as a row of weights
Eq. (2)  s(y, x, w) = y wᵀx = y Σ_t w_{t, i_t}   forward: the sum of n looked-up weights (and a bias), without y
Sec. 3   boosted trees that make the x           fit_trees (LightGBM), on rows that the regression is not trained on
Differs: `fit_trees` starts the weights at the trees' own leaf values, so that the model begins as the boosted trees and
         what the regression learns is a correction (start="zero" as in the paper). Each tree owns `num_leaves` weights
         whether it has so many leaves or not, so shapes follow from the configuration. Categories are split as sets,
         not as numbers; the slots of a field of many values are columns of their own. `with_fields` adds a plain
         regression on the fields beside the leaves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.core.config import keeps_config
from funnelrec.core.nn.embedding import FieldEmbedding, Table
from funnelrec.core.schema import Spec
from funnelrec.core.shapes import PADDING

__all__ = ["GBDTLR"]

HINT = "GBDT+LR needs LightGBM, which is not installed; run: pip install 'funnelrec[trees]'"
TEXT = "trees"  #: the buffer that holds LightGBM's text, byte by byte


def _lightgbm() -> Any:
    try:
        import lightgbm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(HINT) from error
    return lightgbm


def _make_room(module: nn.Module, state: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    """Before load_state_dict, which wants equal shapes: the text to come is as long as it is."""
    if prefix + TEXT in state:
        module.register_buffer(TEXT, torch.empty_like(state[prefix + TEXT]))


@keeps_config
class GBDTLR(nn.Module):
    """Logit of a click from the leaves of at most `num_trees` boosted trees. Call `fit_trees` before training.

    The trees are saved with the weights, as LightGBM's text, and are no parameters: `fit` trains the regression.
    """

    trees: Tensor
    offsets: Tensor

    def __init__(self, spec: Spec, *, num_trees: int = 500, num_leaves: int = 12, with_fields: bool = False) -> None:
        super().__init__()
        if num_trees < 1 or num_leaves < 2:
            raise ValueError(
                f"GBDT+LR needs at least 1 tree of 2 leaves, received num_trees={num_trees}, num_leaves={num_leaves}"
            )
        self.num_trees = num_trees
        self.num_leaves = num_leaves
        offsets = torch.tensor([c.offset for c in spec.categories for _ in range(c.start, c.stop)], dtype=torch.int64)
        self.register_buffer("offsets", offsets, persistent=False)  # (C,) of the field that a column belongs to
        self.weight = Table(num_trees * num_leaves, 1, std=0.0, padding=False)
        self.fields = FieldEmbedding(spec, 1, std=0.0) if with_fields else None
        self.bias = nn.Parameter(torch.zeros(()))
        self.register_buffer(TEXT, torch.empty(0, dtype=torch.uint8))
        self.register_load_state_dict_pre_hook(_make_room)  # type: ignore[no-untyped-call]
        self._read: tuple[Tensor, int, Any] | None = None  # the text that was read, its version, what came of it

    # ---------------------------------------------------------------------------------------------------- trees
    def fit_trees(
        self,
        batches: Iterable[Batch],
        valid: Iterable[Batch] | None = None,
        *,
        shrinkage: float = 0.1,
        min_leaf_rows: int = 20,
        patience: int = 50,
        start: Literal["leaves", "zero"] = "leaves",
        seed: int = 0,
        options: Mapping[str, Any] | None = None,
    ) -> GBDTLR:
        """Grow the trees on rows that lie before those of the regression, and set the regression to its start.

        With `valid`, growing stops after `patience` trees that bring its log loss no lower, and the best number of
        trees is kept. `shrinkage`: what a tree's values are multiplied by. start="leaves": the model is then the
        boosted trees, to the digits of float32; "zero": all weights are 0. `options`: more of LightGBM's own.
        Raises ModuleNotFoundError, with the way to install it, where LightGBM is absent.
        """
        lightgbm = _lightgbm()
        settings = {
            "objective": "binary", "num_leaves": self.num_leaves, "learning_rate": shrinkage,
            "min_data_in_leaf": min_leaf_rows, "seed": seed, "deterministic": True, "force_row_wise": True,
            "num_threads": torch.get_num_threads(), "verbosity": -1, **(options or {}),
        }  # fmt: skip
        train = self._table(lightgbm, batches)
        checks = [] if valid is None else [self._table(lightgbm, valid, train)]
        stop = [lightgbm.early_stopping(patience, verbose=False)] if checks else []
        grown = lightgbm.train(settings, train, self.num_trees, valid_sets=checks, callbacks=stop)
        text = grown.model_to_string(num_iteration=grown.best_iteration if checks else -1)
        device = self.bias.device
        self.register_buffer(TEXT, torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(device))
        with torch.no_grad():
            self.weight.weight.zero_()
            self.bias.zero_()
            if self.fields is not None:
                self.fields.reset_parameters()
            if start == "leaves":
                self.weight.weight[:, 0] = self._leaf_values().to(device)
        return self

    def _table(self, lightgbm: Any, batches: Iterable[Batch], like: Any = None) -> Any:
        """Rows as LightGBM's data set; the first columns are categories."""
        rows = [
            (self._columns(b), b.label.cpu().numpy(), b.weight.cpu().numpy() if "weight" in b else None)
            for b in batches
        ]
        if not rows:
            raise ValueError("trees need rows to grow on, received no batch")
        x, y, w = zip(*rows, strict=True)
        weight = None if w[0] is None else np.concatenate(w)
        categories = list(range(len(self.offsets)))
        return lightgbm.Dataset(
            np.concatenate(x), np.concatenate(y), weight=weight, reference=like, categorical_feature=categories
        )

    def _columns(self, batch: Batch) -> Float[np.ndarray, "B columns"]:
        """Categories as vocabulary rows of their own field, nothing as missing, then the numbers."""
        rows = batch.ids.long() - self.offsets + 1  # (B, C); exact in float64 far beyond any vocabulary
        ids = rows.double().masked_fill(batch.ids == PADDING, torch.nan)
        table: Float[np.ndarray, "B columns"] = torch.cat([ids, batch.numbers.double()], dim=1).cpu().numpy()
        return table

    def _booster(self) -> Any:
        """LightGBM's model of the text, read again only after the text has changed."""
        version = self.trees._version
        if self._read is None or self._read[0] is not self.trees or self._read[1] != version:
            if not len(self.trees):
                raise ValueError("this GBDT+LR has no trees yet; call fit_trees(batches of an earlier slice of time)")
            text = self.trees.cpu().numpy().tobytes().decode()
            self._read = (self.trees, version, _lightgbm().Booster(model_str=text))
        return self._read[2]

    def _leaf_values(self) -> Float[Tensor, "leaves"]:
        booster = self._booster()
        values = torch.zeros(self.num_trees, self.num_leaves)
        for tree, described in enumerate(booster.dump_model()["tree_info"]):
            for leaf in range(described["num_leaves"]):
                values[tree, leaf] = booster.get_leaf_output(tree, leaf)
        return values.flatten()

    # ----------------------------------------------------------------------------------------------- regression
    @torch.no_grad()
    def leaves(self, batch: Batch) -> Int[Tensor, "B T"]:
        """The row of `weight` of each tree's leaf: exactly one a tree.   Eq. (1)"""
        found = self._booster().predict(self._columns(batch), pred_leaf=True, num_threads=torch.get_num_threads())
        found = torch.from_numpy(np.ascontiguousarray(found)).long().view(batch.size, -1)  # (B, T)
        offset = self.num_leaves * torch.arange(found.shape[1])
        return (found + offset).to(batch.ids.device)

    def forward(self, batch: Batch) -> Float[Tensor, "B"]:
        """Logits [B] from `ids` and `numbers`."""
        logit: Tensor = self.weight(self.leaves(batch)).sum((1, 2)) + self.bias  # (B, T, 1) -> (B,)   Eq. (2)
        return logit if self.fields is None else logit + self.fields(batch).sum((1, 2))
