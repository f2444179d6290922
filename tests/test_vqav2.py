"""VQAv2 on small files in the official format; scores against the official vqaEval.py's (fixtures/vqa_accuracy.json)."""

import json
from pathlib import Path

import pytest
from PIL import Image

from xformer_mllm.commands import BenchmarkConfig
from xformer_mllm.data.questions import Question
from xformer_mllm.evaluate.evaluation import open_benchmark
from xformer_mllm.evaluate.vqav2 import Vqav2

OFFICIAL = json.loads((Path(__file__).parent / "fixtures" / "vqa_accuracy.json").read_text())
QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
ANNOTATIONS = "v2_mscoco_val2014_annotations.json"
HEAD = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": "val2014"}


def question(number, image_id=42, text="How many?"):
    return {"image_id": image_id, "question": text, "question_id": number}


def annotation(number, answers=("2",) * 10, question_type="how many", answer_type="number", image_id=42):
    return {
        "question_type": question_type,
        "multiple_choice_answer": answers[0],
        "answers": [
            {"answer": answer, "answer_confidence": "yes", "answer_id": place}
            for place, answer in enumerate(answers, 1)
        ],
        "image_id": image_id,
        "answer_type": answer_type,
        "question_id": number,
    }


def write(folder, questions, annotations):
    (folder / QUESTIONS).write_text(json.dumps({**HEAD, "task_type": "Open-Ended", "questions": questions}))
    (folder / ANNOTATIONS).write_text(json.dumps({**HEAD, "annotations": annotations}))
    return folder


@pytest.fixture
def small(tmp_path):
    """Question 7 about image 42, question 5 about image 43; the annotations stand in another order."""
    return write(
        tmp_path,
        [question(7), question(5, 43, "Is it red?")],
        [annotation(5, ("no",) * 4 + ("yes",) * 6, "is it", "yes/no", 43), annotation(7)],
    )


def test_records_are_in_the_question_file_s_order(small):
    first, second = Vqav2(small, "val").records
    assert first == Question("7", "42", "How many?", "2", "how many", answers=("2",) * 10)
    assert (second.id, second.image_id, second.question, second.answer) == ("5", "43", "Is it red?", "yes")
    assert second.answers == ("no",) * 4 + ("yes",) * 6


def test_scores_equal_the_official_ones(tmp_path):
    """All fixture cases at once: overall, per answer type and per question type, as vqaEval.py rounds them."""
    cases = OFFICIAL["cases"]
    rows = [annotation(n, c["answers"], c["question_type"], c["answer_type"]) for n, c in enumerate(cases)]
    benchmark = Vqav2(write(tmp_path, [question(n) for n in range(len(cases))], rows), "val")
    scores = benchmark.score({str(n): c["prediction"] for n, c in enumerate(cases)})
    percent = {group: round(100 * score["accuracy"], 2) for group, score in scores.items()}
    by_question = {f"question:{kind}": value for kind, value in OFFICIAL["overall"]["perQuestionType"].items()}
    assert percent == {"all": OFFICIAL["overall"]["overall"], **OFFICIAL["overall"]["perAnswerType"], **by_question}
    assert next(iter(scores)) == "all"
    assert scores["all"]["n"] == len(cases)
    assert sum(scores[kind]["n"] for kind in ("yes/no", "number", "other")) == len(cases)


def test_only_answered_questions_are_scored(small):
    benchmark = Vqav2(small, "val")
    assert benchmark.score({"7": "2"}) == {
        "all": {"accuracy": 1.0, "n": 1},
        "number": {"accuracy": 1.0, "n": 1},
        "question:how many": {"accuracy": 1.0, "n": 1},
    }
    assert benchmark.score({"7": "", "5": "no"})["all"] == {"accuracy": 0.5, "n": 2}, "an empty answer is a wrong one"
    assert benchmark.score({}) == {"all": {"n": 0}}


def test_credit_is_the_accuracy_of_one_answer(small):
    benchmark = Vqav2(small, "val")
    assert benchmark.credit(benchmark.records[0], "two") == 0.0, "all agree: compared as it stands"
    assert benchmark.credit(benchmark.records[1], "No.") == 1.0


def test_the_official_results_file_and_back(small):
    benchmark = Vqav2(small, "val")
    results = benchmark.official({"5": "no", "7": "2"})
    assert results == [{"question_id": 7, "answer": "2"}, {"question_id": 5, "answer": "no"}]
    assert benchmark.read_official(json.loads(json.dumps(results))) == [("7", "2"), ("5", "no")]
    twice = [{"question_id": 7, "answer": "2"}, {"question_id": 7, "answer": "3", "more": 1}]
    assert benchmark.read_official(twice) == [("7", "2"), ("7", "3")], "repeated ids are for the caller to see"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"7": "2"}, "not a list"),
        ([{"question_id": 7, "answer": "2"}, {"answer": "2"}], 'entry 1: "question_id" is missing'),
        ([{"question_id": 7}], 'entry 0: "answer" is missing'),
        ([{"question_id": "7", "answer": "2"}], '"question_id" is missing or not of type int'),
        ([{"question_id": True, "answer": "2"}], '"question_id" is missing or not of type int'),
        ([{"question_id": 7, "answer": None}], '"answer" is missing or not of type str'),
        (["2"], 'entry 0: "question_id" is missing'),
    ],
)
def test_results_of_another_form(small, content, message):
    with pytest.raises(ValueError, match=message) as error:
        Vqav2(small, "val").read_official(content)
    assert '[{"question_id": int, "answer": str}, ...]' in str(error.value)


