"""keeps_config: what a model was built with, as plain data."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from torch import nn

from funnelrec.core.config import keeps_config
from funnelrec.core.schema import Spec


@keeps_config
class Small(nn.Module):
    """A model."""

    def __init__(self, spec: Spec, *, hidden: Sequence[int] = (4, 2), dropout: float = 0.1) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.widths = tuple(hidden)


def test_config_holds_defaults_and_given_arguments() -> None:
    spec = Spec(num_items=7)
    model = Small(spec, dropout=0.5)
    assert model.config == {"hidden": [4, 2], "dropout": 0.5}
    assert model.spec is spec
    assert Small(spec, **model.config).config == model.config


def test_the_class_stays_what_it_was() -> None:
    assert Small.__name__ == "Small"
    assert Small.__doc__ == "A model."
    assert isinstance(Small(Spec()).dropout, nn.Dropout)
    with pytest.raises(TypeError, match="drop_rate"):
        Small(Spec(), drop_rate=0.5)  # type: ignore[call-arg]


def test_arguments_that_json_cannot_hold_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the arguments of Small must be numbers, words.*received"):
        Small(Spec(), dropout=float("nan"))
