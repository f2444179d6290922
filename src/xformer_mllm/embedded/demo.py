"""`xformer demo`: train the variants through both stages with equal budgets and compare their answers.

Each variant is a lane of jobs (stage 1, stage 2, questions); `lanes` runs them and skips those already finished.

    runs/demo/VARIANT/{stage1,stage2,questions}/    output of the commands
    runs/demo/VARIANT/{stage1,stage2,questions}.log their console output
    runs/demo/metrics.json, runs/demo/report.html   the results
"""

import contextlib
import io
import json
import os
import platform
import shlex
import shutil
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from xformer_mllm import report
from xformer_mllm.commands import BenchmarkConfig, ReconstructConfig, flag_of
from xformer_mllm.embedded.commands import DemoConfig
from xformer_mllm.embedded.lanes import Job, Lane, clock, processor, read_json, read_rows, run_lanes
from xformer_mllm.evaluate.benchmark import Benchmark
from xformer_mllm.evaluate.evaluation import open_benchmark
from xformer_mllm.evaluate.exact_match import compare
from xformer_mllm.evaluate.query_analysis import QueryAnalysis, analyse
from xformer_mllm.files import read_json_lines, write_whole
from xformer_mllm.inference import reconstruct
from xformer_mllm.processes import cores

# A finished job stays valid while the code and weights it used are unchanged.
WORLD = ("world", "scenes", "scene_questions", "photographs", "easy_vqa", "start")
TRAINING_SOURCES = (
    *("model", "data", "train", "variants.py", "checkpoints.py", "language_models.py", "defaults.py"),
    *("files.py", "processes.py", "embedded/weights"),
    *(f"embedded/{name}.py" for name in WORLD),
)
QUESTION_SOURCES = (
    *TRAINING_SOURCES,
    "evaluate",
    "inference.py",
    "commands.py",
    "embedded/commands.py",
    "embedded/benchmarks.py",
)

# Stage 2 on captions: of a batch as many texts as with four questions about each image, and all that an image shows.
ZERO_SHOT = ("--data", "scenes-detailed", "--batch-size", "96", "--learning-rate", "1e-3")

DATA_NAMES = {"scenes": "the embedded scenes", "photographs": "photographs", "easy-vqa": "easy-VQA"}

IMAGES_TO_TRY = 4
RECONSTRUCTED_IMAGES = 3
ANALYSED_IMAGES = 200
QUERY_OVERLAYS = 3

# Expected duration in steps of stage 1, for the estimate (measured with `make demo` on two cores).
STAGE2_STEP = 0.88
QUESTIONS_PER_STEP = 120
QUESTIONS_PER_SCENE, EASY_VQA_QUESTIONS = 4, 9_673


def run_demo(config: DemoConfig) -> Path:
    """Run the demo and return the path of the report.

    Raises ValueError if a job fails, after showing the end of its log. On KeyboardInterrupt the processes are stopped.
    """
    config.output_dir.mkdir(parents=True, exist_ok=True)
    started = time.time()
    lanes = [Lane(variant, jobs_of(config, variant)) for variant in config.variants]
    run_lanes(lanes)
    settings = gather(config)
    for name, setting in settings.items():
        write_whole(config.output_dir / name, json.dumps(setting.metrics, indent=2) + "\n")
        print(f"\n{setting.name}\n\n{table(setting, config.variants)}\n\n{sentence(setting, config.variants)}")
    images = write_images(config)
    page = write_page(config, list(settings.values()), lanes, images, time.time() - started)
    print(f"\n{what_next(config, page, images)}")
    return page


