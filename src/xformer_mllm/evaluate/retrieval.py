"""Image-text retrieval on COCO and Flickr30k with a stage-1 model: rank by ITC, then re-rank the best by ITM.

An image is searched with in text retrieval, a caption in image retrieval. As in LAVIS (blip2.py `compute_sim_matrix`):

    ITC            cosine of the caption and the image's most similar query
    ITM re-ranked  the k_test best by ITC: ITM's logit for "a pair", mean over the queries, plus that cosine (not divided by
                   ITC's temperature); all others -100

The work is split into blocks of `batch_size` images. Each block's results are written to `parts/` in the output folder:
the rows of the cosines, then the logits of the block's pairs. ITM scores an image's pairs of both directions together
and encodes each image a second time: at the paper's sizes that is 4.5 % of ITM's work, while keeping COCO's tokens would
take 6.9 GB. The result does not depend on the number of processes or on resuming, because the blocks do not.

`I` images, `C` captions, `K` candidates, `P` pairs, `Q` queries, `R` searches, `G` gallery, `T` text tokens. Memory: a few
times 4 I C bytes (COCO's 5,000 images with 25,000 captions: 0.5 GB each).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import PartialState
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from xformer_mllm.data.records import CLEAN_WORDS, clean
from xformer_mllm.evaluate.benchmark import Scores, check_images
from xformer_mllm.evaluate.karpathy import read_split
from xformer_mllm.evaluate.prediction import ImageBatches, open_parts, remove_parts
from xformer_mllm.files import atomic_path, write_whole
from xformer_mllm.inference import bf16_autocast
from xformer_mllm.model.images import load_image
from xformer_mllm.model.losses import image_text_similarity
from xformer_mllm.model.processing_xformer import encode
from xformer_mllm.model.vision_encoders import ImageTokens

K_TEST = 128
NO_CANDIDATE = -100.0
RECALLS = (1, 5, 10)
TEXT_TOKENS = 35  # LAVIS's for evaluation; its training and ours truncate to 32
CAPTIONS_AT_ONCE = 256
PAIRS_PER_IMAGE = 4  # in a batch: LAVIS scores 128 pairs where it encodes 32 images
ROWS_AT_ONCE = 256  # sorting takes about 20 bytes an entry

Ranking = dict[str, Any]


# ----------------------------------------------------------------------------------------------------------- data sets


@dataclass(frozen=True, slots=True)
class CaptionedImage:
    """An image and its captions. id, image_id: the file's stem; path: relative to the folder of images."""

    id: str
    image_id: str
    path: str
    captions: tuple[str, ...]


class Retrieval:
    """A set of images with several captions each, as `karpathy.py` reads them. Arguments and errors as `Benchmark`'s."""

    name: ClassVar[str]
    splits = ("test", "val")
    files: ClassVar[str]
    normalisation = (
        'captions are lower-cased, .!"()*#:;~ become spaces, '
        f"and they are truncated to {CLEAN_WORDS} words and {TEXT_TOKENS} tokens"
    )
    karpathy_file: ClassVar[str]
    lavis_file: ClassVar[str]
    images_folder: ClassVar[str]
    """Folder of the images whose folder Karpathy's file does not give."""

    records: Sequence[CaptionedImage]
    """In the file's order."""
    not_computed: Mapping[str, str] = {}
    notes: Sequence[str] = ("Unreadable images are left out, together with their captions.",)

    def __init__(self, data: Path, split: str, images: Path | None = None):
        self.images = images or data
        file, found = read_split(data, split, self.karpathy_file, self.lavis_file.format(split=split))
        paths = [image.path if "/" in image.path else f"{self.images_folder}/{image.path}" for image in found]
        ids = [Path(path).stem for path in paths]
        check_images(file, split, ids)
        self.records = [
            CaptionedImage(name, name, path, image.captions)
            for name, path, image in zip(ids, paths, found, strict=True)
        ]
        if not self.images.is_dir():
            raise FileNotFoundError(f"{self.images}: no such folder; --images names the folder of the images")

    def image_file(self, record: CaptionedImage) -> Path:
        """Path of a record's image: directly in the folder of images, else as in the benchmark's file."""
        named = self.images / record.path
        direct = self.images / named.name
        return direct if direct.is_file() else named

    def load(self, record: CaptionedImage) -> Image.Image:
        """Load a record's image. Raises OSError or ValueError if it is missing or broken."""
        return load_image(self.image_file(record))


