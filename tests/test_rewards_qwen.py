from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_rewards import as_tensor, assert_gradient, assert_rows_do_not_mix, natural, redraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

from tiltflow.rewards import checked, load_reward
from tiltflow.rewards.zoo.geneval2 import GenEval2, questions_of
from tiltflow.rewards.zoo.hpsv3 import HPSv3, read_instruction, split_keys
from tiltflow.rewards.zoo.qwen import QwenPreprocessing

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|image_pad|>", "<|video_pad|>")  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MERGED = ("yes", "Yes", "Ġyes", "ĠYes", "two", "Ġtwo", "Two", "ĠTwo")


def write_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE that knows a few words, with Qwen's special tokens and a chat template."""
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for word in MERGED:
        for end in range(2, len(word) + 1):
            merge = (word[: end - 1], word[end - 1])
            if merge not in merges:
                merges.append(merge)
            vocab.setdefault(word[:end], len(vocab))
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|endoftext|>", eos_token="<|im_end|>",
        chat_template=TEMPLATE,
    )  # fmt: skip
    tokenizer.save_pretrained(path)
    return tokenizer


def sizes(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    names = {"image": "image_pad", "video": "video_pad"}
    names |= {"vision_start": "vision_start", "vision_end": "vision_end"}
    ids = {f"{n}_token_id": tokenizer.convert_tokens_to_ids(f"<|{t}|>") for n, t in names.items()}
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
    }  # fmt: skip
    return {"text_config": text, **ids}


# --- preprocessing -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(56, 56), (64, 48), (50, 90), (130, 40), (20, 20)])
@pytest.mark.parametrize(("patch", "least"), [(14, 56 * 56), (16, 64 * 64)])
def test_preprocessing_matches_the_processor(
    size: tuple[int, int], patch: int, least: int, tmp_path: Path
) -> None:
    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": least, "longest_edge": 80 * 80}, patch_size=patch,
        image_mean=[0.5, 0.4, 0.3], image_std=[0.5, 0.4, 0.3],
    )  # fmt: skip
    processor.save_pretrained(tmp_path)
    arrays = [natural(*size, seed) for seed in range(2)]
    expected = processor(arrays, return_tensors="pt")
    ours = QwenPreprocessing.from_pretrained(str(tmp_path))
    patches, grid = ours(as_tensor(*arrays))
    assert grid.tolist() == expected["image_grid_thw"].tolist()
    assert (patches - expected["pixel_values"]).abs().max() <= 2 / 255 / 0.3
    assert ours.tokens(*size) * 4 == int(grid[0].prod())
    unscaled = QwenPreprocessing(patch, 2, 2, least, 80 * 80, (0.0,) * 3, (1.0,) * 3)
    exact = processor(arrays, return_tensors="pt", do_normalize=False)["pixel_values"]
    assert (unscaled(as_tensor(*arrays))[0] - exact).abs().max() <= 2 / 255


# --- HPSv3 -------------------------------------------------------------------------------------


BEFORE, AFTER = "Rate this \nimage of ", ": <|Reward|>\n"


@pytest.fixture(scope="module")
def hpsv3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Qwen2VLModel, nn.Module]:
    path = tmp_path_factory.mktemp("hpsv3")
    tokenizer = write_tokenizer(path)
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    config = Qwen2VLConfig(vision_config=vision, **sizes(tokenizer))
    config.text_config.rope_parameters["mrope_section"] = [2, 3, 3]
    config.save_pretrained(path)
    Qwen2VLImageProcessorPil().save_pretrained(path)
    config.text_config.vocab_size += 1  # the reward token
    torch.manual_seed(0)
    model = Qwen2VLModel(config).eval()
    redraw(model, 0.15)
    head = nn.Sequential(nn.Linear(32, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16),
                         nn.ReLU(), nn.Linear(16, 2)).eval()  # fmt: skip
    redraw(head, 0.1)
    state = {f"rm_head.{key}": value for key, value in head.state_dict().items()}
    for key, value in model.state_dict().items():  # the names of transformers before 4.52
        old = key if key.startswith("visual.") else key.replace("language_model.", "model.")
        state[old] = value.contiguous().clone()
    state["lm_head.weight"] = torch.zeros(3, 32)
    save_file(state, path / "HPSv3.safetensors")
    (path / "instruction.txt").write_text(BEFORE + "{prompt}" + AFTER)
    return path, model, head


