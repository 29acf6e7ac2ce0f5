"""Mutants: changed datasets, and how a change is carried up to the manifest.

*Deep* mutations seal everything above what they change: checksums of members and blocks, the member table, tar headers
and the manifest's sha256, so that they reach the check that is meant. The others leave the shard's own checksums alone;
in half of them the manifest's sha256 is made right, so that the shard's own checks must find the damage.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from benchmarks.mutation_parts import SHARDS, Base, Draw, Map, Parts, seal
from nrrdd_format.manifest import MANIFEST_NAME
from nrrdd_format.shards import shard_name

Expectation = Literal["harmless", "damage", "unseen", "broken", "open"]
"""What a mutation does, and so what must come of it:

harmless: hits nothing that has a meaning: read and verified without complaint, identical.
damage: changes bytes under their checksums: verify finds it, a reader refuses it or reads identical data.
unseen: breaks a rule that ordinary readers need not check: verify finds it.
broken: breaks a rule that every reader checks: every reader refuses it.
open: may leave a dataset that keeps every rule: refused, identical or another dataset.
"""


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """A changed dataset."""

    files: Mapping[str, bytes | None]  # the files that differ from the base's; None: missing
    expectation: Expectation
    what: str  # was done, for people


def a_name(draw: Draw) -> str:
    return shard_name(draw.below(SHARDS))


def a_shard(base: Base, draw: Draw) -> tuple[str, bytes]:
    name = a_name(draw)
    return name, base.files[name]


def a_block(base: Base, draw: Draw) -> tuple[str, int, bytes]:
    name = a_name(draw)
    contents = base.parts[name].contents
    block = draw.below(len(contents))
    return name, block, contents[block]


def damaged(base: Base, draw: Draw, name: str, data: bytes, what: str) -> Mutant:
    """A shard whose own checksums are left as they were; the manifest's are made right in half of the cases."""
    if data == base.files[name]:
        return Mutant(files={}, expectation="harmless", what=f"{what}, to what it was")
    if draw.chance(2) or not data:
        return Mutant(files={name: data}, expectation="damage", what=f"{name}: {what}")
    files = {name: data, MANIFEST_NAME: manifest_of(base, name, data)}
    return Mutant(files=files, expectation="damage", what=f"{name}: {what}; sha256 made right")


def sealed_shard(base: Base, name: str, data: bytes, expectation: Expectation, what: str) -> Mutant:
    """A shard and a manifest that agrees with it."""
    if data == base.files[name]:
        expectation = "harmless"
    files = {name: data, MANIFEST_NAME: manifest_of(base, name, data)}
    return Mutant(files=files, expectation=expectation, what=what)


def sealed_parts(base: Base, name: str, parts: Parts, expectation: Expectation, what: str) -> Mutant:
    return sealed_shard(base, name, seal(parts), expectation, f"{name}: {what}")


def with_content(base: Base, name: str, block: int, content: bytes, expectation: Expectation, what: str) -> Mutant:
    contents = list(base.parts[name].contents)
    contents[block] = content
    parts = replace(base.parts[name], contents=tuple(contents))
    return sealed_parts(base, name, parts, expectation, f"block {block}: {what}")


def with_block(base: Base, name: str, block: int, data: bytes, expectation: Expectation, what: str) -> Mutant:
    def change(blocks: list[bytes]) -> list[bytes]:
        return [*blocks[:block], data, *blocks[block + 1 :]]

    whole = seal(base.parts[name], blocks=change)
    return sealed_shard(base, name, whole, expectation, f"{name}: block {block}: {what}")


def manifest_of(base: Base, name: str, data: bytes) -> bytes:
    """The manifest with the size, hash and record bytes of a changed shard."""
    content = base.content
    (entry,) = [entry for entry in content["shards"] if entry["name"] == name]
    entry.update(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
    records = _record_bytes(data)
    if records is not None:
        entry["record_bytes"] = records
    return json.dumps(content).encode()


def _record_bytes(data: bytes) -> int | None:
    """Size of the records member as its tar header states it, if that can be found."""
    at = data.rfind(b"__nrrdd__/records" + bytes(83))
    digits = data[at + 124 : at + 135]
    return int(digits, 8) if at >= 0 and digits.isdigit() and not set(digits) & set(b"89") and int(digits, 8) else None


def changed_manifest(base: Base, change: Callable[[Map], object], expectation: Expectation, what: str) -> Mutant:
    content = base.content
    change(content)
    return manifest_bytes(json.dumps(content).encode(), expectation, what)


def manifest_bytes(data: bytes, expectation: Expectation, what: str) -> Mutant:
    return Mutant(files={MANIFEST_NAME: data}, expectation=expectation, what=f"manifest: {what}")
