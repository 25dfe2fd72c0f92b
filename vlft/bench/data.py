"""`vlft bench data`: how fast vlft and stock transformers turn rows into batches, alternating in one process tree.

A third side only decodes and resizes the same pictures and frames, with the same functions and as many processes. Its
rows are parsed before. The share of its rate that vlft reaches (`of_decode`) says what rows, tokens, batches and their
way to the trainer cost. It is the median over pairs of neighbouring passes, since machines are rarely quiet.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import DataLoader

from vlft.bench.stock import COUNTS, StockRows, stock_collator
from vlft.bench.work import BuiltIn, Say, workplace
from vlft.config.flags import DataFlags, ModelFlags
from vlft.config.parse import Parsed
from vlft.config.recipe import Recipe
from vlft.data.collate import Batch
from vlft.data.dataset import RowDataset
from vlft.data.media.decode import decode
from vlft.data.order import RowOrder
from vlft.data.sample import Sample
from vlft.data.workers import loader_options, workers_end_with_errors
from vlft.errors import DataError
from vlft.setup import Base, MeasuredRows, open_base, trainable_rows


@dataclass(frozen=True, kw_only=True)
class DataBench:
    """Settings of the benchmark.

    Attributes:
        rows: maximum number of rows in a pass.
        rounds: number of passes of each side; the sides alternate.
        batch: rows of a batch.
        workers: loader processes of each side.
        baseline: whether stock transformers is also measured.
        work: folder that built-in rows stay in; None for a temporary one.
    """

    rows: int
    rounds: int
    batch: int
    workers: int
    baseline: bool
    work: str | None = None


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Seconds and counts of one pass over the rows; `pictures` counts stills and frames of videos."""

    seconds: float
    pictures: int
    samples: int
    tokens: int
    pixel_bytes: int


@dataclass(frozen=True, kw_only=True)
class _Decoded:
    """Rows whose pictures and frames are decoded and resized on access, and dropped.

    Attributes:
        samples: parsed rows, in memory.
        recipe: pixel and frame settings.
    """

    samples: Mapping[int, Sample]
    recipe: Recipe

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> int:
        """Return the number of stills and frames of the row."""
        return sum(len(decode(medium, self.recipe).pixels) for medium in self.samples[index].media)


class _Lists:
    """A batch sampler whose lists are set before each pass, so that worker processes stay alive."""

    def __init__(self) -> None:
        self.lists: Sequence[list[int]] = ()

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.lists)

    def __len__(self) -> int:
        return len(self.lists)


class _Side:
    """The loader of one side. Its workers are started once."""

    def __init__(self, rows: Any, collator: Any, workers: int) -> None:
        self.lists = _Lists()
        # The loader of VlftTrainer; `generator` and `prefetch_factor` make no difference here.
        options = loader_options(workers, pin_memory=True)
        self.loader = DataLoader(rows, batch_sampler=self.lists, collate_fn=collator, **options)  # type: ignore[arg-type]

    def run(self, lists: Sequence[list[int]]) -> Pass:
        """Run one pass, timed from the request for the first batch to the arrival of the last."""
        self.lists.lists = lists
        done = []
        start = time.perf_counter()
        for batch in self.loader:
            done.append(_counted(batch))
        seconds = time.perf_counter() - start
        pictures, samples, tokens, pixel_bytes = map(sum, zip(*done, strict=True))
        return Pass(seconds=seconds, pictures=pictures, samples=samples, tokens=tokens, pixel_bytes=pixel_bytes)


def _counted(batch: Any) -> tuple[int, int, int, int]:
    """Count pictures, samples, tokens and bytes of pixels in a batch of any side."""
    if isinstance(batch, list):  # of `_Decoded`
        return sum(batch), len(batch), 0, 0
    if COUNTS in batch and "places" in batch[COUNTS]:
        counts = batch[COUNTS]
        return counts["images"] + counts["frames"], counts["samples"], counts["tokens"], counts["pixel_bytes"]
    ours: Batch = batch
    if ours["skipped"]:
        raise DataError(ours["skipped"][0])
    counts = ours["counts"]
    videos = ours["vision_grid"][len(ours["vision_grid"]) - counts["videos"] :]
    pixel_bytes = ours["still_pixels"].nbytes + ours["video_pixels"].nbytes
    return counts["images"] + int(2 * videos[:, 0].sum()), counts["samples"], counts["tokens"], pixel_bytes


