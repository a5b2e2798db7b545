"""`tiltflow sample` and `tiltflow evaluate`: images and figures of a model and its LoRAs."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from tiltflow.core.disk import write_whole, writing
from tiltflow.core.distributed import ALONE, Ranks, ranks_of_job
from tiltflow.core.precision import attention_of, autocast_dtype
from tiltflow.core.sentences import counted
from tiltflow.data.prompts import Prompt
from tiltflow.evaluation.chunks import Chunks, Take, lasting, make_anew, place_of
from tiltflow.evaluation.diversity import features_of, last_clip
from tiltflow.evaluation.files import scores_path, write_evaluation, write_scores
from tiltflow.evaluation.scores import (
    KEPT_IMAGES,
    AtSize,
    Diversity,
    Evaluation,
    evaluate_systems,
)
from tiltflow.models.medium import IMAGES, Medium
from tiltflow.rewards.base import Reward, at_once_of, load_reward
from tiltflow.rewards.files import files_of, of_servers
from tiltflow.rewards.frames import for_medium
from tiltflow.setup.build import device_of
from tiltflow.setup.manifest import rewards_fingerprints
from tiltflow.tasks.callbacks import SILENT, Callbacks
from tiltflow.tasks.depends import adapters_of, asked, content_of, digest
from tiltflow.tasks.progress import Terminal
from tiltflow.tasks.request import Request, prepare, say_guided, say_settled, say_unused
from tiltflow.tasks.sized import at_sizes
from tiltflow.tasks.systems import TEACHER

PROMPTS = "prompts.txt"
"""In a folder of images: their prompts, one a line."""


def sample_images(request: Request, out: Path, console: Console) -> list[Path]:
    """`sample_to` with its progress on a console."""
    with Terminal(console) as callbacks:
        return sample_to(request, out, callbacks)


def sample_to(request: Request, out: Path, callbacks: Callbacks = SILENT) -> list[Path]:
    """One file a prompt in `out`, a PNG of images, from the furthest-trained system given.

    Where every prompt is sampled at several sizes, a size's files lie in a folder of its name.
    Under torchrun the prompts are split over the ranks.

    Raises:
        ValueError: if `out` is a file, an image is not finite, or as `prepare`.
        OSError: naming the image that could not be written.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file, but the images go into a folder")
    with ranks_of_job(device_of(request.device)) as ranks:
        callbacks = callbacks if ranks.main else SILENT
        sizes, medium = _chosen_system(request, callbacks, ranks)
        out.mkdir(parents=True, exist_ok=True)
        folders = [out / size.name if size.folder else out for size in sizes]
        for which, rows, encoded in _batches(sizes, medium, request, callbacks, ranks):
            save_samples(medium, folders[which], rows, encoded)
        ranks.total([0.0])  # all samples are there when rank 0 says so
        if ranks.main:
            for folder in dict.fromkeys(folders):
                _say_older(folder, len(request.prompts), medium, callbacks)
    made = [(f, row) for f, size in zip(folders, sizes, strict=True) for row in size.rows]
    if not any(size.folder for size in sizes):
        made.sort(key=lambda one: one[1])
    return [_file(folder, row, medium) for folder, row in made]


def sampled(request: Request, callbacks: Callbacks = SILENT) -> NDArray[np.generic]:
    """The samples of `sample_to` in memory, all of them in every process: images (N, H, W, 3)
    uint8, points (N, D).

    Raises:
        ValueError: if there is no prompt, a sample is not finite, there are several sizes, or as
            `prepare`.
    """
    if len(request.buckets) > 1:
        raise ValueError("images of several sizes are no one array: say by out= where they go")
    sizes, medium = _chosen_system(request, callbacks, ALONE)
    made = _batches(sizes, medium, request, callbacks, ALONE)
    return np.concatenate([encoded for _, _, encoded in made])


def _file(folder: Path, row: int, medium: Medium) -> Path:
    return folder / f"{row:05d}{medium.suffix}"


def _chosen_system(
    request: Request, callbacks: Callbacks, ranks: Ranks
) -> tuple[list[AtSize], Medium]:
    """The furthest-trained system of a request, at each size, and what it makes."""
    say_settled(request, callbacks)
    loaded, sampler = prepare(request, ranks)
    say_unused(request, bool(loaded.students), callbacks)
    if not loaded.students:
        say_guided(request, loaded, callbacks)
    which = slice(-1, None) if loaded.students else slice(1)
    sizes = at_sizes(request.buckets, loaded, sampler, which, teacher=not loaded.students)
    return sizes, loaded.backbone.medium


def _batches(
    sizes: Sequence[AtSize],
    medium: Medium,
    request: Request,
    callbacks: Callbacks,
    ranks: Ranks,
) -> Iterator[tuple[int, Sequence[int], NDArray[np.generic]]]:
    """The number of a size, a rank's prompts of it by their numbers, and their encoded samples,
    batch by batch."""
    mine = [list(size.rows)[ranks.share(len(size.rows))] for size in sizes]
    done, total, name = 0, sum(map(len, mine)), sizes[0].systems[0].name
    callbacks.begin(name, 0, None)
    with _attention(request):
        for which, size in enumerate(sizes):
            for start in range(0, len(mine[which]), request.batch):
                rows = mine[which][start : start + request.batch]
                yield which, rows, medium.encode(medium.rounded(size.systems[0].sample(rows)))
                done += len(rows)
                callbacks.progress(name, done, total)


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


