"""Streams: every sample once a pass over all readers, mixtures by weight, and what a resumption repeats or loses."""

import logging
from collections import Counter
from functools import partial
from itertools import islice, pairwise, takewhile

import pytest
from made import shard, shards, write_image
from torch.utils.data import DataLoader

from xformer_mllm.data.records import CaptionItems, hash_of, record_of
from xformer_mllm.data.shards import find_shards
from xformer_mllm.data.streams import ListPart, Positioned, ShardPart, Stream, ValidationStream, in_split
from xformer_mllm.data.table import Table

ITEM = CaptionItems(None, 0)


@pytest.fixture(scope="module")
def twelve(tmp_path_factory):
    """Twelve shards of ten."""
    source = find_shards(str(shards(tmp_path_factory.mktemp("shards"), 12, 10)))
    return ShardPart("twelve", source, "")


@pytest.fixture(scope="module")
def fifty(tmp_path_factory):
    """A list of fifty."""
    folder = tmp_path_factory.mktemp("list")
    return a_list([write_image(folder / f"{place}.jpg", place) for place in range(50)])


def a_list(paths, weight=1.0):
    rows = Table(record_of(path.name, path, f"caption {path.stem}") for path in paths)
    return ListPart("list", rows, range(len(rows)), weight)


def ids_of(items):
    return [item["id"] for item in items]


def one_pass(part, reader, readers, buffer=1, state=None, epoch=0):
    """(ids of a reader's pass, the states behind each)."""
    order = part.order("seed", reader, readers, buffer, state)
    found, states = [], []
    for record, _ in takewhile(lambda drawn: drawn[1] == epoch, order):
        found.append(record["id"])
        states.append(order.state())
    return found, states


def collate(items):
    return {"ids": ids_of(items)}


def batches(stream, number, workers=0, size=4):
    """(ids, where the stream stands) of the next batches, each noted as learned from."""
    found = []
    loader = DataLoader(stream, size, collate_fn=Positioned(collate, stream), num_workers=workers)
    for batch in islice(loader, number):
        stream.note(batch["position"])
        found.append((batch["ids"], stream.state_dict()))
    return found


# --------------------------------------------------------------------------------------------------- splitting


@pytest.mark.parametrize("readers", [1, 3, 12, 31])
@pytest.mark.parametrize("kind", ["twelve", "fifty"])
def test_readers_share_a_pass_without_overlap(readers, kind, request):
    part = request.getfixturevalue(kind)
    passes = [one_pass(part, reader, readers)[0] for reader in range(readers)]
    counts = Counter(name for found in passes for name in found)
    assert set(counts.values()) == {1}
    assert len(counts) == {"twelve": 120, "fifty": 50}[kind]
    assert min(map(len, passes)) >= max(map(len, passes)) / 2


def test_more_readers_than_rows_share_them(tmp_path):
    part = a_list([write_image(tmp_path / f"{place}.jpg") for place in range(2)])
    assert [len(one_pass(part, reader, 5)[0]) for reader in range(5)] == [1] * 5


@pytest.mark.parametrize("kind", ["twelve", "fifty"])
def test_every_pass_has_another_order(kind, request):
    part = request.getfixturevalue(kind)
    order = part.order("seed", 0, 1, 30, None)
    size = {"twelve": 120, "fifty": 50}[kind]
    drawn = list(islice(order, 2 * size))
    assert [epoch for _, epoch in drawn] == [0] * size + [1] * size
    first, second = ([record["id"] for record, _ in drawn[place : place + size]] for place in (0, size))
    assert sorted(first) == sorted(second)
    assert first != second
    assert first != sorted(first)
    again = [record["id"] for record, _ in islice(part.order("seed", 0, 1, 30, None), size)]
    assert again == first
    assert [record["id"] for record, _ in islice(part.order("other", 0, 1, 30, None), size)] != first


def test_neighbours_in_a_shard_are_parted(twelve):
    """Ten shards feed the buffer at once."""
    found, _ = one_pass(twelve, 0, 1, buffer=40)
    assert sum(one[:5] == other[:5] for one, other in pairwise(found)) < 30


# ---------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("readers", [1, 3, 5])
def test_a_list_goes_on_exactly(fifty, readers):
    for reader in range(readers):
        found, states = one_pass(fifty, reader, readers)
        for done, state in enumerate(states[:-1], 1):
            assert one_pass(fifty, reader, readers, state=state)[0] == found[done:]


@pytest.mark.parametrize("readers", [1, 5])
@pytest.mark.parametrize("buffer", [1, 8, 1000])
def test_shards_repeat_nothing_and_lose_less_than_a_buffer(twelve, readers, buffer):
    """The docstring's promise; all of the buffer's contents but one can be lost, and are lost where it is full."""
    most = 0
    for reader in range(readers):
        found, states = one_pass(twelve, reader, readers, buffer)
        for done in range(1, len(found), 8):
            rest, _ = one_pass(twelve, reader, readers, buffer, states[done - 1])
            seen = found[:done] + rest
            assert len(set(seen)) == len(seen), "repeated"
            assert set(seen) <= set(found)
            most = max(most, len(found) - len(seen))
    assert most <= buffer - 1
    assert (most == 0) == (buffer == 1)


