"""Endless streams of training items from shards and lists, one source or a mixture, split between processes.

Every worker process of every training process is a *reader* with its own part of the data. A reader that has finished its
part of a source starts over in another order, so no process waits for another.

    stream = open_captions("cc12m", "train", transform=TrainTransform(224), rank=rank, world=world)
    loader = DataLoader(stream, batch_size, collate_fn=Positioned(collator, stream), num_workers=4)
    stream.load_state_dict(saved)               # to resume, before iterating
    for batch in loader:
        stream.note(batch.pop("position"))      # after the training step
        saved = stream.state_dict()             # plain JSON, one per training process

A run that resumes with the same numbers of processes and workers repeats nothing, and loses

- of lists (JSON, folders, data sets on disk), and of the order in which sources are mixed: nothing.
- of shards: for that epoch the contents of each reader's shuffle buffer, at most `buffer` - 1 samples per sharded source,
  because `datasets` does not save them. The following samples come in another order; captions and crops depend on the
  sample's name and stay the same.

With other numbers of processes or workers, every source starts its next epoch.
"""

import json
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from xformer_mllm.data.records import (
    MAX_NAMED,
    MIN_COUNTED,
    VALIDATION_SHARE,
    Item,
    Record,
    Rows,
    check_broken,
    hash_of,
    make_item,
)
from xformer_mllm.data.shards import ShardSource

logger = logging.getLogger(__name__)

BUFFER = 2000  # samples in memory for each sharded source and reader; 100 MB at 50 kB each
SHARDS_AT_ONCE = 10  # shards that feed the buffer
GOLDEN = 0.6180339887498949  # its multiples are evenly spread modulo 1
MIN_SHARDS_PER_READER = 4  # with fewer, one shard more or less makes readers too unequal


def in_split(split: str, name: str, share: float = VALIDATION_SHARE) -> bool:
    """Return whether the hash of a sample's id puts it in a split; for sources without splits."""
    return (hash_of(name) < share) == (split == "validation")


@dataclass(frozen=True)
class ListPart:
    """The rows at `indices` of a list. weight: probability of drawing from it, relative to the other parts."""

    name: str
    rows: Rows
    indices: Sequence[int]
    weight: float = 1.0

    def order(self, seed: str, reader: int, readers: int, buffer: int, state: dict | None) -> "ListOrder":
        return ListOrder(self, seed, reader, readers, state)

    def records(self) -> Iterator[Record]:
        """Yield all records once, in order."""
        return (self.rows[int(index)] for index in self.indices)


@dataclass(frozen=True)
class ShardPart:
    """The samples in a split's shards whose id `belongs` accepts, by default all. weight: as of `ListPart`."""

    name: str
    source: ShardSource
    split: str
    belongs: Callable[[str], bool] | None = None
    weight: float = 1.0

    def order(self, seed: str, reader: int, readers: int, buffer: int, state: dict | None) -> "ShardOrder":
        return ShardOrder(self, seed, reader, readers, buffer, state)

    def records(self) -> Iterator[Record]:
        """Yield all records once, in order."""
        return _records(list(enumerate(self.source.shards[self.split])), self.source, self.belongs)


StreamPart = ListPart | ShardPart


class ListOrder:
    """A reader's endless order of a list, as (record, epoch): every n-th row of one permutation per epoch."""

    def __init__(self, part: ListPart, seed: str, reader: int, readers: int, state: dict | None):
        self._part, self._seed = part, seed
        self._first, self._step = reader % len(part.indices), readers  # with more readers than rows some share a row
        state = state or {"epoch": 0}
        self._epoch, self._done = state["epoch"], state.get("done", 0)

    def __iter__(self) -> Iterator[tuple[Record, int]]:
        rows, indices = self._part.rows, self._part.indices
        while True:
            generator = torch.Generator().manual_seed(_integer(f"{self._seed}/{self._epoch}"))
            mine = torch.randperm(len(indices), generator=generator)[self._first :: self._step]
            while self._done < len(mine):
                self._done += 1
                yield rows[int(indices[int(mine[self._done - 1])])], self._epoch
            self._epoch, self._done = self._epoch + 1, 0

    def state(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "done": self._done}