def bench_data(parsed: Parsed, plan: DataBench, built_in: BuiltIn, say: Say) -> dict[str, Any]:
    """Measure the loader.

    Args:
        parsed: parsed flags, with `DataFlags` and `ModelFlags` first.
        plan: settings of the benchmark.
        built_in: base and rows that are used if the flags name none.
        say: receives lines about progress.

    Returns:
        the document of `vlft bench data --json`.

    Raises:
        VlftError: the flags cannot be carried out, or a row cannot be read.
    """
    data, model = parsed.flags[:2]
    with workplace(plan.work) as work:
        own_base, own_rows = model.model_id is not None, bool(data.data_path)
        if not own_base:
            model = replace(model, model_id=str(built_in.base(work, say)))
        if not own_rows:
            data = replace(data, data_path=[str(built_in.rows(work, plan.rows, say, own_base=own_base, scale="real"))])
        base, measured = _open(data, model, parsed, plan.workers)
        with workers_end_with_errors():
            document = _measure(base, measured, plan, say)
        return document | {
            "base": model.model_id if own_base else f"{built_in.shape} (random weights)",
            "data": data.data_path if own_rows else f"{built_in.mix} mix, seed {built_in.seed}",
            "image_max_pixels": base.recipe.image_max_pixels,
        }


def _open(data: DataFlags, model: ModelFlags, parsed: Parsed, workers: int) -> tuple[Base, MeasuredRows]:
    base = open_base(data, model, given=parsed.given)
    return base, trainable_rows(data.data_path, data, base, workers=workers)


def _measure(base: Base, measured: MeasuredRows, plan: DataBench, say: Say) -> dict[str, Any]:
    samples = measured.rows.samples
    everything = RowOrder(rows=len(samples), rows_per_step=plan.batch, shuffle=True).epoch(0)[: plan.rows]
    lists = [everything[i : i + plan.batch] for i in range(0, len(everything), plan.batch)]
    sides = {"ours": _Side(RowDataset(samples, base.encoder, measured.costs), base.collator(), plan.workers)}
    if any(samples[index].media for index in everything):
        parsed = {index: samples[index] for index in everything}
        sides["decode_only"] = _Side(_Decoded(samples=parsed, recipe=base.recipe), list, plan.workers)
    if plan.baseline:
        stock = StockRows(samples=samples, processor=base.processor, recipe=base.recipe, family=base.family)
        sides["baseline"] = _Side(stock, stock_collator(base.processor), plan.workers)
    warm = lists[: max(1, 2 * plan.workers)]
    for name, side in sides.items():
        say(f"{name}: warming up on {len(warm)} batches")
        side.run(warm)
    passes: dict[str, list[Pass]] = {name: [] for name in sides}
    for turn in range(plan.rounds):
        for name, side in sides.items():
            passes[name].append(side.run(lists))
            rate = passes[name][-1].samples / passes[name][-1].seconds
            say(f"{name}, pass {turn + 1} of {plan.rounds}: {rate:,.1f} rows/s")
    found = {name: _rates(some, plan.workers) for name, some in passes.items()}
    document = {**found["ours"], "baseline": found.get("baseline")}
    document["ratio"] = _ratio(found["ours"], found["baseline"]) if plan.baseline else None
    alone = found.get("decode_only")
    document["decode_only"] = alone and alone["pictures_per_s"]
    document["seconds_of_decode"] = alone and alone["seconds_of_passes"]
    document["of_decode"] = None
    if alone:
        pairs = zip(passes["decode_only"], passes["ours"], strict=True)
        document["of_decode"] = statistics.median(one.seconds / ours.seconds for one, ours in pairs)
    document |= {"rounds": plan.rounds, "rows": len(everything), "rows_per_batch": plan.batch}
    document |= {"torch": torch.__version__, "cores": os.cpu_count()}
    return document


def _rates(passes: Sequence[Pass], workers: int) -> dict[str, Any]:
    """Compute rates from the median over the passes; all passes use the same rows."""
    seconds = statistics.median(one.seconds for one in passes)
    first = passes[0]
    return {
        "pictures_per_s": first.pictures / seconds if first.pictures else None,
        "samples_per_s": first.samples / seconds,
        "tokens_per_s": first.tokens / seconds,
        "bytes_per_picture": first.pixel_bytes / first.pictures if first.pictures else None,
        "workers": workers,
        "seconds": seconds,
        "seconds_of_passes": [round(one.seconds, 4) for one in passes],
        "pictures": first.pictures,
        "samples": first.samples,
        "tokens": first.tokens,
    }


def _ratio(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float | None]:
    """Divide our figures by the baseline's."""
    names = ("pictures_per_s", "samples_per_s", "tokens_per_s", "bytes_per_picture")
    return {name: ours[name] / theirs[name] if ours[name] and theirs[name] else None for name in names}
