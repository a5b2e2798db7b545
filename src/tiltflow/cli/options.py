"""The options of the commands: what several share is declared once.

Nothing here waits for torch: `--help` is printed at once.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from tiltflow.core.limits import LARGEST_SEED, LONGEST_SIDE, MOST_SAMPLES, MOST_STEPS, MOST_TOKENS
from tiltflow.core.paths import home_for_tilde
from tiltflow.core.sizes import Resolution, both, frames_of, parse_size
from tiltflow.rewards.remote.address import refuse_secrets

if TYPE_CHECKING:
    from tiltflow.tasks.interface import Sampling

NO_PROMPT = "give either --prompt TEXT or --prompts FILE"


def place(text: str) -> Path:
    """A path of the command line, with the home directory for a leading `~`.

    Raises:
        ValueError: if the user after a `~` has none.
    """
    return Path(home_for_tilde(text))


def option(name: str, help: str) -> Any:
    """An option that is a path."""
    return typer.Option(name, help=help, parser=place, metavar="PATH")


def recipe_names(incomplete: str) -> list[tuple[str, str]]:
    """For the shell: the packaged recipes that begin so, each with a line about it."""
    from tiltflow.tasks.recipes import summaries

    return [each for each in summaries().items() if each[0].startswith(incomplete)]


Recipe = Annotated[
    str,
    typer.Argument(help="a packaged recipe's name, or a .yaml file", autocompletion=recipe_names),
]

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE...", help="settings that replace a recipe's"),
]

Debug = typer.Option("--debug", help="on an error, show where it was raised")

Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, mps or auto")]

Rewards = Annotated[
    list[str] | None,
    typer.Option("--reward", help="NAME or NAME@PATH of its weights; repeatable"),
]


@dataclass(frozen=True)
class SamplingOptions:
    """What to sample from, and how, as the command line says it."""

    model: Annotated[
        str,
        typer.Option(
            "--model", help="pipeline directory or hub id", parser=home_for_tilde, metavar="DIR"
        ),
    ]
    prompt: Annotated[str | None, typer.Option("--prompt", help="one prompt")] = None
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts", help="prompt file or packaged set", parser=home_for_tilde, metavar="FILE"
        ),
    ] = None
    split: Annotated[
        str | None, typer.Option("--split", help="which split of the prompts", metavar="NAME")
    ] = None
    column: Annotated[
        list[str] | None,
        typer.Option(
            "--column",
            help="a column's own name, as prompt=NAME, category=, negative=, size=; repeatable",
            metavar="KEY=NAME",
        ),
    ] = None
    few_step: Annotated[Path | None, option("--few-step", "stage-1 LoRA folder")] = None
    tilt_lora: Annotated[Path | None, option("--tilt-lora", "stage-2 LoRA folder")] = None
    tilt: Annotated[float, typer.Option("--tilt", help="stage-2 strength, 0 to 1.5")] = 1.0
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            help="sampling steps of the students [as trained, or 4]",
            min=1,
            max=MOST_STEPS,
        ),
    ] = None
    eta: Annotated[
        float | None,
        typer.Option("--eta", help="stochasticity, 0 to 1 [as trained, or 0.9]", min=0, max=1),
    ] = None
    seed: Annotated[
        int, typer.Option("--seed", help="seed of the noise", min=0, max=LARGEST_SEED)
    ] = 0
    guidance: Annotated[float | None, typer.Option("--guidance", help="the teacher's guidance")] = (
        None
    )
    student_guidance: Annotated[
        float | None,
        typer.Option("--student-guidance", help="the students' guidance [as trained]"),
    ] = None
    teacher_steps: Annotated[
        int, typer.Option("--teacher-steps", help="the teacher's steps", min=1, max=MOST_STEPS)
    ] = 50
    batch: Annotated[
        int, typer.Option("--batch", help="images at a time", min=1, max=MOST_SAMPLES)
    ] = 16
    device: Device = "auto"
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="fp32 or bf16 [as trained, or the files']")
    ] = None
    autocast: Annotated[
        str | None, typer.Option("--autocast", help="bf16 or auto: networks in mixed precision")
    ] = None
    resolution: Annotated[
        int | None,
        typer.Option(
            "--resolution", help="image side in pixels [as trained]", min=8, max=LONGEST_SIDE
        ),
    ] = None
    size: Annotated[
        list[str] | None,
        typer.Option(
            "--size", help="of images; repeatable: every prompt at each", metavar="HEIGHTxWIDTH"
        ),
    ] = None
    max_sequence_length: Annotated[
        int | None,
        typer.Option(
            "--max-sequence-length", help="text tokens [as trained]", min=1, max=MOST_TOKENS
        ),
    ] = None
    generator: Annotated[
        str | None,
        typer.Option(
            "--generator",
            help="the distilled pipeline that LoRAs sit on (klein, Z-Image-Turbo, Krea 2 Turbo)",
            parser=home_for_tilde,
            metavar="DIR",
        ),
    ] = None
    family: Annotated[
        str | None,
        typer.Option("--family", help="module:RECORD of a family from outside (model.family)"),
    ] = None
    cache: Annotated[
        str | None, typer.Option("--cache", help="where embeddings are kept, or off")
    ] = None

    def chosen_prompts(self) -> str | list[str] | None:
        """The source of the prompts, or the one prompt in a list; None where neither is given.

        Raises:
            ValueError: if both are given, or the prompt is no text.
        """
        if self.prompt is None:
            return self.prompts or None
        if self.prompts is not None:
            raise ValueError(NO_PROMPT)
        if not _is_text(self.prompt):
            raise ValueError("--prompt holds a byte that is not UTF-8")
        return [self.prompt]

    def sampling(self) -> Sampling:
        """The rest, as the Python interface takes it."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("model", "prompt", "prompts"):
            del given[name]
        given["columns"] = named_columns(given.pop("column") or [])
        sizes = [_size(size) for size in given.pop("size") or ()]
        if sizes and self.resolution is not None:
            raise ValueError("give either --resolution SIDE or --size HEIGHTxWIDTH")
        if len(sizes) == 1:
            given["resolution"] = sizes[0]
        elif sizes:
            given["sizes"] = sizes
        return cast("Sampling", given | {"generator_path": given.pop("generator")})


