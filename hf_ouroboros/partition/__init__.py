"""Model -> stages: device maps, the balanced split, and stages that share the model's parameters."""

from .split import OwnDevice, Partition, split_model
from .stage_plan import StagePlan, StageRow, torch_device
from .stages import Boundary, Finish, Memory, ModelCall, Stage, compose, select, to_device

__all__ = [
    "Boundary",
    "Finish",
    "Memory",
    "ModelCall",
    "OwnDevice",
    "Partition",
    "Stage",
    "StagePlan",
    "StageRow",
    "compose",
    "select",
    "split_model",
    "to_device",
    "torch_device",
]
