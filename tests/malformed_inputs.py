"""Malformed recipes, settings, prompt files, command lines and evaluations."""

from __future__ import annotations

import json
import struct
import zlib

from malformed import Case, Make, captions, run, text
from malformed import both as all_of

TRAIN = "train demo_cold_start run.device=cpu "
TILT = "train demo_tilt run.device=cpu model.few_step=x "
MODEL = TRAIN + "model.path=model model.autocast=null data.prompts=prompts.txt "
PROMPTS = TRAIN + "data.prompts="
SAMPLE = "sample --device cpu --prompt 'a cat' --out images --model "
EVALUATE = "evaluate --device cpu --prompts prompts.txt --model model "
COMPARE = "compare evaluation.json"

SCORE = {"mean": 0.5, "ci95": [0.4, 0.6]}
EVALUATION = {
    "prompts": 2,
    "systems": {"teacher": {"nfe": 8, "scores": {"shapes": SCORE}}},
    "comparisons": [],
}
IMAGES = "run/evaluation.images"
_SIZE = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
BOMB = b"\x89PNG\r\n\x1a\n\0\0\0\x0d" + _SIZE + struct.pack(">I", zlib.crc32(_SIZE))
"""A PNG file that ends after its header."""


def recipe(what: str, content: str | bytes) -> Case:
    return Case(what, "train mine.yaml", text("mine.yaml", content))


def prompts(what: str, name: str, content: str | bytes) -> Case:
    return Case(what, PROMPTS + name, text(name, content))


def evaluation(what: str, **changes: object) -> Case:
    return Case(what, COMPARE, text("evaluation.json", json.dumps(EVALUATION | changes)))


def score(what: str, value: object, name: str = "teacher") -> Case:
    """An evaluation of one system whose scores are `value`."""
    return evaluation(what, systems={name: {"nfe": 8, "scores": value}})


def report(what: str, *makes: Make) -> Case:
    """A run directory with an evaluation, a prompt, and what `makes` add."""
    return Case(
        what,
        "report run",
        all_of(
            text("run/config.yaml", "stage: tilt\n"),
            text("run/evaluation.json", json.dumps(EVALUATION)),
            text(f"{IMAGES}/prompts.txt", "a cat\n"),
            *makes,
        ),
    )


