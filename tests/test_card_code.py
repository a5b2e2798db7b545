"""The code of an export's card, cut out of it and run in the export's folder by a fresh process."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from students import RESOLUTION, TOKENS, random_like, request, sampled, student

from tiltflow.config.load import load_config
from tiltflow.core.checkpoint import Checkpoint
from tiltflow.data.prompts import Prompt
from tiltflow.formats.card import call_of
from tiltflow.formats.contract import Licence, base_facts, licence_of, read_contract
from tiltflow.formats.wanted import Wanted
from tiltflow.models.families import load_backbone
from tiltflow.models.pipelines.directory import Pipelines
from tiltflow.models.roles import AdapterSettings, adapter_roles
from tiltflow.tasks.export import export_checkpoint

Tiny = Callable[[str], Path]
SRC = Path(__file__).parents[1] / "src"
RUN = """
import json, sys
import numpy as np
for number, code in enumerate(json.load(sys.stdin)):
    made = {}
    exec(compile(code, f"the card's code {number}", "exec"), made)
    np.save(f"out_{number}.npy", np.stack([np.asarray(image) for image in made["images"]]))
"""
FOX = "a red fox in the snow"


def code_of(folder: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)


def run_code(folder: Path, *codes: str) -> list[torch.Tensor]:
    """The images (B, H, W, 3) in eight bits of each code, run in `folder` by a fresh process, which
    takes longer to import the libraries than for all of them: each has names of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN], input=json.dumps(codes), text=True,
        cwd=folder, env={**os.environ, "PYTHONPATH": str(SRC)}, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    import numpy as np

    return [torch.from_numpy(np.load(folder / f"out_{n}.npy")) for n in range(len(codes))]


def set_base(code: str, base: Path) -> str:
    """As a reader does who has the base model in a directory of his own."""
    changed, count = re.subn(r"^BASE = .*# set this:.*$", f"BASE = {str(base)!r}", code, flags=re.M)
    assert count == 1
    return changed


@pytest.mark.long
@pytest.mark.parametrize("name", ["sd3m", "flux1_dev", "flux2_klein_4b"])
def test_the_code_runs_in_the_folder(tiny_pipeline: Tiny, tmp_path: Path, name: str) -> None:
    made = student(tiny_pipeline, name, tmp_path, formats=("diffusers", "merged", "peft"))
    folders, merged, peft = code_of(made.export)
    asked = request(made, prompts=[Prompt(FOX)])
    ours = (sampled(asked) * 255).round().byte().permute(0, 2, 3, 1).int()
    # each by itself, on a base of its own
    based = [set_base(code, made.base) for code in (folders, peft)]
    *loaded, whole = run_code(made.export, *based, merged)
    for theirs in loaded:
        assert (ours - theirs.int()).abs().max() <= 1  # diffusers rounds what we round, from fp32
    below = (sampled(replace(asked, tilt_lora=None)) * 255).round().permute(0, 2, 3, 1)
    assert (ours - below).abs().max() > 5  # stage 1's student is another
    assert (ours - whole.int()).abs().max() <= 2
    assert ours.float().std() > 5


@pytest.mark.parametrize("formats", [("peft",), ("diffusers", "peft")])
def test_the_peft_code_is_whole(
    tiny_pipeline: Tiny, tmp_path: Path, formats: tuple[str, ...]
) -> None:
    """A base of its own, the sampler, which is there, and both adapters at work; none baked."""
    made = student(tiny_pipeline, "sd3m", tmp_path, formats=formats, strengths=(0.5,))
    code = code_of(made.export)[-1]
    assert "pipe = StableDiffusion3Pipeline.from_pretrained(BASE" in code
    for name in ("few_step", "tilt"):
        assert f'"peft/{name}", adapter_name="{name}"' in code
    assert 'set_adapter(["few_step", "tilt"])' in code and "baked" not in code
    assert 'CPSFlowMatchScheduler.from_pretrained("scheduler")' in code
    assert (made.export / "scheduler" / "scheduler_config.json").is_file()
    assert "`peft/baked_0.5` is both in one" in (made.export / "README.md").read_text()


@pytest.mark.long
def test_the_packaged_pipelines_code_runs_as_it_stands(tmp_path: Path) -> None:
    """No directory to set, no private path, and the parts that this SD3 lacks are told."""
    asked = ["data.prompts=p.txt", "adapters.targets=null", "model.dtype=bf16"]
    config = load_config("demo_cold_start", asked)
    backbone: Any = load_backbone(_packaged(), device="cpu")
    settings = AdapterSettings(2, 4.0, backbone.lora_targets())
    weights = random_like(adapter_roles(backbone, settings, seed=0).generator.state(), 1)
    facts = {"stage": "cold_start", "adapters": vars(settings)}
    export_checkpoint(config, Checkpoint(3, {"ema": weights}, facts), tmp_path / "e")
    text = (tmp_path / "e" / "README.md").read_text()
    assert "packaged:" not in text and str(_packaged()) not in text
    (code,) = code_of(tmp_path / "e")
    assert "dtype=torch.bfloat16, text_encoder_3=None, tokenizer_3=None)" in code
    assert [made.shape for made in run_code(tmp_path / "e", code)] == [(1, 64, 64, 3)]


def _packaged() -> Path:
    import tiltflow

    return Path(tiltflow.__file__).parent / "assets" / "pipeline"


