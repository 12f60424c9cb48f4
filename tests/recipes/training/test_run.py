"""The training loop: it learns, it can be stopped and resumed, and its updates are those of a plain loop."""

import copy
import csv
import json
import math
import re
import shutil

import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import adderkit
from adderkit import AdderConv2d
from adderkit.convert.errors import AdderkitError, DatasetError, ModelSourceError, RecipeError
from adderkit.convert.model_source import ModelSource
from adderkit.recipes.configs.files import load_recipe, parse_settings, recipe_names
from adderkit.recipes.configs.recipe import Recipe
from adderkit.recipes.data.datasets import DataConfig, open_dataset
from adderkit.recipes.data.loaders import Transformed, evaluation_transform, unlabeled_images
from adderkit.recipes.objectives import labels
from adderkit.recipes.objectives.terms import teacher_need
from adderkit.recipes.runs.folder import RunFolder
from adderkit.recipes.runs.kept_teacher import find_teacher
from adderkit.recipes.runs.state import COLUMNS
from adderkit.recipes.training import assemble, prepare
from adderkit.recipes.training import run as finetune
from adderkit.recipes.training.evaluate import Metrics
from adderkit.recipes.training.models import Job, build_teacher
from adderkit.recipes.verbs.evaluate import evaluate_model


def weights(folder):
    return adderkit.load(folder).state_dict()


def assert_same_weights(actual, expected, **tolerance):
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}",
                                   **(tolerance or {"rtol": 0, "atol": 0}))  # fmt: skip


def read_summary(folder):
    lines = (folder.path / "summary.csv").read_text().splitlines()
    return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(lines)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, quick_recipe):
    """A CNN trained from scratch for four epochs."""
    folder = RunFolder(tmp_path_factory.mktemp("trained") / "run")
    recipe = quick_recipe(epochs=4, train_images=128, hflip=0.0, lr=0.05)
    return finetune.start(Job(ModelSource("cifar_resnet20", pretrained=False)), recipe, folder), folder


