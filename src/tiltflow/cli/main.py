"""The command line. Bad input is one clear sentence and a non-zero exit; `--debug` shows more."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import Abort, TyperException

from tiltflow.cli.desk import desk
from tiltflow.cli.dial import dial
from tiltflow.cli.fit_reward import fit_reward
from tiltflow.cli.options import (
    NO_PROMPT,
    Debug,
    Device,
    Overrides,
    Recipe,
    Rewards,
    SamplingOptions,
    named_rewards,
    option,
    place,
    recipe_names,
    sampling_options,
    with_debug,
)
from tiltflow.cli.sharing import register_sharing
from tiltflow.cli.study import study
from tiltflow.cli.submit import submit
from tiltflow.cli.terminal import (
    INTERRUPTED,
    interrupted,
    terminal,
    threads_give_way,
    write_any_text,
)
from tiltflow.core.errors import NonFiniteError, PeerLost
from tiltflow.core.importing import large_imports
from tiltflow.core.limits import MOST_SAMPLES
from tiltflow.core.sentences import counted, printable

EXPECTED = (ValueError, OSError, MemoryError, FloatingPointError, ImportError)
"""What bad input, or too small a machine, raises. Anything else is a mistake in the program, and
shows where it is."""

app = typer.Typer(
    name="tiltflow",
    help="Distil a flow-matching text-to-image model to 4 steps and tilt it towards rewards.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
console = terminal(quiet=os.environ.get("RANK", "0") != "0")  # of several ranks, one speaks


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        console.print(f"tiltflow {version('tiltflow')}", highlight=False)
        raise typer.Exit


@app.callback()
def everywhere(
    version: Annotated[
        bool,
        typer.Option("--version", help="the version", callback=_version, is_eager=True),
    ] = False,
    debug: Annotated[bool, Debug] = False,
) -> None:
    """Distil a flow-matching text-to-image model to 4 steps and tilt it towards rewards."""


@app.command(
    epilog="Example: tiltflow train sd35m_cold_start model.path=DIR data.prompts=FILE run.out=DIR"
)
@with_debug
def train(
    recipe: Recipe,
    overrides: Overrides = None,
) -> None:
    """Train one stage: RECIPE with KEY=VALUE settings."""
    with large_imports():
        from tiltflow.tasks import interface
        from tiltflow.tasks.progress import Terminal

    with Terminal(console, "dim") as callbacks:
        run = interface.train(interface.load_recipe(recipe, *(overrides or [])), callbacks)
    console.print(f"run directory: {run.path}")


@app.command(epilog="Example: tiltflow demo --fast")
@with_debug
def demo(
    out: Annotated[Path, option("--out", "run directory")] = Path("runs/demo"),
    fast: Annotated[bool, typer.Option("--fast", help="a smoke run of a few minutes")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="delete an earlier demo first")] = False,
    loop: Annotated[
        bool, typer.Option("--loop", help="from a simulated person's votes to a tilt, instead")
    ] = False,
) -> None:
    """Teacher to tilted 4-step generator on the embedded model, scored and reported."""
    if loop and (fast or fresh):
        raise ValueError(
            "--loop goes on from the demo's cold start: give it without --fast and --fresh"
        )
    if loop:
        from tiltflow.tasks.loop import run_loop

        run_loop(out, console)
        return
    with large_imports():
        from tiltflow.tasks.demo import run_demo

    run_demo(out, fast, fresh, console)


@app.command(
    epilog="Example: tiltflow sample --model DIR --few-step runs/a/export/few_step "
    "--prompt 'a red circle' --out images"
)
@with_debug
@sampling_options(batch=16)
def sample(
    options: SamplingOptions,
    out: Annotated[Path, option("--out", "folder of the images")],
) -> None:
    """Images of a model with its LoRAs; without LoRAs, of the teacher."""
    with large_imports():
        from tiltflow.tasks import interface
        from tiltflow.tasks.progress import Terminal

    prompts = options.chosen_prompts()
    if prompts is None:
        raise ValueError(NO_PROMPT)
    with Terminal(console) as callbacks:
        paths = interface.sample(
            options.model,
            prompts,
            out=out,
            callbacks=callbacks,
            **options.sampling(),
        )
    console.print(f"{counted(len(paths), 'image')} in {out}")


@app.command(
    epilog="Example: tiltflow evaluate --model DIR --few-step LORA --prompts FILE "
    "--reward clipscore --json evaluation.json"
)
@with_debug
@sampling_options(batch=64)
def evaluate(
    options: SamplingOptions,
    reward: Rewards = None,
    suite: Annotated[
        str | None, typer.Option("--suite", help="a prompt format and its rewards")
    ] = None,
    json_file: Annotated[Path, option("--json", "where the figures go")] = Path("evaluation.json"),
    count: Annotated[int | None, typer.Option("--count", help="the first N prompts", min=2)] = None,
    diversity: Annotated[
        bool, typer.Option("--diversity", help="diversity, and the distance to the teacher, too")
    ] = False,
    keep_images: Annotated[
        bool,
        typer.Option("--keep-images", help="all images beside the figures, not the first alone"),
    ] = False,
) -> None:
    """Score teacher and students on the same prompts and noise, with intervals and tests.

    Killed, it goes on where it was when the same is asked again.
    """
    with large_imports():
        from tiltflow.tasks import interface
        from tiltflow.tasks.progress import Terminal
        from tiltflow.tasks.tables import show, show_categories, show_sizes

    with Terminal(console) as callbacks:
        result = interface.evaluate(
            options.model,
            options.chosen_prompts(),
            named_rewards(reward or []),
            suite=suite,
            count=count,
            diversity=diversity,
            out=json_file,
            keep_images=keep_images,
            callbacks=callbacks,
            **options.sampling(),
        )
    show(result.summary, console)
    show_sizes(result.summary, console)
    show_categories(result.summary, console)
    console.print(f"figures: {json_file}")


@app.command(epilog="Example: tiltflow compare runs/a/evaluation.json runs/b/evaluation.json")
@with_debug
def compare(
    evaluations: Annotated[
        list[Path],
        typer.Argument(
            metavar="EVALUATION...",
            help="one or two evaluation.json or their folders",
            parser=place,
        ),
    ],
    systems: Annotated[
        str | None, typer.Option("--systems", help="A,B: these two alone (of two files: A then B)")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option("--size", help="of several sizes, this one", metavar="HEIGHTxWIDTH"),
    ] = None,
    json_file: Annotated[Path | None, option("--json", "write the comparisons here too")] = None,
) -> None:
    """Systems against each other, prompt by prompt: differences, intervals and p-values."""
    from tiltflow.tasks.compare import run_compare

    run_compare(evaluations, systems, json_file, console, size)


@app.command("reward-server", epilog="Example: tiltflow reward-server hpsv3 --port 8000")
@with_debug
def reward_server(
    rewards: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="rewards, or NAME@PATH of the weights")
    ],
    host: Annotated[
        str, typer.Option("--host", help="address; any but the loopback needs a token")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="port", min=1, max=65535)] = 8000,
    batch: Annotated[
        int, typer.Option("--batch", help="images at a time", min=1, max=MOST_SAMPLES)
    ] = 16,
    device: Device = "auto",
    header_timeout: Annotated[
        float,
        typer.Option(
            "--header-timeout",
            help="seconds for a request's headers, and for a pause in its body",
            min=0.1,
            max=3600,
        ),
    ] = 10.0,
    body_timeout: Annotated[
        float,
        typer.Option("--body-timeout", help="seconds for a request's body", min=0.1, max=86400),
    ] = 60.0,
    connections: Annotated[
        int, typer.Option("--connections", help="connections at a time", min=1, max=10000)
    ] = 64,
    per_address: Annotated[
        int, typer.Option("--per-address", help="of them from one address", min=1, max=10000)
    ] = 16,
    body: Annotated[int, typer.Option("--max-body", help="MiB a request", min=1, max=1024)] = 64,
    image: Annotated[
        int, typer.Option("--max-image", help="megapixels (2^20) an image", min=1, max=64)
    ] = 16,
    images: Annotated[
        int, typer.Option("--max-images", help="megapixels a request", min=1, max=16384)
    ] = 64,
) -> None:
    """Serve rewards to runs elsewhere, which name them remote:http://HOST:PORT/NAME."""
    with large_imports():
        from tiltflow.rewards.remote.limits import Limits
        from tiltflow.tasks.reward_server import serve

    limits = Limits(
        header_timeout, body_timeout, connections, per_address, body * 2**20, image * 2**20,
        images * 2**20,
    )  # fmt: skip
    serve(named_rewards(rewards), host, port, device, batch, limits, console)


