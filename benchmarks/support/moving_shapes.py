"""A world of moving shapes: captions, their videos, and exact measures of what a video shows.

A clip has nine frames of 32 × 32 pixels: one coloured shape goes straight over grey. What has a
colour is the shape, so where it is, what colour and shape it has and which way it goes are read off
the pixels, without a network. The measures are rewards as tiltflow takes them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tiltflow.models.medium import VIDEOS

FRAMES, SIDE = 9, 32
COLOURS = {
    "red": (1, 0, 0),
    "green": (0, 1, 0),
    "blue": (0, 0, 1),
    "yellow": (1, 1, 0),
    "magenta": (1, 0, 1),
    "cyan": (0, 1, 1),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
GROUND = 0.5
"""The grey behind."""
RADII, SPEEDS, MARGIN = (3.5, 5.0), (0.6, 1.6), 5.5
"""In pixels: of a circle of the shape's area, a frame's way, and from an edge to a centre."""
MIDDLE = (FRAMES - 1) * sum(SPEEDS) / 2
"""Pixels of a clip at the middle speed."""
COLOURED, SMALLEST = 0.25, 8
"""What spread of a pixel's channels is a colour, and how many such pixels are a shape."""
MOVED = 3.0
"""Pixels from the first frame to the last, below which a shape stands still."""


@dataclass(frozen=True)
class Scene:
    colour: str
    shape: str
    direction: str

    @property
    def text(self) -> str:
        return f"a {self.colour} {self.shape} moves {self.direction}"

    @classmethod
    def of(cls, text: str) -> Scene:
        """The scene that a caption of this world asks for."""
        _, colour, shape, _, direction = text.split()
        return cls(colour, shape, direction)


def scenes(held_out: bool) -> list[Scene]:
    """Of every colour and shape one of the four directions is held out."""
    names = (tuple(COLOURS), SHAPES, tuple(DIRECTIONS))
    places = itertools.product(*(range(len(each)) for each in names))
    return [
        Scene(*(each[i] for each, i in zip(names, at, strict=True)))
        for at in places
        if (sum(at) % len(DIRECTIONS) == 0) == held_out
    ]


