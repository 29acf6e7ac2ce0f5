"""Benchmark records: what ran where, tables, and the dated files in the results folder."""

from __future__ import annotations

import datetime
import json
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from builders.cores import usable_cores
from nrrdd_format.errors import ConfigError, counted
from nrrdd_format.files import atomic_write, make_folder
from nrrdd_format.remote import place_of, without_secrets

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_OPTION_AND_VALUE = re.compile(r"([^=/?]*=)?(.*)", re.DOTALL)
PACKAGES = ("nrrdd", "torch", "torchvision", "numpy", "pillow", "simplejpeg", "zstandard")


def provenance(module: str, seeds: Sequence[int]) -> dict[str, Any]:
    """Hardware, versions, command and seeds of this process, as JSON values.

    Args:
        module: the module that was started with `python -m`.
        seeds: every seed the run used.
    """
    return circumstances() | {"command": command_line(module, sys.argv[1:]), "seeds": list(seeds)}


def circumstances() -> dict[str, Any]:
    """Date, hardware and versions of this process, as JSON values."""
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
    }


def refuse_other(path: Path, made: Mapping[str, str | None], asked: Mapping[str, str | None]) -> None:
    """Refuses a file that was made with something else than is asked; None on either side: not known, not compared.

    Args:
        path: the file.
        made: what it was made with.
        asked: the same for what is to be made now; its names are those the message uses.

    Raises:
        ConfigError: naming the first difference.
    """
    for name, expected in asked.items():
        found = made.get(name)
        if None not in (found, expected) and found != expected:
            raise ConfigError(
                f"{path}: made with {name} {_short(found)}, asked for {_short(expected)}; "
                "choose another --out, or give what it was made with"
            )


def _short(value: str | None) -> str:
    """A digest's first digits; anything shorter as it is."""
    return f"{value:.16}"


def command_line(module: str, arguments: Sequence[str]) -> str:
    """The command as it can be published: of an absolute path only the last part, of a URL neither user nor query."""
    return " ".join([f"python -m {module}", *map(_published, arguments)])


def _published(argument: str) -> str:
    match = _OPTION_AND_VALUE.fullmatch(argument)
    assert match is not None
    start, value = match.groups("")
    url = isinstance(place_of(value), str)
    path = Path(urlsplit(value).path if url and value.lower().startswith("file:") else value)
    return f"{start}…/{path.name}" if path.is_absolute() else shlex.quote(start + without_secrets(value))


def hardware() -> dict[str, Any]:
    """The processor, the cores this process may use, and the GPU if there is one."""
    import torch  # here, so that a table can be written without it

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"processor": _processor(), "cores": usable_cores(), "gpu": gpu}


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded to read well in a terminal; all columns but the first on the right."""
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]
    rule = [("-" * width if column == 0 else "-" * (width - 1) + ":") for column, width in enumerate(widths)]
    return "\n".join(_table_line(line, widths) for line in [header, rule, *rows])


@dataclass(frozen=True)
class Picture:
    """A figure of a report."""

    caption: str
    figure: Figure
    suffix: str = ""
    """Of its file's name, where a report has several."""


def write_report(
    folder: Path,
    name: str,
    facts: Mapping[str, Any],
    data: Mapping[str, Any],
    *,
    title: str,
    text: str,
    pictures: Sequence[Picture] = (),
) -> None:
    """Writes a report into the results folder: `<date>-<name>`.md to read, .json with all that was measured, and .png.

    Args:
        folder: made when missing.
        name: of the files.
        facts: `provenance` of the run.
        data: what was measured, as JSON values.
        title, text: Markdown; the provenance stands between them, pictures at the end.

    Raises:
        OutputError: a file cannot be written.
    """
    stem = f"{facts['date']}-{name}"
    write_json(folder / f"{stem}.json", {**facts, **data})
    links = []
    for picture in pictures:
        path = folder / f"{stem}{picture.suffix}.png"
        with atomic_write(path) as file:
            picture.figure.savefig(file, format="png", dpi=150)
        links.append(f"![{picture.caption}]({quote(path.name)})")
    parts = [f"# {title}", _provenance_text(facts), text.rstrip("\n"), *links]
    _write_text(folder / f"{stem}.md", "\n\n".join(parts) + "\n")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON value, whole or not at all, making the folder when missing.

    Raises:
        OutputError: it cannot be written.
    """
    make_folder(path.parent)
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def _write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text, whole or not at all, making the folder when missing.

    Raises:
        OutputError: it cannot be written.
    """
    make_folder(path.parent)
    with atomic_write(path) as file:
        file.write(text.encode())


def _provenance_text(facts: Mapping[str, Any]) -> str:
    """The provenance as a Markdown paragraph and the command as a code block."""
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    seeds = ", ".join(map(str, facts["seeds"]))
    device = _device(facts["hardware"])
    return f"{facts['date']}, on {device}; {versions}; seeds {seeds}.\n\n```\n{facts['command']}\n```"


def circumstances_text(of_students: Sequence[Mapping[str, Any] | None]) -> str:
    """Over which dates, hardware and versions students range, one line; None: a student's are not known."""
    known = [each for each in of_students if each is not None]
    if not known:
        return "When these students were trained, and with which versions, is not recorded."
    dates = sorted({each["date"] for each in known})
    days = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    devices = " and ".join(sorted({_device(each["hardware"]) for each in known}))
    numbers: dict[str, set[str]] = {}
    for each in known:
        for name, number in each["versions"].items():
            numbers.setdefault(name, set()).add(number)
    versions = ", ".join(f"{name} {' and '.join(sorted(found))}" for name, found in numbers.items())
    unknown = len(of_students) - len(known)
    rest = f"; not recorded for {unknown} older ones of {len(of_students)}" if unknown else ""
    return f"Students trained {days}, on {devices}; {versions}{rest}."


def _device(machine: Mapping[str, Any]) -> str:
    return machine["gpu"] or f"{counted(machine['cores'], 'core')} of {machine['processor']}"


def _table_line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = zip(cells, widths, strict=True)
    return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    """The processor's name; Linux keeps it in /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
