"""What BERT is trained on: texts with hidden tokens, alone or as pairs that follow one another or do not.

tokens = Tokens.learn(texts, kind="wordpiece", size=8_000, special=SPECIAL)
examples = MaskedTexts(tokens, texts, max_len=64)                   # a long text becomes several
examples = MaskedPairs(tokens, documents, max_len=64)               # documents: lists of sentences
Batches(examples, 128, shuffle=True)                                # text, hidden, segment, follows
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from funnelrec.core.batch import Batch
from funnelrec.core.shapes import FIRST_KNOWN, PADDING
from funnelrec.encode.text.tokens import Tokens, padded

__all__ = ["CLS", "MASK", "SEP", "SPECIAL", "MaskedPairs", "MaskedTexts", "hide_tokens", "public_wordpiece", "wrapped"]

SPECIAL = ("[CLS]", "[SEP]", "[MASK]")
CLS, SEP, MASK = range(FIRST_KNOWN, FIRST_KNOWN + 3)
FIRST_WORD = MASK + 1
SHARE = 0.15


def hide_tokens(
    text: Int[Tensor, "B L"], num_tokens: int, generator: torch.Generator | None = None, *, share: float = SHARE
) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B L"]]:
    """The text with `share` of each row's tokens, at least one, to be guessed, and those tokens, 0 elsewhere.

    Of them 80 % become [MASK], 10 % another token, 10 % stay. Special tokens and padding are neither taken nor put in.
    """
    word = text >= FIRST_WORD
    draws = torch.rand(text.shape, generator=generator).masked_fill(~word, 2.0)
    count = (word.sum(1) * share).round().clamp(min=1).minimum(word.sum(1))  # (B,)
    taken = draws.argsort(1).argsort(1) < count.unsqueeze(1)  # the smallest draws of each row
    what = torch.rand(text.shape, generator=generator)
    others = torch.randint(FIRST_WORD, num_tokens, text.shape, generator=generator)
    read = torch.where(taken & (what < 0.8), MASK, text)
    read = torch.where(taken & (what >= 0.8) & (what < 0.9), others, read)
    return read, torch.where(taken, text, PADDING)


class MaskedTexts:
    """Texts for `Batches`, cut into pieces of `max_len` tokens, [CLS] and [SEP] counted; `text` and `hidden` [B, L].

    What is hidden is drawn anew for every batch; without a generator (evaluation) it is always the same.
    """

    def __init__(
        self, tokens: Tokens, texts: Sequence[str], *, max_len: int = 128, shortest: int = 8, share: float = SHARE
    ) -> None:
        self.num_tokens, self.share = len(tokens), share
        room = _room(max_len, 2)
        self.pieces = [
            torch.tensor([CLS, *row[start : start + room], SEP])
            for row in tokens.lists(texts)
            for start in range(0, len(row), room)
            if len(row) - start >= shortest or start == 0
        ]
        self.lengths = torch.tensor([len(piece) for piece in self.pieces])

    def __len__(self) -> int:
        return len(self.pieces)

    def gather(self, index: Int[Tensor, "B"], generator: torch.Generator | None) -> Batch:
        """The pieces at `index`, some of their tokens hidden."""
        text = padded([self.pieces[i] for i in index.tolist()])
        read, hidden = hide_tokens(
            text, self.num_tokens, generator or torch.Generator().manual_seed(0), share=self.share
        )
        return Batch(text=read, hidden=hidden)


class MaskedPairs:
    """[CLS] A [SEP] B [SEP]: A some sentences of a document, B those that follow or, half the time, another document's.

    `documents`: lists of sentences; one of a single sentence has no second part and is left out, as it would teach that
    B never follows. A batch has `text`, `hidden`, `segment` [B, L] (1 in B) and `follows` [B]. The longer part is cut.
    """

    def __init__(self, tokens: Tokens, documents: Sequence[Sequence[str]], *, max_len: int = 128) -> None:
        self.num_tokens, self.room = len(tokens), _room(max_len, 3)
        kept = [tokens.lists(document) for document in documents if len(document) > 1]
        if len(kept) < 2:
            raise ValueError(f"pairs need two documents of two sentences at least, received {len(kept)} such")
        self.chunks: list[list[list[int]]] = []  # consecutive sentences of about `room` tokens
        self.owner: list[int] = []
        for number, document in enumerate(kept):
            for chunk in _chunks(document, self.room):
                self.chunks.append(chunk)
                self.owner.append(number)

    def __len__(self) -> int:
        return len(self.chunks)

    def gather(self, index: Int[Tensor, "B"], generator: torch.Generator | None) -> Batch:
        """Pairs that begin in the chunks at `index`."""
        generator = generator or torch.Generator().manual_seed(0)
        rows, segments, follows = [], [], []
        for i in index.tolist():
            chunk = self.chunks[i]
            cut = 1 + _draw(len(chunk) - 1, generator)
            first, true = chunk[:cut], bool(_draw(2, generator))
            second = chunk[cut:] if true else self._elsewhere(i, generator)
            a, b = _fitted([t for s in first for t in s], [t for s in second for t in s], self.room)
            rows.append(torch.tensor([CLS, *a, SEP, *b, SEP]))
            segments.append(torch.tensor([0] * (len(a) + 2) + [1] * (len(b) + 1)))
            follows.append(true)
        read, hidden = hide_tokens(padded(rows), self.num_tokens, generator)
        return Batch(text=read, hidden=hidden, segment=padded(segments), follows=torch.tensor(follows).long())

    def _elsewhere(self, i: int, generator: torch.Generator) -> list[list[int]]:
        """Sentences of another document, from a random one on."""
        other = _draw(len(self.chunks), generator)
        while self.owner[other] == self.owner[i]:
            other = _draw(len(self.chunks), generator)
        chunk = self.chunks[other]
        return chunk[_draw(len(chunk), generator) :]


def wrapped(texts: Sequence[str]) -> list[str]:
    """[CLS] text [SEP], which a vocabulary with SPECIAL cuts so: what a Bert for classes reads."""
    return [f"{SPECIAL[0]}{text}{SPECIAL[1]}" for text in texts]


def public_wordpiece(path: Path | str, *, lower: bool = True) -> Tokens:
    """The vocabulary of a published BERT (`vocab.txt`, a piece a line) with its rules; its rows are those of the file.

    Its [CLS], [SEP] and [MASK] are found by `Tokens.row`, as they stand elsewhere than in a vocabulary learnt here.
    """
    import tokenizers

    pieces = Path(path).read_text(encoding="utf-8").splitlines()
    if not pieces or "[UNK]" not in pieces:
        raise ValueError(f"{path} has {len(pieces)} lines and no [UNK]; it is no WordPiece vocabulary")
    model = tokenizers.models.WordPiece(
        {piece: row for row, piece in enumerate(pieces)}, unk_token="[UNK]", max_input_chars_per_word=200
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lower)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece(prefix="##")
    tokenizer.add_special_tokens([piece for piece in ("[PAD]", *SPECIAL) if piece in pieces])
    return Tokens(tokenizer)


def _room(max_len: int, special: int) -> int:
    if max_len < special + 2:
        raise ValueError(
            f"max_len counts {special} special tokens and must be at least {special + 2}, received {max_len}"
        )
    return max_len - special


def _chunks(document: list[list[int]], room: int) -> list[list[list[int]]]:
    """Runs of at least two sentences that fill `room` tokens; what is left over joins the last run."""
    runs: list[list[list[int]]] = [[]]
    for sentence in document:
        if len(runs[-1]) >= 2 and sum(map(len, runs[-1])) + len(sentence) > room:
            runs.append([])
        runs[-1].append(sentence)
    if len(runs[-1]) < 2:
        last = runs.pop()
        runs[-1].extend(last)
    return runs


def _fitted(a: list[int], b: list[int], room: int) -> tuple[list[int], list[int]]:
    """Both parts, the longer cut at its end until they fit."""
    over = len(a) + len(b) - room
    if over > 0:
        shorter = min(len(a), len(b), room // 2)
        a, b = (a[: room - shorter], b[:shorter]) if len(a) >= len(b) else (a[:shorter], b[: room - shorter])
    return a, b


def _draw(number: int, generator: torch.Generator) -> int:
    return int(torch.randint(number, (), generator=generator))
