"""How long a shard's JPEG takes to decode: by the package's decoder, by Pillow and by torchvision.

`python -m benchmarks.decoders` times the three in turn, image by image, on one core; figures are medians.
"""

from __future__ import annotations

import argparse
import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.benchmark import Timer
from torchvision.io import ImageReadMode, decode_jpeg

from benchmarks.command import run, whole
from benchmarks.loader_data import SEED, encoded_picture
from benchmarks.results_io import markdown_table, provenance, write_report
from nrrdd_format.decoding import decode_image

MODULE = "benchmarks.decoders"
SIZES = (32, 224)
MICROSECONDS = 1e6
OURS, PILLOW, TORCHVISION = "nrrdd (simplejpeg)", "Pillow", "torchvision"
Decoder = Callable[[bytes], Tensor]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = make_parser().parse_args(arguments)
    return run(lambda: report(options))


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description="Time the decoding of a shard's JPEGs.")
    parser.add_argument("--images", type=whole(1), default=100, metavar="N", help="decoded in a repeat (100)")
    parser.add_argument("--repeats", type=whole(1), default=15, metavar="R", help="(15)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write <date>-decoders.{json,md} here")
    return parser


def report(options: argparse.Namespace) -> int:
    """Measures, prints the table and writes what was asked for; returns the exit status."""
    timings = {size: measure(size, options.images, options.repeats) for size in SIZES}
    header = ["decoder"] + [text for size in SIZES for text in (f"µs an image of {size} px", "of Pillow's")]
    rows = [[name, *_cells(timings, name)] for name in (OURS, PILLOW, TORCHVISION)]
    text = markdown_table(header, rows)
    print(text)
    if options.out is not None:
        data = {"microseconds": {str(size): times for size, times in timings.items()}}
        title = "Decoding JPEGs"
        write_report(options.out, "decoders", provenance(MODULE, [SEED]), data, title=title, text=text)
    return 0


def _cells(timings: dict[int, dict[str, list[float]]], name: str) -> list[str]:
    cells = []
    for times in timings.values():
        ratio = median(mine / pillows for mine, pillows in zip(times[name], times[PILLOW], strict=True))
        cells += [f"{median(times[name]):.1f}", f"{ratio:.2f}"]
    return cells


def measure(size: int, images: int, repeats: int) -> dict[str, list[float]]:
    """Microseconds an image of every decoder, one for each repeat; every repeat goes through all decoders."""
    files = [encoded_picture(number, size) for number in range(images)]
    decoders: dict[str, Decoder] = {
        OURS: lambda data: decode_image(data, size),
        PILLOW: _by_pillow,
        TORCHVISION: _by_torchvision,
    }
    times: dict[str, list[float]] = {name: [] for name in decoders}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torchvision's since 0.29
        for _ in range(repeats):
            for name, decode in decoders.items():
                timer = Timer("for data in files: decode(data)", globals={"files": files, "decode": decode})
                times[name].append(timer.timeit(1).median / images * MICROSECONDS)  # warmed up before
    return times


def _by_pillow(data: bytes) -> Tensor:
    """(3, S, S) uint8, channels last in memory, as `decode_image` gives it."""
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)))).permute(2, 0, 1)


def _by_torchvision(data: bytes) -> Tensor:
    image: Tensor = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    return image


if __name__ == "__main__":
    raise SystemExit(main())
