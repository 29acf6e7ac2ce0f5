"""Mutations of images, their names and record blocks, with right checksums."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import replace

from benchmarks.mutants import Expectation, Mutant, a_block, a_name, sealed_parts, with_block, with_content
from benchmarks.mutate_zstd import ZSTD_FAULTS, zstd_frame
from benchmarks.mutation_parts import (
    BLOCK_EPOCHS,
    CLASSES,
    CYCLE,
    EPOCHS,
    FURTHER,
    IMAGES,
    LEVELS,
    MIX_GROUP,
    MIXES,
    SHARDS,
    SIZE,
    VERBATIM_PAIRS,
    VIEWS,
    Base,
    Draw,
    picture,
)
from nrrdd_format.shards import shard_name

# ---- images and names, with right checksums


def break_image(base: Base, draw: Draw) -> Mutant:
    """A member is no image of the manifest's codec and size; every checksum is right."""
    bomb = bytearray(picture(0))
    bomb[16:24] = struct.pack(">II", *draw.one(((65535, 65535), (2**31 - 1, 2**31 - 1), (SIZE, 2**20), (0, SIZE))))
    whole = picture(draw.below(50))
    data = draw.one(
        (
            b"x",
            b"text",
            draw.data(draw.between(1, 300)),
            whole[: draw.between(1, len(whole) - 1)],
            whole + draw.data(draw.between(1, 9)),
            picture(0, side=draw.one((1, SIZE - 1, SIZE + 1, 64))),
            picture(0, codec=draw.one(("JPEG", "GIF", "BMP", "WEBP"))),
            bytes(bomb),
        )
    )
    return _with_image(base, draw, data, "unseen", "no whole image")


def change_image(base: Base, draw: Draw) -> Mutant:
    """The bytes of an image are others, which may make an image or not; every checksum is right."""
    name = a_name(draw)
    _, old = base.parts[name].images[draw.below(IMAGES)]
    changed = bytearray(old)
    for _ in range(draw.between(1, 4)):
        changed[draw.below(len(changed))] ^= 1 << draw.below(8)
    data = draw.one((bytes(changed), picture(draw.below(50))))
    return _with_image(base, draw, data, "open", "other image bytes")


def _with_image(base: Base, draw: Draw, data: bytes, expectation: Expectation, what: str) -> Mutant:
    name, at = a_name(draw), draw.below(IMAGES)
    images = list(base.parts[name].images)
    images[at] = (images[at][0], data)
    return sealed_parts(base, name, replace(base.parts[name], images=tuple(images)), expectation, f"image {at}: {what}")


def rename_image(base: Base, draw: Draw) -> Mutant:
    """An image has another number or class, in the member table and its tar header alike."""
    name, at = a_name(draw), draw.below(IMAGES)
    images = list(base.parts[name].images)
    index, label = int(images[at][0][:7]), int(images[at][0][9:14])
    numbers = [int(other[:7]) for other, _ in images]
    foreign = [n for n in range(SHARDS * IMAGES) if n not in numbers]
    what, expectation, new = draw.one(
        (
            ("fresh number", "open", f"{draw.between(SHARDS * IMAGES, 10**9 - 1):07d}_c{label:05d}.png"),
            ("another class", "open", f"{index:07d}_c{draw.below(len(CLASSES)):05d}.png"),
            ("unknown class", "broken", f"{index:07d}_c{draw.between(len(CLASSES), 9999999):05d}.png"),
            ("number of this shard", "broken", f"{numbers[(at + 1) % IMAGES]:07d}_c{label:05d}.png"),
            ("number of the other shard", "unseen", f"{draw.one(foreign):07d}_c{label:05d}.png"),
            ("too high a number", "broken", f"{draw.between(10**9, 10**10 - 1)}_c{label:05d}.png"),
            ("another extension", "broken", f"{index:07d}_c{label:05d}.jpg"),
            ("another form", "broken", draw.one(("a.png", f"{index:08d}_c{label:05d}.png", f"{index}_c{label}.png"))),
        )
    )
    images[at] = (new, images[at][1])
    parts = replace(base.parts[name], images=tuple(images))
    return sealed_parts(base, name, parts, expectation, f"image {at}: {what}")  # type: ignore[arg-type]


def rearrange_images(base: Base, draw: Draw) -> Mutant:
    """Images change places, are missing or occur again, and the shard says so everywhere."""
    name = a_name(draw)
    images = list(base.parts[name].images)
    a, b = draw.two_of(IMAGES)
    what = draw.one(("swapped", "deleted", "again"))
    expectation: Expectation = "open" if what == "swapped" else "broken"
    if what == "swapped":
        images[a], images[b] = images[b], images[a]
    elif what == "deleted":
        del images[a]
    else:
        images.insert(b, (draw.one((images[a][0], "0000999_c00000.png")), images[a][1]))
    return sealed_parts(base, name, replace(base.parts[name], images=tuple(images)), expectation, f"images {what}")


# ---- record blocks, with right checksums


