"""A model -> a folder that plain transformers loads where xformer_mllm cannot be imported, and its card."""

import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from conftest import llm_inputs, randomise
from huggingface_hub import ModelCard, SpaceCard
from packaging.requirements import Requirement
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_threads import ANSWERS, in_threads
from transformers.dynamic_module_utils import get_class_from_dynamic_module, get_relative_import_files

import xformer_mllm
from xformer_mllm import XFormerForConditionalGeneration, XFormerForPreTraining, XFormerProcessor
from xformer_mllm.checkpoints import load_model
from xformer_mllm.commands import ExportConfig
from xformer_mllm.export import export
from xformer_mllm.export.facts import part_of
from xformer_mllm.export.folder import dtype_of
from xformer_mllm.model.modeling_xformer import FROZEN
from xformer_mllm.model.processing_xformer import CHAT_TEMPLATE

PROMPT = "Question: How many objects are there in the image? Answer:"
REPO = "you/xformer-stage2"
REVISION = "0123456789abcdef0123456789abcdef01234567"

SCORES = {
    "benchmark": "vqav2",
    "scores": {
        "all": {"accuracy": 0.4321, "ci95": [0.42, 0.44], "majority": 0.3, "n": 1000},
        "number": {"accuracy": 0.2},
    },
    "records": 1001,
    "answered": 1000,
    "normalisation": "the official one.",
    "settings": {"prompt": "Q: {question} | A:", "num_beams": 5, "length_penalty": -1.0, "max_new_tokens": 10},
    "config": {"model": "runs/stage2", "split": "val"},
}

# A process that cannot import the package runs the programs that it is given.
ALONE = """
import importlib.abc, json, sys

class NotInstalled(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "xformer_mllm":
            raise ModuleNotFoundError(f"no module named {name}", name=name)

sys.meta_path.insert(0, NotInstalled())
package, *programs = json.load(sys.stdin)
for program in programs:
    exec(program, {})
files = [getattr(module, "__file__", None) or "" for module in sys.modules.values()]
assert not [file for file in files if file.startswith(package)], "the package's own files were imported"
assert not [name for name in sys.modules if name.partition(".")[0] == "xformer_mllm"]
assert [name for name in sys.modules if name.endswith(".modeling_xformer")]
"""


def run(model: Path, output: Path, **settings) -> Path:
    return export(ExportConfig(model=model, output_dir=output, **settings))


@pytest.fixture(scope="module")
def place(tmp_path_factory, runs):
    """Exported: stage1; stage2 in several shards, and as the hub's cache has it; half, with frozen parts in bf16."""
    folder = tmp_path_factory.mktemp("exported")
    pixels = torch.randint(0, 256, (60, 70, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    Image.fromarray(pixels.numpy()).save(folder / "image.png")
    run(runs / "stage1", folder / "stage1")
    run(runs / "stage2", folder / "stage2", repo_id=REPO, max_shard_size="3MB", license="apache-2.0")
    run(runs / "stage2", folder / "half", dtype="bfloat16")
    into_cache(folder / "stage2", folder / "hub")
    return folder


def into_cache(folder: Path, cache: Path) -> None:
    """As huggingface_hub lays out what it has downloaded: links to files that are named by what they hold."""
    model = cache / f"models--{REPO.replace('/', '--')}"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(REVISION)
    (model / "blobs").mkdir()
    for file in (path for path in folder.rglob("*") if path.is_file()):
        blob = model / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blob)
        link = model / "snapshots" / REVISION / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))


def program_in(card: Path) -> str:
    """The example of a card."""
    return re.search(r"```python\n(.*?)```", card.read_text(), re.DOTALL)[1]


def alone(place: Path, *programs: str) -> list[str]:
    """What programs print that run in `place` and cannot import the package."""
    package = str(Path(xformer_mllm.__file__).parent)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(place / "home"), "HF_HUB_CACHE": str(place / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE],
        input=json.dumps([package, *programs]),
        cwd=place,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


