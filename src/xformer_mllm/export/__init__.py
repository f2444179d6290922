"""`xformer export`: a model -> one self-contained folder, for the Hub and for plain transformers.

In reading order:

    facts   the model's files, and what is known about it: its runs and evaluations
    folder  settings and code, as they are written
    card    README.md: usage, contents, scores, data, licence, citation
    space   a Gradio Space around exported models
"""

from dataclasses import replace
from pathlib import Path

from huggingface_hub.utils import validate_repo_id

from xformer_mllm.checkpoints import model_folder, model_name, write_weights
from xformer_mllm.commands import ExportConfig
from xformer_mllm.export.card import model_card
from xformer_mllm.export.facts import (
    Facts,
    evaluations,
    kind_of,
    lineage,
    made_from,
    open_processor,
    open_weights,
    title_of,
)
from xformer_mllm.export.folder import check_whole, dtype_of, new_config, write_code, write_settings
from xformer_mllm.export.space import MODELS, write_space
from xformer_mllm.files import atomic_path, check_new_folder, write_whole

__all__ = ["export"]


def export(settings: ExportConfig) -> Path:
    """Export and return the new folder.

    Raises:
        ValueError, OSError: if there is no such model, if the output folder is not empty, or if the disk is full.
    """
    check_new_folder(settings.output_dir)
    if settings.space:
        return export_space(settings)
    facts, left_out = export_model(settings)
    print(summary(facts, left_out))
    return settings.output_dir


def export_model(settings: ExportConfig) -> tuple[Facts, list[str]]:
    """Export one model: what is known about it, and which scores are not in its card. Raises as `export`."""
    output = settings.output_dir
    if settings.repo_id is not None:
        validate_repo_id(settings.repo_id)
    folder = model_folder(settings.model)
    kind, tensors, processor = kind_of(folder), open_weights(folder), open_processor(folder)
    config = new_config(folder, kind)
    wanted = {name: tensor.to("meta", dtype_of(name, tensor, settings.dtype)) for name, tensor in tensors.items()}
    scores, left_out = evaluations(folder, settings.metrics)
    runs = lineage(folder)
    facts = Facts(settings, kind, config, wanted, runs, made_from(runs, settings.base_models), scores)
    try:
        with atomic_path(output) as partial:
            partial.mkdir()
            write_settings(partial, folder, facts, processor)
            write_code(partial)
            write_whole(partial / "README.md", model_card(facts))
            write_weights(partial, wanted, tensors.__getitem__, settings.max_shard_size)
            check_whole(partial, kind, folder)
    except OSError as error:
        raise OSError(f"{output}: could not be written, and nothing is left of it: {error}") from error
    return facts, left_out


def export_space(settings: ExportConfig) -> Path:
    """Export models into a Gradio Space and return its folder. Raises as `export`."""
    output = settings.output_dir
    roles = {"model": settings.model, "baseline": settings.baseline, "stage1": settings.stage1}
    folders = {role: folder for role, folder in roles.items() if folder is not None}
    names = {role: model_name(folder) for role, folder in folders.items()}
    if len(set(names.values())) < len(names):
        raise ValueError(f"the models need different names, not {', '.join(names.values())}; rename a folder")
    with atomic_path(output) as partial:
        partial.mkdir()
        for role, folder in folders.items():
            place = partial / MODELS / names[role]
            alone = replace(settings, model=folder, output_dir=place, baseline=None, stage1=None, examples=None)
            export_model(replace(alone, space=False))
        write_space(partial, names, settings)
    print(f"{output}: a Gradio Space; try it with `python {output / 'app.py'}`")
    print(f"to publish: hf upload --repo-type space {settings.repo_id or 'YOU/NAME'} {output}")
    return output


def summary(facts: Facts, left_out: list[str]) -> str:
    """Describe what was written, which scores are not in the card, and how to publish it."""
    output = facts.settings.output_dir
    named = ", ".join(map(title_of, facts.scores))
    lines = [
        f"{output}: {facts.kind.model.__name__}, {facts.gigabytes:,.3f} GB of weights",
        f"scores in the card: {named or 'none; --metrics FILE adds them'}",
        *(f"not in the card: {line}" for line in left_out),
    ]
    if not facts.settled:
        lines.append("the licence is not settled, and the card says so: --license, --base-models NAME=LICENCE")
    lines.append(f"to publish: hf upload {facts.settings.repo_id or 'YOU/NAME'} {output}")
    return "\n".join(lines)