class TestTrainedCnn:
    def test_learns(self, trained):
        rows, _ = trained
        assert rows[-1]["train_loss"] < 0.8 * rows[0]["train_loss"]
        assert [row["epoch"] for row in rows] == [0, 1, 2, 3]

    def test_summary_holds_the_rows(self, trained):
        rows, folder = trained
        assert read_summary(folder) == rows
        assert (folder.path / "summary.csv").read_text().startswith(",".join(COLUMNS) + "\n")

    def test_leaves_the_files_that_are_promised(self, trained):
        _, folder = trained
        names = {path.name for path in folder.path.iterdir()}
        models = {"best", "last", "previous"}
        assert names == models | {"args.yaml", "summary.csv", "layers.csv", "log.txt", "plots", ".lock"}

    def test_arguments_are_kept(self, trained):
        _, folder = trained
        arguments = yaml.safe_load((folder.path / "args.yaml").read_text())
        assert arguments["job"]["source"]["name"] == "cifar_resnet20"
        assert Recipe().changed(arguments["recipe"]).lr == 0.05

    @pytest.mark.parametrize("which", ["best", "last"])
    def test_saved_models_have_the_recorded_accuracy(self, trained, which):
        rows, folder = trained
        row = max(rows, key=lambda row: row["eval_top1"]) if which == "best" else rows[-1]
        metrics = evaluate_model(ModelSource(str(folder.path / which)), "digits", None, "validation", 32, 0)
        assert metrics.top1 == row["eval_top1"]
        assert metrics.top5 == row["eval_top5"]
        assert metrics.loss == pytest.approx(row["eval_loss"], rel=1e-6)

    def test_report_names_recipe_and_metrics(self, trained):
        rows, folder = trained
        report = json.loads((folder.last / "adder_report.json").read_text())
        assert report["training"]["epoch"] == 3
        assert report["training"]["recipe"]["epochs"] == 4
        assert report["metrics"]["validation"]["top1"] == rows[-1]["eval_top1"]

    def test_batchnorm_of_a_cnn_is_left_alone(self, trained):
        _, folder = trained
        assert adderkit.load(folder.last).features[0][1].num_batches_tracked.item() == 4 * (128 // 32)

    def test_resuming_a_finished_run_changes_nothing(self, trained, tmp_path):
        rows, folder = trained
        copied = RunFolder(shutil.copytree(folder.path, tmp_path / "copy"))
        assert finetune.resume(copied) == rows
        assert_same_weights(weights(copied.last), weights(folder.last))


def test_another_seed_gives_another_run(straight, train):
    rows, _ = straight("cnn")
    other, _ = train(epochs=3, seed=1)
    assert other[0]["train_loss"] != rows[0]["train_loss"]


def test_a_run_is_never_overwritten(straight):
    rows, folder = straight("cnn")
    with pytest.raises(RecipeError, match="--resume"):
        finetune.start(*straight.arguments("cnn"), folder)
    assert read_summary(folder) == rows


def test_weights_from_a_relative_checkpoint(cnn_folder, train, monkeypatch):
    monkeypatch.chdir(cnn_folder.parent)
    _, folder = train(job=Job(ModelSource("cifar_resnet20", checkpoint="net")), lr=0.0, warmup_epochs=0)
    assert folder.arguments()["job"]["source"]["checkpoint"] == str(cnn_folder.resolve())
    assert weights(folder.last)["fc.weight"].equal(weights(cnn_folder)["fc.weight"])


class TestStudent:
    def test_distills_from_the_teacher_that_conversion_recorded(self, straight, adder_folder, cnn_folder):
        rows, folder = straight("adder")
        assert folder.arguments()["job"]["teacher"] == str(adder_folder / "teacher")
        assert weights(folder.path / "teacher")["fc.weight"].equal(weights(cnn_folder)["fc.weight"])
        assert all(math.isfinite(row["train_loss"]) for row in rows)

    def test_stays_an_adder_network(self, straight, adder_folder):
        _, folder = straight("adder")
        layers = [type(module) for module in adderkit.load(folder.best).modules() if isinstance(module, AdderConv2d)]
        assert len(layers) == 3
        assert not weights(folder.last)["features.4.conv1.weight"].equal(
            weights(adder_folder)["features.4.conv1.weight"]
        )

    def test_report_keeps_what_the_conversion_said(self, straight, adder_folder):
        _, folder = straight("adder")
        before, after = (json.loads((path / "adder_report.json").read_text()) for path in (adder_folder, folder.best))
        assert after["plan"] == before["plan"]
        assert after["teacher"] == "teacher"
        assert find_teacher(folder.best) == folder.path / "teacher"

    def test_first_loss_is_the_distillation_loss(self, adder_folder, cnn_folder, train, monkeypatch):
        """One batch of all images, no augmentation: the mean training loss can be computed from outside."""
        monkeypatch.setattr(prepare, "training_transform", lambda config, augmentation: evaluation_transform(config))
        changes = {"distill_loss_weight": 0.7, "task_loss_weight": 0.3, "smoothing": 0.1, "kd_temperature": 3.0}
        changes["block_loss_weight"] = 0.0
        rows, _ = train("distill", job=Job(ModelSource(str(adder_folder))), train_images=0, batch_size=1437, **changes)
        student, teacher = adderkit.load(adder_folder).train(), adderkit.load(cnn_folder)
        transform = evaluation_transform(DataConfig.of(teacher))
        dataset = Transformed(open_dataset("digits", None, "train", 1), transform)
        images = torch.stack([dataset[index][0] for index in range(len(dataset))])
        targets = torch.tensor([dataset[index][1] for index in range(len(dataset))])
        with torch.no_grad():
            logits, expected = student(images), teacher(images)
            p, q = (F.softmax(value / 3.0, 1) for value in (expected, logits))
            distil = 9 * (p * (p.log() - q.log())).sum(1).mean()
            smooth = torch.full_like(logits, 0.1 / 10).scatter(1, targets[:, None], 0.9 + 0.1 / 10)
            task = -(smooth * F.log_softmax(logits, 1)).sum(1).mean()
        assert rows[0]["train_loss"] == pytest.approx((0.7 * distil + 0.3 * task).item(), rel=1e-4)

    def test_batchnorm_statistics_are_those_of_the_final_weights(self, adder_folder, train):
        _, folder = train("distill", job=Job(ModelSource(str(adder_folder))), bn_images=32)
        model = adderkit.load(folder.last)
        found = {name: value.clone() for name, value in model.state_dict().items() if "running" in name}
        images = unlabeled_images("digits", None, model, 64, seed=0)
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = 1.0
                norm.train()
        # The 32 are a random choice of the 64 training images, which are a random choice themselves.
        chosen = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:32]
        with torch.no_grad():
            model(images[chosen])
        assert found
        for name, value in found.items():
            torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-4, atol=1e-4)

    def test_no_batchnorm_images_keeps_the_running_statistics(self, adder_folder, train):
        _, folder = train("distill", job=Job(ModelSource(str(adder_folder))), bn_images=0)
        assert weights(folder.last)["features.4.bn1.num_batches_tracked"].item() == 2 + tracked(adder_folder)

    def test_a_last_batch_of_one_image_is_no_trouble_for_batchnorm(self, adder_folder, train):
        rows, _ = train("distill", job=Job(ModelSource(str(adder_folder))), train_images=33, bn_images=33)
        assert len(rows) == 1

    @pytest.mark.parametrize("eta", [0.0, 0.2])
    def test_adaptive_rate_is_on_unless_eta_is_zero(self, adder_folder, train, eta):
        changes = {"eta": eta, "opt": "momentum", "lr": 0.1, "train_images": 32}
        _, folder = train("distill", job=Job(ModelSource(str(adder_folder))), **changes)
        key = "features.4.conv2.weight"
        moved = (weights(folder.last)[key] - weights(adder_folder)[key]).norm().item()
        by_formula = moved == pytest.approx(0.1 * 0.2 * weights(adder_folder)[key].numel() ** 0.5, rel=1e-4)
        assert by_formula == (eta > 0)

    @pytest.mark.parametrize("amp", ["bf16"])
    def test_mixed_precision(self, adder_folder, train, amp):
        rows, folder = train("distill", job=Job(ModelSource(str(adder_folder))), amp=amp)
        assert math.isfinite(rows[0]["train_loss"])
        assert {value.dtype for value in weights(folder.last).values()} == {torch.float32, torch.int64}


