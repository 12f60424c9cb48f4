"""Pictures of a run: drawn from the rows there are, whatever their values."""

import math

import pytest
from PIL import Image

from adderkit.recipes.runs.plots import draw_plots

NAMES = {"loss.png", "accuracy.png", "learning_rate.png", "weight_scale.png", "gradient_scale.png"}
ROW = {"train_loss": 2.0, "eval_loss": 1.0, "eval_top1": 10.0, "eval_top5": 60.5, "lr": 0.1}


def rows(epochs, **changes):
    return [{"epoch": epoch, **ROW, "train_loss": 2 / (epoch + 1), **changes} for epoch in range(epochs)]


def samples(epochs, layers, value=1.0):
    return [
        {"epoch": epoch, "weight_rms": [0.1 + epoch] * layers, "gradient_norm": [value / (epoch + 1)] * layers}
        for epoch in range(epochs)
    ]


def draw(folder, epochs, layers, value=1.0, **changes):
    draw_plots(rows(epochs, **changes), [f"layer{index}" for index in range(layers)],
               samples(epochs, layers, value), folder)  # fmt: skip
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("epochs", "layers"), [(1, 1), (40, 52), (3, 0)])
def test_pictures_of_few_and_of_many_layers(tmp_path, epochs, layers):
    assert set(draw(tmp_path / "plots", epochs, layers)) == NAMES
    for path in (tmp_path / "plots").iterdir():
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert picture.size == (840, 480)
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 10


@pytest.mark.parametrize("value", [math.nan, 0.0], ids=str)
def test_odd_values(tmp_path, value):
    assert set(draw(tmp_path / "plots", 2, 3, value, eval_loss=value, eval_top1=math.inf)) == NAMES


def test_pictures_follow_the_numbers_and_replace_those_before(tmp_path):
    one = draw(tmp_path / "plots", 2, 2)
    other = draw(tmp_path / "plots", 2, 2, 5.0, lr=0.2, eval_loss_ema=0.9)
    assert {name for name in NAMES if one[name] != other[name]} == {
        "loss.png", "learning_rate.png", "gradient_scale.png"
    }  # fmt: skip