@pytest.mark.parametrize("text", ["rate it <|Reward|>", "rate {prompt}", "<|Reward|> of {prompt}"])
def test_hpsv3_wants_its_authors_instruction(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs the instruction"):
        read_instruction(None)
    file = tmp_path / "instruction.txt"
    with pytest.raises(ValueError, match="cannot be read"):
        read_instruction(str(file))
    file.write_text(text)
    with pytest.raises(ValueError, match="must hold {prompt}"):
        read_instruction(str(file))


def expected_hpsv3(path: Path, model: Any, head: nn.Module, arrays: list, prompt: str) -> Tensor:
    """The library's processor and model, one image at a time, positions along the sequence."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    tokenizer.add_tokens(["<|Reward|>"], special_tokens=True)
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 200704, "longest_edge": 200704})
    scores = []
    for array in arrays:
        image = processor(array, return_tensors="pt")
        count = int(image["image_grid_thw"].prod()) // 4
        text = (
            "<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * count + "<|vision_end|>"
            + BEFORE + prompt + AFTER + "<|im_end|>\n<|im_start|>assistant\n"
        )  # fmt: skip
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            features = model.get_image_features(image["pixel_values"], image["image_grid_thw"])
            embedded = model.language_model.embed_tokens(ids)
            embedded[ids == model.config.image_token_id] = torch.cat(features.pooler_output)
            hidden = model.language_model(inputs_embeds=embedded).last_hidden_state
            scores.append(head(hidden[ids == len(tokenizer) - 1])[0, 0])
    return torch.stack(scores)


def test_hpsv3_is_the_checkpoints_mean(hpsv3: tuple[Path, Qwen2VLModel, nn.Module]) -> None:
    path, model, head = hpsv3
    instruction = str(path / "instruction.txt")
    options = {"base": str(path), "dtype": "fp32", "instruction": instruction}
    reward = load_reward("hpsv3", path=str(path), options=options)
    assert isinstance(reward, HPSv3) and reward.differentiable
    arrays = [natural(448, 448, seed) for seed in range(2)]
    images = as_tensor(*arrays)
    scores = checked(reward, images, ["a dog"] * 2, [{}] * 2).detach()
    expected = expected_hpsv3(path, model, head, arrays, "a dog")
    assert (expected[0] - expected[1]).abs() > 1e-3
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    longer = "a very long prompt about a dog"
    mixed = checked(reward, images, [longer, "a dog"], [{}] * 2).detach()
    alone = [checked(reward, images[:1], [longer], [{}]).detach(), scores[1:]]
    torch.testing.assert_close(mixed, torch.cat(alone), atol=1e-5, rtol=1e-5)
    assert (mixed[0] - scores[0]).abs() > 1e-4
    assert_gradient(reward, as_tensor(natural(60, 60)), ["a dog"], h=2e-4)


def test_hpsv3_refuses_what_it_cannot_read(hpsv3: tuple[Path, Qwen2VLModel, nn.Module]) -> None:
    path = str(hpsv3[0])
    image = as_tensor(natural(30, 30))
    options = {"base": path, "dtype": "fp32", "instruction": f"{path}/instruction.txt"}
    reward = load_reward("hpsv3", path=path, options=options)
    with pytest.raises(ValueError, match="the prompt 'a <|Reward|>' has <|Reward|> in it"):
        checked(reward, image, ["a <|Reward|>"], [{}])
    with pytest.raises(ValueError, match="'hpsv3': dtype is 'fp64'"):
        load_reward("hpsv3", path=path, options=options | {"dtype": "fp64"})
    with pytest.raises(ValueError, match="vision.x is no weight of HPSv3"):
        split_keys({"vision.x": torch.zeros(1)})
    new = {"model.visual.a": 1, "model.language_model.b": 2, "rm_head.0.bias": torch.zeros(1)}
    assert split_keys(new)[0] == {"visual.a": 1, "language_model.b": 2}  # type: ignore[arg-type]


# --- GenEval 2 ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen3_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3")
    tokenizer = write_tokenizer(path)
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
        "out_hidden_size": 32, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16,
    }  # fmt: skip
    config = Qwen3VLConfig(vision_config=vision, **sizes(tokenizer))
    config.text_config.head_dim = 16
    config.text_config.rope_parameters["mrope_section"] = [2, 3, 3]
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(config)
    redraw(model, 0.2)
    model.save_pretrained(path)
    Qwen2VLImageProcessorPil(
        patch_size=16, size={"shortest_edge": 64 * 64, "longest_edge": 96 * 96},
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    ).save_pretrained(path)  # fmt: skip
    return path


VQA = [
    {"vqa_list": [["How many dogs are in the image?", "two"], ["Is the dog red?", "Yes"],
                  ["Are there any dogs in the image?", "Yes"]]},
    {"vqa_list": [["Is the cat on the mat?", "Yes"]]},
]  # fmt: skip
VARIANTS = {"two": ("two", "Two", "2"), "Yes": ("Yes", "yes")}


def expected_chances(path: Path, arrays: list) -> list[list[float]]:
    """One question at a time, by the library's processor and model: softmax of the last logits."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    processor = Qwen2VLImageProcessorPil.from_pretrained(path)
    model = Qwen3VLForConditionalGeneration.from_pretrained(path).eval()
    chances = []
    for array, metadata in zip(arrays, VQA, strict=True):
        image, row = processor(array, return_tensors="pt"), []
        count = int(image["image_grid_thw"].prod()) // 4
        for question, answer in metadata["vqa_list"]:
            text = (
                "<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * count + "<|vision_end|>"
                + f"{question} Answer in one word.<|im_end|>\n<|im_start|>assistant\n"
            )  # fmt: skip
            ids = tokenizer(text, return_tensors="pt").input_ids
            types = (ids == model.config.image_token_id).int()
            with torch.no_grad():
                logits = model(input_ids=ids, mm_token_type_ids=types, **image).logits[0, -1]
            words = [space + word for word in VARIANTS[answer] for space in ("", " ")]
            right = {tokenizer.encode(word)[0] for word in words}
            row.append(float(logits.softmax(-1)[list(right)].sum()))
        chances.append(row)
    return chances


def test_geneval2_is_the_mean_chance_of_the_right_answers(qwen3_path: Path) -> None:
    arrays = [natural(64, 64, seed) for seed in range(2)]
    images, prompts = as_tensor(*arrays), ["two red dogs", "a cat on a mat"]
    options = {"dtype": "fp32", "batch": 3}
    reward = load_reward("geneval2", path=str(qwen3_path), options=options)
    assert isinstance(reward, GenEval2) and not reward.differentiable
    chances = expected_chances(qwen3_path, arrays)
    ours = reward.chances(images, [questions_of(m, p) for m, p in zip(VQA, prompts, strict=True)])
    for mine, theirs in zip(ours, chances, strict=True):
        torch.testing.assert_close(mine, torch.tensor(theirs), atol=1e-5, rtol=1e-4)
    scores = assert_rows_do_not_mix(reward, images, prompts, VQA)
    geometric = torch.tensor([torch.tensor(c).log().mean().exp() for c in chances])
    torch.testing.assert_close(scores, geometric, atol=1e-5, rtol=1e-4)
    reward.mean = "arithmetic"
    arithmetic = torch.tensor([sum(c) / len(c) for c in chances])
    scores = checked(reward, images, prompts, VQA)
    torch.testing.assert_close(scores, arithmetic, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="'geneval2': 'p' has no GenEval 2 metadata"):
        checked(reward, images[:1], ["p"], [{}])


def test_questions_have_the_benchmarks_spellings() -> None:
    how, yes = questions_of({"vqa_list": [["How many cows?", "three"], ["Any cow?", "Yes"]]}, "p")
    assert how.text == "How many cows? Answer in one word."
    assert sorted(how.answers) == [" 3", " Three", " three", "3", "Three", "three"]
    assert sorted(yes.answers) == [" Yes", " yes", "Yes", "yes"]
    for pair, message in (
        (["How many?", "many"], "is no number in words"),
        (["Is it?", "No"], "is 'No', not 'Yes'"),
        ("Is it?", "is not a question and its answer"),
        (["Is it?"], "is not a question and its answer"),
    ):
        with pytest.raises(ValueError, match=message):
            questions_of({"vqa_list": [pair]}, "p")
    with pytest.raises(ValueError, match="'geneval2': the mean is 'middle'"):
        load_reward("geneval2", options={"mean": "middle"})
