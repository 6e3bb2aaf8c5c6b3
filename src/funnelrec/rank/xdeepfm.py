"""xDeepFM — explicit interactions of vectors by a compressed interaction network, beside a deep network.

Paper: Lian, Zhou, Zhang, Chen, Xie, Sun. xDeepFM: Combining Explicit and Implicit Feature Interactions for
       Recommender Systems. KDD 2018. arXiv:1803.05170
Idea:  layer k multiplies every map of layer k - 1 with every field, vector by vector, and compresses the products to
       H_k maps. Each map is an explicit sum of products of k + 1 vectors; the MLP adds what no one wrote down.

Eq. (6)   X^k_h = Σ_i Σ_j W^{k,h}_ij (X^{k-1}_i ∘ X^0_j), X^0 = the fields' vectors    _Compress
Eq. (8)   p^k_h = Σ_d X^k_{h,d}                                                       _CIN.forward
Eq. (10)  logit = w_linᵀ a + w_dnnᵀ x_dnn + w_cinᵀ [p^1, …, p^T] + b                   forward
Differs: `split_half` is the authors' code, where half of each layer's maps goes on and the other half goes out; the
         paper (the default) sends all of them both ways. No activation inside CIN, which the paper found best.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from funnelrec.core.batch import Batch
from funnelrec.core.config import keeps_config
from funnelrec.core.nn.embedding import FieldEmbedding
from funnelrec.core.nn.linear import linear, product, to_autocast
from funnelrec.core.nn.mlp import MLP
from funnelrec.core.schema import Spec

__all__ = ["XDeepFM"]

ROWS = 1024  #: rows whose products are alive at a time: they are made, multiplied and forgotten near the cache


class _Compress(torch.autograd.Function):
    """Eq. (6) for R = B · D rows: out = (e ⊗ x) Wᵀ with x [R, H], e [R, F], W [N, F·H].

    The products e ⊗ x are F·H numbers a row, hundreds of times what goes in and out. They are made chunk by chunk,
    forward and again backward, and never kept. What reads them decides how they stand: forward a row has its products
    side by side; for the gradient of W, a sum over rows, each product has its rows side by side.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, e: Tensor, weight: Tensor) -> Tensor:
        x, e, weight = (to_autocast(t) for t in (x, e, weight))
        ctx.save_for_backward(x, e, weight)
        chunks = zip(*(torch.split(t, ROWS) for t in (x, e)), strict=True)
        return torch.cat([product(_products(a, b), weight) for a, b in chunks])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, e, weight = ctx.saved_tensors
        to_x, to_e = torch.empty_like(x), torch.empty_like(e)
        to_weight = weight.new_zeros(weight.shape[::-1], dtype=torch.float32)  # (F·H, N)
        for start in range(0, len(x), ROWS):
            part = slice(start, start + ROWS)
            _gradients(x[part], e[part], weight, gradient[part].to(weight.dtype), (to_x[part], to_e[part], to_weight))
        return to_x, to_e, to_weight.T


def _gradients(x: Tensor, e: Tensor, weight: Tensor, gradient: Tensor, to: tuple[Tensor, Tensor, Tensor]) -> None:
    """Of one chunk. Whatever is large is forgotten before the next is made, so that they share their memory."""
    to_x, to_e, to_weight = to
    to_weight += product((e.T.contiguous().unsqueeze(1) * x.T.contiguous()).flatten(0, 1), gradient.T)
    to_products = product(gradient, weight.T).view(len(x), e.shape[1], x.shape[1])  # (R, F, H)
    torch.bmm(e.unsqueeze(1), to_products, out=to_x.unsqueeze(1))
    torch.bmm(to_products, x.unsqueeze(2), out=to_e.unsqueeze(2))


def _products(x: Tensor, e: Tensor) -> Tensor:
    """(R, H), (R, F) -> (R, F·H), as matrix products of one column and one row: faster than a broadcast."""
    return torch.bmm(e.unsqueeze(2), x.unsqueeze(1)).flatten(1)


class _CIN(nn.Module):
    """The compressed interaction network: vectors [B, F, D] -> pooled maps [B, out_features]."""

    def __init__(self, fields: int, maps: Sequence[int], split_half: bool) -> None:
        super().__init__()
        if not maps or min(maps) < 1 or (split_half and any(m % 2 for m in maps[:-1])):
            raise ValueError(
                f"feature_maps are positive, and even but for the last with split_half, received {tuple(maps)}"
            )
        self.filters = nn.ParameterList()
        self.shown = [m // 2 if split_half else m for m in maps[:-1]] + [maps[-1]]  # maps that go out of each layer
        self.out_features = sum(self.shown)
        before = fields
        for size, shown in zip(maps, self.shown, strict=True):
            weight = nn.Parameter(torch.empty(size, fields * before))
            nn.init.xavier_uniform_(weight)
            self.filters.append(weight)
            before = shown  # as many go on to the next layer, the other half with split_half

    def forward(self, e: Float[Tensor, "B F D"]) -> Float[Tensor, "B P"]:
        size, fields, dim = e.shape
        start = e.transpose(1, 2).reshape(size * dim, fields)  # (B·D, F): each component of the vectors is a row
        x, pooled = start, []
        for weight, shown in zip(self.filters, self.shown, strict=True):
            x = out = self._compress(x, start, weight)  # (B·D, H)   Eq. (6)
            if shown < len(weight):
                x, out = torch.split(out, shown, dim=1)
            pooled.append(out.view(size, dim, shown).sum(1))  # (B, H)   Eq. (8)
        return torch.cat(pooled, dim=1)

    @staticmethod
    def _compress(x: Tensor, e: Tensor, weight: Tensor) -> Tensor:
        if torch.compiler.is_exporting():  # chunks would fix the batch size of the graph
            return linear(_products(x, e), weight)
        out: Tensor = _Compress.apply(x, e, weight)  # type: ignore[no-untyped-call]
        return out


@keeps_config
class XDeepFM(nn.Module):
    """Logit of a click from first-order weights, CIN and an MLP over one table.

    `feature_maps`: maps H_k of each CIN layer. `hidden=()` leaves the MLP out.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        embedding_dim: int = 10,
        feature_maps: Sequence[int] = (100, 100, 50),
        split_half: bool = False,
        hidden: Sequence[int] = (400, 400),
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.embedding = FieldEmbedding(spec, embedding_dim, linear=True)
        self.cin = _CIN(self.embedding.output_fields, feature_maps, split_half)
        self.top = MLP(self.cin.out_features, (1,))
        in_features = self.embedding.output_fields * embedding_dim
        self.deep = MLP(in_features, (*hidden, 1), dropout=dropout, batch_norm=batch_norm) if hidden else None

    def forward(self, batch: Batch) -> Float[Tensor, "B"]:
        """Logits [B] from `ids` and `numbers`."""
        first_order, e = self.embedding.with_linear(batch)  # (B,), (B, F, D)
        logit: Tensor = first_order + self.top(self.cin(e)).squeeze(1)  # (B,)
        if self.deep is not None:
            logit = logit + self.deep(e.flatten(1)).squeeze(1)
        return logit  # Eq. (10)