@pytest.mark.parametrize(("split", "file"), [("test-dev", "test-dev2015"), ("test", "test2015")])
def test_a_test_split_has_no_answers(tmp_path, split, file):
    (tmp_path / f"v2_OpenEnded_mscoco_{file}_questions.json").write_text(json.dumps({"questions": [question(7)]}))
    benchmark = Vqav2(tmp_path, split)
    (record,) = benchmark.records
    assert (record.answer, record.answers, record.question_type) == (None, (), "")
    assert benchmark.credit(record, "2") is None
    assert benchmark.score({"7": "2"}) == {"all": {"n": 1}}
    assert "accuracy" in benchmark.not_computed
    assert bool(benchmark.notes) == (split == "test-dev"), "the server takes test-dev as a part of test"
    assert benchmark.official({"7": "2"}) == [{"question_id": 7, "answer": "2"}]
    assert benchmark.image_file(record) == tmp_path / "test2015" / "COCO_test2015_000000000042.jpg"


def test_a_split_with_answers_says_nothing_of_missing_scores(small):
    benchmark = Vqav2(small, "val")
    assert not benchmark.not_computed
    assert not benchmark.notes


def test_images_are_read_where_coco_has_them_or_where_told(small, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("images")
    for folder in (small / "val2014", elsewhere):
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (3, 2), "red").save(folder / "COCO_val2014_000000000042.jpg")
    for benchmark in (Vqav2(small, "val"), Vqav2(small, "val", elsewhere)):
        assert benchmark.load(benchmark.records[0]).size == (3, 2)
        with pytest.raises(FileNotFoundError, match="COCO_val2014_000000000043"):
            benchmark.load(benchmark.records[1])
    assert Vqav2(small, "val", elsewhere).image_file(benchmark.records[0]).parent == elsewhere


@pytest.mark.parametrize("name", [QUESTIONS, ANNOTATIONS])
def test_a_missing_file_is_named_with_all_that_is_needed(small, name):
    (small / name).unlink()
    with pytest.raises(FileNotFoundError) as error:
        Vqav2(small, "val")
    assert str(error.value) == f"{small / name}: no such file"
    with pytest.raises(FileNotFoundError) as error:  # and everything that is needed, where the user sees it
        open_benchmark(BenchmarkConfig(benchmark="vqav2", data=small))
    assert Vqav2.files in str(error.value)


def without(row, key):
    return {name: value for name, value in row.items() if name != key}


@pytest.mark.parametrize(
    ("questions", "annotations", "message"),
    [
        ([question(7), question(7)], [annotation(7)], rf"{QUESTIONS}: questions\[1\] repeats question_id 7"),
        ([question(7)], [annotation(7), annotation(7)], rf"{ANNOTATIONS}: annotations\[1\] repeats question_id 7"),
        ([question(7), question(8)], [annotation(7)], rf"{ANNOTATIONS}: lacks 1 question ids of .*\(first: 8\)"),
        ([question(7)], [annotation(7), annotation(9)], rf"{QUESTIONS}: lacks 1 question ids of .*\(first: 9\)"),
        ([without(question(7), "image_id")], [annotation(7)], rf'{QUESTIONS}: questions\[0\]: "image_id" is missing'),
        ([question(7), "?"], [annotation(7)], rf'{QUESTIONS}: questions\[1\]: "question_id" is missing'),
        ([question("7")], [annotation(7)], r'questions\[0\]: "question_id" is missing or not of type int'),
        (
            [question(7)],
            [without(annotation(7), "answers")],
            rf'{ANNOTATIONS}: annotations\[0\]: "answers" is missing',
        ),
        ([question(7)], [annotation(7) | {"answers": []}], r'annotations\[0\]: "answers" is empty'),
        ([question(7)], [annotation(7) | {"answers": [{}]}], r'annotations\[0\]: answers\[0\]: "answer" is missing'),
        (
            [question(7)],
            [annotation(7) | {"answers": [{"answer": 2}]}],
            '"answer" is missing or not of type str',
        ),
        ([question(7)], [without(annotation(7), "answer_type")], r'annotations\[0\]: "answer_type" is missing'),
        ({}, [annotation(7)], rf'{QUESTIONS}: "questions" is missing or not of type list'),
    ],
)
def test_malformed_files_are_named_with_index_and_key(tmp_path, questions, annotations, message):
    with pytest.raises(ValueError, match=message) as error:
        Vqav2(write(tmp_path, questions, annotations), "val")
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_settings_of_the_paper_come_first():
    assert list(Vqav2.settings) == ["paper", "lavis"]
    record = Question("7", "42", "How many?", None, "")
    assert Vqav2.settings["paper"].prompt_for(record.question) == "Question: How many? Answer:"
    assert Vqav2.settings["lavis"].prompt_for(record.question) == "Question: how many? Short answer:"
    assert [settings.length_penalty for settings in Vqav2.settings.values()] == [-1.0, 0.0]
    assert {(settings.num_beams, settings.max_new_tokens) for settings in Vqav2.settings.values()} == {(5, 10)}
