"""`xformer evaluate` runs a model on a benchmark; `xformer score` scores answers in the official results format."""

import dataclasses
import json
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import PartialState

from xformer_mllm import defaults, report
from xformer_mllm.checkpoints import evaluation_folder, load_model, model_folder
from xformer_mllm.commands import DRAWN, BenchmarkConfig, EvaluateConfig, ScoreConfig, flag_of
from xformer_mllm.evaluate.benchmark import EXPORT_FILE, Benchmark, Scores
from xformer_mllm.evaluate.coco_captions import CocoCaptions
from xformer_mllm.evaluate.gqa import Gqa
from xformer_mllm.evaluate.gvt import GvtCounting, GvtIdentification
from xformer_mllm.evaluate.nocaps import NoCaps
from xformer_mllm.evaluate.ok_vqa import OkVqa
from xformer_mllm.evaluate.prediction import predict, remove_parts
from xformer_mllm.evaluate.retrieval import CocoRetrieval, FlickrRetrieval, Retrieval, retrieve
from xformer_mllm.evaluate.vqav2 import Vqav2
from xformer_mllm.files import read_json, write_whole
from xformer_mllm.inference import GenerationSettings
from xformer_mllm.model.modeling_xformer import (
    XFormerForConditionalGeneration,
    XFormerForImageTextRetrieval,
    XFormerForPreTraining,
)
from xformer_mllm.processes import is_first, join, loaders
from xformer_mllm.report.wording import aligned

BENCHMARKS: dict[str, Any] = {
    kind.name: kind
    for kind in (
        *(Vqav2, OkVqa, Gqa, GvtCounting, GvtIdentification),
        *(CocoCaptions, NoCaps, CocoRetrieval, FlickrRetrieval),
    )
}