@app.command(epilog="Example: tiltflow report runs/demo")
@with_debug
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="run directories", parser=place)
    ],
    out: Annotated[Path | None, option("--out", "the HTML file")] = None,
) -> None:
    """One self-contained HTML page of one run, or of several side by side."""
    from tiltflow.tasks.report import write_run_report

    console.print(f"report: {write_run_report(runs, out)}")


register_sharing(app, console)


@app.command(epilog="Example: tiltflow encode demo_cold_start")
@with_debug
def encode(
    recipe: Recipe,
    overrides: Overrides = None,
) -> None:
    """Encode a recipe's prompts into the embedding cache, where training finds them."""
    with large_imports():
        from tiltflow.config.load import load_config
        from tiltflow.tasks.encode import encode_recipe

    encode_recipe(load_config(recipe, overrides or []), console)


@app.command(epilog="Example: tiltflow recipes")
@with_debug
def recipes(
    name: Annotated[
        str | None, typer.Argument(help="print this one", autocompletion=recipe_names)
    ] = None,
) -> None:
    """The packaged recipes, or one of them in full."""
    from tiltflow.tasks.recipes import show_recipes

    show_recipes(name, console)


@app.command(epilog="Example: tiltflow doctor demo_tilt --memory 24")
@with_debug
def doctor(
    recipe: Annotated[
        str | None, typer.Argument(help="check this recipe too", autocompletion=recipe_names)
    ] = None,
    overrides: Overrides = None,
    memory: Annotated[
        float | None, typer.Option("--memory", help="GiB of the GPU to plan for", min=0)
    ] = None,
) -> None:
    """Versions and device; with RECIPE, whether it is in order and what memory it will take."""
    with large_imports():
        from tiltflow.tasks.doctor import examine

    examine(recipe, overrides or [], console, memory)


