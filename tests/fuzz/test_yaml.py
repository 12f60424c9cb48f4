"""Recipes, ``args.yaml`` and ``--set`` as somebody else may have written them."""

from os import environ

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from adderkit.convert.errors import RecipeError
from adderkit.recipes.configs.files import load_recipe, parse_settings, recipe_text
from adderkit.recipes.configs.recipe import Recipe
from adderkit.recipes.runs.folder import RunFolder

fuzz = settings.get_profile(environ.get("ADDERKIT_FUZZ", "quick"))

KEYS = st.sampled_from(sorted(Recipe().to_dict())) | st.text(max_size=8)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**300, max_value=10**310)
    | st.floats()
    | st.text(max_size=20)
    | st.dates()
    | st.binary(max_size=8)
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3))
RAW = st.sampled_from(
    [
        *("!!timestamp x", "!!bool x", "!!int ''", "!!float ''", "!!int [1]", "!!python/object/apply:os.getcwd []"),
        *("0x" + "f" * 5000, "1" * 5000, "1" + ":59" * 2000, "1.0" + ":59" * 2000, "[" * 5000, "{a: " * 3000, "*a"),
        *("&a [*a]", "? [a]", "!!set {a}", "!!omap [a: 1]", "!!binary =", "2026-99-99", "-.inf", ".nan", "\x07"),
    ]
)


def written(value):
    try:
        return yaml.safe_dump(value)
    except yaml.YAMLError:  # text that YAML cannot hold
        return "{}"


@fuzz
@given(data=st.data())
def test_damaged_recipe(data, damaged, place, survives):
    valid = recipe_text(data.draw(st.sampled_from(["distill", "cnn", "addernet-imagenet"]))).encode()
    (place / "mine.yaml").write_bytes(data.draw(damaged(valid)))
    recipe = survives(lambda: load_recipe(str(place / "mine.yaml")))
    assert recipe is None or Recipe().changed(recipe.to_dict()) == recipe


@fuzz
@given(settings=st.dictionaries(KEYS, VALUES, max_size=4), raw=st.none() | RAW)
def test_recipe_of_any_values(settings, raw, place, survives):
    text = written(settings) if raw is None else f"lr: {raw}\n"
    (place / "mine.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    recipe = survives(lambda: load_recipe(str(place / "mine.yaml")))
    assert recipe is None or Recipe().changed(recipe.to_dict()) == recipe


@fuzz
@given(key=KEYS, value=RAW | st.text(max_size=30) | VALUES.map(str))
def test_setting_of_any_value(key, value, survives):
    survives(lambda: Recipe().changed(parse_settings([f"{key}={value}"])))


@fuzz
@given(data=st.data())
def test_damaged_arguments_of_a_run(data, damaged, place, survives):
    valid = written({"job": {"model": "net", "teacher": None}, "recipe": Recipe().to_dict()}).encode()
    (place / "run").mkdir(exist_ok=True)
    (place / "run" / "args.yaml").write_bytes(data.draw(damaged(valid)))
    found = survives(RunFolder(place / "run").arguments)
    assert found is None or all(isinstance(key, str) for key in found)


def test_lines_that_stand_for_gigabytes(place, survives):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x]", *(f"a{n + 1}: &a{n + 1} [{f'*a{n}, ' * 8}]" for n in range(12))]
    (place / "bomb.yaml").write_text("\n".join([*lines, "lr: *a12"]))
    with pytest.raises(RecipeError, match=r"not valid YAML: alias \*a0, expected values in full in line 2"):
        load_recipe(str(place / "bomb.yaml"))


def test_file_that_is_too_large(place, survives):
    (place / "large.yaml").write_bytes(b"#" * (1 << 19))
    with pytest.raises(RecipeError, match="has 524288 bytes, expected at most 262144"):
        load_recipe(str(place / "large.yaml"))
