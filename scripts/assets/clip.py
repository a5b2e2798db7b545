"""The CLIP models of the world, and their tokenizer: two architectures, two seeds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTextModelWithProjection, CLIPTokenizer

from assets.data import near_miss, place_labels, render_pool, sample_captions
from assets.train import autocast, batches, fit, tensor_images
from tiltflow.worlds import shapes
from tiltflow.worlds.shapes import Caption

LENGTH = 12
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
NEGATIVES = 3
# text and vision: (width, layers, heads[, patch]). The encoders' text towers condition the teacher;
# the other two are rewards, and see the objects' places in training (`auxiliary`).
ARCHITECTURES = {
    "encoder_a": dict(
        text=(128, 3, 4), vision=(128, 3, 4, 8), projection=128, seed=21, batch=64, steps=500
    ),
    "encoder_b": dict(
        text=(96, 3, 3), vision=(160, 4, 5, 16), projection=96, seed=22, batch=96, steps=2000
    ),
    "clip": dict(
        text=(128, 2, 4), vision=(128, 3, 4, 8), projection=128, seed=23, batch=64, steps=1300
    ),
    "clip_heldout": dict(
        text=(96, 3, 3), vision=(96, 4, 3, 8), projection=96, seed=24, batch=64, steps=650
    ),
}
REWARDS = ("clip", "clip_heldout")


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer in which every word of the world is one token; BOS, EOS have the top ids."""
    words = sorted({word for c in sample_captions(20_000, 0) for word in c.text.split()})
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=1,
        end_of_word_suffix="</w>",
        initial_alphabet=letters,
        show_progress=False,
    )
    bpe.train_from_iterator([words], trainer)
    state = json.loads(bpe.to_str())["model"]
    vocab = {token: i for i, token in enumerate(state["vocab"])}
    for letter in letters:
        vocab.setdefault(letter, len(vocab))
        vocab.setdefault(letter + "</w>", len(vocab))
    vocab["<|startoftext|>"], vocab["<|endoftext|>"] = len(vocab), len(vocab) + 1
    merges = [tuple(m) for m in state["merges"]]
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH)
    for word in words:
        if len(tokenizer(word).input_ids) != 3:
            raise RuntimeError(f"{word!r} is not one token: {tokenizer.tokenize(word)}")
    return tokenizer


def tokenizer_of(work: Path, name: str) -> CLIPTokenizer:
    """The tokenizer of an earlier model of this name or of the first text tower, or a new one."""
    for earlier in (work / name, work / "encoder_a"):
        if earlier.exists():
            return CLIPTokenizer.from_pretrained(earlier)
    return build_tokenizer()


def text_tower(clip: CLIPModel) -> CLIPTextModelWithProjection:
    """The text half of a CLIP model, as the class that SD3 pipelines hold."""
    tower = CLIPTextModelWithProjection(clip.config.text_config)
    tower.load_state_dict({k: v for k, v in clip.state_dict().items() if k.startswith("text_")})
    return tower.eval()


def new_clip(name: str, tokenizer: CLIPTokenizer) -> CLIPModel:
    plan = ARCHITECTURES[name]
    width, layers, heads = plan["text"]
    v_width, v_layers, v_heads, patch = plan["vision"]
    ids = dict(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=LENGTH,
        projection_dim=plan["projection"],
        **ids,
    )
    vision = dict(
        hidden_size=v_width,
        intermediate_size=4 * v_width,
        num_hidden_layers=v_layers,
        num_attention_heads=v_heads,
        image_size=shapes.SIZE,
        patch_size=patch,
        projection_dim=plan["projection"],
    )
    torch.manual_seed(plan["seed"])
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=plan["projection"])
    return CLIPModel(config)


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    return tokenizer(
        texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
    ).input_ids


