"""recipes/: files that the command reads, the paper's numbers in them, and a README that says what is in them and costs."""

import json
import re
from pathlib import Path

import pytest
import tyro

from xformer_mllm import XFormerConfig
from xformer_mllm.commands import EstimateConfig
from xformer_mllm.estimate.estimation import estimate
from xformer_mllm.train.config import Stage1Config, Stage2Config, read_config

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.json"))
README = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
PAIRS = 14_000_000
GPUS = 8
ESTIMATES = re.findall(r"```console\n\$ xformer estimate (.*)\n\n?((?:.*\n)*?)```", README)


def read(path: Path) -> Stage1Config | Stage2Config:
    command = json.loads(path.read_text(encoding="utf-8"))["command"]
    return read_config(path, Stage1Config if command == "train stage1" else Stage2Config, command)


def test_there_is_a_recipe_for_each_of_the_papers_runs():
    kinds = [(type(read(path)), getattr(read(path), "llm", None)) for path in RECIPES]
    assert kinds == [(Stage1Config, None), (Stage2Config, "facebook/opt-2.7b"), (Stage2Config, "facebook/opt-6.7b")]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_has_the_papers_epochs_in_blip2s_batches(path):
    recipe = read(path)
    batch = recipe.batch_size * recipe.gradient_accumulation_steps * GPUS
    stage1 = isinstance(recipe, Stage1Config)
    assert batch == (1680 if stage1 else 1920)
    assert recipe.gradient_accumulation_steps == 1 or not stage1  # the contrast sees one batch
    assert recipe.steps == -(-(9 if stage1 else 1) * PAIRS // batch)
    assert (recipe.learning_rate, recipe.warmup_steps, recipe.weight_decay) == (1e-4, 2000, 0.05)
    assert recipe.min_learning_rate == (1e-5 if stage1 else 5e-5)
    assert recipe.betas == (0.9, 0.98)
    assert recipe.clean_captions
    assert recipe.bf16 == "yes"
    assert (ROOT / recipe.data).is_file()


def test_stage2_goes_on_from_stage1_and_learns_captions():
    stage1, *stage2 = map(read, RECIPES)
    assert all(recipe.from_pretraining == stage1.output_dir for recipe in stage2)
    assert all(recipe.text == "captions" and recipe.data == stage1.data for recipe in stage2)
    assert len({recipe.output_dir for recipe in (stage1, *stage2)}) == 3


def test_the_papers_mask_ratio_is_in_the_model():
    assert XFormerConfig.paper().mask_ratio == 0.5


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_readme_says_where_every_setting_comes_from(path):
    table = README.partition("## Where each setting comes from")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines() if line[:1] == "|")))
    assert set(json.loads(path.read_text(encoding="utf-8"))) - {"command"} <= named


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_fit_in_80_gb(path, capsys):
    result = estimate(EstimateConfig(recipe=path, gpu="H100", count=GPUS))
    assert result["memory"]["needed"] < 80e9
    assert result["run"]["epochs"] == pytest.approx(9 if result["work"]["stage"] == 1 else 1, rel=1e-3)
    assert "fits in 80 GB" in capsys.readouterr().out


def test_readme_estimates_every_recipe():
    assert {words.split()[0] for words, _ in ESTIMATES} == {f"recipes/{path.name}" for path in RECIPES}


@pytest.mark.parametrize(("words", "shown"), ESTIMATES, ids=[words for words, _ in ESTIMATES])
def test_readme_shows_what_the_command_prints(words, shown, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    estimate(tyro.cli(EstimateConfig, args=words.split()))
    assert shown.strip() == capsys.readouterr().out.strip()
