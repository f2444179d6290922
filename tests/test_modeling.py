"""Parity with transformers' BLIP-2, what trains and what does not, generation, saving, sizes at paper scale."""

import copy

import pytest
import torch
from conftest import TOWERS, llm_inputs, randomise, tiny_config
from transformers import (
    AutoModelForImageTextToText,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    BloomConfig,
    FalconConfig,
    OPTConfig,
)

from xformer_mllm import (
    VARIANTS,
    XFormerConfig,
    XFormerForConditionalGeneration,
    XFormerForImageTextRetrieval,
    XFormerForPreTraining,
    XFormerModel,
)
from xformer_mllm.model import modeling_xformer
from xformer_mllm.model.modeling_xformer import FROZEN
from xformer_mllm.model.vision_encoders import scaled
from xformer_mllm.variants import variant_config


def from_blip2(blip2, config, model):
    """Put a tiny BLIP-2's weights into ours, by their published names; its post_layernorm is our clip_layernorm."""
    renamed = {}
    for name, tensor in blip2.state_dict().items():
        if name.startswith("vision_model.post_layernorm."):
            name = "xformer.clip_layernorm." + name.rpartition(".")[2]
        elif name.startswith("vision_model."):
            name = "xformer.clip_encoder.tower." + name.removeprefix("vision_model.")
        elif name.startswith(("qformer.", "query_tokens", "embeddings.")):
            name = "xformer." + name
        renamed[name] = tensor
    missing, unexpected = model.load_state_dict(renamed, strict=False)
    assert not unexpected
    ours_alone = ("fusion", "mae_", "itg_", "temperature", "post_layernorm")
    assert all(any(part in name for part in ours_alone) for name in missing), missing
    return model.eval()


def blip2_config(config: XFormerConfig, text_input: bool) -> Blip2Config:
    qformer = copy.deepcopy(config.qformer_config)
    qformer.use_qformer_text_input = text_input
    return Blip2Config(
        vision_config=config.clip_config,
        qformer_config=qformer,
        text_config=config.text_config,
        num_query_tokens=config.num_query_tokens,
        image_text_hidden_size=config.image_text_hidden_size,
        image_token_index=config.image_token_index,
    )


def normalised(images, config):
    return scaled(images, 32, config.clip_mean, config.clip_std, torch.float32)


@pytest.mark.parametrize("variant", ["qformer", "xformer", "early_cross_attention"])
def test_blip2_in_our_model_gives_the_same_logits_and_ids(images, variant):
    config = variant_config(variant, tiny_config("blip2"))
    config.qformer_config.use_qformer_text_input = False
    config.clip_config.layer_norm_eps = 1e-5  # of BLIP-2's ln_vision, which we always take
    blip2 = randomise(Blip2ForConditionalGeneration(blip2_config(config, False))).eval()
    ours = from_blip2(blip2, config, XFormerForConditionalGeneration(config))
    ids, mask = llm_inputs(config, 4)
    with torch.no_grad():
        pixels = normalised(images, config)
        theirs = blip2(pixels, ids, mask).logits
        torch.testing.assert_close(ours(images, ids, mask).logits, theirs, atol=1e-5, rtol=1e-4)
        generated = blip2.generate(pixels, ids, mask, max_new_tokens=6, do_sample=False)
        beams = blip2.generate(pixels, ids, mask, max_new_tokens=6, do_sample=False, num_beams=3)
    assert torch.equal(ours.generate(images, ids, mask, max_new_tokens=6), generated)
    assert torch.equal(ours.generate(images, ids, mask, max_new_tokens=6, num_beams=3), beams)


def test_blip2_in_our_model_gives_the_same_itc_and_itm_scores(images, texts):
    config = tiny_config("blip2", image_token_index=None)
    config.clip_config.layer_norm_eps = 1e-5
    blip2 = randomise(Blip2ForImageTextRetrieval(blip2_config(config, True))).eval()
    ours = from_blip2(blip2, config, XFormerForImageTextRetrieval(config))
    ids, mask = texts
    pixels = normalised(images, config)
    with torch.no_grad():
        for matching in (False, True):
            theirs = blip2(pixels, ids, attention_mask=mask, use_image_text_matching_head=matching)
            mine = ours(images, ids, mask, use_image_text_matching_head=matching)
            torch.testing.assert_close(mine.logits_per_image, theirs.logits_per_image, atol=1e-5, rtol=1e-4)


