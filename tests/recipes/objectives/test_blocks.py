"""Distillation block by block: the loss against its formula, and what is compared where networks differ."""

import pytest
import timm
import torch
import torch.nn.functional as F

import adderkit
from adderkit.convert.errors import ModelSourceError
from adderkit.convert.model_source import ModelSource
from adderkit.recipes.configs.recipe import Recipe
from adderkit.recipes.data.datasets import DataConfig
from adderkit.recipes.objectives.blocks import BlockDistillation, common_blocks
from adderkit.recipes.objectives.objective import Objective
from adderkit.recipes.objectives.teacher import FrozenTeacher
from adderkit.recipes.objectives.term import forward_both
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
    objective = Objective(Recipe(**SETTINGS), FrozenTeacher(teacher, DataConfig.of(student)), student)
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
    values = objective(student, images, targets)
    assert values["loss"].item() == pytest.approx(wanted.item(), rel=1e-4)
    assert values["block"].item() == pytest.approx(sum(errors).item() / 9, rel=1e-4)


def test_the_gradient_of_a_block_reaches_it_and_those_before_it(pair):
    student, teacher = pair
    objective = Objective(Recipe(**SETTINGS), FrozenTeacher(teacher, DataConfig.of(student)), student)
    objective.terms["block"].paths = ["features.3"]
    objective(student.train(), torch.randn(6, 3, 16, 16), torch.zeros(6, dtype=torch.long))["block"].backward()
    assert student.features[3].conv2.weight.grad.abs().max() > 0
    assert student.features[1].conv1.weight.grad.abs().max() > 0
    assert student.features[4].conv1.weight.grad is None
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_blocks_that_pruning_made_smaller_are_not_compared(pair, caplog):
    student, teacher = pair
    config = adderkit.PruneConfig(ratio=0.5, importance="magnitude", ignore=("features.[0-3].*",))
    adderkit.prune_(student, config)
    shapes = common_blocks(student, teacher)
    assert list(shapes) == BLOCKS
    term = BlockDistillation(Recipe(**SETTINGS), student, teacher)
    kept = term.paths
    assert kept == [path for path, (ours, theirs) in shapes.items() if ours == theirs]
    assert set(kept) < set(BLOCKS)
    assert f"{len(BLOCKS) - len(kept)} of {len(BLOCKS)} blocks have other shapes in the teacher" in caplog.text
    term.paths = []
    images = torch.randn(2, 3, 16, 16)
    outputs, _ = forward_both(student, None, images, [])
    assert term(outputs, outputs, torch.zeros(2)).item() == 0


def test_another_architecture_or_no_adder_layer_cannot_be_compared(pair):
    student, teacher = pair
    other = timm.create_model("test_resnet", pretrained_cfg_overlay={"input_size": (3, 16, 16)})
    with pytest.raises(ModelSourceError, match=r"none of the modules .*, such as features.1; .*--teacher"):
        common_blocks(student, other)
    with pytest.raises(ModelSourceError, match="no converted layer"):
        common_blocks(teacher, teacher)


def test_a_run_learns_the_blocks(adder_folder, cnn_folder, train):
    """Told to, a run brings the blocks' outputs nearer to the teacher's than predictions alone do."""
    images = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    errors = {}
    for weight in (0.0, 10.0):
        settings = {"epochs": 3, "train_images": 256, "lr": 0.02, "block_loss_weight": weight}
        _, folder = train("distill", f"run{weight}", Job(ModelSource(str(adder_folder))), **settings)
        model, teacher = adderkit.load(folder.last), adderkit.load(cnn_folder)
        with torch.no_grad():
            ours, theirs = (blocks_of(each, images)[0] for each in (model, teacher))
        errors[weight] = sum(((a - b) ** 2).mean() / b.var() for a, b in zip(ours, theirs, strict=True))
    assert errors[10.0] < 0.8 * errors[0.0]