def normalise(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (images - mean) / std


def degrade(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Half of the images blurred or noisy, so that the reward is steady on generated images."""
    n = len(images)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    mix = torch.rand(n, 1, 1, 1, generator=generator) * (
        torch.rand(n, 1, 1, 1, generator=generator) < 0.5
    )
    images = images + mix * (blurred - images)
    level = 0.08 * torch.rand(n, 1, 1, 1, generator=generator) ** 2
    return images + level * torch.randn(images.shape, generator=generator)


class PlaceHeads(nn.Module):
    """A second task while a reward model trains: what each patch shows.

    Linear heads name the shape and the colour of the object that a patch's centre lies in; they
    are thrown away afterwards. A vision transformer of this size learns shapes several times
    sooner with them than from captions alone.
    """

    def __init__(self, model: CLIPModel, work: Path) -> None:
        super().__init__()
        width = model.config.vision_config.hidden_size
        self.shape = nn.Linear(width, len(shapes.SHAPES) + 1)
        self.colour = nn.Linear(width, len(shapes.COLOURS) + 1)
        side = shapes.SIZE // model.config.vision_config.patch_size
        self.labels = place_labels(work, "pool", side)

    def loss(self, patches: torch.Tensor, index: np.ndarray) -> torch.Tensor:
        labels = torch.from_numpy(self.labels[index].astype(np.int64))
        by_shape = F.cross_entropy(self.shape(patches).flatten(0, 1), labels[..., 0].flatten())
        by_colour = F.cross_entropy(self.colour(patches).flatten(0, 1), labels[..., 1].flatten())
        return 2 * (by_shape + by_colour)


def features(
    model: CLIPModel, x: torch.Tensor, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Image and text features, normalised, and the image's patch tokens."""
    with autocast():
        seen = model.get_image_features(pixel_values=x)
        text = model.get_text_features(input_ids=ids).pooler_output
    image = F.normalize(seen.pooler_output.float(), dim=-1)
    return image, F.normalize(text.float(), dim=-1), seen.last_hidden_state[:, 1:].float()


def scale_of(model: CLIPModel) -> torch.Tensor:
    return model.logit_scale.exp().clamp(max=100)


def near_miss_logits(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(n, NEGATIVES) logits of n images against their own near misses, which follow their n
    captions in `text`."""
    n = len(image)
    return scale * torch.einsum(
        "bd,bnd->bn", image, text[n : n * (1 + NEGATIVES)].view(n, NEGATIVES, -1)
    )


def verdict(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Cross-entropy (n,) of the right caption among an image's near misses."""
    own = scale * (image * text[: len(image)]).sum(1)
    logits = torch.cat([own[:, None], near_miss_logits(image, text, scale)], 1)
    return F.cross_entropy(logits, torch.zeros(len(image), dtype=torch.long), reduction="none")


def contrast(
    image: torch.Tensor, text: torch.Tensor, texts: list[str], scale: torch.Tensor
) -> torch.Tensor:
    """InfoNCE over the batch both ways, the near misses among the captions, plus `verdict`."""
    n = len(image)
    logits = scale * image @ text[:n].T
    hard = near_miss_logits(image, text, scale)
    # The same caption elsewhere in the batch is no negative.
    same = torch.tensor([[a == b for b in texts] for a in texts])
    same &= ~torch.eye(n, dtype=torch.bool)
    logits = logits.masked_fill(same, -1e4)
    target = torch.arange(n)
    to_text = F.cross_entropy(torch.cat([logits, hard], 1), target)
    return to_text + F.cross_entropy(logits.T, target) + verdict(image, text, scale).mean()


def by_caption(texts: list[str]) -> list[Caption]:
    table = {c.text: c for c in shapes.captions()}
    return [table[text] for text in texts]


def train_clip(name: str, work: Path, tokenizer: CLIPTokenizer) -> CLIPModel:
    """InfoNCE over the batch, plus NEGATIVES near-miss captions an image.

    Goes on from the model in work/name where one is there.
    """
    images, texts = render_pool(work, "pool")
    captions = by_caption(texts)
    model = new_clip(name, tokenizer)
    if (work / name).exists():
        model.load_state_dict(CLIPModel.from_pretrained(work / name).state_dict())
    plan = ARCHITECTURES[name]
    seed, batch, steps = plan["seed"], plan["batch"], plan["steps"]
    helper = PlaceHeads(model, work) if name in REWARDS else None
    trained = [*model.parameters(), *(helper.parameters() if helper else [])]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.02)

    def loss(generator: torch.Generator, step: int) -> torch.Tensor:
        index = batches(len(texts), batch, generator).sort().values.numpy()
        rng = np.random.default_rng([seed, step])
        x = normalise(degrade(tensor_images(np.asarray(images[index])), generator))
        own = [texts[i] for i in index]
        wrong = [near_miss(captions[i], rng) for i in index for _ in range(NEGATIVES)]
        image, text, patches = features(model, x, tokenize(tokenizer, own + wrong))
        total = contrast(image, text, own, scale_of(model))
        return total if helper is None else total + helper.loss(patches, index)

    modules = {"clip": model} | ({"helper": helper} if helper else {})
    fit(name, modules, [optimizer], loss, steps, work, seed)
    return model.eval()


@torch.no_grad()
def hard_accuracy(model: CLIPModel, tokenizer: CLIPTokenizer, n: int = 512) -> float:
    """How often the right caption beats its four near misses, on held-out renders."""
    rng = np.random.default_rng(99)
    captions = shapes.balanced(True, n)
    x = np.stack([shapes.render(shapes.sample_scene(c, rng)) for c in captions])
    image = model.get_image_features(pixel_values=normalise(tensor_images(x))).pooler_output
    texts = [t for c in captions for t in (c.text, *(near_miss(c, rng) for _ in range(NEGATIVES)))]
    text = model.get_text_features(input_ids=tokenize(tokenizer, texts)).pooler_output
    scores = torch.einsum(
        "bd,bnd->bn",
        F.normalize(image, dim=-1),
        F.normalize(text, dim=-1).view(n, NEGATIVES + 1, -1),
    )
    return float((scores.argmax(1) == 0).float().mean())