def test_lm_loss_is_the_mean_over_the_labelled_tokens(images):
    model = randomise(XFormerForConditionalGeneration(tiny_config())).eval()
    ids, mask = llm_inputs(model.config, 4)
    labels = ids.masked_fill(ids == 59, -100)
    labels[0, -2:] = labels[2, :-1] = -100
    with torch.no_grad():
        logits = model(images, ids, mask).logits
        expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        torch.testing.assert_close(model(images, ids, mask, labels=labels).lm_loss, expected)


@pytest.mark.parametrize("tower", TOWERS)
def test_any_tower_gives_the_hidden_states_of_the_chosen_layer(images, tower):
    config = tiny_config(tower, clip_feature_layer=-2)
    model = randomise(XFormerModel(config)).eval()
    from xformer_mllm.model.vision_encoders import build_tower

    whole = build_tower(config.clip_config).eval()
    whole.load_state_dict(model.clip_encoder.tower.state_dict(), strict=False)
    with torch.no_grad():
        theirs = whole(normalised(images, config), output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(model.encode_image(images).clip_tokens, model.clip_layernorm(theirs))
    assert len([n for n in model.clip_encoder.state_dict() if n.endswith("layer_norm1.weight")]) == 2


def stage(model, variant):
    return model(variant_config(variant, tiny_config()))


def steps(model, inputs, count):
    """`count` optimiser steps -> names of trainable parameters that got a non-zero gradient in any of them."""
    model.freeze()
    model.train()
    moved = set()
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(trainable.values(), lr=1e-3)
    for _ in range(count):
        optimiser.zero_grad()
        model(**inputs()).loss.backward()
        moved |= {n for n, p in trainable.items() if p.grad is not None and p.grad.abs().sum() > 0}
        optimiser.step()
    return moved, set(trainable)


def pretraining_inputs(images, texts):
    return lambda: {"pixel_values": images, "qformer_input_ids": texts[0], "qformer_attention_mask": texts[1]}


def generation_inputs(images, config):
    ids, mask = llm_inputs(config, 4)
    labels = ids.masked_fill(ids == config.image_token_index, -100)
    return lambda: {"pixel_values": images, "input_ids": ids, "attention_mask": mask, "labels": labels}


# The key's bias adds the same to all scores of a query: softmax has no gradient there.
NO_GRADIENT = ("key.bias",)


@pytest.mark.parametrize("variant", VARIANTS)
def test_trained_parts_get_gradients_and_frozen_ones_none(images, texts, variant):
    model = stage(XFormerForPreTraining, variant)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    # Projections that start at zero open one after the other; with the reconstruction loss two steps suffice.
    moved, trainable = steps(model, pretraining_inputs(images, texts), 2 if model.config.reconstruction else 3)
    assert {n for n in trainable - moved if not n.endswith(NO_GRADIENT)} == {
        n for n in trainable if model.config.fusion == "none" and ".fusion." in n
    }
    assert not any(part in name for name in trainable for part in FROZEN)
    after = model.state_dict()
    frozen = [n for n in before if any(part in n for part in FROZEN)]
    assert frozen
    assert all(torch.equal(before[n], after[n]) for n in frozen)


@pytest.mark.parametrize("variant", VARIANTS)
def test_stage2_trains_the_projection_not_the_llm(images, variant):
    config = variant_config(variant, tiny_config())
    config.qformer_config.use_qformer_text_input = False
    model = XFormerForConditionalGeneration(config)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    moved, trainable = steps(model, generation_inputs(images, config), 3)
    assert {n for n in trainable - moved if not n.endswith(NO_GRADIENT)} == set()
    assert "language_projection.weight" in moved
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items() if any(p in n for p in FROZEN))


def test_frozen_encoders_stay_in_evaluation_mode(images, texts):
    model = stage(XFormerForPreTraining, "xformer")
    model.freeze()
    model.train()
    assert model.training
    assert model.xformer.qformer.training
    assert not any(m.training for m in model.xformer.clip_encoder.modules())
    assert not any(m.training for m in model.xformer.mae_encoder.modules())
    assert not any(m.training for m in model.xformer.mae_decoder.modules())


