"""GVTBench's scores against those that upstream's code gave (tests/fixtures/gvt.json), and the strict reading by hand."""

import json
from pathlib import Path

import pytest

from xformer_mllm.evaluate.gvt import (
    GvtCounting,
    GvtIdentification,
    Row,
    counting_scores,
    gvt_agrees,
    gvt_number,
    identification_scores,
    strict_number,
    strict_yes,
)

FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "gvt.json").read_text(encoding="utf-8"))
COUNTING, IDENTIFICATION = FIXTURE["counting"], FIXTURE["identification"]

BOTH = [(GvtCounting, "coco", COUNTING), (GvtIdentification, "vcr", IDENTIFICATION)]


def answers_of(part):
    return {str(place): text for place, text in enumerate(part["predictions"])}


@pytest.fixture
def data(tmp_path):
    """A data folder in GVTBench's format."""
    write(tmp_path / "coco_oc.json", COUNTING["entries"])
    write(tmp_path / "vcr_mci.json", IDENTIFICATION["entries"])
    return tmp_path


def write(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("text", "gvt", "strict"),
    [
        ("3", 3, 3),
        (" There are 12 dogs.", 12, 12),
        ("two dogs", 2, 2),
        ("Two dogs", 0, 2),  # upstream does not lower-case
        ("nine", 0, 9),  # and looks for "nive"
        ("nive", 9, None),
        ("someone with 3 dogs", 1, 3),  # within a word
        ("eighteen", 8, 18),
        ("fourteen or 2", 4, 14),
        ("twenty", 0, 20),
        ("none", 0, 0),
        ("zero", 0, 0),
        ("There are no dogs", 0, None),
        ("", 0, None),
        ("dog4", 4, None),
        ("2.5", 2, None),
        ("1,000 or 7", 1, 7),
        ("3, or 4.", 3, 3),
        ("Four.", 0, 4),
    ],
)
def test_numbers_are_read_as_upstream_does_and_strictly(text, gvt, strict):
    assert gvt_number(text) == gvt
    assert strict_number(text) == strict


@pytest.mark.parametrize(
    ("text", "yes", "no", "strict"),
    [
        ("Yes.", True, False, True),
        ("no", False, True, False),
        ("I do not know", False, True, None),
        ("yes and no", True, True, True),  # upstream: always right
        ("eyes", True, False, None),
        ("yesterday", True, False, None),
        ("None", False, True, None),
        ('\n"No", it does not', False, True, False),
        ("It does: yes", True, False, None),
        ("", False, False, None),
    ],
)
def test_yes_and_no_are_read_as_upstream_does_and_strictly(text, yes, no, strict):
    assert (gvt_agrees(text, "Yes."), gvt_agrees(text, "No.")) == (yes, no)
    assert strict_yes(text) is strict


# ------------------------------------------------------------------------------------------------------------- scoring


def test_counting_is_upstreams(data):
    scores = GvtCounting(data, "coco").score(answers_of(COUNTING))
    expected = COUNTING["expected"]
    assert scores["all"] == {
        "accuracy": pytest.approx(expected["accuracy"]),
        "MAE": pytest.approx(expected["mae"]),
        "RMSE": pytest.approx(expected["rmse"]),
        "n": len(COUNTING["entries"]),
    }
    assert scores["always 1"]["MAE"] == pytest.approx(COUNTING["expected_always_1"]["mae"])
    assert scores["always 1"]["accuracy"] == pytest.approx(COUNTING["expected_always_1"]["accuracy"])


def test_counting_by_the_right_number_is_upstreams(data):
    scores = GvtCounting(data, "coco").score(answers_of(COUNTING))
    found = [group for label, group in scores.items() if label.startswith("answer:")]
    assert [label for label in scores if label.startswith("answer:")] == [
        "answer:0-2",
        "answer:3-5",
        "answer:6-8",
        "answer:9-11",
    ]
    for group, expected in zip(found, COUNTING["expected_bins"].values(), strict=True):
        assert [f"{group[metric]:.4f}" for metric in ("accuracy", "MAE", "RMSE")] == [
            expected[metric] for metric in ("acc", "mae", "rmse")
        ]
        assert group["n"] == expected["n"]


def test_identification_is_upstreams(data):
    scores = GvtIdentification(data, "vcr").score(answers_of(IDENTIFICATION))
    expected, constant = IDENTIFICATION["expected"], IDENTIFICATION["expected_always_yes"]
    labels = {"all": "accuracy", "objects:1-9": "1 - 9", "objects:10-19": "10 - 19", "objects:20+": ">= 20"}
    for label, upstreams in labels.items():
        assert round(scores[label]["accuracy"], 4) == expected[upstreams]  # upstream prints four decimals
    assert round(scores["always yes"]["accuracy"], 4) == constant["accuracy"]
    assert (
        sum(scores[label]["n"] for label in list(labels)[1:]) == scores["all"]["n"] == len(IDENTIFICATION["entries"])
    )


