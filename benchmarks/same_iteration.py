"""The same iterations by the authors' code and by ours: how far gradients and weights come apart.

Their repository is not ours to ship: give the folder of a checkout. Their trainer of stage 1 and
that of stage 2 run what ours run: the same small random networks (`reference.py` says what else of
their surroundings is replaced), the published settings at a small size in fp32 (but that stage 2's
three terms are given alike weights), the same weights to begin with, and our counted draws wherever
they draw. An iteration of stage 1 is one with both updates (every tenth); one of stage 2 is an
epoch of one rollout. Each goes on from the weights, the optimizer's state and the average that the
one before has left on its own side.

A figure is the largest of its iterations. The command fails if one is above its bound, as with
`--ours train.ema=0.9`, which changes a setting of ours alone.

    python benchmarks/same_iteration.py --reference DIR [--stage cold_start|tilt|both]
                                        [--model sd35m|klein|both] [--iterations 3]
                                        [--ours KEY=VALUE ...]
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers.utils import logging
from support import reference_tilt
from support.counted_draws import Fed, cold_start_draws, tilt_draws
from support.random_model import RandomModel, random_model
from support.reference_parts import (
    PUBLISHED,
    REPOSITORY,
    Bench,
    cold_start_of_theirs,
    find_theirs,
    on_device,
)
from support.side_by_side import Beside, adapters, copy_to, draw, relative, their_embeddings
from support.tables import markdown

from tiltflow.config.load import RunConfig
from tiltflow.data.prompts import Prompt
from tiltflow.models.backbone import Conditioning
from tiltflow.models.lora_files import read_adapter
from tiltflow.training.cold_start import ColdStart, Cycle
from tiltflow.training.tilt import Tilt

FAKE, GENERATOR = "fake score's gradient", "generator's gradient"
CHANGE, AVERAGE, ADVANTAGES = "weights' change", "average", "advantages"
BOUNDS = {FAKE: 1.5e-4, GENERATOR: 5e-3, CHANGE: 0.08, AVERAGE: 1e-6, ADVANTAGES: 5e-3}
"""An order above what was found (docs/lab/benchmarks.md): another processor adds up in another way,
and a setting of ours that is not theirs shows as a percent or more (`--ours`)."""
Found = dict[str, float]
"""An iteration's figures, by the columns of `BOUNDS`."""
PLAIN = ("model.dtype=fp32", "model.gradient_checkpointing=false")
ALIKE = {"model__gradient_checkpointing": False, "train__autocast_dtype": "fp32"}
MATCHING, REWARD = 15.0, 0.1
"""Weights of stage 2 in both. As published (1e-3, 1e-4) these terms are, on such networks, 1e-4 and
1e-3 of the policy's: a fault in them would be less than a rounding of the advantages."""
EVEN = (f"tilt.matching_weight={MATCHING}", f"tilt.reward_weight={REWARD}")
DRAWS_COLD_START = ("trainers.dmd_trainer", "trainers.ac_dmd_trainer", "schedulers.cps_scheduler")
"""Their modules that draw in stage 1."""


def cold_start(model: RandomModel, folder: Path, own: Sequence[str]) -> Iterator[Found]:
    """Iterations of stage 1 with both updates, one after the other."""
    bench = Bench(model, 4, 64)
    values = bench.settings(*PLAIN, *own)
    cfg, stage = model.config("cold_start", *values), model.build("cold_start", *values).stage
    assert isinstance(stage, ColdStart)
    trainer = cold_start_of_theirs(bench, folder, cfg, **ALIKE, model__dtype="fp32")
    random = torch.Generator().manual_seed(5)
    generator, fake = networks(stage, trainer, random)
    ours, every = stage.roles.ema.parameters, stage.settings.generator_every
    average = adapters(trainer.generator_ema, ours)
    draw(ours, random)  # unlike the generator's, or its rate would hardly matter
    copy_to(average, ours)
    for step in range(every - 1, sys.maxsize, every):
        indices = stage.sampler.indices(Cycle.of(step, 1, every).number * bench.batch, bench.batch)
        cond, _ = stage.prompts.select(indices, model.device)
        give(trainer, model, cond[slice(0, bench.batch)])
        fed, trainer.global_step = Fed(cold_start_draws(stage, step)), step
        with on_device(model.device), ExitStack() as stack:
            for name in DRAWS_COLD_START:
                module = import_module(f"rtdmd.{name}")
                stack.enter_context(patch.object(module, "torch", fed))
            trainer.train_step(["a prompt"] * bench.batch)
        assert not fed.left, f"{len(fed.left)} of our draws are left"
        stage.iteration(step)
        yield figures(generator, fake) | {AVERAGE: relative(ours, average)}


def tilt(model: RandomModel, folder: Path, own: Sequence[str]) -> Iterator[Found]:
    """Epochs of stage 2, one after the other."""
    bench = Bench(model, reference_tilt.BATCH, 64)
    values = reference_tilt.settings(bench, *PLAIN, *EVEN, "tilt.keep_graph=false", *own)
    cfg, stage = model.config("tilt", *values), model.build("tilt", *values).stage
    assert isinstance(stage, Tilt)
    trainer = tilt_of_theirs(bench, folder, cfg, stage)
    generator, fake = networks(stage, trainer, torch.Generator().manual_seed(5))
    most = trainer.config.grpo.adv_clip_max
    for step in range(sys.maxsize):
        cond, prompts = stage._prompts(step)
        give(trainer, model, cond[slice(0, bench.batch)])
        draws, noise = tilt_draws(stage, step)
        place(trainer, prompts, stage.policy.explores(step), noise)
        fed, theirs = Fed(draws), Seen(trainer._grpo_dmd_training_stage)
        with patch.object(trainer, "_grpo_dmd_training_stage", theirs):
            reference_tilt.epoch_of_theirs(bench, trainer, step, fed)
        assert not fed.left, f"{len(fed.left)} of our draws are left"
        ours = Seen(stage._generator_update)
        with patch.object(Tilt, "_generator_update", ours):
            stage.iteration(step)
        advantages = theirs.given[2]["advantages"][:, 0].clamp(-most, most)
        apart = relative({"": ours.given[0].advantages}, {"": advantages})
        yield figures(generator, fake) | {ADVANTAGES: apart}


