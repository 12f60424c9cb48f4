"""Set-up shared by all tests: no window, no network, and a repository root that is not a test package."""

import contextlib
import importlib.util
import io
import json
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
    with _helper("hub_server").Hub() as server:
        yield server


@pytest.fixture
def second_device() -> Iterator[Any]:
    """A device beside the CPU, see ``second_device.py``."""
    with _helper("second_device").second_device() as device:
        yield device


def _helper(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


@pytest.fixture
def fails(adder_kit: Callable[..., tuple[object, str, str]]) -> Callable[..., str]:
    """The one line that a failing command leaves on stderr."""

    def run(*words: object) -> str:
        status, out, err = adder_kit(*words)
        assert status == 1
        assert out == ""
        assert err.startswith("error: ")
        assert "Traceback" not in err
        assert len(err.splitlines()) == 1, err
        return err.removeprefix("error: ").rstrip("\n")

    return run


@pytest.fixture
def misused(adder_kit: Callable[..., tuple[object, str, str]]) -> Callable[..., str]:
    """What wrong usage prints."""

    def run(*words: object) -> str:
        status, out, err = adder_kit(*words)
        assert status == 2
        assert out == ""
        assert "Traceback" not in err
        return " ".join(err.split())

    return run


@pytest.fixture
def json_of(adder_kit: Callable[..., tuple[object, str, str]]) -> Callable[..., dict[str, Any]]:
    """The one JSON object on stdout."""

    def run(*words: object) -> dict[str, Any]:
        status, out, err = adder_kit(*words, "--json")
        assert status == 0, err
        assert len(out.splitlines()) == 1
        value = json.loads(out)
        assert isinstance(value, dict)
        return value

    return run


@pytest.fixture(scope="session")
def cnn_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved CNN for digits, untrained but with statistics of the data."""
    import timm
    import torch

    import adderkit

    torch.manual_seed(0)
    overlay = {"input_size": (1, 8, 8), "mean": (0.3053,), "std": (0.3761,)}
    model = timm.create_model("cifar_resnet20", num_classes=10, in_chans=1, pretrained_cfg_overlay=overlay)
    return adderkit.save(model, tmp_path_factory.mktemp("models") / "net")


@pytest.fixture(scope="session")
def adder_folder(cnn_folder: Path) -> Path:
    """``cnn_folder`` with two of its layers converted, by the ``convert`` verb's own code."""
    import adderkit
    from adderkit.convert.model_source import ModelSource
    from adderkit.recipes.verbs.convert import ConversionJob, run_conversion

    config = adderkit.AdderConfig(include=("features.4.*",))
    job = ConversionJob(ModelSource(str(cnn_folder)), config, output=str(cnn_folder.with_name("net-adder")))
    with contextlib.redirect_stderr(io.StringIO()):
        folder = run_conversion(job, dry_run=False, announce=lambda line: None).folder
    assert folder is not None
    return folder
