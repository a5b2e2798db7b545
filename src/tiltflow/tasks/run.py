"""A run directory, opened to look at."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tiltflow.config.load import RunConfig, load_config
from tiltflow.core.checkpoint import latest_step
from tiltflow.core.metrics import read_metrics
from tiltflow.evaluation.files import read_evaluation
from tiltflow.setup.run_directory import check_run
from tiltflow.tasks.sheets import sheets


@dataclass(frozen=True)
class Run:
    """What a run directory holds, read when it is asked for.

    Raises:
        ValueError: if `path` is no run directory; and by each property, if what it reads is
            missing or torn.
    """

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        check_run(self.path)

    @cached_property
    def config(self) -> RunConfig:
        """The settings that it was trained with."""
        return load_config(str(self.path / "config.yaml"))

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`: each a step and its figures by name."""
        return read_metrics(self.path / "metrics.jsonl")

    @property
    def step(self) -> int | None:
        """The step of the latest checkpoint; None before the first."""
        return latest_step(self.path)

    @property
    def finished(self) -> bool:
        """Whether the latest checkpoint is that of the last iteration."""
        return self.step == self.config.train.steps

    @property
    def samples(self) -> list[Path]:
        """The pictures of samples, the oldest first."""
        return list(sheets(self.path).values())

    @property
    def export(self) -> Path | None:
        """The folder of LoRAs for diffusers; None where there is none (the mixture, copies)."""
        folder = self.path / "export"
        return folder if folder.is_dir() else None

    @property
    def evaluation(self) -> dict[str, Any] | None:
        """The content of its `evaluation.json`; None where there is none."""
        there = (self.path / "evaluation.json").is_file()
        return read_evaluation(self.path) if there else None
