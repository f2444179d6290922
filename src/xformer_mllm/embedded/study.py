"""`xformer study`: variants x seeds x settings from one JSON file, on all cores, as one table with intervals.

    {
      "title": "Scenes: Q-Former and X-Former, five seeds",
      "variants": ["qformer", "xformer"],                 the first one is the baseline
      "seeds": [0, 1, 2, 3, 4],
      "zero_shot": false,                                 also train stage 2 on captions only, and ask zero-shot
      "split": "test",                                    of the scenes that are asked about, or "validation"
      "demo": {"stage1_steps": 720},                      further fields of `xformer demo`, by default its own values
      "settings": {"": {}, "32 queries": {"stage1": ["--model-settings", "num_query_tokens=32"], "stage2": []}}
    }

A variant may also be an object, with a name, arguments and a number of steps of its own:

    {"name": "qformer, longer", "variant": "qformer", "stage1": [], "stage2": [], "demo": {"stage1_steps": 1440}}

Every run is a lane of the demo (stage 1, stage 2, questions): budget and data order are the same, and a finished job is
not run again.

    runs/studies/NAME/[SETTING/]SEED/VARIANT/{stage1,stage2,questions}/    output of the commands; VARIANT is its name
    runs/studies/NAME/{NAME.json,NAME.md,NAME-*.svg}                        the results, NAME being the file's
"""

import json
import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np

from xformer_mllm import report
from xformer_mllm.embedded.commands import DemoConfig, StudyConfig
from xformer_mllm.embedded.demo import jobs_of, text_settings
from xformer_mllm.embedded.lanes import Lane, processor, run_lanes
from xformer_mllm.evaluate.exact_match import Prediction
from xformer_mllm.files import read_json, read_json_lines, write_whole
from xformer_mllm.processes import cores

RESAMPLES = 2_000
MEAN = "mean of the types"
"""Does not depend on how often each type is asked."""
TARGETS = {
    "questions": "Stage 2 with questions",
    "captions": "Stage 2 on captions only: zero-shot questions, as in the paper",
}


BUDGET = ("stage1_steps", "stage2_steps", "train_size")
"""Fields of the demo that a variant may set for itself."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of the tables: a variant under a name, with further arguments of `xformer train` and a budget."""

    name: str
    variant: str
    stage1: Sequence[str] = ()
    stage2: Sequence[str] = ()
    demo: dict[str, int] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """The name of its folder."""
        return self.name.replace(" ", "-")


@dataclass(frozen=True, kw_only=True)
class Study:
    """What the file says."""

    title: str
    variants: Sequence[str | dict[str, Any]] = ("qformer", "xformer")
    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    zero_shot: bool = False
    split: str = "test"
    demo: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, dict[str, list[str]]] = field(default_factory=lambda: {"": {}})

    @property
    def columns(self) -> list[Column]:
        """The variants, each with its name."""
        return [Column(name=v, variant=v) if isinstance(v, str) else Column(**v) for v in self.variants]


