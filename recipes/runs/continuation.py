"""What a resumed run may change: its length, its learning rate, where the images come from, its number of processes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ...convert.errors import RecipeError
from ..configs.recipe import Recipe

# What the steps to come follow from, and neither the state of a run nor the position in it.
CHANGEABLE = ("epochs", "lr", "min_lr", "data_dir", "workers", "save_every", "log_interval", "log_with", "skip_limit")


def changed_settings(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """Return the settings of a run with those changed that may change when it is resumed.

    Args:
        recipe: The settings of the run so far.
        changes: The settings that were given, which may be the same.

    Raises:
        RecipeError: A setting is unknown, has an invalid value, or is part of what the run has learned with.
    """
    changed = recipe.changed(changes)
    for name in differences(recipe, changed):
        if name not in CHANGEABLE:
            value = getattr(changed, name)
            raise RecipeError(
                f"{name} is {getattr(recipe, name)!r} in this run, and cannot become {value!r} when it is resumed; "
                f"only {', '.join(CHANGEABLE)} can; start a new run from the last weights: "
                f"adderkit finetune RUN/last --set {name}={value}"
            )
    return changed


def keep_step(recipe: Recipe, before: int, processes: int) -> Recipe:
    """Return settings with which another number of processes takes the same optimizer steps.

    Each process keeps its batch, which BatchNorm normalizes, and does more or fewer of them in a step.

    Args:
        recipe: The settings of the run so far.
        before: Number of processes of the run so far.
        processes: Number of processes now.

    Raises:
        RecipeError: The batches of a step cannot be divided among that many processes.
    """
    batches = before * recipe.grad_accum_steps
    if batches % processes:
        fitting = ", ".join(str(each) for each in range(1, batches + 1) if batches % each == 0)
        raise RecipeError(
            f"there are {processes} processes, expected one of {fitting}: a step of this run has {batches} batches of "
            f"{recipe.batch_size} images; resume it with one of these numbers, or start a new run from its last/"
        )
    return dataclasses.replace(recipe, grad_accum_steps=batches // processes)


def differences(before: Recipe, after: Recipe) -> dict[str, list[Any]]:
    """Return the settings that differ, each with its value before and after."""
    old, new = before.to_dict(), after.to_dict()
    return {name: [old[name], new[name]] for name in old if old[name] != new[name]}
