"""Query analysis: the scores are what their definitions say, the maps are the model's, the heat lies where they look."""

import json
from itertools import combinations
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity

from xformer_mllm.checkpoints import load_model
from xformer_mllm.commands import QueriesConfig
from xformer_mllm.embedded.start import start_pretraining
from xformer_mllm.evaluate.query_analysis import (
    TILE_PIXELS,
    analyse,
    images_of,
    interval,
    mean_pairwise_cosine,
    model_names,
    most_different,
    overlay,
    queries,
    read_queries,
    to_maps,
)
from xformer_mllm.inference import KINDS, open_image

SCENES = ["scene:test:0", "scene:test:1", "scene:test:2"]
MANY = [f"scene:test:{number}" for number in range(12)]  # enough for an interval
CLIP, MAE, OUTPUT = "attention diversity over CLIP tokens", "attention diversity over MAE tokens", "output similarity"


def test_mean_cosine_over_pairs():
    vectors = torch.randn(3, 5, 7)
    for one, found in zip(vectors, mean_pairwise_cosine(vectors), strict=True):
        cosines = [cosine_similarity(a, b, dim=0) for a, b in combinations(one, 2)]
        torch.testing.assert_close(found, torch.stack(cosines).mean())
    assert mean_pairwise_cosine(torch.eye(6)[None]).item() == pytest.approx(0, abs=1e-6)
    assert mean_pairwise_cosine(torch.ones(1, 6, 4)).item() == pytest.approx(1)


def test_maps_leave_the_class_token_out():
    attention = torch.rand(2, 3, 10).softmax(-1)
    maps = to_maps(attention)
    assert maps.shape == (2, 3, 3, 3)
    torch.testing.assert_close(maps.sum((-2, -1)), torch.ones(2, 3))
    torch.testing.assert_close(maps.flatten(2), attention[..., 1:] / attention[..., 1:].sum(-1, keepdim=True))
    torch.testing.assert_close(to_maps(maps.flatten(2)), maps)  # a tower without a class token


def images(names=SCENES):
    return {name: open_image(name) for name in names}


@pytest.mark.parametrize("folder", ["stage1", "stage2", "qformer"])
def test_scores_are_those_of_the_models_own_attention(runs, folder):
    model, processor = load_model(runs / folder, KINDS, "eager")
    looked = read_queries(model, processor, list(images().values()), batch_size=2)
    assert set(looked.maps) == ({"CLIP"} if folder == "qformer" else {"CLIP", "MAE"})
    scores = looked.scores()
    with torch.inference_mode():
        pixels = processor(images=[open_image(SCENES[2])])["pixel_values"]
        output = model.xformer(pixels, output_attentions=True)
    layers = {"CLIP": output.clip_attentions, "MAE": output.mae_attentions}
    for tokens in looked.maps:
        by_query = sum(layer[0].mean(0) for layer in layers[tokens])[:, 1:]  # [Q, patches]
        cosines = [cosine_similarity(a, b, dim=0) for a, b in combinations(by_query, 2)]
        diversity = 1 - torch.stack(cosines).mean()
        torch.testing.assert_close(
            scores[f"attention diversity over {tokens} tokens"][2], diversity, atol=1e-5, rtol=0
        )
    cosines = [cosine_similarity(a, b, dim=0) for a, b in combinations(output.fused_queries[0], 2)]
    torch.testing.assert_close(scores[OUTPUT][2], torch.stack(cosines).mean(), atol=1e-5, rtol=0)


def test_concatenated_mae_tokens_have_maps_of_their_own():
    model, processor = start_pretraining("concat")
    looked = read_queries(model.eval(), processor, list(images().values()), batch_size=8)
    assert {tokens: tuple(maps.shape) for tokens, maps in looked.maps.items()} == {
        "CLIP": (3, 12, 6, 6),
        "MAE": (3, 12, 6, 6),
    }
    assert not torch.equal(looked.maps["CLIP"], looked.maps["MAE"])


def test_interval():
    values = torch.randn(400) + 3
    low, high = interval(values)
    half = 1.96 * values.std().item() / 20  # of a mean of 400
    assert low == pytest.approx(values.mean().item() - half, abs=half / 4)
    assert high == pytest.approx(values.mean().item() + half, abs=half / 4)
    assert interval(torch.ones(9)) is None