def test_plain_transformers_runs_the_cards_examples(place, runs):
    programs = [
        # From the hub's cache: the card's own words, then what it made, saved by transformers and loaded again.
        program_in(place / "stage2" / "README.md")
        + f"""
import torch
from safetensors.torch import save_file
from transformers import AutoConfig
print(type(AutoConfig.from_pretrained(name, trust_remote_code=True)).__name__, type(model).__name__)
print(type(processor).__name__, type(model).__module__.partition(".")[0])
settings = {{"max_new_tokens": 6, "min_new_tokens": 6}}
prompt = model.get_image_features(inputs["pixel_values"]).pooler_output
made = {{"ids": model.generate(**inputs, **settings), "prompt": prompt}}
save_file(made, "stage2-alone.safetensors")
model.save_pretrained("again")
processor.save_pretrained("again")
again = AutoModelForImageTextToText.from_pretrained("again", trust_remote_code=True)
inputs = AutoProcessor.from_pretrained("again", trust_remote_code=True)(images="image.png", text={PROMPT!r})
print(torch.equal(again.generate(**inputs, **settings), made["ids"]))
""",
        # From a folder.
        program_in(place / "stage1" / "README.md")
        + """
from safetensors.torch import save_file
made = {"ids": ids, "queries": features.fused_queries, "mae": features.enriched_mae_tokens.contiguous()}
save_file(made, "stage1-alone.safetensors")
""",
        """
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained("half", trust_remote_code=True)
print({name: str(parameter.dtype) for name, parameter in model.named_parameters()})
""",
    ]
    printed = alone(place, *programs)

    image = str(place / "image.png")
    model, processor = load_model(runs / "stage2", [XFormerForConditionalGeneration])
    inputs = processor(images=image, text=PROMPT)
    with torch.no_grad():
        new = model.generate(**inputs, max_new_tokens=20)[:, inputs["input_ids"].shape[1] :]
        said = processor.batch_decode(new, skip_special_tokens=True)
        six = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6)
        soft_prompt = model.get_image_features(inputs["pixel_values"]).pooler_output
    assert printed[0] == str(said)
    assert ast.literal_eval(printed[1])[0]["generated_text"].removeprefix(PROMPT).strip() == said[0].strip()
    assert printed[2] == "XFormerConfig XFormerForConditionalGeneration"
    assert printed[3] == "XFormerProcessor transformers_modules"
    made = load_file(place / "stage2-alone.safetensors")
    assert torch.equal(made["ids"], six)
    assert torch.equal(made["prompt"], soft_prompt)
    assert printed[4] == "True"

    first, processor = load_model(runs / "stage1", [XFormerForPreTraining])
    pixels = processor(images=image)["pixel_values"]
    with torch.no_grad():
        ids = first.caption(pixels, processor.qformer_tokenizer.sep_token_id)
        features = first.xformer(pixels)
    made = load_file(place / "stage1-alone.safetensors")
    assert torch.equal(made["ids"], ids)
    assert torch.equal(made["queries"], features.fused_queries)
    assert torch.equal(made["mae"], features.enriched_mae_tokens)
    assert printed[6] == str(processor.qformer_tokenizer.batch_decode(ids, skip_special_tokens=True))

    for name, dtype in ast.literal_eval(printed[7]).items():
        frozen = any(part in name.split(".") for part in FROZEN)
        assert dtype == ("torch.bfloat16" if frozen else "torch.float32"), name


def test_exported_code_is_complete_and_standalone(place):
    code = {file.name for file in (place / "stage1").glob("*.py")}
    entries = [place / "stage1" / f"{name}_xformer.py" for name in ("configuration", "modeling", "processing")]
    followed = {Path(file).name for entry in entries for file in get_relative_import_files(entry)}
    assert code == followed | {entry.name for entry in entries}
    for file in (place / "stage1").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("xformer_mllm") for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1
                siblings = [node.module] if node.module else [alias.name for alias in node.names]
                assert {f"{name}.py" for name in siblings} <= code
            elif isinstance(node, ast.ImportFrom):
                assert not node.module.startswith("xformer_mllm")


def test_weights_are_unchanged_in_shards_with_an_index(place, runs):
    original = load_file(runs / "stage2" / "model" / "model.safetensors")
    index = json.loads((place / "stage2" / "model.safetensors.index.json").read_text())
    shards = sorted((place / "stage2").glob("*.safetensors"))
    assert len(shards) > 3
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in original.values())
    exported = {}
    for shard in shards:
        assert shard.stat().st_size < 3e6 + 50_000  # names and shapes stand in front
        assert shard.stat().st_mode == (place / "stage2" / "config.json").stat().st_mode
        exported |= load_file(shard)
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in original.items())
    assert {"clip_encoder", "mae_encoder", "mae_decoder", "language_model"} <= set(map(part_of, exported))


