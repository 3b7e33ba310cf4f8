"""SameBatches: the processes of a replica agree on their batches before anything of that shape is sent.

A message that is longer than the memory it is received into makes gloo abort the process. Where batches come on an
accelerator only their shapes are compared: a look at their contents would wait for it.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from .grid import ProcessGrid
from .handshake import Facts, disagreement
from .reports import tensor_checksum

ADVICE = (
    "The processes of a replica share their batches: a data set, sampler or collator that draws random numbers of its own has "
    "to be seeded alike in all of them, and must not divide the rows among them"
)


class SameBatches:
    """One process's part.

    Args:
        grid: the processes.
        row: a gloo group of this replica's processes.
        check_others: raises if another process is known to have failed; called while this one waits.
    """

    def __init__(self, grid: ProcessGrid, row: dist.ProcessGroup, check_others: Callable[[], None] = lambda: None):
        self._grid = grid
        self._row = row
        self._check_others = check_others

    def check(self, batches: Sequence[Any], where: str) -> None:
        """Compares the number of micro-batches, their keys, shapes, types and contents; called by all of the replica.

        Args:
            batches: those of an update, or a single one; none where the data has come to its end.
            where: what they are for.

        Raises:
            DisagreementError: they differ; raised by all processes of the replica.
        """
        facts = {"batches": structure(batches)}
        row = torch.tensor([zlib.crc32(json.dumps(facts).encode())])
        rows = [torch.empty_like(row) for _ in range(self._grid.num_devices)]
        work, pause = dist.all_gather(rows, row, self._row, async_op=True), 0.0002
        while not work.is_completed():
            self._check_others()
            time.sleep(pause)
            pause = min(1.3 * pause, 0.02)
        work.wait()
        if all(torch.equal(other, row) for other in rows):
            return
        found: list[Facts] = [{} for _ in rows]
        dist.all_gather_object(found, facts, self._row)
        error = disagreement(f"the micro-batches of {where}", dict(zip(self._grid.row(), found, strict=True)), ADVICE)
        error.everywhere = self._grid.replicas == 1
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
    facts: dict[str, Any] = {"number of micro-batches": len(batches)}
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
