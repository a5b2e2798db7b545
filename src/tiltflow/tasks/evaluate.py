"""`tiltflow sample` and `tiltflow evaluate`: images and figures of a model and its LoRAs."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from tiltflow.core.disk import write_whole, writing
from tiltflow.core.distributed import ALONE, Ranks, ranks_of_job
from tiltflow.core.paths import resolve_path
from tiltflow.core.precision import attention_of, autocast_dtype
from tiltflow.core.sentences import counted
from tiltflow.data.prompts import Prompt
from tiltflow.evaluation.chunks import Chunks, Take, make_anew, place_of
from tiltflow.evaluation.diversity import features_of
from tiltflow.evaluation.files import scores_path, write_evaluation, write_scores
from tiltflow.evaluation.report import beside
from tiltflow.evaluation.scores import (
    KEPT_IMAGES,
    Diversity,
    Evaluation,
    System,
    evaluate_systems,
)
from tiltflow.evaluation.statistics import NO_DIFFERENCE, verdict
from tiltflow.models.medium import Medium
from tiltflow.rewards.base import Reward, at_once_of, load_reward
from tiltflow.setup.build import device_of
from tiltflow.tasks.callbacks import SILENT, Callbacks
from tiltflow.tasks.progress import Terminal
from tiltflow.tasks.request import Request, prepare, say_settled
from tiltflow.tasks.systems import TEACHER

PROMPTS = "prompts.txt"
"""In a folder of images: their prompts, one a line."""


def sample_images(request: Request, out: Path, console: Console) -> list[Path]:
    """`sample_to` with its progress on a console."""
    with Terminal(console) as callbacks:
        return sample_to(request, out, callbacks)


def sample_to(request: Request, out: Path, callbacks: Callbacks = SILENT) -> list[Path]:
    """One file a prompt in `out`, a PNG of images, from the furthest-trained system given.

    Under torchrun the prompts are split over the ranks.

    Raises:
        ValueError: if `out` is a file, an image is not finite, or as `prepare`.
        OSError: naming the image that could not be written.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file, but the images go into a folder")
    with ranks_of_job(device_of(request.device)) as ranks:
        callbacks = callbacks if ranks.main else SILENT
        system, medium = _chosen_system(request, callbacks, ranks)
        out.mkdir(parents=True, exist_ok=True)
        for rows, encoded in _batches(system, medium, request, callbacks, ranks):
            save_samples(medium, out, rows, encoded)
        ranks.total([0.0])  # all samples are there when rank 0 says so
        if ranks.main:
            _say_older(out, len(request.prompts), medium, callbacks)
    return [_file(out, row, medium) for row in range(len(request.prompts))]


def sampled(request: Request, callbacks: Callbacks = SILENT) -> NDArray[np.generic]:
    """The samples of `sample_to` in memory, all of them in every process: images (N, H, W, 3)
    uint8, points (N, D).

    Raises:
        ValueError: if there is no prompt, a sample is not finite, or as `prepare`.
    """
    system, medium = _chosen_system(request, callbacks, ALONE)
    made = _batches(system, medium, request, callbacks, ALONE)
    return np.concatenate([encoded for _, encoded in made])


def _file(folder: Path, row: int, medium: Medium) -> Path:
    return folder / f"{row:05d}{medium.suffix}"


def _chosen_system(request: Request, callbacks: Callbacks, ranks: Ranks) -> tuple[System, Medium]:
    """The furthest-trained system of a request, and what it makes."""
    say_settled(request, callbacks)
    loaded, sampler = prepare(request, ranks)
    systems = sampler.systems(loaded, teacher=not loaded.students)
    return systems[-1 if loaded.students else 0], loaded.backbone.medium


