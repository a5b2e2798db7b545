"""The model card of an export: recipe, scores and usage, as the README.md of a repository."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tiltflow.core.sentences import either, listed
from tiltflow.core.sizes import both, frames_of, said, same_as
from tiltflow.formats.contract import Contract
from tiltflow.formats.usage import Usage
from tiltflow.models.family import Family

STAGES = {
    "cold_start": "Ambient-Consistent Distribution Matching Distillation (AC-DMD)",
    "tilt": "Reward-Tilted Distribution Matching (RTDMD)",
}


@dataclass(frozen=True)
class Card:
    """What a card says.

    `folders` are the LoRA folders for diffusers, and `merged` those of merged pipelines with the
    strength of the tilt that is merged (None of a student that has none apart), if there are any;
    `others` the sections of other programs; `caution` is the family's.
    """

    usage: Usage
    folders: Sequence[str]
    merged: Mapping[str, float | None]
    evaluation: Mapping[str, Any] | None = None
    others: Sequence[str] = ()
    caution: str = ""

    @property
    def contract(self) -> Contract:
        return self.usage.contract


def call_of(contract: Contract, family: Family) -> dict[str, Any]:
    """The arguments with which the pipeline's call is the student."""
    length = {"max_sequence_length": contract.max_sequence_length} if family.takes_length else {}
    height, width = both(contract.resolution)
    return {
        "num_inference_steps": contract.steps,
        family.guidance_argument: contract.guidance - family.guidance_offset,
        "height": height,
        "width": width,
        **length,
        **({"num_frames": frames_of(contract.resolution)} if family.videos else {}),
        **family.call,
        **(family.guided_call if contract.guidance != 1 else {}),
    }


def usage_of(contract: Contract, family: Family, absent: Sequence[str]) -> Usage:
    """The code of a student's card; `absent` are the parts that its base was saved without."""
    video = frames_of(contract.resolution) > 1
    made = "videos = {call}.frames" if video else f"images = {family.result}"
    return Usage(contract, call_of(contract, family), made, absent, family.own_vae_dtype)


def model_card(card: Card) -> str:
    """The README.md: front matter of the hub, then usage, recipe and scores."""
    contract = card.contract
    steps = f"{either(contract.trained_steps)} step{'s' * (contract.steps > 1)}"
    holds = _holds(card)
    parts = [
        _front_matter(card),
        f"# {contract.base.name.rsplit('/', 1)[-1]} in {steps}\n\n"
        f"Trained with tiltflow by {STAGES[contract.stage]}. Here are {holds} and "
        "`contract.json`, which says for what the student was trained: "
        f"{steps}, η = {contract.eta:g}, guidance {contract.guidance:g}, "
        f"{either([said(size) for size in contract.trained_sizes])} pixels, "
        f"{contract.max_sequence_length} text tokens.\n\n" + _base(contract),
        *([_usage(card)] if card.folders or card.merged else []),
        *card.others,
        _recipe(contract.recipe),
        _scores(card),
    ]
    return "\n\n".join(parts) + "\n"


def _holds(card: Card) -> str:
    """What is in the folder, in words."""
    held = []
    if card.folders:
        folder = "folders" if len(card.folders) > 1 else "folder"
        held.append(f"the LoRA {folder} " + " and ".join(f"`{name}/`" for name in card.folders))
    if card.merged:
        pipeline = "pipelines" if len(card.merged) > 1 else "pipeline"
        tilts = {name: "" if s is None else f" (tilt {s:g})" for name, s in card.merged.items()}
        held.append(
            f"the merged {pipeline} " + " and ".join(f"`{n}/`{s}" for n, s in tilts.items())
        )
    if held:
        whose = "its" if len(card.folders) + len(card.merged) == 1 else "their"
        held.append(f"{whose} sampler `scheduler/`")
    if card.others:
        held.append("files for other programs")
    return ", ".join(held)


def _base(contract: Contract) -> str:
    """The base model and its licence, in words."""
    base, licence = contract.base, contract.base.licence
    said = f"The base model is `{base.name}` (SHA-256 `{base.hash[:16]}…` of its weights, whole in "
    said += "`contract.json`). "
    if licence is None:
        return said + "Its files name no licence; whichever it has applies to what is derived."
    named = f"`{licence.id}`" + (f" ({licence.name})" if licence.name else "")
    return said + f"Its licence, {named}, applies to what is derived from it."


def _front_matter(card: Card) -> str:
    base = card.contract.base
    made = "video" if frames_of(card.contract.resolution) > 1 else "image"
    lines = ["---", "library_name: diffusers", f"pipeline_tag: text-to-{made}"]
    note = "" if base.hub_id else "  # a directory's name: put the base model's hub id here"
    lines.append(f"base_model: {_scalar(base.hub_id or base.name)}{note}")
    if base.licence is not None:
        lines.append(f"license: {_scalar(base.licence.id)}")
        for key, value in (("name", base.licence.name), ("link", base.licence.link)):
            lines += [f"license_{key}: {_scalar(value)}"] if value else []
    lora = ["lora"] if card.folders or not card.merged else []
    tags = ["tiltflow", "few-step", "flow-matching", *lora]
    return "\n".join([*lines, f"tags: [{', '.join(tags)}]", "---"])


