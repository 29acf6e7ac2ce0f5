"""The manifest: round trips, and for every rule of SPEC.md section 3 a manifest that breaks it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_dataset import tiny_manifest, write_tiny

from nrrdd_format import manifest as manifest_module
from nrrdd_format.errors import FormatError, OutputError
from nrrdd_format.manifest import Manifest


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The JSON of a whole manifest; copy before changing."""
    folder = write_tiny(tmp_path_factory.mktemp("manifest") / "tiny")
    loaded: dict[str, Any] = json.loads((folder / "dataset.json").read_text())
    return loaded


def changed(content: dict[str, Any], change: Callable[[dict[str, Any]], object]) -> bytes:
    copy = json.loads(json.dumps(content))
    change(copy)
    return json.dumps(copy).encode()


def put(path: str, value: object) -> Callable[[dict[str, Any]], object]:
    """A change that sets the value at a path such as `shards.0.name`."""

    def change(content: Any) -> None:
        *parents, last = [int(p) if p.isdigit() else p for p in path.split(".")]
        for parent in parents:
            content = content[parent]
        content[last] = value

    return change


def test_round_trip(content: dict[str, Any]) -> None:
    manifest = Manifest.decode(json.dumps(content).encode())
    assert json.loads(json.dumps(manifest.to_json())) == content
    again = Manifest.decode(manifest.encode())
    assert again.to_json() == manifest.to_json()
    assert again.dataset_id == manifest.dataset_id


def test_each_top_level_key_has_a_line(content: dict[str, Any]) -> None:
    lines = Manifest.decode(json.dumps(content).encode()).encode().decode("ascii").splitlines()
    assert [line.split('"')[1] for line in lines[1:-1]] == list(content)


def test_the_dataset_id_depends_on_content_only(content: dict[str, Any]) -> None:
    def dataset_id(change: Callable[[dict[str, Any]], object]) -> str:
        return Manifest.decode(changed(content, change)).dataset_id

    same = dataset_id(lambda c: None)
    assert dataset_id(lambda c: c.update(news=1)) == same
    assert dataset_id(lambda c: c["records"].update(temperature=1)) == same
    assert dataset_id(put("records.temperature", 2.0)) != same
    assert dataset_id(put("method.note", "other")) != same


def test_the_dataset_id_is_that_of_the_normal_form(content: dict[str, Any]) -> None:
    """SPEC.md section 3, written out by hand: other readers have other habits with numbers, escapes and sorting."""
    as_found = r'{"😀": 1E-4, "～": 99e-6, "z\u007f\/é\u0001\n": [1E16, 25e15, 9.5e15, 1.50, 100, -0.0, 2e1]}'
    normal = (
        r'{"z\u007f/\u00e9\u0001\n":[1e+16,2.5e+16,9500000000000000.0,1.5,100,-0.0,20.0],'
        r'"\uff5e":9.9e-05,"\ud83d\ude00":0.0001}'
    )
    whole = Manifest.decode(changed(content, put("method", {}))).to_json()
    text = json.dumps({**whole, "version": [1, 0]}, sort_keys=True, separators=(",", ":"))
    decoded = Manifest.decode(json.dumps(whole).replace('"method": {}', f'"method": {as_found}').encode())
    expected = text.replace('"method":{}', f'"method":{normal}')
    assert expected != text
    assert decoded.dataset_id == hashlib.sha256(expected.encode("ascii")).hexdigest()


def test_layout_carries_the_tables(content: dict[str, Any]) -> None:
    layout = Manifest.decode(json.dumps(content).encode()).layout(1)
    assert (layout.images, layout.pairs, layout.cycle, layout.mix_group, layout.seed) == (7, 7, 3, 2, 11)
    views, mixes = layout.codebooks
    assert (len(views), len(mixes), len(layout.levels), layout.block_epochs) == (6, 5, 16, 1)
    assert views.tolist() == content["codebooks"]["views"]


def test_a_key_that_is_there_twice_among_very_many_is_found_at_once(content: dict[str, Any]) -> None:
    """Quadratic in the number of keys, it would take minutes."""
    many = ",".join(f'"key {k}": 0' for k in range(300_000))
    text = json.dumps(content)[:-1] + f', "method": {{{many}, "twice": 1, "twice": 2}}}}'
    with pytest.raises(FormatError, match="key 'twice' appears twice"):
        Manifest.decode(text.encode())


