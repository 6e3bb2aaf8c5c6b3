"""Text to rows of a vocabulary and back.

    tokens = Tokens.learn(texts, kind="words", size=20_000, min_count=2)
    tokens.rows(["a fine film"])           int64 [B, L], 0 at padding, which stands on the right
    tokens.text(rows)                      ["a fine film"]
    tokens.save("tokens.json"); Tokens.open("tokens.json")

| kind         | a token is                                                                              |
|--------------|-----------------------------------------------------------------------------------------|
| `words`      | a run of letters, digits and apostrophes, or one other mark                             |
| `spaces`     | what spaces and line ends separate: for files that are split already                    |
| `characters` | a character, line ends too; small and capital letters are different                     |
| `wordpiece`  | a piece of a word; pieces inside a word begin with ##                                    |
| `bpe`        | a run of bytes, by byte pair encoding: any text can be written and comes back as it was |

Row 0 is padding and row 1 the unknown, as in every vocabulary here; special tokens follow, in the order given, then the
words by falling count. The arithmetic is that of the `tokenizers` library (`pip install funnelrec[text]`).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from funnelrec.core.batch import Batch
from funnelrec.core.shapes import FIRST_KNOWN, PADDING

__all__ = ["PAD", "UNKNOWN_TOKEN", "Kind", "TextExamples", "Tokens", "text_mask"]

Kind = Literal["words", "spaces", "characters", "wordpiece", "bpe"]
PAD, UNKNOWN_TOKEN = "<pad>", "<unk>"
WORD = r"[\p{L}\p{N}']+|[^\s\p{L}\p{N}']"


def text_mask(content: Int[Tensor, "B L"]) -> Bool[Tensor, "B L"]:
    """True where there is a token."""
    return content != PADDING


class Tokens:
    """A vocabulary with the rules that cut a text into its tokens. `learn` makes one, from training texts alone."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def learn(
        cls,
        texts: Iterable[str],
        *,
        kind: str = "words",
        size: int = 30_000,
        min_count: int = 1,
        lower: bool = True,
        special: Sequence[str] = (),
    ) -> Tokens:
        """The vocabulary of `texts`: at most `size` rows, padding, unknown and `special` among them.

        min_count: rarer tokens are unknown. lower: small letters only (`characters` and `bpe` keep the case).
        """
        if kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, received {kind!r}")
        first = [PAD, UNKNOWN_TOKEN, *special]
        if len(set(first)) < len(first):
            raise ValueError(f"special tokens must differ from each other and from {PAD} and {UNKNOWN_TOKEN}: {first}")
        if size <= len(first):
            raise ValueError(f"size counts all rows, {len(first)} special ones too; it must be larger than {size}")
        tokenizer = _empty(kind, lower)
        if kind in ("wordpiece", "bpe"):
            tokenizer.train_from_iterator(iter(texts), _trainer(kind, size, min_count, first))
            return cls(tokenizer)
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(_cut(tokenizer, text))
        for name in first:
            counts.pop(name, None)
        kept = sorted((-n, word) for word, n in counts.items() if n >= min_count)[: size - len(first)]
        return cls(_with_words(tokenizer, [*first, *(word for _, word in kept)], first))

    def __len__(self) -> int:
        """Rows of the vocabulary."""
        return int(self._tokenizer.get_vocab_size())

    def __contains__(self, token: str) -> bool:
        return self._tokenizer.token_to_id(token) is not None

    @property
    def words(self) -> list[str]:
        """The tokens in the order of their rows."""
        return [self._tokenizer.id_to_token(row) for row in range(len(self))]

    @property
    def digest(self) -> str:
        """Names this vocabulary: the same for the same rows and rules."""
        canonical = json.dumps(json.loads(self._tokenizer.to_str()), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    def row(self, token: str) -> int:
        """The row of one token. Raises KeyError for one that the vocabulary lacks."""
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise KeyError(f"the vocabulary of {len(self)} tokens has no {token!r}")
        return int(found)

    def lists(self, texts: Sequence[str]) -> list[list[int]]:
        """The rows of each text."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def rows(self, texts: Sequence[str], max_len: int | None = None) -> Int[Tensor, "B L"]:
        """The rows of all texts, padded on the right to the longest, at least 1; `max_len` keeps the first tokens."""
        return padded([torch.tensor(row[:max_len], dtype=torch.int64) for row in self.lists(texts)])

    def stream(self, text: str) -> Int[Tensor, "T"]:
        """The rows of one long text."""
        return torch.tensor(self.lists([text])[0], dtype=torch.int64)

    def text(self, rows: Int[Tensor, "B L"]) -> list[str]:
        """Rows back to text; padding and special tokens are left out, the unknown is written as such."""
        return [
            str(self._tokenizer.decode([r for r in row if r != PADDING], skip_special_tokens=True))
            for row in rows.tolist()
        ]

    def save(self, path: Path | str) -> Path:
        """Write vocabulary and rules as JSON."""
        Path(path).write_text(self._tokenizer.to_str(), encoding="utf-8")
        return Path(path)

    @classmethod
    def open(cls, path: Path | str) -> Tokens:
        """Read what `save` wrote."""
        return cls(_library().Tokenizer.from_str(Path(path).read_text(encoding="utf-8")))


class TextExamples:
    """Texts for `Batches`: `text` int64 [B, L], as long as the longest of the batch, and `label` int64 [B] if given.

    `max_len` keeps the first tokens of each text.
    """

    def __init__(
        self,
        tokens: Tokens,
        texts: Sequence[str],
        labels: Int[Tensor, "N"] | None = None,
        *,
        max_len: int | None = None,
    ) -> None:
        if labels is not None and len(labels) != len(texts):
            raise ValueError(f"{len(texts)} texts need as many labels, received {len(labels)}")
        lists = [row[:max_len] for row in tokens.lists(texts)]
        self.lengths = torch.tensor([len(row) for row in lists], dtype=torch.int64)
        self._starts = self.lengths.cumsum(0) - self.lengths
        self._flat = torch.tensor([*(t for row in lists for t in row), PADDING], dtype=torch.int64)
        self.labels = labels

    def __len__(self) -> int:
        return len(self.lengths)

    def gather(self, index: Int[Tensor, "B"], generator: torch.Generator | None) -> Batch:
        """The texts at `index`."""
        lengths = self.lengths[index].unsqueeze(1)
        column = torch.arange(max(1, int(lengths.max()) if len(index) else 1))
        place = torch.where(column < lengths, self._starts[index].unsqueeze(1) + column, len(self._flat) - 1)
        tensors = {"text": self._flat[place]}
        if self.labels is not None:
            tensors["label"] = self.labels[index]
        return Batch(**tensors)


def padded(rows: Sequence[Int[Tensor, "_"]]) -> Int[Tensor, "B L"]:
    """Rows of different lengths side by side, 0 on the right."""
    longest = max([1, *(len(row) for row in rows)])
    together = torch.full((len(rows), longest), PADDING)
    for i, row in enumerate(rows):
        together[i, : len(row)] = row
    return together


# ------------------------------------------------------------------------------------------------- the library beneath
def _library() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ImportError("text needs the tokenizers library: pip install funnelrec[text]") from None
    return tokenizers


def _empty(kind: str, lower: bool) -> Any:
    """The rules of a kind, without words."""
    lib = _library()
    cut, normal = lib.pre_tokenizers, lib.normalizers
    if kind == "bpe":
        tokenizer = lib.Tokenizer(lib.models.BPE())
        tokenizer.pre_tokenizer = cut.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = lib.decoders.ByteLevel()
        return tokenizer
    model = lib.models.WordPiece if kind == "wordpiece" else lib.models.WordLevel
    tokenizer = lib.Tokenizer(model({UNKNOWN_TOKEN: 0}, unk_token=UNKNOWN_TOKEN))
    if kind == "characters":
        tokenizer.pre_tokenizer = cut.Split(lib.Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = lib.decoders.Fuse()
        return tokenizer
    tokenizer.normalizer = normal.Sequence([normal.NFC(), *([normal.Lowercase()] if lower else [])])
    if kind == "spaces":
        tokenizer.pre_tokenizer = cut.WhitespaceSplit()
    else:
        tokenizer.pre_tokenizer = cut.Split(lib.Regex(WORD), "removed", invert=True)
    if kind == "wordpiece":
        tokenizer.decoder = lib.decoders.WordPiece(prefix="##", cleanup=False)
    return tokenizer


def _trainer(kind: str, size: int, min_count: int, first: list[str]) -> Any:
    lib = _library()
    options = {"vocab_size": size, "min_frequency": min_count, "special_tokens": first, "show_progress": False}
    if kind == "wordpiece":
        return lib.trainers.WordPieceTrainer(continuing_subword_prefix="##", **options)
    return lib.trainers.BpeTrainer(initial_alphabet=sorted(lib.pre_tokenizers.ByteLevel.alphabet()), **options)


def _cut(tokenizer: Any, text: str) -> list[str]:
    normal = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer is not None else text
    return [token for token, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal)]


def _with_words(tokenizer: Any, words: list[str], special: list[str]) -> Any:
    """The same rules over `words`, whose rows are their places. Words of `special` are never cut."""
    lib = _library()
    tokenizer.model = lib.models.WordLevel({word: row for row, word in enumerate(words)}, unk_token=UNKNOWN_TOKEN)
    tokenizer.add_special_tokens([word for word in special if word not in (PAD, UNKNOWN_TOKEN)])
    return tokenizer


assert FIRST_KNOWN == 2  # PAD and UNKNOWN_TOKEN are rows 0 and 1