def jobs_of(
    config: DemoConfig,
    variant: str,
    split: str = "test",
    stage1: Sequence[str] = (),
    stage2: Sequence[str] = (),
    folder: str | None = None,
) -> list[Job]:
    """The jobs of a variant in order. Equal budgets: only the variant's name differs between the lanes.

    Args:
        split: of the scenes that are asked about.
        stage1, stage2: further arguments of `xformer train`.
        folder: of the lane, in that of the demo. Default: the variant's name.
    """
    lane = config.output_dir / (folder or variant)
    tiny = is_tiny(config.llm)
    steps = config.stage2_steps or (800 if tiny else 250)
    common = ("--data", config.data, "--train-size", str(config.train_size), "--seed", str(config.seed))
    first = ("train", "stage1", "--variant", variant, "--steps", str(config.stage1_steps), *common)
    encoders = ("--encoders", str(config.encoders)) if config.encoders is not None else ()
    jobs = [
        _training_job(
            "stage 1", lane / "stage1", (*first, *encoders, *stage1), config.stage1_steps, config.stage1_steps
        )
    ]
    for text, ending in text_settings(config):
        # A full-size language model needs seconds for a batch that the tiny one reads at once.
        smaller = () if tiny else ("--batch-size", "8")
        changed = (*(ZERO_SHOT if text == "captions" and config.data == "scenes" else ()), *smaller, *stage2)
        second = ("train", "stage2", "--from-pretraining", str(lane / "stage1"), "--llm", config.llm, "--text", text)
        trained = lane / f"stage2{ending}"
        title = f"stage 2 on {text}"
        work = STAGE2_STEP * steps if tiny else None
        jobs.append(_training_job(title, trained, (*second, "--steps", str(steps), *common, *changed), steps, work))
        jobs.append(_questions_job(config, title, trained, lane / f"questions{ending}", split))
    return jobs


def is_tiny(llm: str) -> bool:
    """Whether it is the shipped language model, or one that `xformer train lm` wrote."""
    return llm == "opt" or (Path(llm) / "recipe.json").is_file()


def text_settings(config: DemoConfig) -> list[tuple[str, str]]:
    """(training target of stage 2, suffix of its folders)."""
    return [("questions", ""), *([("captions", "-zero-shot")] if config.zero_shot else [])]


def _training_job(title: str, folder: Path, arguments: tuple[str, ...], steps: int, work: float | None) -> Job:
    return Job(title, folder, (*arguments, "--output-dir", str(folder)), TRAINING_SOURCES, steps, work)


def _questions_job(config: DemoConfig, title: str, model: Path, folder: Path, split: str) -> Job:
    asked = ("evaluate", str(model), "--benchmark", config.data, "--split", split, "--size", str(config.test_size))
    words = (*asked, "--batch-size", "256", "--output-dir", str(folder))
    count = config.test_size * QUESTIONS_PER_SCENE if config.data != "easy-vqa" else EASY_VQA_QUESTIONS
    return Job(f"questions after {title}", folder, words, QUESTION_SOURCES, work=count / QUESTIONS_PER_STEP)


def held_out_questions(config: DemoConfig) -> Benchmark:
    """The test questions."""
    return open_benchmark(BenchmarkConfig(benchmark=config.data, split="test", size=config.test_size))


def gather(config: DemoConfig) -> dict[str, report.Setting]:
    """File name of the scores -> the answers of every variant to the same questions."""
    named = {
        "questions": (
            "metrics.json",
            "with questions in stage 2",
            "Stage 2 learned from questions about training images. (In the paper it sees captions only.)",
        ),
        "captions": (
            "metrics_zero_shot.json",
            "zero-shot",
            "Stage 2 saw captions only, as in the paper: the trained jobs have never seen a question. (The shipped "
            "language model opt has, as text.)",
        ),
    }
    settings = {}
    for text, ending in text_settings(config):
        file, name, note = named[text]
        folders = {variant: config.output_dir / variant / f"questions{ending}" for variant in config.variants}
        metrics = {variant: read_json(folder / "metrics.json")["scores"] for variant, folder in folders.items()}
        rows = {variant: read_json_lines(folder / "predictions.jsonl") for variant, folder in folders.items()}
        first = rows[config.variants[0]]
        differences = {variant: compare(first, rows[variant]) for variant in config.variants[1:]}
        settings[file] = report.Setting(name, note, metrics, differences, rows)
    return settings


