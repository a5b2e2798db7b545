"""The noise levels that a LoRA's student was trained at, where the pipeline at hand has others.

A student of a teacher and a generator is trained at the levels of the teacher's scheduler
(Z-Image's shift is 6), and its LoRA belongs to the generator (Z-Image-Turbo's shift is 3). So the
right weights may come with the wrong levels, and the contract says which are right.
"""

from __future__ import annotations

from collections.abc import Sequence

from tiltflow.core.sentences import either
from tiltflow.core.sizes import Resolution, said
from tiltflow.formats.contract import Contract
from tiltflow.models.pipelines.backbone import PipelineBackbone
from tiltflow.models.pipelines.directory import Pipelines
from tiltflow.models.pipelines.files import check_directory
from tiltflow.models.pipelines.meta import meta_backbone

Levels = tuple[float, ...]

ALIKE = 1e-5
"""Levels this near are the same formula's in another version of the libraries."""


def own_levels(
    contract: Contract,
    pipelines: Pipelines,
    steps: int,
    sizes: Sequence[Resolution],
    moved: bool,
) -> tuple[dict[str, Levels], list[str]]:
    """Where the scheduler at hand is not that of the training: the contract's levels of `steps` by
    the name of each of `sizes`, as far as it says them, and a line for the user. Else nothing.
    `moved` is whether the base has another fingerprint than in training.

    Nothing where the pipelines cannot be read, too: what is wrong is said when they are loaded.
    """
    trained = contract.levels(contract.steps, contract.resolution)
    try:
        if not moved and not pipelines.model.family.twin:
            return {}, []  # the base is the teacher's, and its fingerprint has the scheduler in it
        shapes = _shapes(pipelines, contract.resolution)
        here = tuple(shapes.few_step_sigmas(contract.steps).tolist())
    except ValueError:
        return {}, []
    if trained is None or _alike(trained, here):
        return {}, []
    known = {said(size): contract.levels(steps, size) for size in sizes}
    taken = {name: levels for name, levels in known.items() if levels is not None}
    there, own = (", ".join(f"{level:.4g}" for level in each) for each in (here, trained))
    line = (
        f"the scheduler in {pipelines.model} gives the noise levels {there}, but the student was "
        f"trained at {own}"
    )
    if len(taken) == len(known):
        return taken, [f"{line}: the latter are taken"]
    places = either([said(size) for size in contract.trained_sizes])
    return taken, [
        f"{line}, and its contract has the levels of {contract.steps} steps at {places} pixels "
        "only: for the rest the scheduler's are taken, so give the pipeline of its teacher as "
        "--model, and that of its base as --generator"
    ]


def _shapes(pipelines: Pipelines, size: Resolution) -> PipelineBackbone:
    """What the students are sampled in, without weights.

    Raises:
        ValueError: as `check_directory` and `meta_backbone`.
    """
    model, generator = pipelines.model, pipelines.generator
    family = check_directory(model)
    if generator is not None:
        generator.asked = generator.asked or family.name
        check_directory(generator)
    return meta_backbone(model, generator_path=generator, resolution=size)


def _alike(one: Levels, other: Levels) -> bool:
    return all(abs(a - b) < ALIKE for a, b in zip(one, other, strict=True))