ANSWERING_MODELS = [XFormerForConditionalGeneration]
RANKING_MODELS = [XFormerForPreTraining, XFormerForImageTextRetrieval]
TIMEOUT = timedelta(days=1)  # processes wait for the slowest rank
SHOWN_PROBLEMS = 5
EXAMPLES = 12


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Run `xformer evaluate` and return the content of metrics.json, {} on all processes but the first.

    Raises FileNotFoundError or ValueError if the model, the benchmark or a file is missing or invalid.
    """
    _check_numbers(config, "num_beams", "max_new_tokens", "k_test", "batch_size")
    benchmark = open_benchmark(config)
    join(TIMEOUT)  # each process takes its GPU before it loads a model
    ranks = isinstance(benchmark, Retrieval)
    settings = {"k_test": config.k_test} if ranks else asdict(settings_of(config, benchmark))
    folder = _output_dir(config)
    _check_same_settings(folder, config, settings)
    model, processor = load_model(config.model, RANKING_MODELS if ranks else ANSWERING_MODELS)
    start = time.perf_counter()
    metrics, shown = (_rank if ranks else _answer)(config, benchmark, model, processor, folder)
    if not is_first():
        return {}
    seconds = round(time.perf_counter() - start, 1)
    metrics |= {"settings": settings, "seconds": seconds, "exported_scenes": _is_exported(config)}
    metrics["config"] = _plain(config)
    title = f"{config.benchmark}, {_split(config)}"
    write_whole(folder / "report.html", report.benchmark_page(title, str(config.model), metrics, shown))
    write_whole(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")  # last: marks a complete evaluation
    remove_parts(folder)
    print(summary(metrics))
    print(folder / "report.html")
    return metrics


def _answer(
    config: EvaluateConfig, benchmark: Benchmark, model: Any, processor: Any, folder: Path
) -> tuple[dict[str, Any], Sequence[report.Example]]:
    """Answer questions or caption images; write predictions.jsonl and official.json."""
    settings, workers = settings_of(config, benchmark), loaders(config.workers)
    found = predict(model, processor, benchmark, settings, folder, config.batch_size, workers, _made_by(config))
    PartialState().wait_for_everyone()  # until all have read the parts
    if not is_first():
        return {}, ()
    if not found.answers:
        remove_parts(folder)  # the images may be readable in the next run
        why = next(iter(found.problems.values()), "there are none")
        raise ValueError(
            f"none of the {len(benchmark.records):,} records has an answer, e.g. {why}; "
            "--images names the folder of the images"
        )
    metrics = describe_answers(benchmark, found.answers, found.problems)
    rows = [json.dumps(row, ensure_ascii=False) + "\n" for row in benchmark.predictions(found.answers)]
    write_whole(folder / "predictions.jsonl", "".join(rows))
    write_whole(folder / "official.json", json.dumps(benchmark.official(found.answers)) + "\n")
    return metrics, examples(benchmark, found.answers)


def _rank(
    config: EvaluateConfig, benchmark: Retrieval, model: Any, processor: Any, folder: Path
) -> tuple[dict[str, Any], Sequence[report.Example]]:
    """Rank images and captions; `retrieve` writes ranking.json."""
    workers = loaders(config.workers)
    scores, ranking = retrieve(
        model, processor, benchmark, folder, config.batch_size, config.k_test, workers, _made_by(config)
    )
    problems = ranking["unreadable_images"]
    return describe(benchmark, scores, len(benchmark.records) - len(problems), problems), ()


def _output_dir(config: EvaluateConfig) -> Path:
    if config.output_dir is not None:
        return config.output_dir
    name = f"{config.benchmark}-{_split(config)}" + (f"-{config.settings}" if config.settings else "")
    return evaluation_folder(model_folder(config.model)) / name


def _check_same_settings(folder: Path, config: EvaluateConfig, settings: Mapping[str, Any]) -> None:
    """Raise ValueError if the folder holds results with other settings, data or (with --output-dir) another model."""
    file = folder / "metrics.json"
    if not file.is_file():
        return
    found = read_json(file)
    old, new = {**found.get("config", {}), **found.get("settings", {})}, {**_plain(config), **settings}
    names = [*settings, *(field.name for field in dataclasses.fields(BenchmarkConfig))]
    if config.output_dir is not None:  # the default folder belongs to the model, even after it was moved
        names.append("model")
    paths = ("data", "images", "model")
    differing = [
        f"{flag_of(name)} {old[name]!r}, not {new[name]!r}"
        for name in names
        if name in old and old[name] != new[name] and not (name in paths and _same_place(old[name], new[name]))
    ]
    if differing:
        raise ValueError(f"{folder}: holds results with {'; '.join(differing)}; name another --output-dir")


def _same_place(one: str | None, other: str | None) -> bool:
    return one is not None and other is not None and Path(one).resolve() == Path(other).resolve()


def score(config: ScoreConfig) -> dict[str, Any]:
    """Run `xformer score` and return the metrics. Raises ValueError for unknown, missing or repeated ids."""
    benchmark = open_benchmark(config)
    if isinstance(benchmark, Retrieval):
        raise ValueError(f"{benchmark.name} has no official results file; `xformer evaluate` ranks and scores")
    official = config.answers.with_name("official.json")  # where `evaluate` writes it
    hint = f"; the file to score is {official}" if official.is_file() and official != config.answers else ""
    try:
        content = read_json(config.answers)
    except ValueError as error:
        raise ValueError(f"{error}{hint}") from None
    try:
        pairs = benchmark.read_official(content)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{config.answers}: not in {benchmark.name}'s results format: {error}{hint}") from None
    found, expected = [name for name, _ in pairs], [record.id for record in benchmark.records]
    check_ids(config.answers, found, expected, config.partial)
    metrics = describe_answers(benchmark, dict(pairs), {})
    metrics |= {"exported_scenes": _is_exported(config), "config": _plain(config)}
    if config.output:
        write_whole(config.output, json.dumps(metrics, indent=2) + "\n")
    print(summary(metrics))
    return metrics


def benchmark_class(name: str) -> Any:
    """The class of a benchmark. Raises ValueError for an unknown name."""
    known = defaults.benchmarks() | BENCHMARKS
    if name not in known:
        raise ValueError(f"unknown benchmark {name!r}; choose one of {', '.join(known)}")
    return known[name]


def open_benchmark(config: BenchmarkConfig) -> Any:
    """Read the files of a `Benchmark` or a `Retrieval`. Raises FileNotFoundError or ValueError."""
    kind = benchmark_class(config.benchmark)
    _check_numbers(config, "size", "questions_per_image")
    split = _split(config)
    if split not in kind.splits:
        raise ValueError(f"{kind.name} has the splits {', '.join(kind.splits)}, not {split!r}")
    if config.benchmark in DRAWN:
        return kind(split, config.size, config.questions_per_image, config.seed)
    if config.benchmark == "easy-vqa":
        return kind(split)
    if config.data is None:
        raise ValueError(f"{kind.name} needs --data DIR, a folder with {kind.files}")
    try:
        benchmark = kind(config.data, split, config.images)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; {kind.name} reads {kind.files}") from None
    if _is_exported(config):
        name = kind.name
        benchmark.notes = [f"the embedded scenes in the format of {name}, not {name} itself", *benchmark.notes]
    return benchmark


def _is_exported(config: BenchmarkConfig) -> bool:
    """Whether the data are scenes in the benchmark's format, written by `xformer data export`."""
    return config.data is not None and (config.data / EXPORT_FILE).is_file()


def _check_numbers(config: BenchmarkConfig, *names: str) -> None:
    """Raise ValueError for a number below 1."""
    for name in names:
        number = getattr(config, name)
        if number is not None and number < 1:
            raise ValueError(f"{flag_of(name)} must be at least 1, not {number}")


def _split(config: BenchmarkConfig) -> str:
    return config.split or benchmark_class(config.benchmark).splits[0]


