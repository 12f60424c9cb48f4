"""Splits and class maps on the verbs that take a data set: trained on ``train/``, evaluated on ``test/``, by name."""

import json

import pytest
import timm
from PIL import Image

import adderkit
from adderkit.convert.class_names import class_names_of, record_class_names_

NET = "cifar_resnet20"
DATA = ("--dataset", "folder", "--data-dir")


def write(root, split, classes, count=4):
    for label, name in enumerate(classes):
        folder = root / split / name
        folder.mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (12, 12), (60 * label, 5 * index, 90)).save(folder / f"{index}.png")


@pytest.fixture
def folder(tmp_path):
    """A data set with train/ and test/."""
    for split in ("train", "test"):
        write(tmp_path / "images", split, ("cat", "dog", "eel"), 8)
    return tmp_path / "images"


@pytest.fixture
def model(tmp_path):
    """A network that knows three classes in an order of its own."""
    net = timm.create_model(NET, num_classes=3, pretrained_cfg_overlay={"input_size": (3, 12, 12)})
    record_class_names_(net, ("eel", "dog", "cat"))
    return adderkit.save(net, tmp_path / "net")


def test_a_folder_with_train_and_test_works_as_it_is(adder_kit, folder, tmp_path, caplog):
    words = (*DATA, folder, "--epochs", 1, "-b", 8, "-j", 0, "--set", "img_size=12", "-o", "run")
    status, _, errors = adder_kit("finetune", NET, "--no-pretrained", "--recipe", "cnn", *words)
    assert status == 0, errors
    assert "no 'validation' split; using 'test'" in caplog.text
    assert class_names_of(adderkit.load("run/best")) == ("cat", "dog", "eel")
    config = (tmp_path / "run" / "best" / "config.json").read_text()
    assert json.loads(config)["label_names"] == ["cat", "dog", "eel"]


def test_other_names_of_splits(adder_kit, json_of, folder, model):
    (folder / "train").rename(folder / "fold1")
    (folder / "test").rename(folder / "fold2")
    words = (*DATA, folder, "--epochs", 1, "-b", 8, "-j", 0, "-o", "run")
    splits = ("--train-split", "fold1", "--val-split", "fold2")
    assert adder_kit("finetune", model, "--recipe", "cnn", *words, *splits)[0] == 0
    assert json_of("evaluate", "run/last", *DATA, folder, "--val-split", "fold1", "-j", 0)["images"] == 24
    # The run records the splits with the data set.
    (folder / "fold2" / "cat" / "0.png").unlink()
    assert json_of("evaluate", "run/last", "-j", 0)["images"] == 23
    assert adder_kit("quantize", "run/last", "--dry-run")[0] == 0
    assert adder_kit("quantize", model, *DATA, folder, "--train-split", "fold1", "--dry-run")[0] == 0
    assert adder_kit("prune", model, "--ratio", 0.3, *DATA, folder, "--train-split", "fold1", "--dry-run")[0] == 0
    status, _, errors = adder_kit("convert", "--model", model, *DATA, folder, "--train-split", "fold3")
    assert status == 1
    assert "no split 'fold3': expected fold3, found fold1, fold2; name the folders with --train-split" in errors


def test_evaluation_by_name_gives_the_accuracy_of_the_model_s_order(json_of, folder, model, tmp_path):
    """The same images, once in folders that sort as the model's classes do."""
    given = json_of("evaluate", model, *DATA, folder, "--split", "test", "-j", 0)
    net = adderkit.load(model)
    record_class_names_(net, ("0", "1", "2"))
    renamed = adderkit.save(net, tmp_path / "renamed")
    for new, old in (("0", "eel"), ("1", "dog"), ("2", "cat")):
        (folder / "test" / old).rename(folder / "test" / new)
    assert json_of("evaluate", renamed, *DATA, folder, "--split", "test", "-j", 0)["loss"] == pytest.approx(
        given["loss"]
    )


@pytest.mark.parametrize("verb", ["evaluate", "report", "finetune"])
def test_other_classes_are_refused(adder_kit, folder, model, verb):
    for split in ("train", "test"):
        (folder / split / "cat").rename(folder / split / "fox")
    words = {"finetune": ["--recipe", "cnn", "-o", "run"]}.get(verb, ())
    status, _, errors = adder_kit(verb, model, *words, *DATA, folder)
    assert status == 1
    assert "has classes that the model does not have: fox, and lacks cat" in errors


def test_quantize_says_that_classes_are_others(adder_kit, folder, model, caplog):
    (folder / "train" / "cat").rename(folder / "train" / "fox")
    status, _, _ = adder_kit("quantize", model, *DATA, folder, "-o", "int8")
    assert status == 0
    assert "has classes that the model does not have: fox" in caplog.text
    assert class_names_of(adderkit.load("int8")) == ("eel", "dog", "cat")


def test_backbone_is_refused_before_the_images_are_read(fails, tmp_path):
    adderkit.save(timm.create_model(NET, features_only=True), tmp_path / "backbone")
    for verb in ("quantize", "evaluate", "finetune"):
        assert "is a feature extractor" in fails(verb, "backbone", *DATA, "nowhere")


def test_class_map(json_of, adder_kit, folder, model):
    """Folders with other words for the classes, and a map that says which is which."""
    expected = json_of("evaluate", model, *DATA, folder, "--split", "test", "-j", 0)
    for old, new in (("cat", "Katze"), ("dog", "Hund"), ("eel", "Aal")):
        (folder / "test" / old).rename(folder / "test" / new)
    (folder / "map.txt").write_text("Aal\nHund\nKatze\n")
    found = json_of("evaluate", model, *DATA, folder, "--split", "test", "-j", 0, "--class-map", "map.txt")
    assert found["loss"] == pytest.approx(expected["loss"])
    assert adder_kit("report", model, *DATA, folder, "--val-split", "test", "--class-map", "map.txt")[0] == 0