FAULTS: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (put("format", "zarr"), "format is 'zarr', expected 'nrrdd'"),
    (put("version", [3, 0]), r"version is 3\.0, this reader knows 1\.x and 2\.x"),
    (put("version", [0, 1]), r"version is 0\.1"),
    (put("version", 1), r"version is 1, expected \[major, minor\]"),
    (put("version", [True, 0]), "version is"),
    (put("version", [1, -1]), r"version is \[1, -1\], expected \[major, minor\]"),
    (put("method.deep", json.loads("[" * 70 + "]" * 70)), "values are nested deeper than 64 levels"),
    (lambda c: c.pop("images"), "^images is None, expected an object$"),
    (put("records", []), "records is a list of 0, expected an object"),
    (lambda c: c["dataset"].pop("name"), r"dataset\.name is missing"),
    (put("dataset.name", ""), r"dataset\.name is ''"),
    (put("dataset.name", "x" * 4097), r"dataset\.name"),
    (put("dataset.name", "a\ud800"), r"dataset\.name"),
    (put("dataset.class_names", []), r"dataset\.class_names"),
    (put("dataset.class_names", ["a", 3]), r"dataset\.class_names\[1\] is 3"),
    (put("dataset.wnids", ["n1"]), r"dataset\.wnids has 1 entries, expected 3"),
    (put("dataset.source_license", 4), r"dataset\.source_license is 4"),
    (put("images.count", 13), r"images\.count is 13, the shards hold 14"),
    (put("images.ipc", 0), r"images\.ipc is 0"),
    (put("images.size", 4097), r"images\.size is 4097"),
    (put("images.size", 1), r"^images\.size is 1, expected an integer in 2\.\.4096$"),
    (put("images.size", 16.0), r"images\.size is 16\.0"),
    (put("images.codec", "gif"), r"images\.codec is 'gif', expected one of jpeg, png, webp"),
    (put("images.quality", 101), r"images\.quality is 101"),
    (put("images.mean", [0.5, 0.5]), r"images\.mean is a list of 2"),
    (put("images.std", [0.5, 0.5, 0]), r"images\.std\[2\] is 0"),
    (put("images.std", [0.5, 0.5, 10**400]), "10000.* is too large a number"),
    (put("images.flip", 1), r"images\.flip is 1, expected true or false"),
    (put("records.coding", "zip"), r"records\.coding is 'zip'"),
    (put("records.epochs", 65537), r"records\.epochs is 65537"),
    (put("records.epochs", True), r"records\.epochs is True"),
    (put("records.cycle", 1), r"records\.cycle is 1,"),
    (put("records.mix_group", 0), r"records\.mix_group is 0"),
    (put("records.seed", -1), r"records\.seed is -1"),
    (put("records.seed", 2**63), r"records\.seed"),
    (put("records.mix", "cutout"), r"records\.mix is 'cutout'"),
    (put("records.temperature", 0), r"records\.temperature is 0"),
    (put("records.temperature", "1"), r"records\.temperature is '1'"),
    (put("codebooks.views", []), r"codebooks\.views"),
    (put("codebooks.views", [[0, 0, 16, 16]] * 65537), r"codebooks\.views is a list of 65537"),
    (put("codebooks.views.2", [0, 0, 17, 16]), r"codebooks\.views\[2\]"),
    (put("codebooks.views.2", [0, 0, 0, 16]), r"codebooks\.views\[2\]"),
    (put("codebooks.views.2", [-1, 0, 4, 4]), r"codebooks\.views\[2\]"),
    (put("codebooks.views.2", [0, 13, 4, 4]), r"codebooks\.views\[2\]"),
    (put("codebooks.views.2", [0, 0, 4.0, 4]), r"codebooks\.views\[2\]"),
    (put("codebooks.views.2", [0, 0, 4]), r"codebooks\.views\[2\]"),
    (put("codebooks.mixes", [[0, 0, 4, 4]] * 4097), r"codebooks\.mixes is a list of 4097"),
    (put("codebooks.mixes.0", [0, 0, 16, 16]), r"codebooks\.mixes\[0\]"),
    (put("codebooks.mixes.0", 0.3), r"codebooks\.mixes\[0\] is 0\.3"),
    (put("codebooks.mixes.0", 1.0), r"codebooks\.mixes\[0\] is 1\.0"),
    (put("codebooks.mixes.0", 0.0), r"codebooks\.mixes\[0\] is 0\.0"),
    (put("codebooks.mixes.0", "x"), r"codebooks\.mixes\[0\] is 'x'"),
    (put("codebooks.distances", [1.0]), r"codebooks\.distances is a list of 1"),
    (put("codebooks.distances", list(range(1, 258))), r"codebooks\.distances is a list of 257"),
    (put("codebooks.distances.3", -1), r"codebooks\.distances\[3\] is -1"),
    (put("codebooks.distances.3", 0), r"codebooks\.distances is not strictly ascending"),
    (put("codebooks.views", None), r"codebooks\.views is null, expected a list with explicit coding"),
    (put("records.coding", "verbatim"), r"codebooks\.views is given, expected null with verbatim coding"),
    (put("records.block_epochs", 0), r"records\.block_epochs is 0"),
    (put("shards.0.images", 16385), r"shards\[0\]\.images is 16385, expected at most 16384"),
    (put("codebooks.distances.3", 16.0), "codebooks.distances is not strictly ascending"),
    (put("codebooks.distances", [1.0, 1.000000001]), "codebooks.distances is not strictly ascending"),
    (put("teacher.sha256", "ABC"), r"teacher\.sha256 is 'ABC', expected 64 hex digits"),
    (put("teacher.top1", 75), r"teacher\.top1 is 75"),
    (put("method", None), "method is None"),
    (put("shards", {}), "shards is"),
    (put("shards.1", "shard-00001.tar"), r"shards\[1\] is 'shard-00001\.tar', expected an object"),
    (put("shards.1.name", "../shard-00001.tar"), r"shards\[1\]\.name: shard name"),
    (put("shards.1.name", "shard-00000.tar"), r"shards\[1\]\.name is shard-00000\.tar, expected a higher number"),
    (put("shards.1.sha256", None), r"shards\[1\]\.sha256 is None"),
    (put("shards.1.bytes", 0), r"shards\[1\]\.bytes is 0"),
    (put("shards.1.images", 1), r"shards\[1\]\.images is 1,"),
    (put("shards.1.pairs_per_epoch", 8), r"shards\[1\]\.pairs_per_epoch is 8, expected 7"),
    (put("shards.1.record_bytes", 8**11), r"shards\[1\]\.record_bytes"),
]


