"""Distillation block by block: the loss against its formula, and what is compared where networks differ."""

import pytest
import timm
import torch
import torch.nn.functional as F

import adderkit
from adderkit.convert.errors import ModelSourceError, RecipeError
from adderkit.recipes.configs.recipe import Recipe
from adderkit.recipes.data.datasets import DataConfig
from adderkit.recipes.objectives.blocks import BlockObjective, common_blocks
from adderkit.recipes.objectives.teacher import DistillationTeacher
from adderkit.recipes.training import assemble as prepare
from adderkit.recipes.training.models import Job

SETTINGS = {"distill_loss_weight": 0.7, "task_loss_weight": 0.3, "block_loss_weight": 2.0, "kd_temperature": 3.0}
BLOCKS = [f"features.{index}" for index in range(1, 10)]


def blocks_of(model, images):
    """Outputs of the residual blocks and of the whole, module by module."""
    found = []
    for module in model.features:
        images = module(images)
        found.append(images)
    return found[1:10], model.forward_head(images)


def test_loss_is_the_formula(pair):
    student, teacher = pair
    objective = BlockObjective(Recipe(**SETTINGS), DistillationTeacher(teacher, DataConfig.of(student)), student)
    images, targets = torch.randn(6, 3, 16, 16), torch.tensor([0, 1, 2, 3, 0, 1])
    with torch.no_grad():
        ours, logits = blocks_of(student.train(), images)
        theirs, expected = blocks_of(teacher, images)
        assert len(ours) == 9
        errors = [
            torch.stack([((x - y) ** 2).mean() / y.var() for x, y in zip(a, b, strict=True)]).mean()
            for a, b in zip(ours, theirs, strict=True)
        ]
        p, q = (F.softmax(value / 3, 1) for value in (expected, logits))
        wanted = 0.7 * 9 * (p * (p.log() - q.log())).sum(1).mean() + 0.3 * F.cross_entropy(logits, targets)
        wanted += 2.0 * sum(errors) / 9
    assert objective(student, images, targets).item() == pytest.approx(wanted.item(), rel=1e-4)


def test_the_gradient_of_a_block_reaches_it_and_those_before_it(pair):
    student, teacher = pair
    objective = BlockObjective(Recipe(**SETTINGS), DistillationTeacher(teacher, DataConfig.of(student)), student)
    objective.paths = ["features.3"]
    objective.recipe = Recipe(**{**SETTINGS, "task_loss_weight": 0.0, "distill_loss_weight": 1e-30})
    objective(student.train(), torch.randn(6, 3, 16, 16), torch.zeros(6, dtype=torch.long)).backward()
    assert student.features[3].conv2.weight.grad.abs().max() > 0
    assert student.features[1].conv1.weight.grad.abs().max() > 0
    assert student.features[4].conv1.weight.grad.abs().max() < 1e-20
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_blocks_that_pruning_made_smaller_are_not_compared(pair):
    student, teacher = pair
    config = adderkit.PruneConfig(ratio=0.5, importance="magnitude", ignore=("features.[0-3].*",))
    adderkit.prune_(student, config)
    shapes = common_blocks(student, teacher)
    assert list(shapes) == BLOCKS
    kept = BlockObjective(Recipe(**SETTINGS), DistillationTeacher(teacher, DataConfig.of(student)), student).paths
    assert kept == [path for path, (ours, theirs) in shapes.items() if ours == theirs]
    assert set(kept) < set(BLOCKS)


def test_another_architecture_or_no_adder_layer_cannot_be_compared(pair):
    student, teacher = pair
    other = timm.create_model("test_resnet", pretrained_cfg_overlay={"input_size": (3, 16, 16)})
    with pytest.raises(ModelSourceError, match=r"none of the modules .*, such as features.1; .*--teacher"):
        common_blocks(student, other)
    with pytest.raises(ModelSourceError, match="no adder layer"):
        common_blocks(teacher, teacher)


@pytest.mark.parametrize(("changes", "kind"), [({}, "BlockObjective"), ({"block_loss_weight": 0.0}, "Objective")])
def test_the_recipe_says_what_is_compared(changes, kind, pair):
    student, teacher = pair
    recipe = Recipe(**{**SETTINGS, **changes})
    assert (
        type(prepare.make_objective(recipe, DistillationTeacher(teacher, DataConfig.of(student)), student)).__name__
        == kind
    )


@pytest.mark.parametrize(
    "changes", [{"distill_loss_weight": 0.0}, {"teacher_lr": 0.1}, {"bits": 8}, {"block_loss_weight": -1.0}]
)
def test_settings_that_do_not_fit_are_refused(changes):
    with pytest.raises(RecipeError, match=r"block_loss_weight is .*, expected"):
        Recipe(**{**SETTINGS, **changes})


def test_a_run_learns_the_blocks(adder_folder, cnn_folder, train):
    """Told to, a run brings the blocks' outputs nearer to the teacher's than predictions alone do."""
    images = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    errors = {}
    for weight in (0.0, 10.0):
        settings = {"epochs": 3, "train_images": 256, "lr": 0.02, "block_loss_weight": weight}
        _, folder = train("distill", f"run{weight}", Job(str(adder_folder)), **settings)
        model, teacher = adderkit.load(folder.last), adderkit.load(cnn_folder)
        with torch.no_grad():
            ours, theirs = (blocks_of(each, images)[0] for each in (model, teacher))
        errors[weight] = sum(((a - b) ** 2).mean() / b.var() for a, b in zip(ours, theirs, strict=True))
    assert errors[10.0] < 0.8 * errors[0.0]
