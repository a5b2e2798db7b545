from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_rewards import as_tensor, assert_gradient, assert_rows_do_not_mix, natural
from torch import Tensor
from torch.nn import functional as F
from transformers import BertTokenizer, CLIPImageProcessorPil

from tiltflow.rewards import checked, load_reward
from tiltflow.rewards.zoo.image_reward import MEAN, STD, blip_keys

WIDTH, TEXT, PATCH, SIDE, WORDS = 64, 128, 4, 16, ("a", "red", "blue", "star", "circle")
PROMPTS = ["a red star", "a blue circle", "star"]
State = dict[str, Tensor]


def published_state(seed: int = 0) -> State:
    """Random weights under the names of ImageReward.pt: BLIP's, two layers each, and the head's."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {}

    def add(name: str, *shape: int, scale: float = 0.15) -> None:
        state[name] = torch.randn(shape, generator=generator) * scale

    def linear(name: str, n_in: int, n_out: int) -> None:
        add(f"{name}.weight", n_out, n_in)
        add(f"{name}.bias", n_out)

    def norm(name: str, n: int) -> None:
        add(f"{name}.weight", n, scale=0.5)
        add(f"{name}.bias", n)

    vision, text = "blip.visual_encoder", "blip.text_encoder"
    add(f"{vision}.cls_token", 1, 1, WIDTH)
    add(f"{vision}.pos_embed", 1, (SIDE // PATCH) ** 2 + 1, WIDTH)
    add(f"{vision}.patch_embed.proj.weight", WIDTH, 3, PATCH, PATCH)
    add(f"{vision}.patch_embed.proj.bias", WIDTH)
    for i in range(2):
        block = f"{vision}.blocks.{i}"
        norm(f"{block}.norm1", WIDTH), norm(f"{block}.norm2", WIDTH)
        linear(f"{block}.attn.qkv", WIDTH, 3 * WIDTH), linear(f"{block}.attn.proj", WIDTH, WIDTH)
        linear(f"{block}.mlp.fc1", WIDTH, 96), linear(f"{block}.mlp.fc2", 96, WIDTH)
    norm(f"{vision}.norm", WIDTH)
    state[f"{text}.embeddings.position_ids"] = torch.arange(40)[None]
    add(f"{text}.embeddings.word_embeddings.weight", 12, TEXT)
    add(f"{text}.embeddings.position_embeddings.weight", 40, TEXT)
    norm(f"{text}.embeddings.LayerNorm", TEXT)
    for i in range(2):
        layer = f"{text}.encoder.layer.{i}"
        for part, width in (("attention", TEXT), ("crossattention", WIDTH)):
            linear(f"{layer}.{part}.self.query", TEXT, TEXT)
            linear(f"{layer}.{part}.self.key", width, TEXT)
            linear(f"{layer}.{part}.self.value", width, TEXT)
            linear(f"{layer}.{part}.output.dense", TEXT, TEXT)
            norm(f"{layer}.{part}.output.LayerNorm", TEXT)
        linear(f"{layer}.intermediate.dense", TEXT, 160), linear(f"{layer}.output.dense", 160, TEXT)
        norm(f"{layer}.output.LayerNorm", TEXT)
    linear("blip.vision_proj", WIDTH, 8), linear("blip.text_proj", TEXT, 8)
    sizes = {0: (TEXT, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    for number, (n_in, n_out) in sizes.items():
        linear(f"mlp.layers.{number}", n_in, n_out)
    return state


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Heads of 64."""
    q, k, v = (x.unflatten(-1, (-1, 64)).transpose(1, 2) for x in (q, k, v))
    weights = q @ k.transpose(-1, -2) / 8
    if mask is not None:
        weights = weights.masked_fill(~mask[:, None, None].bool(), float("-inf"))
    return (weights.softmax(-1) @ v).transpose(1, 2).flatten(2)


