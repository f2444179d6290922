"""Scores, intervals and comparisons against cases worked by hand; answering with a model small enough for a test."""

import json
import math

import pytest
import torch
from PIL import Image

from xformer_mllm.data.questions import QUESTION_PROMPT, Question
from xformer_mllm.data.scenes import SceneQuestions
from xformer_mllm.evaluate import questions
from xformer_mllm.evaluate.questions import (
    Blind,
    EvaluateConfig,
    answer_questions,
    compare,
    evaluate,
    questions_of,
    read_predictions,
    score,
    training_questions,
    wilson,
    write_predictions,
)


def row(number, correct, kind="count", image=None, semantic=None, answer="1", question="how many?"):
    return {
        "id": str(number),
        "image_id": str(number if image is None else image),
        "question": question,
        "question_type": kind,
        "structural": None,
        "semantic": semantic,
        "answer": answer,
        "prediction": answer if correct else "wrong",
        "correct": correct,
    }


def test_wilson_against_the_textbook():
    low, high = wilson(81, 263)  # Newcombe 1998, table I, method 3
    assert math.isclose(low, 0.2553, abs_tol=5e-5)
    assert math.isclose(high, 0.3662, abs_tol=5e-5)
    assert wilson(0, 10)[0] == 0.0
    assert wilson(10, 10)[1] == pytest.approx(1.0)
    assert all(0 <= end <= 1 for n in range(11) for end in wilson(n, 10))
    assert math.isclose(wilson(0, 20)[1], 0.1611, abs_tol=5e-5)


def test_scores_by_group():
    rows = [row(0, True), row(1, False), row(2, True, "colour", semantic="attribute"), row(3, True, "colour")]
    scores = score(rows)
    assert list(scores) == ["all", "colour", "count", "semantic:attribute"]
    assert scores["all"]["accuracy"] == 0.75
    assert scores["count"] == {"accuracy": 0.5, "n": 2, "ci95": wilson(1, 2)}
    assert scores["semantic:attribute"]["n"] == 1


def test_the_blind_baselines_are_learned_from_training_questions_alone():
    training = [Question(str(n), "p", "how many?", answer, "count") for n, answer in enumerate("1122233")]
    training += [Question("x", "p", "how many reds?", "3", "count"), Question("y", "p", "which?", "red", "colour")]
    blind = Blind.learn(training)
    rows = [
        row(0, False, answer="2"),
        row(1, True, answer="3", question="how many reds?"),
        row(2, True, answer="9"),
        row(3, True, "never seen", answer="2"),
    ]
    scores = score(rows, blind)
    assert scores["count"]["majority"] == pytest.approx(1 / 3)
    assert scores["count"]["question_only"] == pytest.approx(2 / 3)
    assert scores["never seen"]["majority"] == 0.0


def test_compare_counts_and_finds_a_clear_difference():
    first = [row(n, n < 40) for n in range(100)]
    second = [row(n, n < 70) for n in range(100)]
    entry = compare(first, second)["all"]
    assert entry["difference"] == pytest.approx(0.3)
    assert (entry["only_first"], entry["only_second"], entry["n"]) == (0, 30, 100)
    deviation = math.sqrt(0.3 * 0.7 / 100)
    assert entry["ci95"] == pytest.approx([0.3 - 1.96 * deviation, 0.3 + 1.96 * deviation], abs=0.02)
    assert entry["clear"]
    turned = compare(second, first)["all"]
    assert turned["difference"] == pytest.approx(-0.3)
    assert turned["clear"]


def test_five_disagreements_tell_nothing():
    for number, clear in ((5, False), (6, True)):
        entry = compare([row(n, False) for n in range(6)], [row(n, n < number) for n in range(6)])["all"]
        assert entry["only_second"] == number
        assert entry["clear"] is clear


def test_no_difference_is_not_clear():
    rows = [row(n, n % 2 == 0) for n in range(60)]
    entry = compare(rows, [row(n, n % 2 == 1) for n in range(60)])["all"]
    assert entry["difference"] == 0
    assert not entry["clear"]
    assert compare(rows, rows)["all"]["ci95"] == [0.0, 0.0]


