"""From published layouts to a starting X-Former: tiny through the command line, at full size on the meta device.

The layouts are written down here from upstream's code (salesforce/LAVIS 506965b lavis/models/eva_vit.py,
blip2_models/{Qformer,blip2,blip2_qformer,blip2_opt}.py; transformers 4 for the MAE's old names), and a LAVIS checkpoint
is run by the few lines of arithmetic that those files come to, not by transformers.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import randomise
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch.nn import functional
from transformers import (
    AutoModelForImageTextToText,
    BertConfig,
    BertForPreTraining,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from xformer_mllm import XFormerForConditionalGeneration, XFormerForPreTraining, XFormerProcessor, convert
from xformer_mllm.checkpoints import load_model, start_generation
from xformer_mllm.cli import main
from xformer_mllm.model.modeling_xformer import FROZEN
from xformer_mllm.model.vision_encoders import mae_positions, scaled

WORDS = ["a", "photo", "of", "the", "red", "circle", "what", "is", "in", "picture", "question", "answer", ":", "?"]


# -- tiny checkpoints, as files --------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder of tiny random checkpoints: blip2, itm, mae, mae_encoder, opt, bert, clip, dinov2, *.pth."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sources")
    bert_tokenizer().save_pretrained(folder / "bert")
    bert = randomise(BertForPreTraining(bert_config()))
    save_file(
        {old_bert_name(n): t.clone() for n, t in bert.state_dict().items()}, folder / "bert" / "model.safetensors"
    )
    bert.config.save_pretrained(folder / "bert")
    dec = bert_tokenizer()
    dec.add_special_tokens({"bos_token": "[DEC]"})
    dec.save_pretrained(folder / "dec")

    opt_tokenizer().save_pretrained(folder / "opt")
    opt = randomise(OPTForCausalLM(opt_config()), 0.05)
    opt.save_pretrained(folder / "opt")
    blip2 = randomise(Blip2ForConditionalGeneration(blip2_config()), 0.05)
    blip2.language_model.load_state_dict(opt.state_dict())
    blip2.config.text_config.eos_token_id = 7
    blip2.save_pretrained(folder / "blip2", max_shard_size="200KB")
    statistics = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    (folder / "blip2" / "preprocessor_config.json").write_text(json.dumps(statistics))
    randomise(Blip2ForImageTextRetrieval(blip2_config(text_input=True)), 0.05).save_pretrained(folder / "itm")

    mae = tiny_mae()
    mae.save_pretrained(folder / "mae_saved")  # as transformers 5 writes it
    for name, tensors in {
        "mae": {old_mae_name(n): t for n, t in mae.state_dict().items()},
        "mae_new": mae.state_dict(),
        "mae_encoder": {old_mae_name(n): t for n, t in mae.state_dict().items() if n.startswith("vit.")},
    }.items():
        mae.config.save_pretrained(folder / name)
        torch.save(tensors, folder / name / "pytorch_model.bin")
    mae.vit.save_pretrained(folder / "mae_model")
    randomise(CLIPModel(clip_config()), 0.05).save_pretrained(folder / "clip")
    dinov2 = Dinov2Config(hidden_size=40, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14)
    randomise(Dinov2Model(dinov2), 0.05).save_pretrained(folder / "dino")

    torch.save({"model": random_tensors(lavis_stage1(TINY))}, folder / "blip2_pretrained.pth")
    torch.save({"model": random_tensors(lavis_stage2(TINY))}, folder / "blip2_pretrained_opt2.7b.pth")
    torch.save(random_tensors(eva(TINY)), folder / "eva_vit_g.pth")
    return folder


TINY = {
    "clip": 32, "clip_mlp": 48, "blocks": 4, "patch": 14, "positions": 5,
    "width": 128, "mlp": 96, "layers": 4, "vocabulary": len(WORDS) + 5 + 1, "lengths": 64, "queries": 4,
    "itc": 16, "llm": 36,
}  # fmt: skip
PUBLISHED = {
    "clip": 1408, "clip_mlp": 6144, "blocks": 40, "patch": 14, "positions": 257,
    "width": 768, "mlp": 3072, "layers": 12, "vocabulary": 30523, "lengths": 512, "queries": 32,
    "itc": 256, "llm": 2560,
}  # fmt: skip


def eva(size, blocks=None, prefix=""):
    """LAVIS's eva_vit_g.pth: 40 blocks, of which LAVIS builds 39; a final norm and a head that it drops."""
    width, mlp = size["clip"], size["clip_mlp"]
    names = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, size["positions"], width),
        "patch_embed.proj.weight": (width, 3, size["patch"], size["patch"]),
        "patch_embed.proj.bias": (width,),
    }
    for number in range(blocks or size["blocks"]):
        names |= {
            f"blocks.{number}.{name}": shape
            for name, shape in {
                **norm("norm1", width),
                "attn.q_bias": (width,),
                "attn.v_bias": (width,),
                "attn.qkv.weight": (3 * width, width),
                **linear("attn.proj", width, width),
                **norm("norm2", width),
                **linear("mlp.fc1", width, mlp),
                **linear("mlp.fc2", mlp, width),
            }.items()
        }
    if not prefix:
        names |= norm("norm", width) | linear("head", width, 10)
    return {prefix + name: shape for name, shape in names.items()}


