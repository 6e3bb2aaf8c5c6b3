"""BERT — a transformer encoder that learns a language by guessing hidden words, then any task by a small head.

Paper: Devlin, Chang, Lee, Toutanova. BERT: pre-training of deep bidirectional transformers for language understanding.
    NAACL 2019. arXiv:1810.04805
Idea:  a word that is hidden can be guessed from both sides at once, so every layer may look everywhere; what it learns
    so from plain text is worth more than what a small labelled set can teach.

The paper numbers no equation; in its order:
Eq. (1) § 3, Figure 2   E = LN(word + segment + position)             Bert.states
Eq. (2) § 3             N blocks of attention and GELU networks       core.nn.transformer.EncoderBlock
Eq. (3) § 3.1, task 1   p = softmax(LN(GELU(h W)) Eᵀ + b) where h     Bert.token_states, logits
                        stands at one of the 15 % that are hidden     encode.text.masking
Eq. (4) § 3.1, task 2   is B the text after A? from tanh(W h_[CLS])   Bert.next_logits
Eq. (5) § 4             classes from the same vector                  Bert.forward
Differs:
- next_sentence is an option, as later work found no use in it (RoBERTa, arXiv:1907.11692); what is hidden is drawn anew
  each time a text is seen.
- pooling="mean" takes the mean of the last layer in place of [CLS], which means little where task 2 is not trained.
- `encode`, the vector of a text for a recommender, is that mean without the tanh layer.
- Attention weights are not dropped out.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.core.config import keeps_config
from funnelrec.core.nn.dropout import Dropout
from funnelrec.core.nn.linear import Linear, linear, to_autocast
from funnelrec.core.nn.transformer import EncoderBlock, padding_bias
from funnelrec.core.shapes import PADDING

__all__ = ["Bert"]

EPS = 1e-12


@keeps_config
class Bert(nn.Module):
    """Texts are rows [B, L] of a WordPiece vocabulary, padding 0 on the right, [CLS] first and [SEP] last.

    `num_classes` 0: no head for classes; `max_len`: longest text; `next_sentence`: a head for task 2; `pooling` "first"
    ([CLS]) or "mean": what the heads for whole texts read. The defaults are BERT-base.
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        num_classes: int = 0,
        embedding_dim: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        ff_dim: int = 3072,
        dropout: int | float = 0.1,
        max_len: int = 512,
        next_sentence: bool = False,
        pooling: str = "first",
    ) -> None:
        super().__init__()
        if pooling not in ("first", "mean"):
            raise ValueError(f"pooling must be 'first' or 'mean', received {pooling!r}")
        self.pooling, self.max_len = pooling, max_len
        self.words = nn.Embedding(num_tokens, embedding_dim)
        self.positions = nn.Embedding(max_len, embedding_dim)
        self.segments = nn.Embedding(2, embedding_dim)
        self.norm = nn.LayerNorm(embedding_dim, eps=EPS)
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(
            EncoderBlock(embedding_dim, num_heads, ff_dim, float(dropout), activation="gelu", eps=EPS)
            for _ in range(num_layers)
        )
        self.transform = Linear(embedding_dim, embedding_dim)
        self.transform_norm = nn.LayerNorm(embedding_dim, eps=EPS)
        self.word_bias = nn.Parameter(torch.empty(num_tokens))
        self.pooler = Linear(embedding_dim, embedding_dim)
        self.next = Linear(embedding_dim, 2) if next_sentence else None
        self.out = Linear(embedding_dim, num_classes) if num_classes else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew: N(0, 0.02²), biases 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.word_bias)

    def states(self, content: Int[Tensor, "B L"], segment: Int[Tensor, "B L"] | None = None) -> Float[Tensor, "B L D"]:
        """The last layer at each token; without meaning at padding. `segment` is 0 or 1 (absent: 0)."""
        length = content.shape[1]
        if length > self.max_len:
            raise ValueError(
                f"a text of {length} tokens exceeds max_len={self.max_len}; cut it or build a longer model"
            )
        of_segment = self.segments.weight[0] if segment is None else self.segments(segment)
        x = self.words(content) + self.positions.weight[:length] + of_segment
        x = self.dropout(to_autocast(self.norm(x)))  # Eq. (1); blocks need not change types
        bias = padding_bias(content != PADDING)
        for block in self.blocks:
            x = block(x, bias)  # Eq. (2)
        found: Tensor = x
        return found

    def encode(self, content: Int[Tensor, "B L"]) -> Float[Tensor, "B D"]:
        """The mean of the last layer over the tokens of each text; 0 for a text without any."""
        return _mean(self.states(content), content)

    def forward(self, content: Int[Tensor, "B L"]) -> Float[Tensor, "B K"]:
        """Logits of the classes."""
        if self.out is None:
            raise ValueError("this Bert has no head for classes; build it with num_classes above 0")
        logits: Tensor = self.out(self.dropout(self.pooled(self.states(content), content)))  # Eq. (5)
        return logits

    def pooled(self, states: Float[Tensor, "B L D"], content: Int[Tensor, "B L"]) -> Float[Tensor, "B D"]:
        """tanh(W h), h the state at [CLS], or the mean."""
        return torch.tanh(self.pooler(states[:, 0] if self.pooling == "first" else _mean(states, content)))

    def token_states(self, batch: Batch) -> tuple[Float[Tensor, "P D"], Int[Tensor, "P"]]:
        """At each hidden token of `batch.text` what its logits are made of, and the token: `batch.hidden`, else 0."""
        return self._hidden(self.states(batch.text, batch.segment if "segment" in batch else None), batch)

    def logits(self, states: Float[Tensor, "*B D"]) -> Float[Tensor, "*B V"]:
        """What `token_states` gave against the table of words, and a bias."""
        return linear(states, self.words.weight, self.word_bias)

    def both_states(self, batch: Batch) -> tuple[Float[Tensor, "P D"], Int[Tensor, "P"], Float[Tensor, "B 2"]]:
        """`token_states`, and the logits of "B is another text" and "B follows A", from one pass."""
        if self.next is None:
            raise ValueError("this Bert has no head for the next sentence; build it with next_sentence=True")
        states = self.states(batch.text, batch.segment)
        return *self._hidden(states, batch), self.next(self.dropout(self.pooled(states, batch.text)))  # Eq. (4)

    def load_public(self, folder: Path | str) -> list[str]:
        """Read `model.safetensors` of a public BERT checkpoint of this shape; the names of what stays as it was.

        Heads that the file lacks stay new, as does the head for classes. Raises ValueError when a weight of the body is
        missing or has another shape: the file belongs to another network.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = Path(folder) / "model.safetensors"
        try:
            given = {_own_name(name): tensor for name, tensor in load_file(str(path)).items()}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is no safetensors file: {error}; convert the checkpoint first") from error
        own = self.state_dict()
        kept = [name for name in own if name not in given and name.startswith(HEADS)]
        for name, tensor in own.items():
            found = own[name] if name in kept else given.get(name)
            if found is None or found.shape != tensor.shape:
                what = "is missing" if found is None else f"has the shape {list(found.shape)}, not {list(tensor.shape)}"
                raise ValueError(
                    f"{path}: {name} {what}; this file belongs to another network than Bert({self.config})"
                )
            own[name] = found.to(tensor.dtype)
        self.load_state_dict(own)
        return kept

    def _hidden(self, states: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        wanted = batch.hidden.flatten()
        places = (wanted != PADDING).nonzero().squeeze(1)
        # only these meet the vocabulary: a seventh of the tokens, and the widest product of all
        taken = states.flatten(0, 1).index_select(0, places)
        return self.transform_norm(F.gelu(self.transform(taken))), wanted.index_select(0, places)  # Eq. (3)


HEADS = ("transform", "word_bias", "pooler", "next", "out")
_PUBLIC = (  # of the published checkpoints, and here; the first that fits
    (r"^(?:bert\.)?embeddings\.word_embeddings\.", "words."),
    (r"^(?:bert\.)?embeddings\.position_embeddings\.", "positions."),
    (r"^(?:bert\.)?embeddings\.token_type_embeddings\.", "segments."),
    (r"^(?:bert\.)?embeddings\.LayerNorm\.", "norm."),
    (r"^(?:bert\.)?encoder\.layer\.(\d+)\.attention\.self\.", r"blocks.\1.attention."),
    (r"^(?:bert\.)?encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"blocks.\1.attention.out."),
    (r"^(?:bert\.)?encoder\.layer\.(\d+)\.attention\.output\.LayerNorm\.", r"blocks.\1.attention_residual.norm."),
    (r"^(?:bert\.)?encoder\.layer\.(\d+)\.intermediate\.dense\.", r"blocks.\1.feed_forward.inner."),
    (r"^(?:bert\.)?encoder\.layer\.(\d+)\.output\.dense\.", r"blocks.\1.feed_forward.outer."),
    (r"^(?:bert\.)?encoder\.layer\.(\d+)\.output\.LayerNorm\.", r"blocks.\1.forward_residual.norm."),
    (r"^(?:bert\.)?pooler\.dense\.", "pooler."),
    (r"^cls\.predictions\.transform\.dense\.", "transform."),
    (r"^cls\.predictions\.transform\.LayerNorm\.", "transform_norm."),
    (r"^cls\.predictions\.bias$", "word_bias"),
    (r"^cls\.seq_relationship\.", "next."),
)


def _own_name(name: str) -> str:
    """The name here of a parameter of a published checkpoint; older ones say gamma and beta of a norm."""
    name = name.removesuffix("gamma") + "weight" if name.endswith("LayerNorm.gamma") else name
    name = name.removesuffix("beta") + "bias" if name.endswith("LayerNorm.beta") else name
    for theirs, own in _PUBLIC:
        if re.match(theirs, name):
            return re.sub(theirs, own, name)
    return name


def _mean(states: Tensor, content: Tensor) -> Tensor:
    real = (content != PADDING).unsqueeze(2).to(states.dtype)
    return (states * real).sum(1) / real.sum(1).clamp(min=1)
