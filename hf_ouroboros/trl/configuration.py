"""TRL's options and this package's in one, where both mean the same thing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl import DPOConfig, SFTConfig

from ..arguments import OuroborosArguments
from ..errors import UnsupportedOptionError

REFUSED = {
    "activation_offloading": "stages keep their activations in flight themselves; leave it False",
    "gradient_checkpointing_kwargs": "stages recompute by themselves; leave it out",
    "use_liger_kernel": "it replaces the model's forward; leave it False",
}
SYNCHRONIZED = {"sync_ref_model": "the reference is computed once, before training; leave it False"}


@dataclass
class OuroborosSFTConfig(SFTConfig, OuroborosArguments):
    """`trl.SFTConfig` and `OuroborosArguments`; `gradient_checkpointing=True`, TRL's default, is `recompute=True` here.

    Raises:
        UnsupportedOptionError: an option that has no meaning with stages.
    """

    def __post_init__(self) -> None:
        _before(self, REFUSED)
        super().__post_init__()


@dataclass
class OuroborosDPOConfig(DPOConfig, OuroborosArguments):
    """`trl.DPOConfig` and `OuroborosArguments`; `gradient_checkpointing=True`, TRL's default, is `recompute=True` here.

    Raises:
        UnsupportedOptionError: an option that has no meaning with stages.
    """

    precompute_ref_log_probs: bool = field(
        default=True,
        metadata={
            "help": "Whether the reference model's log-probabilities are computed before training. They always are: while "
            "stages train, no forward can go through all of them at one version of the weights."
        },
    )

    def __post_init__(self) -> None:
        _before(self, REFUSED | SYNCHRONIZED)
        if not self.precompute_ref_log_probs:
            raise UnsupportedOptionError(
                "precompute_ref_log_probs=False: a reference computed on the fly is a second forward through all stages, which "
                "are at work on other micro-batches; leave it True"
            )
        super().__post_init__()


def _before(config: Any, refused: dict[str, str]) -> None:
    for name, why in refused.items():
        if getattr(config, name):
            raise UnsupportedOptionError(f"{name}={getattr(config, name)!r}: {why}")
    if config.gradient_checkpointing:
        config.gradient_checkpointing, config.recompute = False, True
