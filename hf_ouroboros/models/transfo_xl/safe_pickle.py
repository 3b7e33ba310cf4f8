"""Old pickles without their danger: only harmless classes are found, everything else is refused or an inert stub.

A pickle is a program that may call any function it can import (CVE-2023-6730 is about exactly these vocabularies). Here
it can import nothing: a name is looked up in a small table, or not at all.
"""

from __future__ import annotations

import collections
import pickle
import tarfile
import types
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from ...options import shortened, shown
from .errors import ConversionError
from .pickle_scan import check_archive, check_pickle


def _guarded(harmless: Callable[..., Any]) -> Callable[..., Any]:
    """The same callable in a disguise: a pickle may also set attributes of what it finds, say methods of a class."""
    return lambda *arguments: harmless(*arguments)


ZIP = b"PK\x03\x04"
LEGACY_PICKLES = 5  # magic number, protocol, the system's numbers, the content, keys of the storages
# Python 2 calls the module of its builtins __builtin__.
PLAIN = {
    ("collections", "OrderedDict"): _guarded(collections.OrderedDict),
    ("collections", "Counter"): _guarded(collections.Counter),
    ("builtins", "set"): _guarded(set),
    ("__builtin__", "set"): _guarded(set),
}
# What rebuilds tensors; nothing in it calls what it is given.
TENSORS = {
    ("torch._utils", "_rebuild_tensor"): _guarded(torch._utils._rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _guarded(torch._utils._rebuild_tensor_v2),
    ("torch._utils", "_rebuild_parameter"): _guarded(torch._utils._rebuild_parameter),
    ("torch.nn.parameter", "Parameter"): _guarded(torch.nn.Parameter),
    ("torch", "Size"): _guarded(torch.Size),
}


MOST_CLASSES = 1000


class Stub:
    """Stands for an object of a class that wasn't imported: keeps its state, does nothing."""

    origin = "?"
    dump_patches = False  # torch.load asks old modules for it

    def __new__(cls, *args: object, **kwargs: object) -> Stub:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object):
        pass

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)

    def __repr__(self) -> str:
        return f"<stub of {self.origin}>"


class SafeUnpickler(pickle.Unpickler):
    """Refuses every global that isn't in its table, or gives a stub for it.

    Args:
        file: binary file.
        stubs: give stubs instead of refusing the file.
        tensors: whether what rebuilds tensors is harmless.
    """

    def __init__(self, file: IO[bytes], stubs: bool = False, tensors: bool = False, **kwargs: Any):
        super().__init__(file, **kwargs)
        self._stubs = stubs
        self._made: dict[tuple[str, str], type[Stub]] = {}
        self._table = PLAIN | TENSORS if tensors else PLAIN

    def find_class(self, module: str, name: str) -> Any:
        """The class or function of that name, if it is harmless."""
        if (module, name) in self._table:
            return self._table[module, name]
        if self._stubs:
            if len(self._made) >= MOST_CLASSES:
                raise ConversionError(f"it has objects of more than {MOST_CLASSES:,} classes")
            if (module, name) not in self._made:
                self._made[module, name] = type("Stub", (Stub,), {"origin": f"{module}.{name}"[:200]})
            return self._made[module, name]
        raise ConversionError(
            f"it wants to import {shown(f'{module}.{name}')}, which is refused: only OrderedDict, Counter, set and tensors are "
            "harmless. With allow_stubs=True (--allow_stubs) unknown objects become inert instead"
        )


def load_pickle(path: str | Path, allow_stubs: bool = False) -> Any:
    """Content of a file written by `pickle.dump` or `torch.save`; nothing in it is executed.

    Args:
        path: the file.
        allow_stubs: unknown objects become stubs; otherwise the file is refused if it has any.

    Raises:
        ConversionError: the file wants to import something, is damaged, or would never end (see `pickle_scan`).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    try:
        with path.open("rb") as file:
            if file.read(4) != ZIP:  # what torch goes by
                file.seek(0)
                check_pickle(file)
                file.seek(0)
                content = SafeUnpickler(file, allow_stubs).load()
                # Before torch 1.6 a torch file was a sequence of pickles, the first of which is a magic number.
                if not isinstance(content, int):
                    return content
                if tarfile.is_tarfile(path):
                    raise ConversionError(
                        "it is an archive of torch 0.1, which is not read; save it with a newer torch"
                    )
                for _ in range(LEGACY_PICKLES - 1):
                    check_pickle(file)
            elif any(name.endswith("constants.pkl") for name in zipfile.ZipFile(path).namelist()):
                raise ConversionError("it is a TorchScript archive, which holds code")
            else:
                check_archive(path)
        return _load_with_stubs(path) if allow_stubs else torch.load(path, map_location="cpu", weights_only=True)
    except ConversionError as error:
        raise ConversionError(f"{path}: {error}") from None
    except (OSError, MemoryError) as error:
        raise ConversionError(f"{path} can't be read: {error}") from error
    except Exception as error:  # a damaged pickle may raise nearly anything
        raise ConversionError(
            f"{path} is damaged, or holds more than data; in the latter case, with allow_stubs=True (--allow_stubs) "
            f"unknown objects become inert ({type(error).__name__}: {shortened(str(error))})"
        ) from error


def _load_with_stubs(path: Path) -> Any:
    """torch.load, in which `SafeUnpickler.find_class` has the last word: its unpickler derives from the given one."""

    class Unpickler(SafeUnpickler):
        def __init__(self, file: IO[bytes], **kwargs: Any):
            super().__init__(file, stubs=True, tensors=True, **kwargs)

    pickle_module = types.SimpleNamespace(
        __name__="safe_pickle",
        Unpickler=Unpickler,
        load=lambda file, **kwargs: Unpickler(file, **kwargs).load(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the source code of a stub isn't that of the saved class
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=pickle_module)
