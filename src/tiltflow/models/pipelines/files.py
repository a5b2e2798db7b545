"""Whether a pipeline directory is whole and of one piece, before any weight loads and without
diffusers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tiltflow.models.family import Family, has_files
from tiltflow.models.pipelines.directory import (
    INDEX,
    SIDE_FILE,
    Pipeline,
    absent_parts,
    is_encoder,
    is_network,
    is_null,
    is_part,
    local_pipeline,
    stem,
)
from tiltflow.models.pipelines.headers import DEPTHS, WIDTHS, check_sizes
from tiltflow.models.pipelines.limits import check_numbers, flattened, is_number, is_whole, shown

__all__ = ["absent_parts", "check_directory", "check_pipeline", "check_teacher", "local_pipeline"]

PART_NAME = re.compile(r"\w+")

LIBRARIES = ("diffusers", "transformers", "tiltflow.scheduler")
"""Where the classes of a pipeline's parts may come from; no code is taken from the directory."""

STUDENTS = "CPSFlowMatchScheduler"
"""The scheduler of a merged student, which any family's pipeline may have."""

NUMBERED = ("config.json", "scheduler_config.json")
JSON_FILES = (*NUMBERED, "tokenizer_config.json", "tokenizer.json", "vocab.json")
TOKENIZER_FILES = (("tokenizer.json",), ("spiece.model",), ("vocab.json", "merges.txt"))
"""The files that a tokenizer may consist of, besides its tokenizer_config.json."""


def check_pipeline(path: str | Path, family: str | None = None) -> str:
    """The family of the pipeline in directory `path` by its name.

    A family without files passes unchecked: as `family`, or as the path where that is None.

    Raises:
        ValueError: if there is no such directory, it holds no pipeline, one of another class than
            `family`, or one with files missing (all of them are listed) or broken.
    """
    if not has_files(None if family else str(path), family):
        return family or str(path)
    return check_directory(Pipeline(path, family)).name


def check_directory(pipeline: Pipeline) -> Family:
    """The pipeline's family, when its directory is in order; what has passed passes again unread.

    Raises:
        ValueError: as `check_pipeline`.
    """
    family = pipeline.family
    if pipeline.checked:
        return family
    root, index, name = pipeline.root, pipeline.index, family.pipeline
    parts = parts_of(pipeline, family)
    missing = _missing_files(pipeline, family, parts)
    scheduler = index.get("scheduler")
    if isinstance(scheduler, list) and scheduler[-1] not in (None, STUDENTS, *family.schedulers):
        raise ValueError(f"{root} has a {scheduler[-1]}, but it needs a {family.schedulers[0]}")
    if missing:
        listed = f"{', '.join(missing)} missing{_left_over(pipeline, parts, missing)}"
        raise ValueError(f"{root} is not a complete {name}: {listed}")
    for part in parts:
        _check_class(pipeline, part, family)
        for file in JSON_FILES:
            content = pipeline.json(f"{part}/{file}") if pipeline.has(f"{part}/{file}") else {}
            if file in NUMBERED:
                for config in flattened(content):
                    check_numbers(root / part / file, config, family.whole, family.nullable)
        if is_network(part):
            depths, widths = (*DEPTHS, *family.depths), (*WIDTHS, *family.widths)
            for config in flattened(pipeline.config(part)):
                check_sizes(root / part, config, pipeline.header(part), depths, widths)
    check_numbers(root / INDEX, index)
    _check_kinds(pipeline, family)
    check_numbers(root / SIDE_FILE, pipeline.side)
    _check_tokenizers(pipeline, family)
    pipeline.checked = True
    return family


def check_teacher(pipeline: Pipeline) -> None:
    """Whether a pipeline may be the teacher of a run: a merged student is none.

    It would be the fake score's start too, with guidance on top of what was distilled from it.

    Raises:
        ValueError: if the pipeline's scheduler is the students'; as `Pipeline.family`.
    """
    scheduler = pipeline.index.get("scheduler")
    if not isinstance(scheduler, list) or scheduler[-1:] != [STUDENTS]:
        return
    start = f", or model.generator_path={pipeline}" if pipeline.family.twin else ""
    raise ValueError(
        f"{pipeline} is a merged student (its scheduler is a {STUDENTS}) and cannot be a teacher: "
        "give the model that it was trained on, and to go on from the student model.few_step=RUN "
        f"for stage 2, run.resume=true in its run for more of stage 1{start}"
    )


def _check_class(pipeline: Pipeline, part: str, family: Family) -> None:
    """Whether a part is what its family takes, by the index and by its own configuration."""
    wanted = family.classes(part)
    if not wanted:
        return
    for file, name in (
        (INDEX, (pipeline.index.get(part) or [None])[-1]),
        (f"{part}/config.json", pipeline.config(part).get("_class_name")),
    ):
        if name not in wanted and not (file != INDEX and name is None):
            raise ValueError(
                f"{pipeline.root / file} calls the {part} {shown(name)}, but it must be a "
                f"{' or a '.join(wanted)}"
            )


def _check_kinds(pipeline: Pipeline, family: Family) -> None:
    """Whether what a family's index says beside its parts is of the kind that it is by default."""
    for key, default in family.twin_index.items():
        value, listed = pipeline.index.get(key), isinstance(default, list)
        if value is not None and not (isinstance(value, list) if listed else is_whole(value)):
            raise ValueError(
                f"{pipeline.root / INDEX} has {key}={shown(value)}, which is no "
                f"{'list' if listed else 'whole number'}"
            )


