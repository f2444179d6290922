"""What the demo runs and prints, and once, tiny, the whole of it."""

import json
import shlex

import pytest
from PIL import Image

from xformer_mllm import cli, report
from xformer_mllm.embedded import demo, lanes
from xformer_mllm.embedded.commands import DemoConfig
from xformer_mllm.embedded.demo import jobs_of, run_demo


def test_budgets_are_equal_but_for_the_name_of_the_variant():
    config = DemoConfig()
    lines = {
        variant: [" ".join(p.arguments).replace(variant, "VARIANT") for p in jobs_of(config, variant)]
        for variant in config.variants
    }
    assert lines["qformer"] == lines["xformer"]
    assert [p.title for p in jobs_of(config, "xformer")] == [
        "stage 1",
        "stage 2 on questions",
        "questions after stage 2 on questions",
    ]


def test_zero_shot_adds_a_second_stage_on_captions_alone():
    jobs = jobs_of(DemoConfig(zero_shot=True), "xformer")
    assert [p.folder.name for p in jobs] == [
        "stage1",
        "stage2",
        "questions",
        "stage2-zero-shot",
        "questions-zero-shot",
    ]
    assert "captions" in jobs[3].arguments
    assert str(jobs[3].folder) in jobs[4].arguments


def test_a_large_language_model_gets_fewer_steps():
    def steps(**settings):
        return jobs_of(DemoConfig(**settings), "xformer")[1].steps

    assert steps() > steps(llm="smollm2")
    assert steps(llm="smollm2", stage2_steps=7) == 7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variants": ()}, "one or more"),
        ({"variants": ("xformer", "xformer")}, "different names"),
        ({"test_size": 0}, "--test-size must be at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DemoConfig(**settings)


def test_the_command_of_a_configuration():
    assert demo.demo_command(DemoConfig()) == "xformer demo"
    config = DemoConfig(seed=3, zero_shot=True, variants=("qformer", "concat"))
    assert demo.demo_command(config) == "xformer demo --variants qformer concat --seed 3 --zero-shot"


def test_the_table_holds_the_scores_in_aligned_columns():
    def score(accuracy):
        return {"accuracy": accuracy, "n": 1234, "ci95": [accuracy - 0.05, accuracy + 0.05], "majority": 0.4}

    metrics = {
        name: {"all": score(value), "semantic:object": score(0.1)} for name, value in (("qformer", 0.5), ("x", 0.6))
    }
    differences = {"x": {"all": {"difference": 0.1, "ci95": [0.05, 0.15], "n": 1234, "clear": True}}}
    setting = report.Setting("name", "", metrics, differences)
    lines = demo.table(setting, ("qformer", "x")).splitlines()
    assert lines[2].split("  ")[-3:] == ["50.0 [45.0, 55.0]", "60.0 [55.0, 65.0]", "+10.0 [+5.0, +15.0]"]
    assert "1,234" in lines[2]
    assert "40.0" in lines[2]
    assert len({len(line) for line in lines}) == 1
    assert len(lines) == 3
    assert "x is ahead by 10.0 points" in " ".join(demo.sentence(setting, ("qformer", "x")).split())


def test_the_whole_demo_on_a_few_scenes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lanes, "fingerprint", lambda sources: "as now")  # the code may be edited while the test runs
    config = DemoConfig(
        output_dir=tmp_path / "demo", stage1_steps=2, stage2_steps=2, train_size=96, test_size=5, seed=1
    )
    page = run_demo(config)
    said = capsys.readouterr().out
    metrics = json.loads((config.output_dir / "metrics.json").read_text())
    assert set(metrics) == {"qformer", "xformer"}
    for scores in metrics.values():
        assert scores["all"]["n"] == 20
        assert all(0 <= s["ci95"][0] <= s["accuracy"] <= s["ci95"][1] <= 1 for s in scores.values())
    html = page.read_text(encoding="utf-8")
    for heading in ("Training", "Reconstructions", "Generated texts during training", "Configuration"):
        assert f"<h2>{heading}</h2>" in html
    assert "xformer demo --seed 1" in html
    assert "To try:" in said
    with Image.open(config.output_dir / "images" / "0.png") as image:
        assert image.size == (48, 48)

    words = shlex.split(next(line for line in said.splitlines() if " ask " in line))
    assert cli.main([*words[1:], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["image"] == words[2]

    run_demo(config)
    assert capsys.readouterr().out.count("already finished") == 6
