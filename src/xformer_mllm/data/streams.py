"""Endless streams of training items: shards and lists, one source or several mixed, split between processes.

Every worker process of every training process is a *reader* with its own part of the data. A stream never ends: each
source begins anew, in another order, when a reader has gone through its part, so no process waits for another at the end.

    stream = open_captions("cc12m", "train", load_image, transform=TrainTransform(224), rank=rank, world=world)
    loader = DataLoader(stream, batch_size, collate_fn=Positioned(collator, stream), num_workers=4)
    stream.load_state_dict(saved)               # before the loader is iterated; leave it out to begin
    for batch in loader:
        stream.note(batch.pop("position"))      # once the batch has been learned from
        saved = stream.state_dict()             # plain JSON: one for each training process

What a resumption with the same numbers of processes and workers repeats or loses, compared with an undisturbed run:

- lists (JSON, folders, data sets on disk) and the order in which sources are mixed: nothing; the same items follow.
- shards: nothing is repeated. What stood in a reader's shuffle buffer when the checkpoint was written is not seen in that
  pass: at most `buffer` - 1 samples of each sharded source and reader (`datasets` keeps no buffer's contents). What follows
  comes in another order than it would have; captions and crops, drawn from a sample's name, are the same.

With other numbers of processes or workers, every source begins its next pass: the rest of the current one is not seen.
"""

import json
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch.utils.data import IterableDataset, get_worker_info

from xformer_mllm.data.records import GRACE, NAMED, VALIDATION_SHARE, Item, Record, Rows, check_broken, hash_of
from xformer_mllm.data.shards import Sharded

logger = logging.getLogger(__name__)

BUFFER = 2000  # samples in memory for each sharded source and reader; at 50 kB each 100 MB
SHARDS_AT_ONCE = 10  # that fill the buffer
GOLDEN = 0.6180339887498949  # its multiples spread evenly
EVEN = 4  # shards a reader, from which on one more or less does not matter


# -------------------------------------------------------------------------------------------------- one source's order


class Order(Protocol):
    """A reader's endless way through its part of a source: (record, visit), and where it stands, as plain JSON."""

    def __iter__(self) -> Iterator[tuple[Record, int]]: ...

    def state(self) -> dict[str, Any]: ...


class ListOrder:
    """Through rows: in each visit in another order, of which every reader takes every n-th."""

    def __init__(self, rows: Rows, places: Sequence[int], seed: str, reader: int, readers: int, state: dict | None):
        self._rows, self._places, self._seed = rows, places, seed
        self._first, self._step = reader % len(places), readers  # with more readers than rows some share one
        self._visit: int = state["visit"] if state else 0
        self._done: int = state.get("done", 0) if state else 0

    def __iter__(self) -> Iterator[tuple[Record, int]]:
        while True:
            generator = torch.Generator().manual_seed(_number(f"{self._seed}/{self._visit}"))
            mine = torch.randperm(len(self._places), generator=generator)[self._first :: self._step]
            while self._done < len(mine):
                self._done += 1
                yield self._rows[int(self._places[int(mine[self._done - 1])])], self._visit
            self._visit, self._done = self._visit + 1, 0

    def state(self) -> dict[str, Any]:
        return {"visit": self._visit, "done": self._done}


