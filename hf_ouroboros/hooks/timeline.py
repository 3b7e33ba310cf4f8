"""The timeline of a run: that it can be written is looked at before training, and it is written afterwards."""

from __future__ import annotations

from transformers.utils import logging

from ..errors import OutputFileError
from ..simulate.timeline import timeline_files
from ..user_files import check_writable
from .interfaces import SplitTrainer

logger = logging.get_logger(__name__)


class TimelineHooks(SplitTrainer):
    """Writes what the workers have executed; where devices are processes, the main process does, for the first replica."""

    def _check_timeline(self) -> None:
        """Raises before the first update what would be raised after the last one.

        Raises:
            OutputFileError: the timeline can't be written where it is wanted.
        """
        if self.options.timeline is not None and self.is_world_process_zero():
            check_writable("timeline", *timeline_files(self.options.timeline))

    def _write_timeline(self) -> None:
        path = self.options.timeline
        if self.timeline is None or path is None:
            return
        self.timeline = self._processes.gather_timeline(self.timeline)
        if self.is_world_process_zero():
            try:
                self.timeline.write(path)
            except OutputFileError as error:  # it could be when training began; the trained model is worth more
                logger.warning(f"timeline={path!r} is lost: {error}")