def test_strict_counting_by_hand():
    rows = [Row("Nine", "9", 30), Row("someone, 2", "2", 9), Row("many", "4", 10), Row("5 cats", "3", 19)]
    scores = counting_scores(rows)
    assert scores["strict"] == {
        "accuracy": 0.5,
        "MAE": (4 + 2) / 4,  # "many" is an error of 4, as if it were 0
        "RMSE": pytest.approx(((16 + 4) / 4) ** 0.5),
        "unparsed": 0.25,
        "n": 4,
    }
    assert scores["all"]["accuracy"] == 0.0
    assert {label: group["accuracy"] for label, group in scores.items() if label.startswith("strict objects")} == {
        "strict objects:1-9": 1.0,
        "strict objects:10-19": 0.0,
        "strict objects:20+": 1.0,
    }


def test_nothing_said_is_not_a_zero_strictly():
    scores = counting_scores([Row("", "0", 1)])
    assert (scores["all"]["accuracy"], scores["strict"]["accuracy"]) == (1.0, 0.0)


def test_strict_identification_by_hand():
    rows = [Row("yes", "Yes.", 1), Row("I do not know", "No.", 1), Row("No.", "Yes.", 25), Row("No, none", "No.", 25)]
    scores = identification_scores(rows)
    assert scores["strict"] == {"accuracy": 0.5, "unparsed": 0.25, "n": 4}
    assert scores["all"] == {"accuracy": 0.75, "n": 4}
    assert scores["always yes"] == {"accuracy": 0.5, "n": 4}
    assert scores["strict objects:1-9"] == {"accuracy": 0.5, "unparsed": 0.5, "n": 2}
    assert "objects:10-19" not in scores  # nothing in it


def test_only_answered_questions_are_scored(data):
    benchmark = GvtCounting(data, "coco")
    truth = COUNTING["entries"][7]["text_out"]
    assert benchmark.score({"7": truth})["all"] == {"accuracy": 1.0, "MAE": 0.0, "RMSE": 0.0, "n": 1}
    assert benchmark.score({}) == {"all": {"n": 0}}


def test_an_endless_number_is_just_wrong():
    scores = counting_scores([Row("7" * 5000, "3", 1)])
    assert scores["all"]["accuracy"] == scores["strict"]["accuracy"] == 0.0


@pytest.mark.parametrize(
    ("kind", "split", "part"), [(GvtCounting, "coco", COUNTING), (GvtIdentification, "vcr", IDENTIFICATION)]
)
def test_credit_adds_up_to_the_accuracy(data, kind, split, part):
    benchmark = kind(data, split)
    answers = answers_of(part)
    credits = [benchmark.credit(record, answers[record.id]) for record in benchmark.records]
    assert sum(credits) / len(credits) == pytest.approx(benchmark.score(answers)["all"]["accuracy"])


# --------------------------------------------------------------------------------------------------------------- files


def test_records_and_images_of_both_sets(data):
    coco, vcr = GvtCounting(data, "coco"), GvtIdentification(data, "vcr")
    entry = COUNTING["entries"][0]
    assert [record.id for record in coco.records] == [str(place) for place in range(len(COUNTING["entries"]))]
    assert (coco.records[0].question, coco.records[0].answer) == (entry["text_in"], entry["text_out"])
    assert coco.image_file(coco.records[0]) == data / "val2017" / f"{entry['image_id']:012d}.jpg"
    assert vcr.image_file(vcr.records[1]) == data / "vcr1images" / "movie_1" / "clip@1.jpg"
    elsewhere = GvtCounting(data, "coco", images=data / "elsewhere")
    assert elsewhere.image_file(coco.records[0]).parent == data / "elsewhere"


def test_wording_that_gives_answers_away_is_counted(data):
    benchmark = GvtIdentification(data, "vcr")
    assert {record.question for record in benchmark.records if record.answer == "No."} == {
        "Does dog exis in the image?"
    }
    noes = sum(entry["text_out"] == "No." for entry in IDENTIFICATION["entries"])
    (note,) = benchmark.notes
    assert f"in {noes} of {noes} questions whose answer is no and in 0 of" in note
    repaired = [{**entry, "text_in": "Does dog exist in the image?"} for entry in IDENTIFICATION["entries"]]
    write(data / "vcr_mci.json", repaired)
    assert not GvtIdentification(data, "vcr").notes


def test_which_of_the_two_counting_files_it_is_can_be_told(data):
    entries = [{"image_id": 1, "text_in": "?", "text_out": answer, "n_obj_exist": 1} for answer in "1112"]
    write(data / "coco_oc.json", entries)
    (note,) = GvtCounting(data, "coco").notes
    assert "75.0% of the answers are 1" in note


def test_blip2s_prompt_is_the_default_as_opt_needs_it(data):
    for kind in (GvtCounting, GvtIdentification):
        default = next(iter(kind.settings.values()))
        assert default.prompt == "Question: {question} Answer:"
        assert kind.settings["paper"].prompt == "{question}"


