"""What was measured, in a file for the next time: taken only if it is whole, written as a whole, never a reason to fail."""

from __future__ import annotations

import json
import os
from pathlib import Path

from transformers.utils import logging

from ..errors import InputFileError, OutputFileError
from ..options import Number, from_json
from ..user_files import read_text, written_together

MOST_BYTES = 2**26
_SECONDS = Number(0.0)
logger = logging.get_logger(__name__)


def remembered(file: Path, devices: int, units: int) -> list[list[list[float]]] | None:
    """What a file says; None where there is none, or it says something else, which a new measurement replaces."""
    if not os.path.lexists(file):
        return None
    try:
        times = from_json(read_text(file, MOST_BYTES))
        if [[len(unit) for unit in row] for row in times] != [[3] * units] * devices:
            raise ValueError("other numbers of devices, units or times")
        return [[[_SECONDS.read(value) for value in unit] for unit in row] for row in times]
    except (InputFileError, ValueError, TypeError) as error:
        logger.warning(f"{file} holds no measurements ({error or 'a time that is none'}); they are made again")
        return None


def remember(file: Path, times: list[list[list[float]]]) -> None:
    """Writes what was measured; it is only for the next time, so a plan does not fail where it can't be kept."""
    try:
        with written_together(file) as (new,):
            new.write_text(json.dumps(times), encoding="utf-8")
    except OutputFileError as error:
        logger.warning(f"measurements are not kept for the next time: {error}")
