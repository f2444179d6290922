"""Layouts of LAVIS, BERT and the MAE (its authors' and transformers'), against what they compute.

A LAVIS checkpoint is run by the few lines of arithmetic that its code comes to (salesforce/LAVIS 506965b
lavis/models/eva_vit.py, blip2_models/{Qformer,blip2,blip2_qformer,blip2_opt}.py), not by transformers.
"""

import argparse

import pytest
import torch
from published import LAVIS, TINY, differences, eva, fails, original_mae, random_tensors, record, run
from torch.nn import functional
from transformers import OPTForCausalLM, T5ForConditionalGeneration

from xformer_mllm import XFormerForConditionalGeneration, XFormerForPreTraining
from xformer_mllm.checkpoints import load_model
from xformer_mllm.model.vision_encoders import scaled

pytest_plugins = ["published_files"]


@pytest.mark.parametrize("mae", ["mae_new", "mae_saved"])
def test_old_and_new_names_of_a_mae_give_the_same(files, converted, mae, tmp_path):
    words = ("--qformer", "blip2", "--mae", mae, "--llm", "opt", "--dtype", "float32")
    assert run(files, tmp_path / "out", *words) == 0
    a, b = (XFormerForConditionalGeneration.from_pretrained(path).xformer for path in (converted, tmp_path / "out"))
    assert all(torch.equal(t, b.mae_encoder.state_dict()[n]) for n, t in a.mae_encoder.state_dict().items())
    assert all(torch.equal(t, b.mae_decoder.state_dict()[n]) for n, t in a.mae_decoder.state_dict().items())


def apply(tensors, name, x):
    return functional.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])


def normed(tensors, name, x, eps):
    return functional.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps)


def attend(query, key, value, heads, mask=None):
    query, key, value = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return (scores if mask is None else scores + mask).softmax(-1).matmul(value).transpose(1, 2).flatten(2)