@pytest.mark.parametrize("kind", ["twelve", "fifty"])
def test_a_source_that_is_not_drawn_from_stays_where_it_was(kind, request):
    part = request.getfixturevalue(kind)
    _, states = one_pass(part, 0, 2)
    assert part.order("seed", 0, 2, 1, states[9]).state() == states[9]


def test_a_resumed_epoch_is_followed_by_the_same_next_one(twelve):
    _, states = one_pass(twelve, 0, 2, 8)
    undisturbed = one_pass(twelve, 0, 2, 8, {"epoch": 1}, epoch=1)[0]
    order = twelve.order("seed", 0, 2, 8, states[20])
    second = [record["id"] for record, epoch in takewhile(lambda drawn: drawn[1] < 2, order) if epoch == 1]
    assert second == undisturbed


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_batch_by_batch(fifty, twelve, workers):
    """Of lists and of shards without a buffer: the same batches in the same order, whichever worker was to be next."""
    parts = [fifty, twelve]

    def stream():
        return Stream("both", parts, ITEM, seed=0, buffer=1)

    undisturbed = batches(stream(), 15, workers)
    for done in (1, 2, 7):
        resumed = stream()
        resumed.load_state_dict(undisturbed[done - 1][1])
        found = batches(resumed, 15 - done, workers)
        assert [ids for ids, _ in found] == [ids for ids, _ in undisturbed[done:]]
        assert found[-1][1] == undisturbed[-1][1]


def test_iterating_without_noting_moves_nothing(fifty):
    """As the standardisation of the layer norms does, before training."""
    stream = Stream("list", [fifty], ITEM, seed=0)
    looked_at = ids_of(islice(stream, 7))
    assert [ids for ids, _ in batches(stream, 1, size=7)] == [looked_at]


def test_noted_batches_are_not_read_again_by_the_next_loader(fifty):
    stream = Stream("list", [fifty], ITEM, seed=0)
    one, two = batches(stream, 3), batches(stream, 3)
    assert not {name for ids, _ in one for name in ids} & {name for ids, _ in two for name in ids}


def test_other_numbers_of_readers_begin_the_next_pass(fifty, caplog):
    stream = Stream("list", [fifty], ITEM, seed=0)
    state = batches(stream, 3)[-1][1]
    other = Stream("list", [fifty], ITEM, seed=0, rank=0, world=2)
    other.load_state_dict(state)
    with caplog.at_level(logging.WARNING):
        found = ids_of(islice(other, 25))
    assert "read by 1 processes with 1 workers, now by 2 with 1" in caplog.text
    assert found == one_pass_of_stream(fifty, epoch=1, reader=0, readers=2)


def test_workers_that_had_no_batch_yet_also_begin_the_next_pass(fifty):
    stream = Stream("list", [fifty], ITEM, seed=0)
    batches(stream, 3)
    (_, state), *_ = batches(stream, 1, workers=2)  # of the second worker nothing is known
    resumed = Stream("list", [fifty], ITEM, seed=0)
    resumed.load_state_dict(state)
    (second, _), (first, _) = batches(resumed, 2, workers=2)
    assert second == one_pass_of_stream(fifty, epoch=1, reader=1, readers=2)[:4]
    assert first == one_pass_of_stream(fifty, epoch=1, reader=0, readers=2)[4:8]


def test_another_number_of_sources_is_refused(fifty, twelve):
    stream = Stream("list", [fifty], ITEM, seed=0)
    state = batches(stream, 1)[0][1]
    with pytest.raises(ValueError, match="mixes 2 sources, but 1 when the run stopped"):
        Stream("both", [fifty, twelve], ITEM, seed=0).load_state_dict(state)


def one_pass_of_stream(part, epoch, reader, readers):
    order = part.order("0/0", reader, readers, 1, {"epoch": epoch})
    return [record["id"] for record, _ in takewhile(lambda drawn: drawn[1] == epoch, order)]


def test_ranks_and_workers_are_all_readers(fifty):
    found = []
    for rank in range(2):
        stream = Stream("list", [fifty], ITEM, seed=0, rank=rank, world=2)
        for ids, _ in batches(stream, 24, workers=2, size=1):
            found += ids
    assert len(found) == len(set(found)) == 48


def test_captions_and_crops_of_a_resumed_run_are_the_same(tmp_path):
    rows = Table([record_of("a", write_image(tmp_path / "a.jpg"), [f"caption {number}" for number in range(30)])])
    stream = Stream("one", [ListPart("one", rows, [0])], ITEM, seed=0)
    drawn = [item["caption"] for item in islice(stream, 12)]
    assert len(set(drawn)) > 5  # every pass draws anew
    states = batches(stream, 4, size=1)
    resumed = Stream("one", [ListPart("one", rows, [0])], ITEM, seed=0)
    resumed.load_state_dict(states[-1][1])
    assert [item["caption"] for item in islice(resumed, 8)] == drawn[4:]


