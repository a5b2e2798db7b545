"""What `import tiltflow` gives, and what the commands call. docs/python.md is its page."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack, get_args, overload

import numpy as np
from numpy.typing import NDArray

from tiltflow.config.load import RunConfig, load_config
from tiltflow.config.schema import Autocast
from tiltflow.core import registry
from tiltflow.core.paths import nearest
from tiltflow.core.sizes import Resolution, said, same_as
from tiltflow.data.columns import columns_of
from tiltflow.data.prompts import Prompt, load_prompts
from tiltflow.evaluation.scores import Evaluation
from tiltflow.evaluation.suites import suite_of
from tiltflow.formats.wanted import FileType, Format, Wanted
from tiltflow.models import family, medium
from tiltflow.rewards import base as rewards_base
from tiltflow.rewards.fitting import check_prompts_fit, check_reward_imports
from tiltflow.setup.build import DTYPES
from tiltflow.tasks.asked import asked
from tiltflow.tasks.callbacks import SILENT, Callbacks
from tiltflow.tasks.compare import comparisons
from tiltflow.tasks.evaluate import evaluated, sample_to, sampled
from tiltflow.tasks.export import export_run
from tiltflow.tasks.recipes import summaries
from tiltflow.tasks.request import Request
from tiltflow.tasks.run import Run
from tiltflow.tasks.sized import buckets_asked
from tiltflow.tasks.train import train_run
from tiltflow.training.objective import OBJECTIVES
from tiltflow.training.own_terms import TERMS

Prompts = str | Path | Sequence[str | Prompt]
"""A prompt file or the name of a packaged set; or the prompts themselves, in a list."""


class Sampling(TypedDict, total=False):
    """How a model is sampled. What is left out is as the student was trained, or as said here."""

    split: str | None
    """Which split of a prompt file that has several."""
    columns: Mapping[str, str]
    """What the columns of a prompt file are called: {"prompt": NAME, "category": NAME,
    "negative": NAME}; and with "size" the column that has each prompt's size of pictures."""
    few_step: str | Path | None
    """Stage-1 LoRA folder, of the mixture a run directory; without one, the teacher is sampled."""
    tilt_lora: str | Path | None
    """Stage-2 LoRA folder, on top of `few_step`; of the mixture a run directory."""
    tilt: float
    """Strength of stage 2, 0 to 1.5. Left out: 1."""
    steps: int | None
    """Sampling steps of the students."""
    eta: float | None
    """Stochasticity of the students' sampler, 0 to 1."""
    seed: int
    """Seed of the noise. Left out: 0."""
    guidance: float | None
    """The teacher's guidance scale."""
    student_guidance: float | None
    """The students' guidance scale."""
    teacher_steps: int
    """The teacher's steps. Left out: 50."""
    batch: int
    """Images at a time. Left out: 64."""
    device: str
    """cpu, cuda, cuda:1, mps or auto. Left out: auto."""
    dtype: Any
    """fp32 or bf16."""
    autocast: str | None
    """bf16 or auto: networks in mixed precision."""
    resolution: Resolution | None
    """A square image's side in pixels, or (height, width)."""
    sizes: Sequence[Resolution]
    """Several of them: every prompt is sampled at each."""
    max_sequence_length: int | None
    """Text tokens."""
    generator_path: str | None
    """The distilled pipeline that klein's LoRAs sit on."""
    family: str | None
    """Name of the model's family, or `module:RECORD`; left out, it is read off the directory."""
    cache: str | None
    """Where embeddings are kept, or off."""


def load_recipe(recipe: str | Path, *overrides: str, **sections: object) -> RunConfig:
    """A packaged recipe, a `.yaml` file, or a run's own `config.yaml`, with settings changed.

    Settings are changed as on the command line, or by sections:

        load_recipe("demo_tilt", "train.steps=20", run={"out": "runs/a"}, rewards={"shapes": 1.0})

    A section's keys replace those of the recipe one by one, `rewards` as a whole.

    Raises:
        ValueError: in one sentence: an unknown recipe or key (the nearest is named), a value of
            the wrong kind, or values that do not go together.
    """
    given = [f"{key}={_written(value)}" for key, value in _settings(sections)]
    return load_config(str(recipe), [*overrides, *given])


