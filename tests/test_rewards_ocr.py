from __future__ import annotations

import sys
import unicodedata

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from tiny_rewards import as_tensor, natural

from tiltflow.rewards import checked, load_reward
from tiltflow.rewards.zoo.ocr import OCR, edit_distance, quoted_text, text_score


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("abc", "", 3), ("", "ab", 2), ("kitten", "sitting", 3), ("flaw", "lawn", 2),
     ("abcd", "abcd", 0), ("ab", "ba", 2)],
)  # fmt: skip
def test_edit_distance(a: str, b: str, distance: int) -> None:
    assert edit_distance(a, b) == edit_distance(b, a) == distance


def test_text_score() -> None:
    assert text_score("Hello World", "hello  world") == 1
    assert text_score("say: HELLO!", "hello") == 1  # contained
    assert text_score("helo", "hello") == pytest.approx(0.8)
    assert text_score("", "hello") == 0
    assert text_score("completely other, and long", "hello") == 0


@pytest.mark.parametrize("shown", ["CAFÉ", "MÜNCHEN", "SEÑOR", "ﬁne", "Ｏｐｅｎ", "ﾃﾞ"])
def test_how_unicode_spells_a_letter_does_not_count(shown: str) -> None:
    """macOS writes é as two characters; a reader may give either."""
    spelled = [unicodedata.normalize(form, shown) for form in ("NFC", "NFD", "NFKC", "NFKD")]
    for asked in spelled:
        assert [text_score(read, asked) for read in spelled] == [1, 1, 1, 1]
    assert text_score("cafe", "café") == 0.75


@pytest.mark.parametrize(
    ("prompt", "text"),
    [('a sign "Open"', "Open"), ("a sign “Open 24”", "Open 24"), ("ein Schild „Auf“", "Auf"),
     ('"A" over "B c"', "A B c"), ("it's «Fin»", "Fin")],
)  # fmt: skip
def test_quoted_text(prompt: str, text: str) -> None:
    assert quoted_text(prompt) == text


@pytest.mark.parametrize("prompt", ["a dog", "it's a dog's life", 'an empty "  " sign'])
def test_a_prompt_without_quoted_text_is_an_error_that_names_it(prompt: str) -> None:
    with pytest.raises(ValueError, match="has no .quoted text.") as caught:
        quoted_text(prompt)
    assert prompt in str(caught.value)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(ValueError, match=r"'ocr': it needs rapidocr.*tiltflow\[ocr\]"):
        load_reward("ocr")


def rendered(text: str, width: int = 480, height: int = 128) -> np.ndarray:
    image = Image.new("RGB", (width, height), (240, 236, 220))
    font = ImageFont.load_default(size=36)
    ImageDraw.Draw(image).text((24, 40), text, (20, 20, 60), font)
    return np.array(image)


@pytest.mark.long
def test_rendered_sentences_are_read_and_scored() -> None:
    pytest.importorskip("rapidocr")
    reward = load_reward("ocr")
    assert isinstance(reward, OCR) and not reward.differentiable
    texts = ["Step Goal Achieved", "Lost City Near", "Open 24 Hours"]
    images = as_tensor(*(rendered(text) for text in texts))
    prompts = [f'a photo of a sign that says "{text}"' for text in texts]
    assert checked(reward, images, prompts, [{}] * 3).tolist() == [1, 1, 1]
    shifted = checked(reward, images, prompts[1:] + prompts[:1], [{}] * 3)
    assert shifted.max() < 0.4
    blank = as_tensor(np.full((128, 480, 3), 200, np.uint8), natural(128, 480))
    assert checked(reward, blank, prompts[:2], [{}] * 2).max() < 0.2
    near = checked(reward, images[:1], ['a sign "Step Goal Achieve!"'], [{}])
    assert 0.8 < float(near) < 1
    with pytest.raises(ValueError, match="'ocr': the prompt 'a plain sign' has no"):
        checked(reward, images[:2], [prompts[0], "a plain sign"], [{}] * 2)
