"""A dial computed beforehand: `tiltflow dial`, for models whose pictures take too long to wait for.

A folder holds a picture of every prompt, seed and strength, each the one that the loaded student
makes, to the last bit, and each strength's rewards on the run's held-out prompts, in as many steps.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from PIL import Image
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
)
from torch import Tensor

from tiltflow.config.load import RunConfig
from tiltflow.config.schema import as_tuple
from tiltflow.core.disk import parse_json, write_whole, writing
from tiltflow.core.limits import check_tilt
from tiltflow.core.settings import misfit
from tiltflow.rewards.files import revisions
from tiltflow.setup.manifest import configured_fingerprints
from tiltflow.tasks.callbacks import SILENT, Callbacks
from tiltflow.tasks.depends import asked, digest
from tiltflow.tasks.dial import Student, load_student

FILE = "dial.json"
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
MOST_PICTURES = 20_000


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class Score(_Part):
    """A reward at one strength: its mean and 95% interval, and whether it was trained on."""

    mean: float
    ci95: Annotated[list[float], Field(min_length=2, max_length=2)]
    trained: bool


class Grid(_Part):
    """What a folder's `dial.json` says: the grid, and a digest of all that its pictures depend on.

    `tilt` is the run's name, `side` a square picture's in pixels, or height and width.
    """

    tilt: str
    digest: str
    steps: Annotated[int, Field(ge=1)]
    side: Annotated[int, Field(ge=1)] | Annotated[tuple[int, int], BeforeValidator(as_tuple)]
    strengths: Annotated[list[float], Field(min_length=1)]
    prompts: Annotated[list[str], Field(min_length=1)]
    seeds: Annotated[list[int], Field(min_length=1)]

    def places(self) -> list[tuple[int, int, int]]:
        """Every picture by the numbers of its prompt, seed and strength, in the order in which they
        are made: all strengths of a prompt and seed before the next."""
        return [
            (prompt, seed, strength)
            for prompt in range(len(self.prompts))
            for seed in range(len(self.seeds))
            for strength in range(len(self.strengths))
        ]


def compute_dial(
    run: Path,
    out: Path,
    prompts: Sequence[str] | None,
    *,
    count: int = 4,
    seeds: Sequence[int] = (0, 1),
    strengths: Sequence[float] = STRENGTHS,
    steps: int | None = None,
    side: int | None = None,
    device: str = "auto",
    callbacks: Callbacks = SILENT,
) -> Grid:
    """Makes what is missing of a dial in `out`: killed, the same call goes on where it was.

    `prompts` None: `count` of the run's held-out ones that it is scored on. `steps` and `side` are
    another number of steps and another size than the run's.

    Raises:
        ValueError: as `load_student`; if a number is out of range, or `out` holds a dial that is of
            another run, of other settings, versions or rewards, by what their files hold.
    """
    _check(seeds, strengths, prompts)
    student = load_student([run], side, device)
    trained = student.request.settled.steps
    chosen = trained if steps is None else steps
    texts = list(prompts or [p.text for p in student.fixed.prompts[:count]])
    scored = student.cfg.model_dump(mode="json", include={"rewards", "watch", "run"})
    what = {**asked(student.request), **scored, "steps": chosen}
    if revised := revisions([*student.cfg.rewards, *student.cfg.watch.rewards]):
        what["revisions"] = revised
    if chosen != trained:  # what earlier versions scored at the trained number is not gone on with
        what["scored_steps"] = chosen
    if content := _content(student.cfg):
        what["content"] = content
    grid = Grid(
        tilt=run.absolute().name,
        digest=digest(what),
        steps=chosen,
        side=student.backbone.resolution,  # type: ignore[attr-defined]
        strengths=list(strengths),
        prompts=texts,
        seeds=list(seeds),
    )
    places = grid.places()
    if len(places) > MOST_PICTURES:
        raise ValueError(f"a dial has {MOST_PICTURES:,} pictures at most, not {len(places):,}")
    _begin(out, grid)
    _pictures(student, grid, out, callbacks)
    _scores(student, grid, out, callbacks)
    return grid


def _check(seeds: Sequence[int], strengths: Sequence[float], prompts: Sequence[str] | None) -> None:
    if not strengths:
        raise ValueError("--strengths has none")
    for strength in strengths:
        check_tilt("--strengths", strength)
    if list(strengths) != sorted(set(strengths)):
        raise ValueError("strengths grow from one to the next")
    if not seeds or len(set(seeds)) < len(seeds) or not all(0 <= s < 2**63 for s in seeds):
        raise ValueError("a dial needs a seed, each once, from 0 to 2^63 − 1")
    if prompts is not None and not prompts:
        raise ValueError("a dial needs a prompt")


def _content(cfg: RunConfig) -> dict[str, dict[str, str]]:
    """What the files of the rewards that strengths are scored by hold, where they have any."""
    tables = {"rewards": cfg.rewards, "watch": cfg.watch.rewards}
    found = {name: configured_fingerprints(table) for name, table in tables.items()}
    return {name: digests for name, digests in found.items() if digests}


def _begin(out: Path, grid: Grid) -> None:
    """Writes down what the folder will hold, or makes sure that it holds this."""
    if (out / FILE).is_file():
        if read_grid(out) != grid:
            raise ValueError(
                f"{out} holds a dial of another run, settings or versions, or of other rewards: "
                "choose another --out, or delete it"
            )
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty, and holds no dial: choose another --out")
    with writing(out / FILE):
        write_whole(out / FILE, grid.model_dump_json(indent=1) + "\n")


def _pictures(student: Student, grid: Grid, out: Path, callbacks: Callbacks) -> None:
    places = grid.places()
    callbacks.begin("pictures", 0, None)
    for done, place in enumerate(places, 1):
        prompt, seed, strength = place
        file = picture_file(out, *place)
        if not file.is_file():
            at = [grid.strengths[strength]]
            made = student.image(at, grid.prompts[prompt], grid.seeds[seed], grid.steps)
            file.parent.mkdir(exist_ok=True)
            part = file.with_suffix(".part")
            with writing(file):
                part.write_bytes(packed(made))
                os.replace(part, file)
        callbacks.progress("pictures", done, len(places))


def _scores(student: Student, grid: Grid, out: Path, callbacks: Callbacks) -> None:
    callbacks.begin("rewards", 0, None)
    for number, strength in enumerate(grid.strengths):
        file = _scores_file(out, number)
        if not file.is_file():
            with writing(file):
                found = student.scores([strength], grid.steps)
                write_whole(file, json.dumps(found, allow_nan=False) + "\n")
        callbacks.progress("rewards", number + 1, len(grid.strengths))


def packed(image: Tensor) -> bytes:
    """An image (3, H, W) in [0, 1] as PNG."""
    pixels = (image * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def picture_file(out: Path, prompt: int, seed: int, strength: int) -> Path:
    """Where a picture lies, by the numbers of its prompt, seed and strength."""
    return out / "pictures" / f"{prompt:05d}-{seed:05d}-{strength:05d}.png"


def _scores_file(out: Path, strength: int) -> Path:
    return out / f"scores-{strength:05d}.json"


def read_grid(out: Path) -> Grid:
    """What a folder's pictures are of.

    Raises:
        ValueError: if its `dial.json` is none.
    """
    grid: Grid = _read(TypeAdapter(Grid), out / FILE)
    return grid


def read_scores(out: Path, grid: Grid) -> dict[float, dict[str, dict[str, Any]]]:
    """By strength, each reward's `Score` as a dictionary, for the strengths that are done.

    Raises:
        ValueError: if a file of them is none.
    """
    found = {}
    for number, strength in enumerate(grid.strengths):
        file = _scores_file(out, number)
        if file.is_file():
            scores = _read(TypeAdapter(dict[str, Score]), file)
            found[strength] = {name: score.model_dump() for name, score in scores.items()}
    return found


def _read(form: TypeAdapter[Any], file: Path) -> Any:
    try:
        return form.validate_python(parse_json(file.read_bytes()))
    except ValidationError as error:
        raise ValueError(f"{file} is of no dial ({misfit(error)})") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is of no dial: {error}") from error