def change_block_content(base: Base, draw: Draw) -> Mutant:
    """Bits of a block's content; what they say may be in range or not."""
    name, block, content = a_block(base, draw)
    changed = bytearray(content)
    if draw.chance(4):
        at = draw.below(len(changed))
        changed[at:] = draw.data(len(changed) - at)
    else:
        for _ in range(draw.between(1, 6)):
            changed[draw.below(len(changed))] ^= 1 << draw.below(8)
    return with_content(base, name, block, bytes(changed), "open", "bits of the content")


def leave_range(base: Base, draw: Draw) -> Mutant:
    """A field of a block is out of its range."""
    name, block, content = a_block(base, draw)
    what, changed = draw.one(list(_out_of_range(base.coding, content, draw)))
    return with_content(base, name, block, changed, "broken", what)


def _out_of_range(coding: str, content: bytes, draw: Draw) -> Iterator[tuple[str, bytes]]:
    """Contents that break one rule each."""
    fields = {"explicit": _explicit_fields, "verbatim": _verbatim_fields, "derived": list}[coding]()
    width = (sum(width for _, width, _ in fields) + 7) // 8
    pairs = VERBATIM_PAIRS if coding == "verbatim" else IMAGES
    level_bytes, further = 1 if LEVELS[coding] <= 16 else 2, FURTHER[coding] or 0
    epochs = len(content) // (width + pairs * (level_bytes + 2 * further))
    first = draw.below(epochs) * width * 8
    levels = range(epochs * width, epochs * (width + pairs * level_bytes))
    high = LEVELS[coding] ** 2 if LEVELS[coding] <= 16 else LEVELS[coding]
    at = draw.one(levels)
    yield "level", content[:at] + bytes([draw.between(high, 255)]) + content[at + 1 :]
    if coding == "derived":
        return
    starts = [sum(w for _, w, _ in fields[:i]) for i in range(len(fields))]
    outside = [i for i, (_, bits, limit) in enumerate(fields) if limit < 1 << bits]
    i = draw.one(outside)
    yield (
        fields[i][0],
        _put_bits(content, first + starts[i], fields[i][1], draw.between(fields[i][2], 2 ** fields[i][1] - 1)),
    )
    used = starts[-1] + fields[-1][1]
    yield (
        "padding bits",
        _put_bits(content, first + used, 8 * width - used, draw.between(1, 2 ** (8 * width - used) - 1)),
    )
    if coding == "verbatim":
        yield from _verbatim_faults(content, first, [name for name, _, _ in fields], starts, draw)


