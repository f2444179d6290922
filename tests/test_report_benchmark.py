"""The page of one evaluation: it shows the numbers, is self-contained, and every part but the scores is optional."""

import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from xformer_mllm.report.benchmark import (
    LONG_TABLE,
    PHOTO_SIDE,
    SHOWN_PROBLEMS,
    Example,
    benchmark_page,
    decoding,
    number,
)

EVIL = "<script>alert('x')</script>&\"'"
VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """The visible text, and a check that tags are closed in order."""

    def __init__(self, html):
        super().__init__()
        self.open, self.text, self.tags, self.attributes = [], [], [], []
        self.feed(html)
        self.close()
        self.visible = " ".join(" ".join(self.text).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)


@pytest.fixture
def metrics():
    """As metrics.json holds them."""
    return {
        "benchmark": "gvt-counting",
        "scores": {
            "all": {"accuracy": 0.3964, "MAE": 1.234, "RMSE": 2.05, "n": 9997},
            "strict": {"accuracy": 0.4121, "MAE": 1.2, "RMSE": 2.0, "unparsed": 0.0134, "n": 9997},
            "always 1": {"accuracy": 0.543, "MAE": 1.1, "RMSE": 2.2, "n": 9997},
            "objects:1-9": {"accuracy": 0.45, "n": 8000},
            "structural:query": {"accuracy": 0.351, "n": 12},
            **{f"words:{words}": {"accuracy": 0.5, "n": 3} for words in range(LONG_TABLE + 1)},
        },
        "records": 10_000,
        "answered": 9_997,
        "empty_answers": 4,
        "unreadable_images": {"42": f"val2017/42.jpg: no such image {EVIL}"},
        "normalisation": f"the first number {EVIL}",
        "not_computed": {"METEOR": f"needs Java {EVIL}"},
        "notes": [f"two different files {EVIL}"],
        "settings": {
            "prompt": f"Question: {{question}} Answer:{EVIL}",
            "num_beams": 5,
            "length_penalty": -1.0,
            "max_new_tokens": 10,
            "min_new_tokens": 1,
            "repetition_penalty": 1.0,
        },
        "seconds": 1234.5,
        "config": {"model": f"runs/{EVIL}", "batch_size": 32},
    }


@pytest.fixture
def examples():
    image = Image.new("RGB", (48, 48), "teal")
    return [
        Example(image, f"How many? {EVIL}", "2", "2", 1.0, "count"),
        Example(image, "Which?", "red", f"blue {EVIL}", 0.0),
        Example(image, "What?", "net", "netting", 0.6),
        Example(image, "", "a red circle", "", None),
        Example(None, "Where?", "", "here", None),
    ]


def page_of(metrics, examples=()):
    return benchmark_page(f"X-Former on gvt-counting {EVIL}", f"runs/model {EVIL}", metrics, examples)


def test_the_page_is_self_contained_and_escaped(metrics, examples):
    html = page_of(metrics, examples)
    page = Page(html)
    assert page.open == []
    assert "script" not in page.tags
    assert EVIL in page.visible  # shown as text
    sources = [value for name, value in page.attributes if name in ("src", "href")]
    assert all(source.startswith(("data:image/png;base64,", "https://arxiv.org/")) for source in sources)
    assert "@import" not in html
    assert "url(" not in html


def test_shares_are_printed_times_100_but_errors_are_not(metrics):
    page = Page(page_of(metrics))
    assert "accuracy 39.6, MAE 1.23, RMSE 2.05 (over 9,997)" in page.visible
    assert "strict 41.2 1.20 2.00 1.3 9,997" in page.visible
    assert "always 1 54.3 1.10 2.20 – 9,997" in page.visible
    assert "the score of that constant answer, without a model" in page.visible
    assert "MAE, RMSE, unparsed: lower is better." in page.visible


@pytest.mark.parametrize(
    ("metric", "value", "shown"),
    [
        *(("accuracy", 0.3964, "39.6"), ("CIDEr-D", 1.458, "145.8"), ("recall@1", 1.0, "100.0")),
        *(("MAE", 1.234, "1.23"), ("RMSE", 12.0, "12.00"), ("distribution", 4.718, "4.72")),
        *(("n", 12578, "12,578"), ("METEOR", None, "–")),
    ],
)
def test_a_number_is_shown_by_its_metric(metric, value, shown):
    assert number(metric, value) == shown


def test_each_kind_has_a_table_and_long_ones_are_collapsed(metrics):
    html = page_of(metrics)
    assert "<h3>By structural type</h3>" in html
    assert "<h3>By number of objects in the image</h3>" in html
    assert f"<summary>By number of words in the question ({LONG_TABLE + 1})</summary>" in html
    assert "query 35.1 12" in Page(html).visible


def test_intervals_and_baselines_are_shown():
    scores = {
        "all": {"accuracy": 0.664, "n": 8000, "ci95": [0.654, 0.675], "majority": 0.384, "question_only": 0.39},
        "count_all": {"accuracy": 0.43, "n": 374, "ci95": [0.38, 0.48], "majority": 0.33, "question_only": 0.33},
    }
    html = page_of({"scores": scores})
    page = Page(html)
    assert "accuracy 66.4 (95 % interval 65.4–67.5), majority 38.4" in page.visible
    assert "all 66.4 65.4–67.5 38.4 39.0 8,000" in page.visible
    assert "count all 43.0 38.0–48.0 33.0 33.0 374" in page.visible
    assert "majority: most frequent training answer to the type of question." in page.visible
    assert 'class="dot v1" style="top:50%;left:66.40%"' in html
    assert 'class="interval v1" style="top:50%;left:65.40%;width:2.10%"' in html
    assert 'class="blind majority" style="left:38.40%"' in html
    assert 'aria-label="count all: accuracy 43.0, majority 33.0, question alone 33.0"' in html


