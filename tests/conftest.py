"""Shared fixtures. The jaxtyping hook checks every annotated shape at run time, in tests only."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

install_import_hook("funnelrec", "beartype.beartype")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of public data sets: FUNNELREC_DATA, or ../shared/data beside the project; the test skips without."""
    folder = Path(os.environ.get("FUNNELREC_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no public data sets at {folder}; set FUNNELREC_DATA to their folder")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tensors this small lose more to waking threads than they gain, most of all beside other test processes."""
    import torch  # after the hook above, and only where tests run

    torch.set_num_threads(1)
