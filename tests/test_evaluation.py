"""Evaluations that go on after a kill, by category, compared afterwards, and their suites."""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from tiltflow.data.prompts import Prompt, load_prompts
from tiltflow.evaluation.categories import by_category, category_means, category_of
from tiltflow.evaluation.chunks import Chunks, place_of
from tiltflow.evaluation.files import read_scores, scores_path, write_evaluation, write_scores
from tiltflow.evaluation.scores import Diversity, Evaluation, System, evaluate_systems
from tiltflow.evaluation.suites import SUITES, suite_of
from tiltflow.rewards import FunctionReward
from tiltflow.tasks.compare import run_compare
from tiltflow.tasks.tables import show_categories

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
PUBLISHED = {
    "pickscore", "clipscore", "hpsv2", "aesthetic", "image_reward", "hpsv3", "ocr", "geneval",
    "geneval2",
}  # fmt: skip
PROMPTS = [Prompt(f"p{i}\u2028", {"tag": "odd" if i % 2 else "even"}) for i in range(7)]
MEAN = FunctionReward(lambda x, p, m: x.mean((1, 2, 3)), "mean")


class Painter:
    """A system whose image of prompt i from noise `draw` is one colour; counts its images."""

    def __init__(self, name: str, offset: float = 0.0, stop_at: int | None = None) -> None:
        self.name, self.offset, self.made, self.stop_at = name, offset, 0, stop_at

    def paint(self, rows: Sequence[int], draw: int) -> Tensor:
        if self.stop_at is not None and self.made >= self.stop_at:
            raise KeyboardInterrupt
        self.made += len(rows)
        grey = torch.tensor([(i + self.offset) / 20 for i in rows]).view(-1, 1, 1, 1)
        images = grey.expand(-1, 3, 4, 4).clone()
        images[:, draw % 3] += 0.1
        return images

    def system(self) -> System:
        return System(self.name, 4, lambda rows: self.paint(rows, 0), self.paint)


COLOURS = Diversity(
    lambda x: torch.nn.functional.normalize(x.mean((2, 3)) + 0.1, dim=-1),
    prompts=5, images=3, reference="a",
)  # fmt: skip


def run(
    painters: Sequence[Painter], chunks: Chunks | None, saved: list | None = None
) -> Evaluation:
    return evaluate_systems(
        [painter.system() for painter in painters],
        PROMPTS,
        [MEAN],
        batch_size=2,
        comparisons=[("b", "a")],
        diversity=COLOURS,
        keep=3,
        **({"take": chunks.take} if chunks is not None else {}),
        save_images=None if saved is None else lambda *call: saved.append((call[0], *call[1])),
    )


def test_a_killed_evaluation_goes_on_where_it_was(tmp_path: Path) -> None:
    """Every image is made once in all, and the figures are those of an undisturbed run."""
    asked = {"seed": 0}
    first, saved = [Painter("a"), Painter("b", 3.0, stop_at=10)], []
    with pytest.raises(KeyboardInterrupt):
        run(first, Chunks(tmp_path / "parts", asked), saved)
    chunks = Chunks(tmp_path / "parts", asked)
    assert len(chunks) == 4 + 3 * 3 + 4 + 2
    again = [Painter("a"), Painter("b", 3.0)]
    resumed = run(again, chunks, saved)
    whole = [Painter("a"), Painter("b", 3.0)]
    plain = run(whole, None)
    assert [p.made + q.made for p, q in zip(first, again, strict=True)] == [22, 22]
    assert [p.made for p in whole] == [22, 22]
    assert resumed.summary == plain.summary
    assert np.array_equal(resumed.images["b"], plain.images["b"])
    assert resumed.images["b"].shape == (3, 4, 4, 3)
    expected = [(name, *rows) for name in "ab" for rows in ([0, 1], [2, 3], [4, 5], [6])]
    assert saved == expected
    chunks.clear()
    assert list(tmp_path.iterdir()) == []


