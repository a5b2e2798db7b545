"""What the published run's choices do, each against the other value, on the embedded model.

Stage 1 of the demo once a seed, with two averages of the generator beside it; from it stage 2 with
one setting changed at a time:

- `A std 1`: fresh adapters whose A has standard deviation 1, as published, against 1/rank, at the
  same rate, and against 1/rank at `RANK` times that rate, which moves the weights as fast;
- `policy sum`: SubGRPO's sum over the M = 2 trained steps, all over M + 1, against the mean;
- `fake fresh`: the fake score's fresh adapter over stage 1's frozen one, against stage 1's own
  trained on;
- `EMA .904`: what .99 an iteration is for a generator updated every tenth, against .99 an update.

Every student makes one image of each of 516 held-out prompts with the same noise. An arm is a
process of its own, and writes its scores by prompt when it is done; what is there is not repeated.

    python benchmarks/published_choices.py [--workers 16] [--seeds 3] [--device cpu] [--out DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

RANK = 16
RATE = 3.75e-5
"""At which A std 1 moves the weights as fast as the demo's 1/16 does at the demo's rate."""
BASE = (
    "tilt.reward_steps=1",  # the published structure: rewards through the last step only
    "tilt.subset=2",
    "tilt.group_size=8",
    "tilt.policy_weight=0.1",
)
FAST, SLOW = f"train.generator_lr={RATE * RANK}", f"train.generator_lr={RATE}"
TILT = {
    "1/r fast": (FAST,),
    "1/r slow": (SLOW,),
    "std 1 slow": (SLOW, "adapters.init_std=1.0"),
    "policy sum": (FAST, "tilt.policy_reduction=sum"),
    "fake fresh": (FAST, "tilt.fake_score_start=fresh"),
}
AVERAGES = {"EMA .904": 0.99**10, "EMA .99": 0.99}
PAIRS = (
    ("std 1 slow", "1/r slow"),
    ("std 1 slow", "1/r fast"),
    ("policy sum", "1/r fast"),
    ("fake fresh", "1/r fast"),
    ("EMA .904", "EMA .99"),
    ("EMA .904", "no average"),
)
REWARDS = ("shapes", "clipscore", "clipscore_heldout")


def options(args: argparse.Namespace, seed: int) -> list[str]:
    """What both stages of a seed have in common."""
    return [
        f"run.device={args.device}",
        f"run.seed={seed}",
        f"data.cache={args.out / 'cache'}",
        "watch.rewards={shapes: 1.0, clipscore: 1.0, clipscore_heldout: 1.0}",
        f"watch.prompts={args.prompts}",
        f"train.micro_batch_size={args.micro}",
        *(["model.autocast=bf16"] if args.device.startswith("cuda") else []),
    ]


def cold_start(args: argparse.Namespace, seed: int) -> None:
    """Stage 1 of a seed, its checkpoint, and the scores of its averages."""
    from tiltflow.config.load import load_config
    from tiltflow.core.checkpoint import save_checkpoint
    from tiltflow.setup.build import attention_for, build_stage

    changes = [f"train.steps={args.cold_steps}", "train.schedule=constant", "train.ema=0.95"]
    run = args.out / f"cold_start-{seed}"
    cfg = load_config("demo_cold_start", [*options(args, seed), *changes, f"run.out={run}"])
    build = build_stage(cfg)
    roles = build.stage.roles
    slow = {name: _copy(roles.generator.state()) for name in AVERAGES}
    with attention_for(cfg, build.backbone.device):
        for step in range(cfg.train.steps):
            build.stage.iteration(step)
            _stop_at(build.stage.guard.failures())
            now = roles.generator.state()
            for name, decay in AVERAGES.items():
                for key, value in slow[name].items():
                    value.lerp_(now[key], 1 - decay)
        save_checkpoint(run, cfg.train.steps, roles.state(), build.facts.as_json(), keep=1)
        slow["no average"] = _copy(roles.generator.state())
        for name, weights in slow.items():
            roles.ema.load(weights)
            write(args, name, seed, evaluate(cfg, build))


def tilt(args: argparse.Namespace, arm: str, seed: int) -> None:
    """Stage 2 of a seed with an arm's settings, and the scores of its average."""
    from tiltflow.config.load import load_config
    from tiltflow.setup.build import attention_for, build_stage

    changes = [
        *BASE,
        f"train.steps={args.tilt_steps}",
        f"train.batch_size={args.tilt_batch}",
        f"model.few_step={args.out / f'cold_start-{seed}'}",
        f"run.out={args.out / 'unused'}",
        *TILT[arm],
    ]
    cfg = load_config("demo_tilt", [*options(args, seed), *changes])
    build = build_stage(cfg)
    with attention_for(cfg, build.backbone.device):
        for step in range(cfg.train.steps):
            build.stage.iteration(step)
            _stop_at(build.stage.guard.failures())
        write(args, arm, seed, evaluate(cfg, build))


