"""The plan of a run: what it would be, checked against runs and measurements; nothing is written."""

import copy
import json
import math
import subprocess
import sys

import pytest
import timm
import torch
import yaml

import adderkit
from adderkit.convert.errors import DatasetError, ModelSourceError, RecipeError
from adderkit.convert.model_source import ModelSource
from adderkit.recipes.configs.files import load_recipe, recipe_names
from adderkit.recipes.configs.recipe import Recipe
from adderkit.recipes.data.datasets import DataConfig
from adderkit.recipes.objectives.objective import Objective
from adderkit.recipes.objectives.teacher import DistillationTeacher, FrozenTeacher
from adderkit.recipes.runs.folder import RunFolder
from adderkit.recipes.runs.plan import batches_per_epoch
from adderkit.recipes.training import assemble as module
from adderkit.recipes.training import run as finetune
from adderkit.recipes.training.assemble import assemble, open_data
from adderkit.recipes.training.dry_run import dry_run
from adderkit.recipes.training.memory import estimate_memory
from adderkit.recipes.training.models import Job, build_student
from adderkit.recipes.training.prepare import make_accelerator, prepare

CNN = Job(ModelSource("cifar_resnet20", pretrained=False))


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_can_be_carried_out(name, adder_folder, cnn_folder, tmp_path, monkeypatch):
    """On a tiny data set in the place of its own, with 8 processes."""
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(name).changed({"dataset": "digits", "workers": 0})
    recipe = recipe.changed({"batch_size": min(64, recipe.batch_size)})
    job = Job(ModelSource(str(adder_folder)), teacher=str(cnn_folder) if recipe.distill_loss_weight else None)
    planned = dry_run(job, recipe, 8)
    assert planned.plan.steps_per_epoch > 0
    assert planned.plan.effective_batch == recipe.batch_size * 8 * recipe.grad_accum_steps
    assert planned.memory.total > planned.memory.activations > 0
    resolved = yaml.safe_load(planned.text().split("\n\n", 1)[1])
    assert Recipe().changed(resolved) == recipe
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "processes", "steps"),
    [
        ({"batch_size": 32, "train_images": 96}, 1, 3),
        ({"batch_size": 20, "train_images": 96}, 1, 4),  # the last 16 images are left out
        ({"batch_size": 200, "train_images": 96}, 1, 1),
        ({"batch_size": 16, "train_images": 96, "grad_accum_steps": 4}, 1, 2),
        ({"batch_size": 16, "train_images": 96}, 4, 1),
        ({"batch_size": 8, "train_images": 96}, 4, 3),
    ],
    ids=str,
)
def test_steps(quick_recipe, changes, processes, steps):
    recipe = quick_recipe(epochs=3, **changes)
    plan = dry_run(CNN, recipe, processes).plan
    assert (plan.steps_per_epoch, plan.steps, plan.images) == (steps, 3 * steps, 96)
    if processes == 1:
        model = build_student(CNN, recipe)
        assembly = assemble(CNN, recipe, model, open_data(recipe, model), processes=1)
        run = prepare(assembly, make_accelerator(recipe, RunFolder("x").path))
        assert run.updates_per_epoch == run.plan.steps_per_epoch == steps


def test_more_processes_than_batches_leave_nothing(quick_recipe):
    assert batches_per_epoch(100, 32, processes=4) == 0
    assert batches_per_epoch(20, 32, processes=1) == 1
    assert batches_per_epoch(20, 32, processes=4) == 0  # not the same images for each
    with pytest.raises(DatasetError, match="100 training images, expected at least 128, 32 for each of 4 processes"):
        dry_run(CNN, quick_recipe(batch_size=32, train_images=100), 4)


@pytest.mark.parametrize(("size", "processes", "rate"), [(0, 4, 0.1), (256, 4, 0.1), (64, 4, 0.4), (512, 1, 0.0125)])
def test_learning_rate_in_proportion_to_the_batch(quick_recipe, size, processes, rate):
    recipe = quick_recipe(lr=0.1, lr_base_size=size, batch_size=32, grad_accum_steps=2, train_images=128)
    planned = dry_run(CNN, recipe, processes)
    assert planned.to_dict()["plan"]["lr"] == pytest.approx(rate)
    assert (f"0.1 x {64 * processes} / {size}" in planned.text()) == bool(size)


def test_a_run_takes_the_rate_that_was_planned(train):
    rows, _ = train(lr=0.1, lr_base_size=64, batch_size=32, sched="step", warmup_epochs=0)
    assert rows[0]["lr"] == pytest.approx(0.05)


def test_counts_of_a_converted_model(adder_folder, quick_recipe):
    plan = dry_run(Job(ModelSource(str(adder_folder))), quick_recipe("distill"), 1).plan
    assert (plan.converted_layers, plan.convolutions) == (3, 19)
    assert plan.teacher == str(adder_folder / "teacher")