def test_another_question_shares_no_chunk(tmp_path: Path) -> None:
    one, other = Chunks(tmp_path, {"seed": 0}), Chunks(tmp_path, {"seed": 1})
    one.take("a/0", lambda: {"x": torch.zeros(2)})
    assert (len(one), len(other)) == (1, 0)
    found = one.take("a/0", lambda: pytest.fail("made twice"))
    assert torch.equal(found["x"], torch.zeros(2))
    other.take("a/0", lambda: {"x": torch.ones(2)})
    one.clear()
    one.clear()
    assert other.folder.is_dir() and not one.folder.exists()
    assert json.loads((other.folder / "asked.json").read_text()) == {"seed": 1}
    path = other.folder / "a%2F0.safetensors"
    path.write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"a%2F0\.safetensors cannot be read .* delete it"):
        other.take("a/0", lambda: {"x": torch.zeros(2)})


def test_weights_are_known_by_their_files(tmp_path: Path) -> None:
    assert place_of(None) is None and place_of("org/name") == "org/name"
    (tmp_path / "w.safetensors").write_bytes(b"1")
    before = place_of(tmp_path)
    assert before == place_of(tmp_path)
    (tmp_path / "w.safetensors").write_bytes(b"22")
    assert place_of(tmp_path) != before


def test_diversity_vendi_and_distance_stand_beside_the_scores() -> None:
    summary = run([Painter("a"), Painter("b", 3.0)], None).summary
    a, b = summary["systems"]["a"], summary["systems"]["b"]
    assert list(a["scores"]) == ["mean", "diversity"]
    assert 1 < a["vendi"]["mean"] < 3 and a["vendi"]["ci95"][0] < a["vendi"]["ci95"][1]
    assert "cmmd" not in a and b["cmmd"] > 0
    assert {row["reward"] for row in summary["comparisons"]} == {"mean", "diversity"}


# --- categories -------------------------------------------------------------------------------


def test_categories_by_hand() -> None:
    assert category_of({"tag": "colors", "category": "x"}) == "x"  # of a column that is named
    assert category_of({"category": "x"}) == "x"
    assert category_of({"category": 1}) == "1" and category_of({"tag": 0}) == "0"
    assert category_of({"category": True}) is category_of({"category": 1.5}) is None
    assert category_of({"atom_count": 3}) == "3 atoms"
    assert category_of({"prompt": "a"}) is None
    metadata = [{"tag": "one"}, {"tag": "two"}, {"tag": "one"}, {"tag": "one"}]
    scores = {"s": {"r": np.array([1.0, 0.0, 0.0, 1.0]), "some": np.array([1.0, 2.0])}}
    table = by_category(metadata, scores, "wxyz")
    assert list(table) == ["one", "two"] and table["one"]["prompts"] == 3
    one = table["one"]["systems"]["s"]
    assert list(one) == ["r"] and one["r"]["mean"] == pytest.approx(2 / 3)
    assert one["r"]["ci95"][0] < 2 / 3 < one["r"]["ci95"][1]
    assert table["two"]["systems"]["s"]["r"] == {"mean": 0.0, "ci95": None}
    # GenEval's overall score: of the categories' means, not of the prompts.
    assert category_means(table, "s") == {"r": pytest.approx(1 / 3)}
    assert by_category([{}, *metadata[1:]], scores, "wxyz") == {}
    assert by_category([{"tag": "one"}] * 4, scores, "wxyz") == {}


def test_an_evaluation_has_its_categories() -> None:
    summary = run([Painter("a"), Painter("b", 3.0)], None).summary
    assert {n: c["prompts"] for n, c in summary["categories"].items()} == {"even": 4, "odd": 3}
    means = [c["systems"]["b"]["mean"]["mean"] for c in summary["categories"].values()]
    assert summary["systems"]["b"]["category_means"]["mean"] == pytest.approx(np.mean(means))
    console = Console(file=StringIO(), width=120)
    show_categories(summary, console)
    assert "odd (3)" in console.file.getvalue()  # type: ignore[attr-defined]


# --- comparing afterwards ---------------------------------------------------------------------


def store(folder: Path, painters: Sequence[Painter]) -> Path:
    result = run(painters, None)
    path = folder / "evaluation.json"
    write_evaluation(path, result.summary)
    write_scores(scores_path(path), result, PROMPTS)
    return path