class ShardOrder:
    """A reader's endless order of shards, as (record, epoch): several shards at once feed a shuffle buffer.

    Each reader has its own shards. If there are too few to share evenly, it takes every n-th sample of all shards.
    """

    def __init__(self, part: ShardPart, seed: str, reader: int, readers: int, buffer: int, state: dict | None):
        self._part, self._shards = part, list(enumerate(part.source.shards[part.split]))
        self._seed, self._reader, self._readers, self._buffer = seed, reader, readers, buffer
        state = state or {"epoch": 0}
        self._epoch, self._start = state["epoch"], state.get("dataset")
        self._dataset: Any = None

    def __iter__(self) -> Iterator[tuple[Record, int]]:
        while True:
            self._dataset = self._open()
            is_empty = self._start is None
            # The data set's own iterator would split the shards between worker processes again.
            for batch in self._dataset.iter(batch_size=1):
                is_empty = False
                yield {name: values[0] for name, values in batch.items()}, self._epoch
            if is_empty:
                raise ValueError(
                    f"{self._part.name}: no samples for reader {self._reader} of {self._readers}; if there are more "
                    "readers than samples, lower --num-workers"
                )
            self._epoch, self._start = self._epoch + 1, None

    def state(self) -> dict[str, Any]:
        # A source not drawn from since the start is still in the state it was loaded with.
        return {"epoch": self._epoch, "dataset": self._dataset.state_dict() if self._dataset else self._start}

    def _open(self) -> Any:
        from datasets import IterableDataset as Streamed  # the extra `train`
        from datasets.distributed import split_dataset_by_node

        own = len(self._shards) % self._readers == 0 or len(self._shards) >= MIN_SHARDS_PER_READER * self._readers
        first, step = (0, 1) if own else (self._reader, self._readers)
        arguments = {"shards": self._shards, "source": self._part.source, "belongs": self._part.belongs}
        dataset = Streamed.from_generator(_records, gen_kwargs={**arguments, "first": first, "step": step})
        seed = _integer(f"{self._seed}/{self._epoch}")
        dataset = dataset.shuffle(seed=seed, buffer_size=self._buffer, max_buffer_input_shards=SHARDS_AT_ONCE)
        if own:
            dataset = split_dataset_by_node(dataset, self._reader, self._readers, strategy="shards")
        if self._start:
            # Every reader would warn that the contents of its buffer are lost.
            logging.getLogger("datasets.iterable_dataset").setLevel(logging.ERROR)
            dataset.load_state_dict(self._start)
        return dataset


