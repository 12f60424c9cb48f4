"""The folder of a run: ``args.yaml``, ``summary.csv``, ``layers.csv``, ``last/``, ``previous/`` and ``best/``.

``last/``, ``previous/`` and ``best/`` are checkpoints that ``adderkit.load`` reads. ``last/state`` holds what resuming
needs besides: accelerate's state and the state of the run. A save is written to a temporary folder, with the checksums
of its files, and moved into place; the save before stays as ``previous/``. So a kill at any moment leaves an intact
save, and a disk that lost part of the last one costs only the work since the save before.
"""

import csv
import io
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor, nn

from ...convert.checkpoint.folder import save
from ...convert.checkpoint.report import Report
from ...convert.errors import AdderkitError, CheckpointError, RecipeError
from ...convert.files import read_json_object, recover_folder, replace_folder, sha256, write_json, write_text
from ..configs.files import parse_yaml, read_text
from ..configs.recipe import Recipe
from .layer_scales import LayerScales, write_scales
from .lock import LOCK_FILE
from .state import COLUMNS, Row, RunState, gather_sums, read_state, write_state

_CHECKSUMS = "checksums.json"
_STATE = "run_state.json"
_PARTIAL = ".partial"


class SaveError(AdderkitError):
    """A save failed; the save before is intact."""


