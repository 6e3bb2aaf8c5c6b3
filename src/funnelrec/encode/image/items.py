"""Pictures of items as vectors: encoded once, kept by what is in the picture and which encoder it was.

    vectors = picture_vectors(items["picture"].to_list(), "encoder/", cache="cache/")
    items = items.with_columns(pl.Series("look", vectors))          # a Vector field: match and rank read it as any

The encoder is a folder that `funnelrec finetune` wrote. A picture is its bytes or the path of its file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from funnelrec.data.images import actions, decode
from funnelrec.encode.image.classifier import Classifier
from funnelrec.encode.image.named import load_classifier

__all__ = ["picture_vectors"]

CHUNK = 128


def picture_vectors(
    pictures: Sequence[bytes | str | Path | None], encoder: Path | str, cache: Path | str
) -> Float[np.ndarray, "n D"]:
    """One vector a picture, standing still where the same encoder has seen the same bytes before.

    A picture that is missing or faulty (and cannot be mended) has the vector 0: it says nothing. Raises ValueError for
    a damaged encoder; a damaged cache is made anew.
    """
    model, facts = load_classifier(encoder)
    size, channels = int(facts["size"]), int(facts["in_channels"])
    file = Path(cache) / f"{facts['sha256'][:16]}.safetensors"  # another encoder, another file
    known = _open(file)
    keys = [_key(data) for data in map(_bytes, pictures)]
    new = {key: place for place, key in enumerate(keys) if key and key not in known}
    places = list(new.items())
    for start in range(0, len(places), CHUNK):
        part = places[start : start + CHUNK]
        decoded = [
            decode(_bytes(pictures[place]), key, size=size, channels=channels, told=actions("use"))[0]
            for key, place in part
        ]
        good = [(key, pixels) for (key, _), pixels in zip(part, decoded, strict=True) if pixels is not None]
        if good:
            found = _encode(model, np.stack([pixels for _, pixels in good]))
            known |= dict(zip((key for key, _ in good), found, strict=True))
    if new:
        Path(cache).mkdir(parents=True, exist_ok=True)
        part_file = file.with_suffix(".part")
        save_file({key: np.ascontiguousarray(vector) for key, vector in known.items()}, part_file)
        part_file.replace(file)
    nothing = np.zeros(int(model.network.num_features), dtype=np.float32)
    return np.stack([known.get(key, nothing) for key in keys]) if keys else np.empty((0, len(nothing)), np.float32)


def _bytes(picture: bytes | str | Path | None) -> bytes:
    if picture is None or isinstance(picture, bytes):
        return picture or b""
    try:
        return Path(picture).read_bytes()
    except OSError:
        return b""


def _key(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if data else ""


def _open(file: Path) -> dict[str, np.ndarray]:
    try:
        return dict(load_file(file))
    except (OSError, SafetensorError):
        return {}


@torch.no_grad()
def _encode(model: Classifier, pixels: np.ndarray) -> np.ndarray:
    vectors: np.ndarray = model.encode(torch.from_numpy(pixels)).float().numpy()
    return vectors
