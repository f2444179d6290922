"""At step 0 a fusion is its parents; afterwards it does what the paper's row says."""

import pytest
import torch
from conftest import randomise, tiny_config

from xformer_mllm import VARIANTS, XFormerModel
from xformer_mllm.variants import variant_config


def model_of(variant: str) -> XFormerModel:
    return XFormerModel(variant_config(variant, tiny_config())).eval()


def test_fresh_dual_cross_attention_changes_nothing_bit_for_bit(images):
    with torch.no_grad():
        output = model_of("xformer")(images)
    assert torch.equal(output.fused_queries, output.queries)
    assert torch.equal(output.enriched_mae_tokens, output.mae_tokens)


def test_fresh_early_cross_attention_is_the_qformer(images):
    early, plain = model_of("early_cross_attention"), model_of("qformer")
    plain.load_state_dict(early.state_dict(), strict=False)
    with torch.no_grad():
        assert torch.equal(early(images).fused_queries, plain(images).fused_queries)


def test_queries_see_m_in_every_variant_but_the_qformer(images):
    for name in VARIANTS:
        model = randomise(model_of(name))
        with torch.no_grad():
            image = model.encode_image(images)
            before = model.read(image).fused_queries
            if image.mae is not None:
                image.mae.tokens = image.mae.tokens.flip(0)
            after = model.read(image).fused_queries
        assert torch.equal(before, after) == (name == "qformer"), name


def test_only_in_dual_cross_attention_m_reads_the_queries(images):
    for name in VARIANTS:
        model = randomise(model_of(name))
        with torch.no_grad():
            output = model(images)
        changed = output.mae_tokens is not None and not torch.equal(output.enriched_mae_tokens, output.mae_tokens)
        assert changed == (model.config.fusion == "dual_cross_attention"), name


def test_dual_cross_attention_equals_a_plain_loop(images):
    """Every query and every token by itself, written out from the paper's two formulas."""
    model = randomise(model_of("xformer"))
    with torch.no_grad():
        output = model(images)
        block = model.fusion.blocks[0]

        def attend(layer, x, context):
            context = layer.context_norm(context)
            q, k, v = layer.query(layer.norm(x)), layer.key(context), layer.value(context)
            heads = []
            for h in range(q.shape[-1] // layer.head_dim):
                part = slice(h * layer.head_dim, (h + 1) * layer.head_dim)
                weights = (q[..., part] @ k[..., part].transpose(-1, -2) / layer.head_dim**0.5).softmax(-1)
                heads.append(weights @ v[..., part])
            return layer.output(torch.cat(heads, -1))

        def feed(layer, x):
            return layer.output(torch.nn.functional.gelu(layer.intermediate(layer.norm(x))))

        m = output.mae_tokens + attend(block.mae_reads_queries, output.mae_tokens, output.queries)
        m = m + feed(block.mae_feed_forward, m)
        z = output.queries + attend(block.queries_read_mae, output.queries, m)
        z = z + feed(block.queries_feed_forward, z)
    torch.testing.assert_close(output.enriched_mae_tokens, m, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.fused_queries, z, atol=1e-5, rtol=1e-5)


def test_attention_implementations_agree(images):
    model = randomise(model_of("xformer"))
    with torch.no_grad():
        model.set_attn_implementation("eager")
        eager = model(images).fused_queries
        model.set_attn_implementation("sdpa")
        sdpa = model(images).fused_queries
    torch.testing.assert_close(eager, sdpa, atol=1e-5, rtol=1e-5)


def test_attention_maps_on_request_sum_to_one(images):
    model = randomise(model_of("xformer"))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(images, output_attentions=True)
    assert output.mae_attentions[0].shape == (4, 2, 4, 17)
    assert output.clip_attentions[0].shape == (4, 2, 4, 17)
    for attention in (*output.mae_attentions, *output.clip_attentions):
        torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention.sum(-1)))


@pytest.mark.parametrize("name", VARIANTS)
def test_standardised_norms_give_mean_0_and_deviation_1(images, name):
    model = model_of(name)
    randomise(model.clip_encoder)
    batch = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8)
    model.standardise(batch)
    with torch.no_grad():
        image = model.encode_image(batch)
        read = [image.clip_tokens] + [norm(image.mae.tokens) for norm in model.fusion.mae_norms()]
        for tokens in read:
            deviation, mean = torch.std_mean(tokens.flatten(0, 1), dim=0)
            torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-3, rtol=0)
            torch.testing.assert_close(deviation, torch.ones_like(deviation), atol=1e-2, rtol=0)
        output = model(images)
    assert (
        len(read)
        == {"none": 1, "concat": 2, "early_cross_attention": 2, "dual_cross_attention": 4}[model.config.fusion]
    )
    assert torch.equal(output.fused_queries, output.queries)


def test_unknown_variant_names_the_known_ones():
    with pytest.raises(ValueError, match=r"variant 'xfromer' is unknown; choose one of qformer, xformer"):
        variant_config("xfromer", tiny_config())