def tracked(folder):
    return weights(folder)["features.4.bn1.num_batches_tracked"].item()


class Recorded:
    """A data set that remembers in which order it was read."""

    def __init__(self, dataset):
        self.dataset, self.order = dataset, []

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        self.order.append(index)
        return self.dataset[index]


def plain_loop(model, dataset, order, recipe, rates):
    """Gradient accumulation, momentum and the adaptive rate written out; one epoch."""
    model = model.train()
    parameters = list(model.parameters())
    momentum = [torch.zeros_like(parameter) for parameter in parameters]
    adders = {id(layer.weight) for layer in model.modules() if isinstance(layer, AdderConv2d)}
    batches = [order[start : start + recipe.batch_size] for start in range(0, len(order), recipe.batch_size)]
    windows = [
        batches[start : start + recipe.grad_accum_steps] for start in range(0, len(batches), recipe.grad_accum_steps)
    ]
    assert len(windows) == len(rates)
    for window, rate in zip(windows, rates, strict=True):
        grads = [torch.zeros_like(parameter) for parameter in parameters]
        for batch in window:
            images = torch.stack([dataset[index][0] for index in batch])
            targets = torch.tensor([dataset[index][1] for index in batch])
            loss = F.cross_entropy(model(images), targets)
            for total, grad in zip(grads, torch.autograd.grad(loss, parameters), strict=True):
                total += grad / len(window)
        with torch.no_grad():
            for parameter, grad, velocity in zip(parameters, grads, momentum, strict=True):
                if id(parameter) in adders:
                    grad *= recipe.eta * grad.numel() ** 0.5 / grad.norm()
                velocity.mul_(recipe.momentum).add_(grad)
                parameter -= rate * velocity
    return model


