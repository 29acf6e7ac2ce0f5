"""Reads an FKD or SRe2L relabel store beside its images: the pairs of every epoch, with distances in place of logits.

A store does not say which images a batch shows: their order comes from its sampler's seed, and the logits tell whether
that is the right one.

Shapes: n images, P pairs an epoch, B pairs a batch, K classes, S the side in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from builders.fkd_layout import (
    FkdBatch,
    batch_path,
    count_batches,
    count_epochs,
    read_batch,
    sampler_orders,
)
from builders.image_folder import Classes, FolderFiles, check_files, open_folder
from builders.progress import Progress
from nrrdd_format.codebooks import MixKind
from nrrdd_format.errors import ConfigError, FormatError
from nrrdd_format.limits import MAX_IMAGES
from nrrdd_format.manifest import Codec
from nrrdd_format.pairs import PairRecords

LEAST_GAIN = 0.1
"""Share of the way from chance to 1 that the agreement of logits and labels must come, where nothing else is asked."""
MOST_DOUBT = 0.01
"""Highest `EpochReader.doubt` of a store that is taken, where nothing else is asked; also how probable it may be, at
most, that an epoch of a sound store is refused."""
LEAST_PAIRS = 500
"""Pairs of an epoch that is judged as soon as it is read; smaller ones are when all others have been read."""
_WHICH_IMAGES = "are these the images that the store was made from, and all of them?"


@dataclass(frozen=True, kw_only=True)
class FkdSource:
    """A store and its images, as far as they are known before all batches are read; made by `open_source`."""

    store: Path
    files: FolderFiles
    classes: Classes
    codec: Codec
    size: int
    epochs: int
    batch: int
    """B, of all batches but a shorter last one."""
    batches: int
    pairs: int
    """P; less than the images where the store's loader dropped the last batch."""

    def read_batch(self, epoch: int, number: int) -> FkdBatch:
        """One batch, checked against what is known. Raises FormatError."""
        path = batch_path(self.store, epoch, number)
        batch = read_batch(path, size=self.size, num_classes=len(self.classes.names), most=len(self.files))
        expected = min(self.batch, self.pairs - number * self.batch)
        if len(batch) != expected:
            raise FormatError(
                f"holds {len(batch)} pairs, expected {expected} for the {len(self.files)} images; {_WHICH_IMAGES}",
                path=path,
            )
        return batch