def render(asked: Sequence[Scene], generator: torch.Generator) -> Tensor:
    """A video of each, (N, F, 3, H, W) in [0, 1]: size, speed, place and shade are drawn."""
    n = len(asked)

    def drawn(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    radius, way = drawn(*RADII), drawn(*SPEEDS) * (FRAMES - 1)
    across = drawn(MARGIN, SIDE - MARGIN)
    start = MARGIN + (SIDE - 2 * MARGIN - way) * torch.rand(n, generator=generator)
    along = start[:, None] + way[:, None] * torch.linspace(0, 1, FRAMES)
    steps = torch.tensor([DIRECTIONS[each.direction] for each in asked])
    along = torch.where(steps.sum(1)[:, None] < 0, SIDE - along, along)
    across = across[:, None].expand(n, FRAMES)
    sideways = (steps[:, 0] != 0)[:, None]
    centres = torch.stack([torch.where(sideways, along, across),
                           torch.where(sideways, across, along)], -1)  # fmt: skip
    pale, light = drawn(0, 0.3)[:, None], drawn(0.8, 1)[:, None]
    pure = torch.tensor([COLOURS[each.colour] for each in asked]).float()
    colour = light * (pure * (1 - pale) + pale)
    masks = torch.stack([mask(name, centres, radius) for name in SHAPES])
    which = torch.tensor([SHAPES.index(each.shape) for each in asked])
    alpha = masks[which, torch.arange(n)].unsqueeze(2)
    return alpha * colour.view(n, 1, 3, 1, 1) + (1 - alpha) * GROUND


def mask(shape: str, centres: Tensor, radius: Tensor) -> Tensor:
    """How much of each pixel a shape covers, (N, F, H, W): the shape has the area of a circle of
    `radius` (N,), and its centre of mass is at `centres` (N, F, 2)."""
    places = torch.arange(SIDE) + 0.5
    x = places.view(1, 1, 1, -1) - centres[..., 0, None, None]
    y = places.view(1, 1, -1, 1) - centres[..., 1, None, None]
    r = radius.view(-1, 1, 1, 1)
    if shape == "circle":
        outside = (x.square() + y.square()).sqrt() - r
    elif shape == "square":
        outside = torch.maximum(x.abs(), y.abs()) - r * math.sqrt(math.pi) / 2
    else:
        slope = x.abs() * math.sqrt(3) / 2 - y / 2
        outside = torch.maximum(slope, y) - r * math.sqrt(math.pi / (3 * math.sqrt(3)))
    return (0.5 - outside).clamp(0, 1)


@dataclass(frozen=True)
class Seen:
    """What videos (B, F, 3, H, W) show. `there` (B,): a shape is seen in every frame; its `centres`
    (B, F, 2), its `colour` (B, 3) and the `area` (B, F) that it covers, in pixels."""

    there: Tensor
    centres: Tensor
    colour: Tensor
    area: Tensor
    cover: Tensor

    @property
    def moved(self) -> Tensor:
        """Pixels to the right and down from the first frame to the last, (B, 2)."""
        return self.centres[:, -1] - self.centres[:, 0]


def spread(pixels: Tensor, channels: int) -> Tensor:
    """The highest less the lowest channel: 0 of a grey."""
    return pixels.amax(channels) - pixels.amin(channels)


def look(videos: Tensor) -> Seen:
    strength = spread(videos, 2)
    weight = torch.relu(strength - COLOURED)
    mass = weight.sum((2, 3)).clamp_min(1e-6)
    places = torch.arange(SIDE, device=videos.device) + 0.5
    x = (weight.sum(2) * places).sum(2) / mass
    y = (weight.sum(3) * places).sum(2) / mass
    colour = (videos * weight.unsqueeze(2)).sum((1, 3, 4)) / mass.sum(1, keepdim=True)
    there = ((strength > COLOURED).sum((2, 3)) >= SMALLEST).all(1)
    # a pixel that is half the shape's has half its colour
    full = strength.flatten(2).topk(SMALLEST, dim=2).values.mean(2)[..., None, None]
    cover = (strength / full.clamp_min(COLOURED)).clamp(0, 1)
    cover = torch.where(strength > COLOURED / 2, cover, 0.0)
    return Seen(there, torch.stack([x, y], -1), colour, cover.sum((2, 3)), cover)


def colour_right(videos: Tensor, prompts: Sequence[str], metadata: object) -> Tensor:
    """1 where the shape's hue is nearest to that of the colour that is asked for, else 0."""
    seen = look(videos)
    low, high = seen.colour.amin(1, keepdim=True), seen.colour.amax(1, keepdim=True)
    hue = (seen.colour - low) / (high - low).clamp_min(1e-6)
    pure = torch.tensor(list(COLOURS.values())).to(hue)
    nearest = (hue[:, None] - pure).abs().sum(2).argmin(1)
    wanted = torch.tensor([list(COLOURS).index(Scene.of(each).colour) for each in prompts])
    return (seen.there & (nearest == wanted.to(nearest))).float()


def shape_right(videos: Tensor, prompts: Sequence[str], metadata: object) -> Tensor:
    """1 where of the three shapes, at the place and with the area seen, the right one overlaps
    best with what is seen, over all frames; else 0."""
    seen = look(videos)
    radius = (seen.area.mean(1) / math.pi).sqrt()
    overlaps = []
    for name in SHAPES:
        ideal = mask(name, seen.centres, radius)
        both = torch.minimum(ideal, seen.cover).sum((2, 3))
        overlaps.append((both / torch.maximum(ideal, seen.cover).sum((2, 3))).mean(1))
    best = torch.stack(overlaps).argmax(0)
    wanted = torch.tensor([SHAPES.index(Scene.of(each).shape) for each in prompts])
    return (seen.there & (best == wanted.to(best))).float()


def _along(seen: Seen, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Pixels moved in the direction asked for, and across it, (B,)."""
    way = torch.tensor([DIRECTIONS[Scene.of(each).direction] for each in prompts]).to(seen.moved)
    along = (seen.moved * way).sum(1)
    return along, (seen.moved - along[:, None] * way).norm(dim=1)


def direction_right(videos: Tensor, prompts: Sequence[str], metadata: object) -> Tensor:
    """1 where the shape has moved, and in the direction asked for twice as far as across it."""
    seen = look(videos)
    along, across = _along(seen, prompts)
    return (seen.there & (along >= MOVED) & (along >= 2 * across)).float()


def steered(videos: Tensor, prompts: Sequence[str], metadata: object) -> Tensor:
    """How far the shape goes the way asked for, less how far across it; from −1 to 1, which is the
    middle speed of this world. Not differentiable here: the policy gradient is what can follow."""
    seen = look(videos)
    along, across = _along(seen, prompts)
    return torch.where(seen.there, ((along - across) / MIDDLE).clamp(-1, 1), -1.0)


def travel(videos: Tensor, prompts: object, metadata: object) -> Tensor:
    """Pixels from the shape's first place to its last; 0 where there is none."""
    seen = look(videos)
    return torch.where(seen.there, seen.moved.norm(dim=1), 0.0)


def going(videos: Tensor, prompts: object, metadata: object) -> Tensor:
    """`travel` as a reward: 1 is the middle speed of this world. Differentiable."""
    seen = look(videos)
    return torch.where(seen.there, seen.moved.norm(dim=1) / MIDDLE, 0.0)


def motion(videos: Tensor, prompts: object, metadata: object) -> Tensor:
    """The watch's own measure of motion, a logarithm."""
    return VIDEOS.probes["motion"](videos, 0.0).float()


def poster(images: Tensor, prompts: object, metadata: object) -> Tensor:
    """A taste in single frames (B, 3, H, W): colour in the middle, the more the better. A shape
    that stays there has the most of it, so it invites stills. Differentiable."""
    places = torch.arange(SIDE, device=images.device) + 0.5 - SIDE / 2
    near = torch.exp(-places.square() / (2 * (SIDE / 8) ** 2))
    middle = near[:, None] * near
    return (spread(images, 1) * middle).sum((1, 2)) / 50


for of_videos in (colour_right, shape_right, direction_right, steered, travel, going, motion):
    of_videos.domain = "videos"  # type: ignore[attr-defined]
poster.differentiable = going.differentiable = True  # type: ignore[attr-defined]


def scored(measure: Any, videos: Tensor, texts: Sequence[str]) -> Tensor:
    """Of videos (N, F, 3, H, W); of a measure of frames the mean over all."""
    if getattr(measure, "domain", "images") == VIDEOS.name:
        return measure(videos, texts, None)
    return measure(videos.flatten(0, 1), texts, None).unflatten(0, videos.shape[:2]).mean(1)


def named(reward: Any) -> str:
    """As a recipe names it."""
    return f"{__name__}:{reward.__name__}"
