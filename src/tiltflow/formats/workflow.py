"""A ComfyUI workflow that samples as the student was trained, in the form of ComfyUI's own API.

ManualSigmas, SamplerEulerAncestral, the loaders of several encoders and the empty latents are as
docs.comfy.org/built-in-nodes names them (read 2026-11), what nodes and SD3's loaders do to a
prompt's conditioning is from ComfyUI's source; the other nodes are as published workflows
have them. ComfyUI itself was not run. What the samplers do to a flow model, in our symbols, with
x̂₀ = x − σ v:

- `ManualSigmas` gives the levels; the first is σ₀ = 1, where the latent is the noise itself.
- `lcm`: x' = (1 − σ') x̂₀ + σ' z with fresh noise z, which is CPS at η = 1 (METHOD §2).
- `euler`: x' = x̂₀ + σ'/σ (x − x̂₀), which is CPS at η = 0.
- `SamplerEulerAncestral` steps down to σ_d = σ' (1 + (σ'/σ − 1) e), for its setting e, scales by
  (1 − σ')/(1 − σ_d) and adds noise up to the variance of σ'. That is CPS with another η at every
  level: the noise kept is σ' cos θ for e = (1 − σ_d/σ') / (1 − σ'/σ), where
  σ_d = q/(1 + q) with q = σ' cos θ / (1 − σ'). So 0 < η < 1 takes a sampler node a step, each with
  its own e and its own seed, and is exact up to rounding too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tiltflow.core.sizes import both, frames_of
from tiltflow.formats.contract import BaseModelFacts, Contract
from tiltflow.models.medium import FRAMES_PER_SECOND

Link = tuple[str, int]
Graph = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Nodes:
    """What a family's workflow is made of: loader nodes by (class, inputs), with the file names of
    the published models, which the user sets to those at hand."""

    encoders: tuple[str, Mapping[str, Any]]
    autoencoder: str
    latent: str
    tokens: int | None = None
    """How many tokens ComfyUI makes of every prompt, where no node sets their number."""
    t5: bool = False
    """Whether the text encoder pads a prompt as `T5TokenizerOptions` says."""
    embedded_guidance: bool = False
    without_t5: tuple[str, Mapping[str, Any]] | None = None
    """The encoders' loader for a student that was trained without T5, if it can be."""


VIDEO_LATENT = "EmptyHunyuanLatentVideo"
ANIMATED = {"fps": float(FRAMES_PER_SECOND), "lossless": False, "quality": 90, "method": "default"}

NODES: Mapping[str, Nodes] = {
    "sd3": Nodes(
        encoders=(
            "TripleCLIPLoader",
            {
                "clip_name1": "clip_l.safetensors",
                "clip_name2": "clip_g.safetensors",
                "clip_name3": "t5xxl_fp16.safetensors",
            },
        ),
        autoencoder="sd3_vae.safetensors",
        latent="EmptySD3LatentImage",
        t5=True,
        without_t5=(
            "DualCLIPLoader",
            {
                "clip_name1": "clip_l.safetensors",
                "clip_name2": "clip_g.safetensors",
                "type": "sd3",
            },
        ),
    ),
    "flux": Nodes(
        encoders=(
            "DualCLIPLoader",
            {
                "clip_name1": "clip_l.safetensors",
                "clip_name2": "t5xxl_fp16.safetensors",
                "type": "flux",
            },
        ),
        autoencoder="ae.safetensors",
        latent="EmptySD3LatentImage",
        t5=True,
        embedded_guidance=True,
    ),
    "flux2": Nodes(
        encoders=("CLIPLoader", {"clip_name": "qwen_3_4b.safetensors", "type": "flux2"}),
        autoencoder="flux2-vae.safetensors",
        latent="EmptyFlux2LatentImage",
    ),
    "flux2_dev": Nodes(
        encoders=(
            "CLIPLoader",
            {"clip_name": "mistral_3_small_flux2_bf16.safetensors", "type": "flux2"},
        ),
        autoencoder="flux2-vae.safetensors",
        latent="EmptyFlux2LatentImage",
        embedded_guidance=True,
    ),
    "z_image": Nodes(
        encoders=("CLIPLoader", {"clip_name": "qwen_3_4b.safetensors", "type": "lumina2"}),
        autoencoder="ae.safetensors",
        latent="EmptySD3LatentImage",
    ),
    "chroma": Nodes(
        encoders=("CLIPLoader", {"clip_name": "t5xxl_fp16.safetensors", "type": "chroma"}),
        autoencoder="ae.safetensors",
        latent="EmptySD3LatentImage",
        t5=True,
    ),
    "qwen_image": Nodes(
        encoders=("CLIPLoader", {"clip_name": "qwen_2.5_vl_7b.safetensors", "type": "qwen_image"}),
        autoencoder="qwen_image_vae.safetensors",
        latent="EmptySD3LatentImage",
    ),
    "krea2": Nodes(
        encoders=("CLIPLoader", {"clip_name": "qwen3vl_4b_bf16.safetensors", "type": "krea2"}),
        autoencoder="qwen_image_vae.safetensors",
        latent="EmptySD3LatentImage",
    ),
    "wan": Nodes(
        encoders=("CLIPLoader", {"clip_name": "umt5_xxl_fp16.safetensors", "type": "wan"}),
        autoencoder="wan_2.1_vae.safetensors",
        latent=VIDEO_LATENT,
        tokens=512,
    ),
}
"""By family. There is none of SANA, which its own nodes do not load, nor of Qwen-Image-2.1."""

