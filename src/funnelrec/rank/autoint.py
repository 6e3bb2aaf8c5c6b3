"""AutoInt — fields that attend to one another.

Paper: Song, Shi, Xiao, Duan, Xu, Zhang, Tang. AutoInt: Automatic Feature Interaction Learning via Self-Attentive
       Neural Networks. CIKM 2019. arXiv:1810.11921
Idea:  a field combines with the fields that matter to it, which self-attention finds; each layer adds one order, and a
       residual keeps the lower ones.

Eq. (5)  α_mk = softmax_k ⟨W_Q e_m, W_K e_k⟩, for each head, unscaled            _Interact
Eq. (6)  ẽ_m = Σ_k α_mk W_V e_k                                                 _Interact
Eq. (7)  heads side by side                                                     _Interact
Eq. (8)  e'_m = ReLU(ẽ_m + W_Res e_m)                                           _Interact
Eq. (9)  logit = wᵀ [e'_1, …, e'_F] + b                                         forward
AutoInt+ adds the logit of an MLP over the same vectors (`hidden`).
Differs: from the authors' code, which scales the scores, puts biases and ReLU on all projections and normalises layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from funnelrec.core.batch import Batch
from funnelrec.core.config import keeps_config
from funnelrec.core.nn.embedding import FieldEmbedding
from funnelrec.core.nn.linear import linear
from funnelrec.core.nn.mlp import MLP
from funnelrec.core.schema import Spec

__all__ = ["AutoInt"]


SAFE = 60.0  #: exp of ± this, sums of it and quotients of them stay within the range of float32 and of bfloat16
CHUNK = 2**20  #: scores alive at a time


def _attend(q: Float[Tensor, "N d F"], k: Float[Tensor, "N d F"], v: Float[Tensor, "N d F"]) -> Tensor:
    """v softmax(qᵀ k)ᵀ for N pairs of example and head. Fused attention is slower for so few fields and narrow heads.

    The fields stand innermost because they are more than the coordinates of a head: what is done number by number then
    runs along them.
    """
    if q.device.type != "cpu" or q.dtype == torch.float16 or torch.compiler.is_exporting():
        return v @ torch.softmax(q.mT @ k, dim=-1).mT
    out: Tensor = _Attend.apply(q, k, v)  # type: ignore[no-untyped-call]
    return out


class _Attend(torch.autograd.Function):
    """out = v softmax(qᵀ k)ᵀ, all of them [N, d, F], on CPU.

    A softmax over rows as short as the fields costs more there than both products. So only exp is taken, and the
    products do its sums, forward with a row of ones below v: [out · s; s] = [v; 1] exp(qᵀ k)ᵀ; and backward, where the
    gradient of the scores is p ∘ (gᵀ v − g·out) / s = p ∘ ([g; −g·out] / s)ᵀ [v; 1] with p = exp(qᵀ k). Scores are
    made chunk by chunk inside the cache, forward and again backward (the same bits, or p and s would not fit), and
    never kept. What all v of an example have in common is put aside meanwhile: rounded to bfloat16 it would hide what
    they differ in.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mean = v.mean(2, keepdim=True)
        v = F.pad(v - mean, (0, 0, 0, 1), value=1.0)  # (N, d + 1, F)
        sums = torch.empty_like(v)
        for part in _chunks(q):
            torch.bmm(v[part], _exponentials(q[part], k[part]).mT, out=sums[part])
        total = sums[:, -1:].to(torch.promote_types(q.dtype, torch.float32))
        out = sums[:, :-1] / total
        ctx.save_for_backward(q, k, v, out, total)
        return (out + mean).to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, total = ctx.saved_tensors
        g = gradient.to(total.dtype)
        g = torch.cat([g, -(g * out).sum(1, keepdim=True)], dim=1).div_(total).to(q.dtype)  # (N, d + 1, F)
        scaled = g[:, :-1].contiguous()
        to_q, to_k, to_v = (torch.empty_like(x) for x in (q, k, scaled))
        for part in _chunks(q):
            p = _exponentials(q[part], k[part])
            torch.bmm(scaled[part], p, out=to_v[part])
            p *= torch.bmm(g[part].mT, v[part])
            torch.bmm(k[part], p.mT, out=to_q[part])
            torch.bmm(q[part], p, out=to_k[part])
        return to_q, to_k, to_v


