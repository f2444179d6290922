"""Losses against closed forms and naive loops, in fp32 and on random inputs."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from xformer_mllm.model import losses


def test_similarity_is_the_best_query_of_each_pair():
    image, text = normalize(torch.randn(3, 4, 8), dim=-1), normalize(torch.randn(5, 8), dim=-1)
    similarity = losses.image_text_similarity(image, text)
    for i in range(3):
        for t in range(5):
            assert similarity[i, t] == pytest.approx(max(float(q @ text[t]) for q in image[i]), abs=1e-6)


def naive_smoothed(logits, target, smoothing):
    """Cross-entropy with BLIP-2's label smoothing of 0.1: the truth gets 1 - s, and everything shares s."""
    total = 0.0
    for row, own in zip(logits.double(), target, strict=True):
        log_probability = row - torch.logsumexp(row, 0)
        weights = torch.full_like(row, smoothing / len(row))
        weights[own] += 1 - smoothing
        total -= float((weights * log_probability).sum())
    return total / len(logits)


def test_itc_equals_a_naive_loop_with_label_smoothing():
    a, b, targets = torch.randn(4, 6), torch.randn(4, 6), torch.tensor([2, 3, 4, 5])
    expected = (naive_smoothed(a, targets, 0.1) + naive_smoothed(b, targets, 0.1)) / 2
    assert float(losses.itc_loss(a, b, targets, 0.1)) == pytest.approx(expected, abs=1e-5)


def test_itc_of_equal_similarities_is_the_log_of_the_batch():
    flat = torch.zeros(5, 5)
    assert float(losses.itc_loss(flat, flat, torch.arange(5))) == pytest.approx(math.log(5), abs=1e-6)


def test_itm_at_chance_is_the_logarithm_of_two():
    assert float(losses.itm_loss(torch.zeros(6, 2), torch.tensor([1, 1, 0, 0, 0, 0]))) == pytest.approx(math.log(2))


def test_itg_targets_are_the_following_tokens_without_padding():
    ids, mask = torch.tensor([[7, 4, 5, 6], [7, 4, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    assert losses.itg_targets(ids, mask).tolist() == [[4, 5, 6, -100], [4, -100, -100, -100]]


def cross_entropies(rows: int, dtype: torch.dtype | None = None):
    """(ours, torch's) loss and gradients, over chunks of 4 of the rows, some without a target."""
    states, targets = torch.randn(rows, 8), torch.randint(0, 11, (rows,))
    targets[1::3] = losses.IGNORED
    found = []
    for function in (losses.linear_cross_entropy, by_torch):
        given = (states, torch.ones(11, 8).cumsum(0) / 9, torch.arange(11) / 9)
        leaves = [tensor.clone().requires_grad_() for tensor in given]
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = function(*leaves, targets, 0.1, 4)
        (3 * loss).backward()
        found.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    return found


def by_torch(states, weight, bias, targets, smoothing, _chunk):
    logits = torch.nn.functional.linear(states, weight, bias).float()
    return torch.nn.functional.cross_entropy(logits, targets, label_smoothing=smoothing)


@pytest.mark.parametrize("rows", [3, 4, 10])
def test_cross_entropy_in_chunks_and_its_gradients_equal_torch(rows):
    for ours, expected in zip(*cross_entropies(rows), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)


def test_cross_entropy_in_chunks_follows_autocast():
    for ours, expected in zip(*cross_entropies(10, torch.bfloat16), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, expected, atol=2e-2, rtol=2e-2)


def test_without_a_target_cross_entropy_is_zero():
    states = torch.randn(2, 8, requires_grad=True)
    loss = losses.linear_cross_entropy(states, torch.randn(11, 8), torch.zeros(11), torch.tensor([-100, -100]))
    loss.backward()
    assert float(loss) == 0
    assert not states.grad.any()


def test_hard_negatives_are_never_excluded_ones():
    for _ in range(200):
        similarity = 20 * torch.randn(6, 6) + 100 * torch.eye(6)  # the own pair is by far the most similar
        same = torch.eye(6, dtype=torch.bool)
        same[0, 1] = same[1, 0] = True  # two pairs with one text
        drawn = losses.sample_hard_negatives(similarity, same)
        assert not same[torch.arange(6), drawn].any()


def test_hard_negatives_follow_the_softmax():
    similarity = torch.tensor([[0.0, 1.0, 2.0, 9.0]]).expand(20_000, -1)
    excluded = torch.tensor([[False, False, False, True]]).expand(20_000, -1)
    drawn = losses.sample_hard_negatives(similarity, excluded)
    frequency = drawn.bincount(minlength=4) / len(drawn)
    torch.testing.assert_close(frequency[:3], torch.tensor([0.0, 1.0, 2.0]).softmax(0), atol=0.02, rtol=0)
    assert frequency[3] == 0


def test_similarities_that_are_not_numbers_draw_something():
    drawn = losses.sample_hard_negatives(torch.full((3, 3), torch.nan), torch.eye(3, dtype=torch.bool))
    assert ((drawn >= 0) & (drawn < 3)).all()


def test_a_batch_of_one_has_no_negatives():
    assert losses.sample_hard_negatives(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool)).tolist() == [-1]


def test_similarities_are_fp32_under_autocast():
    images, texts = normalize(torch.randn(3, 4, 8), dim=-1), normalize(torch.randn(5, 8), dim=-1)
    with torch.autocast("cpu", torch.bfloat16):
        similarity = losses.image_text_similarity(images, texts)
    assert similarity.dtype == torch.float32
    torch.testing.assert_close(similarity, losses.image_text_similarity(images, texts), atol=0, rtol=0)
