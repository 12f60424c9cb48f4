"""Training with quantization: the run's models compute as in integers, resume, and become integer networks."""

import pytest
import torch

import adderkit
from adderkit.adder_layers.integer.network import IntegerNetwork
from adderkit.convert.errors import AdderkitError, RecipeError
from adderkit.convert.model_source import ModelSource
from adderkit.convert.quantization.fake_quantize import FakeQuantized
from adderkit.convert.record import transforms_of
from adderkit.recipes.data.loaders import unlabeled_images
from adderkit.recipes.runs.folder import RunFolder
from adderkit.recipes.training import run as finetune
from adderkit.recipes.training.models import Job

FEW = {"train_images": 96, "bn_images": 64}


def test_trained_ranges_are_the_integers(train, adder_folder):
    _, folder = train("int8-qat", job=Job(ModelSource(str(adder_folder))), bits=4, **FEW)
    model = adderkit.load(folder.best)
    assert isinstance(model, FakeQuantized)
    assert transforms_of(model)[-1]["config"]["bits"] == 4
    images = unlabeled_images("digits", None, model, 64)
    network = adderkit.quantize(model, images)
    assert isinstance(network, IntegerNetwork)
    scales = [float(held.scale) for held in model.quantization.values()]
    assert set(scales) <= {each.scale for each in network.plan.activations}
    assert [transform["kind"] for transform in transforms_of(network)] == ["adder", "quantize"]
    with torch.no_grad():
        agree = model(images).argmax(1) == network(images).argmax(1)
    assert float(agree.float().mean()) > 0.85


def test_stopped_and_resumed_is_the_same(quick_recipe, adder_folder, same_run, tmp_path, stop_at, monkeypatch):
    job, recipe = Job(ModelSource(str(adder_folder))), quick_recipe("int8-qat", epochs=2, **FEW)
    through, folder = RunFolder(tmp_path / "through"), RunFolder(tmp_path / "run")
    rows = finetune.start(job, recipe, through)
    stop_at("epoch 1/1", 1)
    with pytest.raises(KeyboardInterrupt):
        finetune.start(job, recipe, folder)
    monkeypatch.undo()
    assert finetune.resume(folder) == rows
    same_run(folder, through)


def test_other_bits_than_it_was_trained_with(train, adder_folder):
    _, folder = train("int8-qat", job=Job(ModelSource(str(adder_folder))), **FEW)
    with pytest.raises(RecipeError, match="bits is 4 and requant fixed, expected 8 and fixed"):
        train("int8-qat", job=Job(ModelSource(str(folder.best))), folder="again", bits=4, **FEW)


def test_integers_are_not_trained(adder_folder, train, tmp_path):
    model = adderkit.load(adder_folder)
    network = adderkit.quantize(model, unlabeled_images("digits", None, model, 32))
    folder = adderkit.save(network, tmp_path / "int8")
    with pytest.raises(AdderkitError, match="is quantized and cannot be trained"):
        train("distill", job=Job(ModelSource(str(folder))), **FEW)


def test_bits_that_do_not_exist(quick_recipe):
    with pytest.raises(RecipeError, match="bits is 7, expected 0 or one of 8, 6, 5, 4"):
        quick_recipe("int8-qat", bits=7)
