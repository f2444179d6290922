"""Retrieval: LAVIS's formula and recalls, the same as pair by pair, and as one however a run is cut up."""

import json
import os
import random
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import multiprocessing

from xformer_mllm import inference, processes
from xformer_mllm.data.records import clean
from xformer_mllm.embedded.scenes import SceneCaptions
from xformer_mllm.embedded.start import start_pretraining
from xformer_mllm.evaluate import retrieval
from xformer_mllm.evaluate.retrieval import (
    CocoRetrieval,
    FlickrRetrieval,
    best,
    pairs_to_score,
    rerank,
    retrieve,
    scores_of,
)

FIXTURE = Path(__file__).parent / "fixtures" / "retrieval.json"
IMAGES = 12
WORDS = ("red", "blue", "circle", "squares", "star", "a", "the", "two", "large", "striped", "on", "ground", "and")


@pytest.fixture(scope="module")
def lavis():
    """What LAVIS made of random features and logits; "made_by" says which files at which commit."""
    return json.loads(FIXTURE.read_text())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder in the official formats: IMAGES scenes as COCO's test split, captions of very different lengths."""
    folder = tmp_path_factory.mktemp("coco")
    (folder / "val2014").mkdir()
    rng = random.Random(0)
    images, lavis = [], []
    for number, item in enumerate(SceneCaptions("test", IMAGES)[i] for i in range(IMAGES)):
        name = f"COCO_val2014_{number:012}.png"
        item["image"].save(folder / "val2014" / name)
        captions = [" ".join(rng.choices(WORDS, k=rng.randint(1, 40))) for _ in range(2 + number % 3)]
        sentences = [{"raw": text, "tokens": text.split(), "imgid": number, "sentid": 0} for text in captions]
        entry = {"filepath": "val2014", "filename": name, "cocoid": number, "imgid": number, "sentids": [0]}
        images.append(entry | {"sentences": sentences, "split": "test"})
        images.append(entry | {"filename": f"other{number}.png", "sentences": sentences, "split": "restval"})
        lavis.append({"image": f"val2014/{name}", "caption": captions})
    (folder / "dataset_coco.json").write_text(json.dumps({"dataset": "coco", "images": images}))
    (folder / "lavis.json").write_text(json.dumps(lavis))
    return folder


@pytest.fixture(scope="module")
def parts():
    """A model that nobody trained, but whose every part does something; and its processor."""
    return model_and_processor()


def model_and_processor():
    model, processor = start_pretraining("xformer", seed=0)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith(("xformer.clip_encoder", "xformer.mae_")):
                parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.1)
    return model.eval(), processor


@pytest.fixture(autouse=True)
def _fp32(monkeypatch):
    monkeypatch.setattr("xformer_mllm.inference.bf16_is_fast", lambda: False)


# ------------------------------------------------------------------------------------------------------------- ranking


def test_scores_are_lavis(lavis):
    images, texts = torch.tensor(lavis["image_features"]), torch.tensor(lavis["text_features"])
    logits, k_test = torch.tensor(lavis["itm_logits"]), lavis["k_test"]
    cosine = retrieval.image_text_similarity(images, texts)
    to_text, to_image = best(cosine, k_test), best(cosine.t(), k_test)
    read = torch.full_like(logits, torch.nan)
    needed = pairs_to_score(to_text, to_image, k_test)
    read[needed] = logits[needed]  # what is not asked for is not known
    by_text = {"ITC": to_text, "ITM": rerank(to_text, read, k_test)}
    by_image = {"ITC": to_image, "ITM": rerank(to_image, read.t(), k_test)}

    for ranked, theirs in ((by_text, "scores_text_retrieval"), (by_image, "scores_image_retrieval")):
        theirs = torch.tensor(lavis[theirs])
        assert (theirs == -100).any()
        ours = torch.full_like(theirs, -100).scatter_(1, ranked["ITM"].places, ranked["ITM"].scores)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)

    owner = torch.arange(len(texts)) // lavis["captions_per_image"]
    scores = scores_of(by_text, by_image, owner)
    for method, metrics in (("ITC", "metrics_itc"), ("ITM", "metrics")):
        for direction, short in (("text", "txt"), ("image", "img")):
            theirs = {f"recall@{k}": lavis[metrics][f"{short}_r{k}"] / 100 for k in (1, 5, 10)}
            theirs |= {"mean recall": lavis[metrics][f"{short}_r_mean"] / 100}
            ours = scores[f"{direction} retrieval, {method}"]
            assert {name: ours[name] for name in theirs} == pytest.approx(theirs)
    assert scores["all"] == pytest.approx(
        {"n": len(images) + len(texts), "mean recall": lavis["metrics"]["r_mean"] / 100}
    )
    assert next(iter(scores)) == "all"


