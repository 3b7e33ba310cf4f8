"""The engine equals the reference to the last bit, whatever the schedule, and stops cleanly whatever happens."""

from __future__ import annotations

import gc
import itertools
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from accelerate.hooks import attach_align_device_hook_on_blocks
from helpers import (
    Case,
    Run,
    assert_same_run,
    causal_loss,
    clone,
    cpu_devices,
    differences,
    make_batch,
    oracle,
    tiny_gpt2,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trainer_helpers import EVERY

from hf_ouroboros.engine.core import Engine
from hf_ouroboros.engine.messages import StepDone
from hf_ouroboros.engine.settings import EngineSettings
from hf_ouroboros.errors import EngineError, WorkerError
from hf_ouroboros.partition import split_model
from hf_ouroboros.simulate.timeline import Timeline


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_worker_is_left() -> Iterator[None]:
    yield
    assert [t.name for t in threading.enumerate() if t.name.startswith("ouroboros")] == []


# ---- equal to the reference ----

LOOKS = ["synchronize", "settle", "norm", "state"]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Everything that the numbers, or the order of things, depend on."""
    stages = draw(st.integers(1, 5))
    return Case(
        stages=stages,
        updates=tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))),
        tied=draw(st.booleans()),
        dropout=draw(st.sampled_from([0.0, 0.2])),
        optimizer=draw(st.sampled_from(["sgd", "adamw", "nadam", "adafactor"])),
        clip=draw(st.sampled_from([None, 0.3])),
        scope=draw(st.sampled_from(["stage", "global"])),
        warmup=draw(st.integers(0, 3)),
        recompute=draw(st.booleans()),
        tied_gradient=draw(st.sampled_from(["joint", "paper"])),
        padded=draw(st.booleans()),
        devices=draw(st.sampled_from([None, 1, 2, 3])),
    )


def possible(case: Case) -> list[str]:
    """The schedules that can execute a case."""
    schedules = ["lockstep"]
    if case.tied_gradient == "joint":
        schedules += ["1f1b"] + ["pipelined"] * (case.scope == "stage")
    return schedules


def assert_equal_to_reference(case: Case, schedule: str, looks: Mapping[int, str] | None = None) -> None:
    rule = "reference 1f1b" if schedule == "1f1b" else "reference"
    assert_same_run(oracle(case, rule, looks), Run(case, schedule).train(looks))


@pytest.mark.slow
@settings(max_examples=24 if EVERY else 16, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cases(), st.dictionaries(st.integers(0, 5), st.sampled_from(LOOKS), max_size=3), st.data())
def test_equal_to_the_reference(case: Case, looks: dict[int, str], data: st.DataObject) -> None:
    assert_equal_to_reference(case, data.draw(st.sampled_from(possible(case))), looks)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["lockstep", "pipelined", "1f1b"])
@pytest.mark.parametrize(
    "case",
    [
        Case(stages=1, updates=(1, 2, 1)),
        Case(stages=2, updates=(1,) * 5),  # both stages on one device
        Case(stages=4, updates=(1,) * 9, dropout=0.2, clip=0.2),
        Case(stages=5, updates=(1, 1)),  # shorter than the delays
        Case(stages=4, updates=(3, 1, 2, 3), padded=True, optimizer="nadam"),  # ragged
        Case(stages=3, updates=(4, 4, 3), recompute=True, dropout=0.2),
        Case(stages=4, updates=(1, 2, 1, 2, 1, 2), warmup=3, tied=False),
        Case(stages=6, updates=(1,) * 8),  # the last stage is the head alone
        Case(stages=3, updates=(2,) * 4, optimizer="adafactor"),
    ],
    ids=str,
)
def test_regressions(case: Case, schedule: str) -> None:
    assert_equal_to_reference(case, schedule)


@pytest.mark.slow
@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("schedule", ["lockstep", "pipelined", "1f1b"])
def test_looking_changes_nothing(schedule: str, look: str) -> None:
    case = Case(stages=4, updates=(2, 1, 3, 2, 1), dropout=0.2, recompute=look == "settle")
    plain = oracle(case, schedule)
    looked = Run(case, schedule).train(dict.fromkeys(range(5), look))
    looked.grad_norms = {-1: looked.grad_norms[-1]}
    assert_same_run(plain, looked)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["stage", "global"])
@pytest.mark.parametrize("tied", [True, False])
def test_papers_tied_gradient(tied: bool, scope: str) -> None:
    case = Case(stages=4, updates=(1, 1, 2, 1, 1, 2), tied=tied, tied_gradient="paper", scope=scope, clip=0.3, warmup=2)
    assert_equal_to_reference(case, "lockstep", {3: "state"})


def test_bfloat16_autocast() -> None:
    found = []
    for kind in ("reference", "pipelined"):
        run = Run(Case(), kind)
        assert run.engine.settings.autocast_dtype is None
        object.__setattr__(run.engine.settings, "autocast_dtype", torch.bfloat16)
        found.append(run.train())
    assert_same_run(*found)
    assert found[0].losses != Run(Case(), "reference").train().losses


@pytest.mark.parametrize("schedule", ["lockstep", "pipelined"])
def test_model_dispatched_by_accelerate(schedule: str) -> None:
    """What accelerate's hooks leave behind must not lead around the weight versions."""
    case = Case(stages=3, updates=(1, 2, 1, 1), dropout=0.2, counts=(2, 2, 1))
    names = [f"transformer.{name}" for name in ("wte", "wpe", "drop", *(f"h.{i}" for i in range(5)), "ln_f")]

    def dispatch(model: torch.nn.Module) -> None:
        execution = dict.fromkeys([*names, "lm_head"], "cpu")
        attach_align_device_hook_on_blocks(model, execution, offload=dict.fromkeys(execution, False))
        model.hf_device_map = execution

    assert_same_run(Run(case, "reference").train(), Run(case, schedule, prepare=dispatch).train())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stages", "devices", "updates"), [(3, 1, 1), (4, 2, 1), (4, 2, 2), (5, 2, 3), (6, 3, 1), (6, 3, 2)]
)
@pytest.mark.parametrize("schedule", ["pipelined", "1f1b"])
def test_pause_soon_after_the_start(schedule: str, stages: int, devices: int, updates: int) -> None:
    """Devices with several stages catch up in an order in which nobody waits for a stage of its own."""
    case = Case(stages=stages, updates=(1,) * updates, devices=devices)
    assert_equal_to_reference(case, schedule, dict.fromkeys(range(updates), "state"))