def test_questions_on_one_picture_stand_or_fall_together():
    gains = [n % 3 == 0 for n in range(60)]
    alone = compare([row(n, False) for n in range(60)], [row(n, gains[n]) for n in range(60)])["all"]["ci95"]
    first = [row(n, False, image=n // 4) for n in range(240)]
    fourfold = compare(first, [row(n, gains[n // 4], image=n // 4) for n in range(240)])["all"]["ci95"]
    assert fourfold[1] - fourfold[0] == pytest.approx(alone[1] - alone[0], abs=0.03)  # not half as wide


def test_compare_refuses_other_questions():
    with pytest.raises(ValueError, match="not about the same questions"):
        compare([row(0, True)], [row(1, True)])


def test_predictions_survive_the_disk(tmp_path):
    rows = [row(0, True), row(1, False, answer="grün\u2028")]
    write_predictions(tmp_path / "predictions.jsonl", rows)
    assert read_predictions(tmp_path / "predictions.jsonl") == rows
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.jsonl"]


class Tokenizer:
    def batch_decode(self, tokens, skip_special_tokens):
        return [f" {number} " for number in tokens[:, 0].tolist()]


class Batch(dict):
    def to(self, device):
        return self


class Processor:
    """A picture's one number is its red; a text's one token is how long it is."""

    tokenizer = Tokenizer()

    def __call__(self, images=None, text=None, **_):
        if images is not None:
            reds = [image.getpixel((0, 0))[0] for image in images]
            return Batch(pixel_values=torch.tensor(reds, dtype=torch.float32)[:, None])
        ids = torch.tensor([[len(prompt)] for prompt in text])
        return Batch(input_ids=ids, attention_mask=torch.ones_like(ids))


class Model(torch.nn.Linear):
    """Answers with the picture's number, so that a picture given to the wrong question is seen."""

    def __init__(self):
        super().__init__(1, 1)
        self.encoded = 0

    def generate(self, pixels, image_index, input_ids, attention_mask, **_):
        self.encoded += len(pixels)
        assert len(image_index) == len(input_ids)
        return pixels[image_index].long()


def items():
    return [
        {
            **row(n, True, image=n // 3, answer=str(7 * (n // 3)), question="q" * (n % 3 + 1)),
            "image": Image.new("RGB", (2, 2), (7 * (n // 3), 0, 0)),
        }
        for n in range(10)
    ]


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_every_question_gets_the_answer_about_its_own_picture(batch_size):
    predictions = answer_questions(Model(), Processor(), items(), batch_size, progress=False)
    assert [p["prediction"] for p in predictions] == ["0"] * 3 + ["7"] * 3 + ["14"] * 3 + ["21"]
    assert all(p["correct"] for p in predictions)
    assert [p["id"] for p in predictions] == [str(n) for n in range(10)]
    assert "image" not in predictions[0]


def test_a_picture_is_encoded_once_for_all_its_questions_in_a_batch():
    model = Model()
    answer_questions(model, Processor(), items(), batch_size=100, progress=False)
    assert model.encoded == 4


def test_case_and_space_do_not_matter():
    assert questions.normalised(" Yes\n") == questions.normalised("yes")
    assert questions.normalised("yes") != questions.normalised("yes.")


def test_scenes_training_questions_are_of_the_training_split(monkeypatch):
    monkeypatch.setattr(questions, "TRAINING_SCENES", 5)
    asked = list(training_questions("scenes", questions_per_picture=3))
    expected = SceneQuestions("train", 5, questions_per_scene=3)
    assert [question.id for question in asked] == [expected[n]["id"] for n in range(15)]


def test_unknown_data_and_missing_model_say_so(tmp_path):
    with pytest.raises(ValueError, match="no questions called 'gqa'"):
        questions_of("gqa", "test", 1)
    with pytest.raises(FileNotFoundError, match="no trained model there"):
        evaluate(EvaluateConfig(model=tmp_path, size=1))


def test_evaluate_writes_predictions_and_scores(tmp_path, monkeypatch):
    monkeypatch.setattr(questions, "TRAINING_SCENES", 50)
    monkeypatch.setattr(questions, "load_model", lambda folder, kinds: (Model(), Processor()))
    monkeypatch.setattr(questions, "model_folder", lambda folder: folder / "model")
    evaluate(EvaluateConfig(model=tmp_path / "stage2", size=6, questions_per_picture=2))
    folder = tmp_path / "stage2" / "questions-scenes-test"
    metrics = json.loads((folder / "metrics.json").read_text())
    predictions = read_predictions(folder / "predictions.jsonl")
    assert metrics["scores"]["all"]["n"] == len(predictions) == 12
    assert metrics["scores"]["all"]["accuracy"] == sum(p["correct"] for p in predictions) / 12
    assert metrics["prompt"] == QUESTION_PROMPT
    assert metrics["config"]["size"] == 6
    assert {path.name for path in folder.iterdir()} == {"metrics.json", "predictions.jsonl"}