def front(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def test_front_matter_and_licence(tiny_pipeline: Tiny, tmp_path: Path) -> None:
    made = student(tiny_pipeline, "sd3m", tmp_path)
    plain = (made.export / "README.md").read_text()
    assert front(plain)["base_model"] == "sd3m" and "license" not in front(plain)
    assert "files name no licence" in plain and str(tmp_path) not in plain
    (made.model / "README.md").write_text(
        "---\nlicense: other\nlicense_name: some-community\nlicense_link: LICENSE.md\n---\n# X\n"
    )
    (made.model / "LICENSE.md").write_text("# Some Community Licence\n\nYou may.\n")
    export_checkpoint(made.config, made.checkpoint, made.export)
    text = (made.export / "README.md").read_text()
    assert front(text) == {
        "library_name": "diffusers", "pipeline_tag": "text-to-image", "base_model": "sd3m",
        "license": "other", "license_name": "some-community", "license_link": "LICENSE.md",
        "tags": ["tiltflow", "few-step", "flow-matching", "lora"],
    }  # fmt: skip
    assert (made.export / "LICENSE.md").read_text().endswith("You may.\n")
    assert "licence, `other` (some-community), applies" in text


def test_licences(tmp_path: Path) -> None:
    assert licence_of(tmp_path) is None
    (tmp_path / "LICENSE").write_text("\n   Apache License\n   Version 2.0, January 2004\n")
    assert licence_of(tmp_path) == Licence(id="apache-2.0")
    (tmp_path / "LICENSE").write_text("# FLUX Non-Commercial\ntext")
    assert licence_of(tmp_path) == Licence(id="other", name="FLUX Non-Commercial", link="LICENSE")
    (tmp_path / "README.md").write_text("# no front matter\nlicense: mit\n")
    assert licence_of(tmp_path) == Licence(id="other", name="FLUX Non-Commercial", link="LICENSE")
    (tmp_path / "README.md").write_bytes(b"---\r\nlicense: 'mit'\r\n---\r\n\xff")
    assert licence_of(tmp_path) == Licence(id="mit")


def test_names_of_bases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    snapshot = tmp_path / "hub" / "models--org--a-model" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    local = tmp_path / "secret" / "my model"
    local.mkdir(parents=True)
    for setting, root, expected in (
        ("org/a-model", snapshot, ("org/a-model", "org/a-model", None)),
        (str(snapshot), snapshot, ("org/a-model", "org/a-model", None)),
        ("packaged:pipeline", _packaged(), ("tiltflow-pipeline", None, "pipeline")),
        ("secret/my model", local, ("my model", None, None)),
    ):
        found = base_facts(setting, root, "0")
        assert (found.name, found.hub_id, found.packaged) == expected


def test_merged_says_what_it_lacks_without_the_import(tiny_pipeline: Tiny, tmp_path: Path) -> None:
    """Why the card's code imports the class: diffusers names the module that it will not import."""
    made = student(tiny_pipeline, "sd3m", tmp_path, formats=("diffusers", "merged"))
    index = (made.export / "merged" / "model_index.json").read_text()
    assert '"tiltflow.scheduler"' in index and "_name_or_path" not in index
    (_, code) = code_of(made.export)
    assert "from tiltflow.scheduler import CPSFlowMatchScheduler" in code


def test_settings_of_a_call_are_the_contracts(tiny_pipeline: Tiny, tmp_path: Path) -> None:
    made = student(tiny_pipeline, "flux1_dev", tmp_path / "a")
    (code,) = code_of(made.export)
    size = f"height={RESOLUTION}, width={RESOLUTION}, max_sequence_length={TOKENS}"
    assert f"num_inference_steps=4, guidance_scale=1.0, {size}" in code
    bf16 = made.config.model_copy(
        update={"model": made.config.model.model_copy(update={"dtype": "bf16"})}
    )
    export_checkpoint(bf16, made.checkpoint, tmp_path / "b")
    (code,) = code_of(tmp_path / "b")
    assert "FluxPipeline.from_pretrained(BASE, dtype=torch.bfloat16)" in code
    assert code.startswith("import torch\n")
    shutil.rmtree(tmp_path / "b")


@pytest.mark.long
def test_the_code_decodes_as_in_training(tiny_pipeline: Tiny, tmp_path: Path) -> None:
    """Where the pipeline takes an autoencoder in a type of its own; else the card says so."""
    for name, takes in (("z_image", True), ("sd3m", False)):
        made, out = student(tiny_pipeline, name, tmp_path / name), tmp_path / f"{name} mixed"
        model = made.config.model.model_copy(update={"dtype": "bf16", "vae_dtype": "fp32"})
        config = made.config.model_copy(update={"model": model})
        export_checkpoint(config, made.checkpoint, out, Wanted(("diffusers", "merged")))
        text = (out / "README.md").read_text()
        codes = code_of(out)
        for code in codes:
            assert ('"default": torch.bfloat16, "vae": torch.float32' in code) is takes
        assert ("its autoencoder in fp32, as in training" in text) is takes
        assert ("does not take beside bf16" in text) is not takes
        seen = "\nassert pipe.vae.dtype == torch.float32 != pipe.transformer.dtype\n" * takes
        (images,) = run_code(out, codes[-1] + seen)
        assert images.shape == (1, RESOLUTION, RESOLUTION, 3)


@pytest.mark.long
@pytest.mark.parametrize("name", ["qwen_image", "qwen_image_21", "wan21_1b", "sana", "krea2"])
def test_other_pipelines_that_take_an_autoencoder_in_another_type(
    tiny_pipeline: Tiny, tmp_path: Path, name: str
) -> None:
    made = student(tiny_pipeline, name, tmp_path)
    contract, family = read_contract(made.export / "tilt"), Pipelines(str(made.model)).model.family
    assert contract is not None and family.own_vae_dtype
    kinds = {"default": torch.bfloat16, "vae": torch.float32}
    pipe: Any = DiffusionPipeline.from_pretrained(made.base, dtype=kinds)
    pipe(prompt=["a cat"], **call_of(contract, family))
    assert (pipe.transformer.dtype, pipe.vae.dtype) == tuple(kinds.values())