def tilt_of_theirs(bench: Bench, folder: Path, cfg: RunConfig, stage: Tilt) -> Any:
    """Their trainer, whose generator has our adapter of stage 1 merged by their own code."""
    reward = stage.rewards.rewards[0].reward
    # Their gradient of CLIPScore divides logits by 100, CLIP's scale. The small CLIP's is another.
    reward.model.logit_scale.data.fill_(math.log(100.0))
    saved, _ = read_adapter(bench.model.folder / "few_step")
    scale = (saved.alpha / saved.rank) / (cfg.adapters.alpha / cfg.adapters.rank)
    assert stage.roles.reference is not None
    few_step = {
        name.replace(".weight", ".default.weight"): value * (scale if ".lora_B." in name else 1.0)
        for name, value in stage.roles.reference.state().items()
    }
    path = bench.model.folder / "generator_ema.pt"
    torch.save(few_step, path)
    more = ALIKE | {
        "model__generator_lora__load_path": str(path),
        "grpo__last_step_loss__weight": MATCHING,
        "grpo__last_step_loss__bp_grad_scale": REWARD,
    }
    return reference_tilt.tilt_trainer_of_theirs(bench, folder, cfg, reward, **more)


class Seen:
    """A function that keeps what it was last called with."""

    def __init__(self, plain: Any) -> None:
        self._plain = plain

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.given = args
        return self._plain(*args, **kwargs)


def networks(stage: ColdStart | Tilt, trainer: Any, random: torch.Generator) -> list[Beside]:
    """The generators and the fake scores, with the same random adapters."""
    pairs = (
        (stage.updater, trainer.generator, trainer.optimizers["generator"]),
        (stage.fake.updater, trainer.fake_score_net, trainer.optimizers["fake_score"]),
    )
    return [Beside.of(*pair, random) for pair in pairs]


def figures(generator: Beside, fake: Beside) -> Found:
    change = max(generator.change(), fake.change())
    return {FAKE: fake.gradient(), GENERATOR: generator.gradient(), CHANGE: change}


def give(trainer: Any, model: RandomModel, cond: Conditioning) -> None:
    """Has their trainer look up the embeddings of an iteration's prompts."""
    encoded, trainer._uncond_embeds = their_embeddings(model.name, cond)
    trainer._encode_prompts = lambda _: encoded


def place(trainer: Any, prompts: list[Prompt], trained: Any, noise: list[torch.Tensor]) -> None:
    """Has their epoch take these prompts, train these sampler steps, and add this noise."""
    trainer._grpo_sample_iter = iter([[prompt.text for prompt in prompts]])
    trainer._sample_selected_steps = lambda *_, **__: list(trained)
    trainer._make_shared_noise = lambda k, *_: noise[k]


STAGES = {"cold_start": cold_start, "tilt": tilt}


def largest(stage: str, model: str, args: argparse.Namespace) -> Found:
    """The largest of each figure over the iterations, each of which is shown as it comes."""
    seen: dict[str, list[float]] = {}
    with (
        tempfile.TemporaryDirectory() as files,
        random_model(model, torch.device("cpu"), True, Path(files)) as made,
    ):
        iterations = STAGES[stage](made, args.reference, args.ours)
        for number, found in zip(range(args.iterations), iterations, strict=False):
            shown = ", ".join(f"{name} {value:.1e}" for name, value in found.items())
            print(f"{stage}, {model}, iteration {number + 1}: {shown}", flush=True)
            for name, value in found.items():
                seen.setdefault(name, []).append(value)
    # torch's: the largest of numbers and none is none
    return {k: float(torch.tensor(v, dtype=torch.float64).max()) for k, v in seen.items()}


def above(found: Found) -> list[str]:
    """The figures that are above their bounds, or no number."""
    return [name for name, value in found.items() if not value <= BOUNDS[name]]


def commit(folder: Path) -> str:
    if not (folder / ".git").exists():
        return "not known: no git checkout"
    words = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--reference", type=Path, required=True, help=f"a checkout of {REPOSITORY}, the authors'"
    )
    parser.add_argument("--stage", choices=(*STAGES, "both"), default="both")
    parser.add_argument("--model", choices=(*PUBLISHED, "both"), default="both")
    parser.add_argument("--iterations", type=int, default=3)
    change = "settings of ours to change, to see it fail"
    parser.add_argument("--ours", nargs="+", default=[], metavar="KEY=VALUE", help=change)
    args = parser.parse_args()
    if args.iterations < 1:
        parser.error(f"--iterations is {args.iterations}, but it must be 1 or more")
    find_theirs(args.reference)
    logging.set_verbosity_error()
    rows, failed = [], []
    for stage in STAGES if args.stage == "both" else (args.stage,):
        for model in PUBLISHED if args.model == "both" else (args.model,):
            found = largest(stage, model, args)
            rows.append([stage, model, *(found.get(name, "–") for name in BOUNDS)])
            failed += [f"{name} of {stage} with {model}" for name in above(found)]
    rows.append(["bound", "", *BOUNDS.values()])
    print(markdown(["stage", "model", *BOUNDS], rows))
    print(f"their commit: {commit(args.reference)}")
    if failed:
        sys.exit(f"above the bound: {', '.join(failed)}")


if __name__ == "__main__":
    main()