# ---- interruption ----


@pytest.mark.slow
@settings(max_examples=14 if EVERY else 10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cases(), st.data())
def test_resumed_equals_uninterrupted(case: Case, data: st.DataObject) -> None:
    """Interrupted anywhere, written out as JSON and safetensors, continued under any schedule."""
    schedules = [s for s in possible(case) if s != "1f1b"] + ["reference"]
    first, second = data.draw(st.sampled_from(schedules)), data.draw(st.sampled_from(schedules))
    at = data.draw(st.integers(0, len(case.updates)))
    whole = Run(case, data.draw(st.sampled_from(schedules))).train()
    begun = Run(case, first)
    try:
        for u in range(at):
            begun.update(u)
        checkpoint = begun.checkpoint()
        begun.finish()
    finally:
        begun.engine.close()
    resumed = Run(case, second).resume(checkpoint).train(updates=range(at, len(case.updates)))
    resumed.ticks, resumed.losses = begun.ticks + resumed.ticks, begun.losses + resumed.losses
    if at == len(case.updates):
        resumed.grad_norms = whole.grad_norms  # no update since
    assert_same_run(whole, resumed)


@pytest.mark.slow
@pytest.mark.sampled(3)
@pytest.mark.parametrize("at", range(8))
@pytest.mark.parametrize("second", ["lockstep", "pipelined", "reference"])
def test_resume_at_every_update(at: int, second: str) -> None:
    case = Case(stages=4, updates=(2, 1, 1, 3, 1, 2, 1), dropout=0.2, warmup=2)
    begun = Run(case, "pipelined")
    try:
        for u in range(at):
            begun.update(u)
        checkpoint = begun.checkpoint()
    finally:
        begun.engine.close()
    whole = oracle(case)
    resumed = Run(case, second).resume(checkpoint).train(updates=range(at, 7))
    begun.hear()
    assert differences(whole.model.state_dict(), resumed.model.state_dict()) == []
    assert begun.losses + resumed.losses == whole.losses


