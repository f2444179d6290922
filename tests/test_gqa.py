"""GQA's scores against those that its own eval.py and LAVIS's normalisation gave (tests/fixtures/gqa.json)."""

import copy
import json
from pathlib import Path

import pytest

from xformer_mllm.evaluate.gqa import Gqa, gqa_scores

FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "gqa.json").read_text(encoding="utf-8"))
QUESTIONS, CHOICES, EXPECTED = FIXTURE["questions"], FIXTURE["choices"], FIXTURE["expected"]
PREDICTIONS = {row["questionId"]: row["prediction"] for row in FIXTURE["predictions"]}
BALANCED = {name: question for name, question in QUESTIONS.items() if question["isBalanced"]}
FIRST = next(iter(QUESTIONS))

# eval.py's names of the semantic types, in the files and here
TYPES = {"attr": "attribute", "cat": "category", "global": "global", "obj": "object", "rel": "relation"}


@pytest.fixture
def data(tmp_path):
    """A data folder in GQA's format."""
    write(tmp_path / "val_all_questions.json", QUESTIONS)
    write(tmp_path / "val_balanced_questions.json", BALANCED)
    write(tmp_path / "testdev_balanced_questions.json", BALANCED)
    write(tmp_path / "val_choices.json", CHOICES)
    return tmp_path


def write(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")


def test_the_main_scores_are_those_of_the_official_script(data):
    scores = Gqa(data, "val-all").score(PREDICTIONS)
    assert next(iter(scores)) == "all"
    for metric in ("accuracy", "consistency", "validity", "plausibility"):
        assert 100 * scores["all"][metric] == pytest.approx(EXPECTED[metric]), metric
    assert scores["all"]["distribution"] == pytest.approx(EXPECTED["distribution"])
    assert scores["all"]["n"] == len(BALANCED)
    assert 100 * scores["binary"]["accuracy"] == pytest.approx(EXPECTED["binary"])
    assert 100 * scores["open"]["accuracy"] == pytest.approx(EXPECTED["open"])
    assert scores["binary"]["n"] + scores["open"]["n"] == len(BALANCED)


@pytest.mark.parametrize(
    ("official", "prefix"),
    [
        ("accuracyPerStructuralType", "structural"),
        ("accuracyPerSemanticType", "semantic"),
        ("accuracyPerSteps", "steps"),
        ("accuracyPerLength", "words"),
    ],
)
def test_the_scores_by_group_are_those_of_the_official_script(data, official, prefix):
    scores = Gqa(data, "val-all").score(PREDICTIONS)
    found = {label: group for label, group in scores.items() if label.startswith(prefix + ":")}
    expected = {f"{prefix}:{TYPES.get(name, name)}": values for name, values in EXPECTED[official].items()}
    assert set(found) == set(expected)
    for label, (accuracy, n) in expected.items():
        assert found[label] == {"accuracy": pytest.approx(accuracy / 100), "n": n}


def test_the_score_of_the_answers_as_submitted_is_the_official_scripts(data):
    scores = Gqa(data, "val-all").score(PREDICTIONS)
    expected = {name: value / (1 if name == "distribution" else 100) for name, value in EXPECTED["uncleaned"].items()}
    assert scores["official, uncleaned"] == pytest.approx(expected | {"n": len(BALANCED)})
    assert scores["official, uncleaned"]["accuracy"] < scores["all"]["accuracy"]
    capitals = Gqa(data, "val").score({FIRST: QUESTIONS[FIRST]["answer"].upper()})
    assert (capitals["all"]["accuracy"], capitals["official, uncleaned"]["accuracy"]) == (1.0, 0.0)


def test_lengths_are_in_the_order_of_numbers(data):
    labels = [label for label in Gqa(data, "val-all").score(PREDICTIONS) if label.startswith("words:")]
    assert labels == sorted(labels, key=lambda label: int(label.split(":")[1]))
    assert labels[-1] == "words:10"


def test_laviss_normalisation_is_a_score_of_its_own(data):
    scores = Gqa(data, "val-all").score(PREDICTIONS)
    assert 100 * scores["lavis normalisation"]["accuracy"] == pytest.approx(EXPECTED["lavisAccuracy"])
    assert scores["lavis normalisation"]["accuracy"] > scores["all"]["accuracy"]
    question = {FIRST: QUESTIONS[FIRST] | {"answer": "dog"}}
    right = gqa_scores(question, {FIRST: "The dog."})
    assert (right["all"]["accuracy"], right["lavis normalisation"]["accuracy"]) == (0.0, 1.0)


def test_missing_files_of_gqa_are_named_with_the_scores(data):
    testdev, val, everything = (Gqa(data, split) for split in ("testdev", "val", "val-all"))
    assert set(testdev.not_computed) == {"consistency", "validity", "plausibility"}
    assert "testdev-all" in testdev.not_computed["consistency"]
    assert "testdev_choices.json" in testdev.not_computed["validity"]
    assert set(val.not_computed) == {"consistency"}
    assert not everything.not_computed
    answers = {name: PREDICTIONS[name] for name in BALANCED}
    scores = {benchmark: set(benchmark.score(answers)["all"]) for benchmark in (testdev, val)}
    assert scores[testdev] == {"accuracy", "distribution", "n"}
    assert scores[val] == {"accuracy", "distribution", "validity", "plausibility", "n"}
    assert testdev.score(answers)["all"]["accuracy"] == everything.score(PREDICTIONS)["all"]["accuracy"]


def test_only_answered_questions_are_scored(data):
    benchmark = Gqa(data, "val-all")
    first, second = list(BALANCED)[:2]
    scores = benchmark.score({first: BALANCED[first]["answer"].upper(), second: "something else"})
    assert scores["all"]["accuracy"] == 0.5
    assert scores["all"]["n"] == 2
    assert benchmark.score({}) == {"all": {"n": 0}}
    unbalanced = next(name for name in QUESTIONS if name not in BALANCED)
    assert benchmark.score({unbalanced: "yes"}) == {"all": {"n": 0}}


def chain():
    """Three questions: the first entails itself, the second, and one that is in no file."""
    chain = {name: copy.deepcopy(QUESTIONS[FIRST]) | {"answer": "yes", "entailed": []} for name in "abc"}
    chain["a"]["entailed"] = ["a", "b", "c", "elsewhere"]
    return chain


def test_consistency_counts_entailed_questions():
    consistent = [
        gqa_scores(chain(), answers, consistency=True)["all"]["consistency"]
        for answers in (
            {"a": "yes", "b": "yes", "c": "no"},
            {"a": "yes", "b": "yes"},
            {"a": "no", "b": "yes", "c": "yes"},
        )
    ]
    assert consistent == [0.5, 1.0, 0.0]


def test_questions_without_a_group_have_no_distribution():
    questions = chain()
    for question in questions.values():
        question["groups"] = {"global": None, "local": "x"}
    assert "distribution" not in gqa_scores(questions, dict.fromkeys("abc", "yes"))["all"]


def test_records_have_gqas_types_and_images(data):
    benchmark = Gqa(data, "val-all")
    record = benchmark.records[0]
    question = QUESTIONS[FIRST]
    assert [record.id for record in benchmark.records] == list(QUESTIONS)
    assert (record.question, record.answer, record.image_id) == tuple(
        question[key] for key in ("question", "answer", "imageId")
    )
    assert (record.structural, record.semantic) == (question["types"]["structural"], "attribute")
    assert benchmark.image_file(record) == data / "images" / f"{question['imageId']}.jpg"
    elsewhere = Gqa(data, "val-all", images=data / "elsewhere")
    assert elsewhere.image_file(record) == data / "elsewhere" / f"{question['imageId']}.jpg"
    assert [record.id for record in Gqa(data, "testdev").records] == list(BALANCED)


def test_credit_adds_up_to_the_accuracy(data):
    benchmark = Gqa(data, "testdev")
    credits = [benchmark.credit(record, PREDICTIONS[record.id]) for record in benchmark.records]
    assert sum(credits) / len(credits) == pytest.approx(EXPECTED["accuracy"] / 100)


def test_the_results_file_is_what_the_official_script_was_given(data):
    benchmark = Gqa(data, "val-all")
    official = benchmark.official(PREDICTIONS)
    assert official == [{"questionId": name, "prediction": PREDICTIONS[name].strip().lower()} for name in QUESTIONS]
    pairs = benchmark.read_official(official)
    scores = benchmark.score(PREDICTIONS)
    assert benchmark.score(dict(pairs)) == scores | {"official, uncleaned": scores["all"]}
    assert benchmark.official({FIRST: "yes"}) == [{"questionId": FIRST, "prediction": "yes"}]
    assert benchmark.read_official(official[:1] * 2) == pairs[:1] * 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"1": "yes"}, "not a list"),
        ([{"questionId": "1"}], 'entry 0: "prediction"'),
        ([{"questionId": "1", "prediction": "yes"}, {"questionId": 2, "prediction": "yes"}], 'entry 1: "questionId"'),
        (["yes"], 'entry 0: "questionId"'),
    ],
)
def test_a_malformed_results_file_is_refused(data, content, message):
    with pytest.raises(ValueError, match=message):
        Gqa(data, "val").read_official(content)