def lavis_qformer(size, text):
    """Q-Former, queries and ln_vision; LAVIS saves what it trains, so no vision tower."""
    width, mlp = size["width"], size["mlp"]
    names = {"query_tokens": (1, size["queries"], width), **norm("ln_vision", size["clip"])}
    names["Qformer.bert.embeddings.position_ids"] = (1, size["lengths"])
    names |= norm("Qformer.bert.embeddings.LayerNorm", width)
    if text:
        names["Qformer.bert.embeddings.word_embeddings.weight"] = (size["vocabulary"], width)
        names["Qformer.bert.embeddings.position_embeddings.weight"] = (size["lengths"], width)
    for number in range(size["layers"]):
        attentions = {"attention": width} | ({"crossattention": size["clip"]} if number % 2 == 0 else {})
        layer = {}
        for name, context in attentions.items():
            layer |= linear(f"{name}.self.query", width, width)
            layer |= linear(f"{name}.self.key", context, width) | linear(f"{name}.self.value", context, width)
            layer |= linear(f"{name}.output.dense", width, width) | norm(f"{name}.output.LayerNorm", width)
        for suffix in ("", "_query") if text else ("_query",):
            layer |= linear(f"intermediate{suffix}.dense", width, mlp)
            layer |= linear(f"output{suffix}.dense", mlp, width) | norm(f"output{suffix}.LayerNorm", width)
        names |= {f"Qformer.bert.encoder.layer.{number}.{name}": shape for name, shape in layer.items()}
    return names


def lavis_stage1(size):
    """blip2_pretrained.pth."""
    width, words, head = size["width"], size["vocabulary"], "Qformer.cls.predictions."
    return {
        **lavis_qformer(size, text=True),
        f"{head}bias": (words,),
        **linear(f"{head}transform.dense", width, width),
        **norm(f"{head}transform.LayerNorm", width),
        **linear(f"{head}decoder", width, words),
        **linear("vision_proj", width, size["itc"]),
        **linear("text_proj", width, size["itc"]),
        **linear("itm_head", width, 2),
        "temp": (),
    }


def lavis_stage2(size):
    """blip2_pretrained_opt2.7b.pth: the text feed-forwards, the words and the head are gone."""
    return {**lavis_qformer(size, text=False), **linear("opt_proj", size["width"], size["llm"])}


def linear(name, inputs, outputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def random_tensors(names):
    """Values with which every tensor matters: norms near 1, the decoder tied to the words."""
    tensors = {}
    for name, shape in names.items():
        is_norm = "norm" in name.lower() or "ln_vision" in name
        tensors[name] = 0.15 * torch.randn(shape) + (1.0 if is_norm and name.endswith("weight") else 0.0)
    if "temp" in tensors:
        tensors["temp"] = torch.tensor(0.05)
    head = "Qformer.cls.predictions."
    if f"{head}bias" in tensors:
        tensors[f"{head}decoder.weight"] = tensors["Qformer.bert.embeddings.word_embeddings.weight"]
        tensors[f"{head}decoder.bias"] = tensors[f"{head}bias"]
    return tensors


def bert_tokenizer():
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{name}_token": token for name, token in special.items()}
    )


