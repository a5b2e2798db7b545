"""A ComfyUI workflow gives the student's images, by a small interpreter of its sampler nodes.

The nodes' rules, in our own words (ComfyUI: comfy/samplers.py, comfy/k_diffusion/sampling.py and
comfy/model_sampling.py's CONST): a latent enters a sampler as σ₀ z + (1 − σ₀) latent, z being
zero without `add_noise`, and leaves it divided by 1 − σ_end. `lcm` takes x̂₀ and adds noise to σ'.
`euler` goes along x − x̂₀. The ancestral sampler steps to σ_d, scales, and adds noise to σ'.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from students import MODELS as MODELS_OF_STUDENTS
from students import PROMPTS, TOKENS, Student, request, sampled, student
from torch import Tensor
from typer.testing import CliRunner

from tiltflow.cli.main import app
from tiltflow.config.load import dump_config
from tiltflow.core.checkpoint import save_checkpoint
from tiltflow.core.randomness import SAMPLE_INIT, sample_step
from tiltflow.flow import cps_mean_std
from tiltflow.formats.contract import Contract, read_contract
from tiltflow.formats.workflow import (
    NO_WORKFLOW,
    NODES,
    TRANSFORMERS,
    ancestral_eta,
    has_workflow,
    no_workflow,
    spelled,
    workflow,
)
from tiltflow.method.sampling import numbered_noise
from tiltflow.models.family import families
from tiltflow.tasks.evaluate import prepare

Tiny = Callable[[str], Path]
Denoise = Callable[[Tensor, float], Tensor]


MODELS = {
    "sd3": ("sd35m", "sd3m", "sd35l"),
    "flux": ("flux1_dev", "schnell"),
    "flux2": ("flux2_klein_4b",),
    "flux2_dev": ("flux2_dev",),
    "z_image": ("z_image",),
    "chroma": ("chroma",),
    "qwen_image": ("qwen_image",),
    "krea2": ("krea2",),
    "wan": ("wan21_1b",),
}
ALWAYS = ("sd35m", "flux1_dev", "flux2_klein_4b")
"""What `make test` has; the others are in `make test-slow`."""
ROUNDINGS = {"krea2": 5e-5, "wan": 5e-5}
"""For η between 0 and 1, where the ancestral form rounds otherwise than CPS's own. One unit in the
last place of the noise is 2.7e-5 in the images of Krea 2's tiny network, and 3e-6 in SD3.5's; of
Wan's the two forms are 1.7e-5 apart."""


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=() if name in ALWAYS else pytest.mark.long)
        for names in MODELS.values()
        for name in names
    ],
)
def made(
    request: pytest.FixtureRequest, tiny_pipeline: Tiny, tmp_path_factory: pytest.TempPathFactory
) -> Student:
    out = tmp_path_factory.mktemp(request.param)
    whole = {"tokens": 512} if request.param == "wan21_1b" else {}  # those that ComfyUI has
    return student(tiny_pipeline, request.param, out, formats=("diffusers", "comfyui"), **whole)


def contract_of(made: Student) -> Contract:
    contract = read_contract(made.export / "tilt")
    assert contract is not None
    return contract


