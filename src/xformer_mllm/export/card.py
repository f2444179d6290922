"""The model card: how to use the model, what is in it, scores, data, licence, citation."""

import json
import re
from importlib.metadata import requires, version
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCardData

from xformer_mllm.commands import DATA
from xformer_mllm.data.questions import QUESTION_PROMPT
from xformer_mllm.export.facts import Facts, Metrics, benchmark_of, part_of, title_of, without_folders
from xformer_mllm.model.modeling_xformer import FROZEN
from xformer_mllm.report.benchmark import UNSCALED, decoding, number
from xformer_mllm.report.contents import BLIND


def model_card(facts: Facts) -> str:
    """Return README.md: YAML for the Hub, then the text."""
    scores = ["## Scores", *map(scores_of, facts.scores)] if facts.scores else []
    sections = [introduction(facts), usage(facts), contents(facts), training(facts), *scores, licence(facts), CITATION]
    return f"---\n{hub_fields(facts)}\n---\n\n" + "\n\n".join(sections) + "\n"


def hub_fields(facts: Facts) -> str:
    """Return the card's YAML."""
    settings, task = facts.settings, facts.kind.task
    return ModelCardData(
        license=settings.license,
        license_name=settings.license_name,
        license_link=settings.license_link,
        library_name="transformers",
        pipeline_tag=task,
        base_model=[name for name in facts.bases if re.fullmatch(r"[\w.-]+/[\w.-]+", name)] or None,
        datasets=list(settings.datasets) or None,
        tags=["x-former", "q-former", "custom_code"],
        model_name=facts.name.rpartition("/")[2],
        eval_results=[result for metrics in facts.scores for result in hub_results(metrics, task)] or None,
    ).to_yaml()


def hub_results(metrics: Metrics, task: str) -> list[EvalResult]:
    """Return the overall scores, except on the embedded scenes: the Hub would list them as the benchmark's."""
    if metrics.get("exported_scenes"):
        return []
    name, split = benchmark_of(metrics)
    return [
        EvalResult(
            task_type=task,
            dataset_type=name,
            dataset_name=name,
            dataset_split=split or None,
            metric_type=metric,
            metric_value=round(value if metric in UNSCALED else 100 * value, 2),
        )
        for metric, value in metrics["scores"]["all"].items()
        if metric not in ("n", "ci95", *BLIND) and value is not None
    ]


def introduction(facts: Facts) -> str:
    return f"""\
# {facts.name}

X-Former ({facts.kind.title}): a frozen CLIP encoder keeps an image's global meaning and loses local detail; a second
frozen encoder (a MAE, in the paper) keeps detail; a Q-Former and a dual cross-attention make one short sequence of both.
From [X-Former: Unifying Contrastive and Reconstruction Learning for MLLMs](https://arxiv.org/abs/2407.13851) (ECCV 2024), in
the open implementation xformer-mllm {version("xformer-mllm")}, which is not the authors'.

Its output can be wrong, and carries the biases of its frozen parts and of its training data."""


def usage(facts: Facts) -> str:
    needed = ", ".join(f"`{line}`" for line in requires("xformer-mllm") or [] if ";" not in line)
    prompt = QUESTION_PROMPT.format(question="How many objects are there in the image?")
    return f"""\
## Use

Needs {needed}. `trust_remote_code=True` runs the Python files of this folder: read them first.

```python
{facts.kind.example.format(name=json.dumps(facts.name), prompt=json.dumps(prompt))}
```"""


def contents(facts: Facts) -> str:
    """List the parts, their sizes and dtypes."""
    config = facts.config
    what = {
        "clip_encoder": tower(config.clip_config),
        "mae_encoder": tower(config.mae_config),
        "qformer": tower(config.qformer_config),
        "query_tokens": f"{config.num_query_tokens} queries",
        "fusion": config.fusion.replace("_", " "),
        "language_model": tower(config.text_config),
    }
    parts: dict[str, list[torch.Tensor]] = {}
    for name, tensor in facts.wanted.items():
        parts.setdefault(part_of(name), []).append(tensor)
    rows = [
        [
            part,
            what.get(part, ""),
            f"{sum(tensor.numel() for tensor in tensors):,}",
            ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})),
            "frozen" if part in FROZEN else "trainable",
        ]
        for part, tensors in parts.items()
    ]
    total, side = sum(tensor.numel() for tensor in facts.wanted.values()), config.clip_config.image_size
    return f"""\
## What is in it

{table(["part", "", "weights", "dtype", ""], rows)}

{total:,} weights, {facts.gigabytes:,.3f} GB. Images of any size are scaled to {side} × {side} pixels."""


