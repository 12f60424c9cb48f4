"""Kernel distillation against its formulas, and the recipe pkkd, whose teacher trains alongside."""

import copy
import json
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import adderkit
from adderkit.convert.errors import ModelSourceError, RecipeError
from adderkit.convert.model_source import ModelSource
from adderkit.recipes.configs.recipe import Recipe
from adderkit.recipes.data.datasets import DataConfig, open_dataset, subset
from adderkit.recipes.data.loaders import Transformed, evaluation_transform
from adderkit.recipes.objectives.kernels import gaussian_kernel, laplacian_kernel, stage_ends
from adderkit.recipes.objectives.objective import Objective
from adderkit.recipes.objectives.teacher import DistillationTeacher
from adderkit.recipes.runs.folder import RunFolder
from adderkit.recipes.training import prepare
from adderkit.recipes.training import run as finetune
from adderkit.recipes.training.models import Job, build_teacher

FINE = {"adder_init": "keep", "lr": 0.01, "eta": 0.05, "sharpness": 1024.0, "teacher_lr": 0.01}
SETTINGS = {"distill_loss_weight": 0.7, "task_loss_weight": 0.3, "teacher_lr": 0.1, "kd_temperature": 3.0}


def objective_of(pair, **changes):
    student, teacher = copy.deepcopy(pair)
    recipe = Recipe(**{**SETTINGS, **changes})
    return Objective(recipe, DistillationTeacher(teacher, DataConfig.of(student)), student), student.train()


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_kernels_are_their_formulas(temperature):
    features = torch.tensor([[[[3.0, -4.0]], [[0.0, 2.0]]]])
    gaussian, laplacian = (kernel(features, temperature) for kernel in (gaussian_kernel, laplacian_kernel))
    units = (math.sqrt((9 + 16) / 2), math.sqrt(4 / 2))
    for channel, unit in enumerate(units):
        for place in range(2):
            value = features[0, channel, 0, place].item() / unit
            assert gaussian[0, channel, 0, place].item() == pytest.approx(math.exp(-(value**2) / 2 / temperature**2))
            assert laplacian[0, channel, 0, place].item() == pytest.approx(math.exp(-abs(value) / temperature))


def test_kernels_of_a_silent_channel_are_finite():
    features = torch.zeros(2, 3, 4, 4, requires_grad=True)
    (gaussian_kernel(features, 1.0) + laplacian_kernel(features, 1.0)).sum().backward()
    assert features.grad.isfinite().all()


def test_networks_are_compared_where_their_stages_end(pair):
    assert stage_ends(*pair) == {"features.3": (16, 16), "features.6": (32, 32), "features.9": (64, 64)}


def test_another_architecture_or_no_adder_layer_cannot_be_compared(pair):
    student, teacher = pair
    other = timm.create_model("test_resnet", pretrained_cfg_overlay={"input_size": (3, 16, 16)})
    with pytest.raises(ModelSourceError, match=r"none of the modules .*, such as features.1; .*--teacher"):
        stage_ends(student, other)
    with pytest.raises(ModelSourceError, match="no converted layer"):
        stage_ends(teacher, teacher)


def standardized(values):
    mean, variance = values.mean((0, 2, 3), keepdim=True), values.var((0, 2, 3), keepdim=True, unbiased=False)
    return (values - mean) / (variance + 1e-5).sqrt()


def stages(model, images):
    """Outputs of the three stages and of the whole, module by module."""
    found = []
    for index, module in enumerate(model.features):
        images = module(images)
        if index in (3, 6, 9):
            found.append(images)
    return found, model.forward_head(images)


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_loss_is_the_formula(pair, weight):
    objective, student = objective_of(pair, kernel_loss_weight=weight, kernel_temperature=0.5, smoothing=0.1)
    images, targets = torch.randn(6, 3, 16, 16), torch.tensor([0, 1, 2, 3, 0, 1])
    with torch.no_grad():
        ours, logits = stages(student, images)
        theirs, expected = stages(objective.teacher.model, images)
        kernels = [
            (standardized(laplacian_kernel(a, 0.5)) - standardized(gaussian_kernel(b, 0.5))).square().mean()
            for a, b in zip(ours, theirs, strict=True)
        ]
        p, q = (F.softmax(value / 3, 1) for value in (expected, logits))
        wanted = 0.7 * 9 * (p * (p.log() - q.log())).sum(1).mean() + weight * sum(kernels) / 3
        wanted += 0.3 * F.cross_entropy(logits, targets, label_smoothing=0.1)
        wanted += F.cross_entropy(expected, targets, label_smoothing=0.1)
    assert objective(student, images, targets)["loss"].item() == pytest.approx(wanted.item(), rel=1e-4)


