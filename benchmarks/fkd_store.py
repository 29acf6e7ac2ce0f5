"""Writes soft labels the way FKD and SRe2L store them, to have something measured to compare with.

An epoch is a folder, a batch a file `epoch_{E}/batch_{B}.tar` that holds a torch-saved list (it is no tar archive):

    [coordinates (B, 4) float32, flip (B,) bool, mix index (B,) int64, λ, box [x1, y1, x2, y2], logits (B, K)]

Coordinates are fractions of the image (top, left, height, width). λ and box are one a batch, so of a batch whose pairs
have several mixes only the first is written: the store measured here is, if anything, too small.

Shapes: B pairs a file, K classes, S the side in pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from nrrdd_format import draws
from nrrdd_format.errors import OutputError
from nrrdd_format.records import PairRecords

Form = Literal["fp16", "fp32", "top5"]
BATCH = 100
TOP = 5


@dataclass(frozen=True, kw_only=True)
class FkdStore:
    """What a store of soft labels is made for.

    Attributes:
        size: S.
        num_classes: K.
        form: `fp16` or `fp32` logits, or `top5`: five fp16 values and their int16 classes.
        seed: of the logits. They are random normal numbers of the real shape: the file is not compressed, so its
            length does not depend on their values.
    """

    size: int
    num_classes: int
    form: Form = "fp16"
    seed: int = 0

    def write_epoch(self, folder: Path, epoch: int, records: PairRecords) -> int:
        """Writes the pairs of one epoch into `folder`; returns the bytes of its files."""
        place = folder / f"epoch_{epoch}"
        place.mkdir(parents=True, exist_ok=True)
        return sum(
            _save(self._batch(part, epoch, number), place / f"batch_{number}.tar")
            for number, part in enumerate(_batches(records))
        )

    def _batch(self, records: PairRecords, epoch: int, number: int) -> list[Any]:
        count = len(records)
        top, left, height, width = records.mix_box[0]
        return [
            torch.from_numpy((records.view_org / self.size).astype(np.float32)),
            torch.from_numpy(np.array(records.flip_org, dtype=bool)),
            torch.from_numpy(np.array(records.index_aug, dtype=np.int64)),
            np.float64(records.lam[0]),
            [np.int64(top), np.int64(left), np.int64(top + height), np.int64(left + width)],
            *self._logits(count, epoch, number),
        ]

    def _logits(self, count: int, epoch: int, number: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(draws.torch_seed(self.seed, "fkd-logits", epoch, number))
        logits = torch.randn(count, self.num_classes, generator=generator)
        if self.form == "fp32":
            return [logits]
        if self.form == "fp16":
            return [logits.half()]
        values, classes = logits.topk(min(TOP, self.num_classes), dim=1)
        return [values.half(), classes.to(torch.int16)]


def _batches(records: PairRecords) -> Iterator[PairRecords]:
    for start in range(0, len(records), BATCH):
        yield records.take(slice(start, start + BATCH))


def _save(batch: list[Any], path: Path) -> int:
    try:
        torch.save(batch, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch's own writer, as when the disk is full
        raise OutputError(f"{path}: cannot write ({error}); make room, or set TMPDIR to a larger disk") from error
    return path.stat().st_size
