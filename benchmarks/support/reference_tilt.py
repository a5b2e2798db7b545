"""An epoch of stage 2 as the authors' trainer runs it, and as ours does, on the same work.

Beside what is replaced in stage 1 (`reference.py`): no adapter is loaded, the scorer is the small
packaged CLIP behind their interface, `_split_prompt_batch` is made a static method (as it stands
the first batch is a TypeError), and on a CPU the modules' `torch.device("cuda")` is the CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from support.reference_parts import (
    PUBLISHED,
    Bench,
    HostTorch,
    on_device,
    parts,
    prompts,
    their_config,
)
from tiltflow.config.load import RunConfig
from tiltflow.rewards.zoo.clip_family import CLIPScore
from tiltflow.setup.build import attention_for

BATCH, GROUP = 16, 8
CLIP = "packaged:clip"
MODULES = ("base_trainer", "grpo_trainer", "rtdmd_trainer", "ac_dmd_mixin", "bp_mixin")
Epoch = Callable[[int], None]


def settings(bench: Bench, *more: str) -> list[str]:
    return bench.settings(
        "model.dtype=fp32",
        f"tilt.group_size={GROUP}",
        f"tilt.decode_chunk={bench.batch}",
        f"rewards={{clipscore: {{weight: 1.0, path: '{CLIP}'}}}}",
        *more,
    )


def tilt_of_ours(bench: Bench, *more: str) -> Epoch:
    values = settings(bench, *more)
    build, cfg = bench.model.build("tilt", *values), bench.model.config("tilt", *values)

    def run(number: int) -> None:
        with attention_for(cfg, bench.model.device):
            build.stage.iteration(number)

    return run


def tilt_of_theirs(bench: Bench, folder: Path) -> Epoch:
    """Epochs of the authors' trainer at `folder`, with their published settings at our sizes."""
    cfg = bench.model.config("tilt", *settings(bench))
    trainer = tilt_trainer_of_theirs(bench, folder, cfg, CLIPScore(CLIP, bench.model.device))
    known = prompts(bench, cfg)
    trainer._encode_prompts = lambda batch: (known[0][: len(batch)], known[1][: len(batch)])
    trainer._uncond_embeds = (known[0][-1:], known[1][-1:])

    def run(number: int) -> None:
        epoch_of_theirs(bench, trainer, number)

    return run


def tilt_trainer_of_theirs(
    bench: Bench, folder: Path, cfg: RunConfig, reward: CLIPScore, **overrides: Any
) -> Any:
    """Their trainer of stage 2, ready to run, with the networks of our `cfg`."""
    trainer_of = import_module("rtdmd.trainers.rtdmd_trainer").RTDMDTrainer
    grpo = import_module("rtdmd.trainers.grpo_trainer")
    theirs = their_config(bench, folder, "rtdmd", **(_sizes(bench) | overrides))
    loaded = parts(bench, cfg)
    loaded["vae"] = copy.deepcopy(bench.model.backbone(cfg).vae)
    plain = copy.deepcopy(loaded["transformer"])
    split = grpo.GRPOTrainer._split_prompt_batch
    grpo.GRPOTrainer._split_prompt_batch = staticmethod(split)
    trainer, loader = trainer_of(theirs), PUBLISHED[bench.model.name][1]
    with surroundings(bench), ExitStack() as stack:
        stack.enter_context(patch.object(grpo, loader, lambda _: loaded))
        stack.enter_context(patch.object(trainer_of, "_wrap_models", lambda *_: None))
        one = lambda *_, **__: copy.deepcopy(plain)  # noqa: E731
        stack.enter_context(patch.object(trainer_of, "_load_pretrained_transformer", one))
        trainer.setup_models()
        trainer.setup_optimizers()
    trainer._scorer = Scorer(reward)
    return trainer


def epoch_of_theirs(bench: Bench, trainer: Any, number: int, seen: HostTorch | None = None) -> None:
    """One epoch; their modules see `seen` as torch."""
    chosen = trainer.config.grpo
    empty = trainer._get_uncond_embeds(bench.batch)
    steps = trainer._resolve_step_selection(chosen)
    clip = (chosen.clip_range_lt, chosen.clip_range_gt)
    trainer._grpo_epoch = number
    with surroundings(bench, seen), ThreadPoolExecutor(1) as workers:
        metrics = trainer._run_grpo_epoch(
            chosen, nullcontext, workers, *empty, *empty, 4, *clip, step_sel_config=steps
        )
    assert metrics["num_samples_after_filter"] == bench.batch, "samples were left out"


def _sizes(bench: Bench) -> dict[str, Any]:
    """No process group: on one device their strategy is `ddp`, which wraps nothing."""
    batch = bench.batch
    return {
        "model__dtype": "fp32",
        "model__generator_lora__load_path": "",
        "model__fake_score_lora__load_path": "",
        "distributed__strategy": "ddp",
        "grpo__reward_fn": {"clipscore": 1.0},
        "grpo__num_batches_per_epoch": 1,
        "grpo__gradient_accumulation_steps": 1,
        "grpo__sample_batch_size": batch,
        "grpo__train_batch_size": batch,
        "grpo__num_image_per_prompt": GROUP,
        "grpo__vae_decode_batch_size": batch,
        "grpo__last_step_loss__fake_score_batch_size": batch,
        "prompt_path": str(bench.model.folder / "prompts.txt"),
    }


class Scorer:
    """CLIP as their scorer of several rewards and as the one that gradients go through."""

    def __init__(self, reward: CLIPScore) -> None:
        self._backend = Backend(reward)
        self.score_fns = {"clipscore": self._backend}

    def to(self, device: object) -> None:
        """It stays where it is."""

    @torch.no_grad()
    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: object = None
    ) -> tuple[dict[str, Any], None]:
        shown = (images * 255).round().clamp(0, 255) / 255
        given = self._backend.processor(text=list(prompts))
        made = self._backend.model(pixel_values=self._backend._process(shown), **given)
        scores = (made.logits_per_image.diagonal() / 100).cpu().numpy()
        return {"clipscore": scores, "mean": scores}, None


class Backend(nn.Module):
    """What their gradient of CLIPScore asks of a model."""

    def __init__(self, reward: CLIPScore) -> None:
        super().__init__()
        self.model, self._process = reward.model, reward.preprocessing
        self._words, self._context = reward.tokenizer, reward.context

    def processor(self, text: list[str], **_: Any) -> dict[str, Tensor]:
        made = self._words(
            text,
            padding="max_length",
            max_length=self._context,
            truncation=True,
            return_tensors="pt",
        )
        return {name: made[name] for name in ("input_ids", "attention_mask")}


@contextmanager
def surroundings(bench: Bench, seen: HostTorch | None = None) -> Iterator[None]:
    """What their modules have around them; on a CPU `seen` is their torch."""
    with on_device(bench.model.device), ExitStack() as stack:
        if bench.model.device.type == "cpu":
            for name in MODULES:
                module = import_module(f"rtdmd.trainers.{name}")
                stack.enter_context(patch.object(module, "torch", seen or HostTorch()))
        yield
