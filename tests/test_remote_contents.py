"""What a reward server says its rewards are made of, and a client that holds it to that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from reward_servers import free_port, http, says, server
from torch import Tensor

from tiltflow.rewards import FunctionReward, RewardMixture, Weighted, checked
from tiltflow.rewards.remote import wire
from tiltflow.rewards.remote.client import RemoteReward
from tiltflow.rewards.remote.limits import Limits
from tiltflow.rewards.remote.server import Scorer
from tiltflow.tasks import reward_server

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