@pytest.mark.parametrize("kind", ["cnn", "adder"])
def test_accumulation_with_a_short_last_window_is_that_of_a_plain_loop(
    kind, cnn_folder, adder_folder, train, monkeypatch
):
    source = adder_folder if kind == "adder" else cnn_folder
    recorded = []

    def recording(recipe, model, *, training, open_split=assemble.open_split):
        dataset = open_split(recipe, model, training=training)
        if not training:
            return dataset
        recorded.append(Recorded(dataset))
        return recorded[-1]

    monkeypatch.setattr(assemble, "open_split", recording)
    monkeypatch.setattr(prepare, "training_transform", lambda config, augmentation: evaluation_transform(config))
    settings = {"opt": "momentum", "lr": 0.01, "momentum": 0.9, "weight_decay": 0.0, "warmup_epochs": 0, "bn_images": 0}
    recipe = Recipe(batch_size=8, grad_accum_steps=3, **settings)
    _, folder = train(job=Job(ModelSource(str(source))), batch_size=8, grad_accum_steps=3, train_images=32, **settings)
    order = recorded[0].order
    assert len(order) == len(set(order)) == 32
    rates = [0.01, 0.01 * 0.5 * (1 + math.cos(math.pi * 1 / 2))]
    model = adderkit.load(source)
    images = Transformed(recorded[0], evaluation_transform(DataConfig.of(model)))
    expected = plain_loop(model, images, list(order), recipe, rates)
    assert_same_weights(weights(folder.last), expected.state_dict(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("steps", "warmup", "min_lr"), [(1, 0, 0.0), (1, 1, 0.001), (3, 2, 0.0)])
def test_learning_rate_follows_the_cosine(train, steps, warmup, min_lr, monkeypatch):
    monkeypatch.setattr(finetune, "evaluate", lambda *_: Metrics(1.0, 1.0, 1.0, 1, 1.0))
    seen = []
    handle = register_optimizer_step_pre_hook(lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"]))
    settings = {"epochs": 3, "batch_size": 16, "grad_accum_steps": steps, "warmup_epochs": warmup}
    rows, _ = train(lr=0.05, warmup_lr=0.01, min_lr=min_lr, **settings)
    handle.remove()
    per_epoch = math.ceil(4 / steps)
    total, rising = 3 * per_epoch, warmup * per_epoch
    expected = [
        0.01 + (0.05 - 0.01) * step / rising
        if step < rising
        else min_lr + (0.05 - min_lr) * (1 + math.cos(math.pi * step / total)) / 2
        for step in range(total)
    ]
    assert seen == pytest.approx(expected, rel=1e-6)
    assert [row["lr"] for row in rows] == pytest.approx(expected[per_epoch - 1 :: per_epoch], rel=1e-6)


@pytest.mark.parametrize(("decay", "shrinks"), [(0.0, False), (0.5, True)])
def test_weight_decay_spares_normalizations(cnn_folder, train, decay, shrinks, monkeypatch):
    """With gradients of zero, what moves is moved by the decay alone."""
    monkeypatch.setattr(labels, "cross_entropy", lambda logits, targets, **options: logits.sum() * 0)
    _, folder = train(job=Job(ModelSource(str(cnn_folder))), lr=0.1, weight_decay=decay, epochs=1, warmup_epochs=0)
    before, after = weights(cnn_folder), weights(folder.last)
    assert (after["fc.weight"].norm() < 0.99 * before["fc.weight"].norm()) == shrinks
    assert after["fc_norm.weight"].equal(before["fc_norm.weight"])


@pytest.mark.parametrize(
    "changes", [{"opt": "nonsense"}, {"sched": "nonsense"}, {"sched": "none"}, {"auto_augment": "x", "crop_padding": 0}]
)
def test_a_setting_that_timm_does_not_know_is_one_clear_error(train, changes):
    with pytest.raises(AdderkitError):
        train(**changes)


class TestRefused:
    def test_distilling_without_a_teacher(self, train, cnn_folder):
        with pytest.raises(ModelSourceError, match=r"names no teacher; .*--teacher"):
            train("distill", job=Job(ModelSource(str(cnn_folder))))

    @pytest.mark.parametrize("name", [name for name in recipe_names() if load_recipe(name).distill_loss_weight])
    def test_the_settings_that_do_without_a_teacher_fit(self, name, cnn_folder):
        with pytest.raises(ModelSourceError, match="names no teacher") as caught:
            build_teacher(Job(ModelSource(str(cnn_folder))), load_recipe(name), adderkit.load(cnn_folder))
        words = re.findall(r"--set (\S+)", str(caught.value))
        changed = load_recipe(name).changed(parse_settings(words))
        assert teacher_need(changed) is None

    def test_half_precision_that_the_machine_lacks(self, train, monkeypatch):
        def refuse(**_):
            raise ValueError("fp16 mixed precision requires a GPU")

        monkeypatch.setattr(prepare, "Accelerator", refuse)
        with pytest.raises(RecipeError, match="accelerate cannot be set up with amp 'fp16': fp16 mixed"):
            train(amp="fp16")

    def test_data_of_other_classes(self, train, cnn_folder, image_folder):
        with pytest.raises(DatasetError, match="has 2 classes, expected 10"):
            train(job=Job(ModelSource(str(cnn_folder))), dataset="folder", data_dir=str(image_folder()))

    def test_no_data_set(self, train, cnn_folder):
        with pytest.raises(DatasetError, match="no data set was given"):
            train(job=Job(ModelSource(str(cnn_folder))), dataset="")

    def test_frozen_batchnorm(self, train, adder_folder, monkeypatch):
        model = adderkit.load(adder_folder)
        model.features[4].bn1 = timm.layers.FrozenBatchNormAct2d(16)
        monkeypatch.setattr(assemble, "build_student", lambda *_, **__: copy.deepcopy(model))
        monkeypatch.setattr(assemble, "check_savable", lambda model: None)
        with pytest.raises(
            RecipeError,
            match=r"features.4.bn1 is a FrozenBatchNormAct2d, expected a BatchNorm that can follow: .*go stale",
        ):
            train(job=Job(ModelSource(str(adder_folder))))

    def test_nothing_is_left_behind(self, train, tmp_path, cnn_folder):
        with pytest.raises(ModelSourceError):
            train("distill", job=Job(ModelSource(str(cnn_folder))))
        assert not (tmp_path / "run").exists()


def test_class_folders_from_scratch(train, image_folder):
    """Two classes of one color each are told apart within a few epochs."""
    root = str(image_folder(count=8, size=(8, 8)))
    changes = {"dataset": "folder", "data_dir": root, "img_size": 8, "batch_size": 8, "train_images": 0}
    rows, folder = train(epochs=6, lr=0.02, **changes)
    assert min(row["train_loss"] for row in rows) < 0.5 * math.log(2)
    assert adderkit.load(folder.best).num_classes == 2
    assert DataConfig.of(adderkit.load(folder.best)).input_size == (3, 8, 8)


@pytest.mark.parametrize("name", ["addernet-cifar", "addernet-imagenet"])
def test_training_from_scratch_begins_with_normal_weights_and_no_teacher(name, adder_folder, train):
    changes = {"lr": 0.0, "warmup_epochs": 0, "weight_decay": 0.0}
    rows, folder = train(name, job=Job(ModelSource(str(adder_folder)), teacher="nowhere"), **changes)
    for layer in ("features.4.conv1", "features.4.conv2"):
        weight = weights(folder.last)[f"{layer}.weight"]
        assert weight.mean().item() == pytest.approx(0, abs=0.1)
        assert weight.std().item() == pytest.approx(1, abs=0.1)
    assert folder.arguments()["job"]["teacher"] is None
    assert math.isfinite(rows[0]["train_loss"])


def test_a_cnn_has_no_adder_weights_to_draw(train):
    with pytest.raises(RecipeError, match="adder_init is normal, but the model has no adder layer; convert it first"):
        train(adder_init="normal")
