"""Stage 2 with every kind of language model: OPT's, Llama's, Qwen's and an encoder-decoder; chat templates; LoRA."""

import copy
import dataclasses
import importlib.util
import itertools
import sys

import pytest
import torch
from conftest import llm_inputs, randomise, tiny_config
from PIL import Image
from safetensors.torch import load_file
from test_modeling import blip2_config, from_blip2, normalised
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForImageTextToText,
    Blip2ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTMAEConfig,
    pipeline,
)

from xformer_mllm import XFormerForConditionalGeneration, XFormerProcessor
from xformer_mllm.checkpoints import load_language_model, load_model, start_generation
from xformer_mllm.data.questions import QUESTION_PROMPT
from xformer_mllm.embedded.scenes import SceneCaptions, SceneQuestions
from xformer_mllm.model.modeling_xformer import LORA
from xformer_mllm.train import freeze, run_folder
from xformer_mllm.train.batches import IGNORED, Stage2Collator
from xformer_mllm.train.config import Stage2Config
from xformer_mllm.train.stages import run_stage2

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs the package peft")

CHATML = """{% if messages[0]['role'] != 'system' %}<|im_start|>system
You are helpful.<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LLAMA2 = """{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]\
{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"""
TEXTS = [
    "how many blue circles are there?\n",
    "a small red square left of 3 striped triangles\n",
    "Question: Answer: yes",
]
SIZES = {"hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 256}
GATED = SIZES | {"intermediate_size": 48, "num_key_value_heads": 1}


def byte_level(**special) -> PreTrainedTokenizerFast:
    """Byte-level BPE: GPT-2's kind, OPT's and Qwen's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    names = list(dict.fromkeys(special.values()))
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=330, special_tokens=names, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def metaspace(unigram: bool, **special) -> PreTrainedTokenizerFast:
    """SentencePiece's kinds: Llama's BPE, T5's unigram model."""
    tokenizer = Tokenizer(models.Unigram() if unigram else models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    names = list(special.values())
    train = trainers.UnigramTrainer if unigram else trainers.BpeTrainer
    settings = {"unk_token": special["unk_token"]} if unigram else {}
    tokenizer.train_from_iterator(TEXTS, train(vocab_size=90, special_tokens=names, **settings))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def framed(tokenizer: PreTrainedTokenizerFast, form: str, token: str) -> PreTrainedTokenizerFast:
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=form, special_tokens=[(token, tokenizer.convert_tokens_to_ids(token))]
    )
    return tokenizer


def opt():
    tokenizer = byte_level(bos_token="</s>", eos_token="</s>", pad_token="<pad>")
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    config = OPTConfig(**SIZES, vocab_size=330, ffn_dim=48, word_embed_proj_dim=36, dropout=0.1, **ids)
    return OPTForCausalLM(config), framed(tokenizer, "</s> $A", "</s>")


def llama():
    tokenizer = metaspace(False, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = LLAMA2
    return LlamaForCausalLM(LlamaConfig(**GATED, vocab_size=len(tokenizer))), framed(tokenizer, "<s> $A", "<s>")


def qwen():
    """Two end tokens, the wrong one first, as many an instruct model's settings have them; no start token."""
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "additional_special_tokens": ["<|im_start|>"]}
    tokenizer = byte_level(eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<|im_start|>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **special)
    tokenizer.chat_template = CHATML
    model = Qwen2ForCausalLM(Qwen2Config(**GATED, vocab_size=330, bos_token_id=None, eos_token_id=1))
    model.generation_config.eos_token_id = [1, 0]
    return model, tokenizer


def t5():
    tokenizer = metaspace(True, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    sizes = {"d_model": 36, "d_kv": 18, "d_ff": 48, "num_layers": 2, "num_heads": 2, "vocab_size": len(tokenizer)}
    config = T5Config(**sizes, decoder_start_token_id=0, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    return T5ForConditionalGeneration(config), framed(tokenizer, "$A </s>", "</s>")


LANGUAGE_MODELS = {"opt": opt, "llama": llama, "qwen": qwen, "t5": t5}
KINDS = [("opt", False), ("llama", False), ("llama", True), ("qwen", False), ("qwen", True), ("t5", False)]


@pytest.fixture(scope="module")
def language_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llm")
    torch.manual_seed(0)
    for name, make in LANGUAGE_MODELS.items():
        model, tokenizer = make()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def start(runs, language_models):
    def start(name, chat=False, **settings):
        model, processor = start_generation(
            runs / "stage1" / "model", str(language_models / name), chat_template=chat, **settings
        )
        randomise(model.language_projection, 0.5)  # images that matter
        return model, processor

    return start


def end_of(model) -> int:
    """As training takes it."""
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, int) else ends[0]


def batch_of(model, processor, questions=True, size=3):
    source = SceneQuestions("train", size, questions_per_scene=1) if questions else SceneCaptions("train", size)
    return Stage2Collator(processor, end_of(model), 32)([source[place] for place in range(size)])


def inputs(batch):
    return {name: tensor for name, tensor in batch.items() if name != "ids"}


def train(model, batch, steps=2):
    model.freeze()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**inputs(batch)).loss.backward()
        optimizer.step()
    return model.eval()


def some_images(count):
    return torch.randint(0, 256, (count, 3, 48, 48), dtype=torch.uint8)


PROMPTS = ["Question: how many circles are there? Answer:", "", "Question: is it red? Answer:", "a red"]


@pytest.mark.parametrize(("name", "chat"), KINDS)
def test_train_save_load_generate(start, name, chat, tmp_path):
    model, processor = start(name, chat)
    frozen = {n: p.clone() for n, p in model.language_model.named_parameters()}
    projection = model.language_projection.weight.clone()
    train(model, batch_of(model, processor))
    assert all(torch.equal(frozen[n], p) for n, p in model.language_model.named_parameters())
    assert not torch.equal(projection, model.language_projection.weight)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, its_processor = load_model(tmp_path, [XFormerForConditionalGeneration])
    assert its_processor.turn == processor.turn
    assert its_processor.encoder_decoder == (name == "t5")
    pixels = some_images(len(PROMPTS))
    asked, again_asked = processor(text=PROMPTS), its_processor(text=PROMPTS)
    assert torch.equal(asked["input_ids"], again_asked["input_ids"])
    generated = model.generate(pixels, **asked, max_new_tokens=5, do_sample=False)
    assert torch.equal(generated, again.to("cpu").generate(pixels, **again_asked, max_new_tokens=5, do_sample=False))
    assert 1 <= generated.shape[1] - (1 if name == "t5" else asked["input_ids"].shape[1]) <= 5
    assert model.generate(pixels, max_new_tokens=3, do_sample=False).shape[0] == len(PROMPTS)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(("name", "chat"), KINDS)
def test_batched_generation_equals_one_by_one(start, name, chat, beams):
    model, processor = start(name, chat)
    model.eval()
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": beams, "do_sample": False}
    pixels = some_images(len(PROMPTS))
    batched = model.generate(pixels, **processor(text=PROMPTS), **settings)
    for row, image, prompt in zip(batched, pixels, PROMPTS, strict=True):
        assert torch.equal(row[-6:], model.generate(image[None], **processor(text=prompt), **settings)[0, -6:])
    assert len({tuple(row[-6:].tolist()) for row in batched}) > 1


@pytest.mark.parametrize(("name", "chat"), [kind for kind in KINDS if kind[0] != "t5"])
def test_training_and_inference_have_the_same_prompt(start, name, chat):
    """Labels are the target and the end alone; the loss is that of the logits behind the very prompt of inference."""
    model, processor = start(name, chat)
    tokenizer, end = processor.tokenizer, end_of(model)
    records = [{"id": "q", "question": "how many circles are there?", "answer": "3"}, {"id": "c", "caption": "a red"}]
    records = [record | {"image": Image.new("RGB", (48, 48))} for record in records]
    batch = Stage2Collator(processor, end, 32)(records)
    model.eval()
    for place, (record, prompt) in enumerate(zip(records, [PROMPTS[0], PROMPTS[1]], strict=True)):
        ids = batch["input_ids"][place][batch["attention_mask"][place] == 1].tolist()
        learned = [token for token in batch["labels"][place].tolist() if token != IGNORED]
        before = processor(text=prompt)["input_ids"][0].tolist()
        assert before.count(processor.image_token_id) == processor.num_query_tokens
        assert ids == [*before, *learned]
        assert batch["labels"][place].tolist()[: len(before)] == [IGNORED] * len(before)
        assert learned[-1] == end
        assert tokenizer.decode(learned[:-1]).strip() == record.get("answer", record.get("caption"))
        with torch.no_grad():
            logits = model(batch["pixel_values"][place][None], torch.tensor([ids]), torch.ones(1, len(ids))).logits[0]
            row = {n: t[place][None] for n, t in inputs(batch).items() if n != "image_index"}
            expected = torch.nn.functional.cross_entropy(logits[-len(learned) - 1 : -1], torch.tensor(learned))
            torch.testing.assert_close(model(**row).lm_loss, expected)


def test_the_end_that_is_learned_stops_generation(start):
    ends = {}
    for kind in KINDS:
        model, processor = start(*kind)
        ends[kind] = processor.tokenizer.decode([end_of(model)])
    assert ends == {
        ("opt", False): "\n",  # start and end are one token there
        ("llama", False): "</s>",
        ("llama", True): "</s>",
        ("qwen", False): "<|endoftext|>",
        ("qwen", True): "<|im_end|>",
        ("t5", False): "</s>",
    }
    model, processor = start("qwen", True)
    train(model, batch_of(model, processor, size=1), steps=1)
    model.language_model.lm_head.weight.data.zero_()
    bias = torch.zeros(model.config.text_config.vocab_size)
    bias[end_of(model)] = 1
    model.language_model.lm_head.bias = torch.nn.Parameter(bias)  # nothing but the end is ever said
    asked = processor(text=PROMPTS[0])
    generated = model.generate(some_images(1), **asked, max_new_tokens=9, do_sample=False)
    assert generated.tolist() == [[*asked["input_ids"][0].tolist(), end_of(model)]]


TURNS = {
    "qwen": (
        "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        "",
    ),
    "llama": ("<s>[INST] ", " [/INST]", " "),
}


@pytest.mark.parametrize("name", TURNS)
def test_the_chat_template_is_the_tokenizers_own(start, name):
    """Prompt and answer are, token for token, what the tokenizer makes of such a conversation."""
    model, processor = start(name, True)
    tokenizer = processor.tokenizer
    assert processor.turn == list(TURNS[name])
    # Llama's template writes a space before the end, which a model need not learn, and the image splits another one off.
    ignored = {processor.image_token_id, *(tokenizer.convert_tokens_to_ids(["▁"]) if name == "llama" else [])}

    def tokens(ids):
        return [token for token in ids if token not in ignored]

    def tokenized(turns, **options):
        text = tokenizer.apply_chat_template(turns, tokenize=False, **options)
        return tokens(tokenizer(text, add_special_tokens=False)["input_ids"])

    for prompt, answer in itertools.product(["how many circles?", "a red"], ["3", "blue circles"]):
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        (before,), (said,) = processor.prompt_ids([prompt]), processor.target_ids([prompt], [answer])
        assert tokens(before) == tokenized(turns[:1], add_generation_prompt=True)
        ours, whole = tokens([*before, *said, end_of(model)]), tokenized(turns)
        assert ours == whole[: len(ours)]
        assert len(whole) - len(ours) <= 1  # a newline behind the end


def test_the_pipeline_speaks_by_the_chat_template_too(start, tmp_path):
    model, processor = start("qwen", True)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    image = Image.fromarray(some_images(1)[0].permute(1, 2, 0).numpy())
    pipe = pipeline("image-text-to-text", model=str(tmp_path))
    settings = {"max_new_tokens": 5, "do_sample": False}
    asked = {"images": image, "text": "<image>" + PROMPTS[0]}
    said = pipe(**asked, generate_kwargs=settings, return_full_text=False)[0]["generated_text"]
    inputs = processor(images=image, text=PROMPTS[0])
    tokens = pipe.model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
    assert said.strip() == processor.tokenizer.decode(tokens[0], skip_special_tokens=True).strip()


def test_a_model_without_a_chat_template_says_so(start):
    with pytest.raises(ValueError, match="opt: has no chat template") as error:
        start("opt", True)
    assert "\n" not in str(error.value)


def test_what_is_no_language_model_is_said(tmp_path):
    ViTMAEConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a vit_mae is not a language model"):
        load_language_model(str(tmp_path))


def test_the_frozen_language_model_drops_nothing(start):
    for name in ("opt", "t5"):
        model, processor = start(name)
        batch = inputs(batch_of(model, processor))
        model.train()
        with torch.no_grad():
            torch.testing.assert_close(model(**batch).loss, model.eval()(**batch).loss)


# ---- encoder-decoder


def t5_config(config):
    config = copy.deepcopy(config)
    config.text_config = T5Config(
        vocab_size=60, d_model=36, d_kv=18, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    config.qformer_config.use_qformer_text_input = False
    config.clip_config.layer_norm_eps = 1e-5  # of BLIP-2's ln_vision, which we always take
    return config


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_blip2_with_t5_in_our_model_gives_the_same_results(attention):
    config = t5_config(tiny_config("blip2"))
    config._attn_implementation = attention
    blip2 = randomise(Blip2ForConditionalGeneration(blip2_config(config, False))).eval()
    ours = from_blip2(blip2, config, XFormerForConditionalGeneration(config))
    ids, _ = llm_inputs(config, 4)
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    labels = torch.randint(2, 40, (4, 6))
    labels[2, 3:] = IGNORED
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    pixels = normalised(images, config)
    with torch.no_grad():
        theirs = blip2(pixels, ids, mask, labels=labels)
        torch.testing.assert_close(ours(images, ids, mask, labels=labels).lm_loss, theirs.loss)
        shifted = blip2.language_model._shift_right(labels)
        logits = ours(images, ids, mask, decoder_input_ids=shifted).logits
        torch.testing.assert_close(logits, theirs.logits, atol=1e-5, rtol=1e-4)
        generated = blip2.generate(pixels, ids, mask, max_new_tokens=6, do_sample=False)
        beams = blip2.generate(pixels, ids, mask, max_new_tokens=6, do_sample=False, num_beams=3)
    assert torch.equal(ours.generate(images, ids, mask, max_new_tokens=6, do_sample=False), generated)
    found = ours.generate(images, ids, mask, max_new_tokens=6, do_sample=False, num_beams=3)
    assert torch.equal(found, beams)


def test_an_encoder_reads_the_question_or_a_captions_beginning(start):
    model, processor = start("t5")
    tokenizer, collator = processor.tokenizer, Stage2Collator(processor, end_of(model), 32)
    image, words = Image.new("RGB", (48, 48)), TEXTS[1].split()
    asked = collator([{"id": "q", "image": image, "question": "how many?", "answer": "3"}])
    prompt = QUESTION_PROMPT.format(question="how many?")
    assert torch.equal(asked["input_ids"][asked["attention_mask"] == 1], processor(text=prompt)["input_ids"][0])
    assert asked["labels"][asked["labels"] != IGNORED].tolist() == tokenizer("3")["input_ids"]
    captions = [{"id": str(number), "image": image, "caption": " ".join(words)} for number in range(40)]
    batch, split = collator(captions), set()
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        read = tokenizer.decode(ids[mask == 1], skip_special_tokens=True).split()
        said = tokenizer.decode(labels[labels != IGNORED], skip_special_tokens=True).split()
        assert [*read, *said] == words
        assert torch.equal(ids[mask == 1], processor(text=" ".join(read))["input_ids"][0])
        split.add(len(read))
    assert split == set(range(len(words)))
    again = collator(captions)
    assert torch.equal(again["labels"], batch["labels"])


# ---- paths through stage 2


@pytest.mark.parametrize(("name", "chat"), KINDS)
def test_instruction_aware_queries_read_the_bare_prompt(start, name, chat):
    model, processor = start(name, chat, instruction_aware=True)
    batch = batch_of(model, processor)
    questions = [SceneQuestions("train", 3, questions_per_scene=1)[place]["question"] for place in range(3)]
    prompts = [QUESTION_PROMPT.format(question=question) for question in questions]
    assert torch.equal(batch["qformer_input_ids"], processor(text=prompts)["qformer_input_ids"])
    assert torch.equal(batch["qformer_input_ids"], processor.qformer_inputs(prompts)["qformer_input_ids"])
    train(model, batch, steps=1)
    asked = processor(text=prompts)
    assert model.generate(batch["pixel_values"], **asked, max_new_tokens=2, do_sample=False).shape[0] == 3


def test_reconstruction_in_stage_2_with_an_encoder_decoder(start):
    model, processor = start("t5", instruction_aware=True)
    model.config.reconstruction_in_stage2 = True
    records = SceneQuestions("train", 2, questions_per_scene=2)
    batch = Stage2Collator(processor, end_of(model), 32)([[records[0], records[1]], [records[2], records[3]]])
    output = model(**inputs(batch))
    torch.testing.assert_close(output.loss, output.lm_loss + output.reconstruction_loss)
    output.loss.backward()
    assert model.language_projection.weight.grad.abs().sum() > 0


# ---- LoRA


@needs_peft
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_adapters_change_nothing_until_they_are_trained(start, name):
    plain, processor = start(name)
    torch.manual_seed(1)
    adapted, _ = start(name, lora_rank=2)
    adapted.language_projection.load_state_dict(plain.language_projection.state_dict())
    batch = inputs(batch_of(plain, processor))
    with torch.no_grad():
        assert torch.equal(plain.eval()(**batch).loss, adapted.eval()(**batch).loss)
    own = {n: p for n, p in adapted.language_model.named_parameters() if LORA not in n}
    theirs = dict(plain.language_model.named_parameters())
    assert all(torch.equal(theirs[n.replace(".base_layer", "")], p) for n, p in own.items())


@needs_peft
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_adapters_are_trained_and_saved_with_stage_2(start, name, tmp_path):
    model, processor = start(name, lora_rank=2)
    before = {n: p.clone() for n, p in model.named_parameters()}
    train(model, batch_of(model, processor), steps=3)
    trained = {n for n, p in model.named_parameters() if not torch.equal(before[n], p)}
    adapters = {n for n in before if LORA in n}
    assert adapters
    assert adapters <= trained
    assert {n for n in trained if n.startswith("language_model.")} == adapters
    table = {part.name: part for part in freeze.freeze_table(model)}
    assert table["language_model"].trainable == sum(before[n].numel() for n in adapters)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors", ".jinja"}
    again, report = AutoModelForImageTextToText.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    batch = inputs(batch_of(model, processor))
    with torch.no_grad():
        assert torch.equal(model(**batch).loss, again.eval()(**batch).loss)
    asked = XFormerProcessor.from_pretrained(tmp_path)(text=PROMPTS)
    pixels = some_images(len(PROMPTS))
    settings = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(pixels, **asked, **settings), again.generate(pixels, **asked, **settings))
    again.freeze()
    assert {n for n, p in again.named_parameters() if p.requires_grad and LORA in n} == adapters


@needs_peft
def test_adapters_of_a_bf16_language_model_are_fp32(start, tmp_path):
    model, processor = start("llama", lora_rank=2)
    for name, part in model.named_modules():
        if name in ("language_model", "xformer.clip_encoder", "xformer.mae_encoder", "xformer.mae_decoder"):
            for parameter_name, parameter in part.named_parameters():
                if LORA not in f".{parameter_name}":
                    parameter.data = parameter.data.bfloat16()
    model.config.text_config.dtype = torch.bfloat16
    train(model, batch_of(model, processor), steps=1)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert {n: p.dtype for n, p in model.named_parameters()} == {n: p.dtype for n, p in again.named_parameters()}
    assert {p.dtype for n, p in again.named_parameters() if LORA in n} == {torch.float32}
    assert {p.dtype for n, p in again.language_model.named_parameters() if LORA not in n} == {torch.bfloat16}


def test_without_peft_it_is_named(start, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModuleNotFoundError) as error:
        start("opt", lora_rank=2)
    assert error.value.name == "peft"  # which the command line turns into the extra to install


def test_a_negative_rank_is_refused():
    with pytest.raises(ValueError, match="lora_rank is -1"):
        tiny_config(lora_rank=-1)


@needs_peft
@pytest.mark.parametrize(("name", "chat"), [("qwen", True), ("t5", False)])
def test_a_run_with_adapters_is_resumed_bit_for_bit(runs, language_models, name, chat, tmp_path, monkeypatch):
    settings = Stage2Config(
        from_pretraining=runs / "stage1",
        llm=str(language_models / name),
        text="questions",
        chat_template=chat,
        lora_rank=2,
        train_size=8,
        batch_size=3,
        steps=4,
        save_steps=2,
        warmup_steps=1,
        output_dir=tmp_path / "whole",
    )
    run_stage2(settings)
    cut = dataclasses.replace(settings, output_dir=tmp_path / "cut")
    save = run_folder.rotate

    def save_and_stop(*args):
        save(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(run_folder, "rotate", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        run_stage2(cut)
    monkeypatch.undo()
    (checkpoint,) = cut.output_dir.glob("checkpoint-*")
    assert any(LORA in key for key in load_file(checkpoint / "trained.safetensors"))
    run_stage2(cut)
    whole, resumed = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("whole", "cut"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
