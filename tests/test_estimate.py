"""The cost model against what torch counts: FLOPs exactly, bytes kept for the backward pass within a stated tolerance."""

import json
import re
from contextlib import contextmanager
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
import tyro
from conftest import llm_inputs, tiny_config
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, LlamaConfig, OPTConfig, T5Config

from xformer_mllm import VARIANTS, XFormerConfig, XFormerForConditionalGeneration, XFormerForPreTraining
from xformer_mllm.commands import EstimateConfig
from xformer_mllm.embedded.start import WEIGHTS, embedded_config
from xformer_mllm.estimate.costs import (
    BF16,
    GPUS,
    Cost,
    Gpu,
    Work,
    costs,
    memory,
    step_seconds,
    total,
    vocabulary_gradient,
)
from xformer_mllm.estimate.estimation import estimate, language_model_config, read_recipe, work_of
from xformer_mllm.estimate.sizes import empty_model, sizes_of
from xformer_mllm.model import modeling_xformer
from xformer_mllm.model.modeling_xformer import FROZEN
from xformer_mllm.variants import variant_config

ROOT = Path(__file__).parent.parent
TEXT = 7


# ---- what torch counts


def attention_flops(query, key, value, *_args, out_shape=None, **_kwargs) -> int:
    batch, heads, asking, width = query
    return 4 * batch * heads * asking * key[2] * width


def attention_backward_flops(_gradient, query, key, value, *_args, out_shape=None, **_kwargs) -> int:
    return 2 * attention_flops(
        query, key, value
    )  # of the products' gradients; what a kernel computes again is its own


CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


@contextmanager
def bytes_kept(model: nn.Module):
    """Yields a list that ends with the bytes of all storages that autograd saved, the model's own weights aside."""
    weights = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    saved, found = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage  # held, so that no other gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found
    found.append(sum(storage.nbytes() for storage in saved.values()))


def measured_step(model, inputs, autocast: bool = False) -> Cost:
    """One forward and backward pass: what torch counts of it."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter, bytes_kept(model) as kept:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**inputs).loss
        forward = counter.get_total_flops()
        loss.backward()
    return Cost(forward, counter.get_total_flops() - forward, kept[0])


def inputs_of(config: XFormerConfig, stage: int, images: int, text: int, prompt: int = 1, texts: int = 1) -> dict:
    size = config.clip_config.image_size
    inputs = {"pixel_values": torch.zeros(images, 3, size, size, dtype=torch.uint8)}
    if stage == 1:
        ids = torch.ones(images, text, dtype=torch.long)
        inputs |= {"qformer_input_ids": ids, "qformer_attention_mask": torch.ones_like(ids)}
        another = torch.arange(images).roll(1)
        return inputs | {"negatives": (another, another)}
    ids, mask = llm_inputs(config, images * texts, prompt + text)
    labels = torch.full_like(ids, -100)
    labels[:, -text:] = 1
    inputs |= {"input_ids": ids, "attention_mask": mask, "labels": labels}
    inputs["image_index"] = torch.arange(images).repeat_interleave(texts)
    if config.instruction_aware:
        read = torch.ones(images * texts, prompt, dtype=torch.long)
        inputs |= {"qformer_input_ids": read, "qformer_attention_mask": read}
    return inputs


def stage2_config(config: XFormerConfig, llm=None, aware: bool = False) -> XFormerConfig:
    config.text_config = llm or config.text_config
    config.qformer_config.use_qformer_text_input = config.instruction_aware = aware
    return config


def predicted(config: XFormerConfig, work: Work) -> Cost:
    return total(list(costs(config, sizes_of(empty_model(config, work.stage)), work).values())) * work.images


def real_model(config: XFormerConfig, stage: int, attention: str = "eager"):
    kind = XFormerForPreTraining if stage == 1 else XFormerForConditionalGeneration
    model = kind._from_config(config, attn_implementation=attention)
    model.freeze()
    return model.train()


# ---- FLOPs


@pytest.fixture(autouse=True)
def rows_as_on_a_gpu(monkeypatch):
    """A CPU adds rows without a target to ITG's."""
    monkeypatch.setattr(modeling_xformer, "ROWS", 1)


