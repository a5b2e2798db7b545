"""An epoch of stage 2 as the authors' trainer runs it, and as ours does, on the same work.

Beside what is replaced in stage 1 (`reference.py`): no adapter is loaded, the scorer is the small
packaged CLIP behind their interface, `_split_prompt_batch` is made a static method (as it stands
the first batch is a TypeError), and on a CPU the modules' `torch.device("cuda")` is the CPU.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from support.reference_parts import Bench, on_device, parts, prompts
from tiltflow.rewards.zoo.clip_family import CLIPScore
from tiltflow.setup.build import attention_for

BATCH, GROUP = 16, 8
CLIP = "packaged:clip"
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
    sys.path.insert(0, str(folder))
    trainer_of = import_module("rtdmd.trainers.rtdmd_trainer").RTDMDTrainer
    grpo = import_module("rtdmd.trainers.grpo_trainer")
    cfg = bench.model.config("tilt", *settings(bench))
    theirs = import_module("rtdmd.config").RTDMDConfig.from_yaml(
        str(folder / "configs" / "rtdmd" / "sd35m.yaml"), overrides=_overrides(bench)
    )
    loaded = parts(bench, cfg)
    loaded["vae"] = copy.deepcopy(bench.model.backbone(cfg).vae)
    plain = copy.deepcopy(loaded["transformer"])
    split = grpo.GRPOTrainer._split_prompt_batch
    grpo.GRPOTrainer._split_prompt_batch = staticmethod(split)
    trainer = trainer_of(theirs)
    known = prompts(bench, cfg)
    with _surroundings(bench), ExitStack() as stack:
        stack.enter_context(patch.object(grpo, "load_sd35_models", lambda _: loaded))
        stack.enter_context(patch.object(trainer_of, "_wrap_models", lambda *_: None))
        one = lambda *_, **__: copy.deepcopy(plain)  # noqa: E731
        stack.enter_context(patch.object(trainer_of, "_load_pretrained_transformer", one))
        trainer.setup_models()
        trainer.setup_optimizers()
    trainer._encode_prompts = lambda batch: (known[0][: len(batch)], known[1][: len(batch)])
    trainer._uncond_embeds = (known[0][-1:], known[1][-1:])
    trainer._scorer = Scorer(CLIPScore(CLIP, bench.model.device))
    chosen = theirs.grpo
    workers, empty = ThreadPoolExecutor(1), trainer._get_uncond_embeds(bench.batch)
    steps = trainer._resolve_step_selection(chosen)
    clip = (chosen.clip_range_lt, chosen.clip_range_gt)

    def run(number: int) -> None:
        trainer._grpo_epoch = number
        with _surroundings(bench):
            seen = trainer._run_grpo_epoch(
                chosen, nullcontext, workers, *empty, *empty, 4, *clip, step_sel_config=steps
            )
        assert seen["num_samples_after_filter"] == bench.batch, "samples were left out"

    return run


def _overrides(bench: Bench) -> dict[str, Any]:
    batch = bench.batch
    return {
        "model.image_resolution": bench.side,
        "model.dtype": "fp32",
        "model.generator_lora.load_path": "",
        "model.fake_score_lora.load_path": "",
        "grpo.reward_fn": {"clipscore": 1.0},
        "grpo.num_batches_per_epoch": 1,
        "grpo.gradient_accumulation_steps": 1,
        "grpo.sample_batch_size": batch,
        "grpo.train_batch_size": batch,
        "grpo.num_image_per_prompt": GROUP,
        "grpo.vae_decode_batch_size": batch,
        "grpo.last_step_loss.fake_score_batch_size": batch,
        "prompt_path": str(bench.model.folder / "prompts.txt"),
        "logging.enabled": False,
        "eval.enabled": False,
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


class _Torch:
    """torch as a module sees it whose device is the CPU whatever it names."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def device(self, *_: object) -> torch.device:
        return torch.device("cpu")


@contextmanager
def _surroundings(bench: Bench) -> Iterator[None]:
    with on_device(bench.model.device), ExitStack() as stack:
        if bench.model.device.type == "cpu":
            for name in (
                "base_trainer",
                "grpo_trainer",
                "rtdmd_trainer",
                "ac_dmd_mixin",
                "bp_mixin",
            ):
                module = import_module(f"rtdmd.trainers.{name}")
                stack.enter_context(patch.object(module, "torch", _Torch()))
        yield