def test_reconstruction_in_stage2_is_a_loss_of_its_own(images):
    config = variant_config("reconstruction_in_stage2", tiny_config())
    model = XFormerForConditionalGeneration(config).eval()
    output = model(**generation_inputs(images, config)())
    torch.testing.assert_close(output.loss, output.lm_loss + output.reconstruction_loss)


def test_a_batch_of_one_works(images, texts):
    model = stage(XFormerForPreTraining, "xformer")
    output = model(images[:1], texts[0][:1], texts[1][:1])
    assert torch.isfinite(output.loss)
    of_own_pair = torch.nn.functional.cross_entropy(output.itm_logits[:1], torch.tensor([1]))  # there is no negative
    torch.testing.assert_close(output.itm_loss, of_own_pair)


def test_stage1_is_reproduced_with_given_randomness(images, texts):
    model = stage(XFormerForPreTraining, "xformer").eval()
    fixed = {"noise": torch.rand(4, 16), "negatives": (torch.tensor([1, 2, 3, 0]), torch.tensor([2, 3, 0, 1]))}
    with torch.no_grad():
        assert torch.equal(model(images, *texts, **fixed).loss, model(images, *texts, **fixed).loss)


def test_itm_triples_are_own_pair_wrong_image_wrong_text(images, texts):
    model = randomise(stage(XFormerForPreTraining, "no_reconstruction")).eval()
    negatives = (torch.tensor([1, 2, 3, 0]), torch.tensor([2, 3, 0, 1]))
    with torch.no_grad():
        logits = model(images, *texts, negatives=negatives).itm_logits
        image_of, text_of = [0, 1, 2, 3, *negatives[0], 0, 1, 2, 3], [0, 1, 2, 3, 0, 1, 2, 3, *negatives[1]]
        for row, (i, t) in enumerate(zip(image_of, text_of, strict=True)):
            pair = model.match(model.xformer.encode_image(images[i : i + 1]), texts[0][t][None], texts[1][t][None])[0]
            torch.testing.assert_close(logits[row], pair[0], atol=1e-5, rtol=1e-4)


def test_the_itg_pass_gives_itc_the_queries_alone(images, texts):
    model = randomise(stage(XFormerForPreTraining, "no_reconstruction")).eval()
    with torch.no_grad():
        stage1 = model(images, *texts).xformer_output.fused_queries
        torch.testing.assert_close(stage1, model.xformer(images).fused_queries, atol=1e-5, rtol=1e-4)


def test_itg_s_added_rows_change_nothing(texts, monkeypatch):
    ids, mask = texts
    model = randomise(stage(XFormerForPreTraining, "no_reconstruction")).eval()
    states = torch.randn(*ids.shape, model.config.qformer_config.hidden_size)
    found = []
    for rows in (1, 64):
        monkeypatch.setattr(modeling_xformer, "ROWS", rows)
        leaf = states.clone().requires_grad_()
        model.zero_grad()
        loss = model.itg_loss(leaf, ids, mask)
        loss.backward()
        found.append((loss.detach(), leaf.grad, model.itg_head.weight.grad, model.itg_bias.grad))
    torch.testing.assert_close(found[1], found[0], atol=1e-7, rtol=1e-5)


def test_batched_generation_equals_one_by_one(images):
    model = randomise(XFormerForConditionalGeneration(tiny_config()), 0.3).eval()
    prompts = [torch.randint(5, 40, (length,)) for length in (2, 5, 3, 4)]
    ids, mask = [], []
    for prompt in prompts:  # placeholders, padding, text: as the processor pads on the left
        padding = 5 - len(prompt)
        ids.append(torch.cat([torch.full((4,), 59), torch.ones(padding, dtype=torch.long), prompt]))
        mask.append(torch.tensor([1] * 4 + [0] * padding + [1] * len(prompt)))
    batched = model.generate(images, torch.stack(ids), torch.stack(mask), max_new_tokens=6, min_new_tokens=6)
    for i, prompt in enumerate(prompts):
        alone = torch.cat([torch.full((4,), 59), prompt])[None]
        one = model.generate(images[i : i + 1], alone, torch.ones_like(alone), max_new_tokens=6, min_new_tokens=6)
        assert torch.equal(batched[i, -6:], one[0, -6:])
        assert torch.equal(batched[i, :-6], ids[i])
    assert len({tuple(row[-6:].tolist()) for row in batched}) > 1


