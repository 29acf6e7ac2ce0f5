"""Small datasets for the mutations, and shards taken apart so that one part can be changed and the rest sealed anew.

What is known here about bytes comes from SPEC.md, not from the reader under test.
"""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, TypeVar, get_args

import msgpack
import numpy as np
import zstandard
from numpy.typing import NDArray
from PIL import Image

from nrrdd_format import draws, tar
from nrrdd_format.codebooks import Codebooks, distance_levels, mix_codebook, view_codebook
from nrrdd_format.manifest import MANIFEST_NAME, DatasetInfo, ImagesInfo, Manifest, RecordsInfo, TeacherInfo
from nrrdd_format.pairs import Coding, PairRecords, RecordLayout, cycle_bounds, draw_pairs
from nrrdd_format.priors import Priors, choose_priors
from nrrdd_format.records import encode_shard_records
from nrrdd_format.shard_header import HEADER_NAME, RECORDS_NAME
from nrrdd_format.shards import EncodedImage, ShardEntry, shard_name, write_shard

T = TypeVar("T")
Map = dict[str, Any]

SIZE = 8
SHARDS, IMAGES, EPOCHS, BLOCK_EPOCHS, CYCLE, MIX_GROUP = 2, 6, 3, 2, 3, 2
VERBATIM_PAIRS = 5
VIEWS, MIXES = 6, 5
LEVELS = {"explicit": 5, "derived": 20, "verbatim": 12}  # up to 16 levels, both of a pair share a byte
CLASSES = ("circle", "square", "star", "cross", "ring")
PRIORS = {"explicit": 1, "derived": 2, "verbatim": None}  # classes in each image's prior
FURTHER = {"explicit": None, "derived": 1, "verbatim": 2}  # further classes of each pair