def test_captions_are_cleaned_as_lavis_does(lavis):
    # White space alone may differ: the tokenizer splits there anyway.
    assert [clean(caption).split() for caption in lavis["captions"]] == [text.split() for text in lavis["cleaned"]]


def test_a_model_that_tells_nothing_apart_gets_what_chance_gets():
    to_text, to_image = best(torch.zeros(20, 20), 12), best(torch.zeros(20, 20), 12)
    scores = scores_of({"ITC": to_text}, {"ITC": to_image}, torch.arange(20))
    assert scores["text retrieval, ITC"] == pytest.approx(
        {"n": 20, "recall@1": 1 / 20, "recall@5": 5 / 20, "recall@10": 10 / 20, "mean recall": 16 / 60}
    )


def test_what_itm_has_not_seen_stays_behind_in_the_order_of_itc():
    ranked = best(torch.tensor([[0.1, 0.5, 0.4, 0.3, 0.2]]), 5)
    reranked = rerank(ranked, torch.tensor([[9.0, -50.0, 1.0, 9.0, 9.0]]), 2)
    assert reranked.places.tolist() == [[2, 1, 3, 4, 0]]
    assert reranked.scores.tolist() == [[pytest.approx(1.4), -49.5, -100, -100, -100]]


def test_a_score_that_is_no_number_is_no_score():
    with pytest.raises(ValueError, match="not finite"):
        best(torch.tensor([[0.0, torch.nan]]), 1)


# ----------------------------------------------------------------------------------------------------------- retrieval


def pair_by_pair(model, processor, benchmark, k_test):
    """Scores of ITM re-ranking in both directions, {(image, caption): score}, by loops and the model's own forward."""
    pixels = {r.id: processor(images=[benchmark.load(r)])["pixel_values"] for r in benchmark.records}
    texts = {f"{r.id}#{n}": clean(text) for r in benchmark.records for n, text in enumerate(r.captions)}
    itc, itm = {}, {}
    for image, tensor in pixels.items():
        for caption, text in texts.items():
            ids = processor.qformer_tokenizer(text, truncation=True, max_length=35, return_tensors="pt")
            text_inputs = {"qformer_input_ids": ids["input_ids"], "qformer_attention_mask": ids["attention_mask"]}
            itc[image, caption] = model(tensor, **text_inputs, **ITC).logits_per_image.item()
            itm[image, caption] = model(tensor, **text_inputs, **ITM).logits_per_image[0, 1].item()

    def candidates(pairs):
        return sorted(pairs, key=lambda pair: -itc[pair])[:k_test]

    to_text = {p: {c: itc[p, c] + itm[p, c] for _, c in candidates((p, c) for c in texts)} for p in pixels}
    to_image = {c: {p: itc[p, c] + itm[p, c] for p, _ in candidates((p, c) for p in pixels)} for c in texts}
    return to_text, to_image


ITC, ITM = {"use_image_text_matching_head": False}, {"use_image_text_matching_head": True}


@torch.inference_mode()
def test_blocks_give_what_every_pair_by_itself_gives(parts, data, tmp_path, monkeypatch):
    from xformer_mllm import XFormerForImageTextRetrieval

    model, processor = parts
    benchmark = CocoRetrieval(data, "test")
    benchmark.records = benchmark.records[:5]
    scores, ranking = retrieve(model, processor, benchmark, tmp_path, batch_size=2, k_test=4)

    forward = XFormerForImageTextRetrieval.forward  # stage 1's own forward is the loss
    monkeypatch.setattr(type(model), "forward", lambda self, *a, **k: forward(self, *a, **k))
    to_text, to_image = pair_by_pair(model, processor, benchmark, k_test=4)
    for direction, expected in (("text retrieval", to_text), ("image retrieval", to_image)):
        found = ranking[direction]["ITM re-ranked"]
        assert list(found) == list(expected)
        for query, rows in found.items():
            kept = dict(row for row in rows if row[1] > -100)
            assert kept == pytest.approx(expected[query], abs=2e-4)
            assert [score for _, score in rows] == sorted((score for _, score in rows), reverse=True)
    right = {query: {name for name in to_image if name.startswith(f"{query}#")} for query in to_text}
    firsts = [max(scores_, key=scores_.get) in right[query] for query, scores_ in to_text.items()]
    assert scores["text retrieval, ITM re-ranked"]["recall@1"] == sum(firsts) / len(firsts)
    assert scores["text retrieval, ITM re-ranked"]["n"] == 5
    assert scores["image retrieval, ITM re-ranked"]["n"] == len(to_image)
    assert json.loads((tmp_path / "ranking.json").read_text()) == ranking


