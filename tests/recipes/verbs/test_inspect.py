"""``adderkit inspect``: tables, JSON and chart of saved and named models, and what wrong input gets."""

import functools
import json
import os

import pytest
import timm
from PIL import Image

from adderkit import convert_, cost, save
from adderkit.convert.model_source import ModelSource
from adderkit.recipes.reporting import cost_image
from adderkit.recipes.reporting.cost_image import bars, check_chart

PNG, SVG = b"\x89PNG\r\n", b"<?xml"


@pytest.fixture
def inspect(adder_kit):
    """Run the verb in an empty folder; exit status, stdout and stderr."""
    return functools.partial(adder_kit, "inspect")


@pytest.fixture
def refused(inspect):
    """The one line that wrong input gets."""

    def run(*words):
        status, out, err = inspect(*words)
        assert (status, out) == (1, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert "unexpected" not in err
        return err

    return run


@pytest.fixture
def adder():
    model = timm.create_model("cifar_resnet20").eval()
    convert_(model)
    return model


def test_tables_show_every_layer_and_both_counts(inspect, adder, tmp_path):
    save(adder, tmp_path / "net")
    status, out, err = inspect("net")
    found = cost(adder)
    assert (status, err) == (0, "")
    assert all(row.path in out for row in found.layers)
    for operations in (found.honest, found.honest_before, found.headline, found.headline_before):
        assert f"{operations.multiplications:,}" in out
        assert f"{operations.additions:,}" in out
    assert f"{found.parameters:,}" in out
    assert "papers' headline" in out
    assert "honest" in out
    assert all(name in out for name in ("fp32", "fp16", "int8", "DRAM"))
    assert all(f"{area:,.0f}" in out for area in (found.area, found.cnn_area(8), found.cnn_area(3)))
    assert "This model takes as much area as the CNN with 2-bit weights." in out
    assert "…" not in out


def test_json_is_the_same_count(inspect, adder, tmp_path):
    save(adder, tmp_path / "net")
    status, out, _ = inspect("net", "--json")
    assert status == 0
    assert json.loads(out) == {"model": "net", **json.loads(json.dumps(cost(adder).to_dict()))}


def test_a_name_needs_no_weights(inspect):
    status, out, _ = inspect("cifar_resnet20", "--in-chans", 1, "--num-classes", 7, "--json")
    assert status == 0
    layers = json.loads(out)["layers"]
    assert layers[0]["multiplications"] == 16 * 9 * 32 * 32
    assert next(layer for layer in layers if layer["path"] == "fc")["output_shape"] == [7, 1, 1]


def test_input_size(inspect):
    status, out, _ = inspect("cifar_resnet20", "--input-size", 3, 16, 16, "--json")
    assert status == 0
    assert json.loads(out)["layers"][0]["output_shape"] == [16, 16, 16]
    assert json.loads(out)["input_shape"] == [3, 16, 16]


@pytest.mark.parametrize(("name", "start"), [("net.png", PNG), ("deep/net.SVG", SVG)])
def test_chart(inspect, tmp_path, name, start):
    status, out, err = inspect("cifar_resnet20", "--chart", name, "--json")
    assert status == 0
    assert json.loads(out)["model"] == "cifar_resnet20"
    assert err == f"chart: {name}\n"
    target = tmp_path / name
    assert target.read_bytes().startswith(start)
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_chart_names_every_layer(inspect, adder, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("matplotlib").rcParams, "svg.fonttype", "none")
    save(adder, tmp_path / "net")
    inspect("net", "--chart", "net.svg")
    text = (tmp_path / "net.svg").read_text()
    assert all(f">{row.path}<" in text for row in cost(adder).weight_layers)


def test_chart_grows_with_the_layers(inspect, tmp_path):
    inspect("resnet34", "--chart", "net.png")
    with Image.open(tmp_path / "net.png") as picture:
        assert picture.height / 37 > 16  # pixels a layer, enough for its name


def test_bars_hold_all_operations(adder):
    found = cost(adder)
    made = bars(found)
    assert [bar.path for bar in made] == [row.path for row in found.weight_layers]
    extra = sum(bar.norms.multiplications + bar.others.multiplications for bar in made)
    assert sum(bar.products for bar in made) + extra == found.multiplications
    extra = sum(bar.norms.additions + bar.others.additions for bar in made)
    assert sum(bar.products + 2 * bar.distances for bar in made) + extra == found.additions


@pytest.mark.parametrize("name", ["net.pdf", "net", ".png"])
def test_chart_of_another_kind(refused, name):
    assert "expected '.png' or '.svg'" in refused("cifar_resnet20", "--chart", name)


def test_chart_is_checked_before_the_work(refused, monkeypatch):
    monkeypatch.setattr(ModelSource, "build", None)
    assert "expected '.png'" in refused("resnet50", "--chart", "net.jpg")


def test_chart_in_a_folder_that_cannot_be(refused, tmp_path):
    (tmp_path / "file").touch()
    assert "is not a writable directory" in refused("cifar_resnet20", "--chart", "file/net.png")
    (tmp_path / "net.png").mkdir()
    assert "is a folder" in refused("cifar_resnet20", "--chart", "net.png")


def test_chart_in_a_folder_without_permission(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(cost_image.AdderkitError, match="is not a writable directory"):
        check_chart(str(tmp_path / "net.png"))


def test_chart_that_fails_leaves_nothing(refused, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    assert "No space left on device" in refused("cifar_resnet20", "--chart", "net.png")
    assert list(tmp_path.iterdir()) == []


def test_missing_folder(refused):
    assert "neither a timm model nor a folder" in refused("./nowhere/net")


def test_input_size_that_does_not_fit(refused):
    assert "input size" in refused("cifar_vgg_small", "--input-size", 3, 20, 20)
    assert "expected three positive numbers" in refused("cifar_resnet20", "--input-size", 3, 0, 32)


def test_model_without_convolutions_is_counted(inspect, monkeypatch, tmp_path):
    status, out, _ = inspect("gmlp_s16_224", "--json")
    assert status == 0
    assert json.loads(out)["uncounted"] == []


def test_chart_of_nothing(refused, monkeypatch):
    from torch import nn

    monkeypatch.setattr(ModelSource, "build", lambda *_, **__: nn.ReLU())
    line = refused("relu", "--input-size", 3, 8, 8, "--chart", "net.png")
    assert "nothing to draw" in line