def test_synchronous_run_continues_with_delays() -> None:
    """What 1f1b left behind is what a delay warm-up leaves behind."""
    case = Case(stages=3, updates=(2,) * 6)
    begun = Run(case, "1f1b")
    for u in range(3):
        begun.update(u)
    checkpoint = begun.checkpoint()
    begun.finish()
    resumed = Run(case, "pipelined").resume(checkpoint).train(updates=range(3, 6))
    warm = Run(Case(stages=3, updates=(2,) * 6, warmup=3), "reference").train()
    assert differences(warm.model.state_dict(), resumed.model.state_dict()) == []


def test_seed_of_the_dropout_masks_comes_from_the_checkpoint() -> None:
    case = Case(dropout=0.3)
    begun = Run(case, "pipelined")
    for u in range(3):
        begun.update(u)
    checkpoint = begun.checkpoint()
    begun.finish()
    resumed = Run(case, "pipelined")
    object.__setattr__(resumed.engine.settings, "seed", 12345)
    resumed.resume(checkpoint).train(updates=range(3, 6))
    assert begun.losses + resumed.losses == Run(case, "reference").train().losses


# ---- losses and limits ----


@pytest.mark.parametrize("schedule", ["lockstep", "pipelined", "1f1b"])
def test_losses_once_and_in_order(schedule: str) -> None:
    run = Run(Case(stages=4, updates=(3,) * 10), schedule).train({4: "settle", 7: "state"})
    assert run.ticks == list(range(30))


def small_engine(
    loss_fn: Callable[..., torch.Tensor] = causal_loss,
    stages: int = 3,
    schedule: str = "pipelined",
    timeline: Timeline | None = None,
    **options: Any,
) -> Engine:
    model = tiny_gpt2()
    devices = cpu_devices(max(1, stages - 1))
    partition = split_model(model, devices, num_stages=stages, check=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    engine_settings = EngineSettings(schedule=schedule, threads=1, **options)
    return Engine(partition, optimizer, loss_fn, engine_settings, timeline)


def feed(engine: Engine, updates: int, ticks: int = 1) -> None:
    for _ in range(updates):
        for _ in range(ticks):
            tick = engine._clock.tick
            assert (
                engine.submit(
                    make_batch(tick % 7),
                    tick if engine._runners[max(engine._runners)]._loss_fn is not causal_loss else None,
                )
                == tick
            )
        engine.step()


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["lockstep", "pipelined", "1f1b"])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_run_ahead_is_bounded(stages: int, schedule: str) -> None:
    """At most K+1 ticks are between the entrance and stage 0's backward, at most d_k + 1 on stage k."""
    seen: list[int] = []

    def loss_fn(logits: torch.Tensor, batch: Mapping[str, Any], tick: int) -> torch.Tensor:
        pending = {t for runner in engine._runners.values() for t in list(runner.in_flight)}
        seen.append(max(pending) - tick + 1)
        assert engine._clock.tick - tick <= stages + 2  # one more waits for it to be known whether it closes an update
        return causal_loss(logits, batch, None)

    engine = small_engine(loss_fn, stages, schedule)
    most = dict.fromkeys(range(stages), 0)
    for runner in engine._runners.values():

        def watched(*args: Any, runner: Any = runner, forward: Any = runner.forward) -> torch.Tensor:
            result = forward(*args)
            most[runner.index] = max(most[runner.index], len(runner.in_flight))
            return result

        runner.forward = watched
    try:
        feed(engine, 12, ticks=3)
        engine.synchronize()
    finally:
        engine.close()
    assert len(seen) == 36 and max(seen) <= stages + 1
    drained_after = 3 if schedule == "1f1b" else 36
    assert all(most[k] == min(stages - k, drained_after) for k in range(stages))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["pipelined", "lockstep"] if EVERY else ["pipelined"])
