"""X-Former on an existing BLIP-2 and InstructBLIP: step 0, training, saving, taking it off; parity with our own model."""

import copy
import resource
import time
from pathlib import Path

import pytest
import torch
from conftest import llm_inputs, randomise, tiny_config
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    OPTModel,
    SiglipVisionModel,
    T5Config,
    ViTMAEForPreTraining,
    ViTMAEModel,
)

import xformer_mllm
from xformer_mllm import XFormerConfig, XFormerForConditionalGeneration
from xformer_mllm.attach import attach_xformer, detach_xformer
from xformer_mllm.model.modeling_xformer import without_dropout
from xformer_mllm.model.vision_encoders import mae_positions, scaled
from xformer_mllm.variants import variant_config

VISION = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
T5 = T5Config(vocab_size=60, d_model=36, d_kv=18, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=0)


def host(kind: str):
    """A tiny random model without dropout, and what it is called with besides its image."""
    config = tiny_config("blip2")
    without_dropout(config.text_config)
    ids, mask = llm_inputs(config, 4)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if kind == "instructblip":
        qformer = InstructBlipQFormerConfig(
            vocab_size=50,
            hidden_size=28,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=44,
            encoder_hidden_size=32,
            max_position_embeddings=40,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        whole = InstructBlipConfig(
            vision_config=InstructBlipVisionConfig(**VISION, image_size=32, patch_size=8),
            qformer_config=qformer,
            text_config=config.text_config,
            num_query_tokens=4,
            image_token_index=59,
        )
        read = torch.randint(5, 40, (4, 6))
        read_mask = torch.ones_like(read)
        read_mask[2, 4:] = 0
        model = InstructBlipForConditionalGeneration(whole)
        return randomise(model).eval(), inputs | {"qformer_input_ids": read, "qformer_attention_mask": read_mask}
    config.qformer_config.use_qformer_text_input = False
    whole = Blip2Config(
        vision_config=config.clip_config,
        qformer_config=config.qformer_config,
        text_config=T5 if kind == "blip2-t5" else config.text_config,
        num_query_tokens=4,
        image_token_index=59,
    )
    if kind == "blip2-t5":
        inputs["decoder_input_ids"] = torch.randint(5, 40, (4, 3))
    return randomise(Blip2ForConditionalGeneration(whole)).eval(), inputs


HOSTS = ("blip2", "blip2-t5", "instructblip")
hosts = pytest.mark.parametrize("kind", HOSTS)


def tiny_mae() -> ViTMAEModel:
    mae = ViTMAEModel(tiny_config().mae_config)
    positions = mae.embeddings.position_embeddings  # transformers leaves them at zero
    positions.data.copy_(mae_positions(positions.shape[1] - 1, positions.shape[2]))
    return randomise(mae).eval()


def with_trained_fusion(model):
    randomise(model.xformer.fusion)
    return model


@pytest.fixture
def pixels(images):
    """float[4, 3, 32, 32], as a BLIP-2's processor normalises."""
    config = tiny_config()
    return scaled(images, 32, config.clip_mean, config.clip_std, torch.float32)


def answers(model, pixels, inputs):
    """Logits, greedy ids, beam ids."""
    prompt = {name: tensor for name, tensor in inputs.items() if not name.startswith("decoder")}
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        return (
            model(pixel_values=pixels, **inputs).logits,
            model.generate(pixels, **prompt, **settings),
            model.generate(pixels, **prompt, **settings, num_beams=3),
        )


def same(a, b) -> bool:
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


@hosts
def test_at_step_0_the_model_answers_bit_for_bit_as_before(pixels, kind):
    model, inputs = host(kind)
    before = answers(model, pixels, inputs)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mae = tiny_mae()
    mae_before = copy.deepcopy(mae.state_dict())
    assert attach_xformer(model, mae) is model
    assert same(answers(model, pixels, inputs), before)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in weights.items())
    assert all(
        torch.equal(tensor, model.xformer.mae_encoder.state_dict()[name]) for name, tensor in mae_before.items()
    )
    with_trained_fusion(model)
    assert not torch.equal(answers(model, pixels, inputs)[0], before[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@hosts
def test_step_0_in_half_precision_with_an_fp32_fusion(pixels, kind, dtype):
    model, inputs = host(kind)
    model, pixels = model.to(dtype), pixels.to(dtype)
    with torch.no_grad():
        before = model(pixel_values=pixels, **inputs).logits
        attach_xformer(model, tiny_mae().to(dtype))
        assert torch.equal(model(pixel_values=pixels, **inputs).logits, before)
    assert {parameter.dtype for parameter in model.xformer.fusion.parameters()} == {torch.float32}
    assert model.xformer.mae_encoder.dtype == dtype


def test_it_is_our_own_x_former_with_the_same_weights(images, pixels):
    """Also says that the MAE gets pixels by its own mean and deviation, undone from the CLIP's."""
    blip2, inputs = host("blip2")
    config = tiny_config("blip2", reconstruction=False)
    config.qformer_config.use_qformer_text_input = False
    ours = XFormerForConditionalGeneration(config)
    theirs = with_trained_fusion(attach_xformer(blip2, tiny_mae()))
    names = {"vision_model.post_layernorm.": "xformer.clip_layernorm.", "vision_model.": "xformer.clip_encoder.tower."}
    renamed = {}
    for name, tensor in theirs.state_dict().items():
        for old, new in names.items():
            if name.startswith(old):
                name = new + name.removeprefix(old)
        renamed["xformer." + name if name.startswith(("qformer.", "query_tokens")) else name] = tensor
    missing, unexpected = ours.load_state_dict(renamed, strict=False)
    assert not unexpected
    assert all("post_layernorm" in name for name in missing)
    ours.xformer.clip_layernorm.eps = theirs.vision_model.post_layernorm.eps
    ours.eval()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        logits = theirs(pixels, **inputs).logits
        torch.testing.assert_close(logits, ours(images, ids, mask).logits, atol=1e-5, rtol=1e-4)
        ours.config.mae_mean = [0.5, 0.5, 0.5]
        assert not torch.allclose(logits, ours(images, ids, mask).logits, atol=1e-5, rtol=1e-4)
    ours.config.mae_mean = theirs.xformer.config.mae_mean
    generated = theirs.generate(pixels, ids, mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(ours.generate(images, ids, mask, max_new_tokens=6), generated)


def test_pixels_are_denormalised_by_the_given_statistics(images, pixels):
    mae, half, seen = tiny_mae(), ([0.5] * 3, [0.25] * 3), []
    given = {"clip_mean": half[0], "clip_std": half[1]}
    for settings, normalised in (({}, pixels), (given, scaled(images, 32, *half, torch.float32))):
        model, _ = host("blip2")
        attach_xformer(model, mae, **settings)
        model.vision_model.register_forward_hook(lambda *call: seen.append(call[-1][0].mae_tokens))
        model.get_image_features(normalised)
    torch.testing.assert_close(*seen, atol=1e-5, rtol=1e-4)


def loss_of(model, pixels, inputs):
    ids = inputs["input_ids"]
    labels = ids.masked_fill(ids == model.config.image_token_index, -100)
    return model(pixel_values=pixels, labels=labels, **inputs).loss


# The key's bias adds the same to all scores of a query: softmax has no gradient there.
NO_GRADIENT = ("key.bias",)


@pytest.mark.parametrize("kind", ["blip2", "instructblip"])
@pytest.mark.parametrize(("trained", "steps"), [(False, 3), (True, 1)])
def test_the_fusion_gets_a_gradient_and_the_mae_none(pixels, kind, trained, steps):
    """A fresh fusion opens from its end: the queries' half has its gradient in the second step, M's in the third."""
    model, inputs = host(kind)
    model.vision_model.requires_grad_(False)
    asked = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    attach_xformer(model, tiny_mae())
    assert all(parameter.requires_grad == asked[name] for name, parameter in model.named_parameters() if name in asked)
    assert not any(parameter.requires_grad for parameter in model.xformer.mae_encoder.parameters())
    if trained:
        with_trained_fusion(model)
    model.train()
    assert model.xformer.training
    assert not model.xformer.mae_encoder.training
    fusion = dict(model.xformer.fusion.named_parameters())
    optimiser = torch.optim.AdamW(fusion.values(), lr=1e-2)
    moved, losses = [set()], []
    for _ in range(steps):
        optimiser.zero_grad()
        loss = loss_of(model, pixels, inputs)
        loss.backward()
        losses.append(loss.item())
        moved.append(moved[-1] | {n for n, p in fusion.items() if p.grad is not None and p.grad.abs().sum() > 0})
        optimiser.step()
    assert {name for name in fusion if not name.endswith(NO_GRADIENT)} <= moved[-1]
    if not trained:
        assert {"blocks.0.queries_read_mae.output.weight", "blocks.0.queries_feed_forward.output.weight"} <= moved[1]
        queries = {name for name in fusion if "queries_" in name.split(".")[2] and not name.endswith(NO_GRADIENT)}
        assert {name for name in queries if not name.startswith("blocks.0.mae_")} <= moved[2]
        assert losses[-1] < losses[0]


@hosts
@pytest.mark.parametrize("whole", [False, True])
def test_save_and_load(pixels, kind, whole, tmp_path):
    model, inputs = host(kind)
    with_trained_fusion(attach_xformer(model, tiny_mae().to(torch.bfloat16)))
    wanted = answers(model, pixels, inputs)
    model.save_pretrained(tmp_path / "model", max_shard_size="50KB")
    model.xformer.save_pretrained(tmp_path / "xformer")
    assert {file.suffix for file in (tmp_path / "xformer").iterdir()} == {".json", ".safetensors"}

    again = type(model).from_pretrained(tmp_path / "model")
    assert not same(answers(again, pixels, inputs)[:1], wanted[:1])
    attach_xformer(again, tmp_path / ("model" if whole else "xformer"))
    assert same(answers(again, pixels, inputs), wanted)
    assert {n: (p.dtype, p.requires_grad) for n, p in again.named_parameters()} == {
        n: (p.dtype, p.requires_grad) for n, p in model.named_parameters()
    }


@hosts
def test_off_and_on_again(pixels, kind, tmp_path):
    model, inputs = host(kind)
    before, config = answers(model, pixels, inputs), model.config.to_dict()
    names = list(model.state_dict())
    with_trained_fusion(attach_xformer(model, tiny_mae()))
    attached = answers(model, pixels, inputs)
    part = detach_xformer(model)
    assert same(answers(model, pixels, inputs), before)
    assert (list(model.state_dict()), model.config.to_dict()) == (names, config)
    attach_xformer(model, part)
    assert same(answers(model, pixels, inputs), attached)


def test_a_copy_of_the_model_reads_its_own_fusion(pixels):
    model, inputs = host("blip2")
    with_trained_fusion(attach_xformer(model, tiny_mae()))
    wanted = answers(model, pixels, inputs)
    other = copy.deepcopy(model)
    randomise(model.xformer.fusion)
    assert same(answers(other, pixels, inputs), wanted)
    assert not torch.equal(answers(model, pixels, inputs)[0], wanted[0])
    detach_xformer(other)
    assert not torch.equal(answers(other, pixels, inputs)[0], wanted[0])


def test_gradient_checkpointing_changes_no_gradient(pixels):
    model, inputs = host("blip2")
    with_trained_fusion(attach_xformer(model, tiny_mae())).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            getattr(
                model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
            )()  # its name from 5.2x on
        model.zero_grad()
        loss_of(model, pixels, inputs).backward()
        gradients.append({n: p.grad.clone() for n, p in model.xformer.fusion.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-4)


def test_any_vision_tower_will_do(pixels):
    config = tiny_config()
    towers = (
        ViTMAEForPreTraining(config.mae_config),
        Dinov2Model(
            Dinov2Config(hidden_size=40, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=8)
        ),
        DINOv3ViTModel(
            DINOv3ViTConfig(
                hidden_size=40, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, patch_size=8
            )
        ),
        SiglipVisionModel(tiny_config("siglip").clip_config),
        CLIPModel(
            CLIPConfig(
                vision_config=config.clip_config.to_dict(), text_config={"hidden_size": 32, "num_hidden_layers": 1}
            )
        ),
    )
    for tower in towers:
        model, inputs = host("blip2")
        with torch.no_grad():
            before = model(pixels, **inputs).logits
            attach_xformer(model, tower)
            assert torch.equal(model(pixels, **inputs).logits, before)
            with_trained_fusion(model)
            assert not torch.equal(model(pixels, **inputs).logits, before)


def test_larger_images_are_brought_to_the_maes_size():
    model, inputs = host("blip2")
    attach_xformer(model, tiny_mae())
    with torch.no_grad():
        logits = model(torch.randn(4, 3, 64, 64), **inputs, interpolate_pos_encoding=True).logits
    assert torch.isfinite(logits).all()


def test_several_blocks():
    model, _ = host("blip2")
    assert len(attach_xformer(model, tiny_mae(), fusion_blocks=2).xformer.fusion.blocks) == 2


def test_what_cannot_be_attached_is_said_in_one_line(pixels, tmp_path):
    model, _ = host("blip2")
    retrieval = Blip2ForImageTextRetrieval(model.config)
    with pytest.raises(ValueError, match="not to a Blip2ForImageTextRetrieval"):
        attach_xformer(retrieval, tiny_mae())
    with pytest.raises(ValueError, match="no X-Former is attached"):
        detach_xformer(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no attached X-Former was saved there"):
        attach_xformer(model, tmp_path)
    attach_xformer(model, tiny_mae())
    with pytest.raises(ValueError, match="attached to this model already"):
        attach_xformer(model, tiny_mae())
    with pytest.raises(ValueError, match="without the vision model"):
        model.qformer(query_embeds=model.query_tokens, encoder_hidden_states=torch.zeros(1, 17, 32))
    part = detach_xformer(model)
    part.config.num_query_tokens = 5
    with pytest.raises(ValueError, match="for 5 queries of width 28, but the model has 4 of width 28"):
        attach_xformer(model, part)


@pytest.mark.parametrize(
    ("mae", "settings", "message"),
    [
        (None, {}, "mae must be a vision tower of transformers or a saved fusion's folder, not a NoneType"),
        (lambda: OPTModel(tiny_config().text_config), {}, "must be a vision tower, not a OPTModel"),
        (tiny_mae, {"fusion": "concat"}, "unknown settings: fusion; a fusion takes fusion_blocks, mae_mean"),
        (tiny_mae, {"fusion_blokcs": 2}, "unknown settings: fusion_blokcs"),
        (lambda: "my-fusion", {"fusion_blocks": 2}, "has its own settings; leave out fusion_blocks"),
        (lambda: detach_xformer(attach_xformer(host("blip2")[0], tiny_mae())), {"mae_mean": [0.5] * 3}, "mae_mean"),
    ],
)
def test_a_wrong_second_encoder_or_setting_is_an_error(mae, settings, message):
    model, _ = host("blip2")
    with pytest.raises(ValueError, match=message) as caught:
        attach_xformer(model, mae and mae(), **settings)
    assert "\n" not in str(caught.value)
    assert not hasattr(model, "xformer")


def test_a_saved_model_of_another_kind_is_an_error(tmp_path):
    variant = variant_config("qformer", tiny_config("blip2"))
    XFormerForConditionalGeneration(variant).save_pretrained(tmp_path)
    model, _ = host("blip2")
    with pytest.raises(ValueError, match="no attached X-Former"):
        attach_xformer(model, tmp_path)


def test_the_run_in_the_docs_prints_what_they_say(monkeypatch, capsys):
    monkeypatch.setattr(xformer_mllm, "attach_xformer", attach_xformer, raising=False)
    text = (Path(__file__).parents[1] / "docs" / "attach.md").read_text(encoding="utf-8").partition("## A run")[2]
    code, said = (text.partition(f"```{kind}\n")[2].partition("```")[0] for kind in ("python", "text"))
    exec(code, {})
    printed = capsys.readouterr().out.splitlines()
    # The losses' last digit is the machine's.
    assert [line[:-1] for line in printed] == [line[:-1] for line in said.splitlines()]


@pytest.mark.slow
def test_at_full_size_in_bf16():
    """BLIP-2 with OPT 2.7B and MAE ViT-H of random weights: 9 GB. Prints what docs/attach.md shows (pytest -s)."""

    def said(what, began):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{what}: {time.perf_counter() - began:.0f} s, peak {peak:.1f} GiB")

    config = XFormerConfig.paper()
    config.text_config.update({"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1})
    whole = Blip2Config(
        vision_config=config.clip_config.to_dict(),
        text_config=without_dropout(config.text_config),
        image_token_index=50265,
    )
    whole.text_config.vocab_size = 50304  # as published: the placeholder is in it
    began = time.perf_counter()
    model = Blip2ForConditionalGeneration._from_config(whole, dtype=torch.bfloat16, attn_implementation="eager").eval()
    mae = ViTMAEModel._from_config(config.mae_config, dtype=torch.bfloat16)
    model.requires_grad_(False)
    said("made", began)
    ids = torch.cat([torch.full((2, 32), 50265), torch.randint(5, 50000, (2, 8))], dim=1)
    pixels = torch.randn(2, 3, 224, 224, dtype=torch.bfloat16)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with torch.no_grad():
        model.query_tokens.normal_(std=0.02)
        began = time.perf_counter()
        before = model(pixels, **inputs).logits
        said("BLIP-2's forward pass of 2 images", began)
        generated = model.generate(pixels, **inputs, **settings)
        attach_xformer(model, mae)
        began = time.perf_counter()
        assert torch.equal(model(pixels, **inputs).logits, before)
        said("the same, with X-Former: logits equal bit for bit", began)
        assert torch.equal(model.generate(pixels, **inputs, **settings), generated)
    counts = [
        sum(p.numel() for p in part.parameters()) / 1e6 for part in (model.xformer.fusion, model.xformer.mae_encoder)
    ]
    print(f"fusion {counts[0]:.1f}M weights, second encoder {counts[1]:.0f}M")
    model.train()
    optimiser = torch.optim.AdamW(model.xformer.fusion.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        began = time.perf_counter()
        optimiser.zero_grad()
        loss = loss_of(model, pixels, inputs)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        said(f"step, loss {loss.item():.4f}", began)
    assert all(torch.isfinite(p.grad).all() for p in model.xformer.fusion.parameters())
    assert losses[-1] < losses[0]
