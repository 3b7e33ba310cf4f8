"""Delay compensation: what a run may do about gradients that come late, and the one step that applies it."""

from .choice import Choice, choose
from .compensation import Compensation, StageUpdate
from .step import compensated_step, predictions

__all__ = ["Choice", "Compensation", "StageUpdate", "choose", "compensated_step", "predictions"]