def _scalar(text: str) -> str:
    """A word or path as YAML takes it, anything else in quotes (JSON's are YAML's)."""
    plain = re.fullmatch(r"[A-Za-z][\w./-]*", text)
    return text if plain else json.dumps(text, ensure_ascii=False)


def _usage(card: Card) -> str:
    """Code that runs in the export's folder, for the LoRA folders and for the merged pipeline."""
    blocks = []
    if card.folders:
        blocks.append(card.usage.of_folders(card.folders))
    if card.merged:
        if card.folders:
            blocks.append("The merged pipeline by itself:")
        blocks.append(card.usage.of_merged(next(iter(card.merged))))
    said = [_precision(card)] if set(card.contract.kept_in.values()) != {"fp32"} else []
    if card.folders:
        said.append(
            "In fp32 the LoRA folders give what `tiltflow sample --seed 0 --dtype fp32` gives."
        )
    return "## Use\n\nIn this folder, with tiltflow installed:\n\n" + "\n\n".join(
        [
            *blocks,
            *([" ".join(said)] if said else []),
            "Without `seed`, the `generator` of the call decides the image by itself.",
            *([card.caution] if card.caution else []),
        ]
    )


def _precision(card: Card) -> str:
    """In which types the code loads the base, and where that is not as in training."""
    base, vae = card.contract.kept_in.values()
    if base == vae:
        return f"The base is in {base}, as in training."
    if card.usage.own_vae:
        return f"The base is in {base} and its autoencoder in {vae}, as in training."
    return (
        f"The base is in {base}, as in training. Its autoencoder was in {vae} there, which this "
        f"pipeline's call does not take beside {base}; `tiltflow sample` decodes as in training."
    )


def _recipe(recipe: Mapping[str, Any]) -> str:
    rows = [f"| {key} | {value} |" for key, value in recipe.items()]
    return "\n".join(["## Recipe", "", "| setting | value |", "|---|---|", *rows])


def _scores(card: Card) -> str:
    evaluation = card.evaluation
    if evaluation is None:
        return (
            "## Scores\n\nNot evaluated: the run directory has no evaluation.json of this student."
        )
    systems = evaluation["systems"]
    rewards = list(dict.fromkeys(r for s in systems.values() for r in s["scores"]))
    head = [f"| system | NFE | {' | '.join(rewards)} |", "|---" * (len(rewards) + 2) + "|"]
    rows = []
    for name, system in systems.items():
        cells = [_cell(system["scores"].get(reward)) for reward in rewards]
        rows.append(f"| {name} | {system['nfe']} | {' | '.join(cells)} |")
    first = f"Means over {evaluation['prompts']} prompts, with 95% intervals."
    asked = evaluation.get("asked") or {}
    strength, merged = asked.get("tilt"), card.merged.values()
    other = strength is not None and any(each not in (None, strength) for each in merged)
    if "rtdmd" in systems and (strength not in (None, 1) or other):
        first += f" `rtdmd` has the tilt at {strength:g}."
    if "merged" in systems and asked.get("merged") is not None:
        first += f" `merged` has the tilt at {asked['merged']:g}."
    sentences = [first, *_otherwise(asked, card.contract)]
    return "\n".join(["## Scores", "", " ".join(sentences), "", *head, *rows])


def _otherwise(asked: Mapping[str, Any], contract: Contract) -> list[str]:
    """A sentence for each setting that the students of an evaluation were sampled with and were not
    trained for, as far as it says."""
    sizes = [name for name, _ in asked.get("sizes") or ()]
    size = asked.get("resolution")
    if not sizes and size is not None:
        sizes = [said(same_as(size))]
    trained_sizes = [said(each) for each in contract.trained_sizes]
    odd = [name for name in sizes if name not in trained_sizes]
    length = asked.get("max_sequence_length")
    of: list[tuple[str, Any, Sequence[Any]]] = [
        ("{} steps", asked.get("steps"), contract.trained_steps),
        ("η = {}", _short(asked.get("eta")), [_short(contract.eta)]),
        ("guidance {}", _short(asked.get("student_guidance")), [_short(contract.guidance)]),
        ("{} pixels", listed(odd) if odd else None, trained_sizes),
        ("{} text tokens", length, [contract.max_sequence_length]),
    ]
    return [
        f"The students were sampled with {what.format(found)}, but this one was trained for "
        f"{either(trained)}."
        for what, found, trained in of
        if found is not None and found not in trained
    ]


def _short(number: float | None) -> str | None:
    return None if number is None else f"{number:g}"


def _cell(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return "–"
    low, high = score["ci95"]
    return f"{score['mean']:.4f} [{low:.4f}, {high:.4f}]"