def test_nothing_grows(schedule: str) -> None:
    """500 ticks: tensors, micro-batches in flight, weight versions and bookkeeping are those of tick 50."""

    def census(engine: Engine) -> dict[str, int]:
        engine.synchronize()
        engine.collect()
        engine.collect_norms()
        gc.collect()
        storages = {
            leaf.data_ptr()
            for r in engine._runners.values()
            for item in r.in_flight.values()
            for leaf in item.leaves.values()
        }
        books = [engine._submitted, engine._accounts._open, engine._accounts._norms, engine._parts.transport._shared]
        books += [
            entry for w in engine._workers for table in (w._waiting, w._hyperparameters) for entry in table.values()
        ]
        link = engine._runners[0]._link
        return {
            "tensors": sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()),
            "weight versions": len(storages),
            "in flight": sum(len(r.in_flight) for r in engine._runners.values()),
            "books": sum(map(len, books)),
            "link": len(link.weights) + len(link.gradients),
        }

    engine = small_engine(stages=4, schedule=schedule)
    try:
        feed(engine, 50)
        before = census(engine)
        feed(engine, 450)
        assert census(engine) == before
        assert before["in flight"] == 3 + 2 + 1 and before["link"] == 3
    finally:
        engine.close()


def test_settling_releases_activations() -> None:
    engine = small_engine(stages=4)
    try:
        feed(engine, 6)
        engine.settle()
        assert [len(r.in_flight) for r in engine._runners.values()] == [0] * 4
        assert [sorted(r.settled) for r in engine._runners.values()] == [[3, 4, 5], [4, 5], [5], []]
        engine.settle()
        feed(engine, 3)
        engine.synchronize()
        assert [sorted(r.settled) for r in engine._runners.values()] == [[], [], [], []]
    finally:
        engine.close()


def test_a_finished_run_keeps_no_gradients() -> None:
    engine = small_engine(stages=4)
    try:
        feed(engine, 6)
        engine.settle()  # a checkpoint at the end
        engine.finish()
        feed_again = small_engine(stages=4)
        feed(feed_again, 6)
        feed_again.finish()
        for each in (engine, feed_again):
            assert [len(r.in_flight) + len(r.settled) for r in each._runners.values()] == [0] * 4
            with pytest.raises(EngineError, match="training has ended, .* save it before on_train_end"):
                each.state_dict()
        feed_again.close()
    finally:
        engine.close()


def test_timeline_has_everything() -> None:
    timeline = Timeline(3)
    engine = small_engine(stages=4, timeline=timeline)
    feed(engine, 6)
    engine.settle()
    engine.close()
    found = sorted((e.kind, e.stage, e.index) for e in timeline.events)
    expected = [("forward", k, t) for k in range(4) for t in range(6)]
    expected += [("backward" if t < 3 + k else "settle", k, t) for k in range(4) for t in range(6)]
    expected += [("step", k, u) for k in range(4) for u in range(6)]
    assert found == sorted(expected)


def test_grad_norm_comes_with_the_first_closed_update() -> None:
    engine = small_engine()
    try:
        assert engine.grad_norm is None
        feed(engine, 1)
        engine.synchronize()
        assert engine.grad_norm > 0
    finally:
        engine.close()


def test_grad_norm_does_not_depend_on_who_reports_first() -> None:
    engine = small_engine(stages=4)
    try:
        values = [1e8, 1.0, 1.0, 1.0]  # in another order of summation, the small ones would get lost one by one
        expected = None
        for update, order in enumerate(itertools.permutations(range(4))):
            for k in order:
                engine._events.put(StepDone(k, update, torch.tensor(values[k], dtype=torch.float64)))
            engine.collect()
            expected = engine.grad_norm if expected is None else expected
            assert engine.grad_norm == expected
    finally:
        engine.close()


# ---- wrong calls ----


