"""Relay: forward passes for evaluation through the stages of several processes, all of them busy.

The process with the first stage runs it for some batches ahead; every other process takes them up one after the other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..engine.streams import Reading, Segment
from ..partition import Boundary, Finish, Partition, select
from .accelerator import ReplicaAccelerator
from .channels import BoundarySpec, Channels
from .grid import ProcessGrid


class Relay:
    """The stages of this process, with what comes before and after them; created by all processes at the same point.

    Args:
        partition: the split model.
        grid: the processes.
        specs: what each stage but the last puts out.

    Attributes:
        reading: what stages remember of the batches before; None for nothing.
    """

    def __init__(self, partition: Partition, grid: ProcessGrid, specs: Sequence[BoundarySpec]):
        placement = partition.plan.placement
        self._partition = partition
        self._grid = grid
        self._specs = specs
        self._channels = Channels(grid, placement, max(map(len, specs), default=1))
        self._own = [k for k, device in enumerate(placement) if device == grid.device_index]
        # A first stage that is the last one, too, has to know what `run` wants of it.
        self._ahead = {0} if self._own[0] == 0 and len(placement) > 1 else set()
        self._begun: deque[tuple[Segment | None, Boundary | None]] = deque()
        self.reading: Reading | None = None
        self.has_logits = placement[-1] == grid.device_index
        self.depth = grid.num_devices

    def run(self, batch: Mapping[str, Any], finish: Finish | None = None) -> Any:
        """Passes a batch through the stages of this process; all processes of the replica do so, in the same order.

        Args:
            batch: what the family takes, e.g. `input_ids` [batch, time].
            finish: as in `Stage.forward`.

        Returns:
            What `finish` returns, or the logits [batch, time, vocabulary], where the last stage is; None elsewhere.
        """
        if not self._begun:
            self.begin(batch)
        segment, state = self._begun.popleft()
        for stage in self._own:
            if stage not in self._ahead:
                state = self._stage(stage, batch, state, segment, finish)
        return state if self.has_logits else None

    def begin(self, batch: Mapping[str, Any]) -> None:
        """Runs the first stage, where it is here, for a batch that `run` will be called with later."""
        segment = None if self.reading is None else self.reading.streams.enter(batch)
        self._begun.append((segment, self._stage(0, batch, None, segment) if 0 in self._ahead else None))

    @torch.no_grad()
    def _stage(
        self,
        stage: int,
        batch: Mapping[str, Any],
        received: Boundary | None,
        segment: Segment | None,
        finish: Finish | None = None,
    ) -> Any:
        module = self._partition.stages[stage]
        if stage > 0 and not self._channels.is_local("hidden", stage):
            received = self._channels.post_all("hidden", stage, self._specs[stage - 1].shapes(batch)).wait()
        memories = None if self.reading is None else self.reading.memories[stage]
        memory = None if memories is None else memories.recall(segment)
        given = select(module, batch, self._grid.device)
        output = module(given, received, memory, finish if module.is_last else None)
        if memories is not None:
            memories.keep(segment, memory)
        if not module.is_last and not self._channels.is_local("hidden", stage + 1):
            self._channels.send_all("hidden", stage + 1, output)
            return None
        return output

    def close(self) -> None:
        """Forgets batches that were begun."""
        self._begun.clear()


class AheadLoader:
    """A data loader whose batches have been begun before they come out.

    Args:
        loader: the data loader.
        relay: begins the batches.
        accelerator: told how many rows of the last batch count.
        scope: entered around the forwards that are run ahead.
    """

    def __init__(
        self,
        loader: DataLoader,
        relay: Relay,
        accelerator: ReplicaAccelerator,
        scope: Callable[[], AbstractContextManager[None]],
    ):
        self._loader, self._relay, self._accelerator, self._scope = loader, relay, accelerator, scope

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        state = self._accelerator.gradient_state
        waiting: deque[tuple[Any, int | None]] = deque()
        self._relay.close()
        try:
            for batch in self._loader:
                # Known while the loader stands at the batch, which comes out only later.
                rows = state.remainder if state.end_of_dataloader and state.remainder > 0 else None
                with self._scope():
                    self._relay.begin(batch)
                waiting.append((batch, rows))
                if len(waiting) > self._relay.depth:
                    yield self._next(waiting)
            while waiting:
                yield self._next(waiting)
        finally:
            self._accelerator.rows_left = None

    def _next(self, waiting: deque[tuple[Any, int | None]]) -> Any:
        batch, self._accelerator.rows_left = waiting.popleft()
        return batch
