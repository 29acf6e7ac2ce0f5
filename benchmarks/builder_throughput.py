"""How fast the builder's three stages run, beside a plain recovery loop, bare decoding and the matmul rate.

`python -m benchmarks.builder_throughput` times everything in one run, case after case and all of them again in every
repeat; figures are medians. On a GPU:

    python -m benchmarks.builder_throughput --device cuda --size 224 --batch-size 100 --iterations 50 --repeats 5
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.command import Several, add_device, pick_device, run, whole
from benchmarks.loader_data import MEAN, STD, picture
from benchmarks.plain_recover import recover
from benchmarks.results_io import markdown_table, provenance, write_report
from benchmarks.wide_build import untrained, write_images
from builders.cam import ClassActivation
from builders.config import BuildConfig, DiscoverySettings, RefinementSettings
from builders.cores import usable_cores
from builders.discovery import Eyes, class_groups, discover_groups
from builders.folders import list_classes
from builders.image_sets import FolderImages
from builders.label_refinement import PairTables
from builders.passes import Passes
from builders.prefetch import in_processes
from builders.refinement import Objective, refine_batch
from builders.relabel import relabel_epoch
from builders.teacher import load_teacher, load_weights_only
from nrrdd_format.codebooks import MixTable, distance_levels, mix_codebook, view_codebook
from nrrdd_format.errors import ConfigError, counted
from nrrdd_format.pairs import RecordLayout, draw_pairs
from nrrdd_format.replay import normalize

MODULE = "benchmarks.builder_throughput"
SEED = 0
PLAIN = "plain recovery, fp32"
FULL = "nrrdd"
ONE_PASS = "nrrdd without label refinement"
DECODE = "decode only"
PAPER_ITERATIONS = 2000
IMAGENET_CLASSES = 1000
IPCS = (10, 50, 200)
MEGABYTE = 1e6
SOURCE_CLASSES = 10
DISCOVERY = DiscoverySettings(
    ipc=1, beta=4, init=BuildConfig.init, confidence=BuildConfig.confidence, crop_score=BuildConfig.crop_score
)
"""A build's default ones, for one distilled image."""
Precision = Literal["fp32", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")

NOTES = """\
*plain recovery* is SRe2L's loop written plainly (`benchmarks/plain_recover.py`): one pass of the teacher a step. *nrrdd
without label refinement* does the same work; *nrrdd* has the second pass, on mixed images, that NRR-DD adds.
*compiled*: through torch.compile (`--compile`). *First call*: wall time of an untimed call, which compiles. On a GPU
ms are wall time; on a CPU they are the cores' own time, that of reading processes included, which other work on the
machine stretches far less, so that every figure is one core's. TFLOP/s count convolutions and linear layers, and stand
beside what a large matrix product reaches in the same precision in the same run. Hours: images of ImageNet-1k times
2000 iterations at that ms. Cosine: between a gradient and the one in fp32, not compiled, at the same pixels, the least
over five steps. Peak memory: the process's without those that read (CPU) or what torch took from the
GPU beyond what earlier cases hold of it. *teacher
alone*: as many forward passes as the stage makes, on images that are ready.
"""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Everything that is timed works on this: a teacher, one batch of images, and a folder of JPEGs."""

    eyes: Eyes
    images: np.ndarray
    labels: np.ndarray
    tables: PairTables
    source: FolderImages
    iterations: int
    threads: int
    compile: tuple[Precision, ...]
    """The precisions in which compiled refinement is timed beside the others."""
    pairs: int
    """Labelled in a repeat."""

    @property
    def model(self) -> nn.Module:
        """The teacher's network."""
        return self.eyes.activation.model

    @cached_property
    def passes(self) -> dict[str, Passes]:
        """The forms in which refinement is timed; made once, since compiling takes a minute."""
        plain = refinement_settings(iterations=self.iterations, batch_size=len(self.images))
        ways = {precision: replace(plain, precision=precision) for precision in PRECISIONS}
        compiled = {f"{precision}, compiled": replace(ways[precision], compile=True) for precision in self.compile}
        return {way: Passes(self.eyes, settings) for way, settings in (ways | compiled).items()}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to time. `prepare` makes ready, untimed, what is then called; one call does `items` items.

    `passes` are the teacher's forward passes of an item that are followed back; a way back costs what the way there
    does, since the weights need no gradient.
    """

    stage: str
    name: str
    items: int
    prepare: Callable[[], Callable[[], object]]
    passes: int = 0


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Medians over the repeats.

    Attributes:
        wall_ms, processor_ms: per item: an image and iteration of refinement, a pair, an image of discovery.
        ms: the one that counts: on a GPU wall time, on a CPU the cores' own, so that other work on the machine,
            which stretches wall time alone, changes no figure much.
        repeats: each repeat's own ms.
        first_s: wall seconds of the untimed call before them.
        peak: bytes, the largest of all repeats; None where the system does not tell.
        tflops: achieved, where they are counted.
    """

    stage: str
    name: str
    ms: float
    wall_ms: float
    processor_ms: float
    repeats: tuple[float, ...]
    first_s: float
    peak: int | None
    tflops: float | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = make_parser().parse_args(arguments)
    return run(lambda: report(options))


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description="Time the builder's stages.")
    add_teacher(parser)
    parser.add_argument("--batch-size", type=whole(2), default=20, metavar="B", help="images refined together (20)")
    parser.add_argument("--iterations", type=whole(1), default=3, metavar="N", help="steps timed in a repeat (3)")
    parser.add_argument(
        "--source-images", type=whole(SOURCE_CLASSES), default=500, metavar="N", help="JPEGs of discovery (500)"
    )
    parser.add_argument(
        "--compile",
        nargs="*",
        action=Several,
        choices=PRECISIONS,
        metavar="P",
        help="compiled refinement, too, in fp32, bf16 or both",
    )
    parser.add_argument(
        "--pairs", type=whole(1), metavar="N", help="labelled in a repeat (the batch's number of images)"
    )
    parser.add_argument("--repeats", type=whole(1), default=5, metavar="R", help="of every case (5)")
    parser.add_argument(
        "--threads", type=whole(1), default=usable_cores(), metavar="N", help="torch's and reading (all cores)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write <date>-builder-throughput-….{json,md} here")
    add_device(parser)
    return parser


