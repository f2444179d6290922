"""Studies: what the file may say, the lanes that it makes, and scores over seeds against closed forms."""

import json
from pathlib import Path

import numpy as np
import pytest

from xformer_mllm.embedded import study as module
from xformer_mllm.embedded.commands import StudyConfig
from xformer_mllm.embedded.start import start_pretraining
from xformer_mllm.embedded.study import lanes_of, over_seeds, read_study, run_study

STUDIES = Path(__file__).parents[1] / "recipes" / "studies"


def written(tmp_path, **content):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"title": "Mine", **content}))
    return path


def rows(credits, per_image=2):
    """Predictions about images with `per_image` questions each; every other question is of type "a"."""
    return [
        {"id": str(n), "image_id": str(n // per_image), "question_type": "ab"[n % 2], "credit": float(credit)}
        for n, credit in enumerate(credits)
    ]


def test_a_run_for_each_setting_seed_and_variant(tmp_path):
    settings = {"": {}, "two blocks": {"stage1": ["--model-settings", "fusion_blocks=2"], "stage2": ["--steps", "9"]}}
    study = read_study(
        written(tmp_path, variants=["concat", "xformer"], seeds=[3, 4], settings=settings, split="validation")
    )
    lanes = lanes_of(study, tmp_path / "runs")
    assert [lane.variant for lane in lanes] == [
        *("concat 3", "xformer 3", "concat 4", "xformer 4"),
        *("two blocks concat 3", "two blocks xformer 3", "two blocks concat 4", "two blocks xformer 4"),
    ]
    first, second, questions = lanes[-1].jobs
    assert first.folder == tmp_path / "runs" / "two-blocks" / "4" / "xformer" / "stage1"
    assert first.arguments[-4:-2] == ("--model-settings", "fusion_blocks=2")
    assert second.arguments[-4:-2] == ("--steps", "9")
    assert "--model-settings" not in second.arguments
    assert questions.arguments[questions.arguments.index("--split") + 1] == "validation"
    # Equal budgets: without the names of folders, variants differ in the variant alone.
    one, other = (" ".join(lane.jobs[0].arguments) for lane in lanes[:2])
    assert one.replace("concat", "xformer") == other


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"variant": ["xformer"]}, "unknown field 'variant'; fields: title, variants"),
        ({"split": "train"}, "split is 'train', but must be test or validation"),
        ({"seeds": [1, 1]}, "seeds must be one or more different values"),
        ({"seeds": "3"}, "seeds must be one or more different values"),
        ({"variants": "xformer"}, "variants must be one or more different values"),
        (
            {"variants": ["qformer", {"name": "qformer", "variant": "qformer"}]},
            "variants must be one or more different",
        ),
        ({"variants": [{"variant": "qformer"}]}, "a variant is a name or {"),
        ({"variants": [{"name": "a/b", "variant": "qformer"}]}, "cannot be the name of a folder"),
        ({"variants": [{"name": "a", "variant": "qformer", "stage1": "--steps 3"}]}, "must be lists of arguments"),
        ({"variants": [{"name": "a", "variant": "qformer", "stage1": [3]}]}, "must be lists of arguments"),
        (
            {"variants": [{"name": "a", "variant": "qformer", "demo": {"data": "x"}}]},
            "unknown field 'data' in demo of",
        ),
        ({"variants": []}, "variants must be one or more different values"),
        ({"settings": {"x": ["--steps"]}}, "setting 'x' must be"),
        ({"settings": {"x": {"stage3": []}}}, "setting 'x' must be"),
        ({"demo": {"step": 3}}, "unknown field 'step' in demo"),
        ({"demo": {"seed": 3}}, "unknown field 'seed' in demo"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, content, said):
    with pytest.raises(ValueError, match=r"mine\.json") as raised:
        read_study(written(tmp_path, **content))
    assert said in str(raised.value)


def test_a_variant_may_have_a_name_arguments_and_steps_of_its_own(tmp_path):
    wider = {"name": "qformer, wider", "variant": "qformer", "stage1": ["--model-settings", "num_query_tokens=16"]}
    longer = {"name": "longer", "variant": "qformer", "demo": {"stage1_steps": 936, "stage2_steps": 1040}}
    settings = {"slower": {"stage1": ["--learning-rate", "1e-3"]}}
    study = read_study(
        written(tmp_path, variants=["qformer", wider, longer], seeds=[3], settings=settings, demo={"stage1_steps": 5})
    )
    lanes = lanes_of(study, tmp_path / "runs")
    assert [lane.variant for lane in lanes] == ["slower qformer 3", "slower qformer, wider 3", "slower longer 3"]
    plain, first, second = [lane.jobs for lane in lanes]
    assert first[0].folder == tmp_path / "runs" / "slower" / "3" / "qformer,-wider" / "stage1"
    assert str(first[0].folder) in first[1].arguments
    assert plain[0].arguments[-4:-2] == ("--learning-rate", "1e-3")
    assert first[0].arguments[:-2] == (*plain[0].arguments[:-2], "--model-settings", "num_query_tokens=16")
    assert [job.steps for job in plain] == [5, 800, None]
    assert [job.steps for job in second] == [936, 1040, None]
    with pytest.raises(ValueError, match="'qformer, wider' and setting 'x' both set --model-settings of stage1"):
        read_study(written(tmp_path, variants=[wider], settings={"x": {"stage1": ["--model-settings", "a=1"]}}))


