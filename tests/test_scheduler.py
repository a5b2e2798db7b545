"""The CPS scheduler for diffusers: grid, noise, and images against `tiltflow sample`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    FluxPipeline,
)
from lengths import mostly_long
from students import (
    MODELS,
    PROMPTS,
    RESOLUTION,
    TOKENS,
    Student,
    pictures,
    request,
    sampled,
    student,
)
from torch import Tensor

from tiltflow.core.randomness import Randomness
from tiltflow.data.prompts import Prompt
from tiltflow.flow import cps_step, euler_step
from tiltflow.models.families import load_backbone
from tiltflow.scheduler import CPSFlowMatchScheduler, latent_shape, pack

Tiny = Callable[[str], Path]


def test_grid_of_sd3_is_shifted_once() -> None:
    made = CPSFlowMatchScheduler.from_config(FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    made.set_timesteps(4)
    assert torch.equal(made.sigmas, torch.tensor([1, 0.9, 0.75, 0.5, 0]))
    assert torch.equal(made.timesteps, 1000 * made.sigmas[:-1])
    made.set_timesteps(1)
    assert torch.equal(made.sigmas, torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="at least 1 step"):
        made.set_timesteps(0)
    with pytest.raises(ValueError, match="not timesteps"):
        made.set_timesteps(timesteps=[1000.0, 500.0])


@pytest.mark.parametrize("name", ["sd3m", "flux_dev", "flux_schnell", "klein"])
def test_grid_is_the_backbones(tiny_pipeline: Tiny, name: str) -> None:
    backbone: Any = load_backbone(tiny_pipeline(name), device="cpu", resolution=RESOLUTION)
    made = CPSFlowMatchScheduler.from_config(backbone.scheduler.config)
    for steps in (2, 4, 8):
        dynamic = backbone.scheduler.config.use_dynamic_shifting
        made.set_timesteps(steps, mu=backbone._mu(steps) if dynamic else None)
        assert torch.equal(made.sigmas, backbone.few_step_sigmas(steps))


def test_saved_and_loaded(tmp_path: Path) -> None:
    euler = FlowMatchEulerDiscreteScheduler(shift=2.0, use_dynamic_shifting=True, max_shift=1.3)
    made = CPSFlowMatchScheduler.from_config(euler.config, eta=0.5, patch=2)
    made.save_pretrained(tmp_path)
    again = CPSFlowMatchScheduler.from_pretrained(tmp_path)
    assert (again.config.eta, again.config.patch, again.config.shift) == (0.5, 2, 2.0)
    assert (again.config.use_dynamic_shifting, again.config.max_shift) == (True, 1.3)
    for wrong in ({"eta": 1.1}, {"eta": -0.1}, {"patch": 0}, {"stochastic_sampling": True}):
        with pytest.raises(ValueError):
            CPSFlowMatchScheduler(**wrong)


def test_noise_is_packed_as_the_pipelines_pack() -> None:
    x = torch.randn(2, 16, 4, 6)
    assert torch.equal(pack(x, 2), FluxPipeline._pack_latents(x, *x.shape))
    assert torch.equal(pack(x, 1), Flux2KleinPipeline._pack_latents(x))
    assert latent_shape(16, 64, 2) == (16, 8, 8) and latent_shape(16, 128, 1) == (128, 4, 4)
    assert latent_shape(6, 64, 2) == (16, 2, 12)  # no square


def test_a_step_is_flow_cps_step_with_counted_noise() -> None:
    made = CPSFlowMatchScheduler(eta=0.7, shift=3.0)
    x, v = torch.randn(2, 2, 4, 4, 4).unbind()
    first = made.seed(5, images=[3, 8])
    assert torch.equal(
        torch.randn(4, 4, 4, generator=first[1]), Randomness(5).normal("sample/init", 8, (4, 4, 4))
    )
    made.set_timesteps(2)
    for k, t in enumerate(made.timesteps):
        z = torch.stack([Randomness(5).normal(f"sample/step{k}", n, (4, 4, 4)) for n in (3, 8)])
        expected = cps_step(x, v, made.sigmas[k], made.sigmas[k + 1], 0.7, z if k == 0 else None)
        assert torch.equal(made.step(v, t, x).prev_sample, expected)
    half = CPSFlowMatchScheduler(shift=3.0)
    half.set_timesteps(2)
    assert half.step(v.bfloat16(), half.timesteps[0], x.bfloat16())[0].dtype == torch.bfloat16


def test_eta_zero_is_euler_up_to_rounding() -> None:
    made = CPSFlowMatchScheduler(eta=0.0, shift=3.0)
    made.set_timesteps(4)
    x, v = torch.randn(2, 2, 4, 4, 4).unbind()
    for k, t in enumerate(made.timesteps):
        euler = euler_step(x, v, made.sigmas[k], made.sigmas[k + 1])
        assert torch.allclose(made.step(v, t, x)[0], euler, atol=1e-6)


def test_bad_seeds() -> None:
    made = CPSFlowMatchScheduler()
    with pytest.raises(ValueError, match="must be 0 or more"):
        made.seed(-1)
    with pytest.raises(ValueError, match="no image"):
        made.seed(0, images=0)
    made.seed(0, images=3)
    made.set_timesteps(2)
    x = torch.zeros(2, 4, 4, 4)
    with pytest.raises(ValueError, match="seeded for 3 images, but the pipeline makes 2"):
        made.step(x, made.timesteps[0], x)
    with pytest.raises(NotImplementedError):
        made.scale_noise(x, made.timesteps[:1], x)


@pytest.fixture(scope="module")
def made(tiny_pipeline: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Student]:
    students: dict[str, Student] = {}

    def get(name: str) -> Student:
        if name not in students:
            students[name] = student(tiny_pipeline, name, tmp_path_factory.mktemp(name))
        return students[name]

    return get


def loaded_pipeline(made: Student, strength: float) -> Any:
    pipe: Any = DiffusionPipeline.from_pretrained(made.base)
    for name in ("few_step", "tilt"):
        pipe.load_lora_weights(made.export / name, adapter_name=name)
    pipe.set_adapters(["few_step", "tilt"], [1.0, strength])
    pipe.scheduler = CPSFlowMatchScheduler.from_pretrained(made.export / "scheduler")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe: Any, **call: Any) -> Tensor:
    size = {"height": RESOLUTION, "width": RESOLUTION, "max_sequence_length": TOKENS}
    # SD3 and klein take 1 as no guidance; FLUX.1-dev's student was trained at it
    values = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "pt"}
    given = {"prompt": PROMPTS} | size | values | call
    # Z-Image's pipeline writes its template into the list that it is given
    given["prompt"] = list(given["prompt"])
    made = pictures(pipe(**{name: value for name, value in given.items() if value != OUT}))
    return made[:, :3]  # of Qwen-Image-2.1 without the opacity


OUT = "left out"


OFF = {
    "z_image": {"guidance_scale": 0.0},
    "krea2": {"guidance_scale": 0.0},
    "sana": {"use_resolution_binning": False},
    "qwen_image": {"guidance_scale": None},
    "wan21_1b": {"num_frames": 1},
    "qwen_image_21": {"guidance_scale": OUT, "max_sequence_length": OUT},
}
"""What a pipeline's call takes for a student's pass beside `images`' own arguments."""


