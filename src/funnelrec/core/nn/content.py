"""Items that have content: a vector of their own plus what their content says, so that a new item has a vector too.

    z_i = known_i · e_i + s_i · (W LN(x_i) + b)

e_i is learnt from clicks, x_i is the content (encode/item/content.py). In training e_i is left out for a share of the
look-ups (id dropout: Volkovs, Yu, Poutanen, DropoutNet, NeurIPS 2017), so that content learns to stand alone; an item
that training never saw has no e_i at all. Its z is then shorter than that of others, which matters to a dot product:
`calibrate` sets s of such items to what makes the mean lengths equal.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from funnelrec.core.nn.embedding import Table

__all__ = ["ContentTable", "content_tables"]

ROWS_AT_ONCE = 65_536


class ContentTable(Table):
    """A `Table` of items whose rows also have content of width `content_dim`. A row of zeros is missing content."""

    content: Tensor
    warm: Tensor
    scale: Tensor

    def __init__(
        self, rows: int, dim: int, *, content_dim: int, id_dropout: float = 0.3, std: float = 0.01, dense: bool = False
    ) -> None:
        super().__init__(rows, dim, std=std, dense=dense)
        self.id_dropout = id_dropout
        self.register_buffer("content", torch.zeros(rows, content_dim))
        self.register_buffer("warm", torch.ones(rows, dtype=torch.bool))
        self.register_buffer("scale", torch.ones(()))
        self.adapter = nn.Sequential(nn.LayerNorm(content_dim), nn.Linear(content_dim, dim))

    def set_content(self, vectors: Float[Tensor, "N M"], warm: Bool[Tensor, "N"]) -> None:
        """Content of every row, and which rows training saw. Raises ValueError for another shape."""
        if vectors.shape != self.content.shape or len(warm) != len(self.warm):
            raise ValueError(
                f"content is {list(self.content.shape)} and warm {list(self.warm.shape)}, "
                f"received {list(vectors.shape)} and {list(warm.shape)}"
            )
        self.content.copy_(vectors)
        self.warm.copy_(warm)

    def forward(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape D"]:
        """Rows with their content; ids int32 or int64 of any shape."""
        known = self.warm[ids]
        if self.training and self.id_dropout > 0:
            known = known & (torch.rand(ids.shape, device=ids.device) >= self.id_dropout)
        own = super().forward(ids) * known.unsqueeze(-1)
        scale = torch.where(self.warm[ids], 1.0, self.scale).unsqueeze(-1)
        return own + self.of_content(ids) * scale

    def of_content(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape D"]:
        """What content alone says of these rows; zero where there is none."""
        if ids.numel() > self.rows:  # histories name most items many times: adapt each once
            return F.embedding(ids, self._adapted(self.content))
        return self._adapted(self.content[ids])

    def _adapted(self, x: Float[Tensor, "*shape M"]) -> Float[Tensor, "*shape D"]:
        out: Tensor = self.adapter(x) * x.any(-1, keepdim=True)
        return out

    @torch.no_grad()
    def calibrate(self, strength: int | float = 1.0) -> float:
        """Make items that training never saw as long as the others on average, or a share of the way; the scale."""
        training = self.training
        self.eval()
        rows = torch.arange(self.rows, device=self.content.device)
        whole, alone = 0.0, 0.0
        for part in torch.split(rows[self.warm & self.content.any(1)], ROWS_AT_ONCE):
            whole += self(part).norm(dim=1).sum().item()
            alone += self.of_content(part).norm(dim=1).sum().item()
        self.scale.fill_((whole / alone) ** float(strength) if alone > 0 else 1.0)
        self.train(training)
        return self.scale.item()


def content_tables(model: nn.Module) -> list[ContentTable]:
    """The tables of a model that read content."""
    return [module for module in model.modules() if isinstance(module, ContentTable)]
