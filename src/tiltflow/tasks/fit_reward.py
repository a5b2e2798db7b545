"""`tiltflow fit-reward`: choices between images become a reward, if they say enough.

The model is Bradley and Terry's (1952): P(first chosen) = σ(w · (φ(first) − φ(second))) on frozen
CLIP features φ (`rewards/zoo/votes.py`), with a Gaussian prior on w, so w is the penalised logistic
regression's. How strong the prior is, is chosen by the log-likelihood of choices left out, and the
accuracy is of choices left out of that as well (nested cross-validation). The two images of a
prompt, and all pairs of one prompt, stay on one side of every split.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit

from tiltflow.core.disk import save_tensors, sha256, write_whole
from tiltflow.core.paths import check_folder, resolve_path
from tiltflow.core.sentences import counted
from tiltflow.data.preferences import Preference, agreement, load_preferences
from tiltflow.evaluation.statistics import proportion_ci
from tiltflow.rewards.fitted import FITTED
from tiltflow.rewards.packaged import check_words
from tiltflow.rewards.zoo.clip_family import CLIPScore
from tiltflow.rewards.zoo.votes import (
    CLIP_WHOLE,
    HEAD,
    facts_text,
    features,
    identity,
    whole_identity,
)
from tiltflow.setup.build import device_of

Array = NDArray[np.float64]

FEWEST = 50
"""Choices (ties aside) below which nothing is fitted."""
FEWEST_PROMPTS = 10
"""Different prompts, which the splits go by."""
MOST_CONTRADICTIONS = 1 / 3
"""Share of the repeated pairs that may be decided both ways; at chance it is a half."""
REPEATED = 10
"""Repeated pairs from which that share is looked at."""
FOLDS = 5
PRIORS = (0.1, 1.0, 10.0, 100.0, 1000.0)
"""Standard deviations² of w's prior that are tried."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Choices:
    """(n, D + 1) differences φ(first) − φ(second), (n,) what was chosen (1, 0 or ½), (n,) the
    prompts' numbers, and (2n, D + 1) all images' φ."""

    differences: Array
    chosen: Array
    groups: NDArray[np.intp]
    seen: Array


@dataclass(frozen=True)
class Fit:
    """What came out: `accuracy` with its 95% interval on `decided` choices left out. The votes on
    one prompt are no independent ones, so it counts a prompt once (`proportion_ci`)."""

    weight: Array
    prior: float
    accuracy: float
    interval: tuple[float, float]
    decided: int


def fit_reward(
    files: Sequence[Path], out: Path, clip: str, device: str, say: Say = print
) -> Mapping[str, Any]:
    """Fits a reward to the preferences in `files` on the CLIP at `clip` and writes the folder
    `out`, which is then the reward's name: `rewards={OUT: 1}`.

    Raises:
        ValueError: if a file cannot be read, the choices are too few or contradict each other, or
            what they say cannot be told from chance.
    """
    check_out(out)
    check_files(files)
    each = {file: load_preferences(file) for file in files}
    check_votes(each)
    preferences = [one for found in each.values() for one in found]
    check_choices(preferences)
    for one in preferences:
        check_words(one.prompt, clip)
    model = CLIPScore(clip, device_of(device))
    choices = measure(preferences, model, say)
    found = fit(choices)
    low, high = found.interval
    said = f"{found.accuracy:.3f} [{low:.3f}, {high:.3f}] on {found.decided} choices left out"
    if low <= 0.5:
        raise ValueError(
            f"the choices cannot be told from chance by this CLIP: the fitted reward agrees with "
            f"{said}; give more votes, or another --clip"
        )
    about = _facts(found, choices, clip, model)
    _write(out, found, choices, about)
    say(f"agrees with {said}")
    return about


def check_out(out: Path) -> None:
    """Passes a folder that can be made, is empty or holds an earlier fit.

    Raises:
        ValueError: if it is none of these.
    """
    check_folder("--out", out)
    if out.is_dir() and any(path.name not in (FITTED, HEAD) for path in out.iterdir()):
        raise ValueError(f"--out {out} holds other things than a fitted reward: give another one")