def add_teacher(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `make_eyes` reads, but for --device."""
    parser.add_argument("--architecture", default="resnet18", metavar="ARCH", help="an untrained teacher (resnet18)")
    parser.add_argument(
        "--teacher-checkpoint", type=Path, metavar="FILE", help="a trained one by nrrdd teacher instead"
    )
    parser.add_argument(
        "--classes",
        type=whole(SOURCE_CLASSES),
        default=1000,
        metavar="C",
        help="of the untrained teacher (1000)",
    )
    parser.add_argument("--size", type=whole(8), default=64, metavar="PX", help="side of the images (64)")


def report(options: argparse.Namespace) -> int:
    """Measures, prints the tables and writes what was asked for; returns the exit status."""
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="nrrdd-builder-") as folder:
        bench, architecture = make_bench(options, Path(folder))
        timings = measure(list(make_cases(bench)), options.repeats, bench.eyes.device, forward_flops(bench))
        rates = {name: matmul_rate(bench.eyes.device, dtype) for name, dtype in _TYPES.items()}
        cosines = {name: least_cosine(bench, passes) for name, passes in bench.passes.items() if name != "fp32"}
    text = tables(timings, rates, cosines)
    print(f"{text}\n{NOTES}")
    if options.out is not None:
        on_gpu = "-cuda" if bench.eyes.device.type == "cuda" else ""
        write_report(
            options.out,
            f"builder-throughput-{architecture}-{options.size}{on_gpu}",
            provenance(MODULE, seeds=[SEED]),
            _as_json(timings, rates, cosines, options, architecture),
            title=f"Speed of the builder: {architecture}, {options.size} px, batches of {options.batch_size}",
            text=f"{text}\n{NOTES}",
        )
    return 0


_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


# ---- what is timed


def make_bench(options: argparse.Namespace, folder: Path) -> tuple[Bench, str]:
    """The teacher and the images, generated; and the teacher's architecture."""
    eyes, architecture = make_eyes(options)
    names = [f"class-{label}" for label in range(SOURCE_CLASSES)]
    write_images(folder, names, images_of_a_class(options.source_images), options.size)
    return Bench(
        eyes=eyes,
        images=pictures(options.batch_size, options.size),
        labels=some_labels(options.batch_size),
        tables=pair_tables(options.size),
        source=list_classes(folder, names, options.size),
        iterations=options.iterations,
        threads=options.threads,
        compile=PRECISIONS if options.compile == [] else tuple(options.compile or ()),
        pairs=options.pairs or options.batch_size,
    ), architecture


def images_of_a_class(source_images: int) -> int:
    """About as many of each class, so that discovery looks at all of them."""
    of_class = source_images // SOURCE_CLASSES
    return of_class - of_class % DISCOVERY.images_needed if of_class > DISCOVERY.images_needed else of_class


def make_eyes(options: argparse.Namespace) -> tuple[Eyes, str]:
    """The teacher that the options name, ready to see images; and its architecture."""
    device = torch.device(pick_device(options.device))
    model, architecture = _teacher(options, device)
    return Eyes(activation=ClassActivation(model, options.size), mean=MEAN, std=STD, device=device), architecture


def pictures(count: int, size: int) -> np.ndarray:
    """Generated images (count, 3, size, size) uint8."""
    return np.stack([picture(number, size).transpose(2, 0, 1) for number in range(count)])


def some_labels(count: int) -> np.ndarray:
    """Classes (count,) int64 of as many images."""
    return np.arange(count) % SOURCE_CLASSES


def pair_tables(size: int) -> PairTables:
    """What label refinement draws from at this size, as in a build with `refinement_settings`."""
    return PairTables(
        views=view_codebook(SEED, size, (0.5, 1.0)),
        flip=True,
        mixes=MixTable.from_entries(mix_codebook(SEED, size, "cutmix"), size),
    )


def _teacher(options: argparse.Namespace, device: torch.device) -> tuple[nn.Module, str]:
    if options.teacher_checkpoint is None:
        model = untrained(options.architecture, options.classes, options.size).requires_grad_(False)
        return model.to(device, memory_format=torch.channels_last), options.architecture  # type: ignore[call-overload]
    names = load_weights_only(options.teacher_checkpoint, "give a file by nrrdd teacher").get("class_names")
    if not isinstance(names, list) or len(names) < SOURCE_CLASSES:
        found = (
            f"a teacher of {counted(len(names), 'class', 'classes')}" if isinstance(names, list) else "no class names"
        )
        raise ConfigError(
            f"--teacher-checkpoint: found {found}, expected a file by nrrdd teacher of {SOURCE_CLASSES} classes or more"
        )
    teacher = load_teacher(
        None,
        options.teacher_checkpoint,
        num_classes=len(names),
        image_size=options.size,
        device=device,
        class_names=names,
    )
    return teacher.model, teacher.architecture


def make_cases(bench: Bench) -> Iterator[Case]:
    """Refinement in all its forms, then relabeling and discovery, each with its ceiling."""
    yield Case(stage="refinement", name=PLAIN, items=_steps(bench), passes=1, prepare=lambda: _plain(bench))
    for name, count in ((ONE_PASS, 1), (FULL, 2)):
        for way, passes in bench.passes.items():
            yield Case(
                stage="refinement",
                name=f"{name}, {way}",
                items=_steps(bench),
                prepare=partial(partial, _refine, bench, passes if count == 2 else _first_alone(passes)),
                passes=count,
            )
    yield Case(stage="relabeling", name="nrrdd", items=bench.pairs, prepare=lambda: _relabel(bench))
    batches = -(-bench.pairs // len(bench.images))
    yield Case(stage="relabeling", name="teacher alone", items=bench.pairs, prepare=lambda: _forwards(bench, batches))
    images = len(bench.source)
    yield Case(stage="discovery", name="nrrdd", items=images, prepare=lambda: lambda: _discover(bench))
    yield Case(stage="discovery", name=DECODE, items=images, prepare=lambda: lambda: _decode(bench))
    forwards = 2 * -(-images // len(bench.images))  # an image for its activation map, and its patch
    yield Case(stage="discovery", name="teacher alone", items=images, prepare=lambda: _forwards(bench, forwards))


def _first_alone(passes: Passes) -> Passes:
    """The same, compiled once for both, for steps without label refinement."""
    alone = copy.copy(passes)
    alone.settings = replace(passes.settings, alpha_lr=0.0)
    return alone


def _steps(bench: Bench) -> int:
    return bench.iterations * len(bench.images)


def refinement_settings(*, iterations: int, batch_size: int) -> RefinementSettings:
    """A build's default ones, in float32."""
    return RefinementSettings(
        iterations=iterations,
        learning_rate=0.05,
        schedule="cosine",
        mask="non-critical",
        epsilon=0.5,
        cam_every=0,
        alpha_bn=0.01,
        alpha_lr=1.0,
        label_refinement="soft",
        label_refinement_views=True,
        jitter=False,
        batch_size=batch_size,
        mix="cutmix",
    )


def _plain(bench: Bench) -> Callable[[], object]:
    model = copy.deepcopy(bench.model).to(memory_format=torch.contiguous_format)
    pixels, labels = bench.eyes.see(bench.images), torch.from_numpy(bench.labels).to(bench.eyes.device)
    ends = torch.tensor([0.0, 255.0], device=bench.eyes.device).view(2, 1, 1, 1, 1).expand(2, 1, 3, 1, 1)
    low, high = (normalize(end, MEAN, STD) for end in ends)
    return lambda: recover(model, pixels, labels, bench.iterations, (low, high))


def _refine(bench: Bench, passes: Passes) -> None:
    refine_batch(
        bench.images,
        bench.labels,
        passes,
        tables=bench.tables,
        seed=SEED,
        batch=0,
        on_steps=lambda steps, losses: None,
    )


def _relabel(bench: Bench) -> Callable[[], object]:
    count, size = bench.pairs, bench.images.shape[-1]
    layout = RecordLayout(
        classes=SOURCE_CLASSES,
        images=count,
        pairs=count,
        size=size,
        cycle=min(10, count),
        mix_group=10,
        block_epochs=1,
        flip=True,
        coding="explicit",
        seed=SEED,
        views=bench.tables.views,
        mixes=bench.tables.mixes,
        levels=distance_levels(),
    )
    images, labels = (np.resize(each, (count, *each.shape[1:])) for each in (bench.images, bench.labels))
    on_device = torch.from_numpy(images).contiguous(memory_format=torch.channels_last).to(bench.eyes.device)
    return lambda: relabel_epoch(
        on_device,
        labels,
        draw_pairs(layout, 0, 0),
        model=bench.model,
        temperature=1.0,
        mean=bench.eyes.mean,
        std=bench.eyes.std,
    )


def _forwards(bench: Bench, passes: int) -> Callable[[], object]:
    pixels = bench.eyes.see(bench.images).contiguous(memory_format=torch.channels_last)

    def call() -> None:
        with torch.no_grad():
            for _ in range(passes):
                bench.model(pixels)

    return call


def _discover(bench: Bench) -> None:
    of_class = len(bench.source) // SOURCE_CLASSES
    settings = replace(DISCOVERY, ipc=max(1, of_class // DISCOVERY.images_needed))
    members = np.split(np.arange(len(bench.source)), SOURCE_CLASSES)
    usable = [part.tolist() for part in members]
    groups = class_groups(SOURCE_CLASSES, settings)
    for _ in discover_groups(bench.source, groups, usable, bench.eyes, settings, SEED, bench.threads):
        pass


def _decode(bench: Bench) -> None:
    with closing(in_processes(bench.source.read, range(len(bench.source)), bench.threads)) as images:
        for _ in images:
            pass


# ---- timing


def measure(cases: Sequence[Case], repeats: int, device: torch.device, flops: float) -> list[Timing]:
    """Times every case, all of them once in every repeat, after one warming call of each.

    `flops` are those of one image's forward pass.
    """
    firsts = [_first(case, device) for case in cases]
    rounds = [[_time(case, device) for case in cases] for _ in range(repeats)]
    return [
        _timing(case, first, one, flops, device.type == "cuda")
        for case, first, one in zip(cases, firsts, zip(*rounds, strict=True), strict=True)
    ]


def _first(case: Case, device: torch.device) -> tuple[float, float, int | None]:
    """The warming call; on a GPU nothing is at hand for it that an earlier case has left."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return _time(case, device)


def _time(case: Case, device: torch.device) -> tuple[float, float, int | None]:
    """Wall and processor seconds of one call, and peak memory."""
    call = case.prepare()
    held = _forget_peak(device)
    _wait(device)
    started, processor = time.perf_counter(), _processor_seconds()
    call()
    _wait(device)
    return time.perf_counter() - started, _processor_seconds() - processor, _peak(device, held)


def _processor_seconds() -> float:
    """The cores' time of this process and of those it has waited for, which read images."""
    ended = os.times()
    return time.process_time() + ended.children_user + ended.children_system


def _timing(
    case: Case,
    first: tuple[float, float, int | None],
    rounds: Sequence[tuple[float, float, int | None]],
    flops: float,
    on_gpu: bool,
) -> Timing:
    walls, processors, peaks = zip(*rounds, strict=True)
    if on_gpu:  # a graph's memory is taken when it is recorded, in the first call
        peaks = (first[2], *peaks)
    counted = walls if on_gpu else processors
    return Timing(
        stage=case.stage,
        name=case.name,
        ms=1000 * median(counted) / case.items,
        wall_ms=1000 * median(walls) / case.items,
        processor_ms=1000 * median(processors) / case.items,
        repeats=tuple(1000 * seconds / case.items for seconds in counted),
        first_s=first[0],
        peak=max((peak for peak in peaks if peak is not None), default=None),
        tflops=2 * case.passes * flops * case.items / median(counted) / 1e12 if case.passes else None,
    )


def forward_flops(bench: Bench) -> float:
    """Floating-point operations of one image's forward pass: convolutions and linear layers."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        bench.model(bench.eyes.see(bench.images))
    return float(counter.get_total_flops()) / len(bench.images)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a large matrix product, the best of five."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(6):  # the first warms up
        _wait(device)
        clock = time.perf_counter if device.type == "cuda" else time.process_time
        started = clock()
        torch.mm(a, b)
        _wait(device)
        seconds.append(clock() - started)
    return 2 * side**3 / min(seconds[1:]) / 1e12


def least_cosine(bench: Bench, passes: Passes, steps: int = 5) -> float:
    """The least cosine between gradients by these passes and in plain fp32, over steps from the same pixels."""
    pixels, targets = bench.eyes.see(bench.images), torch.from_numpy(bench.labels).to(bench.eyes.device)
    pixels = pixels.contiguous(memory_format=torch.channels_last)  # as in a build: nothing is compiled anew

    def gradients(passes: Passes) -> list[Tensor]:
        objective = Objective(passes, targets, bench.tables, SEED, 0)
        with passes.batchnorm:
            return [objective.gradient(pixels, step)[0].flatten() for step in range(steps)]

    pairs = zip(gradients(bench.passes["fp32"]), gradients(passes), strict=True)
    return min(float(torch.cosine_similarity(exact, other, dim=0)) for exact, other in pairs)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _forget_peak(device: torch.device) -> int:
    """Begins a new peak; returns the bytes that belong to what came before, such as the graphs of other cases."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_reserved(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak becomes what is held now
    return 0


def _peak(device: torch.device, held: int) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) - held
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)


# ---- what is reported


def tables(timings: Sequence[Timing], rates: dict[str, float], cosines: dict[str, float]) -> str:
    """All figures as text."""
    refinement = [timing for timing in timings if timing.stage == "refinement"]
    return "\n".join(
        [
            _refinement_table(refinement, rates),
            "",
            f"Gradient against fp32: cosine {', '.join(f'{cosine:.4f} ({way})' for way, cosine in cosines.items())}.",
            "",
            _hours_table(refinement),
            "",
            _rates_table([timing for timing in timings if timing.stage != "refinement"]),
            "",
        ]
    )


def _refinement_table(timings: Sequence[Timing], rates: dict[str, float]) -> str:
    plain = next(timing.ms for timing in timings if timing.name == PLAIN)
    header = [
        "refinement",
        "ms an image and iteration",
        "wall ms",
        "× plain",
        "TFLOP/s",
        "of matmul",
        "peak memory, MB",
        "first call, s",
    ]
    rows = []
    for timing in timings:
        rate = rates["bf16" if "bf16" in timing.name else "fp32"]
        assert timing.tflops is not None
        rows.append(
            [
                timing.name,
                f"{timing.ms:.3f}",
                f"{timing.wall_ms:.3f}",
                f"{plain / timing.ms:.2f}",
                f"{timing.tflops:.3f}",
                f"{timing.tflops / rate:.0%}",
                _megabytes(timing.peak),
                f"{timing.first_s:.1f}",
            ]
        )
    return markdown_table(header, rows)


def _hours_table(timings: Sequence[Timing]) -> str:
    header = [f"{PAPER_ITERATIONS} iterations", "s an image", *(f"hours, ImageNet-1k IPC {ipc}" for ipc in IPCS)]
    rows = []
    for timing in timings:
        seconds = timing.ms * PAPER_ITERATIONS / 1000
        hours = [f"{IMAGENET_CLASSES * ipc * seconds / 3600:,.1f}" for ipc in IPCS]
        rows.append([timing.name, f"{seconds:.2f}", *hours])
    return markdown_table(header, rows)


def _rates_table(timings: Sequence[Timing]) -> str:
    header = ["stage", "images or pairs a second", "ms", "wall ms", "peak memory, MB"]
    rows = [
        [
            f"{timing.stage}: {timing.name}",
            f"{1000 / timing.ms:,.0f}",
            f"{timing.ms:.3f}",
            f"{timing.wall_ms:.3f}",
            _megabytes(timing.peak),
        ]
        for timing in timings
    ]
    return markdown_table(header, rows)


def _megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / MEGABYTE:,.0f}"


def _as_json(
    timings: Sequence[Timing],
    rates: dict[str, float],
    cosines: dict[str, float],
    options: argparse.Namespace,
    architecture: str,
) -> dict[str, Any]:
    names = ("size", "batch_size", "iterations", "source_images", "pairs", "repeats", "threads")
    return {
        "teacher": {"architecture": architecture, "trained": options.teacher_checkpoint is not None},
        "shape": {name: getattr(options, name) for name in names},
        "matmul_tflops": rates,
        "gradient_cosines": cosines,
        "timings": [asdict(timing) for timing in timings],
    }


if __name__ == "__main__":
    raise SystemExit(main())
