"""Training speed of text models beside a plain loop over torch's own modules: the same batches, taking turns.

    python benchmarks/text.py transformer|lstm [--rounds 8] [--output benchmarks/results/text.json]

`transformer`: ours under `NextToken` beside `nn.Transformer` with embeddings, an output tied to the table and
`F.cross_entropy`; 3 + 3 layers, width 256, 4 heads, 512 inside, dropout 0.2 (in torch's of attention weights too, which
ours leaves out: a second torch model has none there), vocabulary 5,000, 96 pairs of 8 to 16 tokens a batch. Both with
fused AdamW and a clipped norm, in float32 and under bfloat16 autocast. A round is some steps of each; the figures are
target tokens a second of processor time, medians of rounds, so that a busy machine slows all alike. Read the ratios.

`lstm`: `LanguageModel` under `CrossEntropy`, its state carried, beside `nn.Embedding`, `nn.LSTM` and a tied output; two
layers of 256, dropout 0.3 (ours locked over time), vocabulary 5,000 and 65, 32 columns of 35 tokens.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.data.batches import Batches
from funnelrec.encode.text.language_model import Carried, LanguageModel, StreamExamples
from funnelrec.encode.text.transformer import Transformer
from funnelrec.learn.losses import CrossEntropy
from funnelrec.learn.text import NextToken

TOKENS, DIM, LAYERS, HEADS, INSIDE, DROPOUT, SMOOTHING = 5000, 256, 3, 4, 512, 0.2, 0.1
PAIRS, SHORTEST, LONGEST, STEPS = 96, 8, 16, 3
LOSS = NextToken(SMOOTHING)

Step = Callable[[Batch], None]


class Plain(nn.Module):
    """A translator of torch's modules, as the tutorials write it."""

    def __init__(self, attention_dropout: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(TOKENS, DIM)
        nn.init.normal_(self.table.weight, std=DIM**-0.5)
        self.positions = nn.Parameter(torch.randn(64, DIM) * 0.02)
        self.body = nn.Transformer(
            DIM, HEADS, LAYERS, LAYERS, INSIDE, dropout=DROPOUT, batch_first=True, norm_first=True
        )
        if not attention_dropout:
            for module in self.body.modules():
                if isinstance(module, nn.MultiheadAttention):
                    module.dropout = 0.0
        self.dropout = nn.Dropout(DROPOUT)

    def embed(self, rows: Tensor) -> Tensor:
        embedded: Tensor = self.dropout(self.table(rows) * DIM**0.5 + self.positions[: rows.shape[1]])
        return embedded

    def loss(self, batch: Batch) -> Tensor:
        read, wanted = batch.target[:, :-1], batch.target[:, 1:]
        padding = batch.source == 0
        causal = nn.Transformer.generate_square_subsequent_mask(read.shape[1]).isinf()
        states = self.body(
            self.embed(batch.source), self.embed(read), tgt_mask=causal, tgt_is_causal=True,
            src_key_padding_mask=padding, memory_key_padding_mask=padding, tgt_key_padding_mask=read == 0,
        )  # fmt: skip
        logits = states @ self.table.weight.T
        return F.cross_entropy(
            logits.flatten(0, 1).float(), wanted.flatten(), ignore_index=0, label_smoothing=SMOOTHING
        )


def stepping(model: nn.Module, loss: Callable[[Batch], Tensor], bf16: bool) -> Step:
    """One training step of a model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            value = loss(batch)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def batches(number: int) -> list[Batch]:
    """Pairs of random tokens; all of a batch are about as long, as batches by length make them."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(number):
        longest = int(torch.randint(SHORTEST + 2, LONGEST + 1, (), generator=generator))
        sides = {}
        for side in ("source", "target"):
            rows = torch.randint(4, TOKENS, (PAIRS, longest), generator=generator)
            lengths = torch.randint(longest - 2, longest + 1, (PAIRS, 1), generator=generator)
            sides[side] = rows.masked_fill(torch.arange(longest) >= lengths, 0)
        made.append(Batch(**sides))
    return made


def transformer(rounds: int) -> dict[str, Any]:
    """Target tokens a second of ours and of torch's, and the median of the rounds' ratios."""
    figures: dict[str, Any] = {}
    data = batches(STEPS)
    tokens = sum(int((batch.target[:, 1:] != 0).sum()) for batch in data)
    for name, bf16 in (("float32", False), ("bfloat16", True)):
        torch.manual_seed(0)
        ours = Transformer(
            source_tokens=TOKENS, target_tokens=TOKENS, embedding_dim=DIM, num_layers=LAYERS, num_heads=HEADS,
            ff_dim=INSIDE, dropout=DROPOUT, pre_norm=True,
        )  # fmt: skip
        whole, lighter = Plain(True), Plain(False)
        sides = {
            "ours": stepping(ours, lambda batch, model=ours: LOSS(model, batch), bf16),  # type: ignore[misc]
            "torch": stepping(whole, whole.loss, bf16),
            "torch_no_attention_dropout": stepping(lighter, lighter.loss, bf16),
        }
        speed: dict[str, list[float]] = {side: [] for side in sides}
        for number in range(rounds + 1):
            for side, step in sides.items():
                begun = time.process_time()
                for batch in data:
                    step(batch)
                if number:  # the first round warms up
                    speed[side].append(tokens / (time.process_time() - begun))
        figures[name] = {side: round(statistics.median(values)) for side, values in speed.items()}
        for peer in ("torch", "torch_no_attention_dropout"):
            ratios = [a / b for a, b in zip(speed["ours"], speed[peer], strict=True)]
            figures[name][f"ratio_to_{peer}"] = round(statistics.median(ratios), 3)
            figures[name][f"ratios_to_{peer}"] = [round(min(ratios), 3), round(max(ratios), 3)]
    return figures


class PlainLSTM(nn.Module):
    """A language model of torch's modules, as the tutorials write it."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.table = nn.Embedding(tokens, DIM)
        self.body = nn.LSTM(DIM, DIM, 2, dropout=0.3)
        self.out = nn.Linear(DIM, tokens)
        self.out.weight = self.table.weight
        self.dropout = nn.Dropout(0.3)
        self.state: tuple[Tensor, Tensor] | None = None

    def loss(self, batch: Batch) -> Tensor:
        states, (h, c) = self.body(self.dropout(self.table(batch.text.T)), self.state)
        self.state = h.detach(), c.detach()
        logits = self.out(self.dropout(states))
        return F.cross_entropy(logits.flatten(0, 1).float(), batch.label.T.flatten())


def lstm(rounds: int) -> dict[str, Any]:
    """Tokens a second of ours and of torch's, and the median of the rounds' ratios."""
    figures: dict[str, Any] = {}
    for tokens in (5000, 65):
        rows = torch.randint(2, tokens, (32 * 35 * STEPS + 1,), generator=torch.Generator().manual_seed(0))
        data = list(Batches(StreamExamples(rows, 32, 35), 32).epoch(0))
        for name, bf16 in (("float32", False), ("bfloat16", True)):
            torch.manual_seed(0)
            ours, plain = Carried(LanguageModel(num_tokens=tokens, dropout=0.3), 32), PlainLSTM(tokens)
            sides = {
                "ours": stepping(ours, lambda batch, model=ours: CrossEntropy()(model, batch), bf16),  # type: ignore[misc]
                "torch": stepping(plain, plain.loss, bf16),
            }
            figures[f"{tokens} tokens, {name}"] = taking_turns(sides, data, 32 * 35 * STEPS, rounds)
    return figures


def taking_turns(sides: dict[str, Step], data: list[Batch], tokens: int, rounds: int) -> dict[str, Any]:
    """Tokens a second of processor time of "ours" and "torch", and their ratio: its median, least and most."""
    speed: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds + 1):
        for side, step in sides.items():
            begun = time.process_time()
            for batch in data:
                step(batch)
            if number:  # the first round warms up
                speed[side].append(tokens / (time.process_time() - begun))
    ratios = [a / b for a, b in zip(speed["ours"], speed["torch"], strict=True)]
    return {
        **{side: round(statistics.median(values)) for side, values in speed.items()},
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(min(ratios), 3), round(max(ratios), 3)],
    }


PARTS: dict[str, Callable[[int], dict[str, Any]]] = {"transformer": transformer, "lstm": lstm}


def main() -> None:
    """Measure one part and write it into the JSON beside the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=sorted(PARTS))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/text.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = json.loads(args.output.read_text()) if args.output.is_file() else {}
    found[args.part] = {
        "torch": torch.__version__, "machine": platform.machine(), "threads": args.threads, "rounds": args.rounds,
        **PARTS[args.part](args.rounds),
    }  # fmt: skip
    args.output.write_text(json.dumps(found, indent=2) + "\n")
    sys.stdout.write(json.dumps(found[args.part], indent=2) + "\n")


if __name__ == "__main__":
    main()
