"""Features of frozen encoders on disk: the same losses, for the right images, of the right encoders."""

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from PIL import Image
from safetensors.torch import load_file

from xformer_mllm import XFormerForPreTraining, processes
from xformer_mllm.cli import main
from xformer_mllm.data import records, transforms
from xformer_mllm.model.images import load_image
from xformer_mllm.train import datasets, feature_cache
from xformer_mllm.train.config import Stage1Config
from xformer_mllm.train.feature_cache import FeatureCache

STEPS = [
    "--bf16",
    "no",
    "--batch-size",
    "3",
    "--steps",
    "5",
    "--logging-steps",
    "2",
    "--sample-steps",
    "5",
    "--warmup-steps",
    "1",
]


@pytest.fixture(autouse=True)
def _alone():
    processes.join()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """110 images, of which one is cut short: fewer than one in a hundred."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(110):
        Image.new("RGB", (40, 30), (2 * number, 255 - 2 * number, 77)).save(folder / f"{number:03}.png")
        (folder / f"{number:03}.txt").write_text(f"{number} red circles")
    content = (folder / "007.png").read_bytes()
    (folder / "007.png").write_bytes(content[: len(content) // 2])
    return folder


class Items(torch.utils.data.Dataset):
    """Images of the tiny model's size; two of them are the same one."""

    def __init__(self, count: int):
        self.pixels = torch.randint(0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.pixels) + 1

    def __getitem__(self, index):
        place = index % len(self.pixels)
        return {"id": str(place), "image": self.pixels[place].to(torch.uint8), "caption": "a"}


def collate(items):
    return {"ids": [item["id"] for item in items], "pixel_values": torch.stack([item["image"] for item in items])}


@pytest.fixture
def model():
    model = XFormerForPreTraining(tiny_config()).eval()
    model.freeze()
    return model


