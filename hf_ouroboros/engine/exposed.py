"""Exposed updates: gradients that scripts see and change in `grad` before all stages are stepped at once.

The main thread does it while the workers rest. It is what a script pays for looking at gradients, or for an optimizer that
does not step each parameter by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from ..optim import compensated_step
from .settings import EngineSettings
from .stage_runner import StageRunner

Norms = dict[int, torch.Tensor | None]


class ExposedUpdate:
    """The open update of stages that rest.

    Args:
        runners: the stages of this process.
        settings: of the run.
        num_stages: K.
        share: puts together the norms of the stages of all processes.

    Attributes:
        norms: of each stage before clipping, None of one without gradients.
    """

    def __init__(
        self,
        runners: Mapping[int, StageRunner],
        settings: EngineSettings,
        num_stages: int,
        share: Callable[[int, Norms], Norms],
    ):
        self._runners, self._settings, self._num_stages = runners, settings, num_stages
        self._gradients: list[tuple[nn.Parameter, torch.Tensor]] = []
        self._device = next(iter(runners.values())).device
        with own_threads(settings.threads, self._device):
            for runner in runners.values():
                runner.start_mean()
                runner.finish_mean()
            self.norms: Norms = {stage: runner.norm() for stage, runner in sorted(runners.items())}
            self._bound(share(-1, self.norms) if settings.shares_norms else self.norms)
        for runner in runners.values():
            runner.expose()

    def _bound(self, known: Norms) -> None:
        """Bounds and drops gradients as workers do.

        Args:
            known: norms of all stages, where stages share them; else of these.
        """
        present = [norm.to(self._device) for _, norm in sorted(known.items()) if norm is not None]
        if not present:
            return
        whole = torch.linalg.vector_norm(torch.stack(present))
        for stage, runner in self._runners.items():
            if (norm := self.norms[stage]) is not None:
                runner.bound(norm, whole)

    def step(self, optimizer: torch.optim.Optimizer, update: int) -> None:
        """Steps all stages with the gradients that their parameters have now.

        Args:
            optimizer: of the whole model; steps once, or with delay compensation once for each stage.
            update: the update that closes.
        """
        settings = self._settings
        stages = {k: runner.exposed() for k, runner in sorted(self._runners.items())}
        self._gradients = [pair for pairs in stages.values() for pair in pairs]
        if settings.scales_losses and not self._gradients:
            return
        with own_threads(settings.threads, self._device):
            if not settings.compensations:
                optimizer.step()
                return
            self.clear()
            for k, gradients in stages.items():
                if gradients:
                    at = settings.stage_update(k, self._num_stages, update)
                    compensated_step(optimizer, gradients, settings.compensations, at)
        for parameter, gradient in self._gradients:
            parameter.grad = gradient

    def clear(self) -> None:
        """Removes the gradients."""
        for parameter, _ in self._gradients:
            parameter.grad = None


@contextmanager
def own_threads(count: int | None, device: torch.device) -> Iterator[None]:
    """Kernels may sum in another order with another number of threads, so it belongs to the numbers."""
    before = torch.get_num_threads()
    if count is not None and device.type == "cpu":
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
