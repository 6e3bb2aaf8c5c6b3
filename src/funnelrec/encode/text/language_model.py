"""A language model that reads one token after the other: RNN, LSTM or GRU with tied weights and locked dropout.

Paper: Mikolov et al. Recurrent neural network based language model. Interspeech 2010 · Hochreiter, Schmidhuber. Long
       short-term memory. 1997 · Cho et al. 2014. arXiv:1406.1078 · Gal, Ghahramani. Dropout in recurrent neural
       networks. 2016. arXiv:1512.05287 · Press, Wolf. Using the output embedding. 2017. arXiv:1608.05859
Idea:  a state that has read everything so far says what comes next; a token means the same where it is read and where
       it is foretold, so one table serves both.

Eq. (1)  x_t = m ∘ E[w_t]                       one mask m a text, the same at all times      _locked
Eq. (2)  rnn   h_t = tanh(W x_t + U h_{t-1} + b)
         lstm  c_t = f ∘ c_{t-1} + i ∘ g,  h_t = o ∘ tanh(c_t)                                torch's fused layers
         gru   h_t = (1 - z) ∘ n + z ∘ h_{t-1},  n = tanh(W x_t + b + r ∘ (U h_{t-1} + b'))
Eq. (3)  p(w_{t+1} | w_1 … w_t) = softmax(E P h_t + b)   P only where h is of another width    score
Eq. (4)  perplexity = exp(- mean over tokens of log p)                                        perplexity
Eq. (5)  training cuts the sum of gradients after a window; the state goes on                 Carried, StreamExamples
Differs: locked dropout stands at the inputs, between layers and at the outputs, not inside the recurrence (that would
    need a loop in Python); the forget gate's bias begins at 1 (Jozefowicz et al. 2015). Padding may stand on the right:
    no state before it knows of it.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.core.config import keeps_config
from funnelrec.core.nn.linear import Linear
from funnelrec.core.shapes import PADDING

__all__ = ["LanguageModel"]

CELLS: dict[str, type[nn.RNN | nn.LSTM | nn.GRU]] = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
State = Float[Tensor, "S layers B H"]  # S is 2 for an LSTM (h, c), else 1


class StreamExamples:
    """One long text as `columns` texts side by side, cut into windows: for `Batches(stream, columns)`, not shuffled.

    Batch k holds window k of every column: `text` and the next token int64 [columns, window], the latter as `label` for
    a CrossEntropy and as `target` for a softmax over a sample, and `fresh` [columns], True where a text begins. What
    does not fill a window of all columns at the end is left out.
    """

    def __init__(self, rows: Int[Tensor, "T"], columns: int, window: int) -> None:
        self.windows = (len(rows) - 1) // (columns * window) if columns > 0 and window > 0 else 0
        if self.windows < 1:
            raise ValueError(
                f"{len(rows)} tokens do not fill {columns} columns of one window of {window} and a last target; "
                "use fewer columns or a smaller window"
            )
        self.columns, self.window = columns, window
        length = self.windows * window
        self._text = rows[: columns * length].view(columns, self.windows, window)
        self._next = rows[1 : columns * length + 1].view(columns, self.windows, window)

    def __len__(self) -> int:
        return self.columns * self.windows

    def gather(self, index: Int[Tensor, "B"], generator: torch.Generator | None) -> Batch:
        """Example k · columns + b is window k of column b."""
        column, window = index % self.columns, index // self.columns
        following = self._next[column, window]
        return Batch(text=self._text[column, window], label=following, target=following, fresh=window == 0)


class Carried(nn.Module):
    """The model in training over a stream: each batch begins with the state in which the one before ended (Eq. (5)).

    The state is a buffer, so a checkpoint holds it and a resumed run goes on to the bit. `CrossEntropy` asks for the
    logits; `SampledSoftmax`, many times as fast where the vocabulary is large, for the vectors and for some rows.
    """

    state: Tensor

    def __init__(self, model: LanguageModel, columns: int) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("state", model.start(columns))

    def forward(self, batch: Batch) -> Float[Tensor, "B T V"]:
        """Logits of what follows each token."""
        return self.model.score(self._read(batch))

    def encode_positions(self, batch: Batch) -> Float[Tensor, "B T D"]:
        """What the rows of `encode_items` are multiplied with: P h_t, and 1 for their bias."""
        hidden = self.model.project(self._read(batch))
        return torch.cat([hidden, hidden.new_ones(*hidden.shape[:2], 1)], 2)

    def encode_items(self, rows: Int[Tensor, "N"]) -> Float[Tensor, "N D"]:
        """The output rows of some tokens, with their bias."""
        out = self.model.out
        return torch.cat([F.embedding(rows, out.weight), out.bias[rows].unsqueeze(1)], 1)

    def _read(self, batch: Batch) -> Tensor:
        begin = self.state.masked_fill(batch.fresh.view(1, 1, -1, 1), 0.0)  # a copy, no gradient beyond the window
        hidden, state = self.model.read(batch.text, begin)
        self.state.copy_(state.detach())
        return hidden


@keeps_config
class LanguageModel(nn.Module):
    """`num_tokens` V; `cell` rnn, lstm or gru of `hidden_dim` units, `num_layers` of them; `tied`: one table reads and
    foretells; `dropout` at inputs, between layers and at outputs; `token_dropout`: share of the tokens of the
    vocabulary that a batch does not see, wherever they stand.
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        cell: str = "lstm",
        embedding_dim: int = 256,
        hidden_dim: int = 256,
        num_layers: int = 2,
        dropout: int | float = 0.3,
        token_dropout: int | float = 0.0,
        tied: bool = True,
    ) -> None:
        super().__init__()
        if cell not in CELLS:
            raise ValueError(f"cell must be one of {', '.join(CELLS)}, received {cell!r}")
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, received {num_layers}")
        self.dropout, self.token_dropout, self.hidden_dim = dropout, token_dropout, hidden_dim
        self.num_features = hidden_dim
        self.table = nn.Embedding(num_tokens, embedding_dim)
        widths = [embedding_dim] + [hidden_dim] * num_layers
        self.layers = nn.ModuleList(CELLS[cell](i, o) for i, o in pairwise(widths))
        self.project = Linear(hidden_dim, embedding_dim) if tied and hidden_dim != embedding_dim else nn.Identity()
        self.out = Linear(embedding_dim if tied else hidden_dim, num_tokens)
        if tied:
            self.out.weight = self.table.weight
        self.states = 2 if cell == "lstm" else 1
        self._begin()

    @torch.no_grad()
    def _begin(self) -> None:
        nn.init.uniform_(self.table.weight, -0.1, 0.1)
        nn.init.uniform_(self.out.weight, -0.1, 0.1)
        nn.init.zeros_(self.out.bias)
        for layer in self.layers:
            for name, parameter in layer.named_parameters():
                if "weight_hh" in name:
                    for gate in torch.split(parameter, self.hidden_dim):
                        nn.init.orthogonal_(gate)
                elif "bias" in name:
                    nn.init.zeros_(parameter)
                    if self.states == 2 and "bias_ih" in name:
                        parameter[self.hidden_dim : 2 * self.hidden_dim] = 1.0  # the forget gate; bias_hh stays at 0

    def start(self, size: int) -> State:
        """The state of `size` texts of which nothing has been read."""
        return self.table.weight.new_zeros(self.states, len(self.layers), size, self.hidden_dim)

    def read(self, content: Int[Tensor, "B T"], state: State | None = None) -> tuple[Float[Tensor, "B T H"], State]:
        """The last layer's output after each token, and the state after all."""
        state = self.start(len(content)) if state is None else state
        x = self._locked(self._look_up(content.T))  # (T, B, D)   Eq. (1)
        ends = []
        for number, layer in enumerate(self.layers):
            before = state[:, number : number + 1].contiguous()  # (S, 1, B, H)
            x, end = layer(x, tuple(before) if self.states == 2 else before[0])  # (T, B, H)   Eq. (2)
            ends.append(torch.stack(end) if self.states == 2 else end.unsqueeze(0))
            x = self._locked(x)
        return x.transpose(0, 1), torch.cat(ends, 1).to(state.dtype)

    def forward(self, content: Int[Tensor, "B T"], state: State | None = None) -> tuple[Float[Tensor, "B T V"], State]:
        """Logits of what follows each token, and the state after the last."""
        hidden, state = self.read(content, state)
        return self.score(hidden), state

    def score(self, hidden: Float[Tensor, "B T H"]) -> Float[Tensor, "B T V"]:
        """Logits of what follows, from the output of the last layer."""
        logits: Tensor = self.out(self.project(hidden))  # (B, T, V)   Eq. (3)
        return logits

    def encode(self, content: Int[Tensor, "B L"]) -> Float[Tensor, "B D"]:
        """A text as the mean of what was read after each of its tokens."""
        mask = (content != PADDING).unsqueeze(2)
        return (self.read(content)[0] * mask).sum(1) / mask.sum(1).clamp(min=1)

    @torch.no_grad()
    def perplexity(self, rows: Int[Tensor, "T"], *, columns: int = 1, window: int = 512) -> float:
        """exp(- mean log p) of every token but the first, each after all before it (Eq. (4)).

        `columns` texts are read side by side, which is faster; each but the first then forgets what was before it.
        Training mode, dropout that is, is off meanwhile.
        """
        if len(rows) <= columns:
            raise ValueError(f"perplexity in {columns} columns needs more than {columns} tokens, received {len(rows)}")
        was_training, total = self.training, 0.0
        self.eval()
        length = math.ceil((len(rows) - 1) / columns)
        text = torch.full((columns * length,), PADDING, device=rows.device)
        goal = torch.full_like(text, -1)
        text[: len(rows) - 1], goal[: len(rows) - 1] = rows[:-1], rows[1:]
        state = self.start(columns)
        windows = (torch.split(rows.view(columns, -1), window, dim=1) for rows in (text, goal))
        for x, y in zip(*windows, strict=True):
            logits, state = self(x, state)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), ignore_index=-1, reduction="sum")
            total += float(loss.double())
        self.train(was_training)
        return math.exp(total / (len(rows) - 1))

    @torch.no_grad()
    def sample(
        self,
        begin: Int[Tensor, "B L"],
        length: int,
        generator: torch.Generator | None = None,
        *,
        temperature: int | float = 1.0,
        top: int | None = None,
    ) -> Int[Tensor, "B T"]:
        """`length` tokens after `begin` (no padding in it), drawn by p^(1 / temperature) among the `top` likeliest.

        Padding and the unknown are never written.
        """
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, received {temperature}; small values write the likeliest")
        was_training, written = self.training, []
        self.eval()
        logits, state = self(begin)
        for _ in range(length):
            scores = logits[:, -1].float() / temperature
            scores[:, :2] = -torch.inf
            if top is not None:
                scores[scores < scores.topk(min(top, scores.shape[1])).values[:, -1:]] = -torch.inf
            token = torch.multinomial(scores.softmax(1), 1, generator=generator)
            written.append(token)
            logits, state = self(token, state)
        self.train(was_training)
        return torch.cat(written, 1) if written else begin[:, :0]

    def _look_up(self, content: Tensor) -> Tensor:
        x: Tensor = self.table(content)
        if not (self.training and self.token_dropout):
            return x
        kept: Bool[Tensor, "V"] = torch.rand(len(self.table.weight), device=x.device) >= self.token_dropout
        return x * kept[content].unsqueeze(-1) / (1 - self.token_dropout)

    def _locked(self, x: Tensor) -> Tensor:
        """Dropout with one mask for all times: x is [T, B, D]."""
        if not (self.training and self.dropout):
            return x
        kept = torch.rand(1, *x.shape[1:], device=x.device) >= self.dropout
        return x * (kept / (1 - self.dropout)).to(x.dtype)