def test_a_dtype_is_of_the_frozen_parts_and_is_kept(place, tmp_path):
    again = run(place / "half", tmp_path / "again")  # an export can be exported, in the dtype that it has
    tensors = load_file(again / "model.safetensors")
    for name, tensor in tensors.items():
        assert tensor.dtype == (torch.bfloat16 if part_of(name) in FROZEN else torch.float32), name
    config = json.loads((again / "config.json").read_text())
    assert [config["dtype"], config["text_config"]["dtype"], config["clip_config"]["dtype"]] == ["bfloat16"] * 3
    assert config["qformer_config"]["dtype"] == "float32"
    model, _ = load_model(again, [XFormerForConditionalGeneration])
    assert {str(p.dtype) for p in model.language_model.parameters()} == {"torch.bfloat16"}
    assert {str(p.dtype) for p in model.xformer.qformer.parameters()} == {"torch.float32"}


def test_stage_1_with_frozen_parts_in_bf16_keeps_them(runs, tmp_path):
    first = XFormerForPreTraining.from_pretrained(runs / "stage1" / "model", dtype=torch.bfloat16)
    first.save_pretrained(tmp_path / "model")
    XFormerProcessor.from_pretrained(runs / "stage1" / "model").save_pretrained(tmp_path / "model")
    model, _ = load_model(run(tmp_path / "model", tmp_path / "new"), [XFormerForPreTraining])
    assert model.xformer.mae_encoder.layernorm.weight.dtype == torch.bfloat16
    assert model.xformer.fusion.blocks[0].mae_feed_forward.norm.weight.dtype == torch.float32


def test_no_path_of_this_machine_is_in_the_folder(place, runs):
    text = "".join(file.read_text() for file in (place / "stage2").rglob("*.*") if file.suffix in (".json", ".md"))
    assert str(runs) not in text
    assert str(Path(xformer_mllm.__file__).parent) not in text
    assert "local_files_only" not in text


# -- the card ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(runs, tmp_path):
    """The folder of a stage-2 run with its settings and an evaluation, and of a stage-1 run that it began from."""
    for name in ("stage1", "stage2"):
        shutil.copytree(runs / name, tmp_path / name)
    made = {"qformer": "Salesforce/blip2-opt-2.7b", "mae": str(tmp_path / "mae-local"), "llm": None}
    (tmp_path / "stage1" / "model" / "conversion.json").write_text(json.dumps({"settings": made}))
    first = {"command": "train stage1", "data": "/data/pairs", "augment": "crop", "steps": 7}
    (tmp_path / "stage1" / "config.json").write_text(json.dumps(first))
    second = {
        "command": "train stage2",
        "data": "scenes",
        "augment": "crop+flip",
        "llm": "facebook/opt-2.7b",
        "steps": 5,
    }
    second["from_pretraining"] = str(tmp_path / "stage1")
    (tmp_path / "stage2" / "config.json").write_text(json.dumps(second))
    evaluation = tmp_path / "stage2" / "evaluation" / "vqav2-val"
    evaluation.mkdir(parents=True)
    (evaluation / "metrics.json").write_text(json.dumps(SCORES))
    return tmp_path


def test_the_card_states_runs_and_scores(trained, capsys):
    output = run(trained / "stage2", trained / "new", datasets=("you/pairs",))
    card = ModelCard.load(output / "README.md")
    fields = card.data.to_dict()
    assert fields["base_model"] == ["facebook/opt-2.7b", "Salesforce/blip2-opt-2.7b"]
    assert fields["datasets"] == ["you/pairs"]
    assert (fields["license"], fields["pipeline_tag"]) == ("other", "image-text-to-text")
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.dataset_split, result.metric_type) == ("vqav2", "val", "accuracy")
    assert result.metric_value == 43.21

    text = card.text
    for expected in (
        "| all | 43.2 | 30.0 | 1,000 |",
        "| number | 20.0 | – | – |",
        "1,000 of 1,001 records answered",
        '`"Q: {question} | A:"`',
        "5 beams, length penalty -1, at most 10 new tokens",
        "normalisation: the official one.",
        "`xformer train stage2` on `scenes`",
        "`xformer train stage1` on `pairs`",
        "`xformer convert`",
        "| Salesforce/blip2-opt-2.7b | not known |",
        "| mae-local | not known |",
        "The licence is not settled",
        "@inproceedings{swetha2024xformer",
        "| mae_encoder | vit_mae, 4 layers × 128 |",
    ):
        assert expected in text, expected
    assert str(trained) not in text
    assert text.count('"augment"') == 1  # the scenes are never augmented
    printed = capsys.readouterr().out
    assert "scores in the card: vqav2 val" in printed
    assert "licence is not settled" in printed


