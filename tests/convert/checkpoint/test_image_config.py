"""Image settings of the wrong type are one line, whatever verb reads them."""

import json
import math
import shutil

import pytest

import adderkit
from adderkit.convert.checkpoint.image_config import check_image_config
from adderkit.convert.errors import AdderkitError, CheckpointError
from adderkit.recipes.data.datasets import DataConfig
from adderkit.recipes.data.loaders import evaluation_transform

WRONG = (
    1.5,
    "x",
    -1,
    math.nan,
    10**400,
    [],
    {},
    [[1]],
    True,
    0,
    [3, 32.0, 32],
    [math.inf],
    [3, 0, 32],
    [3, 1 << 40, 1],
)


@pytest.fixture
def altered(cnn_folder, tmp_path):
    """A saved CNN whose configuration is changed."""
    folder = shutil.copytree(cnn_folder, tmp_path / "net")

    def change(key, value, *, nested=True):
        config = json.loads((cnn_folder / "config.json").read_text())
        (config["pretrained_cfg"] if nested else config)[key] = value
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return change


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("input_size", [3, 32.0, 32], "expected three whole numbers"),
        ("input_size", "3x32x32", "expected three whole numbers"),
        ("input_size", [3, -1, 32], "expected three whole numbers"),
        ("input_size", [3, 10**9, 32], "expected three whole numbers"),
        ("mean", [math.nan], "expected a list of numbers"),
        ("std", [0.0], "expected a list of positive numbers"),
        ("crop_pct", "much", "expected a number above 0"),
        ("crop_mode", ["center"], "expected one of center"),
        ("interpolation", 3, "expected one of nearest"),
    ],
)
def test_inspect(fails, altered, key, value, message):
    line = fails("inspect", altered(key, value))
    assert line.startswith(f"{key} is ")
    assert message in line


def test_number_of_classes(fails, altered):
    assert "num_classes is 'ten'" in fails("inspect", altered("num_classes", "ten", nested=False))


@pytest.mark.parametrize("key", ["input_size", "test_input_size", "crop_pct", "crop_mode", "interpolation", "mean"])
@pytest.mark.parametrize("value", [None])
def test_null_means_the_default(altered, key, value):
    path = altered(key, value)
    check_image_config(json.loads((path / "config.json").read_text()), path)


@pytest.mark.parametrize("key", ["pretrained_cfg", "model_args", "architecture"])
def test_sections_of_another_type(altered, key):
    with pytest.raises(CheckpointError, match=f"{key} is "):
        adderkit.load(altered(key, [1], nested=False))


@pytest.mark.parametrize(
    "key", ["input_size", "fixed_input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "classifier"]
)
def test_any_value_is_used_or_refused(altered, key):
    for value in WRONG:
        try:
            evaluation_transform(DataConfig.of(adderkit.load(altered(key, value), pretrained=False)))
            refusal = "config.json"
        except AdderkitError as error:
            refusal = str(error)
        assert "config.json" in refusal
