"""RTDMD on videos: a small Wan pipeline is trained on moving shapes, distilled to four steps, and
tilted to a taste in frames, to that and motion, and to the direction that a caption asks for.

Stages: vae, teacher, cold_start, tilt, evaluate. Each is seeded and goes on where it was stopped;
without --stage they run one after the other, about an hour on one CPU core. The figures
go to docs/data/videos.json and the picture to docs/figures/videos.webp; the weights stay in --work.

    python benchmarks/videos.py [--work runs/videos] [--stage NAME] [--seeds 1]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from support import moving_shapes as world
from support.cells import Cells
from support.video_figures import picture, table
from support.video_teacher import TOKENS, Scale, copies, train_teacher, train_vae

from tiltflow.config.load import load_config
from tiltflow.core.checkpoint import latest_step
from tiltflow.data.prompts import Prompt
from tiltflow.evaluation.watch.history import read_history
from tiltflow.tasks.evaluate import evaluate
from tiltflow.tasks.request import Request
from tiltflow.tasks.train import run_training

STAGES = ("vae", "teacher", "cold_start", "tilt", "evaluate")
SIZE = (world.FRAMES, world.SIDE, world.SIDE)
GUIDANCE = 2.0
MEASURES = (
    world.colour_right, world.shape_right, world.direction_right, world.poster, world.steered,
    world.travel, world.motion,
)  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """What a run of stage 2 is tilted to: rewards with their weights, and SubGRPO's weight."""

    rewards: Mapping[str, float]
    policy: float


# Of a reward without a gradient SubGRPO alone can make something, so it has more of a say there.
ARMS = {
    "frames": Arm({"poster": 1.0}, 10.0),
    "frames and motion": Arm({"poster": 1.0, "going": 1.0}, 10.0),
    "direction": Arm({"steered": 1.0}, 50.0),
}


@dataclass(frozen=True)
class Form:
    """How long everything is; a short one shows only that it runs."""

    scale: Scale = field(default_factory=Scale)
    cold_steps: int = 150
    tilt_steps: int = 60
    batch: int = 32
    group: int = 8
    groups: int = 4
    count: int = 144
    watched: int = 64
    teacher_steps: int = 25


SHORT = Form(Scale(2, 2, 2, 2, 4, 8), 2, 2, 4, 4, 2, 4, 8, 2)


