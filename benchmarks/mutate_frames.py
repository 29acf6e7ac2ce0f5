"""Mutations of the two frames of a shard, with right checksums: the header and what stands before the record blocks."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import msgpack

from benchmarks.mutants import Expectation, Mutant, a_name, changed_manifest, sealed_parts, sealed_shard
from benchmarks.mutate_zstd import ZSTD_FAULTS
from benchmarks.mutation_parts import (
    CLASSES,
    EPOCHS,
    FURTHER,
    IMAGES,
    LEVELS,
    PRIORS,
    Base,
    Draw,
    Map,
    frame,
    frame_of,
    seal,
)
from nrrdd_format.manifest import MANIFEST_NAME

_WRONG_NUMBERS = (-1, 2**31, 2**32, 2**53, 2**63, 2**64 - 1)

# ---- the two frames of a shard, with right checksums


def lie_in_shard_header(base: Base, draw: Draw) -> Mutant:
    """A count, size, checksum or name of the shard header is another one."""
    name = a_name(draw)
    what = draw.one(_HEADER_LIES)

    def change(content: Map) -> None:
        rows = content["members"]
        row = len(rows) - 1 if what == "crc32 of the records" else draw.below(IMAGES)
        if what in ("shard", "epochs"):
            content[what] = _other_number(content[what], draw)
        elif what == "size of the records":
            rows[-1][1] = _other_number(rows[-1][1], draw)
        elif what in ("size", "crc32", "crc32 of the records"):
            column = 1 if what == "size" else 2
            rows[row][column] = _other_number(rows[row][column], draw)
        elif what == "name":
            rows[draw.below(len(rows))][0] = draw.one(_WRONG_NAMES)
        elif what == "row gone":
            del rows[draw.below(len(rows))]
        elif what == "row again":
            rows.insert(draw.below(len(rows)), list(draw.one(rows)))
        elif what == "rows swapped":
            a, b = draw.two_of(len(rows))
            rows[a], rows[b] = rows[b], rows[a]
        else:
            rows[row][0] = f"{draw.below(10**7):07d}_c{draw.between(len(CLASSES), 99999):05d}.png"

    data = seal(base.parts[name], header=change)
    expectation: Expectation = "unseen" if what == "crc32 of the records" else "broken"
    return sealed_shard(base, name, data, expectation, f"shard header of {name}: {what}")


_HEADER_LIES = (
    "shard",
    "epochs",
    "size",
    "size of the records",
    "crc32",
    "crc32 of the records",  # a reader trusts the checksums of the blocks it reads
    "name",
    "row gone",
    "row again",
    "rows swapped",
    "label",
)
_WRONG_NAMES = (
    "",
    "__nrrdd__/header",
    "__nrrdd__/other",
    "0000000_c00000.exe",
    "../0000000_c00000.png",
    "/etc/passwd",
    "0000000_c00000.png\n",
    "0000000_c00000.png\0",
    "00000000_c00000.png",
    "٠٠٠٠٠٠٠_c00000.png",
    "9999999999_c00000.png",
    "0000000_c9999999.png",
    "x" * 101,
    "y" * 5000,
)


def lie_in_records_head(base: Base, draw: Draw) -> Mutant:
    """A count, size or checksum in front of the record blocks is another one."""
    name = a_name(draw)
    what = draw.one(("epochs", "pairs", "blocks", "crcs", "block gone", "block more", "sizes shifted", "crcs swapped"))

    def change(content: Map) -> None:
        at = draw.below(len(content["blocks"]))
        if what in ("epochs", "pairs"):
            content[what] = _other_number(content[what], draw)
        elif what in ("blocks", "crcs"):
            content[what][at] = _other_number(content[what][at], draw)
        elif what == "block gone":
            del content["blocks"][at], content["crcs"][at]
        elif what == "block more":
            content["blocks"].append(1)
            content["crcs"].append(0)
        elif what == "sizes shifted":
            move = draw.between(1, content["blocks"][0] - 1)
            content["blocks"] = [content["blocks"][0] - move, content["blocks"][1] + move]
        else:
            content["crcs"].reverse()

    data = seal(base.parts[name], head=change)
    return sealed_shard(base, name, data, "broken", f"records head of {name}: {what}")


def _other_number(old: int, draw: Draw) -> int:
    near = [old - 1, old + 1, old * 2 + 1, 0, 2**32 - 1, *_WRONG_NUMBERS]
    return draw.one([number for number in near if number != old])


def lie_in_priors(base: Base, draw: Draw) -> Mutant:
    """A prior is out of its range, too short or too long; or another one."""
    name = a_name(draw)
    head, count = deepcopy(base.parts[name].head), PRIORS[base.coding]
    if count is None:
        head |= {"prior_gaps": [0], "prior_levels": ["x"]}
        return _with_head(base, name, head, "harmless", "priors that the manifest does not promise")
    at = draw.below(IMAGES * count)
    key = draw.one(("prior_gaps", "prior_levels"))
    what = draw.one(("level", "class", "own class", "entries", "one key", "another level"))
    if what == "level":
        head["prior_levels"][at] = draw.one((LEVELS[base.coding], 256, *_WRONG_NUMBERS))
    elif what == "class":
        head["prior_gaps"][at] = draw.one((len(CLASSES), 2**17, *_WRONG_NUMBERS))
    elif what == "own class":
        image = at // count
        own = int(base.parts[name].images[image][0][9:14])
        gaps = [own] if count == 1 else [own, 0] if own < len(CLASSES) - 1 else [own - 1, 0]
        head["prior_gaps"][image * count : (image + 1) * count] = gaps
    elif what == "entries":
        head[key] = draw.one((head[key][:-1], [*head[key], 0], [], [head[key]]))
    elif what == "one key":
        del head[key]
    else:
        head["prior_levels"][at] = (head["prior_levels"][at] + 1) % LEVELS[base.coding]
    return _with_head(base, name, head, "open" if what == "another level" else "broken", what)


def _with_head(base: Base, name: str, head: Map, expectation: Expectation, what: str) -> Mutant:
    return sealed_parts(base, name, replace(base.parts[name], head=head), expectation, f"priors: {what}")


def promise_epochs(base: Base, draw: Draw) -> Mutant:
    """Manifest and shard agree on more epochs than the blocks hold, up to the limit."""
    name, epochs = a_name(draw), 65536 if draw.chance(20) else draw.one((4, 30, 300))
    old, longer = base.parts[name], {"epochs": epochs}
    contents = draw.one((old.contents, old.contents[:1], old.contents[:1] * 40))
    parts = replace(old, header=old.header | longer, head=old.head | longer, contents=contents)
    files = dict(sealed_parts(base, name, parts, "broken", "").files)
    content = json.loads(files[MANIFEST_NAME] or b"")
    content["records"].update(longer, block_epochs=draw.one((1, 2, epochs)))
    return Mutant(
        files={**files, MANIFEST_NAME: json.dumps(content).encode()},
        expectation="broken",
        what=f"{name}: {epochs} epochs in {len(contents)} blocks",
    )


_WRONG_VALUES: tuple[Any, ...] = (None, True, False, "1", "", b"1", 0.5, float("nan"), [], [1], {}, {"a": 1}, [[]])


def confuse_frame_types(base: Base, draw: Draw) -> Mutant:
    """A value of either frame is of another type, or missing."""
    name = a_name(draw)
    table = draw.one(("header", "head"))

    def change(content: Map) -> None:
        key = draw.one([key for key in content if key != "news"])
        value = content[key]
        if isinstance(value, list) and draw.chance(2):  # an entry, or a cell of a row
            at = draw.below(len(value))
            cells = value[at] if isinstance(value[at], list) and draw.chance(2) else value
            at = draw.below(len(cells))
            cells[at] = _of_another_type(cells[at], draw)
        elif draw.chance(4):
            del content[key]
        else:
            content[key] = _of_another_type(value, draw)

    data = seal(base.parts[name], **{table: change})  # type: ignore[arg-type]
    return sealed_shard(base, name, data, "broken", f"types in the {table} of {name}")


def _of_another_type(old: object, draw: Draw) -> object:
    return draw.one([value for value in _WRONG_VALUES if type(value) is not type(old)])


def hostile_msgpack(base: Base, draw: Draw) -> Mutant:
    """What a frame holds is not the msgpack it should be; its length and checksum are right."""
    what, make = draw.one(_HOSTILE)
    return _with_payload(base, draw, lambda payload: make(payload, draw), "broken", f"msgpack: {what}")


def _insert(payload: bytes, extra: bytes) -> bytes:
    """The map of up to 14 keys with one more entry."""
    return bytes([payload[0] + 1]) + payload[1:] + extra


def _key(value: bytes) -> Callable[[bytes, Draw], bytes]:
    return lambda payload, draw: _insert(payload, msgpack.packb("news") + value)


_HOSTILE: tuple[tuple[str, Callable[[bytes, Draw], bytes]], ...] = (
    ("empty", lambda p, d: b""),
    ("cut", lambda p, d: p[: d.below(len(p))]),
    ("more behind it", lambda p, d: p + d.data(d.between(1, 9))),
    ("another map behind it", lambda p, d: p + p),
    ("a list", lambda p, d: msgpack.packb(list(range(d.below(20))))),
    ("a number", lambda p, d: bytes([d.below(128)])),
    ("nothing", lambda p, d: b"\xc0"),
    ("a reserved byte", _key(b"\xc1")),
    ("an array of 2^32 - 1", _key(b"\xdd\xff\xff\xff\xff")),
    ("a map of 2^32 - 1", _key(b"\xdf\xff\xff\xff\xff")),
    ("a text of 2^32 - 1", _key(b"\xdb\xff\xff\xff\xff")),
    ("bytes of 2^32 - 1", _key(b"\xc6\xff\xff\xff\xff")),
    ("an extension of 2^32 - 1", _key(b"\xc9\xff\xff\xff\xff\x01")),
    ("an extension", _key(b"\xd4\x01\x00")),
    ("a timestamp", _key(b"\xd6\xff\x00\x00\x00\x01")),
    ("text that is not UTF-8", _key(b"\xa2\xc3\x28")),
    ("a surrogate in UTF-8", _key(b"\xa3\xed\xa0\x80")),
    ("a number as key", lambda p, d: _insert(p, b"\x01\x01")),
    ("a list as key", lambda p, d: _insert(p, b"\x90\x01")),
    ("a map as key", lambda p, d: _insert(p, b"\x80\x01")),
    ("a key that is not UTF-8", lambda p, d: _insert(p, b"\xa1\xff\x01")),
    ("a list 5000 deep", lambda p, d: _insert(p, msgpack.packb("news") + b"\x91" * 5000 + b"\x90")),
)


def odd_msgpack(base: Base, draw: Draw) -> Mutant:
    """What a frame holds is msgpack that a reader may take or leave: deep, very long, with repeated keys, random."""
    what = "long" if draw.chance(100) else draw.one(("deep", "deep in a value", "repeated", "random", "bits"))

    def change(payload: bytes) -> bytes:
        if what == "deep":
            return _insert(payload, msgpack.packb("news") + _deep(draw))
        if what == "deep in a value":
            key = draw.one(("epochs", "epochs", "shard", "pairs", "format", "members"))
            return _insert(payload, msgpack.packb(key) + _deep(draw))
        if what == "repeated":
            key = draw.one(("epochs", "shard", "pairs", "members", "version"))
            return _insert(payload, msgpack.packb(key) + msgpack.packb(draw.one((0, 1, EPOCHS, [1, 0], "x"))))
        if what == "long":
            return _insert(payload, msgpack.packb("news") + _long(draw))
        if what == "random":
            return draw.data(draw.between(1, 200))
        changed = bytearray(payload)
        changed[draw.below(len(changed))] ^= 1 << draw.below(8)
        return bytes(changed)

    return _with_payload(base, draw, change, "open", f"msgpack: {what}")


def _deep(draw: Draw) -> bytes:
    depth = draw.one((10, 100, draw.between(500, 520), draw.between(960, 1030), draw.between(960, 1030)))
    return draw.one((b"\x91", b"\x91", b"\x91", b"\x81\xa1a")) * depth + b"\x01"


def _long(draw: Draw) -> bytes:
    """A list of many small values, up to the limit of a frame; or lists in lists that each claim very many."""
    if draw.chance(4):
        return b"\xdd\x00\x04\x00\x00" * draw.between(100, 1000)
    value = draw.one((b"\x90", b"\x80", b"\xc0", b"\xa2ab", b"\xcd\xff\xff", b"\xcb" + bytes(8), b"\x91\x90"))
    count = draw.one((10_000, 200_000, 260_000))
    one = b"\xdd" + count.to_bytes(4, "big") + value * count
    lists = min(draw.one((1, 8, 60)), (2**23 - 1000) // len(one))
    return b"\xdc" + lists.to_bytes(2, "big") + one * lists


def lie_in_frame(base: Base, draw: Draw) -> Mutant:
    """A frame's length or checksum is another one; everything around it is right."""

    def change(payload: bytes) -> bytes:
        whole = frame(payload)
        length, crc = struct.unpack_from("<II", whole)
        if draw.chance(2):
            length = draw.one([n for n in (0, length - 1, length + 1, 2**24, 2**24 + 1, 2**32 - 1) if n != length])
        else:
            crc ^= 1 << draw.below(32)
        return struct.pack("<II", length, crc) + whole[8:]

    return _with_frame(base, draw, change, "broken", "frame length or checksum")