@pytest.mark.parametrize(("change", "message"), FAULTS)
def test_faults(content: dict[str, Any], change: Callable[[dict[str, Any]], object], message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        Manifest.decode(changed(content, change))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_all_problems_are_listed_up_to_ten(content: dict[str, Any]) -> None:
    with pytest.raises(FormatError) as caught:
        Manifest.decode(changed(content, lambda c: (put("images.ipc", 0)(c), put("records.seed", -1)(c))))
    assert "images.ipc" in str(caught.value) and "records.seed" in str(caught.value)
    with pytest.raises(FormatError, match=r"and [0-9]+ more"):
        Manifest.decode(changed(content, lambda c: c.update(images={}, records={})))


def test_a_higher_minor_version_unknown_and_optional_keys_are_read(content: dict[str, Any]) -> None:
    def change(c: dict[str, Any]) -> None:
        c["version"] = [1, 9]
        c["news"] = {"a": [1]}
        c["shards"][0]["news"] = 1
        c["dataset"].pop("wnids")
        c["images"].pop("quality")
        c["teacher"]["top1"] = None

    assert Manifest.decode(changed(content, change)).teacher.top1 is None


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"nonsense",
        b"{",
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1e400}',
        b'{"a": 1, "a": 2}',
        b'{"x": {"a": 1, "a": 2}}',
        b"\xff\xfe",
        b'{"a": ' + b"[" * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": ' + b"9" * 400 + b"}",
    ],
)
def test_broken_json_is_refused(text: bytes) -> None:
    with pytest.raises(FormatError):
        Manifest.decode(text)


@settings(max_examples=15)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), st.lists, max_leaves=5))
def test_any_value_anywhere_is_refused_or_read(value: object) -> None:
    content = tiny_manifest().to_json()
    for section, values in content.items():
        if isinstance(values, dict):
            for key in values:
                text = changed(content, put(f"{section}.{key}", value))
                try:
                    Manifest.decode(text)
                except FormatError:
                    continue


def test_size_is_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(manifest_module, "MAX_MANIFEST_BYTES", 100)
    (tmp_path / "dataset.json").write_bytes(b" " * 1000)
    with pytest.raises(FormatError, match="101 bytes, expected at most 100"):
        Manifest.load(tmp_path / "dataset.json")


def test_a_missing_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"dataset\.json: cannot be read.*is this a dataset folder"):
        Manifest.load(tmp_path / "dataset.json")


def test_load_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text("{}")
    with pytest.raises(FormatError, match=r"dataset\.json: format is None"):
        Manifest.load(tmp_path / "dataset.json")


def test_what_no_reader_would_accept_is_not_written(tmp_path: Path) -> None:
    manifest = tiny_manifest()
    with pytest.raises(FormatError, match=r"images\.count is 5"):
        replace(manifest, images=replace(manifest.images, count=5)).save(tmp_path / "dataset.json")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FormatError, match="expected finite numbers"):
        replace(manifest, method={"x": float("nan")}).save(tmp_path / "dataset.json")
    with pytest.raises(OutputError):
        manifest.save(tmp_path / "missing" / "dataset.json")


def test_names_in_any_script_survive(tmp_path: Path) -> None:
    manifest = tiny_manifest()
    names = ("étoile", "四角", "🐟 é")
    replace(manifest, dataset=replace(manifest.dataset, class_names=names)).save(tmp_path / "dataset.json")
    assert Manifest.load(tmp_path / "dataset.json").dataset.class_names == names
