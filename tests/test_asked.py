"""The Python interface's keywords: a value of a wrong kind is a sentence, never another image."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

import tiltflow
from tiltflow.models.lora_files import lora_file
from tiltflow.tasks.asked import asked


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("tilt", "0.5", "a valid number"), ("tilt", None, "a valid number"),
        ("tilt", True, "a valid number"),
        ("resolution", "64", "a valid integer"), ("resolution", 64.0, "a valid integer"),
        ("resolution", (64,), r"a side, \[height, width\]"), ("resolution", (64,) * 4, "a side, "),
        ("resolution", [64, "x"], "a valid integer"),
        ("resolution", 0, "greater than or equal to 1"),
        ("eta", -1, "greater than or equal to 0"), ("eta", math.nan, "less than or equal to 1"),
        ("steps", 2.5, "a valid integer"), ("teacher_steps", 0, "greater than or equal to 1"),
        ("seed", 1.5, "a valid integer"), ("seed", 2**63, "less than or equal to"),
        ("batch", 0, "greater than or equal to 1"), ("batch", "x", "a valid integer"),
        ("guidance", "x", "a valid number"), ("cache", 5, "a valid string"),
        ("few_step", 5, "a valid string"), ("device", "", "at least 1 character"),
        ("generator_path", "\0", "no null character"),
    ],
)  # fmt: skip
def test_a_value_of_a_wrong_kind_is_a_sentence(name: str, value: Any, said: str) -> None:
    how: Any = {name: value}
    with pytest.raises(ValueError, match=f"^{name} is .*, but it should .*{said}"):
        tiltflow.sample("packaged:pipeline", ["a red circle"], **how)


def test_a_prompt_that_is_no_text_is_a_sentence() -> None:
    prompts: Any = ["a red circle", None]
    with pytest.raises(ValueError, match="^a prompt is None, but it should be a text or a Prompt$"):
        tiltflow.sample("packaged:pipeline", prompts)


def test_what_is_in_order_is_handed_on() -> None:
    given = {"tilt": 1, "resolution": [64, 64], "cache": Path("a"), "other": {}, "seed": 2**63 - 1}
    assert asked(given) == given | {"resolution": 64, "cache": "a"}
    assert asked({"resolution": (64, 32)}) == {"resolution": (64, 32)}


def test_a_run_directory_is_no_lora_folder(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ValueError, match=r"it is a run directory, whose LoRAs lie in .*export$"):
        lora_file(tmp_path)
