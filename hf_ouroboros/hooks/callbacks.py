"""Callbacks of a script: which are its own, and what they may touch."""

from __future__ import annotations

from typing import Any

_LIBRARIES = ("transformers", __name__.split(".")[0])


def is_foreign(owner: Any, name: str) -> bool:
    """Whether a method, of a callback or a trainer, is a script's own: neither Transformers' nor this package's."""
    method = getattr(owner, name, None)
    function = getattr(method, "__func__", method)
    module = getattr(function, "__module__", None) or ""
    return method is not None and module.split(".")[0] not in _LIBRARIES