app.command(epilog="Example: tiltflow desk runs/demo")(desk)
app.command(epilog="Example: tiltflow dial runs/tilt --prompt 'a red circle' --seeds 0,1,2")(dial)
app.command(epilog="Example: tiltflow submit sd35m_cold_start data.prompts=FILE --gpus 8")(submit)
app.command("fit-reward", epilog="Example: tiltflow fit-reward preferences.jsonl --out taste")(
    fit_reward
)
app.command(epilog="Example: tiltflow study studies/quick.yaml --jobs 2")(study)


def main() -> None:
    """The entry point: turns expected errors into one sentence and an exit status."""
    debug = "--debug" in sys.argv
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    threads_give_way(os.environ)
    write_any_text()
    if not debug:  # the libraries' notices; their errors arrive as exceptions
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
    try:
        status = app(args=arguments or ["--help"], prog_name="tiltflow", standalone_mode=False)
    except Abort:
        status = 1
    except PeerLost:  # has said so already
        if debug:
            raise
        status = 1
    except (*EXPECTED, NonFiniteError, TyperException) as error:
        if debug:
            raise
        terminal(stderr=True).print(f"tiltflow: {_sentence(error, arguments)}", highlight=False)
        status = 2 if isinstance(error, ValueError | OSError | TyperException) else 1
    if status == INTERRUPTED:
        terminal(stderr=True, quiet=console.quiet).print(interrupted(arguments), highlight=False)
    sys.exit(status if isinstance(status, int) else 0)


def _sentence(error: Exception, arguments: list[str]) -> str:
    """What an error says, on one line."""
    text = str(error)
    if isinstance(error, TyperException):
        text = error.format_message()
        if text.startswith("No such option") and arguments[0] in ("train", "doctor"):
            text += " A run's settings are KEY=VALUE: train.steps=100, run.out=DIR."
    elif isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.filename}: {error.strerror}"
    return printable(text, 4000)


if __name__ == "__main__":
    main()
