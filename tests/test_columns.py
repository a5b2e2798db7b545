"""Tables of prompts: CSV, TSV and sets of `datasets`; what columns are called; weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tiltflow.cli.options import named_columns
from tiltflow.config.load import load_config, read_prompts
from tiltflow.core.checkpoint import load_checkpoint
from tiltflow.core.randomness import Randomness
from tiltflow.data.buckets import by_column
from tiltflow.data.columns import Columns, weights_of
from tiltflow.data.embeddings import check_negatives, distinct, encode_prompts
from tiltflow.data.prompts import Prompt, PromptSampler, load_prompts
from tiltflow.evaluation.categories import category_of
from tiltflow.models.families import load_backbone
from tiltflow.tasks.interface import request_of
from tiltflow.tasks.study_file import load_study
from tiltflow.tasks.train import run_training


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


CSV = """\ufeffid,Prompt,size,kind,often\r
1,"a fox, a ""red"" one",64x128,animals,2\r
\r
2,"two\r
lines",64,things,0.5\r
3,  a fox ,64,animals,0\r
"""


def test_csv_has_a_row_a_prompt_of_text(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", CSV)
    prompts = load_prompts(path, columns=Columns(prompt="Prompt", category="kind"))
    assert [p.text for p in prompts] == ['a fox, a "red" one', "two\nlines", "a fox"]
    assert prompts[0].metadata == {
        "id": "1", "Prompt": 'a fox, a "red" one', "size": "64x128", "kind": "animals",
        "often": "2", "category": "animals",
    }  # fmt: skip
    assert [category_of(p.metadata) for p in prompts] == ["animals", "things", "animals"]
    assert weights_of("often", prompts) == (2.0, 0.5, 0.0)
    assert [b.size for b in by_column("size", prompts)] == [(64, 128), 64]


def test_tsv_is_the_same_with_tabs(tmp_path: Path) -> None:
    path = write(tmp_path / "p.tsv", 'prompt\tnote\na, b\t\nan "x"\ty\n')
    assert load_prompts(path) == [
        Prompt("a, b", {"prompt": "a, b", "note": ""}),
        Prompt('an "x"', {"prompt": 'an "x"', "note": "y"}),
    ]


def test_a_folder_of_tables_and_its_splits(tmp_path: Path) -> None:
    for name in ("test", "train-00000-of-00002", "train-00001-of-00002"):
        write(tmp_path / f"{name}.csv", f"prompt\n{name}\n")
    found = load_prompts(tmp_path, "train")
    assert [p.text for p in found] == ["train-00000-of-00002", "train-00001-of-00002"]
    with pytest.raises(ValueError, match=r"holds several splits; .*\(test, train\)"):
        load_prompts(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "columns", "message"),
    [
        ("a.csv", "prompt;size\nx;1\n", {}, "none of the columns prompt, text, caption; it has pr"),
        ("a.csv", "text\nx\n", {"prompt": "Text"}, "has no column 'Text'; it has text"),
        ("a.csv", "prompt,prompt\na,b\n", {}, "has two columns 'prompt'"),
        ("a.csv", "prompt,x\na\n", {}, "line 2 has 1 cells, but there are 2 columns"),
        ("a.csv", 'prompt\n"a\n', {}, "line 2 cannot be read as a table"),
        ("a.csv", 'prompt\n"a"b\n', {}, "line 2 cannot be read as a table"),
        ("a.csv", "prompt\n" + "a" * 200_000, {}, "line 2 cannot be read as a table"),
        ("a.csv", "prompt,x\n ,b\n", {}, "line 2 is an empty prompt"),
        ("a.csv", "prompt\n", {}, "has no prompts"),
        ("a.csv", "", {}, "has no prompts"),
        ("a.csv", "prompt,k\na,\n", {"category": "k"}, "line 2 has no category as 'k'"),
        ("a.jsonl", '{"prompt": "a"}', {"prompt": "q"}, "line 1 has none of the keys q"),
        ("a.jsonl", '{"prompt": "a"}', {"category": "k"}, "line 1 has no category as 'k'"),
        ("a.txt", "a", {"prompt": "q"}, "line 1 is a prompt alone, without columns"),
    ],
)
def test_bad_tables(
    tmp_path: Path, name: str, content: str, columns: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_prompts(write(tmp_path / name, content), columns=Columns(**columns))
    assert "\n" not in str(caught.value)


def test_packaged_sets_have_no_columns() -> None:
    with pytest.raises(ValueError, match="shapes-train is a packaged set"):
        load_prompts("shapes-train", columns=Columns(weight="w"))


def test_negative_prompts(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", "prompt,avoid\na, blurry \nb,\n")
    prompts = load_prompts(path, columns=Columns(negative="avoid"))
    assert [p.negative for p in prompts] == ["blurry", None]
    assert [p.negative for p in load_prompts(path)] == [None, None]
    assert distinct([*prompts, Prompt("blurry")]) == ["a", "b", "blurry"]
    with pytest.raises(ValueError, match="line 2 has no negative prompt as 'avid'"):
        load_prompts(path, columns=Columns(negative="avid"))


@pytest.mark.parametrize("name", ["sd35m", "qwen_image"])
def test_the_teacher_is_guided_away_from_each_prompts_own(
    tiny_pipeline: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    """What `select` gives is what encoding the negative texts gives, cached or not."""
    backbone = load_backbone(tiny_pipeline(name), device="cpu", max_sequence_length=8)
    prompts = [Prompt("a cat", negative="blurry"), Prompt("a dog"), Prompt("a cat", negative="bad")]
    encoded = encode_prompts(backbone, prompts, batch_size=2)
    cond, _ = encoded.select([0, 1, 2], torch.device("cpu"))
    without = encode_prompts(backbone, [Prompt(p.text) for p in prompts], batch_size=2)
    plain, _ = without.select([0, 1, 2], torch.device("cpu"))
    texts = encode_prompts(backbone, [Prompt("blurry"), Prompt("bad")], batch_size=2)
    own, _ = texts.select([0, 1], torch.device("cpu"))
    for key, value in cond.negative.items():
        assert torch.equal(value[1], plain.negative[key][1])
        assert torch.equal(value[[0, 2]], own.positive[key])
        assert torch.equal(cond.positive[key], plain.positive[key])


def test_who_is_not_guided_has_no_negative_prompts(tiny_pipeline: Callable[[str], Path]) -> None:
    prompts = [Prompt("a", negative="b")]
    flux = load_backbone(tiny_pipeline("flux_dev"), device="cpu")
    with pytest.raises(ValueError, match="need a teacher with classifier-free guidance"):
        check_negatives(prompts, flux, None)
    sd35m = load_backbone(tiny_pipeline("sd35m"), device="cpu")
    with pytest.raises(ValueError, match="need a teacher with classifier-free guidance"):
        check_negatives(prompts, sd35m, 1.0)
    check_negatives(prompts, sd35m, None)
    check_negatives([Prompt("a")], flux, None)
    sana = load_backbone(tiny_pipeline("sana"), device="cpu")
    with pytest.raises(ValueError, match="encodes a negative prompt otherwise than a prompt"):
        check_negatives(prompts, sana, None)


# --- weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, -0.5], r"the weight of prompt 2 in 'w' is -0\.5; it is to be a number of 0 or more"),
        ([1, float("nan")], "prompt 2 in 'w' is nan"),
        ([1, float("inf")], "prompt 2 in 'w' is inf"),
        (["1", "much"], "prompt 2 in 'w' is 'much'"),
        ([1, True], "prompt 2 in 'w' is True"),
        ([1, 10**400], "prompt 2 in 'w' is 1000"),
        ([1, None], "prompt 2 in 'w' is none"),
        ([0, "0.0"], "every weight in 'w' is 0, so none would be drawn"),
    ],
)
def test_bad_weights(weights: list[object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weights_of("w", [Prompt("a", {"w": weight}) for weight in weights])


@pytest.mark.parametrize("weight", [1.0, 0.1, 1 / 3, 7e-300, 3e300])
def test_weights_that_are_alike_are_none(weight: float) -> None:
    for n in (1, 3, 64, 1000):
        plain = PromptSampler(n, Randomness(3))
        weighted = PromptSampler(n, Randomness(3), weights=(weight,) * n)
        assert weighted.indices(0, 3 * n) == plain.indices(0, 3 * n)


WEIGHTS = (5.0, 1.0, 0.0, 0.7, 2.0, 1e-30, 1.3)


def test_an_epoch_has_each_prompt_as_often_as_it_weighs() -> None:
    n = len(WEIGHTS)
    sampler = PromptSampler(n, Randomness(0), weights=WEIGHTS)
    drawn = sampler.indices(0, 2000 * n)
    due = [n * w / sum(WEIGHTS) for w in WEIGHTS]
    for epoch in range(2000):
        times = Counter(drawn[epoch * n : (epoch + 1) * n])
        assert all(abs(times[i] - due[i]) < 1 for i in range(n))
    assert 2 not in drawn
    share = Counter(drawn)
    assert all(abs(share[i] / 2000 - due[i]) < 0.05 for i in range(n))


def test_weighted_draws_are_counted() -> None:
    sampler = PromptSampler(7, Randomness(3), weights=WEIGHTS)
    whole = sampler.indices(0, 60)
    assert all(sampler.indices(p, c) == whole[p : p + c] for p in range(20) for c in (0, 1, 9, 30))
    assert PromptSampler(7, Randomness(4), weights=WEIGHTS).indices(0, 60) != whole
    some = sampler.of((0, 3, 4))
    assert set(some.indices(0, 30)) == {0, 3, 4} and some.weights == (5.0, 0.7, 2.0)


def test_a_bucket_weighs_as_its_prompts_do() -> None:
    prompts = [Prompt(str(i), {"size": size}) for i, size in enumerate((64, 96, 64, 128))]
    found = by_column("size", prompts, (1.5, 3.0, 0.25, 0.0))
    assert [(b.size, b.weight, b.prompts) for b in found] == [(64, 1.75, (0, 2)), (96, 3.0, (1,))]


# --- a run's prompts ----------------------------------------------------------------------------


def test_a_run_reads_its_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", CSV)
    chosen = [f"data.prompts={path}", "data.columns.prompt=Prompt", "data.columns.weight=often"]
    sets = read_prompts(load_config("demo_cold_start", chosen))
    assert len(sets.train) == 3 and len(sets.fixed) == 1024  # the packaged ones
    plain = write(tmp_path / "e.txt", "a dog\n")
    sets = read_prompts(load_config("demo_cold_start", [*chosen, f"data.eval_prompts={plain}"]))
    assert [p.text for p in sets.fixed] == ["a dog"]
    with pytest.raises(ValueError, match="the weight of prompt 1 in 'id2' is none"):
        read_prompts(load_config("demo_cold_start", [*chosen, "data.columns.weight=id2"]))
    with pytest.raises(ValueError, match=r"unknown key data\.columns\.prmpt"):
        load_config("demo_cold_start", [*chosen, "data.columns.prmpt=x"])


def test_sampling_and_studies_read_the_same_way(tmp_path: Path) -> None:
    for name in ("test", "train"):
        write(tmp_path / f"{name}.csv", f"Caption,prompt,kind\n{name},x,{name}s\n{name} 2,x,y\n")
    columns = named_columns(["prompt=Caption", "category=kind"])
    request = request_of("m", tmp_path, {"split": "test", "columns": columns})
    assert [p.text for p in request.prompts] == ["test", "test 2"]
    assert category_of(request.prompts[0].metadata) == "tests"
    study = write(
        tmp_path / "study.yaml",
        json.dumps({
            "rows": {"a": {"recipe": "mixture_cold_start"}}, "seeds": [0], "reference": "a",
            "stages": {"cold_start": {"budget": 100}}, "rewards": ["shapes"], "count": 2,
            "prompts": str(tmp_path), "split": "train", "columns": dict(columns),
        }),
    )  # fmt: skip
    assert [p.text for p in load_study(study).scored()] == ["train", "train 2"]
    for given in (["q"], ["=a"], ["prompt="], ["prompt=a", "prompt=b"]):
        with pytest.raises(ValueError, match="--column"):
            named_columns(given)
    with pytest.raises(ValueError, match="said of a prompt file only"):
        request_of("m", ["a"], {"split": "test"})


@pytest.mark.long
def test_a_weighted_run_resumes_exactly(
    tiny_pipeline: Callable[[str], Path], tmp_path: Path
) -> None:
    """And weights that are alike train what none do."""
    captions = [f"a {thing}" for thing in ("cat", "dog", "fox", "hen", "cow")]
    rows = [f"{text},{weight},3\n" for text, weight in zip(captions, WEIGHTS, strict=False)]
    path = write(tmp_path / "p.csv", "prompt,w,alike\n" + "".join(rows))
    fixed = {
        "model.path": tiny_pipeline("sd35m"), "model.autocast": "null", "adapters.rank": 2,
        "model.max_sequence_length": 8, "data.prompts": path, "data.eval_prompts": path,
        "train.batch_size": 2, "watch.rewards": "{}", "log.samples_every": 0,
        "run.device": "cpu", "checkpoint.every": 1,
    }  # fmt: skip

    def train(out: str, steps: int, *more: str) -> dict[str, torch.Tensor]:
        chosen = [*(f"{k}={v}" for k, v in fixed.items()), f"train.steps={steps}"]
        config = load_config("demo_cold_start", [*chosen, f"run.out={tmp_path / out}", *more])
        run_training(config, Console(quiet=True))
        tables = load_checkpoint(tmp_path / out).tensors
        return {f"{group}/{k}": v for group, table in tables.items() for k, v in table.items()}

    def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
        return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())

    weighted = "data.columns.weight=w"
    whole = train("whole", 3, weighted)
    train("parts", 1, weighted)
    assert equal(whole, train("parts", 3, weighted, "run.resume=true"))
    plain = train("plain", 3)
    assert equal(plain, train("alike", 3, "data.columns.weight=alike")) and not equal(plain, whole)


# --- datasets -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of `datasets` with one set of two splits, as it leaves it after a download."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("datasets")
    files = {
        split: str(write(folder / f"{split}.csv", f"Prompt,w\na {split},1\nb,2\n"))
        for split in ("train", "test")
    }
    cache = folder / "cache"
    builder = datasets.load_dataset_builder("csv", data_files=files, cache_dir=str(cache))
    builder.download_and_prepare()
    # by the file's name, `datasets` knows a downloaded set: OWNER___NAME/CONFIGURATION/VERSION/HASH
    place = Path(builder.cache_dir)
    target = cache / "me___my_set" / "default" / place.parent.name / place.name
    target.parent.mkdir(parents=True)
    place.rename(target)
    for file in target.glob("csv-*.arrow"):
        file.rename(file.with_name(file.name.replace("csv-", "my_set-", 1)))
    about = json.loads((target / "dataset_info.json").read_text())
    about |= {"dataset_name": "my_set", "config_name": "default"}
    for split in about["splits"].values():
        split["dataset_name"] = "my_set"
    (target / "dataset_info.json").write_text(json.dumps(about))
    return cache


READ = """
import socket, sys
def refuse(*args, **named): raise SystemExit("the network was asked for")
socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse
from tiltflow.data.columns import Columns
from tiltflow.data.prompts import load_prompts
for asked in sys.argv[1:]:
    source, _, split = asked.partition(" ")
    try:
        found = load_prompts(source, split or None, Columns(prompt="Prompt"))
        print([(p.text, dict(p.metadata)) for p in found])
    except ValueError as error:
        print(error)
