"""AutoStaged models: `from_pretrained` and `from_config` for processes that each hold some of the stages."""

from __future__ import annotations

from os import PathLike
from typing import Any, ClassVar

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
)

from .arguments import OuroborosArguments
from .partition.initialising import initialise_owned
from .partition.owned_weights import load_owned, load_owned_packed
from .partition.ownership import Owned
from .partition.packed_loading import Packing
from .partition.split import plan_ownership


class AutoStagedModelForCausalLM:
    """Makes models whose foreign parameters are on the meta device, ready for `OuroborosTrainer`.

    Under a launch of several processes each gets the parameters of its own stages and never holds more; in a single
    process these are `AutoModelForCausalLM.from_pretrained` and `from_config`. Values are the same in both cases.
    """

    _auto: ClassVar[Any] = AutoModelForCausalLM

    def __init__(self) -> None:
        raise TypeError(
            f"{type(self).__name__} is not instantiated: use {type(self).__name__}.from_pretrained(name, args=args) or "
            ".from_config(config, args=args)"
        )

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str | PathLike[str],
        *,
        args: OuroborosArguments,
        frozen: bool = False,
        **kwargs: Any,
    ) -> PreTrainedModel:
        """Loads a pretrained model.

        Args:
            model_name_or_path: local folder or Hub name.
            args: what the model will be trained with: devices, device_map, num_stages, replicas.
            frozen: whether nothing of it will be trained, only adapters on top of it (`get_peft_model`): tied embeddings then
                may be on two devices.
            kwargs: as for the `from_pretrained` of transformers' own Auto class; with a `BitsAndBytesConfig`, a
                `TorchAoConfig` or `QuantoConfig` of weights as int8, as `quantization_config` every process packs its own matrices, one after
                the other. A checkpoint that was saved packed stays as it is.

        Raises:
            UnsupportedModelError, DeviceMapError: the model can't be split as `args` say, or is quantized in another way.
            UnsupportedOptionError: an argument that places or rewrites parameters.
        """
        if args.world_size == 1:
            if kwargs.get("quantization_config") is not None:
                kwargs.setdefault("device_map", {"": "cpu"})  # else all of it would be packed on one accelerator
            return _kept(cls._auto.from_pretrained(model_name_or_path, **kwargs), frozen)
        config = kwargs.pop("config", None)
        if config is None:
            config, kwargs = AutoConfig.from_pretrained(model_name_or_path, return_unused_kwargs=True, **kwargs)
        saved, quantization = getattr(config, "quantization_config", None), kwargs.pop("quantization_config", None)
        if saved is not None:
            stored = Packing(saved)
            stored.check_saved(model_name_or_path)
            owned = cls._ownership(config, args, frozen, stored)
            model = load_owned_packed(model_name_or_path, owned, cls._auto, quantization, config=config, **kwargs)
            return _kept(model, frozen)
        packing = None if quantization is None else Packing(quantization)
        owned = cls._ownership(config, args, frozen, packing)
        return _kept(load_owned(model_name_or_path, owned, cls._auto, packing, config=config, **kwargs), frozen)

    @classmethod
    def from_config(cls, config: PretrainedConfig, *, args: OuroborosArguments, **kwargs: Any) -> PreTrainedModel:
        """Initialises a model from scratch; all processes must have the same seed set (`transformers.set_seed`).

        Args:
            config: configuration of the model.
            args: what the model will be trained with.
            kwargs: as for the `from_config` of transformers' own Auto class.

        Raises:
            UnsupportedModelError, DeviceMapError: the model can't be split as `args` say, or built in parts.
        """
        if args.world_size == 1:
            return cls._auto.from_config(config, **kwargs)
        return initialise_owned(config, cls._ownership(config, args), cls._auto.from_config, **kwargs)

    @classmethod
    def _ownership(
        cls, config: PretrainedConfig, args: OuroborosArguments, frozen: bool = False, packing: Packing | None = None
    ) -> Owned:
        """Which parameters this process will own, found on a model without memory."""
        with torch.device("meta"):
            skeleton = _kept(cls._auto.from_config(config), frozen)
        if packing is not None:
            packing.of_meta(skeleton, packing.exceptions(skeleton))
        index = args.process_index % len(args.device_names)
        memory: Any = args.max_memory  # text on the command line, and read by now
        return plan_ownership(skeleton, args.device_names, args.device_map, args.num_stages, memory, index)


class AutoStagedModelForSeq2SeqLM(AutoStagedModelForCausalLM):
    """The same for encoder-decoder models, in the place of `AutoModelForSeq2SeqLM`."""

    _auto: ClassVar[Any] = AutoModelForSeq2SeqLM


def _kept(model: PreTrainedModel, frozen: bool) -> PreTrainedModel:
    """The model, frozen or as it is."""
    return model.requires_grad_(False) if frozen else model
