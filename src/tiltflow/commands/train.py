"""`tiltflow train`: one run directory from one recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from tiltflow.build import Build, build_rewards, build_stage, device_of, eval_prompts
from tiltflow.checkpoint import latest_step, load_checkpoint
from tiltflow.commands.export import export_checkpoint
from tiltflow.config import RunConfig, dump_config, validate_files
from tiltflow.embeddings import EncodedPrompts, encode_prompts
from tiltflow.randomness import Randomness
from tiltflow.rewards.combine import RewardMixture
from tiltflow.roles import Role
from tiltflow.sampling import sample_few_step
from tiltflow.train.loop import Hooks, LoopSettings, train


@dataclass(frozen=True)
class FixedPrompts:
    """Samples of a role on prompts and noise that stay the same through a run."""

    encoded: EncodedPrompts
    sigmas: torch.Tensor
    eta: float
    batch: int

    def images(self, role: Role, count: int) -> torch.Tensor:
        """Images (count, 3, H, W) in [0, 1] of the first prompts, on the CPU."""
        parts = []
        for start in range(0, count, self.batch):
            numbers = list(range(start, min(start + self.batch, count)))
            cond, _ = self.encoded.select(numbers, role.backbone.device)
            x = sample_few_step(role, cond, numbers, Randomness(0), self.sigmas, self.eta)
            with torch.no_grad():
                parts.append(role.backbone.decode(x).cpu())
        return torch.cat(parts)


def save_grid(images: torch.Tensor, path: Path, columns: int = 8) -> None:
    """Images (N, 3, H, W) in [0, 1] as one PNG."""
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    n, h, w, _ = pixels.shape
    rows = -(-n // columns)
    sheet = np.full((rows * h, columns * w, 3), 255, np.uint8)
    for i, picture in enumerate(pixels):
        r, c = divmod(i, columns)
        sheet[r * h : (r + 1) * h, c * w : (c + 1) * w] = picture
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path)


def run_training(cfg: RunConfig, console: Console) -> Path:
    """Trains what the config says and returns the run directory.

    Raises:
        ValueError: if the directory already holds a run and `run.resume` is false, or there is
            nothing to resume; and whatever the config's files have wrong.
    """
    out = Path(cfg.run.out)
    resume = _resume(cfg, out)
    validate_files(cfg)
    with attention_of(device_of(cfg.run.device)):
        return _run(cfg, out, resume, console)


@contextmanager
def attention_of(device: torch.device) -> Iterator[None]:
    """Plain attention on a CPU, where the fused kernel's backward pass is several times slower.

    Measured: 24 against 109 ms a forward and backward pass of 128 × 4 heads × 28 tokens.
    """
    if device.type != "cpu":
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield


def _run(cfg: RunConfig, out: Path, resume: bool, console: Console) -> Path:
    build = build_stage(cfg, lambda message: console.print(f"[dim]{message}[/dim]"))
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(dump_config(cfg))
    settings = LoopSettings(
        steps=cfg.train.steps,
        log_every=cfg.log.every,
        save_every=cfg.checkpoint.every,
        keep=cfg.checkpoint.keep,
        tensorboard=cfg.log.tensorboard,
        wandb=cfg.log.wandb,
        facts=build.facts,
    )
    with _bar(console) as bar:
        start = (latest_step(out) or 0) if resume else 0
        task = bar.add_task(cfg.stage, total=cfg.train.steps, completed=start, note="")
        hooks = _hooks(cfg, build, out, lambda done, m: _show(bar, task, done, m, console))
        build.backbone.free_text_encoders()
        done = train(build.stage, out, settings, hooks, resume)
    if done < cfg.train.steps:
        console.print(f"stopped at step {done} and saved; go on with run.resume=true run.out={out}")
    elif hasattr(build.backbone, "pipe") and cfg.adapters.kind == "lora":
        export_checkpoint(cfg, load_checkpoint(out), out / "export")
    return out


def _resume(cfg: RunConfig, out: Path) -> bool:
    found = latest_step(out)
    if found is not None and not cfg.run.resume:
        raise ValueError(
            f"{out} already holds a run at step {found}: give run.resume=true to go on with it, "
            "or another run.out"
        )
    return found is not None


def _hooks(
    cfg: RunConfig,
    build: Build,
    out: Path,
    progress: Callable[[int, dict[str, float]], None],
) -> Hooks:
    """Sample grids and held-out rewards, both on fixed prompts and noise."""
    watched = cfg.watch.rewards
    pictures = cfg.log.samples_every > 0 and len(build.backbone.latent_shape) == 3
    if not pictures and not watched:
        return Hooks(progress=progress)
    count = max(cfg.log.samples if pictures else 0, cfg.watch.prompts if watched else 0)
    prompts = eval_prompts(cfg)[:count]
    fixed = FixedPrompts(
        encode_prompts(build.backbone, prompts),
        build.backbone.few_step_sigmas(cfg.sampler.steps),
        cfg.sampler.eta,
        min(cfg.train.micro, 64),
    )
    rewards = build_rewards(watched, build.backbone.device) if watched else None
    ema = build.stage.roles.ema

    def sample(done: int) -> None:
        if pictures:
            images = fixed.images(ema, min(cfg.log.samples, len(prompts)))
            save_grid(images, out / "samples" / f"step-{done:06d}.png")

    def watch(done: int) -> dict[str, float]:
        assert rewards is not None
        return held_out(fixed, ema, rewards, min(cfg.watch.prompts, len(prompts)))

    return Hooks(
        progress=progress,
        sample=sample,
        watch=watch,
        sample_every=cfg.log.samples_every if pictures else 0,
        watch_every=cfg.watch.every if rewards else 0,
    )


def held_out(
    fixed: FixedPrompts, role: Role, rewards: RewardMixture, count: int
) -> dict[str, float]:
    """The mean of each held-out reward on the fixed prompts and noise."""
    images = fixed.images(role, count).to(role.backbone.device)
    chosen = fixed.encoded.prompts[:count]
    scores = rewards.score(images, [p.text for p in chosen], [p.metadata for p in chosen])
    return {f"held_out/{name}": float(values.mean()) for name, values in scores.items()}


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


SHOWN: Sequence[str] = ("generator/matching", "fake_score/ambient")


def _show(bar: Progress, task, done: int, metrics: dict[str, float], console: Console) -> None:  # type: ignore[no-untyped-def]
    """Moves the bar; where there is no terminal, prints a line instead."""
    names = [n for n in metrics if n.startswith("reward/")] or [n for n in SHOWN if n in metrics]
    note = "  ".join(f"{name.split('/')[-1]} {metrics[name]:.4g}" for name in names)
    bar.update(task, completed=done, note=note)
    if not console.is_terminal:
        left = bar.tasks[task].time_remaining
        console.print(f"step {done}  {note}" + (f"  left {left:.0f} s" if left else ""))