MISSING = {"dataset": "folder", "train_images": 0, "crop_padding": 0}


def test_a_data_set_that_is_not_here(tmp_path, quick_recipe):
    planned = dry_run(CNN, quick_recipe(**MISSING, data_dir=str(tmp_path / "birds")), 1)
    assert planned.plan.images is planned.plan.steps is planned.hours is None
    assert "images unknown: data set not found here: " in planned.text()
    assert "birds does not exist" in planned.text()
    json.dumps(planned.to_dict())


@pytest.mark.parametrize(("dataset", "data_dir"), [("folder", "here/ImageNet"), ("hfds/ILSVRC/imagenet-1k", None)])
def test_imagenet_is_known_without_its_images(quick_recipe, dataset, data_dir):
    recipe = quick_recipe(**{**MISSING, "dataset": dataset}, data_dir=data_dir, batch_size=256, img_size=32)
    planned = dry_run(Job(ModelSource("resnet18")), recipe, 4)
    assert (planned.plan.images, planned.plan.evaluation_images) == (1_281_167, 50_000)
    assert planned.plan.steps_per_epoch == 1_281_167 // 256 // 4
    assert "the numbers are ImageNet's" in planned.text()


@pytest.mark.parametrize(
    ("changes", "job", "error"),
    [
        ({"dataset": "digit"}, CNN, DatasetError),
        ({"dataset": ""}, CNN, DatasetError),
        ({"opt": "sgdd"}, CNN, RecipeError),
        ({"sched": "cosin"}, CNN, RecipeError),
        ({"log_with": "tensorbored"}, CNN, RecipeError),
        ({"torchcompile": "indutcor"}, CNN, RecipeError),
        ({"adder_init": "normal"}, CNN, RecipeError),
        ({"mixup": 1.0, "train_images": 31}, CNN, RecipeError),
        ({"distill_loss_weight": 1.0}, CNN, ModelSourceError),
        ({}, Job(ModelSource("resnet999")), ModelSourceError),
        ({}, Job(ModelSource("cifar_resnet20", pretrained=False, num_classes=7)), DatasetError),
    ],
    ids=str,
)
def test_what_would_stop_the_run_stops_the_plan(quick_recipe, changes, job, error):
    with pytest.raises(error):
        dry_run(job, quick_recipe(**changes), 1)


@pytest.mark.parametrize("recipe", ["distill", "pkkd"])
def test_a_teacher_that_cannot_be_compared_stops_the_plan(recipe, quick_recipe, adder_folder, tmp_path):
    overlay = {"input_size": (1, 8, 8)}
    other = timm.create_model("test_resnet", num_classes=10, in_chans=1, pretrained_cfg_overlay=overlay)
    adderkit.save(other, tmp_path / "other")
    with pytest.raises(ModelSourceError, match="the teacher has none of the modules that are compared"):
        dry_run(Job(ModelSource(str(adder_folder)), teacher=str(tmp_path / "other")), quick_recipe(recipe), 1)


def test_splits_of_other_classes_stop_the_plan(quick_recipe, image_folder):
    root = image_folder()
    (root / "validation" / "dog").rename(root / "validation" / "fox")
    with pytest.raises(DatasetError, match="does not have: fox, and lacks dog"):
        dry_run(CNN, quick_recipe(**MISSING, data_dir=str(root)), 1)


def test_a_batchnorm_that_cannot_be_synchronized_stops_the_plan(quick_recipe, adder_folder, monkeypatch):
    class Own(torch.nn.BatchNorm2d):
        pass

    def build(*_, **__):
        model = adderkit.load(adder_folder)
        model.features[0][1] = Own(16)
        return model

    monkeypatch.setattr(module, "build_student", build)
    recipe = quick_recipe("distill", sync_bn=True, batch_size=16)
    assert dry_run(Job(ModelSource(str(adder_folder))), recipe, 1)
    with pytest.raises(RecipeError, match=r"features.0.1 is a Own, expected torch's BatchNorm"):
        dry_run(Job(ModelSource(str(adder_folder))), recipe, 2)


def test_a_measured_rate_gives_hours(train, quick_recipe):
    _, folder = train()
    planned = dry_run(Job(ModelSource(str(folder.last))), quick_recipe(epochs=50, train_images=128), 1)
    rate, where = planned.rate
    assert where == "1 x cpu"
    assert rate > 0
    assert planned.hours == pytest.approx(50 * 128 / rate / 3600)
    assert "measured on 1 x cpu" in planned.text()


def test_command_line(adder_kit, tmp_path):
    words = ("finetune", "cifar_resnet20", "--no-pretrained", "--dataset", "digits", "--dry-run")
    status, output, _ = adder_kit(*words, "--num-processes", 4)
    assert status == 0
    assert "x 4 processes = 512 images" in output
    status, output, _ = adder_kit(*words, "--json")
    found = json.loads(output)
    assert found["plan"]["images"] == 1437
    assert found["recipe"]["dataset"] == "digits"
    assert found["hours"] is None
    assert list(tmp_path.iterdir()) == []
    assert adder_kit("finetune", "--resume", tmp_path, "--dry-run")[0] == 2