@dataclass(frozen=True)
class Bench:
    work: Path
    form: Form
    console: Console

    @property
    def cold(self) -> Path:
        return self.work / "cold_start"

    def tilted(self, arm: str, seed: int) -> Path:
        return self.work / f"tilt_{arm.replace(' ', '_')}_{seed}"

    def settings(self, out: Path) -> list[str]:
        """What both stages' runs have in the place of the recipe's: the sizes of this model, and
        the rates that a small one needs (docs/lab/demo_settings.md)."""
        lists = {}
        for held_out in (False, True):
            lists[held_out] = self.work / f"prompts_{'held_out' if held_out else 'train'}.txt"
            lists[held_out].write_text("".join(f"{s.text}\n" for s in world.scenes(held_out)))
        return [
            f"model.path={self.work / 'pipeline'}",
            f"model.resolution={list(SIZE)}",
            f"model.max_sequence_length={TOKENS}",
            f"model.guidance={GUIDANCE}",
            "model.dtype=fp32",
            "model.gradient_checkpointing=false",
            f"data.prompts={lists[False]}",
            f"data.eval_prompts={lists[True]}",
            "data.cache=off",
            "adapters.rank=16",
            "adapters.alpha=32",
            r"adapters.targets=blocks\.\d+\.(attn[12]\.(to_q|to_k|to_v|to_out\.0)"
            r"|ffn\.net\.(0\.proj|2))",
            "train.micro_batch_size=null",
            "train.fake_scores=per_boundary",
            "train.boundary_power=1.0",
            "train.betas=[0.0, 0.99]",
            "train.ema=0.95",
            "train.schedule=cosine",
            "run.device=cpu",
            f"run.out={out}",
            "run.resume=auto",
            "log.samples=8",
            "log.every=5",
        ]

    def train(self, recipe: str, out: Path, own: Sequence[str]) -> None:
        cfg = load_config(recipe, [*self.settings(out), *own])
        if latest_step(out) != cfg.train.steps:
            run_training(cfg, self.console)
        if latest_step(out) != cfg.train.steps:
            raise SystemExit(f"{out} was stopped: the same command goes on")

    def cold_start(self) -> None:
        own = [
            f"train.steps={self.form.cold_steps}",
            f"train.batch_size={self.form.batch}",
            "train.generator_lr=4.0e-4",
            "train.fake_score_lr=2.0e-3",
            "train.ema_every=update",
            "train.warmup=5",
            "cold_start.generator_every=1",
            "cold_start.fresh_boundary=false",
            "cold_start.keep_graph=true",
            "cold_start.consistency_form=one_sample",
            "checkpoint.every=50",
            "log.samples_every=75",
        ]
        self.train("wan21_1b_cold_start", self.cold, own)

    def tilt(self, arm: str, seed: int) -> None:
        form, given = self.form, ARMS[arm].rewards
        rewards = ", ".join(f"'{world.named(getattr(world, n))}': {w}" for n, w in given.items())
        held_out = [world.colour_right, world.shape_right, world.direction_right]
        own = [
            f"model.few_step={self.cold}",
            "adapters.init_std=null",
            f"train.steps={form.tilt_steps}",
            f"train.batch_size={form.group * form.groups}",
            "train.generator_lr=7.5e-4",
            "train.fake_score_lr=2.0e-3",
            "train.weight_decay=0",
            "train.ema_warmup=false",
            "train.ema_interval=1",
            "train.ema_repeats=1",
            "train.warmup=10",
            f"tilt.group_size={form.group}",
            "tilt.policy_reduction=mean",
            "tilt.keep_graph=true",
            "tilt.fake_score_start=continued",
            "tilt.decode_chunk=8",
            "tilt.consistency=0.0",
            f"tilt.policy_weight={ARMS[arm].policy}",
            "tilt.matching_weight=8.0",
            "tilt.match_steps=random",
            f"tilt.reward_weight={2.25 if 'poster' in given else 0.0}",
            "tilt.reward_normalise=true",
            f"rewards={{{rewards}}}",
            f"watch.rewards={{{', '.join(f'{world.named(r)!r}: 1.0' for r in held_out)}}}",
            "watch.every=20",
            f"watch.prompts={form.watched}",
            f"watch.teacher_images={form.watched}",
            f"watch.teacher_steps={min(25, form.teacher_steps)}",
            "checkpoint.every=20",
            "log.samples_every=30",
            f"run.seed={seed}",
        ]
        self.train("wan21_1b_tilt", self.tilted(arm, seed), own)

    def prompts(self) -> list[Prompt]:
        """Every caption, so often, the held-out ones first; each place in the list has a noise of
        its own, which no training saw."""
        known = [*world.scenes(True), *world.scenes(False)]
        times = -(-self.form.count // len(known))
        return [Prompt(each.text) for each in known * times][: self.form.count]

    def request(self, arm: str | None = None, seed: int = 0, **how: Any) -> Request:
        """The teacher alone, or with the students up to a tilted one."""
        students = {}
        if arm is not None:
            students = {
                "few_step": self.cold / "export" / "few_step",
                "tilt_lora": self.tilted(arm, seed) / "export" / "tilt",
            }
        usual: dict[str, Any] = {
            "prompts": self.prompts(),
            "resolution": SIZE,
            "max_sequence_length": TOKENS,
            "guidance": GUIDANCE,
            "teacher_steps": self.form.teacher_steps,
            "batch": 64,
            "device": "cpu",
            "dtype": "fp32",
            "cache": "off",
        }
        return Request(str(self.work / "pipeline"), **(usual | students | how))

    def scores(self, alone: bool, **how: Any) -> dict[str, dict[str, list[float]]]:
        """By system and measure the values of every prompt."""
        rewards = {world.named(each): None for each in MEASURES}
        found = evaluate(self.request(rewards=rewards, **how), alone=alone).scores
        return {
            system: {name.rpartition(":")[2]: values(column) for name, column in columns.items()}
            for system, columns in found.items()
        }

    def copies(self) -> dict[str, list[float]]:
        """What the measures say of drawn videos that went through the autoencoder."""
        texts = [prompt.text for prompt in self.prompts()]
        made = world.VIDEOS.rounded(copies(self.work, [world.Scene.of(text) for text in texts]))
        return {each.__name__: values(world.scored(each, made, texts)) for each in MEASURES}

    def say(self, step: int) -> None:
        """How good the teacher is so far."""
        for held_out in (True, False):
            some = [Prompt(each.text) for each in world.scenes(held_out)][: self.form.count]
            few = min(20, self.form.teacher_steps)
            found = self.scores(False, prompts=some, teacher_steps=few)["teacher"]
            shown = {name: round(sum(v) / len(v), 3) for name, v in found.items()}
            print(f"teacher at {step}, captions {held_out=}: {shown}", flush=True)


def values(column: Any) -> list[float]:
    return [float(f"{x:.5g}") for x in column.tolist()]


def evaluated(bench: Bench, cells: Cells, seeds: Iterable[int]) -> None:
    """The teacher in many steps and in four, stage 1, and every tilted student; and what the
    watches of the runs saw."""
    cells.cell("copies", bench.copies)
    first = partial(bench.scores, False, arm=next(iter(ARMS)))
    started = cells.cell("start", lambda: {k: v for k, v in first().items() if k != "rtdmd"})
    assert set(started) == {"teacher", "teacher_4_step", "ac_dmd"}
    for seed in seeds:
        for arm in ARMS:
            if latest_step(bench.tilted(arm, seed)) != bench.form.tilt_steps:
                print(f"{arm}, seed {seed}: the run has not ended, and is left out", flush=True)
                continue
            (found,) = cells.cell(
                f"{arm}, seed {seed}",
                lambda arm=arm, seed=seed: list(bench.scores(True, arm=arm, seed=seed).values()),
            )
            assert set(found) == {each.__name__ for each in MEASURES}
            cells.cell(f"watch of {arm}, seed {seed}", partial(seen, bench.tilted(arm, seed)))


def seen(run: Path) -> list[dict[str, Any]]:
    """Of every measurement of a run's watch the means and alarms; `motion` and the like as factors
    of the teacher's."""
    history, rows = read_history(run / "watch.jsonl"), []
    for at in history:
        means = {}
        for name in at.values:
            if not name.startswith("teacher/"):
                of_teacher = history[0].values.get(f"teacher/{name}")
                value = at.mean(name)
                if of_teacher is not None:
                    value = float(torch.tensor(value - of_teacher.mean()).exp())
                means[name.rpartition(":")[2]] = float(f"{value:.4g}")
        rows.append({"step": at.step, "means": means, "alarms": dict(at.alarms)})
    return rows


def run(stage: str, bench: Bench, seeds: Sequence[int], out: Path, figure: Path) -> None:
    bench.work.mkdir(parents=True, exist_ok=True)
    if stage == "vae":
        print(f"vae: mse {train_vae(bench.work, bench.form.scale):.5f} on [-1, 1]", flush=True)
    elif stage == "teacher":
        train_teacher(bench.work, bench.form.scale, bench.say)
    elif stage == "cold_start":
        bench.cold_start()
    elif stage == "tilt":
        for seed in seeds:
            for arm in ARMS:
                bench.tilt(arm, seed)
    else:
        settings = {
            "guidance": GUIDANCE,
            "count": bench.form.count,
            "arms": {name: asdict(arm) for name, arm in ARMS.items()},
        }
        cells = Cells(out, settings | {"teacher_steps": bench.form.teacher_steps})
        evaluated(bench, cells, seeds)
        print(table(cells.found, [p.text for p in bench.prompts()], list(ARMS), list(seeds)))
        picture(bench, list(ARMS), figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--stage", choices=STAGES)
    parser.add_argument("--work", type=Path, default=Path("runs/videos"))
    parser.add_argument("--seeds", type=int, default=1, help="runs of each arm of stage 2")
    parser.add_argument("--short", action="store_true", help="a few steps: that it runs at all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("docs/data/videos.json"))
    parser.add_argument("--figure", type=Path, default=Path("docs/figures/videos.webp"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bench = Bench(args.work, SHORT if args.short else Form(), Console())
    for stage in [args.stage] if args.stage else STAGES:
        run(stage, bench, range(args.seeds), args.out, args.figure)


if __name__ == "__main__":
    sys.exit(main())
