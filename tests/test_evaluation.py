"""`xformer evaluate` and `xformer score` through the command line: files, scores, refusals."""

import json
import shutil

import pytest

from xformer_mllm.cli import main
from xformer_mllm.data.questions import Question
from xformer_mllm.embedded import benchmarks as scenes
from xformer_mllm.embedded.benchmarks import Scenes
from xformer_mllm.embedded.scenes import SceneQuestions
from xformer_mllm.evaluate import evaluation as run
from xformer_mllm.files import read_json, read_json_lines
from xformer_mllm.inference import GenerationSettings

SIZE = ["--size", "6", "--questions-per-image", "2"]


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
    metrics = run.score(run.ScoreConfig(answers=tmp_path / "mine.json", size=3, questions_per_image=2))
    assert metrics["scores"]["all"]["accuracy"] == 1.0


def test_ids_that_do_not_match_are_counted_and_named(tmp_path, capsys):
    ids = [record.id for record in Scenes("test", 3, 2).records]
    rows = [{"id": name, "answer": "yes"} for name in [*ids[1:], ids[1], "nobody"]]
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    line = refusal(capsys, "score", tmp_path / "mine.json", "--size", "3", "--questions-per-image", "2")
    assert f"1 repeated ({ids[1]}); 1 unknown (nobody); 1 missing ({ids[0]})" in line
    (tmp_path / "mine.json").write_text(json.dumps(rows[:-2]))
    words = ("score", tmp_path / "mine.json", "--size", "3", "--questions-per-image", "2")
    assert refusal(capsys, *words).endswith("--partial scores the others")
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
    assert "a stage-2 model; this needs a stage-1" in refusal(capsys, "evaluate", runs / "stage2", *words)
    assert "has no official results file" in refusal(capsys, "score", output / "ranking.json", *words)


def test_invalid_names_are_refused_before_loading(tmp_path, capsys):
    evaluate = ("evaluate", tmp_path / "none")
    assert "unknown benchmark 'vqa'" in refusal(capsys, *evaluate, "--benchmark", "vqa")
    assert "has the splits test, validation" in refusal(capsys, *evaluate, "--split", "train")
    assert "has the settings greedy" in refusal(capsys, *evaluate, "--settings", "lavis")
    assert "gqa needs --data DIR" in refusal(capsys, *evaluate, "--benchmark", "gqa")
    assert "no trained model" in refusal(capsys, *evaluate)
    gqa = tmp_path / "gqa"
    assert main(["data", "export", "gqa", "--size", "2", "--output-dir", str(gqa)]) == 0
    for prompt in ("Answer:", ""):
        line = refusal(capsys, *evaluate, "--benchmark", "gqa", "--data", gqa, "--prompt", prompt)
        assert "{question}" in line


@pytest.mark.parametrize(
    "name", ["size", "questions-per-image", "batch-size", "num-beams", "max-new-tokens", "k-test"]
)
def test_an_invalid_number_is_refused(name, tmp_path, capsys):
    line = refusal(capsys, "evaluate", tmp_path / "none", f"--{name}", "0")
    assert line == f"xformer: --{name} must be at least 1, not 0"


def test_captions_may_be_asked_for_with_any_prompt(tmp_path):
    assert main(["data", "export", "nocaps", "--size", "3", "--output-dir", str(tmp_path / "nocaps")]) == 0
    config = run.EvaluateConfig(model=tmp_path, benchmark="nocaps", data=tmp_path / "nocaps", prompt="it shows")
    assert run.settings_of(config, run.open_benchmark(config)).prompt == "it shows"


def gqa_of_scenes(folder):
    assert main(["data", "export", "gqa", "--size", "2", "--output-dir", str(folder)]) == 0
    return ["--benchmark", "gqa", "--data", str(folder)]


def test_exported_scenes_are_called_so(runs, tmp_path, capsys):
    output, words = tmp_path / "out", gqa_of_scenes(tmp_path / "gqa")
    evaluate = ["evaluate", str(runs / "stage2"), *words, "--num-beams", "1", "--output-dir", str(output)]
    capsys.readouterr()
    assert main(evaluate) == 0
    note = "the embedded scenes in the format of gqa, not gqa itself"
    assert note in capsys.readouterr().out
    assert note in (output / "report.html").read_text()
    metrics = read_json(output / "metrics.json")
    assert metrics["notes"] == [note]
    assert metrics["exported_scenes"]
    assert main(["score", str(output / "official.json"), *words]) == 0
    assert note in capsys.readouterr().out
    (tmp_path / "gqa" / "export.json").unlink()  # the official data have none
    assert main(evaluate) == 0
    assert not read_json(output / "metrics.json")["exported_scenes"]


