"""What a reward is, the one gate through which all are called, and how one is found by name."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from tiltflow.core.allocation import out_of_memory
from tiltflow.core.interruption import Stopped
from tiltflow.core.paths import nearest
from tiltflow.core.registry import failure, find, made
from tiltflow.models.medium import Fault, Medium, article, load_medium
from tiltflow.rewards.batches import checked_at_once, in_fixed_batches, no_gradient, with_gradient
from tiltflow.rewards.fitted import is_fitted, load_fitted
from tiltflow.rewards.packaged import CLIP_WEIGHTS
from tiltflow.rewards.remote.address import ELSEWHERE

ENTRY_POINTS = "tiltflow.rewards"

Metadata = Mapping[str, object]
RewardFunction = Callable[[Tensor, Sequence[str], Sequence[Metadata]], Tensor]


class NonFiniteScore(ValueError):
    """A reward gave, or was given, a number that is NaN or infinite."""


class RewardFailed(ValueError):
    """A reward raised something other than a ValueError: its own fault, not its input's."""


@runtime_checkable
class Reward(Protocol):
    """Scores images: (B, 3, H, W) floats in [0, 1], prompts and metadata to (B,) fp32, more is
    better. `differentiable` says that gradients flow from the scores to the images.

    `at_once` is how many images it is called with, always: 1 where it does not say. None: as many
    as there are, for a reward that sees to it itself that no score depends on the others' images
    (`at_once_of` has the whole rule).

    A reward of another medium than images says so with `domain`, the medium's name or dotted path:
    "points" ((B, D), any range). One that waits for another machine says `elsewhere = True`:
    training calls it from another thread and goes on meanwhile. It is not differentiable.
    """

    name: str
    differentiable: bool

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor: ...


class FunctionReward:
    """A plain function `f(images, prompts, metadata) -> (B,)` as a reward."""

    def __init__(
        self,
        function: RewardFunction,
        name: str,
        differentiable: bool = False,
        domain: str = "images",
        elsewhere: bool = False,
        at_once: int | None = None,
    ) -> None:
        _domain(name, domain)
        if elsewhere and differentiable:
            raise ValueError(f"reward {name!r}: elsewhere, so it cannot be differentiable")
        self.function = function
        self.name = name
        self.differentiable = differentiable
        self.domain = domain
        self.elsewhere = elsewhere
        if at_once is not None:
            self.at_once = _sensible(name, at_once)

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        return self.function(images, prompts, metadata)


def at_once_of(reward: Reward) -> int | None:
    """How many images `checked` calls a reward with; None: as many as there are.

    What `reward.at_once` says. Where it says nothing: 1, so that a score is a function of its own
    image and prompt by construction; but None for points, and for a reward elsewhere (its medium
    says it, `Medium.at_once`).

    Raises:
        ValueError: if it says something else than None or a whole number from 1.
    """
    usual = None if getattr(reward, "elsewhere", False) else medium_of(reward).at_once
    said = getattr(reward, "at_once", usual)
    return None if said is None else _sensible(reward.name, said)


def medium_of(reward: Reward) -> Medium:
    """The medium that a reward scores: its `domain`, images where it has none.

    Raises:
        ValueError: if there is no such medium.
    """
    return _domain(reward.name, getattr(reward, "domain", "images"))


def check_medium(rewards: Iterable[Reward], medium: Medium) -> None:
    """Passes rewards that score samples of `medium`.

    Raises:
        ValueError: naming the first that scores those of another.
    """
    for reward in rewards:
        other = medium_of(reward)
        if other.name != medium.name:
            raise ValueError(
                f"reward {reward.name!r} scores {other.name}, but here {medium.name} are generated"
            )


def _domain(name: str, domain: str) -> Medium:
    try:
        return load_medium(domain)
    except ValueError as error:
        raise ValueError(f"reward {name!r}: domain: {error}") from error


def _sensible(name: str, given: object) -> int:
    try:
        return checked_at_once(given)
    except ValueError as error:
        raise ValueError(f"reward {name!r}: {error}") from error