class Draw:
    """Random choices of one mutation, a function of (seed, index) alone."""

    def __init__(self, seed: int, index: int) -> None:
        self._outputs = _outputs(seed, index)

    def below(self, high: int) -> int:
        """An integer in [0, high)."""
        return (next(self._outputs) * high) >> 64

    def between(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return low + self.below(high - low + 1)

    def chance(self, one_in: int) -> bool:
        """True once in so many times."""
        return self.below(one_in) == 0

    def one(self, options: Sequence[T]) -> T:
        """One of the options."""
        return options[self.below(len(options))]

    def data(self, size: int) -> bytes:
        """Random bytes."""
        return b"".join(word.to_bytes(8, "little") for word in islice(self._outputs, -(-size // 8)))[:size]

    def two_of(self, count: int) -> tuple[int, int]:
        """Two different integers in [0, count)."""
        first = self.below(count)
        return first, (first + self.between(1, count - 1)) % count


def _outputs(seed: int, index: int) -> Iterator[int]:
    page = 0
    while True:
        yield from draws.raw(seed, "mutation", index, page, count=32 << 2 * page).tolist()
        page += 1


# ---- the datasets


@dataclass(frozen=True, kw_only=True)
class Base:
    """A whole dataset in memory."""

    coding: Coding
    files: dict[str, bytes]
    parts: dict[str, Parts]  # by shard file

    @property
    def content(self) -> Map:
        """The manifest's JSON, free to be changed."""
        loaded: Map = json.loads(self.files[MANIFEST_NAME])
        return loaded

    @property
    def first_shard(self) -> bytes:
        """The file of shard 0."""
        return self.files[shard_name(0)]


def make_bases(folder: Path) -> list[Base]:
    """Writes one dataset of each coding into `folder` and takes it apart."""
    return [_take_in(coding, _write_dataset(folder / coding, coding)) for coding in get_args(Coding)]


def _take_in(coding: Coding, folder: Path) -> Base:
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    return Base(
        coding=coding,
        files=files,
        parts={name: take_apart(data) for name, data in files.items() if name != MANIFEST_NAME},
    )


def _write_dataset(folder: Path, coding: Coding) -> Path:
    folder.mkdir()
    manifest = _manifest(coding)
    pairs = VERBATIM_PAIRS if coding == "verbatim" else IMAGES
    layout = manifest.layout_for(IMAGES, pairs)
    entries = tuple(_write_shard(folder, layout, number) for number in range(SHARDS))
    images = replace(manifest.images, count=SHARDS * IMAGES)
    replace(manifest, images=images, shards=entries).save(folder / MANIFEST_NAME)
    return folder


def _manifest(coding: Coding) -> Manifest:
    verbatim = coding == "verbatim"
    return Manifest(
        dataset=DatasetInfo(name="mutated", class_names=CLASSES, source_license="CC0-1.0"),
        images=ImagesInfo(
            count=0,
            ipc=4,
            size=SIZE,
            codec="png",
            quality=None,
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
            flip=coding != "derived",
        ),
        records=RecordsInfo(
            coding=coding,
            epochs=EPOCHS,
            cycle=CYCLE,
            mix_group=MIX_GROUP,
            block_epochs=BLOCK_EPOCHS,
            seed=11,
            mix="both",
            priors=PRIORS[coding],
            further=FURTHER[coding],
        ),
        codebooks=Codebooks(
            views=None if verbatim else view_codebook(5, SIZE, (0.3, 1.0), count=VIEWS),
            mixes=None if verbatim else tuple(mix_codebook(5, SIZE, "both", count=MIXES)),
            distances=distance_levels(LEVELS[coding]),
        ),
        teacher=TeacherInfo(architecture="conv3", sha256="0" * 64, top1=0.75),
        method={"steps": [1, 2.5, "three", None]},
    )


def _write_shard(folder: Path, layout: RecordLayout, number: int) -> ShardEntry:
    images = [
        EncodedImage(index=index, label=index % len(CLASSES), data=picture(index))
        for index in range(number * IMAGES, (number + 1) * IMAGES)
    ]
    records = [_records(layout, number, epoch) for epoch in range(EPOCHS)]
    return write_shard(
        folder / shard_name(number),
        shard=number,
        images=images,
        extension="png",
        blocks=encode_shard_records(records, layout, number),
        epochs=EPOCHS,
        layout=layout,
        priors=_priors(layout, np.array([image.label for image in images]), number),
    )


def _priors(layout: RecordLayout, labels: NDArray[np.int64], shard: int) -> Priors | None:
    masses = draws.uniform(3, "priors", shard, count=len(labels) * len(CLASSES)).reshape(-1, len(CLASSES))
    return None if layout.priors is None else choose_priors(masses, labels, layout.priors, layout.levels)


def _records(layout: RecordLayout, shard: int, epoch: int) -> PairRecords:
    pairs = _verbatim_pairs(layout, shard, epoch) if layout.coding == "verbatim" else draw_pairs(layout, shard, epoch)
    level = [
        draws.integers(3, f"level/{side}", shard, epoch, count=layout.pairs, high=len(layout.levels)) for side in (0, 1)
    ]
    labelled = replace(pairs, distance_org=layout.levels[level[0]], distance_aug=layout.levels[level[1]])
    return labelled if layout.further is None else _with_further(labelled, layout, layout.further, shard, epoch)


def _with_further(records: PairRecords, layout: RecordLayout, count: int, shard: int, epoch: int) -> PairRecords:
    """Any classes but the pair's own, with any levels."""
    chance = Draw(shard, epoch)
    own = (shard * IMAGES + np.stack([records.index_org, records.index_aug], axis=1)) % len(CLASSES)
    others = [[c for c in range(len(CLASSES)) if c not in labels] for labels in own.tolist()]
    firsts = [chance.below(len(row)) for row in others]
    classes = [(row[at:] + row[:at])[:count] for row, at in zip(others, firsts, strict=True)]
    levels = [sorted(chance.below(len(layout.levels)) for _ in range(count)) for _ in others]
    return replace(records, further_classes=np.array(classes), further_distances=layout.levels[np.array(levels)])


def _verbatim_pairs(layout: RecordLayout, shard: int, epoch: int) -> PairRecords:
    """Pairs that no rule of ours draws: any partner of the group, any box, a λ apart from the box's share."""
    chance = Draw(shard, epoch)
    order = draws.permutation(3, "order", shard, epoch, count=layout.images)[: layout.pairs]
    bounds = cycle_bounds(layout.pairs, layout.cycle).tolist()
    groups = [range(low, high) for low, high in pairwise(bounds)]
    aug = np.array([chance.one(group) for group in groups for _ in group])
    view = np.array([_box(chance) for _ in order], np.int16)
    flip = np.array([chance.chance(2) for _ in order])
    group = layout.group_of_pair
    is_cutmix = np.arange(layout.groups) % 2 == epoch % 2
    box = np.array([_box(chance) if cut else (0, 0, 0, 0) for cut in is_cutmix], np.int16)
    lam = np.array([chance.between(1, 9) / 10 for _ in is_cutmix], np.float32)
    return PairRecords(
        index_org=order,
        index_aug=order[aug],
        view_org=view,
        view_aug=view[aug],
        flip_org=flip,
        flip_aug=flip[aug],
        is_cutmix=is_cutmix[group],
        mix_box=box[group],
        lam=lam[group],
        distance_org=np.full(layout.pairs, np.nan, np.float32),
        distance_aug=np.full(layout.pairs, np.nan, np.float32),
    )


def _box(chance: Draw) -> tuple[int, int, int, int]:
    height, width = chance.between(1, SIZE), chance.between(1, SIZE)
    return chance.between(0, SIZE - height), chance.between(0, SIZE - width), height, width


def picture(number: int, side: int = SIZE, codec: str = "PNG") -> bytes:
    """A small colour gradient."""
    y, x = np.indices((side, side))
    pixels = np.stack([x * 16, y * 16, (x + y) * 8 + number], axis=-1) % 256
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, format=codec)
    return buffer.getvalue()


# ---- shards in parts


@dataclass(frozen=True, kw_only=True)
class Member:
    """A tar member as it lies in the file."""

    header: bytes  # 512 bytes
    data: bytes
    padding: bytes

    @property
    def whole(self) -> bytes:
        """All its bytes."""
        return self.header + self.data + self.padding


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a shard holds, without lengths and checksums."""

    header: Map  # without `members`
    images: tuple[tuple[str, bytes], ...]  # name and data
    head: Map  # of the records, without `blocks` and `crcs`
    contents: tuple[bytes, ...]  # of the blocks, decompressed


def split(data: bytes) -> list[Member]:
    """The tar members of a whole shard."""
    members, at = [], 0
    while any(data[at : at + tar.BLOCK]):
        start = at + tar.BLOCK
        end = start + int(data[at + 124 : at + 135], 8)
        after = -(-end // tar.BLOCK) * tar.BLOCK
        members.append(Member(header=data[at:start], data=data[start:end], padding=data[end:after]))
        at = after
    return members


def join(members: Sequence[Member]) -> bytes:
    """A tar file of these members."""
    return b"".join(member.whole for member in members) + bytes(2 * tar.BLOCK)


def take_apart(data: bytes) -> Parts:
    """The parts of a whole shard. Raises whatever comes for one that is not."""
    first, *images, last = split(data)
    header, _ = _unframe(first.data)
    head, blocks = _unframe(last.data)
    sizes = head.pop("blocks")
    ends = np.cumsum(sizes).tolist()
    del head["crcs"], header["members"]
    return Parts(
        header=header,
        images=tuple((member.header[:100].rstrip(b"\0").decode(), member.data) for member in images),
        head=head,
        contents=tuple(decompress(blocks[end - size : end]) for size, end in zip(sizes, ends, strict=True)),
    )


def _same(value: T) -> T:
    return value


def _nothing(content: Map) -> None:
    """Leaves the map as it is."""


def frame(packed: bytes) -> bytes:
    """The frame of some msgpack."""
    return frame_of(compress(packed))


def frame_of(payload: bytes) -> bytes:
    """A payload behind its length and checksum."""
    return struct.pack("<II", len(payload), zlib.crc32(payload)) + payload


def seal(
    parts: Parts,
    *,
    blocks: Callable[[list[bytes]], list[bytes]] = _same,
    head: Callable[[Map], object] = _nothing,
    head_frame: Callable[[bytes], bytes] = frame,
    header: Callable[[Map], object] = _nothing,
    header_frame: Callable[[bytes], bytes] = frame,
    archive: Callable[[list[Member]], list[Member]] = _same,
) -> bytes:
    """The shard of these parts, with every length and checksum right but for what the arguments change.

    Args:
        blocks: changes the compressed record blocks.
        head: changes the map in front of the blocks, in place.
        head_frame: makes the frame of that map from its msgpack.
        header: changes the map of the shard header, in place.
        header_frame: makes the frame of that map.
        archive: changes the tar members.
    """
    packed = blocks([compress(content) for content in parts.contents])
    table = deepcopy(parts.head) | {"blocks": [len(b) for b in packed], "crcs": [zlib.crc32(b) for b in packed]}
    head(table)
    records = head_frame(msgpack.packb(table)) + b"".join(packed)
    members = [*parts.images, (RECORDS_NAME, records)]
    rows = [[name, len(data), zlib.crc32(data)] for name, data in members]
    content = deepcopy(parts.header) | {"members": rows}
    header(content)
    first = header_frame(msgpack.packb(content))
    return join(archive([make_member(name, data) for name, data in [(HEADER_NAME, first), *members]]))


def make_member(name: str, data: bytes) -> Member:
    """A tar member with the header the format wants."""
    return Member(header=tar.header(name, len(data)), data=data, padding=bytes(-len(data) % tar.BLOCK))


def compress(content: bytes) -> bytes:
    """A zstd frame of this content, quickly."""
    return zstandard.ZstdCompressor(level=1).compress(content)


def decompress(block: bytes) -> bytes:
    """The content of a zstd frame."""
    return zstandard.ZstdDecompressor().decompress(block)


def _unframe(data: bytes) -> tuple[Map, bytes]:
    """The map of a frame and the bytes after it."""
    length = int.from_bytes(data[:4], "little")
    content: Map = msgpack.unpackb(decompress(data[8 : 8 + length]))
    return content, data[8 + length :]
