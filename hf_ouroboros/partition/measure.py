"""Measures what units of a model take on devices that are here, all devices at once as in training, and remembers it.

A model with one layer is built from the configuration, so weights are not needed and a large model need not fit; a
model whose layers differ in shape is built whole. What was measured is kept in memory and, by default, in a file
under the Hugging Face cache folder, by configuration, shape, dtype, devices and torch version.
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
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HOME
from torch import nn
from torch.nn.utils import get_total_norm
from transformers import AutoModelForCausalLM, PretrainedConfig

from ..errors import UnsupportedModelError
from .anatomy import HIDDEN
from .facts import ModelFacts
from .families import Family, find_family
from .kept_times import remember, remembered
from .plan import torch_device
from .planner import PlannedDevice, UnitTimes
from .stages import Boundary, Stage
from .units import StageSpan

REPETITIONS = 7  # of which the first two warm up; the median of the others counts
SEED = 0
MOST_MEASURED = 64  # devices
CACHE = Path(HF_HOME) / "hf_ouroboros" / "unit_times"
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
    shapes = [tuple(p.shape for p in whole.get_submodule(name).parameters()) for name in family.layers(whole)]
    alike = len(set(shapes)) == 1
    small = copy.deepcopy(config)
    if alike:
        small.num_hidden_layers = 1
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
    if not alike:
        return results
    layer = next(i for i, unit in enumerate(facts.units) if unit.kind == "layer")
    return [[*row[:layer], *[row[layer]] * facts.layers, *row[layer + 1 :]] for row in results]


class _DeviceRun:
    """Measures one unit after the other on one device, while the other devices do the same."""

    def __init__(
        self, model: nn.Module, family: Family, facts: ModelFacts, device: torch.device, gate: threading.Barrier
    ):
        self.model, self.family, self.facts, self.device, self.gate = model, family, facts, device, gate
        generator = torch.Generator().manual_seed(SEED)
        vocabulary = model.config.vocab_size
        shape = (facts.batch, facts.time)
        self.batch = {"input_ids": torch.randint(vocabulary, shape, generator=generator).to(device)}
        self.width = int(facts.units[0].output_bytes / facts.batch / facts.time / facts.dtype.itemsize)

    def run(self) -> list[list[float]]:
        """[unit] -> [forward, backward, step]; norm and head are measured together and count for the head."""
        units = self.family.units(self.model)
        first_head = next(i for i, unit in enumerate(units) if unit.kind == "head")
        rows: list[list[float]] = []
        for i in range(first_head):
            # Index 0 makes a first stage, which embeds; any other stage of three is one from the middle.
            stage = self.family.make_stage(self.model, units, StageSpan(min(i, 1), i, i + 1, 0), 3)
            rows.append(self._unit(stage, is_head=False))
        head = self.family.make_stage(self.model, units, StageSpan(2, first_head, len(units), 0), 3)
        rows += [[0.0, 0.0, 0.0] for _ in units[first_head:-1]]
        rows.append(self._unit(head, is_head=True))
        return rows

    def _unit(self, stage: Stage, is_head: bool) -> list[float]:
        stage.train()
        parameters = list(stage.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=0.0) if parameters else None
        shape = (self.facts.batch, self.facts.time, self.width)
        found: list[list[float]] = []
        for _ in range(REPETITIONS):
            received = None
            if not stage.is_first:
                hidden = torch.randn(shape, device=self.device, dtype=self.facts.dtype).requires_grad_(True)
                received = {HIDDEN: hidden}
            self.gate.wait()
            forward, output = self._timed(lambda given=received: self._loss(stage(self.batch, given), is_head))
            gradient = None if is_head else torch.ones_like(output)
            backward, _ = self._timed(lambda output=output, gradient=gradient: output.backward(gradient))
            step = 0.0
            # A tied matrix is stepped by its owner, the embedding.
            if optimizer is not None and not (is_head and self.facts.tied):
                step, _ = self._timed(lambda: self._step(optimizer, parameters))
            for parameter in parameters:
                parameter.grad = None
            found.append([forward, backward, step])
        return [statistics.median(column) for column in zip(*found[2:], strict=True)]

    def _loss(self, output: Boundary | torch.Tensor, is_head: bool) -> torch.Tensor:
        if not is_head:
            return output[HIDDEN]
        labels = self.batch["input_ids"].flatten().roll(-1)
        return nn.functional.cross_entropy(output.float().flatten(0, 1), labels)

    def _step(self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
        get_total_norm([p.grad for p in parameters if p.grad is not None])
        optimizer.step()

    def _timed(self, action: Callable[[], torch.Tensor | None]) -> tuple[float, torch.Tensor | None]:
        self._wait()
        start = clock.perf_counter()
        result = action()
        self._wait()
        return clock.perf_counter() - start, result

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
