"""The contracts between the stages. `nn.Module` is a model's only ancestor; these are Protocols, never base classes.

A model's constructor signature is its configuration: `spec` first, the rest keyword-only and JSON-able. A model knows
neither its loss nor its sampler, optimiser, device, seed or path. Letters: core/shapes.py.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor

from funnelrec.core.batch import Batch

__all__ = ["Encoder", "Index", "Matcher", "Ranker", "Reranker", "VectorMatcher"]


@runtime_checkable
class Ranker(Protocol):
    """One logit (never a probability) a row of the batch. rank/"""

    def forward(self, batch: Batch) -> Float[Tensor, "B"]: ...


@runtime_checkable
class VectorMatcher(Protocol):
    """Users and items as vectors whose dot product is the score. match/

    `encode_users` gives K vectors a user and which of them are valid (False = not an interest; all False = nothing is
    known of this user, the caller falls back). `user_for_target` says which user vector a target item trains.
    A sequence model may also offer `encode_positions(batch) -> Float[Tensor, "B L D"]`, the user's vector after each
    history item; the losses use it when `batch.target` is [B, L].
    A model may offer `training_input(batch) -> Batch`, which puts history and target into the form that its paper
    trains on (BERT4Rec hides items), and `training_terms(batch) -> dict[str, Tensor]`, extra loss terms of its paper.
    """

    def encode_users(self, batch: Batch) -> tuple[Float[Tensor, "B K D"], Bool[Tensor, "B K"]]: ...

    def encode_items(self, rows: Int[Tensor, "N"]) -> Float[Tensor, "N D"]: ...

    def user_for_target(
        self, interests: Float[Tensor, "B K D"], valid: Bool[Tensor, "B K"], target: Float[Tensor, "B D"]
    ) -> Float[Tensor, "B D"]: ...


@runtime_checkable
class Matcher(Protocol):
    """A retriever that is no vectors (item-CF, popularity), or a vector matcher joined to its index. match/

    Returns item rows, best first, and their scores; where fewer than k items qualify, row 0 and -inf fill the rest.
    `exclude` int64 [B, X] holds item rows that must not be returned (0 = nothing), `allowed` bool [N] those that may.
    Ties go to the lower row.
    """

    def recommend(
        self,
        batch: Batch,
        k: int,
        exclude: Int[Tensor, "B X"] | None = None,
        allowed: Bool[Tensor, "N"] | None = None,
    ) -> tuple[Int[Tensor, "B k"], Float[Tensor, "B k"]]: ...


@runtime_checkable
class Encoder(Protocol):
    """Content to vectors; knows nothing of users. encode/"""

    def forward(self, content: Tensor) -> Float[Tensor, "B D"]: ...


@runtime_checkable
class Index(Protocol):
    """Maximum inner product search over item vectors. match/index/

    `vectors[n]` belongs to item row n. Rows 0 and 1 and rows where `allowed` is False are never returned. The K
    queries of a user are merged: an item's score is its best over the valid queries, each item appears once.
    Ties go to the lower row; (row 0, -inf) fills what is missing.
    """

    def search(
        self,
        queries: Float[Tensor, "B K D"],
        valid: Bool[Tensor, "B K"],
        k: int,
        exclude: Int[Tensor, "B X"] | None = None,
        allowed: Bool[Tensor, "N"] | None = None,
    ) -> tuple[Int[Tensor, "B k"], Float[Tensor, "B k"]]: ...


@runtime_checkable
class Reranker(Protocol):
    """Chooses and orders the list as a whole. rerank/

    `scores` [C] of the candidates, any scale, larger is better; `categories` int64 [C, G] are the attribute rows that
    diversity is measured on (0 = padding); `vectors` [C, D] are item vectors. Returns positions into the candidates,
    best first, min(k, C) of them, none twice.
    """

    def rerank(
        self,
        scores: Float[Tensor, "C"],
        k: int,
        *,
        categories: Int[Tensor, "C G"],
        vectors: Float[Tensor, "C D"],
    ) -> Int[Tensor, "k"]: ...
