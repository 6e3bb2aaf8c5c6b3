"""The tiny training run of harness.py, for all tests of learn."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def harness() -> ModuleType:
    """harness.py as a module; its path is `harness.__file__`."""
    path = Path(__file__).with_name("harness.py")
    spec = importlib.util.spec_from_file_location("learn_harness", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["learn_harness"] = module
    spec.loader.exec_module(module)
    return module