def load_rewards(
    rewards: Mapping[str, str | None], device: str, medium: Medium = IMAGES
) -> list[Reward]:
    """The rewards by name and path of weights, for samples of `medium`."""
    return [
        for_medium(load_reward(name, path=path, device=str(device_of(device))), medium)
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
    begin: Callable[[Mapping[str, Reward]], None] = lambda rewards: None,
) -> Evaluation:
    """Scores the teacher and the students; every student is compared with the systems before it.

    `alone`: the furthest-trained student only. With `folder`, the samples of the first `kept`
    prompts (None: of all) are saved as `folder`/SYSTEM/NNNNN, or `folder`/SYSTEM/SIZE/NNNNN where
    every prompt is sampled at several sizes. `begin` gets the loaded rewards before anything is
    sampled or taken.
    """
    loaded, sampler = prepare(request, ranks)
    if not alone:
        say_guided(request, loaded, callbacks)
    chosen = slice(-1 if alone else 0, None)
    sizes = at_sizes(request.buckets, loaded, sampler, chosen, teacher=not alone)
    systems = sizes[0].systems
    names, medium = [s.name for s in systems], loaded.backbone.medium
    rewards = load_rewards(request.rewards, request.device, medium)
    begin(dict(zip(request.rewards, rewards, strict=True)))
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
            sizes=sizes if request.buckets else (),
        )
    columns = {n: r.name for n, r in zip(request.rewards, rewards, strict=True) if n != r.name}
    if columns:  # of rewards with a name of their own, under which their scores stand
        result.summary["columns"] = columns
    result.summary["rewards_at_once"] = {reward.name: at_once_of(reward) for reward in rewards}
    if request.diversity:
        result.summary["diversity_in"] = _diversity_in(medium, rewards, request)
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
    content = content_of(request)  # before anything loads: it may be edited while this runs
    adapters: dict[str, str] = {}
    with ranks_of_job(device_of(request.device)) as ranks:
        callbacks = callbacks if ranks.main else SILENT
        say_settled(request, callbacks)
        place = {"rank": ranks.rank, "ranks": ranks.size}
        chunks = Chunks(path.with_suffix(".parts"), what | place | {"keep_images": keep_images})

        def begin(rewards: Mapping[str, Reward]) -> None:
            """What servers score by is known when they are asked: others begin anew."""
            chunks.also(of_servers(rewards, "contents"))
            content["rewards"] |= of_servers(rewards, "lasting")
            adapters.update(adapters_of(request))
            if len(chunks):
                before = counted(len(chunks), "batch", "batches")
                callbacks.notice(f"going on with {before} of an earlier run")

        made = path.with_suffix(".parts") / f"images-{digest(what)}"
        kept = None if keep_images else KEPT_IMAGES
        result = evaluate(request, callbacks, ranks, chunks.take, made, kept=kept, begin=begin)
        result.summary.update(asked=what, content=content)
        if adapters:
            result.summary["adapters"] = adapters
        if request.settled.weights:
            result.summary["weights"] = request.settled.weights
        if ranks.main:
            save(result, request.prompts, path)
            save_prompts(made, request.prompts[:kept])
            _replace(folder, made)
        ranks.total([0.0])  # what rank 0 has written makes the chunks superfluous
        chunks.clear()
    return result


def _replace(folder: Path, made: Path) -> None:
    """Puts the folder `made` in the place of `folder`. The old one is moved away before it is
    removed: what a kill left of it in its place would be nobody's, and be refused."""
    old = made.with_name("images-before")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    made.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


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


def save_prompts(folder: Path, prompts: Sequence[Prompt]) -> None:
    """The prompts of the images in `folder`, one a line, in `PROMPTS`."""
    write_whole(folder / PROMPTS, prompt_lines(prompts))


def prompt_lines(prompts: Sequence[Prompt]) -> str:
    """Prompts as a file beside images has them, one a line."""
    return "\n".join(" ".join(prompt.text.split()) for prompt in prompts) + "\n"


def kept_prompts(file: Path) -> tuple[str, ...]:
    """What `prompt_lines` made of prompts, read again; none where nobody wrote them down.

    Raises:
        ValueError: if the file is no text.
    """
    try:
        return tuple(file.read_text(encoding="utf-8").split("\n")[:-1]) if file.is_file() else ()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no UTF-8 text") from error


def _diversity(medium: Medium, rewards: Sequence[Reward]) -> Diversity:
    """Diversity in the medium's features, or those of the last CLIP among the rewards (the held-out
    one), and the distance to the teacher's samples in the same."""
    features = features_of(medium, rewards)
    if features is None:
        raise ValueError("--diversity measures distances in a CLIP: add --reward clipscore")
    return Diversity(features, reference=TEACHER)


def _diversity_in(medium: Medium, rewards: Sequence[Reward], request: Request) -> dict[str, Any]:
    """Whose features diversity was measured in: the medium's, or a reward's with its weights."""
    clip = last_clip(rewards)
    if medium.features is not None or clip is None:
        return {"medium": medium.name}
    name, path = list(request.rewards.items())[clip]
    content = rewards_fingerprints({name: path})
    return {
        "reward": name,
        "weights": lasting(place_of(files_of(name, path))),
        **({"content": content} if content else {}),
    }


def save(evaluation: Evaluation, prompts: Sequence[Prompt], path: Path) -> None:
    """`evaluation.json`, and the scores by prompt beside it."""
    with writing(scores_path(path)):
        write_scores(scores_path(path), evaluation, prompts)
    with writing(path):
        write_evaluation(path, evaluation.summary)
