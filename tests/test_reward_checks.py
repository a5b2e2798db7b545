"""Rewards held against their code, packages, prompts, and their weights while they load."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_rewards import write_clip
from torch import Tensor, nn
from transformers import CLIPModel

from tiltflow import rewards
from tiltflow.config.load import load_config
from tiltflow.data.prompts import Prompt, load_prompts
from tiltflow.rewards import FunctionReward, checked, load_reward
from tiltflow.rewards.base import RewardFailed
from tiltflow.rewards.fitting import check_prompts_fit, check_reward_imports
from tiltflow.rewards.packaged import VIT_L_14
from tiltflow.rewards.weights import load_exactly, load_pretrained
from tiltflow.rewards.zoo.ocr import quoted_text
from tiltflow.setup.checks import CHECKS, Subject

IMAGES = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
PROMPTS, NOTHING = ["a cat", "a dog", "a bird"], [{}, {}, {}]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current directory that is not on the path, as the command `tiltflow` finds it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("mine_"):
            del sys.modules[name]


def test_ones_own_module_is_found_in_the_current_directory(here: Path) -> None:
    (here / "mine_colours.py").write_text(
        "from mine_means import mean\n"
        "def red(images, prompts, metadata):\n    return mean(images[:, 0])\n"
    )
    (here / "mine_means.py").write_text("def mean(x):\n    return x.mean((1, 2))\n")
    check_reward_imports(["mine_colours:red", "shapes", "remote:http://127.0.0.1:1/x"])
    reward = load_reward("mine_colours:red")
    assert torch.equal(
        checked(reward, IMAGES, PROMPTS, NOTHING),
        torch.stack([image[0].mean((0, 1)) for image in IMAGES]),
    )
    assert sys.path.count(str(here)) == 1


def test_ones_own_code_leaves_torchs_settings_as_they_were(here: Path) -> None:
    """Set as a module is imported, and as its class is made."""
    settings = (
        "torch.set_default_dtype(torch.float64)", "torch.set_grad_enabled(False)",
        "torch.set_float32_matmul_precision('high')",
    )  # fmt: skip
    lines = ["import torch", *settings, "class Mine:", "    differentiable, name = False, 'mine'"]
    lines += ["    def __init__(self, device):", *(f"        {line}" for line in settings)]
    lines += ["    def __call__(self, images, prompts, metadata): return images.mean((1, 2, 3))"]
    (here / "mine_global.py").write_text("\n".join(lines))

    def now() -> tuple[object, ...]:
        precision = torch.get_float32_matmul_precision()
        return torch.get_default_dtype(), torch.is_grad_enabled(), precision

    before = now()
    reward = load_reward("mine_global:Mine")
    assert now() == before == (torch.float32, True, "highest")
    assert checked(reward, IMAGES, PROMPTS, NOTHING).shape == (3,)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def f(images:\n", r"cannot import 'mine_bad': .* \(mine_bad.py, line 1\)"),
        ("x = {}['key']\n", "cannot import 'mine_bad', which raised KeyError: 'key'"),
        ("raise RuntimeError('no\\nway')\n", "which raised RuntimeError: no$"),
        ("import sys; sys.exit()\n", "which raised SystemExit"),
        ("import no_such_package\n", "cannot import 'mine_bad': No module named 'no_such_package'"),
        ("f = 3\n", "is neither a function nor a class"),
        ("class f:\n    def __init__(self, device):\n        open('/no/such')\n",
         "cannot be made: FileNotFoundError"),
    ],
)  # fmt: skip
def test_a_module_that_fails_is_told_in_one_sentence(here: Path, code: str, message: str) -> None:
    (here / "mine_bad.py").write_text(code)
    with pytest.raises(ValueError, match=message) as caught:
        load_reward("mine_bad:f")
    assert str(caught.value).startswith("reward 'mine_bad:f'") and "\n" not in str(caught.value)
    if "class" not in code:
        with pytest.raises(ValueError, match=message):
            check_reward_imports(["clipscore", "mine_bad:f"])


def test_what_a_reward_needs_is_asked_for_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(ValueError, match=r"'ocr': it needs rapidocr.*tiltflow\[ocr\]"):
        check_reward_imports(["ocr"])
    with pytest.raises(ValueError, match="no reward 'clipscor'; did you mean 'clipscore'"):
        check_reward_imports(["clipscor"])


class Fails:
    """A reward that raises at the second prompt."""

    name, differentiable = "mine", False

    def __init__(self, error: BaseException, at_once: int) -> None:
        self.error, self.at_once = error, at_once

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence) -> Tensor:
        if "a dog" in prompts:
            raise self.error
        return images.mean((1, 2, 3))


@pytest.mark.parametrize(
    ("error", "at_once", "message"),
    [
        (KeyError("tag"), 1, "reward 'mine' failed on 'a dog': KeyError: 'tag'"),
        (KeyError("tag"), 3, "reward 'mine' failed on 'a cat' and 2 more: KeyError: 'tag'"),
        (IndexError(), 1, "reward 'mine' failed on 'a dog': IndexError"),
        (SystemExit(3), 1, "reward 'mine' failed on 'a dog': SystemExit: 3"),
        (ValueError("too small"), 1, "reward 'mine' on 'a dog': too small"),
        (ValueError("'a dog' is none"), 1, "reward 'mine': 'a dog' is none"),
    ],
)
def test_a_reward_that_raises_is_told_with_its_prompt(
    error: BaseException, at_once: int, message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        checked(Fails(error, at_once), IMAGES, PROMPTS, NOTHING)
    assert str(caught.value) == message
    assert isinstance(caught.value, RewardFailed) != isinstance(error, ValueError)


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), MemoryError(), RuntimeError("DefaultCPUAllocator: can't "
              "allocate memory"), torch.OutOfMemoryError("CUDA out of memory")],
)  # fmt: skip
def test_interruption_and_want_of_memory_pass_as_they_are(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        checked(Fails(error, 1), IMAGES, PROMPTS, NOTHING)
    assert caught.value is error


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.ones(1, dtype=torch.complex64), r"must give \(1,\) float scores, got .* complex64"),
        (torch.ones(1, dtype=torch.bool), "got .* bool"),
        (torch.tensor(1.0), r"got \(\) float32"),
        (None, "got NoneType"),
        (torch.ones(1, device="meta"), "float32 on meta"),
        (torch.tensor([1e300], dtype=torch.float64), "non-finite score for 'a cat'"),
        (nn.Parameter(torch.ones(1)), "require a gradient where none was asked for"),
    ],
)
def test_what_is_no_score_is_refused(result: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked(FunctionReward(lambda *_: result, "mine"), IMAGES, PROMPTS, NOTHING)


def test_a_reward_may_write_into_all_that_it_is_given() -> None:
    def greedy(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        scores = images.mean((1, 2, 3)) + len(metadata[0]["include"])
        images.fill_(1.0)
        metadata[0]["include"].clear()
        prompts.clear()
        return scores

    about: list[dict[str, Any]] = [{"include": ["a", "b"]} for _ in PROMPTS]
    images = IMAGES.clone()
    for _ in range(2):
        scores = checked(FunctionReward(greedy, "mine"), images, PROMPTS, about)  # type: ignore[arg-type]
        assert torch.equal(scores, IMAGES.mean((1, 2, 3)) + 2)


# --- quotation marks ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('a 15" laptop that shows "HELLO"', "HELLO"),
        ('"HELLO" on a 15" laptop', "HELLO"),
        ('a 15" laptop and a 17" one with "A" and "B"', "A B"),
        ('a sign that says "ROUTE 66"', "ROUTE 66"),
        ('"ROUTE 66" on a 2" pipe', "ROUTE 66"),
        ('a man of 6\'2" with the words "HI"', "HI"),
        ("a 15” screen that shows “HELLO”", "HELLO"),
        ("it's the dogs' sign: \"DON'T\"", "DON'T"),
        ('“say "hi" now”', 'say "hi" now'),
        ('"say “hi” now"', "say “hi” now"),
        ('a sign ""SALE""', "SALE"),
        ("ein Schild „Auf“ und „Zu”", "Auf Zu"),
        ('招牌"你好"', "你好"),
    ],
)
def test_inches_are_no_quotations(prompt: str, text: str) -> None:
    assert quoted_text(prompt) == text


@pytest.mark.parametrize(
    "prompt",
    ['a sign that says "HELLO', 'HELLO" on a sign', 'the words "BUY A 15" TV"', "a sign “HELLO",
     'a sign “HELLO"', 'a sign "HELLO”', "HELLO” on a sign", '"A" and "B', "»Fin«",
     'he said "she said "hi""'],
)  # fmt: skip
def test_a_mark_without_a_partner_is_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="quotation mark . without a partner") as caught:
        quoted_text(prompt)
    assert repr(prompt) in str(caught.value)


def test_inches_alone_quote_nothing() -> None:
    with pytest.raises(ValueError, match="has no .quoted text."):
        quoted_text('a 15" laptop beside a 17" one')


# --- prompts and rewards --------------------------------------------------------------------------


def test_every_prompt_is_read_by_every_reward() -> None:
    good = Prompt('a "big" sign')
    check_prompts_fit(["pickscore", "aesthetic", "ocr", "remote:http://x/ocr"], [good] * 3)
    with pytest.raises(ValueError) as caught:
        check_prompts_fit(["pickscore", "ocr"], [good, Prompt("a dog"), good, Prompt("a cat")])
    assert str(caught.value) == (
        "reward 'ocr' cannot score prompt 2: the prompt 'a dog' has no \"quoted text\" to look for "
        "(nor 1 other: 4)"
    )
    with pytest.raises(ValueError, match=r"\(nor 9 others: 2, 3, 4, …\)$"):
        check_prompts_fit(["ocr"], [Prompt("a dog")] * 10)
    scene = {"tag": "x", "include": [{"class": "dog", "count": 1}]}
    for name, wrong in (
        ("geneval", "has no GenEval metadata"),
        ("geneval2", "has no GenEval 2 metadata"),
        ("shapes", "is not a caption"),
        ("shapes_soft", "is not a caption"),
    ):
        with pytest.raises(ValueError, match=f"'{name}' cannot score prompt 1: 'a dog'.*{wrong}"):
            check_prompts_fit([name], [Prompt("a dog")])
    check_prompts_fit(["geneval"], [Prompt("a dog", scene)])
    check_prompts_fit(["geneval2"], [Prompt("a dog", {"vqa_list": [["Is it?", "Yes"]]})])
    with pytest.raises(ValueError, match=r"'hpsv3' cannot score prompt 1: .*<\|Reward\|>"):
        check_prompts_fit(["hpsv3"], [Prompt("a <|Reward|>")])


def test_a_packaged_clip_takes_only_what_it_can_read(tmp_path: Path) -> None:
    for name in ("clipscore", "clipscore_heldout"):
        for split in ("shapes-train", "shapes-heldout"):
            check_prompts_fit([name], load_prompts(split))
        for text, why in (
            ("a portrait of an elephant", r"reads 10 tokens, .* take \d+"),
            ("a 3", "does not know '3'"),
            (" ".join(["red"] * 11), "reads 10 tokens, .* take 11"),
        ):
            with pytest.raises(ValueError, match=f"'{name}' cannot score prompt 2.*{why}; give"):
                check_prompts_fit([name], [Prompt("a Red cat"), Prompt(text)])
            with pytest.raises(ValueError, match=why):
                check_prompts_fit({name: "packaged:clip"}, [Prompt(text)])
            check_prompts_fit({name: VIT_L_14}, [Prompt(text)])
            with pytest.raises(ValueError, match=why):
                checked(load_reward(name), torch.rand(1, 3, 8, 8), [text], [{}])
    fitted = {"format": "tiltflow-fitted-reward-1", "clip": "packaged:clip", "clip_digest": ""}
    (tmp_path / "reward.json").write_text(json.dumps(fitted))
    with pytest.raises(ValueError, match="packaged:clip cannot read 'a dog!'"):
        check_prompts_fit([str(tmp_path)], [Prompt("a dog!")])


def test_training_does_not_begin_with_prompts_that_the_packaged_clip_cannot_read(
    here: Path,
) -> None:
    (here / "p.txt").write_text("a portrait of an elephant\n")
    changes = ["data.prompts=p.txt", "watch.rewards={}"]
    for path, refused in ((None, True), (VIT_L_14, False)):
        clip = f"{{clipscore: {{weight: 1.0, path: {path}}}}}" if path else "{clipscore: 1.0}"
        on = Subject(load_config("demo_tilt", [*changes, f"rewards={clip}"]))
        (check,) = [check for check in CHECKS if check.name == "prompts and rewards"]
        with pytest.raises(ValueError, match="cannot read") if refused else nullcontext():
            check.run(on)


def test_ones_own_reward_may_say_what_it_needs(here: Path) -> None:
    (here / "mine_needs.py").write_text(
        "def f(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n"
        "def needs(text, metadata):\n"
        "    if 'place' not in metadata:\n        raise ValueError(f'{text!r} has no place')\n"
        "f.reads = needs\n"
    )
    check_prompts_fit(["mine_needs:f"], [Prompt("a", {"place": 1})])
    with pytest.raises(ValueError, match="cannot score prompt 2: 'b' has no place"):
        check_prompts_fit(["mine_needs:f"], [Prompt("a", {"place": 1}), Prompt("b")])


# --- weights --------------------------------------------------------------------------------------


def test_a_model_has_its_weights_and_no_others(tmp_path: Path) -> None:
    """The library draws a missing weight at random, and leaves out one too many."""
    path = write_clip(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    name = "text_model.encoder.layers.0.mlp.fc1.weight"

    def load(**changes: torch.Tensor | None) -> object:
        table = {**whole, **{key.replace("__", "."): value for key, value in changes.items()}}
        save_file({k: v for k, v in table.items() if v is not None}, file, {"format": "pt"})
        return load_pretrained(CLIPModel, path, "CLIP model", torch.float32)

    assert isinstance(load(text_model__embeddings__position_ids=torch.arange(8)[None]), CLIPModel)
    for change, said in (
        ({name: None}, f"lacks {name}"),
        ({"criterium.x": torch.ones(1)}, "holds criterium.x, which it does not use"),
        ({name: whole[name] * float("nan")}, f"holds {name} with a value that is nan"),
        ({name: whole[name][:-1]}, "cannot be loaded"),
    ):
        with pytest.raises(ValueError, match=f"the CLIP model at .*{re.escape(said)}"):
            load(**change)
    file.unlink()
    torch.save(whole, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="there is no CLIP model at"):
        load_pretrained(CLIPModel, path, "CLIP model", torch.float32)
    with pytest.raises(ValueError, match="the head holds weight with a value that is inf"):
        load_exactly(
            nn.Linear(2, 1, bias=False), {"weight": torch.full((1, 2), torch.inf)}, "the head"
        )


@pytest.mark.parametrize("name", sorted(Path(rewards.__file__).parent.glob("*.py")), ids=str)
def test_no_reward_loads_a_network_by_itself(name: Path) -> None:
    """`load_pretrained` and `from_state` are the ways in: both look at every weight."""
    if name.name == "weights.py":
        return
    calls = re.findall(r"(\w+)\.from_pretrained\(", name.read_text())
    fine = re.compile(
        r"cls|kind|.*(Config|Tokenizer|Processor|ProcessorPil|Preprocessing|config_class)"
    )
    assert [call for call in calls if not fine.fullmatch(call)] == []