class ShardOrder:
    """Through shards: in each visit in another order, several at once, through a shuffle buffer.

    Each reader has its own shards. Where these are few, so that some readers would have many more than others, it has every
    n-th sample of all shards.
    """

    def __init__(
        self,
        source: Sharded,
        split: str,
        belongs: Callable[[str], bool],
        seed: str,
        reader: int,
        readers: int,
        buffer: int,
        state: dict | None,
    ):
        self._source, self._shards, self._belongs = source, list(enumerate(source.shards[split])), belongs
        self._seed, self._reader, self._readers, self._buffer = seed, reader, readers, buffer
        self._visit: int = state["visit"] if state else 0
        self._start = state.get("dataset") if state else None
        self._dataset: Any = None

    def __iter__(self) -> Iterator[tuple[Record, int]]:
        while True:
            self._dataset = self._open()
            met = self._start is not None
            # `iter` and not the data set's own iterator, which would split the shards between worker processes again.
            for batch in self._dataset.iter(batch_size=1):
                met = True
                yield {name: values[0] for name, values in batch.items()}, self._visit
            if not met:
                raise ValueError(
                    f"{self._source.name}: nothing in it for reader {self._reader} of {self._readers}; has it fewer samples "
                    "than there are readers, use fewer --num-workers"
                )
            self._visit, self._start = self._visit + 1, None

    def state(self) -> dict[str, Any]:
        # A source of which nothing has been drawn since the start still stands where it stood then.
        return {"visit": self._visit, "dataset": self._dataset.state_dict() if self._dataset else self._start}

    def _open(self) -> Any:
        from datasets import IterableDataset as Streamed  # the extra `train`
        from datasets.distributed import split_dataset_by_node

        each = len(self._shards) % self._readers == 0 or len(self._shards) >= EVEN * self._readers
        first, step = (0, 1) if each else (self._reader, self._readers)
        arguments = {
            "shards": self._shards,
            "source": self._source,
            "belongs": self._belongs,
            "first": first,
            "step": step,
        }
        dataset = Streamed.from_generator(_records, gen_kwargs=arguments)
        seed = _number(f"{self._seed}/{self._visit}")
        dataset = dataset.shuffle(seed=seed, buffer_size=self._buffer, max_buffer_input_shards=SHARDS_AT_ONCE)
        if each:
            dataset = split_dataset_by_node(dataset, self._reader, self._readers, strategy="shards")
        if self._start:
            # Every reader would warn that its buffer is lost.
            logging.getLogger("datasets.iterable_dataset").setLevel(logging.ERROR)
            dataset.load_state_dict(self._start)
        return dataset


