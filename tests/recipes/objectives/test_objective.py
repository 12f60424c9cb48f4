"""Terms of a loss: any may stand beside any, and their values and gradients add up."""

import copy
import dataclasses
import itertools
import json

import pytest
import torch
from safetensors.torch import load_file

from adderkit.convert.errors import RecipeError
from adderkit.convert.model_source import ModelSource
from adderkit.recipes.configs.recipe import Recipe
from adderkit.recipes.data.datasets import DataConfig
from adderkit.recipes.objectives.objective import Objective
from adderkit.recipes.objectives.teacher import DistillationTeacher, FrozenTeacher
from adderkit.recipes.objectives.terms import TERMS, active_terms, teacher_need
from adderkit.recipes.runs.folder import RunFolder
from adderkit.recipes.training import run as finetune
from adderkit.recipes.training.models import Job

WEIGHTS = {
    "task_loss_weight": 0.3,
    "distill_loss_weight": 0.7,
    "teacher_lr": 0.1,
    "block_loss_weight": 2.0,
    "kernel_loss_weight": 0.5,
}
TARGETS = torch.tensor([0, 1, 2, 3, 0, 1])


def objective_of(pair, changes):
    """An objective with a copy of the networks, always the same."""
    student, teacher = copy.deepcopy(pair)
    recipe = Recipe(**{**dict.fromkeys(WEIGHTS, 0.0), "task_loss_weight": 1.0, **changes, "kernel_temperature": 0.5})
    kind = DistillationTeacher if recipe.teacher_lr else FrozenTeacher
    return Objective(recipe, kind(teacher, DataConfig.of(student)), student), student.train()


def values_and_gradients(pair, changes, name="loss"):
    objective, student = objective_of(pair, changes)
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    values = objective(student, images, TARGETS)
    values[name].backward()
    parameters = {**dict(student.named_parameters()), **dict(objective.named_parameters())}
    gradients = {key: torch.zeros(()) if each.grad is None else each.grad for key, each in parameters.items()}
    return {key: value.item() for key, value in values.items()}, gradients


def test_terms_add_up_to_the_loss(pair):
    values, _ = values_and_gradients(pair, WEIGHTS)
    assert list(values) == ["loss", "task", "distill", "teacher", "block", "kernel"]
    weighted = 0.3 * values["task"] + 0.7 * values["distill"] + values["teacher"]
    weighted += 2.0 * values["block"] + 0.5 * values["kernel"]
    assert values["loss"] == pytest.approx(weighted, rel=1e-6)
    assert min(values.values()) > 0


@pytest.mark.parametrize("term", TERMS, ids=lambda term: term.name)
def test_a_term_alone_has_the_value_and_the_gradient_that_it_has_among_others(pair, term):
    """Alone but for the teacher's mode, which changes its BatchNorms' statistics."""
    together, gradients = values_and_gradients(pair, WEIGHTS, term.name)
    others = {"task_loss_weight": 1.0, "distill_loss_weight": 1.0, "teacher_lr": 0.1}
    alone, expected = values_and_gradients(pair, {**others, term.switch: WEIGHTS[term.switch]}, term.name)
    assert together[term.name] == alone[term.name]
    assert sum(value.abs().sum() for value in expected.values()) > 0
    for key, value in expected.items():
        torch.testing.assert_close(gradients[key], value, rtol=1e-6, atol=1e-8)


def test_gradients_add_up(pair):
    _, total = values_and_gradients(pair, WEIGHTS)
    parts = {}
    for term in TERMS:
        weight = 1.0 if term.name == "teacher" else WEIGHTS[term.switch]
        for key, value in values_and_gradients(pair, WEIGHTS, term.name)[1].items():
            parts[key] = parts.get(key, 0) + weight * value
    for key, value in total.items():
        torch.testing.assert_close(parts[key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("frozen", [True, False])
def test_only_its_own_term_trains_the_teacher(pair, frozen):
    changes = {**WEIGHTS, "teacher_lr": 0.0} if frozen else WEIGHTS
    for name in ("task", "distill", "block", "kernel"):
        _, gradients = values_and_gradients(pair, changes, name)
        assert all(not value.any() for key, value in gradients.items() if key.startswith("teacher."))
    objective, _ = objective_of(pair, changes)
    assert objective.trains_teacher == (not frozen)
    assert objective.trains  # the kernels' convolutions
    assert not objective_of(pair, {"distill_loss_weight": 1.0})[0].trains


@pytest.mark.parametrize(
    "on", [each for count in range(len(WEIGHTS) + 1) for each in itertools.combinations(WEIGHTS, count)], ids=str
)
def test_any_terms_may_be_combined(on):
    settings = {**dict.fromkeys(WEIGHTS, 0.0), **{key: WEIGHTS[key] for key in on}}
    if not {"task_loss_weight", "distill_loss_weight"} & set(on):
        with pytest.raises(RecipeError, match="are both 0, expected one above 0: nothing would train the classifier"):
            Recipe(**settings)
        return
    recipe, users = Recipe(**settings), set(on) - {"task_loss_weight", "teacher_lr"}
    if "teacher_lr" in on and not users:
        with pytest.raises(RecipeError, match=r"teacher_lr is 0.1, expected 0 where .* are 0: nothing would learn"):
            active_terms(recipe)
        return
    assert {term.switch for term in active_terms(recipe)} == set(on)
    assert teacher_need(recipe) == ("training" if "teacher_lr" in on else "frozen" if users else None)


@pytest.mark.parametrize("weight", ["block_loss_weight", "kernel_loss_weight"])
def test_a_model_for_integers_has_no_features_to_compare(weight):
    with pytest.raises(RecipeError, match=rf"{weight} is 1.0, expected 0 where bits is not 0 \(now 8\)"):
        active_terms(Recipe(bits=8, **{weight: 1.0}))
    assert active_terms(Recipe(bits=8, distill_loss_weight=1.0))


def test_the_table_names_each_term_and_each_key_once():
    fields = {field.name for field in dataclasses.fields(Recipe)}
    assert len({term.name for term in TERMS}) == len({term.switch for term in TERMS}) == len(TERMS)
    assert all({term.switch, *term.keys} <= fields for term in TERMS)
    assert {key for key in fields if key.endswith("_loss_weight")} <= {term.switch for term in TERMS}


def test_all_terms_train_and_resume_exactly(adder_folder, train, same_run, stop_at, monkeypatch):
    """Labels, logits, blocks and kernels, with a teacher that trains; one process is stopped within an epoch."""
    changes = {"epochs": 2, "hflip": 0.5, "job": Job(ModelSource(str(adder_folder))), "adder_init": "keep", "lr": 0.01}
    changes |= {"eta": 0.05, "sharpness": 1024.0, "teacher_lr": 0.01, "block_loss_weight": 1.0}
    rows, through = train("pkkd", folder="through", **changes)
    stop_at("epoch 1/1", 1)
    with pytest.raises(KeyboardInterrupt):
        train("pkkd", folder="stopped", save_every=1, **changes)
    monkeypatch.undo()
    folder = RunFolder(through.path.with_name("stopped"))
    assert json.loads((folder.last / "state" / "run_state.json").read_text())["batches_done"] == 1
    assert finetune.resume(folder) == rows
    same_run(folder, through)
    ours, theirs = (load_file(each.last / "state" / "model_1.safetensors") for each in (folder, through))
    assert [name for name, value in ours.items() if not value.equal(theirs[name])] == []
