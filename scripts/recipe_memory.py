"""What each recipe of a published model needs in memory, planned on shapes: the cards in README.md,
every recipe in docs/backbones.md.

    python scripts/recipe_memory.py            plans every recipe (minutes), writes all three files
    python scripts/recipe_memory.py --table    writes the tables from the figures that are there

No weight is loaded: the planner runs a micro-batch on torch's meta device.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from tiltflow.config.load import load_config
from tiltflow.setup.planner import GIB
from tiltflow.tasks.planning import is_auto, with_checkpointing
from tiltflow.tasks.plans import plan_recipe, reward_models

ROOT = Path(__file__).parents[1]
DATA = ROOT / "docs" / "data" / "recipe_memory.json"
README, PAGE = ROOT / "README.md", ROOT / "docs" / "backbones.md"
RECIPES = ROOT / "src" / "tiltflow" / "recipes"
MODELS = {
    "sd3m": "SD3-M",
    "sd35m": "SD3.5-M",
    "sd35l": "SD3.5-Large",
    "sana": "SANA",
    "chroma": "Chroma",
    "flux1_dev": "FLUX.1-dev",
    "flux2_klein_4b": "FLUX.2-klein 4B",
    "flux2_klein_9b": "FLUX.2-klein 9B",
    "flux2_dev": "FLUX.2-dev",
    "z_image": "Z-Image",
    "qwen_image": "Qwen-Image",
    "qwen_image_21": "Qwen-Image-2.1",
    "krea2": "Krea 2",
    "wan21_1b": "Wan 2.1 1.3B",
}
STAGES = {"cold_start": "1", "tilt": "2"}
MEASURED = {"sd35m_cold_start": "13.3 samples/s on an H200, random weights"}
CARDS, ASIDE = (24, 40, 80, 141), 1.5
"""GiB of the cards that people have, and what CUDA and its allocator take beside the plan."""
BEGIN, END = "<!-- made by scripts/recipe_memory.py -->\n", "<!-- end -->"


def peaks(recipe: str) -> dict[str, object]:
    """GiB at the peak: recomputing everything and nothing where the recipe leaves it open."""
    needs = ["data.prompts=prompts.txt", "run.out=out"]
    needs += ["model.few_step=cold"] if recipe.split("_cold")[0] == recipe else []
    cfg = load_config(recipe, needs)
    open_ = is_auto(cfg)
    parts = ("fake_score", "generator") + (("decoder",) if cfg.stage == "tilt" else ())
    cases = [with_checkpointing(cfg, parts), with_checkpointing(cfg, ())] if open_ else [cfg]
    plans = [round(plan_recipe(case).peak / GIB, 1) for case in cases]
    _, unknown = reward_models(cfg)
    return {"gib": plans, "unknown": [name.split()[-1] for name in unknown]}


def table(figures: dict[str, dict[str, object]]) -> str:
    """Markdown: a row a model and stage."""
    rows = ["| model | stage | recipe | planned peak, GiB | time |", "|---|---|---|---|---|"]
    for key, model in MODELS.items():
        for stage, number in STAGES.items():
            for name in sorted(n for n in figures if n.startswith(f"{key}_{stage}")):
                gib = figures[name]["gib"]
                assert isinstance(gib, list)
                peak = " to ".join(f"{value:.1f}" for value in gib)
                time = MEASURED.get(name, "not measured")
                rows.append(f"| {model} | {number} | `{name}` | {peak} | {time} |")
    return "\n".join(rows) + "\n"


def cards(figures: dict[str, dict[str, object]]) -> str:
    """Markdown: a row a model, the smallest card that a recipe of each stage fits, and which."""
    rows = ["| model | stage 1 | stage 2 |", "|---|---|---|"]
    for key, model in MODELS.items():
        cells = [_smallest(figures, f"{key}_{stage}") for stage in STAGES]
        rows.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def _smallest(figures: dict[str, dict[str, object]], start: str) -> str:
    found = []
    for name in (n for n in figures if n.startswith(start)):
        gib = figures[name]["gib"]
        assert isinstance(gib, list)
        found.append((min(card for card in CARDS if gib[0] + ASIDE <= card), len(name), name))
    card, _, name = min(found)
    return f"{card} GB: `{name}`"


def write_tables() -> None:
    figures = json.loads(DATA.read_text(encoding="utf-8"))
    for page, made in ((README, cards(figures)), (PAGE, table(figures))):
        text = page.read_text(encoding="utf-8")
        whole = BEGIN + "\n" + made + "\n" + END
        new = re.sub(f"{BEGIN}.*?{END}", lambda _, whole=whole: whole, text, flags=re.S)
        page.write_text(new, encoding="utf-8")


def main() -> None:
    if "--table" not in sys.argv:
        figures = {}
        for path in sorted(RECIPES.glob("*.yaml")):
            if path.stem.startswith(tuple(MODELS)):
                figures[path.stem] = peaks(path.stem)
                print(path.stem, figures[path.stem], flush=True)
        DATA.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    write_tables()


if __name__ == "__main__":
    main()