def test_step_without_a_micro_batch() -> None:
    engine = small_engine()
    try:
        with pytest.raises(EngineError, match=r"step\(\) without a micro-batch since the last step\(\)"):
            engine.step()
        feed(engine, 1)
        with pytest.raises(EngineError, match="without a micro-batch"):
            engine.step()
        feed(engine, 1)
    finally:
        engine.close()


def test_state_is_defined_between_updates() -> None:
    engine = small_engine()
    try:
        engine.submit(make_batch(0))
        with pytest.raises(EngineError, match=r"between updates; call step\(\) first"):
            engine.state_dict()
        engine.step()
        assert engine.state_dict().tick == 1
    finally:
        engine.close()


def test_state_is_loaded_before_the_first_micro_batch() -> None:
    engine = small_engine()
    try:
        state = engine.state_dict()
        engine.load_state_dict(state)
        feed(engine, 1)
        with pytest.raises(EngineError, match="after the first micro-batch"):
            engine.load_state_dict(state)
    finally:
        engine.close()


@pytest.mark.parametrize(
    "call",
    [
        lambda engine: engine.submit(make_batch(0)),
        lambda engine: engine.step(),
        lambda engine: engine.synchronize(),
        lambda engine: engine.settle(),
    ],
    ids=["submit", "step", "synchronize", "settle"],
)
@pytest.mark.parametrize("used", [False, True])
def test_closed_engine(call: Callable[[Engine], Any], used: bool) -> None:
    engine = small_engine()
    if used:
        feed(engine, 4)
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="the engine is closed"):
        call(engine)
    assert not any(worker.is_alive() for worker in engine._workers)


def test_closing_in_the_middle_of_work() -> None:
    engine = small_engine(stages=5)
    feed(engine, 10, ticks=2)
    engine.submit(make_batch(0))
    engine.close()
    assert not any(worker.is_alive() for worker in engine._workers)


# ---- failures ----


class Broken(Exception):
    """What the tests' layers and losses raise."""


def fail_at(tick: int) -> Callable[..., torch.Tensor]:
    def loss_fn(logits: torch.Tensor, batch: Mapping[str, Any], context: int) -> torch.Tensor:
        if context == tick:
            raise Broken("out of luck")
        return causal_loss(logits, batch, None)

    return loss_fn


def assert_fails(engine: Engine, device: str, instruction: str, message: str = "Broken: out of luck") -> WorkerError:
    """The failure surfaces once work goes on, later calls raise the same, and no thread is left after close()."""
    with pytest.raises(WorkerError) as caught:
        feed(engine, 20)
        engine.synchronize()
    error = caught.value
    assert (error.device, error.instruction) == (device, instruction)
    assert str(error) == f"worker on {device} failed during {instruction}: {message}"
    for call in (lambda: engine.submit(make_batch(0)), engine.step, engine.synchronize, engine.settle):
        with pytest.raises(WorkerError) as again:
            call()
        assert again.value is error
    engine.close()
    assert not any(worker.is_alive() for worker in engine._workers)
    with pytest.raises(WorkerError):
        engine.submit(make_batch(0))
    return error


@pytest.mark.parametrize("schedule", ["lockstep", "pipelined", "1f1b"])
@pytest.mark.parametrize("tick", [0, 5])
def test_failing_loss(schedule: str, tick: int) -> None:
    engine = small_engine(fail_at(tick), stages=4, schedule=schedule)
    error = assert_fails(engine, "cpu:0", f"Forward(stage=3, tick={tick})")
    assert isinstance(error.__cause__, Broken)
    assert error.__cause__.__traceback__ is not None  # where it was raised


@pytest.mark.parametrize("schedule", ["lockstep", "pipelined", "1f1b"])
def test_failing_layer(schedule: str) -> None:
    calls = iter(range(100))

    def hook(*_: Any) -> None:
        if next(calls) == 3:
            raise Broken("out of luck")

    engine = small_engine(fail_at(-1), stages=4, schedule=schedule)
    name = engine.partition.stages[2].layer_names[0]
    engine.partition.stages[2].get_submodule(name).register_forward_pre_hook(hook)
    assert_fails(engine, "cpu:2", "Forward(stage=2, tick=3)")


