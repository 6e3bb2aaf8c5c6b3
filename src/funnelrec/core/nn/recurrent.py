"""Gated recurrence over histories, with an optional attention that steers how much each step may change the state.

The loop over time and its gradient are written by hand: a step is a block of [features, examples], which stays in the
cache from one operation to the next, and holds only those whose history has begun (core/nn/packed.py, Steps).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from funnelrec.core.nn.linear import Linear, linear
from funnelrec.core.nn.packed import Steps, steps

__all__ = ["GRU", "Evolution"]

Evolution = Literal["gru", "aigru", "agru", "augru"]

sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
tanh_backward = torch.ops.aten.tanh_backward.grad_input


def _tanh_(x: Tensor) -> Tensor:
    """tanh x in place; on CPU in float32 as 2 σ(2x) - 1, to 2e-7 and five times as fast as torch's own."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return x.tanh_()
    return x.mul_(2).sigmoid_().mul_(2).sub_(1)


class _Recurrence(torch.autograd.Function):
    """h_t = h_{t-1} + w_t (c_t - h_{t-1}), c_t = tanh(W_c x_t + b_c + r_t ∘ (U_c h_{t-1})), w_t = s_t u_t or s_t.

    x [T, D] are the inputs; W [G·E, D], b [G·E] and U [G·E, E] have the gates in the order r, (u,) c; G is 3 with the
    update gate u and 2 without. s [T] is the share of each step. T counts the items step after step, and step t has the
    first `begun[t]` examples, whose number never falls. Gives all states [T, E].
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, share: Tensor, weight: Tensor, bias: Tensor, recurrent: Tensor, begun: list[int]
    ) -> Tensor:
        width, dim = recurrent.shape
        states = x.new_empty(x.shape[0], dim)
        to_gates, to_candidate, bias = recurrent[:-dim], recurrent[-dim:], bias.unsqueeze(1)
        kept, last, stop = [], x.new_empty(dim, 0), 0
        for n in begun:
            start, stop = stop, stop + n
            s = share[start:stop]
            gate = torch.addmm(bias, weight, x[start:stop].T)  # (G·E, n); those of all steps at once leave the cache
            fresh = n - last.shape[1]  # who begins begins at zero
            before = torch.cat([last, x.new_zeros(dim, fresh)], 1) if fresh else last
            c = gate[-dim:]
            gate[:-dim].addmm_(to_gates, before).sigmoid_()
            _tanh_(c.addcmul_(gate[:dim], to_candidate @ before))
            last = torch.lerp(before, c, s * gate[dim : 2 * dim] if width > 2 * dim else s.expand_as(c))
            states[start:stop] = last.T
            kept += [gate, before]
        ctx.save_for_backward(x, share, weight, recurrent, *kept)
        ctx.begun = begun
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, None]:
        x, share, weight, recurrent, *kept = ctx.saved_tensors
        width, dim = recurrent.shape
        to_x, to_share, to_weight, to_recurrent = (torch.zeros_like(z) for z in (x, share, weight, recurrent))
        to_bias = outer.new_zeros(width)
        transposed, of_candidate = recurrent.T.contiguous(), recurrent[-dim:]
        grad = outer.new_zeros(dim, ctx.begun[-1] if ctx.begun else 0)  # of h_t
        stop = len(x)
        for t in range(len(ctx.begun) - 1, -1, -1):
            n, gate, before = ctx.begun[t], kept[2 * t], kept[2 * t + 1]
            here = slice(stop - n, stop)
            stop, s = stop - n, share[here]
            grad = grad[:, :n] + outer[here].T
            to_gate = torch.empty_like(gate)  # before the activations
            r, c, share_of_c = gate[:dim], gate[-dim:], s
            moved = (c - before).mul_(grad)  # of w_t
            if width > 2 * dim:
                u = gate[dim : 2 * dim]
                share_of_c = s * u
                if ctx.needs_input_grad[1]:
                    to_share[here] = (moved * u).sum(0)
                sigmoid_backward(moved.mul_(s), u, grad_input=to_gate[dim : 2 * dim])
            elif ctx.needs_input_grad[1]:
                to_share[here] = moved.sum(0)
            passed = grad * share_of_c
            of_c = tanh_backward(passed, c, grad_input=to_gate[-dim:])
            inner = of_candidate @ before  # U_c h, cheaper to make again than to keep
            sigmoid_backward(inner.mul_(of_c), r, grad_input=to_gate[:dim])
            to_bias += to_gate.sum(1)
            to_weight.addmm_(to_gate, x[here])
            torch.mm(to_gate.T, weight, out=to_x[here])
            to_gate[-dim:].mul_(r)  # U_c h stands behind r
            to_recurrent.addmm_(to_gate, before.T)
            grad = grad.sub_(passed).addmm_(transposed, to_gate)
        return to_x, to_share, to_weight, to_bias, to_recurrent, None


class GRU(nn.Module):
    """A GRU over a padded history; with `attention`, one of the three forms of DIEN (arXiv:1809.03672).

    u = σ(W_u x + U_u h + b_u), r = σ(W_r x + U_r h + b_r), c = tanh(W_c x + r ∘ (U_c h) + b_c), a the attention:

    "gru"    h ← (1 - u) h + u c             no attention
    "aigru"  the same over a·x               attention scales the input
    "agru"   h ← (1 - a) h + a c             attention is the update gate (there is no u)
    "augru"  h ← (1 - a u) h + a u c         attention scales the update gate

    u is the share that is written, as in the paper; in torch's GRU the gate z is the share that is kept. At padding,
    wherever it stands, the state stays as it is; it starts at zero. Can be differentiated once.
    """

    def __init__(self, in_features: int, out_features: int, *, kind: Evolution = "gru") -> None:
        super().__init__()
        if kind not in ("gru", "aigru", "agru", "augru"):
            raise ValueError(f"kind must be one of gru, aigru, agru, augru, received {kind!r}")
        self.kind = kind
        gates = 2 if kind == "agru" else 3
        self.input = Linear(in_features, gates * out_features)  # r, (u,) c
        self.recurrent = nn.Parameter(torch.empty(gates * out_features, out_features))
        nn.init.zeros_(self.input.bias)
        with torch.no_grad():  # each gate is a matrix of its own
            for gate in range(gates):
                rows = slice(gate * out_features, (gate + 1) * out_features)
                nn.init.xavier_uniform_(self.input.weight[rows])
                nn.init.orthogonal_(self.recurrent[rows])

    def forward(
        self, x: Float[Tensor, "B L D"], mask: Bool[Tensor, "B L"], attention: Float[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B L E"]:
        """The state after each position; the last one, [:, -1], is the state after the whole history."""
        rows = steps(mask)
        return rows.grid(self.over(rows.take(x), rows, None if attention is None else rows.take(attention)))

    def over(
        self, x: Float[Tensor, "T D"], rows: Steps, attention: Float[Tensor, "T"] | None = None
    ) -> Float[Tensor, "T E"]:
        """The state after each item, for items that stand step after step."""
        if (attention is None) != (self.kind == "gru"):
            raise ValueError(
                f"a recurrence of kind '{self.kind}' {'takes no' if self.kind == 'gru' else 'needs an'} attention"
            )
        if attention is not None and self.kind == "aigru":
            x, attention = x * attention.unsqueeze(-1), None
        with torch.autocast(x.device.type, enabled=False):  # errors add up over the steps: the state stays in float32
            dtype = self.recurrent.dtype
            real = rows.real.to(dtype)
            share = real if attention is None else attention.to(dtype) * real
            weights = (self.input.weight, self.input.bias, self.recurrent)
            states: Tensor = _Recurrence.apply(x.to(dtype), share, *weights, rows.begun)  # type: ignore[no-untyped-call]
            return states

    def step(self, x: Float[Tensor, "B D"], state: Float[Tensor, "B E"]) -> Float[Tensor, "B E"]:
        """The state after one more input, for those who carry states themselves; `kind` "gru" alone has it."""
        if self.kind != "gru":
            raise ValueError(f"only a recurrence of kind 'gru' goes step by step, this one is '{self.kind}'")
        dim = state.shape[1]
        gates, candidate = torch.split(self.input(x), [2 * dim, dim], dim=1)
        from_state, from_candidate = torch.split(linear(state, self.recurrent), [2 * dim, dim], dim=1)
        reset, update = torch.sigmoid(gates + from_state).chunk(2, dim=1)
        return torch.lerp(state, torch.tanh(candidate + reset * from_candidate).to(state.dtype), update.to(state.dtype))
