"""Exports of full copies (adapters.kind=copies): no tilt apart, and the card's figures theirs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiltflow.config.load import RunConfig, load_config
from tiltflow.core.checkpoint import Checkpoint
from tiltflow.formats.wanted import Wanted
from tiltflow.models.roles import AdapterSettings
from tiltflow.setup.facts import Facts
from tiltflow.tasks.export import export_checkpoint

STAGE_1 = Facts("cold_start", AdapterSettings(2, 4.0, "x"), None, 4, 0.9, None, None, None)
COPIES = Facts("tilt", None, None, 4, 0.9, None, {}, None)


def config(out: Path) -> RunConfig:
    return load_config(
        "demo_tilt", ["adapters.kind=copies", "model.few_step=few_step", f"run.out={out}"]
    )


@pytest.mark.parametrize(
    ("facts", "formats", "said"),
    [
        (COPIES, ("merged",), "this run trained full copies .*, which have no tilt apart"),
        (STAGE_1, ("merged",), "this run has no tilt, which stage 2 trains"),
        (STAGE_1, ("diffusers",), "this run has no tilt, which stage 2 trains"),
    ],
)
@pytest.mark.parametrize("strengths", ["0,.5,1.5", "1"])
def test_without_a_tilt_no_strength_is_exported(
    tmp_path: Path, facts: Facts, formats: tuple[str, ...], said: str, strengths: str
) -> None:
    """A checkpoint's state says so by None: the key is there in every run."""
    state = facts.as_json()
    assert state["few_step_adapters"] is None
    with pytest.raises(ValueError, match=f"^{said}: leave --tilt out$"):
        export_checkpoint(
            config(tmp_path),
            Checkpoint(3, {"ema": {}}, state),
            tmp_path / "out",
            Wanted.of(formats, strengths),
        )
    assert not (tmp_path / "out").exists()
