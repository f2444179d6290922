"""Folders of images with a .txt beside each, and what is wrong with real ones."""

import logging
import os
import pickle
from pathlib import Path

import pytest
from PIL import Image

from xformer_mllm.commands import InspectConfig, ShardConfig
from xformer_mllm.data.folders import read_folder
from xformer_mllm.data.inspect import inspect
from xformer_mllm.data.shard_writer import shard
from xformer_mllm.data.shards import read_shard
from xformer_mllm.data.sources import open_captions


def add(folder, name, caption=None, colour="red"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), colour).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def add_many(folder, number):
    for i in range(number):
        add(folder, f"{i:03}.png", f"Number {i}.")


def records(folder):
    rows = read_folder(folder).rows[""]
    return [rows[index] for index in range(len(rows))]


def test_records_are_sorted_and_recursive(tmp_path):
    add(tmp_path, "b.png", "A blue square.", "blue")
    add(tmp_path, "a/z.JPG", "A red square.\n")
    assert [(record["id"], record["captions"]) for record in records(tmp_path)] == [
        ("a/z.JPG", ["A red square."]),
        ("b.png", ["A blue square."]),
    ]


@pytest.mark.parametrize(
    "text", ["A coin.\nde.utf8=Eine Münze.\n", "\n \nA coin.\n", "\ufeffA coin.", "  A coin.  \r\nfr.utf8=Une pièce."]
)
def test_caption_is_the_first_line_with_text(tmp_path, text):
    add(tmp_path, "coin.png", text)
    assert records(tmp_path)[0]["captions"] == ["A coin."]


def test_caption_that_is_not_utf8(tmp_path):
    add(tmp_path, "coin.png").with_suffix(".txt").write_bytes("A Münze.".encode("latin-1"))
    assert records(tmp_path)[0]["captions"] == ["A M\ufffdnze."]


def test_skipped_files_are_counted_and_logged_once(tmp_path, caplog):
    for name in ("good.png", "better.png"):
        add(tmp_path, name, "Good.")
    add(tmp_path, "no_text.png")
    add(tmp_path, "empty.png", " \n\n")
    add(tmp_path, "empty_too.png", "")
    (tmp_path / "drawing.svg").write_text("<svg/>")
    (tmp_path / "drawing.txt").write_text("A drawing.")
    with caplog.at_level(logging.WARNING):
        open_captions(str(tmp_path), "train")
        open_captions(str(tmp_path), "validation")
    (line,) = caplog.messages
    assert "skipped 1 without a .txt, 2 with an empty .txt, 1 in SVG" in line


def test_complete_folder_logs_nothing(tmp_path, caplog):
    add_many(tmp_path, 2)
    open_captions(str(tmp_path), "train")
    assert not caplog.messages


def test_broken_images_are_replaced_until_one_percent(tmp_path, caplog):
    add_many(tmp_path, 250)
    dataset = open_captions(str(tmp_path), "train")
    ids = [item["id"] for item in dataset]
    for index in (7, -1, 9):
        (tmp_path / ids[index]).write_bytes(b"broken")
    assert [dataset[7]["id"] for _ in range(2)] == [ids[8]] * 2
    assert dataset[-1]["id"] == ids[0]  # the next after the last is the first
    assert sorted(dataset.broken) == sorted([ids[7], ids[-1]])
    assert [ids[7] in line for line in caplog.messages] == [True, False]
    with pytest.raises(ValueError, match=rf"3 of {len(ids)} images cannot be read") as error:
        dataset[9]
    assert "\n" not in str(error.value)


def test_missing_image_counts_as_broken(tmp_path):
    add_many(tmp_path, 130)
    dataset = open_captions(str(tmp_path), "train")
    first, second = dataset[0]["id"], dataset[1]["id"]
    (tmp_path / first).unlink()
    assert dataset[0]["id"] == second


def test_folders_without_captions_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"no images found; expected files such as \.jpg or \.png"):
        read_folder(tmp_path)
    add(tmp_path, "val2014/lonely.png")
    with pytest.raises(ValueError, match=r"1 without a \.txt.*cat\.jpg and cat\.txt beside it"):
        read_folder(tmp_path)
    (tmp_path / "annotations").mkdir()
    for name in ("captions_val2014.json", "instances_val2014.json"):
        (tmp_path / "annotations" / name).write_text("{}")
    with pytest.raises(ValueError, match=r"pass the file .*images: \S*annotations/captions_val2014\.json$"):
        read_folder(tmp_path)


