"""From the shipped parts to stage 1, from stage 1 to stage 2, and through transformers' own doors."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import randomise
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    pipeline,
)

from xformer_mllm import VARIANTS, XFormerForConditionalGeneration, XFormerForPreTraining
from xformer_mllm.checkpoints import copy_weights, evaluation_folder, load_model, model_folder, start_generation
from xformer_mllm.embedded.start import WEIGHTS, start_pretraining
from xformer_mllm.model.vision_encoders import scaled


@pytest.fixture
def images():
    return torch.randint(0, 256, (3, 3, 48, 48), dtype=torch.uint8)


def test_the_shipped_weights_are_small_and_safe():
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 25e6
    assert {path.suffix for path in files} == {".safetensors", ".json"}


def test_frozen_parts_are_the_shipped_ones(images):
    mae = ViTMAEForPreTraining.from_pretrained(WEIGHTS / "mae").eval()
    mae.config.mask_ratio = 0.5
    noise = torch.rand(3, mae.vit.embeddings.patch_embeddings.num_patches)
    model, _ = start_pretraining("xformer")
    config = model.config
    with torch.no_grad():
        theirs = mae(scaled(images, 48, config.mae_mean, config.mae_std, torch.float32), noise=noise)
        image = model.xformer.encode_image(images, 0.5, noise)
        ours = model.xformer.reconstruction_loss(image, model.xformer.read(image))
    torch.testing.assert_close(ours, theirs.loss, atol=1e-5, rtol=1e-4)

    control, _ = start_pretraining("random_mae")
    name = "layers.0.mlp.fc1.weight"
    assert not torch.equal(control.xformer.mae_encoder.state_dict()[name], mae.vit.state_dict()[name])


@pytest.mark.parametrize("whole_clip", [False, True])
def test_another_second_encoder_is_loaded_from_its_folder(images, tmp_path, whole_clip):
    if whole_clip:
        other = CLIPModel(
            CLIPConfig(vision_config={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2})
        )
        tower = other.vision_model
    else:
        other = tower = Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
    randomise(other).save_pretrained(tmp_path)
    model, _ = start_pretraining("dinov2", second_encoder=str(tmp_path))
    assert model.xformer.mae_decoder is None
    loaded = model.xformer.mae_encoder.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in tower.state_dict().items())
    assert torch.equal(model.xformer(images).fused_queries, model.xformer(images).queries)
    with pytest.raises(ValueError, match="has none; set reconstruction=False"):
        start_pretraining("xformer", second_encoder=str(tmp_path))
    with pytest.raises(ValueError, match="variant dinov2 needs --second-encoder"):
        start_pretraining("dinov2")


def test_another_mae_keeps_its_decoder(tmp_path):
    mae = randomise(ViTMAEForPreTraining.from_pretrained(WEIGHTS / "mae"))
    mae.save_pretrained(tmp_path)
    model, _ = start_pretraining("xformer", second_encoder=str(tmp_path))
    loaded = model.xformer.mae_decoder.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in mae.decoder.state_dict().items())


def test_own_encoders_are_loaded_with_their_sizes_and_tokenizer(tmp_path):
    clip = CLIPVisionModel._from_config(CLIPVisionModel.config_class(hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=64, image_size=64, patch_size=16))  # fmt: skip
    mae = ViTMAEForPreTraining(ViTMAEConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, image_size=64, patch_size=16, decoder_hidden_size=16, decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2, decoder_intermediate_size=32))  # fmt: skip
    randomise(clip).save_pretrained(tmp_path / "clip")
    randomise(mae).save_pretrained(tmp_path / "mae")
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / "qformer_tokenizer")
    tokenizer.add_tokens("zebra")
    tokenizer.save_pretrained(tmp_path / "qformer_tokenizer")
    model, processor = start_pretraining("xformer", encoders=tmp_path)
    for ours, theirs in (
        (model.xformer.clip_encoder.tower, clip),
        (model.xformer.mae_encoder, mae.vit),
        (model.xformer.mae_decoder, mae.decoder),
    ):
        weights = theirs.state_dict()  # of CLIP, without the last layer, which is not read
        assert all(torch.equal(tensor, weights[name]) for name, tensor in ours.state_dict().items())
    pixels = processor(images=[Image.new("RGB", (100, 80))])["pixel_values"]
    assert pixels.shape == (1, 3, 64, 64)
    assert model.xformer(pixels).mae_tokens.shape == (1, 17, 32)
    assert processor.qformer_tokenizer.tokenize("zebra") == ["zebra"]
    shutil.rmtree(tmp_path / "mae")
    with pytest.raises(FileNotFoundError, match="no mae/ in it; train encoders with `xformer train encoders"):
        start_pretraining("xformer", encoders=tmp_path)


def test_the_seed_decides_the_new_weights():
    weights = [start_pretraining("xformer", seed)[0].xformer.query_tokens for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_instruction_aware_stage_2_reads_the_prompt(images, tmp_path):
    first, processor = start_pretraining("xformer")
    randomise(first, 0.05).save_pretrained(tmp_path / "stage1")
    processor.save_pretrained(tmp_path / "stage1")
    model, processor = start_generation(tmp_path / "stage1", instruction_aware=True)
    model.save_pretrained(tmp_path / "stage2")
    processor.save_pretrained(tmp_path / "stage2")
    processor = AutoProcessor.from_pretrained(tmp_path / "stage2")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "stage2")
    with torch.no_grad():
        prompts = []
        for prompt in ("Question: how many circles are there? Answer:", "Question: is it red? Answer:", ""):
            inputs = processor(images=[Image.fromarray(images[0].permute(1, 2, 0).numpy())], text=prompt)
            read = {name: inputs[name] for name in inputs if name.startswith("qformer")}
            prompts.append(model.get_image_features(inputs["pixel_values"], **read).pooler_output)
    assert not torch.allclose(prompts[0], prompts[1])
    assert not torch.allclose(prompts[0], prompts[2])


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "dinov2"])
def test_stage_2_starts_with_what_stage_1_learned(variant, images, tmp_path):
    first, processor = start_pretraining(variant)
    randomise(first, 0.02).eval().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    second, processor = start_generation(tmp_path)
    second.eval()
    with torch.no_grad():
        torch.testing.assert_close(second.xformer(images).fused_queries, first.xformer(images).fused_queries)
    shipped = AutoModelForCausalLM.from_pretrained(WEIGHTS / "opt").state_dict()
    assert all(torch.equal(tensor, shipped[name]) for name, tensor in second.language_model.state_dict().items())
    left_behind = [name for name, _ in second.xformer.named_parameters() if "embeddings.word" in name]
    left_behind += [name for name, _ in second.xformer.qformer.named_parameters() if ".intermediate." in name]
    assert not [name for name in left_behind if "encoder.tower" not in name]


def test_batches_and_pipeline_equal_single_answers(images, tmp_path):
    first, processor = start_pretraining("xformer")
    randomise(first, 0.05).save_pretrained(tmp_path / "stage1")
    processor.save_pretrained(tmp_path / "stage1")
    model, processor = start_generation(tmp_path / "stage1")
    randomise(model.language_projection, 1.0)
    model.eval().save_pretrained(tmp_path / "stage2")
    processor.save_pretrained(tmp_path / "stage2")

    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "stage2")
    processor = AutoProcessor.from_pretrained(tmp_path / "stage2")
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    prompts = ["Question: how many circles are there? Answer:", "", "Question: what? Answer:"]
    inputs = processor(images=images, text=prompts)
    batch = model.generate(**inputs, max_new_tokens=5)[:, inputs["input_ids"].shape[1] :]
    texts = processor.batch_decode(batch, skip_special_tokens=True)
    for image, prompt, text in zip(images, prompts, texts, strict=True):
        inputs = processor(images=image, text=prompt)
        one = model.generate(**inputs, max_new_tokens=5)[:, inputs["input_ids"].shape[1] :]
        assert processor.batch_decode(one, skip_special_tokens=True)[0] == text

    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    answer = pipe(images=images[0], text=prompts[0], max_new_tokens=5, return_full_text=False)
    assert answer[0]["generated_text"].strip() == texts[0].strip()


def test_a_folder_of_runs_names_them(tmp_path):
    for run in ("one", "two/stage1", "two/stage2"):
        (tmp_path / run / "model").mkdir(parents=True)
        (tmp_path / run / "model" / "config.json").touch()
    two = f"{tmp_path}/two/stage1, {tmp_path}/two/stage2"
    with pytest.raises(
        FileNotFoundError, match=f"not a model, but a folder of runs; name one: {tmp_path}/one, {two}$"
    ):
        model_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"name one: {two}$"):
        model_folder(tmp_path / "two")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty: no trained model; name the folder of a run"):
        model_folder(tmp_path / "empty")


def test_a_model_of_the_other_stage_is_named_in_words(runs):
    for folder, kind, message in (
        ("stage1", XFormerForConditionalGeneration, "holds a stage-1 model; this needs a stage-2 one"),
        ("stage2", XFormerForPreTraining, "holds a stage-2 model; this needs a stage-1 one"),
    ):
        with pytest.raises(ValueError, match=f"{folder}/model: {message}"):
            load_model(runs / folder, [kind])


def test_evaluations_are_in_the_run_or_in_a_model_without_one(tmp_path, monkeypatch):
    assert evaluation_folder(tmp_path / "run" / "model") == tmp_path / "run" / "evaluation"
    assert evaluation_folder(Path("run/model")) == Path("run/evaluation")
    assert evaluation_folder(tmp_path / "exported") == tmp_path / "exported" / "evaluation"
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    assert evaluation_folder(Path()) == tmp_path / "evaluation"


def test_a_part_that_does_not_fit_names_the_tensor():
    part = torch.nn.Linear(3, 2)
    with pytest.raises(ValueError, match="MAE: the checkpoint has no tensor 'weight'"):
        copy_weights({}, part, "MAE")
    with pytest.raises(ValueError, match=r"'weight' is \(2, 4\) in the checkpoint, the model needs \(2, 3\)"):
        copy_weights({"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}, part, "MAE")
