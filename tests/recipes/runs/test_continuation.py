"""What a resumed run may change, and the steps that another number of processes takes."""

import pytest

from adderkit.convert.errors import RecipeError
from adderkit.recipes.configs.recipe import Recipe
from adderkit.recipes.runs.continuation import changed_settings, differences, keep_step

RECIPE = Recipe(epochs=5, lr=0.1, batch_size=32, grad_accum_steps=2)


def test_length_and_rate_may_change():
    changed = changed_settings(RECIPE, {"epochs": 9, "lr": 0.01, "workers": 4})
    assert differences(RECIPE, changed) == {"epochs": [5, 9], "lr": [0.1, 0.01]}


@pytest.mark.parametrize("change", [{"batch_size": 16}, {"grad_accum_steps": 1}, {"seed": 3}, {"dataset": "digits"}])
def test_what_the_run_has_learned_with_may_not(change):
    (name,) = change
    with pytest.raises(RecipeError, match=rf"^{name} is .* cannot become .*; start a new run from the last weights: "):
        changed_settings(RECIPE, change)


@pytest.mark.parametrize(("before", "now", "accumulated"), [(4, 8, 1), (4, 4, 2), (4, 2, 4), (4, 1, 8), (1, 2, 1)])
def test_a_step_keeps_its_batches(before, now, accumulated):
    kept = keep_step(RECIPE, before, now)
    assert differences(RECIPE, kept) == ({} if before == now else {"grad_accum_steps": [2, accumulated]})


def test_a_number_of_processes_that_does_not_divide_a_step():
    with pytest.raises(
        RecipeError, match=r"there are 3 processes, expected one of 1, 2, 4, 8: a step of this run has 8"
    ):
        keep_step(RECIPE, 4, 3)
