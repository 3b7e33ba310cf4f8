"""What a script's code reads, without a gradient, while stages compute: weights of its own moment, or it is refused by name.

What is reached with a gradient is found in the graph (`graph.py`). A value (`p.norm().item()`, `p.detach()`, `p.data`, a view kept
from before, `p.grad`) leaves no trace there, and comes from a stage that is at another micro-batch at that moment. So calls of
torch's functions are looked at:

    in a script's own loss, and in hooks in a backward     always: there are few of them in Python
    in a stage's forward                                   the first one; all of them where a script's code is in it

What code of libraries that was exchanged deep inside begins to read after the first forward is not noticed.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from ..errors import OuroborosError, UnsupportedModelError, UnsupportedOptionError
from ..partition import Stage
from ..partition.module_hooks import OURS
from .graph import leaves_of
from .settings import EngineSettings

_LIBRARIES = ("torch", "transformers", "accelerate", "peft", "trl", "torchao", "bitsandbytes", __name__.split(".")[0])
WITHOUT_VALUES = frozenset(
    "shape dtype device layout ndim names requires_grad is_leaf is_meta is_cpu is_cuda is_sparse is_quantized itemsize nbytes "
    "grad_fn _backward_hooks _post_accumulate_grad_hooks _version size dim numel nelement stride element_size __len__ is_contiguous "
    "get_device is_floating_point is_complex is_signed type storage_offset data_ptr zeros_like ones_like empty_like full_like "
    "rand_like randn_like new_zeros new_ones new_empty new_full new_tensor register_hook register_post_accumulate_grad_hook".split()
)


_HOOKING = frozenset(("register_hook", "retain_grad", "grad_fn"))


class Moment(Enum):
    """Whose code runs."""

    FORWARD = "the forward of stage {}"
    LOSS = "the loss"
    BACKWARD = "a hook in the backward of stage {}"
    GRADIENT = "a hook on a gradient of stage {}"


class ReadCheck:
    """Refuses reads of tensors that are at other moments than the code that reads them.

    Args:
        model: whose parameters and buffers have names.
        stage: that computes.
        owned: the parameters that belong to each stage.
        settings: of the run.

    Attributes:
        saw_hooks: whether code that was looked at has put hooks on tensors or reached for their graph, so that a backward may
            call what must not be called twice.
    """

    def __init__(
        self, model: nn.Module, stage: Stage, owned: Sequence[Mapping[str, nn.Parameter]], settings: EngineSettings
    ):
        self._stage, self._alone = stage, stage.is_first and stage.is_last
        self._parameters = {id(p): (name, p) for name, p in model.named_parameters()}
        self._trained = {i for i, (_, p) in self._parameters.items() if p.requires_grad}
        self._own = {id(p) for p in owned[stage.index].values()}
        buffers = {name for name, _ in stage.named_buffers()}
        held = {id(b) for b in stage.buffers()}  # one that layers of several stages share has the name of the first
        others = ((name, b) for name, b in model.named_buffers() if name not in buffers and id(b) not in held)
        self._buffers = {id(b): name for name, b in others}
        together = settings.record.is_synchronous
        replayed = settings.replayed_by is not None and not stage.is_last
        forward = together or not (settings.predicts or replayed)
        self._own_allowed = {Moment.FORWARD: forward, Moment.LOSS: forward, Moment.BACKWARD: together}
        # What a stage has received was computed after the steps of the stages before; those behind may not have stepped yet.
        earlier = {id(p) for each in owned[: stage.index] for p in each.values()}
        self._right_if_synchronous = set() if together else earlier | self._own
        allowed = earlier if together else set()
        self._foreign_allowed = {Moment.FORWARD: set() if replayed else allowed, Moment.LOSS: allowed}
        self._mode = _Calls(self._look)
        self._moment: Moment | None = None
        self._hooked: nn.Parameter | None = None
        self._found: OuroborosError | None = None
        # Storages of other stages' weights, whose views a script may have kept.
        self._kept: dict[int, int] | None = None
        self._leaves: Mapping[str, torch.Tensor] = {}
        self._first, self._has_loss = True, False
        self.saw_hooks = False
        self.look_again()

    def look_again(self) -> None:
        """Whether a script's code is in the stage may have changed."""
        self.has_script = not self._alone and has_script(self._stage)

    @contextmanager
    def forward(self, leaves: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Surrounds a forward of the stage, up to where its graph was looked at.

        Args:
            leaves: the weights that it uses.
        """
        first, self._first = self._first, False
        watched = self.has_script or (first and not self._alone)
        with self._using(leaves), self._during(Moment.FORWARD) if watched else nullcontext():
            yield

    def loss(self) -> AbstractContextManager[None]:
        """Surrounds a script's loss, within the forward of the last stage."""
        self._has_loss = True
        return self._during(Moment.LOSS)

    @contextmanager
    def call(self) -> Iterator[None]:
        """Surrounds the call of the model within a script's loss."""
        if self._moment is None:
            yield
        elif self.has_script or _get_current_function_mode() is not self._mode:
            with self._during(Moment.FORWARD):
                yield
        else:
            self._mode.__exit__(None, None, None)
            try:
                yield
            finally:
                self._mode.__enter__()

    @contextmanager
    def backward(self, leaves: Mapping[str, torch.Tensor]) -> Iterator[bool]:
        """Surrounds a backward, in which only the hooks of a script are Python; tells whether they are watched.

        Args:
            leaves: the weights of its forward.
        """
        watched = self.has_script or (self._has_loss and not self._alone)
        with self._using(leaves), self._during(Moment.BACKWARD) if watched else nullcontext():
            yield watched

    @contextmanager
    def gradient(self, parameter: nn.Parameter) -> Iterator[None]:
        """Surrounds the hooks on a parameter, which may look at it and at its gradient."""
        if self._alone or not (parameter._backward_hooks or parameter._post_accumulate_grad_hooks):
            yield
            return
        self._hooked = parameter
        try:
            with self._during(Moment.GRADIENT):
                yield
        finally:
            self._hooked = None

    # ---- inside ----

    @contextmanager
    def _using(self, leaves: Mapping[str, torch.Tensor]) -> Iterator[None]:
        self._leaves = leaves
        try:
            yield
        finally:
            self._leaves = {}  # so that no old version stays

    @contextmanager
    def _during(self, moment: Moment) -> Iterator[None]:
        """Watches, and refuses what was found when it is over: what has a gradient is refused by its graph, in its own words."""
        before, self._moment = self._moment, moment
        try:
            if before is not None:
                yield
                return
            self._found = self._kept = None
            with self._mode:
                yield
        except OuroborosError:
            raise
        except Exception as error:
            if before is None and self._found is not None:
                raise self._found from error
            raise
        finally:
            self._moment = before
        if self._found is not None:
            raise self._found

    def _look(self, func: Callable[..., Any], args: Any, kwargs: Any) -> None:
        moment = self._moment
        assert moment is not None  # the mode is there during one only
        name, writes = name_of(func)
        self.saw_hooks |= name in _HOOKING and moment in (Moment.FORWARD, Moment.LOSS)
        if name in WITHOUT_VALUES and not writes:
            return
        if name == "backward" and moment is Moment.LOSS and not kwargs.get("inputs"):
            self._look_at_backward(args)
        for tensor in tensors_in((args, kwargs)):
            found = self._objection(moment, tensor, func, name, writes)
            if found is not None:
                what, why, advice = found
                who = moment.value.format(self._stage.index)
                kind = UnsupportedOptionError if moment is Moment.LOSS else UnsupportedModelError
                self._found = self._found or kind(
                    f"{who} {what}, {why}; {advice}" + ("" if self._alone else ", or train with num_stages=1")
                )
                if writes:
                    raise self._found
                return

    def _look_at_backward(self, args: Any) -> None:
        own = {id(leaf) for leaf in self._leaves.values()}
        if any(id(leaf) in own for leaf in leaves_of(tensors_in(args))):
            raise UnsupportedOptionError(
                "the loss calls backward() by itself on what depends on the model, whose gradients the stages add up at moments of "
                "their own; add such a loss to the one that is returned, or detach() what it is computed of"
            )

    def _objection(
        self, moment: Moment, tensor: torch.Tensor, func: Callable[..., Any], name: str, writes: bool
    ) -> tuple[str, str, str] | None:
        key: int | None = id(tensor)
        if key in self._buffers:
            advice = "look at it in a callback"
            return f"reads the buffer {self._buffers[key]}", "which another stage may be writing", advice
        if key not in self._parameters:
            key = self._viewed(tensor)
            if key is None:
                return None
        title, parameter = self._parameters[key]
        if name == "grad":
            if parameter is self._hooked or (func is torch.autograd.grad and self._alone):
                return None
            advice = "look at gradients in on_pre_optimizer_step"
            return f"asks for the gradient of {title}", "which the stages keep until their update is complete", advice
        if self._alone:
            return None
        what = f"{'writes' if writes else 'reads'} the parameter {title}"
        if parameter.is_meta:
            return what, "which is in another process", "look at it in a callback there"
        own = key in self._own
        if writes:
            if own and type(parameter) is not nn.Parameter and not parameter.requires_grad:
                return None  # packed: its library notes on it what its module needs
            return what, "which its stage uses meanwhile", "write in a callback"
        if own and (moment is Moment.GRADIENT or self._own_allowed[moment]):
            return None
        if not own and key in self._foreign_allowed.get(moment, ()):
            return None
        if key not in self._trained and not parameter.requires_grad:  # the same at every moment
            return None
        advice = "use weights by the modules that have them, look at them in a callback"
        if key in self._right_if_synchronous and moment in (Moment.FORWARD, Moment.LOSS):
            advice += ", use schedule='1f1b'"
        return what, "which may be that of another micro-batch at that moment", advice

    def _viewed(self, tensor: torch.Tensor) -> int | None:
        """The parameter of another stage whose memory a tensor shares; None for none.

        A parameter with such a view keeps its memory (`weights.py`), so there is nothing to miss.
        """
        storage = storage_of(tensor)
        if self._alone or storage is None:
            return None
        if self._kept is None:
            others = {key: p for key, (_, p) in self._parameters.items() if key not in self._own}
            self._kept = {s: key for key, p in others.items() if (s := storage_of(p)) is not None}
            for leaf in self._leaves.values():  # that of a tied matrix is lent to the last stage
                if (lent := storage_of(leaf)) is not None:
                    self._kept.pop(lent, None)
        key = self._kept.get(storage)
        if key is None or storage_of(self._parameters[key][1]) != storage:  # its stage has moved it meanwhile
            return None
        return key


def has_script(stage: Stage) -> bool:
    """Whether code that is neither a library's nor this package's runs in a stage's forward or backward."""
    core = stage.__dict__.get("_core")
    return any(has_script_in(part) for part in [*stage.modules(), *([] if core is None else [core])])


def has_script_in(part: nn.Module) -> bool:
    """The same of a module, without those inside."""
    hooks = part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks
    if any(not hasattr(hook, OURS) for kind in hooks for hook in kind.values()):
        return True
    functions = [v for v in vars(part).values() if isinstance(v, (types.FunctionType, types.MethodType))]
    return any(is_of_script(code) for code in (type(part), type(part).forward, *functions))


def is_of_script(code: Any) -> bool:
    """Whether a function or class is neither this package's nor of a library that it knows."""
    return (getattr(code, "__module__", None) or "").split(".")[0] not in _LIBRARIES


def tensors_in(tree: Any) -> Iterator[torch.Tensor]:
    """Tensors in nested lists, tuples and dicts of arguments."""
    for each in tree:
        if isinstance(each, torch.Tensor):
            yield each
        elif type(each) in (list, tuple):
            yield from tensors_in(each)
        elif type(each) is dict:
            yield from tensors_in(each.values())


def name_of(func: Callable[..., Any]) -> tuple[str, bool]:
    """A function's name, or that of the attribute that is looked at; and whether it writes into its first argument."""
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__", "__delete__"):
        return getattr(getattr(func, "__self__", None), "__name__", ""), name != "__get__"
    inplace = name.endswith("_") and not name.startswith("__")
    return name, inplace or name == "__setitem__" or (
        name.startswith("__i") and name not in ("__invert__", "__index__", "__int__")
    )


def storage_of(tensor: torch.Tensor) -> int | None:
    """Which memory a tensor is in; None of tensors of a kind of their own."""
    if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.layout is not torch.strided:
        return None
    memory: int = tensor.untyped_storage()._cdata
    return memory


class _Calls(TorchFunctionMode):
    """Tells of every call of a function of torch in this thread."""

    def __init__(self, tell: Callable[[Callable[..., Any], Any, Any], None]):
        super().__init__()
        self._tell = tell

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._tell(func, args, kwargs)
        return func(*args, **kwargs)