def _explicit_fields() -> list[tuple[str, int, int]]:
    """Name, width in bits and limit of each packed field of an epoch."""
    groups = -(-IMAGES // MIX_GROUP)
    counts = [*(("order", IMAGES - i) for i in range(IMAGES)), *[("view", VIEWS)] * IMAGES]
    fields = [(name, (count - 1).bit_length(), count) for name, count in counts]
    return [*fields, *[("flip", 1, 2)] * IMAGES, *[("mix", (MIXES - 1).bit_length(), MIXES)] * groups]


def _verbatim_fields() -> list[tuple[str, int, int]]:
    """The same; boxes and λ have rules of their own."""
    side = (SIZE - 1).bit_length()
    images = [("image", (IMAGES - 1).bit_length(), IMAGES)] * VERBATIM_PAIRS
    cycles = [CYCLE] * (VERBATIM_PAIRS // CYCLE) + [VERBATIM_PAIRS % CYCLE]
    partners = [("partner", (length - 1).bit_length(), length) for length in cycles for _ in range(length)]
    views = [("view", side, SIZE)] * 4 * VERBATIM_PAIRS
    mix = [("is cutmix", 1, 2), *[("box", side, SIZE)] * 4, ("lam", 16, 2**16), ("lam", 16, 2**16)]
    groups = -(-VERBATIM_PAIRS // MIX_GROUP)
    return [*images, *partners, *views, *[("flip", 1, 2)] * VERBATIM_PAIRS, *mix * groups]


def _verbatim_faults(
    content: bytes, first: int, names: list[str], starts: list[int], draw: Draw
) -> Iterator[tuple[str, bytes]]:
    def place(name: str, number: int) -> int:
        return first + starts[names.index(name) + number]

    a, b = draw.two_of(VERBATIM_PAIRS)
    image_bits = (IMAGES - 1).bit_length()
    twice = _get_bits(content, place("image", a), image_bits)
    yield "an image named twice", _put_bits(content, place("image", b), image_bits, twice)
    side, axis = (SIZE - 1).bit_length(), draw.below(2)
    view = place("view", 4 * draw.below(VERBATIM_PAIRS))
    outside = _put_bits(content, view + axis * side, side, SIZE - 1)
    yield "a view outside the image", _put_bits(outside, view + (2 + axis) * side, side, draw.between(1, SIZE - 1))
    mix = place("is cutmix", 7 * draw.below(VERBATIM_PAIRS // MIX_GROUP))
    lam = draw.one((float("nan"), float("inf"), -float("inf"), -0.25, 1.0000001, 2.0, 3e38, -3e38))
    raw = int.from_bytes(struct.pack("<f", lam), "little") | (draw.below(2) << 31 if lam != lam else 0)
    yield f"lam {lam}", _put_bits(content, mix + 1 + 4 * side, 32, raw)
    cut = _put_bits(_put_bits(content, mix, 1, 1), mix + 1 + axis * side, side, SIZE - 1)
    yield "a CutMix box outside the image", _put_bits(cut, mix + 1 + (2 + axis) * side, side, draw.between(1, SIZE - 1))
    mixup = _put_bits(content, mix, 1, 0)
    yield "a Mixup with a box", _put_bits(mixup, mix + 1, 4 * side, draw.between(1, 2 ** (4 * side) - 1))


def lie_in_further(base: Base, draw: Draw) -> Mutant:
    """A further class or its level breaks a rule; or there are columns where the manifest promises none."""
    name, block, content = a_block(base, draw)
    count = FURTHER[base.coding]
    if count is None:
        longer = content + bytes(2 * len(content))
        return with_content(base, name, block, longer, "broken", "further classes that the manifest does not promise")
    pairs = VERBATIM_PAIRS if base.coding == "verbatim" else IMAGES
    row = pairs * (BLOCK_EPOCHS if block == 0 else EPOCHS - BLOCK_EPOCHS)
    columns = bytearray(content[-2 * count * row :])  # all classes, a row for each of the x, then all levels
    at, half = draw.below(count * row), count * row
    what = draw.one(("class", "level", "own class", "twice", "falling"))
    if what in ("own class", "twice", "falling") and base.coding != "verbatim":  # where x is 1 and no image is stored
        what = draw.one(("class", "level"))
    if what == "class":
        columns[at] = draw.between(len(CLASSES), 255)
    elif what == "level":
        columns[half + at] = draw.between(LEVELS[base.coding], 255)
    elif what == "own class":
        bits = (IMAGES - 1).bit_length()
        org = _get_bits(content, (at % pairs) * bits, bits)
        columns[at % pairs], columns[row + at % pairs] = _with_own(int(base.parts[name].images[org][0][9:14]), draw)
    elif what == "twice":
        columns[at] = columns[(at + row) % half]
    else:
        columns[half + at % row] = draw.between(1, LEVELS[base.coding] - 1)
        columns[half + row + at % row] = draw.below(columns[half + at % row])
    changed = content[: -len(columns)] + bytes(columns)
    return with_content(base, name, block, changed, "broken", f"further classes: {what}")


def _with_own(own: int, draw: Draw) -> tuple[int, int]:
    """Two different classes, one of them this one, in either order."""
    other = (own + draw.between(1, len(CLASSES) - 1)) % len(CLASSES)
    return draw.one(((own, other), (other, own)))


def _put_bits(content: bytes, start: int, width: int, value: int) -> bytes:
    """The bytes with another value in a field; a field's lowest bit comes first."""
    number = int.from_bytes(content, "little")
    number = number & ~(((1 << width) - 1) << start) | value << start
    return number.to_bytes(len(content), "little")


def _get_bits(content: bytes, start: int, width: int) -> int:
    return int.from_bytes(content, "little") >> start & ((1 << width) - 1)


def blow_up_block(base: Base, draw: Draw) -> Mutant:
    """A block that is a zstd bomb, or no single frame of exactly the right content."""
    name, block, content = a_block(base, draw)
    what = draw.one(tuple(ZSTD_FAULTS))
    data = ZSTD_FAULTS[what](content, draw)
    return with_block(base, name, block, data, "broken", f"zstd: {what}")


def compress_otherwise(base: Base, draw: Draw) -> Mutant:
    """A block coded in another way that says the same."""
    name, block, content = a_block(base, draw)
    half = draw.between(1, len(content) - 1)
    data = draw.one(
        (
            zstd_frame(len(content), [(0, content)]),
            zstd_frame(len(content), [(0, content[:half]), (0, content[half:])]),
            zstd_frame(len(content), [(1, content[i : i + 1]) for i in range(len(content))]),
            zstd_frame(len(content), [(0, content)], window=0x58),
        )
    )
    return with_block(base, name, block, data, "harmless", "another coding of the same content")


def rearrange_blocks(base: Base, draw: Draw) -> Mutant:
    """Blocks change places or come from the other shard, and the table in front says so."""
    name, other = draw.one(((shard_name(0), shard_name(1)), (shard_name(1), shard_name(0))))
    mine, theirs = base.parts[name].contents, base.parts[other].contents
    contents = draw.one((mine[::-1], theirs, (mine[0], theirs[1]), (mine[0], mine[0]), mine[:1], (*mine, mine[1])))
    return sealed_parts(base, name, replace(base.parts[name], contents=contents), "open", "blocks rearranged")


KINDS = (
    break_image,
    change_image,
    rename_image,
    rearrange_images,
    change_block_content,
    leave_range,
    lie_in_further,
    blow_up_block,
    compress_otherwise,
    rearrange_blocks,
)
