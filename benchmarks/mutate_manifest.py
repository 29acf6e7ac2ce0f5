"""Mutations of the manifest, which no checksum covers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.mutants import Expectation, Mutant, changed_manifest, manifest_bytes
from benchmarks.mutation_parts import IMAGES, LEVELS, SHARDS, Base, Draw, Map
from nrrdd_format.manifest import MANIFEST_NAME
from nrrdd_format.shards import shard_name

_HUGE = ("1" + "0" * 400, "9" * 5000, "-" + "9" * 4400, "1e400", "-1e400", str(2**63), str(-(2**63)), str(2**64))


def change_manifest_bits(base: Base, draw: Draw) -> Mutant:
    """Bits of the manifest, which no checksum covers: what comes of it must be just what it says."""
    changed = bytearray(base.files[MANIFEST_NAME])
    for _ in range(draw.one((1, 1, 1, 2, 4))):
        changed[draw.below(len(changed))] ^= 1 << draw.below(8)
    return manifest_bytes(bytes(changed), "open", "bits flipped")


def change_manifest_bytes(base: Base, draw: Draw) -> Mutant:
    """A run of the manifest's bytes is others, missing or repeated."""
    data = base.files[MANIFEST_NAME]
    at, length = draw.below(len(data)), draw.one((1, 1, 2, 5, 20, 100))
    new = draw.one((b"", draw.data(length), data[at : at + length] * 2, b"0", b'"', b"}", b"]", b",", b"-", b"1e9"))
    return manifest_bytes(data[:at] + new + data[at + length :], "open", f"bytes at {at}")


def truncate_manifest(base: Base, draw: Draw) -> Mutant:
    """The manifest ends early."""
    data = base.files[MANIFEST_NAME]
    end = draw.below(len(data.rstrip()))
    return manifest_bytes(data[:end], "broken", f"truncated to {end} bytes")


def swap_manifest(base: Base, draw: Draw) -> Mutant:
    """No manifest, or something else in its place."""
    content = draw.one((None, b"", b"{}", b"[]", b"null", b"1", b'"x"', base.files[shard_name(0)], draw.data(100)))
    return Mutant(files={MANIFEST_NAME: content}, expectation="broken", what="no manifest")


def lie_in_manifest(base: Base, draw: Draw) -> Mutant:
    """A count, size, name or hash in the manifest is another valid one."""
    what, change, expectation = draw.one(_MANIFEST_LIES)
    return changed_manifest(base, lambda content: change(content, draw), expectation, what)


def _put(*path: str | int, value: Callable[[Any, Draw], Any]) -> Callable[[Map, Draw], None]:
    def change(content: Any, draw: Draw) -> None:
        for step in path[:-1]:
            content = content[step]
        content[path[-1]] = value(content[path[-1]], draw)

    return change


def _number(low: int, high: int) -> Callable[[Any, Draw], int]:
    def other(old: int, draw: Draw) -> int:
        return draw.one(
            [n for n in (old - 1, old + 1, old * 2, low, high, draw.between(low, high)) if n != old and n >= low]
        )

    return other


def _digest(old: str, draw: Draw) -> str:
    return hashlib.sha256(draw.data(8)).hexdigest()


_MANIFEST_LIES: tuple[tuple[str, Callable[[Map, Draw], object], Expectation], ...] = (
    ("images.count", _put("images", "count", value=_number(0, 10**9)), "broken"),
    ("images.size", _put("images", "size", value=_number(2, 4096)), "unseen"),
    ("images.codec", _put("images", "codec", value=lambda old, draw: draw.one(("jpeg", "webp"))), "unseen"),
    ("records.epochs", _put("records", "epochs", value=_number(1, 65536)), "broken"),
    ("records.coding", _put("records", "coding", value=lambda o, d: d.one([c for c in LEVELS if c != o])), "broken"),
    ("records.block_epochs", _put("records", "block_epochs", value=_number(1, 65536)), "open"),
    ("records.cycle", _put("records", "cycle", value=_number(2, 2**18)), "open"),
    ("records.mix_group", _put("records", "mix_group", value=_number(1, 2**18)), "open"),
    ("records.seed", _put("records", "seed", value=_number(0, 2**63 - 1)), "open"),
    (
        "records.priors",
        lambda c, d: c["records"].update(priors=(c["records"].get("priors") or 0) + d.between(1, 3)),
        "broken",
    ),
    (
        "records.further",
        lambda c, d: c["records"].update(further=(c["records"].get("further") or 0) + d.between(1, 20)),
        "broken",
    ),
    ("further classes left out", lambda c, d: c["records"].pop("further", None), "open"),
    ("priors left out", lambda c, d: c["records"].pop("priors", None), "open"),
    ("images.flip", _put("images", "flip", value=lambda old, draw: not old), "open"),
    ("a distance missing", lambda c, d: c["codebooks"]["distances"].pop(), "open"),
    ("distances reversed", lambda c, d: c["codebooks"]["distances"].reverse(), "broken"),
    ("a class missing", lambda c, d: c["dataset"]["class_names"].pop(), "broken"),
    ("wnids too few", lambda c, d: c["dataset"].update(wnids=["n1"]), "broken"),
    ("shards[].bytes", _put("shards", 0, "bytes", value=_number(1, 2**42)), "broken"),
    ("shards[].images", _put("shards", 1, "images", value=_number(2, 2**14)), "broken"),
    ("shards[].pairs_per_epoch", _put("shards", 1, "pairs_per_epoch", value=_number(2, 2**14)), "broken"),
    ("shards[].record_bytes", _put("shards", 1, "record_bytes", value=_number(1, 8**11 - 1)), "broken"),
    ("shards[].sha256", _put("shards", 0, "sha256", value=_digest), "damage"),
    ("shards[].name", _put("shards", 1, "name", value=lambda o, d: shard_name(d.between(2, 65535))), "broken"),
    ("a shard twice", lambda c, d: c["shards"].append(c["shards"][-1]), "broken"),
    ("shards reversed", lambda c, d: c["shards"].reverse(), "broken"),
    ("a shard left out", lambda c, d: c["shards"].pop(d.below(SHARDS)), "broken"),
    ("fewer shards", lambda c, d: (c["shards"].pop(d.below(SHARDS)), c["images"].update(count=IMAGES)), "open"),
    ("no shards", lambda c, d: (c["shards"].clear(), c["images"].update(count=0)), "open"),
)