def check_files(files: Sequence[Path]) -> None:
    """Passes files of which none is given twice, nor is a copy of another: every vote would count
    as two.

    Raises:
        ValueError: naming the first that is.
    """
    seen: dict[object, Path] = {}
    for file in files:
        if not file.is_file():
            continue  # said by whoever reads it
        for mark in (file.resolve(), (file.stat().st_size, sha256(file))):
            if mark in seen:
                is_copy = "" if seen[mark] == file else f": {seen[mark]} holds the same"
                raise ValueError(f"{file} is given twice{is_copy}, and a vote counts once")
            seen[mark] = file


def check_votes(each: Mapping[Path, Sequence[Preference]]) -> None:
    """Passes votes of which none stands twice, in one file or in two, such as the desk's and a copy
    of it that is older.

    Raises:
        ValueError: saying how many do, and where.
    """
    seen: dict[object, Path] = {}
    for file, found in each.items():
        votes = [vote for one in found if (vote := one.vote) is not None]
        again = [seen[vote] for vote in votes if vote in seen]
        again += [file] * (len(votes) - len(set(votes)))
        if again:
            count = counted(len(again), "vote that stands", "votes that stand")
            where = "there already" if again[0] == file else f"in {again[0]} too"
            raise ValueError(f"{file} has {count} {where}, and a vote counts once: leave it out")
        seen |= dict.fromkeys(votes, file)


def check_choices(preferences: Sequence[Preference]) -> None:
    """Passes choices that are enough and do not contradict each other too often.

    Raises:
        ValueError: saying what is missing, or how many contradict each other.
    """
    decided = [one for one in preferences if one.choice != 0.5]
    prompts = len({one.prompt for one in decided})
    if len(decided) < FEWEST:
        raise ValueError(
            f"{counted(len(decided), 'vote prefers', 'votes prefer')} one image "
            f"({len(preferences) - len(decided)} none); a reward needs {FEWEST} or more"
        )
    if prompts < FEWEST_PROMPTS:
        raise ValueError(
            f"the votes are on {counted(prompts, 'prompt', 'different prompts')}; a reward needs "
            f"{FEWEST_PROMPTS} or more"
        )
    repeated, contradictory = agreement(preferences)
    if repeated >= REPEATED and contradictory > MOST_CONTRADICTIONS * repeated:
        raise ValueError(
            f"the votes contradict each other: of {repeated} pairs that were voted on more than "
            f"once, {contradictory} were decided both ways"
        )


@torch.no_grad()
def measure(preferences: Sequence[Preference], clip: CLIPScore, say: Say) -> Choices:
    """The features of every image of the choices, one image at a time; of a video the mean of its
    frames', as its score is the mean of theirs and linear in them.

    Raises:
        ValueError: if an image cannot be read.
    """
    first: list[Array] = []
    second: list[Array] = []
    for number, one in enumerate(preferences, start=1):
        for images, into in zip(one.images(), (first, second), strict=True):
            seen = [features(clip, image, [one.prompt])[0] for image in images.split(1)]
            into.append(torch.stack(seen).double().mean(0).cpu().numpy())
        if number % 500 == 0:
            say(f"{number} of {len(preferences)} pairs seen")
    a, b = np.stack(first), np.stack(second)
    numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(p.prompt for p in preferences))}
    return Choices(
        a - b,
        np.array([one.choice for one in preferences]),
        np.array([numbers[one.prompt] for one in preferences], dtype=np.intp),
        np.concatenate([a, b]),
    )


