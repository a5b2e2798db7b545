"""What is generated: how samples are checked, kept in files, shown and compared.

A family's network knows latents only. What its samples are (images, the mixture's points; a sound
or a video of one's own) is a `Medium`, and nothing else in the package asks for it: rewards say by
`domain` which medium they score, a backbone has one, and `model.medium` gives it another.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tiltflow.core.registry import find, made
from tiltflow.models.spectrum import FLOOR, high_frequency_energy

ENTRY_POINTS = "tiltflow.media"
FRAMES_PER_SECOND = 16
"""Of files: Wan's own."""
SHOWN = 3
"""Frames of a video in a sheet."""
RANGE_TOLERANCE = 1e-3  # decoders clamp to [0, 1]; a bf16 round trip may leave it by this much

Features = Callable[[Tensor], Tensor]
"""Samples (B, …) to vectors (B, F)."""
Sheet = Callable[[Tensor, int], NDArray[np.uint8]]
"""Samples (N, …) and a number of columns to one picture (H, W, 3)."""
Probe = Callable[[Tensor, float], Tensor]
"""Samples (B, …) and `watch.frequency` to a number of each, (B,)."""


@dataclass(frozen=True)
class Fault:
    """What is wrong with some samples: `rows` (B,) bool; `finite` is false for a NaN or infinity.

    `what` follows an article: "non-finite image", "image outside [0, 1]".
    """

    what: str
    rows: Tensor
    finite: bool


@runtime_checkable
class Medium(Protocol):
    """Samples (B, …) of one kind, floats. Everything here is of each sample alone."""

    name: str
    """Of many: "images"; what a reward's `domain` says. `one` is of one: "image"."""
    one: str
    suffix: str
    """The ending of a sample's file: ".png"."""
    at_once: int | None
    """How many samples a reward is called with where it does not say; None: as many as there are.
    1 makes a score a function of its own sample by construction."""

    @property
    def features(self) -> Features | None:
        """What diversity is measured in; None: `image_features` of a reward that has these."""

    @property
    def probes(self) -> Mapping[str, Probe]:
        """What the watch of stage 2 measures besides rewards, diversity and drift, by name."""

    @property
    def sheet(self) -> Sheet | None:
        """Draws samples side by side; None where there is nothing to see."""

    def check(self, samples: Tensor) -> Fault | None:
        """The first thing wrong with the values of samples (B, …).

        Raises:
            ValueError: "needs …, got …", if their shape or type is not this medium's.
        """

    def decode(self, decoded: Tensor) -> Tensor:
        """Samples from what the family's decoder gives; differentiable."""

    def rounded(self, samples: Tensor) -> Tensor:
        """The samples as files hold them, still floats; what is scored is this."""

    def encode(self, samples: Tensor) -> NDArray[np.generic]:
        """Rounded samples as a file's numbers, (B, …), on the CPU."""

    def save(self, encoded: NDArray[np.generic], file: Path) -> None:
        """Writes one encoded sample to a file that ends with `suffix`."""


def log_high_frequency(images: Tensor, cutoff: float) -> Tensor:
    """The logarithm of `high_frequency_energy`, (B,) fp64."""
    return torch.log(high_frequency_energy(images, cutoff) + FLOOR)


def frames_high_frequency(videos: Tensor, cutoff: float) -> Tensor:
    """The logarithm of the mean `high_frequency_energy` of a video's frames, (B,) fp64."""
    energy = high_frequency_energy(videos.flatten(0, 1), cutoff)
    return torch.log(energy.unflatten(0, videos.shape[:2]).mean(1) + FLOOR)


def log_motion(videos: Tensor, cutoff: float) -> Tensor:
    """The logarithm of the mean square by which a frame differs from the one before, (B,) fp64."""
    moved = (videos[:, 1:].double() - videos[:, :-1].double()).square()
    return torch.log(moved.flatten(1).mean(1) + FLOOR)


