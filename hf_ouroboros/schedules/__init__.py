"""Schedules: which device does what in which order. One record each in `records.py`; knows no torch, no threads, no clock."""

from __future__ import annotations

from hf_ouroboros.schedules.records import (
    DEFAULT,
    SCHEDULES,
    Schedule,
    device_programs,
    names_where,
    schedule_named,
)

__all__ = ["DEFAULT", "SCHEDULES", "Schedule", "device_programs", "names_where", "schedule_named"]