def test_a_constant_answer_is_a_bar_not_a_dot(metrics):
    html = page_of(metrics)
    assert '<i class="blind majority" style="left:54.30%"></i>' in html
    assert 'class="dot v1" style="top:50%;left:54.30%"' not in html


def test_there_is_no_plot_of_one_group_or_of_other_metrics():
    assert 'class="plot"' not in page_of({"scores": {"all": {"accuracy": 0.5, "n": 4}}})
    caption = {"CIDEr-D": 1.2, "n": 4}
    assert 'class="plot"' not in page_of({"scores": {"all": caption, "in-domain": caption}})


def test_evaluation_settings(metrics):
    page = Page(page_of(metrics))
    assert "Prompt Question: {question} Answer:" in page.visible
    assert "5 beams, length penalty -1, at least 1 new token, at most 10 new tokens" in page.visible
    assert "Normalisation the first number" in page.visible
    assert "METEOR needs Java" in page.visible
    assert "two different files" in page.visible


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_beams": 1, "length_penalty": 0.0, "max_new_tokens": 8}, "greedy, at most 8 new tokens"),
        (
            {
                "num_beams": 5,
                "length_penalty": 0.0,
                "max_new_tokens": 30,
                "min_new_tokens": 8,
                "repetition_penalty": 1.15,
            },
            "5 beams, length penalty 0, at least 8 new tokens, at most 30 new tokens, repetition penalty 1.15",
        ),
    ],
)
def test_decoding_in_a_sentence(settings, sentence):
    assert decoding(settings) == sentence


def test_retrieval_shows_how_many_itm_reranked():
    scores = {"all": {"mean recall": 0.5, "n": 6}, "text retrieval, ITC": {"recall@1": 0.25, "n": 2}}
    page = Page(page_of({"scores": scores, "settings": {"k_test": 128}}))
    assert "Reranked by ITM the 128 best by ITC" in page.visible
    assert "Prompt" not in page.visible


def test_an_empty_prompt_is_named(metrics):
    metrics["settings"]["prompt"] = ""
    assert "Prompt none" in Page(page_of(metrics)).visible


def test_a_changed_question_is_named(metrics):
    assert "lower case" not in Page(page_of(metrics)).visible
    metrics["settings"]["plain_question"] = True
    assert "the question in lower case and without punctuation" in Page(page_of(metrics)).visible


def test_counts_and_unreadable_images(metrics):
    page = Page(page_of(metrics))
    assert "9,997 of 10,000 records answered." in page.visible
    assert "Records 10,000 Answered 9,997 Empty answers 4 Seconds 1,234.5 Unreadable images 1" in page.visible
    assert "42 val2017/42.jpg: no such image" in page.visible
    metrics["unreadable_images"] = {f"p{n}": "broken" for n in range(SHOWN_PROBLEMS + 7)}
    assert "7 more are in metrics.json." in Page(page_of(metrics)).visible
    assert "all 10,000 records answered." in Page(page_of(metrics | {"answered": 10_000})).visible


def test_examples_show_the_answer_and_its_credit(metrics, examples):
    html = page_of(metrics, examples)
    page = Page(html)
    assert html.count("<img ") == 4
    assert '<dd class="right"><span aria-label="right">✓</span> 2</dd>' in html
    assert '<dd class="wrong"><span aria-label="wrong">✗</span> blue' in html
    assert '<dd class="even"><span aria-label="partly right:">60&nbsp;%</span> netting</dd>' in html
    assert "truth a red circle model empty" in page.visible
    assert "Where? model here" in page.visible  # no truth, no sign
    assert "Drawn at random" in page.visible
    assert "Examples" not in Page(page_of(metrics)).visible


def test_a_photo_is_scaled_down_and_a_scene_is_not(metrics):
    html = page_of(metrics, [Example(Image.new("RGB", (2000, 1000)), "What?", "a", "a", 1.0)])
    assert '<div class="photo"><img src="data:image/png;base64,' in html
    assert f'width="{PHOTO_SIDE}" height="{PHOTO_SIDE // 2}"' in html
    html = page_of(metrics, [Example(Image.new("RGB", (48, 48)), "What?", "a", "a", 1.0)])
    assert '<div class="photo">' not in html
    assert 'width="48" height="48"' in html


def test_only_scores_are_needed():
    page = Page(page_of({"scores": {"all": {"n": 0}}}))
    assert page.open == []
    assert "No scores." in page.visible
    for title in ("Evaluation settings", "Records", "Not computed", "Configuration"):
        assert title not in page.visible


def test_a_page_can_be_made_again_from_the_file(metrics, examples):
    assert page_of(json.loads(json.dumps(metrics)), examples) == page_of(metrics, examples)


def test_no_number_is_left_unrounded(metrics, examples):
    visible = Page(page_of(metrics, examples)).visible
    assert not re.search(r"\d\.\d{4,}", visible)
