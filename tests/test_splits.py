"""Splits of one prompt set: never read together, and taken by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tiltflow.config.load import RunConfig, load_config, read_prompts
from tiltflow.data.prompts import load_prompts
from tiltflow.data.tables import split_name

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

HUB = ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001", "test")


def parquet(folder: Path, *names: str) -> Path:
    """Files of one prompt each, which is the file's name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        pq.write_table(pa.table({"prompt": [name]}), folder / f"{name}.parquet")
    return folder


def saved(folder: Path, split: str) -> Path:
    """A dataset as `datasets` saves it, of one prompt: the split's name."""
    folder.mkdir(parents=True)
    table = pa.table({"prompt": [split]})
    with (
        pa.OSFile(str(folder / "data.arrow"), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as stream,
    ):
        stream.write_table(table)
    state = {"_data_files": [{"filename": "data.arrow"}], "_split": split}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def texts(source: Path, split: str | None = None) -> list[str]:
    return [prompt.text for prompt in load_prompts(source, split)]


@pytest.mark.parametrize(
    ("file", "split"),
    [
        ("train-00000-of-00001.parquet", "train"),
        ("my_split-00003-of-00010.parquet", "my_split"),
        ("my_split-00003-of-00010-0123456789abcdef.parquet", "my_split"),
        ("test.parquet", "test"),
        ("captions_val.parquet", "validation"),
        ("Dev.parquet", "validation"),
        ("train-00001.parquet", "train"),
        ("holdout-0.parquet", "test"),
        ("part-00001.parquet", ""),
        ("devices.parquet", ""),
        ("latest.parquet", ""),
    ],
)
def test_split_of_a_file(file: str, split: str) -> None:
    assert split_name(file) == split


def test_splits_in_one_folder_are_refused_and_taken_when_asked_for(tmp_path: Path) -> None:
    folder = parquet(tmp_path, *HUB)
    with pytest.raises(ValueError) as caught:
        texts(folder)
    assert "holds several splits" in str(caught.value)
    assert "(test, train, validation)" in str(caught.value)
    assert "data.split" in str(caught.value)
    assert texts(folder, "train") == list(HUB[:2])
    assert texts(folder, "validation") == [HUB[2]]
    with pytest.raises(ValueError, match="no split 'tarin'; it has test, train, validation"):
        texts(folder, "tarin")


def test_nothing_in_a_folder_is_left_out_without_a_word(tmp_path: Path) -> None:
    """Tables of several kinds, endings in capitals, and parts of a whole that are not all there."""
    (tmp_path / "A.CSV").write_text("prompt\na\n")
    (tmp_path / "b.csv").write_text("prompt\nb\n")
    assert texts(tmp_path) == ["a", "b"]
    (tmp_path / "c.tsv").write_text("prompt\nc\n")
    with pytest.raises(ValueError, match=r"holds \.csv and \.tsv files, which are never read toge"):
        texts(tmp_path)
    folder = parquet(tmp_path / "part", "train-00000-of-00003", "train-00002-of-00003", "test")
    for split in (None, "train", "test"):
        with pytest.raises(ValueError, match=r"has 2 of the 3 parts of 'train': fetch the others"):
            texts(folder, split)
    older = parquet(tmp_path / "older", "train-00001-of-00002-0123456789abcdef")  # of datasets
    with pytest.raises(ValueError, match=r"has 1 of the 2 parts of 'train'"):
        texts(older)


@pytest.mark.parametrize(
    ("kept", "there"),
    [
        (["00000-of-00002-0123456789abcdef", "00000-of-00002-fedcba9876543210"], 1),
        (["00000-of-00002", "00002-of-00002"], 1),
        (["00000-of-00002", "00001-of-00002", "00001-of-00002-0123456789abcdef"], 2),
    ],
)
def test_parts_of_a_whole_are_told_by_their_numbers(
    tmp_path: Path, kept: list[str], there: int
) -> None:
    folder = parquet(tmp_path, *(f"train-{part}" for part in kept))
    missing = r"has 1 of the 2 parts of 'train': fetch the others"
    twice = r"has 3 files for the 2 parts of 'train': keep one of each number"
    with pytest.raises(ValueError, match=missing if there == 1 else twice):
        texts(folder)


def test_one_split_is_one_set(tmp_path: Path) -> None:
    folder = parquet(tmp_path, "train-00000-of-00002", "train-00001-of-00002")
    for beside in ("README.md", ".gitattributes", "dataset_infos.json", "prompts.txt"):
        (folder / beside).write_text("no table")  # as folders of the hub have them
    assert texts(folder) == ["train-00000-of-00002", "train-00001-of-00002"]
    assert texts(folder, "train") == ["train-00000-of-00002", "train-00001-of-00002"]
    assert texts(parquet(tmp_path / "plain", "part-0", "part-1")) == ["part-0", "part-1"]
    with pytest.raises(ValueError, match="no split 'train'; it has none"):
        texts(tmp_path / "plain", "train")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (("captions", "captions_test"), "test by name, and 'captions.parquet', whose name says no"),
        (("x", "test"), "test by name, and 'x.parquet', whose name says none: say it there"),
        (("a", "b", "train-00000-of-00001"), "train by name, and 'a.parquet'"),
        (("captions_train", "extra", "test"), "train, test by name, and 'extra.parquet'"),
    ],
)
def test_what_names_no_split_is_not_read_beside_what_does(
    tmp_path: Path, files: tuple[str, ...], said: str
) -> None:
    """Read together, what is held out would be trained on; by name, the file would be left out."""
    folder = parquet(tmp_path, *files)
    for split in (None, "train", "test"):
        with pytest.raises(ValueError, match=f"holds several splits: {said}"):
            texts(folder, split)
    assert texts(folder / f"{files[0]}.parquet") == [files[0]]


def test_what_datasets_saved_is_taken_by_split(tmp_path: Path) -> None:
    for split in ("test", "train"):
        saved(tmp_path / split, split)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match=r"give the folder of one \(test, train\), or its name"):
        texts(tmp_path)
    assert texts(tmp_path, "train") == ["train"]
    assert texts(tmp_path / "test") == texts(tmp_path / "test", "test") == ["test"]
    with pytest.raises(ValueError, match="is of the split 'test', not 'train'"):
        texts(tmp_path / "test", "train")
    with pytest.raises(ValueError, match=r"no split '\.\.'"):
        texts(tmp_path, "..")


def test_what_has_no_splits_says_so(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a\n")
    for source in (str(tmp_path / "p.txt"), "shapes-train"):
        with pytest.raises(ValueError, match="has no splits, so there is no 'train' of it"):
            load_prompts(source, "train")


def config(folder: Path, *more: str) -> RunConfig:
    return load_config("demo_cold_start", [f"data.prompts={folder}", "data.split=train", *more])


@pytest.mark.parametrize(
    ("more", "fixed"),
    [
        (["data.eval_prompts="], HUB[:2]),
        (["data.eval_prompts=", "data.eval_split=validation"], HUB[2:3]),
        (["data.eval_prompts={folder}", "data.eval_split=test"], HUB[3:]),
    ],
)
def test_a_run_takes_the_splits_that_it_names(
    tmp_path: Path, more: list[str], fixed: tuple[str, ...]
) -> None:
    folder = parquet(tmp_path, *HUB)
    sets = read_prompts(config(folder, *(each.format(folder=folder) for each in more)))
    assert [p.text for p in sets.train] == list(HUB[:2])
    assert [p.text for p in sets.fixed] == list(fixed)
