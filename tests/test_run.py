"""`xformer evaluate` and `xformer score` through the command line: files, scores, refusals."""

import json

import pytest

from xformer_mllm.cli import main
from xformer_mllm.data.json_files import read_json, read_json_lines
from xformer_mllm.data.questions import Question
from xformer_mllm.data.scenes import SceneQuestions
from xformer_mllm.evaluate import run, scenes
from xformer_mllm.evaluate.benchmark import Settings
from xformer_mllm.evaluate.scenes import Scenes

SIZE = ["--size", "6", "--questions-per-picture", "2"]


def refusal(capsys, *words):
    assert main([str(word) for word in words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in lines if line.startswith("xformer: ")]) == 1
    return lines[-1]


@pytest.fixture(autouse=True)
def few_training_scenes(monkeypatch):
    monkeypatch.setattr(scenes, "TRAINING_SCENES", 50)


def test_evaluate_writes_what_it_says(runs, tmp_path, capsys):
    output = tmp_path / "out"
    words = ["evaluate", runs / "stage2", *SIZE, "--max-new-tokens", "3", "--output-dir", output]
    assert main([str(word) for word in words]) == 0
    printed = capsys.readouterr().out
    metrics, rows = read_json(output / "metrics.json"), read_json_lines(output / "predictions.jsonl")
    assert {path.name for path in output.iterdir()} == {
        "metrics.json",
        "predictions.jsonl",
        "official.json",
        "report.html",
    }
    assert metrics["scores"]["all"]["n"] == len(rows) == metrics["answered"] == 12
    assert metrics["scores"]["all"]["accuracy"] == sum(row["credit"] for row in rows) / 12
    assert metrics["settings"]["max_new_tokens"] == 3
    assert metrics["config"]["size"] == 6
    expected = SceneQuestions("test", 6, questions_per_scene=2)
    assert [row["id"] for row in rows] == [expected[n]["id"] for n in range(12)]
    for belongs in ("12 of 12 records answered", "prompt: Question: {question} Answer:", "exact match", "majority"):
        assert belongs in printed


def test_score_gives_what_evaluate_gave(runs, tmp_path, capsys):
    output, scores = tmp_path / "out", tmp_path / "scores.json"
    assert main(["evaluate", str(runs / "stage2"), *SIZE, "--output-dir", str(output)]) == 0
    assert main(["score", str(output / "official.json"), *SIZE, "--output", str(scores)]) == 0
    assert read_json(scores)["scores"] == read_json(output / "metrics.json")["scores"]


def test_score_knows_a_right_answer(tmp_path, capsys):
    records = Scenes("test", 3, 2).records
    rows = [{"id": record.id, "answer": record.answer.upper()} for record in records]
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    metrics = run.score(run.ScoreConfig(answers=tmp_path / "mine.json", size=3, questions_per_picture=2))
    assert metrics["scores"]["all"]["accuracy"] == 1.0


def test_ids_that_do_not_match_are_counted_and_named(tmp_path, capsys):
    ids = [record.id for record in Scenes("test", 3, 2).records]
    rows = [{"id": name, "answer": "yes"} for name in [*ids[1:], ids[1], "nobody"]]
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    line = refusal(capsys, "score", tmp_path / "mine.json", "--size", "3", "--questions-per-picture", "2")
    assert f"1 repeated ({ids[1]}); 1 unknown (nobody); 1 missing ({ids[0]})" in line
    (tmp_path / "mine.json").write_text(json.dumps(rows[:-2]))
    words = ("score", tmp_path / "mine.json", "--size", "3", "--questions-per-picture", "2")
    assert refusal(capsys, *words).endswith("--partial scores those that are there")
    assert main([*map(str, words), "--partial"]) == 0
    assert "5 of 6 records answered" in capsys.readouterr().out
    (tmp_path / "mine.json").write_text('[{"question": 1}]')
    assert "not in scenes's results format" in refusal(capsys, "score", tmp_path / "mine.json")
    (tmp_path / "mine.json").write_text('[{"id": 1,]')
    assert "mine.json:1:11: not valid JSON" in refusal(capsys, "score", tmp_path / "mine.json")


def test_retrieval_on_exported_scenes(runs, tmp_path, capsys):
    data, output = tmp_path / "data", tmp_path / "out"
    assert main(["data", "export", "coco-retrieval", "--size", "6", "--output-dir", str(data)]) == 0
    words = ["--benchmark", "coco-retrieval", "--data", str(data)]
    assert main(["evaluate", str(runs / "stage1"), *words, "--k-test", "3", "--output-dir", str(output)]) == 0
    assert "image retrieval, ITM re-ranked" in capsys.readouterr().out
    assert {path.name for path in output.iterdir()} == {"metrics.json", "ranking.json", "report.html"}
    assert read_json(output / "metrics.json")["scores"]["all"]["n"] > 0
    assert "needed: XFormerForPreTraining" in refusal(capsys, "evaluate", runs / "stage2", *words)
    assert "has no official results file" in refusal(capsys, "score", output / "ranking.json", *words)


def test_what_does_not_exist_is_refused_before_a_model_is_loaded(tmp_path, capsys):
    evaluate = ("evaluate", tmp_path / "none")
    assert "unknown benchmark 'vqa'" in refusal(capsys, *evaluate, "--benchmark", "vqa")
    assert "has the splits test, validation" in refusal(capsys, *evaluate, "--split", "train")
    assert "has the settings greedy" in refusal(capsys, *evaluate, "--settings", "lavis")
    assert "gqa needs --data DIR" in refusal(capsys, *evaluate, "--benchmark", "gqa")
    assert "no trained model there" in refusal(capsys, *evaluate)


def test_settings_can_be_replaced_one_by_one(tmp_path):
    config = run.EvaluateConfig(model=tmp_path, num_beams=5, prompt="{question}?", size=1)
    settings = run.settings_of(config, run.open_benchmark(config))
    assert (settings.num_beams, settings.prompt, settings.max_new_tokens) == (5, "{question}?", 8)


def test_a_question_as_lavis_asks_it():
    record = Question("1", "1", 'What is "this" (thing): a.b ' + "x " * 60 + "?", None, "")
    settings = Settings(
        prompt="Q: {question} A:", num_beams=1, length_penalty=0.0, max_new_tokens=1, plain_question=True
    )
    assert settings.text(record) == f"Q: what is this thing ab{' x' * 45} A:"


def test_table_prints_shares_times_100_and_leaves_gaps():
    text = run.table({"all": {"accuracy": 0.5, "n": 2000, "ci95": [0.25, 0.75]}, "far": {"MAE": 1.5, "n": 3}})
    assert text.splitlines()[2].split() == ["all", "50.0", "[25.0,", "75.0]", "2,000"]
    assert text.splitlines()[3].split() == ["far", "3", "1.50"]
