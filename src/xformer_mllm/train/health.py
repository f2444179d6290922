"""Health of a run: similarity of the queries, and a warning when they have collapsed."""

import logging

import torch
from torch.nn.functional import normalize

logger = logging.getLogger(__name__)

COLLAPSED = 0.98  # mean cosine of two queries of one image
LOGS_UNTIL_ALARM = 5


def query_similarity(queries: torch.Tensor) -> torch.Tensor:
    """The mean cosine of two different queries of one image, [B, Q, D] -> a scalar in [-1, 1]; nan for one query."""
    unit = normalize(queries.detach().float(), dim=-1)
    count = unit.shape[1]
    # The squared length of the sum is every cosine twice, plus 1 for each query with itself.
    pairs = unit.sum(1).square().sum(-1) - count
    return (pairs / (count * (count - 1))).mean()


class CollapseAlarm:
    """One warning when `query_similarity` was above COLLAPSED in LOGS_UNTIL_ALARM logs in a row; again after a recovery.

    All queries are then the same vector: 32 of them carry no more information than one.
    """

    def __init__(self):
        self.above = 0

    def check(self, step: int, values: dict[str, float]) -> None:
        """Look at the values of a log."""
        similarity = values.get("query_similarity")
        if similarity is None:
            return
        self.above = self.above + 1 if similarity > COLLAPSED else 0
        if self.above == LOGS_UNTIL_ALARM:
            logger.warning(
                "step %d: the queries have collapsed: two of one image have a cosine of %.3f, above %.2f for %d logs; "
                "see docs/training.md (equal initial queries? learning rate too high? wrong normalisation?)",
                step, similarity, COLLAPSED, LOGS_UNTIL_ALARM,
            )  # fmt: skip