def table(setting: report.Setting, variants: Sequence[str]) -> str:
    """The scores as text: one row per question type, in %, with 95 % intervals."""
    compared = [variant for variant in variants if variant in setting.differences]
    head = ["", "questions", "majority", *map(report.display_name, variants)]
    head += [f"{report.display_name(variant)} - {report.display_name(variants[0])}" for variant in compared]
    rows = [head]
    for group, score in setting.metrics[variants[0]].items():
        if ":" not in group:
            scores = [setting.metrics[variant][group] for variant in variants]
            row = [report.plain(group), f"{score['n']:,}", f"{100 * score['majority']:.1f}"]
            row += [_cell(100 * s["accuracy"], s["ci95"], ".1f") for s in scores]
            entries = [setting.differences[variant][group] for variant in compared]
            row += [_cell(100 * entry["difference"], entry["ci95"], "+.1f") for entry in entries]
            rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _cell(value: float, interval: Sequence[float], form: str) -> str:
    low, high = (format(100 * end, form) for end in interval)
    return f"{value:{form}} [{low}, {high}]"


def sentence(setting: report.Setting, variants: Sequence[str]) -> str:
    """The comparison over all questions, and what the intervals do not cover."""
    overall = report.overall(setting, variants).replace("\u00a0", " ")
    return textwrap.fill(f"{overall} One training run each: another seed moves these numbers too.", 100)


def write_images(config: DemoConfig) -> dict[Path, str]:
    """Write a few held-out images to try the models on: path -> one of its questions."""
    folder = config.output_dir / "images"
    folder.mkdir(exist_ok=True)
    benchmark = held_out_questions(config)
    first: dict[str, Any] = {}
    for record in benchmark.records:
        first.setdefault(record.image_id, record)
    written = {}
    for number, record in enumerate(list(first.values())[:IMAGES_TO_TRY]):
        path = folder / f"{number}.png"
        benchmark.load(record).save(path)
        written[path] = record.question
    return written


def reconstructions(lanes: Sequence[Lane], images: Sequence[Path]) -> list[report.Strip]:
    """Reconstructions of images with half of their patches masked, for each variant trained to reconstruct."""
    strips = []
    for lane in lanes:
        stage1 = lane.jobs[0].folder
        if not any(job["name"] == "mae_decoder" for job in read_json(stage1 / "freeze.json")):
            continue
        sheet = stage1.with_name("reconstructions.png")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            found = reconstruct(ReconstructConfig(images=tuple(map(str, images)), model=stage1, output=sheet))
        alone, fused = (sum(row[key] for row in found) / len(found) for key in ("mae_error", "xformer_error"))
        label = (
            "From left to right: original, masked, reconstructed by the MAE alone, reconstructed from M' of "
            f"{report.display_name(lane.variant)}. Mean squared error on masked pixels: {alone:.4f} and {fused:.4f}."
        )
        with Image.open(sheet) as image:
            strips.append(report.Strip(report.display_name(lane.variant), [(label, image.convert("RGB"))]))
    return strips


def queries_of(config: DemoConfig, lanes: Sequence[Lane]) -> QueryAnalysis:
    """Where the queries attend after stage 1."""
    benchmark = held_out_questions(config)
    first = {record.image_id: record for record in reversed(benchmark.records)}
    chosen = list(reversed(first.values()))[:ANALYSED_IMAGES]
    images = {record.image_id: benchmark.load(record) for record in chosen}
    models = {lane.variant: lane.jobs[0].folder for lane in lanes}
    return analyse(models, images, overlays=QUERY_OVERLAYS)


def write_page(
    config: DemoConfig,
    settings: Sequence[report.Setting],
    lanes: Sequence[Lane],
    images: Mapping[Path, str],
    seconds: float,
) -> Path:
    """Write report.html and return its path."""
    names = [report.display_name(variant) for variant in config.variants]
    asked = settings[0].metrics[config.variants[0]]["all"]["n"]
    steps = next(job.steps for job in lanes[0].jobs if job.title.startswith("stage 2"))
    page = report.Report(
        title=f"{' and '.join(names)} on {DATA_NAMES[config.data]}",
        variants=config.variants,
        introduction=(
            f"Trained with equal budgets ({config.stage1_steps:,} steps of stage 1, {steps:,} of stage 2, the same "
            f"images in the same order, frozen language model {config.llm}) and asked the same {asked:,} questions "
            "about held-out images."
        ),
        settings=settings,
        runs=[run for lane in lanes for run in runs_of(lane)],
        reconstructions=reconstructions(lanes, list(images)[:RECONSTRUCTED_IMAGES]),
        queries=queries_of(config, lanes),
        configuration=asdict(config),
        provenance=provenance(config, lanes, seconds),
        images=images_of(config, lanes),
        seed=config.seed,
    )
    return report.write_report(config.output_dir / "report.html", page)


