"""How many pairs a second our loader delivers, against bare decoding of the same images and against other loaders.

`python -m benchmarks.loader_throughput` generates images, then measures every loader in a fresh process, one after the
other, and all of them again in every repeat, so that a machine that slows down slows all of them. The figures are
medians over the repeats. The main process takes batches and does nothing with them.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from matplotlib.figure import Figure

from benchmarks.command import Several, number, run, whole
from benchmarks.loader_data import Data, write_data
from benchmarks.loader_peers import (
    UNBOUNDED,
    Setting,
    count_decodes,
    open_decoder,
    open_fkd,
    open_ours,
    open_ours_without_replay,
    open_streaming,
    open_webdataset,
    why_no_streaming,
    write_streaming,
)
from benchmarks.loader_timing import Case, Measurement, measure_all
from benchmarks.results_io import Picture, markdown_table, provenance, write_json, write_report

MODULE = "benchmarks.loader_throughput"
DECODER = "decode only"
FKD = "FKD-style"
STREAMING = "MosaicML Streaming + CutMix"
CACHE_WARM_UP = 8
"""Epochs until every worker has seen, and so keeps, nearly every image."""

NOTES = """\
Every loader takes the same JPEGs. "decode only" is the ceiling: as many workers decode images that are in memory, with
the decoder that our loader uses, and deliver uint8 batches. "replay on the device" delivers what a training device
needs; the replay itself runs there, or is left out where there is none. "decoded once" keeps decoded images in every
worker. The FKD-style loader uses Pillow, one transform after the other on each image, and a file of soft labels a
batch; WebDataset and MosaicML Streaming have no soft labels at all. An epoch's start, when workers have nothing ready
yet, counts for all. Peak memory is the sum of what the loading process and each of its workers held at most, shared
pages counted in each.
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a case came to.

    Attributes:
        pairs_per_second: median over the repeats.
        repeats: each repeat's own.
        ratio_to_decode_only, ratio_to_fkd: of the medians, same images and workers; None where those were not measured.
        peak_rss_mb: the largest of all repeats, in 10^6 bytes; None where the system does not tell.
    """

    name: str
    resolution: int
    images: int
    device: str
    workers: int
    pairs_per_second: float
    repeats: tuple[float, ...]
    ratio_to_decode_only: float | None
    ratio_to_fkd: float | None
    peak_rss_mb: float | None
    decodes_per_pair: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = make_parser().parse_args(arguments)
    return run(lambda: report(options))


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}", description="Measure pairs a second of our loader and of others."
    )
    parser.add_argument(
        "--resolution", type=whole(8), action=Several, default=[224, 32], metavar="S", help="sides in pixels (224 32)"
    )
    parser.add_argument("--images", type=whole(8), default=2000, metavar="N", help="images in the dataset (2000)")
    parser.add_argument("--batch-size", type=whole(1), default=100, metavar="B", help="pairs in a batch (100)")
    parser.add_argument("--workers", type=whole(0), default=2, metavar="W", help="processes that load (2)")
    parser.add_argument("--repeats", type=whole(1), default=5, metavar="R", help="runs of each loader (5)")
    parser.add_argument(
        "--seconds",
        type=number(0),
        default=2.0,
        metavar="T",
        help="whole epochs are timed until so much has passed (2)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write <date>-throughput.{json,md,png} into this folder"
    )
    return parser


def report(options: argparse.Namespace) -> int:
    """Measures, prints the tables and writes what was asked for; returns the exit status."""
    skipped = why_no_streaming()
    with tempfile.TemporaryDirectory(prefix="nrrdd-throughput-") as folder:
        cases = list(make_cases(options, Path(folder), streaming=skipped is None))
        rows = make_rows(cases, measure_all(cases, options.repeats, options.seconds))
    notes = NOTES if skipped is None else f"{NOTES}Skipped: {STREAMING} ({skipped}).\n"
    text = table(rows)
    print(f"{text}\n\n{notes}")
    facts = provenance(MODULE, seeds=[0])
    data = {"skipped": {} if skipped is None else {STREAMING: skipped}, "rows": [asdict(row) for row in rows]}
    if options.json is not None:
        write_json(options.json, facts | data)
    if options.out is not None:
        write_report(
            options.out,
            "throughput",
            facts,
            data,
            title="Loader throughput",
            text=f"{text}\n\n{notes}",
            pictures=[Picture("pairs a second", plot(rows))],
        )
    return 0


def make_cases(options: argparse.Namespace, folder: Path, *, streaming: bool) -> Iterator[Case]:
    """Writes the data and yields every case on it: all loaders; then ours with fewer workers, and on other sizes."""
    for size in options.resolution:
        data = _write(options, folder, size, options.images)
        if streaming:
            write_streaming(data)
        yield from loader_cases(data, options.workers)
        yield from peer_cases(data, options.workers, streaming=streaming)
    first = options.resolution[0]
    data = _data(options, folder, first, options.images)
    for workers in range(options.workers):
        yield from loader_cases(data, workers)
    for images in (max(options.images // 4, 8), options.images * 4):
        yield from loader_cases(_write(options, folder, first, images), options.workers)


def loader_cases(data: Data, workers: int) -> Iterator[Case]:
    """The ceiling and our loader in its forms."""
    cpu = Setting(data=data, workers=workers, device="cpu")
    decodes = count_decodes(data, cache_bytes=0)
    once = count_decodes(data, cache_bytes=UNBOUNDED)
    ours, cached = partial(open_ours, cache_bytes=0), partial(open_ours, cache_bytes=UNBOUNDED)
    yield Case(name=DECODER, open=open_decoder, setting=cpu)
    if torch.cuda.is_available():
        cuda = Setting(data=data, workers=workers, device="cuda")
        yield Case(name="nrrdd, replay on the device", open=ours, setting=cuda, decodes=decodes)
    else:
        nowhere = Setting(data=data, workers=workers, device="meta")
        yield Case(name="nrrdd, replay on the device", open=open_ours_without_replay, setting=nowhere, decodes=decodes)
    yield Case(name="nrrdd, replay in the workers", open=ours, setting=cpu, decodes=decodes)
    yield Case(name="nrrdd, decoded once", open=cached, setting=cpu, warm_up=CACHE_WARM_UP, decodes=once)


def peer_cases(data: Data, workers: int, *, streaming: bool) -> Iterator[Case]:
    """Other people's ways to load; each decodes one image for each mixed one."""
    setting = Setting(data=data, workers=workers, device="cpu")
    yield Case(name=FKD, open=open_fkd, setting=setting)
    yield Case(name="WebDataset + CutMix", open=open_webdataset, setting=setting)
    if streaming:
        yield Case(name=STREAMING, open=open_streaming, setting=setting)


