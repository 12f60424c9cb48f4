"""The teacher that travels with a model: its files lie in ``teacher/``, unless timm's registry can give it again."""

import dataclasses
import os
import shutil
from pathlib import Path

from torch import nn

from ...convert.checkpoint.folder import CARD, CONFIG, WEIGHTS, save
from ...convert.checkpoint.report import REPORT, Report
from ...convert.errors import CheckpointError
from ...convert.model_source import ModelSource
from .provenance import tagged, weights_origin

TEACHER = "teacher"  # name of the folder, and what a report records for a teacher in it


@dataclasses.dataclass(frozen=True)
class KeptTeacher:
    """The teacher of a model that is about to be written.

    Args:
        name: Name that the report records: one of timm's registry or ``teacher``; ``None`` for no teacher.
        folder: Saved folder to keep a copy of.
        model: Model to save, for one that is not a saved folder.
        report: Report to save with it.
    """

    name: str | None = None
    folder: Path | None = None
    model: nn.Module | None = None
    report: Report = dataclasses.field(default_factory=Report)

    @classmethod
    def of_cnn(cls, source: ModelSource, model: nn.Module) -> "KeptTeacher":
        """The CNN itself as the teacher of what is made from it; none if its weights are random.

        Args:
            source: The CNN as it was named.
            model: The CNN as it was built.
        """
        folder = source.folder or source.checkpoint_folder
        if folder is not None:
            return cls(TEACHER, folder=folder)
        if source.checkpoint is None and not source.pretrained:
            return cls()
        if source.is_registered:
            return cls(tagged(source.name, model))
        return cls(TEACHER, model=model, report=Report(source=weights_origin(source, model)))

    @classmethod
    def of_successor(cls, source: ModelSource, model: nn.Module) -> "KeptTeacher":
        """The teacher of a model that is made from a saved one: what that one records, or else the saved one itself.

        Args:
            source: The model as it was named.
            model: The model as it was built.
        """
        recorded = cls.recorded_by(source)
        return recorded if recorded.name is not None else cls.of_cnn(source, model)

    @classmethod
    def recorded_by(cls, source: ModelSource) -> "KeptTeacher":
        """The teacher that a saved model records."""
        name = source.report().teacher
        return cls(name, folder=find_teacher(source.folder) if name == TEACHER and source.folder else None)

    def save_with(self, model: nn.Module, folder: Path, report: Report) -> None:
        """Save a model together with its teacher, which a report then names.

        A kill in between leaves a folder without a teacher, never with that of an earlier model.

        Args:
            model: Model to save.
            folder: Folder to write.
            report: Everything else to record.
        """
        if self.folder is None or self.folder.resolve() != (folder / TEACHER).resolve():
            (folder / TEACHER / WEIGHTS).unlink(missing_ok=True)
        save(model, folder, dataclasses.replace(report, teacher=self.name))
        self.write(folder)

    def write(self, folder: Path) -> None:
        """Write the teacher's files, if there are any to keep, into a folder of a model or run.

        Files of a saved folder are linked where the file system can, so that they need no space: every program that
        writes them replaces them.
        """
        target = folder / TEACHER
        if self.model is not None:
            save(self.model, target, self.report)
        elif self.folder is not None and self.folder.is_dir() and self.folder.resolve() != target.resolve():
            try:
                target.mkdir(parents=True, exist_ok=True)
                for name in (WEIGHTS, REPORT, CARD, CONFIG):  # the one that makes it a model comes last
                    if (self.folder / name).is_file():
                        _link_or_copy(self.folder / name, target / name)
            except OSError as error:
                raise CheckpointError(f"cannot write {target}: {error.strerror or error}") from error


def kept_in(folder: Path) -> Path | None:
    """Return the folder of the teacher that is kept in a folder; ``None`` if there is none, or only a part of it."""
    return folder / TEACHER if (folder / TEACHER / CONFIG).is_file() else None


def find_teacher(folder: Path) -> Path:
    """Return the folder of a saved model's teacher: in the model's folder, or else in the folder of its run."""
    run = folder.resolve().parent
    return kept_in(folder) or ((run / "args.yaml").is_file() and kept_in(run)) or folder / TEACHER


def _link_or_copy(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
