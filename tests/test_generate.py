"""`generate` by the cases of transformers' generation tests: it answers as the language model on the same embeddings."""

import pytest
import torch
from conftest import llm_inputs, randomise, tiny_config
from transformers import GenerationConfig, StoppingCriteriaList, T5Config
from transformers.generation import LogitsProcessorList, MaxTimeCriteria, MinLengthLogitsProcessor, TextStreamer

from xformer_mllm import XFormerForConditionalGeneration

NEW = 6
T5 = T5Config(
    vocab_size=60,
    d_model=36,
    d_kv=18,
    d_ff=48,
    num_layers=2,
    num_heads=2,
    decoder_start_token_id=0,
    feed_forward_proj="gated-gelu",
    tie_word_embeddings=False,
)
CASES = {
    "greedy": {},
    "sample": {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 0.7},
    "sample several": {"do_sample": True, "num_return_sequences": 3},
    "beam": {"num_beams": 3},
    "beams returned": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": -1.0},
    "beam sample": {"num_beams": 2, "do_sample": True},
    "early stopping": {"num_beams": 3, "early_stopping": True},
    "repetition": {"repetition_penalty": 2.0},
    "no repeated pairs": {"no_repeat_ngram_size": 2},
    "shortest": {"min_new_tokens": 4},
    "suppressed": {"suppress_tokens": list(range(3, 40))},
    "bad words": {"bad_words_ids": [[7], [8, 9]]},
    "forced end": {"forced_eos_token_id": 2},
    "other ends": {"eos_token_id": list(range(30))},
    "no cache": {"use_cache": False},
    "a static cache": {"cache_implementation": "static"},
    "a processor": {"logits_processor": LogitsProcessorList([MinLengthLogitsProcessor(5, 2)])},
    "a criterion": {"stopping_criteria": StoppingCriteriaList([MaxTimeCriteria(60.0)])},
    "a configuration": {"generation_config": GenerationConfig(max_new_tokens=3, num_beams=2, pad_token_id=1)},
}
RECORDED = {"output_scores": True, "output_logits": True, "output_hidden_states": True, "output_attentions": True}


def decoder() -> XFormerForConditionalGeneration:
    config = tiny_config()
    return randomise(XFormerForConditionalGeneration._from_config(config, attn_implementation="eager"), 0.3).eval()


def encoder_decoder() -> XFormerForConditionalGeneration:
    config = tiny_config(text_config=T5)
    return randomise(XFormerForConditionalGeneration._from_config(config, attn_implementation="eager"), 0.3).eval()


def on_embeddings(model, images, ids, mask, **options):
    """The language model's own answer, with the soft prompt put at the placeholders by hand."""
    prompt = model.get_image_features(images).pooler_output
    embeds = model.get_input_embeddings()(ids.masked_fill(ids == model.config.image_token_index, 0))
    embeds[:, : prompt.shape[1]] = prompt
    torch.manual_seed(1)
    return model.language_model.generate(inputs_embeds=embeds, attention_mask=mask, **options)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("build", [decoder, encoder_decoder])
def test_options_reach_the_language_model(images, build, case):
    model = build()
    ids, mask = llm_inputs(model.config, 4)
    options = ({} if "generation_config" in CASES[case] else {"max_new_tokens": NEW}) | CASES[case]
    with torch.no_grad():
        expected = on_embeddings(model, images, ids, mask, **options)
        torch.manual_seed(1)
        found = model.generate(images, ids, mask, **options)
    if build is decoder:
        repeats = len(expected) // len(ids)
        expected = torch.cat([ids.repeat_interleave(repeats, dim=0), expected], dim=1)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("build", [decoder, encoder_decoder])
def test_what_is_recorded_is_the_language_models(images, build, beams):
    model = build()
    ids, mask = llm_inputs(model.config, 4)
    options = {"max_new_tokens": NEW, "num_beams": beams, "return_dict_in_generate": True} | RECORDED
    with torch.no_grad():
        expected = on_embeddings(model, images, ids, mask, **options)
        found = model.generate(images, ids, mask, **options)
    assert found.keys() == expected.keys()
    assert {"scores", "logits"} <= found.keys()
    tokens = expected.sequences if build is encoder_decoder else torch.cat([ids, expected.sequences], dim=1)
    assert torch.equal(found.sequences, tokens)
    for step, other in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(step, other)
    states = "hidden_states" if build is decoder else "decoder_hidden_states"
    for layers, others in zip(found[states], expected[states], strict=True):
        torch.testing.assert_close(layers, others)


def test_a_streamer_gets_each_new_token(images):
    seen = []

    class Streamer(TextStreamer):
        def __init__(self):
            pass

        def put(self, value):
            seen.extend(value.flatten().tolist())

        def end(self):
            seen.append("end")

    model = decoder()
    ids, mask = llm_inputs(model.config, 1)
    found = model.generate(images[:1], ids, mask, max_new_tokens=NEW, streamer=Streamer())
    assert seen == [*found[0, ids.shape[1] :].tolist(), "end"]


def test_padding_on_the_left_changes_nothing(images):
    model = decoder()
    ids, mask = llm_inputs(model.config, 4)
    pad = torch.ones(4, 3, dtype=torch.long)
    padded = torch.cat([pad, ids], dim=1), torch.cat([torch.zeros_like(pad), mask], dim=1)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW}
    found = model.generate(images, *padded, **options)
    assert torch.equal(found[:, 3:], model.generate(images, ids, mask, **options))


def test_own_settings_are_used_and_kept(images):
    model = decoder()
    ids, mask = llm_inputs(model.config, 4)
    model.generation_config.max_new_tokens = 3
    before = model.generation_config.to_dict()
    assert model.generate(images, ids, mask, eos_token_id=None).shape[1] == ids.shape[1] + 3
    assert model.generate(images, ids, mask, max_new_tokens=5, eos_token_id=None).shape[1] == ids.shape[1] + 5
    assert model.generation_config.to_dict() == before


@pytest.mark.parametrize("options", [{"max_new_token": 3}, {"nucleus": 0.5}])
def test_unknown_options_are_refused(images, options):
    model = decoder()
    with pytest.raises(ValueError, match=next(iter(options))):
        model.generate(images, *llm_inputs(model.config, 4), **options)
