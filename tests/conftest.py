"""Set-up shared by all tests: no window, no network, and a repository root that is not a test package."""

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["MPLBACKEND"] = "Agg"
os.environ["HF_HUB_OFFLINE"] = "1"

ROOT = Path(__file__).resolve().parent.parent


class _PlainRoot:
    """Keeps pytest from importing the root's ``__init__.py`` a second time, under the name ``__init__``.

    That copy would register its own timm hook, which then looks for ``__init__.convert.registry``.
    A plugin object, because pytest does not ask a conftest about folders above its own.
    """

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Dir | None:
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_PlainRoot(), "plain-root")


@pytest.fixture
def hub() -> Iterator[Any]:
    """A Hugging Face Hub on this machine, see ``hub_server.py``."""
    spec = importlib.util.spec_from_file_location("hub_server", ROOT / "tests" / "hub_server.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with module.Hub() as server:
        yield server


@pytest.fixture
def adder_kit(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[object, str, str]]:
    """Run the command line in an empty folder; exit status, stdout and stderr."""
    from adderkit import cli

    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main([str(word) for word in words])
        captured = capsys.readouterr()
        return caught.value.code, captured.out, captured.err

    return run