def opt_tokenizer():
    """Bytes, with </s> in front of every text, as OPT's."""
    vocabulary = ["</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(vocabulary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing("</s> $A", special_tokens=[("</s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", pad_token="<pad>")


def bert_config():
    return BertConfig(
        vocab_size=len(WORDS) + 5,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=96,
        max_position_embeddings=64,
    )


def opt_config(**changes):
    fields = {"hidden_size": 36, "word_embed_proj_dim": 36, "ffn_dim": 48, "num_hidden_layers": 2}
    fields |= {"num_attention_heads": 2, "max_position_embeddings": 64, "vocab_size": 260}
    return OPTConfig(**(fields | changes))


def blip2_config(text_input=False):
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    return Blip2Config(
        vision_config=Blip2VisionConfig(**vision, image_size=28, patch_size=14, initializer_range=0.1),
        qformer_config=Blip2QFormerConfig(
            vocab_size=TINY["vocabulary"],
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=96,
            encoder_hidden_size=32,
            max_position_embeddings=64,
            use_qformer_text_input=text_input,
        ),
        text_config=opt_config(),
        num_query_tokens=4,
        image_text_hidden_size=16,
        image_token_index=3,
    )


def clip_config():
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = {**vision, "vocab_size": 20}
    return CLIPConfig(vision_config={**vision, "image_size": 28, "patch_size": 14}, text_config=text)


def mae_config(**changes):
    fields = {"hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    fields |= {"image_size": 28, "patch_size": 7, "decoder_hidden_size": 24, "decoder_num_hidden_layers": 2}
    fields |= {"decoder_num_attention_heads": 2, "decoder_intermediate_size": 48, "norm_pix_loss": True}
    return ViTMAEConfig(**(fields | changes))


def tiny_mae():
    mae = randomise(ViTMAEForPreTraining(mae_config()), 0.05)
    with torch.no_grad():
        mae.vit.embeddings.position_embeddings.copy_(mae_positions(16, 40))
    return mae


def old_bert_name(name):
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def old_mae_name(name):
    """transformers 5 -> transformers 4, as in facebook/vit-mae-huge."""
    name = name.replace("vit.layers.", "vit.encoder.layer.").replace("attention.o_proj", "attention.output.dense")
    for letter, word in (("q", "query"), ("k", "key"), ("v", "value")):
        name = name.replace(f"attention.{letter}_proj", f"attention.attention.{word}")
    return name.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")


# -- the command line ------------------------------------------------------------------------------------------------


def run(files, output, *words):
    """`xformer convert`; words that are names in `files` stand for its paths."""
    words = [str(files / word) if (files / word).exists() else word for word in map(str, words)]
    tokenizer = [] if "--qformer-tokenizer" in words else ["--qformer-tokenizer", str(files / "dec")]
    return main(["convert", *words, *tokenizer, "--output-dir", str(output)])


def record(output):
    return json.loads((output / "conversion.json").read_text())


def differences(output):
    return {check["what"]: check["difference"] for check in record(output)["checks"]}


BLIP2 = ("--qformer", "blip2", "--mae", "mae", "--llm", "opt")


@pytest.fixture(scope="session")
def converted(files, tmp_path_factory):
    output = tmp_path_factory.mktemp("converted") / "stage2"
    assert run(files, output, *BLIP2, "--dtype", "float32") == 0
    return output


def test_a_blip2_and_a_mae_become_the_start_of_stage_2(files, converted):
    model, report = AutoModelForImageTextToText.from_pretrained(converted, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert isinstance(model, XFormerForConditionalGeneration)
    assert (model.config.clip_mean, model.config.clip_std) == ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
    assert model.config.mae_mean == [0.485, 0.456, 0.406]
    assert model.config.mae_config.norm_pix_loss
    assert model.generation_config.eos_token_id == 7
    assert set(differences(converted)) == {"CLIP tokens", "queries", "logits", "reconstruction loss"}
    assert max(differences(converted).values()) < 1e-5

    blip2 = Blip2ForConditionalGeneration.from_pretrained(files / "blip2").eval()
    blip2.vision_model.post_layernorm.eps = 1e-5
    images = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8)
    pixels = scaled(images, 28, [0.4, 0.5, 0.6], [0.2, 0.3, 0.4], torch.float32)
    processor = XFormerProcessor.from_pretrained(converted)
    text = processor(text=["what is in the picture?", "a"])
    theirs = text["input_ids"].masked_fill(text["input_ids"] == processor.image_token_id, 3)
    with torch.no_grad():
        expected = blip2(pixels, theirs, text["attention_mask"]).logits
        torch.testing.assert_close(model(images, **text).logits, expected, atol=1e-5, rtol=1e-4)


def test_the_table_says_where_everything_comes_from(files, converted, capsys, tmp_path):
    assert run(files, tmp_path / "again", *BLIP2, "--dtype", "float32") == 0
    shown = capsys.readouterr().out
    parts = {(row["part"], row["from"]): row for row in record(tmp_path / "again")["parts"]}
    model = XFormerForConditionalGeneration.from_pretrained(converted)
    assert sum(row["parameters"] for row in parts.values()) == sum(p.numel() for p in model.parameters())
    assert parts["fusion", "initialised"]["tensors"] == len(list(model.xformer.fusion.parameters()))
    assert parts["mae_decoder", str(files / "mae")]["tensors"] == len(model.xformer.mae_decoder.state_dict())
    assert not [row for row in parts if row[1] == "initialised" and row[0] != "fusion"]
    assert f"{parts['fusion', 'initialised']['parameters']:,}" in shown
    assert record(tmp_path / "again")["settings"]["mae"] == str(files / "mae")
    left = {row["why"] for row in record(tmp_path / "again")["left"]}
    assert left == {"the language model comes from --llm"}
    assert "logits" in shown


def test_frozen_parts_are_saved_in_bf16_and_trained_ones_in_fp32(files, tmp_path):
    assert run(files, tmp_path / "out", *BLIP2) == 0
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    for name, parameter in model.named_parameters():
        frozen = set(FROZEN) & set(name.split(".")[:2])
        assert parameter.dtype == (torch.bfloat16 if frozen else torch.float32), name
    assert max(differences(tmp_path / "out").values()) < 1e-2


def test_shards_load_as_one_file_does(files, converted, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "SHARD_BYTES", 300_000)
    assert run(files, tmp_path / "out", *BLIP2, "--dtype", "float32") == 0
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    a, b = (
        XFormerForConditionalGeneration.from_pretrained(path).state_dict() for path in (converted, tmp_path / "out")
    )
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_seed_decides_what_is_initialised(files, converted, tmp_path):
    assert run(files, tmp_path / "out", *BLIP2, "--dtype", "float32", "--seed", 1) == 0
    a, b = (
        XFormerForConditionalGeneration.from_pretrained(path).state_dict() for path in (converted, tmp_path / "out")
    )
    changed = {name.split(".")[1] for name in a if not torch.equal(a[name], b[name])}
    assert changed == {"fusion"}


@pytest.mark.parametrize("mae", ["mae_new", "mae_saved"])
def test_old_and_new_names_of_a_mae_give_the_same(files, converted, mae, tmp_path):
    words = ("--qformer", "blip2", "--mae", mae, "--llm", "opt", "--dtype", "float32")
    assert run(files, tmp_path / "out", *words) == 0
    a, b = (XFormerForConditionalGeneration.from_pretrained(path).xformer for path in (converted, tmp_path / "out"))
    assert all(torch.equal(t, b.mae_encoder.state_dict()[n]) for n, t in a.mae_encoder.state_dict().items())
    assert all(torch.equal(t, b.mae_decoder.state_dict()[n]) for n, t in a.mae_decoder.state_dict().items())


@pytest.mark.parametrize(
    "variant",
    ["qformer", "concat", "early_cross_attention", "clip_shallow", "no_reconstruction", "reconstruction_in_stage2"],
)
def test_every_variant_starts_from_the_same_parents(files, variant, tmp_path):
    mae = () if variant in ("qformer", "clip_shallow") else ("--mae", "mae")
    words = ("--qformer", "blip2", *mae, "--llm", "opt", "--variant", variant)
    assert run(files, tmp_path / "out", *words) == 0
    assert ("logits" in differences(tmp_path / "out")) == (variant != "concat")
    if mae:
        reconstructs = variant == "reconstruction_in_stage2"
        assert ("reconstruction loss" if reconstructs else "second encoder's tokens") in differences(tmp_path / "out")


def test_the_second_encoder_may_be_another_tower(files, tmp_path):
    words = ("--qformer", "blip2", "--mae", "dino", "--llm", "opt")
    assert run(files, tmp_path / "out", *words, "--variant", "dinov2", "--dtype", "float32") == 0
    assert differences(tmp_path / "out")["second encoder's tokens"] < 1e-5
    assert XFormerForConditionalGeneration.from_pretrained(tmp_path / "out").config.mae_image_size == 28


# -- LAVIS, by its own arithmetic ------------------------------------------------------------------------------------


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


@pytest.fixture
def picture():
    return torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8)


def lavis_image(files, tensors, picture, config):
    eva_tensors = torch.load(files / "eva_vit_g.pth")
    pixels = scaled(picture, 28, config.clip_mean, config.clip_std, torch.float32)
    return normed(tensors, "ln_vision", lavis_eva(eva_tensors, pixels, 3), 1e-5)


LAVIS = ("--clip", "eva_vit_g.pth", "--mae", "mae", "--dtype", "float32")


def test_lavis_stage_1_gives_the_same_scores_words_and_temperature(files, picture, tmp_path):
    assert run(files, tmp_path / "out", "--qformer", "blip2_pretrained.pth", *LAVIS) == 0
    model, processor = load_model(tmp_path / "out", [XFormerForPreTraining])
    tensors = torch.load(files / "blip2_pretrained.pth")["model"]
    text = processor(qformer_text=["a red circle", "what is the question ?"])
    ids, mask = text["qformer_input_ids"], text["qformer_attention_mask"]
    image = lavis_image(files, tensors, picture, model.config)
    hidden = (1 - mask[:, None, None]) * -1e4
    seen = functional.pad(hidden, (4, 0))
    causal = torch.ones(ids.shape[1], ids.shape[1]).tril()[None, None]
    causal = functional.pad(functional.pad(1 - causal, (4, 0)) * -1e4, (0, 0, 4, 0)) + seen
    causal[:, :, :4, 4:] = -1e4
    queries, _ = lavis_qformer_states(tensors, image)
    _, states = lavis_qformer_states(tensors, ids=ids, queries=False, mask=hidden)
    both, _ = lavis_qformer_states(tensors, image, ids, mask=seen)
    starting = torch.cat([torch.full_like(ids[:, :1], processor.qformer_tokenizer.bos_token_id), ids[:, 1:]], dim=1)
    _, written = lavis_qformer_states(tensors, image, starting, mask=causal)
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
        torch.testing.assert_close(scores(picture, ids, mask).logits_per_image, similarity.amax(-1))
        itm = scores(picture, ids, mask, use_image_text_matching_head=True).logits_per_image
        torch.testing.assert_close(itm, apply(tensors, "itm_head", both).mean(1), atol=1e-5, rtol=1e-4)
        ours = model(picture, ids, mask).itg_logits
    torch.testing.assert_close(ours[mask.bool()], words[mask.bool()], atol=1e-4, rtol=1e-4)
    assert model.temperature.item() == pytest.approx(0.05)
    assert set(differences(tmp_path / "out")) == {
        "CLIP tokens", "queries", "ITC scores", "ITM logits", "reconstruction loss"
    }  # fmt: skip
    left = {row["why"]: row["tensors"] for row in record(tmp_path / "out")["left"]}
    assert left == {
        "tied to the word embeddings and the bias": 2,
        "numbers of positions, not weights": 1,
        "behind the layer that is read": 13 + 4,  # the last block, the final norm and the head
    }


def test_lavis_stage_2_gives_the_same_logits(files, picture, tmp_path):
    words = ("--qformer", "blip2_pretrained_opt2.7b.pth", *LAVIS, "--llm", "opt")
    assert run(files, tmp_path / "out", *words) == 0
    model, processor = load_model(tmp_path / "out", [XFormerForConditionalGeneration])
    tensors = torch.load(files / "blip2_pretrained_opt2.7b.pth")["model"]
    queries, _ = lavis_qformer_states(tensors, lavis_image(files, tensors, picture, model.config))
    prompt = apply(tensors, "opt_proj", queries)
    text = processor(text=["what is in the picture?", "what is in the picture?"])
    opt = OPTForCausalLM.from_pretrained(files / "opt").eval()
    with torch.no_grad():
        embeds = torch.cat([prompt, opt.get_input_embeddings()(text["input_ids"][:, 4:])], dim=1)
        expected = opt(inputs_embeds=embeds, attention_mask=text["attention_mask"]).logits
        torch.testing.assert_close(model(picture, **text).logits, expected, atol=1e-4, rtol=1e-4)
    assert "logits" in differences(tmp_path / "out")
    newline = processor.tokenizer("\n", add_special_tokens=False)["input_ids"][0]
    assert model.generation_config.eos_token_id == newline


def test_a_lavis_file_may_hold_its_tower(files, tmp_path):
    tensors = torch.load(files / "blip2_pretrained.pth")["model"]
    tensors |= random_tensors(eva(TINY, 3, "visual_encoder."))
    torch.save({"model": tensors}, tmp_path / "whole.pth")
    assert run(files, tmp_path / "out", "--qformer", tmp_path / "whole.pth", "--mae", "mae") == 0
    config = XFormerForPreTraining.from_pretrained(tmp_path / "out").config
    assert config.clip_config.num_hidden_layers == 3
    assert config.clip_config.image_size == 28


# -- BERT, and other towers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tower", ["clip", "eva_vit_g.pth", "blip2"])
def test_a_bert_starts_stage_1_behind_any_tower(files, tower, tmp_path):
    words = ("--qformer", "bert", "--qformer-tokenizer", "bert", "--clip", tower, "--mae", "mae", "--dtype", "float32")
    assert run(files, tmp_path / "out", *words) == 0
    assert set(differences(tmp_path / "out")) == {"CLIP tokens", "text states", "reconstruction loss"}
    model, processor = load_model(tmp_path / "out", [XFormerForPreTraining])
    tokenizer = processor.qformer_tokenizer
    assert model.config.text_start_token_id == tokenizer.convert_tokens_to_ids("[DEC]") == len(WORDS) + 5
    assert len(model.xformer.embeddings.word_embeddings.weight) == len(model.itg_bias) == len(WORDS) + 6
    bert = BertForPreTraining.from_pretrained(files / "bert")
    layer = model.xformer.qformer.encoder.layer[1]
    assert torch.equal(layer.intermediate_query.dense.weight, bert.bert.encoder.layer[1].intermediate.dense.weight)
    assert torch.equal(layer.output.dense.weight, layer.output_query.dense.weight)
    states = torch.randn(2, 128)
    with torch.no_grad():
        logits = model.itg_logits(states[None])[0, :, :-1]
        torch.testing.assert_close(logits, bert.cls.predictions(states), atol=1e-4, rtol=1e-4)
    assert len(model.xformer.query_tokens[0].unique(dim=0)) == 32
    text = processor(qformer_text=["a red circle", "the picture"])
    images = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8)
    assert torch.isfinite(model(images, **text).loss)


