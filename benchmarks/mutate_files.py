"""Mutations of a shard's bytes, tar headers and padding."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.mutants import Mutant, a_name, a_shard, damaged, manifest_of, sealed_shard
from benchmarks.mutation_parts import IMAGES, Base, Draw, Member, join, seal, split
from nrrdd_format import tar
from nrrdd_format.manifest import MANIFEST_NAME
from nrrdd_format.shards import shard_name


def flip_bits(base: Base, draw: Draw) -> Mutant:
    """One to eight bits of a shard."""
    name, data = a_shard(base, draw)
    changed = bytearray(data)
    for _ in range(draw.one((1, 1, 1, 2, 3, 8))):
        changed[draw.below(len(changed))] ^= 1 << draw.below(8)
    return damaged(base, draw, name, bytes(changed), "bits flipped")


def change_bytes(base: Base, draw: Draw) -> Mutant:
    """A run of bytes: random, zeros, ones, or copied from elsewhere in the shard."""
    name, data = a_shard(base, draw)
    length = draw.one((1, 1, 2, 4, 16, 64, 512))
    at, other = draw.below(len(data) - length + 1), draw.below(len(data) - length + 1)
    new = draw.one((draw.data(length), bytes(length), b"\xff" * length, data[other : other + length]))
    return damaged(base, draw, name, data[:at] + new + data[at + length :], f"{length} bytes at {at} changed")


def truncate_at_member(base: Base, draw: Draw) -> Mutant:
    """The shard ends where a tar header, a member's data, its padding or the end marker begins or ends."""
    name, data = a_shard(base, draw)
    ends, at = [0], 0
    for member in split(data):
        ends += [at + len(member.header), at + len(member.header) + len(member.data), at + len(member.whole)]
        at = ends[-1]
    end = min(max(draw.one([*ends, at + tar.BLOCK]) + draw.between(-1, 1), 0), len(data) - 1)
    return damaged(base, draw, name, data[:end], f"truncated to {end} bytes")


def truncate_anywhere(base: Base, draw: Draw) -> Mutant:
    """The shard ends anywhere."""
    name, data = a_shard(base, draw)
    end = draw.below(len(data))
    return damaged(base, draw, name, data[:end], f"truncated to {end} bytes")


def shift_bytes(base: Base, draw: Draw) -> Mutant:
    """Bytes are put in, taken out or added at the end."""
    name, data = a_shard(base, draw)
    at, length = draw.one((draw.below(len(data)), len(data))), draw.one((1, 2, 511, 512, 1024))
    if draw.chance(2) or at == len(data):
        changed = data[:at] + draw.one((bytes(length), draw.data(length))) + data[at:]
    else:
        changed = data[:at] + data[at + length :]
    return damaged(base, draw, name, changed, f"{len(changed) - len(data):+} bytes at {at}")


def swap_members(base: Base, draw: Draw) -> Mutant:
    """Two members change places, with or without their tar headers."""
    name, data = a_shard(base, draw)
    members = split(data)
    a, b = draw.two_of(len(members))
    if draw.chance(2):
        members[a], members[b] = members[b], members[a]
    else:
        one, two = members[a], members[b]
        members[a], members[b] = replace(two, header=one.header), replace(one, header=two.header)
    return damaged(base, draw, name, join(members), f"members {a} and {b} swapped")


def duplicate_member(base: Base, draw: Draw) -> Mutant:
    """A member occurs twice, or replaces another."""
    name, data = a_shard(base, draw)
    members = split(data)
    a, b = draw.two_of(len(members))
    members[b : b + draw.below(2)] = [members[a]]
    return damaged(base, draw, name, join(members), f"member {a} again at {b}")


def delete_member(base: Base, draw: Draw) -> Mutant:
    """A member is missing."""
    name, data = a_shard(base, draw)
    members = split(data)
    at = draw.below(len(members))
    del members[at]
    return damaged(base, draw, name, join(members), f"member {at} deleted")


