"""The command line. Bad input is one clear sentence and a non-zero exit; `--debug` shows more."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    name="tiltflow",
    help="Distil a flow-matching text-to-image model to 4 steps and tilt it towards rewards.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
console = Console()

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE...", help="settings that replace a recipe's"),
]
Model = Annotated[str, typer.Option("--model", help="pipeline directory or hub id")]
FewStep = Annotated[Path | None, typer.Option("--few-step", help="stage-1 LoRA folder")]
TiltLora = Annotated[Path | None, typer.Option("--tilt-lora", help="stage-2 LoRA folder")]
Strength = Annotated[float, typer.Option("--tilt", help="stage-2 strength, 0 to 1")]
Prompts = Annotated[str | None, typer.Option("--prompts", help="prompt file or packaged set")]
PromptText = Annotated[str | None, typer.Option("--prompt", help="one prompt")]
Steps = Annotated[int, typer.Option("--steps", help="sampling steps of the students", min=1)]
Eta = Annotated[float, typer.Option("--eta", help="stochasticity, 0 to 1", min=0, max=1)]
Seed = Annotated[int, typer.Option("--seed", help="seed of the noise", min=0)]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, mps or auto")]
Dtype = Annotated[str, typer.Option("--dtype", help="fp32 or bf16")]
Batch = Annotated[int, typer.Option("--batch", help="images at a time", min=1)]
Guidance = Annotated[float | None, typer.Option("--guidance", help="the teacher's guidance")]
TeacherSteps = Annotated[int, typer.Option("--teacher-steps", help="the teacher's steps", min=1)]
Resolution = Annotated[int | None, typer.Option("--resolution", help="image side in pixels")]
Generator = Annotated[
    str | None, typer.Option("--generator", help="the distilled pipeline that LoRAs sit on (klein)")
]


@app.command(
    epilog="Example: tiltflow train sd35m_cold_start model.path=DIR data.prompts=FILE run.out=DIR"
)
def train(
    recipe: Annotated[str, typer.Argument(help="a packaged recipe's name, or a .yaml file")],
    overrides: Overrides = None,
) -> None:
    """Train one stage: RECIPE with KEY=VALUE settings."""
    from tiltflow.commands.train import run_training
    from tiltflow.config import load_config

    out = run_training(load_config(recipe, overrides or []), console)
    console.print(f"run directory: {out}")


@app.command(epilog="Example: tiltflow demo --fast")
def demo(
    out: Annotated[Path, typer.Option("--out", help="run directory")] = Path("runs/demo"),
    fast: Annotated[bool, typer.Option("--fast", help="a smoke run of a few minutes")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="delete an earlier demo first")] = False,
) -> None:
    """Teacher to tilted 4-step generator on the embedded model, scored and reported."""
    from tiltflow.commands.demo import run_demo

    run_demo(out, fast, fresh, console)


@app.command(
    epilog="Example: tiltflow sample --model DIR --few-step runs/a/export/few_step "
    "--prompt 'a red circle' --out images"
)
def sample(
    model: Model,
    out: Annotated[Path, typer.Option("--out", help="folder of the images")],
    prompt: PromptText = None,
    prompts: Prompts = None,
    few_step: FewStep = None,
    tilt_lora: TiltLora = None,
    tilt: Strength = 1.0,
    steps: Steps = 4,
    eta: Eta = 0.9,
    seed: Seed = 0,
    guidance: Guidance = None,
    teacher_steps: TeacherSteps = 50,
    batch: Batch = 16,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    resolution: Resolution = None,
    generator: Generator = None,
) -> None:
    """Images of a model with its LoRAs; without LoRAs, of the teacher."""
    from tiltflow.commands.evaluate import sample_images

    request = _request(
        model=model,
        prompt=prompt,
        prompts=prompts,
        few_step=few_step,
        tilt_lora=tilt_lora,
        tilt=tilt,
        steps=steps,
        eta=eta,
        seed=seed,
        guidance=guidance,
        teacher_steps=teacher_steps,
        batch=batch,
        device=device,
        dtype=dtype,
        resolution=resolution,
        generator=generator,
    )
    paths = sample_images(request, out, console)
    console.print(f"{len(paths)} images in {out}")


@app.command(
    epilog="Example: tiltflow evaluate --model DIR --few-step LORA --prompts FILE "
    "--reward clipscore --json evaluation.json"
)
def evaluate(
    model: Model,
    prompt: PromptText = None,
    prompts: Prompts = None,
    reward: Annotated[
        list[str] | None,
        typer.Option("--reward", help="NAME or NAME@PATH of its weights; repeatable"),
    ] = None,
    suite: Annotated[
        str | None, typer.Option("--suite", help="prompts and rewards together")
    ] = None,
    json_file: Annotated[Path, typer.Option("--json", help="where the figures go")] = Path(
        "evaluation.json"
    ),
    count: Annotated[int | None, typer.Option("--count", help="the first N prompts", min=2)] = None,
    diversity: Annotated[bool, typer.Option("--diversity", help="measure diversity too")] = False,
    few_step: FewStep = None,
    tilt_lora: TiltLora = None,
    tilt: Strength = 1.0,
    steps: Steps = 4,
    eta: Eta = 0.9,
    seed: Seed = 0,
    guidance: Guidance = None,
    teacher_steps: TeacherSteps = 50,
    batch: Batch = 64,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    resolution: Resolution = None,
    generator: Generator = None,
) -> None:
    """Score teacher and students on the same prompts and noise, with intervals and tests."""
    from tiltflow.commands import evaluate as command
    from tiltflow.evaluation.suites import suite_of

    names = list(reward or [])
    if suite is not None:
        chosen = suite_of(suite)
        prompts, names = prompts or chosen.prompts, names or list(chosen.rewards)
    if not names:
        raise ValueError("give at least one --reward NAME, or a --suite")
    rewards = {name: path or None for name, _, path in (n.partition("@") for n in names)}
    request = _request(
        model=model,
        prompt=prompt,
        prompts=prompts,
        count=count,
        few_step=few_step,
        tilt_lora=tilt_lora,
        tilt=tilt,
        steps=steps,
        eta=eta,
        seed=seed,
        guidance=guidance,
        teacher_steps=teacher_steps,
        batch=batch,
        device=device,
        dtype=dtype,
        resolution=resolution,
        generator=generator,
        rewards=rewards,
        diversity=diversity,
    )
    result = command.evaluate(request, console)
    command.save(result, json_file)
    command.show(result.summary, console)
    console.print(f"figures: {json_file}")


@app.command(epilog="Example: tiltflow compare runs/demo/evaluation.json")
def compare(
    evaluation: Annotated[Path, typer.Argument(help="an evaluation.json or its run directory")],
) -> None:
    """The systems of an evaluation against each other, with p-values."""
    from tiltflow.commands.evaluate import read_evaluation, show

    show(read_evaluation(evaluation), console)


@app.command(epilog="Example: tiltflow report runs/demo")
def report(
    runs: Annotated[list[Path], typer.Argument(help="run directories")],
    out: Annotated[Path | None, typer.Option("--out", help="the HTML file")] = None,
) -> None:
    """One self-contained HTML page of one run, or of several side by side."""
    from tiltflow.commands.report import write_run_report

    console.print(f"report: {write_run_report(runs, out)}")


@app.command(epilog="Example: tiltflow export runs/tilt --out lora --merged")
def export(
    run: Annotated[Path, typer.Argument(help="a run directory")],
    out: Annotated[Path, typer.Option("--out", help="where the folders go")],
    merged: Annotated[
        bool, typer.Option("--merged", help="also the whole pipeline with the adapters merged in")
    ] = False,
    tilt: Annotated[float, typer.Option("--tilt", help="stage-2 strength in it, 0 to 1")] = 1.0,
) -> None:
    """LoRA folders, scheduler and model card for diffusers, from a run's latest checkpoint."""
    from tiltflow.commands.export import export_run

    for path in export_run(run, out, merged, tilt):
        console.print(f"wrote {path}")


