"""Shards: one tar file with the images and pair records of one slice of the dataset (SPEC.md section 4)."""

from __future__ import annotations

import hashlib
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from nrrdd_format import tar
from nrrdd_format.errors import FormatError, require
from nrrdd_format.files import atomic_write
from nrrdd_format.frames import PREFIX, payload_length
from nrrdd_format.further import check_labels
from nrrdd_format.limits import MAX_CLASSES, MAX_EPOCHS, MAX_IMAGE_BYTES, MAX_INDEX, MAX_SHARDS
from nrrdd_format.pairs import PairRecords, RecordLayout
from nrrdd_format.pread import PositionedFile
from nrrdd_format.priors import Priors
from nrrdd_format.records import block_count, epochs_in_block, max_block_bytes, open_block
from nrrdd_format.shard_header import (
    EXTENSIONS,
    HEADER_NAME,
    RECORDS_NAME,
    Member,
    RecordsHead,
    ShardHeader,
    image_name,
    pack_header,
)
from nrrdd_format.versions import needed_version

_SHARD_NAME = re.compile(r"shard-([0-9]{5})\.tar")
_CHUNK = 2**20


@dataclass(frozen=True, kw_only=True)
class EncodedImage:
    """An image as it goes into a shard."""

    index: int  # its number in the whole dataset
    label: int  # its class
    data: bytes  # the encoded file


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """What the manifest says about one shard."""

    name: str
    sha256: str  # of the whole file
    bytes: int
    images: int
    pairs_per_epoch: int
    record_bytes: int  # size of the record member: everything the labels cost


def shard_name(shard: int) -> str:
    """File name of shard number `shard`."""
    return f"shard-{shard:05d}.tar"


def shard_number(name: str) -> int:
    """Number of the shard with this file name. Raises FormatError for a name of another form."""
    match = _SHARD_NAME.fullmatch(name)
    if match is None or int(match[1]) >= MAX_SHARDS:
        raise FormatError(f"shard name {name[:60]!r}, expected shard-00000.tar .. shard-{MAX_SHARDS - 1:05d}.tar")
    return int(match[1])


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file in hex, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def write_shard(
    path: str | os.PathLike[str],
    *,
    shard: int,
    images: Sequence[EncodedImage],
    extension: str,
    blocks: Sequence[bytes],
    epochs: int,
    layout: RecordLayout,
    priors: Priors | None = None,
) -> ShardEntry:
    """Write one shard: `images` and, where the layout has them, `priors` in the order the records number the images.

    `blocks` are those of `encode_shard_records`.

    The file appears whole or not at all. Raises ConfigError for content the format cannot hold, FormatError for
    blocks and priors that it cannot, OutputError where the file cannot be written.
    """
    _check_content(shard, images, extension, blocks, epochs, layout)
    _check_priors(shard, images, layout, priors)
    head = RecordsHead(
        epochs=epochs,
        pairs=layout.pairs,
        blocks=tuple(map(len, blocks)),
        crcs=tuple(map(zlib.crc32, blocks)),
        priors=priors,
    )
    records = [head.pack(), *blocks]
    members = [_member(image_name(i.index, i.label, extension), [i.data]) for i in images]
    members.append(_member(RECORDS_NAME, records))
    version = needed_version(priors=layout.priors, further=layout.further)
    header = pack_header(version=version, shard=shard, epochs=epochs, members=members)
    with atomic_write(Path(path)) as file:
        _write_member(file, HEADER_NAME, [header])
        for member, image in zip(members, images, strict=False):
            _write_member(file, member.name, [image.data])
        _write_member(file, RECORDS_NAME, records)
        file.write(tar.END)
    return ShardEntry(
        name=os.path.basename(path),
        sha256=file_sha256(path),
        bytes=os.path.getsize(path),
        images=len(images),
        pairs_per_epoch=layout.pairs,
        record_bytes=members[-1].size,
    )


def _check_content(
    shard: int,
    images: Sequence[EncodedImage],
    extension: str,
    blocks: Sequence[bytes],
    epochs: int,
    layout: RecordLayout,
) -> None:
    require(0 <= shard < MAX_SHARDS, f"shard number {shard}: expected 0..{MAX_SHARDS - 1}")
    require(extension in EXTENSIONS, f"image extension {extension!r}: expected one of {', '.join(EXTENSIONS)}")
    require(len(images) == layout.images, f"shard {shard}: {len(images)} images, expected {layout.images}")
    require(1 <= epochs <= MAX_EPOCHS, f"shard {shard}: {epochs} epochs, expected 1..{MAX_EPOCHS}")
    max_block_bytes(layout, epochs_in_block(layout, 0, epochs))  # raises where the blocks are over the limit
    count = block_count(layout, epochs)
    require(len(blocks) == count, f"shard {shard}: {len(blocks)} record blocks, expected {count}")
    require(len({i.index for i in images}) == len(images), f"shard {shard}: an image index appears twice")
    for image in images:
        size = len(image.data)
        require(0 <= image.index < MAX_INDEX, f"image {image.index}: expected a number of 0..{MAX_INDEX - 1}")
        require(
            0 <= image.label < MAX_CLASSES, f"image {image.index}: class {image.label}, expected 0..{MAX_CLASSES - 1}"
        )
        require(
            1 <= size <= MAX_IMAGE_BYTES,
            f"image {image.index}: {size} bytes encoded, expected 1..{MAX_IMAGE_BYTES}",
        )