def blow_up_frame(base: Base, draw: Draw) -> Mutant:
    """A frame's payload is a zstd bomb, or no single zstd frame of just its msgpack."""
    what = draw.one(tuple(ZSTD_FAULTS))
    return _with_frame(base, draw, lambda packed: frame_of(ZSTD_FAULTS[what](packed, draw)), "broken", f"zstd: {what}")


def stretch_header(base: Base, draw: Draw) -> Mutant:
    """Bytes behind a frame that should fill its member, or in front of the blocks."""
    extra = draw.one((bytes(1), bytes(8), draw.data(draw.between(1, 600))))
    return _with_frame(
        base, draw, lambda payload: frame(payload) + extra, "broken", f"{len(extra)} bytes after a frame"
    )


def _with_payload(
    base: Base, draw: Draw, change: Callable[[bytes], bytes], expectation: Expectation, what: str
) -> Mutant:
    return _with_frame(base, draw, lambda payload: frame(change(payload)), expectation, what)


def _with_frame(
    base: Base, draw: Draw, change: Callable[[bytes], bytes], expectation: Expectation, what: str
) -> Mutant:
    """The shard with another frame in its header or in front of its records."""
    name = a_name(draw)
    which = draw.one(("header_frame", "head_frame"))
    data = seal(base.parts[name], **{which: change})  # type: ignore[arg-type]
    return sealed_shard(base, name, data, expectation, f"{which} of {name}: {what}")


