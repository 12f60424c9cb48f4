"""The report of a saved model, ``adder_report.json``: how the model was made and what was measured on it."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ..errors import CheckpointError
from ..files import read_json_object, sha256, write_json
from ..output import FolderKind
from .weights import CONFIG, WEIGHTS

REPORT = "adder_report.json"
FORMAT_VERSION = 1
NOT_RECORDED = ""

Verb = Literal["convert", "finetune", "prune", "quantize", "import-checkpoint"]

# The fields that still hold for the model that a verb makes. Every other field describes the model it was made from;
# measurements and training never survive, since the weights change.
_SURVIVES: Mapping[Verb, tuple[str, ...]] = {
    "convert": ("data", "commands"),
    "finetune": ("plan", "calibration", "pruning", "imported", "teacher", "data", "commands"),
    "prune": ("plan", "calibration", "imported", "teacher", "data", "commands"),
    "quantize": ("plan", "calibration", "pruning", "imported", "teacher", "data", "commands"),
    "import-checkpoint": (),
}


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _origin(value: object) -> str | None:
    return value if value is None or isinstance(value, str) else NOT_RECORDED


def _texts(value: object) -> tuple[str, ...]:
    return tuple(each for each in value if isinstance(each, str)) if isinstance(value, list) else ()


def _mappings(value: object) -> tuple[Mapping[str, Any], ...]:
    return tuple(each for each in value if isinstance(each, dict)) if isinstance(value, list) else ()


def _facts() -> Any:
    """A field that holds a JSON object; empty where nothing is recorded."""
    return dataclasses.field(default_factory=dict, metadata={"read": _mapping})


def _name() -> Any:
    """A field that holds a text; ``None`` where nothing is recorded."""
    return dataclasses.field(default=None, metadata={"read": _text})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that is recorded about a saved model; each field is a key of ``adder_report.json``.

    Args:
        plan: Conversion plan, as ``ConversionPlan.to_dict`` gives it.
        calibration: Settings and fidelity of the calibration, as ``CalibrationReport.to_dict`` gives them.
        pruning: The last pruning, as ``PruningReport.to_dict`` gives it.
        quantization: Configuration and activation ranges of the quantization.
        imported: Name and SHA-256 of the file that the weights were imported from.
        teacher: Name of the model to distil from; ``teacher`` for the one in the folder of that name.
        data: Data set that the model was made with: ``dataset``, ``data_dir``, ``train_split``, ``val_split`` and
            ``class_map``, as on the command line where they are not the defaults; not recorded in published folders.
        source: Origin of the weights: a timm name, Hub repository or folder; ``None`` for random weights or a file of
            unknown origin, ``NOT_RECORDED`` where nothing is recorded.
        commands: Command lines that made the model, in order.
        training: Recipe, progress and speed of the training run.
        metrics: Measurements of the training run, by split.
        evaluations: Measurements that ``evaluate --record`` added, each with the SHA-256 of the weights.
        cost: Operations, parameters and energy; recorded in published folders.
        repository: Hub repository of a published folder, ``user/name``.
        license: License of a published folder.
        base_model: Hub repository of the model that a published model was made from.
        card_sha256: SHA-256 of the model card of a published folder.
        architecture: Name under which timm builds the saved model.
        base: Name of the unconverted network in timm's registry.
        versions: Versions of Python and of the packages that saved the model.
        sha256: SHA-256 of the weights.
    """

    plan: Mapping[str, Any] = _facts()
    calibration: Mapping[str, Any] = _facts()
    pruning: Mapping[str, Any] = _facts()
    quantization: Mapping[str, Any] = _facts()
    imported: Mapping[str, Any] = _facts()
    teacher: str | None = _name()
    data: Mapping[str, Any] = _facts()
    source: str | None = dataclasses.field(default=NOT_RECORDED, metadata={"read": _origin})
    commands: tuple[str, ...] = dataclasses.field(default=(), metadata={"read": _texts})
    training: Mapping[str, Any] = _facts()
    metrics: Mapping[str, Any] = _facts()
    evaluations: tuple[Mapping[str, Any], ...] = dataclasses.field(default=(), metadata={"read": _mappings})
    cost: Mapping[str, Any] = _facts()
    repository: str | None = _name()
    license: str | None = _name()
    base_model: str | None = _name()
    card_sha256: str | None = _name()
    architecture: str | None = _name()
    base: str | None = _name()
    versions: Mapping[str, Any] = _facts()
    sha256: str | None = _name()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Report":
        """Read the output of ``to_dict``; a value of the wrong type, which somebody else may have written, is dropped.

        Raises:
            CheckpointError: A newer version of adderkit wrote it.
        """
        version = values.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise CheckpointError(
                f"format_version is {version} in {REPORT}, expected at most {FORMAT_VERSION}; update adderkit"
            )
        known = {field.name: field.metadata["read"] for field in dataclasses.fields(cls)}
        return cls(**{name: read(values[name]) for name, read in known.items() if name in values})

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping of everything that is recorded."""
        values: dict[str, Any] = {"format_version": FORMAT_VERSION}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value or (field.name == "source" and value is None):
                values[field.name] = list(value) if isinstance(value, tuple) else value
        return values

    def after(self, verb: Verb, command: str | None = None, **changes: Any) -> "Report":
        """Return the report of the model that a verb makes of this one.

        Args:
            verb: What is done to the model; decides which fields survive.
            command: Command line to append to the commands.
            **changes: Fields that the verb sets.
        """
        kept = {name: getattr(self, name) for name in _SURVIVES[verb]}
        if command is not None:
            kept["commands"] = (*kept.get("commands", ()), command)
        return Report(**{**kept, **changes})


def read_report(folder: str | Path) -> Report:
    """Read the report of a saved model; empty where the folder has none.

    Raises:
        CheckpointError: The file is damaged, or a newer version of adderkit wrote it.
    """
    path = Path(folder) / REPORT
    return Report.from_dict(read_json_object(path)) if path.is_file() else Report()


def write_report(folder: Path, report: Report) -> None:
    """Write the report of a saved model atomically."""
    write_json(folder / REPORT, report.to_dict())


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """The files of a saved model, without building it.

    Args:
        folder: Folder that holds them.
        config: Contents of ``config.json``.
        report: Contents of ``adder_report.json``.
        digest: SHA-256 of the weights.
    """

    folder: Path
    config: Mapping[str, Any]
    report: Report
    digest: str

    @classmethod
    def load(cls, folder: Path) -> "SavedModel":
        """Read the files.

        Raises:
            CheckpointError: A file is missing or damaged.
        """
        weights = folder / WEIGHTS
        if not weights.is_file():
            raise CheckpointError(f"{weights} does not exist")
        return cls(folder, read_json_object(folder / CONFIG), read_report(folder), sha256(weights))


def _is_saved_model(folder: Path) -> bool:
    """Return whether a folder was written by ``save``, and is not a checkpoint that a run resumes from."""
    try:
        config = read_json_object(folder / CONFIG)
    except CheckpointError:
        return False
    return "adderkit" in config and not (folder / "checksums.json").exists()


MODEL_FOLDER = FolderKind("a saved model", _is_saved_model)