def told(*arguments: object) -> str:
    console = Console(file=StringIO(), width=200)
    run_compare(*arguments, console)  # type: ignore[arg-type]
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_scores_by_prompt_survive_the_file(tmp_path: Path) -> None:
    result = run([Painter("a"), Painter("b", 3.0)], None)
    write_scores(tmp_path / "s.jsonl", result, PROMPTS)
    stored = read_scores(tmp_path / "s.jsonl")
    assert stored.prompts == tuple(p.text for p in PROMPTS)
    for system, table in result.scores.items():
        assert np.array_equal(stored.scores[system]["mean"], table["mean"])
        diversity = stored.scores[system]["diversity"]
        rows = result.measured["diversity"]
        assert np.array_equal(diversity[rows], table["diversity"])
        assert np.flatnonzero(~np.isnan(diversity)).tolist() == rows == [0, 2, 3, 4, 6]
    (tmp_path / "s.jsonl").write_text('{"prompt": "a", "scores": 3}\n')
    with pytest.raises(ValueError, match="line 1 holds no scores"):
        read_scores(tmp_path / "s.jsonl")
    with pytest.raises(ValueError, match="run tiltflow evaluate again"):
        read_scores(tmp_path / "none.jsonl")


def test_compare_within_one_evaluation(tmp_path: Path) -> None:
    path = store(tmp_path, [Painter("a"), Painter("b", 3.0)])
    assert "b − a on mean: +0.1" in told([tmp_path], None, None)
    out = tmp_path / "comparisons.json"
    text = told([path], "a, b", out)
    assert "a − b on mean: -0.1" in text and "a is lower" in text
    assert "wins 0% of 7" in text and "bootstrap [" in text
    rows = json.loads(out.read_text())["comparisons"]
    assert [(r["reward"], r["n"]) for r in rows] == [("mean", 7), ("diversity", 5)]
    with pytest.raises(ValueError, match="has no system 'bb'"):
        told([path], "a,bb", None)
    with pytest.raises(ValueError, match="write two names"):
        told([path], "a", None)


def test_compare_two_evaluations(tmp_path: Path) -> None:
    one = store(tmp_path / "one", [Painter("a"), Painter("b", 3.0)])
    two = store(tmp_path / "two", [Painter("a"), Painter("b", 3.0001)])
    text = told([one, two.parent], None, None)
    # The teachers are the same: nothing to test. The others are so close that eight bits agree
    # on most prompts, which is said plainly.
    assert "one:a" not in text
    assert "one:b − two:b on mean" not in text or "no significant difference" in text
    text = told([one, two], "b,a", None)
    assert "one:b − two:a on mean: +0.1" in text and "one:b is higher" in text
    other = tmp_path / "three" / "evaluation.json"
    result = evaluate_systems([Painter("a").system()], PROMPTS[::-1], [MEAN], 4)
    write_evaluation(other, result.summary)
    write_scores(scores_path(other), result, PROMPTS[::-1])
    with pytest.raises(ValueError, match="on different prompts"):
        told([one, other], None, None)
    with pytest.raises(ValueError, match="one or two evaluations, not 3"):
        told([one, two, other], None, None)


def test_scores_by_other_weights_are_not_compared(tmp_path: Path) -> None:
    one, two = (store(tmp_path / n, [Painter("a"), Painter("b", 3.0)]) for n in ("one", "two"))

    def ask(path: Path, asked: object) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"asked": asked}))

    def place(folder: str, size: int, time: int) -> dict[str, object]:
        return {"path": folder, "files": [["model.safetensors", size, time]]}

    ask(one, {"rewards": {"mean": place("/a", 5, 1)}})
    for asked in (None, {"rewards": None}, {"rewards": {"mean": place("/b", 5, 2)}}):
        ask(two, asked)
        told([one, two], "b,a", None)
    ask(two, {"rewards": {"mean": place("/a", 6, 1)}})
    with pytest.raises(ValueError, match="have the reward 'mean' with other weights"):
        told([one, two], "b,a", None)
    ask(two, {"rewards": {"mine:f": place("/m.py", 5, 1)}})
    ask(one, {"rewards": {"mine:f": None}})  # an earlier version did not look at it
    told([one, two], "b,a", None)
    ask(one, {"rewards": {"mine:f": place("/m.py", 4, 1)}})
    with pytest.raises(ValueError, match="have the reward 'mine:f' with other code"):
        told([one, two], "b,a", None)
    ask(two, 3)
    with pytest.raises(ValueError, match=r"\(asked: Input should be a mapping of keys to values\)"):
        told([one, two], "b,a", None)