class CocoRetrieval(Retrieval):
    """COCO in Karpathy's split: 5,000 test images of val2014 with five or more captions each."""

    name = "coco-retrieval"
    karpathy_file, lavis_file, images_folder = "dataset_coco.json", "coco_karpathy_{split}.json", "val2014"
    files = "dataset_coco.json (Karpathy) or coco_karpathy_SPLIT.json (LAVIS), and the images in val2014/"


class FlickrRetrieval(Retrieval):
    """Flickr30k in Karpathy's split: 1,000 test images with five captions each."""

    name = "flickr-retrieval"
    karpathy_file, lavis_file, images_folder = "dataset_flickr30k.json", "flickr30k_{split}.json", "flickr30k-images"
    files = "dataset_flickr30k.json (Karpathy) or flickr30k_SPLIT.json (LAVIS), and the images in flickr30k-images/"


# ------------------------------------------------------------------------------------------------------------- ranking


@dataclass(frozen=True)
class Ranked:
    """The best of a gallery for each search, best first. places: int64[R, K] indices; scores: fp32[R, K]."""

    places: torch.Tensor
    scores: torch.Tensor


def best(scores: torch.Tensor, number: int) -> Ranked:
    """The `number` highest of each row of [R, G]; ties in the file's order. Raises ValueError if one is not finite."""
    if not scores.isfinite().all():
        raise ValueError("some cosines of images and captions are not finite; the model's weights may be broken")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parts = [rows.to(device).sort(dim=1, descending=True, stable=True) for rows in scores.split(ROWS_AT_ONCE)]
    values, places = (torch.cat([part[which][:, :number].cpu() for part in parts]) for which in (0, 1))
    return Ranked(places, values)


def rerank(ranked: Ranked, logits: torch.Tensor, k_test: int) -> Ranked:
    """Re-rank the first `k_test` of each search by ITM logits [R, G]; the others follow in ITC's order."""
    candidates = ranked.places[:, :k_test]
    scores = torch.full_like(ranked.scores, NO_CANDIDATE)
    scores[:, :k_test] = logits.gather(1, candidates) + ranked.scores[:, :k_test]
    ordered = scores.sort(dim=1, descending=True, stable=True)
    return Ranked(ranked.places.gather(1, ordered.indices), ordered.values)


def pairs_to_score(to_text: Ranked, to_image: Ranked, k_test: int) -> torch.Tensor:
    """bool[I, C]: the pairs that are candidates in either direction."""
    needed = torch.zeros(len(to_text.places), len(to_image.places), dtype=torch.bool)
    needed.scatter_(1, to_text.places[:, :k_test], True)
    needed.t().scatter_(1, to_image.places[:, :k_test], True)
    return needed


def recalls(hits: torch.Tensor) -> dict[str, float]:
    """bool[R, K], whether the k-th best is correct -> the shares of searches with a correct one among the first k."""
    found = {f"recall@{k}": hits[:, :k].any(1).double().mean().item() for k in RECALLS}
    return {"n": len(hits), **found, "mean recall": sum(found.values()) / len(found)}


def scores_of(to_text: Mapping[str, Ranked], to_image: Mapping[str, Ranked], owner: torch.Tensor) -> Scores:
    """Score both directions by {method: ranking}; "all" is by the last method. owner: int64[C], each caption's image."""
    groups: Scores = {}
    for method in to_text:
        own = owner[to_text[method].places] == torch.arange(len(to_text[method].places))[:, None]
        groups[f"text retrieval, {method}"] = recalls(own)
        groups[f"image retrieval, {method}"] = recalls(to_image[method].places == owner[:, None])
    last = list(groups.values())[-2:]
    mean = sum(group["mean recall"] for group in last) / 2
    return {"all": {"n": sum(group["n"] for group in last), "mean recall": mean}, **groups}


# ----------------------------------------------------------------------------------------------------------- retrieval


