"""What a run measures: sums that stay on the device, one transfer a log line, JSONL on disk."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiltflow.core.disk import parse_json, write_whole

Total = Callable[[Sequence[float]], Sequence[float]]
"""Adds up numbers over the ranks."""
Each = Callable[[Sequence[float]], Sequence[Sequence[float]]]
"""Every rank's numbers."""
Values = Mapping[str, Tensor | float]
ANEW = "watch/anew"
"""The text of a log that names the metrics, with commas between, which from its step on are
measured otherwise than before, so that the two cannot be held against each other."""

_HEAD = b'{"step": '
"""How every line begins."""


def set_apart(curves: MutableMapping[str, Any], row: Mapping[str, Any]) -> None:
    """Where a row of the log says `ANEW`, puts what was read before under names that say so."""
    for name in str(row.get(ANEW, "")).split(", "):
        if name in curves:
            curves[f"{name} before step {row['step']}"] = curves.pop(name)


class Accumulator:
    """Running means of 0-d tensors and floats, without a transfer until they are asked for.

    A metric's mean is over the calls of `add` that named it and were not refused.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor | float] = {}

    def add(self, values: Values, refused: Tensor | None = None) -> None:
        """Adds one observation of each metric, or none where `refused` (0-d) is 1.

        Raises:
            ValueError: on a tensor that is not 0-d.
        """
        for name, value in values.items():
            tensor = torch.as_tensor(value, dtype=torch.float32).detach()
            if tensor.ndim:
                raise ValueError(f"metric {name!r} has shape {tuple(tensor.shape)}, not ()")
            if refused is not None:  # not a product: what was refused may be NaN
                tensor = torch.where(refused > 0, 0.0, tensor)
            before = self._sums.get(name)
            # A copy, so that the caller may go on to change its tensor in place.
            self._sums[name] = tensor.clone() if before is None else before + tensor
            count = 1 if refused is None else 1 - refused
            self._counts[name] = self._counts.get(name, 0) + count

    def means(self, total: Total = lambda values: values) -> dict[str, float]:
        """The mean of every metric since the last reset; one transfer a device.

        `total` adds up the means over ranks, of which each accumulates its share of a metric and
        all refuse the same calls. A metric of refused calls alone has no mean.

        Raises:
            FloatingPointError: naming the first metric that is NaN or infinite.
        """
        means = {name: value / count for name, (value, count) in self._read().items() if count}
        totals = total(list(means.values()))
        return {n: _finite(n, value) for n, value in zip(means, totals, strict=True)}

    def _read(self) -> dict[str, tuple[float, float]]:
        """Each metric's sum and count, in order; one transfer a device."""
        found: dict[str, tuple[float, float]] = {}
        for device in {tensor.device for tensor in self._sums.values()}:
            names = [name for name, tensor in self._sums.items() if tensor.device == device]
            table = [torch.stack([self._sums[name] for name in names])]
            table += [torch.stack([_count(self._counts[n], device) for n in names])]
            sums, counts = torch.stack(table).tolist()
            found |= dict(zip(names, zip(sums, counts, strict=True), strict=True))
        return {name: found[name] for name in self._sums}

    def state(self, each: Each = lambda values: [values]) -> dict[str, list[float]]:
        """What has been added since the last reset, for `load`: of each metric every rank's sum,
        and the count. (The sum of these would round otherwise than a run in one piece.)

        Raises:
            FloatingPointError: naming the first metric that is NaN or infinite.
        """
        found = self._read()
        sums = zip(*each([value for value, _ in found.values()]), strict=True)
        pairs = zip(found.items(), sums, strict=True)
        return {name: [*(_finite(name, s) for s in of), count] for (name, (_, count)), of in pairs}

    def load(self, state: Mapping[str, Sequence[float]], rank: int = 0, size: int = 1) -> None:
        """Goes on from a `state`, as rank `rank` of `size`: with its own sums if they are of as
        many ranks, else the first has all, and the others know of them, so that all have the same
        metrics.

        Raises:
            ValueError: if that is no such state.
        """
        for name, kept in state.items():
            if not isinstance(kept, Sequence) or len(kept) < 2 or {*map(type, kept)} != {float}:
                raise ValueError(f"the sum and count of metric {name!r} are {kept!r}")
            *sums, count = kept
            whole = sum(sums) if rank == 0 else 0.0
            self._sums[name] = torch.tensor(sums[rank] if len(sums) == size else whole)
            self._counts[name] = count

    def reset(self) -> None:
        """Forgets everything added so far."""
        self._sums.clear()
        self._counts.clear()


