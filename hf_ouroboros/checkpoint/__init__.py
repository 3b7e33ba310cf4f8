"""Checkpoints on disk: a manifest of what was written, one place that reads, directories that appear whole, one writer."""

from __future__ import annotations

from .manifest import STATE_META, StatePart, write_manifest
from .run_state import STATE_TENSORS, load_run_state, save_run_state, save_state_part

__all__ = [
    "STATE_META",
    "STATE_TENSORS",
    "StatePart",
    "load_run_state",
    "save_run_state",
    "save_state_part",
    "write_manifest",
]