def _batches(
    system: System, medium: Medium, request: Request, callbacks: Callbacks, ranks: Ranks
) -> Iterator[tuple[range, NDArray[np.generic]]]:
    """A rank's prompts by their numbers, and their encoded samples, batch by batch."""
    mine = range(len(request.prompts))[ranks.share(len(request.prompts))]
    callbacks.begin(system.name, 0, None)
    with _attention(request):
        for start in range(0, len(mine), request.batch):
            rows = mine[start : start + request.batch]
            yield rows, medium.encode(medium.rounded(system.sample(list(rows))))
            callbacks.progress(system.name, start + len(rows), len(mine))


def _say_older(out: Path, count: int, medium: Medium, callbacks: Callbacks) -> None:
    """A line if there are numbered files in `out` beyond the `count` that were made: those of an
    earlier call with more prompts, which stay, for nobody asked to remove them."""
    names = sorted(path.stem for path in out.glob(f"*{medium.suffix}"))
    older = [name for name in names if re.fullmatch(r"\d{5,}", name) and int(name) >= count]
    if older:
        more = f" and {len(older) - 1} more" if len(older) > 1 else ""
        callbacks.notice(
            f"{_file(out, int(older[0]), medium)}{more} in this folder are not of these prompts, "
            "but of an earlier call"
        )


def save_samples(
    medium: Medium, folder: Path, rows: Sequence[int], encoded: NDArray[np.generic]
) -> None:
    """A batch of encoded samples as `folder`/NNNNN with the medium's ending."""
    folder.mkdir(parents=True, exist_ok=True)
    for row, sample in zip(rows, encoded, strict=True):
        file = _file(folder, row, medium)
        with writing(file):
            medium.save(sample, file)


def _attention(request: Request) -> AbstractContextManager[None]:
    """As in training; without autocast the networks' own, which diffusers' pipelines use too."""
    device = device_of(request.device)
    mixed = autocast_dtype(request.autocast, device)
    return attention_of(device, mixed) if mixed else nullcontext()


def load_rewards(rewards: Mapping[str, str | None], device: str) -> list[Reward]:
    return [
        load_reward(name, path=path, device=str(device_of(device)))
        for name, path in rewards.items()
    ]


def evaluate(
    request: Request,
    callbacks: Callbacks = SILENT,
    ranks: Ranks = ALONE,
    take: Take = make_anew,
    folder: Path | None = None,
    alone: bool = False,
    kept: int | None = None,
) -> Evaluation:
    """Scores the teacher and the students; every student is compared with the systems before it.

    `alone`: the furthest-trained student only. With `folder`, the samples of the first `kept`
    prompts (None: of all) are saved as `folder`/SYSTEM/NNNNN.
    """
    loaded, sampler = prepare(request, ranks)
    systems = sampler.systems(loaded, teacher=not alone)[-1 if alone else 0 :]
    rewards = load_rewards(request.rewards, request.device)
    names, medium = [s.name for s in systems], loaded.backbone.medium
    pairs = [(a, b) for i, a in enumerate(names) for b in names[:i] if a in loaded.students]

    def save_batch(system: str, rows: Sequence[int], encoded: NDArray[np.generic]) -> None:
        assert folder is not None
        shown = [row for row in rows if kept is None or row < kept]
        save_samples(medium, folder / system, shown, encoded[: len(shown)])

    for name in names:
        callbacks.begin(name, 0, None)
    with _attention(request):
        result = evaluate_systems(
            systems,
            request.prompts,
            rewards,
            request.batch,
            callbacks.progress,
            comparisons=pairs,
            diversity=_diversity(medium, rewards) if request.diversity else None,
            take=take,
            save_images=save_batch if folder else None,
            ranks=ranks,
            medium=medium,
        )
    result.summary["rewards_at_once"] = {reward.name: at_once_of(reward) for reward in rewards}
    return result


def evaluate_to(
    path: Path, request: Request, console: Console, keep_images: bool = False
) -> Evaluation:
    """`evaluated` with its progress on a console."""
    with Terminal(console) as callbacks:
        return evaluated(path, request, callbacks, keep_images)


