"""Each part of a model on disk or in other precision: weights are read only by their own module's forward."""

import pytest
import torch
from conftest import llm_inputs, randomise, tiny_config
from test_attach import answers, host, tiny_mae, with_trained_fusion
from transformers import BitsAndBytesConfig, QuantoConfig

from xformer_mllm import XFormerForConditionalGeneration, XFormerForPreTraining
from xformer_mllm.attach import attach_xformer
from xformer_mllm.checkpoints import load_model
from xformer_mllm.model.modeling_xformer import add_lora
from xformer_mllm.model.vision_encoders import scaled
from xformer_mllm.variants import variant_config

VARIANTS = ("xformer", "early_cross_attention", "clip_shallow", "concat", "qformer")


def maps(model, tied: dict[str, str]):
    """Device maps: every part alone on disk, the base as a whole on disk, and all parts."""
    outer = [name for name, _ in model.named_children()]
    own = [name for name, _ in model.named_parameters() if "." not in name]
    inner = [f"xformer.{name}" for name, _ in model.xformer.named_children()]
    for part in [*(name for name in outer if name not in tied.values()), *inner]:
        split = part.startswith("xformer.")
        parts = [name for name in outer if not (split and name == "xformer")]
        parts += [*own, *(inner if split else ()), *(["xformer.query_tokens"] if split else ())]
        yield {name: "disk" if name in (part, tied.get(part)) else "cpu" for name in parts}


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_part_of_stage_2_may_be_on_disk(images, variant, tmp_path):
    model = randomise(XFormerForConditionalGeneration(variant_config(variant, tiny_config()))).eval()
    ids, mask = llm_inputs(model.config, 4)
    model.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        logits, generated = model(images, ids, mask).logits, model.generate(images, ids, mask, max_new_tokens=4)
        for number, devices in enumerate(maps(model, {})):
            again = XFormerForConditionalGeneration.from_pretrained(
                tmp_path / "model", device_map=devices, offload_folder=tmp_path / str(number)
            ).eval()
            torch.testing.assert_close(again(images, ids, mask).logits, logits)
            assert torch.equal(again.generate(images, ids, mask, max_new_tokens=4), generated)


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_part_of_stage_1_may_be_on_disk(images, texts, variant, tmp_path):
    model = randomise(XFormerForPreTraining(variant_config(variant, tiny_config()))).eval()
    given = {"negatives": (torch.tensor([1, 2, 3, 0]), torch.tensor([3, 0, 1, 2])), "noise": torch.rand(4, 16)}
    model.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        loss, captions = model(images, *texts, **given).loss, model.caption(images, 39, 4)
        tied = {"xformer": "itg_head", "xformer.embeddings": "itg_head"}
        for number, devices in enumerate(maps(model, tied)):
            again = XFormerForPreTraining.from_pretrained(
                tmp_path / "model", device_map=devices, offload_folder=tmp_path / str(number)
            ).eval()
            torch.testing.assert_close(again(images, *texts, **given).loss, loss)
            assert torch.equal(again.caption(images, 39, 4), captions)


@pytest.mark.parametrize("budget", [100_000, 300_000])
@pytest.mark.parametrize("kind", [XFormerForConditionalGeneration, XFormerForPreTraining])
def test_little_memory_and_an_automatic_device_map(images, texts, kind, budget, tmp_path):
    model = randomise(kind(tiny_config())).eval()
    model.save_pretrained(tmp_path / "model")
    again = kind.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": budget}, offload_folder=tmp_path / "offload"
    ).eval()
    assert set(again.hf_device_map.values()) == {"cpu", "disk"}
    with torch.no_grad():
        if kind is XFormerForPreTraining:
            assert torch.equal(again.caption(images, 39, 4), model.caption(images, 39, 4))
        else:
            inputs = (images, *llm_inputs(model.config, 4))
            torch.testing.assert_close(again(*inputs).logits, model(*inputs).logits)


@pytest.mark.parametrize("dtype", ["dtype", "torch_dtype"])
def test_the_dtype_is_that_of_the_frozen_parts(dtype, tmp_path):
    XFormerForConditionalGeneration(tiny_config()).save_pretrained(tmp_path)
    model = XFormerForConditionalGeneration.from_pretrained(tmp_path, **{dtype: torch.bfloat16})
    assert model.dtype == model.language_model.dtype == torch.bfloat16
    model.freeze()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


# ---- quantised


def quantisers() -> dict:
    """Settings by name, of the packages that are installed."""
    found = {
        "8 bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
        "4 bit": lambda: BitsAndBytesConfig(load_in_4bit=True),
    }

    def torchao():
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig())

    return {**found, "torchao": torchao, "quanto": lambda: QuantoConfig(weights="int8")}


PACKAGES = {"8 bit": "bitsandbytes", "4 bit": "bitsandbytes", "torchao": "torchao", "quanto": "optimum.quanto"}


@pytest.mark.parametrize("name", PACKAGES)
def test_a_quantised_model_trains_what_it_trained(runs, name):
    pytest.importorskip(PACKAGES[name])
    model, processor = load_model(runs / "stage2", [XFormerForConditionalGeneration])
    model.freeze()
    trained = {key: p.shape for key, p in model.named_parameters() if p.requires_grad}
    small = XFormerForConditionalGeneration.from_pretrained(
        runs / "stage2" / "model", quantization_config=quantisers()[name]()
    )
    small.freeze()
    assert {key: p.shape for key, p in small.named_parameters() if p.requires_grad} == trained
    assert type(small.language_model.model.decoder.layers[0].fc1.weight) is not torch.nn.Parameter or name == "torchao"
    inputs = processor(images=torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8), text=["red", "a blue circle"])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == processor.image_token_id, -100)
    loss = small.train()(**inputs, labels=labels).loss
    loss.backward()
    assert all(p.grad is not None for p in small.parameters() if p.requires_grad)
    with torch.no_grad():
        assert loss.item() == pytest.approx(model.train()(**inputs, labels=labels).loss.item(), rel=0.1)
    assert small.eval().generate(**inputs, max_new_tokens=2).shape[0] == 2


def test_adapters_train_on_a_quantised_language_model(runs):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    model = XFormerForConditionalGeneration.from_pretrained(
        runs / "stage2" / "model", quantization_config=quantisers()["8 bit"]()
    )
    add_lora(model.language_model, 2)
    model.freeze()
    adapters = [p for name, p in model.named_parameters() if "lora_" in name]
    assert adapters
    assert all(p.requires_grad and p.dtype == torch.float32 for p in adapters)
    ids, mask = llm_inputs(model.config, 2)
    ids[:, : model.config.num_query_tokens] = model.config.image_token_index
    images = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    model.train()(
        images, ids, mask, labels=ids.masked_fill(ids == model.config.image_token_index, -100)
    ).loss.backward()
    assert all(p.grad is not None for p in adapters)


# ---- attached


@pytest.mark.parametrize(
    "part", ["vision_model", "qformer", "language_model", "xformer.mae_encoder", "xformer.fusion"]
)
def test_each_part_of_an_attached_model_may_be_on_disk(images, part, tmp_path):
    from accelerate import disk_offload

    config = tiny_config()
    pixels = scaled(images, 32, config.clip_mean, config.clip_std, torch.float32)
    model, inputs = host("blip2")
    with_trained_fusion(attach_xformer(model, tiny_mae()))
    expected = answers(model, pixels, inputs)
    disk_offload(model.get_submodule(part), tmp_path, execution_device=torch.device("cpu"))
    for found, one in zip(answers(model, pixels, inputs), expected, strict=True):
        torch.testing.assert_close(found, one)
