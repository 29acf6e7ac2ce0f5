"""What the code may import and call: layers downwards only, no torch in the format, no foreign code run."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Each package and the packages it may import.
LAYERS = {
    "nrrdd_format": {"nrrdd_format"},
    "builders": {"builders", "nrrdd_format"},
    "loaders": {"loaders", "nrrdd_format"},
    "benchmarks": {"benchmarks", "builders", "loaders", "nrrdd_format"},
}
TORCH = {"torch", "torchvision", "webdataset"}  # webdataset imports torch
PICKLING = {"_pickle", "cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
WITH_TORCH = ("nrrdd_format.decoding", "nrrdd_format.replay")

Rule = Callable[[str, ast.Module], Iterator[str]]


def imported(module: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and absolute name of all that `module` imports anywhere; `from a import b` counts as a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def upward_import(module: str, tree: ast.Module) -> Iterator[str]:
    """Imports of a package of ours that lies above or beside, or of the tests."""
    ours = LAYERS.keys() | {"tests", "conftest"}
    for line, name in imported(module, tree):
        if (top := top_level(name)) in ours - LAYERS[top_level(module)]:
            yield f"line {line}: imports {top}"


def torch_in_the_format(module: str, tree: ast.Module) -> Iterator[str]:
    """Imports of torch, or of a module that imports it, elsewhere in nrrdd_format."""
    if top_level(module) != "nrrdd_format" or module in WITH_TORCH:
        return
    for line, name in imported(module, tree):
        if top_level(name) in TORCH or f"{name}.".startswith(tuple(f"{one}." for one in WITH_TORCH)):
            yield f"line {line}: imports {name}"


def pickling(module: str, tree: ast.Module) -> Iterator[str]:
    """Imports of anything that restores arbitrary objects; the error that torch.load raises may be named."""
    for line, name in imported(module, tree):
        if top_level(name) in PICKLING and name != "pickle.UnpicklingError":
            yield f"line {line}: imports {name}"


def unsafe_load(module: str, tree: ast.Module) -> Iterator[str]:
    """`torch.load` without `weights_only=True`; `numpy.load` that allows pickles; either imported by name."""
    for line, name in imported(module, tree):
        if name in ("torch.load", "numpy.load"):
            yield f"line {line}: imports {name} by name"
    for call in calls(tree):
        function = ast.unparse(call.func)
        if function == "torch.load" and keyword(call, "weights_only") != "True":
            yield f"line {call.lineno}: torch.load without weights_only=True"
        if function in ("np.load", "numpy.load") and keyword(call, "allow_pickle") not in (None, "False"):
            yield f"line {call.lineno}: {function} with allow_pickle"


def shell(module: str, tree: ast.Module) -> Iterator[str]:
    """Commands that go through a shell."""
    for call in calls(tree):
        if keyword(call, "shell") not in (None, "False") or ast.unparse(call.func) in (
            "os.system",
            "os.popen",
        ):
            yield f"line {call.lineno}: runs a shell"


def work_at_import(module: str, tree: ast.Module) -> Iterator[str]:
    """Argument parsing and making of folders while the module is imported."""
    for call in calls_at_import(tree.body):
        function = ast.unparse(call.func).rpartition(".")[2]
        if function in ("ArgumentParser", "parse_args", "parse_known_args", "mkdir", "makedirs"):
            yield f"line {call.lineno}: {function} at import"


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    """Every call in `tree`."""
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def calls_at_import(body: list[ast.stmt]) -> Iterator[ast.Call]:
    """Calls that importing makes: those outside functions and outside `if __name__ == '__main__'`."""
    waiting: list[ast.AST] = list(body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += node.args.defaults  # these, unlike the body, run when the function is defined
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
            continue
        if isinstance(node, ast.Call):
            yield node
        waiting += ast.iter_child_nodes(node)


def keyword(call: ast.Call, name: str) -> str | None:
    """Source text of the call's keyword argument `name`; None: not given."""
    return next((ast.unparse(item.value) for item in call.keywords if item.arg == name), None)


def top_level(name: str) -> str:
    """The package a dotted name lies in."""
    return name.partition(".")[0]


@pytest.fixture(scope="module")
def modules(repository: Path) -> dict[str, ast.Module]:
    """Syntax tree of every module of the four packages, by dotted name."""
    paths = [path for package in LAYERS for path in sorted((repository / package).rglob("*.py"))]
    names = [".".join(path.relative_to(repository).with_suffix("").parts) for path in paths]
    return {name: ast.parse(path.read_bytes()) for name, path in zip(names, paths, strict=True)}