def settings_of(config: EvaluateConfig, benchmark: Benchmark) -> GenerationSettings:
    """The preset with the overriding values. Raises ValueError for an unknown preset, or a prompt without {question}."""
    name = config.settings or next(iter(benchmark.settings))
    if name not in benchmark.settings:
        raise ValueError(f"{benchmark.name} has the settings {', '.join(benchmark.settings)}, not {name!r}")
    fields = [field.name for field in dataclasses.fields(GenerationSettings)]
    given = {field: value for field in fields if (value := getattr(config, field, None)) is not None}
    asks = "{question}" in benchmark.settings[name].prompt
    if asks and "{question}" not in given.get("prompt", "{question}"):
        raise ValueError(f"--prompt {given['prompt']!r} has no {{question}}")
    return dataclasses.replace(benchmark.settings[name], **given)


def check_ids(file: Path, found: Sequence[str], expected: Sequence[str], partial: bool) -> None:
    """Raise ValueError if there are no ids, or some are repeated, unknown or, unless `partial`, missing."""
    if not found:
        raise ValueError(f"{file}: holds no answers")
    kinds = {
        "repeated": [name for name, times in Counter(found).items() if times > 1],
        "unknown": sorted(set(found) - set(expected)),
        "missing": [] if partial else sorted(set(expected) - set(found)),
    }
    wrong = [f"{len(names)} {kind} ({', '.join(names[:3])})" for kind, names in kinds.items() if names]
    if wrong:
        hint = "; --partial scores the others" if len(wrong) == 1 and kinds["missing"] else ""
        raise ValueError(f"{file}: the ids do not match the benchmark's: {'; '.join(wrong)}{hint}")


# ------------------------------------------------------------------------------------------------------------- results


def describe(
    benchmark: Benchmark | Retrieval, scores: Scores, answered: int, problems: Mapping[str, str], empty: int = 0
) -> dict[str, Any]:
    """Scores with the facts needed to read them."""
    return {
        "benchmark": benchmark.name,
        "scores": scores,
        "records": len(benchmark.records),
        "answered": answered,
        "empty_answers": empty,
        "unreadable_images": dict(problems),
        "normalisation": benchmark.normalisation,
        "not_computed": dict(benchmark.not_computed),
        "notes": list(benchmark.notes),
    }


def describe_answers(benchmark: Benchmark, answers: Mapping[str, str], problems: Mapping[str, str]) -> dict[str, Any]:
    """Score answers and describe the scores."""
    empty = sum(not answer for answer in answers.values())
    return describe(benchmark, benchmark.score(answers), len(answers), problems, empty)


def examples(benchmark: Benchmark, answers: Mapping[str, str]) -> list[report.Example]:
    """A few answered records, drawn at random but the same for every model."""
    answered = benchmark.answered(answers)
    return [
        report.Example(
            image=benchmark.load(record),
            question=getattr(record, "question", ""),
            truth=benchmark.truth(record),
            prediction=answers[record.id],
            credit=benchmark.credit(record, answers[record.id]),
            kind=getattr(record, "question_type", ""),
        )
        for record in random.Random(0).sample(answered, min(EXAMPLES, len(answered)))
    ]


def summary(metrics: Mapping[str, Any]) -> str:
    """Scores, settings and notes as text."""
    lines = [f"{metrics['benchmark']}: {metrics['answered']:,} of {metrics['records']:,} records answered", ""]
    lines += [table(metrics["scores"]), ""]
    lines += [f"{name}: {value}" for name, value in metrics.get("settings", {}).items()]
    lines += [f"normalisation: {metrics['normalisation']}", *metrics["notes"]]
    lines += [f"not computed: {name} ({why})" for name, why in metrics["not_computed"].items()]
    if metrics["empty_answers"]:
        lines.append(f"empty answers: {metrics['empty_answers']:,}")
    problems = list(metrics["unreadable_images"].values())
    if problems:
        lines.append(f"unreadable images: {len(problems):,}; their records are not scored")
        lines += [f"  {problem}" for problem in problems[:SHOWN_PROBLEMS]]
    return "\n".join(lines)


def table(scores: Scores) -> str:
    """A row per group, a column per metric; "ci95" in brackets after the accuracy."""
    metrics = list(dict.fromkeys(metric for group in scores.values() for metric in group if metric != "ci95"))
    rows = [[group, *(_cell(found, metric) for metric in metrics)] for group, found in scores.items()]
    head, *lines = aligned([["", *metrics], *rows])
    return "\n".join([head, "-" * len(head), *lines])


def _cell(found: Mapping[str, Any], metric: str) -> str:
    if metric not in found:
        return ""
    value = report.number(metric, found[metric])
    if metric == "accuracy" and "ci95" in found:
        low, high = found["ci95"]
        return f"{value} [{100 * low:.1f}, {100 * high:.1f}]"
    return value


def _made_by(config: EvaluateConfig) -> dict[str, Any]:
    """What the answers depend on besides the settings: the data and the model's files."""
    files = [path for path in sorted(model_folder(config.model).iterdir()) if path.is_file()]
    model = {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
    benchmark = {field.name: _plain(config)[field.name] for field in dataclasses.fields(BenchmarkConfig)}
    return benchmark | {"model": model}


def _plain(config: BenchmarkConfig) -> dict[str, Any]:
    values = asdict(config) | {"split": _split(config)}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
