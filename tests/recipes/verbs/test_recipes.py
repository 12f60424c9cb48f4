"""``adderkit recipes``: list, print and copy."""

import pytest

from adderkit.recipes.configs.files import recipe_text


def test_ls(adder_kit, json_of):
    status, out, _ = adder_kit("recipes", "ls")
    assert status == 0
    names = ["addernet-cifar", "addernet-imagenet", "cnn", "distill", "imagenet-distill", "int8-qat", "pkkd"]
    assert [line.split()[0] for line in out.splitlines()] == names
    assert list(json_of("recipes", "ls")) == names


@pytest.mark.parametrize("name", ["cnn", "distill"])
def test_show(adder_kit, name):
    assert adder_kit("recipes", "show", name) == (0, recipe_text(name), "")


def test_copy(adder_kit, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert adder_kit("recipes", "copy", "cnn", "mine.yaml") == (0, "recipe written: mine.yaml\n", "")
    assert (tmp_path / "mine.yaml").read_text() == recipe_text("cnn")
    assert "exists already" in fails("recipes", "copy", "cnn", "mine.yaml")
    assert adder_kit("recipes", "copy", "distill", "mine.yaml", "--overwrite")[0] == 0
    assert (tmp_path / "mine.yaml").read_text() == recipe_text("distill")


def test_show_of_an_unknown_one(fails):
    assert "did you mean 'distill'" in fails("recipes", "show", "distil")
