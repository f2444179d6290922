"""The section on queries: its sentences follow from the numbers, and its page is self-contained."""

from dataclasses import replace

import pytest
from PIL import Image
from test_report import EVIL, Page

from xformer_mllm.report.pages import PAPER
from xformer_mllm.report.queries import QueryAnalysis, query_page, verdict

METRIC, OTHER = "attention diversity over CLIP tokens", "output similarity"


@pytest.fixture
def analysis():
    def model(value, **more):
        scores = {METRIC: {"mean": value, "ci95": [0.1, 0.9]}, **more}
        return {"folder": EVIL, "stage": "stage 1", "queries": 12, "scores": scores}

    return QueryAnalysis(
        models={"qformer": model(0.411), "xformer": model(0.322, **{OTHER: {"mean": -0.25, "ci95": None}})},
        differences={"xformer": {METRIC: {"difference": -0.089, "ci95": [-0.1, -0.07], "clear": True}}},
        definitions={METRIC: f"what it is {EVIL}", OTHER: "another"},
        image_count=1234,
        overlays=[(f"image {EVIL}", Image.new("RGB", (30, 20), "teal"))],
    )


def test_sentences(analysis):
    first, second = (sentence.replace("\u00a0", " ") for sentence in verdict(analysis))
    assert first == (
        "Attention diversity over CLIP tokens after stage 1: X-Former 0.32, Q-Former 0.41 "
        "(difference −0.089, 95 % interval −0.100 to −0.070)."
    )
    assert second == "Output similarity after stage 1: X-Former −0.25."
    entry = {"difference": -0.089, "ci95": [-0.2, 0.01], "clear": False}
    unclear = replace(analysis, differences={"xformer": {METRIC: entry}})
    assert "no clear difference (−0.089" in verdict(unclear)[0]
    alone = replace(analysis, differences={"xformer": {METRIC: entry | {"ci95": None}}})
    assert verdict(alone)[0].endswith("Q-Former 0.41.")  # a single image has no interval
    one = replace(analysis, models={"qformer": analysis.models["qformer"]}, differences={})
    assert verdict(replace(one, definitions={METRIC: ""})) == [
        "Attention diversity over CLIP tokens after stage 1: Q-Former 0.41."
    ]


def test_page_is_whole_and_escaped(analysis):
    html = query_page(analysis, {"Models": EVIL})
    page = Page(html)
    assert page.open == []
    assert "<script" not in html
    links = [attributes[name] for _, attributes in page.tags for name in ("src", "href") if name in attributes]
    assert [link for link in links if not link.startswith("data:image/png;base64,")] == [PAPER]
    assert "1,234 images" in html
    assert "Where the queries attend, after stage 1" in html


def test_numbers_of_the_table_and_the_plot(analysis):
    html = query_page(analysis, {})
    cells = Page(html).cells
    row = cells[cells.index(METRIC) :][:4]
    assert row == [METRIC, "0.411 0.100 to 0.900", "0.322 0.100 to 0.900", "−0.089 −0.100 to −0.070"]
    assert cells[cells.index(OTHER) :][:4] == [OTHER, "–", "−0.250", "–"]
    assert "left:41.10%" in html
    assert 'style="left:-' not in html  # a cosine below 0 is drawn at 0