def test_without_any_answer_there_are_no_results(runs, tmp_path, capsys):
    data, output = tmp_path / "gqa", tmp_path / "out"
    words = gqa_of_scenes(data)
    evaluate = ["evaluate", str(runs / "stage2"), *words, "--num-beams", "1", "--output-dir", str(output)]
    (data / "images").rename(data / "elsewhere")
    line = refusal(capsys, *evaluate)
    assert "records has an answer, e.g. " in line
    assert "n1.jpg: no such image" in line
    assert line.endswith("; --images names the folder of the images")
    assert not list(output.iterdir())
    (data / "elsewhere").rename(data / "images")
    assert main(evaluate) == 0  # and what could not be read then is not remembered
    (tmp_path / "empty.json").write_text("[]")
    for partial in ([], ["--partial"]):
        assert refusal(capsys, "score", tmp_path / "empty.json", *words, *partial).endswith("holds no answers")


def test_results_with_other_settings_are_not_overwritten(runs, tmp_path, capsys):
    shutil.copytree(runs / "stage2", tmp_path / "run")
    words = ["evaluate", str(tmp_path / "run"), *SIZE, "--max-new-tokens", "2"]
    assert main(words) == 0
    folder = tmp_path / "run" / "evaluation" / "scenes-test"
    before = (folder / "metrics.json").read_text()
    for other, difference in (
        (["--max-new-tokens", "3"], "--max-new-tokens 2, not 3"),
        (["--size", "5", "--seed", "1"], "--size 6, not 5; --seed 0, not 1"),
    ):
        line = refusal(capsys, *words, *other)
        assert line == f"xformer: {folder}: holds results with {difference}; name another --output-dir"
    assert (folder / "metrics.json").read_text() == before
    (tmp_path / "run").rename(tmp_path / "moved")
    assert main(["evaluate", str(tmp_path / "moved" / "model"), *words[2:]]) == 0  # equal ones are
    named = ["--output-dir", tmp_path / "moved" / "evaluation" / "scenes-test"]
    assert "holds results with --model '" in refusal(capsys, "evaluate", runs / "stage2", *words[2:], *named)


def test_models_in_one_folder_have_their_own_evaluations(runs, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(runs / "stage2" / "model", tmp_path / name)
        config = run.EvaluateConfig(model=tmp_path / name, size=2, max_new_tokens=1)
        assert run.evaluate(config)["answered"] == 8
        assert (tmp_path / name / "evaluation" / "scenes-test" / "metrics.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_a_prompt_can_be_too_long(runs, tmp_path, capsys):
    words = [*SIZE, "--prompt", "{question} " + "what " * 300, "--output-dir", tmp_path / "out"]
    line = refusal(capsys, "evaluate", runs / "stage2", *words)
    assert "tokens with the image's, the language model reads at most 256" in line


def test_other_files_name_the_results_file(runs, tmp_path, capsys):
    assert main(["evaluate", str(runs / "stage2"), *SIZE, "--output-dir", str(tmp_path)]) == 0
    for name in ("predictions.jsonl", "metrics.json"):
        line = refusal(capsys, "score", tmp_path / name, *SIZE)
        assert line.endswith(f"; the file to score is {tmp_path / 'official.json'}")


@pytest.mark.parametrize("text", ["[" * 100_000, '[{"id": ' + "1" * 5000 + ', "answer": "red"}]'])
def test_results_that_python_cannot_hold_are_one_line_of_the_file(tmp_path, capsys, text):
    (tmp_path / "answers.json").write_text(text)
    line = refusal(capsys, "score", tmp_path / "answers.json", *SIZE)
    assert line.startswith(f"xformer: {tmp_path / 'answers.json'}: ")


def test_settings_can_be_replaced_one_by_one(tmp_path):
    config = run.EvaluateConfig(model=tmp_path, num_beams=5, prompt="{question}?", size=1)
    settings = run.settings_of(config, run.open_benchmark(config))
    assert (settings.num_beams, settings.prompt, settings.max_new_tokens) == (5, "{question}?", 8)


def test_a_question_as_lavis_asks_it():
    record = Question("1", "1", 'What is "this" (thing): a.b ' + "x " * 60 + "?", None, "")
    settings = GenerationSettings(
        prompt="Q: {question} A:", num_beams=1, length_penalty=0.0, max_new_tokens=1, plain_question=True
    )
    assert settings.prompt_for(record.question) == f"Q: what is this thing ab{' x' * 45} A:"


def test_table_prints_shares_times_100_and_leaves_gaps():
    text = run.table({"all": {"accuracy": 0.5, "n": 2000, "ci95": [0.25, 0.75]}, "far": {"MAE": 1.5, "n": 3}})
    assert text.splitlines()[2].split() == ["all", "50.0", "[25.0,", "75.0]", "2,000"]
    assert text.splitlines()[3].split() == ["far", "3", "1.50"]