def tower(config: Any) -> str:
    """Describe a tower, as in 'vit_mae, 32 layers × 1280'."""
    return "" if config is None else f"{config.model_type}, {config.num_hidden_layers} layers × {config.hidden_size}"


def training(facts: Facts) -> str:
    """List the data and all settings of the runs and conversions."""
    parts = ["## Training"]
    if datasets := facts.settings.datasets:
        parts.append(f"Data: {', '.join(f'[{name}](https://huggingface.co/datasets/{name})' for name in datasets)}.")
    for run in facts.runs:
        shown = {key: without_folders(value) for key, value in run.items() if key != "command"}
        if run.get("data") in DATA:
            shown.pop("augment", None)  # only external images are augmented
        data = f" on `{shown['data']}`" if "data" in shown else ""
        content = json.dumps(shown, indent=2, ensure_ascii=False)
        parts.append(f"`xformer {run['command']}`{data}, with these settings:\n\n```json\n{content}\n```")
    if not datasets and not facts.runs:
        parts.append("The training data and settings are not known.")
    return "\n\n".join(parts)


def scores_of(metrics: Metrics) -> str:
    """Format one benchmark: overall scores, how they were obtained, and the other groups, folded."""
    groups = metrics["scores"]
    columns = list(dict.fromkeys(metric for group in groups.values() for metric in group if metric != "ci95"))
    rows = [[name, *(number(metric, group.get(metric)) for metric in columns)] for name, group in groups.items()]
    overall, others = [row for row in rows if row[0] == "all"], [row for row in rows if row[0] != "all"]

    facts = ["Shares are times 100"]
    if {"answered", "records"} <= metrics.keys():
        facts.append(f"{metrics['answered']:,} of {metrics['records']:,} records answered")
    settings = metrics.get("settings", {})
    if prompt := settings.get("prompt", metrics.get("prompt")):
        facts.append(f"prompt `{json.dumps(prompt, ensure_ascii=False)}`")
    if "max_new_tokens" in settings:
        facts.append(decoding(settings))
    if normalisation := metrics.get("normalisation"):
        facts.append(f"normalisation: {normalisation.rstrip('.')}")
    facts += [note.rstrip(".") for note in metrics.get("notes", [])]

    text = f"### {title_of(metrics)}\n\n{table(['', *columns], overall)}\n\n{'; '.join(facts)}."
    if others:
        text += f"\n\n<details><summary>By group</summary>\n\n{table(['', *columns], others)}\n\n</details>"
    return text


def licence(facts: Facts) -> str:
    """State the licence of the whole and of each base model, and which are not known."""
    settings = facts.settings
    whole = settings.license_name or settings.license
    if settings.license_link:
        whole = f"[{whole}]({settings.license_link})"
    parts = [f"## Licence\n\nThe whole: {whole}. The Python files: Apache-2.0."]
    if facts.bases:
        parts.append(
            table(["made from", "licence"], [[name, known or "not known"] for name, known in facts.bases.items()])
        )
    if not facts.settled:
        parts.append("""\
**The licence is not settled.** The weights contain frozen parts (CLIP tower, second encoder, language model), each under
its own licence, and not all of these are known. Whoever publishes this model must look them up and choose a licence
for the whole that they permit.""")
    return "\n\n".join(parts)


CITATION = """\
## Citation

```bibtex
@inproceedings{swetha2024xformer,
  title     = {X-Former: Unifying Contrastive and Reconstruction Learning for {MLLMs}},
  author    = {Swetha, Sirnam and Yang, Jinyu and Neiman, Tal and Rizve, Mamshad Nayeem and Tran, Son and Yao, Benjamin
               and Chilimbi, Trishul and Shah, Mubarak},
  booktitle = {European Conference on Computer Vision (ECCV)},
  year      = {2024},
  url       = {https://arxiv.org/abs/2407.13851}
}
```"""


def table(head: list[str], rows: list[list[str]]) -> str:
    """Format a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