class RunFolder:
    """The folder of one run.

    Args:
        path: Path of the folder, which need not exist yet.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.last = self.path / "last"
        self.previous = self.path / "previous"
        self.best = self.path / "best"

    def start(self, arguments: dict[str, Any]) -> None:
        """Begin a new run: write ``args.yaml``.

        Raises:
            RecipeError: The folder holds a run or something else, or cannot be written.
        """
        self.require_empty()
        self.write_arguments(arguments)

    def write_arguments(self, arguments: dict[str, Any]) -> None:
        """Write ``args.yaml``.

        Raises:
            RecipeError: The folder cannot be written.
        """
        try:
            write_text(self.path / "args.yaml", yaml.safe_dump(arguments, sort_keys=False))
        except OSError as error:
            raise RecipeError(f"cannot write --output {self.path}: {error.strerror or error}") from error

    def require_empty(self) -> None:
        """Refuse a folder that is not empty, apart from what a run leaves that was killed before it began.

        Raises:
            RecipeError: It holds a run, as where a launcher repeats its command after a failure, or something else.
        """
        if (self.path / "args.yaml").exists():
            raise RecipeError(
                f"{self.path} holds a run already; continue it with --resume {self.path}, or give another --output"
            )
        if self.path.exists() and not self.path.is_dir():
            raise RecipeError(f"--output {self.path} is a file, expected a new or empty folder")
        others = sorted(each.name for each in self.path.glob("*") if not _is_left_over(each.name))
        if others:
            raise RecipeError(
                f"--output {self.path} holds {', '.join(others[:3])}{', …' if others[3:] else ''}, expected a new or "
                "empty folder; give another --output"
            )

    def arguments(self) -> dict[str, Any]:
        """Read ``args.yaml``.

        Raises:
            RecipeError: There is no run here.
        """
        path = self.path / "args.yaml"
        if not path.is_file():
            raise RecipeError(
                f"{self.path} holds no run to resume: {path} does not exist; start one with "
                f"adderkit finetune MODEL --output {self.path}"
            )
        return parse_yaml(read_text(path), str(path))

    def recover(self, say: Callable[[str], None]) -> None:
        """Clean up after a kill, and fall back to the save before where the last one is damaged; on one process.

        Args:
            say: Called with a line for each damaged save.

        Raises:
            RecipeError: Both saves are damaged.
        """
        shutil.rmtree(self.path / _PARTIAL, ignore_errors=True)
        recover_folder(self.best)
        found = [(folder, _damage(folder)) for folder in (self.last, self.previous) if folder.exists()]
        for folder, damage in found:
            if damage:
                say(f"{folder} is damaged: {damage}")
        intact = next((folder for folder, damage in found if not damage), None)
        if found and intact is None:
            raise RecipeError(f"no save in {self.path} is intact; start a new run, from {self.best} if it is there")
        if intact == self.previous:
            say(f"resuming from the save before, {self.previous}")
            shutil.rmtree(self.last, ignore_errors=True)
            self.previous.rename(self.last)

    def save_last(
        self,
        model: nn.Module,
        accelerator: Accelerator,
        run_state: RunState,
        report: Report,
        as_evaluated: AbstractContextManager[None] | None = None,
    ) -> None:
        """Save the model and everything that resuming needs; called on every process.

        Args:
            model: The model without accelerate's wrapper.
            accelerator: It has prepared the model and everything else with a state.
            run_state: The state of the run.
            report: Content of ``adder_report.json``.
            as_evaluated: Context that is entered on every process while the model, but not the state, is saved: in it
                the model may have other statistics than training continues with.
        """
        # Only the main process writes here, as others may not see the folder; but with FSDP2, each has its shards.
        writes = accelerator.is_main_process or accelerator.is_fsdp2
        with self._partial("last", accelerator.is_main_process) if writes else _scratch() as partial:
            accelerator.wait_for_everyone()
            accelerator.save_state(str(partial / "state"))
            sums = gather_sums(run_state, accelerator)
            with as_evaluated or nullcontext():
                state = accelerator.get_state_dict(model)
                if accelerator.is_main_process:
                    save(model, partial, report, state)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                write_state(partial / "state" / _STATE, run_state, sums)
                write_json(partial / _CHECKSUMS, _checksums(partial))
                if self.last.exists():
                    replace_folder(self.previous, self.last)
                replace_folder(self.last, partial)
            accelerator.wait_for_everyone()

    def load_last(self, accelerator: Accelerator, last: Path | None = None) -> RunState:
        """Restore the state that ``save_last`` wrote; return that of a new run where nothing was saved.

        Args:
            accelerator: It has prepared the model and everything else with a state.
            last: The copy of ``last/`` that this process was given, where the folder is on another machine.

        Raises:
            RecipeError: The state is damaged.
        """
        state = (last or self.last) / "state"
        if not state.exists():
            return RunState()
        run_state = read_state(state / _STATE, accelerator)
        try:
            accelerator.load_state(str(state))
        except Exception as error:  # whatever torch and safetensors make of files of another program or version
            raise RecipeError(f"cannot restore {state}: {error}; start a new run from {self.best}") from error
        accelerator.step = 0  # a save is between two windows, whose length may be another now
        return run_state

    def save_best(self, model: nn.Module, report: Report, state: dict[str, Tensor] | None = None) -> None:
        """Save the model as the best so far.

        Args:
            model: The model without accelerate's wrapper.
            report: Content of ``adder_report.json``.
            state: Its weights, where they are not those that it holds itself.
        """
        with self._partial("best") as partial:
            save(model, partial, report, state)
            replace_folder(self.best, partial)

    @contextmanager
    def _partial(self, name: str, clear: bool = True) -> Iterator[Path]:
        """Yield a temporary folder to build a save in; it has its final name, which the model card gives.

        Args:
            name: Name of the folder.
            clear: Make it, and remove it where it is not finished, so that a full disk has room again.
        """
        partial = self.path / _PARTIAL / name
        try:
            if clear:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            yield partial
        except (OSError, RuntimeError, SafetensorError, CheckpointError) as error:  # what writers make of a full disk
            reason = " ".join(str(error).split())
            raise SaveError(
                f"cannot save {self.path / name} ({reason}); free some space, the save before is intact"
            ) from error
        finally:
            if clear:
                shutil.rmtree(partial.parent, ignore_errors=True)

    def write_summary(self, rows: Sequence[Row]) -> None:
        """Rewrite ``summary.csv`` from all rows."""
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, rows[0] if rows else COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.path / "summary.csv", buffer.getvalue())

    def write_layers(self, layers: Sequence[str], scales: Sequence[LayerScales]) -> None:
        """Rewrite ``layers.csv`` from all epochs' samples."""
        write_scales(self.path / "layers.csv", layers, scales)


@contextmanager
def _scratch() -> Iterator[Path]:
    """Yield a temporary folder for what accelerate writes on a process whose files nobody needs."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _is_left_over(name: str) -> bool:
    return name in (LOCK_FILE, _PARTIAL) or name.startswith(".args.yaml.")


def _checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a save except the model card, which people edit."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): sha256(path)
        for path in files
        if path.name not in ("README.md", _CHECKSUMS)
    }


def _damage(folder: Path) -> str | None:
    """Return what is wrong with a save, if anything is."""
    try:
        expected = read_json_object(folder / _CHECKSUMS)
        actual = _checksums(folder)
    except (AdderkitError, OSError) as error:
        return str(error)
    wrong = [name for name, digest in expected.items() if actual.get(name) != digest]
    return f"{wrong[0]} is not what was written" if wrong else None


def new_run_folder(output: str | None, model: str, recipe: Recipe) -> RunFolder:
    """Return the folder that was asked for, or ``runs/<time>-<model>-<data set>``, as timm names its own."""
    if output is not None:
        return RunFolder(output)
    name = "".join(sign if sign.isalnum() else "_" for sign in f"{Path(model).name}-{recipe.dataset}")
    return RunFolder(Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{name}")
