"""Gated recurrence over histories, with an optional attention that steers how much each step may change the state.

The projections of the inputs are one matrix product before the loop, the gradients of the recurrent weights one after
it; only what truly depends on the state before stays in the loop over time, forwards and backwards.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["GRU", "Evolution"]

Evolution = Literal["gru", "aigru", "agru", "augru"]


class _Recurrence(torch.autograd.Function):
    """h_t = h_{t-1} + w_t (c_t - h_{t-1}), c_t = tanh(x^c_t + r_t ∘ (U_c h_{t-1})), w_t = s_t u_t, or s_t without u.

    x [L, B, G·E] are the projected inputs in the order r, (u,) c; s [L, B] is the share of each step, 0 at padding;
    U [G·E, E]. Gives all states [L, B, E]. G is 3 with the update gate u and 2 without.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: Tensor, recurrent: Tensor) -> Tensor:
        length, size, width = x.shape
        dim = recurrent.shape[1]
        gates = x.new_empty(length, size, width)  # after the loop: r, (u,) c
        inner = x.new_empty(length, size, dim)  # U_c h
        states = x.new_zeros(length + 1, size, dim)
        updates = width > 2 * dim
        for t in range(length):
            before = states[t]
            from_state = before @ recurrent.T  # (B, G·E)
            torch.add(x[t, :, :-dim], from_state[:, :-dim], out=gates[t, :, :-dim]).sigmoid_()
            inner[t] = from_state[:, -dim:]
            torch.addcmul(x[t, :, -dim:], gates[t, :, :dim], inner[t], out=gates[t, :, -dim:]).tanh_()
            weight = share[t].unsqueeze(1)
            if updates:
                weight = weight * gates[t, :, dim : 2 * dim]
            torch.addcmul(before, weight, gates[t, :, -dim:] - before, out=states[t + 1])
        ctx.save_for_backward(share, recurrent, gates, inner, states)
        return states[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        share, recurrent, gates, inner, states = ctx.saved_tensors
        length, size, width = gates.shape
        dim = recurrent.shape[1]
        updates = width > 2 * dim
        to_inputs = torch.empty_like(gates)  # gradients before the gates' activations
        to_states = torch.empty_like(gates)  # the same, but that of U_c h is behind r
        to_share = torch.empty_like(share)
        grad = states.new_zeros(size, dim)  # of h_t
        for t in range(length - 1, -1, -1):
            grad = grad + outer[t]
            before, r, c, s = states[t], gates[t, :, :dim], gates[t, :, -dim:], share[t].unsqueeze(1)
            moved = grad * (c - before)  # of w_t
            weight = s
            if updates:
                u = gates[t, :, dim : 2 * dim]
                weight = s * u
                to_share[t] = (moved * u).sum(1)
                torch.mul(moved * s, u * (1 - u), out=to_inputs[t, :, dim : 2 * dim])
            else:
                to_share[t] = moved.sum(1)
            of_c = torch.mul(grad * weight, 1 - c * c, out=to_inputs[t, :, -dim:])
            torch.mul(of_c * inner[t], r * (1 - r), out=to_inputs[t, :, :dim])
            to_states[t, :, :-dim] = to_inputs[t, :, :-dim]
            torch.mul(of_c, r, out=to_states[t, :, -dim:])
            grad = torch.addmm(grad * (1 - weight), to_states[t], recurrent)
        to_recurrent = to_states.flatten(0, 1).T @ states[:-1].flatten(0, 1)  # (G·E, E)
        return to_inputs, to_share, to_recurrent


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
        self.input = nn.Linear(in_features, gates * out_features)  # r, (u,) c
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
        if (attention is None) != (self.kind == "gru"):
            raise ValueError(
                f"a recurrence of kind '{self.kind}' {'takes no' if self.kind == 'gru' else 'needs an'} attention"
            )
        if attention is not None and self.kind == "aigru":
            x, attention = x * attention.unsqueeze(-1), None
        share = mask.to(x.dtype) if attention is None else attention.masked_fill(~mask, 0.0)  # (B, L)
        projected = self.input(x.transpose(0, 1).contiguous())  # (L, B, G·E), time first: a step is one block of memory
        projected, share = projected.to(self.recurrent.dtype), share.to(self.recurrent.dtype).T.contiguous()
        with torch.autocast(x.device.type, enabled=False):  # errors add up over the steps: the state stays in float32
            states: Tensor = _Recurrence.apply(projected, share, self.recurrent)  # type: ignore[no-untyped-call]
        return states.transpose(0, 1)  # (B, L, E)