def test_failing_backward() -> None:
    def loss_fn(logits: torch.Tensor, batch: Mapping[str, Any], tick: int) -> torch.Tensor:
        if tick == 2:
            logits.register_hook(lambda gradient: (_ for _ in ()).throw(Broken("out of luck")))
        return causal_loss(logits, batch, None)

    assert_fails(small_engine(loss_fn), "cpu:0", "Backward(stage=2, tick=2)")


def test_failing_step() -> None:
    engine = small_engine(fail_at(-1))

    def step(*_: Any) -> None:
        raise Broken("out of luck")

    engine._runners[1].optimizer.step = step
    assert_fails(engine, "cpu:1", "Step(stage=1, update=1)")  # its first window with a gradient


def test_bad_batch() -> None:
    engine = small_engine()
    with pytest.raises(
        WorkerError,
        match=r"worker on cpu:0 failed during Forward\(stage=0, tick=0\): EngineError: a batch needs input_ids",
    ):
        engine.submit({"labels": torch.zeros(1, 2)})
        engine.step()
        engine.synchronize()
    engine.close()


def test_first_failure_counts() -> None:
    """Other workers, torn away by the abort, don't report failures of their own."""
    engine = small_engine(fail_at(1), stages=5)
    error = assert_fails(engine, "cpu:0", "Forward(stage=4, tick=1)")
    assert error is engine._failure
    assert engine._events.empty() or not any(
        isinstance(engine._events.get(), WorkerError) for _ in range(engine._events.qsize())
    )


@pytest.fixture
def control_c() -> Iterator[None]:
    """Control-C interrupts, also where the tests run in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("control_c")
def test_keyboard_interrupt_while_waiting() -> None:
    """Control-C reaches the main thread although it waits for a worker; close() then stops all workers."""
    release = threading.Event()

    def loss_fn(logits: torch.Tensor, batch: Mapping[str, Any], context: None) -> torch.Tensor:
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        release.wait(30)
        return causal_loss(logits, batch, None)

    engine = small_engine(loss_fn, stages=4)
    with pytest.raises(KeyboardInterrupt):
        engine.submit(make_batch(0))
        engine.step()
        engine.synchronize()
        threading.Event().wait(30)  # the signal was late
    release.set()
    engine.close()
    assert not any(worker.is_alive() for worker in engine._workers)
    with pytest.raises(EngineError, match="closed"):
        engine.submit(make_batch(0))


# ---- the optimizer ----


def test_learning_rate_is_that_of_the_step_call() -> None:
    """A stage may step long after the scheduler moved on."""
    gate = threading.Event()

    def loss_fn(logits: torch.Tensor, batch: Mapping[str, Any], context: None) -> torch.Tensor:
        gate.wait(30)
        return causal_loss(logits, batch, None)

    def train(first: float, then: float) -> dict[str, torch.Tensor]:
        gate.clear()
        engine = small_engine(loss_fn, stages=3)
        engine.optimizer.param_groups[0]["lr"] = first
        engine.submit(make_batch(0))
        engine.step()
        engine.optimizer.param_groups[0]["lr"] = then
        gate.set()
        engine.synchronize()
        engine.close()
        return clone(engine.partition.model.state_dict())

    assert differences(train(0.5, 0.5), train(0.5, 0.0)) == []
    assert differences(train(0.5, 0.5), train(0.0, 0.5)) != []


def test_attach_takes_a_replaced_state() -> None:
    run = Run(Case(stages=3, updates=(1,) * 4), "pipelined")
    before = Run(Case(stages=3, updates=(1,) * 4), "reference")
    for each in (run, before):
        for u in range(2):
            each.update(u)
        each.engine.synchronize()
        each.optimizer.load_state_dict(clone(each.optimizer.state_dict()))
        each.engine.attach(each.optimizer)
    assert_same_run(before.train(updates=range(2, 4)), run.train(updates=range(2, 4)))