def evaluated(
    path: Path, request: Request, callbacks: Callbacks = SILENT, keep_images: bool = False
) -> Evaluation:
    """`evaluate`, written to `path` (an evaluation.json) and beside it.

    While it runs, what is done lies in `NAME.parts/`; the same request for the same path goes on
    from there. Images are `NAME.images/SYSTEM/NNNNN.png`, those of the first prompts or, with
    `keep_images`, of all; they take the place of an earlier evaluation's when all are there.

    Under torchrun the prompts are split over the ranks, which go on if they are as many as before.

    Raises:
        ValueError: before anything loads, if `path` is a folder, or one cannot be made for it.
    """
    check_target(path)
    what, folder = asked(request), path.with_suffix(".images")
    with ranks_of_job(device_of(request.device)) as ranks:
        callbacks = callbacks if ranks.main else SILENT
        say_settled(request, callbacks)
        place = {"rank": ranks.rank, "ranks": ranks.size}
        chunks = Chunks(path.with_suffix(".parts"), what | place | {"keep_images": keep_images})
        if len(chunks):
            callbacks.notice(
                f"going on with {counted(len(chunks), 'batch', 'batches')} of an earlier run"
            )
        made = path.with_suffix(".parts") / f"images-{digest(what)}"
        kept = None if keep_images else KEPT_IMAGES
        result = evaluate(request, callbacks, ranks, chunks.take, made, kept=kept)
        result.summary["asked"] = what
        if ranks.main:
            save(result, request.prompts, path)
            save_prompts(made, request.prompts[:kept])
            shutil.rmtree(folder, ignore_errors=True)
            made.rename(folder)
        ranks.total([0.0])  # what rank 0 has written makes the chunks superfluous
        chunks.clear()
    return result


def digest(what: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits for what was asked."""
    text = json.dumps(what, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def check_target(path: Path) -> None:
    """That figures may go into `path`, and images beside it.

    Raises:
        ValueError: if it, or what is above, is in the way; or it is there and something else's.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder, but --json names the file that the figures go into")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(
            f"{path} cannot be written: {above} is no folder, or one without the right"
        )
    if path.exists() and not _is_evaluation(path):
        raise ValueError(f"{path} is there and is no evaluation: give another name with --json")
    images = path.with_suffix(".images")
    if images.exists() and not (images / PROMPTS).is_file():
        raise ValueError(
            f"{images}, the folder of the images, is there and holds something else: give another "
            "name with --json"
        )


def _is_evaluation(path: Path) -> bool:
    """Whether a file is an evaluation, or empty."""
    try:
        found = json.loads(path.read_text(encoding="utf-8") or '{"systems": {}}')
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and "systems" in found


def asked(request: Request) -> dict[str, Any]:
    """What the figures of a request depend on, as JSON; weights by the files that hold them.

    The code of rewards of one's own, and what a reward server runs, are not seen here.
    """
    plain = ("tilt", "teacher_steps", "guidance", "seed", "batch", "autocast", "diversity")
    chosen = request.settled
    settled = ("steps", "eta", "dtype", "resolution", "max_sequence_length")
    prompts = json.dumps([[p.text, p.metadata] for p in request.prompts], default=str)
    return {
        **{name: getattr(request, name) for name in plain},
        **{name: getattr(chosen, name) for name in settled},
        "student_guidance": chosen.guidance,
        "device": device_of(request.device).type,
        "model": place_of(resolve_path(request.model)),
        "generator": place_of(request.generator_path and resolve_path(request.generator_path)),
        "few_step": place_of(request.few_step),
        "tilt_lora": place_of(request.tilt_lora),
        "rewards": {
            name: place_of(path and resolve_path(path)) for name, path in request.rewards.items()
        },
        "prompts": hashlib.blake2b(prompts.encode(), digest_size=16).hexdigest(),
        "versions": {name: version(name) for name in ("tiltflow", "torch", "diffusers")},
    }


