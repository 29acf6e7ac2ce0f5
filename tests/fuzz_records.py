"""Coverage-guided fuzzing of all that reads untrusted bytes: manifests, frames, record blocks, images.

    python tests/fuzz_records.py CORPUS -max_total_time=300 -max_len=4096

CORPUS is a folder; good inputs are put into an empty one. The options are libFuzzer's. Needs the extra `fuzz`.

An input's first byte chooses the target. FormatError is what bad bytes are for; anything else is a crash, whose input
libFuzzer leaves in `crash-…` (`python tests/fuzz_records.py crash-…` repeats it). Checksums and compression are put
around the input here, since no fuzzer would find them. A block that decodes must encode to the same content.
"""

from __future__ import annotations

import io
import sys
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import atheris  # type: ignore[import-not-found, import-untyped, unused-ignore]

with atheris.instrument_imports(include=["nrrdd_format"]):
    import numpy as np
    import zstandard
    from PIL import Image
    from tiny_dataset import tiny_images, tiny_manifest

    from nrrdd_format.codebooks import MixTable, distance_levels, mix_codebook, view_codebook
    from nrrdd_format.compression import decompress, stated_size
    from nrrdd_format.errors import FormatError
    from nrrdd_format.frames import PREFIX, unpack_frame
    from nrrdd_format.image_file import check_image
    from nrrdd_format.manifest import Codec, Manifest
    from nrrdd_format.pairs import Coding, PairRecords, RecordLayout
    from nrrdd_format.priors import Priors
    from nrrdd_format.records import content_bytes, encode_block, open_block
    from nrrdd_format.shard_header import RECORDS_NAME, Member, RecordsHead, ShardHeader, pack_header

SIZE, IMAGES, EPOCHS, BLOCK_EPOCHS = 8, 5, 3, 2


def layout_of(coding: Coding) -> RecordLayout:
    """A small layout whose fields can all be out of range."""
    verbatim = coding == "verbatim"
    return RecordLayout(
        images=IMAGES,
        pairs=IMAGES - 1 if verbatim else IMAGES,
        classes=4,
        size=SIZE,
        cycle=2,
        mix_group=2,
        block_epochs=BLOCK_EPOCHS,
        flip=True,
        coding=coding,
        seed=11,
        views=None if verbatim else view_codebook(5, SIZE, (0.3, 1.0), count=6),
        mixes=None if verbatim else MixTable.from_entries(mix_codebook(5, SIZE, "both", count=5), SIZE),
        levels=distance_levels(20 if coding == "derived" else 12),
        priors=2 if coding == "explicit" else None,
        further={"explicit": None, "derived": 1, "verbatim": 2}[coding],
    )


# ---- targets


def read_manifest(data: bytes) -> None:
    """Decodes a manifest; one that is accepted has an id and layouts, and can be written again."""
    manifest = Manifest.decode(data)
    for shard in range(len(manifest.shards)):
        manifest.layout(shard)
    if Manifest.decode(manifest.encode()).dataset_id != manifest.dataset_id:
        raise AssertionError("a manifest written again has another id")


def in_frame(parse: Callable[[bytes], object], packed: bytes) -> None:
    """Parses the frame of some msgpack."""
    payload = zstandard.ZstdCompressor(level=1).compress(packed)
    parse(PREFIX.pack(len(payload), zlib.crc32(payload)) + payload)


def read_block(layout: RecordLayout, data: bytes) -> list[PairRecords]:
    """Decodes block 0 as it is."""
    block = open_block(data, layout, shard=0, number=0, epochs=EPOCHS)
    return [block.epoch(epoch) for epoch in range(BLOCK_EPOCHS)]


def read_content(layout: RecordLayout, data: bytes) -> None:
    """Decodes the block of this content, cut or filled to its size."""
    length = content_bytes(layout, BLOCK_EPOCHS)
    content = data[:length].ljust(length, b"\0")
    records = read_block(layout, zstandard.ZstdCompressor(level=1).compress(content))
    again = decompress(encode_block(records, layout, shard=0, first_epoch=0), length, "block")
    if again != content:
        raise AssertionError(f"{layout.coding}: {content.hex()} was read as {again.hex()}")


LAYOUTS = [layout_of(coding) for coding in get_args(Coding)]
TARGETS: list[Callable[[bytes], object]] = [
    read_manifest,
    unpack_frame,
    partial(in_frame, unpack_frame),
    partial(in_frame, ShardHeader.parse),
    partial(in_frame, partial(RecordsHead.parse, layout=LAYOUTS[0], epochs=EPOCHS)),
    *(partial(read_block, layout) for layout in LAYOUTS),
    *(partial(read_content, layout) for layout in LAYOUTS),
    *(partial(check_image, codec=codec, size=SIZE) for codec in get_args(Codec)),
]


def test_one_input(data: bytes) -> None:
    """What libFuzzer calls."""
    try:
        TARGETS[data[0] % len(TARGETS) if data else 0](data[1:])
    except FormatError as error:
        message = str(error)
        if "\n" in message or len(message) > 4096:
            raise AssertionError(f"a message of {len(message)} characters: {message:.200}") from error
        message.encode()


# ---- good inputs, one for each target in their order


def good_inputs() -> Iterator[bytes]:
    """Inputs that are read without complaint."""
    member = Member(name=RECORDS_NAME, size=100, crc32=1)
    images = tuple(Member(name=f"{i:07d}_c00000.png", size=90, crc32=i) for i in range(IMAGES))
    header = pack_header(version=(1, 1), shard=0, epochs=EPOCHS, members=(*images, member))
    priors = Priors(classes=np.tile([1, 3], (IMAGES, 1)), levels=np.zeros((IMAGES, 2), np.uint8))
    head = RecordsHead(epochs=EPOCHS, pairs=IMAGES, blocks=(20, 10), crcs=(1, 2), priors=priors).pack()
    yield tiny_manifest().encode()
    yield header
    yield from map(content_of, (header, header, head))
    contents = [bytes(content_bytes(layout, BLOCK_EPOCHS)) for layout in LAYOUTS]
    yield from map(zstandard.ZstdCompressor(level=1).compress, contents)
    yield from contents
    yield from map(picture, get_args(Codec))


def content_of(frame: bytes) -> bytes:
    """The msgpack of a frame."""
    payload = frame[PREFIX.size :]
    return decompress(payload, stated_size(payload, "frame"), "frame")


def picture(codec: Codec) -> bytes:
    """A small image."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(tiny_images(1, 1)[0].data)).resize((SIZE, SIZE)).save(buffer, format=codec)
    return buffer.getvalue()


def fill(corpus: Path) -> None:
    """Puts the good inputs into an empty corpus."""
    corpus.mkdir(parents=True, exist_ok=True)
    if not any(corpus.iterdir()):
        for number, data in enumerate(good_inputs()):
            (corpus / f"good-{number:02d}").write_bytes(bytes([number]) + data)


if __name__ == "__main__":
    folders = [Path(text) for text in sys.argv[1:2] if not text.startswith("-") and not Path(text).is_file()]
    for folder in folders:
        fill(folder)
    atheris.Setup(sys.argv, test_one_input)
    atheris.Fuzz()