@pytest.mark.parametrize("k_test", [1, 1000])
def test_any_number_of_candidates(parts, data, tmp_path, k_test):
    _, ranking = retrieve(*parts, CocoRetrieval(data, "test"), tmp_path, batch_size=5, k_test=k_test)
    for direction in ("text retrieval", "image retrieval"):
        itc, itm = (ranking[direction][method] for method in ("ITC", "ITM re-ranked"))
        assert all(len(rows) == 10 for rows in itm.values())
        if k_test == 1:  # nothing to re-rank: ITM can only confirm the first
            assert all([n for n, _ in itm[query]] == [n for n, _ in rows] for query, rows in itc.items())
        else:
            assert all(score > -100 for rows in itm.values() for _, score in rows)


def test_unreadable_images_and_their_captions_are_left_out(parts, data, tmp_path):
    copy = tmp_path / "data"
    (copy / "val2014").mkdir(parents=True)
    content = json.loads((data / "dataset_coco.json").read_text())
    (copy / "dataset_coco.json").write_text(json.dumps(content))
    for path in (data / "val2014").iterdir():
        (copy / "val2014" / path.name).write_bytes(path.read_bytes())
    names = [Path(image["filename"]).stem for image in content["images"] if image["split"] == "test"]
    (copy / "val2014" / f"{names[4]}.png").unlink()
    (copy / "val2014" / f"{names[5]}.png").write_text("no image")
    scores, ranking = retrieve(*parts, CocoRetrieval(copy, "test"), tmp_path / "broken", 2)  # a block of none
    assert set(ranking["unreadable_images"]) == {names[4], names[5]}
    assert "no such image" in ranking["unreadable_images"][names[4]]

    whole = CocoRetrieval(data, "test")
    whole.records = [record for record in whole.records if record.id not in (names[4], names[5])]
    expected, expected_ranking = retrieve(*parts, whole, tmp_path / "without", 2)
    assert scores == expected
    assert ranking["text retrieval"].keys() == expected_ranking["text retrieval"].keys()
    assert scores["text retrieval, ITC"]["n"] == IMAGES - 2

    for path in (copy / "val2014").iterdir():
        path.write_text("no image")
    with pytest.raises(ValueError, match=r"none of the 12 images can be read.*--images"):
        retrieve(*parts, CocoRetrieval(copy, "test"), tmp_path / "none", 4)


def test_a_killed_run_goes_on(parts, data, tmp_path, monkeypatch):
    model, processor = parts
    benchmark = CocoRetrieval(data, "test")
    once = tmp_path / "once"
    retrieve(model, processor, benchmark, once, batch_size=4, k_test=5)

    encode, encoded = type(model.xformer).encode_image, []

    def counted(self, pixels, *rest):
        if len(encoded) == stop:
            raise KeyboardInterrupt
        encoded.append(len(pixels))
        return encode(self, pixels, *rest)

    monkeypatch.setattr(type(model.xformer), "encode_image", counted)
    again = tmp_path / "again"
    # Cut within ITC, cut within ITM, to the end, and once more: nothing is left to do.
    for stop, expected in [(2, [4, 4]), (3, [4, 4, 4]), (9, [4]), (0, [])]:
        encoded.clear()
        with pytest.raises(KeyboardInterrupt) if expected and stop < 9 else nullcontext():
            retrieve(model, processor, benchmark, again, batch_size=4, k_test=5)
        assert encoded == expected
    assert (again / "ranking.json").read_bytes() == (once / "ranking.json").read_bytes()
    with pytest.raises(ValueError, match="another model, data or settings"):
        retrieve(model, processor, benchmark, again, batch_size=4, k_test=6)
    with pytest.raises(ValueError, match="another model, data or settings"):
        retrieve(model, processor, benchmark, again, batch_size=4, k_test=5, made_by={"model": "another"})


