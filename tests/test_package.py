"""Tests of the wheel's content, of what importing costs, and of the public names."""

import ast
import email
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import adderkit

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("adder_layers", "convert", "recipes")
ROOT_FILES = ("__init__.py", "__main__.py", "cli.py", "py.typed")
SOURCE_SUFFIXES = {".py", ".pyi", ".yaml", ".css", ".c", ".cpp", ".h"}
UNSHIPPED = {"csrc"}  # folders that the wheel holds compiled


def python(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a fresh interpreter from ``cwd``, an empty folder, so that nothing of the clone is on its path."""
    command = [sys.executable, *args]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in SOURCE_SUFFIXES)


def package_sources() -> list[Path]:
    return [ROOT / name for name in ROOT_FILES] + [path for layer in LAYERS for path in sources(ROOT / layer)]


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# The wheel


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that building leaves nothing behind in the clone."""
    copy = tmp_path_factory.mktemp("source") / "adder-kit"
    everywhere = shutil.ignore_patterns(".git", ".venv", ".types", "*_cache")

    def ignored(folder: str, names: list[str]) -> set[str]:
        """``runs`` is a folder of the package, too."""
        return everywhere(folder, names) | ({"build", "dist", "runs"} & {*names} if Path(folder) == ROOT else set())

    shutil.copytree(ROOT, copy, ignore=ignored, symlinks=True)
    for layer in LAYERS:
        (copy / layer / "__pycache__").mkdir(exist_ok=True)
        (copy / layer / "__pycache__" / "stale.pyc").touch()
    return copy


def build_wheel(tree: Path, out: Path, *options: str) -> Path:
    fixed = ["--quiet", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", str(out)]
    python("-m", "pip", "wheel", *fixed, *options, str(tree), cwd=out)
    (path,) = out.glob(f"adderkit-{adderkit.__version__}-*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """The wheel without compiled code: what an installation gets where there is no compiler, built in seconds."""
    path = build_wheel(tree, tmp_path_factory.mktemp("wheel"), "--config-settings=wheel.cmake=false")
    assert path.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def package_names(archive: zipfile.ZipFile) -> set[str]:
    return {name for name in archive.namelist() if ".dist-info/" not in name}


def metadata_file(wheel: zipfile.ZipFile, name: str) -> str:
    return wheel.read(f"adderkit-{adderkit.__version__}.dist-info/{name}").decode()


def test_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile, tree: Path) -> None:
    expected = {f"adderkit/{name}" for name in ROOT_FILES}
    for layer in LAYERS:
        paths = (path.relative_to(tree) for path in sources(tree / layer))
        expected |= {f"adderkit/{path.as_posix()}" for path in paths if not UNSHIPPED & set(path.parts)}
    assert package_names(wheel) == expected


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("c++")), reason="needs cmake and a C++ compiler")
def test_compiled_wheel_holds_one_extension_more(wheel: zipfile.ZipFile, tree: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(build_wheel(tree, tmp_path)) as archive:
        (extension,) = package_names(archive) - package_names(wheel)
        assert package_names(wheel) < package_names(archive)
    assert extension.startswith("adderkit/adder_layers/_cpu.")


def test_wheel_is_typed(wheel: zipfile.ZipFile) -> None:
    assert "adderkit/py.typed" in wheel.namelist()


def test_wheel_has_both_commands(wheel: zipfile.ZipFile) -> None:
    lines = metadata_file(wheel, "entry_points.txt").split("\n")
    assert "adderkit = adderkit.cli:main" in lines
    assert "convert = adderkit.cli:convert_main" in lines


def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    metadata = email.message_from_string(metadata_file(wheel, "METADATA"))
    assert metadata["Version"] == adderkit.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["License-File"] == "LICENSE"


# Importing


def test_no_part_is_importable_by_a_bare_name(tmp_path: Path) -> None:
    """Looks for the modules without running them; a namesake outside the clone is not ours to judge."""
    names = [*LAYERS, "cli", "tests"]
    code = f"""
from importlib.util import find_spec
import adderkit
for spec in filter(None, map(find_spec, {names})):
    print(*(spec.submodule_search_locations or [spec.origin]), sep="\\n")
"""
    found = [Path(line).resolve() for line in python("-c", code, cwd=tmp_path).stdout.splitlines()]
    assert [path for path in found if path.is_relative_to(ROOT)] == []


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    done = python("-X", "importtime", "-m", "adderkit", "--help", cwd=tmp_path)
    assert "Usage" in done.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "adderkit.cli" in imported
    assert imported & {"torch", "torchvision", "timm", "accelerate", "matplotlib", "sklearn"} == set()


def test_import_adderkit_imports_no_torch(tmp_path: Path) -> None:
    done = python("-c", "import sys, adderkit; print('torch' in sys.modules)", cwd=tmp_path)
    assert done.stdout.strip() == "False"


def test_pytest_does_not_import_the_root_again() -> None:
    """See conftest.py."""
    files = {name: vars(module).get("__file__") for name, module in sys.modules.items()}
    assert {name for name, file in files.items() if file == str(ROOT / "__init__.py")} <= {"adderkit"}


@pytest.mark.parametrize("name", adderkit.__all__)
def test_public_name_resolves(name: str) -> None:
    assert getattr(adderkit, name) is not None


def test_dir_lists_the_public_names() -> None:
    assert dir(adderkit) == sorted(adderkit.__all__)


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="module 'adderkit' has no attribute 'subtract'"):
        adderkit.subtract  # noqa: B018


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    imports = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
    seen = {alias.name: node.module for node in imports if node.level for alias in node.names}
    assert seen == adderkit._HOME
    assert set(adderkit.__all__) == {*seen, "__version__"}


@pytest.mark.parametrize(
    ("imports", "registered"),
    [
        ("adderkit, timm", True),
        ("timm, adderkit", True),
        ("timm", False),
        ("adderkit, timm.layers, timm", True),
        ("adderkit, importlib.util; importlib.util.find_spec('timm'); import timm", True),
    ],
)
def test_models_are_registered_with_timm(imports: str, registered: bool, tmp_path: Path) -> None:
    code = f"import {imports}; print(timm.is_model('adder'), timm.is_model('cifar_resnet20'))"
    assert python("-c", code, cwd=tmp_path).stdout.split() == [str(registered)] * 2


def test_imported_modules_keep_what_their_loaders_can_do(tmp_path: Path) -> None:
    """Source code and data files of timm are found, and it can be imported again."""
    code = """
import importlib.resources, inspect
import adderkit, timm
print(inspect.getsource(timm).startswith("from ."))
print(importlib.resources.files(timm).joinpath("version.py").is_file())
print(importlib.reload(timm).is_model("adder"))
"""
    assert python("-c", code, cwd=tmp_path).stdout.split() == ["True"] * 3


FIRST_IMPORTS = """
import importlib, os, sys, traceback
import torch, torchvision
for name in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            importlib.import_module(name)
        except BaseException:
            print(f"import {name}:", traceback.format_exc(limit=-3), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_any_module_can_be_imported_first(tmp_path: Path) -> None:
    """The first to import timm sets off our registration amid its own imports; that must not end in a circle."""
    paths = [label(path) for path in package_sources() if path.suffix == ".py" and path.parent != ROOT]
    names = [f"adderkit.{path.removesuffix('.py').replace('/', '.')}".removesuffix(".__init__") for path in paths]
    assert python("-c", FIRST_IMPORTS, *names, cwd=tmp_path).stdout == ""


def test_every_folder_of_the_package_is_listed() -> None:
    """A new folder of modules at the root has to be added to ``wheel.packages`` and to ``LAYERS``."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(config["tool"]["scikit-build"]["wheel"]["packages"].values())
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"benchmarks", "tests"}
    assert folders == set(LAYERS)
    assert listed == {*LAYERS, *ROOT_FILES}
