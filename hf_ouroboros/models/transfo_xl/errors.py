"""The named error of vocabulary and checkpoint conversion."""

from __future__ import annotations

from ...errors import OuroborosError


class ConversionError(OuroborosError, ValueError):
    """An old checkpoint or vocabulary that can't be converted: unsafe, damaged, or not what it should be."""
