"""The code of an export's README.md: Python that samples the student, each block by itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tiltflow.formats.contract import BaseModelFacts, Contract
from tiltflow.models.switch import TILT, stack_tilt

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Usage:
    """What the code is made of: `call` are the arguments of the pipeline's call, `made` the line
    that keeps what `{call}` gives, `absent` the parts that the base was saved without and has to be
    loaded without. `own_vae` is whether the call takes an autoencoder in a type of its own."""

    contract: Contract
    call: Mapping[str, Any]
    made: str
    absent: Sequence[str] = ()
    own_vae: bool = False

    @property
    def dtypes(self) -> Mapping[str, str]:
        """The types that the pipeline is loaded in, by part; `default` is that of all others."""
        kept = self.contract.kept_in
        own = self.own_vae and kept["vae"] != kept["default"]
        return kept if own else {"default": kept["default"]}

    def of_folders(self, folders: Sequence[str]) -> str:
        """Code that loads LoRA folders through diffusers; those of baked strengths stay aside."""
        names = _apart(folders)
        code = [f'pipe.load_lora_weights("{name}", adapter_name="{name}")' for name in names]
        if TILT in names:
            stack = json.dumps(stack_tilt())
            code.append(f"pipe.set_adapters({stack}, [1.0, 1.0])  # tilt: 0 to 1.5")
        return self._on_the_base([], code)

    def of_peft(self, folders: Sequence[str]) -> str:
        """Code that loads the same LoRAs as PEFT's folders, on a base of its own: a pipeline that
        another block has loaded LoRAs into, or the merged one, would have them twice."""
        first, *others = _apart(folders)
        code = [
            "pipe.transformer = PeftModel.from_pretrained(",
            f'    pipe.transformer, "peft/{first}", adapter_name="{first}"',
            ")",
            *(f'pipe.transformer.load_adapter("peft/{n}", adapter_name="{n}")' for n in others),
        ]
        if TILT in others:  # PeftModel's own set_adapter takes one adapter, its tuner's several
            code.append(f"pipe.transformer.base_model.set_adapter({json.dumps(stack_tilt())})")
        return self._on_the_base(["from peft import PeftModel"], code)

    def of_merged(self, folder: str) -> str:
        """Code that loads a merged pipeline."""
        naming = f"  # the class that {folder}/ names"
        return self._code([], naming, [f"pipe = {self._loaded(json.dumps(folder))}"])

    def _on_the_base(self, imports: Sequence[str], adapters: Sequence[str]) -> str:
        scheduler = 'pipe.scheduler = CPSFlowMatchScheduler.from_pretrained("scheduler")'
        base = [*_where(self.contract.base), f"pipe = {self._loaded('BASE')}"]
        return self._code(imports, "", [*base, *adapters, scheduler])

    def _loaded(self, source: str) -> str:
        kinds = {part: f"torch.{DTYPES[kind]}" for part, kind in self.dtypes.items()}
        options = []
        if len(kinds) > 1:
            options = ["dtype={" + ", ".join(f'"{p}": {kind}' for p, kind in kinds.items()) + "}"]
        elif self.contract.dtype == "bf16":
            options = [f"dtype={kinds['default']}"]
        options += [f"{part}=None" for part in self.absent]
        return f"{self.contract.pipeline}.from_pretrained({', '.join([source, *options])})"

    def _code(self, imports: Sequence[str], naming: str, loading: Sequence[str]) -> str:
        arguments = ", ".join(f"{key}={value!r}" for key, value in self.call.items())
        call = f"pipe(prompt=prompts, generator=noise, {arguments})"
        code = [
            *(["import torch"] if "torch." in " ".join(loading) else []),
            f"from diffusers import {self.contract.pipeline}",
            *imports,
            f"from tiltflow.scheduler import CPSFlowMatchScheduler{naming}",
            "",
            *loading,
            'prompts = ["a red fox in the snow"]',
            "noise = pipe.scheduler.seed(0, images=len(prompts))",
            self.made.format(call=call),
        ]
        return "```python\n" + "\n".join(code) + "\n```"


def _apart(folders: Sequence[str]) -> list[str]:
    """The student's own adapters, without those of baked strengths."""
    return [name for name in folders if not name.startswith("baked_")]


def _where(base: BaseModelFacts) -> list[str]:
    """Lines that say where the base model is."""
    if base.packaged is not None:
        place = f'str(files("tiltflow") / "assets" / "{base.packaged}")'
        return ["from importlib.resources import files", "", f"BASE = {place}"]
    if base.hub_id is not None:
        return [f'BASE = "{base.hub_id}"']
    return [f"BASE = {base.name!r}  # set this: the directory of the base model"]
