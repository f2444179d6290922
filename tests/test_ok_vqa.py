"""OK-VQA on small files in the official format: stemmed and typed answers, types of question by their names."""

import json

import pytest

from xformer_mllm.evaluate.ok_vqa import OkVqa

QUESTIONS = "OpenEnded_mscoco_val2014_questions.json"
ANNOTATIONS = "mscoco_val2014_annotations.json"
TYPES = {"four": "Sports and Recreation", "eight": "Plants and Animals", "other": "Other"}


def annotation(number, question_type, answers):
    """answers: (stemmed, typed) of each annotator, counted twice as in the set."""
    twice = [answer for answer in answers for _ in range(2)]
    return {
        "image_id": number + 100,
        "answer_type": "other",
        "question_type": question_type,
        "question_id": number,
        "answers": [
            {"answer_id": place, "raw_answer": typed, "answer_confidence": "yes", "answer": stemmed}
            for place, (stemmed, typed) in enumerate(twice, 1)
        ],
        "confidence": 3,
    }


ROWS = [
    annotation(1, "eight", [("dog", "dogs")] * 4 + [("wolf", "wolf")]),
    annotation(2, "four", [("surf", "surfing")] * 3 + [("race", "race")] * 2),
    annotation(3, "four", [("ball", "ball")] * 5),
]


@pytest.fixture
def data(tmp_path):
    head = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": "val2014"}
    questions = [{"image_id": n + 100, "question": f"Which {n}?", "question_id": n} for n in (1, 2, 3)]
    (tmp_path / QUESTIONS).write_text(json.dumps({**head, "task_type": "OpenEnded", "questions": questions}))
    (tmp_path / ANNOTATIONS).write_text(json.dumps({**head, "annotations": ROWS, "question_types": TYPES}))
    return tmp_path


def change(data, annotations):
    (data / ANNOTATIONS).write_text(json.dumps({"annotations": annotations, "question_types": TYPES}))


def test_all_answers_are_scored_stemmed_and_as_typed(data):
    benchmark = OkVqa(data, "val")
    typed = benchmark.score({"1": "dogs", "2": "surfing", "3": "ball"})
    assert typed["all"] == {"accuracy": pytest.approx(1 / 3), "n": 3}
    assert typed["raw answers"] == {"accuracy": 1.0, "n": 3}
    stemmed = benchmark.score({"1": "dog", "2": "surf", "3": "ball"})
    assert stemmed["all"] == {"accuracy": 1.0, "n": 3}
    assert stemmed["raw answers"]["accuracy"] == pytest.approx(1 / 3)


def test_groups_are_the_named_types_of_question(data):
    scores = OkVqa(data, "val").score({"1": "dog", "2": "race", "3": "bat"})
    assert list(scores) == ["all", "raw answers", "question:Plants and Animals", "question:Sports and Recreation"]
    assert scores["question:Plants and Animals"] == {"accuracy": 1.0, "n": 1}
    assert scores["question:Sports and Recreation"] == {"accuracy": 0.5, "n": 2}, "stemmed, as 'all'"


def test_only_answered_questions_are_scored(data):
    benchmark = OkVqa(data, "val")
    assert benchmark.score({"3": "ball"})["raw answers"] == {"accuracy": 1.0, "n": 1}
    assert benchmark.score({}) == {"all": {"n": 0}}


def test_records(data):
    benchmark = OkVqa(data, "val")
    record = benchmark.records[0]
    assert (record.id, record.image_id, record.question) == ("1", "101", "Which 1?")
    assert (record.answer, record.question_type) == ("dog", "Plants and Animals")
    assert record.answers == ("dog",) * 8 + ("wolf",) * 2
    assert benchmark.credit(record, "dog") == 1.0
    assert benchmark.image_file(record) == data / "val2014" / "COCO_val2014_000000000101.jpg"
    assert benchmark.official({"1": "dog"}) == [{"question_id": 1, "answer": "dog"}]
    assert benchmark.read_official([{"question_id": 1, "answer": "dog"}]) == [("1", "dog")]


def test_an_answer_without_its_typed_form_is_named(data):
    broken = annotation(1, "eight", [("dog", "dogs")] * 5)
    del broken["answers"][3]["raw_answer"]
    change(data, [broken, *ROWS[1:]])
    with pytest.raises(ValueError, match=rf'{ANNOTATIONS}: annotations\[0\]: answers\[3\]: "raw_answer" is missing'):
        OkVqa(data, "val")


def test_a_question_without_its_annotation_is_named(data):
    change(data, ROWS[:2])
    with pytest.raises(ValueError, match=rf"{ANNOTATIONS}: lacks 1 question ids of .*{QUESTIONS} \(first: 3\)"):
        OkVqa(data, "val")
