"""Every rule of SPEC.md, [R1] to the last, has inputs that break it, and each of them is refused for the right reason.

`BROKEN` holds, by rule, datasets that break it, each made from a good one; `BEYOND_LIMITS` the same by row of the table
of limits. Rules for writers and builders have tests of their own, named in `OWN_TESTS`. The last tests compare all of
it with SPEC.md: a rule, limit or manifest key without a test fails, and so does a test of one that is not there.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from trap import Trap

from benchmarks.mutants import changed_manifest, manifest_bytes, sealed_shard
from benchmarks.mutate_zstd import zstd_frame
from benchmarks.mutation_check import read
from benchmarks.mutation_parts import (
    CLASSES,
    IMAGES,
    SIZE,
    Base,
    Map,
    Member,
    Parts,
    compress,
    frame,
    frame_of,
    make_bases,
    picture,
    seal,
)
from nrrdd_format import draws
from nrrdd_format.errors import ConfigError, FormatError, OutputError
from nrrdd_format.manifest import MANIFEST_NAME, Manifest
from nrrdd_format.pairs import Coding, draw_pairs
from nrrdd_format.records import encode_block
from nrrdd_format.replay import PairTensors, replay
from nrrdd_format.shards import EncodedImage, write_shard
from nrrdd_format.verify import verify_dataset

NAME = "shard-00000.tar"
Files = Mapping[str, bytes | None]
Break = Callable[[Base], Files]
"""Gives the files that differ from a good dataset's."""


@dataclass(frozen=True)
class Broken:
    """A dataset that breaks a rule."""

    what: str
    files: Break
    message: str  # a pattern in what is said
    coding: Coding = "explicit"
    seen: bool = True  # by every reader; else by verify alone


# ---- how a good dataset is broken


def manifest(*path: str | int, value: object) -> Break:
    """The value at a path of the manifest is another."""

    def change(content: Any) -> None:
        for step in path[:-1]:
            content = content[step]
        content[path[-1]] = value

    return stated(change)


def stated(change: Callable[[Map], object]) -> Break:
    """The manifest is changed."""
    return lambda base: changed_manifest(base, change, "broken", "").files


def text(change: Callable[[bytes], bytes]) -> Break:
    """The bytes of the manifest are others."""
    return lambda base: manifest_bytes(change(base.files[MANIFEST_NAME]), "broken", "").files


def sealed(**changes: Callable[[Any], Any]) -> Break:
    """Something in shard 0 is other than it should be (see `seal`), and all checksums above it are right."""
    return lambda base: with_shard(base, seal(base.parts[NAME], **changes))


def parts(change: Callable[[Parts], Parts]) -> Break:
    """The parts of shard 0 are others, everything around them is right."""
    return lambda base: with_shard(base, seal(change(base.parts[NAME])))


def raw(change: Callable[[bytes], bytes]) -> Break:
    """The bytes of shard 0 are others, the manifest has their sha256 and size."""
    return lambda base: with_shard(base, change(base.files[NAME]))


def with_shard(base: Base, data: bytes) -> Files:
    """Shard 0 of these bytes, and a manifest that agrees."""
    return sealed_shard(base, NAME, data, "broken", "").files


def field(name: str, value: object) -> Callable[[Map], None]:
    """A change of a frame's map."""
    return lambda content: content.update({name: value})


def cell(row: int, column: int, value: object) -> Callable[[Map], None]:
    """A change of the member table."""

    def change(content: Map) -> None:
        content["members"][row][column] = value

    return change


def image(name: str | None = None, data: bytes | None = None) -> Break:
    """Image 0 of shard 0 has another name or other bytes."""

    def change(old: Parts) -> Parts:
        old_name, old_data = old.images[0]
        return replace(old, images=((name or old_name, old_data if data is None else data), *old.images[1:]))

    return parts(change)


def content(change: Callable[[bytes], bytes]) -> Break:
    """The content of block 0 is another, all around it is right."""
    return parts(lambda old: replace(old, contents=(change(old.contents[0]), *old.contents[1:])))


def bits(start: int, width: int, value: int) -> Break:
    """A field of epoch 0, with which the content of block 0 begins, has another value."""

    def change(data: bytes) -> bytes:
        number = int.from_bytes(data, "little") & ~(((1 << width) - 1) << start)
        return (number | value << start).to_bytes(len(data), "little")

    return content(change)


def block(change: Callable[[bytes], bytes]) -> Break:
    """Block 0 as compressed is another, all around it is right."""
    return sealed(blocks=lambda blocks: [change(blocks[0]), *blocks[1:]])


def tar_field(start: int, value: bytes) -> Break:
    """Other bytes in the tar header of image 1, whose checksum is right."""

    def change(members: list[Member]) -> list[Member]:
        old = members[2].header
        new = old[:start] + value + old[start + len(value) :]
        blank = new[:148] + b" " * 8 + new[156:]
        members[2] = replace(members[2], header=new[:148] + b"%06o\0 " % sum(blank) + new[156:])
        return members

    return sealed(archive=change)