class Interpreter:
    """Runs a graph's `SamplerCustom` nodes. `noise(k)` is the latent's z for k = −1, and then that
    of the k-th step."""

    def __init__(self, graph: dict[str, Any], denoise: Denoise, noise: Callable[[int], Tensor]):
        self.graph, self.denoise, self.noise, self.step = graph, denoise, noise, 0

    def kind(self, link: list[Any]) -> tuple[str, dict[str, Any]]:
        node = self.graph[link[0]]
        return node["class_type"], node["inputs"]

    def latent(self, link: list[Any]) -> Tensor:
        kind, inputs = self.kind(link)
        if kind.startswith("Empty"):
            return torch.zeros_like(self.noise(-1))
        assert kind == "SamplerCustom" and inputs["cfg"] == 1
        x = self.latent(inputs["latent_image"])
        named, settings = self.kind(inputs["sigmas"])
        assert named == "ManualSigmas"
        numbers = re.findall(r"[-+]?\d*\.?\d+", settings["sigmas"])
        sigmas = [float(torch.tensor(float(number))) for number in numbers]
        z = self.noise(-1) if inputs["add_noise"] else torch.zeros_like(x)
        x = sigmas[0] * z + (1 - sigmas[0]) * x
        name, settings = self.kind(inputs["sampler"])
        name = settings.get("sampler_name", name)
        for now, then in pairwise(sigmas):
            x = getattr(self, name.lower())(x, now, then, settings)
            self.step += 1
        return x / (1 - sigmas[-1])

    def lcm(self, x: Tensor, now: float, then: float, _: Any) -> Tensor:
        x0 = self.denoise(x, now)
        return (1 - then) * x0 + then * self.noise(self.step) if then > 0 else x0

    def euler(self, x: Tensor, now: float, then: float, _: Any) -> Tensor:
        x0 = self.denoise(x, now)
        return x + (x - x0) / now * (then - now)

    def samplereulerancestral(self, x: Tensor, now: float, then: float, settings: Any) -> Tensor:
        assert 0 <= settings["eta"] <= 100 and settings["s_noise"] == 1
        x0 = self.denoise(x, now)
        down = then * (1 + (then / now - 1) * settings["eta"])
        ratio = (1 - then) / (1 - down)
        x = ratio * (down / now * x + (1 - down / now) * x0)
        return x + (then**2 - (down * ratio) ** 2) ** 0.5 * self.noise(self.step)


@torch.no_grad()
def by_workflow(made: Student, graph: dict[str, Any]) -> Tensor:
    """Images of the graph's samplers around the student's network, with the student's noise."""
    loaded, sampler = prepare(request(made, seed=7))
    role, numbers = loaded.students["rtdmd"], list(range(len(PROMPTS)))
    cond, _ = sampler.encoded.select(numbers, role.backbone.device)
    shape = role.backbone.latent_shape

    def noise(k: int) -> Tensor:
        stream = SAMPLE_INIT if k < 0 else sample_step(k)
        return numbered_noise(sampler.randomness, stream, numbers, shape)

    def denoise(x: Tensor, sigma: float) -> Tensor:
        level = torch.full((len(x),), sigma)
        return x - sigma * role(x, level, cond)

    last = next(n["inputs"]["samples"] for n in graph.values() if n["class_type"] == "VAEDecode")
    return role.backbone.decode(Interpreter(graph, denoise, noise).latent(last))


@pytest.mark.long
@pytest.mark.parametrize("eta", [0.0, 0.4, 0.9, 1.0])
def test_the_workflow_gives_the_students_images(made: Student, eta: float) -> None:
    graph = workflow(contract_of(made).model_copy(update={"eta": eta}))
    found, expected = by_workflow(made, graph), sampled(request(made, seed=7, eta=eta))
    between = 0 < eta < 1
    bound = ROUNDINGS.get(contract_of(made).family, 1e-5) if between else 1e-5
    assert (found - expected).abs().max() <= bound
    other = sampled(request(made, seed=7, eta=1 - eta if eta != 0.4 else 0.9))
    assert (found - other).abs().max() > 1e-3


def test_the_files_graph(made: Student) -> None:
    """Every link is of a node that stands before; the LoRAs are those beside it."""
    graph = json.loads((made.export / "comfyui" / "workflow.json").read_text())
    contract = contract_of(made)
    assert graph == json.loads(json.dumps(workflow(contract, LORAS)))
    for name, node in graph.items():
        links = [v for v in node["inputs"].values() if isinstance(v, list)]
        assert all(int(source) < int(name) and slot == 0 for source, slot in links)
    kinds = [node["class_type"] for node in graph.values()]
    assert kinds.count("SamplerEulerAncestral") == 3 and kinds.count("SamplerCustom") == 4
    assert kinds.count(NODES[contract.family].latent) == 1
    loaders = [n["inputs"] for n in graph.values() if n["class_type"] == "LoraLoaderModelOnly"]
    for inputs in loaders:
        assert (made.export / "comfyui" / inputs["lora_name"]).is_file()
        assert inputs["strength_model"] == 1
    assert len(loaders) == 2
    seeds = [n["inputs"].get("noise_seed") for n in graph.values()]
    assert len({s for s in seeds if s is not None}) == 4