def test_the_matched_study_has_as_many_weights_and_as_much_compute():
    study = read_study(STUDIES / "scenes-matched.json")
    columns = {column.name: column for column in study.columns}

    def weights(variant, settings=()):
        model, _ = start_pretraining(variant, settings=settings)
        model.freeze()
        return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)

    wider = columns["qformer, as many weights"].stage1
    assert wider[0] == "--model-settings"
    assert weights("qformer", wider[1:]) == pytest.approx(weights("xformer"), rel=0.01)
    # benchmarks/flops.py: a step of X-Former costs 1.351 and 1.269 steps of the Q-Former.
    longer = columns["qformer, as much compute"].demo
    assert longer == {"stage1_steps": round(720 * 1.35103), "stage2_steps": round(800 * 1.26942)}


def test_a_missing_file_and_another_kind_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such study"):
        read_study(tmp_path / "none.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match=r"list\.json: not a study"):
        read_study(tmp_path / "list.json")


def test_values_are_means_over_seeds_by_type():
    scores = over_seeds([rows([1, 0, 1, 0]), rows([1, 1, 0, 0])])
    assert {group: (score["value"], score["n"]) for group, score in scores.items()} == {
        "all": (0.5, 4),
        "a": (0.75, 2),
        "b": (0.25, 2),
        "mean of the types": (0.5, 4),
    }
    assert scores["a"]["by_seed"] == [1.0, 0.5]


def test_intervals_cover_seeds_and_images():
    """Against closed forms: the variance of a bootstrap mean is that of the sample divided by its size."""
    generator = np.random.default_rng(3)
    images = 400
    # All seeds alike: only the images vary.
    credits = generator.integers(0, 2, images)
    scores = over_seeds([rows(credits, per_image=1)] * 5)["all"]
    half = 1.96 * np.sqrt(credits.var() / images)
    np.testing.assert_allclose(scores["ci95"], [credits.mean() - half, credits.mean() + half], atol=0.006)
    # All images alike: only the seeds vary.
    levels = np.array([0.2, 0.4, 0.5, 0.6, 0.8])
    scores = over_seeds([rows(np.full(images, level), per_image=1) for level in levels])["all"]
    half = 1.96 * np.sqrt(levels.var() / len(levels))
    np.testing.assert_allclose(scores["ci95"], [0.5 - half, 0.5 + half], atol=0.02)


def test_questions_of_one_image_are_resampled_together():
    """Four equal questions of each image hold no more information than one."""
    credits = np.random.default_rng(1).integers(0, 2, 300)
    one = over_seeds([rows(credits, per_image=1)])["all"]["ci95"]
    four = over_seeds([rows(np.repeat(credits, 4), per_image=4)])["all"]["ci95"]
    np.testing.assert_allclose(one, four, atol=1e-12)


def test_differences_are_paired_by_seed_and_question():
    first = [rows([0, 1, 0, 1] * 50), rows([1, 1, 0, 0] * 50)]
    better = [rows([1, 1, 0, 1] * 50), rows([1, 1, 1, 0] * 50)]
    scores = over_seeds(better, first)
    assert scores["all"]["value"] == 0.25
    assert scores["all"]["by_seed"] == [0.25, 0.25]
    assert scores["a"]["value"] == 0.5
    assert scores["b"] == {"value": 0.0, "ci95": [0.0, 0.0], "by_seed": [0.0, 0.0], "n": 100}


def test_other_questions_are_refused():
    with pytest.raises(ValueError, match="same questions"):
        over_seeds([rows([1, 0]), rows([1, 0, 1, 0])])


def test_a_study_writes_its_results_and_page(tmp_path, monkeypatch):
    """The runs are stand-ins: the answers are there, and no process is started."""
    named = {"name": "long X-Former", "variant": "xformer", "demo": {"stage1_steps": 9}, "stage2": ["--seed", "7"]}
    study = written(tmp_path, seeds=[0, 1], zero_shot=True, variants=["qformer", named])
    root = tmp_path / "runs"
    for seed in (0, 1):
        for variant, credits in (("qformer", [0, 1, 0, 1]), ("long-X-Former", [1, 1, seed, 1])):
            for ending in ("", "-zero-shot"):
                folder = root / str(seed) / variant / f"questions{ending}"
                folder.mkdir(parents=True)
                scores = {group: {"majority": 0.25} for group in ("all", "a", "b")}
                (folder / "metrics.json").write_text(json.dumps({"scores": scores}))
                (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(credits)))

    def finish(lanes):
        for lane in lanes:
            lane.seconds["stage 1"] = 90.0

    monkeypatch.setattr(module, "run_lanes", finish)
    page = run_study(StudyConfig(study=study, output_dir=root))
    text = page.read_text()
    assert "# Mine" in text
    assert "| all | 4 | 0.250 | 0.500 [" in text
    assert "+37.5 [" in text
    assert "by seed +25.0, +50.0" in text
    assert "| question type | n | majority | qformer | long X-Former |" in text
    assert "(long X-Former: xformer with stage1_steps 9, `--seed 7` in stage2)" in " ".join(text.split())
    assert "zero-shot" in text
    assert f"xformer study {study}" in text
    results = json.loads((root / "mine.json").read_text())
    assert results["targets"]["questions"][""]["differences"]["long X-Former"]["a"]["value"] == 0.75
    assert results["minutes"] == dict.fromkeys(("qformer 0", "long X-Former 0", "qformer 1", "long X-Former 1"), 1.5)
    for target in ("questions", "captions"):
        drawing = (root / f"mine-{target}.svg").read_text()
        assert drawing.count("<circle") == 2 + 4 * 2
        assert f"(mine-{target}.svg)" in text
