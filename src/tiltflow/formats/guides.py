"""How each program is given its files: the parts of an export's README.md beside diffusers'."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tiltflow.core.sentences import listed
from tiltflow.core.sizes import said
from tiltflow.formats.contract import Contract
from tiltflow.formats.keys import has_layout
from tiltflow.formats.usage import Usage
from tiltflow.formats.wanted import Wanted
from tiltflow.formats.workflow import T5_ZEROS, no_workflow, zero_tokens
from tiltflow.models.switch import TILT


def guides(wanted: Wanted, loras: Sequence[str], usage: Usage) -> list[str]:
    """One section of markdown for each format that has files of its own."""
    contract = usage.contract
    files = " and ".join(f"`{name}.safetensors`" for name in loras)
    parts = []
    if "comfyui" in wanted.formats:
        parts.append(
            "## ComfyUI\n\n"
            f"`comfyui/` has {files} with the original names of the model's weights and `.alpha` "
            "tensors. Put them into `models/loras`"
            + _graph(contract)
            + _strength(loras)
            + _sampler(contract)
        )
    if "kohya" in wanted.formats:
        parts.append(
            "## kohya's sd-scripts and programs that read its files\n\n"
            f"`kohya/` has {files} with keys `lora_unet_….lora_down.weight`, `….lora_up.weight` "
            f"and `….alpha`. The scale is alpha / rank. {_levels(contract)}"
        )
    if "peft" in wanted.formats:
        parts.append(_peft(loras, usage))
    if "merged" in wanted.formats and has_layout(contract.family):
        kind = {None: f"in {contract.dtype}", "bf16": "in bf16", "fp8": "in fp8 (e4m3)"}
        parts.append(
            "## One file\n\n`original/` has the merged transformer "
            f"{kind[wanted.dtype]}{_merged_tilt(wanted, loras)}, in the layout of the model's "
            "makers, for programs that load a "
            "transformer from one file"
            + (
                f"; {_graphs(wanted)} ComfyUI's, which finds the file in `models/diffusion_models`."
                + _without_t5(contract)
                if no_workflow(contract) is None
                else "."
            )
            + (
                " Only the matrices of the blocks are in 8 bits, without scales; the rest is bf16."
                if wanted.dtype == "fp8"
                else ""
            )
        )
    return parts


def _graphs(wanted: Wanted) -> str:
    """The workflows of merged transformers: one each where there are several strengths."""
    if len(wanted.strengths) < 2:
        return "`workflow.json` beside it is"
    named = listed([f"`workflow_{strength:g}.json`" for strength in wanted.strengths])
    return f"{named} beside `transformer_….safetensors` are"


def _merged_tilt(wanted: Wanted, loras: Sequence[str]) -> str:
    if TILT not in loras:
        return ""
    return f", with the tilt at {listed([f'{s:g}' for s in wanted.strengths or (1.0,)])}"


def _peft(loras: Sequence[str], usage: Usage) -> str:
    folders = " and ".join(f"`peft/{name}/`" for name in loras)
    baked = [name for name in loras if name.startswith("baked_")]
    both = f"`peft/{baked[0]}` is both in one: load it alone in their place. " if baked else ""
    return (
        f"## PEFT\n\n{folders} are PEFT folders of the transformer, which servers take too. "
        f"In this folder, with tiltflow installed:\n\n{usage.of_peft(loras)}\n\n"
        "The base is loaded anew: on a pipeline that has the LoRAs already they would act twice. "
        f"{both}{_levels(usage.contract)}"
    )


def _without_t5(contract: Contract) -> str:
    """What a workflow has in T5's place, where the student was trained without it."""
    zeros = zero_tokens(contract)
    if zeros is None:
        return ""
    if zeros == 0:
        return " The student was trained without T5, and the workflow loads none."
    return (
        f" The student was trained without T5, with {zeros} tokens of zeros in its place. "
        "ComfyUI's nodes take their number from a T5 only. So the workflow loads "
        f"`{T5_ZEROS['clip_name']}`, gives it an empty prompt, and sets what comes out to zero."
    )


def _graph(contract: Contract) -> str:
    reason = no_workflow(contract)
    if reason is None:
        return (
            ", open `comfyui/workflow.json`, and set the file names of the base model, text "
            f"encoders and autoencoder to yours.{_without_t5(contract)} "
        )
    return f". {reason}: load the LoRAs behind the node that loads the model. {_levels(contract)} "


def _strength(loras: Sequence[str]) -> str:
    if TILT not in loras:
        return ""
    baked = [name for name in loras if name.startswith("baked_")]
    said = "The tilt's strength, 0 to 1.5, is `strength_model` of its loader. "
    if baked:
        said += f"`{baked[0]}` is both in one: load it alone, at strength 1. "
    return said


def _levels(contract: Contract) -> str:
    return (
        f"Sample as the student was trained: the levels {_listed(contract.sigmas)}, guidance "
        f"{contract.guidance:g}, η = {contract.eta:g}.{_other_sizes(contract)}"
    )


def _listed(levels: Sequence[float]) -> str:
    return ", ".join(f"{level:.6g}" for level in levels)


def _other_sizes(contract: Contract) -> str:
    """At which of the trained sizes the levels are others, and which."""
    others = [f"{size} {_listed(levels)}" for size, levels in contract.sized_sigmas.items()]
    if not others:
        return ""
    own = said(contract.resolution)
    return f" These are the levels of {own} pixels; those of others are {'; '.join(others)}."


def _sampler(contract: Contract) -> str:
    """What in ComfyUI is the student's sampler."""
    other = _other_sizes(contract)
    if contract.eta in (0, 1):
        name = "euler" if contract.eta == 0 else "lcm"
        return f"Its levels with the sampler `{name}` are the student's own sampler.{other}"
    kept = math.cos(contract.eta * math.pi / 2)
    return (
        f"The student was trained with η = {contract.eta:g}, which lies between ComfyUI's `euler` "
        "(η = 0) and `lcm` (η = 1). The workflow therefore has a sampler node a step, "
        "`SamplerEulerAncestral` with a setting of its own each; together they are the student's "
        "sampler up to rounding. A single `lcm` node over all levels is simpler and is η = 1: it "
        f"draws all noise anew, where the student keeps {kept:.3f} of the noise that it predicts. "
        f"A student trained with `sampler.eta=1.0` needs none of this.{other}"
    )
