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
FOLDERS = sorted(path.parent for path in GOLDEN.glob("v*/dataset.json"))


def read_frame(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The map of a frame [R14], and the bytes after it."""
    length, crc = struct.unpack("<II", data[:8])
    payload = data[8 : 8 + length]
    assert zlib.crc32(payload) == crc
    return msgpack.unpackb(zstandard.ZstdDecompressor().decompress(payload)), data[8 + length :]


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


def group_bounds(pairs: int, cycle: int) -> list[tuple[int, int]]:
    starts = list(range(0, pairs, cycle))
    if pairs % cycle == 1 and len(starts) > 1:
        del starts[-1]
    return list(zip(starts, [*starts[1:], pairs], strict=True))


def partners(order: list[int], cycle: int) -> list[int]:
    result = []
    for low, high in group_bounds(len(order), cycle):
        result += [*order[low + 1 : high], order[low]]
    return result


def verbatim_pairs(manifest: dict[str, Any], n: int, pairs: int, groups: int, bits: BitReader) -> dict[str, list[Any]]:
    """The columns of an epoch with verbatim coding."""
    cycle, size = manifest["records"]["cycle"], manifest["images"]["size"]
    bounds = group_bounds(pairs, cycle)
    image = [bits.take(bits_for(n)) for _ in range(pairs)]
    partner = [low + bits.take(bits_for(high - low)) for low, high in bounds for _ in range(low, high)]
    view = [read_box(bits, size) for _ in range(pairs)]
    flip = [bool(bits.take(1)) if manifest["images"]["flip"] else False for _ in range(pairs)]
    mixes = []
    for _ in range(groups):
        cut, box = bits.take(1), read_box(bits, size)
        lam = struct.unpack("<f", struct.pack("<I", bits.take(16) | bits.take(16) << 16))[0]
        mixes.append((bool(cut), box if cut else [0, 0, 0, 0], lam))
    assert bits.rest == 0
    mix = [mixes[t // manifest["records"]["mix_group"]] for t in range(pairs)]
    return {
        "index_org": image,
        "index_aug": [image[p] for p in partner],
        "view_org": view,
        "view_aug": [view[p] for p in partner],
        "flip_org": flip,
        "flip_aug": [flip[p] for p in partner],
        "is_cutmix": [cut for cut, _, _ in mix],
        "mix_box": [box for _, box, _ in mix],
        "lam": [lam for _, _, lam in mix],
    }


def read_box(bits: BitReader, size: int) -> list[int]:
    top, left, height, width = (bits.take(bits_for(size)) for _ in range(4))
    return [top, left, height + 1, width + 1]


def drawn_pairs(manifest: dict[str, Any], drawn: dict[str, list[int]], n: int) -> dict[str, list[Any]]:
    """The columns of an epoch with explicit or derived coding."""
    books, size, group = manifest["codebooks"], manifest["images"]["size"], manifest["records"]["mix_group"]
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
    }


def decode_block(
    manifest: dict[str, Any], block: bytes, n: int, pairs: int, shard: int, first: int, count: int
) -> list[dict[str, list[Any]]]:
    """The epochs of one block, `first` the number of its first."""
    content = zstandard.ZstdDecompressor().decompress(block)
    books, coding = manifest["codebooks"]["distances"], manifest["records"]["coding"]
    joint, further = len(books) <= 16, manifest["records"].get("further") or 0
    planes = -(-bits_for(len(manifest["dataset"]["class_names"])) // 8) + 1
    end = len(content) - further * planes * count * pairs
    levels, others = content[end - count * pairs * (1 if joint else 2) : end], content[end:]
    packed = content[: end - len(levels)]
    groups = -(-pairs // manifest["records"]["mix_group"])
    epochs = []
    for k in range(count):
        bits = BitReader(packed[k * len(packed) // count : (k + 1) * len(packed) // count])
        if coding == "verbatim":
            columns = verbatim_pairs(manifest, n, pairs, groups, bits)
        elif coding == "explicit":
            columns = drawn_pairs(manifest, explicit_draws(manifest, n, groups, bits), n)
        else:
            columns = drawn_pairs(manifest, derived_draws(manifest, n, groups, shard, first + k), n)
        here = levels[k * len(levels) // count : (k + 1) * len(levels) // count]
        both = [divmod(b, len(books)) for b in here] if joint else list(zip(here[::2], here[1::2], strict=True))
        columns["distance_org"] = [books[org] for org, _ in both]
        columns["distance_aug"] = [books[aug] for _, aug in both]
        if further:
            place = [[(t * count + k) * pairs + p for t in range(further)] for p in range(pairs)]
            plane = further * count * pairs
            columns["further_classes"] = [
                [sum(others[b * plane + at] << 8 * b for b in range(planes - 1)) for at in row] for row in place
            ]
            columns["further_distances"] = [[books[others[(planes - 1) * plane + at]] for at in row] for row in place]
        epochs.append(columns)
    return epochs


def decode_shard(manifest: dict[str, Any], path: Path) -> dict[str, Any]:
    with tarfile.open(path) as archive:
        members = [(m.name, archive.extractfile(m).read()) for m in archive]  # type: ignore[union-attr]
    header, rest = read_frame(members[0][1])
    assert (members[0][0], header["format"], rest) == ("__nrrdd__/header", "nrrdd-shard", b"")
    assert header["version"][0] == (2 if manifest["records"].get("further") else 1)
    assert [[name, len(data), zlib.crc32(data)] for name, data in members[1:]] == header["members"]
    names = [name for name, _ in members[1:-1]]
    head, blocks = read_frame(members[-1][1])
    epochs: list[dict[str, list[Any]]] = []
    for size, crc in zip(head["blocks"], head["crcs"], strict=True):
        block, blocks = blocks[:size], blocks[size:]
        assert zlib.crc32(block) == crc
        count = min(manifest["records"]["block_epochs"], head["epochs"] - len(epochs))
        epochs += decode_block(manifest, block, len(names), head["pairs"], header["shard"], len(epochs), count)
    assert blocks == b"" and len(epochs) == head["epochs"]
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
    assert len(printed) == 8 + 51 + 40
    assert data.startswith(printed)


def is_hex(text: str) -> bool:
    return bool(text) and all(len(part) == 2 and set(part) <= set("0123456789abcdef") for part in text.split())


def test_this_file_shares_no_code_with_the_package() -> None:
    tree = ast.parse(Path(__file__).read_text())
    imported = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not [name for name in imported if name.startswith(("nrrdd_format", "tiny_dataset"))]