def test_the_model_is_left_as_it_is():
    model = timm.create_model("cifar_resnet20").eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    estimate_memory(model, Objective(Recipe(), None, model), Recipe(batch_size=4), (3, 32, 32), 1)
    assert not model.training
    assert all(before[name].equal(value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("opt", "values"), [("sgd", 1), ("adamw", 2), ("lamb", 2), ("lookahead_momentum", 1)])
def test_memory_of_what_goes_with_the_weights(opt, values):
    model = timm.create_model("cifar_resnet20")
    teacher = FrozenTeacher(copy.deepcopy(model), DataConfig.of(model))
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    recipe = Recipe(opt=opt, batch_size=4, model_ema=True)
    found = estimate_memory(model, Objective(recipe, teacher, model), recipe, (3, 32, 32), 2)
    assert (found.gradients, found.optimizer) == (2 * weights, values * weights)
    assert found.average == found.weights
    assert found.teacher == found.weights + 2 * 3 * 4  # the change of normalization
    assert weights < found.weights < 1.01 * weights


def test_activations_of_a_network_by_hand():
    """Kept: the images, what ReLU gives (which also the second layer keeps), and nothing for the last sum."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 1))

    class Sum(Objective):
        def forward(self, model, batch, targets):
            return {"loss": model(batch).sum()}

    found = estimate_memory(model, Sum(Recipe(), None, model), Recipe(batch_size=8), (3, 10, 10), 1)
    assert found.activations == 4 * 8 * 100 * (3 + 4)
    assert found.passing == 2 * 4 * 8 * 100 * (4 + 4)


def activations(pair, **changes):
    student, teacher = copy.deepcopy(pair)
    recipe = Recipe(batch_size=8, distill_loss_weight=1.0, **changes)
    taught = (DistillationTeacher if recipe.teacher_lr else FrozenTeacher)(teacher, DataConfig.of(student))
    return estimate_memory(student, Objective(recipe, taught, student), recipe, (3, 16, 16), 1).activations


def test_what_comparing_blocks_keeps(pair):
    """The square of a difference keeps the difference: nine blocks of three sizes, in fp32, and little else."""
    blocks = 4 * 8 * 3 * (16 * 16 * 16 + 32 * 8 * 8 + 64 * 4 * 4)
    more = activations(pair, block_loss_weight=1.0) - activations(pair)
    assert blocks <= more < 1.01 * blocks


def test_what_a_teacher_that_trains_and_its_kernels_keep(pair):
    """The CNN keeps less than its adder twin; kernels keep several maps of each stage of both."""
    alone, taught = activations(pair), activations(pair, teacher_lr=0.1)
    stages = 4 * 8 * (16 * 16 * 16 + 32 * 8 * 8 + 64 * 4 * 4)
    assert 1.5 * alone < taught < 2 * alone
    assert activations(pair, teacher_lr=0.1, kernel_loss_weight=1.0) - taught > 6 * stages


MEASURE = """
import timm, torch
from adderkit import convert_
from adderkit.recipes.training.memory import estimate_memory
from adderkit.recipes.objectives.objective import Objective
from adderkit.recipes.configs.recipe import Recipe

def peak(name):
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])

def step(batch):
    images, labels = torch.randn(batch, 3, 32, 32), torch.zeros(batch, dtype=torch.long)
    torch.nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()

model = timm.create_model("cifar_resnet20").train()
if KIND == "adder":
    convert_(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
step(2)
before = peak("VmRSS")
step(128)
recipe = Recipe(batch_size=128)
print(peak("VmHWM") - before, estimate_memory(model, Objective(recipe, None, model), recipe, (3, 32, 32), 1).total)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("kind", [pytest.param("cnn", marks=pytest.mark.slow), "adder"])
def test_memory_is_that_of_a_measured_step(kind):
    """The highest resident memory of a process, against what it had before the step; within a factor of 2."""
    words = [sys.executable, "-c", f"KIND = {kind!r}\n{MEASURE}"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    measured, estimated = map(int, done.stdout.split())
    assert measured > 5e7
    assert 0.5 < estimated / measured < 2, (measured, estimated)


def test_a_finished_run_was_what_was_planned(train, quick_recipe):
    rows, folder = train(epochs=2, train_images=96, batch_size=32)
    lines = (folder.path / "log.txt").read_text()
    planned = dry_run(CNN, quick_recipe(epochs=2, train_images=96, batch_size=32), 1)
    for title, text in planned.plan.lines().items():
        assert f" {title}: {text}\n" in lines
    assert planned.plan.steps == 6
    assert math.isfinite(rows[-1]["train_loss"])
    assert finetune.resume(folder) == rows
