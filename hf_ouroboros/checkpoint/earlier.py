"""What to do about a damaged checkpoint: the newest complete one before it, found with the same strictness."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ..errors import CheckpointError, CheckpointMismatchError
from .reading import Checkpoint


def newest_complete_before(checkpoint: str | Path) -> Path | None:
    """The newest checkpoint beside this one that comes before it and is whole in every respect; None if there is none."""
    checkpoint = Path(checkpoint)
    limit = _number_of(checkpoint)
    with contextlib.suppress(OSError):
        found = [(_number_of(path), path) for path in checkpoint.parent.glob("checkpoint-*")]
        for step, path in sorted(found, reverse=True):
            if 0 < step < limit:
                with contextlib.suppress(CheckpointError):
                    Checkpoint.open(path).read_all()
                    return path
    return None


def advice(checkpoint: str | Path) -> str:
    """A sentence that names the newest complete checkpoint before a damaged one; empty if there is none."""
    earlier = newest_complete_before(checkpoint)
    if earlier is None:
        return ""
    return f". The checkpoint before it is complete: resume_from_checkpoint={str(earlier)!r}"


@contextlib.contextmanager
def offering_earlier(checkpoint: str | Path) -> Iterator[None]:
    """Adds to the error about a damaged checkpoint which earlier one beside it is complete.

    Not where it is whole, but of another kind of run: those before it would fail alike.
    """
    try:
        yield
    except CheckpointMismatchError:
        raise
    except CheckpointError as error:
        if not (sentence := advice(checkpoint)):
            raise
        raise CheckpointError(f"{error}{sentence}") from error


def _number_of(path: Path) -> int:
    number = path.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() and number.isascii() and len(number) < 19 else 0