def assert_flops_exact(config: XFormerConfig, work: Work) -> None:
    inputs = inputs_of(config, work.stage, work.images, work.text_tokens, work.prompt_tokens, work.texts)
    measured, counted = measured_step(real_model(config, work.stage), inputs), predicted(config, work)
    assert (counted.forward, counted.backward) == (measured.forward, measured.backward)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stage", [1, 2])
def test_flops_are_exact(stage, variant):
    config = variant_config(variant, tiny_config())
    if stage == 2:
        config = stage2_config(config)
    assert_flops_exact(config, Work(stage, 3, TEXT))


def test_flops_are_exact_with_blip2s_tower_and_two_blocks():
    assert_flops_exact(tiny_config("blip2", fusion_blocks=2), Work(1, 3, TEXT))


def test_flops_of_a_tower_without_class_token():
    """SigLIP's pooling head runs, too, though nobody reads it; it is not counted."""
    config = tiny_config("siglip")
    measured = measured_step(real_model(config, 1), inputs_of(config, 1, 3, TEXT))
    counted = predicted(config, Work(1, 3, TEXT))
    assert counted.backward == measured.backward
    assert counted.forward == pytest.approx(measured.forward, rel=0.02)


def test_flops_are_exact_with_several_questions():
    config = stage2_config(variant_config("xformer", tiny_config()), aware=True)
    assert_flops_exact(config, Work(2, 3, 2, texts=4, prompt_tokens=TEXT, instruction_aware=True))


def llama() -> LlamaConfig:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaConfig(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, **heads)


def test_flops_are_exact_with_gates_and_shared_keys():
    assert_flops_exact(stage2_config(tiny_config(), llama()), Work(2, 3, TEXT))


def test_a_shortened_formula_would_be_seen():
    """The comparison can fail: one token more is another number of FLOPs."""
    config = tiny_config()
    measured = measured_step(real_model(config, 1), inputs_of(config, 1, 3, TEXT))
    assert predicted(config, Work(1, 3, TEXT + 1)).forward > measured.forward


# ---- parameters


@pytest.mark.parametrize("stage", [1, 2])
def test_parameters_are_those_of_the_model(stage):
    config = tiny_config() if stage == 1 else stage2_config(tiny_config())
    model, sizes = real_model(config, stage), sizes_of(empty_model(config, stage))
    assert sum(sizes.parameters.values()) == sum(p.numel() for p in model.parameters())
    assert sum(sizes.trained.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("name", "published"), [("facebook/opt-2.7b", 2_651_596_800), ("facebook/opt-6.7b", 6_658_473_984)]
)
def test_language_models_have_their_published_size(name, published):
    config = stage2_config(XFormerConfig.paper(), language_model_config(name))
    sizes = sizes_of(empty_model(config, 2))
    assert sizes.parameters["language_model"] == published
    assert sizes.trained["language_model"] == 0


# ---- bytes kept for the backward pass


@pytest.mark.parametrize("variant", ["qformer", "xformer", "concat", "early_cross_attention", "clip_shallow"])
@pytest.mark.parametrize("stage", [1, 2])
def test_bytes_kept_by_a_real_cpu_step(stage, variant):
    """Embedded sizes, bf16 autocast of a CPU, whose layer norms stay in bf16 where a GPU's are in fp32: within 10 %."""
    config = variant_config(variant, embedded_config())
    if stage == 2:
        opt = AutoConfig.from_pretrained(WEIGHTS / "opt")
        config = stage2_config(config, opt)
        config.image_token_index = opt.vocab_size - 1
    work = Work(stage, 8, 12)
    model = in_bf16(real_model(config, stage, "sdpa"))
    measured = measured_step(model, inputs_of(config, stage, 8, 12), autocast=True).kept
    copies = BF16 * sizes_of(empty_model(config, stage)).cast

    vocabulary = 4 * vocabulary_gradient(config) if stage == 1 else 0
    assert predicted(config, work).kept == pytest.approx(measured - copies - vocabulary, rel=0.1)


def in_bf16(model: nn.Module) -> nn.Module:
    """The frozen parts, as they are trained on a GPU."""
    for name, part in model.named_modules():
        if name.rpartition(".")[2] in FROZEN:
            part.to(torch.bfloat16)
    return model


# ---- the paper's sizes, on tensors without memory