def test_a_soft_prompt_stands_for_its_image(images):
    model = randomise(XFormerForConditionalGeneration(tiny_config())).eval()
    ids, mask = llm_inputs(model.config, 4)
    with torch.no_grad():
        prompt = model.get_image_features(images).pooler_output
        torch.testing.assert_close(model(images, ids, mask).logits, model(None, ids, mask, soft_prompt=prompt).logits)


def test_several_texts_of_an_image_share_its_encoding(images):
    model = randomise(XFormerForConditionalGeneration(tiny_config())).eval()
    ids, mask = llm_inputs(model.config, 6)
    index = torch.tensor([0, 0, 1, 3, 3, 3])
    labels = ids.masked_fill(ids == 59, -100)
    with torch.no_grad():
        shared = model(images, ids, mask, labels=labels, image_index=index).loss
        torch.testing.assert_close(shared, model(images[index], ids, mask, labels=labels).loss)


def test_instruction_aware_queries_read_their_prompt(images, texts):
    config = tiny_config(instruction_aware=True)
    model = randomise(XFormerForConditionalGeneration(config)).eval()
    ids, mask = llm_inputs(config, 4)
    read = {"qformer_input_ids": texts[0], "qformer_attention_mask": texts[1]}
    longer = {name: torch.nn.functional.pad(tensor, (0, 3)) for name, tensor in read.items()}
    swapped = {name: tensor.flip(0) for name, tensor in read.items()}
    index = torch.tensor([2, 2, 0, 1])
    with torch.no_grad():
        logits = model(images, ids, mask, **read).logits
        torch.testing.assert_close(model(images, ids, mask, **longer).logits, logits, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(model(images, ids, mask, **swapped).logits, logits)
        shared = model(images, ids, mask, image_index=index, **read).logits
        torch.testing.assert_close(shared, model(images[index], ids, mask, **read).logits)
        with pytest.raises(ValueError, match="this model's queries read the prompt"):
            model(images, ids, mask)
    a = model.generate(images, ids, mask, image_index=index, max_new_tokens=3, **read)
    assert torch.equal(a, model.generate(images[index], ids, mask, max_new_tokens=3, **read))


@pytest.mark.parametrize("aware", [False, True])
def test_each_text_needs_its_image(images, aware):
    config = tiny_config(instruction_aware=aware)
    model = XFormerForConditionalGeneration(config).eval()
    read = torch.ones(4, 3, dtype=torch.long)

    def said(message, count, texts, calls=(model, model.generate), **index):
        ids, mask = llm_inputs(config, texts)
        prompts = {"qformer_input_ids": read[:texts], "qformer_attention_mask": read[:texts]}
        for call in calls:
            with pytest.raises(ValueError, match=message) as caught:
                call(images[:count], ids, mask, **prompts, **index)
            assert "\n" not in str(caught.value)

    said("4 images, 1 text: pass as many texts as images, or image_index", 4, 1)
    said("1 image, 4 texts: pass as many texts as images, or image_index", 1, 4)
    said("1 image, 2 texts", 1, 2)
    said("image_index names 3 images for 2 texts", 4, 2, image_index=torch.tensor([0, 1, 2]))
    in_use = (model.generate,)
    said(
        r"image_index is \[0, 4\], but must be from 0 to 3 \(4 images\)",
        4,
        2,
        in_use,
        image_index=torch.tensor([0, 4]),
    )
    said(r"image_index is \[-1, 0\], but must be from 0 to 0 \(1 image\)", 1, 2, in_use, image_index=[-1, 0])
    with pytest.raises(ValueError, match="1 soft prompt for 4 texts"):
        model(None, *llm_inputs(config, 4), soft_prompt=torch.zeros(1, 4, 36))
    if aware:
        with pytest.raises(ValueError, match="4 images, 2 texts"):
            model.get_image_features(images, None, read[:2], read[:2])
    else:  # from the pixels alone
        assert len(model.generate(images, max_new_tokens=1)) == 4
        assert len(model.generate(images, image_index=[0, 3], max_new_tokens=1)) == 2


def test_what_cannot_generate_says_what_is_missing(tmp_path):
    model = XFormerForConditionalGeneration(tiny_config())
    with pytest.raises(ValueError, match="pass pixel_values"):
        model.generate(input_ids=llm_inputs(model.config, 1)[0])
    XFormerForPreTraining(tiny_config(text_config=None)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a model of stage 1 has no language model to generate with"):
        AutoModelForImageTextToText.from_pretrained(tmp_path)


def test_wrong_number_of_placeholders_is_said(images):
    model = XFormerForConditionalGeneration(tiny_config())
    ids, mask = llm_inputs(model.config, 4)
    with pytest.raises(ValueError, match="needs 4 image placeholders"):
        model(images, ids[:, 1:], mask[:, 1:])


@pytest.mark.parametrize("variant", VARIANTS)
def test_train_save_load_gives_the_same_outputs(images, texts, variant, tmp_path):
    first = stage(XFormerForPreTraining, variant)
    steps(first, pretraining_inputs(images, texts), 2)
    first.eval().save_pretrained(tmp_path / "stage1")
    again = XFormerForPreTraining.from_pretrained(tmp_path / "stage1")
    with torch.no_grad():
        assert torch.equal(first.xformer(images).fused_queries, again.xformer(images).fused_queries)
        assert torch.equal(first.caption(images, 3, 4), again.caption(images, 3, 4))

    second = stage(XFormerForConditionalGeneration, variant)
    steps(second, generation_inputs(images, second.config), 2)
    second.eval().save_pretrained(tmp_path / "stage2")
    again, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "stage2", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids, mask = llm_inputs(second.config, 4)
    assert torch.equal(
        second.generate(images, ids, mask, max_new_tokens=4), again.generate(images, ids, mask, max_new_tokens=4)
    )


def test_a_bf16_language_model_stays_bf16_the_rest_fp32(images, tmp_path):
    model = XFormerForConditionalGeneration(tiny_config()).eval()
    for part in (
        model.language_model,
        model.xformer.clip_encoder,
        model.xformer.mae_encoder,
        model.xformer.mae_decoder,
    ):
        part.to(torch.bfloat16)
    model.config.text_config.dtype = torch.bfloat16
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert {n: p.dtype for n, p in model.named_parameters()} == {n: p.dtype for n, p in again.named_parameters()}
    ids, mask = llm_inputs(model.config, 4)
    with torch.no_grad():
        assert torch.equal(model(images, ids, mask).logits, again(images, ids, mask).logits)


@pytest.mark.parametrize("kind", [BloomConfig, FalconConfig])
def test_a_bf16_language_model_with_blooms_names_stays_bf16(kind, tmp_path):
    """Their `word_embeddings` are not the Q-Former's."""
    config = tiny_config(text_config=kind(vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4))
    model = XFormerForConditionalGeneration(config)
    model.language_model.to(torch.bfloat16)
    model.config.text_config.dtype = torch.bfloat16
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in again.language_model.parameters()} == {torch.bfloat16}


def test_the_trained_parts_of_a_model_by_itself_are_fp32_too(tmp_path):
    config = tiny_config()
    config.qformer_config.use_qformer_text_input = True
    XFormerForPreTraining(config).save_pretrained(tmp_path)
    model = XFormerModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    frozen = ("clip_encoder", "mae_encoder", "mae_decoder")
    kept = {name: p.dtype for name, p in model.named_parameters() if not name.startswith(frozen)}
    assert set(kept.values()) == {torch.float32}
    assert any(name.startswith("embeddings") for name in kept)


def test_retrieval_loads_from_stage_1_and_scores_the_same(images, texts, tmp_path):
    first = randomise(stage(XFormerForPreTraining, "xformer")).eval()
    first.save_pretrained(tmp_path)
    retrieval, report = XFormerForImageTextRetrieval.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    with torch.no_grad():
        a = XFormerForImageTextRetrieval.forward(first, images, *texts).logits_per_image
        torch.testing.assert_close(retrieval(images, *texts).logits_per_image, a)


def test_gradient_checkpointing_gives_the_same_gradients(images, texts):
    gradients = []
    model = stage(XFormerForPreTraining, "early_cross_attention")
    model.freeze()
    model.train()
    fixed = {"noise": torch.rand(4, 16), "negatives": (torch.tensor([1, 2, 3, 0]), torch.tensor([2, 3, 0, 1]))}
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
        model.zero_grad()
        model(images, *texts, **fixed).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-4)


