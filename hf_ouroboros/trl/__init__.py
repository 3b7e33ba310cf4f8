"""TRL's trainers over stages; needs the extra `trl`.

from hf_ouroboros.trl import OuroborosDPOConfig, OuroborosDPOTrainer, OuroborosSFTConfig, OuroborosSFTTrainer
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from .others import refuse

if TYPE_CHECKING:
    from .configuration import OuroborosDPOConfig, OuroborosSFTConfig
    from .dpo import OuroborosDPOTrainer
    from .sft import OuroborosSFTTrainer

__all__ = ["OuroborosDPOConfig", "OuroborosDPOTrainer", "OuroborosSFTConfig", "OuroborosSFTTrainer"]

LEAST, BELOW = "1.16", "1.17"
"""Releases of TRL that its trainers were compared with."""
_MODULES = {
    "OuroborosDPOConfig": ".configuration",
    "OuroborosDPOTrainer": ".dpo",
    "OuroborosSFTConfig": ".configuration",
    "OuroborosSFTTrainer": ".sft",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        refuse(name, _MODULES)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    check_version()
    return getattr(import_module(_MODULES[name], __name__), name)


def check_version() -> None:
    """Refuses releases of TRL that this package was not compared with.

    Raises:
        ImportError: TRL is not there, or is another release.
    """
    install = "pip install 'hf_ouroboros[trl]'"
    try:
        found = version("trl")
    except PackageNotFoundError:
        raise ImportError(f"hf_ouroboros.trl needs TRL: {install}") from None
    if not Version(LEAST) <= Version(found) < Version(BELOW):
        raise ImportError(f"hf_ouroboros.trl needs trl>={LEAST},<{BELOW}, found {found}: {install}")