SETTINGS = [
    Case("a recipe's name with a typing error", "train demo_cold_strat"),
    Case("a recipe file that is not there", "train mine.yaml"),
    recipe("a recipe that is not UTF-8", b"stage: \xff"),
    recipe("a recipe that is a list", "- a\n- b\n"),
    recipe("YAML that is none", "stage: [tilt\n"),
    recipe("a key twice", "stage: tilt\nstage: tilt\n"),
    recipe("a YAML tag that would run a command", "stage: !!python/object/apply:os.system [ls]\n"),
    recipe("YAML aliases", "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"),
    recipe("YAML nested 5,000 deep", "a: " + "[" * 5000),
    recipe("a recipe without a model", "stage: tilt\nrun: {out: x}\n"),
    recipe("a recipe without prompts", "stage: tilt\nmodel: {path: mixture}\n"),
    Case("a YAML tag in a setting", TRAIN + "'train.steps=!!python/name:os.system'"),
    Case("a setting without =", TRAIN + "train.steps"),
    Case("an unknown key", TRAIN + "trian.steps=3"),
    Case("an unknown key in a section", TRAIN + "train.step=3"),
    Case("a word for a number", TRAIN + "train.steps=ten"),
    Case("no steps", TRAIN + "train.steps=0"),
    Case(
        "a kept graph of samples that are drawn anew",
        TRAIN + "cold_start.keep_graph=true cold_start.fresh_boundary=true",
    ),
    Case(
        "a rollout of several boundaries in a phase of one",
        TRAIN + "cold_start.boundary_order=phased cold_start.reuse=2",
    ),
    Case("a fresh adapter on copies", TILT + "adapters.kind=copies tilt.fake_score_start=fresh"),
    Case("a start of LoRAs for copies", TRAIN + "adapters.kind=copies adapters.init_std=0.1"),
    Case("an average by iterations in stage 2", TILT + "train.ema_every=iteration"),
    Case("a rate that is not finite", TRAIN + "train.generator_lr=.nan"),
    Case("a part without gradient", TRAIN + "'model.gradient_checkpointing=[teacher]'"),
    Case("a number in quotes", TRAIN + "'train.steps=\"3\"'"),
    Case("a setting below a number", TRAIN + "train.steps.more=3"),
    Case("an unknown stage", TRAIN + "stage=warm_start"),
    Case("the other stage's section", TRAIN + "tilt.subset=2"),
    Case("rewards in stage 1", TRAIN + "rewards.shapes=1.0"),
    Case("stage 2 without stage 1", TILT + "model.few_step=null"),
    Case("stage 2 on nothing", TILT),
    Case("stage 2 without rewards", TILT + "rewards={}"),
    Case("a reward of weight 0", TILT + "rewards.shapes=0"),
    Case("a reward without a weight", TILT + "'rewards={shapes: {}}'"),
    Case(
        "a password in a reward's address",
        TILT + "'rewards={\"remote:http://me:secret@host/x\": 1}'",
    ),
    Case(
        "a token among a reward's options",
        TILT + "'rewards={\"my_rewards:mine\": {weight: 1, options: {token: secret}}}'",
    ),
    Case(
        "a reward server to be waited for without end",
        TILT + "'rewards={\"remote:http://host/x\": {weight: 1, options: {timeout: .inf}}}'",
    ),
    Case("a remote reward without an address", TILT + "'rewards={\"remote:mean\": 1}'"),
    Case(
        "a pool whose server is no address",
        TILT + "'rewards={\"remote:mean\": {weight: 1, options: {servers: [host]}}}'",
    ),
    Case(
        "a pool of one server twice",
        TILT + "'rewards={\"remote:x\": {weight: 1, options: {servers: [http://a, http://a/]}}}'",
    ),
    Case("a judge without a rubric", TILT + "'rewards={\"judge:m\": 1}'"),
    Case(
        "a judge whose scores have no range",
        TILT + "'rewards={\"judge:m\": {weight: 1, options: {rubric: r.txt, low: 10}}}'",
    ),
    Case(
        "a judge at no address",
        TILT + "'rewards={\"judge:m\": {weight: 1, options: {rubric: r.txt, endpoint: here}}}'",
    ),
    Case(
        "a judge at an endpoint with a local one's option",
        TILT + "'rewards={\"judge:m\": {weight: 1, options: {rubric: r.txt, dtype: fp32}}}'",
    ),
    Case(
        "a local judge with an endpoint's option",
        TILT + "'rewards={\"judge:m\": {weight: 1, path: m, options: {rubric: r, retries: 1}}}'",
    ),
    Case(
        "a judge of ranks that is watched",
        TILT + "'watch.rewards={\"judge:m\": {weight: 1, options: {rubric: r, form: group}}}'",
    ),
    Case("a watch of few images", TILT + "watch.prompts=4"),
    Case("a watch of one prompt's diversity", TILT + "watch.diversity_prompts=1"),
    Case("a watch of one image of the teacher", TILT + "watch.teacher_images=1"),
    Case("a dial beyond its end", "dial run --strengths 0,2"),
    Case("a dial whose seeds are words", "dial run --seeds one"),
    Case("the loop of a demo that is begun anew", "demo --loop --fresh"),
    Case("ranks given up at once", TRAIN + "run.rank_timeout=1"),
    Case("micro-batches across groups", TILT + "train.micro_batch_size=7"),
    Case("more sampler steps than there may be", TRAIN + "sampler.steps=1000000000"),
    Case("numbers of sampler steps that fall", TRAIN + "'sampler.steps=[4, 2]'"),
    Case("a reward through more steps than the fewest", TILT + "'sampler.steps=[1, 4]'"),
    Case("a seed beyond 63 bits", TRAIN + "run.seed=18446744073709551616"),
    Case("a number of 5,000 digits", TRAIN + "train.steps=" + 5_000 * "9"),
    Case("groups that do not divide", TILT + "tilt.group_size=7"),
    Case("more trained steps than there are", TILT + "tilt.subset=4"),
    Case("a policy without noise", TILT + "sampler.eta=0"),
    Case("matching with a fake score that stands still", TILT + "tilt.fake_score_updates=0"),
    Case("a term that there is not", TILT + "'tilt.terms={stay: {}}'"),
    Case("a term that is a function", TILT + "'tilt.terms={json:dumps: {}}'"),
    Case("an objective that there is not", TRAIN + "cold_start.objective=dmd"),
    Case("settings that an objective lacks", TRAIN + "'cold_start.objective_options={a: 1}'"),
    Case("an odd resolution", TRAIN + "model.resolution=30"),
    Case("a size that is given twice", TRAIN + "'data.buckets=[[32, 16], [32, 16]]'"),
    Case("no sizes", TRAIN + "data.buckets=[]"),
    Case("sizes for the mixture", "train mixture_cold_start data.buckets=[32]"),
    Case("a picture with an odd side", TRAIN + "'model.resolution=[32, 30]'"),
    Case("a picture with three sides", TRAIN + "'model.resolution=[32, 32, 3]'"),
    Case("a size that is none", SAMPLE + "packaged:pipeline --size 32"),
    Case("one size twice", SAMPLE + "packaged:pipeline --size 64x96 --size 64x96"),
    Case("a side and a size", SAMPLE + "packaged:pipeline --resolution 64 --size 64x96"),
    Case("half of a character", TRAIN + """'data.prompts="\\ud800"'"""),
    Case("the mixture with a path", TRAIN + "model.family=mixture"),
    Case("a device that does not exist", "train demo_cold_start run.device=gpu"),
    Case("a device that is not here", "train demo_cold_start run.device=xpu:7"),
    Case("a run that is there already", TRAIN + "run.out=run", run()),
    Case("nothing to go on with", TRAIN + "run.out=typo run.resume=true"),
    Case(
        "a checkpoint that is not there",
        TRAIN + "run.out=run run.resume=true run.resume_from=step-000009",
        run(),
    ),
    Case("perhaps", TRAIN + "run.resume=maybe"),
    Case("a cache where a file stands", MODEL + "data.cache=prompts.txt", model="sd35m"),
    Case("embeddings of the mixture", "encode mixture_cold_start"),
    Case("embeddings without a cache", "encode demo_cold_start data.cache=off"),
]

