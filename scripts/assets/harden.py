"""The trained reward made sturdy: right against wrong images of a caption, under attack.

A reward whose gradient is followed needs more than the right ranking of captions. Trained on
clean renders alone, it has a gradient of small, scattered changes that raise the score and leave
the picture as it is, and nothing tells it that "a square" is not a red one. Relations ("left of")
all learn here: first the places that images show and captions tell (`PlaceHeads`), the contrast of
captions weighing little, then both together. The text towers of the pipeline have the first part
only; before it, turning a relation round changed a twelfth of their embeddings, after it all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import CLIPModel, CLIPTokenizer

from assets.clip import (
    NEGATIVES,
    Features,
    PlaceHeads,
    by_caption,
    contrast,
    degrade,
    features,
    load,
    normalise,
    scale_of,
    tokenize,
    verdict,
)
from assets.data import near_miss, render_pool
from assets.train import batches, fit, tensor_images
from tiltflow.rewards.worlds import shapes
from tiltflow.rewards.worlds.shapes import Caption, Scene

RADIUS = 2.5
"""The greatest change of an image under attack: L2, of 64 × 64 × 3 values in [0, 1]."""
PAIR_WEIGHT = 3.0


@dataclass(frozen=True)
class Sitting:
    """A step has `batch` renders, half of them of relations, and `pairs` captions with a right and
    a wrong image; images change by up to `radius`; the losses of captions weigh `contrast`."""

    steps: int
    batch: int
    pairs: int
    seed: int
    radius: float = RADIUS
    contrast: float = 1.0


PLACES = Sitting(500, 64, 0, 23, radius=0.0, contrast=0.1)
SITTINGS = {
    "clip": (PLACES, Sitting(1000, 48, 24, 123)),
    "clip_heldout": (replace(PLACES, seed=24), Sitting(600, 64, 0, 124, radius=0.0)),
    "encoder_a": (replace(PLACES, seed=321),),
    "encoder_b": (replace(PLACES, seed=322),),
}


def spoil(scene: Scene, relation: bool, rng: np.random.Generator) -> Scene:
    """The scene with one thing changed, so that a caption that it followed is wrong.

    Where the caption has a `relation`, the two objects may also have changed places.
    """
    objects = list(scene.objects)
    at = int(rng.integers(len(objects)))
    changed = objects[at]
    options = ["shape", "colour", "colour"] + ["drop"] * (len(objects) > 1)
    free = shapes.free_places(scene)
    options += ["add", "add"] * bool(free)
    if len(objects) == 2 and all(
        getattr(objects[0], key) != getattr(objects[1], key) for key in ("shape", "colour")
    ):
        options += ["swap", "swap"] + ["mirror"] * (4 * relation)
    change = options[rng.integers(len(options))]
    if change == "shape":
        objects[at] = replace(changed, shape=_other(shapes.SHAPES, changed.shape, rng))
    elif change == "colour":
        objects[at] = replace(changed, colour=_other(shapes.COLOURS, changed.colour, rng))
    elif change == "drop":
        del objects[at]
    elif change == "swap":
        a, b = objects
        objects = [replace(a, colour=b.colour), replace(b, colour=a.colour)]
    elif change == "mirror":
        a, b = objects
        objects = [replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y)]
    else:
        kind = (changed.shape, changed.colour)
        if rng.random() < 0.5:
            kind = (str(rng.choice(list(shapes.SHAPES))), str(rng.choice(list(shapes.COLOURS))))
        objects.append(shapes.place(kind, free[rng.integers(len(free))], rng))
    return replace(scene, objects=tuple(objects))


def _other(options, current: str, rng: np.random.Generator) -> str:
    return str(rng.choice([value for value in options if value != current]))


def pair_images(
    captions: list[Caption], rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A better and a worse image of each caption: 2 × (n, 3, 64, 64) in [0, 1].

    Blends of a right scene and a spoilt one, as a student's samples are; the better one has less
    of the spoilt scene in it, half of the time nothing.
    """
    better, worse = [], []
    for caption in captions:
        scene = shapes.sample_scene(caption, rng)
        right, wrong = (
            shapes.render(s).astype(np.float32) / 255
            for s in (scene, spoil(scene, caption.relation is not None, rng))
        )
        near = rng.uniform(0, 0.3) * (rng.random() < 0.5)
        far = rng.uniform(near + 0.2, 1.0) if rng.random() < 0.6 else 1.0
        better.append(right + near * (wrong - right))
        worse.append(right + far * (wrong - right))
    made = [torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) for images in (better, worse)]
    return made[0], made[1]


