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

from funnelrec.core.nn.linear import Linear, linear, product

__all__ = ["GRU", "Evolution"]

Evolution = Literal["gru", "aigru", "agru", "augru"]


class _Recurrence(torch.autograd.Function):
    """h_t = h_{t-1} + w_t (c_t - h_{t-1}), c_t = tanh(x^c_t + r_t ∘ (U_c h_{t-1})), w_t = s_t u_t, or s_t without u.

    x [L, G·E, B] are the projected inputs in the order r, (u,) c; s [L, B] is the share of each step, 0 at padding;
    U [G·E, E]. Gives all states [L, E, B]. G is 3 with the update gate u and 2 without. The batch stands last, so that
    every gate of a step is one block of memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: Tensor, recurrent: Tensor) -> Tensor:
        length, width, size = x.shape
        dim = recurrent.shape[1]
        gates = x  # the projections are nobody else's: the gates r, (u,) c take their place
        states = x.new_zeros(length + 1, dim, size)
        for t in range(length):
            before, gate, c = states[t], gates[t], gates[t, -dim:]
            from_state = product(recurrent, before.T)  # (G·E, E) @ (E, B)
            gate[:-dim].add_(from_state[:-dim]).sigmoid_()
            c.addcmul_(gate[:dim], from_state[-dim:]).tanh_()
            weight = share[t] * gate[dim : 2 * dim] if width > 2 * dim else share[t]
            torch.addcmul(before, weight, c - before, out=states[t + 1])
        ctx.save_for_backward(share, recurrent, gates.detach(), states)
        return states[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        share, recurrent, gates, states = ctx.saved_tensors
        length, width, size = gates.shape
        dim = recurrent.shape[1]
        to_inputs = torch.empty_like(gates)  # gradients before the gates' activations
        to_state = gates.new_empty(width, size)  # those of one step, but that of U_c h is behind r
        to_share = torch.empty_like(share)
        to_recurrent = torch.zeros_like(recurrent)
        transposed, of_candidate = recurrent.T.contiguous(), recurrent[-dim:]
        grad = states.new_zeros(dim, size)  # of h_t
        for t in range(length - 1, -1, -1):
            grad = grad.add_(outer[t])
            before, gate, s, to_input = states[t], gates[t], share[t], to_inputs[t]
            r, c, weight = gate[:dim], gate[-dim:], s
            moved = (c - before).mul_(grad)  # of w_t
            if width > 2 * dim:
                u = gate[dim : 2 * dim]
                weight = s * u
                to_share[t] = (moved * u).sum(0)
                torch.mul(moved.mul_(s), torch.addcmul(u, u, u, value=-1), out=to_input[dim : 2 * dim])  # σ' = u - u²
            else:
                to_share[t] = moved.sum(0)
            of_c = torch.mul(grad * weight, 1 - c * c, out=to_input[-dim:])
            inner = product(of_candidate, before.T)  # U_c h, cheaper to make again than to keep
            torch.mul(inner.mul_(of_c), torch.addcmul(r, r, r, value=-1), out=to_input[:dim])
            to_state[:-dim] = to_input[:-dim]
            torch.mul(of_c, r, out=to_state[-dim:])
            to_recurrent += product(to_state, before)  # (G·E, B) @ (B, E)
            grad = torch.addcmul(grad, grad, weight, value=-1).add_(product(transposed, to_state.T))
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
        if (attention is None) != (self.kind == "gru"):
            raise ValueError(
                f"a recurrence of kind '{self.kind}' {'takes no' if self.kind == 'gru' else 'needs an'} attention"
            )
        if attention is not None and self.kind == "aigru":
            x, attention = x * attention.unsqueeze(-1), None
        share = mask.to(x.dtype) if attention is None else attention.masked_fill(~mask, 0.0)  # (B, L)
        weight = self.input.weight.expand(x.shape[1], -1, -1)
        projected = torch.baddbmm(self.input.bias.view(1, -1, 1), weight, x.permute(1, 2, 0))  # (L, G·E, B)
        projected, share = projected.to(self.recurrent.dtype), share.to(self.recurrent.dtype).T.contiguous()
        with torch.autocast(x.device.type, enabled=False):  # errors add up over the steps: the state stays in float32
            states: Tensor = _Recurrence.apply(projected, share, self.recurrent)  # type: ignore[no-untyped-call]
        return states.permute(2, 0, 1)  # (L, E, B) -> (B, L, E)

    def step(self, x: Float[Tensor, "B D"], state: Float[Tensor, "B E"]) -> Float[Tensor, "B E"]:
        """The state after one more input, for those who carry states themselves; `kind` "gru" alone has it."""
        if self.kind != "gru":
            raise ValueError(f"only a recurrence of kind 'gru' goes step by step, this one is '{self.kind}'")
        dim = state.shape[1]
        gates, candidate = torch.split(self.input(x), [2 * dim, dim], dim=1)
        from_state, from_candidate = torch.split(linear(state, self.recurrent), [2 * dim, dim], dim=1)
        reset, update = torch.sigmoid(gates + from_state).chunk(2, dim=1)
        return torch.lerp(state, torch.tanh(candidate + reset * from_candidate).to(state.dtype), update.to(state.dtype))
