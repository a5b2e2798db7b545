"""A tiny LLaVA in the published format, which can be taught to tell colours."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_rewards import redraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

Lesson = tuple[list[Tensor], str, str]
"""Images (3, H, W), question, answer."""
SIDE, ROUNDS, KNOWN = 28, 600, 0.01
"""An image's side; most rounds over the lessons; the mean loss of a token that is known."""
TEMPLATE = (
    "{% for message in messages %}<user>{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, and a few that are special."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<pad>")
    fast.add_special_tokens({"additional_special_tokens": ["<image>", "<user>", "<assistant>"]})
    return fast


def build(place: Path, lessons: list[Lesson] | None = None, seed: int = 0) -> Path:
    """Writes the model to `place`, taught the lessons if there are any."""
    words = tokenizer()
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=SIDE,
                patch_size=SIDE // 2,
            ).to_dict(),
            text_config=LlamaConfig(
                vocab_size=len(words) + 3,  # as published models have: more rows than words
                hidden_size=48,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=4,
                eos_token_id=words.eos_token_id,
                pad_token_id=words.pad_token_id,
                bos_token_id=None,
            ).to_dict(),
            image_token_index=words.convert_tokens_to_ids("<image>"),
            vision_feature_layer=-1,
        )
    )
    redraw(model.model.vision_tower, 0.3)
    # A published model's own settings sample.
    model.generation_config.do_sample, model.generation_config.temperature = True, 1.5
    model.generation_config.repetition_penalty = 1.3
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
        ),
        tokenizer=words,
        patch_size=SIDE // 2,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    if lessons:
        teach(model, processor, lessons)
    model.save_pretrained(place)
    processor.save_pretrained(place)
    return place


def teach(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, lessons: list[Lesson]
) -> None:
    """By heart; lessons of as many images are of one length, and seen together.

    How many rounds that takes depends on the machine's rounding: it goes on until all are known.
    """
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    slower = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, ROUNDS)
    batches = []
    for count in sorted({len(images) for images, _, _ in lessons}):
        alike = [lesson for lesson in lessons if len(lesson[0]) == count]
        texts = [
            f"<user>{'<image>' * count}{question}<end><assistant>{answer}<end>"
            for _, question, answer in alike
        ]
        images = [image for lesson in alike for image in lesson[0]]
        inputs = processor(images=images, text=texts, return_tensors="pt", do_rescale=False)
        labels = inputs.input_ids.clone()
        labels[:, : -len(alike[0][2]) - 1] = -100
        batches.append((inputs, labels))
    for _ in range(ROUNDS):
        losses = []
        for inputs, labels in batches:
            loss = model(**inputs, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        slower.step()
        if max(losses) < KNOWN:
            return
    raise RuntimeError(f"the lessons were not learnt: losses of {losses} in {ROUNDS} rounds")