def test_splits_are_disjoint_complete_and_stable(tmp_path):
    add_many(tmp_path, 100)
    ids = {split: {item["id"] for item in open_captions(str(tmp_path), split)} for split in ("train", "validation")}
    assert not ids["train"] & ids["validation"]
    assert len(ids["train"] | ids["validation"]) == 100
    assert 3 <= len(ids["validation"]) <= 20
    add(tmp_path, "0000.png", "New.")
    assert ids["validation"] <= {item["id"] for item in open_captions(str(tmp_path), "validation")}


def test_one_image_cannot_be_split(tmp_path):
    add(tmp_path, "one.png", "One.")
    with pytest.raises(ValueError, match="one image cannot be split"):
        open_captions(str(tmp_path), "train")


def test_data_set_can_be_pickled(tmp_path):
    add_many(tmp_path, 2)
    dataset = open_captions(str(tmp_path), "train")
    assert pickle.loads(pickle.dumps(dataset))[0]["id"] == dataset[0]["id"]


@pytest.mark.parametrize("name", ["._a.png", ".hidden.png", ".Trash/a.png", "b/.ipynb_checkpoints/a-checkpoint.png"])
def test_hidden_files_and_folders_are_left_out(tmp_path, name):
    add(tmp_path, "a.png", "A coin.")
    add(tmp_path, name, "A coin.")
    found = read_folder(tmp_path)
    assert [record["id"] for record in records(tmp_path)] == ["a.png"]
    assert not any(found.skipped.values())


def test_a_folder_in_a_hidden_folder_is_read(tmp_path):
    add(tmp_path / ".cache" / "images", "a.png", "A coin.")
    assert [record["id"] for record in records(tmp_path / ".cache" / "images")] == ["a.png"]


def test_linked_folders_are_followed_and_loops_are_not(tmp_path):
    add(tmp_path / "elsewhere", "a/x.png", "A coin.")
    add(tmp_path / "in", "b.png", "A square.")
    (tmp_path / "in" / "one").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "two").symlink_to(tmp_path / "elsewhere" / "a")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "elsewhere" / "a" / "up").symlink_to(tmp_path / "elsewhere")
    assert [record["id"] for record in records(tmp_path / "in")] == [
        "b.png",
        "one/a/x.png",
        "two/x.png",
    ]


def test_a_link_to_nothing_is_a_broken_image(tmp_path):
    add_many(tmp_path, 3)
    (tmp_path / "x.png").symlink_to(tmp_path / "nothing.png")
    (tmp_path / "x.txt").write_text("Nothing.")
    assert "x.png" in [record["id"] for record in records(tmp_path)]


NOT_UTF8 = os.fsdecode(b"caf\xe9.png")


def test_names_that_are_not_utf8_are_left_out_and_named(tmp_path, caplog, capsys):
    add_many(tmp_path / "in", 12)
    add(tmp_path / "in", NOT_UTF8, "A coin.")
    with caplog.at_level(logging.WARNING):
        train = open_captions(str(tmp_path / "in"), "train")
    assert "1 whose name is not UTF-8 (caf\\udce9.png)" in caplog.text
    assert all(item["id"] != NOT_UTF8 for item in train)
    inspect(InspectConfig(source=str(tmp_path / "in"), sheet=tmp_path / "sheet.png"))
    printed = capsys.readouterr().out
    assert "skipped     1 whose name is not UTF-8 (caf\\udce9.png)" in printed
    assert printed.encode()  # as a terminal's
    shard(ShardConfig(source=str(tmp_path / "in"), output_dir=tmp_path / "out"))
    assert len(list(read_shard(tmp_path / "out" / "00000.tar"))) == 12


def test_only_names_that_are_not_utf8(tmp_path):
    add(tmp_path, NOT_UTF8, "A coin.")
    with pytest.raises(ValueError, match=r"no image with a caption \(1 whose name is not UTF-8 \(caf.udce9\.png\)\)"):
        read_folder(tmp_path)


def test_a_txt_that_cannot_be_read_is_a_broken_record(tmp_path, monkeypatch):
    add_many(tmp_path, 3)
    read_text = Path.read_text

    def refused(path, *arguments, **settings):
        if path.name == "001.txt":
            raise PermissionError(13, "Permission denied")
        return read_text(path, *arguments, **settings)

    monkeypatch.setattr(Path, "read_text", refused)
    assert read_folder(tmp_path).broken == {"001.png": "its .txt cannot be read (Permission denied)"}


def test_folders_that_cannot_be_read_are_left_out_and_named(tmp_path, monkeypatch):
    add(tmp_path, "a.png", "A coin.")
    add(tmp_path, "lost+found/b.png", "A coin.")
    scandir = os.scandir

    def refused(path):
        if Path(path).name == "lost+found":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    assert read_folder(tmp_path).skipped["folders that cannot be read (lost+found)"] == 1
