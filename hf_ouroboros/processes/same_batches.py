"""SameBatches: the processes of a replica agree on their batches before anything of that shape is sent.

A message that is longer than the memory it is received into makes gloo abort the process. Where batches come on an
accelerator only their shapes are compared: a look at their contents would wait for it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from .awaiting import await_others
from .files import gather_objects
from .grid import ProcessGrid
from .handshake import Facts, disagreement
from .reports import tensor_checksum

NUMBER = "number of micro-batches"
ADVICE = (
    "The processes of a replica share their batches: a data set, sampler or collator that draws random numbers of its own has "
    "to be seeded alike in all of them, and must not divide the rows among them"
)


class SameBatches:
    """One process's part.

    Args:
        grid: the processes.
        group: a gloo group of all processes.
        check_others: raises if another process is known to have failed; called while this one waits.
    """

    def __init__(self, grid: ProcessGrid, group: dist.ProcessGroup, check_others: Callable[[], None] = lambda: None):
        self._grid = grid
        self._group = group
        self._check_others = check_others

    def check(self, batches: Sequence[Any], where: str) -> None:
        """Compares the number of micro-batches among all processes, all else of them within each replica.

        Args:
            batches: those of an update, or a single one; none where the data has come to its end.
            where: what they are for.

        Raises:
            DisagreementError: they differ; raised by all processes.
        """
        facts = {"batches": structure(batches)}
        own = torch.tensor([len(batches), zlib.crc32(json.dumps(facts).encode())])
        found = [torch.empty_like(own) for _ in range(self._grid.world_size)]
        await_others(dist.all_gather(found, own, self._group, async_op=True), self._check_others)
        everybody = range(self._grid.world_size)
        if len({int(numbers[0]) for numbers in found}) > 1:
            self._refuse({"batches": {NUMBER: len(batches)}}, where, everybody)
        for replica in range(self._grid.replicas):
            if len({int(found[rank][1]) for rank in self._grid.row(replica)}) > 1:
                self._refuse(facts, where, self._grid.row(replica))

    def _refuse(self, facts: Facts, where: str, among: Sequence[int]) -> None:
        """Has all processes raise what differs among some of them."""
        found = gather_objects(self._grid, self._group, facts)
        error = disagreement(f"the micro-batches of {where}", {rank: found[rank] for rank in among}, ADVICE)
        assert error is not None  # what differs in number or checksum differs in what is compared here
        error.everywhere = True
        raise error

    def of(self, loader: Any, where: str) -> Any:
        """A data loader whose batches have been compared when they come out."""
        return _CheckedLoader(loader, self, where)


class _CheckedLoader:
    def __init__(self, loader: Any, same: SameBatches, where: str):
        self._loader, self._same, self._where = loader, same, where

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            self._same.check([batch], self._where)
            yield batch
        self._same.check([], self._where)


def structure(batches: Sequence[Any]) -> dict[str, Any]:
    """What everything that is computed from micro-batches depends on."""
    facts: dict[str, Any] = {NUMBER: len(batches)}
    for index, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            facts[f"micro-batch {index}"] = type(batch).__name__
            continue
        for key in sorted(batch):
            facts[f"{key} of micro-batch {index}"] = _described(batch[key])
    return facts


def _described(value: Any) -> str:
    if not torch.is_tensor(value):
        return type(value).__name__
    contents = f", checksum {tensor_checksum(value):08x}" if value.device.type == "cpu" else ""
    return f"{list(value.shape)} {value.dtype}{contents}"
