"""OuroborosArguments: TrainingArguments plus the options of delayed-gradient training, all checked early."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import cast

import torch
from transformers import TrainingArguments

from .argument_checks import GLOBAL, HALVES, check_combinations, check_options
from .argument_table import ARGUMENTS, words_of
from .engine.loss_scale import INITIAL
from .engine.settings import EngineSettings
from .optim.choice import NAMES
from .options import read_options
from .precision import autocast_dtype
from .processes.launch import check_launch, check_started, launched_processes
from .processes.meeting import present, refusing
from .schedules import DEFAULT, SCHEDULES


@dataclass
class OuroborosArguments(TrainingArguments):
    """Arguments of `OuroborosTrainer`: everything of TrainingArguments, and how to split and schedule the model.

    Raises:
        UnsupportedOptionError: an option, or a combination of options, that has no meaning here.
    """

    schedule: str = field(
        default=DEFAULT,
        metadata={
            "help": "How the update rule is executed: "
            + ", ".join(f"'{schedule.name}' ({schedule.summary})" for schedule in SCHEDULES.values())
            + ".",
            "choices": words_of("schedule"),
        },
    )
    num_stages: int | None = field(
        default=None,
        metadata={"help": "Stages K. Default: devices + 1 with tied embeddings on several devices, else devices."},
    )
    devices: list[str] | None = field(
        default=None,
        metadata={
            "help": "Devices in worker order, e.g. cuda:0 cuda:1 or cpu:0 cpu:1 (threads). Default: all visible "
            "accelerators, else cpu:0 cpu:1. Under a launch of several processes, each process is a device.",
        },
    )
    device_map: str = field(
        default="auto",
        metadata={
            "help": "auto, mixed (several stages per device where that balances better), balanced, sequential, a dict "
            "{module name prefix: device}, a list of layer counts or of [layers, device] per stage (dict and list as JSON on the "
            "command line), or a .json file that `hf-ouroboros plan` wrote. auto also honours model.hf_device_map.",
        },
    )
    max_memory: str | None = field(
        default=None,
        metadata={"help": 'Bytes of parameters per device, e.g. \'{"0": "10GB"}\'; a dict, or JSON.'},
    )
    data_parallel_replicas: int = field(
        default=1,
        metadata={"help": "Data-parallel replicas R of the pipeline; N processes are R replicas of N/R devices each."},
    )
    tied_gradient: str = field(
        default="joint",
        metadata={
            "help": "Gradient of a tied embedding: 'joint' delays both sides by K-1 ticks (exact for its batch), 'paper' "
            f"only the input side (schedules {' and '.join(HALVES)}).",
            "choices": words_of("tied_gradient"),
        },
    )
    clip_scope: str = field(
        default="stage",
        metadata={
            "help": "'stage' limits each stage's gradient norm to max_grad_norm/sqrt(K), so that the whole never exceeds "
            f"max_grad_norm; 'global' limits the norm of the whole (with schedules {', '.join(GLOBAL)}).",
            "choices": words_of("clip_scope"),
        },
    )
    delay_warmup_steps: int = field(
        default=0, metadata={"help": "Updates without delay (drained pipeline) before the delays start."}
    )
    delay_compensation: str = field(
        default="none",
        metadata={
            "help": "What the optimizer does about the delay: none; auto, which keeps AdamW where it can; muon+auto, which is "
            f"recommended from scratch; or {', '.join(NAMES)}, several joined by '+'.",
        },
    )
    delay_compensation_args: str | None = field(
        default=None,
        metadata={"help": "Options of the compensations, e.g. 'momentum=0.9,anneal=2000'; see hf_ouroboros/optim."},
    )
    eval_mem_len: int | None = field(
        default=None,
        metadata={"help": "Rows of memory per layer during evaluation (Transformer-XL). Default: as in training."},
    )
    eval_clamp_len: int | None = field(
        default=None,
        metadata={
            "help": "Distances beyond it count as this distance during evaluation, 0 for no clamping (Transformer-XL). "
            "Default: as in training.",
        },
    )
    recompute: bool = field(
        default=False,
        metadata={
            "help": "Keep only the inputs of in-flight micro-batches and replay their forward at backward, with the weights "
            "and dropout masks of then.",
        },
    )
    weights: str = field(
        default="then",
        metadata={
            "help": "Weights of a late backward: 'then', those of its forward, older versions being kept, or 'now', the newest "
            "ones, with which it replays its forward (features replay: another update rule, that keeps no older version).",
            "choices": words_of("weights"),
        },
    )
    fused_head: str = field(
        default="auto",
        metadata={
            "help": "Compute the loss from hidden states chunk by chunk, without building logits, where the head is a plain matrix "
            "and nobody looks at logits: 'on', 'off', or 'auto', which does so from a vocabulary of 16,384 on.",
            "choices": words_of("fused_head"),
        },
    )
    resume_changed: str = field(
        default="refuse",
        metadata={
            "help": "What to do about a checkpoint whose files are not as they were written: 'refuse' it, or 'accept' changes "
            "made on purpose (weights in other shards, an edited trainer_state.json), as far as its files can be read and fit.",
            "choices": ["refuse", "accept"],
        },
    )
    timeline: str | None = field(
        default=None,
        metadata={"help": "Path: record every executed instruction there (Chrome trace JSON and a PNG)."},
    )

    def __post_init__(self) -> None:
        check_launch()
        if launched_processes() > 1 and not torch.accelerator.is_available():
            self.use_cpu = True  # otherwise accelerate would not connect the processes
        with refusing(self.use_cpu, self.ddp_backend):
            read_options(self, ARGUMENTS)
            self._meet_and_check()

    def _meet_and_check(self) -> None:
        """Connects the processes, and checks the options; the others hear of a refusal, also if it comes before."""
        super().__post_init__()
        check_started(self.world_size)
        present()
        check_options(self)
        check_combinations(self)
        if self.device_names[0].startswith("cpu"):
            self.dataloader_pin_memory = False  # torch warns in every epoch where there is nothing to pin for

    @classmethod
    def from_training_arguments(cls, args: TrainingArguments) -> OuroborosArguments:
        """Options for a script that only swaps the Trainer: its own arguments, with the defaults of this class beside them.

        Both are the same object but for their class: what is changed in one of them is changed in the other.

        Raises:
            UnsupportedOptionError: an option, or a combination of options, that has no meaning here.
        """
        if isinstance(args, cls):
            return args
        if launched_processes() > 1 and not torch.accelerator.is_available() and not args.use_cpu:
            args.use_cpu = True
            args.__dict__.pop("__cached__setup_devices", None)  # this time, accelerate connects the processes
        options = object.__new__(_with_defaults(cast(Hashable, type(args))))  # mypy looks for the hash of its objects
        options.__dict__ = args.__dict__
        with refusing(args.use_cpu, args.ddp_backend):
            check_launch()
            check_started(options.world_size)
            present()
            options.check()
        return options

    def check(self) -> None:
        """Reads and checks all options as they are now.

        Raises:
            UnsupportedOptionError: an option, or a combination of options, that has no meaning here.
        """
        read_options(self, {name: rule for name, rule in ARGUMENTS.items() if name in vars(self)})
        check_options(self)
        check_combinations(self)

    # ---- what Trainer asks ----

    @property
    def n_gpu(self) -> int:
        """At most 1: several devices are stages here, never `nn.DataParallel`."""
        return min(1, super().n_gpu)

    @property
    def place_model_on_device(self) -> bool:
        """False: stages go to their own devices."""
        return False

    # ---- what the trainer asks ----

    @property
    def device_names(self) -> list[str]:
        """The devices in worker order."""
        if self.world_size > 1:
            return [f"{self.device.type}:{i}" for i in range(self.world_size // self.data_parallel_replicas)]
        if self.devices:
            return list(self.devices)
        accelerator = None if self.use_cpu else torch.accelerator.current_accelerator(check_available=True)
        if accelerator is None:
            return ["cpu:0", "cpu:1"]
        return [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())]

    @property
    def evaluation_options(self) -> dict[str, int]:
        """What evaluation changes in the model's configuration."""
        options = {"mem_len": self.eval_mem_len, "clamp_len": self.eval_clamp_len}
        return {name: value for name, value in options.items() if value is not None}

    @property
    def has_default_optimizer(self) -> bool:
        """Whether `optim` is torch's AdamW."""
        return getattr(self.optim, "value", self.optim) in ("adamw_torch", "adamw_torch_fused") and not self.optim_args

    def engine_settings(self, num_workers: int) -> EngineSettings:
        """The engine's settings for a split that is meant for so many devices."""
        on_cpu, dtype = self.device_names[0].startswith("cpu"), autocast_dtype(self)
        return EngineSettings(
            schedule=self.schedule,
            tied_gradient=self.tied_gradient,
            max_grad_norm=self.max_grad_norm or None,
            clip_scope=self.clip_scope,
            delay_warmup_steps=self.delay_warmup_steps,
            seed=self.seed,
            autocast_dtype=dtype,
            recompute=self.recompute,
            # The reference computes on one device, but with the threads that each of the devices would have:
            # kernels may sum in another order with another number of threads. A process of several has its own share.
            threads=max(1, torch.get_num_threads() // (1 if self.world_size > 1 else num_workers)) if on_cpu else None,
            micro_batches=self.gradient_accumulation_steps,
            weights=self.weights,
            initial_loss_scale=INITIAL if dtype is torch.float16 else None,
        )


@functools.cache
def _with_defaults(cls: type[TrainingArguments]) -> type[OuroborosArguments]:
    """A class of a script's arguments with the options of this package, which its objects have the defaults of."""
    made = cast(
        type[OuroborosArguments],
        type(f"Ouroboros{cls.__name__}", (OuroborosArguments, cls), {"__module__": __name__}),
    )
    made.__dataclass_fields__ = {**cls.__dataclass_fields__, **OuroborosArguments.__dataclass_fields__}
    return made