NO_WORKFLOW = "There is no workflow for this family"
T5_ABSENT = ("text_encoder_3",)
T5_ZEROS = {"clip_name": "t5xxl_fp16.safetensors", "type": "sd3"}
"""The loader of the T5 whose tokens are set to zero (`_zeros`)."""

TRANSFORMERS: Mapping[str, str] = {
    "stabilityai/stable-diffusion-3-medium-diffusers": "sd3_medium.safetensors",
    "stabilityai/stable-diffusion-3.5-medium": "sd3.5_medium.safetensors",
    "stabilityai/stable-diffusion-3.5-large": "sd3.5_large.safetensors",
    "black-forest-labs/FLUX.1-dev": "flux1-dev.safetensors",
    "black-forest-labs/FLUX.1-schnell": "flux1-schnell.safetensors",
    "black-forest-labs/FLUX.2-klein-4B": "flux-2-klein-4b.safetensors",
    "black-forest-labs/FLUX.2-klein-9B": "flux-2-klein-9b.safetensors",
    "black-forest-labs/FLUX.2-klein-base-4B": "flux-2-klein-base-4b.safetensors",
    "black-forest-labs/FLUX.2-klein-base-9B": "flux-2-klein-base-9b.safetensors",
    "black-forest-labs/FLUX.2-dev": "flux2-dev.safetensors",
    "Tongyi-MAI/Z-Image": "z_image_bf16.safetensors",
    "Tongyi-MAI/Z-Image-Turbo": "z_image_turbo_bf16.safetensors",
    "lodestones/Chroma1-HD": "Chroma1-HD.safetensors",
    "Qwen/Qwen-Image": "qwen_image_bf16.safetensors",
    "krea/Krea-2-Raw": "krea2_raw_bf16.safetensors",
    "krea/Krea-2-Turbo": "krea2_turbo_bf16.safetensors",
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "wan2.1_t2v_1.3B_bf16.safetensors",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": "wan2.1_t2v_14B_bf16.safetensors",
}
"""The published transformers' file names by the pipeline's hub id."""

_KLEIN_9B = {"clip_name": "qwen_3_8b.safetensors"}
ENCODERS: Mapping[str, Mapping[str, str]] = {
    "black-forest-labs/FLUX.2-klein-9B": _KLEIN_9B,
    "black-forest-labs/FLUX.2-klein-base-9B": _KLEIN_9B,
}
"""What is another encoder than the family's, by hub id."""


@dataclass
class _Builder:
    """Nodes numbered in the order in which they are added."""

    graph: Graph = field(default_factory=dict)

    def add(self, kind: str, /, **inputs: Any) -> str:
        name = str(len(self.graph) + 1)
        links = {k: list(v) if isinstance(v, tuple) else v for k, v in inputs.items()}
        self.graph[name] = {"class_type": kind, "inputs": links}
        return name


def has_workflow(family: str) -> bool:
    """Whether ComfyUI's own nodes load a family's models."""
    return family in NODES


def no_workflow(contract: Contract) -> str | None:
    """Why a student has no workflow, without a full stop; None where it has one."""
    if not has_workflow(contract.family):
        return NO_WORKFLOW
    nodes, absent = NODES[contract.family], contract.absent or ()
    if nodes.tokens not in (None, contract.max_sequence_length):
        return (
            f"There is no workflow for a student that was trained with "
            f"{contract.max_sequence_length} text tokens, where ComfyUI has {nodes.tokens}"
        )
    if not absent or (absent == T5_ABSENT and nodes.without_t5):
        return None
    return f"There is no workflow for a student that was trained without {' and '.join(absent)}"


def zero_tokens(contract: Contract) -> int | None:
    """The tokens that are zeros in T5's place in a student's workflow; None where T5 is there."""
    return contract.max_sequence_length if contract.absent == T5_ABSENT else None