FILES = [
    Case("no such file", PROMPTS + "none.txt"),
    Case("one of nearly that name", PROMPTS + "promts.txt", text("prompts.txt", "a cat\n")),
    Case("no such packaged set", PROMPTS + "shapes-trian"),
    Case("a directory", PROMPTS + "."),
    prompts("another format", "p.xlsx", "a,b\n"),
    prompts("an empty file", "p.txt", "\n \n"),
    prompts("Latin-1 text", "p.txt", b"caf\xe9\n"),
    prompts("a broken line", "p.jsonl", '"a"\n{"b\n'),
    prompts("no prompt", "p.jsonl", '{"tag": "x"}\n'),
    prompts("an empty prompt", "p.jsonl", '{"text": " "}'),
    prompts("a number", "p.json", '["a", 3]'),
    prompts("an object", "p.json", '{"prompt": "a"}'),
    prompts("half a letter", "p.json", '["\\ud800"]'),
    prompts("deep JSON", "p.json", "[" * 200_000),
    Case(
        "a folder of three splits",
        PROMPTS + "p",
        all_of(*(text(f"p/{s}-00000-of-00001.parquet", "") for s in ("train", "test", "dev"))),
    ),
    Case(
        "a held-out file beside one without a split",
        PROMPTS + "p",
        all_of(text("p/captions.csv", "prompt\na\n"), text("p/captions_test.csv", "prompt\nb\n")),
    ),
    Case("a split of a file", PROMPTS + "prompts.txt data.split=train"),
    prompts("parquet without pyarrow", "p.parquet", "PAR1"),
    prompts("CSV with another mark", "p.csv", "prompt;size\na;1\n"),
    prompts("CSV whose row is short", "p.csv", "prompt,size\na\n"),
    prompts("CSV with an open quotation mark", "p.csv", 'prompt\n"a\n'),
    prompts("TSV with a column twice", "p.tsv", "prompt\tprompt\na\tb\n"),
    Case(
        "a column that is not there",
        PROMPTS + "p.csv data.columns.prompt=Caption",
        text("p.csv", "prompt\na\n"),
    ),
    Case("columns of a plain text", PROMPTS + "prompts.txt data.columns.prompt=q"),
    Case(
        "a prompt without a category",
        PROMPTS + "p.csv data.columns.category=kind",
        text("p.csv", "prompt,kind\na,\n"),
    ),
    *(
        Case(
            f"weights: {what}",
            PROMPTS + "p.csv data.columns.weight=w",
            text("p.csv", "prompt,w\n" + "".join(f"a,{weight}\n" for weight in weights)),
        )
        for what, weights in {
            "a negative one": ("1", "-1"),
            "one that is not finite": ("1", "nan"),
            "all zero": ("0", "0"),
            "a word": ("1", "often"),
        }.items()
    ),
    Case(
        "a size that is none in CSV",
        PROMPTS + "p.csv data.buckets=size",
        text("p.csv", "prompt,size\na,large\n"),
    ),
    Case(
        "a negative prompt's column that is not there",
        PROMPTS + "p.csv data.columns.negative=avoid",
        text("p.csv", "prompt\na\n"),
    ),
    Case(
        "negative prompts of points",
        "train mixture_cold_start run.device=cpu data.prompts=p.csv data.columns.negative=avoid",
        text("p.csv", "prompt,avoid\na,b\n"),
    ),
    Case(
        "negative prompts for SANA",
        TRAIN + "model.path=model model.autocast=null data.prompts=p.csv data.eval_prompts= "
        "model.resolution=64 data.columns.negative=avoid",
        text("p.csv", "prompt,avoid\na,b\n"),
        "sana",
    ),
    Case("a set of datasets that has no name", PROMPTS + "datasets:../x"),
    Case("--column of nothing", EVALUATE + "--reward shapes --column q"),
    Case(
        "a column that sampling has no use for",
        EVALUATE + "--reward shapes --column weight=w",
    ),
    Case("a split of one prompt", SAMPLE + "model --split train"),
    Case("held-out prompts", TRAIN + "data.eval_prompts=p.json", text("p.json", "[1]")),
]

