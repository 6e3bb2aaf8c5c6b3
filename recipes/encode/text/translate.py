"""Multi30k, German to English: a small Transformer on one vocabulary of byte pairs.

Run:      python recipes/encode/text/translate.py FOLDER_OF_THE_TOKENISED_FILES [--epochs 12] [--out FOLDER]
Hardware: 1 CPU core with bfloat16 arithmetic, 3 GB; about 100 s of processor time an epoch
Expected: one seed: BLEU 39.2 on test 2016 by a beam of 5, 37.7 greedily; 40.3 and 38.9 on the validation pairs, whose
          pieces have perplexity 34.5 after the first epoch, 6.7 after the fifth and 4.9 after the last.
          BLEU is sacrebleu's on the files' own tokens, small letters:
          nrefs:1|case:mixed|eff:no|tok:none|smooth:exp|version:2.6.0. With --out a run that was cut off goes on.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from sacrebleu.metrics import BLEU

from funnelrec.encode.text.decoding import beam_search, greedy
from funnelrec.encode.text.pairs import SPECIAL, PairExamples, TokenBatches
from funnelrec.encode.text.tokens import Tokens
from funnelrec.encode.text.transformer import Transformer
from funnelrec.learn.fit import fit
from funnelrec.learn.schedules import Constant, Noam
from funnelrec.learn.text import KeepWeights, NextToken, token_scores

NAMES = {"train": "train", "valid": "val", "test": "test_2016_flickr"}


def read(folder: Path, part: str, language: str) -> list[str]:
    """The lines of one file, small letters, tokens separated by spaces."""
    path = folder / f"{NAMES[part]}.lc.norm.tok.{language}.gz"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; give the folder of multi30k's tok files (data/task1/tok)")
    return gzip.open(path, "rt", encoding="utf-8").read().splitlines()


def translate(model: Transformer, tokens: Tokens, sources: Sequence[str], beam: int, alpha: float) -> list[str]:
    """Each source in the other language; beam 1 is greedy. Sources of similar length go together."""
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    written = [""] * len(sources)
    for start in range(0, len(order), 100):
        part = order[start : start + 100]
        rows = tokens.rows([sources[i] + SPECIAL[1] for i in part])
        most = rows.shape[1] + 10  # a search that may write much more goes on much longer, and finds no better
        found, _ = (
            greedy(model, rows, most=most)
            if beam == 1
            else beam_search(model, rows, width=beam, alpha=alpha, most=most)
        )
        for i, text in zip(part, tokens.text(found), strict=True):
            written[i] = text.strip()
    return written


def bleu(written: Sequence[str], truth: Sequence[str]) -> tuple[float, str]:
    """BLEU on the tokens as they are, and sacrebleu's signature."""
    metric = BLEU(tokenize="none", force=True)
    return metric.corpus_score(list(written), [list(truth)]).score, str(metric.get_signature())


def train(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One run; its figures."""
    text = {(part, side): read(args.folder, part, side) for part in NAMES for side in ("de", "en")}
    if args.pairs is not None:
        text |= {("train", side): text["train", side][: args.pairs] for side in ("de", "en")}
    tokens = Tokens.learn(
        [*text["train", "de"], *text["train", "en"]], kind="bpe", size=args.size, min_count=2, special=SPECIAL
    )
    tokens.save(folder / "tokens.json")
    pairs = {part: PairExamples(tokens, text[part, "de"], tokens, text[part, "en"], max_len=100) for part in NAMES}
    batches = {
        part: TokenBatches(examples, args.tokens, examples.lengths, shuffle=part == "train", seed=args.seed)
        for part, examples in pairs.items()
    }
    torch.manual_seed(args.seed)
    model = Transformer(
        source_tokens=len(tokens), target_tokens=len(tokens), embedding_dim=args.dim, num_layers=args.layers,
        num_heads=args.heads, ff_dim=args.ff, dropout=args.dropout, pre_norm=not args.post_norm, max_len=200,
    )  # fmt: skip
    kept = KeepWeights(model, folder / "epochs", keep=args.average)
    done = [int(path.stem.removeprefix("epoch-")) for path in kept.files()]
    started, epoch = time.monotonic(), count(max(done, default=-1) + 1)  # a run that was cut off goes on

    def scores(part: str) -> dict[str, float]:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return token_scores(model, batches[part].epoch(0))

    def validate() -> dict[str, float]:
        number = next(epoch)
        kept(number)
        found = scores("valid")
        say(f"epoch {number}: {time.monotonic() - started:.0f} s, {found}")
        return found

    peak = args.peak * (args.dim * args.warmup) ** 0.5  # Noam's factor for this highest learning rate
    schedule = Constant() if args.constant else Noam(args.dim, args.warmup)
    fit(
        model, batches["train"], NextToken(label_smoothing=args.smoothing), epochs=args.epochs,
        lr=args.peak if args.constant else peak, schedule=schedule, clip_norm=1.0, validate=validate,
        seed=args.seed, bf16=True, progress=False, folder=folder / "run", checkpoint_every=100,
    )  # fmt: skip
    seconds = time.monotonic() - started
    kept.load_average()
    model.eval()
    result: dict[str, Any] = {"seconds": round(seconds), "parameters": sum(p.numel() for p in model.parameters())}
    result |= {f"valid_{name}": round(value, 4) for name, value in scores("valid").items()}
    for part in ("valid", "test"):
        for beam in () if args.sentences == 0 else (1, args.beam):
            begun = time.monotonic()
            written = translate(model, tokens, text[part, "de"][: args.sentences], beam, args.alpha)
            score, signature = bleu(written, text[part, "en"][: args.sentences])
            result[f"{part}_bleu_beam{beam}"] = round(score, 2)
            result["signature"] = signature
            result["examples"] = list(zip(text[part, "de"][:3], written[:3], text[part, "en"][:3], strict=True))
            say(f"{part} beam {beam}: BLEU {score:.2f} ({time.monotonic() - begun:.0f} s)")
    return result


def say(line: str) -> None:
    """A line of progress."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    """Train, translate the test sentences, write the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--pairs", type=int, help="train on the first pairs alone")
    parser.add_argument("--size", type=int, default=5000, help="rows of the vocabulary")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--ff", type=int, default=512)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--smoothing", type=float, default=0.1)
    parser.add_argument("--tokens", type=int, default=3072, help="slots of a batch, both languages together")
    parser.add_argument("--peak", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--warmup", type=int, default=500, help="steps")
    parser.add_argument("--constant", action="store_true", help="no schedule: the rate is --peak throughout")
    parser.add_argument("--post-norm", action="store_true")
    parser.add_argument("--average", type=int, default=5, help="epochs whose weights are averaged")
    parser.add_argument("--beam", type=int, default=5)
    parser.add_argument("--alpha", type=float, default=1.0)
    parser.add_argument("--sentences", type=int, help="translate so many of each part alone; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where the weights of epochs and result.json go")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        result = {key: value for key, value in vars(args).items() if key not in ("folder", "out")} | train(args, folder)
        line = json.dumps(result, ensure_ascii=False)
        (folder / "result.json").write_text(line + "\n", encoding="utf-8")
        say(line)


if __name__ == "__main__":
    main()
