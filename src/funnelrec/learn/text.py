"""Training of what writes text: the loss over a vocabulary, perplexity, and averaged checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.learn.checkpoint import load_weights, weights_of

__all__ = ["KeepWeights", "MaskedPairsLoss", "NextToken", "average_weights", "token_scores"]

CHUNK = 256  #: states whose logits are alive at a time: they stay in the cache


@dataclass(frozen=True)
class NextToken:
    """Mean cross-entropy of the tokens to predict, against (1 - ε) · one-hot + ε / V, V the whole vocabulary.

    The model has `token_states(batch) -> (states [P, D], tokens [P])` and `logits(states)`; the mean is over the P
    tokens, so padding and the number of texts have no say. With ε > 0 the loss cannot reach 0: its floor is the entropy
    of the smoothed target. Source: Szegedy et al. 2016, Section 7.
    """

    label_smoothing: float = 0.0

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        states, tokens = model.token_states(batch)
        return _against_vocabulary(model, states, tokens, self.label_smoothing)


@dataclass(frozen=True)
class MaskedPairsLoss:
    """Cross-entropy of the hidden tokens plus that of "B follows A" (`batch.follows`), each a mean, from one pass.

    Source: Devlin et al. 2019, Section 3.1 and appendix A.2. Without the second part it is `NextToken()`.
    """

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        states, tokens, follows = model.both_states(batch)
        return _against_vocabulary(model, states, tokens, 0.0) + F.cross_entropy(follows.float(), batch.follows)


def _against_vocabulary(model: Any, states: Tensor, tokens: Tensor, smoothing: float) -> Tensor:
    """The mean cross-entropy of `tokens`, a few states at a time."""
    total: Tensor = states.float().sum() * 0.0
    for part, wanted in zip(torch.split(states, CHUNK), torch.split(tokens, CHUNK), strict=True):
        logits = model.logits(part).float()
        total = total + F.cross_entropy(logits, wanted, reduction="sum", label_smoothing=smoothing)
    return total / max(1, len(tokens))


@torch.no_grad()
def token_scores(model: Any, batches: Iterable[Batch]) -> dict[str, float]:
    """`nll` in nats a token, not smoothed, `perplexity` = exp(nll) and `accuracy` over all tokens to predict."""
    nll, right, count = 0.0, 0, 0
    for batch in batches:
        states, tokens = model.token_states(batch)
        for part, wanted in zip(torch.split(states, CHUNK), torch.split(tokens, CHUNK), strict=True):
            logits = model.logits(part).float()
            nll += float(F.cross_entropy(logits, wanted, reduction="sum"))
            right += int((logits.argmax(1) == wanted).sum())
            count += len(wanted)
    if count == 0:
        raise ValueError("there is no token to predict; the texts are empty")
    return {"nll": nll / count, "perplexity": float(torch.tensor(nll / count).exp()), "accuracy": right / count}


def average_weights(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each tensor over checkpoints of one network; whole numbers are those of the last checkpoint."""
    if not states:
        raise ValueError("there is no checkpoint to average")
    shapes = [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in states]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError("the checkpoints belong to networks of different shapes; average those of one run")
    return {
        name: sum((state[name].double() for state in states), torch.zeros(())).div(len(states)).to(last.dtype)
        if last.is_floating_point()
        else last.clone()
        for name, last in states[-1].items()
    }


class KeepWeights:
    """Keeps the weights of the newest epochs in a folder, for averaging: call it at the end of each epoch.

    They lie beside the run's checkpoints, so a run that is resumed averages what an undisturbed one would.
    """

    def __init__(self, model: nn.Module, folder: Path | str, *, keep: int = 5) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, received {keep}")
        self.model, self.folder, self.keep = model, Path(folder), keep

    def __call__(self, epoch: int) -> None:
        """Write the weights of `epoch` and drop those that are `keep` epochs older."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights_of(self.model).items()}
        temporary = self.folder / ".writing"
        save_file(tensors, temporary)
        temporary.rename(self.folder / f"epoch-{epoch:06d}.safetensors")
        for old in self.files()[: -self.keep]:
            old.unlink()

    def files(self) -> list[Path]:
        """What is kept, oldest first."""
        return sorted(self.folder.glob("epoch-*.safetensors"))

    def load_average(self) -> None:
        """Put the mean of what is kept into the model."""
        load_weights(self.model, average_weights([load_file(path) for path in self.files()]))
