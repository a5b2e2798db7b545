"""The CLIP models of the world, and their tokenizer: two architectures, two seeds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTextModelWithProjection, CLIPTokenizer

from assets.data import near_miss, place_labels, render_pool, sample_captions
from assets.train import autocast, batches, fit, tensor_images
from tiltflow.rewards.worlds import shapes
from tiltflow.rewards.worlds.shapes import Caption

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
EYES = {"encoder_a": "clip", "encoder_b": "clip_heldout"}  # for towers that had their own once


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


def load(work: Path, name: str) -> CLIPModel:
    """The model in work/name; a text tower gets the image half of the reward in `EYES`."""
    if name in REWARDS:
        return CLIPModel.from_pretrained(work / name)
    tower = CLIPTextModelWithProjection.from_pretrained(work / name)
    seeing = CLIPModel.from_pretrained(work / EYES[name])
    config = CLIPConfig(
        text_config=tower.config.to_dict(),
        vision_config=seeing.config.vision_config.to_dict(),
        projection_dim=tower.config.projection_dim,
    )
    model = CLIPModel(config)
    rest = {k: v for k, v in seeing.state_dict().items() if not k.startswith("text_")}
    model.load_state_dict(rest | tower.state_dict())
    return model


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
    """Second tasks while a reward model trains: what is where.

    Linear heads, thrown away afterwards. Two name what each patch shows: the shape and the colour
    of the object that its centre lies in, with the quarter of the frame. One reads from pooled
    features, the image's and the caption's alike, where things of each colour and of each shape
    are. A vision transformer of this size learns shapes several times sooner with the first, and
    relations ("left of") not at all without the second: captions alone left them at chance.
    """

    def __init__(self, model: CLIPModel, work: Path) -> None:
        super().__init__()
        width, joint = model.config.vision_config.hidden_size, model.config.projection_dim
        kinds = (len(shapes.SHAPES), len(shapes.COLOURS))
        self.names = nn.ModuleList(nn.Linear(width, 4 * kind + 1) for kind in kinds)
        self.places = nn.Linear(joint, 2 * sum(kinds))
        side = shapes.SIZE // model.config.vision_config.patch_size
        self.labels = place_labels(work, "pool", side)
        centres = 4 * (torch.arange(side) + 0.5) / side - 2  # of a quarter: ±1
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        self.at = torch.stack([x, y], -1).flatten(0, 1)

    def loss(self, seen: Features, index: np.ndarray, captions: list[Caption]) -> torch.Tensor:
        """For the rows `index` of the pool, whose captions come first among the texts."""
        labels = torch.from_numpy(self.labels[index].astype(np.int64))
        quarter = 2 * (self.at[:, 0] > 0) + (self.at[:, 1] > 0)
        total = seen.image.new_zeros(())
        for head, label in zip(self.names, labels.unbind(-1), strict=True):
            there = torch.where(label > 0, 4 * (label - 1) + quarter + 1, 0)
            total = total + F.cross_entropy(head(seen.patches).flatten(0, 1), there.flatten())
        kinds = [head.out_features // 4 for head in self.names]
        shown = torch.cat(
            [F.one_hot(v, k + 1)[..., 1:] for v, k in zip(labels.unbind(-1), kinds, strict=True)],
            -1,
        ).float()  # (n, patches, things)
        count = shown.sum(1)
        place = torch.einsum("nps,pd->nsd", shown, self.at) / count.clamp(min=1)[..., None]
        told = torch.stack([told_places(caption) for caption in captions])
        said = told.isfinite().all(-1)
        text = self._miss(seen.text[: len(captions)], told.nan_to_num(), said)
        return 2 * total + self._miss(seen.image, place, count > 0) + text

    def _miss(self, pooled: torch.Tensor, place: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """Mean squared distance of the places read from `pooled` to those that are known."""
        error = (self.places(10 * pooled).view(place.shape) - place).square().sum(-1)
        return (error * known).sum() / known.sum().clamp(min=1)


def told_places(caption: Caption) -> torch.Tensor:
    """Where a caption puts things of each shape and colour, (things, 2) in ±1, NaN for others."""
    things = (*shapes.SHAPES, *shapes.COLOURS)
    told = torch.full((len(things), 2), torch.nan)
    if caption.relation is not None:
        first = torch.tensor(_TOWARDS[caption.relation])
        for item, place in zip(caption.items, (first, -first), strict=True):
            for name in (item.shape, item.colour):
                told[things.index(name)] = told[things.index(name)].nan_to_num() + place
    return told


_TOWARDS = {
    "left of": (-1.0, 0.0),
    "right of": (1.0, 0.0),
    "above": (0.0, -1.0),
    "below": (0.0, 1.0),
}


class Features(NamedTuple):
    """Pooled features of images (n, D) and texts (m, D), normalised, and the images' patches."""

    image: torch.Tensor
    text: torch.Tensor
    patches: torch.Tensor


def features(model: CLIPModel, x: torch.Tensor, ids: torch.Tensor) -> Features:
    with autocast():
        seen = model.get_image_features(pixel_values=x)
        text = model.get_text_features(input_ids=ids).pooler_output
    image, text = (F.normalize(v.float(), dim=-1) for v in (seen.pooler_output, text))
    return Features(image, text, seen.last_hidden_state[:, 1:].float())


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
        seen = features(model, x, tokenize(tokenizer, own + wrong))
        total = contrast(seen.image, seen.text, own, scale_of(model))
        if helper is None:
            return total
        return total + helper.loss(seen, index, [captions[i] for i in index])

    modules = {"clip": model} | ({"helper": helper} if helper else {})
    fit(name, modules, [optimizer], loss, steps, work, seed)
    return model.eval()


@torch.no_grad()
def hard_accuracy(model: CLIPModel, tokenizer: CLIPTokenizer, n: int = 512) -> float:
    """How often the right caption beats its near misses, on held-out renders."""
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


@torch.no_grad()
def relation_accuracy(model: CLIPModel, tokenizer: CLIPTokenizer, n: int = 512) -> float:
    """How often, of the four relations, a held-out scene's own has the highest score."""
    rng = np.random.default_rng(97)
    captions = [c for c in shapes.balanced(True, 6 * n) if c.relation is not None]
    x = np.stack([shapes.render(shapes.sample_scene(c, rng)) for c in captions])
    texts = [replace(c, relation=relation).text for c in captions for relation in shapes.RELATIONS]
    seen = features(model, normalise(tensor_images(x)), tokenize(tokenizer, texts))
    scores = torch.einsum("bd,bnd->bn", seen.image, seen.text.view(len(captions), 4, -1))
    own = torch.tensor([shapes.RELATIONS.index(str(c.relation)) for c in captions])
    return float((scores.argmax(1) == own).float().mean())