BROKEN: list[tuple[Rule, str, str]] = [
    (upward_import, "nrrdd_format.records", "import builders.config"),
    (upward_import, "nrrdd_format.records", "def f():\n    from loaders import DBRLoader"),
    (upward_import, "builders.relabel", "from loaders.order import batches"),
    (upward_import, "loaders.order", "from builders import ranks"),
    (upward_import, "loaders.order", "import benchmarks"),
    (upward_import, "builders.cli", "from tests.conftest import shared_data"),
    (torch_in_the_format, "nrrdd_format.records", "import torch"),
    (torch_in_the_format, "nrrdd_format.records", "from torch.nn import functional"),
    (torch_in_the_format, "nrrdd_format.records", "if True:\n    import torchvision.io"),
    (torch_in_the_format, "nrrdd_format.__init__", "from nrrdd_format.replay import mix"),
    (torch_in_the_format, "nrrdd_format.__init__", "from . import replay"),
    (torch_in_the_format, "nrrdd_format.records", "from .replay import mix"),
    (torch_in_the_format, "nrrdd_format.image_file", "from nrrdd_format.decoding import decode_image"),
    (pickling, "loaders.order", "import pickle"),
    (pickling, "builders.teacher", "from joblib import load"),
    (pickling, "builders.teacher", "from pickle import UnpicklingError, loads"),
    (unsafe_load, "builders.teacher", "torch.load(path)"),
    (unsafe_load, "builders.teacher", "torch.load(path, weights_only=False)"),
    (unsafe_load, "builders.teacher", "from torch import load"),
    (unsafe_load, "builders.workdir", "np.load(path, allow_pickle=True)"),
    (shell, "nrrdd_format.remote", "subprocess.run(command, shell=True)"),
    (shell, "nrrdd_format.remote", "os.system(command)"),
    (work_at_import, "builders.cli", "args = argparse.ArgumentParser().parse_args()"),
    (work_at_import, "builders.cli", "class Options:\n    parser = ArgumentParser()"),
    (work_at_import, "builders.cli", "if fresh:\n    os.makedirs('out')"),
    (work_at_import, "builders.cli", "def f(parser=ArgumentParser()): ..."),
]

ALLOWED: list[tuple[Rule, str, str]] = [
    (
        upward_import,
        "benchmarks.student",
        "from builders.models import create_model\nfrom loaders import DBRLoader",
    ),
    (upward_import, "builders.relabel", "from . import ranks\nfrom nrrdd_format import draws"),
    (torch_in_the_format, "nrrdd_format.replay", "import torch"),
    (torch_in_the_format, "builders.relabel", "import torch"),
    (pickling, "builders.teacher", "from pickle import UnpicklingError"),
    (unsafe_load, "builders.teacher", "torch.load(path, weights_only=True)"),
    (unsafe_load, "builders.workdir", "np.load(path, allow_pickle=False)"),
    (shell, "nrrdd_format.remote", "subprocess.run(command, shell=False)"),
    (work_at_import, "builders.cli", "def main():\n    return ArgumentParser().parse_args()"),
    (work_at_import, "builders.cli", "if __name__ == '__main__':\n    path.mkdir()"),
]

RULES = [upward_import, torch_in_the_format, pickling, unsafe_load, shell, work_at_import]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_code_keeps_the_rule(rule: Rule, modules: dict[str, ast.Module]) -> None:
    assert modules
    found = [f"{module}, {fault}" for module, tree in modules.items() for fault in rule(module, tree)]
    assert found == []


@pytest.mark.parametrize(("rule", "module", "source"), BROKEN)
def test_the_rule_catches(rule: Rule, module: str, source: str) -> None:
    assert list(rule(module, ast.parse(source)))


@pytest.mark.parametrize(("rule", "module", "source"), ALLOWED)
def test_the_rule_allows(rule: Rule, module: str, source: str) -> None:
    assert list(rule(module, ast.parse(source))) == []


def test_importing_the_format_does_not_import_torch(repository: Path) -> None:
    script = """
        import importlib, pkgutil, sys
        import nrrdd_format
        for module in pkgutil.iter_modules(nrrdd_format.__path__):
            if module.name not in ("decoding", "replay"):
                importlib.import_module(f"nrrdd_format.{module.name}")
        print(*sorted({"torch", "torchvision"} & sys.modules.keys()))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
