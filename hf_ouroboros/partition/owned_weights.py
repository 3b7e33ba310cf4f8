"""Loads only the owned parameters of a checkpoint: `from_pretrained` for a process that holds some of the stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from ..errors import UnsupportedOptionError
from .ownership import Owned, check_owned, names_of_parameters, release_foreign
from .packed_loading import Packing

# They place, shard or rewrite the parameters themselves.
REFUSED = (
    "device_map",
    "device_mesh",
    "distributed_config",
    "gguf_file",
    "max_memory",
    "output_loading_info",
    "quantization_config",
    "state_dict",
    "tp_plan",
    "tp_size",
)


def load_owned(
    model_name_or_path: str | PathLike[str],
    owned: Owned,
    model_class: Any = AutoModelForCausalLM,
    packing: Packing | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Builds a pretrained model of which only the owned parameters have values; the others are on the meta device.

    Owned parameters, buffers, tying, key renaming, reports and errors are those of plain `from_pretrained`, because it
    does the work: a device map sends what is foreign to "meta", which transformers handles lazily, tensor by tensor,
    on memory-mapped files. Parameters that the checkpoint lacks are initialised as `from_pretrained` would do it in a
    process with the same seed, all of them everywhere, before the foreign ones are let go.

    Memory: the owned parameters. Without a conversion of dtype they are the mapped file itself, read when they are
    first used; with one, the mapped pages of the original tensors come on top until the end of the call.

    Args:
        model_name_or_path: local folder or Hub name, as for `from_pretrained`.
        owned: whether this process owns the parameter of that name, as in `model.named_parameters()`; a tied matrix
            is owned if it is under any of its names.
        model_class: what `from_pretrained` is called on: an Auto class or a model class.
        packing: how linear modules are packed, one after the other, while they are loaded; None for not at all.
        kwargs: passed on: `dtype`, `revision`, `subfolder`, `config`, values of the configuration, ...

    Returns:
        The model, on CPU, in evaluation mode as `from_pretrained` returns it.

    Raises:
        UnsupportedOptionError: an argument that places or rewrites parameters (`device_map`, quantization, ...).
        UnsupportedModelError: an owned parameter was left without values.
    """
    _check_given(kwargs)
    with _quietly():
        skeleton, report = model_class.from_pretrained(
            model_name_or_path, device_map={"": "meta"}, output_loading_info=True, **kwargs
        )
    lacking = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"]), *_undecided(skeleton)}
    foreign = [
        name
        for _, names in names_of_parameters(skeleton)
        if not any(owned(name) or name in lacking for name in names)
        for name in names
    ]
    # Names that the map does not hold go to the CPU. Naming them would make two devices, and accelerate's hooks.
    places = dict.fromkeys(foreign, "meta") or None
    if packing is not None:
        kwargs["quantization_config"], exceptions = packing.of_own(skeleton, foreign), packing.exceptions(skeleton)
        places = places or {"": "cpu"}
    del skeleton
    model = model_class.from_pretrained(model_name_or_path, device_map=places, **kwargs)
    if packing is not None:
        packing.complete(model, exceptions)
    release_foreign(model, owned)
    check_owned(model, owned)
    return model


def load_owned_packed(
    model_name_or_path: str | PathLike[str],
    owned: Owned,
    model_class: Any = AutoModelForCausalLM,
    quantization_config: Any = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """As `load_owned`, of a checkpoint that was saved packed, whose files Transformers maps.

    Nothing is read before it is used, and what is foreign is let go before.

    Args:
        model_name_or_path: local folder or Hub name.
        owned: whether this process owns the parameter of that name.
        model_class: what `from_pretrained` is called on.
        quantization_config: options for loading, which Transformers adds to those that were saved; None for none.
        kwargs: passed on.

    Raises:
        UnsupportedOptionError: an argument that places or rewrites parameters.
        UnsupportedModelError: an owned parameter was left without values.
    """
    _check_given(kwargs)
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    model = model_class.from_pretrained(model_name_or_path, device_map={"": "cpu"}, **kwargs)
    release_foreign(model, owned)
    check_owned(model, owned)
    return model


def _check_given(given: Mapping[str, Any]) -> None:
    for key in REFUSED:
        if given.get(key) is not None:
            raise UnsupportedOptionError(
                f"{key}={given[key]!r} can't be combined with loading only the owned parameters, which are placed by "
                "the stages' devices; leave it out"
            )


def _undecided(skeleton: PreTrainedModel) -> set[str]:
    """Names that should be tied, but are both in the checkpoint: only their values tell whether they will be."""
    return {
        name
        for pair in skeleton.all_tied_weights_keys.items()
        if skeleton.get_parameter(pair[0]) is not skeleton.get_parameter(pair[1])
        for name in pair
    }


@contextmanager
def _quietly() -> Iterator[None]:
    """Keeps the first look at a checkpoint from printing the report and the bar that the second one prints."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with without_progress_bars():
            yield
    finally:
        logging.set_verbosity(verbosity)


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Silences the bars of transformers."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