def spread(count: int, most: int) -> list[int]:
    """The numbers of `most` of `count` frames (all, if there are fewer), evenly from the first to
    the last; of one the middle."""
    if most >= count:
        return list(range(count))
    if most == 1:
        return [(count - 1) // 2]
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


class ImageMedium:
    """Images (B, 3, H, W) in [0, 1]; PNG files of eight bits."""

    name, one, suffix = "images", "image", ".png"
    at_once: int | None = 1
    features: Features | None = None
    probes: Mapping[str, Probe] = MappingProxyType({"high_frequency": log_high_frequency})

    def check(self, samples: Tensor) -> Fault | None:
        fits = samples.ndim == 4 and samples.shape[1] == 3
        require(fits, samples, "(B, 3, H, W) float images")
        return outside(self.one, samples)

    def decode(self, decoded: Tensor) -> Tensor:
        """From an autoencoder's [−1, 1]."""
        return (decoded / 2 + 0.5).clamp(0, 1)

    def rounded(self, samples: Tensor) -> Tensor:
        return (samples.detach() * 255).round().clamp(0, 255) / 255

    def encode(self, samples: Tensor) -> NDArray[np.uint8]:
        """(B, H, W, 3)."""
        pixels: NDArray[np.uint8] = (samples * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return pixels

    def save(self, encoded: NDArray[np.generic], file: Path) -> None:
        Image.fromarray(encoded).save(file)

    def sheet(self, samples: Tensor, columns: int) -> NDArray[np.uint8]:
        """Side by side, on white."""
        pixels = self.encode(samples)
        n, h, w, _ = pixels.shape
        sheet = np.full((-(-n // columns) * h, columns * w, 3), 255, np.uint8)
        for i, picture in enumerate(pixels):
            r, c = divmod(i, columns)
            sheet[r * h : (r + 1) * h, c * w : (c + 1) * w] = picture
        return sheet


class VideoMedium:
    """Videos (B, F, 3, H, W) in [0, 1]; animated PNG files of eight bits, which browsers play and
    whose first frame is a picture to whatever knows pictures alone."""

    name, one, suffix = "videos", "video", ".png"
    at_once: int | None = 1
    features: Features | None = None
    probes: Mapping[str, Probe] = MappingProxyType(
        {"high_frequency": frames_high_frequency, "motion": log_motion}
    )

    def check(self, samples: Tensor) -> Fault | None:
        fits = samples.ndim == 5 and samples.shape[2] == 3
        require(fits, samples, "(B, F, 3, H, W) float videos")
        return outside(self.one, samples)

    def decode(self, decoded: Tensor) -> Tensor:
        """From an autoencoder's [−1, 1]."""
        return IMAGES.decode(decoded)

    def rounded(self, samples: Tensor) -> Tensor:
        return IMAGES.rounded(samples)

    def encode(self, samples: Tensor) -> NDArray[np.uint8]:
        """(B, F, H, W, 3)."""
        return np.stack([IMAGES.encode(video) for video in samples])

    def save(self, encoded: NDArray[np.generic], file: Path) -> None:
        first, *others = (Image.fromarray(frame) for frame in encoded)
        first.save(
            file,
            save_all=True,
            append_images=others,
            duration=1000 / FRAMES_PER_SECOND,
            loop=0,
            # Laid over or in the place of the one before, a frame without gaps is the same; but
            # Pillow makes one long frame of successive equal ones that are blended alike.
            blend=[number % 2 for number in range(len(encoded))],
        )

    def sheet(self, samples: Tensor, columns: int) -> NDArray[np.uint8]:
        """Each as its first, middle and last frame, side by side, on white."""
        at = spread(samples.shape[1], SHOWN)
        strips = samples[:, at].permute(0, 2, 3, 1, 4).flatten(3)  # (B, 3, H, frames · W)
        return IMAGES.sheet(strips, columns)


def frames_in(image: Image.Image, chosen: Callable[[int], Iterable[int]]) -> Iterator[Image.Image]:
    """Of an opened file the frames that are `chosen` by how many there are, in RGB: of a picture
    one, of an animated PNG or WebP (videos are animated PNGs) several."""
    count = getattr(image, "n_frames", 1) if image.format in ("PNG", "WEBP") else 1
    for number in chosen(count):
        image.seek(number)
        yield image.convert("RGB")


class PointMedium:
    """Points (B, D) of any range, as a Gaussian mixture has them; `.npy` files. No picture."""

    name, one, suffix = "points", "point", ".npy"
    at_once: int | None = None
    probes: Mapping[str, Probe] = MappingProxyType({})
    sheet: Sheet | None = None

    def features(self, samples: Tensor) -> Tensor:
        """The points themselves."""
        return samples

    def check(self, samples: Tensor) -> Fault | None:
        require(samples.ndim == 2, samples, "(B, D) float points")
        return not_finite(self.one, *ends(samples))

    def decode(self, decoded: Tensor) -> Tensor:
        return decoded

    def rounded(self, samples: Tensor) -> Tensor:
        return samples.detach()

    def encode(self, samples: Tensor) -> NDArray[np.generic]:
        encoded: NDArray[np.generic] = samples.detach().cpu().numpy()
        return encoded

    def save(self, encoded: NDArray[np.generic], file: Path) -> None:
        np.save(file, encoded)  # numbers of a tensor: nothing to pickle


IMAGES, VIDEOS, POINTS = ImageMedium(), VideoMedium(), PointMedium()
BUILTIN: dict[str, Medium] = {medium.name: medium for medium in (IMAGES, VIDEOS, POINTS)}


@functools.cache
def load_medium(name: str) -> Medium:
    """A medium by builtin name, entry point (group `tiltflow.media`) or `package.module:name`,
    which leads to one or to a class that makes one.

    Raises:
        ValueError: if there is none (names the nearest), it cannot be imported, or lacks a part.
    """
    if name in BUILTIN:
        return BUILTIN[name]
    target = find("medium", name, ENTRY_POINTS, BUILTIN, "Class")
    medium = made("medium", name, target) if isinstance(target, type) else target
    if not isinstance(medium, Medium):
        parts = [part for part in _parts() if not hasattr(medium, part)]
        raise ValueError(f"medium {name!r} has no {', '.join(parts)}")
    return medium


def _parts() -> list[str]:
    return sorted({*Medium.__annotations__, *(n for n in vars(Medium) if not n.startswith("_"))})


def require(fits: bool, samples: Tensor, wanted: str) -> None:
    """For `Medium.check`: passes float samples that fit and have numbers in them.

    Raises:
        ValueError: "needs `wanted`, got SHAPE TYPE".
    """
    if not fits or 0 in samples.shape[1:] or not samples.is_floating_point():
        kind = str(samples.dtype).removeprefix("torch.")
        raise ValueError(f"needs {wanted}, got {tuple(samples.shape)} {kind}")


def ends(samples: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest number of each, (B,); of a sample with a NaN in it both are
    NaN."""
    flat = samples.detach().flatten(1)
    return flat.amin(1), flat.amax(1)


def fault(what: str, rows: Tensor, finite: bool = True) -> Fault | None:
    """A `Fault` if any of `rows` (B,) holds."""
    return Fault(what, rows, finite) if bool(rows.any()) else None


def not_finite(one: str, low: Tensor, high: Tensor) -> Fault | None:
    """For `Medium.check`: the samples whose `ends` are not finite."""
    return fault(f"non-finite {one}", ~(torch.isfinite(low) & torch.isfinite(high)), False)


def outside(one: str, samples: Tensor) -> Fault | None:
    """For `Medium.check`: the samples (`one` is what each is called) beyond [0, 1], or none."""
    low, high = ends(samples)
    beyond = (low < -RANGE_TOLERANCE) | (high > 1 + RANGE_TOLERANCE)
    return not_finite(one, low, high) or fault(f"{one} outside [0, 1]", beyond)


def article(noun: str) -> str:
    """Of an English noun."""
    return "an" if noun[0] in "aeiou" else "a"