def one_of_two(rank, port, data, output):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    inference.bf16_is_fast = lambda: False
    processes.join()
    save, written = retrieval.save_file, []

    def noted(tensors, file, **rest):
        written.append(file.name.removesuffix(".partial"))
        save(tensors, file, **rest)

    retrieval.save_file = noted
    scores, _ = retrieve(*model_and_processor(), CocoRetrieval(data, "test"), output, batch_size=3, k_test=5)
    assert torch.distributed.get_backend() == "gloo"
    assert torch.distributed.get_world_size() == 2
    (output / f"{rank}.json").write_text(json.dumps({"scores": scores, "written": written}))
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_file_of_one(parts, data, tmp_path):
    processes.multiply_fp32_by_onednn()  # as `join` in each of the two
    scores, _ = retrieve(*parts, CocoRetrieval(data, "test"), tmp_path / "one", batch_size=3, k_test=5)
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = store.port
    del store  # a port that was free just now
    (tmp_path / "two").mkdir()
    multiprocessing.spawn(one_of_two, args=(port, data, tmp_path / "two"), nprocs=2)
    assert (tmp_path / "two" / "ranking.json").read_bytes() == (tmp_path / "one" / "ranking.json").read_bytes()
    of_each = [json.loads((tmp_path / "two" / f"{rank}.json").read_text()) for rank in range(2)]
    assert [found["scores"] for found in of_each] == [scores, scores]
    blocks = [f"{stage}-0000{number}.safetensors" for stage in ("itc", "itm") for number in range(IMAGES // 3)]
    assert [found["written"] for found in of_each] == [blocks[0::2], blocks[1::2]]  # each its share, and no more


# --------------------------------------------------------------------------------------------------------------- files


def test_karpathys_file_and_lavis_name_the_same(data, tmp_path):
    karpathy = CocoRetrieval(data, "test")
    (tmp_path / "coco_karpathy_test.json").write_bytes((data / "lavis.json").read_bytes())
    assert CocoRetrieval(tmp_path, "test", data).records == karpathy.records
    assert len(karpathy.records) == IMAGES
    assert karpathy.records[0].id == "COCO_val2014_000000000000"
    sizes = {karpathy.load(record).size for record in karpathy.records}
    assert sizes == {(48, 48)}
    straight = CocoRetrieval(data, "test", data / "val2014")
    assert straight.image_file(straight.records[3]) == data / "val2014" / "COCO_val2014_000000000003.png"


def test_flickr(tmp_path):
    images = [
        {"filename": f"{n}.jpg", "split": split, "sentences": [{"raw": f"caption {n}", "tokens": []}]}
        for n, split in enumerate(["train", "test", "val"])
    ]
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps({"images": images, "dataset": "flickr30k"}))
    (record,) = FlickrRetrieval(tmp_path, "val").records
    assert (record.id, record.path, record.captions) == ("2", "flickr30k-images/2.jpg", ("caption 2",))
    lavis = [{"image": "flickr30k-images/7.jpg", "caption": ["one", "two"]}]
    (tmp_path / "flickr30k_test.json").write_text(json.dumps(lavis))
    (tmp_path / "dataset_flickr30k.json").unlink()
    assert FlickrRetrieval(tmp_path, "test").records[0].captions == ("one", "two")


IMAGE = {"filepath": "val2014", "filename": "1.jpg", "split": "test", "sentences": [{"raw": "a cat"}]}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("other.json", {}, "neither dataset_coco.json nor coco_karpathy_test.json"),
        ("dataset_coco.json", [], "dataset_coco.json: not Karpathy's"),
        (
            "dataset_coco.json",
            {"images": [{"split": "test", "sentences": []}]},
            r"dataset_coco.json: images\[0\]\.filename is missing",
        ),
        ("dataset_coco.json", {"images": [IMAGE | {"split": "val"}]}, "no images in the split 'test'"),
        ("dataset_coco.json", {"images": [IMAGE, IMAGE]}, r"1 repeated image ids \(1\)"),
        ("dataset_coco.json", {"images": [IMAGE | {"sentences": []}]}, "1 images have no caption"),
        (
            "coco_karpathy_test.json",
            [{"image": "1.jpg", "caption": "a cat"}],
            '"caption" is missing or not of type list',
        ),
    ],
)
def test_files_that_are_not_as_they_should_be(tmp_path, file, content, message):
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        CocoRetrieval(tmp_path, "test")
    assert "\n" not in str(error.value)


def test_the_images_folder_must_be_there(tmp_path):
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": [IMAGE]}))
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder; --images"):
        CocoRetrieval(tmp_path, "test", tmp_path / "nowhere")