def _settings(sections: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    for name, value in sections.items():
        if isinstance(value, Mapping) and name != "rewards":
            yield from ((f"{name}.{key}", inner) for key, inner in value.items())
        else:
            yield name, value


def _written(value: object) -> str:
    """A value as an override's YAML; JSON is that, too."""
    return json.dumps(value, default=str)


def recipes() -> dict[str, str]:
    """The packaged recipes: each name with a line about it."""
    return summaries()


def train(config: RunConfig, callbacks: Callbacks = SILENT) -> Run:
    """Trains one stage, and returns its run directory. `Callbacks` sees how it goes.

    Interrupted by SIGINT or SIGTERM it saves and returns; `Run.finished` tells. With
    `run={"resume": "auto"}` in the config, the same call goes on from there, and the result is
    equal bit for bit.

    Raises:
        ValueError: if the directory holds a run already, or a file that is named is not in order.
        MemoryError, OSError: out of memory or disk, with what helps.
    """
    return Run(train_run(config, callbacks))


@overload
def sample(
    model: str | Path,
    prompts: Prompts,
    *,
    out: None = None,
    callbacks: Callbacks = SILENT,
    **how: Unpack[Sampling],
) -> NDArray[np.generic]: ...


@overload
def sample(
    model: str | Path,
    prompts: Prompts,
    *,
    out: str | Path,
    callbacks: Callbacks = SILENT,
    **how: Unpack[Sampling],
) -> list[Path]: ...


def sample(
    model: str | Path,
    prompts: Prompts,
    *,
    out: str | Path | None = None,
    callbacks: Callbacks = SILENT,
    **how: Unpack[Sampling],
) -> NDArray[np.generic] | list[Path]:
    """One image a prompt, from the furthest-trained system that `how` names (`Sampling`).

    Images come back as (N, H, W, 3) uint8, the mixture's points as (N, 2) fp32. With `out` they go
    to files in that folder instead, and their paths come back; under torchrun the ranks share them.

    Raises:
        ValueError: if there is no prompt, a setting is out of range, or something does not load.
    """
    request = request_of(model, prompts, how)
    if out is not None:
        return sample_to(request, Path(out), callbacks)
    return sampled(request, callbacks)


def evaluate(
    model: str | Path,
    prompts: Prompts | None = None,
    rewards: Sequence[str] | Mapping[str, str | None] = (),
    *,
    suite: str | None = None,
    count: int | None = None,
    diversity: bool = False,
    out: str | Path = "evaluation.json",
    keep_images: bool = False,
    callbacks: Callbacks = SILENT,
    **how: Unpack[Sampling],
) -> Evaluation:
    """Scores the teacher and the students that `how` names (`Sampling`) on the same prompts and
    noise, with intervals and paired tests.

    Args:
        rewards: names, or names with the path of their weights.
        suite: a packaged choice of rewards and, where it brings them, prompts.
        count: the first so many prompts only.
        diversity: also how much images of one prompt differ, and the distance to the teacher's.
        out: the figures' file; beside it lie the scores by prompt and the first images, with
            `keep_images` all of them. Killed, the same call goes on where it was.

    Raises:
        ValueError: if no reward or no prompt is given, or a reward cannot score a prompt.
    """
    chosen = suite_of(suite) if suite is not None else None
    named = rewards if isinstance(rewards, Mapping) else dict.fromkeys(rewards)
    named = named or (chosen.rewards if chosen else {})
    if not named:
        raise ValueError("give at least one --reward NAME, or a --suite")
    if prompts is None and chosen is not None:
        prompts = chosen.prompts
    request = request_of(model, prompts, how, count=count, rewards=named, diversity=diversity)
    if chosen is not None:
        chosen.check(request.prompts)
    check_reward_imports(request.rewards)
    check_prompts_fit(request.rewards, request.prompts)
    return evaluated(Path(out), request, callbacks, keep_images)


def compare(
    first: str | Path,
    second: str | Path | None = None,
    *,
    systems: tuple[str, str] | None = None,
    size: Resolution | None = None,
) -> list[dict[str, Any]]:
    """The systems of one evaluation, or of two, against each other prompt by prompt.

    Each row has `a`, `b`, `reward`, `difference` (a − b), `ci95`, `p_value` and, of several rows,
    `p_holm`, corrected for their number. `systems` names two alone: of two evaluations, the first's
    and the second's; `size`, of evaluations over several sizes, one of them. Diversities that were
    measured in different features are left out.

    Raises:
        ValueError: if a system is in neither, the prompts or sizes differ, or scores are missing.
    """
    paths = [Path(path) for path in (first, second) if path is not None]
    chosen = None if size is None else said(same_as(size))
    return comparisons(paths, systems, chosen)


def export(
    run: str | Path | Run,
    out: str | Path,
    *,
    formats: Sequence[Format] = ("diffusers",),
    strengths: Sequence[float] = (),
    dtype: FileType | None = None,
    callbacks: Callbacks = SILENT,
) -> list[Path]:
    """A run's student from its latest checkpoint, for other programs, with a card. The paths
    written.

    Args:
        formats: "diffusers", "comfyui", "peft", "kohya" (LoRAs), "merged" (whole pipelines).
        strengths: stage 2's, in [0, 1.5], to bake in; none leaves the tilt a file of its own, and
            merges it at 1.
        dtype: of the merged transformer's one file, "bf16" or "fp8"; None as trained.
        callbacks: `notice` gets what one may not expect, such as an adapter that is all zeros.

    Raises:
        ValueError: if `run` is no run directory, its model has no pipeline, or it has not what is
            asked for.
    """
    path = run.path if isinstance(run, Run) else Path(run)
    return export_run(path, Path(out), Wanted(tuple(formats), tuple(strengths), dtype), callbacks)


def request_of(
    model: str | Path,
    prompts: Prompts | None,
    how: Sampling,
    *,
    count: int | None = None,
    **more: Any,
) -> Request:
    """The `Request` of these options and the first `count` prompts.

    Raises:
        ValueError: if there is no prompt or no such keyword, or a keyword's value is of a wrong
            kind or out of range.
    """
    for name in how:
        if name not in Sampling.__annotations__:
            raise ValueError(
                f"there is no keyword {name!r}{nearest(name, list(Sampling.__annotations__))}"
            )
    given = asked(how)
    for option, known in (("dtype", tuple(DTYPES)), ("autocast", get_args(Autocast))):
        if given.get(option) not in (None, *known):
            raise ValueError(f"--{option} is {given[option]!r}; it is one of {', '.join(known)}")
    if prompts is None:
        raise ValueError("give either --prompt TEXT or --prompts FILE")
    split, columns = given.pop("split", None), dict(given.pop("columns", None) or {})
    sizes, size_column = given.pop("sizes", ()), columns.pop("size", None)
    if isinstance(prompts, str | Path):
        chosen = load_prompts(str(prompts), split, columns_of(columns))
    elif split is not None or columns or size_column is not None:
        raise ValueError("a split, or what columns are called, is said of a prompt file only")
    else:
        chosen = [p if isinstance(p, Prompt) else Prompt(_text(p)) for p in prompts]
    if not chosen:
        raise ValueError("there is no prompt in the list")
    for folder in ("few_step", "tilt_lora"):
        if given.get(folder) is not None:
            given[folder] = Path(given[folder])
    if sum(map(bool, (given.get("resolution"), sizes, size_column))) > 1:
        raise ValueError("give either --resolution, or --size, or a column of the prompts' sizes")
    buckets = buckets_asked(sizes, size_column, chosen[:count])
    return Request(str(model), chosen[:count], buckets=buckets, **given, **more)


def _text(prompt: object) -> str:
    if not isinstance(prompt, str):
        raise ValueError(f"a prompt is {prompt!r}, but it should be a text or a Prompt")
    return prompt


KINDS: Mapping[str, tuple[str, Collection[str]]] = {
    "family": (family.GROUP, family.BUILTIN),
    "medium": (medium.ENTRY_POINTS, medium.BUILTIN),
    "objective": (OBJECTIVES.group, OBJECTIVES.builtin),
    "reward": (rewards_base.ENTRY_POINTS, rewards_base.BUILTIN),
    "term": (TERMS.group, TERMS.builtin),
}
"""What can be registered: the group of its entry points, and the names that are taken."""


def register(kind: str, name: str, target: object) -> None:
    """Gives your own reward, term of stage 2, objective of stage 1, medium or model family a name
    that recipes of this process know. `kind` is "reward", "term", "objective", "medium", "family".

    `target` is a function or class of a module, or its place as "package.module:name", which is
    imported when it is used. A run that others are to resume should name the place itself, or
    your package an entry point (docs/rewards.md).

    Raises:
        ValueError: if there is no such kind, the name is taken, or `target` has no place.
    """
    if kind not in KINDS:
        raise ValueError(f"there is no kind {kind!r} to register: it is one of {', '.join(KINDS)}")
    group, builtin = KINDS[kind]
    if name in builtin:
        raise ValueError(f"the {kind} {name!r} is a builtin one")
    registry.register(kind, group, name, target)