def lavis_eva(tensors, pixels, blocks):
    """eva_vit.py `forward_features` of the first `blocks` blocks."""
    x = functional.conv2d(pixels, tensors["patch_embed.proj.weight"], tensors["patch_embed.proj.bias"], stride=14)
    x = torch.cat([tensors["cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
    x = x + tensors["pos_embed"]
    for number in range(blocks):
        block = {
            n.removeprefix(f"blocks.{number}."): t for n, t in tensors.items() if n.startswith(f"blocks.{number}.")
        }
        bias = torch.cat([block["attn.q_bias"], torch.zeros_like(block["attn.v_bias"]), block["attn.v_bias"]])
        qkv = functional.linear(normed(block, "norm1", x, 1e-6), block["attn.qkv.weight"], bias)
        x = x + apply(block, "attn.proj", attend(*qkv.chunk(3, dim=-1), heads=16))
        x = x + apply(block, "mlp.fc2", functional.gelu(apply(block, "mlp.fc1", normed(block, "norm2", x, 1e-6))))
    return x


def lavis_qformer_states(tensors, image=None, ids=None, queries=True, mask=None):
    """Qformer.py `BertModel.forward`: the states of the queries, then of the text."""
    bert = {n.removeprefix("Qformer.bert."): t for n, t in tensors.items()}
    parts = [tensors["query_tokens"].expand(len(image), -1, -1)] if queries else []
    length = tensors["query_tokens"].shape[1] if queries else 0
    if ids is not None:
        words = bert["embeddings.word_embeddings.weight"][ids]
        parts.append(words + bert["embeddings.position_embeddings.weight"][: ids.shape[1]])
    x = normed(bert, "embeddings.LayerNorm", torch.cat(parts, dim=1), 1e-12)

    def attention(layer, name, x, context, mask=None):
        states = [
            apply(layer, f"{name}.self.{part}", c) for part, c in (("query", x), ("key", context), ("value", context))
        ]
        states = apply(layer, f"{name}.output.dense", attend(*states, heads=2, mask=mask))
        return normed(layer, f"{name}.output.LayerNorm", states + x, 1e-12)

    def feed_forward(layer, suffix, x):
        states = functional.gelu(apply(layer, f"intermediate{suffix}.dense", x))
        return normed(layer, f"output{suffix}.LayerNorm", apply(layer, f"output{suffix}.dense", states) + x, 1e-12)

    for number in range(4):
        prefix = f"encoder.layer.{number}."
        layer = {n.removeprefix(prefix): t for n, t in bert.items() if n.startswith(prefix)}
        x = attention(layer, "attention", x, x, mask)
        parts = []
        if queries:
            asked = x[:, :length]
            if number % 2 == 0:
                asked = attention(layer, "crossattention", asked, image)
            parts.append(feed_forward(layer, "_query", asked))
        if ids is not None:
            parts.append(feed_forward(layer, "", x[:, length:]))
        x = torch.cat(parts, dim=1)
    return x[:, :length], x[:, length:]


def mae_blocks(tensors, name, x, heads):
    """timm's `Block`, once per block of the file."""
    block = {n.removeprefix(f"{name}.0."): t for n, t in tensors.items() if n.startswith(f"{name}.0.")}
    qkv = apply(block, "attn.qkv", normed(block, "norm1", x, 1e-6))
    x = x + apply(block, "attn.proj", attend(*qkv.chunk(3, dim=-1), heads=heads))
    return x + apply(block, "mlp.fc2", functional.gelu(apply(block, "mlp.fc1", normed(block, "norm2", x, 1e-6))))


def original_mae_forward(tensors, pixels, kept, heads):
    """models_mae.py `forward` with the patches `kept`: the encoder's states, the prediction, the target patches."""
    patch = tensors["patch_embed.proj.weight"].shape[-1]
    x = functional.conv2d(pixels, tensors["patch_embed.proj.weight"], tensors["patch_embed.proj.bias"], stride=patch)
    x = x.flatten(2).transpose(1, 2) + tensors["pos_embed"][:, 1:]
    first = (tensors["cls_token"] + tensors["pos_embed"][:, :1]).expand(len(x), -1, -1)
    x = mae_blocks(tensors, "blocks", torch.cat([first, x[:, kept]], dim=1), heads)
    states = normed(tensors, "norm", x, 1e-6)
    x = apply(tensors, "decoder_embed", states)
    every = tensors["mask_token"].repeat(len(x), 4, 1)
    every[:, kept] = x[:, 1:]
    x = mae_blocks(tensors, "decoder_blocks", torch.cat([x[:, :1], every], 1) + tensors["decoder_pos_embed"], 16)
    prediction = apply(tensors, "decoder_pred", normed(tensors, "decoder_norm", x, 1e-6))[:, 1:]
    squares = pixels.unfold(2, patch, patch).unfold(3, patch, patch)  # [B, 3, rows, columns, patch, patch]
    return states, prediction, squares.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


@pytest.mark.parametrize(
    ("name", "width", "patch", "heads", "normalised"),
    [
        ("mae_visualize_vit_base.pth", 768, 16, 12, False),
        ("mae_visualize_vit_huge.pth", 1280, 14, 16, False),
        ("mae_pretrain_vit_base_full.pth", 768, 16, 12, True),
    ],
)
def test_an_original_mae_gives_the_same_outputs(files, name, width, patch, heads, normalised, tmp_path):
    tensors = random_tensors(original_mae(width, patch), deviation=0.05)
    torch.save({"model": tensors}, tmp_path / name)
    words = ("--qformer", "blip2", "--mae", tmp_path / name, "--llm", "opt", "--dtype", "float32")
    assert run(files, tmp_path / "out", *words, "--variant", "reconstruction_in_stage2") == 0
    assert differences(tmp_path / "out")["reconstruction loss"] < 1e-5
    model, _ = load_model(tmp_path / "out", [XFormerForConditionalGeneration])
    image, noise = (
        torch.randint(0, 256, (2, 3, 2 * patch, 2 * patch), dtype=torch.uint8),
        torch.tensor([0.9, 0.4, 0.1, 0.5]),
    )
    pixels = scaled(image, 2 * patch, model.config.mae_mean, model.config.mae_std, torch.float32)
    states, prediction, target = original_mae_forward(tensors, pixels, [2, 1], heads)
    if normalised:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    loss = (prediction - target)[:, [0, 3]].square().mean()
    with torch.no_grad():
        masked = model.xformer.encode_image(image, 0.5, noise.expand(2, -1))
        torch.testing.assert_close(masked.mae.tokens, states, atol=1e-4, rtol=1e-4)
        found = model.xformer.mae_decoder(masked.mae.tokens, masked.mae.ids_restore).logits
        torch.testing.assert_close(found, prediction, atol=1e-4, rtol=1e-4)
        ours = model.xformer.reconstruction_loss(masked, model.xformer.read(masked))
    torch.testing.assert_close(ours, loss, atol=1e-5, rtol=1e-5)
    assert record(tmp_path / "out")["left"] == [
        {"source": str(files / "blip2"), "tensors": 36, "why": "the language model comes from --llm",
         "first": "language_model.model.decoder.embed_positions.weight"}
    ]  # fmt: skip


@pytest.mark.parametrize("normalised", [True, False])
def test_a_runs_own_mae_states_its_targets(files, normalised, tmp_path):
    content = {"model": random_tensors(original_mae(768, 16), deviation=0.05), "epoch": 799}
    content["args"] = argparse.Namespace(norm_pix_loss=normalised, model="mae_vit_base_patch16", accum_iter=1)
    torch.save(content, tmp_path / "checkpoint-799.pth")
    assert (
        run(files, tmp_path / "out", "--qformer", "bert", "--clip", "clip", "--mae", tmp_path / "checkpoint-799.pth")
        == 0
    )
    assert XFormerForPreTraining.from_pretrained(tmp_path / "out").config.mae_config.norm_pix_loss == normalised


def test_an_original_mae_without_decoder_is_an_error(files, tmp_path, capsys):
    torch.save(
        {"model": random_tensors(original_mae(1024, 16, decoder=False))}, tmp_path / "mae_pretrain_vit_large.pth"
    )
    words = ("--qformer", "blip2", "--mae", tmp_path / "mae_pretrain_vit_large.pth", "--llm", "opt")
    error = fails(files, capsys, tmp_path / "out", *words)
    assert "this MAE has no decoder to reconstruct with: mae_visualize_vit_large.pth has it" in error
    assert run(files, tmp_path / "out", *words, "--variant", "no_reconstruction") == 0
    assert "second encoder's tokens" in differences(tmp_path / "out")


def test_an_original_mae_of_another_width_is_an_error(files, tmp_path, capsys):
    torch.save({"model": random_tensors(original_mae(192, 16))}, tmp_path / "mae.pth")
    words = ("--qformer", "blip2", "--mae", tmp_path / "mae.pth", "--llm", "opt")
    assert "its width 192 (decoder 512) is of no published MAE" in fails(files, capsys, tmp_path / "out", *words)


@pytest.fixture
def image():
    return torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8)


def lavis_image(files, tensors, image, config):
    eva_tensors = torch.load(files / "eva_vit_g.pth")
    pixels = scaled(image, 28, config.clip_mean, config.clip_std, torch.float32)
    return normed(tensors, "ln_vision", lavis_eva(eva_tensors, pixels, 3), 1e-5)


def test_lavis_stage_1_gives_the_same_outputs(files, image, tmp_path):
    assert run(files, tmp_path / "out", "--qformer", "blip2_pretrained.pth", *LAVIS) == 0
    model, processor = load_model(tmp_path / "out", [XFormerForPreTraining])
    tensors = torch.load(files / "blip2_pretrained.pth")["model"]
    text = processor(qformer_text=["a red circle", "what is the question ?"])
    ids, mask = text["qformer_input_ids"], text["qformer_attention_mask"]
    tokens = lavis_image(files, tensors, image, model.config)
    hidden = (1 - mask[:, None, None]) * -1e4
    seen = functional.pad(hidden, (4, 0))
    causal = torch.ones(ids.shape[1], ids.shape[1]).tril()[None, None]
    causal = functional.pad(functional.pad(1 - causal, (4, 0)) * -1e4, (0, 0, 4, 0)) + seen
    causal[:, :, :4, 4:] = -1e4
    queries, _ = lavis_qformer_states(tensors, tokens)
    _, states = lavis_qformer_states(tensors, ids=ids, queries=False, mask=hidden)
    both, _ = lavis_qformer_states(tensors, tokens, ids, mask=seen)
    starting = torch.cat([torch.full_like(ids[:, :1], processor.qformer_tokenizer.bos_token_id), ids[:, 1:]], dim=1)
    _, written = lavis_qformer_states(tensors, tokens, starting, mask=causal)
    head = "Qformer.cls.predictions"
    written = functional.gelu(apply(tensors, f"{head}.transform.dense", written))
    words = apply(tensors, f"{head}.decoder", normed(tensors, f"{head}.transform.LayerNorm", written, 1e-12))
    similarity = torch.einsum(
        "iqd,td->itq",
        functional.normalize(apply(tensors, "vision_proj", queries), dim=-1),
        functional.normalize(apply(tensors, "text_proj", states[:, 0]), dim=-1),
    )
    with torch.no_grad():
        scores = super(XFormerForPreTraining, model).forward
        torch.testing.assert_close(scores(image, ids, mask).logits_per_image, similarity.amax(-1))
        itm = scores(image, ids, mask, use_image_text_matching_head=True).logits_per_image
        torch.testing.assert_close(itm, apply(tensors, "itm_head", both).mean(1), atol=1e-5, rtol=1e-4)
        ours = model.itg_logits(model(image, ids, mask).xformer_output.text_states)
    torch.testing.assert_close(ours[mask.bool()], words[mask.bool()], atol=1e-4, rtol=1e-4)
    assert model.temperature.item() == pytest.approx(0.05)
    assert set(differences(tmp_path / "out")) == {
        "CLIP tokens", "queries", "ITC scores", "ITM logits", "reconstruction loss"
    }  # fmt: skip
    left = {row["why"]: row["tensors"] for row in record(tmp_path / "out")["left"]}
    assert left == {
        "tied to the word embeddings and the bias": 2,
        "numbers of positions, not weights": 1,
        "after the layer that is read": 13 + 4,  # the last block, the final norm and the head
    }


def test_lavis_stage_2_gives_the_same_logits(files, image, tmp_path):
    words = ("--qformer", "blip2_pretrained_opt2.7b.pth", *LAVIS, "--llm", "opt")
    assert run(files, tmp_path / "out", *words) == 0
    model, processor = load_model(tmp_path / "out", [XFormerForConditionalGeneration])
    tensors = torch.load(files / "blip2_pretrained_opt2.7b.pth")["model"]
    queries, _ = lavis_qformer_states(tensors, lavis_image(files, tensors, image, model.config))
    prompt = apply(tensors, "opt_proj", queries)
    text = processor(text=["what is in the image?", "what is in the image?"])
    opt = OPTForCausalLM.from_pretrained(files / "opt").eval()
    with torch.no_grad():
        embeds = torch.cat([prompt, opt.get_input_embeddings()(text["input_ids"][:, 4:])], dim=1)
        expected = opt(inputs_embeds=embeds, attention_mask=text["attention_mask"]).logits
        torch.testing.assert_close(model(image, **text).logits, expected, atol=1e-4, rtol=1e-4)
    assert "logits" in differences(tmp_path / "out")
    newline = processor.tokenizer("\n", add_special_tokens=False)["input_ids"][0]
    assert model.generation_config.eos_token_id == newline


def test_lavis_stage_2_with_t5_gives_the_same_logits(files, image, tmp_path):
    words = ("--qformer", "blip2_pretrained_flant5xl.pth", *LAVIS, "--llm", "t5")
    assert run(files, tmp_path / "out", *words) == 0
    model, processor = load_model(tmp_path / "out", [XFormerForConditionalGeneration])
    tensors = torch.load(files / "blip2_pretrained_flant5xl.pth")["model"]
    queries, _ = lavis_qformer_states(tensors, lavis_image(files, tensors, image, model.config))
    prompt = apply(tensors, "t5_proj", queries)
    text, answer = processor(text=["what is in the image?", "what is in the image?"]), torch.randint(5, 250, (2, 6))
    t5 = T5ForConditionalGeneration.from_pretrained(files / "t5").eval()
    with torch.no_grad():
        embeds = torch.cat([prompt, t5.get_input_embeddings()(text["input_ids"][:, 4:])], dim=1)
        expected = t5(inputs_embeds=embeds, attention_mask=text["attention_mask"], decoder_input_ids=answer).logits
        torch.testing.assert_close(
            model(image, **text, decoder_input_ids=answer).logits, expected, atol=1e-4, rtol=1e-4
        )
    assert "logits" in differences(tmp_path / "out")
    assert model.generation_config.eos_token_id == 1


@pytest.mark.parametrize(("trained_for", "llm"), [("opt2.7b", "t5"), ("flant5xl", "opt")])
def test_a_lavis_projection_needs_its_language_model(files, trained_for, llm, tmp_path, capsys):
    words = ("--qformer", f"blip2_pretrained_{trained_for}.pth", *LAVIS, "--llm", llm)
    assert "projection was made for another language model" in fails(files, capsys, tmp_path / "out", *words)


def test_a_lavis_file_may_hold_its_tower(files, tmp_path):
    tensors = torch.load(files / "blip2_pretrained.pth")["model"]
    tensors |= random_tensors(eva(TINY, 3, "visual_encoder."))
    torch.save({"model": tensors}, tmp_path / "whole.pth")
    assert run(files, tmp_path / "out", "--qformer", tmp_path / "whole.pth", "--mae", "mae") == 0
    config = XFormerForPreTraining.from_pretrained(tmp_path / "out").config
    assert config.clip_config.num_hidden_layers == 3
    assert config.clip_config.image_size == 28
