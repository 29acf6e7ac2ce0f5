"""Writes soft labels the way FKD and SRe2L store them, to have something measured to compare with.

The layout is that of `builders.fkd_layout`. λ and box are one a batch there, so of a batch whose pairs have several
mixes only the first is written: the store measured here is, if anything, too small.

Shapes: B pairs a file, K classes, S the side in pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from builders.fkd_layout import FkdBatch, batch_path, write_batch
from nrrdd_format import draws
from nrrdd_format.pairs import PairRecords

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
        batch_path(folder, epoch, 0).parent.mkdir(parents=True, exist_ok=True)
        return sum(self._write(folder, epoch, number, part) for number, part in enumerate(_batches(records)))

    def _write(self, folder: Path, epoch: int, number: int, records: PairRecords) -> int:
        logits, classes = self._logits(len(records), epoch, number)
        top, left, height, width = records.mix_box[0].tolist()
        batch = FkdBatch(
            views=records.view_org,
            flip=np.array(records.flip_org, dtype=bool),
            mix_index=np.array(records.index_aug, dtype=np.int64),
            mix_box=(top, left, height, width),
            lam=float(records.lam[0]),
            logits=logits,
        )
        return write_batch(batch_path(folder, epoch, number), batch, self.size, classes=classes)

    def _logits(self, count: int, epoch: int, number: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits, and of which classes they are where those are not all."""
        generator = torch.Generator().manual_seed(draws.torch_seed(self.seed, "fkd-logits", epoch, number))
        logits = torch.randn(count, self.num_classes, generator=generator)
        if self.form == "fp32":
            return logits, None
        if self.form == "fp16":
            return logits.half(), None
        values, classes = logits.topk(min(TOP, self.num_classes), dim=1)
        return values.half(), classes.to(torch.int16)


def _batches(records: PairRecords) -> Iterator[PairRecords]:
    for start in range(0, len(records), BATCH):
        yield records.take(slice(start, start + BATCH))
