"""Which options, and which of them together, have no meaning here: each is refused by name, with what to do instead."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .errors import UnsupportedOptionError
from .optim import choose
from .optim.advice import AUTOMATIC
from .planning.hardware import is_here
from .precision import autocast_dtype
from .schedules import SCHEDULES, names_where

if TYPE_CHECKING:
    from .arguments import OuroborosArguments

# option -> (is it on?, what to do instead)
_REFUSED: dict[str, tuple[Any, str]] = {
    "fp16_full_eval": (bool, "it would overwrite the weights with half precision; use fp16=True"),
    "bf16_full_eval": (bool, "it would overwrite the weights with half precision; use bf16=True"),
    "auto_find_batch_size": (bool, "it restarts training after a failure; choose per_device_train_batch_size yourself"),
    "fsdp": (bool, "stages are placed whole; use more stages, or recompute=True to save memory"),
    "deepspeed": (bool, "stages are placed whole; use more stages, or recompute=True to save memory"),
    "use_liger_kernel": (bool, "it replaces the model's forward; leave it off"),
    "neftune_noise_alpha": (lambda value: value is not None, "its noise is not tied to micro-batches; leave it off"),
    "gradient_checkpointing": (bool, "it recomputes with the weights of now; use recompute=True"),
    "activation_checkpointing": (bool, "it recomputes with the weights of now; use recompute=True"),
    "predict_with_generate": (
        bool,
        "every token would go through all stages by itself; leave it off, and let the saved model generate()",
    ),
    "parallelism_config": (lambda value: value is not None, "stages are the parallelism here; leave it unset"),
    "debug": (
        lambda value: "underflow_overflow" in [getattr(v, "value", v) for v in value or ()],
        "it follows one forward through all modules, but stages run several at once; leave it out",
    ),
    "torch_empty_cache_steps": (lambda value: value is not None, "emptying the cache would stall all stages"),
}

GLOBAL = names_where(lambda schedule: schedule.allows_global_norm)
HALVES = names_where(lambda schedule: schedule.allows_halves)
DELAYED = names_where(lambda schedule: not schedule.is_synchronous)
"""Names of the schedules that allow a norm of all gradients, the two halves of a tied gradient, and that delay."""


def check_options(args: OuroborosArguments) -> None:
    """Refuses options that have no meaning here.

    Raises:
        UnsupportedOptionError: says which, and what to do instead.
    """
    for name, (is_on, advice) in _REFUSED.items():
        value = getattr(args, name, None)
        if is_on(value):
            raise UnsupportedOptionError(f"{name}={value!r} is not supported by OuroborosTrainer: {advice}")
    autocast_dtype(args)
    optim = getattr(args.optim, "value", args.optim)  # str() of the enum member is its name in capitals
    if any(word in optim for word in ("lomo", "layerwise")):
        raise UnsupportedOptionError(
            f"optim={optim!r} updates weights during the backward pass, which delayed gradients rule out; "
            "use another optimizer, e.g. adamw_torch"
        )
    if "schedule_free" in optim:
        raise UnsupportedOptionError(
            f"optim={optim!r} swaps the weights for evaluation while micro-batches are in flight; use "
            "another optimizer, e.g. adamw_torch"
        )


def check_combinations(args: OuroborosArguments) -> None:
    """Refuses options that have no meaning together.

    Raises:
        UnsupportedOptionError: says which, and what to do instead.
    """
    if args.world_size % args.data_parallel_replicas:
        raise UnsupportedOptionError(
            f"data_parallel_replicas={args.data_parallel_replicas} does not divide the {args.world_size} process(es) of "
            "this run; N processes are R replicas of N/R devices, e.g. torchrun --nproc_per_node 4 with 2 replicas"
        )
    schedule = SCHEDULES[args.schedule]
    if args.world_size > 1 and not schedule.uses_devices:
        raise UnsupportedOptionError(
            f"schedule={args.schedule!r} is one device by definition; start it as one process (python script.py)"
        )
    if args.world_size > 1 and args.save_on_each_node:
        raise UnsupportedOptionError(
            "save_on_each_node=True would have several processes write what the main one puts together; leave it off: "
            "without a shared file system the parts travel to the main process"
        )
    if args.world_size > 1 and getattr(args, "train_sampling_strategy", None) == "batch_rebalance":
        raise UnsupportedOptionError(
            "train_sampling_strategy='batch_rebalance' gives every process its own rows, but the processes of a replica "
            "need the same ones; use 'random', 'sequential' or 'group_by_length'"
        )
    if args.torch_compile and schedule.divides_backward:
        raise UnsupportedOptionError(
            f"torch_compile=True makes backwards that compute all gradients at once, so that schedule={args.schedule!r} has "
            "nothing to fill bubbles with; use schedule='1f1b', to the same numbers, or leave torch_compile off"
        )
    if args.tied_gradient == "paper" and not schedule.allows_halves:
        raise UnsupportedOptionError(
            f"tied_gradient='paper' needs the output side's gradient in the same tick, which schedule="
            f"{args.schedule!r} doesn't have; use schedule={HALVES[0]!r}, or tied_gradient='joint'"
        )
    if args.clip_scope == "global" and not schedule.allows_global_norm:
        raise UnsupportedOptionError(
            f"clip_scope='global' makes every stage wait for all others in each update, which schedule={args.schedule!r} "
            f"rules out; use clip_scope='stage', or schedule {' or '.join(GLOBAL)}"
        )
    _check_weights(args)
    _check_scaling(args)
    _check_compensation(args)
    if args.timeline is not None and not schedule.uses_devices:
        raise UnsupportedOptionError(f"timeline records devices at work; schedule={args.schedule!r} has none to record")
    _check_devices(args)


def _check_weights(args: OuroborosArguments) -> None:
    if args.weights == "then":
        return
    if SCHEDULES[args.schedule].is_synchronous:
        raise UnsupportedOptionError(
            f"weights={args.weights!r} is about late backwards, but with schedule={args.schedule!r} none is late, and no older "
            f"weights are kept; leave weights at 'then', or use schedule {', '.join(DELAYED)}"
        )
    if args.tied_gradient == "paper":
        raise UnsupportedOptionError(
            f"weights={args.weights!r} and tied_gradient='paper' are of two different update rules; use tied_gradient='joint', or "
            "leave weights at 'then'"
        )


def _check_scaling(args: OuroborosArguments) -> None:
    if autocast_dtype(args) is not torch.float16:
        return
    if args.weights != "then":
        raise UnsupportedOptionError(
            f"weights={args.weights!r} keeps gradients of activations in checkpoints, which with fp16=True have the scale of their "
            "micro-batch's loss; leave weights at 'then', or use bf16=True"
        )
    if args.fused_head == "on":
        raise UnsupportedOptionError(
            "fused_head='on' computes gradients in the forward, before the loss is scaled, which fp16=True needs; leave fused_head "
            "at 'auto', or use bf16=True"
        )


def _check_compensation(args: OuroborosArguments) -> None:
    automatic = args.delay_compensation in AUTOMATIC
    if automatic and args.delay_compensation_args:
        raise UnsupportedOptionError(
            f"delay_compensation_args={args.delay_compensation_args!r} needs to know of what; name the compensation "
            f"instead of delay_compensation={args.delay_compensation!r}"
        )
    if args.delay_compensation == "auto":
        return
    # What "muon+auto" adds to Muon goes by K, which the trainer knows; it checks that with the weights.
    choice = choose("muon" if automatic else args.delay_compensation, args.delay_compensation_args)
    choice.check_weights(args.weights, args.delay_compensation)
    if choice.optimizer is not None and not args.has_default_optimizer:
        raise UnsupportedOptionError(
            f"delay_compensation={args.delay_compensation!r} brings its own optimizer, so optim="
            f"{getattr(args.optim, 'value', args.optim)!r} would have no effect; leave optim at adamw_torch"
        )


def _check_devices(args: OuroborosArguments) -> None:
    if args.devices is None or args.world_size > 1:
        return
    if len(set(args.devices)) < len(args.devices):
        raise UnsupportedOptionError(f"devices={args.devices} must be different names, e.g. cpu:0 cpu:1")
    kinds = {name.partition(":")[0] for name in args.devices}
    if len(kinds) > 1:
        raise UnsupportedOptionError(
            f"devices={args.devices} mixes {' and '.join(sorted(kinds))}: what crosses from one to the other is copied "
            "while both go on, which only devices of one kind can do; name devices of one kind"
        )
    for name in args.devices:
        if not is_here(name):
            raise UnsupportedOptionError(
                f"devices names {name!r}, which this machine doesn't have; give names with an index, e.g. cpu:0, "
                "or cuda:0 to cuda:N-1"
            )