def fit(choices: Choices) -> Fit:
    """The weights from all choices, and how well such a fit agrees with choices left out."""
    right = np.zeros(len(choices.chosen), dtype=bool)
    for part in _folds(choices.groups):
        prior = _prior(choices, ~part)
        weight = regression(choices.differences[~part], choices.chosen[~part], prior)
        right[part] = (choices.differences[part] @ weight > 0) == (choices.chosen[part] > 0.5)
    decided = choices.chosen != 0.5
    share, low, high = proportion_ci(right[decided], clusters=choices.groups[decided].tolist())
    prior = _prior(choices, np.ones_like(decided))
    weight = regression(choices.differences, choices.chosen, prior)
    return Fit(weight, prior, share, (low, high), int(decided.sum()))


def regression(differences: Array, chosen: Array, prior: float) -> Array:
    """w (D + 1,) that minimises −log-likelihood + |w|² / (2 `prior`); ties are half of each."""

    def loss(weight: Array) -> tuple[float, Array]:
        logits = differences @ weight
        value = np.logaddexp(0, logits) - chosen * logits
        slope = differences.T @ (expit(logits) - chosen) + weight / prior
        return float(value.sum() + weight @ weight / (2 * prior)), slope

    def curvature(weight: Array) -> Array:
        share = expit(differences @ weight)
        found: Array = (differences.T * (share * (1 - share))) @ differences
        return found + np.eye(len(weight)) / prior

    start = np.zeros(differences.shape[1])
    found = minimize(loss, start, jac=True, hess=curvature, method="trust-exact")
    weight: Array = found.x
    return weight


def _prior(choices: Choices, rows: NDArray[np.bool_]) -> float:
    """The prior under which choices left out of `rows` are most likely."""
    x, y, groups = choices.differences[rows], choices.chosen[rows], choices.groups[rows]
    loss = dict.fromkeys(PRIORS, 0.0)
    for part in _folds(groups):
        for prior in PRIORS:
            logits = x[part] @ regression(x[~part], y[~part], prior)
            loss[prior] += float((np.logaddexp(0, logits) - y[part] * logits).sum())
    return min(loss, key=loss.__getitem__)


def _folds(groups: NDArray[np.intp]) -> list[NDArray[np.bool_]]:
    """`FOLDS` parts of the rows; all rows of a prompt are in one. Prompts are dealt in the order
    of their numbers, shuffled by a fixed seed, so the same votes give the same reward."""
    names = np.unique(groups)
    dealt = np.random.default_rng(0).permutation(names)
    parts = [np.isin(groups, dealt[i::FOLDS]) for i in range(FOLDS)]
    return [part for part in parts if part.any()]


def _scale(found: Fit, choices: Choices) -> tuple[float, float]:
    """Mean and standard deviation of the log-odds scores over the images of the choices."""
    scores = choices.seen @ found.weight
    return float(scores.mean()), float(scores.std()) or 1.0


def _facts(found: Fit, choices: Choices, clip: str, model: CLIPScore) -> dict[str, Any]:
    local = Path(resolve_path(clip))
    _, spread = _scale(found, choices)
    return {
        "clip": clip
        if clip.startswith("packaged:") or not local.exists()
        else str(local.resolve()),
        "clip_digest": identity(model),  # for earlier versions, which look at no other
        CLIP_WHOLE: whole_identity(model),
        "choices": len(choices.chosen),
        "decided": found.decided,
        "prompts": len(np.unique(choices.groups)),
        "accuracy": found.accuracy,
        "accuracy_ci95": list(found.interval),
        "prior_variance": found.prior,
        "log_odds_per_point": spread,
    }


def _write(out: Path, found: Fit, choices: Choices, about: Mapping[str, Any]) -> None:
    mean, spread = _scale(found, choices)
    if not math.isfinite(mean / spread):
        raise ValueError("the fitted weights are not finite")
    head = {
        "weight": torch.from_numpy(found.weight / spread).float(),
        "bias": torch.tensor(-mean / spread, dtype=torch.float32),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / FITTED).unlink(missing_ok=True)  # it comes last: without it the folder is no reward
    save_tensors(head, out / HEAD)
    write_whole(out / FITTED, facts_text(about))