LORAS = [("few_step.safetensors", 1.0), ("tilt.safetensors", 1.0)]


@pytest.mark.parametrize("eta", [0.05, 0.5, 0.9, 0.99])
@pytest.mark.parametrize(("now", "then"), [(1.0, 0.9), (0.9, 0.75), (0.75, 0.5), (0.3, 0.01)])
def test_the_ancestral_setting_is_cps(eta: float, now: float, then: float) -> None:
    """Mean and standard deviation in fp64."""
    draw = torch.Generator().manual_seed(0)
    x, v = (torch.randn(1, 8, dtype=torch.float64, generator=draw) for _ in range(2))
    mean, std = cps_mean_std(x, v, torch.tensor(now).double(), torch.tensor(then).double(), eta)
    now, then = float(torch.tensor(now)), float(torch.tensor(then))
    run = Interpreter({}, lambda y, s: y - s * v, lambda k: torch.zeros_like(x))
    setting = {"eta": ancestral_eta(now, then, eta), "s_noise": 1.0}
    assert torch.allclose(run.samplereulerancestral(x, now, then, setting), mean, atol=1e-12)
    run.noise = lambda k: torch.ones_like(x)
    above = run.samplereulerancestral(x, now, then, setting) - mean
    assert torch.allclose(above, std.expand_as(above), atol=1e-9)


def test_levels_are_spelled_without_exponents() -> None:
    levels = [1.0, 0.8999999761581421, 0.1 + 0.2, 1.2345678e-5, 0.0]
    text = spelled(levels)
    assert text == "1, 0.9, 0.3, 0.000012345678, 0" and "e" not in text
    read = torch.tensor([float(part) for part in text.split(",")])
    assert torch.equal(read, torch.tensor(levels))


def test_every_family_with_a_workflow_is_executed(made: Student) -> None:
    assert MODELS.keys() == NODES.keys()
    assert any(name in made.export.parent.name for name in MODELS[contract_of(made).family])


def test_the_workflow_asks_for_the_students_own_base(made: Student) -> None:
    """Not for another model of the family, with which ComfyUI would sample without a word."""
    contract = contract_of(made)

    def named(**base: str | None) -> str:
        facts = contract.base.model_copy(update=base)
        graph = workflow(contract.model_copy(update={"base": facts}), LORAS)
        return graph["1"]["inputs"]["unet_name"] + " " + str(graph["4"]["inputs"])

    assert named().startswith(f"{contract.base.name}.safetensors ")
    assert named(hub_id="me/my-own").startswith("my-own.safetensors ")
    large = "stabilityai/stable-diffusion-3.5-large"
    assert named(hub_id=large).startswith("sd3.5_large.safetensors ")
    nine = named(hub_id="black-forest-labs/FLUX.2-klein-9B")
    assert nine.startswith("flux-2-klein-9b.safetensors ") and "qwen_3_8b.safetensors" in nine


@pytest.fixture(scope="module")
def without_t5(tiny_pipeline: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Student:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS_OF_STUDENTS, "sd35m", ("sd3m_without_t5", None))
        out = tmp_path_factory.mktemp("without_t5")
        return student(tiny_pipeline, "sd35m", out, formats=("diffusers", "comfyui", "merged"))


