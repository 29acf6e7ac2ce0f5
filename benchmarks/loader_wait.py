"""How long a training waits for its data: steps fed by the loader against the same steps on a batch that is there.

`python -m benchmarks.loader_wait` trains a network (on a GPU: ResNet-18 at 224 px in bf16) with DBR labels. A step that
reuses one batch costs what the network costs; what a step fed by the loader costs beyond that is waiting, copying and
replay. Both kinds take turns in one process, and what workers have prepared in the meantime is used up untimed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from torch import nn

from benchmarks.command import add_device, pick_device, run, whole
from benchmarks.loader_data import CLASSES, Data, write_data
from benchmarks.results_io import markdown_table, provenance, write_report
from builders.cores import usable_cores
from builders.models import create_model
from builders.progress import Progress
from loaders import DBRBatch, DBRLoader, DBRLoss
from loaders.loader import PREFETCHED

MODULE = "benchmarks.loader_wait"
RESULTS = Path("benchmarks") / "results"


@dataclass(frozen=True, kw_only=True)
class Row:
    """Milliseconds a step, each repeat's own, and the median of what waiting adds, in % of the fed step."""

    network: str
    resolution: int
    batch_size: int
    device: str
    workers: int
    fed: tuple[float, ...]
    reused: tuple[float, ...]
    waiting: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = make_parser().parse_args(arguments)
    return run(lambda: report(options))


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}", description="Measure how long training waits for data."
    )
    parser.add_argument("--network", default="resnet18", metavar="ARCH", help="that is trained (resnet18)")
    parser.add_argument("--resolution", type=whole(8), default=224, metavar="S", help="side in pixels (224)")
    parser.add_argument("--images", type=whole(8), default=2000, metavar="N", help="images in the dataset (2000)")
    parser.add_argument("--batch-size", type=whole(1), default=100, metavar="B", help="pairs in a batch (100)")
    parser.add_argument(
        "--workers", type=whole(0), default=usable_cores(), metavar="W", help="processes that load (one a core)"
    )
    parser.add_argument(
        "--cache-bytes", type=whole(0), default=2**28, metavar="N", help="of decoded images, each worker (2^28)"
    )
    parser.add_argument("--steps", type=whole(1), default=100, metavar="N", help="of each kind in a repeat (100)")
    parser.add_argument("--repeats", type=whole(1), default=5, metavar="R", help="(5)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help=f"for the dated report ({RESULTS})")
    add_device(parser)
    return parser


def report(options: argparse.Namespace) -> int:
    """Measures, prints the table and writes the dated report; returns the exit status."""
    with tempfile.TemporaryDirectory(prefix="nrrdd-wait-") as folder:
        data = Data(
            folder=Path(folder) / "data", size=options.resolution, images=options.images, batch=options.batch_size
        )
        row = measure(write_data(data), options, pick_device(options.device))
    text = markdown_table(
        ["network", "px", "batch", "device", "workers", "ms a step, fed", "ms a step, one batch", "waiting, %"],
        [
            [
                row.network,
                str(row.resolution),
                str(row.batch_size),
                row.device,
                str(row.workers),
                f"{median(row.fed):.2f}",
                f"{median(row.reused):.2f}",
                f"{row.waiting:.1f}",
            ]
        ],
    )
    print(f"\n{text}")
    write_report(
        options.out,
        f"loader-wait-{row.device}",
        provenance(MODULE, [0]),
        {"rows": [asdict(row)]},
        title="Waiting for data",
        text=text,
    )
    return 0


def measure(data: Data, options: argparse.Namespace, device: str) -> Row:
    """Times both kinds of steps in turn."""
    loader = DBRLoader(
        data.dataset,
        data.batch,
        num_workers=options.workers,
        device=device,
        pin_memory=device == "cuda",
        cache_bytes=options.cache_bytes,
        drop_last=True,
    )
    step = make_step(options.network, data.size, device)
    batches = endless(loader)
    one = next(batches)
    fed, reused = [], []
    with Progress(options.repeats + 1, "repeats", "repeat") as progress:
        for _ in range(options.repeats + 1):
            seconds(step, batches, PREFETCHED * options.workers, device)
            fed.append(seconds(step, batches, options.steps, device))
            reused.append(seconds(step, iter([one] * options.steps), options.steps, device))
            progress.advance()
    fed, reused = fed[1:], reused[1:]  # the first warms up
    waiting = [100 * (1 - lone / with_loader) for with_loader, lone in zip(fed, reused, strict=True)]
    return Row(
        network=options.network,
        resolution=data.size,
        batch_size=data.batch,
        device=device,
        workers=options.workers,
        fed=tuple(1000 * value / options.steps for value in fed),
        reused=tuple(1000 * value / options.steps for value in reused),
        waiting=median(waiting),
    )


def endless(loader: DBRLoader) -> Iterator[DBRBatch]:
    """Epoch after epoch, the stored ones again and again."""
    while True:
        loader.set_epoch(0)
        yield from loader
        loader.set_epoch(1)
        yield from loader


def make_step(network: str, size: int, device: str) -> Callable[[DBRBatch], None]:
    """A training step with DBR labels: AdamW, in bf16 where there is a GPU."""
    model: nn.Module = create_model(network, CLASSES, size).to(device).to(memory_format=torch.channels_last)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, fused=device == "cuda")
    loss_function = DBRLoss()

    def step(batch: DBRBatch) -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = model(batch.images)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss_function(logits, batch))
        optimizer.step()

    return step


def seconds(step: Callable[[DBRBatch], None], batches: Iterator[DBRBatch], steps: int, device: str) -> float:
    """Wall time of so many steps."""
    _wait_for(device)
    started = time.perf_counter()
    for _ in range(steps):
        step(next(batches))
    _wait_for(device)
    return time.perf_counter() - started


def _wait_for(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    raise SystemExit(main())
