"""Handshake: what the processes of a run must agree on, and the words for where they don't. No transport, no torch.

Every process states *facts*, {section: {name: value}}, for example {"options": {"learning_rate": 1e-3}}. A value is
what JSON can carry; None in `WHERE_HELD` stands for "not held here". The facts of all processes are compared at
`processes.meeting`.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DisagreementError

Facts = Mapping[str, Mapping[str, Any]]

MAY_DIFFER: dict[str, str] = {
    "output_dir": "hosts without a shared file system have paths of their own; files travel to the main process",
    "local_rank": "it is what tells processes apart",
    "devices": "ignored where every process is a device",
    "log_level": "how much a process says",
    "log_level_replica": "how much a process says",
    "log_on_each_node": "how much a process says",
    "disable_tqdm": "how much a process says",
    "report_to": "only the main process reports",
    "run_name": "only the main process reports",
    "project": "only the main process reports",
    "trackio_space_id": "only the main process reports",
    "trackio_bucket_id": "only the main process reports",
    "trackio_static_space_id": "only the main process reports",
    "logging_dir": "only the main process reports",
    "hub_token": "a secret, which belongs on no board; only the main process pushes",
    "debug": "what a process says about itself",
    "skip_memory_metrics": "what a process says about itself",
    "dataloader_pin_memory": "how batches get to the device, not which",
    "dataloader_persistent_workers": "how batches get to the device, not which",
    "dataloader_prefetch_factor": "how batches get to the device, not which",
    "dataloader_multiprocessing_context": "how batches get to the device, not which",
    "ddp_find_unused_parameters": "nothing here is wrapped in DistributedDataParallel",
    "ddp_bucket_cap_mb": "nothing here is wrapped in DistributedDataParallel",
    "ddp_broadcast_buffers": "nothing here is wrapped in DistributedDataParallel",
    "ddp_static_graph": "nothing here is wrapped in DistributedDataParallel",
    "resume_from_checkpoint": "a path, given to scripts; what was read from there is compared when training begins",
    "do_train": "for scripts; the trainer does not read it",
    "do_predict": "for scripts; the trainer does not read it",
}
"""Options that are not compared, with the reason. All others are."""

WHETHER: dict[str, str] = {
    "timeline": "all processes record, or none; the main process alone writes, so the path is its own",
}
"""Options of which only it is compared whether they are set, with the reason."""

WHERE_HELD = frozenset({"weights"})
"""Sections in which None says that this process does not hold the thing: only those who hold it have to agree."""

POINT = "point"
"""Section of the point that a process has reached."""
ADVICE = "Start all of them with the same script, options, software and files"
SHOWN = 6
"""How many differences a message spells out."""
LONGEST = 80
"""Characters of a value in a message."""


@dataclass(frozen=True)
class Difference:
    """Something that processes don't agree on.

    Args:
        name: of the option or fact.
        values: its value, by rank; ranks that don't hold it are left out.
    """

    name: str
    values: Mapping[int, Any]

    def __str__(self) -> str:
        texts = _shortened({rank: _text(value) for rank, value in self.values.items()})
        ranks: dict[str, list[int]] = {}
        for rank, text in texts.items():
            ranks.setdefault(text, []).append(rank)
        rarest_first = sorted(ranks.items(), key=lambda item: (len(item[1]), item[1]))
        return f"{self.name} is " + ", ".join(f"{text} on {ranks_text(where)}" for text, where in rarest_first)


def options_to_compare(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a run's options that have to be equal in all processes, as far as they do."""
    return {
        name: value if name not in WHETHER else value is not None
        for name, value in options.items()
        if name not in MAY_DIFFER
    }


def checksum(section: Mapping[str, Any]) -> int:
    """A number that is the same for equal sections, whatever the order of their names."""
    return zlib.crc32(json.dumps(section, sort_keys=True).encode())


def differences(facts: Mapping[int, Facts]) -> list[Difference]:
    """What processes don't agree on.

    Args:
        facts: of every process, by rank.
    """
    found = []
    for section in dict.fromkeys(name for one in facts.values() for name in one):
        tables = {rank: one.get(section, {}) for rank, one in facts.items()}
        for name in dict.fromkeys(name for table in tables.values() for name in table):
            values = {rank: table.get(name, "(nothing)") for rank, table in tables.items()}
            if section in WHERE_HELD:
                values = {rank: value for rank, value in values.items() if value is not None}
            if len({_text(value) for value in values.values()}) > 1:
                found.append(Difference(name, values))
    return found


def disagreement(where: str, facts: Mapping[int, Facts], advice: str = ADVICE) -> DisagreementError | None:
    """The error that all processes raise; None where they agree.

    Args:
        where: what they are about to do.
        facts: of every process, by rank.
        advice: what to do about it.
    """
    # Those who are at different points, or have different models, differ in much that follows from it.
    stages = [frozenset({POINT}), frozenset(name for one in facts.values() for name in one) - WHERE_HELD, WHERE_HELD]
    for sections in stages:
        found = differences({rank: {k: v for k, v in one.items() if k in sections} for rank, one in facts.items()})
        if found:
            break
    else:
        return None
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return DisagreementError(
        f"the processes of this run disagree, at {where}: {'; '.join(map(str, found[:SHOWN]))}{more}. {advice}",
        tuple(difference.name for difference in found),
    )


def ranks_text(ranks: Sequence[int]) -> str:
    """Ranks in words."""
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _shortened(texts: Mapping[int, str]) -> dict[int, str]:
    """Long texts from where they begin to differ."""
    if max(map(len, texts.values())) <= LONGEST:
        return dict(texts)
    all_texts = list(texts.values())
    at = next(i for i in range(max(map(len, all_texts)) + 1) if len({text[i : i + 1] for text in all_texts}) > 1)
    start = max(0, at - LONGEST // 2)
    return {
        rank: ("..." if start else "") + text[start : start + LONGEST] + ("..." if len(text) > start + LONGEST else "")
        for rank, text in texts.items()
    }
