"""What fuzzing needs: how many cases, damaged files, and what must hold whatever a file says.

A few hundred cases by default; ``ADDERKIT_FUZZ=nightly`` (``make fuzz``) takes 10,000 of each test.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from adderkit.convert.errors import AdderkitError

_COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}
settings.register_profile("quick", max_examples=30, database=None, derandomize=True, **_COMMON)
settings.register_profile("nightly", max_examples=10_000, **_COMMON)

_MEMORY = 1 << 30  # bytes that reading one small file may take, with room for what libraries keep
_SPECIAL = [
    b"\x00",
    b"\xff" * 8,
    b"9" * 30,
    b"-1",
    b"1e999",
    b"../../",
    b"[" * 3000,
    b'"',
    b"\x80\x02c",
    b"NaN",
    b"&a *a",
]


@st.composite
def _damaged(draw: st.DrawFn, valid: bytes) -> bytes:
    content = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(content)))
        match draw(st.sampled_from(["flip", "cut", "insert", "overwrite", "repeat", "delete"])):
            case "flip" if place < len(content):
                content[place] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del content[place:]
            case "insert":
                content[place:place] = draw(st.sampled_from(_SPECIAL) | st.binary(max_size=16))
            case "overwrite":
                new = draw(st.sampled_from(_SPECIAL) | st.binary(max_size=16))
                content[place : place + len(new)] = new
            case "repeat":
                content += content[place : place + 4096]
            case _:
                del content[place : place + draw(st.integers(1, 64))]
    return bytes(content)


@pytest.fixture(scope="session")
def damaged() -> Callable[[bytes], st.SearchStrategy[bytes]]:
    """Strategy: a valid file with a few bytes changed, lost, added or doubled."""
    return _damaged


def _spots(value: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values in nested lists and mappings."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from _spots(child, (*path, key))


@st.composite
def _changed(draw: st.DrawFn, valid: Any, keys: st.SearchStrategy[str], values: st.SearchStrategy[Any]) -> Any:
    value = json.loads(json.dumps(valid))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(sorted(_spots(value), key=repr)))
        if not path:
            continue
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        match draw(st.sampled_from(["replace", "lose", "add"])):
            case "replace":
                parent[path[-1]] = draw(values)
            case "lose":
                del parent[path[-1]]
            case _ if isinstance(parent, dict):
                parent[draw(keys)] = draw(values)
    return value


@pytest.fixture(scope="session")
def changed() -> Callable[..., st.SearchStrategy[Any]]:
    """Strategy: a JSON value with a few parts replaced by such values, added under such keys, or lost."""
    return _changed


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that files are written to; nothing may appear beside it, nor in the working folder."""
    return tmp_path_factory.mktemp("fuzz") / "inside"


@pytest.fixture
def survives(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[], object]], object]]:
    """Call a reader: it gives a result, or ``None`` after one clear line. Anything else fails the test."""
    place.mkdir(exist_ok=True)
    working = place.parent / "working"
    working.mkdir(exist_ok=True)
    monkeypatch.chdir(working)
    _reset_peak()
    before = _peak()

    def call(read: Callable[[], object]) -> object:
        try:
            return read()
        except AdderkitError as error:
            message = str(error)
        assert 0 < len(message.strip()) < 10_000
        return None

    yield call
    assert _peak() - before < _MEMORY
    assert sorted(path.name for path in place.parent.iterdir()) == ["inside", "working"]
    assert list(working.iterdir()) == []


def _reset_peak() -> None:
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """Most memory that the process had in use since the reset, in bytes; 0 where the system does not say."""
    if not Path("/proc/self/status").exists():
        return 0
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def pytest_configure() -> None:
    assert os.environ.get("ADDERKIT_FUZZ", "quick") in ("quick", "nightly"), "ADDERKIT_FUZZ is quick or nightly"
