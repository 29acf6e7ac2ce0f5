"""The layout of an FKD store: written as its own trainers read it, and read without trusting a byte of it."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from make_fkd_store import make_images, make_store, rewrite
from torch.utils.data import DataLoader, RandomSampler
from torchvision.datasets import ImageFolder

from builders.fkd_layout import (
    FkdBatch,
    batch_path,
    count_batches,
    count_epochs,
    read_batch,
    sampler_orders,
    write_batch,
)
from nrrdd_format.errors import FormatError, OutputError

SIZE, CLASSES = 32, 3
LARGEST = 40


def _batch(pairs: int = 4, size: int = SIZE) -> FkdBatch:
    draw = np.random.default_rng(3)
    length = draw.integers(1, size + 1, (pairs, 2))
    start = draw.integers(0, size + 1 - length)
    return FkdBatch(
        views=np.concatenate([start, length], axis=1).astype(np.int16),
        flip=draw.random(pairs) < 0.5,
        mix_index=draw.permutation(pairs),
        mix_box=(3, 4, 5, 6),
        lam=0.25,
        logits=torch.randn(pairs, CLASSES, generator=torch.Generator().manual_seed(3)).half(),
    )


def _read(path: Path, size: int = SIZE) -> FkdBatch:
    return read_batch(path, size=size, num_classes=CLASSES, most=LARGEST)


def _assert_equal(left: FkdBatch, right: FkdBatch) -> None:
    np.testing.assert_array_equal(left.views, right.views)
    np.testing.assert_array_equal(left.flip, right.flip)
    np.testing.assert_array_equal(left.mix_index, right.mix_index)
    assert (left.mix_box, left.lam) == (right.mix_box, right.lam)
    torch.testing.assert_close(left.logits, right.logits, rtol=0, atol=0)


@pytest.mark.parametrize("size", [32, 224, 1024])
@pytest.mark.parametrize("mix", ["cutmix", "empty box", "mixup", "none"])
def test_what_is_written_is_read(tmp_path: Path, mix: str, size: int) -> None:
    batch = _batch(size=size)
    if mix == "empty box":
        batch = replace(batch, mix_box=(7, 0, 0, 9))
    if mix in ("mixup", "none"):
        batch = replace(batch, mix_box=None)
    if mix == "none":
        batch = replace(batch, mix_index=None, lam=None)
    written = write_batch(tmp_path / "batch", batch, size)
    assert written == (tmp_path / "batch").stat().st_size
    _assert_equal(batch, _read(tmp_path / "batch", size))


def test_a_file_is_the_list_that_trainers_expect(tmp_path: Path) -> None:
    batch = replace(_batch(), views=np.array([[8, 16, 4, 2]] * 4, np.int16), mix_box=(1, 2, 3, 10))
    write_batch(tmp_path / "batch", batch, SIZE)
    seen: list[Any] = []
    rewrite(tmp_path / "batch", lambda content: seen.extend(content))
    coordinates, flip, mix_index, lam, box, logits = seen
    assert coordinates.dtype == torch.float32 and coordinates[0].tolist() == [0.25, 0.5, 0.125, 0.0625]
    assert (flip.dtype, mix_index.dtype, logits.dtype) == (torch.bool, torch.int64, torch.float16)
    assert lam == 0.25 and box == [1, 2, 4, 12]
    assert [type(value) for value in (lam, *box)] == [np.float64] + [np.int64] * 4


def test_a_store_of_the_original_scripts_is_read(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images")
    store = make_store(tmp_path / "store", images, epochs=2, batch=6)
    assert (count_epochs(store), count_batches(store, 1)) == (2, 4)
    sizes = [len(_read(batch_path(store, 1, number))) for number in range(4)]
    assert sizes == [6, 6, 6, 3]


def test_the_order_is_that_of_a_loader_with_one_generator(tmp_path: Path) -> None:
    folder = ImageFolder(make_images(tmp_path / "images"))
    sampler = RandomSampler(folder, generator=torch.Generator().manual_seed(9))
    loader: DataLoader[int] = DataLoader(range(len(folder)), batch_size=4, sampler=sampler)  # type: ignore[arg-type]
    expected = [torch.cat(list(loader)).tolist() for _ in range(3)]
    assert [order.tolist() for order in islice(sampler_orders(len(folder), 9), 3)] == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [32, 224, 500])
def test_coordinates_of_any_float_type_name_their_pixels(tmp_path: Path, size: int, dtype: torch.dtype) -> None:
    batch = _batch(LARGEST, size)
    write_batch(tmp_path / "batch", batch, size)

    def convert(content: list[Any]) -> None:
        content[0] = (content[0].double()).to(dtype)

    rewrite(tmp_path / "batch", convert)
    np.testing.assert_array_equal(_read(tmp_path / "batch", size).views, batch.views)


@pytest.mark.parametrize("name", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_numbers_of_both_major_versions_of_numpy_are_read(tmp_path: Path, name: str) -> None:
    write_batch(tmp_path / "batch", _batch(), SIZE)
    _edit_pickle(tmp_path / "batch", lambda data: _named(data, name))
    _assert_equal(_batch(), _read(tmp_path / "batch"))


def _named(data: bytes, module: str) -> bytes:
    for known in (b"cnumpy.core.multiarray\n", b"cnumpy._core.multiarray\n"):
        data = data.replace(known, f"c{module}\n".encode())
    return data


def _edit_pickle(path: Path, change: Callable[[bytes], bytes], **options: Any) -> None:
    """Rewrites a file of torch.save with its pickle changed."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in members.items():
            archive.writestr(name, change(data) if name.endswith("data.pkl") else data)