def fake_model(config: XFormerConfig, stage: int) -> nn.Module:
    """The model of the paper's sizes on CPU tensors that have no memory: frozen parts in bf16, attention by a kernel."""
    config._attn_implementation = "sdpa"
    model = empty_model(config, stage)
    made: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        dtype = torch.bfloat16 if set(name.split(".")) & set(FROZEN) else torch.float32
        for key, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(
                        torch.empty(parameter.shape, dtype=dtype), parameter.requires_grad
                    )
                module._parameters[key] = made[id(parameter)]
        for key, buffer in module._buffers.items():
            module._buffers[key] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)
    return model.train()


@pytest.fixture
def shapes_alone(monkeypatch):
    """What a GPU's autocast does to layer norms, and stand-ins for the steps that need numbers, not shapes."""
    layer_norm = nn.functional.layer_norm

    def in_fp32(states, shape, weight=None, bias=None, eps=1e-5):
        with torch.autocast("cpu", enabled=False):
            weight, bias = (None if tensor is None else tensor.float() for tensor in (weight, bias))
            return layer_norm(states.float(), shape, weight, bias, eps)

    def with_soft_prompt(self, input_ids, soft_prompt):
        embeds = self.get_input_embeddings()(input_ids)
        return embeds.masked_scatter((input_ids == 0).unsqueeze(-1), soft_prompt.to(embeds.dtype))

    monkeypatch.setattr(nn.functional, "layer_norm", in_fp32)
    monkeypatch.setattr(XFormerForConditionalGeneration, "_with_soft_prompt", with_soft_prompt)


FULL_SIZE = [
    pytest.param(stage, variant, marks=() if variant == "xformer" else pytest.mark.slow)
    for stage in (1, 2)
    for variant in VARIANTS
]


@pytest.mark.parametrize(("stage", "variant"), FULL_SIZE)
def test_full_size_flops_are_exact_and_bytes_within_1_percent(stage, variant, shapes_alone, monkeypatch):
    learned = (0, 2 * 31) if stage == 1 else (32, 64)  # places of targets
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda tensor: torch.arange(*learned)[:, None])
    config = variant_config(variant, XFormerConfig.paper())
    config.qformer_config.hidden_dropout_prob = 0.0  # a CPU keeps two bytes where a GPU keeps one
    config.qformer_config.attention_probs_dropout_prob = 0.0  # and leaves its attention kernel
    config.image_token_index = 5
    if stage == 2:
        config = stage2_config(config)
    counted, copies = predicted(config, Work(stage, 2, 32)), BF16 * sizes_of(empty_model(config, stage)).cast
    with FakeTensorMode():
        measured = measured_step(fake_model(config, stage), inputs_of(config, stage, 2, 32), autocast=True)
    assert (counted.forward, counted.backward) == (measured.forward, measured.backward)
    vocabulary = 4 * vocabulary_gradient(config) if stage == 1 else 0
    assert counted.kept == pytest.approx(measured.kept - copies - vocabulary, rel=0.01)


# ---- time


def measured_seconds() -> dict[str, tuple[float, float]]:
    """Seconds of a step in stage 1 and 2 of each variant, from benchmarks/step.py's page."""
    page = (ROOT / "docs/results/step.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")
    ]
    return {row[0]: (float(row[1]), float(row[5])) for row in rows if row[0] in VARIANTS}


@pytest.mark.parametrize("stage", [1, 2])
def test_variants_cost_as_they_were_measured(stage):
    """Ratios to `qformer` of FLOPs at the embedded sizes against those of measured CPU steps: within 15 %.

    The texts are those of benchmarks/step.py: ten tokens of a caption, ten of a question and two of its answer.
    """
    work = Work(1, 48, 10) if stage == 1 else Work(2, 96, 2, prompt_tokens=10)
    seconds = {name: both[stage - 1] for name, both in measured_seconds().items()}
    flops = {}
    for name in seconds:
        config = variant_config(name, embedded_config())
        if stage == 2:
            config = stage2_config(config, AutoConfig.from_pretrained(WEIGHTS / "opt"))
        cost = predicted(config, work)
        flops[name] = cost.forward + cost.backward
    assert len(seconds) > 5
    for name in seconds:
        assert flops[name] / flops["qformer"] == pytest.approx(seconds[name] / seconds["qformer"], rel=0.15), name


