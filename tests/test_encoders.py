"""The embedded encoders, language model and tokenizers: how they are trained, and what the shipped ones reach."""

import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionModel, OPTForCausalLM, PreTrainedTokenizerFast, ViTMAEForPreTraining

import xformer_mllm
from xformer_mllm.embedded import encoders, tokenizers
from xformer_mllm.embedded.commands import ClipConfig, EncodersConfig, LmConfig, MaeConfig
from xformer_mllm.embedded.scene_questions import EVENLY, ask
from xformer_mllm.embedded.scenes import ALT_TEXT, caption
from xformer_mllm.embedded.world import draw_scene

WEIGHTS = Path(xformer_mllm.__file__).parent / "embedded" / "weights"


def stated(part: str) -> dict[str, float]:
    return json.loads((WEIGHTS / part / "recipe.json").read_text())["metrics"]


# --- what is shipped


def test_shipped_mae_reconstructs_as_its_recipe_says():
    metrics = encoders.mae_loss(ViTMAEForPreTraining.from_pretrained(WEIGHTS / "mae"))
    assert metrics["reconstruction_loss"] == pytest.approx(stated("mae")["reconstruction_loss"], rel=0.01)
    assert metrics["reconstruction_loss"] < 0.65 * metrics["variance"]


def test_shipped_lm_answers_from_text_as_its_recipe_says():
    tokenizer = PreTrainedTokenizerFast.from_pretrained(WEIGHTS / "opt")
    metrics = encoders.lm_accuracy(OPTForCausalLM.from_pretrained(WEIGHTS / "opt"), tokenizer, scenes=100)
    assert metrics["accuracy"] == pytest.approx(stated("opt")["accuracy"], abs=0.05)  # 100 of the recipe's scenes
    assert metrics["accuracy"] > 0.8


def test_shipped_weights_are_small_and_say_how_they_were_made():
    assert sum(f.stat().st_size for f in WEIGHTS.rglob("*") if f.is_file()) < 25 * 2**20
    for part in ("clip", "mae", "opt"):
        recipe = json.loads((WEIGHTS / part / "recipe.json").read_text())
        keys = {"command", "seed", "steps", "batch_size", "metrics", "machine", "torch", "transformers", "data"}
        assert keys <= set(recipe)
    assert not [f for f in WEIGHTS.rglob("*") if f.suffix in (".bin", ".pt", ".pth", ".pkl")]


@pytest.mark.parametrize(("part", "made"), [("qformer_tokenizer", "qformer_tokenizer"), ("opt", "lm_tokenizer")])
def test_shipped_tokenizers_are_the_ones_the_code_makes(part, made):
    shipped = PreTrainedTokenizerFast.from_pretrained(WEIGHTS / part)
    fresh = getattr(encoders, made)()
    assert shipped.get_vocab() == fresh.get_vocab()
    assert shipped("A red circle?")["input_ids"] == fresh("A red circle?")["input_ids"]


# --- tokenizers


def test_qformer_tokenizer_is_berts_kind():
    tokenizer = tokenizers.qformer_tokenizer()
    assert (tokenizer.pad_token_id, tokenizer.bos_token) == (0, "[DEC]")
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("Two RED circles")["input_ids"])
    assert tokens == ["[CLS]", "two", "red", "circles", "[SEP]"]


def test_lm_tokenizer_starts_with_bos_as_opt_does():
    tokenizer = tokenizers.lm_tokenizer()
    ids = tokenizer("Question: How many circles are there in the image? Answer:")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == 2
    assert (tokenizer.pad_token_id, tokenizer.eos_token) == (1, "<end>")
    assert tokenizer.decode(ids, skip_special_tokens=True).startswith("question : how many circles")


@pytest.mark.parametrize("make", [tokenizers.qformer_tokenizer, tokenizers.lm_tokenizer])
def test_no_text_is_refused_and_the_worlds_words_are_whole(make):
    tokenizer = make()
    assert tokenizer.unk_token_id not in tokenizer("Zebras, at 7 o'clock: (really)!")["input_ids"]
    assert tokenizer.unk_token_id in tokenizer("\N{SNOWMAN}")["input_ids"]
    for word in ("contain", "not", "gray", "rectangle", "color", "teal", "brown", "black", "shape", "present"):
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1, word
    texts = [f"{q.question} {q.answer}" for i in range(200) for q in ask(draw_scene("test", i), 4)]
    assert not any("##" in t for text in texts for t in tokenizer.tokenize(text))


# --- training


