"""A recipe's precision of the autoencoder, in what is exported and in what is made from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from students import request, student
from test_export_strength import products

from tiltflow.formats.contract import read_contract
from tiltflow.formats.wanted import Wanted
from tiltflow.tasks.callbacks import Callbacks
from tiltflow.tasks.depends import asked
from tiltflow.tasks.evaluate import prepare
from tiltflow.tasks.export import export_checkpoint

Tiny = Callable[[str], Path]
FILE = Path("transformer", "diffusion_pytorch_model.safetensors")


class Notices(Callbacks):
    def __init__(self) -> None:
        self.said: list[str] = []

    def notice(self, text: str) -> None:
        self.said.append(text)


@pytest.mark.long
def test_a_merged_autoencoder_is_kept_as_it_was_trained_with(
    tiny_pipeline: Tiny, tmp_path: Path
) -> None:
    """A recipe may have it in fp32 beside a base in bf16: its weights are then the model's own."""
    made = student(tiny_pipeline, "sd3m", tmp_path)
    own = load_file(made.model / "vae" / "diffusion_pytorch_model.safetensors")
    for vae, kind in (("fp32", torch.float32), (None, torch.bfloat16)):
        model = made.config.model.model_copy(update={"dtype": "bf16", "vae_dtype": vae})
        config, out = made.config.model_copy(update={"model": model}), tmp_path / str(vae)
        export_checkpoint(config, made.checkpoint, out, Wanted(("merged",)))
        kept = load_file(out / "merged" / "vae" / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(kept[name], value.to(kind)) for name, value in own.items())
        transformer = load_file(
            out / "merged" / "transformer" / "diffusion_pytorch_model.safetensors"
        )
        assert {value.dtype for value in transformer.values()} == {torch.bfloat16}
        contract = read_contract(out / "merged")
        assert contract is not None and (contract.dtype, contract.vae_dtype) == ("bf16", vae)


@pytest.mark.long
def test_a_weak_tilt_is_not_rounded_away_from_a_merged_base(
    tiny_pipeline: Tiny, tmp_path: Path
) -> None:
    """Each adapter was added to bf16 weights by itself: of a tilt below half of their last digit
    most was lost. What a few-step adapter alone has below it is lost, and said."""
    made, told, scale = student(tiny_pipeline, "sd3m", tmp_path), Notices(), 1 / 2048
    weak = {
        n: w * scale if ".lora_B." in n else w for n, w in made.checkpoint.tensors["ema"].items()
    }
    model = made.config.model.model_copy(update={"dtype": "bf16"})
    config = made.config.model_copy(update={"model": model})

    def change(tensors: dict[str, Any], strengths: tuple[float, float]) -> tuple[Any, Any]:
        checkpoint = replace(made.checkpoint, tensors=tensors)
        wanted, out = Wanted(("merged",), strengths), tmp_path / "out"
        export_checkpoint(config, checkpoint, out, wanted, callbacks=told)
        one, other = (load_file(out / f"merged_{s:g}" / FILE) for s in strengths)
        moved = {n: other[n].double() - one[n].double() for n in one if one[n].ndim == 2}
        return moved, products(tensors["ema"], lambda module: 2.0)

    moved, tilt = change(made.checkpoint.tensors | {"ema": weak}, (0.0, 1.0))
    assert not told.said
    along = sum(float((moved[f"{n}.weight"] * delta).sum()) for n, delta in tilt.items())
    assert along / sum(float(delta.square().sum()) for delta in tilt.values()) > 0.95
    change({"few_step": {n: w * 0 for n, w in weak.items()}, "ema": weak}, (0.5, 1.0))
    said = [text for text in told.said if text.startswith("merged")]
    assert said[0].startswith("merged_0.5 keeps ") and "too small beside weights in bf16" in said[0]


@pytest.mark.long
def test_a_student_is_decoded_as_in_training(tiny_pipeline: Tiny, tmp_path: Path) -> None:
    """By the contract, unless a precision is asked for, which is that of all parts."""
    made, out = student(tiny_pipeline, "sd3m", tmp_path), tmp_path / "mixed"
    model = made.config.model.model_copy(update={"dtype": "bf16", "vae_dtype": "fp32"})
    config = made.config.model_copy(update={"model": model})
    export_checkpoint(config, made.checkpoint, out)
    for dtype, vae in ((None, torch.float32), ("bf16", torch.bfloat16)):
        given = request(
            made, few_step=out / "few_step", tilt_lora=out / "tilt", dtype=dtype, cache="off"
        )
        backbone: Any = prepare(given)[0].backbone
        assert {value.dtype for value in backbone.vae.parameters()} == {vae}
        assert backbone.transformer.pos_embed.proj.weight.dtype == torch.bfloat16
        assert asked(given).get("vae_dtype") == (None if dtype else "fp32")
