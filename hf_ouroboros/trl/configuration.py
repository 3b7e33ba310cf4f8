"""OuroborosSFTConfig: TRL's options and this package's, where both mean the same thing."""

from __future__ import annotations

from dataclasses import dataclass

from trl import SFTConfig

from ..arguments import OuroborosArguments
from ..errors import UnsupportedOptionError

REFUSED = {
    "activation_offloading": "stages keep their activations in flight themselves; leave it False",
    "gradient_checkpointing_kwargs": "stages recompute by themselves; leave it out",
    "use_liger_kernel": "it replaces the model's forward; leave it False",
}


@dataclass
class OuroborosSFTConfig(SFTConfig, OuroborosArguments):
    """`trl.SFTConfig` and `OuroborosArguments`; `gradient_checkpointing=True`, TRL's default, is `recompute=True` here.

    Raises:
        UnsupportedOptionError: an option that has no meaning with stages.
    """

    def __post_init__(self) -> None:
        for name, why in REFUSED.items():
            if getattr(self, name):
                raise UnsupportedOptionError(f"{name}={getattr(self, name)!r}: {why}")
        if self.gradient_checkpointing:
            self.gradient_checkpointing, self.recompute = False, True
        super().__post_init__()
        if self.data_parallel_replicas > 1:
            raise UnsupportedOptionError(
                f"data_parallel_replicas={self.data_parallel_replicas}: TRL's metrics are not put together over replicas; use "
                "one replica, or OuroborosTrainer"
            )
