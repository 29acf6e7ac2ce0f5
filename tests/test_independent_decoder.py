"""A second decoder, written from SPEC.md alone: it imports nothing of nrrdd_format and reads the golden shards."""

from __future__ import annotations

import ast
import hashlib
import json
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import zstandard

GOLDEN = Path(__file__).resolve().parent / "golden"
FOLDERS = sorted(path.parent for path in GOLDEN.glob("v1.*/dataset.json"))


def read_frame(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The map of a frame [R14], and the bytes after it."""
    length, crc = struct.unpack("<II", data[:8])
    payload = data[8 : 8 + length]
    assert zlib.crc32(payload) == crc
    return msgpack.unpackb(payload), data[8 + length :]


def bits_for(count: int) -> int:
    return (count - 1).bit_length()


class BitReader:
    """The packed fields as one big number, lowest bit first."""

    def __init__(self, data: bytes) -> None:
        self.rest = int.from_bytes(data, "little")

    def take(self, width: int) -> int:
        value = self.rest & ((1 << width) - 1)
        self.rest >>= width
        return value


def explicit_draws(manifest: dict[str, Any], n: int, groups: int, bits: BitReader) -> dict[str, list[int]]:
    unnamed = list(range(n))
    order = [unnamed.pop(bits.take(bits_for(n - i))) for i in range(n)]
    view = [bits.take(bits_for(len(manifest["codebooks"]["views"]))) for _ in range(n)]
    flip = [bits.take(1) if manifest["images"]["flip"] else 0 for _ in range(n)]
    mix = [bits.take(bits_for(len(manifest["codebooks"]["mixes"]))) for _ in range(groups)]
    assert bits.rest == 0
    return {"order": order, "view": view, "flip": flip, "mix": mix}


def derived_draws(manifest: dict[str, Any], n: int, groups: int, shard: int, epoch: int) -> dict[str, list[int]]:
    def outputs(purpose: str, count: int) -> list[int]:
        text = f"nrrdd/{purpose}/{manifest['records']['seed']}/{shard}/{epoch}"
        key = np.frombuffer(hashlib.sha256(text.encode()).digest()[:16], "<u8").astype(np.uint64)
        return [int(v) for v in np.random.Philox(key=key, counter=0).random_raw(count)]

    def integers(purpose: str, count: int, high: int) -> list[int]:
        return [((r >> 32) * high) >> 32 for r in outputs(purpose, count)]

    raw = outputs("order", n)
    return {
        "order": sorted(range(n), key=lambda i: (raw[i], i)),
        "view": integers("view", n, len(manifest["codebooks"]["views"])),
        "flip": integers("flip", n, 2) if manifest["images"]["flip"] else [0] * n,
        "mix": integers("mix", groups, len(manifest["codebooks"]["mixes"])),
    }


def partners(order: list[int], cycle: int) -> list[int]:
    starts = list(range(0, len(order), cycle))
    if len(order) % cycle == 1 and len(starts) > 1:
        del starts[-1]
    result = []
    for low, high in zip(starts, [*starts[1:], len(order)], strict=True):
        result += [*order[low + 1 : high], order[low]]
    return result


def decode_block(manifest: dict[str, Any], block: bytes, n: int, shard: int, epoch: int) -> dict[str, list[Any]]:
    content = zstandard.ZstdDecompressor().decompress(block)
    packed, levels_org, levels_aug = content[: -2 * n], content[-2 * n : -n], content[-n:]
    group = manifest["records"]["mix_group"]
    groups = (n + group - 1) // group
    if manifest["records"]["coding"] == "explicit":
        drawn = explicit_draws(manifest, n, groups, BitReader(packed))
    else:
        assert packed == b""
        drawn = derived_draws(manifest, n, groups, shard, epoch)
    books, size = manifest["codebooks"], manifest["images"]["size"]
    org, aug = drawn["order"], partners(drawn["order"], manifest["records"]["cycle"])
    mixes = [books["mixes"][drawn["mix"][t // group]] for t in range(n)]
    cut = [isinstance(m, list) for m in mixes]
    return {
        "index_org": org,
        "index_aug": aug,
        "view_org": [books["views"][drawn["view"][i]] for i in org],
        "view_aug": [books["views"][drawn["view"][i]] for i in aug],
        "flip_org": [bool(drawn["flip"][i]) for i in org],
        "flip_aug": [bool(drawn["flip"][i]) for i in aug],
        "is_cutmix": cut,
        "mix_box": [m if c else [0, 0, 0, 0] for m, c in zip(mixes, cut, strict=True)],
        "lam": [1 - m[2] * m[3] / size**2 if c else m for m, c in zip(mixes, cut, strict=True)],
        "distance_org": [books["distances"][level] for level in levels_org],
        "distance_aug": [books["distances"][level] for level in levels_aug],
    }


def decode_shard(manifest: dict[str, Any], path: Path) -> dict[str, Any]:
    with tarfile.open(path) as archive:
        members = [(m.name, archive.extractfile(m).read()) for m in archive]  # type: ignore[union-attr]
    header, rest = read_frame(members[0][1])
    assert (members[0][0], header["format"], header["version"][0], rest) == ("__nrrdd__/header", "nrrdd-shard", 1, b"")
    assert [[name, len(data), zlib.crc32(data)] for name, data in members[1:]] == header["members"]
    names = [name for name, _ in members[1:-1]]
    head, blocks = read_frame(members[-1][1])
    epochs = []
    for epoch, (size, crc) in enumerate(zip(head["blocks"], head["crcs"], strict=True)):
        block, blocks = blocks[:size], blocks[size:]
        assert zlib.crc32(block) == crc
        epochs.append(decode_block(manifest, block, len(names), header["shard"], epoch))
    assert blocks == b""
    return {
        "indices": [int(name.split("_c")[0]) for name in names],
        "labels": [int(name.split("_c")[1].split(".")[0]) for name in names],
        "epochs": epochs,
    }


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_golden_shards_decode_by_the_spec_alone(folder: Path) -> None:
    manifest = json.loads((folder / "dataset.json").read_text())
    expected = json.loads((folder / "expected.json").read_text())
    for entry, shard in zip(manifest["shards"], expected["shards"], strict=True):
        path = folder / entry["name"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"]
        found = decode_shard(manifest, path)
        assert found["indices"] == shard["indices"] and found["labels"] == shard["labels"]
        for mine, theirs in zip(found["epochs"], shard["epochs"], strict=True):
            assert mine.keys() == theirs.keys()
            for name in mine:
                assert np.array_equal(np.float32(mine[name]), np.float32(theirs[name])), name


def test_the_worked_example_of_the_spec_is_in_the_golden_shard() -> None:
    """SPEC.md section 11 prints the records member; its bytes are those of the file."""
    spec = (GOLDEN.parent.parent / "nrrdd_format" / "SPEC.md").read_text()
    lines = spec.split("## 11.")[1].splitlines()
    hexes = [line.split("  ") for line in lines if line.startswith("    ")]
    printed = b"".join(bytes.fromhex(part) for row in hexes for part in row if is_hex(part.strip()))
    with tarfile.open(GOLDEN / "v1.0-explicit" / "shard-00000.tar") as archive:
        member = archive.extractfile("__nrrdd__/records")
        assert member is not None
        data = member.read()
    assert len(printed) == 8 + 42 + 33
    assert data.startswith(printed)


def is_hex(text: str) -> bool:
    return bool(text) and all(len(part) == 2 and set(part) <= set("0123456789abcdef") for part in text.split())


def test_this_file_shares_no_code_with_the_package() -> None:
    tree = ast.parse(Path(__file__).read_text())
    imported = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not [name for name in imported if name.startswith(("nrrdd_format", "tiny_dataset"))]