def test_packed_segments_are_as_good_as_separate_sequences():
    """Each segment's logits equal those of [description][segment] alone: it sees nothing else, at the same places."""
    tokenizer = tokenizers.lm_tokenizer()
    config = LmConfig(layers=2, width=32)
    model = encoders.new_lm(config, tokenizer).eval()
    scenes = [encoders.scene_text(i, config, tokenizer) for i in range(3)]
    batch = encoders.pack(scenes, tokenizer)
    del batch["targets"]
    packed = model(**batch).logits
    for row, ((body, _), *segments) in enumerate(scenes):
        start = len(body)
        for segment, _ in segments:
            alone = model(input_ids=torch.tensor([body + segment])).logits[0, len(body) :]
            torch.testing.assert_close(packed[row, start : start + len(segment)], alone, atol=1e-5, rtol=1e-4)
            start += len(segment)


def test_packed_targets_are_the_next_tokens_that_are_learned():
    tokenizer = tokenizers.lm_tokenizer()
    end, bos, pad = tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id
    first = [([20, 21], 0), ([bos, 30, end], 2), ([bos, 31, 32, end], 2)]
    batch = encoders.pack([first, [([22], 0), ([bos, 33, end], 1)]], tokenizer)
    assert batch["input_ids"][0].tolist() == [20, 21, bos, 30, end, bos, 31, 32, end]
    assert batch["targets"][0].tolist() == [-100, -100, 30, end, -100, -100, 32, end, -100]
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 5]
    assert batch["input_ids"][1].tolist() == [22, bos, 33, end] + [pad] * 5
    assert batch["targets"][1].tolist() == [-100, -100, end] + [-100] * 6


def test_answers_and_captions_are_what_is_learned():
    tokenizer = tokenizers.lm_tokenizer()
    scenes = [encoders.scene_text(i, LmConfig(questions_per_scene=2), tokenizer) for i in range(4)]
    targets = encoders.pack(scenes, tokenizer)["targets"]
    for index, row in enumerate(targets):
        scene = draw_scene("train", index)
        texts = [*(q.answer for q in ask(scene, 2, EVENLY)), caption(scene, ALT_TEXT)]
        assert tokenizer.decode(row[row != -100]) == tokenizer.decode(
            [
                i
                for text in texts
                for i in [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            ]
        )


def test_encoders_train_and_load(tmp_path):
    small = EncodersConfig(
        tmp_path, ClipConfig(steps=2, batch_size=8, width=32, layers=2), MaeConfig(steps=2, batch_size=8, width=32)
    )
    metrics = encoders.train_encoders(small)
    assert set(metrics) == {"clip", "mae"}
    assert CLIPVisionModel.from_pretrained(tmp_path / "clip").config.num_hidden_layers == 2
    mae = ViTMAEForPreTraining.from_pretrained(tmp_path / "mae")
    assert mae.decoder.decoder_pos_embed.abs().sum() > 0
    assert encoders.mae_loss(mae) == pytest.approx(metrics["mae"], rel=1e-4)
    assert json.loads((tmp_path / "clip" / "recipe.json").read_text())["metrics"] == metrics["clip"]
    PreTrainedTokenizerFast.from_pretrained(tmp_path / "qformer_tokenizer")


def test_lm_training_learns_and_is_reproducible(tmp_path):
    losses = []
    original = encoders.nn.functional.cross_entropy

    def record(*args, **kwargs):
        loss = original(*args, **kwargs)
        losses.append(loss.item())
        return loss

    config = LmConfig(output=tmp_path, steps=12, batch_size=4, width=32, layers=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoders.nn.functional, "cross_entropy", record)
        patch.setattr(encoders, "lm_accuracy", lambda *_, **__: {"accuracy": 0.0})
        encoders.train_lm(config)
        encoders.train_lm(config)
    assert losses[:12] == losses[12:]
    assert losses[11] < losses[0] - 0.3
    generation = OPTForCausalLM.from_pretrained(tmp_path / "opt").generation_config
    assert generation.eos_token_id == tokenizers.lm_tokenizer().eos_token_id


def test_loss_that_is_not_finite_stops_the_training(tmp_path):
    diverging = MaeConfig(steps=3, batch_size=2, width=32, layers=1, learning_rate=1e30)
    with pytest.raises(FloatingPointError, match=r"mae: loss (nan|inf) at step 1"):
        encoders.train_mae(diverging, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_directory(tmp_path, monkeypatch):
    folder = tmp_path / "qformer_tokenizer"
    encoders.save_qformer_tokenizer(tmp_path)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def fail(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        encoders.save_qformer_tokenizer(tmp_path)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]
