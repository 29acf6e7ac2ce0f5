"""The teacher's distances of a dataset's pairs before they are rounded, and samples of them that other runs draw from.

`python -m benchmarks.exact_distances DATASET --teacher-checkpoint FILE --out NAME.npy` computes them anew, with the
shared replay, and keeps those of some pairs: what the storage benchmark's shard of 1000 classes is filled with.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.command import add_device, local_folder, pick_device, run, whole
from benchmarks.results_io import provenance, write_json
from benchmarks.student import load_dataset_teacher
from builders.progress import Progress
from builders.relabel import relabel_epoch
from nrrdd_format import draws
from nrrdd_format.codebooks import quantize
from nrrdd_format.dataset import open_dataset
from nrrdd_format.decoding import decode_image
from nrrdd_format.errors import ConfigError
from nrrdd_format.files import atomic_write, make_folder
from nrrdd_format.replay import stack_images

MODULE = "benchmarks.exact_distances"
Distances = NDArray[np.float32]


def exact_distances(dataset: Path, teacher_checkpoint: Path, device: str, *, epochs: int | None = None) -> Distances:
    """Distances of all pairs of the first stored epochs (None: of all) of a dataset of one shard.

    Returns:
        (E, 2, P) float32, nats: d_org and d_aug.

    Raises:
        ConfigError: the dataset has several shards.
        TeacherError: another teacher than the dataset's.
    """
    with open_dataset(dataset) as opened:
        manifest = opened.manifest
        if len(manifest.shards) != 1:
            raise ConfigError(f"{dataset}: {len(manifest.shards)} shards; this is written for datasets of one")
        shard, size = opened.shards[0], manifest.images.size
        images = stack_images([decode_image(shard.image_bytes(i), size) for i in range(shard.images)]).to(device)
        labels = shard.labels
        count = manifest.records.epochs if epochs is None else min(epochs, manifest.records.epochs)
        pairs = list(islice(shard.all_records(), count))
    model = load_dataset_teacher(manifest, teacher_checkpoint, device).model
    parts = []
    with Progress(count, "exact distances", "epoch") as progress:
        for records in pairs:
            labelled = relabel_epoch(
                images,
                labels,
                records,
                model=model,
                temperature=manifest.records.temperature,
                mean=manifest.images.mean,
                std=manifest.images.std,
            )
            parts.append(np.stack([labelled.distance_org, labelled.distance_aug]))
            progress.advance()
    return np.stack(parts)


def joint_entropy(distances: Distances, levels: NDArray[np.float32]) -> float:
    """Bits a pair's two levels carry together, from distances (2, N): what an ideal code without context takes."""
    org, aug = quantize(distances, levels).astype(np.int64)
    _, counts = np.unique(org * len(levels) + aug, return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = make_parser().parse_args(arguments)
    return run(lambda: keep_sample(options))


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        description="Keep a sample of the exact distances of a dataset's pairs.",
        epilog=f"example:\n  python -m {MODULE} tiny-real-ipc10 --teacher-checkpoint tiny-teacher.pt \\\n"
        "      --out benchmarks/distances/tiny-imagenet-100.npy",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dataset", type=local_folder, metavar="DATASET", help="a built dataset of one shard")
    parser.add_argument("--teacher-checkpoint", type=Path, required=True, metavar="FILE", help="the dataset's teacher")
    parser.add_argument(
        "--epochs", type=whole(1), default=30, metavar="N", help="stored epochs to take pairs from (30)"
    )
    parser.add_argument("--pairs", type=whole(1), default=30_000, metavar="N", help="pairs to keep (30000)")
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help="of the choice among them (0)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the .npy file; a .json goes beside it")
    add_device(parser)
    return parser


def keep_sample(options: argparse.Namespace) -> int:
    """Writes (2, N) float16 distances and what they are; returns the exit status."""
    every = exact_distances(
        options.dataset, options.teacher_checkpoint, pick_device(options.device), epochs=options.epochs
    )
    flat = every.transpose(1, 0, 2).reshape(2, -1)
    chosen = draws.permutation(options.seed, "sampled-pairs", count=flat.shape[1])[: options.pairs]
    sample = flat[:, np.sort(chosen)].astype(np.float16)
    make_folder(options.out.parent)
    with atomic_write(options.out) as file:
        np.save(file, sample)
    write_json(options.out.with_suffix(".json"), _facts(options, sample))
    print(f"{options.out}: {sample.shape[1]} pairs")
    return 0


def _facts(options: argparse.Namespace, sample: NDArray[np.float16]) -> dict[str, Any]:
    manifest = open_dataset(options.dataset).manifest
    return provenance(MODULE, seeds=[options.seed]) | {
        "dataset": manifest.dataset.name,
        "classes": len(manifest.dataset.class_names),
        "teacher": manifest.teacher.architecture,
        "teacher_top1": manifest.teacher.top1,
        "pairs": sample.shape[1],
        "mean_mass_of_both_classes": float(np.exp(-sample.astype(np.float64)).sum(0).mean()),
    }


def load_sample(path: Path) -> Distances:
    """The distances (2, N) of a kept sample. Raises ConfigError for a file of another form."""
    try:
        sample = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a sample of distances ({error}); make one with python -m {MODULE}") from error
    if sample.ndim != 2 or len(sample) != 2 or sample.dtype != np.float16:
        raise ConfigError(f"{path}: {sample.dtype} {sample.shape}, expected float16 (2, N); see python -m {MODULE}")
    distances: Distances = sample.astype(np.float32)
    return distances


if __name__ == "__main__":
    raise SystemExit(main())
