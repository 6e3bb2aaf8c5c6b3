"""Vectors of contents, each made once: kept on disk under the version of what made them.

    cache = VectorCache("vectors", version=digest_of_the_encoder)
    vectors = cache(texts, lambda missing: encode([texts[i] for i in missing]))

The same for texts, pictures and whatever else has bytes. A content is known by the SHA-256 of its bytes, so a corrected
title is made anew and the others are not; another version of the encoder is another file, and old versions stay until
somebody deletes them. A file is written whole or not at all.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["VectorCache"]


class VectorCache:
    """Vectors by content, of one version of an encoder (letters, digits, - and _)."""

    def __init__(self, folder: Path | str, version: str) -> None:
        if not version or not version.replace("-", "").replace("_", "").isalnum():
            raise ValueError(f"a version is made of letters, digits, - and _, received {version!r}")
        self.path = Path(folder) / f"{version}.safetensors"
        self.made = 0  #: vectors that were made, not found, since this object exists

    def __call__(self, contents: Sequence[str | bytes], make: Callable[[list[int]], Tensor]) -> Float[Tensor, "N D"]:
        """The vector of each content. `make` gets the places of the distinct contents that are new, and gives their
        vectors [n, D]; it is not called when there are none."""
        keys = [hashlib.sha256(c.encode() if isinstance(c, str) else c).digest() for c in contents]
        known, vectors = self._read()
        missing = list({key: place for place, key in reversed(list(enumerate(keys))) if key not in known}.values())
        missing.sort()
        if missing:
            new = make(missing).detach().float().cpu()
            if new.dim() != 2 or len(new) != len(missing):
                raise ValueError(f"{len(missing)} contents need as many vectors, received {list(new.shape)}")
            if vectors is not None and vectors.shape[1] != new.shape[1]:
                raise ValueError(
                    f"{self.path.name} holds vectors of {vectors.shape[1]} numbers, received {new.shape[1]}: a changed "
                    "encoder needs a version of its own"
                )
            known |= {keys[place]: len(known) + i for i, place in enumerate(missing)}
            vectors = new if vectors is None else torch.cat([vectors, new])
            self._write(list(known), vectors)
            self.made += len(missing)
        if vectors is None:
            return torch.zeros(0, 0)
        return vectors[torch.tensor([known[key] for key in keys], dtype=torch.int64)]

    def _read(self) -> tuple[dict[bytes, int], Tensor | None]:
        if not self.path.is_file():
            return {}, None
        try:
            kept = load_file(self.path)
            flat = kept["keys"].numpy().tobytes()
            vectors = kept["vectors"]
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{self.path} is damaged ({error}); delete it, and the vectors are made again") from error
        return {flat[i : i + 32]: i // 32 for i in range(0, len(flat), 32)}, vectors

    def _write(self, keys: list[bytes], vectors: Tensor) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(f".{os.getpid()}.tmp")
        save_file({"keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8), "vectors": vectors}, draft)
        draft.replace(self.path)