def save_prompts(folder: Path, prompts: Sequence[Prompt]) -> None:
    """The prompts of the images in `folder`, one a line, in `PROMPTS`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [" ".join(prompt.text.split()) for prompt in prompts]
    write_whole(folder / PROMPTS, "\n".join(lines) + "\n")


def _diversity(medium: Medium, rewards: Sequence[Reward]) -> Diversity:
    """Diversity in the medium's features, or those of the last CLIP among the rewards (the held-out
    one), and the distance to the teacher's samples in the same."""
    features = features_of(medium, rewards)
    if features is None:
        raise ValueError("--diversity measures distances in a CLIP: add --reward clipscore")
    return Diversity(features, reference=TEACHER)


def show(summary: Mapping[str, Any], console: Console) -> None:
    """The table of an evaluation, a column a system, and its comparisons, in the terminal."""
    systems = summary["systems"]
    table = Table(title=f"{summary['prompts']} prompts, mean ± half the 95% interval")
    table.add_column("", no_wrap=True)
    for name in systems:
        table.add_column(name, justify="right", overflow="fold")
    table.add_row("NFE", *(str(system["nfe"]) for system in systems.values()))
    for reward in next(iter(systems.values()))["scores"]:
        table.add_row(reward, *(_cell(s["scores"].get(reward)) for s in systems.values()))
    for name in beside(systems):
        table.add_row(name, *(_cell(system.get(name)) for system in systems.values()))
    console.print(table)
    show_comparisons(summary["comparisons"], console)


def show_categories(summary: Mapping[str, Any], console: Console) -> None:
    """For each reward, the means by category of prompt and their mean; nothing without any."""
    categories = summary.get("categories")
    if not categories:
        return
    for reward in next(iter(summary["systems"].values()))["category_means"]:
        table = Table(title=f"{reward} by category (prompts)")
        table.add_column("system", no_wrap=True, min_width=14)
        for name, category in categories.items():
            table.add_column(f"{name} ({category['prompts']})", justify="right")
        table.add_column("mean of categories", justify="right")
        for system, figures in summary["systems"].items():
            cells = [f"{c['systems'][system][reward]['mean']:.4f}" for c in categories.values()]
            table.add_row(system, *cells, f"{figures['category_means'][reward]:.4f}")
        console.print(table)


def show_comparisons(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Each comparison in a line, with its `verdict`."""
    for row in rows:
        found = verdict(row)
        said = found if found == NO_DIFFERENCE else f"{row['a']} is {found}"
        parts = [f"{row['difference']:+.4f} {_range(row['ci95'])}"]
        if "bootstrap_ci95" in row:
            parts.append(f"bootstrap {_range(row['bootstrap_ci95'])}")
        if "win_rate" in row:
            parts.append(f"wins {row['win_rate']:.0%} of {row['n']}")
        parts.append(f"p = {row['p_value']:.2g}")
        if "p_holm" in row:
            parts.append(f"corrected {row['p_holm']:.2g}")
        console.print(
            f"{row['a']} − {row['b']} on {row['reward']}: {', '.join(parts)}: {said}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def _range(interval: Sequence[float]) -> str:
    return f"[{interval[0]:+.4f}, {interval[1]:+.4f}]"


def _cell(score: Mapping[str, Any] | float | None) -> str:
    if score is None:
        return "–"
    if isinstance(score, float):
        return f"{score:.4f}"
    low, high = score["ci95"]
    half = f"{(high - low) / 2:.3f}".removeprefix("0")  # four systems fit into 80 columns
    return f"{score['mean']:.3f} ±{half}"


def save(evaluation: Evaluation, prompts: Sequence[Prompt], path: Path) -> None:
    """`evaluation.json`, and the scores by prompt beside it."""
    with writing(scores_path(path)):
        write_scores(scores_path(path), evaluation, prompts)
    with writing(path):
        write_evaluation(path, evaluation.summary)
