"""The peak memory of training with adapters over one base, against a copy for each role.

Stage 1 and then stage 2 on a random SD3 transformer of 36 million parameters with the embedded
model's text encoder and autoencoder, in fp32, one iteration of each with both updates, for
`adapters.kind=lora` and `copies` (full fine-tuning). Each is a process of its own, whose greatest
resident size is read at its end; that of a process which has only imported is subtracted.

    python benchmarks/copies_memory.py [--layers 4] [--width 512]
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

MIB = 2**20


def pipeline(folder: Path, layers: int, width: int) -> int:
    """Saves the pipeline; its transformer's bytes."""
    import torch
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    from tiltflow.core.paths import resolve_path
    from tiltflow.models.pipelines.files import absent_parts

    source = Path(resolve_path("packaged:pipeline"))
    pipe = StableDiffusion3Pipeline.from_pretrained(source, **absent_parts(source))
    own = {k: v for k, v in pipe.transformer.config.items() if not k.startswith("_")}
    sizes = {"num_layers": layers, "num_attention_heads": width // 64, "attention_head_dim": 64}
    torch.manual_seed(0)
    pipe.transformer = SD3Transformer2DModel(**own | sizes | {"caption_projection_dim": width})
    pipe.save_pretrained(folder)
    return sum(p.nbytes for p in pipe.transformer.parameters())


def train(stage: str, kind: str, folder: Path) -> None:
    """One iteration of a stage, in this process."""
    from rich.console import Console

    from tiltflow.config.load import load_config
    from tiltflow.tasks.train import run_training

    if stage == "nothing":
        return
    settings = [
        f"model.path={folder}/pipeline", "model.autocast=null", f"adapters.kind={kind}",
        "train.steps=1", "train.batch_size=4", "train.micro_batch_size=2", "log.samples_every=0",
        "watch.rewards={}", "run.device=cpu", f"run.out={folder}/{kind}-{stage}",
        "data.cache=off", f"data.prompts={folder}/prompts.txt",
    ]  # fmt: skip
    if stage == "cold_start":
        settings += ["cold_start.generator_every=1"]
    else:
        settings += [f"model.few_step={folder}/{kind}-cold_start", "tilt.group_size=2"]
    run_training(load_config(f"demo_{stage}", settings), Console(quiet=True))


def peak(stage: str, kind: str, folder: Path) -> int:
    """The greatest resident size in bytes of a process that trains (or, "nothing", imports)."""
    command = [sys.executable, __file__, "--child", stage, kind, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-2000:])
    return int(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--child", nargs=3, metavar=("STAGE", "KIND", "FOLDER"))
    given = parser.parse_args()
    if given.child:
        stage, kind, folder = given.child
        train(stage, kind, Path(folder))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)  # Linux counts in KiB
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = pipeline(folder / "pipeline", given.layers, given.width)
        (folder / "prompts.txt").write_text("a red circle\na blue square\n")
        print(f"transformer {size / MIB:.0f} MiB; peaks above the imports' in MiB (transformers)")
        base = peak("nothing", "lora", folder)
        for stage in ("cold_start", "tilt"):
            for kind in ("lora", "copies"):
                found = peak(stage, kind, folder) - base
                print(f"{stage:10} {kind:6} {found / MIB:6.0f} ({found / size:.2f})")


if __name__ == "__main__":
    main()
