"""Recipe files, and ``--set key=value``."""

from pathlib import Path

import pytest

from adderkit.convert.errors import AdderkitError, RecipeError
from adderkit.recipes.configs.files import (
    copy_recipe,
    load_recipe,
    parse_settings,
    parse_yaml,
    recipe_names,
    recipe_text,
)
from adderkit.recipes.configs.recipe import Recipe


def test_shipped_recipes():
    assert recipe_names() == [
        "addernet-cifar",
        "addernet-imagenet",
        "cnn",
        "distill",
        "imagenet-distill",
        "int8-qat",
        "pkkd",
    ]


def test_own_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("lr: 1e-4\nepochs: 3\n")
    assert load_recipe(str(path)) == Recipe(lr=1e-4, epochs=3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("distil", "unknown recipe 'distil'; did you mean 'distill'"),
        ("resnet", "unknown recipe 'resnet'.*shipped recipes: addernet-cifar, .*cnn, distill"),
        ("no/such.yaml", "unknown recipe 'no/such.yaml'"),
        ("../pyproject.toml", "unknown recipe"),
    ],
)
def test_unknown_recipe(name, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(name)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("lr=1e-4", {"lr": 1e-4}),
        ("lr=.5", {"lr": 0.5}),
        ("lr=1", {"lr": 1.0}),
        ("epochs=7", {"epochs": 7}),
        ("img_size=null", {"img_size": None}),
        ("data_dir=null", {"data_dir": None}),
        ("data_dir=/data/my images", {"data_dir": "/data/my images"}),
        ("data_dir=a=b", {"data_dir": "a=b"}),
        ("data_dir=2024", {"data_dir": "2024"}),
        ("opt=lamb", {"opt": "lamb"}),
        ("batch-size=8", {"batch_size": 8}),
    ],
)
def test_settings(setting, expected):
    changed = Recipe().changed(parse_settings([setting]))
    assert {key: getattr(changed, key) for key in expected} == expected


@pytest.mark.parametrize(("text", "value"), [("true", True), ("null", None), ("[1, 2]", [1, 2]), ("text", "text")])
def test_settings_are_read_as_yaml(text, value):
    assert parse_settings([f"key={text}"]) == {"key": value}


def test_the_last_of_equal_settings_counts():
    assert parse_settings(["lr=1", "lr=2"]) == {"lr": 2}


@pytest.mark.parametrize("setting", ["lr", "", "=3", "lr 0.1"])
def test_a_setting_without_equals(setting):
    with pytest.raises(RecipeError, match=r"expected key=value such as lr=0.05"):
        parse_settings([setting])


MALFORMED = {"bracket": "[1", "impossible-date": "2001-99-99", "empty-hex": "0x_", "deep": "[" * 1500}


@pytest.mark.parametrize("value", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_setting(value):
    with pytest.raises(RecipeError, match="not valid YAML"):
        parse_settings([f"lr={value}"])


@pytest.mark.parametrize("value", MALFORMED.values(), ids=MALFORMED)
def test_malformed_yaml(value):
    with pytest.raises(RecipeError, match=r"mine.yaml is not valid YAML") as caught:
        parse_yaml(f"lr: {value}", "mine.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "found"), [("", "NoneType"), ("- lr", "list"), ("lr", "str"), ("3", "int"), ("1: 2", "dict")]
)
def test_yaml_that_is_not_a_mapping_of_names(text, found):
    with pytest.raises(RecipeError, match=f"mine.yaml contains a {found}, expected a mapping"):
        parse_yaml(text, "mine.yaml")


@pytest.mark.parametrize("key", ["lr", "? lr\n"])
def test_yaml_is_not_executed(tmp_path, key):
    target = tmp_path / "executed"
    path = tmp_path / "evil.yaml"
    path.write_text(f'{key}: !!python/object/apply:os.system ["touch {target}"]\n')
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(str(path))
    with pytest.raises(RecipeError, match="not valid YAML"):
        parse_settings([f'lr=!!python/object/apply:os.system ["touch {target}"]'])
    assert not target.exists()


def test_a_file_that_is_not_text(tmp_path):
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(RecipeError, match=r"cannot read .*binary.yaml"):
        load_recipe(str(path))


class TestCopy:
    def test_is_the_shipped_text(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert copy_recipe("distill", None) == Path("distill.yaml")
        assert Path("distill.yaml").read_text() == recipe_text("distill")
        assert load_recipe(str(copy_recipe("distill.yaml", "mine.yaml"))) == load_recipe("distill")

    def test_replaces_a_file_only_on_request(self, tmp_path):
        mine = tmp_path / "mine.yaml"
        mine.write_text("lr: 3")
        with pytest.raises(AdderkitError, match=r"mine\.yaml exists already; .*--overwrite"):
            copy_recipe("cnn", str(mine))
        assert mine.read_text() == "lr: 3"
        assert copy_recipe("cnn", str(mine), overwrite=True).read_text() == recipe_text("cnn")

    @pytest.mark.parametrize(
        ("name", "file", "message"),
        [
            ("cn", None, "did you mean 'cnn'"),
            ("cnn", "mine.txt", "mine.txt ends in '.txt', expected .yaml or .yml"),
            ("cnn", "file/in/it.yaml", "cannot write file/in/it.yaml: .* is not a writable directory"),
        ],
    )
    def test_refused(self, name, file, message, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "file").touch()
        with pytest.raises(AdderkitError, match=message):
            copy_recipe(name, file, overwrite=True)
        assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_key_that_is_there_twice():
    with pytest.raises(RecipeError, match=r"mine.yaml is not valid YAML: duplicate key 'lr' in line 3"):
        parse_yaml("lr: 0.1\nepochs: 2\nlr: 0.2\n", "mine.yaml")


def test_a_file_that_is_too_large(tmp_path):
    path = tmp_path / "large.yaml"
    path.write_text("lr: 1\n" * 100_000)
    with pytest.raises(RecipeError, match="has 600,000 bytes, expected at most 65,536"):
        load_recipe(str(path))


def test_aliases_that_stand_for_many_values():
    text = "a: &a [1, 1]\nb: &b [*a, *a]\n"
    with pytest.raises(RecipeError, match=r"mine.yaml is not valid YAML: an alias of a list or mapping in line 1"):
        parse_yaml(text, "mine.yaml")
    assert parse_yaml("lr: &rate 0.1\nmin_lr: *rate", "mine.yaml") == {"lr": 0.1, "min_lr": 0.1}
