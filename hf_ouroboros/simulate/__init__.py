"""Timelines of runs, measured or predicted: what each device did when, and pictures of it. Knows no torch."""

from __future__ import annotations

from hf_ouroboros.simulate.picture import draw
from hf_ouroboros.simulate.timeline import KINDS, DeviceSummary, Event, Timeline

__all__ = ["KINDS", "DeviceSummary", "Event", "Timeline", "draw"]
