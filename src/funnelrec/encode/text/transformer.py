"""Transformer — a text becomes another text by attention alone: encoder, decoder, and a step for decoding.

Paper: Vaswani et al. Attention is all you need. NeurIPS 2017. arXiv:1706.03762
Idea:  every position looks at all others at once, so training needs no recurrence and no step waits for another.

Eq. (1)  softmax(Q Kᵀ / √d_k) V, per head        core.nn.attention.MultiHeadAttention
Eq. (2)  FFN(x) = max(0, x W1 + b1) W2 + b2      core.nn.transformer.FeedForward
Eq. (3)  the learning rate                       learn.schedules.Noam
§ 3.4    E √d + PE, one table for all            Transformer._embed, logits
§ 3.5    PE = sin, cos                           core.nn.transformer.sinusoidal_positions
§ 5.4    label smoothing                         learn.text.NextToken
§ 6.1    beam, length penalty, averaging         encode.text.decoding, learn.text.average_weights
Differs:
- pre_norm: LN before each part and one at the end of each stack (what the authors' code came to use) trains without
  warm-up; the paper has LN after each residual (pre_norm=False). In between both train well at three or four layers.
- Attention weights are not dropped out; embeddings, inner activations and residuals are.
- The output has no bias. Padding, the unknown and the first token can never be written.
- Tables start at N(0, 1/D), as the input is multiplied by √D; linear maps Xavier-uniform, biases 0.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.core.config import keeps_config
from funnelrec.core.nn.dropout import Dropout
from funnelrec.core.nn.linear import Linear, to_autocast
from funnelrec.core.nn.transformer import (
    DecoderBlock,
    EncoderBlock,
    causal_bias,
    padding_bias,
    sinusoidal_positions,
)
from funnelrec.core.shapes import PADDING

__all__ = ["Transformer"]


@dataclass(frozen=True)
class _Past:
    """What a decoder has seen, one entry a layer: own keys and values, and those of the source."""

    own: list[tuple[Tensor, Tensor]]
    source: list[tuple[Tensor, Tensor]]
    bias: Tensor | None
    length: int

    def select(self, rows: Int[Tensor, "b"]) -> _Past:
        """The texts at `rows`, which may repeat."""
        own, source = ([(k[rows], v[rows]) for k, v in layers] for layers in (self.own, self.source))
        bias = None if self.bias is None else self.bias[rows]
        return _Past(own, source, bias, self.length)


@keeps_config
class Transformer(nn.Module):
    """`batch.source` [B, S] and `batch.target` [B, T] are rows of vocabularies, 0 at padding, which is on the right.

    A target begins with the token "begin" and ends with "end" (`encode.text.decoding.BEGIN`, `END`). `source_tokens`,
    `target_tokens`: rows of the vocabularies. `tie`: "all" for one table as source, target and output (one
    vocabulary), "target" for one as target and output, "none". `max_len`: longest text.
    """

    def __init__(
        self,
        *,
        source_tokens: int,
        target_tokens: int,
        embedding_dim: int = 512,
        num_layers: int = 6,
        num_heads: int = 8,
        ff_dim: int = 2048,
        dropout: int | float = 0.1,
        pre_norm: bool = False,
        tie: str = "all",
        max_len: int = 512,
    ) -> None:
        super().__init__()
        if tie not in ("all", "target", "none"):
            raise ValueError(f"tie must be 'all', 'target' or 'none', received {tie!r}")
        if tie == "all" and source_tokens != target_tokens:
            raise ValueError(
                f"tie='all' needs one vocabulary for both languages, received {source_tokens} and {target_tokens} "
                "rows; learn the vocabulary on both, or use tie='target'"
            )
        self.dim, self.max_len = embedding_dim, max_len
        self.target_table = nn.Embedding(target_tokens, embedding_dim)
        self.source_table = self.target_table if tie == "all" else nn.Embedding(source_tokens, embedding_dim)
        self.output = Linear(embedding_dim, target_tokens, bias=False)
        for weight in (self.source_table.weight, self.target_table.weight, self.output.weight):
            nn.init.normal_(weight, std=embedding_dim**-0.5)
        if tie != "none":
            self.output.weight = self.target_table.weight
        sizes = (embedding_dim, num_heads, ff_dim, float(dropout))
        self.encoder = nn.ModuleList(EncoderBlock(*sizes, pre_norm=pre_norm) for _ in range(num_layers))
        self.decoder = nn.ModuleList(DecoderBlock(*sizes, pre_norm=pre_norm) for _ in range(num_layers))
        self.encoder_norm = nn.LayerNorm(embedding_dim) if pre_norm else nn.Identity()
        self.decoder_norm = nn.LayerNorm(embedding_dim) if pre_norm else nn.Identity()
        self.dropout = Dropout(dropout)
        self.register_buffer("positions", sinusoidal_positions(max_len, embedding_dim), persistent=False)

    def encode(self, source: Int[Tensor, "B S"]) -> Float[Tensor, "B S D"]:
        """A vector for each token of the source; without meaning at padding."""
        bias = padding_bias(source != PADDING)
        x = self._embed(self.source_table, source)
        for block in self.encoder:
            x = block(x, bias)
        memory: Tensor = self.encoder_norm(x)
        return memory

    def decode(
        self, target: Int[Tensor, "B T"], memory: Float[Tensor, "B S D"], source: Int[Tensor, "B S"]
    ) -> Float[Tensor, "B T D"]:
        """The state after each token of the target, which knows of that token and those before it."""
        causal, bias = causal_bias(target.shape[1], target.device), padding_bias(source != PADDING)
        x = self._embed(self.target_table, target)
        for block in self.decoder:
            x = block(x, memory, causal, bias)
        states: Tensor = self.decoder_norm(x)
        return states

    def forward(self, batch: Batch) -> Float[Tensor, "B T V"]:
        """Logits of the token after each token of `batch.target`."""
        return self.logits(self.decode(batch.target, self.encode(batch.source), batch.source))

    def token_states(self, batch: Batch) -> tuple[Float[Tensor, "P D"], Int[Tensor, "P"]]:
        """The states that have a token to predict, and that token: what learn.text.NextToken trains."""
        states = self.decode(batch.target[:, :-1], self.encode(batch.source), batch.source).flatten(0, 1)
        wanted = batch.target[:, 1:].flatten()
        real = (wanted != PADDING).nonzero().squeeze(1)
        return states.index_select(0, real), wanted.index_select(0, real)

    def logits(self, states: Float[Tensor, "*B D"]) -> Float[Tensor, "*B V"]:
        """States against the output table."""
        found: Tensor = self.output(states)
        return found

    def start(self, source: Int[Tensor, "B S"]) -> _Past:
        """What decoding begins with: the source, and nothing written yet."""
        memory = self.encode(source)
        blocks = [block for block in self.decoder if isinstance(block, DecoderBlock)]
        empty = [block.attention.remember(memory[:, :0]) for block in blocks]
        return _Past(empty, [block.cross.remember(memory) for block in blocks], padding_bias(source != PADDING), 0)

    def step(self, written: Int[Tensor, "B"], past: _Past) -> tuple[Float[Tensor, "B V"], _Past]:
        """Logits of the token after `written`, the newest one, and the past with it."""
        x = self._embed(self.target_table, written.unsqueeze(1), past.length)  # (B, 1, D)
        own = []
        for block, seen, memory in zip(self.decoder, past.own, past.source, strict=True):
            assert isinstance(block, DecoderBlock)
            x, kept = block.step(x, seen, memory, past.bias)
            own.append(kept)
        return self.logits(self.decoder_norm(x)[:, 0]), _Past(own, past.source, past.bias, past.length + 1)

    def _embed(self, table: nn.Embedding, rows: Tensor, first: int = 0) -> Tensor:
        last = first + rows.shape[1]
        if last > self.max_len:
            raise ValueError(f"a text of {last} tokens exceeds max_len={self.max_len}; cut it or build a longer model")
        positions = self.get_buffer("positions")[first:last]
        embedded: Tensor = self.dropout(to_autocast(table(rows) * self.dim**0.5 + positions))
        return embedded
