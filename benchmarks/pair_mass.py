"""What a pair's two distances leave unsaid, by how its images were made: the teacher's mass on all other classes.

With few classes most of a teacher's prediction on a mixed pair lies on the pair's own two; with many it need not, and
label refinement exists to bring it there (the paper, Eq. 12). `python -m benchmarks.pair_mass --dataset cifar10
--data-dir DIR --teacher-checkpoint FILE --out DIR` builds datasets of several kinds of images, refined for several
numbers of steps and weights of label refinement, and asks their teacher how much of its prediction the two classes
hold, how much the largest others, and how far labels completed in several ways are from it. No student is trained.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from benchmarks.command import Several, add_device, add_source, number, pick_device, run, whole
from benchmarks.grid import IMAGES, Cell, Changes, Grid, Origin, built_dataset, labelled_dataset, require_teacher
from benchmarks.results_io import Picture, markdown_table, provenance, write_report
from benchmarks.spread import spread
from benchmarks.student import load_dataset_teacher
from benchmarks.teacher import TeacherConfig
from builders.sources import load_source
from builders.teacher import Teacher
from loaders import DBRBatch, DBRLoader, completed_labels
from nrrdd_format.errors import counted
from nrrdd_format.manifest import MANIFEST_NAME, Manifest

MODULE = "benchmarks.pair_mass"
RESULTS = Path("benchmarks") / "results"
BATCH = 100
COMPLETIONS = {
    "even": "dbr",
    "priors": "dbr-priors",
    "1 further": "dbr-further1",
    "3 further": "dbr-further3",
    "priors of 99": "dbr-priors99",
    "3 further, priors of 99": "dbr-further3-priors99",
}
"""Ways to complete the labels, and the grid's kinds of labels whose datasets hold what each takes."""

NOTES = """\
*p_i + p_j*: what the teacher's prediction on a pair, as a student sees it, has on the pair's two classes; *3 others*:
on the three largest of the others. *KL*: from the label to the teacher's prediction, KL(label ‖ p) in nats, which is
the loss of a student that has become its teacher: of labels whose rest is spread evenly, by the images' priors (of 9
classes where no number stands, and of no more than there are), and with further classes of each pair stored. Means
over all pairs, mean ± standard deviation over seeds.
"""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a teacher sees in the pairs of one dataset; `kl` by the names in `COMPLETIONS`, in nats."""

    images: str
    iterations: int
    alpha_lr: float
    seed: int
    pair_mass: float
    three_others: float
    kl: dict[str, float]

    @property
    def name(self) -> str:
        """The row that it belongs to."""
        if not self.iterations:
            return self.images
        weight = f", α_lr {self.alpha_lr:g}" if self.alpha_lr else ""
        return f"{self.images}, {counted(self.iterations, 'step')}{weight}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = make_parser().parse_args(arguments)
    return run(lambda: measure(options))


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}", description="Measure how much of a teacher's prediction a pair's two classes hold."
    )
    add_source(parser, default="digits")
    parser.add_argument("--teacher-checkpoint", type=Path, required=True, metavar="FILE", help="a trained teacher")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="keeps the datasets")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help=f"for the report ({RESULTS})")
    parser.add_argument("--name", metavar="NAME", help="of the report's files (the dataset's)")
    parser.add_argument(
        "--images",
        action=Several,
        choices=tuple(IMAGES),
        metavar="KIND",
        default=["random-real", "rded", "nrr", "nrr+lr"],
        help=f"of {', '.join(IMAGES)} (random-real rded nrr nrr+lr)",
    )
    parser.add_argument("--ipc", type=whole(1), default=1, metavar="N", help="images per class (1)")
    parser.add_argument(
        "--iterations", type=whole(0), action=Several, default=[500], metavar="N", help="of refinement (500)"
    )
    parser.add_argument(
        "--alpha-lr", type=number(0), action=Several, default=[1.0], metavar="W", help="label refinement's (1)"
    )
    parser.add_argument("--stored-epochs", type=whole(1), default=16, metavar="N", help="to measure on (16)")
    parser.add_argument("--seeds", type=whole(0), action=Several, default=[0, 1, 2], metavar="N", help="(0 1 2)")
    add_device(parser)
    return parser


def measure(options: argparse.Namespace) -> int:
    """Builds and measures, prints the report and writes it; returns the exit status."""
    require_teacher(options.teacher_checkpoint)
    source = load_source(options.source, data_dir=options.data_dir, test_dir=options.test_dir)
    origin = Origin.of(source)
    rows = []
    for grid, cell in _cells(options):
        rows.append(measure_dataset(grid, cell, origin))
        print(f"{rows[-1].name}, seed {cell.seed}: p_i + p_j {rows[-1].pair_mass:.3f}", flush=True)
    text = table(rows)
    print(f"\n{text}\n\n{NOTES}")
    name = options.name or options.source
    write_report(
        options.results,
        f"pair-mass-{name}",
        provenance(MODULE, seeds=options.seeds),
        {"datasets": [asdict(row) for row in rows]},
        title=f"What the two distances leave unsaid, on {name}, {options.ipc} images per class",
        text=f"{text}\n\n{NOTES}",
        pictures=[Picture("masses", plot(rows))],
    )
    return 0


def _cells(options: argparse.Namespace) -> Iterator[tuple[Grid, Cell]]:
    """Every dataset to measure: kinds that are not refined once, others for every number of steps, and every weight."""
    for images in options.images:
        kind = IMAGES[images]
        for iterations in options.iterations if kind.refined else [0]:
            for weight in options.alpha_lr if kind.label_refinement else [None]:
                changes: Changes = () if weight is None else (("alpha_lr", weight),)
                for seed in options.seeds:
                    cell = Cell(ipc=options.ipc, images=images, labels="dbr", seed=seed, build=changes)
                    yield _grid(options, iterations), cell


def _grid(options: argparse.Namespace, iterations: int) -> Grid:
    """What is built; of its students nothing is used."""
    return Grid(
        dataset=options.source,
        data_dir=options.data_dir,
        test_dir=options.test_dir,
        out=options.out,
        teacher_checkpoint=options.teacher_checkpoint,
        teacher=TeacherConfig(),
        ipcs=(options.ipc,),
        images=tuple(options.images),
        labels=("dbr",),
        seeds=tuple(options.seeds),
        student="",
        epochs=options.stored_epochs,
        iterations=iterations,
        device=pick_device(options.device),
    )


def measure_dataset(grid: Grid, cell: Cell, origin: Origin) -> Measured:
    """Asks the teacher of the cell's dataset about its pairs; what is missing is built first."""
    path = built_dataset(grid, cell, origin)
    manifest = Manifest.load(path / MANIFEST_NAME)
    teacher = load_dataset_teacher(manifest, grid.teacher_checkpoint, grid.device)
    masses = torch.cat([_masses(batch, p) for batch, p in _predictions(path, manifest, teacher, grid.device)]).mean(0)
    kl = {}
    for name, labels in COMPLETIONS.items():
        labelled = labelled_dataset(grid, replace(cell, labels=labels), origin)
        pairs = [_distances(batch, p) for batch, p in _predictions(labelled, manifest, teacher, grid.device)]
        kl[name] = float(torch.cat(pairs).mean())
    refinement = manifest.method["refinement"]
    return Measured(
        images=cell.images,
        iterations=refinement["iterations"],
        alpha_lr=refinement["alpha_lr"],
        seed=cell.seed,
        pair_mass=float(masses[0]),
        three_others=float(masses[1]),
        kl=kl,
    )