def test_a_settled_licence_has_no_note(trained):
    known = ("facebook/opt-2.7b=other", "Salesforce/blip2-opt-2.7b=mit", "mae-local=cc-by-nc-4.0")
    settings = {"license_name": "opt-research", "license_link": "https://example.org/opt"}
    output = run(trained / "stage2", trained / "new", base_models=known, **settings)
    card = ModelCard.load(output / "README.md")
    assert card.data.to_dict()["license_name"] == "opt-research"
    assert "The whole: [opt-research](https://example.org/opt)." in card.text
    assert "| mae-local | cc-by-nc-4.0 |" in card.text
    assert "not settled" not in card.text
    for unsettled in ({"base_models": known}, {"base_models": known[:2], **settings}):
        shutil.rmtree(output)
        run(trained / "stage2", output, **unsettled)
        assert "not settled" in (output / "README.md").read_text()


def test_stale_scores_are_left_out_unless_named(trained, capsys):
    file = trained / "stage2" / "evaluation" / "vqav2-val" / "metrics.json"
    os.utime(file, (1, 1))
    output = run(trained / "stage2", trained / "new")
    assert "## Scores" not in (output / "README.md").read_text()
    assert f"not in the card: {file}, which is older than the weights" in capsys.readouterr().out
    shutil.rmtree(output)
    run(trained / "stage2", output, metrics=(file,))
    assert (output / "README.md").read_text().count("### vqav2 val") == 1
    assert "not in the card" not in capsys.readouterr().out

    shutil.copytree(trained / "stage2" / "model", trained / "stage2" / "mine")
    os.utime(file)
    run(trained / "stage2" / "mine", trained / "newer")
    assert "scores in the card: none" in capsys.readouterr().out
    shutil.copytree(file.parents[1], trained / "stage2" / "mine" / "evaluation")  # where `evaluate` puts its own
    run(trained / "stage2" / "mine", trained / "newest")
    assert "scores in the card: vqav2 val" in capsys.readouterr().out


def test_scores_on_exported_scenes_are_marked(trained, capsys):
    file = trained / "stage2" / "evaluation" / "vqav2-val" / "metrics.json"
    file.write_text(json.dumps(SCORES | {"exported_scenes": True}))
    card = ModelCard.load(run(trained / "stage2", trained / "new") / "README.md")
    assert card.data.eval_results is None
    assert "model-index" not in card.content
    assert "### vqav2 val: the embedded scenes in its format\n\n" in card.text
    assert "| all | 43.2 |" in card.text
    assert "scores in the card: vqav2 val: the embedded scenes in its format" in capsys.readouterr().out


def test_a_card_without_runs_or_scores(runs, tmp_path):
    text = (run(runs / "qformer", tmp_path / "half") / "README.md").read_text()
    assert "mae_encoder" not in text
    assert "training data and settings are not known" in text
    assert "## Scores" not in text
    assert "# half" in text


# -- whole or not at all -----------------------------------------------------------------------------------------------


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_invalid_exports_are_an_error(runs, tmp_path):
    with pytest.raises(FileNotFoundError, match="no trained model"):
        run(tmp_path / "nothing", tmp_path / "new")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="full: exists and is not empty"):
        run(runs / "stage1", tmp_path / "full")
    with pytest.raises(ValueError, match="holds a model of kind OPTForCausalLM"):
        run(Path(xformer_mllm.__file__).parent / "embedded" / "weights" / "opt", tmp_path / "new")
    with pytest.raises(ValueError, match=r"Could not parse|not supported"):
        run(runs / "stage1", tmp_path / "new", max_shard_size="much")
    with pytest.raises(ValueError, match="no scores"):
        run(runs / "stage1", tmp_path / "new", metrics=(runs / "stage1" / "model" / "config.json",))
    with pytest.raises(ValueError, match="a/b/c"):
        run(runs / "stage1", tmp_path / "new", repo_id="a/b/c")
    for wrong, message in (
        ({"license": "mit", "license_name": "x"}, "require --license other, not mit"),
        ({"base_models": ("facebook/opt-2.7b",)}, "facebook/opt-2.7b: expected NAME=LICENCE"),
    ):
        with pytest.raises(ValueError, match=message):
            ExportConfig(model=runs / "stage1", output_dir=tmp_path / "new", **wrong)
    assert left_in(tmp_path) == ["full"]


@pytest.mark.parametrize("file", ["model.safetensors", "processor_config.json"])
def test_a_model_without_one_of_its_files_is_named(file, runs, tmp_path):
    shutil.copytree(runs / "stage1" / "model", tmp_path / "model")
    (tmp_path / "model" / file).unlink()
    with pytest.raises(FileNotFoundError, match=file):
        run(tmp_path / "model", tmp_path / "new")
    assert left_in(tmp_path) == ["model"]


