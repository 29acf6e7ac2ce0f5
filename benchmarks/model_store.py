"""A relabel store as FKD and SRe2L write it, for 1000 classes, to measure what importing it makes of its bytes.

Images, views and mixes are generated. Logits are full rows of 1000 in fp16 whose two classes have the distances of a
kept sample, the rest of the mass spread evenly.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.exact_distances import Distances
from benchmarks.model_shard import CLASSES, IMAGES, SIZE, picture
from builders.fkd_layout import SAMPLER_SEED, FkdBatch, batch_path, sampler_orders, write_batch
from builders.import_fkd import ImportConfig, ImportFacts, import_fkd
from nrrdd_format import draws
from nrrdd_format.codebooks import mix_codebook, view_codebook

BATCH = 100
EPOCHS = 20


def measure_import(sample: Distances, *, epochs: int = EPOCHS, seed: int = 0) -> ImportFacts:
    """Writes a store of one image a class, imports it and returns what that came to."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for image in range(IMAGES):
            place = folder / "images" / f"class-{image % CLASSES:04d}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{image}.jpg").write_bytes(picture(seed, image))
        orders = sampler_orders(IMAGES, SAMPLER_SEED)
        for epoch in range(epochs):
            _write_epoch(folder / "relabel", epoch, next(orders), sample, seed)
        return import_fkd(ImportConfig(store=folder / "relabel", images=folder / "images", out=folder / "out"))


def _write_epoch(store: Path, epoch: int, order: NDArray[np.int64], sample: Distances, seed: int) -> None:
    views = view_codebook(seed, SIZE, (0.08, 1.0), count=4096)
    mixes = mix_codebook(seed, SIZE)
    batch_path(store, epoch, 0).parent.mkdir(parents=True, exist_ok=True)
    for number, images in enumerate(order.reshape(-1, BATCH)):
        index = (epoch, number)
        partner = draws.permutation(seed, "store-partner", *index, count=BATCH)
        box = mixes[draws.integers(seed, "store-mix", *index, count=1, high=len(mixes))[0]]
        assert isinstance(box, tuple)  # all are CutMix
        batch = FkdBatch(
            views=views[draws.integers(seed, "store-view", *index, count=BATCH, high=len(views))],
            flip=draws.uniform(seed, "store-flip", *index, count=BATCH) < 0.5,
            mix_index=partner,
            mix_box=box,
            lam=1 - box[2] * box[3] / SIZE**2,
            logits=_logits(images % CLASSES, images[partner] % CLASSES, sample, seed, index),
        )
        write_batch(batch_path(store, epoch, number), batch, SIZE)


def _logits(
    org: NDArray[np.int64], aug: NDArray[np.int64], sample: Distances, seed: int, index: tuple[int, int]
) -> torch.Tensor:
    """log p of rows (B, 1000) whose two classes have distances drawn from the sample."""
    both = np.exp(-sample[:, draws.integers(seed, "store-distances", *index, count=len(org), high=sample.shape[1])])
    rest = np.maximum(1 - both.sum(0), 1e-6) / (CLASSES - 2)
    shares = np.repeat(rest[:, None], CLASSES, axis=1)
    rows = np.arange(len(org))
    shares[rows, aug], shares[rows, org] = both[1], both[0]
    return torch.from_numpy(np.log(shares)).half()