def _predictions(path: Path, manifest: Manifest, teacher: Teacher, device: str) -> Iterator[tuple[DBRBatch, Tensor]]:
    """Batches of all stored epochs, and the teacher's probabilities (B, K) of each."""
    loader = DBRLoader(path, min(BATCH, manifest.images.count), device=device)
    for epoch in range(manifest.records.epochs):
        loader.set_epoch(epoch)
        for batch in loader:
            with torch.no_grad():
                yield batch, (teacher.model(batch.images) / manifest.records.temperature).softmax(1)


def _masses(batch: DBRBatch, p: Tensor) -> Tensor:
    """(B, 2): what p has on the pair's classes, and on the three largest others."""
    own = torch.zeros_like(p, dtype=torch.bool)
    for labels in (batch.label_org, batch.label_aug):
        own = own.scatter(1, labels[:, None], True)
    others = p.masked_fill(own, 0).topk(min(3, p.shape[1]), dim=1).values
    return torch.stack([(p * own).sum(1), others.sum(1)], dim=1)


def _distances(batch: DBRBatch, p: Tensor) -> Tensor:
    """(B,): KL(completed label ‖ p), nats."""
    return F.kl_div(p.log(), completed_labels(batch, p.shape[1]), reduction="none").sum(1)


def table(rows: Sequence[Measured]) -> str:
    """A line for each kind of images and refinement."""
    lines = []
    for name in dict.fromkeys(row.name for row in rows):
        of = [row for row in rows if row.name == name]
        values = [[row.pair_mass for row in of], [row.three_others for row in of]]
        values += [[row.kl[completion] for row in of] for completion in COMPLETIONS]
        lines.append([name, *(spread(each, digits=3) for each in values)])
    return markdown_table(["images", "p_i + p_j", "3 others", *(f"KL, {name}" for name in COMPLETIONS)], lines)


def plot(rows: Sequence[Measured]) -> Figure:
    """A bar for each row, the mass of the pair's classes, of three others, and of what is left."""
    names = list(dict.fromkeys(row.name for row in rows))
    figure = Figure(figsize=(7.5, 1.4 + 0.3 * len(names)), layout="constrained")
    axis = figure.subplots()
    of = [[row for row in rows if row.name == name] for name in names]
    own = [_mean([row.pair_mass for row in each]) for each in of]
    three = [_mean([row.three_others for row in each]) for each in of]
    axis.barh(names, own, label="the pair's two classes")
    axis.barh(names, three, left=own, label="three largest others")
    both = [first + second for first, second in zip(own, three, strict=True)]
    axis.barh(names, [1 - each for each in both], left=both, label="all the rest", color="0.85")
    axis.invert_yaxis()
    axis.set(xlabel="share of the teacher's prediction", xlim=(0, 1))
    axis.legend(fontsize=8, loc="lower right")
    return figure


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    raise SystemExit(main())