@torch.inference_mode()
def retrieve(
    model: Any,
    processor: Any,
    benchmark: Retrieval,
    output_dir: Path,
    batch_size: int,
    k_test: int = K_TEST,
    workers: int = 0,
    made_by: Mapping[str, Any] | None = None,
) -> tuple[Scores, Ranking]:
    """Rank every caption for every image and vice versa; all processes get the result.

    Args:
        model, processor: of stage 1, on their device.
        output_dir: folder of ranking.json and `parts/`; call `remove_parts` after the scores are written.
        batch_size: images per batch and block; ITM takes four times as many pairs.
        k_test: number of ITC's best candidates that ITM re-ranks.
        workers: processes that load images, per process.
        made_by: identity of the model and data; `parts/` of a run with another one is refused.

    Returns:
        {group: {"n", "recall@1", "recall@5", "recall@10", "mean recall"}}, group "DIRECTION, METHOD"; "all" is the mean
        of both directions by ITM.
        Content of ranking.json: {direction: {method: {id: [[id, score], ...]}}} with the ten best of each, and
        "unreadable_images", {id: why}. The captions of image ID are "ID#0", "ID#1", ...

    Raises:
        ValueError: if `parts/` belongs to another run, or no image can be read.
    """
    model.eval()
    state, parts = PartialState(), output_dir / "parts"
    if state.is_main_process:
        about = {"benchmark": benchmark.name, "images": len(benchmark.records)}
        open_parts(parts, about | {"batch_size": batch_size, "k_test": k_test, **(made_by or {})})
    state.wait_for_everyone()
    work = _Work(model, processor, benchmark, parts, batch_size, workers)

    captions = _Captions.of(benchmark.records, processor)
    cosine, problems = work.cosines(captions)
    records = [record for record in benchmark.records if record.id not in problems]
    if not records:
        state.wait_for_everyone()  # until all have read the parts
        if state.is_main_process:
            remove_parts(output_dir)  # the images may be readable in the next run
        raise ValueError(
            f"none of the {len(problems):,} images can be read, e.g. {next(iter(problems.values()))}; "
            "--images names the folder of the images"
        )
    kept = torch.tensor([name.rpartition("#")[0] not in problems for name in captions.names])
    captions, cosine = captions.select(kept), cosine[:, kept]

    deep = max(k_test, *RECALLS)
    to_text, to_image = best(cosine, deep), best(cosine.t(), deep)
    logits = work.logits(records, captions, pairs_to_score(to_text, to_image, k_test))
    by_text = {"ITC": to_text, "ITM re-ranked": rerank(to_text, logits, k_test)}
    by_image = {"ITC": to_image, "ITM re-ranked": rerank(to_image, logits.t(), k_test)}
    place = {record.id: number for number, record in enumerate(records)}
    owner = torch.tensor([place[name.rpartition("#")[0]] for name in captions.names])
    scores = scores_of(by_text, by_image, owner)
    images, names = list(place), captions.names
    ranking = {
        "benchmark": benchmark.name,
        "k_test": k_test,
        "unreadable_images": problems,
        "text retrieval": {method: _listed(ranked, images, names) for method, ranked in by_text.items()},
        "image retrieval": {method: _listed(ranked, names, images) for method, ranked in by_image.items()},
    }
    if state.is_main_process:
        write_whole(output_dir / "ranking.json", json.dumps(ranking, ensure_ascii=False) + "\n")
    return scores, ranking


def _listed(ranked: Ranked, queries: Sequence[str], gallery: Sequence[str]) -> dict[str, list[list]]:
    """{id of the query: [[id, score], ...]}, the ten best."""
    deepest = max(RECALLS)
    places, scores = ranked.places[:, :deepest].tolist(), ranked.scores[:, :deepest].tolist()
    return {
        query: [[gallery[place], round(score, 6)] for place, score in zip(row, row_scores, strict=True)]
        for query, row, row_scores in zip(queries, places, scores, strict=True)
    }


