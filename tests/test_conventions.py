"""What users of transformers' models expect of ours: Trainer, outputs, vocabularies, arguments."""

import pytest
import torch
from conftest import llm_inputs, randomise, tiny_config
from transformers import Trainer, TrainingArguments

from xformer_mllm import (
    XFormerForConditionalGeneration,
    XFormerForImageTextRetrieval,
    XFormerForPreTraining,
    XFormerModel,
)
from xformer_mllm.model.modeling_xformer import without_dropout

STAGES = (XFormerForPreTraining, XFormerForConditionalGeneration)


def example(kind, config, number: int) -> dict:
    rng = torch.Generator().manual_seed(number)
    image = {"pixel_values": torch.randint(0, 256, (3, 32, 32), generator=rng, dtype=torch.uint8)}
    text = torch.randint(5, 40, (6,), generator=rng)
    if kind is XFormerForPreTraining:
        return image | {"qformer_input_ids": text, "qformer_attention_mask": torch.ones_like(text)}
    ids = torch.cat([torch.full((4,), config.image_token_index), text])
    labels = ids.masked_fill(ids == config.image_token_index, -100)
    return image | {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def trainer(kind, folder, data, **arguments) -> Trainer:
    torch.manual_seed(0)
    config = tiny_config(reconstruction=False)
    without_dropout(config.text_config)
    model = randomise(kind(config))
    settings = {"report_to": [], "use_cpu": True, "max_steps": 1, "logging_steps": 1, "save_strategy": "no"}
    settings |= {"per_device_train_batch_size": 1, "learning_rate": 0.0, "disable_tqdm": True} | arguments
    return Trainer(model, TrainingArguments(str(folder), **settings), train_dataset=data, eval_dataset=data)


# ---- transformers' Trainer


@pytest.mark.parametrize("kind", STAGES)
def test_accumulated_batches_are_averaged(kind, tmp_path):
    config = tiny_config()
    data = [example(kind, config, 0)] * 8  # the same record eight times: any mean is its loss
    once = trainer(kind, tmp_path, data)
    several = trainer(kind, tmp_path, data, gradient_accumulation_steps=8)
    logs = []
    for run in (once, several):
        run.train()
        logs.append(run.state.log_history[0])
    assert logs[1]["loss"] == pytest.approx(logs[0]["loss"], rel=1e-4)
    assert logs[1]["grad_norm"] == pytest.approx(logs[0]["grad_norm"], rel=1e-3)


def test_trainer_evaluates_logits(tmp_path):
    kind, seen = XFormerForConditionalGeneration, {}

    def measure(prediction):
        seen["logits"], seen["labels"] = prediction
        return {"shape": prediction.predictions.shape[1]}

    data = [example(kind, tiny_config(), number) for number in range(3)]
    run = trainer(kind, tmp_path, data)
    run.compute_metrics = measure
    metrics = run.evaluate()
    assert metrics["eval_shape"] == 10
    model = run.model.eval()
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    with torch.no_grad():
        found = model(**batch)
        torch.testing.assert_close(torch.tensor(seen["logits"]), found.logits)
        labels = batch.pop("labels")
        torch.testing.assert_close(model(**batch).logits, found.logits)
        expected = torch.nn.functional.cross_entropy(found.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(found.loss, expected)
    assert metrics["eval_loss"] == pytest.approx(found.loss.item(), rel=1e-4)


# ---- outputs


def test_tuples_and_what_is_recorded(images, texts):
    base, config = randomise(XFormerModel(tiny_config())).eval(), tiny_config()
    base.set_attn_implementation("eager")
    whole = base(images, output_attentions=True, output_hidden_states=True)
    assert len(whole.hidden_states) == 3
    assert torch.equal(whole.hidden_states[-1], whole.queries)
    assert [a.shape for a in whole.attentions] == [(4, 2, 4, 4)] * 2
    assert whole.clip_attentions[0].shape[-1] == 17
    assert torch.equal(base(images, return_dict=False)[0], whole.clip_tokens)
    model = randomise(XFormerForConditionalGeneration(config)).eval()
    model.set_attn_implementation("eager")
    ids, mask = llm_inputs(config, 4)
    found = model(images, ids, mask, output_attentions=True, output_hidden_states=True)
    assert [states.shape for states in found.hidden_states] == [(4, 9, 36)] * 3
    assert [attention.shape for attention in found.attentions] == [(4, 2, 9, 9)] * 2
    assert torch.equal(model(images, ids, mask, return_dict=False)[0], found.logits)
    features = model.get_image_features(images)
    assert features.pooler_output.shape == (4, 4, 36)
    assert features.last_hidden_state.shape == (4, 17, 32)
    assert torch.equal(model.get_image_features(images, return_dict=False)[1], features.pooler_output)
    first = randomise(XFormerForPreTraining(config)).eval()
    pairs = first(images, *texts, return_dict=False)
    assert isinstance(pairs, tuple)
    assert pairs[0].ndim == 0


@pytest.mark.parametrize("kind", [XFormerModel, XFormerForImageTextRetrieval, *STAGES])
def test_misspelt_arguments_are_refused(kind, images):
    with pytest.raises(TypeError, match="pixel_value"):
        kind(tiny_config())(pixel_value=images)


def test_an_assistant_is_refused(images):
    model = XFormerForConditionalGeneration(tiny_config())
    ids, mask = llm_inputs(model.config, 4)
    with pytest.raises(ValueError, match="assisted generation needs a prompt of tokens"):
        model.generate(images, ids, mask, assistant_model=model.language_model, max_new_tokens=2)


def test_sequences_repeat_the_prompt(images):
    model = randomise(XFormerForConditionalGeneration(tiny_config()), 0.5).eval()
    ids, mask = llm_inputs(model.config, 4)
    several = model.generate(images, ids, mask, max_new_tokens=3, num_beams=4, num_return_sequences=2)
    assert torch.equal(several[:, : ids.shape[1]], ids.repeat_interleave(2, dim=0))
    whole = model.generate(images, ids, mask, max_new_tokens=3, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(whole.sequences[:, : ids.shape[1]], ids)
    assert len(whole.scores) == whole.sequences.shape[1] - ids.shape[1]


# ---- vocabularies


@pytest.mark.parametrize("size", [70, 45])
def test_the_language_models_vocabulary_is_resized(images, size, tmp_path):
    model = randomise(XFormerForConditionalGeneration(tiny_config(image_token_index=44))).eval()
    model.resize_token_embeddings(size)
    assert model.get_input_embeddings().weight.shape == model.get_output_embeddings().weight.shape == (size, 36)
    assert model.config.text_config.vocab_size == size
    ids, mask = llm_inputs(model.config, 4)
    logits = model(images, ids, mask).logits
    assert logits.shape[-1] == size
    model.save_pretrained(tmp_path)
    again = XFormerForConditionalGeneration.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(images, ids, mask).logits, logits)


@pytest.mark.parametrize("size", [60, 48])
@pytest.mark.parametrize("text", [True, False])
def test_the_qformers_vocabulary_is_resized(images, texts, size, text, tmp_path):
    config = tiny_config(text_start_token_id=47, **({} if text else {"text_config": None}))
    model = randomise(XFormerForPreTraining(config)).eval()
    before = model.itg_logits(torch.ones(1, 1, 28))[..., :40]
    model.resize_token_embeddings(size)
    words, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert words.weight is head.weight
    assert len(model.itg_bias) == words.num_embeddings == model.config.qformer_config.vocab_size == size
    assert not text or model.config.text_config.vocab_size == 60
    logits = model.itg_logits(torch.ones(1, 1, 28))
    assert logits.shape[-1] == size
    torch.testing.assert_close(logits[..., :40], before)
    noise, negatives = torch.rand(4, 16), (torch.tensor([1, 2, 3, 0]), torch.tensor([3, 0, 1, 2]))
    loss = model(images, *texts, noise=noise, negatives=negatives).loss
    model.save_pretrained(tmp_path)
    again = XFormerForPreTraining.from_pretrained(tmp_path).eval()
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight
    torch.testing.assert_close(again(images, *texts, noise=noise, negatives=negatives).loss, loss)