def test_two_models_are_compared_image_by_image(runs):
    analysis = analyse({"qformer": runs / "qformer", "xformer": runs / "stage1"}, images(MANY), overlays=1)
    assert list(analysis.definitions) == [CLIP, MAE, OUTPUT]
    assert [name for name, _ in analysis.overlays] == SCENES[:1]
    first, other = (analysis.models[name]["scores"] for name in ("qformer", "xformer"))
    difference = analysis.differences["xformer"]
    assert set(difference) == {CLIP, OUTPUT}  # the first has no second encoder
    for metric, entry in difference.items():
        assert entry["difference"] == pytest.approx(other[metric]["mean"] - first[metric]["mean"], abs=1e-6)
        assert entry["ci95"][0] <= entry["difference"] <= entry["ci95"][1]
        assert entry["clear"] == (entry["ci95"][0] > 0 or entry["ci95"][1] < 0)

    same = analyse({"one": runs / "stage1", "two": runs / "stage1" / "model"}, images(MANY), overlays=0)
    assert {entry["difference"] for entry in same.differences["two"].values()} == {0.0}
    assert not any(entry["clear"] for entry in same.differences["two"].values())


def test_most_different_queries():
    maps = torch.zeros(6, 2, 2)
    maps[:4, 0, 0] = 1  # four that look at the same patch
    maps[4, 0, 1] = maps[5, 1, 0] = 1
    chosen = most_different(maps, 3)
    assert chosen[0] in (4, 5)
    assert {4, 5} < set(chosen)
    assert sorted(most_different(maps, 8)) == list(range(6))


def test_heat_lies_where_the_query_looks():
    maps = torch.full((1, 2, 4, 4), 0.5 / 15)
    maps[0, 0, 1, 3] = maps[0, 1, 2, 0] = 0.5
    sheet = overlay(Image.new("RGB", (64, 32), "teal"), {"xformer": {"CLIP": maps}}, 0)
    y = 2 * 8 + TILE_PIXELS + 22  # gaps, the image, the row's title
    tiles = [sheet.crop((x, y, x + TILE_PIXELS, y + TILE_PIXELS)) for x in (120, 232)]  # behind the mean
    hottest = [tile.convert("L").resize((4, 4), Image.Resampling.BOX) for tile in tiles]
    darkest = {min((tile.getpixel((x, y)), (y, x)) for x in range(4) for y in range(4))[1] for tile in hottest}
    assert darkest == {(1, 3), (2, 0)}


def test_command(runs, tmp_path, capsys):
    models = (runs / "qformer", runs / "stage1")
    config = QueriesConfig(models=models, images=(SCENES[0], SCENES[1]), overlays=1, output_dir=tmp_path / "new")
    found = queries(config)
    written = {
        path.relative_to(tmp_path / "new").as_posix() for path in (tmp_path / "new").rglob("*") if path.is_file()
    }
    assert written == {"queries.json", "queries.html", "overlays/0.png"}
    assert json.loads((tmp_path / "new" / "queries.json").read_text()) == found
    assert found["overlays"] == {SCENES[0]: "overlays/0.png"}
    assert Image.open(tmp_path / "new" / "overlays" / "0.png").format == "PNG"
    assert set(found["models"]) == {"qformer", "stage1"}
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == str(tmp_path / "new" / "queries.html")
    mean = found["models"]["qformer"]["scores"][CLIP]["mean"]
    assert f"Q-Former {mean:.2f}" in printed[0]


def test_images_of_a_test_split(runs):
    chosen = images_of(QueriesConfig(models=(), size=3))
    assert list(chosen) == SCENES
    assert chosen[SCENES[1]].tobytes() == open_image(SCENES[1]).tobytes()


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["runs/demo/qformer/stage1", "runs/demo/xformer/stage1"], ["qformer", "xformer"]),
        (["runs/xformer/stage1", "runs/xformer/stage2"], ["stage1", "stage2"]),
        (["a/x/stage1", "b/x/stage2", "b/y/stage2"], ["a/x/stage1", "b/x/stage2", "b/y/stage2"]),
        (["runs/one", "runs/one/model"], ["runs/one", "runs/one/model"]),
        (["runs/one"], ["runs/one"]),
    ],
)
def test_names_of_models(folders, names):
    assert model_names([Path(folder) for folder in folders]) == names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ()}, "name the folder of a trained model"),
        ({"models": ("qformer", "qformer")}, "named twice"),
        ({"models": ("nothing",)}, "no trained model"),
        ({"size": 0}, "--size must be at least 1"),
        ({"images": ("missing.png",)}, "missing.png: no such image"),
        ({"images": ("scene:test:0",), "batch_size": 0}, "--batch-size must be at least 1"),
    ],
)
def test_errors_are_one_line(runs, tmp_path, changes, message):
    models = tuple(runs / name for name in changes.pop("models", ("qformer",)))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        queries(QueriesConfig(models=models, output_dir=tmp_path / "out", **changes))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
