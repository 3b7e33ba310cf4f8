"""Engine: feeds micro-batches to the workers, never lets them run too far ahead, and hears what they report."""

from __future__ import annotations

import queue
import time
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import EngineError, WorkerError
from ..partition import Boundary, Partition
from ..schedules import device_programs
from ..schedules.clock import Clock, Pause, Slot
from ..schedules.instructions import Instruction
from ..schedules.interleave import engine_costs
from ..schedules.programs import stages_by_device
from ..simulate.timeline import Timeline
from .at_rest import AtRest
from .device_queue import handed_over, has_queues
from .exposed import ExposedUpdate
from .losses import LossFunction
from .messages import ForwardStarted, MicroBatch, Paused, Reported, StepDone, Work
from .optimizers import snapshot_hyperparameters
from .parts import EngineParts, parts_of_threads
from .settings import EngineSettings, FinishedLoss, FinishedNorm, Hyperparameters, updates_behind
from .stage_runner import StageRunner
from .streams import Streams
from .weights import TiedLink
from .worker import Worker


class Engine(AtRest):
    """Delayed-gradient training of a partition, one worker thread per device of this process.

    Where there are several processes, all of them make the same calls in the same order.

    Call `submit` for every micro-batch and `step` after the last one of an update. Both return as soon as the
    workers have enough to do; losses come back through `collect`, up to K ticks later.

    Args:
        partition: the split model.
        optimizer: optimizer of the whole model; its parameter groups give each update's hyper-parameters.
        loss_fn: (logits, micro-batch, context) -> scalar, run by the last stage.
        settings: settings of the run.
        timeline: where to record executed instructions; None for nowhere.
        parts: what it works with; None for all devices in this process.
    """

    def __init__(
        self,
        partition: Partition,
        optimizer: torch.optim.Optimizer,
        loss_fn: LossFunction,
        settings: EngineSettings,
        timeline: Timeline | None = None,
        parts: EngineParts | None = None,
    ):
        plan = partition.plan
        num_stages, placement = plan.num_stages, plan.placement
        parts = parts_of_threads(plan) if parts is None else parts
        self._parts = parts
        self._feeds_queues = any(has_queues(device.type) for device in parts.devices.values())
        self.partition = partition
        self.settings = settings
        self.timeline = timeline
        self._clock = Clock(num_stages, settings.is_synchronous)
        self._events: queue.SimpleQueue[Reported] = queue.SimpleQueue()
        self._started = -1
        self._slots = 0
        self._closed_at: dict[int, int] = {}  # slots that had been handed out when an update was closed
        self._resting = False
        self._exposed: ExposedUpdate | None = None
        self._streams = Streams()
        self._opened: tuple[int, Hyperparameters] | None = None
        self._submitted: dict[int, MicroBatch] = {}
        self._paused: set[int] = set()
        self._failure: WorkerError | None = None
        self._closed = False
        self._drained = True  # whether all processes have received all that was sent to them
        link = TiedLink(partition.tied_names) if partition.tied_names and num_stages > 1 else None
        self._runners = {
            k: StageRunner(partition, k, parts.devices[d], loss_fn, settings, link, parts.replica_mean)
            for k, d in enumerate(placement)
            if d in parts.devices
        }
        programs = device_programs(
            settings.schedule,
            placement,
            *engine_costs([row.cost for row in plan.rows], settings.replayed_by is not None),
            settings.micro_batches,
            exchange=settings.shares_norms,
        )
        self._accounts = parts.accounts
        self._accounts.loss_scale = self.loss_scale = settings.loss_scale(num_stages)
        self._scale: float | None = None  # of the losses of the open update
        stages_of = stages_by_device(placement)
        self._workers = [
            Worker(
                index,
                plan.devices[index],
                parts.queues[index],
                {k: self._runners[k] for k in stages_of[index]},
                programs[index],
                parts.transport,
                settings,
                num_stages,
                min(self._runners),
                self._events,
                timeline,
            )
            for index in parts.devices
        ]
        self.attach(optimizer)
        for worker in self._workers:
            worker.start()

    # ---- training ----

    def submit(self, batch: Mapping[str, Any], context: Any = None) -> int:
        """Hands over the next micro-batch; returns its tick.

        Args:
            batch: `input_ids` [batch, time] and what else the family and the loss take; `stream_columns` and
                `stream_segments` [batch], where memories are to be carried over from segment to segment. The same one in
                all processes of a replica.
            context: passed on to the loss function.

        Raises:
            WorkerError: a worker failed (now or earlier).
            StreamError: the batch does not go on where its columns are.
        """
        self._check()
        self._resting = False
        segment = self._streams.enter(batch) if self.partition.remembers else None
        if self.settings.predicts and not self.update_open:
            self._opened = self._clock.update, snapshot_hyperparameters(self.optimizer)
        if self.loss_scale is not None and not self.update_open:
            self.account_for(self.loss_scale.needed(self._clock.update))
            self._scale = self.loss_scale.open(self._clock.update)
        ready, made = handed_over(batch, self._feeds_queues)
        tick, slots = self._clock.next_tick()
        delayed = not self.settings.is_synchronous(self._clock.update)
        self._submitted[tick] = MicroBatch(ready, context, delayed, self._opened, segment, made, self._scale)
        self._drained = False
        self._release(slots)
        self._accounts.open_tick(tick, batch)
        return tick

    def step(self) -> int:
        """Closes the update after the newest micro-batch, with the optimizer's present hyper-parameters."""
        self._check()
        if not self.update_open:
            raise EngineError("step() without a micro-batch since the last step()")
        exposed, self._resting = self._exposed, False
        hyperparameters = snapshot_hyperparameters(self.optimizer)
        update, slots = self._clock.close_update()
        self._closed_at = {u: slots for u, slots in self._closed_at.items() if u >= self._accounts.complete}
        self._closed_at[update] = self._slots
        if exposed is None:
            self._release(slots, hyperparameters)
        else:  # the workers have done everything but the step
            exposed.step(self.optimizer, update)
            for stage, norm in exposed.norms.items():
                self._take(StepDone(stage, update, norm))
        self._accounts.close_update(update, self._await_step)
        if self.loss_scale is not None and self.settings.record.is_synchronous:
            self.account_for(update + 1)
            self.step_was_skipped = self.loss_scale.has_overflowed(update)
        return update

    def collect(self) -> list[FinishedLoss]:
        """Losses finished since the last call, in tick order; never waits."""
        self._check_failure()
        self._hear(block=False)
        return self._accounts.take_losses()

    def collect_norms(self) -> list[FinishedNorm]:
        """Gradient norms known since the last call, in the order of updates; never waits."""
        self._hear(block=False)
        return self._accounts.take_norms()

    @property
    def grad_norm(self) -> float | None:
        """Gradient norm, before clipping, of the newest update that all stages are known to have closed."""
        newest = self._accounts.newest_norm()
        return None if newest is None else newest.value

    def updates_behind(self, update: int) -> int:
        """After how many more updates losses and norm of this one can be waited for without the pipeline running dry."""
        if self.settings.is_synchronous(update):
            return 0
        behind = updates_behind(self.partition.plan.num_stages, self.settings.micro_batches)
        return behind + self._accounts.reporting_delay

    def account_for(self, updates: int) -> None:
        """Waits until losses and norms of so many updates can be collected."""
        self._check()
        self._accounts.account_for(updates, self._await_step)

    def account_for_open(self) -> None:
        """Waits until the losses of the open update's micro-batches can be collected."""
        self.rest()
        self._hear(block=False)
        self._accounts.account_for_open(self._await_step)

    def request_stop(self) -> None:
        """Asks for the end of the run, in all processes."""
        self._accounts.request_stop()

    @property
    def stop_requested(self) -> bool:
        """Whether the end of the run was asked for; becomes true at the same step in all processes."""
        return self._accounts.stop_requested()

    @property
    def instruction(self) -> Instruction | None:
        """What the worker of this process's first device executes at present."""
        return self._workers[0].instruction

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    @property
    def update_open(self) -> bool:
        """Whether micro-batches were submitted since the last `step`."""
        return self._clock.tick > self._clock.first_tick_of_update

    # ---- looking at the weights ----

    def rest(self) -> None:
        """Waits until all stages of this process have finished the newest tick; pending backwards stay pending."""
        if self._resting:
            self._check()
            return
        self._pause(Pause(settle=False))
        self._resting = True

    def synchronize(self) -> None:
        """Waits until all stages have finished the newest tick; pending backwards stay pending."""
        self.rest()
        self._accounts.report_all(self._await_step)

    def settle(self) -> None:
        """Like `synchronize`, and runs the pending backwards: their gradients are kept, queued, not applied."""
        self._pause(Pause(settle=True))
        self._parts.transport.flush()
        self._accounts.report_all(self._await_step)
        self._drained = not self.update_open

    def close(self) -> None:
        """Stops the workers, whatever they are doing; safe to call twice."""
        if self._closed:
            return
        parts, drained = self._parts, self._drained and self._failure is None
        self._closed = True
        parts.transport.abort()
        for worker in self._workers:
            worker.inbox.put(None)
        deadline = time.monotonic() + parts.close_timeout
        for worker in self._workers:
            worker.join(max(0.0, deadline - time.monotonic()))
        for runner in self._runners.values():
            runner.release()
        parts.transport.close(drained)
        parts.accounts.close(drained)
        if parts.replica_mean is not None:
            parts.replica_mean.close(drained)

    # ---- inside ----

    def _release(self, slots: list[Slot], hyperparameters: Hyperparameters | None = None) -> None:
        for slot in slots:
            micro_batch = None if slot.tick is None else self._submitted.pop(slot.tick)
            work = Work(slot, micro_batch, None if slot.update is None else hyperparameters)
            self._slots += 1
            for worker in self._workers:
                worker.inbox.put(work)
            if slot.tick is not None:
                self._hear(block=False)
                # Back-pressure: so many micro-batches may wait in front of the pipeline besides the K in flight.
                while self._started < slot.tick - self._parts.run_ahead:
                    self._hear(block=True)

    def _pause(self, pause: Pause) -> None:
        self._check()
        self._release(self._clock.interrupt())
        self._paused.clear()
        for worker in self._workers:
            worker.inbox.put(pause)
        while len(self._paused) < len(self._workers):
            self._hear(block=True)

    def _expect_gradient(self, stage: int, tick: int, output: Boundary) -> None:
        self._parts.transport.expect_gradient(stage, tick, output)

    @property
    def updates(self) -> int:
        """Updates closed so far, those before the run was resumed included."""
        return self._clock.update

    def _await_step(self, update: int) -> None:
        """Waits for a report that brings the end of an update nearer."""
        if self._slots < self._closed_at.get(update, 0) + 2 * self.partition.plan.num_stages:
            self.rest()  # workers that interleave stages keep the last slots back
            self._hear(block=False)
        else:
            self._hear(block=True)

    def _check_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _check(self) -> None:
        self._check_failure()
        if self._closed:
            raise EngineError("the engine is closed")

    def _hear(self, block: bool) -> None:
        """Takes in what workers have reported; with `block`, waits for at least one report."""
        while True:
            try:
                # A wait without end could not be interrupted where a signal reaches another thread first.
                event = self._events.get(block=block, timeout=1.0)
            except queue.Empty:
                if block:
                    self._parts.check_others()
                    continue
                return
            block = False
            self._take(event)

    def _take(self, event: Reported) -> None:
        """Takes in one report."""
        match event:
            case FinishedLoss():
                self._accounts.add_loss(event)
            case ForwardStarted(tick):
                self._started = tick
            case StepDone(stage, update, norm):
                self._accounts.add_step(stage, update, norm)
            case Paused(device):
                self._paused.add(device)
            case WorkerError():
                self._failure = event
                raise event