@pytest.mark.parametrize(
    "key", ["imageId", "question", "answer", "isBalanced", "types", "groups", "semantic", "entailed"]
)
def test_a_missing_key_is_named_with_its_file_and_question(data, key):
    del (questions := copy.deepcopy(BALANCED))[FIRST][key]
    write(data / "testdev_balanced_questions.json", questions)
    with pytest.raises(ValueError, match=rf'testdev_balanced_questions.json: question {FIRST}: "{key}"'):
        Gqa(data, "testdev")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 2}, '"answer" is missing or not of type str'),
        ({"types": {"structural": "poem", "semantic": "rel", "detailed": "x"}}, "'poem', not one of query"),
        ({"types": {"structural": "query", "semantic": "relation", "detailed": "x"}}, "'relation', not one of attr"),
        ({"types": {"structural": "query", "semantic": "rel"}}, '"detailed"'),
        ({"groups": {}}, '"global" of "groups"'),
        ({"semantic": [{"operation": "exist"}]}, '"operation" or "argument"'),
    ],
)
def test_a_malformed_question_is_refused(data, change, message):
    write(data / "testdev_balanced_questions.json", {FIRST: QUESTIONS[FIRST] | change})
    with pytest.raises(ValueError, match=f"question {FIRST}: .*{message}"):
        Gqa(data, "testdev")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"question_id": 1, "question": "?", "answer": "yes", "image": "1.jpg"}], "as LAVIS rewrote it"),
        ({}, "no questions"),
        ("questions", "no questions"),
        ({"1": "?"}, 'question 1: "imageId" is missing'),
    ],
)
def test_another_file_is_refused(data, content, message):
    write(data / "testdev_balanced_questions.json", content)
    with pytest.raises(ValueError, match=f"testdev_balanced_questions.json: .*{message}"):
        Gqa(data, "testdev")


def test_choices_of_other_questions_are_refused(data):
    name = list(BALANCED)[1]
    for found in (None, {"valid": ["yes"]}):
        write(data / "val_choices.json", CHOICES | {name: found})
        with pytest.raises(ValueError, match=f'val_choices.json: question {name}: "valid" or "plausible"'):
            Gqa(data, "val")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"testdev_balanced_questions\.json"):
        Gqa(tmp_path, "testdev")
