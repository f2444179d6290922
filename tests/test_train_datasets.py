"""Sources of images as a run takes them: augmented, cut to a size, streamed, and resumed."""

import io
import json
import shutil
import tarfile
from functools import partial
from pathlib import Path

import pytest
import torch
from made import jpeg, tar
from PIL import Image

from xformer_mllm import processes
from xformer_mllm.cli import main
from xformer_mllm.train import datasets, run_folder
from xformer_mllm.train.batches import Stage1Collator
from xformer_mllm.train.config import Stage1Config, Stage2Config
from xformer_mllm.train.loop import ShuffledBatches

RUN = ["train", "stage1", "--variant", "qformer", "--batch-size", "3", "--steps", "8", "--logging-steps", "4"]
RUN += ["--save-steps", "2", "--sample-steps", "8", "--warmup-steps", "2"]
COLOURS = ("red", "green", "blue")


def make_image(number: int) -> Image.Image:
    """Its left half is of another colour than its right one."""
    image = Image.new("RGB", (60 + number, 50), COLOURS[number % 3])
    image.paste((10 * number, 255 - 10 * number, 99), (0, 0, 30, 50))
    return image


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number in range(24):
        make_image(number).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"a {COLOURS[number % 3]} circle\n")
    return folder


@pytest.fixture(scope="module")
def mixture(folder, tmp_path_factory) -> Path:
    """Two lists, one with several captions an image, the other with questions as well."""
    place = tmp_path_factory.mktemp("lists")
    captions = [
        {"image": f"{number:02}.png", "caption": [f"a {colour} square", f"{colour} things"]}
        for number, colour in enumerate(COLOURS * 8)
    ]
    (place / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in captions))
    asked = [
        {"image": f"{number:02}.png", "question": "what colour is it", "answers": [colour, colour, "blue"]}
        for number, colour in enumerate(COLOURS * 8)
    ]
    (place / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    sources = [{"source": name, "images": str(folder)} for name in ("captions.jsonl", str(folder))]
    sources[1].pop("images")
    (place / "mixture.json").write_text(json.dumps({"sources": sources}))
    return place


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("shards")
    for shard in range(2):
        with tarfile.open(place / f"{shard:05}.tar", "w") as tar:
            for number in range(120 * shard, 120 * shard + 120):
                content = io.BytesIO()
                make_image(number % 24).save(content, format="PNG")
                for suffix, data in (("png", content.getvalue()), ("txt", f"{COLOURS[number % 3]} dots".encode())):
                    info = tarfile.TarInfo(f"{number:09}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return place


@pytest.fixture(autouse=True)
def _alone():
    processes.join()


def config(kind=Stage1Config, **fields):
    return kind(output_dir=Path("unused"), **fields)


def test_own_images_are_cropped_and_flipped_each_epoch(folder):
    train, held_out = datasets.captions(config(data=str(folder)), 32)
    assert len(held_out) + len(train) <= 24
    assert all(record["image"].convert("L").getextrema() != (0, 0) for record in held_out)  # open, and to be seen
    first = train[0]["image"]
    assert (first.shape, first.dtype) == ((3, 32, 32), torch.uint8)
    assert torch.equal(train[0]["image"], first)
    train.set_epoch(1)
    assert not torch.equal(train[0]["image"], first)


def test_without_augmentation_images_are_as_processed(folder):
    train, _ = datasets.captions(config(data=str(folder), augment="none"), 32)
    record = train[3]
    train.set_epoch(1)
    assert torch.equal(train[3]["image"], record["image"])
    resized = Image.open(folder / record["id"]).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
    assert bytes(record["image"].permute(1, 2, 0).flatten().tolist()) == resized.tobytes()


def test_captions_are_cleaned_also_of_held_out_images(tmp_path):
    for number in range(24):
        make_image(number).save(tmp_path / f"{number:02}.png")
        (tmp_path / f"{number:02}.txt").write_text(f"A #{number} Circle!\n")
    for cleaned, text in ((True, "a {} circle"), (False, "A #{} Circle!")):
        train, held_out = datasets.captions(config(data=str(tmp_path), clean_captions=cleaned), 32)
        for record in (train[0], held_out[0]):
            assert record["caption"] == text.format(int(record["id"][:2]))


def test_crops_alone_are_not_flipped(folder):
    """The colour of the whole image's left edge is at the crop's left edge, too; flipped, it is at its right one."""
    whole, _ = datasets.captions(config(data=str(folder), augment="none"), 32)
    for augment, expected in (("crop", {False}), ("crop+flip", {True, False})):
        train, _ = datasets.captions(config(data=str(folder), augment=augment), 32)
        flipped = set()
        for place in range(len(train)):
            colour = whole[place]["image"][:, :, 0].float().mean(1)
            left, right = (train[place]["image"][:, :, edge].float().mean(1) - colour for edge in (0, -1))
            flipped.add((left.norm() - right.norm() > 5).item())
        assert flipped == expected, augment


def test_at_most_so_many_images_and_they_still_change(folder, shards):
    train, _ = datasets.captions(config(data=str(folder), train_size=5), 32)
    assert len(train) == 5
    first = train[0]["image"]
    train.set_epoch(1)
    assert not torch.equal(train[0]["image"], first)
    with pytest.raises(ValueError, match=r"--train-size: .* is a stream"):
        datasets.captions(config(data=str(shards), train_size=5), 32)


def test_batches_of_like_lengths_have_little_padding_and_every_record():
    lengths = torch.randint(5, 60, (1000,)).tolist()
    alike, mixed = (ShuffledBatches(1000, 8, seed=0, lengths=given) for given in (lambda: lengths, None))
    batches = list(alike)
    assert sorted(index for batch in batches for index in batch) == list(range(1000))

    def padding(batches: list) -> int:
        return sum(max(lengths[index] for index in batch) - lengths[index] for batch in batches for index in batch)

    assert padding(batches) < 0.1 * padding(list(mixed))
    alike.first = 100
    assert list(alike) == batches[100:]  # a resumed run
    alike.first, alike.epoch = 0, 1
    assert {frozenset(batch) for batch in alike} & {frozenset(batch) for batch in batches} == set()
    shared = [list(ShuffledBatches(1000, 4, 0, rank, 2, lambda: lengths)) for rank in range(2)]
    assert [[*one, *other] for one, other in zip(*shared, strict=True)] == batches


def test_lengths_are_those_of_the_texts_of_the_epoch(mixture, folder, shards):
    images = {"images": folder, "group_by_length": True}
    train, _ = datasets.captions(config(data=str(mixture / "captions.jsonl"), train_size=20, **images), 32)
    seen = set()
    for epoch in range(3):
        train.set_epoch(epoch)
        seen.add(tuple(train.text_lengths()))
        assert train.text_lengths() == [len(train[place]["caption"]) for place in range(20)]
    assert len(seen) == 3
    asked = config(Stage2Config, data=str(mixture / "questions.jsonl"), text="questions", **images)
    train, _ = datasets.questions(asked, 32)
    assert set(train.text_lengths()) == {len("what colour is it")}
    for data in ("scenes", str(shards)):
        with pytest.raises(ValueError, match=rf"--group-by-length: {data} is no list"):
            datasets.captions(config(data=data, group_by_length=True), 32)


def test_only_scenes_have_a_default_train_size():
    assert config().train_size == 24_000
    assert config(data="images").train_size is None
    with pytest.raises(ValueError, match="--train-size must be at least 1"):
        config(train_size=0)


def test_questions_on_own_images(folder, mixture):
    fields = {"data": str(mixture / "questions.jsonl"), "images": folder, "text": "questions"}
    train, held_out = datasets.questions(config(Stage2Config, **fields), 32)
    assert held_out[0]["question"] == "what colour is it"
    assert isinstance(held_out[0]["image"], Image.Image)
    (asked,) = train[0]
    assert asked["answer"] in COLOURS
    assert asked["image"].shape == (3, 32, 32)


def test_a_source_without_questions_says_so(folder):
    with pytest.raises(ValueError, match=r"no questions; it has captions \(xformer train stage2 --text captions\)"):
        datasets.questions(config(Stage2Config, data=str(folder), text="questions"), 32)


def stopped_and_resumed(run: Path, monkeypatch, *arguments: str) -> str:
    """A run that cannot write its third checkpoint, and is then started again: its log."""
    write, seen = run_folder.write_files, []

    def full(folder, files):
        seen.append(folder)
        if len(seen) == 3:
            raise OSError(28, "No space left on device")
        write(folder, files)

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "write_files", full)
        assert main([*RUN, *arguments, "--output-dir", str(run)]) == 2
    assert main([*RUN, *arguments, "--output-dir", str(run)]) == 0
    return (run / "log.jsonl").read_text()


@pytest.mark.parametrize(("name", "workers"), [("folder", 0), ("mixture", 2), ("alike", 0)])
def test_a_resumed_run_sees_what_an_undisturbed_one_sees(folder, mixture, tmp_path, monkeypatch, name, workers):
    """Bit for bit: the same images, captions, crops and masks, from lists and from a mixture of lists (a stream)."""
    data = str(mixture / "mixture.json" if name == "mixture" else folder)
    arguments = ["--data", data, "--num-workers", str(workers), *(["--group-by-length"] if name == "alike" else [])]
    assert main([*RUN, *arguments, "--output-dir", str(tmp_path / "undisturbed")]) == 0
    resumed = stopped_and_resumed(tmp_path / "resumed", monkeypatch, *arguments)
    assert resumed == (tmp_path / "undisturbed" / "log.jsonl").read_text()


def test_shards_train_and_go_on_behind_what_was_seen(shards, tmp_path, monkeypatch):
    """No sample is seen twice in the two sessions, which are less than a pass; a smaller buffer lets others be seen."""
    seen, batches = [], Stage1Collator.__call__
    monkeypatch.setattr(datasets, "open_captions", partial(datasets.open_captions, buffer=4))
    monkeypatch.setattr(
        Stage1Collator,
        "__call__",
        lambda self, items: (seen.append([r["id"] for r in items]), batches(self, items))[1],
    )
    log = stopped_and_resumed(tmp_path / "run", monkeypatch, "--data", str(shards))
    assert [json.loads(line)["step"] for line in log.splitlines()] == [1, 4, 8]
    batches_of_3 = [ids for ids in seen if len(ids) == 3]  # and not those that the layer norms start with
    assert len(batches_of_3) == 6 + 4
    kept = [name for ids in (*batches_of_3[:4], *batches_of_3[6:]) for name in ids]
    assert len(set(kept)) == 24
    assert all(name.startswith("0000") for name in kept)


def test_too_many_broken_images_stop_the_run(folder, tmp_path, capsys):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for number in range(0, 24, 2):
        (tmp_path / f"{number:02}.png").write_bytes(b"no image")
    for workers in ("0", "1"):
        arguments = [
            "--data",
            str(tmp_path),
            "--num-workers",
            workers,
            "--output-dir",
            str(tmp_path / f"run{workers}"),
        ]
        assert main([*RUN, *arguments]) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith(f"xformer: {tmp_path}: 1 of ")
        assert "images cannot be read, more than 1%" in said
        assert ".png: not a readable image" in said


def test_a_shard_in_the_wrong_order_names_the_cause(tmp_path, capsys):
    images = {f"{number:03}.jpg": jpeg(number) for number in range(20)}
    path = tar(tmp_path / "a.tar", images | {f"{number:03}.txt": b"a" for number in range(20)})
    assert main([*RUN, "--data", str(path), "--output-dir", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "the files of a sample do not follow each other in the shard; write it again" in said
    assert "add more images" not in said


def test_a_folder_with_names_that_are_not_utf8_trains(folder, tmp_path):
    source = tmp_path / "in"
    shutil.copytree(folder, source)
    shutil.copy(folder / "00.png", source / "caf\udce9.png")
    (source / "caf\udce9.txt").write_text("a coin")
    assert main([*RUN, "--data", str(source), "--output-dir", str(tmp_path / "run")]) == 0
