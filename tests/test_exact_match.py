"""Scores, intervals and comparisons against cases worked by hand."""

import math

import pytest

from xformer_mllm.data.questions import Question
from xformer_mllm.embedded.benchmarks import Scenes
from xformer_mllm.evaluate.exact_match import Blind, compare, is_right, score, wilson


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
        "credit": correct,
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


def test_blind_baselines_only_learn_training_questions():
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


def test_questions_on_one_image_stand_or_fall_together():
    gains = [n % 3 == 0 for n in range(60)]
    alone = compare([row(n, False) for n in range(60)], [row(n, gains[n]) for n in range(60)])["all"]["ci95"]
    first = [row(n, False, image=n // 4) for n in range(240)]
    fourfold = compare(first, [row(n, gains[n // 4], image=n // 4) for n in range(240)])["all"]["ci95"]
    assert fourfold[1] - fourfold[0] == pytest.approx(alone[1] - alone[0], abs=0.03)  # not half as wide


def test_compare_refuses_other_questions():
    with pytest.raises(ValueError, match="not about the same questions"):
        compare([row(0, True)], [row(1, True)])


def test_case_and_space_do_not_matter():
    assert is_right(" Yes\n", "yes")
    assert not is_right("yes", "yes.")
    assert not is_right("", None)


def test_predictions_are_those_questions_that_were_answered():
    benchmark = Scenes("test", 1, 3)
    first, _, last = benchmark.records
    rows = benchmark.predictions({last.id: last.answer, first.id: "nothing"})
    found = [(row["id"], row["prediction"], row["credit"]) for row in rows]
    assert found == [(first.id, "nothing", 0.0), (last.id, last.answer, 1.0)]