@dataclass(frozen=True)
class _Captions:
    """The captions of all images, in order. names: IMAGE#NUMBER; ids, mask: int64[C, T]."""

    names: Sequence[str]
    ids: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def of(cls, records: Sequence[CaptionedImage], processor: Any) -> "_Captions":
        names = [f"{record.id}#{number}" for record in records for number in range(len(record.captions))]
        texts = [clean(caption) for record in records for caption in record.captions]
        text = encode(processor.qformer_tokenizer, texts, True, TEXT_TOKENS, padding_side="right")
        return cls(names, text["input_ids"], text["attention_mask"])

    def select(self, kept: torch.Tensor) -> "_Captions":
        """The captions chosen by bool[C]."""
        return _Captions(list(compress(self.names, kept.tolist())), self.ids[kept], self.mask[kept])

    def batch(self, places: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """int64[B] indices -> ids and mask, int64[B, T], cut to the longest of them."""
        longest = int(self.mask[places].sum(1).max())
        return self.ids[places, :longest].to(device), self.mask[places, :longest].to(device)


@dataclass(frozen=True)
class _Work:
    """The model's computations by block; each process computes its share and reads the others' from `parts`.

    Encoders and Q-Former run in bf16 where it is fast; heads and cosines in fp32, as different scores may be equal in bf16.
    """

    model: Any
    processor: Any
    benchmark: Retrieval
    parts: Path
    batch_size: int
    workers: int

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def cosines(self, captions: _Captions) -> tuple[torch.Tensor, dict[str, str]]:
        """ITC's cosines, fp32[I, C], of the readable images, and {id: why} of the others."""
        places = torch.arange(len(captions.names)).split(CAPTIONS_AT_ONCE)
        features = torch.cat([self.model.text_features(*captions.batch(some, self.device)) for some in places])

        def rows(_block: int, pixels: torch.Tensor | None) -> torch.Tensor:
            if pixels is None:
                return torch.zeros(0, len(features))
            with bf16_autocast(self.device):
                output = self.model.xformer(pixels.to(self.device))
            return image_text_similarity(self.model.image_features(output.fused_queries.float()), features).cpu()

        found = self._by_block("itc", self.benchmark.records, rows)
        problems = {name: problem for _, problems in found for name, problem in problems.items()}
        return torch.cat([tensor for tensor, _ in found]), problems

    def logits(self, records: Sequence[CaptionedImage], captions: _Captions, needed: torch.Tensor) -> torch.Tensor:
        """ITM's logits for "a pair": fp32[I, C], nan where `needed`, bool[I, C], is false."""
        blocks = needed.split(self.batch_size)

        def pairs(block: int, pixels: torch.Tensor) -> torch.Tensor:
            with bf16_autocast(self.device):
                image = self.model.xformer.encode_image(pixels.to(self.device))
            image = ImageTokens(image.clip_tokens, image.mae)  # `select` would copy pixels for every pair
            image = self.model.xformer.project(image)
            together = PAIRS_PER_IMAGE * self.batch_size
            return torch.cat([self._match(image, captions, some) for some in blocks[block].nonzero().split(together)])

        found = self._by_block("itm", records, pairs)
        if problems := [problem for _, found_problems in found for problem in found_problems.values()]:
            raise ValueError(f"{problems[0]} (it was readable before)")
        logits = torch.full(needed.shape, torch.nan)
        logits[needed] = torch.cat([tensor for tensor, _ in found])
        return logits

    def _match(self, image: ImageTokens, captions: _Captions, pairs: torch.Tensor) -> torch.Tensor:
        """int64[P, 2], indices of an image of the block and of a caption -> fp32[P]."""
        with bf16_autocast(self.device):
            chosen = image.select(pairs[:, 0].to(self.device))
            _, output = self.model.match(chosen, *captions.batch(pairs[:, 1], self.device))
        return self.model.itm_head(output.fused_queries.float()).mean(1)[:, 1].cpu()

    def _by_block(
        self, stage: str, records: Sequence[CaptionedImage], compute: Callable[[int, Any], torch.Tensor]
    ) -> list[tuple[torch.Tensor, dict[str, str]]]:
        """For each block `compute(number, pixels)`, and {id: problem} of its unreadable images."""
        state, size = PartialState(), self.batch_size
        blocks = [records[start : start + size] for start in range(0, len(records), size)]
        files = [self.parts / f"{stage}-{number:05}.safetensors" for number in range(len(blocks))]
        # Assign blocks whether done or not: another process may already be writing some.
        share = range(state.process_index, len(blocks), state.num_processes)
        mine = [number for number in share if not files[number].is_file()]
        inputs = ImageBatches([blocks[number] for number in mine], self.benchmark, self.processor)
        loader = DataLoader(inputs, batch_size=None, num_workers=self.workers)
        total, done = sum(len(blocks[number]) for number in share), sum(len(blocks[n]) for n in share if n not in mine)
        with tqdm(total=total, initial=done, unit="image", desc=f"{stage.upper()}, {state.process_index}") as bar:
            for number, (_, pixels, problems) in zip(mine, loader, strict=True):
                _write_block(files[number], compute(number, pixels), problems)
                bar.update(len(blocks[number]))
        state.wait_for_everyone()
        return [_read_block(file) for file in files]


# --------------------------------------------------------------------------------------------------------------- parts


def _write_block(file: Path, values: torch.Tensor, problems: Mapping[str, str]) -> None:
    with atomic_path(file) as partial:
        save_file({"values": values.contiguous()}, partial, metadata={"problems": json.dumps(problems)})


def _read_block(file: Path) -> tuple[torch.Tensor, dict[str, str]]:
    with safe_open(file, "pt") as stored:
        return stored.get_tensor("values"), json.loads(stored.metadata()["problems"])