def test_seconds_are_products_and_memory_traffic():
    config = tiny_config()
    sizes, work = sizes_of(empty_model(config, 1)), Work(1, 4, TEXT)
    cost, trained = predicted(config, work), sum(sizes.trained.values())
    endless = step_seconds(config, sizes, work, Gpu(1e12, 0, 1e30), 0.5)
    assert endless == pytest.approx((cost.forward + cost.backward) / 0.5e12)
    assert step_seconds(config, sizes, work, Gpu(1e30, 0, 1e9), 0.5) == pytest.approx(
        (2 * cost.kept + 28 * trained) / 1e9
    )
    assert step_seconds(config, sizes, work, Gpu(1e12, 0, 1e30), 0.5, passes=3) == pytest.approx(3 * endless)


# ---- memory


def test_memory_of_the_optimiser_and_of_several_gpus():
    config = tiny_config()
    sizes = sizes_of(empty_model(config, 1))
    one, two = memory(config, sizes, Work(1, 4, TEXT)), memory(config, sizes, Work(1, 4, TEXT, gpus=2))
    trained = sum(sizes.trained.values())
    assert one["AdamW's two moments (fp32)"] == 8 * trained
    assert one["gradient buckets of DDP (fp32)"] == 0
    assert two["gradient buckets of DDP (fp32)"] == 4 * trained
    clip, mae = 17 * 32, 9 * 40  # half of 16 patches, and CLS
    pairs = 3 * 4 * (4 * clip + 2 * mae)  # C in fp32, M in bf16
    assert one["images to choose hard negatives from"] == pairs
    assert two["images to choose hard negatives from"] == pairs + 8 * 2 * (clip + mae)


BLIP2_GPUS = 16  # A100 of 40 GB, "less than 6 days for the first stage": BLIP-2 paper, pre-training settings
BLIP2_STEPS, BLIP2_BATCH = 250_000, 1680


def test_blip2_fits_where_and_in_the_time_it_was_trained():
    """And the batch of twice the size would not fit."""
    config, gpu = variant_config("qformer", XFormerConfig.paper()), GPUS["A100-40"]
    sizes, each = sizes_of(empty_model(config, 1)), BLIP2_BATCH // BLIP2_GPUS
    work = Work(1, each, 32, gpus=BLIP2_GPUS)
    assert sum(memory(config, sizes, work).values()) < gpu.memory
    assert sum(memory(config, sizes, Work(1, 2 * each, 32, gpus=BLIP2_GPUS)).values()) > gpu.memory
    days = [BLIP2_STEPS * step_seconds(config, sizes, work, gpu, share) / 86_400 for share in (0.12, 0.4)]
    assert days[0] == pytest.approx(6, rel=0.05)  # ours would take just that at a utilisation of 12 %
    assert days[1] < 2.5


# ---- the command


def recipe_file(folder: Path, **changes) -> Path:
    settings = {
        "command": "train stage1",
        "variant": "xformer",
        "steps": 100,
        "batch_size": 16,
        "gradient_accumulation_steps": 2,
        "max_text_tokens": 32,
        "train_size": 6400,
    }
    path = folder / "recipe.json"
    path.write_text(json.dumps({name: v for name, v in (settings | changes).items() if v is not None}))
    return path


def test_the_printed_tables_and_the_json_agree(tmp_path, capsys):
    path = recipe_file(tmp_path)
    result = estimate(EstimateConfig(recipe=path, count=2, gpu="A100-80", compare=True))
    shown = capsys.readouterr().out
    assert f"{result['memory']['needed'] / 1e9:.2f}" in shown
    assert f"{result['run']['gpu_hours']:,.0f} GPU-hours, if matrix products reach 40 % of 312 TFLOP/s" in shown
    assert all(name in shown for name in (*result["per_image"], *result["parameters"], *VARIANTS))
    assert (result["step"]["images"], result["run"]["epochs"]) == (64, 1.0)
    estimate(EstimateConfig(recipe=path, count=2, gpu="A100-80", compare=True, json=True))
    assert json.loads(capsys.readouterr().out) == result


def test_epochs_of_a_stream_are_the_papers(tmp_path, capsys):
    path = recipe_file(tmp_path, train_size=None, steps=1_000_000, batch_size=14, gradient_accumulation_steps=1)
    assert estimate(EstimateConfig(recipe=path, count=9))["run"]["epochs"] == 9
    assert estimate(EstimateConfig(recipe=path, count=9, epoch=7_000_000))["run"]["epochs"] == 18


