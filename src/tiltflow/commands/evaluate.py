"""`tiltflow sample` and `tiltflow evaluate`: images and figures of a model and its LoRAs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tiltflow.backbones import load_backbone
from tiltflow.build import DTYPES, device_of
from tiltflow.commands.systems import Loaded, Sampler, load_students
from tiltflow.distributed import Ranks, ranks_of_job
from tiltflow.embeddings import BATCH, distinct, encode_prompts
from tiltflow.evaluation.scores import Diversity, Evaluation, evaluate_systems, write_evaluation
from tiltflow.paths import resolve_path
from tiltflow.prompts import Prompt
from tiltflow.randomness import Randomness
from tiltflow.rewards.base import Reward, load_reward
from tiltflow.rewards.clip_family import CLIPScore


@dataclass(frozen=True)
class Request:
    """What to sample from, and how."""

    model: str
    prompts: Sequence[Prompt]
    few_step: Path | None = None
    tilt_lora: Path | None = None
    tilt: float = 1.0
    steps: int = 4
    eta: float = 0.9
    teacher_steps: int = 50
    guidance: float | None = None
    seed: int = 0
    batch: int = 64
    device: str = "auto"
    dtype: str = "fp32"
    resolution: int | None = None
    generator_path: str | None = None
    rewards: Mapping[str, str | None] = field(default_factory=dict)
    """Names of rewards, each with the path of its weights or None."""
    diversity: bool = False


def prepare(request: Request) -> tuple[Loaded, Sampler]:
    """Loads the model and its LoRAs, and encodes the prompts.

    Raises:
        ValueError: if `tilt` is outside [0, 1], a number is not finite, or anything does not load.
    """
    if not 0 <= request.tilt <= 1:
        raise ValueError(f"--tilt is {request.tilt}; it goes from 0 (stage 1) to 1 (stage 2)")
    if request.guidance is not None and not math.isfinite(request.guidance):
        raise ValueError(f"--guidance is {request.guidance}, which is no finite number")
    backbone = load_backbone(
        resolve_path(request.model),
        generator_path=resolve_path(request.generator_path) if request.generator_path else None,
        device=device_of(request.device),
        dtype=DTYPES[request.dtype],
        resolution=request.resolution,
    )
    if not hasattr(backbone, "pipe"):
        raise ValueError("the mixture backbone has no images to sample; use tiltflow train")
    batch = max(1, min(BATCH, len(distinct(request.prompts))))
    encoded = encode_prompts(backbone, request.prompts, batch)
    backbone.free_text_encoders()
    loaded = load_students(backbone, request.few_step, request.tilt_lora, request.tilt)
    guidance = backbone.guidance if request.guidance is None else request.guidance
    sampler = Sampler(
        encoded,
        Randomness(request.seed),
        request.steps,
        request.eta,
        request.teacher_steps,
        guidance,
    )
    return loaded, sampler


def sample_images(request: Request, out: Path, console: Console) -> list[Path]:
    """One PNG a prompt in `out`, from the furthest-trained system that was given.

    Under torchrun the prompts are split over the ranks.
    """
    with ranks_of_job(device_of(request.device)) as ranks:
        _sample_images(request, out, console, ranks)
    return [out / f"{row:05d}.png" for row in range(len(request.prompts))]


def _sample_images(request: Request, out: Path, console: Console, ranks: Ranks) -> None:
    loaded, sampler = prepare(request)
    system = sampler.systems(loaded, teacher=not loaded.students)[-1 if loaded.students else 0]
    out.mkdir(parents=True, exist_ok=True)
    mine = range(len(request.prompts))[ranks.share(len(request.prompts))]
    with Progress(console=console) as bar:
        task = bar.add_task(system.name, total=len(mine))
        for start in range(0, len(mine), request.batch):
            rows = mine[start : start + request.batch]
            images = (system.sample(list(rows)) * 255).round().byte().permute(0, 2, 3, 1)
            for row, pixels in zip(rows, images.cpu().numpy(), strict=True):
                Image.fromarray(pixels).save(out / f"{row:05d}.png")
            bar.update(task, advance=len(rows))
    ranks.total([0.0])  # all images are there when rank 0 says so


def load_rewards(rewards: Mapping[str, str | None], device: str) -> list[Reward]:
    return [
        load_reward(name, path=path, device=str(device_of(device)))
        for name, path in rewards.items()
    ]


def evaluate(request: Request, console: Console) -> Evaluation:
    """Scores the teacher and the students; every student is compared with the systems before it.

    Under torchrun the prompts are split over the ranks.
    """
    with ranks_of_job(device_of(request.device)) as ranks:
        return _evaluate(request, console, ranks)


def _evaluate(request: Request, console: Console, ranks: Ranks) -> Evaluation:
    loaded, sampler = prepare(request)
    systems = sampler.systems(loaded)
    rewards = load_rewards(request.rewards, request.device)
    names = [s.name for s in systems]
    pairs = [(a, b) for i, a in enumerate(names) for b in names[:i] if a in loaded.students]
    with Progress(console=console) as bar:
        tasks = {name: bar.add_task(name, total=None) for name in names}

        def progress(name: str, done: int, total: int) -> None:
            bar.update(tasks[name], completed=done, total=total)

        return evaluate_systems(
            systems,
            request.prompts,
            rewards,
            request.batch,
            progress,
            comparisons=pairs,
            diversity=_diversity(rewards) if request.diversity else None,
            ranks=ranks,
        )


def _diversity(rewards: Sequence[Reward]) -> Diversity:
    """Diversity in the features of the last CLIP among the rewards (the held-out one)."""
    clips = [reward for reward in rewards if isinstance(reward, CLIPScore)]
    if not clips:
        raise ValueError("--diversity measures distances in a CLIP: add --reward clipscore")
    return Diversity(clips[-1].image_features)


def show(summary: Mapping[str, Any], console: Console) -> None:
    """The table of an evaluation, and its comparisons, in the terminal."""
    rewards = list(next(iter(summary["systems"].values()))["scores"])
    table = Table(title=f"{summary['prompts']} prompts, mean [95% interval]")
    table.add_column("system")
    table.add_column("NFE", justify="right")
    for reward in rewards:
        table.add_column(reward, justify="right")
    for name, system in summary["systems"].items():
        cells = []
        for reward in rewards:
            score = system["scores"].get(reward)
            cells.append(_cell(score) if score else "–")
        table.add_row(name, str(system["nfe"]), *cells)
    console.print(table)
    for row in summary["comparisons"]:
        # judged, as in the report, after Holm's correction for the number of comparisons
        verdict = "" if row.get("p_holm", row["p_value"]) < 0.05 else "  (not significant)"
        console.print(
            f"{row['a']} − {row['b']} on {row['reward']}: {row['difference']:+.4f} "
            f"[{row['ci95'][0]:+.4f}, {row['ci95'][1]:+.4f}], p = {row['p_value']:.2g}{verdict}"
        )


def _cell(score: Mapping[str, Any]) -> str:
    low, high = score["ci95"]
    return f"{score['mean']:.4f} [{low:.3f}, {high:.3f}]"


def save(evaluation: Evaluation, path: Path) -> None:
    """`evaluation.json`, the scores by prompt and the first images beside it."""
    write_evaluation(path, evaluation.summary)
    arrays = {
        f"{system}/{reward}": values
        for system, table in evaluation.scores.items()
        for reward, values in table.items()
    }
    np.savez_compressed(path.with_suffix(".scores.npz"), **arrays)  # type: ignore[arg-type]