# ---- versions and unknown keys


def future_major_version(base: Base, draw: Draw) -> Mutant:
    """A major version this reader does not know, or no version at all."""
    version: object = draw.one(
        ([3, 0], [0, 9], [2**31, 0], [-1, 0], [1], [1, 0, 0], "1.0", 1, None, [1.0, 0], [True, 0], {})
    )
    if draw.chance(2):
        return changed_manifest(base, lambda content: content.update(version=version), "broken", f"version {version}")
    name = a_name(draw)
    parts = replace(base.parts[name], header=base.parts[name].header | {"version": version})
    return sealed_parts(base, name, parts, "broken", f"version {version}")


def future_minor_version(base: Base, draw: Draw) -> Mutant:
    """A higher minor version with keys of its own."""
    version, news = [2, draw.between(1, 2**31)], draw.one((1, "x", [1, 2], {"a": None}, 0.5))
    if draw.chance(2):
        return changed_manifest(
            base, lambda content: content.update(version=version, news=news), "harmless", "minor version"
        )
    name = a_name(draw)
    parts = base.parts[name]
    version[0] = 1 if FURTHER[base.coding] is None else 2  # a shard header's has to fit
    header, head = parts.header | {"version": version, "news": news}, parts.head | {"news": news}
    return sealed_parts(base, name, replace(parts, header=header, head=head), "harmless", "minor version")


def past_major_version(base: Base, draw: Draw) -> Mutant:
    """A manifest states version 1, whose readers know no further classes."""
    expectation: Expectation = "harmless" if FURTHER[base.coding] is None else "broken"
    version = [1, draw.one((0, 1, 2**31))]
    return changed_manifest(base, lambda content: content.update(version=version), expectation, f"version {version}")


KINDS = (
    lie_in_shard_header,
    lie_in_records_head,
    lie_in_priors,
    promise_epochs,
    confuse_frame_types,
    hostile_msgpack,
    odd_msgpack,
    lie_in_frame,
    blow_up_frame,
    stretch_header,
    future_major_version,
    future_minor_version,
    past_major_version,
)
