"""The page as a whole: its sections in order, written to one file."""

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from xformer_mllm.report import markup
from xformer_mllm.report.charts import training_section
from xformer_mllm.report.contents import Report, Run
from xformer_mllm.report.document import document
from xformer_mllm.report.examples import examples_section
from xformer_mllm.report.scores import scores_section
from xformer_mllm.report.wording import display_name


def write_report(path: Path, report: Report) -> Path:
    """Write the page to `path`, whole or not at all, and return `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(render(report), encoding="utf-8")
    os.replace(unfinished, path)
    return path


def render(report: Report) -> str:
    """The page as one HTML string."""
    sections = [
        *(scores_section(report, setting) for setting in report.settings),
        *(examples_section(report, setting) for setting in report.settings),
        training_section(report),
        _captions(report),
        _reconstructions(report),
        *report.sections,
        _freeze_tables(report),
        _configuration(report),
        provenance_section(report.provenance),
    ]
    return document(report.title, report.introduction, sections)


def _captions(report: Report) -> str:
    """What each variant said of the same held-out images as training went on."""
    parts = []
    for stage in dict.fromkeys(run.stage for run in report.runs if run.samples):
        runs = [run for run in report.runs if run.stage == stage and run.samples]
        asked = dict.fromkeys((sample["id"], sample.get("question", "")) for run in runs for sample in run.samples)
        parts += [f"<h3>{escape(stage)}</h3>", *(_caption_block(report, runs, *key) for key in asked)]
    note = (
        "The same held-out images as training went on: fluent text that has nothing to do with them would show here."
    )
    return markup.section("What they say of fixed images", markup.paragraph(note, "small"), *parts) if parts else ""


def _caption_block(report: Report, runs: Sequence[Run], image_id: str, question: str) -> str:
    said: dict[int, dict[str, str]] = {}
    reference = ""
    for run in runs:
        for sample in run.samples:
            if (sample["id"], sample.get("question", "")) == (image_id, question):
                said.setdefault(sample["step"], {})[run.variant] = sample["text"]
                reference = sample["reference"]
    variants = [run.variant for run in runs]
    rows = [[f"{step:,}", *(escape(row.get(name) or "–") for name in variants)] for step, row in sorted(said.items())]
    image = report.images(image_id)
    shown = markup.image(image, f"Held-out image {image_id}") if image is not None else ""
    told = f"<p><b>{escape(question or 'Its own caption:')}</b> {escape(reference)}</p>"
    table = markup.table(["step", *(escape(display_name(variant)) for variant in variants)], rows, "", "text")
    return f'<div class="captioned"><div class="thumb">{shown}</div><div>{told}{table}</div></div>'


def _reconstructions(report: Report) -> str:
    strips = []
    for strip in report.reconstructions:
        panels = "".join(
            f"<figure>{markup.image(image, f'{label}: {strip.title}')}<figcaption>{escape(label)}</figcaption></figure>"
            for label, image in strip.panels
        )
        kind = "strip" if len(strip.panels) > 1 else "sheet"
        strips.append(f'<h3>{escape(strip.title)}</h3><div class="{kind}">{panels}</div>')
    note = "Grey patches were hidden from the MAE encoder; only they are painted, the others are the original's."
    return markup.section("Reconstructions", markup.paragraph(note, "small"), *strips) if strips else ""


def _freeze_tables(report: Report) -> str:
    tables = []
    for run in report.runs:
        if not run.freeze:
            continue
        rows = [
            [
                escape(str(row["name"])),
                f"{row['trainable']:,}" if row["trainable"] else "frozen",
                f"{row['parameters']:,}",
            ]
            for row in run.freeze
        ]
        totals = [sum(row[column] for row in run.freeze) for column in ("trainable", "parameters")]
        rows.append(["<b>total</b>", *(f"<b>{total:,}</b>" for total in totals)])
        title = f"{display_name(run.variant)}, {run.stage}"
        tables.append(f"<div>{markup.table(['part', 'trained', 'parameters'], rows, title)}</div>")
    return (
        markup.section("What was trained, what was frozen", f'<div class="columns">{"".join(tables)}</div>')
        if tables
        else ""
    )


def _configuration(report: Report) -> str:
    blocks = [markup.details("The demo", markup.as_json(report.configuration))] if report.configuration else []
    blocks += [
        markup.details(f"{display_name(run.variant)}, {run.stage}", markup.as_json(run.config))
        for run in report.runs
        if run.config
    ]
    return markup.section("Configuration", *blocks) if blocks else ""


def provenance_section(facts: Mapping[str, str]) -> str:
    """How a page came about; empty without facts."""
    rows = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in facts.items())
    return markup.section("How this was produced", f'<dl class="facts">{rows}</dl>') if facts else ""