def _size(text: str) -> Resolution:
    """Of --size.

    Raises:
        ValueError: if it is none.
    """
    try:
        found = parse_size(text)
    except ValueError as error:
        raise ValueError(f"--size: {error}") from error
    if max(*both(found), frames_of(found)) > LONGEST_SIDE:
        raise ValueError(f"--size is {text}, but a side is at most {LONGEST_SIDE}")
    return found


def _is_text(text: str) -> bool:
    """Whether an argument came as UTF-8: Python puts half a surrogate for a byte that did not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def with_debug(command: Callable[..., None]) -> Callable[..., None]:
    """Lists `--debug` among a command's options; `main` is what reads it."""
    own = list(inspect.signature(command, eval_str=True).parameters.values())
    debug = inspect.Parameter(
        "debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, Debug]
    )

    @functools.wraps(command)
    def run(debug: bool = False, **given: Any) -> None:
        command(**given)

    parameters = [*(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own), debug]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def sampling_options(batch: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command, in the place of its first parameter, the options of `SamplingOptions`,
    with `batch` for the default of --batch; it is called with them as one object."""

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        shared = list(inspect.signature(SamplingOptions, eval_str=True).parameters.values())
        shared = [p.replace(default=batch) if p.name == "batch" else p for p in shared]
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        names = [p.name for p in shared]

        @functools.wraps(command)
        def run(**given: Any) -> None:
            command(SamplingOptions(**{name: given.pop(name) for name in names}), **given)

        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*shared, *own)]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return wrap


def named_columns(given: Sequence[str]) -> Mapping[str, str]:
    """KEY=NAME as keys and the names of columns.

    Raises:
        ValueError: if one is written otherwise, or a key is given twice.
    """
    columns: dict[str, str] = {}
    for text in given:
        key, _, name = text.partition("=")
        if not (key and name):
            raise ValueError(
                f"--column {text!r} should read prompt=NAME, category=NAME, negative=NAME or "
                "size=NAME"
            )
        if key in columns:
            raise ValueError(f"--column {key} is given twice")
        columns[key] = name
    return columns


def named_rewards(given: Sequence[str]) -> Mapping[str, str | None]:
    """NAME or NAME@PATH as names, each with the path of its weights or None.

    Raises:
        ValueError: if a name is given twice, or holds a password or token.
    """
    rewards: dict[str, str | None] = {}
    for text in given:
        refuse_secrets(text)
        name, _, path = text.partition("@")
        if name in rewards:
            raise ValueError(f"the reward {name!r} is given twice")
        rewards[name] = home_for_tilde(path) or None
    return rewards
