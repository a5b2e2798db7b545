"""What a reward server says its rewards are made of, and a client that holds it to that."""

from __future__ import annotations

import io
import json
import socket
from pathlib import Path

import pytest
import torch
from reward_servers import free_port, http, says, server
from rich.console import Console
from torch import Tensor

from tiltflow.data.prompts import Prompt
from tiltflow.rewards import FunctionReward, RewardMixture, Weighted, checked
from tiltflow.rewards.remote import wire
from tiltflow.rewards.remote.address import Address
from tiltflow.rewards.remote.client import RemoteReward, lasting_of
from tiltflow.rewards.remote.limits import Limits
from tiltflow.rewards.remote.server import Scorer
from tiltflow.tasks import reward_server
from tiltflow.tasks.compare import comparisons, other_columns
from tiltflow.tasks.evaluate import evaluated
from tiltflow.tasks.request import Request

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def answer(contents: str | None) -> bytes:
    return http(json.dumps({"scores": [1, 2]} | _said(contents)).encode())


def health(contents: str | None) -> bytes:
    about = {"mean": {"differentiable": False} | _said(contents)}
    return http(json.dumps({"rewards": about}).encode())


def _said(contents: str | None) -> dict[str, str]:
    return {} if contents is None else {"contents": contents}


def score(reward: RemoteReward) -> Tensor:
    return checked(reward, IMAGES, ["a", "b"], [{}, {}])


@pytest.mark.parametrize(("before", "after"), [("c0", "c1"), ("c0", None), (None, "c1")])
def test_a_server_that_goes_on_with_another_reward_ends_the_run(
    before: str | None, after: str | None
) -> None:
    port = free_port()
    with server(says(answer(before)), port, says(health(before))):
        reward = RemoteReward(f"remote:http://127.0.0.1:{port}/mean")
        assert score(reward).tolist() == [1, 2]
    with (
        server(says(answer(after)), port, says(health(after))),
        pytest.raises(ValueError, match=f"{port}/mean was started again with other code, weights"),
    ):
        score(reward)