@torch.no_grad()
@pytest.mark.parametrize("length", [TOKENS, 0])
def test_without_t5_its_tokens_are_the_zeros_of_training(without_t5: Student, length: int) -> None:
    """By what ComfyUI's nodes do to a conditioning (comfy/text_encoders/sd3_clip.py, nodes.py):
    both CLIPs alone give their tokens, padded to T5's width, and nothing of T5's; ZeroOut makes
    zeros of tokens and pooled output; Concat puts the second's tokens behind the first's, with the
    pooled output of the first."""
    graph = workflow(contract_of(without_t5).model_copy(update={"max_sequence_length": length}))
    asked = request(without_t5, max_sequence_length=length, cache="off")
    cond, _ = prepare(asked)[1].encoded.select([0], torch.device("cpu"))
    tokens, pooled = cond.positive["prompt_embeds"], cond.positive["pooled_prompt_embeds"]
    clip_tokens = tokens.shape[1] - length
    assert tokens[:, clip_tokens - 1].any()  # those before T5's place are CLIP's

    def made(link: list[Any]) -> tuple[Tensor, Tensor]:
        kind, inputs = graph[link[0]]["class_type"], graph[link[0]]["inputs"]
        if kind == "ConditioningZeroOut":
            return tuple(map(torch.zeros_like, made(inputs["conditioning"])))  # type: ignore[return-value]
        if kind == "ConditioningConcat":
            first, second = made(inputs["conditioning_to"]), made(inputs["conditioning_from"])
            return torch.cat((first[0], second[0]), 1), first[1]
        assert kind == "CLIPTextEncode"
        encoder = graph[inputs["clip"][0]]
        if encoder["class_type"] == "T5TokenizerOptions":
            least = encoder["inputs"]["min_length"]
            assert graph[encoder["inputs"]["clip"][0]]["class_type"] == "CLIPLoader"
            assert inputs["text"] == "" and encoder["inputs"]["min_padding"] == 0
            return torch.ones(1, least, tokens.shape[-1]), torch.ones_like(pooled)
        assert encoder["class_type"] == "DualCLIPLoader" and encoder["inputs"]["type"] == "sd3"
        assert "t5" not in str(encoder)
        return tokens[:, :clip_tokens], pooled

    sampling = next(n for n in graph.values() if n["class_type"] == "SamplerCustom")
    found = made(sampling["inputs"]["positive"])
    assert torch.equal(found[0], tokens) and torch.equal(found[1], pooled)
    assert ("t5xxl" in str(graph)) is (length > 0)


def test_what_stands_in_t5s_place_is_said(without_t5: Student) -> None:
    text = (without_t5.export / "README.md").read_text()
    for section in ("## ComfyUI", "## One file"):
        said = text[text.index(section) :]
        assert f"trained without T5, with {TOKENS} tokens of zeros in its place" in said
    for folder in ("comfyui", "original"):
        graph = json.loads((without_t5.export / folder / "workflow.json").read_text())
        assert "TripleCLIPLoader" not in str(graph) and "ConditioningZeroOut" in str(graph)
    contract = contract_of(without_t5)
    assert no_workflow(contract) is None
    clip = contract.model_copy(update={"absent": ("text_encoder", "text_encoder_3")})
    assert no_workflow(clip) == (
        "There is no workflow for a student that was trained without text_encoder and "
        "text_encoder_3"
    )
    assert no_workflow(contract.model_copy(update={"absent": None})) is None


def test_every_base_of_a_recipe_has_a_file() -> None:
    for family in families():
        if has_workflow(family.name):
            assert set(family.published) <= set(TRANSFORMERS), family.name


@pytest.mark.long
@pytest.mark.parametrize(("name", "said"), [("sana", True), ("z_image", False)])
def test_an_export_without_a_workflow_says_so(
    tiny_pipeline: Tiny, tmp_path: Path, name: str, said: bool
) -> None:
    made = student(tiny_pipeline, name, tmp_path / "made")
    run, out = tmp_path / "run", tmp_path / "out"
    run.mkdir()
    (run / "config.yaml").write_text(dump_config(made.config))
    save_checkpoint(run, 3, made.checkpoint.tensors, {"step": 3, **made.checkpoint.state}, keep=1)
    asked = ["export", str(run), "--out", str(out), "--for", "comfyui"]
    told = CliRunner().invoke(app, asked).output
    assert (" ".join(NO_WORKFLOW.split()) in " ".join(told.split())) is said, told
    assert (NO_WORKFLOW in (out / "README.md").read_text()) is said
    assert (out / "comfyui" / "workflow.json").is_file() is not said
