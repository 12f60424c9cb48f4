"""Trackers: a run's numbers in TensorBoard, trackio, Weights & Biases or any other that accelerate supports."""

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
# Settings that name places on this machine; an address may hold a password.
_PRIVATE = ("data_dir",)


def tracker_names(log_with: str) -> list[str]:
    """Return the trackers of a recipe's ``log_with``, each known and installed.

    Args:
        log_with: accelerate's names of trackers, separated by commas; empty for none.

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
    """Begin the logs of a run, or continue them; on the main process.

    Args:
        accelerator: Accelerator that was made with ``tracker_names`` and a logging folder.
        recipe: Settings to log, except those that name places.
        folder: Folder of the run, whose name is the run's.
        arguments: Content of its ``args.yaml``, whose ``id`` tells the run from others of the same name.
        step: Optimizer steps done; logs of later steps from before a kill are removed where the tracker can do that.
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
            # accelerate ends the run without telling trackio, which would end it again, with a message, at exit.
            end = sys.modules["trackio"].finish if tracker.name == "trackio" else tracker.finish
            end()
    accelerator.trackers.clear()


def _standard_output_kept() -> AbstractContextManager[Any]:
    """Send what trackers print to standard error: standard output is for results."""
    return redirect_stdout(sys.stderr)
