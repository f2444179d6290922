"""One model in several threads, copied, compiled and exported: nothing is kept on modules during forward."""

import copy
import io
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import llm_inputs, randomise, tiny_config
from test_attach import HOSTS, host, tiny_mae, with_trained_fusion

from xformer_mllm import (
    XFormerForConditionalGeneration,
    XFormerForImageTextRetrieval,
    XFormerForPreTraining,
    XFormerModel,
)
from xformer_mllm.attach import attach_xformer
from xformer_mllm.model.vision_encoders import scaled
from xformer_mllm.variants import VARIANTS, variant_config

KINDS = [name for name in VARIANTS if name != "dinov2"]
THREADS, ANSWERS = 8, 100


def generation(variant: str, std: float = 0.1) -> XFormerForConditionalGeneration:
    return randomise(XFormerForConditionalGeneration(variant_config(variant, tiny_config())), std).eval()


def attached(kind: str):
    model, inputs = host(kind)
    return with_trained_fusion(attach_xformer(model, tiny_mae())), inputs


def normalised(images):
    config = tiny_config()
    return scaled(images, 32, config.clip_mean, config.clip_std, torch.float32)


# ---- threads


def in_threads(answer, count: int) -> None:
    """Eight threads give the answers that one gives."""
    with torch.no_grad():
        expected = [answer(number) for number in range(ANSWERS)]
    assert len({tuple(one.flatten().tolist()) for one in expected}) > count // 2  # a mix-up would be seen

    def answers(_):
        with torch.no_grad():
            return [answer(number) for number in range(ANSWERS)]

    with ThreadPoolExecutor(THREADS) as pool:
        for found in pool.map(answers, range(THREADS)):
            assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("variant", ["xformer", "clip_shallow", "early_cross_attention"])
def test_threads_share_a_model(variant):
    model = generation(variant)
    images = torch.randint(0, 256, (ANSWERS, 1, 3, 32, 32), dtype=torch.uint8)
    ids, mask = llm_inputs(model.config, 1)
    in_threads(lambda number: model(images[number], ids, mask).logits, ANSWERS)


@pytest.mark.parametrize("kind", ["blip2", "instructblip"])
def test_threads_share_an_attached_model(kind):
    model, inputs = attached(kind)
    inputs = {name: tensor[:1] for name, tensor in inputs.items()}
    pixels = normalised(torch.randint(0, 256, (ANSWERS, 3, 32, 32), dtype=torch.uint8))
    in_threads(lambda number: model(pixel_values=pixels[number, None], **inputs).logits, ANSWERS)


def test_threads_generate(images):
    model = generation("xformer", std=0.5)
    ids, mask = llm_inputs(model.config, 1)
    many = torch.randint(0, 256, (ANSWERS, 1, 3, 32, 32), dtype=torch.uint8)
    in_threads(lambda number: model.generate(many[number], ids, mask, max_new_tokens=4, min_new_tokens=4), 20)


# ---- copies


def halved(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    return model


@pytest.mark.parametrize("variant", KINDS)
def test_a_copy_is_a_model_of_its_own(images, variant):
    model = generation(variant)
    ids, mask = llm_inputs(model.config, 4)
    with torch.no_grad():
        before = model(images, ids, mask).logits
        half = halved(copy.deepcopy(model))
        after = half(images, ids, mask).logits
        assert torch.equal(model(images, ids, mask).logits, before)
        halved(model)
        assert torch.equal(model(images, ids, mask).logits, after)
        average = torch.optim.swa_utils.AveragedModel(model)
        assert torch.equal(average(images, ids, mask).logits, after)


@pytest.mark.parametrize("variant", KINDS)
def test_a_whole_model_is_saved_and_loaded_by_torch(images, variant):
    model = generation(variant)
    ids, mask = llm_inputs(model.config, 4)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    with torch.no_grad():
        assert torch.equal(again(images, ids, mask).logits, model(images, ids, mask).logits)


@pytest.mark.parametrize("kind", HOSTS)
def test_a_copy_of_an_attached_model(images, kind):
    model, inputs = attached(kind)
    with torch.no_grad():
        before = model(pixel_values=normalised(images), **inputs).logits
        other = copy.deepcopy(model)
        halved(other.xformer)
        assert not torch.equal(other(pixel_values=normalised(images), **inputs).logits, before)
        assert torch.equal(model(pixel_values=normalised(images), **inputs).logits, before)


# ---- compile and export


def compiled(model):
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="eager")


GRAPHS = ("xformer", "early_cross_attention", "clip_shallow", "concat", "qformer")


@pytest.mark.parametrize("variant", GRAPHS)
def test_stage_2_compiles_as_one_graph(images, variant):
    model = generation(variant)
    ids, mask = llm_inputs(model.config, 4)
    labels = ids.masked_fill(ids == 59, -100)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model)(images, ids, mask).logits, model(images, ids, mask).logits)
        whole = model(images, ids, mask, labels=labels).loss
        torch.testing.assert_close(compiled(model)(images, ids, mask, labels=labels).loss, whole)


@pytest.mark.parametrize("variant", GRAPHS)
def test_stage_1_compiles_as_one_graph(images, texts, variant):
    model = randomise(XFormerForPreTraining(variant_config(variant, tiny_config()))).eval()
    given = {"negatives": (torch.tensor([1, 2, 3, 0]), torch.tensor([3, 0, 1, 2])), "noise": torch.rand(4, 16)}
    with torch.no_grad():
        expected = model(images, *texts, **given).loss
        torch.testing.assert_close(compiled(model)(images, *texts, **given).loss, expected)


@pytest.mark.parametrize("matching", [False, True])
def test_retrieval_compiles_as_one_graph(images, texts, matching):
    model = randomise(XFormerForImageTextRetrieval(tiny_config())).eval()
    with torch.no_grad():
        expected = model(images, *texts, use_image_text_matching_head=matching).logits_per_image
        found = compiled(model)(images, *texts, use_image_text_matching_head=matching).logits_per_image
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", HOSTS)
def test_an_attached_model_compiles_as_one_graph(images, kind):
    model, inputs = attached(kind)
    with torch.no_grad():
        expected = model(pixel_values=normalised(images), **inputs).logits
        torch.testing.assert_close(compiled(model)(pixel_values=normalised(images), **inputs).logits, expected)


class Output(torch.nn.Module):
    """One tensor of a model's output, which is what `torch.export` returns."""

    def __init__(self, model, name):
        super().__init__()
        self.model, self.name = model, name

    def forward(self, *inputs):
        return self.model(*inputs)[self.name]


@pytest.mark.parametrize("variant", GRAPHS)
def test_models_are_exported_strictly(images, variant):
    model, base = generation(variant), randomise(XFormerModel(variant_config(variant, tiny_config()))).eval()
    given = {"logits": (model, (images, *llm_inputs(model.config, 4))), "fused_queries": (base, (images / 255,))}
    for name, (whole, inputs) in given.items():
        torch._dynamo.reset()
        with torch.no_grad():
            program = torch.export.export(Output(whole, name), inputs, strict=True)
            torch.testing.assert_close(program.module()(*inputs), whole(*inputs)[name])
