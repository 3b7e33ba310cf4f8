"""The named errors of the package: every refusal says the option or layer, what was found and what to do."""

from __future__ import annotations


class OuroborosError(Exception):
    """Base class of all errors raised on purpose by hf_ouroboros."""


class DeviceMapError(OuroborosError, ValueError):
    """A device map, list of layer counts, or memory budget that can't be turned into stages."""


class UnsupportedModelError(OuroborosError, ValueError):
    """A model architecture, or a feature of a model, that can't be split into stages."""


class UnsupportedOptionError(OuroborosError, ValueError):
    """A training option, or combination of options, that has no meaning with the chosen schedule."""


class UnsupportedTrainerError(OuroborosError, ImportError):
    """A trainer of TRL that has no counterpart over stages; says why."""


class InputFileError(OuroborosError, ValueError):
    """A file that a user names and that can't be read, or isn't what it should be."""


class OutputFileError(OuroborosError, OSError):
    """A file that can't be written where a user wants it."""


class CheckpointError(OuroborosError, ValueError):
    """A checkpoint whose Ouroboros state is missing, damaged, or belongs to a different run."""


class CheckpointMismatchError(CheckpointError):
    """A checkpoint that is whole, but of another kind of run; those before it would not fit either."""


class OutputFolderError(OuroborosError, RuntimeError):
    """An output folder that this run can't save in: another one does, or it can't be written."""


class StreamError(OuroborosError, ValueError):
    """Batches of a stream that don't follow each other, so that memories can't go on."""


class EngineError(OuroborosError, RuntimeError):
    """A call that the engine can't carry out in its present state."""


class WorkerError(EngineError):
    """A worker failed; says device, instruction, stage and tick, and carries the original exception as cause.

    Args:
        device: name of the worker's device.
        instruction: the instruction that was running, as text; None when the worker was between instructions.
        error: the exception the worker raised.
    """

    def __init__(self, device: str, instruction: str | None, error: BaseException):
        self.device = device
        self.instruction = instruction
        doing = f"during {instruction}" if instruction else "between instructions"
        super().__init__(f"worker on {device} failed {doing}: {type(error).__name__}: {error}")


class ConnectionLostError(EngineError):
    """Another process is gone, or did not answer in time.

    Args:
        what: what was waited for.
        peer: rank of the process that should have sent it, where it is one process.
        error: what the communication library said.
    """

    def __init__(self, what: str, peer: int | None, error: BaseException):
        self.peer = peer
        who = "" if peer is None else f" from rank {peer}"
        super().__init__(f"waited in vain for {what}{who}: {str(error).splitlines()[0]}")


class ProcessLaunchError(OuroborosError, RuntimeError):
    """Processes that don't form one run: started singly, not knowing each other, or too few."""


class RankFailedError(EngineError):
    """Another process of the run failed; says which, where it was, and why as far as it could tell."""


class DisagreementError(EngineError, ValueError):
    """Processes of a run that were given different things; says which, on which ranks, and all values.

    Args:
        message: the whole of it, in one line.
        names: what they disagree about.

    Attributes:
        everywhere: whether all processes of the run raise this, so that nobody has to be told.
    """

    def __init__(self, message: str, names: tuple[str, ...]):
        self.names = names
        self.everywhere = False
        super().__init__(message)
