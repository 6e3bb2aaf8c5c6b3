"""A model's constructor signature is its configuration; this keeps what it was called with.

`@keeps_config` above a model class stores the arguments as plain data in `model.config` (and the `spec`, if there is
one, in `model.spec`), so that an artifact can hold them as JSON and build the model again. Nothing is declared twice.
"""

from __future__ import annotations

import functools
import inspect
import json
from typing import Any, TypeVar

__all__ = ["keeps_config"]

Class = TypeVar("Class", bound=type[Any])


def keeps_config(cls: Class) -> Class:
    """Class decorator: `config` is a dict of the constructor's arguments, defaults included, `spec` left out.

    Raises ValueError at construction for an argument that JSON cannot hold.
    """
    init = cls.__init__
    signature = inspect.signature(init)

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        arguments = dict(list(bound.arguments.items())[1:])
        spec = arguments.pop("spec", None)
        try:
            config = json.loads(json.dumps(arguments, allow_nan=False))
        except (TypeError, ValueError):
            raise ValueError(
                f"the arguments of {cls.__name__} must be numbers, words, booleans or lists of them, "
                f"received {arguments}"
            ) from None
        init(self, *args, **kwargs)
        self.config = config
        if spec is not None:
            self.spec = spec

    cls.__init__ = __init__
    return cls