def checked(
    reward: Reward,
    images: Tensor,
    prompts: Sequence[str],
    metadata: Sequence[Metadata],
) -> Tensor:
    """The reward's scores (B,) fp32, on the device of `images`; every caller goes through here.

    Images of any float precision are handed over in fp32, as copies, exactly as many at a time as
    `at_once_of` says. A score is a function of its image and prompt alone, to the last bit: a batch
    of n gives what n batches of one give. A reward that is not differentiable runs without
    gradients, and of another no graph is kept. A failure is never a score of 0 (METHOD §8).

    Raises:
        ValueError: if images, prompts or metadata disagree in length, an image has the wrong
            shape, is not finite or leaves [0, 1] by more than 1e-3, or the scores are not (B,)
            finite floats that carry the promised gradient and no other. The message names the
            reward and the first offending prompt; so do errors that the reward itself raises.
            RewardFailed, which is one, if it raises anything but a ValueError. Running out of
            memory, being stopped and being interrupted pass as they are.
    """
    check_samples(reward.name, medium_of(reward), images, prompts, metadata)
    promised = reward.differentiable and images.requires_grad and torch.is_grad_enabled()
    images = (images if promised else images.detach()).float()
    size = at_once_of(reward) or max(len(images), 1)

    def score(block: Tensor, texts: Sequence[str], about: Sequence[Metadata]) -> Tensor:
        with torch.set_grad_enabled(promised):
            return _check_scores(reward, block, texts, _called(reward, block, texts, about))

    every = with_gradient(reward.name, score) if promised else score
    scores = in_fixed_batches(every, size, images, prompts, metadata)
    bad = ~torch.isfinite(scores.detach())
    _refuse(bad, prompts, f"reward {reward.name!r} gave a non-finite score", NonFiniteScore)
    return scores


def _called(
    reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
) -> object:
    """What the reward gives; what it raises, as one sentence with its name and the prompt."""
    try:
        # copies: what it writes into them would be the next one's prompt
        return reward(images, list(prompts), [copy.deepcopy(about) for about in metadata])
    except (Exception, SystemExit) as error:
        if isinstance(error, Stopped) or getattr(reward, "gated", False):
            raise  # of a gate inside, it has its name and kind
        if out_of_memory(error):
            error.add_note(f"while reward {reward.name!r} scored {len(prompts)} images")
            raise
        others = len(set(prompts)) - 1
        place = f"{prompts[0]!r}{f' and {others} more' if others else ''}" if prompts else "nothing"
        if not isinstance(error, ValueError):
            what = f"reward {reward.name!r} failed on {place}: {failure(error)}"
            raise RewardFailed(what) from error
        named = getattr(reward, "elsewhere", False) or any(repr(p) in str(error) for p in prompts)
        where = "" if named else f" on {place}"
        raise ValueError(f"reward {reward.name!r}{where}: {error}") from error


def check_samples(
    name: str,
    medium: Medium,
    samples: Tensor,
    prompts: Sequence[str],
    metadata: Sequence[Metadata],
) -> None:
    """Raises ValueError, as `checked` does, for samples that are none."""
    try:
        found: Fault | None = medium.check(samples)
    except ValueError as error:
        raise ValueError(f"reward {name!r} {error}") from error
    if not len(samples) == len(prompts) == len(metadata):
        raise ValueError(
            f"reward {name!r} got {len(samples)} {medium.name}, {len(prompts)} prompts "
            f"and {len(metadata)} metadata"
        )
    if found is not None:
        kind = ValueError if found.finite else NonFiniteScore
        got = f"reward {name!r} got {article(found.what)} {found.what}"
        _refuse(found.rows, prompts, got, kind)


def _check_scores(reward: Reward, images: Tensor, prompts: Sequence[str], scores: object) -> Tensor:
    start = f"reward {reward.name!r} must give ({len(prompts)},) float scores"
    if not torch.is_tensor(scores):
        raise ValueError(f"{start}, got {type(scores).__name__}")
    assert isinstance(scores, Tensor)
    empty = scores.is_meta and not images.is_meta  # no numbers for images that have some
    if scores.shape != (len(prompts),) or not scores.is_floating_point() or empty:
        kind = f"{str(scores.dtype).removeprefix('torch.')} on {scores.device}"
        raise ValueError(f"{start}, got {tuple(scores.shape)} {kind}")
    promised = images.requires_grad and torch.is_grad_enabled()
    if promised and not scores.requires_grad:
        raise ValueError(no_gradient(reward.name))
    if scores.requires_grad and not promised:
        raise ValueError(
            f"reward {reward.name!r} gave scores that require a gradient where none was asked for: "
            "detach what it returns"
        )
    return scores.to(images.device, torch.float32)


def _refuse(
    bad: Tensor, prompts: Sequence[str], problem: str, kind: type[ValueError] = ValueError
) -> None:
    """An error of `kind` that names the first prompt where `bad` (B,) holds."""
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise kind(f"{problem} for {prompts[first]!r} (row {first} of {len(prompts)})")


def _shapes(
    name: str, path: str | None, device: str | torch.device, options: Mapping[str, Any]
) -> Reward:
    from tiltflow.rewards.zoo.shapes import ShapesReward

    _no_path(name, path)
    _only(name, options, () if name == "shapes_soft" else ("soft",))
    return ShapesReward(soft=name == "shapes_soft" or bool(options.get("soft", False)))


def _clipscore(
    name: str, path: str | None, device: str | torch.device, options: Mapping[str, Any]
) -> Reward:
    from tiltflow.rewards.zoo.clip_family import CLIPScore

    _only(name, options, ("at_once", "resize"))
    return CLIPScore(path or CLIP_WEIGHTS[name], device=device, name=name, **options)