def test_damaged_or_incomplete_weights_are_an_error(runs, tmp_path):
    shutil.copytree(runs / "stage1" / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    whole = load_file(weights)
    name = "xformer.mae_encoder.layernorm.weight"
    assert name in whole
    for wrong in ({}, {name: torch.zeros(3)}):
        save_file({key: t for key, t in whole.items() if key != name} | wrong, weights, {"format": "pt"})
        with pytest.raises(ValueError, match=f"1 weights are missing or of another shape, such as {name}"):
            run(tmp_path / "model", tmp_path / "new")
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged or cut short"):
        run(tmp_path / "model", tmp_path / "new")
    assert left_in(tmp_path) == ["model"]


def test_a_full_disk_leaves_nothing(runs, tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr("xformer_mllm.checkpoints.save_file", full)
        with pytest.raises(OSError, match=r"new: could not be written, and nothing is left of it: .*No space left"):
            run(runs / "stage1", tmp_path / "new")
    assert left_in(tmp_path) == []
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("xformer_mllm.checkpoints.shutil.disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(OSError, match=r"the weights take 0\.016 GB, and 0\.001 GB are free"):
        run(runs / "stage1", tmp_path / "new")
    assert left_in(tmp_path) == []


def test_adapters_are_trained_and_stay_fp32():
    weight = torch.zeros(1)
    assert dtype_of("language_model.layers.0.q_proj.lora_A.default.weight", weight, "bfloat16") == torch.float32
    assert dtype_of("language_model.layers.0.q_proj.weight", weight, "bfloat16") == torch.bfloat16


def test_threads_share_an_exported_model(place):
    kind = get_class_from_dynamic_module("modeling_xformer.XFormerForConditionalGeneration", str(place / "stage2"))
    assert kind.__module__.partition(".")[0] == "transformers_modules"
    model = kind.from_pretrained(place / "stage2").eval()
    randomise(model.language_projection, 0.5)  # images that matter
    size = model.config.clip_config.image_size
    images = torch.randint(0, 256, (ANSWERS, 1, 3, size, size), dtype=torch.uint8)
    ids, mask = llm_inputs(model.config, 1)
    in_threads(lambda number: model(images[number], ids, mask).logits, ANSWERS)


def test_an_exported_processor_keeps_its_chat_template(place):
    processor = XFormerProcessor.from_pretrained(place / "stage2")
    assert (place / "stage2" / "chat_template.jinja").read_text() == processor.chat_template == CHAT_TEMPLATE
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}]
    assert "How many?" in processor.apply_chat_template(turns)


SPACE_PROGRAM = """
import runpy, sys
folder = sys.argv[1]
sys.path.insert(0, folder)  # as for a script in it
import xformer_mllm
assert xformer_mllm.__file__.startswith(folder), xformer_mllm.__file__
from importlib.metadata import version
from xformer_mllm.serve import server
found = []
server.serve = found.append
runpy.run_path(folder + "/app.py")
(config,) = found
models = server.load(config)
print(sorted(models), server.settings_of(config, models).embedding, len(server.examples_of(config)), config.port)
"""


def test_a_space_runs_from_its_folder(runs, tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "a.png")
    space = tmp_path / "space"
    export(
        ExportConfig(
            model=runs / "stage2",
            output_dir=space,
            space=True,
            stage1=runs / "stage1",
            examples=tmp_path / "pictures",
            license="apache-2.0",
            repo_id="you/demo",
        )
    )
    assert "hf upload --repo-type space you/demo" in capsys.readouterr().out
    card = SpaceCard.load(space / "README.md")
    assert (card.data.sdk, card.data.app_file, card.data.title) == ("gradio", "app.py", "demo")
    assert card.data.sdk_version == version("gradio")
    assert {"gradio", "torch", "uvicorn"} <= {
        Requirement(line).name for line in (space / "requirements.txt").read_text().splitlines()
    }
    assert str(tmp_path) not in (space / "app.py").read_text()
    done = subprocess.run(
        [sys.executable, "-c", SPACE_PROGRAM, str(space)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "['stage1', 'stage2'] stage1 1 7860"
    with pytest.raises(ValueError, match="--stage1 requires --space"):
        ExportConfig(model=runs / "stage2", output_dir=space, stage1=runs / "stage1")
    with pytest.raises(ValueError, match="different names"):
        export(ExportConfig(model=runs / "stage2", output_dir=tmp_path / "b", space=True, baseline=runs / "stage2"))
