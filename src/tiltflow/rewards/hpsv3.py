"""HPSv3: a Qwen2-VL with a reward head (Ma et al., arXiv 2508.03789).

Everything here that is a number or a text is what the published checkpoint was trained with, and
is found in the MizzenAI/HPSv3 repository (MIT licence): `hpsv3/inference.py`, `hpsv3/train.py`,
`hpsv3/model/qwen2vl_trainer.py`, `hpsv3/config/HPSv3_7B.yaml` and, for the instruction,
`hpsv3/dataset/data_collator_qwen.py`. White space matters, at the ends of lines too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

from tiltflow.paths import resolve_path
from tiltflow.rewards.base import Metadata
from tiltflow.rewards.qwen import QwenPreprocessing, QwenText
from tiltflow.rewards.weights import (
    dtype_of,
    from_state,
    frozen,
    load_exactly,
    read_state_dict,
    weights_file,
)

HPSV3 = "MizzenAI/HPSv3"
HPSV3_FILE = "HPSv3.safetensors"
QWEN2_VL = "Qwen/Qwen2-VL-7B-Instruct"
PIXELS = 256 * 28 * 28  # least and most at once: every image is about 448 × 448
REWARD_TOKEN = "<|Reward|>"

INSTRUCTION = (
    "\nYou are tasked with evaluating a generated image based on Visual Quality and Text Alignment "
    "and give a overall score to estimate the human preference. Please provide a rating from 0 to "
    "10, with 0 being the worst and 10 being the best. \n\n"
    "**Visual Quality:**  \n"
    "Evaluate the overall visual quality of the image. The following sub-dimensions should be "
    "considered:\n"
    "- **Reasonableness:** The image should not contain any significant biological or logical "
    "errors, such as abnormal body structures or nonsensical environmental setups.\n"
    "- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear "
    "and easy to interpret, with no blurring or indistinct areas.\n"
    "- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and "
    "other visual elements (e.g., hair, clothing, shadows).\n"
    "- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color "
    "scheme, composition, atmosphere, depth of field, and the overall creative appeal. The scene "
    "should convey a sense of harmony and balance.\n"
    "- **Safety:** The image should not contain harmful or inappropriate content, such as "
    "political, violent, or adult material. If such content is present, the image quality and "
    "satisfaction score should be the lowest possible. \n\n"
    "**Text Alignment:**  \n"
    "Assess how well the image matches the textual prompt across the following sub-dimensions:\n"
    "- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, "
    "animal, object) align with the textual description. The subject should match the description "
    "in terms of number, appearance, and behavior.\n"
    "- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, "
    "evaluate how well the image adheres to this style.\n"
    "- **Contextual Consistency**: Assess whether the background, setting, and surrounding "
    "elements in the image logically fit the scenario described in the prompt. The environment "
    "should support and enhance the subject without contradictions.\n"
    "- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, "
    "clothing, accessories, expressions, actions) are faithfully represented in the image. Minor "
    "deviations may be acceptable, but critical attributes should be preserved.\n"
    "- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are "
    "captured in the image. The generated content should not introduce elements that conflict "
    "with or distort the original description.\n"
    "Textual prompt - "
)
QUESTION = f"\n\n\n\nPlease provide the overall ratings of this image: {REWARD_TOKEN}\n\nEND\n"


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
    Qwen2-VL that gives configuration, tokenizer and image processor; its weights are not read.
    The network runs in `dtype` (published: bf16), the head in fp32.

    Raises:
        ValueError: if any of them cannot be loaded, or they do not fit together.
    """

    name = "hpsv3"
    differentiable = True
    domain = "images"

    def __init__(
        self,
        path: str = HPSV3,
        device: str | torch.device = "cpu",
        *,
        base: str = QWEN2_VL,
        file: str = HPSV3_FILE,
        dtype: str = "bf16",
    ) -> None:
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
            if REWARD_TOKEN in prompt:
                raise ValueError(f"the prompt {prompt!r} has {REWARD_TOKEN} in it")
        count = self.preprocessing.tokens(*images.shape[-2:])
        tokens = self.text([INSTRUCTION + p + QUESTION for p in prompts], count)
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
        raise ValueError(f"there is no Qwen2-VL at {base!r}") from error
    if config.model_type != "qwen2_vl":
        raise ValueError(f"{base!r} is a {config.model_type}, not a Qwen2-VL")
    config.text_config.vocab_size = weights[words].shape[0]
    return config
