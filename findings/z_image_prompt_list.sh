#!/usr/bin/env bash
# ZImagePipeline writes its chat template into the list of prompts that the caller gives it.
#
# Versions: diffusers 0.42.1, transformers 5.23.0, tokenizers 0.23.3, torch 2.13.0.
# Behaviour: the pipeline puts each prompt into its template and stores the result in the caller's own list. The next
#   call with that list puts the template around the template. Prompts given as one string are not touched.
# One would have guessed: a call leaves its arguments as they are, as the other text-to-image pipelines of diffusers do.
# Who is hurt: evaluations that draw several systems from one list of prompts. The first system sees the prompts, the
#   second sees them templated twice, the third three times; the scores differ and no line says why. Whoever scores images
#   against that list afterwards scores them against the template, too.
# What helps: give `list(prompts)`.
#
# Output seen (2026-11-28):
#   the caller's list after one call: ['user : a red cat assistant :']
#   the caller's list after two calls: ['user : user : a red cat assistant : assistant :']
#   tokens of the prompt: 7 in the first call, 11 in the second
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q diffusers==0.42.1 transformers==5.23.0 tokenizers==0.23.3
cat > "$work/try.py" <<'PY'
import warnings

warnings.filterwarnings("ignore")
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

words = {w: i for i, w in enumerate(["<pad>", "<unk>", "user", ":", "assistant", "a", "red", "cat"])}
base = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
base.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, pad_token="<pad>", unk_token="<unk>")
tokenizer.chat_template = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}assistant :"
)
torch.manual_seed(0)
encoder = Qwen3Model(
    Qwen3Config(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8,
    )
).eval()
pipe = ZImagePipeline(FlowMatchEulerDiscreteScheduler(), None, encoder, tokenizer, None)
prompts = ["a red cat"]
with torch.no_grad():
    first, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
    print(f"the caller's list after one call: {prompts}")
    second, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
print(f"the caller's list after two calls: {prompts}")
print(f"tokens of the prompt: {len(first[0])} in the first call, {len(second[0])} in the second")
assert prompts != ["a red cat"] and len(second[0]) > len(first[0])
print("as described")
PY
"$work/venv/bin/python" "$work/try.py"
