"""How many threads a process takes."""

import pytest

from builders.cores import reading_threads, usable_cores
from nrrdd_format.errors import ConfigError


@pytest.mark.parametrize(
    ("given", "environment", "expected"),
    [
        (3, {"OMP_NUM_THREADS": "1"}, 3),
        (None, {}, 8),
        (None, {"OMP_NUM_THREADS": "2"}, 2),
        (None, {"OMP_NUM_THREADS": "4,2"}, 4),
        (None, {"OMP_NUM_THREADS": "many"}, 8),
        (None, {"OMP_NUM_THREADS": "0"}, 8),
        (None, {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}, 4),
        (None, {"LOCAL_WORLD_SIZE": "16"}, 1),
    ],
)
def test_threads_are_those_given_then_a_ranks_share_then_what_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, given: int | None, environment: dict[str, str], expected: int
) -> None:
    monkeypatch.setattr("builders.cores.usable_cores", lambda: 8)
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert reading_threads(given) == expected


@pytest.mark.parametrize("ranks", ["0", "two", "1" * 5000], ids=["none", "a word", "digits that int refuses"])
def test_a_number_of_ranks_that_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch, ranks: str) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    with pytest.raises(
        ConfigError, match=rf"^LOCAL_WORLD_SIZE: found '{ranks[:5]}.*', expected a whole number, 1 or more"
    ):
        reading_threads(None)


def test_cores_are_those_this_process_may_run_on() -> None:
    assert usable_cores() >= 1