def long_blocks(base: Base) -> Files:
    """A shard of 1600 images whose one block is said to hold 65 536 epochs."""
    images = tuple((f"{10 + i:07d}_c00000.png", base.parts[NAME].images[0][1]) for i in range(1600))
    old = base.parts[NAME]
    header, head = old.header | {"epochs": 65536}, old.head | {"epochs": 65536, "pairs": 1600}
    files = with_shard(base, seal(Parts(header=header, images=images, head=head, contents=old.contents[:1])))

    def change(manifest: Map) -> None:
        manifest["records"].update(epochs=65536, block_epochs=65536)
        manifest["shards"][0].update(images=1600, pairs_per_epoch=1600)
        manifest["images"].update(count=1600 + IMAGES)

    within = Base(coding=base.coding, files={**base.files, **files}, parts=base.parts)  # type: ignore[dict-item]
    return {**files, **stated(change)(within)}


def many(count: int) -> Break:
    """Shard 0 is said to have so many images, and as many pairs."""

    def change(manifest: Map) -> None:
        manifest["shards"][0].update(images=count, pairs_per_epoch=count)
        manifest["images"].update(count=count + IMAGES)

    return stated(change)


def many_priors(base: Base) -> Files:
    """Shard 0 is said to hold 16 384 images with priors of 131 071 of 2^17 classes."""

    def change(manifest: Map) -> None:
        manifest["dataset"]["class_names"] = ["a"] * 2**17
        manifest["records"]["priors"] = 2**17 - 1
        manifest["shards"][0].update(images=2**14, pairs_per_epoch=2**14)
        manifest["images"].update(count=2**14 + IMAGES)

    return stated(change)(base)


def lam(value: float) -> Break:
    """λ of the first mix of a verbatim dataset."""
    return bits(MIX + 13, 32, int.from_bytes(struct.pack("<f", value), "little"))


# Where the fields lie. Verbatim (n = 6, P = 5, S = 8, cycles of 3 and 2): 5 images of 3 bits, 3 partners of 2 and 2 of
# 1, 5 views of 4 · 3, 5 flips, 3 mixes of 1 + 4 · 3 + 32, 1 bit of padding. Explicit (n = 6, V = 6, M = 5): order codes
# of 3, 3, 2, 2, 1 and 0 bits, 6 views of 3, 6 flips, 3 mixes of 3, 4 bits of padding; then 6 levels of two among 25.
PARTNER, VIEW, MIX, PADDING = 15, 23, 88, 223


def content_frame(change: Callable[[bytes], bytes]) -> Break:
    """Block 0 is what this makes of its content."""

    def files(base: Base) -> Files:
        data = change(base.parts[NAME].contents[0])
        return block(lambda _: data)(base)

    return files


def dictionary_frame(content: bytes) -> bytes:
    """A zstd frame that asks for a dictionary."""
    plain = zstd_frame(len(content), [(0, content)])
    return plain[:4] + bytes([plain[4] | 1]) + b"\x07" + plain[5:]