def straightforward(state: State, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """ImageReward from BLIP's architecture (its vit.py and med.py), layer by layer."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name: str, x: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    v, t = "blip.visual_encoder", "blip.text_encoder"
    proj = f"{v}.patch_embed.proj"
    x = F.conv2d(pixels, state[f"{proj}.weight"], state[f"{proj}.bias"], PATCH)
    first = state[f"{v}.cls_token"].expand(len(x), -1, -1)
    x = torch.cat([first, x.flatten(2).transpose(1, 2)], 1) + state[f"{v}.pos_embed"]
    for i in range(2):
        b = f"{v}.blocks.{i}"
        q, k, w = linear(f"{b}.attn.qkv", norm(f"{b}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(f"{b}.attn.proj", attention(q, k, w))
        inner = F.gelu(linear(f"{b}.mlp.fc1", norm(f"{b}.norm2", x, 1e-6)))
        x = x + linear(f"{b}.mlp.fc2", inner)
    seen = norm(f"{v}.norm", x, 1e-6)

    e = f"{t}.embeddings"
    y = state[f"{e}.word_embeddings.weight"][ids]
    y = norm(f"{e}.LayerNorm", y + state[f"{e}.position_embeddings.weight"][: ids.shape[1]], 1e-12)
    for i in range(2):
        for part, source, seen_mask in (("attention", None, mask), ("crossattention", seen, None)):
            a = f"{t}.encoder.layer.{i}.{part}"
            keys = y if source is None else source
            q, k = linear(f"{a}.self.query", y), linear(f"{a}.self.key", keys)
            mixed = attention(q, k, linear(f"{a}.self.value", keys), seen_mask)
            y = norm(f"{a}.output.LayerNorm", linear(f"{a}.output.dense", mixed) + y, 1e-12)
        layer = f"{t}.encoder.layer.{i}"
        inner = F.gelu(linear(f"{layer}.intermediate.dense", y))
        y = norm(f"{layer}.output.LayerNorm", linear(f"{layer}.output.dense", inner) + y, 1e-12)
    score = y[:, 0]
    for number in (0, 2, 4, 6, 7):
        score = linear(f"mlp.layers.{number}", score)
    return (score[:, 0] - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image_reward")
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    vocab = {word: i for i, word in enumerate((*special, *WORDS))}
    BertTokenizer(vocab=vocab).save_pretrained(path)
    torch.save(published_state(), path / "ImageReward.pt")
    return path


def test_image_reward_is_blip_layer_by_layer(folder: Path) -> None:
    reward = load_reward("image_reward", path=str(folder), options={"tokenizer": str(folder)})
    assert reward.name == "image_reward" and reward.differentiable
    arrays = [natural(16, 16, seed) for seed in range(3)]
    scores = assert_rows_do_not_mix(reward, as_tensor(*arrays), PROMPTS)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16},
        image_mean=MEAN, image_std=STD,
    )  # fmt: skip
    pixels = processor(arrays, return_tensors="pt")["pixel_values"]
    words = BertTokenizer.from_pretrained(folder)(
        PROMPTS, padding="max_length", max_length=35, truncation=True, return_tensors="pt"
    )
    expected = straightforward(published_state(), pixels, words.input_ids, words.attention_mask)
    assert expected.std() > 1e-3
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    assert_gradient(reward, as_tensor(natural(24, 24)), PROMPTS[:1])


def test_prompt_and_image_both_count_and_long_prompts_are_cut(folder: Path) -> None:
    reward = load_reward("image_reward", path=str(folder), options={"tokenizer": str(folder)})
    images = as_tensor(natural(20, 16, 0), natural(20, 16, 0), natural(20, 16, 1))
    scores = checked(reward, images, ["a star", "a circle", "a star"], [{}] * 3)
    assert len({round(float(score), 5) for score in scores}) == 3
    long, longer = " ".join(["red"] * 33), " ".join(["red"] * 60)
    scores = checked(reward, images[:2], [long, longer], [{}] * 2)
    assert scores[0] == scores[1]


def test_wrong_checkpoints_are_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="blip.visual_encoder_m.norm.bias is no weight"):
        blip_keys({"blip.visual_encoder_m.norm.bias": torch.zeros(1)})
    with pytest.raises(ValueError, match="head.weight is no weight of ImageReward's image"):
        blip_keys({"blip.visual_encoder.head.weight": torch.zeros(1)})
    state = published_state()
    del state["blip.text_encoder.encoder.layer.1.crossattention.self.key.bias"]
    torch.save(state, tmp_path / "ImageReward.pt")
    with pytest.raises(ValueError, match="lacks text.encoder.layer.1.crossattention.self.key.bias"):
        load_reward("image_reward", path=str(tmp_path), options={"tokenizer": str(folder)})
    torch.save({"mlp.layers.0.bias": torch.zeros(4)}, tmp_path / "ImageReward.pt")
    with pytest.raises(ValueError, match="weights lack vision.embeddings.patch_embedding.weight"):
        load_reward("image_reward", path=str(tmp_path), options={"tokenizer": str(folder)})