def evaluate(cfg: Any, build: Any) -> dict[str, list[float]]:
    """Scores of the average's images by prompt, the noise the same for every student."""
    import torch

    from tiltflow.core.randomness import Randomness
    from tiltflow.method.sampling import sample_few_step
    from tiltflow.setup.assemble import build_rewards

    backbone, rewards = build.backbone, build_rewards(cfg.watch.rewards, build.backbone)
    sigmas, found = backbone.few_step_sigmas(4), {name: [] for name in REWARDS}
    for start in range(0, len(build.fixed), 43):
        rows = list(range(start, min(start + 43, len(build.fixed))))
        cond, prompts = build.fixed.select(rows, backbone.device)
        x0 = sample_few_step(build.stage.roles.ema, cond, rows, Randomness(1), sigmas, 0.9)
        with torch.no_grad():
            images = backbone.decode(x0)
        about = [p.text for p in prompts], [p.metadata for p in prompts]
        for name, values in rewards.score(images, *about).items():
            found[name] += values.tolist()
    return found


def write(args: argparse.Namespace, arm: str, seed: int, scores: dict[str, list[float]]) -> None:
    """One arm's result, whole or not at all."""
    place = result(args, arm, seed)
    part = place.with_suffix(f".{os.getpid()}")
    facts = {"arm": arm, "seed": seed, "device": args.device, "scores": scores}
    part.write_text(json.dumps(facts) + "\n")
    part.replace(place)


def result(args: argparse.Namespace, arm: str, seed: int) -> Path:
    name = "".join(c if c.isalnum() else "_" for c in arm)
    return args.out / f"{name}-{seed}.json"


def _copy(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() for name, value in state.items()}


def _stop_at(failures: list[Any]) -> None:
    if failures:
        raise failures[0]


def process(args: argparse.Namespace, arm: str, seed: int, threads: int) -> None:
    """One arm in a process of its own; its output goes to a file beside its result."""
    began = time.perf_counter()
    log = args.out / f"{result(args, arm, seed).stem}.log"
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--arm", arm]
    # processes that share cores must not wait actively for each other
    environment = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    with log.open("w") as file:
        ended = subprocess.run(
            [*command, "--seed", str(seed)],
            env=os.environ | environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    state = "done" if ended.returncode == 0 else f"FAILED, see {log}"
    print(f"{arm} seed {seed}: {state}, {time.perf_counter() - began:.0f} s", flush=True)


def run_all(args: argparse.Namespace) -> None:
    """Stage 1 of all seeds, then every arm of all seeds, `workers` threads at a time."""
    seeds = range(args.seeds)
    first = [("cold_start", seed) for seed in seeds if not cold_done(args, seed)]
    second = [(arm, s) for s in seeds for arm in TILT if not result(args, arm, s).exists()]
    for jobs in (first, second):
        threads = max(1, args.workers // max(1, len(jobs)))
        with ThreadPoolExecutor(max(1, args.workers // threads)) as pool:
            ended = [pool.submit(process, args, arm, seed, threads) for arm, seed in jobs]
        for one in ended:
            one.result()


def cold_done(args: argparse.Namespace, seed: int) -> bool:
    return all(result(args, arm, seed).exists() for arm in (*AVERAGES, "no average"))


def table(args: argparse.Namespace) -> None:
    """Each pair's difference by reward: over prompts (mean of the seeds), and of each seed."""
    import numpy as np

    from tiltflow.evaluation.statistics import mean_ci

    read: dict[tuple[str, int], dict[str, list[float]]] = {}
    for arm in (*TILT, *AVERAGES, "no average"):
        for seed in range(args.seeds):
            if result(args, arm, seed).exists():
                read[arm, seed] = json.loads(result(args, arm, seed).read_text())["scores"]
    print("\n| arm | " + " | ".join(REWARDS) + " |\n|---" + "|---" * len(REWARDS) + "|")
    for arm in dict.fromkeys(arm for arm, _ in read):
        runs = [scores for (name, _), scores in read.items() if name == arm]
        cells = [f"{np.mean([r[reward] for r in runs]):.4f}" for reward in REWARDS]
        print(f"| {arm} ({len(runs)} seeds) | " + " | ".join(cells) + " |")
    print("\n| a − b | reward | difference, 95% over prompts | of each seed |\n|---|---|---|---|")
    for a, b in PAIRS:
        seeds = [s for s in range(args.seeds) if (a, s) in read and (b, s) in read]
        for reward in REWARDS if seeds else ():
            gaps = np.array([np.subtract(read[a, s][reward], read[b, s][reward]) for s in seeds])
            mean, low, high = mean_ci(gaps.mean(0))
            each = ", ".join(f"{gap.mean():+.4f}" for gap in gaps)
            print(f"| {a} − {b} | {reward} | {mean:+.4f} [{low:+.4f}, {high:+.4f}] | {each} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/published_choices"))
    parser.add_argument("--cold-steps", type=int, default=150)
    parser.add_argument("--tilt-steps", type=int, default=100)
    parser.add_argument("--tilt-batch", type=int, default=48)
    parser.add_argument("--micro", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=516)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.arm is None:
        run_all(args)
        table(args)
    elif args.arm == "cold_start":
        cold_start(args, args.seed)
    else:
        tilt(args, args.arm, args.seed)


if __name__ == "__main__":
    main()