def _set(position: int, value: Any) -> Callable[[list[Any]], None]:
    def change(content: list[Any]) -> None:
        content[position] = value(content[position]) if callable(value) else value

    return change


def _at(row: int, column: int, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[row, column] = value
        return tensor

    return change


FAULTS: list[tuple[str, Callable[[list[Any]], Any], str]] = [
    ("no list", lambda content: {"logits": content[5]}, "holds a dict, expected the list"),
    ("seven entries", lambda content: [*content, 0], "holds 7 entries, expected the list"),
    ("logits of other classes", _set(5, lambda logits: logits[:, :2]), "logits: float16 [4, 2], expected"),
    ("logits of whole numbers", _set(5, lambda logits: logits.long()), "logits: int64"),
    ("infinite logits", _set(5, _at(2, 1, float("inf"))), "logits are not finite"),
    ("no tensor", _set(5, [1.0, 2.0]), "logits: a list"),
    ("too many pairs", _set(5, torch.zeros(LARGEST + 1, CLASSES)), "holds 41 pairs, expected 1..40"),
    ("no pair", _set(5, torch.zeros(0, CLASSES)), "holds 0 pairs"),
    ("a meta tensor", _set(5, torch.zeros(4, CLASSES, device="meta")), "logits: a Tensor, expected a plain tensor"),
    ("a sparse tensor", _set(5, torch.zeros(4, CLASSES).to_sparse()), "logits: a Tensor, expected a plain tensor"),
    ("a parameter", _set(5, torch.nn.Parameter(torch.zeros(4, CLASSES))), "logits: a Parameter"),
    ("coordinates of three numbers", _set(0, lambda c: c[:, :3]), "coordinates: float32 [4, 3], expected"),
    ("coordinates of other pairs", _set(0, lambda c: c[:3]), "coordinates: float32 [3, 4], expected"),
    ("half a pixel", _set(0, _at(1, 0, 3.5 / SIZE)), "coordinates of pair 1: [0.109375"),
    ("below the image", _set(0, _at(0, 0, 1.0)), "expected whole pixels inside 32x32"),
    ("before the image", _set(0, _at(0, 1, -1 / SIZE)), "coordinates of pair 0"),
    ("no pixel", _set(0, _at(3, 2, 0.0)), "coordinates of pair 3"),
    ("not a number", _set(0, _at(3, 2, float("nan"))), "coordinates of pair 3"),
    ("endless", _set(0, _at(3, 3, float("inf"))), "coordinates of pair 3"),
    ("flips as numbers", _set(1, lambda flip: flip.float()), "flip: float32 [4], expected bool [4]"),
    ("too few flips", _set(1, lambda flip: flip[:1]), "flip: bool [1]"),
    (
        "partner twice",
        _set(2, torch.tensor([0, 1, 1, 3])),
        "mix index [0, 1, 1, 3]: expected every number of 0..3 once",
    ),
    ("partner elsewhere", _set(2, torch.tensor([0, 1, 2, 4])), "mix index"),
    ("no partners", _set(2, None), "mix index: a NoneType"),
    ("no lam", _set(3, None), "lam is None"),
    ("lam above 1", _set(3, np.float64(1.5)), "lam is 1.5"),
    ("lam is no number", _set(3, float("nan")), "lam is nan"),
    ("lam is text", _set(3, "0.5"), "lam is '0.5'"),
    ("box of three", _set(4, [1, 2, 3]), "box is [1, 2, 3]"),
    ("box outside", _set(4, [0, 0, 33, 4]), "box is [0, 0, 33, 4]"),
    ("box upside down", _set(4, [5, 0, 4, 4]), "box is [5, 0, 4, 4]"),
    ("box between pixels", _set(4, [0.5, 0, 4, 4]), "box is [0.5, 0, 4, 4]"),
]


@pytest.mark.parametrize(("change", "message"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS])
def test_content_that_breaks_the_layout_is_named(tmp_path: Path, change: Callable[..., Any], message: str) -> None:
    path = tmp_path / "batch"
    write_batch(path, _batch(), SIZE)
    rewrite(path, change)
    with pytest.raises(FormatError) as caught:
        _read(path)
    assert caught.value.path == str(path) and message in caught.value.reason
    assert "\n" not in str(caught.value)


class _Runs:
    """Pickled, it asks for a folder to be made."""

    def __init__(self, folder: Path, call: Callable[..., Any]) -> None:
        self._folder = folder
        self._call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return self._call, (str(self._folder),)


def test_code_in_a_file_is_named_and_not_run(tmp_path: Path) -> None:
    torch.save([_Runs(tmp_path / "made", Path.mkdir)], tmp_path / "method")
    torch.save([_Runs(tmp_path / "made", eval)], tmp_path / "function")
    torch.save([np.zeros(3)], tmp_path / "array")
    for name, asked in (("method", "getattr"), ("function", "eval"), ("array", "numpy.ndarray")):
        with pytest.raises(FormatError, match=rf"asks for .*{asked}.* is not run; refused"):
            _read(tmp_path / name)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("value", [np.float16(1), np.complex128(1), np.bool_(True), np.str_("x"), np.void(b"xx")])
def test_other_numpy_values_are_refused(tmp_path: Path, value: Any) -> None:
    torch.save([value], tmp_path / "batch")
    with pytest.raises(FormatError, match=r"a number of NumPy's type|asks for"):
        _read(tmp_path / "batch")


def test_numpy_numbers_of_the_wrong_length_or_order_are_refused(tmp_path: Path) -> None:
    for old, new, message in ((b"f8", b"f4", "does not fit its type"), (b"<", b">", "little-endian")):
        write_batch(tmp_path / "batch", _batch(), SIZE)
        _edit_pickle(tmp_path / "batch", lambda data, old=old, new=new: data.replace(old, new, 1))  # type: ignore[misc]
        with pytest.raises(FormatError, match=message):
            _read(tmp_path / "batch")


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "batch"
    write_batch(path, _batch(), SIZE)
    whole = path.read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(FormatError, match=r"truncated, or no file of torch\.save") as caught:
            _read(path)
        assert caught.value.path == str(path)


def test_changed_logits_do_not_match_their_checksum(tmp_path: Path) -> None:
    path, batch = tmp_path / "batch", _batch()
    write_batch(path, batch, SIZE)
    logits = batch.logits.numpy().tobytes()
    path.write_bytes(path.read_bytes().replace(logits, logits[:-1] + bytes([logits[-1] ^ 1])))
    with pytest.raises(FormatError, match=r"the checksum of .* does not match"):
        _read(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"batch_0\.tar: cannot be read"):
        _read(tmp_path / "batch_0.tar")


def test_a_file_that_holds_too_much_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "batch"
    write_batch(path, _batch(), SIZE)
    _edit_pickle(path, lambda data: data + bytes(2**24), compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**17
    with pytest.raises(FormatError, match=r"holds 16\d+ bytes, expected at most"):
        _read(path)


def test_a_tensor_that_claims_more_than_the_file_has_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "batch"
    torch.save([torch.zeros(2, 3)], path)
    _edit_pickle(
        path, lambda data: data.replace(b"K\x06t", b"J\x00\x10\x00\x00t").replace(b"K\x02K\x03", b"M\xff\x02K\x03")
    )
    with pytest.raises(FormatError, match="damaged, or no file that"):
        _read(path)


@given(
    changes=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=4),
    only_pickle=st.booleans(),
)
def test_damaged_bytes_never_do_more_than_raise(
    changes: list[tuple[int, int]], only_pickle: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged"
    write_batch(path, _batch(), SIZE)

    def damage(data: bytes) -> bytes:
        changed = bytearray(data)
        for place, value in changes:
            changed[place % len(changed)] = value
        return bytes(changed)

    if only_pickle:
        _edit_pickle(path, damage)
    else:
        path.write_bytes(damage(path.read_bytes()))
    try:
        assert len(_read(path)) == 4
    except FormatError as error:
        assert "\n" not in str(error) and error.path == str(path)


def test_a_table_of_contents_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "batch"
    write_batch(path, _batch(), SIZE)
    head, found, tail = path.read_bytes().rpartition(b"data.pkl")
    path.write_bytes(head + b"data\xa3pkl" + tail)
    assert found
    with pytest.raises(FormatError, match="truncated, or no file"):
        _read(path)


def test_missing_batches_and_epochs_are_named(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", make_images(tmp_path / "images"), epochs=3)
    batch_path(store, 1, 2).unlink()
    with pytest.raises(FormatError, match=r"epoch_1: batch_2\.tar is missing, while batch_3\.tar is there"):
        count_batches(store, 1)
    (store / "epoch_1").rename(store / "epoch_01")
    with pytest.raises(FormatError, match="epoch_1 is missing, while epoch_2 is there"):
        count_epochs(store)
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(FormatError, match=r"holds no epoch_0|cannot be read"):
            count_epochs(folder)


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="none/batch: cannot write"):
        write_batch(tmp_path / "none" / "batch", _batch(), SIZE)
