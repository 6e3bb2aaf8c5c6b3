"""Writing a text token by token: the likeliest next one, or the best of several texts (beam search).

A model has `start(source) -> past` and `step(written [B], past) -> (logits [B, V], past)`; a past has `select(rows)`.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from funnelrec.core.shapes import FIRST_KNOWN, PADDING

__all__ = ["BEGIN", "END", "beam_search", "greedy"]

BEGIN, END = FIRST_KNOWN, FIRST_KNOWN + 1  #: rows of Tokens.learn(special=("<s>", "</s>"))
EXTRA = 50  #: a translation may be so many tokens longer than its source
NEVER = -1e30


def _log_probabilities(logits: Tensor) -> Tensor:
    """Log-probabilities of what may be written: no padding, nothing unknown, no second beginning."""
    logits = logits.float()
    logits[:, :END] = NEVER
    return logits.log_softmax(1)


@torch.no_grad()
def greedy(
    model: Any, source: Int[Tensor, "B S"], *, most: int | None = None
) -> tuple[Int[Tensor, "B T"], Float[Tensor, "B"]]:
    """The likeliest token each time, until the end or `most` tokens (absent: 50 more than the source).

    Returns the rows without BEGIN and END, 0 after the end, and each text's log-probability, its end included.
    """
    count = len(source)
    past, written = model.start(source), source.new_full((count,), BEGIN)
    total, open_ = torch.zeros(count, device=source.device), torch.ones(count, dtype=torch.bool, device=source.device)
    texts = []
    for _ in range(source.shape[1] + EXTRA if most is None else most):
        logits, past = model.step(written, past)
        value, written = _log_probabilities(logits).max(1)
        total = total + value * open_
        open_ = open_ & (written != END)
        texts.append(torch.where(open_, written, PADDING))
        if not bool(open_.any()):
            break
    return _trimmed(texts, source), total


@torch.no_grad()
def beam_search(
    model: Any, source: Int[Tensor, "B S"], *, width: int = 4, alpha: float = 0.6, most: int | None = None
) -> tuple[Int[Tensor, "B T"], Float[Tensor, "B"]]:
    """The best text of a search that keeps `width` unfinished ones, by log P / ((5 + |y|) / 6)^alpha (GNMT).

    |y| counts the end. A finished text leaves the beam and is kept; a source is done when no unfinished text can still
    beat its best one. Returns rows as `greedy` does, and scores. Width 1 and alpha 0 are `greedy`.
    """
    if width < 1 or alpha < 0:
        raise ValueError(f"width must be at least 1 and alpha at least 0, received {width} and {alpha}")
    count, device = len(source), source.device
    steps = source.shape[1] + EXTRA if most is None else most
    first = torch.arange(count, device=device).unsqueeze(1) * width  # (B, 1): the first row of each source
    past = model.start(source).select(torch.arange(count, device=device).repeat_interleave(width))
    live = torch.full((count, width), NEVER, device=device)
    live[:, 0] = 0.0  # one beginning, not `width` equal ones
    texts = torch.full((count, width, 1), BEGIN, device=device)
    best, best_text = torch.full((count,), -torch.inf, device=device), source.new_zeros(count, steps)
    for length in range(1, steps + 1):
        logits, past = model.step(texts[:, :, -1].flatten(), past)
        scores = live.unsqueeze(2) + _log_probabilities(logits).view(count, width, -1)  # (B, width, V)
        size = scores.shape[2]
        # twice as many as needed: each unfinished text can end once
        value, place = scores.flatten(1).topk(2 * width)
        parent, token = place // size, place % size
        ended = token == END
        # only those among the first `width` count as ended, as in a beam that holds both
        finished = value.masked_fill(~ended, -torch.inf)[:, :width] / _penalty(length, alpha)
        top, which = finished.max(1)
        better = top > best
        if bool(better.any()):
            best = torch.where(better, top, best)
            chosen = texts[better, parent[better, which[better]]]  # (b, length): BEGIN and what followed
            best_text[better] = 0
            best_text[better, : length - 1] = chosen[:, 1:]
        live, order = value.masked_fill(ended, 2 * NEVER).topk(width)
        parent, token = parent.gather(1, order), token.gather(1, order)
        texts = torch.cat([texts.gather(1, parent.unsqueeze(2).expand(-1, -1, length)), token.unsqueeze(2)], dim=2)
        # log P only falls and the penalty is largest at the last step
        if bool((best >= live[:, 0] / _penalty(steps, alpha)).all()):
            break
        past = past.select((first + parent).flatten())
    open_ = best == -torch.inf  # nothing ended in time: the best beginning
    best_text[open_, : texts.shape[2] - 1] = texts[open_, 0, 1:]
    best = torch.where(open_, live[:, 0] / _penalty(steps, alpha), best)
    return _trimmed(list(best_text.T), source), best


def _penalty(length: int, alpha: float) -> float:
    return float(((5 + length) / 6) ** alpha)


def _trimmed(columns: list[Tensor], source: Tensor) -> Tensor:
    """Columns side by side, without those at the end that are all padding."""
    rows = torch.stack(columns, dim=1) if columns else source.new_zeros(len(source), 0)
    longest = int((rows != PADDING).sum(1).max()) if rows.numel() else 0
    return rows[:, : max(1, longest)]