def test_the_largest_batch_fits_and_one_more_does_not(tmp_path, capsys):
    path = recipe_file(tmp_path)
    largest = estimate(EstimateConfig(recipe=path, gpu="RTX-4090"))["memory"]["largest_batch_size"]
    for batch, fits in ((largest, True), (largest + 1, False)):
        result = estimate(EstimateConfig(recipe=path, gpu="RTX-4090", batch_size=batch))
        assert (result["memory"]["needed"] <= GPUS["RTX-4090"].memory) is fits
    assert "does NOT fit in 24 GB" in capsys.readouterr().out


def test_a_trained_model_gives_its_own_sizes(runs, tmp_path, capsys):
    path = recipe_file(tmp_path)
    result = estimate(EstimateConfig(recipe=path, model=runs / "stage1" / "model"))
    assert result["tokens_per_image"] == {"clip": 37, "second_encoder": 19, "queries": 12, "text": 32}
    assert estimate(EstimateConfig(recipe=path, model=runs / "stage1"))["parameters"] == result["parameters"]
    stage2 = recipe_file(tmp_path, command="train stage2", llm="opt", text="questions", questions_per_image=4)
    result = estimate(EstimateConfig(recipe=stage2, model=runs / "stage1" / "model"))
    assert result["work"]["instruction_aware"] is True
    assert result["run"]["text_tokens"] == 100 * 16 * 2 * 8 * 4 * 32


def test_questions_are_texts_with_prompts():
    settings = {"command": "train stage2", "max_text_tokens": 20, "text": "questions", "questions_per_image": 3}
    assert work_of(settings, 5, 2) == Work(2, 5, 20, 2, 3, 21, True)
    assert work_of(settings | {"text": "captions"}, 5, 2) == Work(2, 5, 20, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "not a recipe of `xformer train stage1|stage2`"),
        ('{"command": "train lm"}', "not a recipe of `xformer train stage1|stage2`"),
        ('{"command": "train stage1", "steps": 3}', "'batch_size' is missing or not an integer"),
        (
            '{"command": "train stage2", "steps": 3, "batch_size": 3, "gradient_accumulation_steps": 1,'
            ' "max_text_tokens": 3}',
            "'llm', the name of the language model, is missing",
        ),
    ],
)
def test_what_is_no_recipe_is_said_in_one_line(text, message, tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        read_recipe(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_each_gpu_of_the_help_has_its_numbers():
    assert get_args(get_type_hints(EstimateConfig)["gpu"]) == tuple(GPUS)


@pytest.mark.parametrize("wrong", [{"count": 0}, {"utilisation": 1.5}, {"batch_size": 0}])
def test_settings_that_cannot_be(wrong, tmp_path):
    with pytest.raises(ValueError, match=r"at least 1|utilisation must be"):
        EstimateConfig(recipe=tmp_path, **wrong)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        estimate(EstimateConfig(recipe=tmp_path / "none.json"))
    recipe = recipe_file(tmp_path)
    with pytest.raises(FileNotFoundError, match="no trained model"):
        estimate(EstimateConfig(recipe=recipe, model=tmp_path))
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        estimate(EstimateConfig(recipe=tmp_path))


def test_an_unfinished_run_is_a_recipe_but_no_model(tmp_path):
    recipe_file(tmp_path).rename(tmp_path / "config.json")
    assert read_recipe(tmp_path)["batch_size"] == 16
    with pytest.raises(FileNotFoundError, match=r"config\.json is not that of an X-Former") as error:
        estimate(EstimateConfig(recipe=tmp_path, model=tmp_path))
    assert "\n" not in str(error.value)


def test_a_language_model_that_is_not_to_be_had_is_one_line():
    with pytest.raises(ValueError, match="llm nosuch/model: no such folder, and not available on the Hub"):
        language_model_config("nosuch/model")


def test_the_command_line_takes_the_recipe_first(tmp_path):
    path = recipe_file(tmp_path)
    words = [str(path), "--gpu", "L40S", "--count", "4", "--json"]
    assert tyro.cli(EstimateConfig, args=words) == EstimateConfig(recipe=path, gpu="L40S", count=4, json=True)


def test_opt_of_the_paper_is_not_asked_of_a_hub():
    assert language_model_config("facebook/opt-6.7b").ffn_dim == 16384
    assert isinstance(language_model_config("opt"), OPTConfig)


def test_an_encoder_decoder_is_refused(tmp_path):
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="only causal language models"):
        language_model_config(str(tmp_path))