def _count(count: Tensor | float, device: torch.device) -> Tensor:
    return torch.as_tensor(count, dtype=torch.float32, device=device)


def _finite(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise FloatingPointError(f"metric {name!r} is {value}")
    return value


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics file. A torn last line, of a run that was killed, is left out.

    Raises:
        ValueError: if the file is missing, or a line is neither a metrics line nor, at the end, a
            torn one.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no metrics file {path}")
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_json(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("not an object with a step")
        except ValueError as error:
            # A whole file ends in a newline, so its last piece is empty; otherwise it is torn,
            # maybe with zeros where a file system had not written yet.
            start = line.rstrip(b"\0")[: len(_HEAD)]
            if number == len(lines) and _HEAD.startswith(start):
                break
            raise ValueError(f"{path}, line {number}: not a metrics line") from error
        rows.append(row)
    return rows


class MetricsLog:
    """Appends to a JSONL file, one object a line with `step` first, flushed line by line.

    With `resume_step`, lines of later steps are dropped first (−1 drops all); without it, only
    a torn last line is. `tensorboard` and `wandb` mirror the values there, beside the file.

    Raises:
        ValueError: if the existing file is not a metrics file, or an asked-for sink's package
            is not installed.
    """

    def __init__(
        self,
        path: str | Path,
        tensorboard: bool = False,
        resume_step: int | None = None,
        wandb: bool = False,
    ) -> None:
        self.path = Path(path)
        self._tensorboard = self._wandb = None
        if tensorboard:
            self._tensorboard = _package("torch.utils.tensorboard", "tensorboard").SummaryWriter(
                str(self.path.parent / "tensorboard"),
                purge_step=None if resume_step is None else resume_step + 1,
            )
        if wandb:
            name = self.path.absolute().parent.name
            self._wandb = _package("wandb", "wandb").init(
                project="tiltflow", group=name, name=name, dir=str(self.path.parent)
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._truncate(resume_step)
        self._file = self.path.open("a", encoding="utf-8")

    def _truncate(self, resume_step: int | None) -> None:
        rows = read_metrics(self.path)
        kept = [row for row in rows if resume_step is None or row["step"] <= resume_step]
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, step: int, values: Values) -> None:
        """One line.

        Raises:
            FloatingPointError: naming the first metric that is NaN or infinite; nothing is written.
            ValueError: if a metric is called `step`.
        """
        if "step" in values:
            raise ValueError("a metric must not be called 'step'")
        row = {name: _finite(name, float(value)) for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in row.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(row, step=step)

    def say(self, step: int, texts: Mapping[str, str]) -> None:
        """One line of words, for what a number cannot say (an alarm); in the JSONL file alone.

        Raises:
            ValueError: if a text is called `step`.
        """
        if "step" in texts:
            raise ValueError("a text must not be called 'step'")
        self._file.write(json.dumps({"step": step, **texts}, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class NoLog:
    """The log of a rank that keeps none."""

    def write(self, step: int, values: Values) -> None:
        """Nothing."""

    def say(self, step: int, texts: Mapping[str, str]) -> None:
        """Nothing."""

    def __enter__(self) -> NoLog:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing."""


def check_sinks(tensorboard: bool, wandb: bool) -> None:
    """That the packages of the sinks that are asked for are installed.

    Raises:
        ValueError: naming the first that is not, and how to install it.
    """
    if tensorboard:
        _package("torch.utils.tensorboard", "tensorboard")
    if wandb:
        _package("wandb", "wandb")


def _package(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"log.{extra} is true, but {extra} is not installed (pip install 'tiltflow[{extra}]')"
        ) from error
