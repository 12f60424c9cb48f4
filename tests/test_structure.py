"""Tests of the layout: which folder may import which, and how large files and folders are."""

import ast
import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("adder_layers", "convert", "recipes")
ROOT_FILES = ("__init__.py", "__main__.py", "cli.py", "py.typed")
SOURCE_SUFFIXES = {".py", ".pyi", ".yaml", ".css", ".c", ".cpp", ".h"}
MAX_LINES = 400
MAX_FILES = 13  # in one folder, besides __init__.py

# What each layer must not import; cli.py may import everything.
FORBIDDEN = {
    "adder_layers": {"adderkit.convert", "adderkit.recipes", "adderkit.cli", "timm", "accelerate"},
    "convert": {"adderkit.recipes", "adderkit.cli", "accelerate"},
    "recipes": {"adderkit.cli"},
}

# The parts of each layer, bottom-up: a file or folder imports only what stands before it.
ORDER = {
    "adder_layers": (
        "_cpu",
        "geometry",
        "reference",
        "backends",
        "ops",
        "transforms",
        "fusion_guard",
        "conv",
        "modules",
        "integer",
    ),
    "convert": (
        "errors",
        "wrappers",
        "user_models",
        "models",
        "files",
        "output",
        "hub",
        "patterns",
        "class_names",
        "record",
        "graph",
        "conversion",
        "calibration",
        "quantization",
        "cost",
        "pruning",
        "foreign_weights",
        "checkpoint",
        "model_source",
        "import_addernet",
        "export",
    ),
    "recipes": (
        "configs",
        "data",
        "distributed",
        "objectives",
        "runs",
        "training",
        "reporting",
        "hub",
        "terminal",
        "verbs",
    ),
}

# Files besides the verbs that import modules of the package inside functions, and why.
LAZY = {
    "adder_layers/integer/cpu_engine.py": "the C++ extension is optional",
    "convert/checkpoint/registry.py": "timm imports it, and it must not import the whole package in turn",
    "convert/conversion/targets.py": "--help lists the targets without importing torch",
    "convert/export/programs.py": "onnx is optional",
    "recipes/data/unlabeled.py": "--help shows its defaults without importing torch",
}


def sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in SOURCE_SUFFIXES)


def package_sources() -> list[Path]:
    return [ROOT / name for name in ROOT_FILES] + [path for layer in LAYERS for path in sources(ROOT / layer)]


def modules() -> list[Path]:
    return [path for path in package_sources() if path.suffix == ".py"]


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def names_in(nodes: Iterable[ast.AST], path: Path) -> Iterator[str]:
    """Absolute names of all that the import statements among the nodes import, ``from`` targets included."""
    package = ["adderkit", *path.relative_to(ROOT).parent.parts]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imported_modules(path: Path) -> Iterator[str]:
    """Absolute names of all that a file imports, at any depth."""
    return names_in(ast.walk(parse(path)), path)


def imports_of(paths: Iterable[Path], packages: Collection[str]) -> list[str]:
    """Say which file imports one of the packages, or anything in them."""
    return [
        f"{label(path)} imports {module}"
        for path in paths
        if path.suffix == ".py"
        for module in imported_modules(path)
        if any(module == package or module.startswith(f"{package}.") for package in packages)
    ]


def part_of(module: str, layer: str) -> str | None:
    """Name the part of a layer that a module belongs to; ``None`` outside the layer."""
    words = module.split(".")
    return words[2] if words[:2] == ["adderkit", layer] and len(words) > 2 else None


# Imports


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_go_downward(layer: str) -> None:
    assert imports_of(sources(ROOT / layer), FORBIDDEN[layer]) == []


@pytest.mark.parametrize("layer", LAYERS)
def test_every_part_has_its_place(layer: str) -> None:
    found = {path.stem for path in (ROOT / layer).iterdir() if path.suffix in {".py", ".pyi"}}
    found |= {path.parent.name for path in (ROOT / layer).glob("*/__init__.py")}
    assert found - {"__init__"} == set(ORDER[layer])


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_between_subfolders_go_one_way(layer: str) -> None:
    height = {part: place for place, part in enumerate(ORDER[layer])}
    wrong = [
        f"{label(path)} imports {module}"
        for path in sources(ROOT / layer)
        if (path.suffix == ".py" and path.parent != ROOT / layer) or path.stem in height
        for module in imported_modules(path)
        if (part := part_of(module, layer)) in height
        if height[part] > height[path.relative_to(ROOT / layer).parts[0].split(".")[0]]
    ]
    assert wrong == []


def test_only_main_imports_the_command_line() -> None:
    others = [path for path in package_sources() if path.name != "__main__.py"]
    assert imports_of(others, ["adderkit.cli"]) == []


def test_parts_are_never_imported_by_a_bare_name() -> None:
    assert imports_of(package_sources(), [*LAYERS, "cli"]) == []


def test_modules_of_a_part_form_no_circle() -> None:
    """A file that imports another needs nothing from above it, be the import at the top or within a function."""
    paths = {f"adderkit.{label(path).removesuffix('.py').replace('/', '.')}": path for path in modules()}
    graph = {name: paths.keys() & set(imported_modules(path)) - {name} for name, path in paths.items()}
    while leaves := {name for name, needs in graph.items() if not needs & graph.keys()}:
        graph = {name: needs for name, needs in graph.items() if name not in leaves}
    assert graph == {}


def test_imports_inside_functions_have_a_reason() -> None:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = {
        label(path)
        for path in modules()
        for function in ast.walk(parse(path))
        if isinstance(function, functions)
        if any(name.startswith("adderkit") for name in names_in(ast.walk(function), path))
    }
    assert {path for path in found if not path.startswith("recipes/verbs/")} == LAZY.keys()


# Sizes


@pytest.mark.parametrize("path", package_sources(), ids=label)
def test_file_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_folders_are_small() -> None:
    tests = [path for folder in ("tests", "benchmarks") for path in sources(ROOT / folder)]
    paths = itertools.chain((path for path in package_sources() if path.parent != ROOT), tests)
    counts = Counter(label(path.parent) for path in paths if path.name != "__init__.py")
    assert {folder: count for folder, count in counts.items() if count > MAX_FILES} == {}


# The architecture document


def test_the_map_is_the_tree() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    folders_and_files = text.partition("## Map")[2].partition("## Data flow")[0]
    parts = {
        f"{part}/" if (ROOT / layer / part).is_dir() else f"{part}.py"
        for layer in LAYERS
        for part in ORDER[layer]
        if part != "_cpu"
    }
    assert {part for part in parts if f"`{part}`" not in folders_and_files} == set()


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=label)
def test_documents_name_files_that_exist(path: Path) -> None:
    named = set(
        re.findall(r"`((?:adder_layers|convert|recipes|benchmarks|tests|docs|csrc)/[\w./]+)`", path.read_text("utf-8"))
    )
    assert {name for name in named if not any((ROOT / base / name).exists() for base in ("", "adder_layers"))} == set()
