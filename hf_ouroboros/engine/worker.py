"""Worker: one device executing its program, instruction by instruction, in a thread of its own."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterator

import torch

from ..errors import WorkerError
from ..partition import Boundary
from ..schedules.clock import Pause, Slot
from ..schedules.instructions import (
    Backward,
    Exchange,
    Forward,
    InputGradient,
    Instruction,
    Program,
    Rendezvous,
    Report,
    Settle,
    Step,
    WeightGradient,
)
from ..simulate.timeline import Event, Timeline
from .device_queue import DeviceQueue, Moment
from .messages import ForwardStarted, MicroBatch, Paused, Reported, StepDone, Work
from .pending import due_next
from .settings import EngineSettings, FinishedLoss, Hyperparameters
from .stage_runner import StageRunner
from .transport import Aborted, Transport


class Worker(threading.Thread):
    """Executes the program of one device.

    Args:
        index: device index.
        name: device name, for messages.
        device_queue: of the device where it computes.
        runners: the device's stages by index.
        program: yields instructions for the slots it is fed.
        transport: to and from other stages.
        settings: settings of the run.
        num_stages: K.
        pacing_stage: the stage whose forwards tell the engine how far this process is.
        events: where losses, norms, pauses and failures are reported to the engine.
        timeline: records every executed instruction; None for no record.
    """

    def __init__(
        self,
        index: int,
        name: str,
        device_queue: DeviceQueue,
        runners: dict[int, StageRunner],
        program: Program,
        transport: Transport,
        settings: EngineSettings,
        num_stages: int,
        pacing_stage: int,
        events: queue.SimpleQueue[Reported],
        timeline: Timeline | None,
    ):
        super().__init__(name=f"ouroboros {name}", daemon=True)
        self.index = index
        self.device_name = name
        self.inbox: queue.SimpleQueue[Work | Pause | None] = queue.SimpleQueue()
        self.runners = runners
        self._queue = device_queue
        self._device = next(iter(runners.values())).device
        self._program = program
        self._transport = transport
        self._settings = settings
        self._num_stages = num_stages
        self._pacing_stage = pacing_stage
        self._events = events
        self._timeline = timeline
        self.instruction: Instruction | None = None
        self._waiting: dict[int, dict[int, MicroBatch]] = {stage: {} for stage in runners}  # for their forwards
        self._hyperparameters: dict[int, dict[int, Hyperparameters]] = {stage: {} for stage in runners}
        self._norms: dict[int, torch.Tensor | None] = {}
        self._shared_norm: torch.Tensor | None = None
        self._output_side_first: set[int] = set()
        self._closing: dict[int, set[int]] = {stage: set() for stage in runners}  # the last ticks of updates
        self._rested = False
        self._spans: deque[tuple[str, int, int, Moment, Moment]] = deque()  # executed, on an accelerator not for sure
        self._averaging: dict[int, int] = {}  # stage -> update whose step waits for the mean over replicas

    def run(self) -> None:
        """Thread main: until the inbox says stop, the run is aborted, or something fails."""
        try:
            # Thread counts and current devices are per thread in torch.
            if self._settings.threads is not None and self._device.type == "cpu":
                torch.set_num_threads(self._settings.threads)
            self._queue.begin()
            for instruction in self._program(self._slots()):
                if self._transport.aborted.is_set():
                    raise Aborted
                self.instruction = instruction
                if self._rested:
                    self._go_on()
                self._execute(instruction)
                self.instruction = None
        except Aborted:
            pass
        except BaseException as error:
            failure = WorkerError(self.device_name, str(self.instruction) if self.instruction else None, error)
            failure.__cause__ = error
            self._events.put(failure)
            self._transport.abort()

    def _slots(self) -> Iterator[Slot | Pause]:
        while (item := self.inbox.get()) is not None:
            if isinstance(item, Pause):
                yield item
                continue
            for stage in self.runners:
                entering, micro_batch = item.slot.tick, item.micro_batch
                if entering is not None and micro_batch is not None:
                    self._waiting[stage][entering] = micro_batch
                    if stage > 0:
                        self._transport.expect_hidden(stage, entering, micro_batch.batch)
                if item.slot.update is not None:
                    assert item.hyperparameters is not None
                    self._hyperparameters[stage][item.slot.update] = item.hyperparameters
                    tick = item.slot.recent_ticks[self._num_stages - 1 - stage]
                    if tick is not None and self._is_pending(stage, tick):
                        self._closing[stage].add(tick)
            yield item.slot

    def _is_pending(self, stage: int, tick: int) -> bool:
        """Whether the backward of a tick is still to come; the order of some schedules does not wait for the end of an update."""
        return any(
            tick in known
            for known in (self._waiting[stage], self.runners[stage].in_flight, self.runners[stage].settled)
        )

    def _execute(self, instruction: Instruction) -> None:
        match instruction:
            case Forward(stage, tick):
                self._finish_step(stage)
                self._forward(self.runners[stage], tick)
            case InputGradient(stage, tick):
                self._finish_step(stage)
                self._input_gradient(self.runners[stage], tick)
            case Backward(stage, tick):
                self._finish_step(stage)
                self._backward(self.runners[stage], tick)
            case WeightGradient(stage, tick):
                self._weight_gradients(self.runners[stage], tick)
            case Settle(stage):
                self._finish_step(stage)
                self._settle(self.runners[stage])
            case Exchange(update):
                self._exchange(update)
            case Step(stage, update):
                self._step(self.runners[stage], update)
            case Rendezvous():
                self._transport.rendezvous()
            case Report():
                for stage in self.runners:
                    self._finish_step(stage)
                self._queue.come_to_rest()
                self._record_passed()
                self._rested = True
                self._events.put(Paused(self.index))

    def _go_on(self) -> None:
        """Takes what others may have written while this worker rested."""
        self._rested = False
        for runner in self.runners.values():
            self._queue.go_on(runner.tensors())

    def _forward(self, runner: StageRunner, tick: int) -> None:
        given = self._waiting[runner.index].pop(tick)
        received = None if runner.index == 0 else self._transport.receive("hidden", runner.index, tick)
        self._queue.accept(given.batch, given.made)
        self._queue.keep_pace()
        start = self._queue.moment()
        if given.opened is not None:
            runner.predict(*given.opened)
        output = runner.forward(tick, given.batch, given.context, received, given.segment, given.scale)
        self._record("forward", runner, tick, start)
        if isinstance(output, torch.Tensor):  # the loss, on the last stage
            self._events.put(FinishedLoss(tick, self._queue.reading(output)))
            if self._settings.tied_gradient == "paper" and given.delayed and runner.borrows:
                self._output_side_first.add(tick)
        else:
            self._transport.expect_gradient(runner.index, tick, output)
            self._transport.send("hidden", runner.index + 1, tick, output)
        if runner.index == self._pacing_stage:
            self._events.put(ForwardStarted(tick))

    def _backward(self, runner: StageRunner, tick: int) -> None:
        closing = tick in self._closing[runner.index]
        self._closing[runner.index].discard(tick)
        if tick in runner.settled:
            runner.accumulate(self._queue.take_out(runner.settled.pop(tick)), tick)
            return
        runner.accumulate(self._run_backward(runner, tick, "backward", closing), tick)
        if runner.index == self._num_stages - 1 and tick in self._output_side_first:
            self._output_side_first.remove(tick)
            self.runners[0].add_output_side(tick)

    def _input_gradient(self, runner: StageRunner, tick: int) -> None:
        gradient = self._gradient(runner, tick)
        start = self._queue.moment()
        upstream = runner.input_gradient(tick, gradient)
        self._record("backward", runner, tick, start)
        if runner.index > 0:
            self._transport.send("gradient", runner.index - 1, tick, upstream)

    def _weight_gradients(self, runner: StageRunner, tick: int) -> None:
        closing = tick in self._closing[runner.index]
        self._closing[runner.index].discard(tick)
        start = self._queue.moment()
        runner.weight_gradients(tick, closing)
        self._record("weights", runner, tick, start)

    def _gradient(self, runner: StageRunner, tick: int) -> Boundary | None:
        """Of the output of a stage's forward of a tick; waits for it."""
        if runner.index == self._num_stages - 1:
            return None
        if tick in runner.arrived:
            return runner.arrived.pop(tick)
        return self._transport.receive("gradient", runner.index, tick)

    def _settle(self, runner: StageRunner) -> None:
        if runner.replays_newest:  # with weights that are still to come; but no message stays on its way
            due = due_next(runner.in_flight, self._num_stages - 1 - runner.index)
            if due is not None and due not in runner.arrived:
                runner.arrived[due] = self._gradient(runner, due) or {}
            return
        for tick in sorted(runner.in_flight):
            gradients = self._run_backward(runner, tick, "settle")
            if runner.keeps_pending:
                runner.settled[tick] = self._queue.put_away(gradients)
            del gradients  # before there are those of the next tick

    def _run_backward(
        self, runner: StageRunner, tick: int, kind: str, closing: bool = False
    ) -> dict[str, torch.Tensor]:
        gradient = self._gradient(runner, tick)
        start = self._queue.moment()
        gradients, upstream = runner.backward(tick, gradient, closing, adding=kind == "backward")
        self._record(kind, runner, tick, start)
        if runner.index > 0:
            self._transport.send("gradient", runner.index - 1, tick, upstream)
        return gradients

    def _exchange(self, update: int) -> None:
        for stage, runner in self.runners.items():
            self._finish_step(stage)
            runner.start_mean()
            runner.finish_mean()
        self._norms = {stage: runner.norm() for stage, runner in self.runners.items()}
        self._queue.come_to_rest()  # others read them, in queues of their own
        norms = self._transport.share(update, self._norms)
        self._queue.go_on(norm for norm in norms.values() if norm is not None)
        present = [norms[stage].to(self._device) for stage in sorted(norms) if norms[stage] is not None]
        self._shared_norm = torch.linalg.vector_norm(torch.stack(present)) if present else None

    def _step(self, runner: StageRunner, update: int) -> None:
        """Steps at once; among replicas, begins the rest of the mean and steps when the stage is needed next.

        The device's other stage, if there is one, computes meanwhile.
        """
        if self._settings.shares_norms:
            self._apply(runner, update)
            return
        runner.start_mean()
        self._averaging[runner.index] = update
        if not runner.has_replicas:
            self._finish_step(runner.index)

    def _finish_step(self, stage: int) -> None:
        update = self._averaging.pop(stage, None)
        if update is not None:
            self.runners[stage].finish_mean()
            self._apply(self.runners[stage], update)

    def _apply(self, runner: StageRunner, update: int) -> None:
        start = self._queue.moment()
        norm = self._norms[runner.index] if self._settings.shares_norms else runner.norm()
        if norm is not None:
            whole = self._shared_norm if self._settings.shares_norms else norm
            assert whole is not None
            runner.bound(norm, whole, self._queue.reading)
        runner.step(self._hyperparameters[runner.index].pop(update), update)
        self._record("step", runner, update, start)
        self._events.put(StepDone(runner.index, update, None if norm is None else self._queue.reading(norm)))

    def _record(self, kind: str, runner: StageRunner, index: int, start: Moment) -> None:
        if self._timeline is not None:
            self._spans.append((kind, runner.index, index, start, self._queue.moment()))
            self._record_passed()

    def _record_passed(self) -> None:
        """Writes down what the device has done by now, when it did it."""
        while self._timeline is not None and self._spans and self._queue.has_passed(self._spans[0][-1]):
            kind, stage, index, start, end = self._spans.popleft()
            self._timeline.record(
                Event(self.index, stage, kind, index, self._queue.seconds(start), self._queue.seconds(end))
            )