PUBLISHED = {
    "aesthetic": "aesthetic:Aesthetic",
    "geneval": "geneval:GenEval",
    "geneval2": "geneval2:GenEval2",
    "hpsv2": "preference:HPSv2",
    "hpsv3": "hpsv3:HPSv3",
    "image_reward": "image_reward:ImageReward",
    "ocr": "ocr:OCR",
    "pickscore": "preference:PickScore",
}
"""Rewards with published weights: module of `rewards.zoo`, and class. Imported when asked for."""


def published_reward(name: str) -> Any:
    """The class of one of `PUBLISHED`."""
    module, _, kind = PUBLISHED[name].partition(":")
    return getattr(importlib.import_module(f"tiltflow.rewards.zoo.{module}"), kind)


def _published(
    name: str, path: str | None, device: str | torch.device, options: Mapping[str, Any]
) -> Reward:
    takes = inspect.signature(published := published_reward(name)).parameters
    _only(name, options, [key for key in takes if key not in ("path", "device")])
    if "path" not in takes:
        _no_path(name, path)
    try:
        places = {} if path is None else {"path": path}
        reward: Reward = published(**places, device=device, **options)
    except ValueError as error:
        start = f"reward {name!r}"
        raise ValueError(str(error) if start in str(error) else f"{start}: {error}") from error
    return reward


def _linear(
    name: str, path: str | None, device: str | torch.device, options: Mapping[str, Any]
) -> Reward:
    from tiltflow.rewards.zoo.mixture import LinearReward

    _no_path(name, path)
    _only(name, options, ())
    return LinearReward()


BUILTIN: dict[str, Callable[[str, str | None, str | torch.device, Mapping[str, Any]], Reward]] = {
    "clipscore": _clipscore,
    "clipscore_heldout": _clipscore,
    "linear": _linear,
    "shapes": _shapes,
    "shapes_soft": _shapes,
    **dict.fromkeys(PUBLISHED, _published),
}


def load_reward(
    name: str,
    *,
    path: str | None = None,
    device: str | torch.device = "cpu",
    options: Mapping[str, Any] | None = None,
) -> Reward:
    """A reward by builtin name, entry point (group `tiltflow.rewards`), `package.module:name`,
    `remote:http://HOST:PORT/NAME` for one behind a reward server, `judge:MODEL` for a model that is
    asked (here, if it has a `path`), or the folder of a fitted one.

    An entry point or dotted path leads either to a plain function `f(images, prompts, metadata)
    -> (B,)`, which may have attributes `differentiable`, `domain`, `elsewhere` and `at_once`
    (options replace them), or to a class, which is called with `device`, the options and, when
    given, `path` (of the weights: a directory, hub id or `packaged:NAME`), and makes a reward.

    Raises:
        ValueError: if there is no such reward (names the nearest), it cannot be imported, or it
            does not take the path or an option.
    """
    options = dict(options or {})
    if name in BUILTIN or is_fitted(name):
        return BUILTIN.get(name, load_fitted)(name, path, device, options)
    if name.startswith(ELSEWHERE):
        from tiltflow.rewards.remote.loading import load_elsewhere

        return load_elsewhere(name, options, path, device)
    return _from_target(target_of(name), name, path, device, options)


def target_of(name: str) -> Callable[..., Any]:
    """The function or class that a dotted path or an entry point leads to.

    Raises:
        ValueError: if there is none (names the nearest), it cannot be imported, or is neither.
    """
    target = find("reward", name, ENTRY_POINTS, BUILTIN, "function")
    if not callable(target):
        raise ValueError(f"reward {name!r} is neither a function nor a class")
    return target


def _from_target(
    target: Callable[..., Any],
    name: str,
    path: str | None,
    device: str | torch.device,
    options: Mapping[str, Any],
) -> Reward:
    if isinstance(target, type):
        places = {} if path is None else {"path": path}
        reward = made("reward", name, target, device=device, **places, **options)
        if not isinstance(reward, Reward):
            raise ValueError(f"reward {name!r} needs a name, differentiable and a call")
        return reward
    _no_path(name, path)
    known = ("differentiable", "domain", "elsewhere", "at_once")
    _only(name, options, known)
    said = {key: getattr(target, key) for key in known if hasattr(target, key)}
    return FunctionReward(target, name, **(said | dict(options)))


def _no_path(name: str, path: str | None) -> None:
    if path is not None:
        raise ValueError(f"reward {name!r} has no weights to load, so it takes no path")


def _only(name: str, options: Mapping[str, Any], allowed: Sequence[str]) -> None:
    for key in options:
        if key not in allowed:
            raise ValueError(f"reward {name!r} has no option {key!r}{nearest(key, list(allowed))}")