def test_the_teacher_learns_from_the_labels_alone(pair):
    objective, student = objective_of(pair, kernel_loss_weight=2.0)
    images, targets = torch.randn(6, 3, 16, 16), torch.tensor([0, 1, 2, 3, 0, 1])
    alone = copy.deepcopy(objective.teacher.model)
    objective(student, images, targets)["loss"].backward()
    F.cross_entropy(alone(images), targets).backward()
    for actual, wanted in zip(objective.teacher.model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, wanted.grad, rtol=1e-3, atol=1e-6)
    term = objective.terms["kernel"]
    heads = [*term.student_heads, *term.teacher_heads]
    assert len(heads) == 6
    assert all(head.weight.grad.abs().max() > 0 for head in heads)
    assert student.features[3].conv2.weight.grad.abs().max() > 0


def progress(folder):
    """The state of the objective: teacher and heads."""
    return load_file(folder.last / "state" / "model_1.safetensors")


def test_the_teacher_steps_at_its_own_rate_unclipped(adder_folder, cnn_folder, train, monkeypatch):
    """One step of plain SGD, written out for the teacher; the student's gradient is clipped to nearly nothing."""
    monkeypatch.setattr(prepare, "training_transform", lambda config, augmentation: evaluation_transform(config))
    changes = {"momentum": 0.0, "weight_decay": 0.0, "teacher_lr": 0.05, "clip_grad": 1e-9, "eta": 0.0}
    _, folder = train("pkkd", job=Job(ModelSource(str(adder_folder))), batch_size=64, **{**FINE, **changes})
    teacher = adderkit.load(cnn_folder).train()
    images = subset(open_dataset("digits", None, "train", 1), 64, seed=0)
    dataset = Transformed(images, evaluation_transform(DataConfig.of(teacher)))
    images, targets = (list(part) for part in zip(*[dataset[index] for index in range(len(dataset))], strict=True))
    F.cross_entropy(teacher(torch.stack(images)), torch.tensor(targets)).backward()
    state = progress(folder)
    for name, parameter in teacher.named_parameters():
        expected = parameter.detach() - 0.05 * parameter.grad
        torch.testing.assert_close(state[f"teacher.model.{name}"], expected, rtol=1e-3, atol=1e-5)
    before, after = (adderkit.load(path).state_dict() for path in (adder_folder, folder.last))
    key = "features.4.conv1.weight"
    assert (after[key] - before[key]).abs().max() < 1e-9
    assert after.keys() == before.keys()  # neither teacher nor heads are in the model


def test_stopped_and_resumed_is_never_stopped(adder_folder, train, same_run, stop_at, monkeypatch):
    changes = {"epochs": 2, "hflip": 0.5, "job": Job(ModelSource(str(adder_folder))), **FINE}
    rows, through = train("pkkd", folder="through", **changes)
    stop_at("epoch 1/1", 1)
    with pytest.raises(KeyboardInterrupt):
        train("pkkd", folder="stopped", save_every=1, **changes)
    monkeypatch.undo()
    folder = RunFolder(through.path.with_name("stopped"))
    assert json.loads((folder.last / "state" / "run_state.json").read_text())["batches_done"] == 1
    assert finetune.resume(folder) == rows
    same_run(folder, through)
    ours, theirs = progress(folder), progress(through)
    assert [name for name, value in ours.items() if not value.equal(theirs[name])] == []


def test_a_step_is_skipped_where_only_the_teacher_gradient_is_not_finite(
    adder_folder, cnn_folder, train, monkeypatch, steep
):
    forward = DistillationTeacher.forward
    monkeypatch.setattr(DistillationTeacher, "forward", lambda self, images: steep(forward(self, images)))
    _, folder = train("pkkd", job=Job(ModelSource(str(adder_folder))), **FINE)
    assert json.loads((folder.last / "adder_report.json").read_text())["training"]["skipped_steps"] == 2
    weight = adderkit.load(cnn_folder).fc.weight
    assert progress(folder)["teacher.model.fc.weight"].equal(weight)


@pytest.mark.parametrize("named", [True, False])
def test_the_teacher_begins_at_random_where_the_student_does(adder_folder, cnn_folder, quick_recipe, named):
    student = adderkit.load(adder_folder)
    job = Job(ModelSource(str(adder_folder), pretrained=False), teacher="cifar_resnet20" if named else None)
    teacher = build_teacher(job, quick_recipe("pkkd"), student, trains=True)
    assert teacher.same
    assert teacher.model.num_classes == 10
    assert not teacher.model.fc.weight.equal(adderkit.load(cnn_folder).fc.weight)
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    frozen = build_teacher(Job(ModelSource(str(adder_folder), pretrained=False)), quick_recipe("distill"), student)
    assert frozen.model.fc.weight.equal(adderkit.load(cnn_folder).fc.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel_temperature": 0.0}, "kernel_temperature is 0.0, expected a positive number"),
        ({"teacher_lr": -1.0}, "teacher_lr is -1.0, expected at least 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(RecipeError, match=message):
        Recipe(**changes)