def test_what_stage_1_starts_goes_on_to_stage_2(files, tmp_path):
    assert run(files, tmp_path / "out", "--qformer", "itm", "--mae", "mae", "--allow", "itg_*", "temperature") == 0
    assert {"ITC scores", "ITM logits"} < set(differences(tmp_path / "out"))
    model, _ = start_generation(tmp_path / "out", str(files / "opt"))
    assert model.xformer.fusion is not None


def test_stage_1s_blip2_starts_stage_2_with_a_new_projection(files, tmp_path):
    assert run(files, tmp_path / "out", "--qformer", "itm", "--mae", "mae", "--llm", "opt") == 0
    parts = {(row["part"], row["from"]) for row in record(tmp_path / "out")["parts"]}
    assert ("language_projection", "initialised") in parts
    assert "queries" in differences(tmp_path / "out")
    assert {row["why"] for row in record(tmp_path / "out")["left"]} == {"of stage 1 alone"}


def test_another_tower_behind_a_qformer_is_run_with_it(files, tmp_path):
    words = ("--qformer", "itm", "--clip", "blip2", "--mae", "mae", "--allow", "itg_*", "temperature")
    assert run(files, tmp_path / "out", *words, "--dtype", "float32") == 0
    assert max(differences(tmp_path / "out").values()) < 1e-5
    assert "ITM logits" in differences(tmp_path / "out")


