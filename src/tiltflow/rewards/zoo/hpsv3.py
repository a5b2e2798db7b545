"""HPSv3: a Qwen2-VL with a reward head (Ma et al., arXiv 2508.03789).

Every number here is what the published checkpoint was trained with, and is found in the
MizzenAI/HPSv3 repository: `hpsv3/inference.py`, `hpsv3/train.py`, `hpsv3/model/qwen2vl_trainer.py`,
`hpsv3/config/HPSv3_7B.yaml`. The instruction is the authors' prose and is not kept here: it is read
from a file that the user makes from `hpsv3/dataset/data_collator_qwen.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

from tiltflow.core.paths import resolve_path
from tiltflow.rewards.base import Metadata
from tiltflow.rewards.weights import (
    absent,
    dtype_of,
    from_state,
    frozen,
    load_exactly,
    read_state_dict,
    weights_file,
)
from tiltflow.rewards.zoo.qwen import QwenPreprocessing, QwenText

HPSV3 = "MizzenAI/HPSv3"
HPSV3_FILE = "HPSv3.safetensors"
QWEN2_VL = "Qwen/Qwen2-VL-7B-Instruct"
PIXELS = 256 * 28 * 28  # least and most at once: every image is about 448 × 448
REWARD_TOKEN = "<|Reward|>"

PLACE = "{prompt}"


def read_instruction(path: str | None) -> tuple[str, str]:
    """What stands before and after the prompt in the instruction HPSv3 was trained with.

    The file is the authors' text, white space at the ends of lines and all, with `{prompt}` where
    the prompt goes and the reward token after it.

    Raises:
        ValueError: if no file is given, or it cannot be read or lacks either mark.
    """
    if path is None:
        raise ValueError(
            "hpsv3 needs the instruction it was trained with: "
            "rewards.hpsv3.options.instruction=FILE (docs/rewards.md says where to find it)"
        )
    try:
        before, found, after = Path(path).read_text(encoding="utf-8").partition(PLACE)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"hpsv3's instruction {path!r} cannot be read ({error})") from error
    if not found or after.count(REWARD_TOKEN) != 1 or REWARD_TOKEN in before:
        raise ValueError(
            f"hpsv3's instruction {path!r} must hold {PLACE} and, after it, {REWARD_TOKEN} once"
        )
    return before, after


def without_token(prompt: str) -> str:
    """The prompt; a ValueError if it holds the token at which the score is read."""
    if REWARD_TOKEN in prompt:
        raise ValueError(f"the prompt {prompt!r} has {REWARD_TOKEN} in it")
    return prompt


def reward_head(width: int) -> nn.Sequential:
    """`rm_head` of the checkpoint: width → 1024 → 16 → (mean, spread). Its dropout does nothing."""
    return nn.Sequential(
        nn.Linear(width, 1024),
        nn.ReLU(),
        nn.Identity(),
        nn.Linear(1024, 16),
        nn.ReLU(),
        nn.Linear(16, 2),
    )


def split_keys(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The checkpoint's weights as those of a `Qwen2VLModel` and of the reward head.

    Takes the names of transformers before 4.52 (`visual.`, `model.layers.`) and since
    (`model.visual.`, `model.language_model.layers.`); the language head, which is not used, is
    left out.

    Raises:
        ValueError: on a key of neither.
    """
    model: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.startswith("rm_head."):
            head[key.removeprefix("rm_head.")] = value.float()
        elif re.match(r"(model\.)?visual\.|model\.language_model\.", key):
            model[key.removeprefix("model.")] = value
        elif key.startswith("model."):
            model["language_model." + key.removeprefix("model.")] = value
        elif key != "lm_head.weight":
            raise ValueError(f"{key} is no weight of HPSv3")
    return model, head


class HPSv3:
    """μ, the mean of the predicted preference, about −5 to 15; differentiable.

    `path` is the published checkpoint, or a directory or hub id that holds `file`; `base` the
    Qwen2-VL that gives configuration, tokenizer and image processor; its weights are not read;
    `instruction` the file of `read_instruction`.
    The network runs in `dtype` (published: bf16), the head in fp32.

    Raises:
        ValueError: if any of them cannot be loaded, or they do not fit together.
    """

    name = "hpsv3"
    differentiable = True
    domain = "images"
    at_once = 1  # a text is padded to the longest beside it

    def __init__(
        self,
        path: str = HPSV3,
        device: str | torch.device = "cpu",
        *,
        base: str = QWEN2_VL,
        file: str = HPSV3_FILE,
        instruction: str | None = None,
        dtype: str = "bf16",
    ) -> None:
        self.before, self.after = read_instruction(instruction)
        precision = dtype_of(dtype)
        weights, head = split_keys(read_state_dict(weights_file(path, file)))
        self.text = QwenText(base, device)
        self.text.tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
        self.reward_token = self.text.tokenizer.convert_tokens_to_ids(REWARD_TOKEN)
        self.preprocessing = replace(
            QwenPreprocessing.from_pretrained(base), least=PIXELS, most=PIXELS
        )
        config = _config(base, weights)
        if self.reward_token >= config.text_config.vocab_size:
            raise ValueError(f"the tokenizer at {base!r} has more tokens than HPSv3's checkpoint")
        self.model: Any = from_state(Qwen2VLModel, config, weights, "HPSv3's checkpoint", precision)
        self.model = frozen(self.model, device, precision)
        reward = reward_head(config.text_config.hidden_size)
        load_exactly(reward, head, "HPSv3's reward head")
        self.head = frozen(reward, device, torch.float32)
        self.device = torch.device(device)

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        for prompt in prompts:
            without_token(prompt)
        count = self.preprocessing.tokens(*images.shape[-2:])
        tokens = self.text([self.before + p + self.after for p in prompts], count)
        with torch.autocast(self.device.type, enabled=False):
            patches, grid = self.preprocessing(images.to(self.device, torch.float32))
            # HPSv3 embeds before it calls the model, which then counts positions along the
            # sequence, as in text: not Qwen2-VL's positions in rows and columns.
            places = torch.arange(tokens.input_ids.shape[1], device=self.device)
            hidden = self.model(
                input_ids=tokens.input_ids,
                attention_mask=tokens.attention_mask,
                position_ids=places.expand(3, len(prompts), -1),
                pixel_values=patches,
                image_grid_thw=grid,
                mm_token_type_ids=tokens.types,
                use_cache=False,
            ).last_hidden_state
            at = (tokens.input_ids == self.reward_token).int().argmax(1)
            rows = torch.arange(len(prompts), device=self.device)
            scores: Tensor = self.head(hidden[rows, at].float())[:, 0]
        return scores.to(images.device)


def _config(base: str, weights: Mapping[str, Tensor]) -> Any:
    """The base's configuration with the vocabulary of the checkpoint."""
    words = "language_model.embed_tokens.weight"
    if words not in weights:
        raise ValueError(f"HPSv3's checkpoint lacks {words}")
    try:
        config: Any = AutoConfig.from_pretrained(resolve_path(base))
    except (OSError, ValueError) as error:
        raise ValueError(absent("Qwen2-VL", base, error)) from error
    if config.model_type != "qwen2_vl":
        raise ValueError(f"{base!r} is a {config.model_type}, not a Qwen2-VL")
    config.text_config.vocab_size = weights[words].shape[0]
    return config
