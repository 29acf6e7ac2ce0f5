"""The two frames inside a shard: its header (member table) and its record member's head (block table)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nrrdd_format import tar
from nrrdd_format.errors import FormatError, shown
from nrrdd_format.frames import list_in, pack_frame, unpack_frame
from nrrdd_format.limits import (
    MAX_EPOCHS,
    MAX_IMAGE_BYTES,
    MAX_IMAGES,
    MAX_INDEX,
    MAX_MEMBER_BYTES,
    MAX_SHARDS,
)
from nrrdd_format.pairs import RecordLayout
from nrrdd_format.priors import Priors
from nrrdd_format.records import block_count, epochs_in_block, max_block_bytes
from nrrdd_format.versions import Version, check_version

FORMAT = "nrrdd-shard"
HEADER_NAME = "__nrrdd__/header"
RECORDS_NAME = "__nrrdd__/records"
EXTENSIONS = ("jpg", "png", "webp")
_IMAGE_NAME = re.compile(rf"([0-9]{{7}}|[1-9][0-9]{{7,9}})_c([0-9]{{5}}|[1-9][0-9]{{5,6}})\.({'|'.join(EXTENSIONS)})")


class Member(NamedTuple):
    """One row of the member table."""

    name: str
    size: int
    crc32: int


def pack_header(*, version: Version, shard: int, epochs: int, members: Sequence[Member]) -> bytes:
    """The content of the header member, for readers of this version and later ones."""
    rows = [[m.name, m.size, m.crc32] for m in members]
    content = {"format": FORMAT, "version": list(version), "shard": shard, "epochs": epochs}
    return pack_frame({**content, "members": rows})


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardHeader:
    """A checked shard header. `members` are the images in order, then the record member."""

    shard: int
    epochs: int
    members: tuple[Member, ...]
    indices: NDArray[np.int64]  # (n,) the images' numbers in the dataset
    labels: NDArray[np.int64]  # (n,) their classes
    major: int  # version

    @property
    def images(self) -> int:
        """n, the number of image members."""
        return len(self.members) - 1

    @classmethod
    def parse(cls, data: bytes) -> ShardHeader:
        """Check and read the content of the header member. Raises FormatError."""
        content = unpack_frame(data)
        if content.get("format") != FORMAT:
            raise FormatError(f"format is {shown(content.get('format'))}, expected {FORMAT!r}")
        check_version(content.get("version"))
        rows = list_in(content, "members", 3, MAX_IMAGES + 1)
        images = [_member(row, None, MAX_IMAGE_BYTES) for row in rows[:-1]]
        names = [parse_image_name(member.name) for member in images]
        indices = np.array([name.number for name in names], np.int64)
        _check_images(indices, {name.extension for name in names})
        return cls(
            shard=bounded(content.get("shard"), "shard", 0, MAX_SHARDS - 1),
            epochs=bounded(content.get("epochs"), "epochs", 1, MAX_EPOCHS),
            members=(*images, _member(rows[-1], RECORDS_NAME, MAX_MEMBER_BYTES)),
            indices=indices,
            labels=np.array([name.label for name in names], np.int64),
            major=content["version"][0],
        )

    def offsets(self, start: int) -> NDArray[np.int64]:
        """File offsets of the members' tar headers, then of the end marker; `start` is that of the first."""
        rooms = [tar.BLOCK + tar.padded(m.size) for m in self.members]
        return start + np.concatenate([[0], np.cumsum(rooms)]).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class RecordsHead:
    """What stands in front of the record blocks: their table, and the priors of the shard's images."""

    epochs: int
    pairs: int
    blocks: tuple[int, ...]  # bytes of each block
    crcs: tuple[int, ...]
    priors: Priors | None = None

    def pack(self) -> bytes:
        """The bytes in front of the first block."""
        content = {"epochs": self.epochs, "pairs": self.pairs}
        priors = {} if self.priors is None else self.priors.pack()
        return pack_frame({**content, "blocks": list(self.blocks), "crcs": list(self.crcs), **priors})

    @classmethod
    def parse(cls, data: bytes, layout: RecordLayout, *, epochs: int) -> RecordsHead:
        """Check and read the head against what the shard header and the layout promise."""
        content = unpack_frame(data)
        pairs, blocks = layout.pairs, block_count(layout, epochs)
        full, last = (max_block_bytes(layout, epochs_in_block(layout, b, epochs)) for b in (0, blocks - 1))
        bounded(content.get("epochs"), "epochs", epochs, epochs)
        bounded(content.get("pairs"), "pairs", pairs, pairs)
        stated = zip(list_in(content, "blocks", blocks, blocks), [full] * (blocks - 1) + [last], strict=True)
        sizes = [bounded(size, "block size", 1, most) for size, most in stated]
        crcs = [bounded(c, "block crc32", 0, 2**32 - 1) for c in list_in(content, "crcs", blocks, blocks)]
        return cls(
            epochs=epochs, pairs=pairs, blocks=tuple(sizes), crcs=tuple(crcs), priors=_read_priors(content, layout)
        )


def image_name(index: int, label: int, extension: str) -> str:
    """Member name of an image: its number in the dataset and its class."""
    return f"{index:07d}_c{label:05d}.{extension}"


class ImageName(NamedTuple):
    """What the name of an image member says."""

    number: int  # of the image in the dataset
    label: int
    extension: str


def parse_image_name(name: str) -> ImageName:
    """Reads the name of an image member. Raises FormatError for a name of another form."""
    match = _IMAGE_NAME.fullmatch(name)
    if match is None:
        raise FormatError(f"member name {shown(name)}, expected <7-digit index>_c<5-digit label>.<jpg|png|webp>")
    return ImageName(int(match[1]), int(match[2]), match[3])


def _read_priors(content: dict[str, Any], layout: RecordLayout) -> Priors | None:
    if layout.priors is None:
        return None
    return Priors.unpack(
        content, images=layout.images, count=layout.priors, classes=layout.classes, levels=len(layout.levels)
    )


def bounded(value: object, name: str, low: int, high: int) -> int:
    """`value` if it is an integer in [low, high]; FormatError otherwise."""
    if type(value) is not int or not low <= value <= high:
        expected = str(low) if low == high else f"{low}..{high}"
        raise FormatError(f"{name} is {shown(value)}, expected {expected}")
    return value


def _member(row: object, name: str | None, limit: int) -> Member:
    if not isinstance(row, list) or len(row) != 3 or not isinstance(row[0], str):
        raise FormatError(f"member table row {shown(row)}, expected [name, size, crc32]")
    if name is not None and row[0] != name:
        raise FormatError(f"last member is {shown(row[0])}, expected {name!r}")
    try:
        size, crc = bounded(row[1], "size", 1, limit), bounded(row[2], "crc32", 0, 2**32 - 1)
    except FormatError as error:
        raise FormatError(f"member {shown(row[0])}: {error.reason}") from None
    return Member(name=row[0], size=size, crc32=crc)


def _check_images(indices: NDArray[np.int64], extensions: set[str]) -> None:
    """Images have distinct numbers and one extension, or a stock WebDataset reader would mix them up."""
    bounded(int(indices.max()), "image index", 0, MAX_INDEX - 1)
    numbers, times = np.unique(indices, return_counts=True)
    if len(numbers) < len(indices):
        most = int(times.argmax())
        raise FormatError(f"image {numbers[most]} appears {times[most]} times, expected once")
    if len(extensions) > 1:
        raise FormatError(f"image members have the extensions {sorted(extensions)}, expected one")