BROKEN: dict[str, Sequence[Broken]] = {
    "R1": [
        Broken("four digits", manifest("shards", 0, "name", value="shard-0000.tar"), "shard name"),
        Broken("number 65536", manifest("shards", 1, "name", value="shard-65536.tar"), "shard name"),
        Broken("a path", manifest("shards", 0, "name", value="../shard-00000.tar"), "shard name"),
        Broken("descending", stated(lambda c: c["shards"].reverse()), "expected a higher number"),
    ],
    "R5": [
        Broken("NaN", text(lambda t: t.replace(b"2.5", b"NaN")), "NaN is not a JSON number"),
        Broken("infinite", text(lambda t: t.replace(b"2.5", b"-Infinity")), "-Infinity is not a JSON number"),
        Broken("a key twice", text(lambda t: t.replace(b'"ipc"', b'"count":10,"ipc"')), "key 'count' appears twice"),
        Broken("beyond float64", text(lambda t: t.replace(b"2.5", b"1e999")), "1e999 is too large a number"),
        Broken("not UTF-8", text(lambda t: t.replace(b"mutated", b"mut\xe4ted")), "utf-8"),
        Broken("a list", text(lambda t: b"[" + t + b"]"), "expected an object"),
        Broken("two objects", text(lambda t: t + t), "not valid JSON"),
        Broken("a byte order mark", text(lambda t: b"\xef\xbb\xbf" + t), "not valid JSON"),
    ],
    "R6": [
        Broken("format", manifest("format", value="zarr"), "format is 'zarr', expected 'nrrdd'"),
        Broken("one number", manifest("version", value=[1]), r"expected \[major, minor\]"),
        Broken("a text", manifest("version", value="1.0"), r"expected \[major, minor\]"),
        Broken("negative", manifest("version", value=[1, -1]), r"expected \[major, minor\]"),
    ],
    "R7": [
        Broken("a key missing", stated(lambda c: c["records"].pop("cycle")), r"records\.cycle is missing"),
        Broken("a fraction", manifest("images", "size", value=8.0), r"images\.size is 8\.0"),
        Broken("out of range", manifest("images", "quality", value=101), r"images\.quality is 101"),
        Broken("upper case", manifest("shards", 0, "sha256", value="A" * 64), r"sha256 is 'A.*expected 64 hex digits"),
        Broken("no codebook", manifest("codebooks", "mixes", value=None), r"codebooks\.mixes is null, expected a list"),
        Broken("a codebook", manifest("codebooks", "views", value=[[0, 0, 8, 8]]), "views is given", "verbatim"),
    ],
    "R8": [
        Broken("outside", manifest("codebooks", "views", 2, value=[0, 1, 8, 8]), r"codebooks\.views\[2\]"),
        Broken("empty", manifest("codebooks", "views", 2, value=[0, 0, 0, 8]), r"codebooks\.views\[2\]"),
        Broken("negative", manifest("codebooks", "views", 2, value=[-1, 0, 4, 8]), r"codebooks\.views\[2\]"),
        Broken("three numbers", manifest("codebooks", "views", 2, value=[0, 0, 8]), r"codebooks\.views\[2\]"),
        Broken("fractions", manifest("codebooks", "views", 2, value=[0, 0, 4.0, 8]), r"codebooks\.views\[2\]"),
    ],
    "R9": [
        Broken("the whole image", manifest("codebooks", "mixes", 0, value=[0, 0, 8, 8]), r"codebooks\.mixes\[0\]"),
        Broken("another step", manifest("codebooks", "mixes", 0, value=0.3), r"codebooks\.mixes\[0\] is 0\.3"),
        Broken("1.0", manifest("codebooks", "mixes", 0, value=1.0), r"codebooks\.mixes\[0\] is 1\.0"),
        Broken("no decimal point", manifest("codebooks", "mixes", 0, value=1), r"codebooks\.mixes\[0\] is 1"),
    ],
    "R10": [
        Broken("equal", manifest("codebooks", "distances", value=[1.0, 1.0]), "not strictly ascending"),
        Broken(
            "equal as float32", manifest("codebooks", "distances", value=[1.0, 1.00000001]), "not strictly ascending"
        ),
        Broken("descending", stated(lambda c: c["codebooks"]["distances"].reverse()), "not strictly ascending"),
    ],
    "R11": [
        Broken("count", manifest("images", "count", value=11), r"images\.count is 11, the shards hold 12"),
        Broken("fewer pairs", manifest("shards", 0, "pairs_per_epoch", value=5), "pairs_per_epoch is 5, expected 6"),
        Broken("more pairs", manifest("shards", 0, "pairs_per_epoch", value=7), "pairs_per_epoch is 7", "verbatim"),
        Broken("priors", manifest("records", "priors", value=5), r"records\.priors is 5, expected less than 5"),
        Broken("further", manifest("records", "further", value=4), r"further is 4, expected at most 3", "derived"),
        Broken("wnids", manifest("dataset", "wnids", value=["n1"]), "wnids has 1 entries, expected 5"),
    ],
    "R12": [
        Broken("padding", raw(lambda d: d[:1023] + b"x" + d[1024:]), "padding", seen=False),
        Broken("the end is not zero", raw(lambda d: d[:-1] + b"x"), "padding", seen=False),
        Broken("the end is too short", raw(lambda d: d[:-512]), "the file has .* bytes"),
        Broken("the end is too long", raw(lambda d: d + bytes(512)), "the file has .* bytes"),
        Broken("cut in the header", raw(lambda d: d[:530]), "it is truncated"),
    ],
    "R13": [
        Broken("the header's", raw(lambda d: b"x" + d[1:]), "tar header byte 0"),
        *(
            Broken(what, tar_field(start, value), "tar header byte")
            for what, start, value in (
                ("name", 0, b"1"),
                ("mode", 100, b"0000755\0"),
                ("uid", 108, b"0000001\0"),
                ("gid", 116, b"0000001\0"),
                ("size", 124, b"00000000001\0"),
                ("mtime", 136, b"00000000001\0"),
                ("type", 156, b"5"),
                ("link name", 157, b"x"),
                ("magic", 257, b"ustar "),
                ("user name", 265, b"root"),
                ("prefix", 345, b"x"),
                ("the rest", 511, b"x"),
            )
        ),
    ],
    "R14": [
        Broken("length", sealed(header_frame=lambda p: b"\xff" * 4 + frame(p)[4:]), "header states 4294967295 bytes"),
        Broken("crc32", sealed(header_frame=lambda p: frame(p)[:4] + b"abcd" + frame(p)[8:]), "crc32"),
        Broken("not zstd", sealed(header_frame=frame_of), "zstd"),
        Broken("no size", sealed(head_frame=lambda p: frame_of(zstd_frame(None, [(0, p)]))), "states no length"),
        Broken("two zstd frames", sealed(head_frame=lambda p: frame_of(compress(p) * 2)), "zstd"),
        Broken("not msgpack", sealed(head_frame=lambda p: frame(b"\xc1")), "msgpack"),
        Broken("a list", sealed(head_frame=lambda p: frame(b"\x90")), "expected a map"),
        Broken("a key twice", sealed(head_frame=lambda p: frame(b"\x82\xa1a\x01\xa1a\x02")), "a key appears twice"),
        Broken("a key that is no text", sealed(head=lambda content: content.update({5: 0})), "int is not allowed"),
    ],
    "R15": [
        Broken("bytes behind it", sealed(header_frame=lambda p: frame(p) + b"\0"), "the tar header states"),
        Broken("format", sealed(header=field("format", "nrrdd")), "format is 'nrrdd', expected 'nrrdd-shard'"),
        Broken("version", sealed(header=field("version", [1])), r"expected \[major, minor\]"),
        Broken("shard", sealed(header=field("shard", 1)), "says it is shard-00001.tar, expected shard-00000.tar"),
        Broken("epochs", sealed(header=field("epochs", 4)), "4 epochs, expected 3"),
        Broken("a row missing", sealed(header=lambda c: c["members"].pop(1)), "the file has .* bytes"),
        Broken("rows swapped", sealed(header=lambda c: c["members"].insert(0, c["members"].pop(1))), "tar header byte"),
        Broken("no records", sealed(header=lambda c: c["members"].pop()), "last member is"),
        Broken("size", sealed(header=cell(0, 1, 1)), "tar header byte|the file has .* bytes"),
    ],
    "R16": [
        Broken("six digits", image("000000_c00000.png"), "member name"),
        Broken("padded further", image("00000000_c00000.png"), "member name"),
        Broken("a four-digit label", image("0000000_c0000.png"), "member name"),
        Broken("no image", image("0000000_c00000.gif"), "member name"),
        Broken("two extensions", image("0000000_c00000.jpg"), "extensions"),
        Broken("unknown label", image(f"0000000_c{len(CLASSES):05d}.png"), "class 5, expected less than 5"),
        Broken("twice in a shard", image("0000001_c00000.png"), "image 1 appears 2 times"),
        Broken("twice in the dataset", image(f"{IMAGES:07d}_c00000.png"), "already, expected once", seen=False),
    ],
    "R17": [
        Broken("not an image", image(data=b"text"), "not a whole png image", seen=False),
        Broken("another codec", image(data=picture(0, codec="JPEG")), "not a whole png image", seen=False),
        Broken("cut", image(data=picture(0)[:-9]), "not a whole png image", seen=False),
        Broken("bytes behind it", image(data=picture(0) + b"x"), "not a whole png image", seen=False),
        Broken("another size", image(data=picture(0, side=SIZE + 1)), "image is 9x9, expected 8x8", seen=False),
    ],
    "R18": [
        Broken("epochs", sealed(head=field("epochs", 2)), "epochs is 2, expected 3"),
        Broken("pairs", sealed(head=field("pairs", 5)), "pairs is 5, expected 6"),
        Broken("a block more", parts(lambda p: replace(p, contents=(*p.contents, b"x"))), "blocks: 3 entries"),
        Broken("a block less", parts(lambda p: replace(p, contents=p.contents[:1])), "blocks: 1 entries"),
        Broken("a checksum less", sealed(head=field("crcs", [1])), "crcs: 1 entries"),
        Broken("not filled", sealed(head_frame=lambda p: frame(p) + b"\0"), "head and blocks take"),
    ],
    "R19": [
        Broken("an image", sealed(header=cell(0, 2, 1)), "crc32 .* expected 00000001"),
        Broken("the records", sealed(header=cell(-1, 2, 1)), "crc32 .* expected 00000001", seen=False),
        Broken("a block", sealed(head=field("crcs", [1, 1])), "crc32 .* expected 00000001"),
        Broken("sha256", manifest("shards", 0, "sha256", value="0" * 64), "sha256 is", seen=False),
        Broken("bytes", manifest("shards", 0, "bytes", value=1), r"expected 1 bytes \(manifest\)"),
    ],
    "R20": [
        Broken("no size", content_frame(lambda c: zstd_frame(None, [(0, c)])), "states no length"),
        Broken("a dictionary", content_frame(dictionary_frame), "zstd"),
        Broken("something behind it", content_frame(lambda c: compress(c) + b"x"), "zstd"),
        Broken("two frames", content_frame(lambda c: compress(c) * 2), "zstd"),
        Broken("too little", content(lambda c: c[:-1]), "states 23 bytes of content, expected 24"),
        Broken("a bomb", content_frame(lambda c: compress(bytes(10**6))), "states 1000000 bytes of content"),
        Broken("a lying bomb", content_frame(lambda c: zstd_frame(len(c), [(2**17, b"a")] * 100)), "zstd"),
        Broken("not zstd", content_frame(lambda c: c), "zstd"),
    ],
    "R21": [
        Broken("explicit", bits(47, 1, 1), "padding bits"),
        Broken("verbatim", bits(PADDING, 1, 1), "padding bits", "verbatim"),
    ],
    "R22": [
        Broken("order code", bits(0, 3, 6), "order 0 is 6, expected less than 6"),
        Broken("view", bits(11, 3, 6), "view 0 is 6, expected less than 6"),
        Broken("mix", bits(35, 3, 7), "mix 0 is 7, expected less than 5"),
        Broken("levels together", content(lambda c: c[:-1] + b"\x19"), "25, expected less than 25"),
        Broken("levels apart", content(lambda c: c[:23] + b"\x14" + c[24:]), "20, expected less than 20", "derived"),
    ],
    "R25": [
        Broken("manifest", manifest("version", value=[3, 0]), r"version is 3\.0, this reader knows 1\.x and 2\.x"),
        Broken("further in 1.1", manifest("version", value=[1, 1]), r"1\.1, expected 2\.0 or higher", "verbatim"),
        Broken("an older one", manifest("version", value=[0, 9]), r"version is 0\.9, this reader knows 1\.x and 2\.x"),
        Broken("shard", sealed(header=field("version", [3, 0])), r"version is 3\.0, this reader knows 1\.x and 2\.x"),
    ],
    "R26": [
        Broken("image", bits(0, 3, 7), "image 0 is 7, expected less than 6", "verbatim"),
        Broken("an image twice", bits(0, 6, 0o11), "named twice", "verbatim"),
        Broken("partner", bits(PARTNER, 2, 3), "partner 0 is 3, expected less than 3", "verbatim"),
        Broken("view", bits(VIEW, 12, 0o7070), "view 0 is .* expected a box inside 8x8", "verbatim"),
        Broken("box of a CutMix", bits(MIX, 13, 0o7070 << 1 | 1), "mix box 0 is .* expected a box", "verbatim"),
        Broken("box of a Mixup", bits(MIX, 13, 0o0001 << 1), "a Mixup has a box", "verbatim"),
        *(Broken(f"λ {x}", lam(x), "lam of mix 0 is", "verbatim") for x in (float("nan"), float("inf"), -0.5, 1.5)),
    ],
}