"""


def read(cache: Path, *sources: str) -> list[str]:
    """What is read, each as "SOURCE SPLIT", in a process that `HF_HUB_OFFLINE` says nothing to."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_DATASETS_CACHE": str(cache), "HF_HOME": str(cache / "home")}
    done = subprocess.run(
        [sys.executable, "-c", READ, *sources],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.splitlines()


def test_sets_in_the_cache_of_datasets_without_the_network(cached: Path) -> None:
    name = "datasets:me/my_set"
    found, several, misspelt, absent = read(
        cached, f"{name} train", name, f"{name} tarin", "datasets:me/another"
    )
    rows = [("a train", {"Prompt": "a train", "w": 1}), ("b", {"Prompt": "b", "w": 2})]
    assert found == str(rows)
    assert "holds several splits; give one (" in several
    assert "has no split 'tarin'; it has " in misspelt
    assert "is not in the local cache of datasets" in absent and "HF_HUB_OFFLINE=0" in absent


def test_names_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("datasets:", "datasets:../x", "datasets:a/b/c", "datasets:http://h/x"):
        with pytest.raises(ValueError, match="names no set: write datasets:OWNER/NAME"):
            load_prompts(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(ValueError, match="give it without datasets:"):
        load_prompts("datasets:here")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"needs datasets \(pip install 'tiltflow\[datasets\]'\)"):
        load_prompts("datasets:me/my_set")
