"""Published checkpoints in their own layouts: tiny ones as files, full-sized ones as names and shapes.

The layouts are written down here from upstream's code (salesforce/LAVIS 506965b lavis/models/eva_vit.py,
blip2_models/{Qformer,blip2,blip2_qformer,blip2_opt,blip2_t5}.py; facebookresearch/mae models_mae.py; transformers 4 for
the MAE's old names).
"""

import json
from pathlib import Path

import torch
from conftest import randomise
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
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
    T5ForConditionalGeneration,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from xformer_mllm.cli import main
from xformer_mllm.model.vision_encoders import mae_positions

WORDS = ["a", "photo", "of", "the", "red", "circle", "what", "is", "in", "image", "question", "answer", ":", "?"]

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


def save_tiny(folder: Path) -> None:
    """Tiny random checkpoints: blip2, blip2_t5, itm, mae, mae_encoder, opt, t5, bert, clip, dino, *.pth."""
    torch.manual_seed(0)
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

    t5_tokenizer().save_pretrained(folder / "t5")
    t5 = randomise(T5ForConditionalGeneration(t5_config()), 0.05)
    t5.save_pretrained(folder / "t5")
    blip2_t5 = randomise(Blip2ForConditionalGeneration(blip2_config(text_config=t5_config())), 0.05)
    blip2_t5.language_model.load_state_dict(t5.state_dict())
    blip2_t5.save_pretrained(folder / "blip2_t5")

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
    torch.save({"model": random_tensors(lavis_stage2(TINY, "t5"))}, folder / "blip2_pretrained_flant5xl.pth")
    torch.save(random_tensors(eva(TINY)), folder / "eva_vit_g.pth")


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


def original_mae(width, patch, decoder=True):
    """facebookresearch/mae's mae_visualize_vit_*.pth, or without decoder mae_pretrain_vit_*.pth; one block of each."""
    names = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 5, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        **mae_block("blocks.0.", width),
        **norm("norm", width),
    }
    if decoder:
        names |= {"mask_token": (1, 1, 512), "decoder_pos_embed": (1, 5, 512)}
        names |= linear("decoder_embed", width, 512) | mae_block("decoder_blocks.0.", 512)
        names |= norm("decoder_norm", 512) | linear("decoder_pred", 512, 3 * patch * patch)
    return names


def mae_block(prefix, width):
    names = norm("norm1", width) | linear("attn.qkv", width, 3 * width) | linear("attn.proj", width, width)
    names |= norm("norm2", width) | linear("mlp.fc1", width, 4 * width) | linear("mlp.fc2", 4 * width, width)
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


def lavis_stage2(size, llm="opt"):
    """blip2_pretrained_opt2.7b.pth, blip2_pretrained_flant5xl.pth: no text feed-forwards, words and head."""
    return {**lavis_qformer(size, text=False), **linear(f"{llm}_proj", size["width"], size["llm"])}


def linear(name, inputs, outputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def random_tensors(names, deviation=0.15):
    """Values with which every tensor matters: norms near 1, the decoder tied to the words."""
    tensors = {}
    for name, shape in names.items():
        is_norm = "norm" in name.lower() or "ln_vision" in name
        tensors[name] = deviation * torch.randn(shape) + (1.0 if is_norm and name.endswith("weight") else 0.0)
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
    tokenizer = bytes_of("</s>", "<pad>")
    tokenizer.post_processor = processors.TemplateProcessing("</s> $A", special_tokens=[("</s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", pad_token="<pad>")


def t5_tokenizer():
    """Bytes, with </s> after every text, as T5's."""
    tokenizer = bytes_of("<pad>", "</s>")
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")


def bytes_of(*special):
    vocabulary = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(vocabulary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


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


def t5_config(**changes):
    """FlanT5's kind: a gated feed-forward, and an output layer of its own."""
    fields = {"d_model": 36, "d_kv": 18, "d_ff": 48, "num_layers": 2, "num_heads": 2, "vocab_size": 260}
    fields |= {"decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    return T5Config(**(fields | changes))


def blip2_config(text_input=False, text_config=None):
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
        text_config=text_config or opt_config(),
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


# -- the command line, on these files --------------------------------------------------------------------------------


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
LAVIS = ("--clip", "eva_vit_g.pth", "--mae", "mae", "--dtype", "float32")


def fails(files, capsys, output, *words):
    """The one line that the command says; nothing is left."""
    before = {path.name for path in output.parent.iterdir()}
    assert run(files, output, *words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert {path.name for path in output.parent.iterdir()} == before
    return error
