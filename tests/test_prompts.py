"""Prompt files as people have them, and the order that a run takes them in."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from tiltflow.core.randomness import Randomness
from tiltflow.data.prompts import Prompt, PromptSampler, load_prompts
from tiltflow.rewards.worlds import shapes

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="shared/data is not here")

GENEVAL = {"tag": "counting", "include": [{"class": "fox", "count": 2}], "prompt": "two foxes"}


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def test_txt_is_one_prompt_a_line(tmp_path: Path) -> None:
    # A byte-order mark, Windows line ends, a blank line, and U+2028, which ends no line here.
    path = write(tmp_path / "p.TXT", "\ufeffa fox\r\n\r\n  a\u2028dog \na fox")
    assert load_prompts(path) == [Prompt("a fox"), Prompt("a\u2028dog"), Prompt("a fox")]


def test_jsonl_keeps_the_whole_object_as_metadata(tmp_path: Path) -> None:
    rows = [GENEVAL, {"text": "b"}, {"caption": "c", "prompt": None}, "d"]
    path = write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n")
    prompts = load_prompts(str(path))
    assert [p.text for p in prompts] == ["two foxes", "b", "c", "d"]
    assert prompts[0].metadata == GENEVAL
    assert prompts[3].metadata == {}


def test_json_is_a_list_of_strings_or_objects(tmp_path: Path) -> None:
    path = write(tmp_path / "p.json", json.dumps(["a", {"caption": "b", "id": 3}]))
    assert load_prompts(path) == [Prompt("a"), Prompt("b", {"caption": "b", "id": 3})]


def test_prompt_comes_before_text_and_caption(tmp_path: Path) -> None:
    row = {"caption": "c", "text": "t", "prompt": "p"}
    assert load_prompts(write(tmp_path / "p.json", json.dumps([row])))[0].text == "p"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("e.txt", b"\n \n", "has no prompts"),
        ("e.json", b"", "has no prompts"),
        ("e.json", b"[]", "has no prompts"),
        ("e.jsonl", b"", "has no prompts"),
        ("l.txt", b"a fox\n\xff\xfe", "not UTF-8 text .byte 6."),
        ("p.xml", b"a", "should end in one of .txt, .json, .jsonl, .csv, .tsv, .parquet"),
        ("n.jsonl", b'{"prompt": "a"}\n\n{"id": 1}\n', "line 3 has none of the keys prompt, text"),
        ("b.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "line 2 is not valid JSON"),
        ("v.jsonl", b'{"prompt": ""}', "line 1 is an empty prompt"),
        ("s.json", b'["a", "  "]', "item 2 is an empty prompt"),
        ("i.json", b'["a", 3]', "item 2 is not a string"),
        ("t.json", b'[{"prompt": ["a"]}]', "item 1 is not a string"),
        ("o.json", b'{"prompt": "a"}', "should hold a JSON list"),
        ("u.jsonl", b'"\\ud800"', "line 1 has half a surrogate pair"),
        ("d.json", b"[" * 100_000, "nested too deeply"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_prompts(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_missing_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no file nowhere.txt"):
        load_prompts("nowhere.txt")
    with pytest.raises(ValueError, match="nearest set is 'shapes-heldout'"):
        load_prompts("shapes-held-out")
    with pytest.raises(ValueError, match="is a directory"):
        load_prompts(tmp_path)


def test_packaged_shapes_are_balanced_and_apart() -> None:
    train, held_out = load_prompts("shapes-train"), load_prompts("shapes-heldout")
    assert (len(train), len(held_out)) == (12_000, 1_024)
    assert not {p.text for p in train} & {p.text for p in held_out}
    assert Counter(p.metadata["tag"] for p in train) == dict.fromkeys(shapes.CATEGORIES, 2_000)
    assert all(p.metadata["prompt"] == p.text for p in held_out)


def test_the_mixture_has_one_empty_prompt() -> None:
    assert load_prompts("mixture") == [Prompt("")]


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"needs pyarrow \(pip install 'tiltflow\[parquet\]'\)"):
        load_prompts(write(tmp_path / "p.parquet", ""))


def test_parquet_reads_a_row_a_prompt(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"caption": ["a", "b"], "id": [1, 2], "jpg_0": [b"x", b"y"]}), path)
    assert load_prompts(path) == [
        Prompt("a", {"caption": "a", "id": 1}),
        Prompt("b", {"caption": "b", "id": 2}),
    ]
    picture, tags = {"bytes": b"x", "path": "p"}, {"tag": "counting", "include": [{"count": 2}]}
    rows = {"prompt": ["a"], "about": [tags], "image": [picture], "images": [[picture]]}
    pq.write_table(pa.table(rows), path)
    assert load_prompts(path) == [Prompt("a", {"prompt": "a", "about": tags})]
    pq.write_table(pa.table({"prompt": ["a", None]}), path)
    with pytest.raises(ValueError, match="row 2 has none of the keys"):
        load_prompts(path)
    pq.write_table(pa.table({"id": [1]}), path)
    with pytest.raises(ValueError, match="none of the columns"):
        load_prompts(path)
    with pytest.raises(ValueError, match="cannot be read as parquet"):
        load_prompts(write(path, "no parquet"))


def test_a_directory_of_parquet_files_is_read_in_order(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    for name, captions in (("train-00001.parquet", ["c"]), ("train-00000.parquet", ["a", "b"])):
        pq.write_table(pa.table({"caption": captions}), tmp_path / name)
    assert [p.text for p in load_prompts(tmp_path)] == ["a", "b", "c"]


def saved_dataset(folder: Path, shards: list[list[str]]) -> None:
    """The layout of `datasets`' save_to_disk: Arrow streams, and their names in order."""
    pa = pytest.importorskip("pyarrow")
    folder.mkdir()
    names = [f"data-{i:05d}-of-{len(shards):05d}.arrow" for i in range(len(shards))]
    for name, prompts in zip(names, shards, strict=True):
        rows = [{"bytes": b"\xff", "path": None}] * len(prompts)
        table = pa.table({"prompt": prompts, "image": rows, "id": list(range(len(prompts)))})
        place = str(folder / name)
        with pa.OSFile(place, "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": name} for name in names], "_split": "train"})
    )


