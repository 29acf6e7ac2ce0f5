"""What all tests share: one thread a process, no network, and the fixtures that more than one area needs."""

from __future__ import annotations

import io
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

# Before anything imports torch: several test processes share the machine; those they start inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import hypothesis
import pytest
import zstandard

REPOSITORY = Path(__file__).resolve().parent.parent

# A loaded machine must not fail a test, so nothing is timed; failures print the blob that repeats them.
hypothesis.settings.register_profile(
    "nrrdd",
    deadline=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("nrrdd")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips tests marked `gpu` where there is no CUDA device."""
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root folder of the repository."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Unpacks real images: `shared_data("cifar10-jpeg", per_class=20)` is a folder `<split>/<class>/<image>`.

    The archives (`<name>.tar.zst`) lie in the folder named by NRRDD_TEST_DATA, or else in `../shared/data`
    beside the repository. They are no part of the project: a test that asks for a missing one is skipped.
    `per_class` bounds the images of each class in each split. Tests of a process share the folder: only read.
    """
    folder = Path(os.environ.get("NRRDD_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    unpacked: dict[tuple[str, int], Path] = {}

    def unpack(name: str, *, per_class: int) -> Path:
        archive = folder / f"{name}.tar.zst"
        if not archive.is_file():
            pytest.skip(f"no real images: {archive.name} is not in NRRDD_TEST_DATA (or ../shared/data)")
        if (name, per_class) not in unpacked:
            root = tmp_path_factory.mktemp(name)
            for path, data in _first_images(archive, per_class):
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                (root / path).write_bytes(data)
            unpacked[name, per_class] = root
        return unpacked[name, per_class]

    return unpack


def _first_images(archive: Path, per_class: int) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Path and bytes of the first `per_class` images of each `<split>/<class>` folder of a .tar.zst."""
    seen: Counter[PurePosixPath] = Counter()
    with (
        archive.open("rb") as file,
        zstandard.ZstdDecompressor().stream_reader(file) as stream,
        tarfile.open(fileobj=io.BufferedReader(stream), mode="r|") as tar,
    ):
        for member in tar:
            path = PurePosixPath(member.name)
            if not member.isfile() or len(path.parts) != 3 or ".." in path.parts:
                continue
            seen[path.parent] += 1
            if seen[path.parent] <= per_class:
                content = tar.extractfile(member)
                assert content is not None
                yield path, content.read()