BROKEN["R27"] = [
    Broken("a gap less", sealed(head=field("prior_gaps", [0] * 5)), "prior_gaps: 5 entries"),
    Broken("a level more", sealed(head=field("prior_levels", [0] * 7)), "prior_levels: 7 entries"),
    Broken("no gaps", sealed(head=lambda c: c.pop("prior_gaps")), "prior_gaps: None"),
    Broken("unknown class", sealed(head=field("prior_gaps", [5, 0, 0, 0, 0, 0])), r"prior_gaps\[0\] is 5"),
    Broken("classes add up", sealed(head=field("prior_gaps", [4, 0] * 6)), "class 5, expected less than 5", "derived"),
    Broken("its own class", sealed(head=field("prior_gaps", [0] * 6)), "prior of image 0: names its own class 0"),
    Broken("level", sealed(head=field("prior_levels", [0, 0, 5, 0, 0, 0])), r"prior_levels\[2\] is 5"),
]


def further(pair: int, classes: Sequence[int], levels: Sequence[int]) -> Break:
    """The two further classes of a pair of block 0 of a verbatim dataset, whose last 40 bytes are the columns."""

    def change(old: bytes) -> bytes:
        columns = np.frombuffer(old[-40:], np.uint8).reshape(2, 2, 10).copy()
        columns[:, :, pair] = [classes, levels]
        return old[:-40] + columns.tobytes()

    return content(change)