@pytest.mark.parametrize(
    ("kind", "split", "part"), [(GvtCounting, "coco", COUNTING), (GvtIdentification, "vcr", IDENTIFICATION)]
)
def test_the_results_file_is_upstreams_and_comes_back(data, kind, split, part):
    benchmark, answers = kind(data, split), answers_of(part)
    official = benchmark.official(answers)
    assert {"pred", "gt", "image_id", "n_obj_exist"} < set(official[0])
    assert official[3]["pred"] == part["predictions"][3]
    assert official[3]["gt"] == part["entries"][3]["text_out"]
    assert official[3]["image_id"] == part["entries"][3]["image_id"]
    assert dict(benchmark.read_official(official)) == answers
    upstreams = [{key: row[key] for key in row if key != "index"} for row in official]
    assert dict(benchmark.read_official(upstreams)) == answers
    some = {"2": "1", "5": "yes"}
    assert dict(benchmark.read_official(benchmark.official(some))) == some
    assert benchmark.read_official(official[:1] * 2) == [("0", answers["0"])] * 2


def test_answers_without_an_index_follow_the_questions(data):
    benchmark = GvtCounting(data, "coco")
    rows = [{key: row[key] for key in row if key != "index"} for row in benchmark.official(answers_of(COUNTING))]
    with pytest.raises(ValueError, match='59 answers to 60 questions: each needs the "index"'):
        benchmark.read_official(rows[:-1])
    message = r"""entry 0: "(image_id|gt)" is .*, but .* in entry 0 of the questions; put the answers in the order"""
    with pytest.raises(ValueError, match=message):
        benchmark.read_official(rows[1:] + rows[:1])


@pytest.mark.parametrize(("kind", "split", "part"), BOTH)
def test_answers_with_an_index_must_be_to_that_question(data, kind, split, part):
    benchmark = kind(data, split)
    rows = benchmark.official(answers_of(part))
    wrong = {"image_id": "elsewhere", "gt": "none"}
    for key, truth in (("image_id", part["entries"][3]["image_id"]), ("gt", part["entries"][3]["text_out"])):
        message = f'entry 3: "{key}" is {wrong[key]!r}, but {truth!r} in entry 3 of the questions; .* index is wrong'
        with pytest.raises(ValueError, match=message):
            benchmark.read_official([*rows[:3], rows[3] | {key: wrong[key]}])
    shifted = [row | {"index": row["index"] + 1} for row in rows[:-1]]
    with pytest.raises(ValueError, match="of the questions; the answers are to another list"):
        benchmark.read_official(shifted)
    assert benchmark.read_official([{"index": 2, "pred": "1"}]) == [("2", "1")]
    assert benchmark.read_official([rows[0] | {"index": 999}]) == [
        ("999", rows[0]["pred"])
    ]  # `score` names unknown ids


@pytest.mark.parametrize(
    ("content", "message"),
    [({"0": "1"}, "not a list"), ([{"index": 0}], 'entry 0: "pred"'), ([{"index": 0, "pred": 1}], 'entry 0: "pred"')],
)
def test_a_malformed_results_file_is_refused(data, content, message):
    with pytest.raises(ValueError, match=message):
        GvtCounting(data, "coco").read_official(content)


@pytest.mark.parametrize("key", ["image_id", "text_in", "text_out", "n_obj_exist"])
def test_a_missing_key_is_named_with_its_file_and_entry(data, key):
    entries = [dict(entry) for entry in COUNTING["entries"]]
    del entries[4][key]
    write(data / "coco_oc.json", entries)
    with pytest.raises(ValueError, match=rf'coco_oc.json: entry 4: "{key}"'):
        GvtCounting(data, "coco")


@pytest.mark.parametrize(
    ("kind", "file", "content", "message"),
    [
        (GvtCounting, "coco_oc.json", {}, "not a list"),
        (GvtCounting, "coco_oc.json", [], "not a list"),
        (GvtCounting, "coco_oc.json", ["?"], 'entry 0: "image_id"'),
        (
            GvtCounting,
            "coco_oc.json",
            [COUNTING["entries"][0] | {"text_out": "two"}],
            "'two', not an answer to gvt-counting",
        ),
        (GvtCounting, "coco_oc.json", [COUNTING["entries"][0] | {"image_id": "a.jpg"}], '"image_id" .*int'),
        (GvtIdentification, "coco_mci.json", COUNTING["entries"], "not an answer to gvt-identification"),
    ],
)
def test_another_file_is_refused(data, kind, file, content, message):
    write(data / file, content)
    with pytest.raises(ValueError, match=f"{file}: .*{message}"):
        kind(data, "coco")


def test_a_missing_file_is_named(data):
    with pytest.raises(FileNotFoundError, match=r"vcr_oc\.json"):
        GvtCounting(data, "vcr")