def confuse_manifest_types(base: Base, draw: Draw) -> Mutant:
    """A value of the manifest is of another JSON type, or missing."""
    content = base.content
    path, holder, key = draw.one([place for place in _places(content) if place[0] not in _UNCHECKED])
    value = draw.one([v for v in (None, True, "x", [], {}, -1, 2.5, [[0]], {"a": 0}) if _type(v) != _type(holder[key])])
    nullable = value is None and path in _NULLABLE
    if isinstance(key, str) and draw.chance(5):
        del holder[key]
        nullable, value = path in _NULLABLE, "nothing"
    else:
        holder[key] = value
    expectation: Expectation = "open" if nullable else "broken"
    return manifest_bytes(json.dumps(content).encode(), expectation, f"{path} is {value!r}")


_UNCHECKED = ("method.steps[]", "method.steps")  # any content
_NULLABLE = (
    "dataset.wnids",
    "dataset.source_license",
    "images.quality",
    "teacher.top1",
    "codebooks.views",
    "codebooks.mixes",
    "records.priors",
    "records.further",
)


def _places(content: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every value of a JSON object, as its path and where it hangs."""
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in items:
        here = f"{path}.{key}".lstrip(".") if isinstance(content, dict) else f"{path}[]"
        yield here, content, key
        if isinstance(value, dict | list):
            yield from _places(value, here)


def _type(value: object) -> str:
    return "number" if type(value) in (int, float) else type(value).__name__


def repeat_key(base: Base, draw: Draw) -> Mutant:
    """A key occurs twice in a JSON object, with the same or another value; sometimes among very many."""
    text = base.files[MANIFEST_NAME].decode()
    at = draw.one([i for i in range(len(text)) if text[i] == "{" and text[i + 1] != "}"])
    start = text.index('"', at)
    key = text[start + 1 : text.index('"', start + 1)]
    value = draw.one(("1", "null", '"x"', "[]", "{}"))
    many = "".join(f'"k{i}":0,' for i in range(30_000)) if draw.chance(40) else ""
    changed = f'{text[: at + 1]}{many}"{draw.one((key, _escaped(key)))}":{value},{text[at + 1 :]}'
    return manifest_bytes(changed.encode(), "broken", f"key {key} twice{' among many' if many else ''}")


def _escaped(text: str) -> str:
    return "".join(f"\\u{ord(c):04x}" for c in text)


def huge_numbers(base: Base, draw: Draw) -> Mutant:
    """A number of the manifest is very large."""
    return _with_literal(base, draw, draw.one(_HUGE), "broken")


def not_finite_numbers(base: Base, draw: Draw) -> Mutant:
    """A number of the manifest is NaN or infinite, among them the codebook's distances."""
    if draw.chance(3):
        return _with_literal(base, draw, draw.one(("1e999", "-1e999")), "broken")
    literal = draw.one(("NaN", "Infinity", "-Infinity", "nan", "inf"))  # no JSON, wherever they stand
    return _with_literal(base, draw, literal, "broken", in_method=draw.chance(2))


def odd_numbers(base: Base, draw: Draw) -> Mutant:
    """A number of the manifest is written or valued oddly."""
    literals = ("1e-400", "-0", "-0.0", "0", "1E2", "1.0", "01", "+1", ".5", "1.", "0x10", "1_0", "١", "true", "5e-324")
    return _with_literal(base, draw, draw.one(literals), "open")


def _with_literal(base: Base, draw: Draw, literal: str, expectation: Expectation, *, in_method: bool = False) -> Mutant:
    """The manifest with this text in place of a number: one of the free `method`, or of a key that readers check."""
    content = base.content
    numbers = [place for place in _places(content) if _type(place[1][place[2]]) == "number"]
    free = [place for place in numbers if place[0] in _UNCHECKED]
    known = [place for place in numbers if place not in free and place[0] != "version[]"]  # any minor version is read
    tables = [place for place in known if place[0] == "codebooks.distances[]"]
    path, holder, key = draw.one(free if in_method else draw.one((known, tables)))
    holder[key] = "@@"
    text = json.dumps(content).replace('"@@"', literal)
    return manifest_bytes(text.encode(), expectation, f"{path} is {literal:.20}")


def nest_deeply(base: Base, draw: Draw) -> Mutant:
    """A value of the manifest is nested deeply, in a known key, an unknown one or the free `method`."""
    depth = draw.one((3, 50, draw.between(200, 400), draw.between(950, 1000), draw.between(950, 1000), 100_000))
    pair = draw.one((("[", "]"), ('{"a":', "}")))
    deep = pair[0] * depth + "1" + pair[1] * depth
    content = base.content
    _, holder, key = draw.one([*_places(content), ("", content, "news"), ("", content["method"], "news")])
    holder[key] = "@@"
    return manifest_bytes(json.dumps(content).replace('"@@"', deep).encode(), "open", f"{depth} deep at {key}")


def broken_text(base: Base, draw: Draw) -> Mutant:
    """The manifest is not UTF-8, or not only JSON."""
    data = base.files[MANIFEST_NAME]
    at = data.index(b"mutated") + draw.below(5)
    bad = draw.one(
        (b"\xff", b"\xc3", b"\xc0\x80", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\x80", b"\0", b"\n", b"\x1f")
    )
    changed = draw.one(
        (
            data[:at] + bad + data[at:],
            b"\xef\xbb\xbf" + data,
            data.decode().encode("utf-16"),
            data.decode().encode("utf-32"),
            data + draw.one((b"x", b"{}", b"\0", b",")),
            b"/* */" + data,
            data.replace(b'"', b"'"),
        )
    )
    return manifest_bytes(changed, "broken", "not JSON in UTF-8")


def odd_texts(base: Base, draw: Draw) -> Mutant:
    """A text of the manifest holds unusual characters, is empty or very long."""
    text = draw.one(
        ("", "\0", "\n\r", "\\ud800", "\\udfff\\ud800", "é", "🐟", "\u202e", "\x7f", "x" * 4096, "x" * 4097)
    )
    content = base.content
    places = [place for place in _places(content) if isinstance(place[1][place[2]], str)]
    path, holder, key = draw.one(places)
    holder[key] = "@@"
    literal = f'"{text}"' if text.startswith("\\u") else json.dumps(text, ensure_ascii=draw.chance(2))
    return manifest_bytes(json.dumps(content).replace('"@@"', literal).encode(), "open", f"{path} is {literal:.20}")


def unknown_keys(base: Base, draw: Draw) -> Mutant:
    """Keys that this version does not know, anywhere in the manifest but in `method`."""
    content = base.content
    holders = [
        content,
        content["dataset"],
        content["images"],
        content["records"],
        content["codebooks"],
        content["teacher"],
    ]
    holder = draw.one([*holders, *content["shards"]])
    holder[draw.one(("news", "", "é", "x" * 5000, "Name"))] = draw.one(
        (None, 1, [1] * 1000, {"a": {}}, "x" * 10_000, 10**30)
    )
    return manifest_bytes(json.dumps(content).encode(), "harmless", "unknown keys")


def rewrite_manifest(base: Base, draw: Draw) -> Mutant:
    """The same manifest as another writer would put it: order of keys, spaces, escapes, no keys that are null."""
    content = base.content
    if draw.chance(2):
        content["dataset"].pop("wnids")
        content["images"].pop("quality")
    keys = sorted(content, key=lambda key: draw.below(100))
    text = json.dumps({key: content[key] for key in keys}, indent=draw.one((None, 0, 1, 4)), ensure_ascii=False)
    if draw.chance(2):
        text = text.replace('"circle"', f'"{_escaped("circle")}"').replace("/", "\\/")
    return manifest_bytes(f"{draw.one(('', ' ', chr(10)))}{text}\r\n\t".encode(), "harmless", "written otherwise")


KINDS = (
    change_manifest_bits,
    change_manifest_bytes,
    truncate_manifest,
    swap_manifest,
    lie_in_manifest,
    confuse_manifest_types,
    repeat_key,
    huge_numbers,
    not_finite_numbers,
    odd_numbers,
    nest_deeply,
    broken_text,
    odd_texts,
    unknown_keys,
    rewrite_manifest,
)
