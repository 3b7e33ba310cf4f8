"""The stage plan: which stage holds what, on which device, with which delay; prints as a table."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StageRow:
    """One stage of a plan.

    Args:
        stage: its index k.
        device: name of its device.
        modules: full names of its modules in execution order.
        layers: how many of them are layers.
        delay: K-1-k ticks, or 0 under a synchronous schedule.
        parameters: how many parameters it owns; a tied matrix belongs to stage 0.
        parameter_bytes: their size.
        cost: its compute time relative to the other stages.
        trained_parameters: how many of its parameters are trained; None for all of them.
        trained_bytes: their size.
    """

    stage: int
    device: str
    modules: tuple[str, ...]
    layers: int
    delay: int
    parameters: int
    parameter_bytes: int
    cost: float
    trained_parameters: int | None = None
    trained_bytes: int | None = None

    @property
    def frozen(self) -> int:
        """How many of its parameters are not trained."""
        return 0 if self.trained_parameters is None else self.parameters - self.trained_parameters


@dataclass(frozen=True)
class StagePlan:
    """How a model is split.

    Args:
        rows: the stages in order.
        devices: the devices in use, in worker order.
        tied: whether first and last stage share a matrix.
        num_workers: devices that the split is meant for; more than `devices` where all stages were put on one.
        reason: why it is split like this, in a sentence, where that was weighed; else empty.
    """

    rows: tuple[StageRow, ...]
    devices: tuple[str, ...]
    tied: bool
    num_workers: int
    reason: str = ""

    @property
    def num_stages(self) -> int:
        """K."""
        return len(self.rows)

    @property
    def placement(self) -> tuple[int, ...]:
        """Device index of every stage."""
        return tuple(self.devices.index(row.device) for row in self.rows)

    @property
    def delays(self) -> tuple[int, ...]:
        """Delay of every stage in ticks."""
        return tuple(row.delay for row in self.rows)

    def device_map(self) -> dict[str, str]:
        """The same plan as {module name: device}, in execution order."""
        return {name: row.device for row in self.rows for name in row.modules}

    def parameters_on(self, device: str) -> int:
        """Number of parameters that live on a device."""
        return sum(row.parameters for row in self.rows if row.device == device)

    def bytes_on(self, device: str) -> int:
        """Bytes of the parameters that live on a device."""
        return sum(row.parameter_bytes for row in self.rows if row.device == device)

    def __str__(self) -> str:
        header: tuple[str, ...] = ("stage", "device", "delay", "layers", "parameters", "MiB", "modules")
        frozen = any(row.frozen for row in self.rows)
        lines: list[tuple[str, ...]] = [
            (
                str(row.stage),
                row.device,
                str(row.delay),
                str(row.layers),
                f"{row.parameters:,}",
                f"{row.parameter_bytes / 2**20:.1f}",
                row.modules[0] if len(row.modules) == 1 else f"{row.modules[0]} .. {row.modules[-1]}",
            )
            for row in self.rows
        ]
        if frozen:
            trained = ("trained", *(f"{row.parameters - row.frozen:,}" for row in self.rows))
            header, *lines = (
                (*line[:5], cell, *line[5:]) for line, cell in zip([header, *lines], trained, strict=True)
            )
        widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
        table = "\n".join(
            "  ".join(
                cell.ljust(w) if i in (1, len(header) - 1) else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in [header, *lines]
        )
        totals = ", ".join(f"{d}: {self.parameters_on(d):,} ({self.bytes_on(d) / 2**20:.1f} MiB)" for d in self.devices)
        text = f"{table}\nparameters per device: {totals}"
        if frozen:
            count = sum(row.parameters - row.frozen for row in self.rows)
            text += f"\ntrained: {count:,}; the others are frozen"
        return f"{text}\n{self.reason}" if self.reason else text


def torch_device(name: str) -> torch.device:
    """The torch device behind a device name.

    `cpu:0`, `cpu:1`, ... are workers of their own on one CPU, and so are `cuda:0/0`, `cuda:0/1`, ... on one GPU.
    """
    return torch.device("cpu") if name.startswith("cpu") else torch.device(name.partition("/")[0])
