"""The shapes of the HTTP interface: what is asked and what is answered. docs/http.md shows each with an example.

The models of questions are checked (unknown keys and wrong types are refused); those of answers are the contract in
/openapi.json and are held against real answers by the tests.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from funnelrec.serve.request import MAX_HISTORY, MAX_K, Request

__all__ = [
    "ANSWERS",
    "QUESTIONS",
    "BatchQuestion",
    "BodyError",
    "EventsQuestion",
    "RankQuestion",
    "RecommendQuestion",
    "SimilarQuestion",
    "parse",
]

MAX_BATCH = 256
MAX_ID = 256  #: characters
MAX_VALUES = 100  #: values of one filter

Question = TypeVar("Question", bound=BaseModel)

# An id is a text that is not empty, or an integer of 64 bits: larger ones could not have been in the data.
Text = Annotated[str, Field(strict=True, min_length=1, max_length=MAX_ID)]
Whole = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)]
Id = Text | Whole
Flag = Annotated[bool, Field(strict=True)]
Value = Annotated[str, Field(strict=True, max_length=MAX_ID)] | Flag | Whole | Annotated[float, Field(strict=True)]
Values = Annotated[list[Value], Field(min_length=1, max_length=MAX_VALUES)]
Name = Annotated[str, Field(max_length=MAX_ID)]
Filters = Annotated[dict[Name, Value | Values], Field(max_length=32)]
Context = Annotated[dict[Name, Value | Values | None], Field(max_length=64)]
K = Annotated[int, Field(strict=True, ge=1, le=MAX_K)]
Moment = (
    Annotated[str, Field(strict=True, max_length=40, json_schema_extra={"format": "date-time"})]
    | Annotated[int, Field(strict=True, ge=0, lt=2**43)]
)
Deadline = Annotated[int, Field(strict=True, ge=1, le=60_000)]


class BodyError(ValueError):
    """The body is not what the path takes; `errors` name the places."""

    def __init__(self, detail: str, errors: Iterable[tuple[str, str]] = ()) -> None:
        super().__init__(detail)
        self.errors = list(errors)


class _Question(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)


class Asked(_Question):
    """Who, how many, under which conditions."""

    user_id: Id | None = Field(None, description="A user; an unknown one gets the recently popular items.")
    history: Annotated[list[Id], Field(max_length=MAX_HISTORY)] | None = Field(
        None, description="Item ids, newest last; replaces the stored history. [] is a stranger."
    )
    k: K = Field(10, description="How many items.")
    context: Context | None = Field(None, description="Context fields of the events.")
    filters: Filters | None = Field(None, description="Only items with one of the values of every field.")
    diversity: Annotated[float, Field(strict=True, ge=0)] | None = Field(
        None, description="The reranker's knob for this answer."
    )
    exclude_seen: Flag = Field(True, description="Leave out what the user knows already.")

    @model_validator(mode="after")
    def _somebody(self) -> Asked:
        if self.user_id is None and self.history is None:
            raise ValueError("needs user_id or history; for a stranger give history=[]")
        return self

    def request(self) -> Request:
        """The same as the funnel is asked."""
        return Request(
            user=self.user_id,
            history=self.history,
            k=self.k,
            filters=self.filters,
            diversity=self.diversity,
            context=self.context,
            exclude_seen=self.exclude_seen,
        )


_SOMEBODY: Any = {
    "anyOf": [{"required": [name], "properties": {name: {"not": {"type": "null"}}}} for name in ("user_id", "history")]
}


class RecommendQuestion(Asked):
    """POST /v1/recommend"""

    model_config = ConfigDict(json_schema_extra=_SOMEBODY)

    explain: Flag = Field(False, description="Also say which interest brought an item and where each stage had it.")
    deadline_ms: Deadline | None = Field(None, description="From arrival; see 'degraded'.")


class Entry(Asked):
    """One question of a batch."""

    model_config = ConfigDict(json_schema_extra=_SOMEBODY)


class BatchQuestion(_Question):
    """POST /v1/recommend/batch"""

    requests: Annotated[list[Entry], Field(min_length=1, max_length=MAX_BATCH)]
    deadline_ms: Deadline | None = None


class RankQuestion(_Question):
    """POST /v1/rank"""

    model_config = ConfigDict(json_schema_extra=_SOMEBODY)

    user_id: Id | None = None
    history: Annotated[list[Id], Field(max_length=MAX_HISTORY)] | None = None
    items: Annotated[list[Id], Field(min_length=1, max_length=MAX_K)]
    context: Context | None = None

    @model_validator(mode="after")
    def _somebody(self) -> RankQuestion:
        if self.user_id is None and self.history is None:
            raise ValueError("needs user_id or history; for a stranger give history=[]")
        return self


class SimilarQuestion(_Question):
    """POST /v1/similar"""

    item_id: Id
    k: K = 10
    filters: Filters | None = None


class Event(_Question):
    """Somebody did something with an item."""

    user_id: Id
    item_id: Id
    event: Annotated[str, Field(strict=True, max_length=64)] | None = None
    timestamp: Moment | None = Field(
        None, description="RFC 3339, or milliseconds since 1970; now where it is left out. Kept in the spool."
    )


class EventsQuestion(_Question):
    """POST /v1/events"""

    events: Annotated[list[Event], Field(min_length=1, max_length=MAX_BATCH)]


# --------------------------------------------------------------------------------------------------------- answers
class Item(BaseModel):
    """An item of the catalogue."""

    item_id: str
    title: str | None
    attributes: dict[str, Any]
    picture: bool


class Scored(Item):
    """An item with a score, null where there is none."""

    score: float | None


class Probable(Scored):
    """An item with a score and, where the funnel was calibrated, the probability of a click."""

    probability: float | None = None


class Places(BaseModel):
    """Where the stages had the item, from 1."""

    match: int
    rank: int
    final: int


class Scores(BaseModel):
    """What the stages thought of the item."""

    match: float | None
    rank: float | None


class Recommended(Probable):
    """An item of an answer; the last three are there with `explain` only."""

    interest: int | None = None
    places: Places | None = None
    scores: Scores | None = None


class Interest(BaseModel):
    """One of the vectors of a user: how many candidates it brought, the best of them, its place on the map."""

    interest: int
    candidates: int
    items: list[Scored]
    map: list[float] | None


class _Answer(BaseModel):
    request_id: str
    model: str
    model_version: str


class RecommendAnswer(_Answer):
    """The best items, best first."""

    items: list[Recommended]
    fallback: str | None
    degraded: bool
    timing_ms: dict[str, float]
    interests: list[Interest] | None = None


class Problem(BaseModel):
    """application/problem+json of RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    instance: str | None = None
    request_id: str | None = None
    errors: list[dict[str, str]] | None = None


