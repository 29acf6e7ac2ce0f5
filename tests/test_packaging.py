"""What is shipped and what the repository holds: the wheel, versions, dependencies, text that must not be."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

PACKAGES = ("benchmarks", "builders", "loaders", "nrrdd_format")
IMPORTED_AS = {"pillow": "PIL", "scikit-learn": "sklearn"}
LARGEST_FILE = 1_000_000
# Written so that the patterns do not match themselves; /home/someone/ is nobody's and may stand for a path.
FORBIDDEN = {
    "a package registry's host name": (
        r"pypi\.org|pythonhosted\.org|registry\.npmjs|debian\.org|download\.pytorch\.org"
    ),
    "a path of one machine": r"(?<![\w.:/])/(?:(?:home|Users)/(?!someone/)|(?:root|mnt|work|farm)/)",
}


@pytest.fixture(scope="module")
def setup_cfg(repository: Path) -> ConfigParser:
    """setup.cfg, parsed."""
    config = ConfigParser()
    config.read(repository / "setup.cfg", encoding="utf-8")
    return config


@pytest.fixture(scope="module")
def files(repository: Path) -> list[Path]:
    """Every file that git tracks or would track, relative to the repository."""
    command = [
        "git",
        "-c",
        "safe.directory=*",
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]
    listed = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip(f"not a git checkout: {listed.stderr.strip()}")
    return [Path(name) for name in listed.stdout.split("\0") if name and (repository / name).is_file()]


@pytest.fixture(scope="module")
def wheel(repository: Path, files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel as built from a copy of the repository's files."""
    root = tmp_path_factory.mktemp("build")
    copy, out = root / "copy", root / "wheels"
    for file in files:
        (copy / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(repository / file, copy / file)
    script = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    built = subprocess.run(
        [sys.executable, "-c", script, str(out)], cwd=copy, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def requirements(text: str) -> dict[str, str]:
    """Name -> version bound of each requirement on its line."""
    lines = filter(None, (line.strip() for line in text.splitlines()))
    split = (re.split(r"(?=[<>=!~])", line, maxsplit=1) for line in lines if not line.startswith("#"))
    return {name.strip(): "".join(bound).strip() for name, *bound in split}


def forbidden(text: str) -> list[str]:
    """What of `FORBIDDEN` the text holds, with line numbers."""
    return [
        f"line {number}: {what}: {line.strip()}"
        for number, line in enumerate(text.splitlines(), start=1)
        for what, pattern in FORBIDDEN.items()
        if re.search(pattern, line)
    ]


def third_party_imports(source: bytes) -> set[str]:
    """Top-level names a module imports that are neither Python's nor ours."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names - sys.stdlib_module_names - set(PACKAGES)


def test_wheel_holds_the_packages_and_nothing_else(wheel: zipfile.ZipFile, files: list[Path]) -> None:
    shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}
    modules = {file.as_posix() for file in files if file.parts[0] in PACKAGES and file.suffix == ".py"}
    samples = {file.as_posix() for file in files if file.parts[:2] == ("benchmarks", "distances")}
    others = {f"{package}/py.typed" for package in PACKAGES} | {"nrrdd_format/SPEC.md"}
    assert len(samples) == 4
    assert shipped == modules | samples | others


def test_wheel_holds_the_licence(wheel: zipfile.ZipFile) -> None:
    (licence,) = (name for name in wheel.namelist() if name.endswith("/LICENSE"))
    text = wheel.read(licence).decode()
    assert "Apache License" in text
    assert "The nrrdd authors" in text


def test_wheel_declares_the_commands(wheel: zipfile.ZipFile) -> None:
    (entry_points,) = (name for name in wheel.namelist() if name.endswith("/entry_points.txt"))
    commands = ConfigParser()
    commands.read_string(wheel.read(entry_points).decode())
    expected = {"build-distilled": "builders.cli:main", "nrrdd": "benchmarks.cli:main"}
    assert dict(commands["console_scripts"]) == expected


def test_commands_exist(repository: Path, setup_cfg: ConfigParser) -> None:
    for line in setup_cfg["options.entry_points"]["console_scripts"].split("\n")[1:]:
        module, function = line.partition("=")[2].strip().split(":")
        tree = ast.parse((repository / module.replace(".", "/")).with_suffix(".py").read_bytes())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, line


def test_version_is_the_same_everywhere(
    repository: Path, setup_cfg: ConfigParser, wheel: zipfile.ZipFile, files: list[Path]
) -> None:
    version = setup_cfg["metadata"]["version"]
    changelog = re.search(r"^## \[(\d[^]]*)\]", (repository / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    (metadata,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    written = {
        found
        for file in files
        if file.suffix == ".py" and file.parts[0] in PACKAGES
        for found in re.findall(r'^__version__ = "(.*)"', (repository / file).read_text("utf-8"), re.MULTILINE)
    }
    assert changelog is not None
    assert changelog[1] == version
    assert f"\nversion: {version}\n" in (repository / "CITATION.cff").read_text("utf-8")
    assert f"Version: {version}" in wheel.read(metadata).decode().splitlines()
    assert written <= {version}


def test_dependencies_are_those_imported(repository: Path, setup_cfg: ConfigParser, files: list[Path]) -> None:
    declared = requirements(setup_cfg["options"]["install_requires"])
    extras = setup_cfg["options.extras_require"]
    optional = {name for extra in ("datasets", "digits", "http", "timm") for name in requirements(extras[extra])}
    imported: set[str] = set()
    for file in files:
        if file.suffix == ".py" and file.parts[0] in PACKAGES:
            imported |= third_party_imports((repository / file).read_bytes())
    assert imported - {IMPORTED_AS.get(name, name) for name in {*declared, *optional}} == set()


def test_dependencies_are_explained(repository: Path, setup_cfg: ConfigParser) -> None:
    text = (repository / "docs" / "dependencies.md").read_text("utf-8")
    sections = [setup_cfg["options"]["install_requires"], *setup_cfg["options.extras_require"].values()]
    names = {name for section in sections for name in requirements(section)}
    assert {name for name in names if f"`{name}`" not in text} == set()


def test_oldest_versions_are_the_lower_bounds(repository: Path, setup_cfg: ConfigParser) -> None:
    bounds = requirements(setup_cfg["options"]["install_requires"])
    oldest = requirements((repository / ".ci" / "oldest-versions.txt").read_text("utf-8"))
    assert oldest == {name: bound.replace(">=", "==") for name, bound in bounds.items()}


def test_no_registry_hosts_or_machine_paths(repository: Path, files: list[Path]) -> None:
    found = [
        f"{file}, {fault}"
        for file in files
        for fault in forbidden((repository / file).read_text("utf-8", errors="replace"))
    ]
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "index = https://" + "pypi" + ".org/simple",
        "download." + "pytorch.org/whl",
        "cd /" + "home/jane/nrrdd",
        "'/" + "root/data'",
    ],
)
def test_registry_hosts_and_machine_paths_are_found(text: str) -> None:
    assert forbidden(f"first line\n{text}\n")


@pytest.mark.parametrize(
    "text", ["see docs/work/notes.md", "https://example.org/home/page", "../root/x", "./work/x", "/home/someone/x"]
)
def test_other_text_is_let_through(text: str) -> None:
    assert forbidden(text) == []


def test_no_large_files(repository: Path, files: list[Path]) -> None:
    assert [str(file) for file in files if (repository / file).stat().st_size > LARGEST_FILE] == []