def test_what_datasets_saved_to_disk_is_read(tmp_path: Path) -> None:
    saved_dataset(tmp_path / "train", [["a", "b"], ["c"]])
    prompts = load_prompts(tmp_path / "train")
    assert [p.text for p in prompts] == ["a", "b", "c"]
    assert prompts[1].metadata == {"prompt": "b", "id": 1}  # and no picture
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(ValueError, match=r"holds several splits; give the folder of one \(train\)"):
        load_prompts(tmp_path)
    (tmp_path / "train" / "data-00001-of-00002.arrow").write_bytes(b"torn")
    with pytest.raises(ValueError, match="00001.* cannot be read as an Arrow stream"):
        load_prompts(tmp_path / "train")
    (tmp_path / "train" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="none of datasets.save_to_disk"):
        load_prompts(tmp_path / "train")


@needs_data
@pytest.mark.parametrize(
    ("name", "count", "key"),
    [
        ("drawbench.txt", 1000, None),
        ("hpsv3.txt", 200, None),
        ("ocr.txt", 100, None),
        ("geneval_metadata.jsonl", 300, "include"),
        ("geneval2.jsonl", 100, "vqa_list"),
    ],
)
def test_the_published_sets_load(name: str, count: int, key: str | None) -> None:
    prompts = load_prompts(DATA / name)
    assert len(prompts) == count
    assert all(p.text for p in prompts)
    assert key is None or all(key in p.metadata for p in prompts)


def test_sampler_takes_every_prompt_once_an_epoch() -> None:
    order = PromptSampler(7, Randomness(3)).indices(0, 21)
    epochs = [order[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] or epochs[1] != epochs[2]


def test_sampler_is_counted() -> None:
    sampler = PromptSampler(7, Randomness(3))
    whole = sampler.indices(0, 50)
    assert all(sampler.indices(p, c) == whole[p : p + c] for p in range(20) for c in (0, 1, 9, 30))
    assert PromptSampler(7, Randomness(4)).indices(0, 50) != whole


def test_sampler_of_one_prompt() -> None:
    assert PromptSampler(1, Randomness(0)).indices(5, 3) == [0, 0, 0]


def test_sampler_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="no prompts"):
        PromptSampler(0, Randomness(0))
    with pytest.raises(ValueError, match="must not be negative"):
        PromptSampler(3, Randomness(0)).indices(-1, 2)