def test_features_of_images_and_texts_come_in_one_output(images, texts):
    model = randomise(XFormerModel(tiny_config())).eval()
    with torch.no_grad():
        output = model(images, qformer_input_ids=texts[0], qformer_attention_mask=texts[1])
        assert torch.equal(output.text_states, model.encode_text(*texts))
        assert torch.equal(output.fused_queries, model(images).fused_queries)


def test_float_pixels_equal_bytes(images):
    model = randomise(XFormerModel(tiny_config())).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(images).fused_queries, model(images / 255).fused_queries)


WRONG_PIXELS = {
    "normalised": (
        lambda images: images / 127.5 - 1,
        r"float32\[4, 3, 32, 32\] from -1.00 to 1.00, perhaps already norm",
    ),
    "not scaled": (lambda images: images.float(), "from 0.00 to 255.00"),
    "not a number": (lambda images: images / 255 * float("nan"), "from nan to nan"),
    "other integers": (lambda images: images.long(), r"int64\[4, 3, 32, 32\]$"),
    "one image": (lambda images: images[0], r"uint8\[3, 32, 32\]$"),
    "channels last": (lambda images: images.permute(0, 2, 3, 1), r"uint8\[4, 32, 32, 3\]$"),
    "grey": (lambda images: images[:, :1], r"uint8\[4, 1, 32, 32\]$"),
    "none": (lambda images: images[:0], r"uint8\[0, 3, 32, 32\]$"),
    "an array": (lambda images: images.numpy(), "not ndarray$"),
    "nothing": (lambda images: None, "pass pixel_values"),
}