def open_source(store: Path, images: Path, epochs: int | None = None) -> FkdSource:
    """Lists a store and its images, and compares how many of each there are.

    Args:
        store: the folder that holds epoch_0, epoch_1, …
        images: a folder of class folders, as the store's loader read it.
        epochs: take only so many.

    Raises:
        ConfigError: the store has fewer epochs, or there are more images than a shard takes.
        DataError: an unusable image.
        FormatError: the store is incomplete, or made from other images.
    """
    files, classes = open_folder(images)
    count = len(files)
    if not 2 <= count <= MAX_IMAGES:
        raise ConfigError(f"{images}: {count} images, expected 2..{MAX_IMAGES} in one shard")
    stored = count_epochs(store)
    if epochs is not None and epochs > stored:
        raise ConfigError(f"--epochs: found {epochs}, but {store} holds {stored}")
    codec, size = check_files(files)
    first = batch_path(store, 0, 0)
    batch = len(read_batch(first, size=size, num_classes=len(classes.names), most=count))
    batches, expected = count_batches(store, 0), -(-count // batch)
    if batches not in (expected, count // batch):
        raise FormatError(
            f"holds {batches} batches of {batch}, expected {expected} for the {count} images; {_WHICH_IMAGES}",
            path=first.parent,
        )
    return FkdSource(
        store=store,
        files=files,
        classes=classes,
        codec=codec,
        size=size,
        epochs=epochs or stored,
        batch=batch,
        batches=batches,
        pairs=min(count, batches * batch),
    )


class EpochReader:
    """Reads the epochs of a store in turn, and counts what is only known when all have been read.

    Attributes:
        pairs: so far.
        agreed: of these, how many have their highest logit at one of their two classes.
        agreed_by_chance: how many would on average, were the images in an order that has nothing to do with the logits.
        bytes: of the files read so far.
    """

    def __init__(
        self, source: FkdSource, *, sampler_seed: int, temperature: float, min_agreement: float | None
    ) -> None:
        self._source = source
        self._sampler_seed = sampler_seed
        self._temperature = temperature
        self._min_agreement = min_agreement
        self._kinds: set[MixKind] = set()
        self._found: list[_Agreement] = []
        self.bytes = 0

    @property
    def pairs(self) -> int:
        """See the class."""
        return sum(each.pairs for each in self._found)

    @property
    def agreed(self) -> int:
        """See the class."""
        return sum(each.agreed for each in self._found)

    @property
    def agreed_by_chance(self) -> float:
        """See the class."""
        return sum(each.by_chance for each in self._found)

    @property
    def doubt(self) -> float:
        """Probability, at most, that as many pairs agree in an order that has nothing to do with the logits.

        The Chernoff bound exp(−P · KL), of half the pairs, since every image stands in two.
        """
        share, chance = self.agreed / self.pairs, self.agreed_by_chance / self.pairs
        if share <= chance:
            return 1.0
        terms = ((share, chance), (1 - share, 1 - chance))
        return math.exp(-self.pairs / 2 * sum(p * math.log(p / q) for p, q in terms if p))

    @property
    def mix(self) -> MixKind:
        """The kinds of mixes read so far."""
        return "both" if len(self._kinds) > 1 else next(iter(self._kinds))

    def epochs(self) -> Iterator[PairRecords]:
        """The pairs of each epoch, in order.

        Raises:
            FormatError: a damaged or missing file, logits that have nothing to do with the images' labels, or too few
                pairs to tell.
        """
        orders = sampler_orders(len(self._source.files), self._sampler_seed)
        with Progress(self._source.epochs * self._source.batches, "import", "batch") as progress:
            for epoch in range(self._source.epochs):
                yield self._epoch(epoch, next(orders), progress)
        self._check_epochs()
        whole = _Agreement(pairs=self.pairs, agreed=self.agreed, by_chance=self.agreed_by_chance)
        self._check_least(whole, self._source.store)
        self._check_doubt()

    def _epoch(self, epoch: int, order: NDArray[np.int64], progress: Progress) -> PairRecords:
        source, labels = self._source, self._source.files.labels
        self._check_count(epoch)
        parts, likeliest = [], []
        for number in range(source.batches):
            batch = source.read_batch(epoch, number)
            self.bytes += batch_path(source.store, epoch, number).stat().st_size
            self._kinds.add("mixup" if batch.mix_box is None else "cutmix")
            images = order[number * source.batch :][: len(batch)]
            parts.append(batch_records(batch, images, labels, self._temperature))
            likeliest.append(batch.logits.argmax(1).numpy())
            progress.advance()
        records = PairRecords.concatenate(parts)
        found = self._count(records, np.concatenate(likeliest))
        self._found.append(found)
        if found.pairs >= LEAST_PAIRS:
            self._check_least(found, batch_path(source.store, epoch, 0).parent)
        return records

    def _check_count(self, epoch: int) -> None:
        batches = count_batches(self._source.store, epoch)
        if batches != self._source.batches:
            folder = batch_path(self._source.store, epoch, 0).parent
            raise FormatError(f"holds {batches} batches, expected {self._source.batches} as in epoch_0", path=folder)

    def _count(self, records: PairRecords, likeliest: NDArray[np.int64]) -> _Agreement:
        """How an epoch's likeliest classes (P,) agree with its pairs' labels."""
        labels = self._source.files.labels
        agreed = (likeliest == labels[records.index_org]) | (likeliest == labels[records.index_aug])
        shares = (np.bincount(labels, minlength=len(self._source.classes.names)) / len(labels))[likeliest]
        alone = records.index_org == records.index_aug
        chance = np.where(alone, shares, 1 - (1 - shares) ** 2)
        return _Agreement(pairs=len(records), agreed=int(agreed.sum()), by_chance=float(chance.sum()))

    def _check_epochs(self) -> None:
        """Refuses an epoch that agrees as by chance where the others do not, however few its pairs are."""
        if self._min_agreement is not None:
            return
        for epoch, found in enumerate(self._found):
            pairs, agreed = self.pairs - found.pairs, self.agreed - found.agreed
            usual = (agreed + 1) / (pairs + 2)
            if pairs and usual > found.chance and found.odds_against(usual) > self._source.epochs / MOST_DOUBT:
                self._refuse(found, batch_path(self._source.store, epoch, 0).parent)

    def _check_least(self, found: _Agreement, path: Path) -> None:
        """Refuses pairs that agree less than asked for or, where nothing is asked, hardly more than by chance."""
        if found.share < (found.least if self._min_agreement is None else self._min_agreement):
            self._refuse(found, path)

    def _refuse(self, found: _Agreement, path: Path) -> NoReturn:
        raise FormatError(
            f"the highest logit is at one of the pair's two classes in {found.share:.1%} of {found.pairs} pairs, by "
            f"chance {found.chance:.1%}: these hardly look like the pairs that were labelled; the usual cause is "
            f"another --sampler-seed than the store's (here {self._sampler_seed}), or other images; accept it as it is "
            "with --min-agreement",
            path=path,
        )

    def _check_doubt(self) -> None:
        """Refuses a store of so few pairs that their agreement, high as it is, may be chance."""
        if self._min_agreement is None and self.doubt > MOST_DOUBT:
            raise FormatError(
                f"the highest logit is at one of the pair's two classes in {self.agreed} of {self.pairs} pairs, "
                f"by chance in {self.agreed_by_chance:.1f}: too few to tell whether --sampler-seed "
                f"{self._sampler_seed} is the store's; take more epochs, or, if you know it is, give --min-agreement",
                path=self._source.store,
            )


@dataclass(frozen=True, kw_only=True)
class _Agreement:
    """Of some pairs, how many have their highest logit at one of their two classes, and how many would by chance."""

    pairs: int
    agreed: int
    by_chance: float

    @property
    def share(self) -> float:
        """Of the pairs that agree."""
        return self.agreed / self.pairs

    @property
    def chance(self) -> float:
        """Of the pairs that would by chance."""
        return self.by_chance / self.pairs

    @property
    def least(self) -> float:
        """The share from which on it is more than chance: by twice the noise, and by `LEAST_GAIN`."""
        noise = math.sqrt(self.chance * (1 - self.chance) / self.pairs)
        return min(1.0, self.chance + max(LEAST_GAIN * (1 - self.chance), 2 * noise))

    def odds_against(self, usual: float) -> float:
        """How many times likelier these pairs are by chance than where the share `usual` of pairs agrees.

        Of pairs whose share that is, one in n at most comes to n or more.
        """
        agree, differ = self.chance / usual, (1 - self.chance) / (1 - usual)
        logarithm = self.agreed * math.log(agree) + (self.pairs - self.agreed) * math.log(differ)
        return math.exp(min(logarithm, 700.0))


def batch_records(
    batch: FkdBatch, images: NDArray[np.int64], labels: NDArray[np.int64], temperature: float
) -> PairRecords:
    """The pairs of one batch.

    Args:
        batch: what the store says.
        images: (B,) which images the batch shows, by their number.
        labels: (n,) classes of all images.
        temperature: τ of the softmax behind the distances.
    """
    partner = np.arange(len(batch)) if batch.mix_index is None else batch.mix_index
    is_cutmix, box, lam = _mix(batch)
    distances = -(batch.logits.float() / temperature).log_softmax(1)
    org, aug = (distances.gather(1, torch.from_numpy(labels[of])[:, None])[:, 0] for of in (images, images[partner]))
    return PairRecords(
        index_org=images,
        index_aug=images[partner],
        view_org=batch.views,
        view_aug=batch.views[partner],
        flip_org=batch.flip,
        flip_aug=batch.flip[partner],
        is_cutmix=np.full(len(batch), is_cutmix),
        mix_box=np.tile(np.array(box, np.int16), (len(batch), 1)),
        lam=np.full(len(batch), lam, np.float32),
        distance_org=org.numpy(),
        distance_aug=aug.numpy(),
    )


def _mix(batch: FkdBatch) -> tuple[bool, tuple[int, int, int, int], float]:
    """CutMix or Mixup, box and λ; where nothing is mixed, or the box is empty, a Mixup that takes all of `org`."""
    box = batch.mix_box or (0, 0, 0, 0)
    if batch.lam is None or (batch.mix_box is not None and 0 in box[2:]):
        return False, (0, 0, 0, 0), 1.0
    return batch.mix_box is not None, box, batch.lam