def preference(
    image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, pairs: int
) -> torch.Tensor:
    """Bradley-Terry loss (pairs,) of the last 2 · `pairs` images, better ones first."""
    own = text[len(text) - pairs :]
    better, worse = image[len(image) - 2 * pairs :].split(pairs) if pairs else (image[:0],) * 2
    return F.softplus(scale * ((worse - better) * own).sum(1))


def attack(
    model: CLIPModel,
    images: torch.Tensor,
    ids: torch.Tensor,
    sitting: Sitting,
    generator: torch.Generator,
) -> torch.Tensor:
    """The images changed by up to the sitting's radius: one gradient step from a random start,
    uphill in the losses; the radius is drawn for each image, so that some stay as they were."""

    def norm(x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1).norm(dim=1).view(-1, 1, 1, 1) + 1e-12

    radius = sitting.radius * torch.rand(len(images), 1, 1, 1, generator=generator)
    start = torch.randn(images.shape, generator=generator)
    start = 0.5 * radius * start / norm(start)
    moved = (images + start).requires_grad_(True)
    scale = scale_of(model).detach()
    image, text, _ = features(model, normalise(moved), ids)
    n = sitting.batch
    loss = (
        verdict(image[:n], text, scale).sum() + preference(image, text, scale, sitting.pairs).sum()
    )
    (gradient,) = torch.autograd.grad(loss, moved)
    change = start + radius * gradient / norm(gradient)
    return images + change * (radius / torch.maximum(norm(change), radius + 1e-12))


def harden_clip(name: str, work: Path, tokenizer: CLIPTokenizer) -> CLIPModel:
    """Goes on from the model in work/name, through its sittings."""
    model = load(work, name)
    for number, sitting in enumerate(SITTINGS[name]):
        _sit(f"{name}_hardened_{number}", model, sitting, work, tokenizer)
    return model.eval()


def _sit(
    label: str, model: CLIPModel, sitting: Sitting, work: Path, tokenizer: CLIPTokenizer
) -> None:
    images, texts = render_pool(work, "pool")
    captions = by_caption(texts)
    torch.manual_seed(sitting.seed)  # for the heads' first weights
    helper = PlaceHeads(model, work)
    trained = [*model.parameters(), *helper.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=5e-4, betas=(0.9, 0.98), weight_decay=0.02)
    n = sitting.batch
    related = torch.tensor([i for i, c in enumerate(captions) if c.relation is not None])

    def loss(generator: torch.Generator, step: int) -> torch.Tensor:
        index = batches(len(texts), n, generator)
        index[: n // 2] = related[batches(len(related), n // 2, generator)]
        index = index.sort().values.numpy()
        rng = np.random.default_rng([sitting.seed, step])
        x = degrade(tensor_images(np.asarray(images[index])), generator)
        own = [texts[i] for i in index]
        wrong = [near_miss(captions[i], rng) for i in index for _ in range(NEGATIVES)]
        chosen = [captions[int(i)] for i in rng.integers(len(captions), size=sitting.pairs)]
        if chosen:
            x = torch.cat([x, degrade(torch.cat(pair_images(chosen, rng)), generator)])
        ids = tokenize(tokenizer, [*own, *wrong, *(c.text for c in chosen)])
        if sitting.radius:
            x = attack(model, x, ids, sitting, generator)
        image, text, patches = features(model, normalise(x), ids)
        scale = scale_of(model)
        total = contrast(image[:n], text[: n * (1 + NEGATIVES)], own, scale)
        if chosen:
            total = total + PAIR_WEIGHT * preference(image, text, scale, sitting.pairs).mean()
        own_features = Features(image[:n], text[:n], patches[:n])
        placed = helper.loss(own_features, index, [captions[i] for i in index])
        return sitting.contrast * total + placed

    fit(
        label,
        {"clip": model, "helper": helper},
        [optimizer],
        loss,
        sitting.steps,
        work,
        sitting.seed,
    )


@torch.no_grad()
def pair_accuracy(model: CLIPModel, tokenizer: CLIPTokenizer, n: int = 512) -> float:
    """How often the better of two images of a held-out caption scores higher."""
    rng = np.random.default_rng(98)
    captions = shapes.balanced(True, n)
    better, worse = pair_images(captions, rng)
    image, text, _ = features(
        model,
        normalise(torch.cat([better, worse])),
        tokenize(tokenizer, [c.text for c in captions]),
    )
    return float((preference(image, text, scale_of(model), n) < np.log(2)).float().mean())
