"""How much memory this process uses, and has used at most."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class MemoryUse:
    """Memory of one process, in bytes.

    Args:
        peak_resident: largest resident size (RAM, mapped files included) so far; None where the system can't tell.
        resident: resident size now; None except on Linux.
        peak_cuda: largest allocated size on the current CUDA device since the last
            `torch.cuda.reset_peak_memory_stats()`; None without CUDA.
    """

    peak_resident: int | None
    resident: int | None
    peak_cuda: int | None


def peak_memory() -> MemoryUse:
    """The memory of this process.

    On Linux it is read from /proc: `getrusage` there reports a child's peak as no less than its parent's size at the
    fork, which would make a small worker of a large launcher look large.
    """
    cuda = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    status = STATUS.read_text() if STATUS.exists() else ""
    found = {key: int(kib) * 1024 for key, kib in re.findall(r"^(VmHWM|VmRSS):\s+(\d+) kB$", status, re.MULTILINE)}
    peak = found["VmHWM"] if "VmHWM" in found else _usage()
    return MemoryUse(peak, found.get("VmRSS"), cuda)


def reset_peak() -> bool:
    """Lets the peak of the resident size begin anew; tells whether the system can do that (Linux)."""
    if not CLEAR_REFS.exists():
        return False
    CLEAR_REFS.write_text("5")
    return True


def _usage() -> int | None:
    try:
        import resource  # Unix only
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere
