"""The comparison page: its sentences and plots follow from the numbers, and it is self-contained."""

import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from PIL import Image

from xformer_mllm.report import Report, Run, Setting, Strip, verdict, write_report
from xformer_mllm.report.charts import ITM_CHANCE_LOSS, line_chart, nice_ticks, running_mean
from xformer_mllm.report.comparison import choose_disagreements, choose_random, render
from xformer_mllm.report.pages import PAPER
from xformer_mllm.report.wording import image_name

EVIL = "<script>alert('x')</script>&\"'"


def score(accuracy, n=200, low=None, high=None, majority=0.25):
    interval = [accuracy - 0.05 if low is None else low, accuracy + 0.05 if high is None else high]
    return {"accuracy": accuracy, "n": n, "ci95": interval, "majority": majority}


def difference(value, clear=True):
    return {"difference": value, "ci95": [value - 0.03, value + 0.03], "n": 200, "clear": clear}


def prediction(number, prediction, answer="red"):
    return {
        "id": f"q{number}",
        "image_id": f"p{number}",
        "question": f"question {number} {EVIL}",
        "question_type": "count_texture",
        "answer": answer,
        "prediction": prediction,
        "credit": prediction == answer,
    }


@pytest.fixture
def setting():
    return Setting(
        name="with questions",
        note=f"a note {EVIL}",
        metrics={
            "qformer": {
                "texture": score(0.3011),
                "count": score(0.7022),
                "all": score(0.5133),
                "semantic:object": score(0.5),
            },
            "xformer": {
                "texture": score(0.7144),
                "count": score(0.6066),
                "all": score(0.6166),
                "semantic:object": score(0.6),
            },
        },
        differences={
            "xformer": {
                "texture": difference(0.4133),
                "count": difference(-0.0967),
                "all": difference(0.1033),
                "semantic:object": difference(0.1),
            }
        },
        predictions={
            "qformer": [prediction(0, "red"), prediction(1, EVIL), prediction(2, "blue"), prediction(3, "")],
            "xformer": [prediction(0, "red"), prediction(1, "red"), prediction(2, "red"), prediction(3, "red")],
        },
    )


@pytest.fixture
def report(setting):
    log = [{"step": step, "loss": 5 / step, "itm_loss": 0.7 / step, "itc_loss": 3.0} for step in range(1, 60)]
    sample = {"step": 5, "id": "s0", "text": EVIL, "reference": "a cat"}
    image = Image.new("RGB", (48, 48), "teal")
    return Report(
        title=f"Title {EVIL}",
        variants=("qformer", "xformer"),
        introduction="introduction",
        settings=[setting],
        runs=[
            Run(
                "qformer",
                "Stage 1",
                log,
                [sample],
                [{"name": "clip_encoder", "parameters": 1234567, "trainable": 0}],
                {"learning_rate": EVIL},
                48,
            ),
            Run("xformer", "Stage 1", log, [sample], [], {}, 48),
        ],
        reconstructions=[Strip("X-Former", [("original", image), ("masked", image)])],
        configuration={"seed": 7, "note": EVIL},
        provenance={"Command": f"xformer demo {EVIL}"},
        images=lambda identity: image if identity != "p1" else None,
    )


class Page(HTMLParser):
    """Tags with attributes and the text of table cells."""

    VOID = frozenset({"meta", "img", "br", "path", "text"})

    def __init__(self, html):
        super().__init__()
        self.tags, self.cells, self.open = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data


def test_all_text_is_escaped_and_all_tags_closed(report):
    html = render(report)
    page = Page(html)
    assert page.open == []
    assert "<script" not in html
    assert "script" not in {tag for tag, _ in page.tags}
    assert "&lt;script&gt;" in html
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_nothing_is_loaded_from_elsewhere(report):
    page = Page(render(report))
    links = [attributes[name] for _, attributes in page.tags for name in ("src", "href") if name in attributes]
    assert [link for link in links if not link.startswith("data:image/png;base64,")] == [PAPER]
    assert not {"link", "script", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert "@import" not in render(report)
    assert "url(" not in render(report)


def test_images_and_plots_have_alternative_texts(report):
    tags = Page(render(report)).tags
    assert all(attributes["alt"].strip() for tag, attributes in tags if tag == "img")
    assert all(attributes["aria-label"].strip() for tag, attributes in tags if tag == "svg")


def test_the_table_holds_the_numbers_of_the_metrics(report, setting):
    cells = Page(render(report)).cells
    row = cells.index("texture")
    assert cells[row + 1 : row + 6] == ["200", "25.0", "30.1 25.1–35.1", "71.4 66.4–76.4", "+41.3 +38.3 to +44.3"]
    row = cells.index("count")
    assert cells[row + 3 : row + 6] == ["70.2 65.2–75.2", "60.7 55.7–65.7", "−9.7 −12.7 to −6.7"]


def test_types_are_sorted_by_gain_and_defined(report, setting):
    gains = {"all": difference(0.1), "texture": difference(-0.2), "count": difference(0.3)}
    html = render(replace(report, settings=[replace(setting, differences={"xformer": gains})]))
    assert re.findall(r'<span class="label">([^<]*)</span>', html) == ["all", "count", "texture", "correct, %"]
    assert "Sorted by the gain of X-Former over Q-Former." in html
    assert "<dt>count</dt><dd>the number of objects of one shape</dd>" in html


def test_only_clear_differences_are_emphasised(report, setting):
    unclear = {"all": difference(0.1), "texture": difference(0.01, clear=False), "count": difference(-0.1)}
    html = render(replace(report, settings=[replace(setting, differences={"xformer": unclear})]))
    assert '<span class="up">+10.0</span>' in html
    assert '<span class="even">+1.0</span>' in html
    assert '<span class="down">−10.0</span>' in html


@pytest.mark.parametrize(
    ("image_id", "name"),
    [("0/test/3", "scene:test:3"), ("0/validation/3/1", "scene:validation:3"), ("7/test/3", "7/test/3"), ("p1", "p1")],
)
def test_images_are_named_as_the_commands_take_them(image_id, name):
    assert image_name(image_id) == name


def test_all_comes_first(report):
    labels = re.findall(r'<span class="label">([^<]*)</span>', render(report))
    assert labels == ["all", "texture", "count", "correct, %"]


def test_positions_of_dots_intervals_and_bars(report):
    html = render(report)
    assert 'class="dot v1" style="top:67%;left:71.44%"' in html
    assert 'class="interval v0" style="top:33%;left:25.11%;width:10.00%"' in html
    assert 'class="blind majority" style="left:25.00%"' in html


def test_the_verdict_names_the_winner_and_the_losses(setting):
    said = verdict(setting, ("qformer", "xformer"))
    assert said[0].startswith("X-Former answers 61.7\u00a0% of 200 held-out questions correctly, Q-Former 51.3\u00a0%")
    assert "X-Former is ahead by 10.3 points" in said[0]
    assert "X-Former is ahead of Q-Former on texture (+41.3)." in said
    assert "X-Former is behind Q-Former on count (−9.7)." in said


def test_the_verdict_gives_the_baseline_without_the_image(setting):
    assert (
        "Without the image, the most frequent training answer to the type of question is right in 25.0"
        in verdict(setting, ("qformer", "xformer"))[0]
    )


def test_the_verdict_says_when_xformer_does_not_win(setting):
    lost = {"all": difference(-0.05), "texture": difference(0.01, clear=False), "count": difference(-0.1)}
    said = verdict(replace(setting, differences={"xformer": lost}), ("qformer", "xformer"))
    assert "Q-Former is ahead by 5.0 points" in said[0]
    assert "X-Former is not clearly ahead of Q-Former on any type of question." in said
    assert "No clear difference on texture." in said


def test_the_verdict_claims_no_win_without_a_clear_difference(setting):
    noise = {"all": difference(0.02, clear=False)}
    said = verdict(replace(setting, differences={"xformer": noise}), ("qformer", "xformer"))
    assert "no clear difference" in said[0]
    assert "ahead by" not in said[0]


def test_scores_not_above_a_baseline_are_named(setting):
    metrics = {"qformer": {"all": score(0.5), "texture": score(0.3, majority=0.26)}}
    said = verdict(replace(setting, metrics=metrics, differences={}), ("qformer",))
    assert "Q-Former is not clearly better than a baseline without the image on texture." in said
    metrics = {"qformer": {"all": score(0.5), "texture": score(0.3, majority=0.2) | {"question_only": 0.28}}}
    said = verdict(replace(setting, metrics=metrics, differences={}), ("qformer",))
    assert "Q-Former is not clearly better than a baseline without the image on texture." in said


def test_one_variant_alone(report, setting):
    alone = replace(
        setting,
        metrics={"xformer": setting.metrics["xformer"]},
        predictions={"xformer": setting.predictions["xformer"]},
        differences={},
    )
    html = render(replace(report, variants=("xformer",), settings=[alone], runs=[report.runs[1]]))
    assert "X-Former answers 61.7" in html
    assert "Only X-Former is right" not in html


@pytest.mark.parametrize(
    ("field", "empty", "title"),
    [
        ("settings", (), "Answers: with questions"),
        ("runs", (), "Training"),
        ("reconstructions", (), "Reconstructions"),
        ("provenance", {}, "How this was produced"),
    ],
)
def test_a_missing_part_is_left_out(report, field, empty, title):
    heading = f"<h2>{title}</h2>"
    assert heading in render(report)
    without = render(replace(report, **{field: empty}))
    assert heading not in without
    assert Page(without).open == []


def test_an_empty_report_is_a_page():
    assert "<h1>nothing</h1>" in render(Report("nothing", ()))


def test_the_chance_of_itm_is_that_of_one_pair_in_three(report):
    assert math.isclose(ITM_CHANCE_LOSS, 0.6365, abs_tol=1e-4)
    html = render(report)
    assert "chance 0.637" in html
    assert f"chance {math.log(48):.3f}" in html  # ITC: one of 48


def test_disagreements_are_where_only_one_is_right(setting):
    won, lost = choose_disagreements(setting.predictions, "qformer", "xformer", 9, seed=0)
    assert won == [1, 2, 3]
    assert lost == []


def test_random_examples_depend_only_on_the_seed():
    rows = {"qformer": [prediction(number, "red") for number in range(100)]}
    wrong = {"qformer": [prediction(number, "blue") for number in range(100)]}
    assert choose_random(rows, 8, seed=1) == choose_random(wrong, 8, seed=1)
    assert choose_random(rows, 8, seed=1) != choose_random(rows, 8, seed=2)
    assert choose_random(rows, 500, seed=1) == list(range(100))


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.637, 0.637), (-3, 8000), (1e-4, 3e-4), (0, 0)])
def test_ticks_cover_the_range_in_few_steps(low, high):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low + 1e-9
    assert ticks[-1] >= high - 1e-9
    assert 2 <= len(ticks) <= 7


def test_running_mean():
    line = [(step, 2.0 * step) for step in range(100)]
    assert running_mean(line)[50] == (50, 100.0)
    noisy = [(step, float(step % 2)) for step in range(240)]
    assert abs(running_mean(noisy)[120][1] - 0.5) < 0.05


def test_a_curve_of_one_point_is_drawn():
    chart = line_chart("loss", {"xformer": [(1, 2.0)]}, {"xformer": "v0"})
    assert chart["lines"] == [("v0", "M44.0 166.0")]


def test_non_finite_losses_are_left_out(report):
    log = [
        {"step": 1, "loss": 1.0, "itc_loss": math.nan, "itm_loss": 0.6},
        {"step": 2, "loss": 0.5, "itm_loss": math.inf},
    ]
    html = render(replace(report, runs=[Run("xformer", "Stage 1", log)]))
    assert "nan" not in re.findall(r'd="([^"]*)"', html)
    assert 'd="M44.0 ' in html


def test_the_file_is_written_atomically(report, tmp_path, monkeypatch):
    path = write_report(tmp_path / "new" / "report.html", report)
    before = path.read_text(encoding="utf-8")
    assert before == render(report)
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report(path, replace(report, title="other"))
    assert path.read_text(encoding="utf-8") == before
