"""The masks, drawn; and that no text leaks where it must not, measured through the real Q-Former."""

import pytest
import torch
from conftest import randomise, tiny_config

from xformer_mllm import XFormerModel
from xformer_mllm.model import masks
from xformer_mllm.variants import variant_config

DRAWN = {
    masks.unimodal_mask: ["##...", "##...", "..##.", "..##.", "..##."],
    masks.multimodal_causal_mask: ["##...", "##...", "###..", "####.", "####."],
    masks.bidirectional_mask: ["####.", "####.", "####.", "####.", "####."],
}


@pytest.mark.parametrize("make", DRAWN, ids=lambda f: f.__name__)
def test_mask_is_as_drawn_with_padding_unseen(make):
    mask = make(torch.tensor([[1, 1, 0]]), num_queries=2)
    drawn = torch.tensor([[c == "#" for c in row] for row in DRAWN[make]])
    assert torch.equal(mask, drawn[None, None])


def read(model, image, ids, mask):
    return model.read(image, ids, mask)


@pytest.fixture
def model():
    return randomise(XFormerModel(tiny_config("blip2"))).eval()


def test_text_never_reaches_the_queries_in_itg(model, images, texts):
    ids, text_mask = texts
    image = model.encode_image(images)
    mask = masks.multimodal_causal_mask(text_mask, 4)
    with torch.no_grad():
        a = model.read(image, ids, mask)
        b = model.read(image, ids.flip(0), mask)
        alone = model.read(image)
    assert torch.equal(a.queries, b.queries)
    torch.testing.assert_close(a.queries, alone.queries, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(a.text_states, b.text_states)


def test_unimodal_mask_separates_text_and_queries(model, images, texts):
    ids, text_mask = texts
    mask = masks.unimodal_mask(text_mask, 4)
    with torch.no_grad():
        image = model.encode_image(images)
        both = model.read(image, ids, mask)
        alone, text = model.read(image), model.encode_text(ids, text_mask)
    torch.testing.assert_close(both.queries, alone.queries, atol=1e-5, rtol=1e-5)
    kept = text_mask.bool()
    torch.testing.assert_close(both.text_states[kept], text[kept], atol=1e-5, rtol=1e-5)


def test_itg_text_sees_the_queries_and_only_earlier_text(model, images, texts):
    ids, text_mask = texts
    text_mask = torch.ones_like(text_mask)
    mask = masks.multimodal_causal_mask(text_mask, 4)
    changed = ids.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 40
    with torch.no_grad():
        image, other = model.encode_image(images), model.encode_image(images.flip(0))
        a, b, c = read(model, image, ids, mask), read(model, image, changed, mask), read(model, other, ids, mask)
    assert torch.equal(a.text_states[:, :4], b.text_states[:, :4])
    assert not torch.allclose(a.text_states[:, 4:], b.text_states[:, 4:])
    assert not torch.allclose(a.text_states[:, 0], c.text_states[:, 0])


def test_itm_queries_see_every_text_token(model, images, texts):
    ids, text_mask = texts
    text_mask = torch.ones_like(text_mask)
    mask = masks.bidirectional_mask(text_mask, 4)
    with torch.no_grad():
        image = model.encode_image(images)
        before = model.read(image, ids, mask).fused_queries
        for position in range(ids.shape[1]):
            changed = ids.clone()
            changed[:, position] = (changed[:, position] + 1) % 40
            assert not torch.allclose(before, model.read(image, changed, mask).fused_queries)


@pytest.mark.parametrize("make", DRAWN, ids=lambda f: f.__name__)
def test_padding_changes_nothing(model, images, texts, make):
    ids, text_mask = texts
    more_ids = torch.nn.functional.pad(ids, (0, 5), value=7)
    more_mask = torch.nn.functional.pad(text_mask, (0, 5), value=0)
    with torch.no_grad():
        image = model.encode_image(images)
        a = model.read(image, ids, make(text_mask, 4))
        b = model.read(image, more_ids, make(more_mask, 4))
    torch.testing.assert_close(a.fused_queries, b.fused_queries, atol=1e-5, rtol=1e-5)
    kept = text_mask.bool()
    torch.testing.assert_close(a.text_states[kept], b.text_states[:, :7][kept], atol=1e-5, rtol=1e-5)


def test_queries_alone_are_those_of_the_whole_pass(model, images, texts):
    ids, text_mask = texts
    mask = masks.bidirectional_mask(text_mask, 4)
    with torch.no_grad():
        image = model.encode_image(images)
        whole, alone = (model.read(image, ids, mask, queries_only=only) for only in (False, True))
        states, first = (model.encode_text(ids, text_mask, kept) for kept in (None, 1))
    assert alone.text_states is None
    torch.testing.assert_close(alone.fused_queries, whole.fused_queries, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(first, states[:, :1], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("variant", ["qformer", "xformer", "concat", "early_cross_attention"])
def test_projecting_an_image_once_changes_nothing(images, texts, variant):
    model = randomise(XFormerModel(variant_config(variant, tiny_config()))).eval()
    mask = masks.bidirectional_mask(texts[1], 4)
    with torch.no_grad():
        image = model.encode_image(images)
        each, once = (model.read(source, texts[0], mask) for source in (image, model.project(image)))
    torch.testing.assert_close(once.fused_queries, each.fused_queries, atol=1e-6, rtol=1e-6)