def _check_tokenizers(pipeline: Pipeline, family: Family) -> None:
    """Whether the tokenizers have lengths, and CLIP's no more tokens than CLIP has positions."""
    for part in (name for name in pipeline.index if name.startswith("tokenizer")):
        name = f"{part}/tokenizer_config.json"
        if is_null(pipeline.index[part]) or not pipeline.has(name):
            continue
        encoder, file = part.replace("tokenizer", "text_encoder"), pipeline.root / name
        length = pipeline.json(name).get("model_max_length")
        if not any(name.startswith("CLIP") for name in family.classes(encoder)):
            if length is not None and not (is_number(length) and length > 0):
                raise ValueError(f"{file} has model_max_length={shown(length)}, which is no length")
            continue
        positions = pipeline.config(encoder).get("max_position_embeddings", 77)
        if length is None:
            raise ValueError(
                f"{file} has no model_max_length, and prompts are padded to it: add the "
                f"{positions} of its text encoder"
            )
        if not is_number(length) or not 1 <= length <= positions:
            raise ValueError(
                f"{file} has model_max_length={shown(length)}, which is no length from 1 to the "
                f"{positions} positions of its text encoder"
            )


def parts_of(pipeline: Pipeline, family: Family) -> list[str]:
    """The parts that the family cannot do without, and those that the index lists.

    Raises:
        ValueError: if the index lists a part of a class from elsewhere than diffusers and
            transformers, or one whose name is no folder name; or if it lists no text encoder.
    """
    index, place = pipeline.index, pipeline.root / INDEX
    needed = ["transformer", "vae", "scheduler"]
    for part in family.required:
        encoder = part.replace("tokenizer", "text_encoder")
        if not family.absent_encoders or not is_null(index.get(encoder)):
            needed.append(part)
    for name, value in index.items():
        if name not in needed and (name.startswith("_") or not is_part(value) or is_null(value)):
            continue
        if value == [None, None] and not (pipeline.root / name).is_dir():
            continue  # a part that is needed and not there: its files are listed as missing
        known = is_part(value) and len(value) == 2 and value[0] in LIBRARIES
        if not known or not PART_NAME.fullmatch(name):
            raise ValueError(
                f"{place} lists {name!r} as {shown(value)}, which is no class of "
                f"{' or '.join(LIBRARIES)}"
            )
        needed.append(name)
    if not any(part.startswith("text_encoder") for part in needed):
        raise ValueError(f"{place} lists no text encoder: a pipeline needs one at least")
    return list(dict.fromkeys(needed))


def _missing_files(pipeline: Pipeline, family: Family, parts: list[str]) -> list[str]:
    """The files, relative to the root, that loading the pipeline would ask for in vain."""
    missing: list[str] = []
    for part in parts:
        wanted = _wanted(pipeline, part)
        missing += [f"{part}/{name}" for name in wanted if not pipeline.has(f"{part}/{name}")]
        if not wanted and not (pipeline.root / part).is_dir():
            missing.append(f"{part}/(the folder)")
    if family.chat_template and not missing and not _has_chat_template(pipeline, _words(family)):
        missing.append(f"{_words(family)}/chat_template.jinja")
    return missing


def _left_over(pipeline: Pipeline, parts: list[str], missing: list[str]) -> str:
    """A clause where shards are missing beside a single file: its save left an older index."""
    for part in parts:
        both = is_network(part) and not is_encoder(part) and pipeline.both_kinds(part)
        if both and any(name.startswith(f"{part}/") for name in missing):
            single = f"{stem(part)}.safetensors"
            return (
                f" (an index names them, and then diffusers does not read {part}/{single}: if "
                "that is the newer, remove the index)"
            )
    return ""


def unread_shards(pipeline: Pipeline) -> list[str]:
    """Lines on text encoders of which shards lie beside a single file, which alone is loaded: a
    later save in shards leaves the older file (findings/saved_in_shards_over_one_file.sh).

    Raises:
        ValueError: as `Pipeline.weight_files`.
    """
    single = f"{stem('text_encoder')}.safetensors"
    return [
        f"{pipeline}/{part} has {single} and shards: transformers loads {single} alone, so if the "
        "shards are the newer, remove it"
        for part in pipeline.index
        if is_encoder(part)
        if pipeline.both_kinds(part) and pipeline.weight_files(part) == [single]
    ]


def _words(family: Family) -> str:
    """The part that makes tokens of a prompt: the first tokenizer, or a processor's."""
    return "processor" if "processor" in family.required else "tokenizer"


def _has_chat_template(pipeline: Pipeline, part: str) -> bool:
    """Whether the tokenizer in a part can put a prompt into a chat."""
    if pipeline.has(f"{part}/chat_template.jinja"):
        return True
    return bool(pipeline.json(f"{part}/tokenizer_config.json").get("chat_template"))


def _wanted(pipeline: Pipeline, part: str) -> list[str]:
    """The files that a part has to hold."""
    if part == "scheduler":
        return ["scheduler_config.json"]
    if part.startswith(("tokenizer", "processor")):
        choices: Any = TOKENIZER_FILES
        present = any(all(pipeline.has(f"{part}/{n}") for n in names) for names in choices)
        return ["tokenizer_config.json", *([] if present else TOKENIZER_FILES[0])]
    if is_network(part):
        return ["config.json", *pipeline.weight_files(part)]
    return []