def read_study(path: Path) -> Study:
    """Read a study. Raises FileNotFoundError, or ValueError naming the file and the field."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such study; docs/training.md describes the file")
    content = read_json(path)
    if not isinstance(content, dict) or "title" not in content:
        raise ValueError(f'{path}: not a study; expected {{"title": ..., "variants": [...], "seeds": [...]}}')
    names = [part.name for part in fields(Study)]
    if unknown := sorted(set(content) - set(names)):
        raise ValueError(f"{path}: unknown field {unknown[0]!r}; fields: {', '.join(names)}")
    for name, setting in content.get("settings", {}).items():
        if not isinstance(setting, dict) or set(setting) - {"stage1", "stage2"}:
            raise ValueError(
                f'{path}: setting {name!r} must be {{"stage1": [...], "stage2": [...]}}, lists of arguments'
            )
    for variant in content.get("variants", ()):
        if not isinstance(variant, str):
            _check_column(path, variant)
    study = Study(**content)
    if study.split not in ("test", "validation"):
        raise ValueError(f"{path}: split is {study.split!r}, but must be test or validation")
    own = ("variants", "seed", "zero_shot", "output_dir")
    known = [part.name for part in fields(DemoConfig) if part.name not in own]
    if unknown := sorted(set(study.demo) - set(known)):
        raise ValueError(f"{path}: unknown field {unknown[0]!r} in demo; fields: {', '.join(known)}")
    names_of_columns = "" if isinstance(study.variants, str) else [column.folder for column in study.columns]
    for name, values in (("variants", names_of_columns), ("seeds", study.seeds), ("settings", study.settings)):
        if isinstance(values, str) or not values or len(set(values)) < len(values):
            raise ValueError(f"{path}: {name} must be one or more different values")
    for column in study.columns:
        for name, setting in study.settings.items():
            for stage in ("stage1", "stage2"):
                if twice := sorted(_flags(getattr(column, stage)) & _flags(setting.get(stage, ()))):
                    raise ValueError(
                        f"{path}: variant {column.name!r} and setting {name!r} both set {twice[0]} of {stage}"
                    )
    return study


def _check_column(path: Path, variant: Any) -> None:
    """Raise ValueError unless a variant that is not a name is an object of the right form."""
    form = '{"name": ..., "variant": ..., "stage1": [...], "stage2": [...], "demo": {...}}'
    allowed = {part.name for part in fields(Column)}
    if not isinstance(variant, dict) or not {"name", "variant"} <= set(variant) <= allowed:
        raise ValueError(f"{path}: a variant is a name or {form}, not {variant!r}")
    name, words = variant["name"], [*variant.get("stage1", ()), *variant.get("stage2", ())]
    if not isinstance(name, str) or not name or "/" in name or name.startswith("."):
        raise ValueError(f"{path}: the name {name!r} of a variant cannot be the name of a folder")
    if any(isinstance(variant.get(stage), str) for stage in ("stage1", "stage2")) or not all(
        isinstance(word, str) for word in words
    ):
        raise ValueError(f"{path}: stage1 and stage2 of variant {name!r} must be lists of arguments")
    if unknown := sorted(set(variant.get("demo", {})) - set(BUDGET)):
        raise ValueError(f"{path}: unknown field {unknown[0]!r} in demo of {name!r}; fields: {', '.join(BUDGET)}")


def _flags(arguments: Sequence[str]) -> set[str]:
    return {argument.partition("=")[0] for argument in arguments if argument.startswith("--")}


def folder_of(root: Path, setting: str, seed: int) -> Path:
    """Folder of a demo within the study."""
    return root / setting.replace(" ", "-") / str(seed)


def lanes_of(study: Study, root: Path) -> list[Lane]:
    """A lane for each run: all variants of a seed before the next seed."""
    lanes = []
    for setting, arguments in study.settings.items():
        for seed in study.seeds:
            for column in study.columns:
                config = DemoConfig(
                    seed=seed,
                    variants=(column.variant,),
                    zero_shot=study.zero_shot,
                    output_dir=folder_of(root, setting, seed),
                    **{**study.demo, **column.demo},
                )
                stage1 = [*arguments.get("stage1", ()), *column.stage1]
                stage2 = [*arguments.get("stage2", ()), *column.stage2]
                jobs = jobs_of(config, column.variant, study.split, stage1, stage2, column.folder)
                lanes.append(Lane(f"{setting} {column.name} {seed}".strip(), jobs))
    return lanes


def run_study(config: StudyConfig) -> Path:
    """Run what is not finished, write the results and return the path of the page.

    Raises ValueError for an invalid file, or if a job fails.
    """
    study = read_study(config.study)
    name = config.study.stem
    root = config.output_dir or Path("runs/studies") / name
    root.mkdir(parents=True, exist_ok=True)
    lanes = lanes_of(study, root)
    run_lanes(lanes)
    results = gather(study, root)
    results |= {
        "title": study.title,
        "command": f"xformer study {config.study}",
        "machine": f"{processor()}, {cores()} cores, one thread for each run",
        "versions": {package: version(package) for package in ("xformer-mllm", "torch", "transformers")},
        "minutes": {lane.variant: round(sum(lane.seconds.values()) / 60, 1) for lane in lanes},
        "study": {part.name: getattr(study, part.name) for part in fields(Study)},
    }
    write_whole(root / f"{name}.json", json.dumps(results, indent=2) + "\n")
    for target, settings in results["targets"].items():
        for setting, found in settings.items():
            write_whole(root / figure_name(name, target, setting), figure(found, TARGETS[target], setting))
    page = root / f"{name}.md"
    write_whole(page, markdown(results, name))
    print(page)
    return page


def gather(study: Study, root: Path) -> dict[str, Any]:
    """{"targets": {target of stage 2: {setting: {"variants": {variant: scores}, "differences": {variant: scores}}}}}.

    Variants go by their names. Scores are those of `over_seeds`; differences are to the first variant.
    """
    columns = study.columns
    targets: dict[str, dict[str, Any]] = {}
    for target, ending in text_settings(DemoConfig(zero_shot=study.zero_shot)):
        for setting in study.settings:
            rows = {
                column.name: [
                    read_json_lines(
                        folder_of(root, setting, seed) / column.folder / f"questions{ending}/predictions.jsonl"
                    )
                    for seed in study.seeds
                ]
                for column in columns
            }
            baseline = rows[columns[0].name]
            folder = folder_of(root, setting, study.seeds[0]) / columns[0].folder / f"questions{ending}"
            scores = read_json(folder / "metrics.json")["scores"]
            targets.setdefault(target, {})[setting] = {
                "majority": {group: score["majority"] for group, score in scores.items()}
                | {MEAN: float(np.mean([score["majority"] for group, score in scores.items() if _is_type(group)]))},
                "variants": {variant: over_seeds(found) for variant, found in rows.items()},
                "differences": {
                    variant: over_seeds(found, baseline) for variant, found in rows.items() if found is not baseline
                },
            }
    return {"targets": targets}


def _is_type(group: str) -> bool:
    return group != "all" and ":" not in group


def over_seeds(
    runs: Sequence[Sequence[Prediction]], baseline: Sequence[Sequence[Prediction]] | None = None
) -> dict[str, dict[str, Any]]:
    """Accuracy over the runs of several seeds, or its difference to the baseline's runs of the same seeds.

    {"all", a type of question or MEAN: {"value", "ci95": [low, high], "by_seed": [...], "n"}}. ci95 is a percentile
    bootstrap of both the seeds and the images, 95 %. With one seed it is one of the images alone.

    Raises ValueError if the runs were not asked the same questions.
    """
    first = runs[0]
    for run in [*runs, *(baseline or [])]:
        if [row["id"] for row in run] != [row["id"] for row in first]:
            raise ValueError("the runs were not asked the same questions in the same order; run the study again")
    groups = ["all", *sorted({row["question_type"] for row in first})]
    images = {image: place for place, image in enumerate(dict.fromkeys(row["image_id"] for row in first))}
    asked = np.zeros((len(images), len(groups)))
    gains = np.zeros((len(runs), *asked.shape))
    for number, row in enumerate(first):
        for group in ("all", row["question_type"]):
            place = images[row["image_id"]], groups.index(group)
            asked[place] += 1
            for seed, run in enumerate(runs):
                against = 0.0 if baseline is None else baseline[seed][number]["credit"]
                gains[(seed, *place)] += run[number]["credit"] - against
    generator = np.random.default_rng(0)
    image_weights = generator.multinomial(len(images), np.full(len(images), 1 / len(images)), size=RESAMPLES)
    seed_weights = generator.multinomial(len(runs), np.full(len(runs), 1 / len(runs)), size=RESAMPLES) / len(runs)
    resampled = np.einsum("ri,sig->rsg", image_weights, gains, optimize=True)
    total = np.maximum(image_weights @ asked, 1)
    values = np.einsum("rs,rsg->rg", seed_weights, resampled) / total
    low, high = np.quantile(_with_mean(values), (0.025, 0.975), axis=0)
    by_seed = _with_mean(gains.sum(1) / asked.sum(0))
    counts = [*asked.sum(0), len(first)]
    return {
        group: {
            "value": float(by_seed[:, column].mean()),
            "ci95": [float(low[column]), float(high[column])],
            "by_seed": [round(float(value), 4) for value in by_seed[:, column]],
            "n": int(counts[column]),
        }
        for column, group in enumerate([*groups, MEAN])
    }


def _with_mean(values: np.ndarray) -> np.ndarray:
    """[..., all and types] -> [..., all, types and their mean]."""
    return np.concatenate([values, values[..., 1:].mean(-1, keepdims=True)], axis=-1)


def figure_name(study: str, target: str, setting: str) -> str:
    """The file with the figure of one setting, beside the page."""
    return "-".join(filter(None, [study, target, setting.replace(" ", "-")])) + ".svg"


def markdown(results: dict[str, Any], name: str) -> str:
    """The results as a page: a section for each target of stage 2, a figure and tables for each setting."""
    study = results["study"]
    demo, columns = DemoConfig(**study["demo"]), Study(title="", variants=study["variants"]).columns
    lines = [f"# {results['title']}", ""]
    for target, settings in results["targets"].items():
        lines += [f"## {TARGETS[target]}", ""]
        for setting, found in settings.items():
            lines += [f"### {setting}", ""] if setting else []
            lines += [f"![Accuracy by type of question]({figure_name(name, target, setting)})", ""]
            lines += [*_accuracies(found), ""]
            lines += [*_differences(found, columns[0].name), ""] if found["differences"] else []
    longest = max(results["minutes"].values())
    packages = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    made_by = (
        f"Made by `{results['command']}`: {demo.stage1_steps} steps of stage 1 and {demo.stage2_steps or 800} of stage 2 "
        f"for every run{_exceptions(columns)}, the same images in the same order for all variants of a seed, "
        f"questions about {demo.test_size:,} {study['split']} scenes. Seeds {', '.join(map(str, study['seeds']))} decide "
        "initial weights, data order, masks and negatives; the encoders and the language model are the same for all. "
        "Brackets: 95 % bootstrap interval over seeds and images. `majority` is the most frequent training answer to the "
        f"type of question. The longest run took {longest:.0f} minutes beside others: {results['machine']}, {packages}."
    )
    lines += [textwrap.fill(made_by, 118, break_long_words=False, break_on_hyphens=False), ""]
    return "\n".join(lines)


def _exceptions(columns: Sequence[Column]) -> str:
    """What the columns with settings of their own differ in."""
    parts = []
    for column in columns:
        own = [f"{name} {value}" for name, value in column.demo.items()]
        own += [
            f"`{shlex.join(words)}` in {stage}" for stage in ("stage1", "stage2") if (words := getattr(column, stage))
        ]
        if own:
            parts.append(f" ({column.name}: {column.variant} with {', '.join(own)})")
    return "".join(parts)


def _accuracies(found: dict[str, Any]) -> list[str]:
    variants = found["variants"]
    rows = [f"| question type | n | majority | {' | '.join(variants)} |", "|---|---|---|" + "---|" * len(variants)]
    for group, score in next(iter(variants.values())).items():
        cells = [_cell(scores[group], ".3f") for scores in variants.values()]
        rows.append(f"| {report.plain(group)} | {score['n']} | {found['majority'][group]:.3f} | {' | '.join(cells)} |")
    return rows


def _differences(found: dict[str, Any], baseline: str) -> list[str]:
    """Points over the first variant, and those of each seed."""
    differences = found["differences"]
    rows = [
        f"| points over {baseline} | {' | '.join(differences)} |",
        "|---|" + "---|" * len(differences),
    ]
    for group in next(iter(differences.values())):
        cells = []
        for scores in differences.values():
            score = {name: 100 * np.array(value) for name, value in scores[group].items() if name != "n"}
            by_seed = ", ".join(f"{value:+.1f}" for value in score["by_seed"])
            cells.append(_cell(score, "+.1f") + f"; by seed {by_seed}")
        rows.append(f"| {report.plain(group)} | {' | '.join(cells)} |".replace("-", "\u2212"))
    return rows


def _cell(score: dict[str, Any], form: str) -> str:
    low, high = (format(end, form) for end in score["ci95"])
    return f"{score['value']:{form}} [{low}, {high}]"


# Grey, then Okabe and Ito's colours, which people who confuse red and green can tell apart.
COLOURS = ("#999999", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#000000")


def figure(found: dict[str, Any], title: str, setting: str) -> str:
    """SVG: a row for each type of question, a dot with its interval for each variant, the majority dashed."""
    variants = found["variants"]
    groups = list(next(iter(variants.values())))
    apart = max(85, 20 + 6 * max(map(len, variants)))  # between the names in the legend
    step, left, width, top = 9 * len(variants) + 10, 130, max(420, apart * len(variants) + 160), 46
    height = top + step * len(groups) + 30

    def x(value: float) -> float:
        return left + width * value

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 20} {height}" font-family="sans-serif" '
        f'font-size="11"><rect width="100%" height="100%" fill="#fff"/>'
        f'<text x="8" y="16" font-size="13">{escape(", ".join(filter(None, [title, setting])))}</text>'
    ]
    for place, name in enumerate(variants):
        at = left + place * apart
        parts.append(
            f'<circle cx="{at}" cy="30" r="4" fill="{COLOURS[place % 8]}"/><text x="{at + 8}" y="34">'
            f"{escape(report.display_name(name))}</text>"
        )
    parts.append(f'<text x="{left + width}" y="34" text-anchor="end">dashed: most frequent answer</text>')
    for tick in range(0, 11, 2):
        parts.append(
            f'<path d="M{x(tick / 10)} {top}V{height - 24}" stroke="#ddd"/>'
            f'<text x="{x(tick / 10)}" y="{height - 8}" text-anchor="middle">{tick / 10:g}</text>'
        )
    for row, group in enumerate(groups):
        start = top + row * step + 5
        parts.append(f'<text x="{left - 8}" y="{start + step / 2}" text-anchor="end">{report.plain(group)}</text>')
        bar = x(found["majority"][group])
        parts.append(f'<path d="M{bar:.1f} {start}V{start + step - 8}" stroke="#000" stroke-dasharray="2 2"/>')
        for place, scores in enumerate(variants.values()):
            y, (low, high) = start + 9 * place + 6, scores[group]["ci95"]
            colour = COLOURS[place % 8]
            parts.append(
                f'<path d="M{x(low):.1f} {y}H{x(high):.1f}" stroke="{colour}" stroke-width="2"/>'
                f'<circle cx="{x(scores[group]["value"]):.1f}" cy="{y}" r="3.5" fill="{colour}"/>'
            )
    return "\n".join([*parts, "</svg>", ""])