def _chunks(q: Tensor) -> list[slice]:
    step = max(1, CHUNK // q.shape[2] ** 2)
    return [slice(start, start + step) for start in range(0, len(q), step)]


def _exponentials(q: Tensor, k: Tensor) -> Tensor:
    """exp(qᵀ k) up to a factor of each row, [N, F, F]."""
    scores = torch.bmm(q.mT, k)
    low, high = torch.aminmax(scores)
    if not (low > -SAFE and high < SAFE):
        scores -= scores.amax(-1, keepdim=True)
    return scores.exp_()


class _Interact(nn.Module):
    """One interacting layer: vectors of width D in, of width H · head_dim out."""

    def __init__(self, dim: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.project = nn.Parameter(torch.empty(4, num_heads * head_dim, dim))  # W_Q, W_K, W_V, W_Res
        for weight in self.project:
            nn.init.xavier_uniform_(weight)

    def forward(self, e: Float[Tensor, "B F D"]) -> Float[Tensor, "B F E"]:
        heads = (self.num_heads, self.project.shape[1] // self.num_heads)  # (H, d)
        to_attend, to_residual = torch.split(self.project, [3, 1])
        projected = linear(e, to_attend.flatten(0, 1)).view(*e.shape[:2], 3, *heads)
        q, k, v = projected.permute(2, 3, 0, 4, 1).contiguous()  # (H, B, d, F) each
        combined = _attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)).view(q.shape)  # Eq. (5)-(6)
        side_by_side = combined.permute(1, 3, 0, 2).flatten(2)  # (B, F, E)   Eq. (7)
        return torch.relu(side_by_side + linear(e, to_residual[0]))  # Eq. (8)


@keeps_config
class AutoInt(nn.Module):
    """Logit of a click from `num_layers` interacting layers; with `hidden` it is AutoInt+.

    `first_order` adds a weight of each value, the wide part that the authors' code has as an option.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        embedding_dim: int = 16,
        num_layers: int = 3,
        num_heads: int = 2,
        head_dim: int = 32,
        first_order: bool = False,
        hidden: Sequence[int] = (),
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        if min(num_layers, num_heads, head_dim) < 1:
            raise ValueError(
                f"num_layers, num_heads and head_dim are at least 1, received {num_layers}, {num_heads} and {head_dim}"
            )
        self.first_order = first_order
        self.embedding = FieldEmbedding(spec, embedding_dim, linear=first_order)
        fields, width = self.embedding.output_fields, num_heads * head_dim
        widths = [embedding_dim] + [width] * (num_layers - 1)
        self.layers = nn.ModuleList(_Interact(dim, num_heads, head_dim) for dim in widths)
        self.top = MLP(fields * width, (1,))
        self.deep = (
            MLP(fields * embedding_dim, (*hidden, 1), dropout=dropout, batch_norm=batch_norm) if hidden else None
        )

    def forward(self, batch: Batch) -> Float[Tensor, "B"]:
        """Logits [B] from `ids` and `numbers`."""
        first, e = self.embedding.with_linear(batch) if self.first_order else (None, self.embedding(batch))
        x = e  # (B, F, D)
        for layer in self.layers:
            x = layer(x)
        logit: Tensor = self.top(x.flatten(1)).squeeze(1)  # (B,)   Eq. (9)
        if first is not None:
            logit = logit + first
        if self.deep is not None:
            logit = logit + self.deep(e.flatten(1)).squeeze(1)
        return logit
