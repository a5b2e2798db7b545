"""The model card of an export: recipe, scores and usage, as the README.md of a repository."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

STAGES = {
    "cold_start": "Ambient-Consistent Distribution Matching Distillation (AC-DMD)",
    "tilt": "Reward-Tilted Distribution Matching (RTDMD)",
}


@dataclass(frozen=True)
class Card:
    """What a card says.

    `model` is the hub id or path of the pipeline that the student's weights belong to; `hub_id`
    the same where it is on the hub; `call` the arguments of the pipeline's call; `folders` the
    LoRA folders, none for a merged pipeline alone; `recipe` the settings worth telling.
    """

    stage: str
    pipeline: str
    model: str
    hub_id: str | None
    call: Mapping[str, Any]
    folders: Sequence[str]
    merged: bool
    recipe: Mapping[str, Any]
    evaluation: Mapping[str, Any] | None


def model_card(card: Card) -> str:
    """The README.md: front matter of the hub, then usage, recipe and scores."""
    steps = card.call["num_inference_steps"]
    kind = " and ".join(f"`{name}/`" for name in card.folders)
    holds = f"the LoRA folders {kind}" if len(card.folders) > 1 else f"the LoRA folder {kind}"
    holds = holds if card.folders else "a whole pipeline"
    if card.folders and card.merged:
        holds += " and the merged pipeline `merged/`"
    parts = [
        _front_matter(card),
        f"# {card.model.rstrip('/').rsplit('/', 1)[-1]} in {steps} steps\n\n"
        f"Trained with tiltflow by {STAGES[card.stage]}. Here are {holds}, and `scheduler/`, the "
        f"sampler that they were trained with. The base model's licence applies to what is "
        "derived from it.",
        _usage(card),
        _recipe(card.recipe),
        _scores(card.evaluation),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(card: Card) -> str:
    lines = ["---", "library_name: diffusers", "pipeline_tag: text-to-image"]
    if card.hub_id is not None:
        lines.append(f"base_model: {card.hub_id}")
    tags = ["tiltflow", "few-step", "flow-matching", *(["lora"] if card.folders else [])]
    return "\n".join([*lines, f"tags: [{', '.join(tags)}]", "---"])


def _usage(card: Card) -> str:
    """Code for the LoRA folders if there are any, else for the merged pipeline."""
    arguments = ", ".join(f"{key}={value!r}" for key, value in card.call.items())
    source = repr(card.model) if card.folders else '"merged"'
    code = [
        f"from diffusers import {card.pipeline}",
        "from tiltflow.scheduler import CPSFlowMatchScheduler",
        "",
        f"pipe = {card.pipeline}.from_pretrained({source})",
    ]
    for name in card.folders:
        code.append(f'pipe.load_lora_weights("{name}", adapter_name="{name}")')
    if "tilt" in card.folders:
        code.append('pipe.set_adapters(["few_step", "tilt"], [1.0, 1.0])  # tilt: 0 to 1')
    if card.folders:
        code.append('pipe.scheduler = CPSFlowMatchScheduler.from_pretrained("scheduler")')
    code += [
        'prompts = ["a red fox in the snow"]',
        "noise = pipe.scheduler.seed(0, images=len(prompts))",
        f"images = pipe(prompt=prompts, generator=noise, {arguments}).images",
    ]
    text = "\n".join(code)
    return (
        f"## Use\n\n```python\n{text}\n```\n\n"
        "In fp32 this gives what `tiltflow sample --seed 0` gives. Without `seed`, the `generator` "
        "of the call decides the image by itself."
    )


def _recipe(recipe: Mapping[str, Any]) -> str:
    rows = [f"| {key} | {value} |" for key, value in recipe.items()]
    return "\n".join(["## Recipe", "", "| setting | value |", "|---|---|", *rows])


def _scores(evaluation: Mapping[str, Any] | None) -> str:
    if evaluation is None:
        return "## Scores\n\nNot evaluated: there was no evaluation.json in the run directory."
    systems = evaluation["systems"]
    rewards = list(dict.fromkeys(r for s in systems.values() for r in s["scores"]))
    head = [f"| system | NFE | {' | '.join(rewards)} |", "|---" * (len(rewards) + 2) + "|"]
    rows = []
    for name, system in systems.items():
        cells = [_cell(system["scores"].get(reward)) for reward in rewards]
        rows.append(f"| {name} | {system['nfe']} | {' | '.join(cells)} |")
    first = f"Means over {evaluation['prompts']} prompts, with 95% intervals."
    return "\n".join(["## Scores", "", first, "", *head, *rows])


def _cell(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return "–"
    low, high = score["ci95"]
    return f"{score['mean']:.4f} [{low:.4f}, {high:.4f}]"