def test_a_server_of_an_earlier_version_is_taken_with_a_notice(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for contents in ("c0", None):
        assert not caplog.records
        with server(says(answer(contents)), health=says(health(contents))) as port:
            reward = RemoteReward(f"remote:http://127.0.0.1:{port}/mean")
            assert score(reward).tolist() == [1, 2]
        mixture = RewardMixture([Weighted(reward)])
        assert mixture.contents == ({} if contents is None else {"mean server": contents})
    (record,) = caplog.records
    assert "does not say what the reward is made of" in record.message


def test_every_answer_names_what_the_reward_is_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    reward = FunctionReward(lambda images, prompts, metadata: images.mean((1, 2, 3)), "mean")
    body = wire.encode_batch(IMAGES, ["a", "b"], [{}, {}])

    def contents(files: dict[str, str]) -> str:
        scorer = Scorer([reward], "cpu", 2, files={"mean": files})
        said = scorer.describe()["rewards"]["mean"]
        assert said.get("files", {}) == files
        assert scorer.score("mean", body)["contents"] == said["contents"]
        found: str = said["contents"]
        return found

    plain = contents({"mean": "0"})
    assert contents({"mean": "0"}) == plain
    assert len({plain, contents({"mean": "1"}), contents({}), contents({"mean clip": "0"})}) == 4
    made_of = Scorer([reward], "cpu", 2).made_of
    for key, same in (("device", True), ("torch", False), ("tiltflow", False)):
        changed = made_of | {key: "another"}
        monkeypatch.setattr("tiltflow.rewards.remote.server.made_of", lambda _, m=changed: m)
        assert (contents({"mean": "0"}) == plain) is same, key


def test_a_server_looks_at_its_rewards_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    made: list[Scorer] = []

    class Enough(Exception):
        pass

    def app(scorer: Scorer, *_: object) -> None:
        made.append(scorer)
        raise Enough

    monkeypatch.setattr("tiltflow.rewards.remote.server.make_app", app)
    for limit in (".5", ".2"):
        code = f"def f(images, prompts, metadata):\n    return images.mean((1, 2, 3)) - {limit}\n"
        (tmp_path / "mine_served.py").write_text(code)
        with pytest.raises(Enough):
            given = ({"mine_served:f": None, "shapes": None}, "127.0.0.1", 0, "cpu", 1)
            reward_server.serve(*given, Limits(), None)  # type: ignore[arg-type]
    one, other = (scorer.describe()["rewards"] for scorer in made)
    assert one["mine_served:f"]["contents"] != other["mine_served:f"]["contents"]
    assert one["shapes"] == other["shapes"]


def scored_by(contents: str, score: float, port: int, out: Path, answers: int = 99) -> list[float]:
    """An evaluation of the teacher on two prompts by a server that refuses after so many
    `answers`; the scores of its systems."""
    left, about = [answers], {"differentiable": False, "contents": contents}
    said = http(json.dumps({"scores": [score], "contents": contents}).encode())

    def reply(connection: socket.socket, body: bytes) -> None:
        left[0] -= 1
        refusal = http(b'{"error": "enough"}', "422 Unprocessable Content")
        connection.sendall(said if left[0] >= 0 else refusal)

    known = says(http(json.dumps({"rewards": {"mean": about}}).encode()))
    prompts = [Prompt("a red circle"), Prompt("a blue square")]
    rewards = {f"remote:http://127.0.0.1:{port}/mean": None}
    asked = Request(
        "packaged:pipeline", prompts, teacher_steps=1, device="cpu", rewards=rewards, batch=1
    )
    with server(reply, port, known):
        found = evaluated(out, asked)
    return [x for table in found.scores.values() for x in table["mean"].tolist()]


@pytest.mark.long
def test_what_another_server_scored_is_not_gone_on_with(tmp_path: Path) -> None:
    port, out = free_port(), tmp_path / "evaluation.json"
    with pytest.raises(ValueError, match="refused the batch: enough"):
        scored_by("c0", 1, port, out, answers=1)
    assert scored_by("c1", 5, port, out) == [5] * 4
    with pytest.raises(ValueError, match="refused the batch: enough"):
        scored_by("c0", 2, port, out, answers=1)
    assert scored_by("c0", 1, port, out, answers=2) == [1, 2, 1, 1]


@pytest.mark.long
@pytest.mark.parametrize("moved", [False, True])
def test_evaluations_by_other_servers_are_told_apart(tmp_path: Path, moved: bool) -> None:
    """Behind one address, and where the address is another."""
    port = free_port()
    files = [tmp_path / name for name in ("one.json", "two.json", "three.json")]
    for contents, file in zip(("c0", "c1", "c0"), files, strict=True):
        scored_by(contents, 1, port, file)
        port = free_port() if moved else port
    one, two, three = (json.loads(file.read_text()) for file in files)
    assert other_columns(one, two) == ["mean"] and other_columns(one, three) == []
    with pytest.raises(ValueError, match="have the reward 'mean' with other weights"):
        comparisons(files[:2])
    assert comparisons(files[::2]) == []
    for each in (two, three):  # of an earlier version, which said nothing of servers
        each["content"]["rewards"] = {}
        assert other_columns(one, each) == []
    # a reward behind a server may read the metadata
    two["content"]["prompts"] = "others"
    assert other_columns(one, two) == ["mean"]


def test_an_upgraded_server_is_the_same_reward_to_an_evaluation() -> None:
    """As a reward that computes here is: packages are no part of what it is compared by."""
    said = {"contents": "c0", "files": {"mean": "1"}, "tiltflow": "0.1", "torch": "2.1"}
    first = lasting_of(said)
    assert first == lasting_of(said | {"contents": "c1", "torch": "2.2"})
    assert first not in (lasting_of(said | {"files": {}}), lasting_of(said | {"revision": 2}))
    other = {"contents": "c0"}  # another program's
    assert (lasting_of(other), lasting_of({})) == ("c0", None)


def test_a_reward_with_a_name_of_its_own_is_known_by_its_files_and_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The module's digest was looked for under the reward's name, and not found: with edited code
    the server was the same. The printed address was of the module, or of a folder's last part."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    made: list[Scorer] = []

    class Nothing:
        def run(self, sockets: object) -> None:
            pass

    def app(scorer: Scorer, *_: object) -> None:
        made.append(scorer)

    monkeypatch.setattr("tiltflow.rewards.remote.server.make_app", app)
    monkeypatch.setattr("tiltflow.rewards.remote.gate.make_server", lambda *_: Nothing())
    said = io.StringIO()
    for limit in (".5", ".2"):
        (tmp_path / "mine_named.py").write_text(
            "class Warm:\n    name, differentiable = 'a/warm one', False\n"
            "    def __init__(self, device):\n        pass\n"
            f"    def __call__(self, images, prompts, metadata):\n        return {limit}\n"
        )
        given = ({"mine_named:Warm": None}, "127.0.0.1", free_port(), "cpu", 1, Limits())
        reward_server.serve(*given, Console(file=said))
    one, other = (scorer.facts["a/warm one"] | scorer.made_of for scorer in made)
    assert one["contents"] != other["contents"] and lasting_of(one) != lasting_of(other)
    assert Address.of(said.getvalue().split()[0]).name == "a/warm one"
