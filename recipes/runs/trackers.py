"""Trackers: a run's numbers in TensorBoard, trackio, Weights & Biases or whatever else accelerate can log with."""

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, redirect_stdout
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType

from ...convert.errors import RecipeError
from ..configs.recipe import Recipe

_PROJECT = "adderkit"
# Settings that say where files of this machine are; an address may hold a password.
_PRIVATE = ("data_dir",)


def tracker_names(log_with: str) -> list[str]:
    """The trackers of a recipe's ``log_with``, each known and installed.

    Args:
        log_with: accelerate's names, separated by commas; empty for none.

    Raises:
        RecipeError: A name is unknown, or its package is not installed.
    """
    names = list(dict.fromkeys(name.strip() for name in log_with.split(",") if name.strip()))
    known = [str(name) for name in LOGGER_TYPE_TO_CLASS]
    available = [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in known:
            raise RecipeError(f"log_with names {name!r}, expected one or several of {', '.join(known)}")
        if name in LoggerType and name not in available:
            raise RecipeError(f"log_with names {name}, and its package is not installed: pip install {name}")
    return names


def start_trackers(
    accelerator: Accelerator, recipe: Recipe, folder: Path, arguments: Mapping[str, Any], step: int
) -> None:
    """Begin the logs of a run, or go on with them; on the main process.

    Args:
        accelerator: Made with ``tracker_names`` and a logging folder.
        recipe: Its settings are logged, but for those that name places.
        folder: Of the run; its name is the run's.
        arguments: Of its ``args.yaml``, whose ``id`` tells the run from others of the same name.
        step: Optimizer steps done; what was logged for later ones before a kill is taken back where that can be.
    """
    if not accelerator.log_with:
        return
    name, identity = folder.resolve().name, str(arguments.get("id"))
    options: dict[str, dict[str, Any]] = {
        "tensorboard": {"purge_step": step + 1 if step else None},
        # Its own record of the command line would have the address of the data.
        "wandb": {
            "name": name,
            "id": identity,
            "resume": "allow",
            "dir": str(folder),
            "settings": {"x_disable_meta": True},
        },
        "trackio": {"name": f"{name}-{identity}", "resume": "allow"},
    }
    settings = {"model": arguments["job"]["source"]["name"], **recipe.to_dict()}
    shown = {key: "" if value is None else value for key, value in settings.items() if key not in _PRIVATE}
    with _standard_output_kept():
        accelerator.init_trackers(_PROJECT, None if step else shown, options)


def end_trackers(accelerator: Accelerator) -> None:
    """End the logs; on the main process."""
    with _standard_output_kept():
        for tracker in accelerator.trackers:
            # accelerate ends the run behind trackio's back, which ends it once more, and says so, when Python ends.
            end = sys.modules["trackio"].finish if tracker.name == "trackio" else tracker.finish
            end()
    accelerator.trackers.clear()


def _standard_output_kept() -> AbstractContextManager[Any]:
    """Inside, what trackers print goes to standard error: standard output is for results."""
    return redirect_stdout(sys.stderr)