@pytest.mark.parametrize("name", mostly_long(MODELS, "sd35m", "flux2_klein_4b", "wan21_1b"))
def test_pipeline_gives_the_images_of_tiltflow_sample(
    made: Callable[[str], Student], name: str
) -> None:
    # Qwen-Image's pipelines encode their prompts together, and each is encoded alone here
    prompts = PROMPTS[:1] if name.startswith("qwen_image") else PROMPTS
    count = len(prompts)
    asked = request(made(name), prompts=[Prompt(text) for text in prompts], tilt=0.7, seed=11)
    ours = sampled(asked)
    pipe = loaded_pipeline(made(name), 0.7)
    off = OFF.get(name, {})
    theirs = images(pipe, generator=pipe.scheduler.seed(11, images=count), **off, prompt=prompts)
    assert ours.std() > 0.05 and (ours - theirs).abs().max() == 0
    # each part of it matters: the second adapter's strength, and the noise of the steps
    other = loaded_pipeline(made(name), 0.0)
    seeded = other.scheduler.seed(11, images=count)
    assert (images(other, generator=seeded, **off, prompt=prompts) - ours).abs().max() > 1e-3
    initial = [Randomness(11).generator("sample/init", n) for n in range(count)]
    assert (images(pipe, generator=initial, **off, prompt=prompts) - ours).abs().max() > 1e-3


def test_without_a_seed_the_generator_decides(made: Callable[[str], Student]) -> None:
    pipe = loaded_pipeline(made("sd3m"), 1.0)

    def draw(seed: int) -> Tensor:
        return images(pipe, generator=torch.Generator().manual_seed(seed))

    pipe.scheduler.seed(0, images=2)
    seeded = draw(1)
    first = draw(1)  # the seed was for one call
    assert (seeded - first).abs().max() > 1e-3
    assert torch.equal(first, draw(1))
    assert (first - draw(2)).abs().max() > 1e-3