def workflow(
    contract: Contract, loras: Sequence[tuple[str, float]] = (), transformer: str | None = None
) -> Graph:
    """The graph for the student of a contract.

    `loras` are file names in ComfyUI's loras folder with their strengths; `transformer` is a file
    among its diffusion models, by default that of the student's own base. There has to be one
    (`no_workflow`).
    """
    nodes, make = NODES[contract.family], _Builder()
    name = transformer or _transformer(contract.base)
    model: Link = (make.add("UNETLoader", unet_name=name, weight_dtype="default"), 0)
    for file, strength in loras:
        loader = make.add(
            "LoraLoaderModelOnly", model=model, lora_name=file, strength_model=strength
        )
        model = (loader, 0)
    positive, negative = _prompts(make, nodes, contract)
    if nodes.embedded_guidance:
        guided = make.add("FluxGuidance", conditioning=positive, guidance=contract.guidance)
        positive = (guided, 0)
    height, width = both(contract.resolution)
    frames = frames_of(contract.resolution)
    length = {"length": frames} if nodes.latent == VIDEO_LATENT else {}
    latent: Link = (make.add(nodes.latent, width=width, height=height, batch_size=1, **length), 0)
    for k, (sampler, sigmas) in enumerate(_steps(make, contract)):
        made = make.add(
            "SamplerCustom",
            model=model,
            add_noise=k == 0,
            noise_seed=1000 * k,  # a step's own: with one seed, each would add the same noise
            cfg=1.0,
            positive=positive,
            negative=negative,
            sampler=sampler,
            sigmas=sigmas,
            latent_image=latent,
        )
        latent = (made, 0)
    vae: Link = (make.add("VAELoader", vae_name=nodes.autoencoder), 0)
    image: Link = (make.add("VAEDecode", samples=latent, vae=vae), 0)
    if frames > 1:
        make.add("SaveAnimatedWEBP", images=image, filename_prefix="tiltflow", **ANIMATED)
    else:
        make.add("SaveImage", images=image, filename_prefix="tiltflow")
    return make.graph


def _prompts(make: _Builder, nodes: Nodes, contract: Contract) -> tuple[Link, Link]:
    """The conditioning of a prompt and of the empty one, which nothing reads at cfg = 1."""
    zeros = zero_tokens(contract)
    kind, files = nodes.encoders if zeros is None else nodes.without_t5 or nodes.encoders
    files = {**files, **ENCODERS.get(contract.base.hub_id or "", {})}
    clip: Link = (make.add(kind, **files), 0)
    if nodes.t5 and zeros is None:
        clip = _padded(make, clip, contract.max_sequence_length)
    texts = ("a red fox in the snow", "")
    made: list[Link] = [(make.add("CLIPTextEncode", clip=clip, text=text), 0) for text in texts]
    if zeros:
        more = _zeros(make, zeros)
        made = [
            (make.add("ConditioningConcat", conditioning_to=one, conditioning_from=more), 0)
            for one in made
        ]
    return made[0], made[1]


def _padded(make: _Builder, clip: Link, length: int) -> Link:
    """A text encoder whose T5 pads a prompt to `length` tokens."""
    return (make.add("T5TokenizerOptions", clip=clip, min_padding=0, min_length=length), 0)


def _zeros(make: _Builder, length: int) -> Link:
    """`length` tokens of zeros. Without T5 ComfyUI has CLIP's 77 tokens alone, where the pipeline
    has zeros in T5's place, which the transformer attends to; and no node makes a length of its own
    but T5's. So T5 reads an empty prompt, and its tokens are set to zero."""
    t5: Link = (make.add("CLIPLoader", **T5_ZEROS), 0)
    empty: Link = (make.add("CLIPTextEncode", clip=_padded(make, t5, length), text=""), 0)
    return (make.add("ConditioningZeroOut", conditioning=empty), 0)


def _transformer(base: BaseModelFacts) -> str:
    """The file of a base. One that is not published is called as its folder is: ComfyUI then asks
    for the file, where another model of the family would be sampled without a word."""
    own = (base.hub_id or base.name).rpartition("/")[2]
    return TRANSFORMERS.get(base.hub_id or "", f"{own}.safetensors")


def _steps(make: _Builder, contract: Contract) -> list[tuple[Link, Link]]:
    """Sampler and levels of each sampler node."""
    eta, levels = contract.eta, contract.sigmas
    if eta in (0, 1):
        sampler = make.add("KSamplerSelect", sampler_name="euler" if eta == 0 else "lcm")
        return [((sampler, 0), (make.add("ManualSigmas", sigmas=spelled(levels)), 0))]
    made: list[tuple[Link, Link]] = []
    for now, then in pairwise(levels):
        if then > 0:
            own = ancestral_eta(now, then, eta)
            sampler = make.add("SamplerEulerAncestral", eta=own, s_noise=1.0)
        else:
            sampler = make.add("KSamplerSelect", sampler_name="euler")
        sigmas = make.add("ManualSigmas", sigmas=spelled((now, then)))
        made.append(((sampler, 0), (sigmas, 0)))
    return made


def ancestral_eta(sigma: float, sigma_next: float, eta: float) -> float:
    """`SamplerEulerAncestral`'s setting with which one step σ → σ' > 0 is CPS's with `eta`."""
    kept = sigma_next * math.cos(eta * math.pi / 2) / (1 - sigma_next)
    down = kept / (1 + kept)
    return (1 - down / sigma_next) / (1 - sigma_next / sigma)


def spelled(levels: Sequence[float]) -> str:
    """Levels as `ManualSigmas` reads numbers: without exponents; the same in 32 bits."""
    return ", ".join(
        np.format_float_positional(np.float32(level), unique=True, trim="-") for level in levels
    )


def write_workflow(graph: Graph, folder: Path, name: str = "workflow.json") -> Path:
    """The graph as a file that ComfyUI opens."""
    file = folder / name
    file.write_text(json.dumps(graph, indent=2) + "\n", encoding="utf-8")
    return file