class BatchEntry(BaseModel):
    """The answer to one question of a batch, or why there is none."""

    items: list[Probable] | None = None
    fallback: str | None = None
    problem: Problem | None = None


class BatchAnswer(_Answer):
    """The answers in the order of the questions."""

    answers: list[BatchEntry]
    degraded: bool
    timing_ms: dict[str, float]


class RankAnswer(_Answer):
    """The caller's items, best first."""

    items: list[Probable]
    fallback: str | None
    timing_ms: dict[str, float]


class SimilarAnswer(_Answer):
    """Items like an item, most similar first."""

    items: list[Scored]


class EventsAnswer(BaseModel):
    """How many events were taken, and how many were about items that the catalogue does not have."""

    request_id: str
    accepted: int
    unknown_items: int


class ItemsAnswer(BaseModel):
    """Items found."""

    items: list[Item]


class User(BaseModel):
    """A user who is known."""

    user_id: str
    history_length: int


class UsersAnswer(BaseModel):
    """Users found."""

    users: list[User]


class UserAnswer(User):
    """A user and the newest 50 of the history, newest last."""

    history: list[Item]


class MapAnswer(BaseModel):
    """The item space in a plane: columns of equal length."""

    model_version: str
    item_id: list[str]
    title: list[str | None]
    x: list[float]
    y: list[float]
    group_field: str | None
    group: list[str | None] | None


class FunnelAnswer(BaseModel):
    """The model card."""

    model: str
    model_version: str
    digest: str
    loaded_at: str
    versions: dict[str, str]
    fingerprint: str
    stages: list[dict[str, Any]]
    metrics: dict[str, Any]
    counts: dict[str, int]
    candidates: int
    max_len: int
    fields: list[dict[str, Any]]
    diversity: dict[str, Any] | None
    calibrated: bool
    map: bool
    pictures: bool


class ModelsAnswer(BaseModel):
    """What is loaded."""

    models: list[dict[str, Any]]


class Health(BaseModel):
    """`status` is "ok", "starting" or "leaving"."""

    status: str


QUESTIONS: tuple[type[BaseModel], ...] = (
    RecommendQuestion,
    BatchQuestion,
    RankQuestion,
    SimilarQuestion,
    EventsQuestion,
)
ANSWERS: tuple[type[BaseModel], ...] = (
    RecommendAnswer,
    BatchAnswer,
    RankAnswer,
    SimilarAnswer,
    EventsAnswer,
    Item,
    ItemsAnswer,
    UsersAnswer,
    UserAnswer,
    MapAnswer,
    FunnelAnswer,
    ModelsAnswer,
    Health,
    Problem,
)


# --------------------------------------------------------------------------------------------------------- reading
def parse(raw: bytes, model: type[Question]) -> Question:
    """A checked question. Raises BodyError that names the places and what is wrong there."""
    try:
        orjson.loads(raw)  # strict: UTF-8, no NaN, no lone surrogate, bounded depth
        body = json.loads(
            raw, object_pairs_hook=_unique, parse_float=_number
        )  # the one that can tell of a key that stands twice
    except (ValueError, RecursionError) as error:
        raise BodyError(f"the body is no JSON: {error}") from None
    try:
        return model.model_validate(body)
    except ValidationError as error:
        found: dict[str, list[str]] = {}
        for fault in error.errors(include_url=False, include_context=False, include_input=False):
            told = found.setdefault(_place(fault["loc"]), [])
            message = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
            if message not in told:
                told.append(message)
        errors = [(place, " or ".join(messages)) for place, messages in found.items()]
        raise BodyError("; ".join(f"{p}: {m}" if p else m for p, m in errors[:3]), errors[:20]) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has a key twice")
    return found


def _number(text: str) -> int | float:
    """To JSON Schema, 7.0 is an integer."""
    number = float(text)
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def _place(where: tuple[int | str, ...]) -> str:
    """The path to a value, without the names of the alternatives of a union."""
    path = []
    for step in where:
        if isinstance(step, str) and (step in {"str", "int", "bool", "float"} or "[" in step or "-" in step):
            break
        path.append(str(step)[:64])
    return ".".join(path)