def swap_or_lose_shards(base: Base, draw: Draw) -> Mutant:
    """A shard's file is missing, empty, another shard's, or of a dataset with another coding of the same name."""
    name, other = draw.one(((shard_name(0), shard_name(1)), (shard_name(1), shard_name(0))))
    content = draw.one((None, b"", base.files[other], base.files[MANIFEST_NAME], bytes(len(base.files[name]))))
    if content is None:
        return Mutant(files={name: None}, expectation="broken", what=f"{name} missing")
    return damaged(base, draw, name, content, f"{name} replaced")


def change_byte(base: Base, draw: Draw, at: int, *, sealed: bool) -> Mutant:
    """The byte at a position of the first shard is another one; `sealed`: the manifest has the right sha256 of that."""
    name, data = shard_name(0), base.first_shard
    at %= len(data)
    changed = data[:at] + bytes([data[at] ^ draw.between(1, 255)]) + data[at + 1 :]
    files = {name: changed, **({MANIFEST_NAME: manifest_of(base, name, changed)} if sealed else {})}
    return Mutant(files=files, expectation="damage", what=f"byte {at} of {name} changed")


# ---- tar headers that lie, with a right tar checksum

_TAR_FIELDS = {
    "name": (0, 100),
    "mode": (100, 8),
    "uid": (108, 8),
    "gid": (116, 8),
    "size": (124, 12),
    "mtime": (136, 12),
    "type": (156, 1),
    "linkname": (157, 100),
    "magic": (257, 6),
    "version": (263, 2),
    "uname": (265, 32),
    "devmajor": (329, 8),
    "prefix": (345, 155),
    "rest": (500, 12),
}


def lie_in_tar_header(base: Base, draw: Draw) -> Mutant:
    """A field of a tar header says something else; all checksums are right."""
    name = a_name(draw)
    field, (start, length) = draw.one(list(_TAR_FIELDS.items()))
    at = draw.below(IMAGES + 2)

    def change(members: list[Member]) -> list[Member]:
        block = members[at].header
        value = _tar_value(field, block[start : start + length], draw)
        members[at] = replace(members[at], header=_with_tar_checksum(block[:start] + value + block[start + length :]))
        return members

    data = seal(base.parts[name], archive=change)
    return sealed_shard(base, name, data, "broken", f"tar field {field} of member {at} of {name}")


def _tar_value(field: str, old: bytes, draw: Draw) -> bytes:
    """Another value of the field."""
    if field == "size":
        size = int(old[:11], 8)
        sizes = [0, size + 1, max(size - 1, 0), size + 512, size * 8, 8**11 - 1, draw.below(8**11)]
        texts = [b"%011o\0" % s for s in sizes] + [
            b"-0000000001\0",
            b"00000000089\0",
            b"\x80" + b"\xff" * 11,
            bytes(12),
        ]
        return draw.one([t for t in texts if t != old])
    if field == "type":
        return draw.one((b"\0", b"1", b"2", b"5", b"7", b"L", b"K", b"g", b"x", b"S"))
    changed = bytearray(old)
    changed[draw.below(len(changed))] ^= draw.between(1, 255)
    return bytes(changed)


def _with_tar_checksum(block: bytes) -> bytes:
    blank = block[:148] + b" " * 8 + block[156:]
    return blank[:148] + b"%06o\0 " % sum(blank) + blank[156:]


def dirty_padding(base: Base, draw: Draw) -> Mutant:
    """A padding byte is not zero: only verify reads those."""
    name = a_name(draw)

    def change(members: list[Member]) -> list[Member]:
        at = draw.one([i for i, member in enumerate(members) if member.padding])
        padding = bytearray(members[at].padding)
        padding[draw.below(len(padding))] = draw.between(1, 255)
        members[at] = replace(members[at], padding=bytes(padding))
        return members

    data = seal(base.parts[name], archive=change)
    if draw.chance(3):
        end = len(data) - 1 - draw.below(2 * tar.BLOCK)
        data = data[:end] + bytes([draw.between(1, 255)]) + data[end + 1 :]
    return sealed_shard(base, name, data, "unseen", f"padding of {name} not zero")


KINDS = (
    flip_bits,
    change_bytes,
    truncate_at_member,
    truncate_anywhere,
    shift_bytes,
    swap_members,
    duplicate_member,
    delete_member,
    swap_or_lose_shards,
    lie_in_tar_header,
    dirty_padding,
)
