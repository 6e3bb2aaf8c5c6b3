"""A recurrent reader in one or both directions: RNN, LSTM or GRU, six ways to join the directions, layers that add.

Paper: Schuster, Paliwal. Bidirectional recurrent neural networks. 1997 · Graves, Schmidhuber. Framewise phoneme
       classification with bidirectional LSTM. 2005 · residual layers: Wu et al. 2016. arXiv:1609.08144, Eq. (5)-(6)
Idea:  what a word means depends on what stands before it and on what follows; two readers meet at each word.

Eq. (1)  f_t = cell(x_t, f_{t-1}),  g_t = cell'(x_t, g_{t+1})                       _Layer
Eq. (2)  m_t = [f; g], f + g, (f + g) / 2, f ∘ g, f alone or g alone                MERGES
Eq. (3)  x^{l+1}_t = x^l_t + drop(m^l_t)         with `residual`, else drop(m^l_t)   encode
Eq. (4)  v = [last f; last g], mean or maximum of the m_t over the words             encode
Eq. (5)  y = A v + b                                                                forward
Differs: the reader from behind reads each text turned round within its own length, so padding, which stands on the
    right, is never read before a word and no state depends on it. The forget gate's bias begins at 1. Where `residual`
    meets another width (the first layer), the input goes through a matrix.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from funnelrec.core.config import keeps_config
from funnelrec.core.nn.pooling import masked_max, masked_mean
from funnelrec.core.shapes import PADDING
from funnelrec.encode.text.classifier import token_table

__all__ = ["TextRNN"]

CELLS: dict[str, type[nn.RNN | nn.LSTM | nn.GRU]] = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
MERGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "concat": lambda f, g: torch.cat([f, g], -1),
    "sum": lambda f, g: f + g,
    "average": lambda f, g: (f + g) / 2,
    "multiply": lambda f, g: f * g,
    "forward": lambda f, g: f,
    "backward": lambda f, g: g,
}


class _Layer(nn.Module):
    """One or two readers and how their states are joined: [B, L, D] -> [B, L, M]."""

    def __init__(self, cell: str, in_features: int, hidden_dim: int, merge: str) -> None:
        super().__init__()
        self.merge = MERGES[merge]
        self.ahead = None if merge == "backward" else _reader(cell, in_features, hidden_dim)
        self.behind = None if merge == "forward" else _reader(cell, in_features, hidden_dim)

    def forward(self, x: Tensor, turned: Tensor) -> Tensor:
        """`turned` [B, L] is the place of each word in the text turned round; it is its own inverse."""
        f = x if self.ahead is None else self.ahead(x)[0]
        g = f if self.behind is None else _take(self.behind(_take(x, turned))[0], turned)
        return self.merge(g if self.ahead is None else f, g)  # (B, L, M)   Eq. (1)-(2)


def _reader(cell: str, in_features: int, hidden_dim: int) -> nn.RNN | nn.LSTM | nn.GRU:
    reader = CELLS[cell](in_features, hidden_dim, batch_first=True)
    with torch.no_grad():
        for name, parameter in reader.named_parameters():
            if name.startswith("weight_hh"):
                for gate in torch.split(parameter, hidden_dim):
                    nn.init.orthogonal_(gate)
            elif name.startswith("weight_ih"):
                for gate in torch.split(parameter, hidden_dim):
                    nn.init.xavier_uniform_(gate)
            else:
                nn.init.zeros_(parameter)
                if cell == "lstm" and name.startswith("bias_ih"):
                    parameter[hidden_dim : 2 * hidden_dim] = 1.0  # the forget gate
    return reader


def _take(x: Tensor, places: Tensor) -> Tensor:
    return x.gather(1, places.unsqueeze(2).expand(-1, -1, x.shape[2]))


@keeps_config
class TextRNN(nn.Module):
    """Rows [B, L], 0 at padding on the right, to `num_classes` logits, or to the vector [B, M] without classes.

    M is 2 · hidden_dim for `merge` "concat", else hidden_dim. `pooling`: "last" (the state of each reader after its
    last word, joined by `merge`; the mean of the two for "multiply"), "mean" or "max" over the words.
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        num_classes: int = 2,
        embedding_dim: int = 100,
        cell: str = "lstm",
        hidden_dim: int = 100,
        num_layers: int = 1,
        merge: str = "concat",
        residual: bool = False,
        pooling: str = "mean",
        dropout: int | float = 0.5,
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("cell", cell, tuple(CELLS)),
            ("merge", merge, tuple(MERGES)),
            ("pooling", pooling, ("last", "mean", "max")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, received {value!r}")
        self.merge, self.pooling = merge, pooling
        self.num_features = width = 2 * hidden_dim if merge == "concat" else hidden_dim
        self.table = token_table(num_tokens, embedding_dim)
        inputs = [embedding_dim] + [width] * (num_layers - 1)
        self.layers = nn.ModuleList(_Layer(cell, i, hidden_dim, merge) for i in inputs)
        widen = residual and embedding_dim != width
        self.widen = nn.Linear(embedding_dim, width, bias=False) if widen else nn.Identity()
        self.residual = residual
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(width, num_classes) if num_classes else nn.Identity()

    def states(self, content: Int[Tensor, "B L"]) -> tuple[Float[Tensor, "B L M"], Bool[Tensor, "B L"]]:
        """What the last layer has to say at each word, and where there are words."""
        mask = content != PADDING
        count = mask.sum(1, keepdim=True)
        place = torch.arange(content.shape[1], device=content.device)
        turned = torch.where(place < count, count - 1 - place, place)  # (B, L)
        x = self.dropout(self.table(content))
        for number, layer in enumerate(self.layers):
            m = layer(x, turned)
            if number < len(self.layers) - 1 or self.residual:
                m = self.dropout(m)
            x = (self.widen(x) if number == 0 else x) + m if self.residual else m  # Eq. (3)
        return x, mask

    def encode(self, content: Int[Tensor, "B L"]) -> Float[Tensor, "B M"]:
        """The text as one vector."""
        x, mask = self.states(content)
        if self.pooling == "mean":
            return masked_mean(x, mask)
        if self.pooling == "max":
            return masked_max(x, mask)
        last = (mask.sum(1) - 1).clamp(min=0)
        f, g = x[torch.arange(len(x)), last], x[:, 0]  # (B, M)   Eq. (4)
        if self.merge == "concat":
            half = x.shape[2] // 2
            v = torch.cat([f[:, :half], g[:, half:]], 1)
        else:
            v = {"forward": f, "backward": g}.get(self.merge, (f + g) / 2)
        return v * mask.any(1, keepdim=True)

    def forward(self, content: Int[Tensor, "B L"]) -> Float[Tensor, "B K"]:
        """Logits of the classes."""
        logits: Tensor = self.out(self.dropout(self.encode(content)))  # (B, K)   Eq. (5)
        return logits