def further_of_its_own(base: Base) -> Files:
    """Pair 0 has the class of its `org` among its further classes."""
    org = base.parts[NAME].contents[0][0] & 7
    own = int(base.parts[NAME].images[org][0][9:14])
    return further(0, [own, (own + 1) % len(CLASSES)], [0, 0])(base)


BROKEN["R28"] = [
    Broken("unknown class", further(2, [0, 5], [0, 0]), r"pair 2: classes \[0, 5\], .* less than 5", "verbatim"),
    Broken("a class twice", further(2, [3, 3], [0, 0]), "pair 2: .* expected different classes", "verbatim"),
    Broken("its own class", further_of_its_own, "further classes of pair 0: name its own", "verbatim"),
    Broken("level", further(2, [0, 1], [0, 12]), "pair 2: .* expected levels less than 12", "verbatim"),
    Broken("levels fall", further(2, [0, 1], [4, 3]), "pair 2: .* expected levels that do not fall", "verbatim"),
]

# By the first column of the table in section 2, whose rule is R4.
BEYOND_LIMITS: dict[str, Sequence[Broken]] = {
    "manifest": [
        Broken("32 MiB + 1", text(lambda t: t.ljust(2**25 + 1)), "33554433 bytes, expected at most 33554432"),
        Broken("values", manifest("method", "many", value=[0] * 1_500_001), r"values, expected at most 1500000"),
    ],
    "shards": [
        Broken("65 537", stated(lambda c: c.update(shards=c["shards"][:1] * 65537)), "shards is a list of 65537")
    ],
    "classes": [
        Broken("2^17 + 1", manifest("dataset", "class_names", value=["a"] * (2**17 + 1)), "a list of 131073"),
        Broken("none", manifest("dataset", "class_names", value=[]), "a list of 0"),
    ],
    "objects and lists inside each other in the manifest": [
        Broken("65", manifest("method", "deep", value=json.loads("[" * 63 + "]" * 63)), "nested deeper than 64 levels")
    ],
    "one text in the manifest, `method` left out": [
        Broken("4097", manifest("dataset", "name", value="x" * 4097), r"dataset\.name is 'xxx"),
        Broken("a control", manifest("dataset", "name", value="a\x1b[31m"), r"dataset\.name is 'a"),
        Broken("half a character", manifest("dataset", "name", value="a\ud800"), r"dataset\.name is 'a"),
    ],
    "image side": [
        Broken("1", manifest("images", "size", value=1), r"images\.size is 1, expected an integer in 2\.\.4096"),
        Broken("4097", manifest("images", "size", value=4097), r"images\.size is 4097"),
    ],
    "views / mixes / distance levels": [
        Broken("views", manifest("codebooks", "views", value=[[0, 0, 8, 8]] * 65537), "a list of 65537"),
        Broken("mixes", manifest("codebooks", "mixes", value=[0.5] * 4097), "a list of 4097"),
        Broken("levels", manifest("codebooks", "distances", value=list(range(257))), "a list of 257"),
        Broken("no view", manifest("codebooks", "views", value=[]), "a list of 0"),
        Broken("one level", manifest("codebooks", "distances", value=[1.0]), "a list of 1"),
    ],
    "payload of a frame, and the msgpack in it": [
        Broken(
            "payload",
            sealed(header_frame=lambda p: struct.pack("<II", 2**23 + 1, 0) + bytes(2**23 + 1)),
            "header states",
        ),
        Broken(
            "msgpack", sealed(header_frame=lambda p: frame(p + bytes(2**23))), "header states 8388.* expected at most"
        ),
        Broken("keys", sealed(header=field("news", {f"{k}": 0 for k in range(64)})), "more than 64 map keys"),
        Broken("a list", sealed(head=field("news", [0] * 262_146)), "msgpack: 262146 exceeds"),
        Broken("lists", sealed(header=field("news", [[0] * 250_000] * 5)), "more than 1048640 list entries"),
        Broken("a binary value", sealed(head=field("news", b"x")), "exceeds max_bin_len"),
        Broken("an empty binary value", sealed(head=field("news", b"")), "binary"),
        Broken("an empty binary value in a list", sealed(head=field("news", [1, b""])), "binary"),
        Broken("an empty binary key", sealed(head=field("news", {b"": 1})), "binary"),
        Broken("an empty value of another type", sealed(head=field("news", msgpack.ExtType(5, b""))), "extension"),
        Broken("keys in the head", sealed(head=field("news", [{}] * 70)), "more than 64 map keys"),
    ],
    "images, and pairs an epoch, of one shard": [
        Broken("1", many(1), r"shards\[0\]\.images is 1,"),
        Broken("2^14 + 1", many(2**14 + 1), r"shards\[0\]\.images is 16385, expected at most 16384"),
        Broken("2^18 + 1", many(2**18 + 1), r"shards\[0\]\.images is 262145", "verbatim"),
    ],
    "one encoded image": [
        Broken("0", sealed(header=cell(0, 1, 0)), "member '0000000_c00000.png': size is 0"),
        Broken("16 MiB + 1", sealed(header=cell(0, 1, 2**24 + 1)), "member '0000000_c00000.png': size is 16777217"),
    ],
    "records member": [
        Broken("8 GiB", sealed(header=cell(-1, 1, 8**11)), "member '__nrrdd__/records': size is 8589934592"),
        Broken("in the manifest", manifest("shards", 0, "record_bytes", value=8**11), "record_bytes is 8589934592"),
    ],
    "stored epochs": [
        Broken("0", manifest("records", "epochs", value=0), r"records\.epochs is 0"),
        Broken("65 537", manifest("records", "epochs", value=65537), r"records\.epochs is 65537"),
        Broken("in a shard", sealed(header=field("epochs", 65537)), "epochs is 65537"),
    ],
    "classes in the priors of one shard's images, all together": [
        Broken("2^14 images of 2^17 - 1 each", many_priors, "expected at most 2 with records.priors 131071")
    ],
    "further classes of a pair": [
        Broken("17", manifest("records", "further", value=17), r"records\.further is 17", "verbatim"),
        Broken("0", manifest("records", "further", value=0), r"records\.further is 0", "verbatim"),
    ],
    "content of one record block": [Broken("more than 16 MiB", long_blocks, "expected at most 16777216")],
    "one record block": [Broken("536 too many", block(lambda b: b + bytes(24 + 512)), "block size is")],
}


