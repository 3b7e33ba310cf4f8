"""SameBatches: the processes of a replica agree on the shapes of their batches before anything of that shape is sent.

A message that is longer than the memory it is received into makes gloo abort the process. The *contents* of batches are
compared some updates later, without anybody waiting (`processes.reports`).
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
        """Compares the number of micro-batches and their keys, shapes and types; called by all processes of the replica.

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
        raise disagreement(f"the micro-batches of {where}", dict(zip(self._grid.row(), found, strict=True)))

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
    """What decides the shapes of everything that is computed from micro-batches."""
    facts: dict[str, Any] = {"number of micro-batches": len(batches)}
    for index, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            facts[f"micro-batch {index}"] = type(batch).__name__
            continue
        for key in sorted(batch):
            value = batch[key]
            described = f"{list(value.shape)} {value.dtype}" if torch.is_tensor(value) else type(value).__name__
            facts[f"{key} of micro-batch {index}"] = described
    return facts
