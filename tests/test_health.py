"""Query similarity, and the alarm when the queries collapse."""

import logging

import pytest
import torch
from torch.nn.functional import cosine_similarity

from xformer_mllm.train.health import COLLAPSED, LOGS_UNTIL_ALARM, CollapseAlarm, query_similarity


def test_it_is_the_mean_cosine_of_different_queries():
    queries = torch.randn(3, 5, 8)
    pairs = [
        cosine_similarity(image[one], image[other], dim=0)
        for image in queries
        for one in range(5)
        for other in range(5)
        if one != other
    ]
    assert query_similarity(queries).item() == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-6)


def test_equal_queries_are_1_and_opposite_ones_minus_1():
    query = torch.randn(2, 1, 8)
    assert query_similarity(query.expand(-1, 4, -1)).item() == pytest.approx(1, abs=1e-5)
    assert query_similarity(torch.cat([query, -query], dim=1)).item() == pytest.approx(-1, abs=1e-5)


def test_the_alarm_sounds_once_for_each_collapse(caplog):
    alarm = CollapseAlarm()
    high, low = COLLAPSED + 0.005, COLLAPSED - 0.1
    with caplog.at_level(logging.WARNING):
        for value in [*[high] * (LOGS_UNTIL_ALARM - 1), low, *[high] * 2 * LOGS_UNTIL_ALARM]:
            alarm.check(7, {"query_similarity": value})
        assert len(caplog.records) == 1
        assert caplog.records[0].getMessage().startswith("step 7: the queries have collapsed")
        alarm.check(7, {"loss": 1.0})
        for value in [low, *[high] * LOGS_UNTIL_ALARM]:
            alarm.check(7, {"query_similarity": value})
    assert len(caplog.records) == 2