# ---- the tests


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    """A good dataset of each coding."""
    return {base.coding: base for base in make_bases(tmp_path_factory.mktemp("rules"))}


def put(folder: Path, base: Base, changed: Files) -> Path:
    """Writes a dataset into a folder."""
    for name, data in {**base.files, **changed}.items():
        if data is not None:
            (folder / name).write_bytes(data)
    return folder


def all_broken() -> list[Any]:
    """Every dataset of both tables, as parameters of a test."""
    tables = {**BROKEN, **BEYOND_LIMITS}
    return [pytest.param(one, id=f"{rule}: {one.what}") for rule, broken in tables.items() for one in broken]


@pytest.mark.parametrize("broken", all_broken())
def test_what_breaks_a_rule_is_refused_for_that_reason(broken: Broken, bases: dict[str, Base], tmp_path: Path) -> None:
    base = bases[broken.coding]
    folder = put(tmp_path, base, broken.files(base))
    said = [str(problem) for problem in verify_dataset(folder)]
    assert any(re.search(broken.message, line) for line in said), said
    if broken.seen:
        with pytest.raises(FormatError, match=broken.message):
            read(folder)


@pytest.mark.parametrize("coding", ["explicit", "derived", "verbatim"])
def test_the_datasets_before_they_are_broken_are_good(coding: str, bases: dict[str, Base], tmp_path: Path) -> None:
    folder = put(tmp_path, bases[coding], sealed()(bases[coding]))  # taken apart and sealed again
    assert verify_dataset(folder) == []
    read(folder)


