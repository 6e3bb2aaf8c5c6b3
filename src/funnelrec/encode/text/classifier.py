"""A network that reads tokens, joined to the vocabulary it reads with: text in, classes or vectors out.

    model = TextClassifier(TextCNN(num_tokens=len(tokens)))
    fit(model, Batches(TextExamples(tokens, texts, labels), 50, shuffle=True), CrossEntropy(), epochs=5)
    model.network(tokens.rows(["a fine film"]))          # logits [1, K]
    model.network.encode(tokens.rows(["a fine film"]))   # the vector that the last layer reads [1, D]

`begin_from` gives a network's table vectors that were learnt elsewhere (word2vec.py).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.core.shapes import FIRST_KNOWN, PADDING

__all__ = ["TextClassifier", "begin_from", "token_table"]


class TextClassifier(nn.Module):
    """What losses and `fit` ask: logits of a batch's `text`. `network` is any text encoder with classes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: Batch) -> Float[Tensor, "B K"]:
        """Logits of `batch.text`."""
        logits: Tensor = self.network(batch.text)
        return logits


def token_table(num_tokens: int, embedding_dim: int) -> nn.Embedding:
    """One vector a token, U(-¼, ¼) as in Kim 2014, about the variance of word2vec's; padding is 0 and stays so."""
    table = nn.Embedding(num_tokens, embedding_dim, padding_idx=PADDING)
    with torch.no_grad():
        table.weight[PADDING + 1 :].uniform_(-0.25, 0.25)
    return table


@torch.no_grad()
def begin_from(
    table: nn.Embedding, rows: Int[Tensor, "N"], vectors: Float[Tensor, "N D"], *, frozen: bool = False
) -> float:
    """Write vectors into the rows of a table; the other rows get the variance of these. Gives the share of known rows.

    frozen: training leaves the whole table as it is.
    """
    if vectors.shape[1] != table.embedding_dim:
        raise ValueError(
            f"the table holds vectors of {table.embedding_dim} numbers, received {vectors.shape[1]}; build the network "
            f"with embedding_dim={vectors.shape[1]}"
        )
    weight = table.weight
    reach = (3 * float(vectors.var())) ** 0.5  # the variance of U(-a, a) is a²/3
    weight[PADDING + 1 :].uniform_(-reach, reach)
    weight[rows] = vectors.to(weight.dtype)
    weight.requires_grad_(not frozen)
    return len(rows) / max(1, len(weight) - FIRST_KNOWN)