# ------------------------------------------------------------------------------------------------------ mixing


def test_parts_are_drawn_by_their_weights(tmp_path):
    parts = [
        a_list([write_image(tmp_path / f"{name}{place}.jpg") for place in range(5)], weight)
        for name, weight in (("a", 6.0), ("b", 3.0), ("c", 1.0))
    ]
    drawn = Counter(name[0] for name in ids_of(islice(Stream("mix", parts, ITEM, seed=0), 1000)))
    expected = {"a": 600, "b": 300, "c": 100}
    assert all(abs(drawn[name] - number) < 50 for name, number in expected.items())


def test_readers_mix_in_different_orders(fifty, twelve):
    def way(rank):
        stream = Stream("both", [fifty, twelve], ITEM, seed=0, rank=rank, world=2, buffer=1)
        return ["/" in name for name in ids_of(islice(stream, 30))]

    assert way(0) != way(1)


# ------------------------------------------------------------------------------------------------------ broken


def stream_of(folder, **arguments):
    return Stream("s", [ShardPart("s", find_shards(str(folder)), "")], ITEM, seed=0, buffer=1, **arguments)


def test_broken_samples_are_passed_over_counted_and_named(tmp_path, caplog):
    stream = stream_of(shards(tmp_path, 2, 60, broken=(3, 70)))
    found = [name for ids, _ in batches(stream, 29) for name in ids]
    assert len(set(found)) == 116
    batches(stream, 1, size=2)
    assert stream.broken() == 2
    assert sum("skipped: " in line for line in caplog.messages) == 2
    assert any("00001/000000070" in line for line in caplog.messages)


def test_more_than_ten_broken_in_a_thousand_stop(tmp_path, caplog):
    stream = stream_of(shards(tmp_path, 4, 30, broken=range(0, 120, 8)))  # 15 of 120
    with pytest.raises(
        ValueError, match=r"s: 11 of 1,000 samples cannot be read, more than 1%: .*: not a readable image"
    ):
        ids_of(islice(stream, 120))
    assert sum("skipped: " in line for line in caplog.messages) == 5
    assert "further ones are only counted" in caplog.text


def test_the_count_goes_on_after_a_resumption(tmp_path):
    folder = shards(tmp_path, 4, 30, broken=range(0, 120, 8))
    stream = stream_of(folder)
    state = batches(stream, 12)[-1][1]
    before = stream.broken()
    assert before > 0
    resumed = stream_of(folder)
    resumed.load_state_dict(state)
    assert resumed.broken() == before
    with pytest.raises(ValueError, match="11 of 1,000"):
        ids_of(islice(resumed, 120))


def test_a_shard_cut_short_loses_what_its_stats_say(tmp_path):
    folder = shards(tmp_path, 2, 40)
    cut = folder / "00001.tar"
    cut.write_bytes(cut.read_bytes()[:100_000])
    (folder / "00001_stats.json").write_text('{"successes": 40}')
    kept = len(list(find_shards(str(cut)).read(str(cut)))) - 1
    assert 0 < kept < 40 - 11
    with pytest.raises(ValueError, match=rf"{40 - kept} of 1,000"):
        ids_of(islice(stream_of(folder), 80))


def test_nothing_but_empty_shards(tmp_path):
    (tmp_path / "00000.tar").write_bytes(bytes(10240))
    with pytest.raises(ValueError, match="no samples for reader 0 of 1"):
        next(iter(stream_of(tmp_path)))


# -------------------------------------------------------------------------------------------------- validation


def test_split_by_the_hash_of_the_name(twelve):
    source = twelve.source
    split = {
        name: ids_of(ValidationStream([ShardPart("s", source, "", partial(in_split, name, share=0.2))], ITEM))
        for name in ("train", "validation")
    }
    assert len(split["train"]) + len(split["validation"]) == 120
    assert split["validation"] == [
        name for name in sorted(split["train"] + split["validation"]) if hash_of(name) < 0.2
    ]
    assert 10 <= len(split["validation"]) <= 40


def test_held_out_items_come_in_turn_once_and_always_the_same(fifty, twelve, tmp_path, caplog):
    few = a_list([write_image(tmp_path / "x.jpg"), tmp_path / "missing.jpg", write_image(tmp_path / "y.jpg")])
    held_out = ValidationStream([twelve, few], ITEM)
    found = ids_of(held_out)
    assert found[:5] == ["00000/000000000", "x.jpg", "00000/000000001", "y.jpg", "00000/000000002"]
    assert len(found) == 122
    assert "missing.jpg: no such image" in caplog.text
    assert ids_of(islice(held_out, 5)) == found[:5]


def test_a_single_shard_is_shared_by_samples(tmp_path):
    shard(tmp_path / "00000.tar", 0, 30)
    part = ShardPart("s", find_shards(str(tmp_path)), "")
    passes = [set(one_pass(part, reader, 4)[0]) for reader in range(4)]
    assert [len(found) for found in passes] == [8, 8, 7, 7]
    assert len(set.union(*passes)) == 30