def test_reading_executes_nothing(bases: dict[str, Base], tmp_path: Path) -> None:
    """R2: a pickle in any place of a dataset is refused, and not run."""
    marker = tmp_path / "executed"
    payload = pickle.dumps(Trap(marker))
    places: list[Break] = [
        text(lambda _: payload),
        raw(lambda _: payload),
        sealed(header_frame=lambda _: frame_of(payload)),
        sealed(header_frame=lambda _: frame(payload)),
        sealed(head_frame=lambda _: frame(payload)),
        block(lambda _: payload),
        content(lambda old: payload[: len(old)]),
        image(data=payload),
        manifest("dataset", "name", value=f"!!python/object/apply:os.mkdir ['{marker}']"),
        manifest("codebooks", "distances", value=f"__import__('os').mkdir('{marker}')"),
    ]
    for number, place in enumerate(places):
        folder = tmp_path / str(number)
        folder.mkdir()
        verify_dataset(put(folder, bases["explicit"], place(bases["explicit"])))
        assert not marker.exists(), number


def test_writers_leave_no_half_files(bases: dict[str, Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R3: a disk that is full at any moment leaves what was there before, and nothing half written."""
    base = bases["verbatim"]
    folder = put(tmp_path, base, {})
    whole = Manifest.load(folder / MANIFEST_NAME)
    images = [EncodedImage(index=i, label=0, data=data) for i, (_, data) in enumerate(base.parts[NAME].images)]

    def write() -> None:
        blocks = [compress(each) for each in base.parts[NAME].contents]
        write_shard(
            folder / NAME, shard=0, images=images, extension="png", blocks=blocks, epochs=3, layout=whole.layout(0)
        )

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, full)
            for attempt in (write, lambda: whole.save(folder / MANIFEST_NAME)):
                with pytest.raises(OutputError, match="No space left"):
                    attempt()
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == base.files


def test_derived_pairs_are_those_of_the_generator(bases: dict[str, Base], tmp_path: Path) -> None:
    """R23: the vectors of section 7; pairs that are not drawn so cannot be stored as derived."""
    spec = spec_text()
    vectors = dict(re.findall(r"^    (order|view|flip|mix) +\S.*?\)  +([0-9 ]+)$", spec, re.MULTILINE))
    drawn = {
        "order": draws.permutation(11, "order", 0, 0, count=7),
        "view": draws.integers(11, "view", 0, 0, count=7, high=6),
        "flip": draws.integers(11, "flip", 0, 0, count=7, high=2),
        "mix": draws.integers(11, "mix", 0, 0, count=4, high=5),
    }
    assert {name: values.tolist() for name, values in drawn.items()} == {
        name: [int(v) for v in vector.split()] for name, vector in vectors.items()
    }
    stored = Manifest.load(put(tmp_path, bases["derived"], {}) / MANIFEST_NAME).layout(0)
    layout = replace(stored, further=None)
    zero = np.zeros(layout.pairs, np.float32)
    mine = [replace(draw_pairs(layout, 0, epoch), distance_org=zero, distance_aug=zero) for epoch in (0, 1)]
    encode_block(mine, layout, shard=0, first_epoch=0)
    for wrong in ([mine[1], mine[0]], [mine[0].take(np.arange(layout.pairs)[::-1]), mine[1]]):
        with pytest.raises(ConfigError, match="not those the format draws"):
            encode_block(wrong, layout, shard=0, first_epoch=0)


def test_replay_does_what_section_8_says_and_nothing_else() -> None:
    """R24: against the section's arithmetic in float64; corners that coincide, or antialiasing, would be seen."""
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16)).astype(np.uint8)
    boxes, flips, box = [[2, 3, 9, 11], [0, 5, 16, 8]], [True, False], [4, 1, 5, 12]
    views = [viewed(*each) for each in zip(images, boxes, flips, strict=True)]
    pasted = np.zeros((16, 16), bool)
    pasted[4:9, 1:13] = True
    expected = [np.where(pasted, views[1], views[0]), 0.25 * views[1] + 0.75 * views[0]]
    pairs = PairTensors(
        images=torch.from_numpy(images).contiguous(memory_format=torch.channels_last),
        boxes=torch.tensor(boxes),
        flips=torch.tensor(flips),
        org=torch.tensor([0, 1]),
        aug=torch.tensor([1, 0]),
        is_cutmix=torch.tensor([True, False]),
        mix_box=torch.tensor([box, [0, 0, 0, 0]]),
        lam=torch.tensor([0.75, 0.25]),
    )
    found = replay(pairs, mean=(0.5, 0.25, 0.75), std=(0.25, 0.5, 0.125)).double().numpy()
    shift, scale = (255 * np.array(v)[:, None, None] for v in ((0.5, 0.25, 0.75), (0.25, 0.5, 0.125)))
    distance = np.abs(found * scale + shift - np.stack(expected))
    assert distance.max() < 1.01
    other = viewed(images[0], boxes[0], True, corners=True)
    assert np.abs(other - views[0]).max() > 5


