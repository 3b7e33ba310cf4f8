"""What the engine of one device works with, in a process of its own, beside those of the other devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..engine.device_queue import queue_of
from ..engine.parts import EngineParts
from ..partition import StagePlan
from .channels import BoundarySpec
from .grid import ProcessGrid
from .process_transport import ProcessTransport
from .replica_mean import GroupMean
from .shared_accounts import SharedAccounts


def parts_of_process(
    grid: ProcessGrid,
    plan: StagePlan,
    micro_batches: int,
    specs: Sequence[BoundarySpec],
    check: Callable[[], None] = lambda: None,
    waiting: Callable[[str | None, int | None], None] = lambda what, peer: None,
) -> EngineParts:
    """For an engine that runs the one device of this process; called by all processes at the same point.

    Args:
        grid: the processes.
        plan: which stage is where.
        micro_batches: M.
        specs: what each stage but the last puts out.
        check: raises if another process is known to have failed; called while this one waits.
        waiting: told what the worker waits for; see `ProcessTransport`.
    """
    # Groups are leased in the same order everywhere: of the accounts, the transport, the column.
    accounts = SharedAccounts(grid, plan, micro_batches, check)
    transport = ProcessTransport(grid, plan.placement, specs, waiting)
    return EngineParts(
        {grid.device_index: grid.device},
        {grid.device_index: queue_of(grid.device)},
        transport,
        accounts,
        # The other processes may be K-1 ticks behind or ahead, and this one's main thread waits for theirs now and then:
        # with K+1 micro-batches in stock the worker never runs dry meanwhile. They are token ids; activations are bounded
        # by the schedule.
        run_ahead=plan.num_stages + 1,
        replica_mean=GroupMean(grid.lease_group("column")) if grid.replicas > 1 else None,
        check_others=check,
        close_timeout=2.0,
    )