def make_rows(cases: Sequence[Case], measured: Sequence[Sequence[Measurement]]) -> list[Row]:
    """Medians, and their ratios to the ceiling and to the FKD-style loader on the same images."""
    medians = [median(one.pairs_per_second for one in repeats) for repeats in measured]
    known = {(case.name, case.setting.data, case.setting.workers): m for case, m in zip(cases, medians, strict=True)}

    def ratio(value: float, name: str, setting: Setting) -> float | None:
        base = known.get((name, setting.data, setting.workers))
        return None if base is None else value / base

    return [
        Row(
            name=case.name,
            resolution=case.setting.data.size,
            images=case.setting.data.images,
            device="none" if case.setting.device == "meta" else case.setting.device,
            workers=case.setting.workers,
            pairs_per_second=value,
            repeats=tuple(one.pairs_per_second for one in repeats),
            ratio_to_decode_only=ratio(value, DECODER, case.setting),
            ratio_to_fkd=ratio(value, FKD, case.setting),
            peak_rss_mb=max((one.peak_rss_mb for one in repeats if one.peak_rss_mb is not None), default=None),
            decodes_per_pair=case.decodes,
        )
        for case, value, repeats in zip(cases, medians, measured, strict=True)
    ]


def table(rows: Sequence[Row]) -> str:
    """All rows as a Markdown table."""
    header = [
        "loader",
        "px",
        "images",
        "device",
        "workers",
        "pairs/s",
        "lowest",
        "highest",
        "of decode only",
        "times FKD-style",
        "decodes a pair",
        "peak MB",
    ]
    lines = [
        [
            row.name,
            str(row.resolution),
            f"{row.images:,}",
            row.device,
            str(row.workers),
            f"{row.pairs_per_second:,.0f}",
            f"{min(row.repeats):,.0f}",
            f"{max(row.repeats):,.0f}",
            "" if row.ratio_to_decode_only is None else f"{row.ratio_to_decode_only:.2f}",
            "" if row.ratio_to_fkd is None else f"{row.ratio_to_fkd:.1f}",
            f"{row.decodes_per_pair:.2f}",
            "" if row.peak_rss_mb is None else f"{row.peak_rss_mb:,.0f}",
        ]
        for row in rows
    ]
    return markdown_table(header, lines)


def plot(rows: Sequence[Row]) -> Figure:
    """Pairs a second of every loader that was compared with others, lowest and highest marked."""
    shown = [row for row in rows if row.ratio_to_fkd is not None]
    figure = Figure(figsize=(8, 0.4 * len(shown) + 1.2), layout="constrained")
    axis = figure.subplots()
    values = [row.pairs_per_second for row in shown]
    below = [row.pairs_per_second - min(row.repeats) for row in shown]
    above = [max(row.repeats) - row.pairs_per_second for row in shown]
    axis.barh(range(len(shown)), values, xerr=[below, above], capsize=3)
    axis.set_yticks(range(len(shown)), [f"{row.name}, {row.resolution} px" for row in shown])
    axis.invert_yaxis()
    axis.set(xscale="log", xlabel=f"pairs a second, {shown[0].workers} workers")
    return figure


def _data(options: argparse.Namespace, folder: Path, size: int, images: int) -> Data:
    return Data(folder=folder / f"{size}px-{images}", size=size, images=images, batch=options.batch_size)


def _write(options: argparse.Namespace, folder: Path, size: int, images: int) -> Data:
    return write_data(_data(options, folder, size, images))


if __name__ == "__main__":
    raise SystemExit(main())