def test_comparisons_are_not_written_over_an_evaluation(tmp_path: Path) -> None:
    path, out = store(tmp_path, [Painter("a"), Painter("b", 3.0)]), tmp_path / "rows.json"
    before = path.read_text()
    with pytest.raises(ValueError, match="is there and holds no comparisons"):
        told([path], None, path)
    assert path.read_text() == before
    for _ in range(2):
        told([path], None, out)


def test_what_is_not_significant_is_said_to_be_so(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scores = {name: {"r": rng.normal(0, 1, 7)} for name in ("a", "b")}
    path = tmp_path / "evaluation.json"
    write_scores(scores_path(path), Evaluation({}, scores), PROMPTS)
    systems = {name: {"nfe": 4, "scores": {}} for name in scores}
    write_evaluation(path, {"prompts": 7, "systems": systems})
    assert "no significant difference" in told([path], "a,b", None)


# --- suites -----------------------------------------------------------------------------------


def test_suites_bind_formats_to_rewards() -> None:
    assert set(SUITES) == {
        "drawbench", "pickapic", "hpsv3", "geneval", "geneval2", "ocr", "shapes"
    }  # fmt: skip
    names = {reward for suite in SUITES.values() for reward in suite.rewards}
    assert names <= PUBLISHED | {"shapes", "clipscore_heldout"}
    with pytest.raises(ValueError, match="did you mean 'geneval"):
        suite_of("genevall")
    general = Prompt("a portrait of an astronaut riding a horse on Mars")
    for name in ("drawbench", "pickapic"):  # not the demo's toy, which knows none of these words
        assert suite_of(name).rewards["clipscore"] == "openai/clip-vit-large-patch14"
        suite_of(name).check([general])


def test_a_suite_names_the_prompt_that_it_cannot_score() -> None:
    good = {"tag": "colors", "include": [{"class": "dog", "count": 1}]}
    suite_of("geneval").check([Prompt("a", good)])
    with pytest.raises(ValueError, match="prompt 1: 'a': 'dogs' is no GenEval clause"):
        suite_of("geneval").check([Prompt("a", good | {"include": ["dogs"]})])
    with pytest.raises(ValueError, match=r"prompt 2 \('b'\) has no 'include'"):
        suite_of("geneval").check([Prompt("a", good), Prompt("b", {"tag": "x"})])
    with pytest.raises(ValueError, match="no 'vqa_list'"):
        suite_of("geneval2").check([Prompt("a", good)])
    with pytest.raises(ValueError, match="prompt 1: 'a' has no GenEval 2 metadata"):
        suite_of("geneval2").check([Prompt("a", {"vqa_list": []})])
    with pytest.raises(ValueError, match="prompt 2: the prompt 'a 5\" sign' has no .quoted"):
        suite_of("ocr").check([Prompt('a "big" sign'), Prompt('a 5" sign')])
    with pytest.raises(ValueError, match="prompt 1: 'a cat' is not a caption"):
        suite_of("shapes").check([Prompt("a cat")])


@pytest.mark.skipif(not DATA.is_dir(), reason="shared/data is not here")
@pytest.mark.parametrize(
    ("name", "file", "categories"),
    [
        ("drawbench", "drawbench.txt", 0),
        ("hpsv3", "hpsv3.txt", 0),
        ("ocr", "ocr.txt", 0),
        ("geneval", "geneval_metadata.jsonl", 6),
        ("geneval2", "geneval2.jsonl", 1),
    ],
)
def test_suites_take_the_published_sets(name: str, file: str, categories: int) -> None:
    prompts = load_prompts(DATA / file)
    suite_of(name).check(prompts)
    found = {category_of(p.metadata) for p in prompts} - {None}
    assert len(found) == categories