def _records(
    shards: list[tuple[int, str]],
    source: ShardSource,
    belongs: Callable[[str], bool] | None,
    first: int = 0,
    step: int = 1,
) -> Iterator[Record]:
    """Yield every `step`-th record of numbered shards, of those that belong to the split.

    The first one, `first`, is shifted from shard to shard, so that many readers of small shards get equally many.
    """
    for number, shard in shards:
        offset = (first + int(number * GOLDEN * step)) % step

        def wanted(index: int, name: str, offset: int = offset) -> bool:
            return index % step == offset and (belongs is None or belongs(name))

        for record in source.read(shard, wanted):
            # What a shard has lost is shared by all its readers.
            yield {**record, "lost": -(-record["lost"] // step)} if "broken" in record else record


def _integer(seed: str) -> int:
    return random.Random(seed).getrandbits(32)


class Stream(IterableDataset):
    """Endless items of one part, or of several mixed by their weights.

    Broken samples are skipped and counted, the first ones named. Raises ValueError once more than 1 % of the samples a
    reader has seen are broken; ten are allowed among its first thousand.

    Args:
        name: of the source, for messages.
        parts: each item is drawn from one of them.
        item: makes an item from a record.
        seed: of the orders and the mixture.
        rank, world: this training process and their number. Accelerate must not split the stream again.
        buffer: size of each shuffle buffer, in samples.
    """

    def __init__(
        self,
        name: str,
        parts: Sequence[StreamPart],
        item: Item,
        seed: int,
        rank: int = 0,
        world: int = 1,
        buffer: int = BUFFER,
    ):
        self.name, self.parts, self.item, self.seed = name, list(parts), item, seed
        self.rank, self.world, self.buffer = rank, world, buffer
        # begin: the start of readers that have no state yet; next: the worker whose batch comes next.
        self._state: dict[str, Any] = {"world": world, "workers": 0, "begin": None, "next": 0, "readers": {}}
        self._reader: _Reader | None = None  # of this process

    def __iter__(self) -> Iterator[Any]:
        """Start at the loaded state, with the part of this worker process."""
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        # A loader always starts with its worker 0, which takes the part of the worker that would be next.
        worker = (worker + self._state["next"]) % workers
        start = self._start(worker, workers)
        self._reader = _Reader(self, worker, self.rank * workers + worker, self.world * workers, start)
        return self._reader.items()

    def _start(self, worker: int, workers: int) -> dict[str, Any] | None:
        state = self._state
        if not state["readers"] or (state["world"], state["workers"]) == (self.world, workers):
            return state["readers"].get(str(worker), state["begin"])
        logger.warning(
            "%s: was read by %d processes with %d workers, now by %d with %d: the rest of the current epoch is skipped",
            self.name, state["world"], state["workers"], self.world, workers,
        )  # fmt: skip
        return self._next_epoch()

    def _next_epoch(self) -> dict[str, Any] | None:
        """Return the start of all readers after their number has changed."""
        readers = self._state["readers"].values()
        if not readers:
            return self._state["begin"]
        epochs = zip(*([part["epoch"] for part in reader["parts"]] for reader in readers), strict=True)
        return {"drawn": 0, "seen": 0, "broken": 0, "parts": [{"epoch": max(of_part) + 1} for of_part in epochs]}

    def position(self) -> str:
        """Return the state of this process's reader, which `Positioned` sends along with a batch."""
        assert self._reader is not None, "nothing has been read yet"
        info = get_worker_info()
        found = {"worker": self._reader.worker, "workers": info.num_workers if info else 1}
        return json.dumps({**found, "state": self._reader.state()})

    def note(self, position: str) -> None:
        """Note that the batch with this position has been trained on. Call it in the training process."""
        found = json.loads(position)
        layout = {"world": self.world, "workers": found["workers"]}
        if not layout.items() <= self._state.items():
            self._state = {**layout, "begin": self._next_epoch(), "readers": {}}
        self._state["readers"][str(found["worker"])] = found["state"]
        self._state["next"] = (found["worker"] + 1) % found["workers"]

    def broken(self) -> int:
        """Count the broken samples of this training process's readers, up to the last noted batch."""
        return sum(reader["broken"] for reader in self._state["readers"].values())

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the last noted batch, as plain JSON. Each training process has its own."""
        return json.loads(json.dumps(self._state))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a `state_dict`. Call it before iterating. Raises ValueError if the number of sources differs."""
        for reader in state["readers"].values():
            if len(reader["parts"]) != len(self.parts):
                raise ValueError(
                    f"{self.name}: mixes {len(self.parts)} sources, but {len(reader['parts'])} when the run stopped; "
                    "restore it, or start over with --no-resume"
                )
        self._state = json.loads(json.dumps(state))


class Positioned:
    """A collator that adds "position" to each batch: the state of the reader after it."""

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
        self._named: dict[str, str] = {}  # the reasons of the first broken samples
        self._orders = [
            part.order(f"{stream.seed}/{number}", reader, readers, stream.buffer, state)
            for number, (part, state) in enumerate(zip(stream.parts, start["parts"], strict=True))
        ]

    def state(self) -> dict[str, Any]:
        counts = {"drawn": self._drawn, "seen": self._seen, "broken": self._broken}
        return {**counts, "parts": [order.state() for order in self._orders]}

    def items(self) -> Iterator[Any]:
        iterators = [iter(order) for order in self._orders]
        weights = [part.weight for part in self._stream.parts]
        while True:
            rng = random.Random(f"{self._stream.seed}/{self._reader}/{self._drawn}")
            (chosen,) = rng.choices(iterators, weights)
            self._drawn += 1
            record, epoch = next(chosen)
            self._seen += 1
            try:
                item = make_item(self._stream.item, record, epoch)
            except (ValueError, OSError) as error:
                self._note_broken(str(error), record["id"], record.get("lost", 1))
                continue
            yield item

    def _note_broken(self, why: str, name: str, lost: int) -> None:
        self._broken += lost
        self._seen += lost - 1
        if name not in self._named and len(self._named) <= MAX_NAMED:  # one more than is shown, for the error's "..."
            self._named[name] = why
            if len(self._named) <= MAX_NAMED:
                last = " (further ones are only counted)" if len(self._named) == MAX_NAMED else ""
                logger.warning("skipped: %s%s", why, last)
        check_broken(self._stream.name, self._broken, max(self._seen, MIN_COUNTED), self._named, "samples")


class ValidationStream(IterableDataset):
    """The items of all parts once, one from each part in turn, in a fixed order. Broken samples are skipped.

    Raises ValueError if all are broken.
    """

    def __init__(self, parts: Sequence[StreamPart], item: Item):
        self.parts, self.item = list(parts), item

    def __iter__(self) -> Iterator[Any]:
        broken: dict[str, str] = {}
        iterators = [self._items(part.records(), broken) for part in self.parts]
        is_empty = True
        while iterators:
            for items in list(iterators):
                try:
                    item = next(items)
                except StopIteration:
                    iterators.remove(items)
                    continue
                is_empty = False
                yield item
        if is_empty and broken:
            name = ", ".join(dict.fromkeys(part.name for part in self.parts))
            check_broken(name, len(broken), len(broken), broken, "validation samples")

    def _items(self, records: Iterator[Record], broken: dict[str, str]) -> Iterator[Any]:
        for record in records:
            try:
                item = make_item(self.item, record, 0)
            except (ValueError, OSError) as error:
                logger.warning("skipped: %s", error)
                broken[record["id"]] = str(error)
                continue
            yield item