@app.command(epilog="Example: tiltflow encode demo_cold_start")
def encode(
    recipe: Annotated[str, typer.Argument(help="a packaged recipe's name, or a .yaml file")],
    overrides: Overrides = None,
) -> None:
    """Encode a recipe's prompts once and say what that gives (shapes, size)."""
    from tiltflow.commands.doctor import encode_recipe
    from tiltflow.config import load_config

    encode_recipe(load_config(recipe, overrides or []), console)


@app.command(epilog="Example: tiltflow recipes")
def recipes(
    name: Annotated[str | None, typer.Argument(help="print this one")] = None,
) -> None:
    """The packaged recipes, or one of them in full."""
    from tiltflow.commands.doctor import show_recipes

    show_recipes(name, console)


@app.command(epilog="Example: tiltflow doctor demo_tilt --memory 24")
def doctor(
    recipe: Annotated[str | None, typer.Argument(help="check this recipe too")] = None,
    overrides: Overrides = None,
    memory: Annotated[
        float | None, typer.Option("--memory", help="GiB of the GPU to plan for", min=0)
    ] = None,
) -> None:
    """Versions and device; with RECIPE, whether it is in order and what memory it will take."""
    from tiltflow.commands.doctor import examine

    examine(recipe, overrides or [], console, memory)


def _request(  # type: ignore[no-untyped-def]
    *, prompt: str | None, prompts: str | None, generator: str | None, count: int | None = None,
    dtype: str, **values,
):  # fmt: skip
    """The options of `sample` and `evaluate` as one request."""
    from tiltflow.build import DTYPES
    from tiltflow.commands.evaluate import Request
    from tiltflow.prompts import Prompt, load_prompts

    if (prompt is None) == (prompts is None):
        raise ValueError("give either --prompt TEXT or --prompts FILE")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype is {dtype!r}; it is one of {', '.join(DTYPES)}")
    chosen = [Prompt(prompt, {})] if prompt is not None else load_prompts(str(prompts))
    return Request(prompts=chosen[:count], generator_path=generator, dtype=dtype, **values)


def main() -> None:
    """The entry point: turns expected errors into one sentence and an exit status."""
    from tiltflow.train.optim import NonFiniteError

    debug = "--debug" in sys.argv
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not debug:  # the libraries' notices; their errors arrive as exceptions
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
    try:
        app(args=arguments, prog_name="tiltflow")
    except (ValueError, OSError, NonFiniteError, FloatingPointError, ImportError) as error:
        if debug:
            raise
        Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(
            f"tiltflow: {' '.join(str(error).split())}"
        )
        sys.exit(2 if isinstance(error, ValueError | OSError) else 1)


if __name__ == "__main__":
    main()
