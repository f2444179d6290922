"""Webdataset shards as img2dataset writes them, and every way in which one can be broken."""

import json
import pickle
import subprocess
from itertools import islice

import pytest
from made import jpeg, shard, shards, tar, write_json

from xformer_mllm.commands import ShardConfig
from xformer_mllm.data.shard_writer import shard as write_shards
from xformer_mllm.data.shards import SCATTERED, find_shards, read_shard
from xformer_mllm.data.sources import open_captions
from xformer_mllm.data.streams import in_split


def sample(key, **files):
    return {f"{key}.{suffix}": content for suffix, content in files.items()}


def names(path):
    return [record["id"] for record in read_shard(path)]


def test_img2dataset(tmp_path):
    one, two = read_shard(shard(tmp_path / "00003.tar", 30000, 2))
    assert one == {"id": "00003/000030000", "image": jpeg(30000), "captions": ["caption 30000"], "questions": []}
    assert two["id"] == "00003/000030001"


@pytest.mark.parametrize(
    ("files", "captions"),
    [
        ({"jpg": b"x", "txt": b"a cat\n"}, ["a cat"]),
        ({"png": b"x", "json": b'{"caption": "a cat"}'}, ["a cat"]),
        ({"webp": b"x", "txt": b"a cat", "json": b'{"captions": ["a cat", "one cat"]}'}, ["a cat", "one cat"]),
        ({"JPG": b"x", "txt": "une pi\xe8ce".encode("latin-1")}, ["une pi\ufffdce"]),
        ({"jpg": b"x", "txt": b"a cat", "cls": b"3"}, ["a cat"]),
    ],
)
def test_where_captions_and_images_are(tmp_path, files, captions):
    (record,) = read_shard(tar(tmp_path / "a.tar", sample("0", **files)))
    assert (record["image"], record["captions"]) == (b"x", captions)


def test_questions(tmp_path):
    questions = [{"id": "1", "question": "?", "answers": ["yes"]}]
    about = json.dumps({"questions": questions}).encode()
    (record,) = read_shard(tar(tmp_path / "a.tar", sample("0", jpg=b"x", json=about)))
    assert (record["captions"], record["questions"]) == ([], questions)


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({"txt": b"a"}, "no image"),
        ({"jpg": b"", "txt": b"a"}, "no image"),
        ({"jpg": b"x"}, "no caption"),
        ({"jpg": b"x", "txt": b" \n"}, "an empty caption"),
        ({"jpg": b"x", "json": b"{}"}, "no caption"),
        ({"jpg": b"x", "txt": b"a", "json": b'{"key'}, "its .json is not valid"),
        ({"jpg": b"x", "txt": b"a", "json": b"[]"}, "its .json is not an object"),
    ],
)
def test_broken_samples_do_not_touch_their_neighbours(tmp_path, files, why):
    good = {"jpg": b"x", "txt": b"a"}
    path = tar(tmp_path / "a.tar", sample("0", **good) | sample("1", **files) | sample("2", **good))
    before, bad, after = read_shard(path)
    assert bad["broken"].startswith(why)
    assert [record["id"] for record in (before, bad, after)] == ["a/0", "a/1", "a/2"]
    assert "captions" in before
    assert "captions" in after


@pytest.mark.parametrize(
    ("questions", "why"),
    [
        ([{"question": "?", "answers": ["yes", True]}], "an answer is true, neither text nor a number"),
        ([{"answers": ["yes"]}], "an empty question or no answer"),
        (["?"], 'the "questions" of its .json are not a list of objects'),
        ({"?": "yes"}, 'the "questions" of its .json are not a list of objects'),
    ],
)
def test_questions_that_cannot_be_used(tmp_path, questions, why):
    about = json.dumps({"questions": questions}).encode()
    (record,) = read_shard(tar(tmp_path / "a.tar", sample("0", jpg=b"x", json=about)))
    assert record["broken"] == why


def test_questions_whose_answers_are_numbers(tmp_path):
    about = json.dumps({"questions": [{"question": "?", "answer": 0}]}).encode()
    (record,) = read_shard(tar(tmp_path / "a.tar", sample("0", jpg=b"x", json=about)))
    assert record["questions"] == [{"id": "a/0/0", "question": "?", "answers": ["0"]}]


def test_a_json_that_is_nested_too_deeply_is_broken(tmp_path):
    (record,) = read_shard(tar(tmp_path / "a.tar", sample("0", jpg=b"x", json=b"[" * 100_000)))
    assert "nested too deeply" in record["broken"]


def test_a_key_ends_at_the_first_dot_and_keeps_its_folder(tmp_path):
    files = {
        "x/a.jpg": b"1",
        "x/a.txt": b"a",
        "y/a.jpg": b"2",
        "y/a.txt": b"a",
        "y/a.b.json": b"{}",
        "y/.DS_Store": b"",
    }
    assert names(tar(tmp_path / "s.tar", files)) == ["s/x/a", "s/y/a"]


@pytest.mark.parametrize("cut", [100, 700, 5000, 110_000])
def test_a_shard_cut_anywhere_gives_what_stands_before_the_cut(tmp_path, cut):
    path = shard(tmp_path / "00000.tar", 0, 40)
    whole, content = names(path), path.read_bytes()
    path.write_bytes(content[:cut])
    *kept, last = read_shard(path)
    assert [record["id"] for record in kept] == whole[: len(kept)]
    assert "cannot be read to its end" in last["broken"]
    assert last["lost"] == 1  # nobody says how many there were
    write_json(tmp_path / "00000_stats.json", {"count": 45, "successes": 40})
    *kept, last = read_shard(path)
    assert last["lost"] == max(1, 40 - len(kept))