def _check_priors(shard: int, images: Sequence[EncodedImage], layout: RecordLayout, priors: Priors | None) -> None:
    found = None if priors is None else priors.classes.shape
    expected = None if layout.priors is None else (layout.images, layout.priors)
    require(found == expected, f"shard {shard}: priors of shape {found}, expected {expected}")
    if priors is not None:
        priors.check_labels(np.array([image.label for image in images]))


def _member(name: str, parts: Sequence[bytes]) -> Member:
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return Member(name=name, size=sum(map(len, parts)), crc32=crc)


def _write_member(file: BinaryIO, name: str, parts: Sequence[bytes]) -> None:
    size = sum(map(len, parts))
    file.write(tar.header(name, size))
    file.writelines(parts)
    file.write(bytes(tar.padded(size) - size))


class ShardReader:
    """Random access to one shard. Nothing read is trusted: lengths are bounded, every checksum compared.

    Opening reads only the header member. The object can be pickled and used after a fork. Every method raises
    FormatError with the file, member and offset of the first fault. `layout` comes from the manifest, as does
    `entry`, against which the file is compared if it is given.
    """

    def __init__(self, path: str | os.PathLike[str], entry: ShardEntry | None, layout: RecordLayout) -> None:
        self.path = os.fspath(path)
        self.layout = layout
        self._file = PositionedFile(path)
        self._records_head: RecordsHead | None = None
        self.header, self._header_bytes = self._read_header()
        self._offsets = self.header.offsets(tar.BLOCK + tar.padded(self._header_bytes))
        self._check_against(entry)

    @property
    def images(self) -> int:
        """n, the number of images."""
        return self.header.images

    @property
    def indices(self) -> NDArray[np.int64]:
        """The images' numbers in the dataset, (n,)."""
        return self.header.indices

    @property
    def labels(self) -> NDArray[np.int64]:
        """The images' classes, (n,)."""
        return self.header.labels

    @property
    def epochs(self) -> int:
        """Number of stored epochs."""
        return self.header.epochs

    @property
    def shard(self) -> int:
        """The shard's number."""
        return self.header.shard

    def image_bytes(self, image: int) -> bytes:
        """The encoded image with this index within the shard, its checksum compared."""
        if not 0 <= image < self.images:
            raise IndexError(f"{self.path}: image {image}, expected 0..{self.images - 1}")
        member, offset = self.header.members[image], int(self._offsets[image])
        block = self._file.read(offset, tar.BLOCK + member.size, member.name)
        self._check_tar_header(block[: tar.BLOCK], member.name, member.size, offset)
        data = block[tar.BLOCK :]
        self._check_crc(zlib.crc32(data), member, offset + tar.BLOCK)
        return data

    def places(self) -> Iterator[tuple[str, int, int]]:
        """Name of each member in file order, the header's first, and offset and size of its data."""
        yield HEADER_NAME, tar.BLOCK, self._header_bytes
        for member, offset in zip(self.header.members, self._offsets.tolist(), strict=False):
            yield member.name, offset + tar.BLOCK, member.size

    def raw_bytes(self, offset: int, size: int, member: str | None) -> bytes:
        """Bytes of the file, which belong to `member`, as they are."""
        return self._file.read(offset, size, member)

    def encoded_images(self) -> Iterator[EncodedImage]:
        """All images with their numbers and labels, as `write_shard` takes them."""
        for image, (index, label) in enumerate(zip(self.indices.tolist(), self.labels.tolist(), strict=True)):
            yield EncodedImage(index=index, label=label, data=self.image_bytes(image))

    @property
    def blocks(self) -> int:
        """Number of record blocks, whose table is read and checked."""
        return len(self._load_records_head()[0].blocks)

    @property
    def priors(self) -> Priors | None:
        """What the teacher sees in each image beside its class; None where the dataset stores none."""
        return self._load_records_head()[0].priors

    def records(self, epoch: int) -> PairRecords:
        """The pairs of one epoch, P of them."""
        if not 0 <= epoch < self.epochs:
            raise IndexError(f"{self.path}: epoch {epoch}, expected 0..{self.epochs - 1}")
        (records,) = self._read_block(epoch // self.layout.block_epochs, range(epoch, epoch + 1))
        return records

    def block_records(self, number: int) -> Iterator[PairRecords]:
        """The pairs of every epoch of one record block, which is decompressed once."""
        first = number * self.layout.block_epochs
        return self._read_block(number, range(first, first + epochs_in_block(self.layout, number, self.epochs)))

    def all_records(self) -> Iterator[PairRecords]:
        """The pairs of every epoch, in order."""
        return chain.from_iterable(map(self.block_records, range(self.blocks)))

    def _read_block(self, number: int, epochs: range) -> Iterator[PairRecords]:
        head, start = self._load_records_head()
        offset = start + sum(head.blocks[:number])
        data = self._file.read(offset, head.blocks[number], RECORDS_NAME)
        where = f"block {number}"
        try:
            if zlib.crc32(data) != head.crcs[number]:
                raise FormatError(f"crc32 {zlib.crc32(data):08x}, expected {head.crcs[number]:08x}")
            block = open_block(data, self.layout, shard=self.shard, number=number, epochs=self.epochs)
            for epoch in epochs:
                where = f"block {number}, epoch {epoch}"
                records = block.epoch(epoch)
                if records.further_classes is not None:
                    labels = (self.labels[index] for index in (records.index_org, records.index_aug))
                    check_labels(records.further_classes, *labels)
                yield records
        except FormatError as error:
            reason = f"{where}: {error.reason}"
            raise FormatError(reason, path=self.path, member=RECORDS_NAME, offset=offset) from None

    def close(self) -> None:
        """Close the file; a later read opens it again."""
        self._file.close()

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_header(self) -> tuple[ShardHeader, int]:
        """The header and the size of its member."""
        first = self._file.read(0, tar.BLOCK + PREFIX.size, HEADER_NAME)
        try:
            size = tar.stated_size(first[: tar.BLOCK])
            self._check_tar_header(first[: tar.BLOCK], HEADER_NAME, size, 0)
            length = payload_length(first[tar.BLOCK :], size)
            header = ShardHeader.parse(self._file.read(tar.BLOCK, PREFIX.size + length, HEADER_NAME))
            if size != PREFIX.size + length:
                raise FormatError(f"the tar header states {size} bytes, the member itself {PREFIX.size + length}")
        except FormatError as error:
            raise error.located(path=self.path, member=HEADER_NAME, offset=tar.BLOCK) from None
        return header, size

    def _check_against(self, entry: ShardEntry | None) -> None:
        """Compare the header with the file's length, the layout and the manifest."""
        size = self._file.size()
        self._expect("the file has", size, int(self._offsets[-1]) + len(tar.END), "bytes (shard header)")
        self._expect("the shard header lists", self.images, self.layout.images, "images (manifest)")
        major, _ = needed_version(priors=self.layout.priors, further=self.layout.further)
        self._expect("the shard header states version", self.header.major, major, "(further classes or none, manifest)")
        if entry is not None:
            self._expect("the shard header says it is", shard_name(self.shard), entry.name, "(manifest)")
            self._expect("the file has", size, entry.bytes, "bytes (manifest)")
            records = self.header.members[-1].size
            self._expect("the record member has", records, entry.record_bytes, "bytes (manifest)")

    def _expect(self, what: str, found: object, expected: object, unit: str) -> None:
        if found != expected:
            raise FormatError(f"{what} {found}, expected {expected} {unit}", path=self.path)

    def _load_records_head(self) -> tuple[RecordsHead, int]:
        """The block table and the file offset of the first block."""
        member, offset = self.header.members[-1], int(self._offsets[-2])
        start = offset + tar.BLOCK
        if self._records_head is None:
            first = self._file.read(offset, tar.BLOCK, member.name)
            self._check_tar_header(first, member.name, member.size, offset)
            try:
                self._records_head = self._read_records_head(start, member.size)
            except FormatError as error:
                raise error.located(path=self.path, member=member.name, offset=start) from None
        return self._records_head, start + member.size - sum(self._records_head.blocks)

    def _read_records_head(self, start: int, size: int) -> RecordsHead:
        prefix = self._file.read(start, min(PREFIX.size, size), RECORDS_NAME)
        length = PREFIX.size + payload_length(prefix, size)
        head = RecordsHead.parse(self._file.read(start, length, RECORDS_NAME), self.layout, epochs=self.epochs)
        if head.priors is not None:
            head.priors.check_labels(self.labels)
        if length + sum(head.blocks) != size:
            raise FormatError(f"head and blocks take {length + sum(head.blocks)} bytes, expected {size}")
        return head

    def _check_tar_header(self, block: bytes, name: str, size: int, offset: int) -> None:
        expected = tar.header(name, size)
        if block != expected:
            at = next(i for i, (a, b) in enumerate(zip(block, expected, strict=True)) if a != b)
            reason = f"tar header byte {at} is {block[at]}, expected {expected[at]}"
            raise FormatError(reason, path=self.path, member=name, offset=offset + at)

    def _check_crc(self, crc: int, member: Member, offset: int) -> None:
        if crc != member.crc32:
            reason = f"crc32 {crc:08x}, expected {member.crc32:08x}: the bytes are damaged"
            raise FormatError(reason, path=self.path, member=member.name, offset=offset)
