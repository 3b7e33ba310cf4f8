"""Labels of pictures: settings can be long, pictures are not wide."""

from __future__ import annotations

import re


def in_lines(label: str, width: int = 36) -> str:
    """A label, however many settings it names, in lines that leave room for what it labels.

    Args:
        label: settings, separated by ":", ",", "+", "@" or spaces; lines end behind these only.
        width: characters of a line; a setting that is longer by itself stays whole.
    """
    lines = [""]
    for part in re.findall(r"[^:,+@ ]+[:,+@ ]*", label):
        if lines[-1].strip() and len((lines[-1] + part).rstrip()) > width:
            lines[-1] = lines[-1].rstrip()
            lines.append("  ")
        lines[-1] += part
    return "\n".join(lines)