def _records(
    shards: list[tuple[int, str]], source: Sharded, belongs: Callable[[str], bool], first: int = 0, step: int = 1
) -> Iterator[Record]:
    """The records of numbered shards that belong to the split, and of them every `step`-th, counted from `first`.

    (Of each shard from another one, so that many readers of small shards have equally many.)
    """
    for number, shard in shards:
        shift = int(number * GOLDEN * step) % step
        wanted = partial(_is_wanted, belongs, (first + shift) % step, step)
        for record in source.read(shard, wanted):
            # What is lost of a shard is lost to all its readers together.
            yield {**record, "lost": -(-record["lost"] // step)} if "broken" in record else record


def _is_wanted(belongs: Callable[[str], bool], first: int, step: int, place: int, name: str) -> bool:
    return place % step == first and belongs(name)


@dataclass(frozen=True)
class InSplit:
    """Whether a sample belongs to a split of a source that names none: by the hash of its id."""

    split: str
    share: float = VALIDATION_SHARE

    def __call__(self, name: str) -> bool:
        return (hash_of(name) < self.share) == (self.split == "validation")


def any_name(_name: str) -> bool:
    return True


def _number(seed: str) -> int:
    return random.Random(seed).getrandbits(32)


# -------------------------------------------------------------------------------------------------------------- parts


@dataclass(frozen=True)
class ListPart:
    """What a mixture draws from: rows at `places`, `weight` times as often as another part of weight 1."""

    name: str
    rows: Rows
    places: Sequence[int]
    weight: float = 1.0

    def order(self, seed: str, reader: int, readers: int, buffer: int, state: dict | None) -> Order:
        return ListOrder(self.rows, self.places, seed, reader, readers, state)

    def records(self) -> Iterator[Record]:
        """Once through, in order."""
        return (self.rows[int(place)] for place in self.places)


@dataclass(frozen=True)
class ShardPart:
    """What a mixture draws from: a split's shards, and of them the samples that `belongs` takes."""

    name: str
    source: Sharded
    split: str
    belongs: Callable[[str], bool] = any_name
    weight: float = 1.0

    def order(self, seed: str, reader: int, readers: int, buffer: int, state: dict | None) -> Order:
        return ShardOrder(self.source, self.split, self.belongs, seed, reader, readers, buffer, state)

    def records(self) -> Iterator[Record]:
        """Once through, in order."""
        return _records(list(enumerate(self.source.shards[self.split])), self.source, self.belongs)


Part = ListPart | ShardPart


# ------------------------------------------------------------------------------------------------------------- streams


class Stream(IterableDataset):
    """Endless items of one part or of several mixed by their weights.

    What is broken is passed over and counted; the first few are named. Once more than 1 % of what a reader has seen is
    broken, ValueError (of its first thousand samples it may find ten broken before that).

    Args:
        name: the source's, for messages.
        parts: what it draws from; each draw is from a part with a probability in proportion to its weight.
        item: makes an item of a record.
        seed: of the orders and of the mixture.
        rank, world: which of how many training processes this is. Accelerate must not split the stream again.
        buffer: size of each shuffle buffer, in samples.
    """

    def __init__(
        self,
        name: str,
        parts: Sequence[Part],
        item: Item,
        seed: int,
        rank: int = 0,
        world: int = 1,
        buffer: int = BUFFER,
    ):
        self.name, self.parts, self.item, self.seed = name, list(parts), item, seed
        self.rank, self.world, self.buffer = rank, world, buffer
        # begin: where a reader starts that has no state of its own yet; next: the worker whose batch comes next.
        self._state: dict[str, Any] = {"world": world, "workers": 0, "begin": None, "next": 0, "readers": {}}
        self._reader: _Reader | None = None  # this process's

    def __iter__(self) -> Iterator[Any]:
        """Begins where `state_dict` says, in each worker process of a loader with that worker's part."""
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        # A loader begins with its worker 0, whoever was to be the next.
        worker = (worker + self._state["next"]) % workers
        start = self._start(worker, workers)
        self._reader = _Reader(self, worker, self.rank * workers + worker, self.world * workers, start)
        return self._reader.items()

    def _start(self, worker: int, workers: int) -> dict[str, Any] | None:
        state = self._state
        if not state["readers"] or (state["world"], state["workers"]) == (self.world, workers):
            return state["readers"].get(str(worker), state["begin"])
        logger.warning(
            "%s: was read by %d processes with %d workers, now by %d with %d: the rest of the current pass is not seen",
            self.name, state["world"], state["workers"], self.world, workers,
        )  # fmt: skip
        return self._next_pass()

    def _next_pass(self) -> dict[str, Any] | None:
        """Where all begin when the numbers of readers have changed."""
        readers = self._state["readers"].values()
        if not readers:
            return self._state["begin"]
        visits = zip(*([part["visit"] for part in reader["parts"]] for reader in readers), strict=True)
        return {"drawn": 0, "seen": 0, "broken": 0, "parts": [{"visit": max(of_part) + 1} for of_part in visits]}

    def position(self) -> str:
        """Where this process's reader stands, to be sent along with a batch (see `Positioned`)."""
        assert self._reader is not None, "nothing has been read yet"
        info = get_worker_info()
        found = {"worker": self._reader.worker, "workers": info.num_workers if info else 1}
        return json.dumps({**found, "state": self._reader.state()})

    def note(self, position: str) -> None:
        """Note that the batch which came with `position` has been learned from. To be called in the training process."""
        found = json.loads(position)
        layout = {"world": self.world, "workers": found["workers"]}
        if not layout.items() <= self._state.items():
            self._state = {**layout, "begin": self._next_pass(), "readers": {}}
        self._state["readers"][str(found["worker"])] = found["state"]
        self._state["next"] = (found["worker"] + 1) % found["workers"]

    def broken(self) -> int:
        """How many broken samples the readers of this training process have met, up to the last noted batch."""
        return sum(reader["broken"] for reader in self._state["readers"].values())

    def state_dict(self) -> dict[str, Any]:
        """What follows the last noted batch; plain JSON. Each training process has its own."""
        return json.loads(json.dumps(self._state))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken. To be called before the stream is iterated.

        Raises ValueError if that was another number of sources.
        """
        for reader in state["readers"].values():
            if len(reader["parts"]) != len(self.parts):
                raise ValueError(
                    f"{self.name}: mixes {len(self.parts)} sources, but {len(reader['parts'])} when the run was stopped; "
                    "restore it, or start over with --no-resume"
                )
        self._state = json.loads(json.dumps(state))


class Positioned:
    """A collator whose batches also hold "position": where the reader that made the batch stands behind it."""

    def __init__(self, collator: Callable[[list], dict[str, Any]], stream: Stream):
        self.collator, self.stream = collator, stream

    def __call__(self, items: list) -> dict[str, Any]:
        return {**self.collator(items), "position": self.stream.position()}


class _Reader:
    """One reader of a stream."""

    def __init__(self, stream: Stream, worker: int, reader: int, readers: int, start: dict[str, Any] | None):
        self.worker, self._reader, self._stream = worker, reader, stream
        start = start or {"drawn": 0, "seen": 0, "broken": 0, "parts": [None] * len(stream.parts)}
        self._drawn, self._seen, self._broken = start["drawn"], start["seen"], start["broken"]
        self._named: list[str] = []
        self._orders = [
            part.order(f"{stream.seed}/{number}", reader, readers, stream.buffer, state)
            for number, (part, state) in enumerate(zip(stream.parts, start["parts"], strict=True))
        ]
        self._weights = [part.weight for part in stream.parts]

    def state(self) -> dict[str, Any]:
        counts = {"drawn": self._drawn, "seen": self._seen, "broken": self._broken}
        return {**counts, "parts": [order.state() for order in self._orders]}

    def items(self) -> Iterator[Any]:
        ways = [iter(order) for order in self._orders]
        while True:
            rng = random.Random(f"{self._stream.seed}/{self._reader}/{self._drawn}")
            (way,) = rng.choices(ways, self._weights)
            self._drawn += 1
            record, visit = next(way)
            self._seen += 1
            if "broken" in record:
                self._note_broken(f"{record['id']}: {record['broken']}", record["id"], record["lost"])
                continue
            try:
                item = self._stream.item(record, visit)
            except (ValueError, OSError) as error:
                self._note_broken(str(error), record["id"], 1)
                continue
            yield item

    def _note_broken(self, why: str, name: str, lost: int) -> None:
        self._broken += lost
        self._seen += lost - 1
        if len(self._named) <= NAMED:  # one more than is shown: there are others
            self._named.append(name)
            if len(self._named) <= NAMED:
                last = " (the next ones are only counted)" if len(self._named) == NAMED else ""
                logger.warning("left out: %s%s", why, last)
        check_broken(self._stream.name, self._broken, max(self._seen, GRACE), self._named, "samples")


class HeldOut(IterableDataset):
    """The items of parts, once through, one from each part in turn; always the same. What is broken is passed over."""

    def __init__(self, parts: Sequence[Part], item: Item):
        self.parts, self.item = list(parts), item

    def __iter__(self) -> Iterator[Any]:
        ways = [part.records() for part in self.parts]
        while ways:
            for way in list(ways):
                if (item := self._next(way)) is None:
                    ways.remove(way)
                else:
                    yield item

    def _next(self, way: Iterator[Record]) -> Any:
        for record in way:
            try:
                if "broken" in record:
                    raise ValueError(f"{record['id']}: {record['broken']}")
                return self.item(record, 0)
            except (ValueError, OSError) as error:
                logger.warning("left out: %s", error)
        return None