@pytest.mark.parametrize("kind", WRONG_PIXELS)
def test_wrong_pixels_are_refused(images, kind):
    change, message = WRONG_PIXELS[kind]
    model = XFormerModel(tiny_config())
    for call in (model, lambda pixels: model.frozen_features(pixels, masked=True)):
        with pytest.raises(ValueError, match=message) as caught:
            call(change(images))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_pixels_of_any_precision_may_be_off_by_a_rounding(images, dtype):
    pixels = (images / 255).clamp(0.1) - 0.105
    assert torch.isfinite(XFormerModel(tiny_config())(pixels.to(dtype)).fused_queries).all()


def test_attention_maps_need_eager_attention(images):
    """As docs/architecture.md says."""
    model = XFormerModel._from_config(tiny_config(), attn_implementation="eager")
    output = model(images, output_attentions=True)
    assert [maps[0].shape for maps in (output.clip_attentions, output.mae_attentions)] == [(4, 2, 4, 17)] * 2


def test_fresh_queries_and_positions_all_differ():
    model = XFormerModel(tiny_config())
    for tensor in (model.query_tokens[0], model.mae_encoder.embeddings.position_embeddings[0, 1:]):
        assert len(tensor.unique(dim=0)) == len(tensor)
    assert len(model.mae_decoder.decoder_pos_embed[0].unique(dim=0)) == 17


# Sizes of the paper: table "ablations", and section "Results" for the language models.
OPT_6_7B = OPTConfig(
    hidden_size=4096, ffn_dim=16384, num_hidden_layers=32, num_attention_heads=32, word_embed_proj_dim=4096
)


def trainable_in_stage2(variant: str) -> float:
    config = variant_config(variant, XFormerConfig.paper(OPT_6_7B))
    config.qformer_config.use_qformer_text_input = False
    with torch.device("meta"):
        model = XFormerForConditionalGeneration(config)
    model.freeze()
    return sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6


def test_trainable_counts_at_paper_size():
    assert trainable_in_stage2("qformer") == pytest.approx(108, rel=0.02)
    assert trainable_in_stage2("concat") == pytest.approx(110, rel=0.02)
    assert trainable_in_stage2("xformer") == pytest.approx(128, rel=0.02)  # "about 20M over the Q-Former"
    assert trainable_in_stage2("early_cross_attention") == pytest.approx(
        127, rel=0.01
    )  # the paper: 183 (docs/decisions)
