"""Versions of the format: which one a dataset needs, and which ones this reader knows (SPEC.md section 9)."""

from __future__ import annotations

from nrrdd_format.errors import FormatError, shown

Version = tuple[int, int]
"""Major, minor."""
NEWEST_MINORS = {1: 1, 2: 0}
"""The newest known minor version of each known major one."""


def needed_version(*, priors: int | None, further: int | None) -> Version:
    """The lowest version that has all of a dataset's parts, so that every reader that can read it does."""
    if further is not None:
        return (2, 0)
    return (1, 0) if priors is None else (1, 1)


def version_text(version: Version) -> str:
    """Such as 1.0."""
    return ".".join(map(str, version))


def check_version(version: object) -> None:
    """Refuses a major version that this reader does not know. Raises FormatError naming all."""
    if not isinstance(version, list) or len(version) != 2 or not all(type(v) is int and v >= 0 for v in version):
        raise FormatError(f"version is {shown(version)}, expected [major, minor]")
    if version[0] not in NEWEST_MINORS:
        known = " and ".join(f"{major}.x" for major in NEWEST_MINORS)
        found = f"{version[0]}.{version[1]}"
        raise FormatError(f"version is {found}, this reader knows {known}: use a newer nrrdd to read it")
