"""A text encoder on disk, and the vectors of texts by it.

    save_encoder("reader", network, tokens)           model.safetensors, tokens.json, encoder.json with their digests
    network, tokens = load_encoder("reader")
    vectors = encode_texts(network, tokens, titles, cache="vectors")      [N, D], each text made once

The vectors are for `ContentEncoder` and the adapter behind it: a `Vector` field of the items, beside given ones.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from funnelrec.encode.cache import VectorCache
from funnelrec.encode.text.tokens import Tokens

__all__ = ["encode_texts", "encoder_version", "load_encoder", "save_encoder"]

WEIGHTS, VOCABULARY, FACTS = "model.safetensors", "tokens.json", "encoder.json"
PACKAGE = "funnelrec.encode.text."


def encoder_version(network: nn.Module, tokens: Tokens) -> str:
    """Changes with any weight, any word and any rule of cutting; the same on every machine."""
    state = hashlib.sha256(f"{type(network).__qualname__} {tokens.digest}".encode())
    for name, tensor in network.state_dict().items():
        state.update(name.encode())
        state.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()[:16]


@torch.no_grad()
def encode_texts(
    network: nn.Module,
    tokens: Tokens,
    texts: Sequence[str],
    *,
    cache: Path | str | None = None,
    max_len: int = 256,
    batch_size: int = 256,
) -> Float[Tensor, "N D"]:
    """The vector of each text by `network.encode`, dropout off, of its first `max_len` tokens.

    cache: a folder where vectors stay, by the version of the encoder, `max_len` and the text itself.
    """
    encode: Any = network.encode

    def make(places: list[int]) -> Tensor:
        was_training = network.training
        network.eval()
        order = sorted(places, key=lambda i: len(texts[i]))  # texts of about one length share a batch
        parts = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
        made = torch.cat([encode(tokens.rows([texts[i] for i in part], max_len)) for part in parts])
        network.train(was_training)
        back = {place: row for row, place in enumerate(order)}
        return made[torch.tensor([back[place] for place in places])]

    if not texts:
        return torch.zeros(0, int(network.num_features))  # type: ignore[arg-type]
    if cache is None:
        return make(list(range(len(texts))))
    return VectorCache(cache, f"{encoder_version(network, tokens)}-{max_len}")(texts, make)


def save_encoder(folder: Path | str, network: nn.Module, tokens: Tokens) -> Path:
    """Write a network of this folder with its vocabulary. Raises ValueError for one that keeps no configuration."""
    file = type(network).__module__.removeprefix(PACKAGE)
    config = getattr(network, "config", None)
    if config is None or type(network).__module__ != PACKAGE + file:
        raise ValueError(f"{type(network).__name__} is no text encoder that can be built again from its configuration")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_model(network, str(folder / WEIGHTS))
    tokens.save(folder / VOCABULARY)
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in (WEIGHTS, VOCABULARY)}
    facts = {"format": 1, "file": file, "config": config, "sha256": digests}
    (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return folder


def load_encoder(folder: Path | str) -> tuple[nn.Module, Tokens]:
    """What `save_encoder` wrote, in eval mode. Raises ValueError for a damaged folder."""
    folder = Path(folder)
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        for name, stated in facts["sha256"].items():
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != stated:
                raise ValueError(f"{name} was changed after it was written")
        if not re.fullmatch(r"[a-z0-9_]+", facts["file"]):
            raise ValueError(f"no encoder is in a file {facts['file']!r}")
        module = importlib.import_module(PACKAGE + facts["file"])
        network: nn.Module = getattr(module, module.__all__[0])(**facts["config"])
        load_model(network, str(folder / WEIGHTS))
        tokens = Tokens.open(folder / VOCABULARY)
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, ImportError, SafetensorError) as error:
        raise ValueError(f"{folder} holds no text encoder: {error}; save it again") from error
    return network.eval(), tokens
