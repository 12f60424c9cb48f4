"""The data set that a model was made with: the default, said in a line; never a download, never another place."""

import pytest
import timm

import adderkit
from adderkit.convert.checkpoint.report import Report
from adderkit.convert.errors import DatasetError
from adderkit.convert.model_source import ModelSource
from adderkit.recipes.configs.recipe import Recipe
from adderkit.recipes.data.unlabeled import UnlabeledImages
from adderkit.recipes.runs.provenance import DataChoice, default_data, facts_of_images


@pytest.fixture
def source(tmp_path):
    """Make a folder that records a data set; its source."""

    def make(**data):
        model = timm.create_model("test_resnet", num_classes=2)
        return ModelSource(str(adderkit.save(model, tmp_path / "net", Report(data=data))))

    return make


def chosen(source, dataset=None, data_dir=None, **options):
    """Data set and folder that are used, and the lines that say so."""
    said = []
    found = default_data(source, DataChoice(dataset, data_dir), said.append, **options)
    return (found.dataset, found.data_dir), said


def test_recorded_one_is_used_and_said(source, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    net = source(dataset="folder", data_dir=str(images))
    found, (line,) = chosen(net)
    assert found == ("folder", str(images))
    assert line.startswith(f"using data set folder in {images}, with which {net.name} was made")
    assert chosen(net, None, str(tmp_path))[0] == ("folder", str(tmp_path))


def test_given_one_wins_without_a_line(source):
    net = source(dataset="digits")
    assert chosen(net, "folder", "x") == (("folder", "x"), [])
    assert chosen(net, "fashion-mnist") == (("fashion-mnist", None), [])


@pytest.mark.parametrize("data", [{}, {"dataset": 3}, {"data_dir": "/"}])
def test_nothing_is_recorded(source, data):
    assert chosen(source(**data)) == ((None, None), [])
    assert chosen(ModelSource("resnet18"), None, "x") == ((None, "x"), [])


def test_place_that_is_gone(source, tmp_path):
    net = source(dataset="folder", data_dir=str(tmp_path / "gone"))
    with pytest.raises(DatasetError, match=r"gone, which does not exist; say where it is now with --data-dir DIR"):
        chosen(net)
    found, (line,) = chosen(net, needed=False)
    assert found == (None, None)
    assert line.startswith("no images: ")
    with pytest.raises(DatasetError, match="lost, which does not exist"):
        chosen(net, None, str(tmp_path / "lost"), needed=False)


@pytest.mark.parametrize("name", ["hfds/ann/images", "tfds/images", "wds/images"])
def test_one_that_would_be_downloaded(source, name):
    with pytest.raises(DatasetError, match=f"may be downloaded: allow that with --dataset {name}"):
        chosen(source(dataset=name))


def test_facts_are_good_from_another_directory(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    (tmp_path / "map.txt").touch()
    monkeypatch.chdir(tmp_path)
    assert DataChoice("folder", "images").facts() == {"dataset": "folder", "data_dir": str(tmp_path / "images")}
    assert DataChoice("digits").facts() == {"dataset": "digits"}
    shards = {"dataset": "wds/x", "data_dir": "https://x/{0..3}.tar"}
    assert DataChoice(**shards).facts() == shards
    mapped = DataChoice("folder", train_split="a", val_split="b", class_map="map.txt").facts()
    assert mapped == {"dataset": "folder", "train_split": "a", "val_split": "b", "class_map": str(tmp_path / "map.txt")}


def test_splits_and_class_map_belong_to_the_data_set(source):
    net = source(dataset="digits", train_split="fold1", val_split="fold2", class_map="map.txt")
    said = []
    found = default_data(net, DataChoice(val_split="fold3"), said.append)
    assert found == DataChoice("digits", None, "fold1", "fold3", "map.txt")
    assert said[0].startswith("using data set digits, --train-split fold1, --class-map map.txt, with which")
    other = DataChoice("folder", "images")
    assert default_data(net, other, said.append) == other


def test_defaults_of_a_recipe_are_not_recorded():
    recipe = Recipe().changed({"dataset": "digits"})
    assert DataChoice.of_recipe(recipe) == DataChoice("digits")
    assert DataChoice.of_recipe(recipe.changed({"val_split": "fold2"})) == DataChoice("digits", val_split="fold2")


def test_facts_of_images_keep_what_is_known_of_their_data_set():
    before = Report(data={"dataset": "digits", "val_split": "fold2"})
    assert facts_of_images(None, before) == before.data
    fold = UnlabeledImages("digits", split="fold1")
    assert facts_of_images(fold, before) == {"dataset": "digits", "train_split": "fold1", "val_split": "fold2"}
    assert facts_of_images(UnlabeledImages("fashion-mnist"), before) == {"dataset": "fashion-mnist"}
