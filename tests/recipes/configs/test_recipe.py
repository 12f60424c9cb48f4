"""Recipes: those that are shipped, and what becomes of mistakes in one's own."""

import dataclasses
import json
import re
import shlex

import pytest
import typer.main
import yaml

from adderkit.cli import app
from adderkit.convert.errors import RecipeError
from adderkit.recipes.configs.files import load_recipe, parse_settings, recipe_names, recipe_text
from adderkit.recipes.configs.recipe import Augmentation, Recipe


@pytest.mark.parametrize("name", recipe_names())
class TestShipped:
    def test_loads_and_says_what_it_is_for(self, name):
        recipe = load_recipe(name)
        assert recipe.description
        assert recipe.version == 1

    def test_header_shows_a_command_that_the_command_line_takes(self, name):
        (line,) = [line for line in recipe_text(name).splitlines() if "adderkit finetune" in line]
        program, verb, *arguments = shlex.split(line.removeprefix("#"))
        command = typer.main.get_command(app).commands[verb]
        context = command.make_context(verb, arguments)
        assert program == "adderkit"
        assert context.params["recipe"] == name
        assert context.params["model"]

    def test_names_its_sources(self, name):
        header = [line for line in recipe_text(name).splitlines() if line.startswith("#")]
        assert "arXiv" in "".join(header)

    def test_says_what_to_expect_and_what_it_costs(self, name):
        header = " ".join(line.lstrip("# ") for line in recipe_text(name).splitlines() if line.startswith("#"))
        assert re.search(r"Measured (only )?on|Expected (accuracy|top-1)", header)
        assert re.search(r"Cost: \S", header)


def test_distill_is_what_it_says():
    recipe = load_recipe("distill")
    assert recipe.distill_loss_weight == 1
    assert recipe.task_loss_weight == 0
    assert 0 < recipe.eta < 0.2
    assert recipe.bn_images > 0


@pytest.mark.parametrize(
    "make", [json.dumps, yaml.safe_dump, lambda value: yaml.safe_dump(value, sort_keys=False)],
    ids=["json", "yaml", "yaml-unsorted"],
)  # fmt: skip
@pytest.mark.parametrize("name", recipe_names())
def test_to_dict_is_read_back(name, make):
    recipe = load_recipe(name).changed(
        {"data_dir": "a: b", "crop_padding": 0, "auto_augment": "rand-m9-mstd0.5-inc1", "lr": 1e-7}
    )
    assert Recipe().changed(yaml.safe_load(make(recipe.to_dict()))) == recipe


def test_a_recipe_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().lr = 1.0


def test_augmentation_is_the_part_of_the_same_names():
    recipe = Recipe(hflip=0.1, scale=0.3, color_jitter=0.4, auto_augment="rand-m9", reprob=0.2)
    assert recipe.augmentation == Augmentation(0, 0.1, 0.3, 0.4, "rand-m9", 0.2)
    assert Recipe(crop_padding=2).augmentation == Augmentation(2)
    assert Recipe().augmentation == Augmentation()


@pytest.mark.parametrize(
    ("key", "hint"),
    [("learning_rat", "known keys|did you mean"), ("epoch", "did you mean 'epochs'"), ("Lr", "did you mean 'lr'")],
)
def test_unknown_key_suggests_the_nearest(key, hint):
    with pytest.raises(RecipeError, match=f"unknown recipe key '{key}'; .*({hint})"):
        Recipe().changed({key: 1})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("epochs", 2.5, "epochs is 2.5, expected int"),
        ("epochs", True, "epochs is True, expected int"),
        ("epochs", None, "epochs is None, expected int"),
        ("epochs", "many", "epochs is 'many', expected int"),
        ("lr", "fast", "lr is 'fast', expected a number"),
        ("lr", None, "lr is None, expected a number"),
        ("lr", False, "lr is False, expected a number"),
        ("lr", float("nan"), "lr is nan, expected a number"),
        ("lr", "inf", "lr is 'inf', expected a number"),
        ("lr", [0.1], "expected a number"),
        ("opt", None, "opt is None, expected str"),
        ("dataset", ["digits"], "expected str"),
        ("data_dir", {"a": 1}, "expected str"),
        ("img_size", "32px", "img_size is '32px', expected int"),
        ("sync_bn", 2, "sync_bn is 2, expected true or false"),
        ("sync_bn", "enabled", "sync_bn is 'enabled', expected true or false"),
        ("sync_bn", None, "sync_bn is None, expected true or false"),
        ("sync_bn", 1.0, "sync_bn is 1.0, expected true or false"),
    ],
)
def test_wrong_type(key, value, message):
    with pytest.raises(RecipeError, match=message):
        Recipe().changed({key: value})


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("False", False), ("yes", True), ("off", False), ("1", True), ("0", False)]
)
def test_booleans_as_yaml_and_timm_users_write_them(text, value):
    assert Recipe().changed(parse_settings([f"sync_bn={text}"])).sync_bn is value


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("epochs", 0, "epochs is 0, expected at least 1"),
        ("batch_size", 0, "expected at least 1"),
        ("grad_accum_steps", 0, "expected at least 1"),
        ("img_size", 0, "expected at least 1"),
        ("workers", -1, "expected at least 0"),
        ("lr", -0.1, "expected at least 0"),
        ("eta", -1, "expected at least 0"),
        ("seed", -1, "expected at least 0"),
        ("hflip", 1.5, "expected a number between 0 and 1"),
        ("smoothing", -0.1, "expected a number between 0 and 1"),
        ("kd_temperature", 0, "expected a positive number"),
        ("amp", "fp8", "amp is 'fp8', expected no, bf16 or fp16"),
        ("task_loss_weight", 0, "nothing would train the classifier"),
        ("version", 2, "the recipe has version 2, expected 1"),
    ],
)
def test_value_out_of_range(key, value, message):
    with pytest.raises(RecipeError, match=message):
        Recipe().changed({key: value})


def test_a_newer_recipe_is_told_from_a_mistyped_one():
    with pytest.raises(RecipeError, match="version 2, expected 1"):
        Recipe().changed({"a_key_of_the_future": 1, "version": 2})


def test_a_long_wrong_value_is_not_printed_whole():
    with pytest.raises(RecipeError) as caught:
        Recipe().changed({"lr": list(range(100_000))})
    assert len(str(caught.value)) < 1000
