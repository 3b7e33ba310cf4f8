"""Measures what units of a model take on devices that are here, all devices at once as in training, and remembers it.

A model with the first layers is built from the configuration, as many as it takes to have one of every kind, so weights are
not needed and a large model need not fit. What was measured is kept in memory and, by default, in a file under the
Hugging Face cache folder, by configuration, shape, dtype, devices and torch version.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import platform
import statistics
import threading
import time as clock
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from huggingface_hub.constants import HF_HOME
from torch import nn
from torch.nn.utils import get_total_norm
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ..errors import UnsupportedModelError
from ..partition.families import Family, find_family
from ..partition.stage_plan import torch_device
from ..partition.stages import Boundary, Stage
from ..partition.units import StageSpan
from .kept_times import remember, remembered
from .kinds import kind_of, layer_kinds
from .planner import PlannedDevice, UnitTimes
from .unit_facts import ModelFacts

REPETITIONS = 7  # of which the first two warm up; the median of the others counts
SEED = 0
MOST_MEASURED = 64  # devices
CACHE = Path(HF_HOME) / "hf_ouroboros" / "unit_times"
Result = TypeVar("Result")
_so_far: dict[str, list[list[list[float]]]] = {}


def measured(
    config: PretrainedConfig,
    facts: ModelFacts,
    devices: Sequence[str],
    cache: Path | None = CACHE,
    margin: float = 0.9,
    again: bool = False,
) -> list[PlannedDevice]:
    """Measures the units of a model on devices of this machine, in seconds.

    Args:
        config: of the model.
        facts: the model's units, and the shape and dtype of its micro-batches.
        devices: names such as "cuda:0" or "cpu:1"; CPU devices share the cores evenly, as in training.
        cache: folder for what was measured; None for no files.
        margin: share of an accelerator's memory that may be used; a CPU's is not limited.
        again: measure even if it was before.

    Raises:
        UnsupportedModelError: the architecture can only be estimated, not run in stages; or it fails, or needs more memory
            than there is.
    """
    if len(devices) > MOST_MEASURED:
        raise UnsupportedModelError(
            f"{len(devices)} devices are more than the {MOST_MEASURED} that are measured at once"
        )
    if facts.untrainable is not None:
        raise UnsupportedModelError(f"{facts.untrainable}, so it can't be measured; plan for device kinds instead")
    key = _key(config, facts, devices)
    file = None if cache is None else cache / f"{key}.json"
    if again or key not in _so_far:
        known = None if again or file is None else remembered(file, len(devices), len(facts.units))
        if known is None:
            _check_room(facts, sum(name.startswith("cpu") for name in devices))
            try:
                known = _measure(config, facts, devices)
            except Exception as error:  # whatever a model does with a batch of this shape
                raise UnsupportedModelError(
                    f"{facts.name} can't be measured with micro-batches of {facts.batch} x {facts.time} tokens on "
                    f"{', '.join(devices)} ({type(error).__name__}: {error}); plan for device kinds instead"
                ) from error
            if file is not None:
                remember(file, known)
        _so_far[key] = known
    return [
        PlannedDevice(name, tuple(UnitTimes(*times) for times in row), _memory_of(name) * margin)
        for name, row in zip(devices, _so_far[key], strict=True)
    ]


def _check_room(facts: ModelFacts, workers: int) -> None:
    """Refuses what a machine has no memory for: it would not fail, but be ended, or end others."""
    if not workers or not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return
    # Of each unit: weights, gradients and two moments; activations, and gradients of as many.
    sizes = [4 * unit.parameter_bytes + 2 * (unit.activation_bytes + unit.output_bytes) for unit in facts.units]
    layers = [size for size, unit in zip(sizes, facts.units, strict=True) if unit.kind == "layer"]
    need = workers * (max(sizes) + sum(sizes) - sum(layers) + max(layers))
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > there:
        raise UnsupportedModelError(
            f"measuring {facts.name} with micro-batches of {facts.batch} x {facts.time} tokens needs about {need / 2**30:,.0f} "
            f"GiB, but this machine has {there / 2**30:,.0f}; plan for device kinds instead"
        )


def _key(config: PretrainedConfig, facts: ModelFacts, devices: Sequence[str]) -> str:
    described = {
        "config": {
            k: str(v) for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version")
        },
        "shape": [facts.batch, facts.time, str(facts.dtype)],
        "devices": [_describe(name) for name in devices],
        "torch": torch.__version__,
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:24]


def _describe(name: str) -> str:
    if name.startswith("cuda"):
        return torch.cuda.get_device_name(name)
    return f"{name.partition(':')[0]} {platform.machine()} {platform.processor()} {torch.get_num_threads()} threads"


def _memory_of(name: str) -> float:
    return float(torch.cuda.get_device_properties(name).total_memory) if name.startswith("cuda") else float("inf")


def _measure(config: PretrainedConfig, facts: ModelFacts, devices: Sequence[str]) -> list[list[list[float]]]:
    """[device][unit] -> [forward, backward, step] in seconds."""
    torch.manual_seed(SEED)
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config)
    family = find_family(whole)
    kinds = layer_kinds([whole.get_submodule(name) for name in family.layers(whole)])
    small = _shortened(config, whole, family, max(kinds) + 1) or config
    results: list[list[list[float]]] = [[] for _ in devices]
    failures: list[BaseException] = []
    gate = threading.Barrier(len(devices))
    threads = max(1, torch.get_num_threads() // max(1, sum(name.startswith("cpu") for name in devices)))
    # One after the other: initialisation draws from one generator.
    models = [AutoModelForCausalLM.from_config(small, dtype=facts.dtype) for _ in devices]

    def work(index: int) -> None:
        try:
            device = torch_device(devices[index])
            if device.type == "cpu":
                torch.set_num_threads(threads)
            results[index] = _DeviceRun(models[index].to(device).train(), family, facts, device, gate).run()
        except BaseException as error:
            failures.append(error)
            gate.abort()

    workers = [threading.Thread(target=work, args=(i,), name=f"measure {name}") for i, name in enumerate(devices)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise next((e for e in failures if not isinstance(e, threading.BrokenBarrierError)), failures[0])
    first = next(i for i, unit in enumerate(facts.units) if unit.kind == "layer")
    after = len(facts.units) - first - facts.layers
    return [[*row[:first], *(row[first + kind] for kind in kinds), *row[len(row) - after :]] for row in results]


def _shortened(
    config: PretrainedConfig, whole: PreTrainedModel, family: Family, layers: int
) -> PretrainedConfig | None:
    """The configuration with the first layers only; None if that changes anything else, so that the model is built whole."""
    total = len(family.layers(whole))
    if layers == total:
        return None
    small = copy.deepcopy(config)
    text = small.get_text_config()
    try:
        for name, value in list(vars(text).items()):
            if "layer" in name and isinstance(value, (list, tuple)) and len(value) == total:
                setattr(text, name, value[:layers])  # what is said of every layer
        text.num_hidden_layers = layers
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(small)
        names = family.layers(model)
    except Exception:  # a configuration that this doesn't leave valid
        return None
    if names != family.layers(whole)[:layers]:
        return None
    alike = [kind_of(model.get_submodule(n)) == kind_of(whole.get_submodule(n)) for n in names]
    return small if all(alike) and _outside(model, family) == _outside(whole, family) else None


def _outside(model: PreTrainedModel, family: Family) -> dict[str, torch.Size]:
    """The shapes of the parameters that are in no layer."""
    layers = tuple(f"{name}." for name in family.layers(model))
    return {name: p.shape for name, p in model.named_parameters() if not name.startswith(layers)}


class _DeviceRun:
    """Measures one unit after the other on one device, while the other devices do the same."""

    def __init__(
        self, model: PreTrainedModel, family: Family, facts: ModelFacts, device: torch.device, gate: threading.Barrier
    ):
        self.model, self.family, self.facts, self.device, self.gate = model, family, facts, device, gate
        generator = torch.Generator().manual_seed(SEED)
        vocabulary = model.config.get_text_config().vocab_size
        shape = (facts.batch, facts.time)
        self.batch = {"input_ids": torch.randint(vocabulary, shape, generator=generator).to(device)}

    def run(self) -> list[list[float]]:
        """[unit] -> [forward, backward, step]; norm and head are measured together and count for the head."""
        units = self.family.units(self.model)
        first_head = next(i for i, unit in enumerate(units) if unit.kind == "head")
        rows: list[list[float]] = []
        received: Boundary | None = None
        for i in range(first_head):
            # Index 0 makes a first stage, which embeds; any other stage of three is one from the middle.
            stage = self.family.make_stage(self.model, units, StageSpan(min(i, 1), i, i + 1, 0), 3)
            row, received = self._unit(stage, received)
            rows.append(row)
        head = self.family.make_stage(self.model, units, StageSpan(2, first_head, len(units), 0), 3)
        rows += [[0.0, 0.0, 0.0] for _ in units[first_head:-1]]
        rows.append(self._unit(head, received)[0])
        return rows

    def _unit(self, stage: Stage, received: Boundary | None) -> tuple[list[float], Boundary]:
        """Forward, backward and step of a stage, and what it gives on."""
        stage.train()
        parameters = list(stage.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=0.0) if parameters else None
        found: list[list[float]] = []
        given: Boundary = {}
        for _ in range(REPETITIONS):
            fresh = None if received is None else {n: self._fresh(stage, n, t) for n, t in received.items()}
            self.gate.wait()
            forward, output = self._timed(partial(self._output, stage, fresh))
            ends = [t for t in output.values() if t.requires_grad]
            gradients = None if stage.is_last else [torch.ones_like(t) for t in ends]
            backward, _ = self._timed(partial(torch.autograd.backward, ends, gradients))
            step = 0.0
            # A tied matrix is stepped by its owner, the embedding.
            if optimizer is not None and not (stage.is_last and self.facts.tied):
                step, _ = self._timed(partial(self._step, optimizer, parameters))
            for parameter in parameters:
                parameter.grad = None
            found.append([forward, backward, step])
            given = {name: tensor.detach() for name, tensor in output.items()}
        return [statistics.median(column) for column in zip(*found[2:], strict=True)], given

    @staticmethod
    def _fresh(stage: Stage, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor as a stage receives it."""
        return tensor.clone().requires_grad_(stage.trains(name, tensor))

    def _output(self, stage: Stage, received: Boundary | None) -> Boundary:
        """What a stage gives on; of the last one the loss."""
        output = stage(self.batch, received)
        if not stage.is_last:
            return output
        labels = self.batch["input_ids"].flatten().roll(-1)
        return {"loss": nn.functional.cross_entropy(output.float().flatten(0, 1), labels)}

    def _step(self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
        get_total_norm([p.grad for p in parameters if p.grad is not None])
        optimizer.step()

    def _timed(self, action: Callable[[], Result]) -> tuple[float, Result]:
        self._wait()
        start = clock.perf_counter()
        result = action()
        self._wait()
        return clock.perf_counter() - start, result

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
