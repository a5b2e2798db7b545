"""What the figures of an evaluation depend on: as it is asked for on this machine, which a killed
one goes on by, and as files hold it anywhere, which two are compared by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tiltflow.core.paths import resolve_path
from tiltflow.core.sizes import said
from tiltflow.evaluation.chunks import place_of
from tiltflow.models.lora_files import adapter_keys, lora_mark
from tiltflow.models.pipelines.fingerprint import LIBRARIES, family_facts
from tiltflow.models.switch import FEW_STEP, TILT
from tiltflow.rewards.files import files_beside, files_of, revisions
from tiltflow.rewards.packages import NEEDS
from tiltflow.setup.build import device_of
from tiltflow.setup.manifest import prompts_fingerprint, rewards_fingerprints
from tiltflow.tasks.request import Request


def asked(request: Request) -> dict[str, Any]:
    """What the figures of a request depend on, as JSON; weights by the files that hold them.

    Of rewards and families of one's own the module's file counts, and not what it imports; what a
    reward server runs is known once it has been asked (`evaluated`).
    """
    plain = ("tilt", "teacher_steps", "guidance", "seed", "batch", "autocast", "diversity")
    chosen, revised = request.settled, revisions(request.rewards)
    settled = ("steps", "eta", "dtype", "resolution", "max_sequence_length")
    sizes = [[said(bucket.size), bucket.prompts] for bucket in request.buckets]
    about = [[p.text, p.metadata, *([p.negative] if p.negative else [])] for p in request.prompts]
    prompts = json.dumps(about, default=str)
    family = family_facts(request.pipelines.model) if request.has_files else {}
    beside: dict[str, Path] = {}
    for name, path in request.rewards.items():
        beside |= files_beside(name, path)
    return {
        **{name: getattr(request, name) for name in plain},
        **{name: getattr(chosen, name) for name in settled},
        **({} if chosen.tilt is None else {"tilt" if request.few_step else "merged": chosen.tilt}),
        **({"vae_dtype": chosen.vae_dtype} if chosen.vae_dtype else {}),
        **({"sizes": sizes} if sizes else {}),
        **({"levels": dict(chosen.levels)} if chosen.levels else {}),
        # Which CLIP is the last is known once the rewards are loaded; their order decides it.
        **({"rewards_in_order": list(request.rewards)} if request.diversity else {}),
        "student_guidance": chosen.guidance,
        "device": device_of(request.device).type,
        "model": place_of(resolve_path(request.model)),
        **({"family": family} if family else {}),  # the builtin one is the model's own
        "generator": place_of(request.generator_path and resolve_path(request.generator_path)),
        "few_step": place_of(request.few_step),
        "tilt_lora": place_of(request.tilt_lora),
        "rewards": {n: place_of(files_of(n, path)) for n, path in request.rewards.items()},
        **({"beside": {n: place_of(place) for n, place in beside.items()}} if beside else {}),
        **({"revisions": revised} if revised else {}),
        "prompts": hashlib.blake2b(prompts.encode(), digest_size=16).hexdigest(),
        "versions": _versions(request),
    }


def _versions(request: Request) -> dict[str, str]:
    """The versions of the packages that make images and read prompts, and of those that score for
    one of the rewards. One that is missing is named when it is needed."""
    found = {}
    of_rewards = [package for reward in request.rewards for package in NEEDS.get(reward, ())]
    of_text = request.pipelines.model.family.text_packages if request.has_files else ()
    for name in ("tiltflow", *LIBRARIES, *of_text, *of_rewards):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def content_of(request: Request) -> dict[str, Any]:
    """What the files hold that the scores of a request depend on: the prompts with their metadata,
    and each reward's files (`rewards_fingerprints`), wherever these lie and whenever they were
    written."""
    return {
        "prompts": prompts_fingerprint(request.prompts),
        "rewards": rewards_fingerprints(request.rewards),
    }


def adapters_of(request: Request) -> dict[str, str]:
    """The fingerprints of the student's adapters by name: of the LoRAs at hand, whatever a contract
    says of them; of what holds both adapters, those in its contract."""
    found = dict(request.settled.adapters)
    if request.has_files and request.settled.tilt is None:
        for name, folder in ((FEW_STEP, request.few_step), (TILT, request.tilt_lora)):
            if folder is not None and adapter_keys(folder) is not None:
                found[name] = lora_mark(folder)
    return found


def digest(what: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits for what was asked."""
    text = json.dumps(what, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