def viewed(image: NDArray[np.uint8], box: list[int], flip: bool, *, corners: bool = False) -> NDArray[np.float64]:
    """Steps 2 to 4 for one image (3, S, S); `corners`: sampled as it must not be."""
    top, left, height, width = box
    crop = image[:, top : top + height, left : left + width].astype(np.float64)
    side = image.shape[-1]
    for axis, length in ((1, height), (2, width)):
        at = np.arange(side)
        place = at * (length - 1) / (side - 1) if corners else (at + 0.5) * length / side - 0.5
        place = place.clip(0, length - 1)
        low = np.floor(place).astype(int)
        high = np.minimum(low + 1, length - 1)
        shape = [1, 1, 1]
        shape[axis] = side
        share = (place - low).reshape(shape)
        crop = np.take(crop, low, axis) * (1 - share) + np.take(crop, high, axis) * share
    rounded: NDArray[np.float64] = np.rint(crop)
    return rounded[..., ::-1] if flip else rounded


OWN_TESTS = {
    "R2": test_reading_executes_nothing,
    "R3": test_writers_leave_no_half_files,
    "R23": test_derived_pairs_are_those_of_the_generator,
    "R24": test_replay_does_what_section_8_says_and_nothing_else,
}


# ---- both tables against SPEC.md


def spec_text() -> str:
    """SPEC.md."""
    return (Path(__file__).resolve().parent.parent / "nrrdd_format" / "SPEC.md").read_text(encoding="utf-8")


def section(number: int) -> str:
    """One section of SPEC.md."""
    return re.split(r"^## ", spec_text(), flags=re.MULTILINE)[number].partition("\n")[2]


def rows(table: str) -> list[str]:
    """The first cells of a Markdown table, without its head."""
    cells = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if line.startswith("| ")]
    return cells[1:]


def test_every_rule_has_a_test_and_every_test_a_rule() -> None:
    rules = set(re.findall(r"\[(R\d+)\]", spec_text().partition("## 1.")[2]))
    assert rules == BROKEN.keys() | OWN_TESTS.keys() | {"R4"}
    assert not BROKEN.keys() & OWN_TESTS.keys()
    assert all(BROKEN.values()) and all(BEYOND_LIMITS.values())


def test_rules_are_numbered_without_gaps() -> None:
    numbers = sorted({int(n) for n in re.findall(r"\[R(\d+)\]", spec_text())})
    assert numbers == list(range(1, len(numbers) + 1))


def test_every_limit_has_a_test_and_every_test_a_limit() -> None:
    assert rows(section(2)) == list(BEYOND_LIMITS)


def manifest_keys() -> list[str]:
    """The keys of section 3, such as `images.mean` and `shards[].sha256`."""
    keys: list[str] = []
    for cell_text in rows(section(3)):
        for name in re.findall(r"`([^`]+)`", cell_text):
            keys.append(f"shards[]{name}" if name.startswith(".") else name)
    return keys


@pytest.mark.parametrize("key", manifest_keys())
def test_every_manifest_key_is_checked(key: str, bases: dict[str, Base], tmp_path: Path) -> None:
    """A value of a wrong type in its place is refused, and the key is named."""
    path: list[str | int] = [step for part in key.split(".") for step in ((part[:-2], 0) if "[]" in part else (part,))]
    wrong: object = 7 if key in ("method", "shards") else {"wrong": 7}
    folder = put(tmp_path, bases["explicit"], manifest(*path, value=wrong)(bases["explicit"]))
    with pytest.raises(FormatError, match=re.escape(key.replace("[]", "[0]")) + r"\S* is "):
        read(folder)


def test_the_manifest_keys_of_the_spec_are_those_that_are_written(bases: dict[str, Base]) -> None:
    written = bases["derived"].content
    listed = manifest_keys()
    for name, value in written.items():
        if name in ("format", "version"):  # R6
            continue
        nested = value[0] if isinstance(value, list) else value
        inner = [] if name == "method" else [f"{name}{'[]' if isinstance(value, list) else ''}.{key}" for key in nested]
        assert {key for key in listed if re.match(rf"{name}\b", key)} - {name} == set(inner), name
    assert {re.split(r"[.\[]", key)[0] for key in listed} == written.keys() - {"format", "version"}
