#!/usr/bin/env bash
# diffusers' EMAModel copies a parameter that is frozen at the moment, instead of averaging it.
#
# Versions: diffusers 0.42.1, peft 0.21.2, torch 2.13.0, transformers 5.23.0, accelerate 1.15.0.
# Behaviour: `EMAModel.step(parameters)` averages those with `requires_grad` and copies the others. PEFT's `set_adapter`,
#   diffusers' `disable_adapters` and a plain `requires_grad_(False)` turn that flag off for a while. If `step` is called
#   in that while, the average becomes the last weights, and all that it had gathered is lost. Its
#   `cur_decay_value` says .99 all along. Nothing is raised or warned.
# One would have guessed: the class averages "model weights" that it was given at its start, at every step. torch's
#   AveragedModel does.
# Who is hurt: loops that train two adapters or two networks in turn (generator and fake score, generator and
#   discriminator) and take the average's step at the iteration's end, when the other one is active. The averaged
#   weights that are evaluated and published are the raw ones. Once is enough: one such call throws the history away.
# What helps: take the step right after the optimizer's, while the adapter is active; or compare the average with the weights.
#
# Output seen (2026-11-28), 200 steps at decay .99, the distance of the average from the last weights:
#   step while the generator's adapter is active  : EMAModel 14, torch 14
#   step after set_adapter("fake_score")          : EMAModel 0, torch 14
#   step after disable_adapters()                 : EMAModel 0, torch 14
#   the last step alone after set_adapter         : EMAModel 0, torch 14
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q peft==0.21.2 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0
cat > "$work/try.py" <<'PY'
import warnings

warnings.filterwarnings("ignore")
import torch
from diffusers import SD3Transformer2DModel
from diffusers.training_utils import EMAModel
from diffusers.utils import logging
from peft import LoraConfig
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

logging.set_verbosity_error()
STEPS, DECAY = 200, 0.99


def run(title, before_average, always=True):
    torch.manual_seed(0)
    network = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32,
        pos_embed_max_size=8,
    )
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k"])
    network.add_adapter(config, "generator")
    network.add_adapter(config, "fake_score")
    network.set_adapter("generator")
    weights = [value for name, value in network.named_parameters() if ".generator." in name]
    ema = EMAModel(weights, decay=DECAY, min_decay=DECAY)
    other = AveragedModel(torch.nn.ParameterList(weights), multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.0)
    for step in range(STEPS):
        network.enable_adapters()
        network.set_adapter("generator")
        for value in weights:
            value.grad = torch.randn_like(value) - 1
        optimizer.step()
        if always or step == STEPS - 1:
            before_average(network)
        ema.step(weights)
        other.update_parameters(torch.nn.ParameterList(weights))
    assert abs(ema.cur_decay_value - DECAY) < 1e-9

    def lag(average):
        return float(sum((a.detach() - w.detach()).square().sum() for a, w in zip(average, weights)) ** 0.5)

    ours, torchs = lag(ema.shadow_params), lag(other.module)
    print(f"{title:46}: EMAModel {ours:.2g}, torch {torchs:.2g}")
    return ours, torchs


active = run("step while the generator's adapter is active", lambda network: None)
assert min(active) > 1 and abs(active[0] - active[1]) < 0.2 * active[1]
for title, change, always in (
    ('step after set_adapter("fake_score")', lambda network: network.set_adapter("fake_score"), True),
    ("step after disable_adapters()", lambda network: network.disable_adapters(), True),
    ("the last step alone after set_adapter", lambda network: network.set_adapter("fake_score"), False),
):
    ours, torchs = run(title, change, always)
    assert ours == 0 and abs(torchs - active[1]) < 1e-3
print("as described")
PY
"$work/venv/bin/python" "$work/try.py"