def runs_of(lane: Lane) -> list[report.Run]:
    """The training runs of a lane, read from their folders."""
    runs = []
    for job in lane.jobs:
        if job.steps is not None:
            run = read_json(job.folder / "config.json")
            runs.append(
                report.Run(
                    variant=lane.variant,
                    stage=job.title.capitalize(),
                    log=read_rows(job.folder / "log.jsonl"),
                    samples=read_rows(job.folder / "samples.jsonl"),
                    freeze=read_json(job.folder / "freeze.json"),
                    config=run,
                    batch_size=run["batch_size"],
                )
            )
    return runs


def images_of(config: DemoConfig, lanes: Sequence[Lane]) -> Any:
    """A function from the id of a test or sample image to the image, None if there is none."""
    benchmark = held_out_questions(config)
    records = {record.image_id: record for record in benchmark.records}
    sampled = {
        row["id"]: job.folder / row["image"]
        for lane in lanes
        for job in lane.jobs
        for row in read_rows(job.folder / "samples.jsonl")
    }

    def image(identity: str) -> Image.Image | None:
        if identity in records:
            return benchmark.load(records[identity])
        path = sampled.get(identity)
        return Image.open(path) if path is not None and path.is_file() else None

    return image


def provenance(config: DemoConfig, lanes: Sequence[Lane], seconds: float) -> dict[str, str]:
    """Command, seed, machine, versions and times."""
    times = {lane.variant: [f"{title} {clock(taken)}" for title, taken in lane.seconds.items()] for lane in lanes}
    packages = [f"{name} {version(name)}" for name in ("xformer-mllm", "torch", "transformers")]
    return {
        "Command": demo_command(config),
        "Seed": str(config.seed),
        "Machine": f"{processor()}, {cores()} cores, {platform.system()} {platform.machine()}",
        "Versions": ", ".join([*packages, f"Python {platform.python_version()}"]),
        "Finished": time.strftime("%Y-%m-%d %H:%M %Z"),
        "Wall time": f"{clock(seconds)} min for this call; jobs already finished were skipped",
        **{f"Time of {variant}": ", ".join(jobs) for variant, jobs in times.items()},
    }


def what_next(config: DemoConfig, page: Path, images: Mapping[Path, str]) -> str:
    """The path of the report, and commands to try on the trained models."""
    variant = "xformer" if "xformer" in config.variants else config.variants[-1]
    lane, (image, question) = config.output_dir / variant, next(iter(images.items()))
    stage1 = ["--model", str(lane / "stage1")]
    commands = {
        "ask": ["ask", str(image), question, "--model", str(lane / "stage2")],
        "caption": ["caption", str(image), *stage1],
        "reconstruct": ["reconstruct", str(image), *stage1],
    }
    # `make demo` does not activate its environment, so the command needs its path.
    place = "" if shutil.which("xformer") else os.path.relpath(Path(sys.executable).parent) + "/"
    lines = [f"  {place}{shlex.join(['xformer', *words])}" for words in commands.values()]
    return "\n".join(
        [f"The report: {page}", "", "To try:", *lines, f"  {place}tensorboard --logdir {config.output_dir}"]
    )


def demo_command(config: DemoConfig) -> str:
    """The command line of this configuration, without defaults."""
    words = ["xformer", "demo"]
    for name, value in asdict(config).items():
        if value != getattr(DemoConfig, name):
            flag = flag_of(name)
            words += [flag] if value is True else [flag, *(value if isinstance(value, tuple) else [str(value)])]
    return shlex.join(words)