# -- what goes wrong -------------------------------------------------------------------------------------------------


def fails(files, capsys, output, *words):
    """The one line that the command says; nothing is left."""
    before = {path.name for path in output.parent.iterdir()}
    assert run(files, output, *words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert {path.name for path in output.parent.iterdir()} == before
    return error


def changed(files, tmp_path, name, change):
    """A copy of a .pth file in which `change` has been at the tensors."""
    content = torch.load(files / name)
    change(content["model"])
    torch.save(content, tmp_path / "changed.pth")
    return tmp_path / "changed.pth"


def test_a_missing_tensor_is_an_error_unless_allowed(files, tmp_path, capsys):
    source = changed(files, tmp_path, "blip2_pretrained.pth", lambda t: t.pop("itm_head.bias"))
    assert "no source has 'itm_head.bias'" in fails(files, capsys, tmp_path / "out", "--qformer", source, *LAVIS)
    assert run(files, tmp_path / "out", "--qformer", source, *LAVIS, "--allow", "itm_head.*") == 0
    assert "ITM logits" not in differences(tmp_path / "out")


def test_a_misshapen_tensor_is_an_error_unless_allowed(files, tmp_path, capsys):
    def cut(tensors):
        tensors["text_proj.weight"] = tensors["text_proj.weight"][:, :-1]

    source = changed(files, tmp_path, "blip2_pretrained.pth", cut)
    error = fails(files, capsys, tmp_path / "out", "--qformer", source, *LAVIS)
    assert f"'text_projection.weight' is (16, 127) in {source}, the model needs (16, 128)" in error
    assert run(files, tmp_path / "out", "--qformer", source, *LAVIS, "--allow", "text_projection.*") == 0


def test_a_tensor_without_a_place_is_an_error_unless_allowed(files, tmp_path, capsys):
    source = changed(files, tmp_path, "blip2_pretrained.pth", lambda t: t.update(extra=torch.ones(2)))
    assert "has 'extra', which has no place" in fails(files, capsys, tmp_path / "out", "--qformer", source, *LAVIS)
    layer = "Qformer.bert.encoder.layer.4.attention.output.dense.bias"
    source = changed(files, tmp_path, "blip2_pretrained_opt2.7b.pth", lambda t: t.update({"extra": torch.ones(2)}))
    words = ("--qformer", source, *LAVIS, "--llm", "opt", "--allow", "extra")
    assert run(files, tmp_path / "out", *words) == 0
    source = changed(files, tmp_path, "blip2_pretrained.pth", lambda t: t.update({layer: torch.ones(128)}))
    assert "layer.4." in fails(files, capsys, tmp_path / "more", "--qformer", source, *LAVIS)


def test_a_blip2_of_stage_2_does_not_start_stage_1_by_itself(files, tmp_path, capsys):
    error = fails(files, capsys, tmp_path / "out", "--qformer", "blip2", "--mae", "mae")
    assert "LAVIS's blip2_pretrained.pth has it" in error
    names = ("xformer.embeddings.*", "xformer.qformer.*", "*_projection.*", "itm_head.*", "itg_*", "temperature")
    assert run(files, tmp_path / "out", "--qformer", "blip2", "--mae", "mae", "--allow", *names) == 0
    assert "queries" in differences(tmp_path / "out")


def test_another_language_model_needs_another_projection(files, tmp_path, capsys):
    OPTForCausalLM(opt_config(num_hidden_layers=3)).save_pretrained(tmp_path / "deeper")
    opt_tokenizer().save_pretrained(tmp_path / "deeper")
    words = ("--qformer", "blip2", "--mae", "mae", "--llm", tmp_path / "deeper")
    assert "no source has 'language_projection.weight'" in fails(files, capsys, tmp_path / "out", *words)
    assert run(files, tmp_path / "out", *words, "--allow", "language_projection.*") == 0
    assert "logits" not in differences(tmp_path / "out")


def test_a_language_model_with_other_weights_is_found_out(files, tmp_path, capsys):
    randomise(OPTForCausalLM(opt_config())).save_pretrained(tmp_path / "other")
    opt_tokenizer().save_pretrained(tmp_path / "other")
    error = fails(files, capsys, tmp_path / "out", "--qformer", "blip2", "--mae", "mae", "--llm", tmp_path / "other")
    assert "logits: the new model is" in error
    assert "it is not kept" in error


def test_a_model_that_is_not_its_parents_is_found_out(files, tmp_path, capsys, monkeypatch):
    drawn = convert.initialised

    def opened(*arguments):
        return {name: tensor + 0.5 for name, tensor in drawn(*arguments).items()}

    monkeypatch.setattr(convert, "initialised", opened)
    error = fails(files, capsys, tmp_path / "out", *BLIP2)
    assert "queries: the new model is" in error


@pytest.mark.parametrize("mae", ["mae_encoder", "mae_model"])
def test_a_mae_without_decoder_cannot_reconstruct(files, mae, tmp_path, capsys):
    words = ("--qformer", "blip2", "--mae", mae, "--llm", "opt")
    assert "--variant no_reconstruction does without" in fails(files, capsys, tmp_path / "out", *words)
    assert run(files, tmp_path / "out", *words, "--variant", "no_reconstruction") == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--qformer", "blip2"), "name it with --mae"),
        (("--qformer", "blip2", "--mae", "mae", "--variant", "qformer"), "leave --mae out"),
        (("--qformer", "blip2", "--mae", "mae", "--variant", "nothing"), "variant 'nothing' is unknown"),
        (("--qformer", "blip2", "--mae", "mae", "--variant", "random_mae"), "nothing to convert"),
        (("--qformer", "nowhere/at/all", "--mae", "mae"), "no such file or folder"),
        (("--qformer", "Salesforce/blip2-opt-2.7b", "--mae", "mae"), "not to be had from the hub"),
        (("--qformer", "mae", "--mae", "mae"), "--qformer takes a BLIP-2 or a BERT"),
        (("--qformer", "eva_vit_g.pth", "--mae", "mae"), "a .pth without Q-Former"),
        (("--qformer", "blip2_pretrained.pth", "--mae", "mae"), "has no CLIP tower; name it with --clip"),
        (
            ("--qformer", "blip2_pretrained.pth", "--clip", "blip2_pretrained.pth", "--mae", "mae"),
            "not LAVIS's EVA-CLIP",
        ),
        (("--qformer", "blip2", "--mae", "blip2_pretrained.pth"), "--mae takes a hub id or a folder"),
        (("--qformer", "blip2", "--mae", "bert"), "bert is no vision tower"),
        (("--qformer", "blip2", "--mae", "dino"), "needs the decoder of a MAE"),
        (("--qformer", "blip2", "--mae", "mae", "--llm", "t5"), "a t5 is no causal language model"),
        (("--qformer", "strange", "--mae", "mae"), "transformers does not know ('strange')"),
        (("--qformer", "empty", "--mae", "mae"), "no config.json in it"),
        (("--qformer", "no_weights", "--mae", "mae"), "no weights in it"),
        (("--qformer", "broken", "--mae", "mae"), "damaged or cut short"),
        (("--qformer", "code.pth", "--mae", "mae"), "not a checkpoint that can be read safely"),
        (("--qformer", "list.pth", "--mae", "mae"), "no tensors in it"),
        (("--qformer", "itm", "--mae", "mae", "--qformer-tokenizer", "opt"), "not a BERT's tokenizer"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(files, words, message, tmp_path, capsys):
    T5Config().save_pretrained(files / "t5")
    for name in ("strange", "empty", "no_weights", "broken"):
        (files / name).mkdir(exist_ok=True)
    (files / "strange" / "config.json").write_text('{"model_type": "strange"}')
    blip2_config().save_pretrained(files / "no_weights")
    blip2_config().save_pretrained(files / "broken")
    (files / "broken" / "model.safetensors").write_bytes(b"\x10\0\0\0")
    torch.save({"model": functional.gelu}, files / "code.pth")
    torch.save([1, 2], files / "list.pth")
    assert message in fails(files, capsys, tmp_path / "out", *words)


@pytest.mark.parametrize("missing", ["pos_embed", "blocks.1.attn.v_bias"])
def test_a_tower_that_is_not_whole_is_said(files, missing, tmp_path, capsys):
    tensors = torch.load(files / "eva_vit_g.pth")
    del tensors[missing]
    torch.save(tensors, tmp_path / "cut.pth")
    words = ("--qformer", "blip2_pretrained.pth", "--clip", tmp_path / "cut.pth", "--mae", "mae")
    error = fails(files, capsys, tmp_path / "out", *words)
    assert "not a whole EVA-CLIP" in error or "no source has 'xformer.clip_encoder.tower.encoder.layers.1" in error


def test_a_full_disk_is_said_before_anything_is_written(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda _: SimpleNamespace(free=1e6))
    assert "the model needs 0.0 GB" in fails(files, capsys, tmp_path / "out", *BLIP2)


def test_nothing_is_overwritten(files, tmp_path, capsys):
    (tmp_path / "kept").write_text("mine")
    assert run(files, tmp_path, *BLIP2) == 2
    assert "there is something already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


# -- the published sizes ---------------------------------------------------------------------------------------------


def on_meta(label, tensors, config=None):
    tensors = {
        name: torch.empty(t, device="meta") if isinstance(t, tuple) else t.to("meta") for name, t in tensors.items()
    }
    return convert.Source(label, tensors, tensors.__getitem__, None, config)


def built_on_meta(kind, config):
    with torch.device("meta"):
        return kind(config).state_dict()


OPT_2_7B = OPTConfig(
    hidden_size=2560, ffn_dim=10240, num_hidden_layers=32, num_attention_heads=32, word_embed_proj_dim=2560
)


def published_blip2():
    """Salesforce/blip2-opt-2.7b: its vocabulary has been padded for <image>."""
    text = OPT_2_7B.to_dict() | {"vocab_size": 50304}
    config = Blip2Config(text_config=text, image_token_index=50265)
    return on_meta("blip2", built_on_meta(Blip2ForConditionalGeneration, config), config)


def published_mae(old):
    """facebook/vit-mae-huge."""
    sizes = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "intermediate_size": 5120}
    config = ViTMAEConfig(**sizes, patch_size=14)
    tensors = built_on_meta(ViTMAEForPreTraining, config)
    return on_meta("mae", {old_mae_name(n) if old else n: t for n, t in tensors.items()}, config)


def published_opt():
    return on_meta("opt", built_on_meta(OPTForCausalLM, OPT_2_7B), OPT_2_7B)


def published_bert():
    tensors = built_on_meta(BertForPreTraining, BertConfig())
    return on_meta("bert", {old_bert_name(n): t for n, t in tensors.items()}, BertConfig())


def plan_of(monkeypatch, qformer, kind, tower=None, llm=None, old=True):
    """The plan of a conversion at the published sizes."""

    class Bert(PreTrainedTokenizerFast):
        def __len__(self):
            return 30523

    tokenizer = bert_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    big = Bert(tokenizer_object=tokenizer.backend_tokenizer, bos_token="[DEC]", unk_token="[UNK]", pad_token="[PAD]")
    monkeypatch.setattr(convert, "qformer_tokenizer", lambda *_: big)
    monkeypatch.setattr(convert, "llm_tokenizer_of", lambda *_: opt_tokenizer())
    settings = convert.ConvertConfig(qformer="", output_dir="")
    towers = (tower, "eva") if tower else (qformer, "blip-2")
    target = convert.build_target(settings, convert.Sources(qformer, kind, *towers, published_mae(old), llm))
    return convert.make_plan(target), target


def initialised_parts(plan):
    return {convert.part_of(name) for name in plan.fresh}


@pytest.mark.parametrize("old", [True, False])
def test_the_published_blip2_and_mae_map_completely(monkeypatch, old):
    plan, target = plan_of(monkeypatch, published_blip2(), "blip-2", llm=published_opt(), old=old)
    assert initialised_parts(plan) == {"fusion"}
    assert {reason for _, reason in plan.left} == {"the language model comes from --llm"}
    paper = convert.XFormerConfig.paper()
    for part in ("clip_config", "mae_config"):
        ours, theirs = getattr(target.config, part).to_diff_dict(), getattr(paper, part).to_diff_dict()
        assert {name: value for name, value in ours.items() if name not in ("dtype", "transformers_version")} == {
            name: value for name, value in theirs.items() if name not in ("dtype", "transformers_version")
        }
    assert sum(t.numel() for n, t in target.wanted.items() if n.startswith("xformer.clip_encoder")) / 1e6 == (
        pytest.approx(986, rel=0.001)
    )


def test_the_published_lavis_stage_1_maps_completely(monkeypatch):
    qformer, tower = on_meta("lavis", lavis_stage1(PUBLISHED)), on_meta("eva", eva(PUBLISHED))
    plan, target = plan_of(monkeypatch, qformer, "lavis", tower)
    assert initialised_parts(plan) == {"fusion"}
    assert {reason for _, reason in plan.left} == {
        "tied to the word embeddings and the bias", "numbers of positions, not weights", "behind the layer that is read"
    }  # fmt: skip
    assert target.config.clip_config.num_hidden_layers == 39
    assert target.config.clip_config.num_attention_heads == 16
    paper = convert.XFormerConfig.paper().qformer_config
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
                 "cross_attention_frequency", "encoder_hidden_size", "max_position_embeddings"):  # fmt: skip
        assert getattr(target.config.qformer_config, name) == getattr(paper, name), name


def test_the_published_lavis_stage_2_maps_completely(monkeypatch):
    qformer, tower = on_meta("lavis", lavis_stage2(PUBLISHED)), on_meta("eva", eva(PUBLISHED))
    plan, _ = plan_of(monkeypatch, qformer, "lavis", tower, published_opt())
    assert initialised_parts(plan) == {"fusion"}
    assert {reason for _, reason in plan.left} == {
        "numbers of positions, not weights",
        "behind the layer that is read",
    }


def test_the_published_bert_maps_completely(monkeypatch):
    plan, target = plan_of(monkeypatch, published_bert(), "bert", on_meta("eva", eva(PUBLISHED)))
    assert initialised_parts(plan) == {
        "fusion", "clip_encoder", "clip_layernorm", "query_tokens", "qformer", "vision_projection", "text_projection",
        "itm_head", "temperature",
    }  # fmt: skip
    assert all(".crossattention." in name for name in plan.fresh if name.startswith("xformer.qformer."))
    assert len(target.model.itg_bias) == 30523
