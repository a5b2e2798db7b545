"""Weight files against the networks of their configurations, values, and noise levels."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_helpers import load
from safetensors.torch import load_file, save_file
from tiny_pipelines import BUILDERS

from tiltflow.models.family import family_named
from tiltflow.models.pipelines.files import check_pipeline
from tiltflow.models.pipelines.weights import check_values, check_weights, largest

Tiny = Callable[[str], Path]
FAMILY = {"sd3m": "sd3", "flux_dev": "flux", "klein": "flux2"}
CLASSES = {family: family_named(family).networks for family in FAMILY.values()}
PARTS = [(name, part) for name, family in FAMILY.items() for part in CLASSES[family]]


def change(model: Path, part: str, edit: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """The part's one weight file with its tensors edited."""
    file = next((model / part).glob("*.safetensors"))
    table = load_file(file)
    edit(table)
    save_file(table, file, {"format": "pt"})
    return model


@pytest.mark.parametrize("name", BUILDERS)
def test_what_diffusers_saves_is_in_order(tiny_pipeline: Tiny, name: str) -> None:
    check_pipeline(tiny_pipeline(name))
    check_weights(tiny_pipeline(name))


@pytest.mark.parametrize(("name", "part"), PARTS)
def test_every_part_refuses_what_it_does_not_use(
    tiny_pipeline: Tiny, tmp_path: Path, name: str, part: str
) -> None:
    model = shutil.copytree(tiny_pipeline(name), tmp_path / "model")
    extra = {"blocks.9.extra": torch.ones(2)}
    change(model, part, lambda table: table.update(extra))
    with pytest.raises(
        ValueError, match=rf"{part} holds blocks\.9\.extra, which a {CLASSES[FAMILY[name]][part]}"
    ):
        check_weights(model)
    first: list[str] = []

    def scaled(table: dict[str, torch.Tensor]) -> None:
        del table["blocks.9.extra"]
        first.append(sorted(k for k, v in table.items() if v.ndim > 1)[0])
        table[first[0]] = table[first[0]].to(torch.float8_e4m3fn)
        table[first[0] + "_scale"] = torch.ones(1)

    change(model, part, scaled)
    with pytest.raises(ValueError, match=rf"{part} holds quantised weights .*{first[0]}_scale"):
        check_pipeline(model)


def test_what_files_may_hold_besides(tiny_pipeline: Tiny, tmp_path: Path) -> None:
    """CLIP's positions of older versions, a tied weight by both names, the other half of a T5."""
    model = shutil.copytree(tiny_pipeline("sd3m"), tmp_path / "model")
    positions = {"text_model.embeddings.position_ids": torch.arange(16)[None]}
    change(model, "text_encoder", lambda table: table.update(positions))

    def whole(table: dict[str, torch.Tensor]) -> None:
        table["encoder.embed_tokens.weight"] = table["shared.weight"].clone()
        table["decoder.final_layer_norm.weight"] = torch.ones(64)

    change(model, "text_encoder_3", whole)
    check_pipeline(model)
    check_weights(model)
    embedded = load(model).encode(["a cat"]).positive["prompt_embeds"]
    plain = load(tiny_pipeline("sd3m")).encode(["a cat"]).positive["prompt_embeds"]
    assert torch.equal(embedded, plain)
    change(model, "text_encoder", lambda table: table.update(
        {"text_model.embeddings.position_ids.weight_scale": torch.ones(1)}))  # fmt: skip
    with pytest.raises(ValueError, match="quantised"):
        check_pipeline(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite(value: float) -> None:
    network = torch.nn.BatchNorm1d(3)
    check_values(network, "here")
    network.running_mean[1] = value  # type: ignore[index]
    with pytest.raises(ValueError, match="here holds running_mean with a value that is"):
        check_values(network, "here")
    assert largest(torch.tensor([-3.0, 2.0])) == 3


@pytest.mark.parametrize("name", ["sd3m", "klein"])
def test_eight_bits_refuse_what_they_do_not_hold(
    tiny_pipeline: Tiny, tmp_path: Path, name: str
) -> None:
    """torch 2.13 clips to 448 in silence, older versions give NaN."""
    model = shutil.copytree(tiny_pipeline(name), tmp_path / "model")
    query = "transformer_blocks.0.attn.to_q.weight"

    def put(value: float) -> Callable[[dict[str, torch.Tensor]], Any]:
        return lambda table: table[query].view(-1)[0].fill_(value)

    load(change(model, "transformer", put(-448.0)), fp8=True)
    change(model, "transformer", put(-449.0))
    with pytest.raises(ValueError, match=rf"a value of 449 in {query}, and 8 bits reach to 448"):
        load(model, fp8=True)
    load(model)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [({"shift_terminal": 0.1}, 1), ({"invert_sigmas": True}, 4), ({"shift": 1e-6}, 4)],
)
def test_levels_that_do_not_fall(
    tiny_pipeline: Tiny, tmp_path: Path, changes: dict[str, Any], steps: int
) -> None:
    model = shutil.copytree(tiny_pipeline("sd3m"), tmp_path / "model")
    file = model / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    backbone = load(model, parts="image")
    for grid in (backbone.few_step_sigmas, backbone.teacher_sigmas):
        if "shift" in changes:
            assert torch.all(grid(steps).diff() < 0)
            continue
        with pytest.raises(
            ValueError, match=f"do not fall from 1 to 0: see .*{next(iter(changes))}"
        ):
            grid(steps)


def test_a_last_level_of_its_own_is_taken(tiny_pipeline: Tiny, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_pipeline("sd3m"), tmp_path / "model")
    file = model / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"shift_terminal": 0.1}))
    levels = load(model, parts="image").few_step_sigmas(4)
    assert levels[-2] == pytest.approx(0.1) and levels[-1] == 0