def cache_of(folder, model, masked=False, source="ours", size=32, bf16=False) -> FeatureCache:
    return FeatureCache(folder, model, masked, source, size, bf16)


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def assert_same_losses(one: Path, other: Path) -> None:
    """To a float's last bits: a batch of another size may be multiplied in another order."""
    for ours, theirs in zip(log(one), log(other), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_features_are_those_of_the_image(model, tmp_path, monkeypatch, masked):
    monkeypatch.setattr(feature_cache, "SHARD", 4)
    monkeypatch.setattr(feature_cache, "BATCH", 2)
    items, cache = Items(9), cache_of(tmp_path, model, masked)
    cache.fill(model, items, collate)
    ids = ["8", "0", "3"]
    found = cache.read(ids)
    assert found.keys() == ({"clip"} if masked else {"clip", "mae"})
    pixels = torch.stack([items[int(name)]["image"] for name in ids])
    expected = model.xformer.encode_image(pixels)
    given = model.xformer.encode_image(pixels if masked else None, features=found)
    torch.testing.assert_close(given.clip_tokens, expected.clip_tokens)
    torch.testing.assert_close(given.mae.tokens, expected.mae.tokens)
    held = [
        name
        for listing in cache.folder.glob(feature_cache.LISTINGS)
        for name in json.loads(listing.read_text())["ids"]
    ]
    assert set(held) == {str(number) for number in range(9)}


def test_what_an_interrupted_filling_wrote_is_not_encoded_again(model, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "SHARD", 4)
    monkeypatch.setattr(feature_cache, "BATCH", 2)
    save, encode, encoded, written = feature_cache.save_file, model.xformer.frozen_features, [], []

    def stop(*args):
        if written:
            raise KeyboardInterrupt
        written.append(1)
        save(*args)

    def counted(pixels, masked):
        encoded.append(len(pixels))
        return encode(pixels, masked)

    monkeypatch.setattr(feature_cache, "save_file", stop)
    monkeypatch.setattr(model.xformer, "frozen_features", counted)
    with pytest.raises(KeyboardInterrupt):
        cache_of(tmp_path, model).fill(model, Items(9), collate)
    monkeypatch.setattr(feature_cache, "save_file", save)
    encoded.clear()
    cache = cache_of(tmp_path, model)
    cache.fill(model, Items(9), collate)
    assert sum(encoded) == 5
    encoded.clear()
    again = cache_of(tmp_path, model)
    again.fill(model, Items(9), collate)
    again.fill(model, Items(9), collate)
    assert encoded == []
    assert torch.equal(again.read(["2"])["clip"], cache.read(["2"])["clip"])


def test_another_encoder_or_source_has_another_folder(model, tmp_path):
    first = cache_of(tmp_path, model)
    other = XFormerForPreTraining(tiny_config()).eval()
    other.freeze()
    with torch.no_grad():
        next(other.xformer.mae_encoder.parameters()).add_(1)
    normalised = XFormerForPreTraining(tiny_config(clip_mean=[0.5, 0.5, 0.5])).eval()
    normalised.load_state_dict(model.state_dict())
    normalised.freeze()
    folders = {
        first.folder, cache_of(tmp_path, other).folder, cache_of(tmp_path, normalised).folder,
        cache_of(tmp_path, model, source="theirs").folder, cache_of(tmp_path, model, size=48).folder,
        cache_of(tmp_path, model, bf16=True).folder,
    }  # fmt: skip
    assert len(folders) == 6
    assert cache_of(tmp_path, model).folder == first.folder


def test_a_image_that_is_not_there_is_named(model, tmp_path):
    cache = cache_of(tmp_path, model)
    cache.fill(model, Items(2), collate)
    with pytest.raises(ValueError, match=r"has no features of cat\.png"):
        cache.read(["1", "cat.png"])


@pytest.fixture(scope="module")
def stage1(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("stage1") / "run"
    assert main(["train", "stage1", *STEPS, "--train-size", "8", "--output-dir", str(run)]) == 0
    return run


def test_stage_1_has_the_same_losses_from_cached_clip_tokens(stage1, tmp_path):
    """The MAE sees other patches in every step, so its tokens are not kept."""
    command = ["train", "stage1", *STEPS, "--train-size", "8", "--feature-cache", str(tmp_path / "cache")]
    assert main([*command, "--output-dir", str(tmp_path / "run")]) == 0
    assert_same_losses(stage1, tmp_path / "run")
    (shard,) = tmp_path.glob("cache/*/*.safetensors")
    assert load_file(shard).keys() == {"clip"}


@pytest.mark.parametrize("text", ["captions", "questions"])
def test_stage_2_has_the_same_losses_without_images(stage1, folder, tmp_path, monkeypatch, capsys, text):
    data = (
        ["--data", "scenes", "--train-size", "8"]
        if text == "questions"
        else ["--data", str(folder), "--augment", "none"]
    )
    command = ["train", "stage2", *STEPS, "--from-pretraining", str(stage1), "--text", text, *data]
    assert main([*command, "--output-dir", str(tmp_path / "plain")]) == 0
    cached = [*command, "--feature-cache", str(tmp_path / "cache"), "--num-workers", "1"]
    assert main([*cached, "--output-dir", str(tmp_path / "first")]) == 0
    assert_same_losses(tmp_path / "plain", tmp_path / "first")

    asked = []
    for module in (records, transforms):
        monkeypatch.setattr(module, "load_image", lambda image: (asked.append(image), load_image(image))[1])
    capsys.readouterr()
    assert main([*cached[:-1], "0", "--output-dir", str(tmp_path / "second")]) == 0
    assert "encoded" not in capsys.readouterr().out
    assert_same_losses(tmp_path / "first", tmp_path / "second")
    assert len(asked) == (0 if text == "questions" else datasets.HELD_OUT_IMAGES)


def test_only_whole_images_of_known_number_are_cached(folder, tmp_path, capsys):
    with pytest.raises(ValueError, match="set --augment none"):
        Stage1Config(data="images", feature_cache=tmp_path)
    Stage1Config(data="scenes", feature_cache=tmp_path)
    (tmp_path / "mixture.json").write_text(json.dumps({"sources": [{"source": str(folder)}]}))
    command = ["train", "stage1", "--data", str(tmp_path / "mixture.json"), "--augment", "none"]
    assert main([*command, "--feature-cache", str(tmp_path / "cache"), "--output-dir", str(tmp_path / "run")]) == 2
    assert "is a stream of unknown length" in capsys.readouterr().err
