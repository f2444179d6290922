"""VQA accuracy against what the official vqaEval.py gave (fixtures/vqa_accuracy.json says which, and how it was run)."""

import json
from pathlib import Path

import pytest

from xformer_mllm.evaluate.vqa_accuracy import CONTRACTIONS, normalised, vqa_accuracy

OFFICIAL = json.loads((Path(__file__).parent / "fixtures" / "vqa_accuracy.json").read_text())


def test_the_fixture_has_cases_of_every_worth():
    worth = {case["printed"] for case in OFFICIAL["cases"]}
    assert {0.0, 30.0, 60.0, 90.0, 100.0} <= worth
    assert len(OFFICIAL["cases"]) >= 400
    assert sum(len(set(case["answers"])) == 1 for case in OFFICIAL["cases"]) > 40


def test_accuracy_equals_the_official_one():
    for case in OFFICIAL["cases"]:
        percent = 100 * vqa_accuracy(case["prediction"], case["answers"])
        assert percent == pytest.approx(case["accuracy"], abs=1e-10), case
        assert round(percent, 2) == case["printed"], case


def test_the_mean_equals_the_official_one():
    worth = [vqa_accuracy(case["prediction"], case["answers"]) for case in OFFICIAL["cases"]]
    assert round(100 * sum(worth) / len(worth), 2) == OFFICIAL["overall"]["overall"]


def test_normalisation_equals_the_official_one():
    assert len(OFFICIAL["normalised"]) > 400
    wrong = {text: (normalised(text), want) for text, want in OFFICIAL["normalised"] if normalised(text) != want}
    assert not wrong


def test_contractions_equal_the_official_ones():
    in_lower_case = {written: word for written, word in OFFICIAL["contractions"].items() if written.islower()}
    of_itself = {"let's": "let's", "she's": "she's"}  # upstream lists them; they change nothing
    assert {**CONTRACTIONS, **of_itself} == in_lower_case


# What the fixture holds among much else, spelled out for the reader.


def test_answers_that_all_agree_are_compared_as_they_stand():
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0.0
    assert vqa_accuracy("Yes", ["yes"] * 9 + ["no"]) == 1.0
    assert vqa_accuracy(" yes\n", ["yes", "yes\t"] * 5) == 1.0, "tabs, line ends and outer spaces go first"


def test_each_nine_of_ten():
    assert vqa_accuracy("a dog", ["dog"] * 3 + ["cat"] * 7) == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert [round(vqa_accuracy("x", ["x"] * n + ["y"] * (10 - n)), 6) for n in range(5)] == [0, 0.3, 0.6, 0.9, 1]


def test_the_slips_are_kept():
    assert normalised("3.") == "3", "the period after a digit was to stay"
    assert normalised("3.5") == "3.5"
    assert normalised("." * 40) == "." * 8, "re.UNICODE is 32, given as the count"
    assert normalised("red/blue") == "red blue"
    assert normalised("red/blue 1,000") == "redblue 1000"
    assert normalised("Im") == "im", "the table has it, but in capitals"