def test_cut_between_two_samples(tmp_path):
    """tarfile itself ends here without a word."""
    path = shard(tmp_path / "00000.tar", 0, 4)
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"000000002.jpg")])
    *kept, last = read_shard(path)
    assert len(kept) == 2
    assert "cut short" in last["broken"]


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", bytes(5000)])
def test_what_is_no_tar(tmp_path, content):
    path = tmp_path / "00000.tar"
    path.write_bytes(content)
    found = list(read_shard(path))
    assert [record.get("lost") for record in found] in ([1], [])
    assert bool(found) == (content != bytes(5000))  # zeros are an empty tar


def test_missing_shard(tmp_path):
    (record,) = read_shard(tmp_path / "00000.tar")
    assert "No such file" in record["broken"]


def test_samples_that_are_not_wanted_are_passed_over(tmp_path):
    path = shard(tmp_path / "00000.tar", 0, 10)
    found = list(read_shard(path, lambda place, name: place % 3 == 1))
    assert [record["id"] for record in found] == [f"00000/{place:09}" for place in (1, 4, 7)]


def test_finding_shards(tmp_path):
    folder = shards(tmp_path / "cc12m", 3, 2)
    (folder / "00003.tar.partial").write_bytes(b"")
    expected = [str(folder / f"{place:05}.tar") for place in range(3)]
    for source in (folder, folder / "*.tar", folder / "{00000..00002}.tar"):
        assert list(find_shards(str(source)).shards[""]) == expected
    assert list(find_shards(str(folder / "00001.tar")).shards[""]) == expected[1:2]
    assert len(find_shards(str(folder / "{00000..00005}.tar")).shards[""]) == 6  # the missing ones are found when read
    for source in (tmp_path / "none", tmp_path / "{0..3}.tar", folder / "x.tar"):
        with pytest.raises(FileNotFoundError, match="no shards found"):
            find_shards(str(source))


def test_size_is_what_the_stats_say(tmp_path):
    folder = shards(tmp_path, 2, 3)
    assert find_shards(str(folder)).size("") is None
    write_json(folder / "00000_stats.json", {"successes": 3})
    assert find_shards(str(folder)).size("") is None
    write_json(folder / "00001_stats.json", {"successes": 4})
    assert find_shards(str(folder)).size("") == 7


def test_truncated(tmp_path):
    folder = shards(tmp_path, 3, 3)
    found = find_shards(str(folder))
    assert found.truncated() == []
    (folder / "00001.tar").write_bytes((folder / "00001.tar").read_bytes()[:3000])
    (folder / "00002.tar").unlink()
    assert found.truncated() == [str(folder / "00001.tar"), str(folder / "00002.tar")]


def test_worker_processes_can_take_it(tmp_path):
    found = pickle.loads(pickle.dumps(find_shards(str(shards(tmp_path, 1, 2)))))
    assert len(list(found.read(found.shards[""][0]))) == 2


def test_names_that_are_not_utf8_are_read(tmp_path, caplog):
    path = tar(
        tmp_path / "a.tar", {f"caf\udce9.{suffix}": content for suffix, content in (("jpg", jpeg()), ("txt", b"a"))}
    )
    (record,) = read_shard(path, lambda index, name: in_split("train", name))
    assert (record["id"], record["captions"]) == (r"a/caf\udce9", ["a"])
    shard(tmp_path / "caf\udce9.tar", 0, 3)
    tar(tmp_path / "._a.tar", {})  # macOS writes such files
    assert find_shards(str(tmp_path)).shards == find_shards(f"{tmp_path}/*.tar").shards == {"": (str(path),)}
    assert r"caf\udce9.tar: the name is not UTF-8" in caplog.text


def scattered(path, number=20):
    """A shard as `tar cf x.tar *.jpg *.txt` writes it: all images first."""
    images = {f"{place:03}.jpg": jpeg(place) for place in range(number)}
    return tar(path, images | {f"{place:03}.txt": b"a" for place in range(number)})


def test_files_of_a_sample_that_do_not_follow_each_other(tmp_path, caplog):
    path = scattered(tmp_path / "a.tar")
    assert {record["broken"] for record in read_shard(path)} == {SCATTERED}
    many = scattered(tmp_path / "many.tar", 600)  # some are held out
    for source, split in ((path, "train"), (many, "validation")):
        with pytest.raises(ValueError, match=r"do not follow each other in the shard; .* tar --sort=name"):
            list(islice(open_captions(str(source), split), 3))
    with pytest.raises(ValueError, match=r"20 of 1,000 samples .* tar --sort=name"):
        write_shards(ShardConfig(source=str(scattered(tmp_path / "b.tar", 10)), output_dir=tmp_path / "out"))


def test_files_in_between_break_only_what_they_lack(tmp_path):
    files = {"0.jpg": jpeg(), "0.txt": b"a", "1.jpg": jpeg(), "0.json": b"{}"}
    first, *others = read_shard(tar(tmp_path / "a.tar", files))
    assert first["captions"] == ["a"]
    assert [record["broken"] for record in others] == [SCATTERED] * 2


def test_the_advice_for_scattered_shards_mends_them(tmp_path):
    scattered(tmp_path / "a.tar")
    (tmp_path / "all").mkdir()
    for command in ("tar -xf a.tar -C all", SCATTERED.partition("names: ")[2].replace("FOLDER", "all")):
        subprocess.run(command.split(), cwd=tmp_path, check=True)
    assert len([record for record in read_shard(tmp_path / "NEW.tar") if record["captions"] == ["a"]]) == 20