LINES = [
    Case("an unknown command", "trian demo_cold_start"),
    Case("no recipe", "train"),
    Case("an unknown option", SAMPLE + "model --stpes 4"),
    Case("a word for a number", SAMPLE + "model --seed abc"),
    Case("no steps", SAMPLE + "model --steps 0"),
    Case("a strength beyond the dial", SAMPLE + "model --tilt 2"),
    Case("a guidance that is no number", SAMPLE + "model --guidance nan"),
    Case("an unknown precision", SAMPLE + "model --dtype fp8"),
    Case("an unknown mixed precision", SAMPLE + "model --autocast fp16"),
    Case("an unknown device", "sample --device gpu --prompt x --out y --model model"),
    Case("no prompt", "sample --model model --out y"),
    Case("a prompt and a file", SAMPLE + "model --prompts prompts.txt"),
    Case("images of the mixture", SAMPLE + "mixture"),
    Case(
        "images where a file stands",
        "sample --device cpu --prompt x --out prompts.txt --teacher-steps 1 --model model",
        model="sd35m",
    ),
    Case(
        "figures where a folder stands",
        EVALUATE + "--reward clipscore --json folder",
        text("folder/x", ""),
        model="sd35m",
    ),
    Case(
        "a prompt that is not UTF-8",
        "sample --device cpu --model model --out images --prompt caf\udce9",
    ),
    Case("no reward", EVALUATE),
    Case("an unknown suite", EVALUATE + "--suite shaeps"),
    Case(
        "one prompt to evaluate",
        "evaluate --device cpu --model model --prompt 'a red circle on black' --reward shapes",
        model="sd35m",
    ),
    Case(
        "diversity without a CLIP",
        EVALUATE + "--reward shapes --diversity",
        captions(),
        model="sd35m",
    ),
    Case("a repository's name that is none", "push run me/two/three"),
    Case("a folder to push that is no run", "push run me/student", text("run/x", "")),
    Case("a cluster's limit that is none", "submit mixture_cold_start --time soon"),
    Case("a limit that saving uses up", "submit mixture_cold_start --time 2"),
    Case("a partition of two words", "submit mixture_cold_start --partition 'a b'"),
    Case("an option of sbatch that is none", "submit mixture_cold_start --sbatch qos=high"),
    Case("a requeued job's own setting", "submit mixture_cold_start run.resume=true"),
]

EVALUATIONS = [
    Case("no such file", "compare nowhere.json"),
    Case("no JSON", COMPARE, text("evaluation.json", "{")),
    Case("no systems", COMPARE, text("evaluation.json", "{}")),
    evaluation("systems that are empty", systems={}),
    score("a system with a path for a name", {"shapes": SCORE}, "../../home"),
    score("a system without scores", 3),
    score("a mean that is no number", {"shapes": SCORE | {"mean": "high"}}),
    score("an interval of one end", {"shapes": SCORE | {"ci95": [0]}}),
    evaluation("a comparison of nothing", comparisons=[{"a": "teacher"}]),
    Case("no run to report", "report nowhere"),
    report("metrics cut in the middle", text("run/metrics.jsonl", '{"step": 1}\n{"st\n{}\n')),
    report("metrics that are no objects", text("run/metrics.jsonl", "[1]\n")),
    report("metrics nested too deeply", text("run/metrics.jsonl", "[" * 100_000)),
    report("an image that is none", text(f"{IMAGES}/teacher/00000.png", "text")),
    report("an image of 10 gigapixels in 33 bytes", text(f"{IMAGES}/teacher/00000.png", BOMB)),
]

CASES = {
    "Recipes and settings": SETTINGS,
    "Prompt files": FILES,
    "Command lines": LINES,
    "Evaluations and reports": EVALUATIONS,
}
