"""Manifests that are written anew: what this version does not know would be lost, so such a manifest is refused."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from nrrdd_format.errors import FormatError, shown
from nrrdd_format.json_checks import parse_json
from nrrdd_format.limits import MAX_MANIFEST_BYTES
from nrrdd_format.manifest import Manifest
from nrrdd_format.versions import NEWEST_MINORS, version_text


def load_to_rewrite(path: str | os.PathLike[str]) -> Manifest:
    """Read a manifest from which another one will be made.

    Raises:
        FormatError: it is wrong, of a newer minor version, or has keys that this version does not know.
    """
    manifest = Manifest.load(path)
    with open(path, "rb") as file:
        content = parse_json(file.read(MAX_MANIFEST_BYTES))
    major, minor = content["version"]
    newest = NEWEST_MINORS[major]
    if minor > newest:
        raise FormatError(
            f"version is {major}.{minor}, this nrrdd writes {version_text((major, newest))} and would lose what came "
            "later: use a newer nrrdd to change this dataset",
            path=path,
        )
    lost = next(_unknown(content, manifest.to_json(), ""), None)
    if lost is not None:
        raise FormatError(
            f"{shown(lost)} is not known to this nrrdd, which would lose it: change this dataset with the program that "
            "wrote it, or remove that key",
            path=path,
        )
    return manifest


def _unknown(found: Any, kept: Any, path: str) -> Iterator[str]:
    """Where keys stand that hold something and are not kept."""
    if isinstance(found, dict) and isinstance(kept, dict):
        for key, value in found.items():
            here = f"{path}.{key}".lstrip(".")
            if key in kept:
                yield from _unknown(value, kept[key], here)
            elif value is not None:
                yield here
    elif isinstance(found, list) and isinstance(kept, list):
        for i, (row, kept_row) in enumerate(zip(found, kept, strict=True)):
            yield from _unknown(row, kept_row, f"{path}[{i}]")
