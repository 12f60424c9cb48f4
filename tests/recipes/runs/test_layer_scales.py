"""The size of each layer's weights and gradients: measured right, before the adaptive rate, and kept over a stop."""

import copy
import csv

import pytest
import timm
import torch
from torch import nn

from adderkit import AdderConv2d
from adderkit.recipes.runs.folder import RunFolder
from adderkit.recipes.runs.layer_scales import is_sample, measure, watched_layers, write_scales
from adderkit.recipes.training import epoch as steps
from adderkit.recipes.training import run as finetune


def read(folder):
    return list(csv.DictReader((folder.path / "layers.csv").read_text().splitlines()))


def test_measured_by_the_formula():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), AdderConv2d(4, 5, 3), nn.ReLU(), AdderConv2d(5, 2, 1, terms=3)).double()
    model(torch.randn(2, 3, 8, 8, dtype=torch.double)).sum().backward()
    model[3].weight.grad = None
    sample = measure(model, 7)
    assert list(watched_layers(model)) == ["1", "3"]
    assert sample["epoch"] == 7
    for index, layer in enumerate((model[1], model[3])):
        values = layer.weight.flatten().tolist()
        assert sample["weight_rms"][index] == pytest.approx((sum(x * x for x in values) / len(values)) ** 0.5)
    squares = sum(x * x for x in model[1].weight.grad.flatten().tolist())
    assert sample["gradient_norm"] == [pytest.approx(squares**0.5), 0.0]
    assert is_sample(sample)


def test_a_cnn_shows_its_convolutions():
    model = timm.create_model("cifar_resnet20")
    assert list(watched_layers(model)) == [name for name, each in model.named_modules() if isinstance(each, nn.Conv2d)]


def test_no_layer_to_watch():
    sample = measure(nn.Linear(2, 2), 0)
    assert sample == {"epoch": 0, "weight_rms": [], "gradient_norm": []}


@pytest.mark.parametrize(
    "value",
    [None, [], {}, {"epoch": 0.0, "weight_rms": [], "gradient_norm": []},
     {"epoch": 0, "weight_rms": [1.0], "gradient_norm": []}, {"epoch": 0, "weight_rms": 1, "gradient_norm": []},
     {"epoch": 0, "weight_rms": [True], "gradient_norm": [1.0]}],
)  # fmt: skip
def test_what_is_no_sample(value):
    assert not is_sample(value)


def test_table(tmp_path):
    sample = {"epoch": 3, "weight_rms": [0.1 + 0.2, 1e-9], "gradient_norm": [0.0, 2.5]}
    write_scales(tmp_path / "layers.csv", ["a", "b.c"], [sample])
    rows = list(csv.DictReader((tmp_path / "layers.csv").read_text().splitlines()))
    assert rows == [
        {"epoch": "3", "layer": "a", "weight_rms": repr(0.1 + 0.2), "gradient_norm": "0.0"},
        {"epoch": "3", "layer": "b.c", "weight_rms": "1e-09", "gradient_norm": "2.5"},
    ]


def test_a_run_samples_the_first_step_of_each_epoch_as_the_adaptive_rate_gets_it(straight, tmp_path, monkeypatch):
    """The gradient of a whole accumulated step, before the adaptive rate rescales it."""
    seen = []

    def spy(model, epoch):
        seen.append({path: copy.deepcopy(layer.weight.grad) for path, layer in watched_layers(model).items()})
        return measure(model, epoch)

    monkeypatch.setattr(steps, "measure", spy)
    folder = RunFolder(tmp_path / "run")
    finetune.start(*straight.arguments("adder"), folder)
    assert len(seen) == 3
    rows = read(folder)
    layers = list(seen[0])
    assert [(row["epoch"], row["layer"]) for row in rows] == [(str(e), layer) for e in range(3) for layer in layers]
    for epoch, gradients in enumerate(seen):
        for row, gradient in zip(rows[epoch * len(layers) :], gradients.values(), strict=False):
            assert float(row["gradient_norm"]) == pytest.approx(gradient.norm().item(), rel=1e-6)
            assert gradient.norm().item() != pytest.approx(0.05 * gradient.numel() ** 0.5, rel=1e-3)


@pytest.mark.parametrize("save_every", [0, 1])
def test_samples_survive_a_stop(straight, tmp_path, stop_at, monkeypatch, save_every):
    _, through = straight("adder")
    folder = RunFolder(tmp_path / "run")
    stop_at("epoch 1/2", 1)
    with pytest.raises(KeyboardInterrupt):
        finetune.start(*straight.arguments("adder", save_every=save_every), folder)
    monkeypatch.undo()
    finetune.resume(folder)
    assert read(folder) == read(through)
    assert len(read(folder)) > 3
