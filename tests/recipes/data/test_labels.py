"""Labels are matched with a model's classes by name, and where names are missing or differ, that is said."""

import json

import numpy as np
import pytest
import timm
import torch
from timm.data import ImageNetInfo

import adderkit
from adderkit.convert.class_names import class_names_of, readable_names, record_class_names_
from adderkit.convert.errors import DatasetError, ModelSourceError
from adderkit.convert.model_source import ModelSource
from adderkit.recipes.configs.recipe import Recipe
from adderkit.recipes.data.labels import Labels, compare_unlabeled, match_labels, read_class_map
from adderkit.recipes.training.models import Job, build_student, build_teacher, open_split

NET = "cifar_resnet20"


def model_of(*names, classes=None):
    model = timm.create_model(NET, num_classes=classes or len(names))
    if names:
        record_class_names_(model, names)
    return model


class TestMatching:
    def test_by_name_in_another_order(self, caplog):
        labels = match_labels(["cat", "ant", "bee"], model_of("ant", "bee", "cat"), "data", None, training=True)
        assert [labels(label) for label in range(3)] == [2, 0, 1]
        assert labels.names == ("ant", "bee", "cat")
        assert "data numbers its classes differently from the model; they are matched by name" in caplog.text

    def test_some_of_the_classes(self, caplog):
        labels = match_labels(["bee", "cat"], model_of("ant", "bee", "cat"), "data", None, training=False)
        assert [labels(label) for label in range(2)] == [1, 2]
        assert "data has images of 2 of the model's 3 classes, matched by name" in caplog.text
        with pytest.raises(DatasetError, match="data has 2 classes, expected 3, as in the model: it lacks ant"):
            match_labels(["bee", "cat"], model_of("ant", "bee", "cat"), "data", None, training=True)

    @pytest.mark.parametrize("training", [True, False])
    def test_other_classes_are_refused(self, training):
        with pytest.raises(DatasetError, match=r"classes that the model does not have: dog, and lacks ant;.*class-map"):
            match_labels(["bee", "cat", "dog"], model_of("ant", "bee", "cat"), "data", None, training=training)

    def test_without_names_the_order_is_said(self, caplog):
        assert match_labels(["x", "y"], model_of(classes=2), "data", None, training=False)(1) == 1
        assert "the model records no class names: the classes of data are taken in order, x, y" in caplog.text
        assert "torchvision" not in caplog.text

    def test_numeric_names_have_another_order_in_torchvision(self, caplog):
        names = [str(number) for number in range(11)]
        match_labels(names, model_of(classes=11), "data", None, training=False)
        assert "torchvision's ImageFolder begins with 0, 1, 10, 2" in caplog.text

    def test_imagenet_by_wordnet_id(self):
        """Three of timm's ImageNet classes, which a model of 1000 classes has without recording names."""
        known = ImageNetInfo("imagenet-1k").label_names()
        labels = match_labels([known[5], known[900], known[30]], model_of(classes=1000), "x", None, training=False)
        assert [labels(label) for label in range(3)] == [5, 900, 30]

    def test_other_wordnet_ids_are_not_imagenet(self):
        with pytest.raises(DatasetError, match="has 2 classes, expected 1000"):
            match_labels(["n99999998", "n99999999"], model_of(classes=1000), "data", None, training=False)

    def test_names_of_the_hub_may_be_a_mapping(self):
        model = model_of(classes=2)
        model.pretrained_cfg = {**model.pretrained_cfg, "label_names": {"1": "b", "0": "a"}}
        assert class_names_of(model) == ("a", "b")

    @pytest.mark.parametrize("names", [["a"], ["a", 1], "ab", {"0": "a", "2": "c"}, None])
    def test_names_that_are_not_one_for_each_class_are_none(self, names):
        model = model_of(classes=2)
        model.pretrained_cfg = {**model.pretrained_cfg, "label_names": names}
        assert class_names_of(model) is None


class TestLabels:
    @pytest.mark.parametrize("label", [3, np.int64(3), np.uint8(3), torch.tensor(3)])
    def test_integers(self, label):
        assert Labels(4)(label) == 3

    @pytest.mark.parametrize(
        ("label", "message"),
        [
            (4, "its label is 4, expected a class index from 0 to 3"),
            (-1, "its label is -1, expected a class index"),
            (-100, "its label is -100"),  # cross_entropy would ignore it
            (1.0, r"its label is 1.0, expected the number of a class"),
            (None, "its label is None"),
            ([0, 1], r"its label is \[0, 1\]"),
            ("cat", "its label is 'cat'"),
        ],
    )
    def test_anything_else_is_refused(self, label, message):
        with pytest.raises(DatasetError, match=message):
            Labels(4)(label)


class TestClassMap:
    def test_text(self, tmp_path):
        file = tmp_path / "map.txt"
        file.write_text("\ufeffcat\n ant \nbee\n\n", encoding="utf-8")
        assert read_class_map(str(file)) == {"cat": 0, "ant": 1, "bee": 2}
        assert read_class_map("map.txt", str(tmp_path)) == {"cat": 0, "ant": 1, "bee": 2}

    @pytest.mark.parametrize("value", [["cat", "ant", "bee"], {"cat": 0, "ant": 1, "bee": 2}])
    def test_json(self, tmp_path, value):
        file = tmp_path / "map.json"
        file.write_text(json.dumps(value))
        assert read_class_map(str(file)) == {"cat": 0, "ant": 1, "bee": 2}

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("map.pkl", "x", r"is a \.pkl, expected a \.txt file"),
            ("map.txt", "", "has the wrong contents"),
            ("map.txt", "a\nb\na\n", "lists 'a' twice"),
            ("map.json", "{", "cannot read class map"),
            ("map.json", '{"a": "0"}', "has the wrong contents"),
            ("map.json", '{"a": -1}', "has the wrong contents"),
            ("map.json", "3", "has the wrong contents"),
            ("none.txt", None, "No such file"),
        ],
    )
    def test_others_are_refused(self, tmp_path, name, text, message):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(DatasetError, match=message):
            read_class_map(str(tmp_path / name))

    def test_order(self):
        labels = match_labels(["10", "2"], model_of(classes=2), "data", {"2": 0, "10": 1}, training=False)
        assert [labels(0), labels(1)] == [1, 0]
        assert labels.names == ("2", "10")

    def test_numbers_of_a_data_set_without_names(self):
        labels = match_labels(None, model_of(classes=3), "data", {"0": 2, "7": 1}, training=False)
        assert [labels(0), labels(7)] == [2, 1]
        with pytest.raises(DatasetError, match="its label is 1, expected one of the 2 that are mapped"):
            labels(1)

    @pytest.mark.parametrize(
        ("class_map", "message"),
        [
            ({"a": 0}, "the class map lacks classes of data: b"),
            ({"a": 0, "b": 2}, "gives 'b' the index 2, expected at most 1"),
            ({"b": 0, "a": 1}, "gives 'a' the index 1, expected 0 as the model records"),
        ],
    )
    def test_must_fit_the_model(self, class_map, message):
        with pytest.raises(DatasetError, match=message):
            match_labels(["a", "b"], model_of("a", "b"), "data", class_map, training=False)


class TestCalibration:
    def test_a_model_without_names_gets_those_of_the_data(self, caplog):
        model = model_of(classes=2)
        compare_unlabeled(["a", "b"], model, "data")
        assert class_names_of(model) == ("a", "b")
        assert "the model's class names are now those of data a, b" in caplog.text

    def test_but_not_a_model_of_imagenet_or_of_other_classes(self):
        for model in (model_of(classes=1000), model_of(classes=3)):
            compare_unlabeled([str(number) for number in range(1000)], model, "data")
            assert class_names_of(model) is None

    def test_other_classes_are_said(self, caplog):
        model = model_of("a", "b")
        compare_unlabeled(["b", "c"], model, "data")
        assert "data has classes that the model does not have: c" in caplog.text
        assert class_names_of(model) == ("a", "b")


def test_names_travel(tmp_path, image_folder):
    """A model that is trained on a data set records its names, through every transform of the model."""
    recipe = Recipe(dataset="folder", data_dir=str(image_folder()), img_size=12)
    model = build_student(Job(ModelSource(NET, pretrained=False)), recipe)
    config = json.loads((adderkit.save(model, tmp_path / "cnn") / "config.json").read_text())
    assert config["label_names"] == ["cat", "dog"]
    assert "label_names" not in config["pretrained_cfg"]
    timm_model = timm.create_model(f"local-dir:{tmp_path / 'cnn'}", pretrained=True)
    assert timm_model.pretrained_cfg["label_names"] == ["cat", "dog"]
    images = torch.randn(16, 3, 12, 12)
    adderkit.prune_(model, adderkit.PruneConfig(ratio=0.3), images)
    adderkit.convert_(model)
    network = adderkit.quantize(model, images)
    for number, each in enumerate((model, network)):
        again = adderkit.load(adderkit.save(each, tmp_path / str(number)))
        assert class_names_of(again) == ("cat", "dog")


def test_names_of_a_classifier_that_was_replaced_are_forgotten(tmp_path):
    model = timm.create_model(NET)
    record_class_names_(model, [str(number) for number in range(10)])
    model.reset_classifier(3)
    assert "label_names" not in (adderkit.save(model, tmp_path / "x") / "config.json").read_text()


def test_evaluated_labels_are_the_model_s(image_folder):
    """Folders b and c of a model that knows a, b and c: both are found at their places."""
    recipe = Recipe(dataset="folder", data_dir=str(image_folder(classes=("b", "c"))))
    split = open_split(recipe, model_of("a", "b", "c"), training=False)
    assert [split[index][1] for index in (0, 3, 4, 7)] == [1, 1, 2, 2]


def test_a_label_out_of_range_names_the_image(image_folder):
    class_map = image_folder() / "map.json"
    class_map.write_text('{"cat": 0, "dog": 1}')
    recipe = Recipe(dataset="folder", data_dir=str(class_map.parent), class_map="map.json")
    split = open_split(recipe, model_of(classes=2), training=False)
    split.labels = Labels(1)
    with pytest.raises(DatasetError, match=r"validation/dog/0.png: its label is 1, expected a class index from 0 to 0"):
        split[4]


def test_a_teacher_of_other_classes(tmp_path):
    teacher = adderkit.save(model_of("dog", "cat"), tmp_path / "teacher")
    job = Job(ModelSource(NET), str(teacher))
    with pytest.raises(ModelSourceError, match=r"class 0 of the teacher .* is 'dog', expected 'cat' as in the model"):
        build_teacher(job, Recipe(dataset="digits"), model_of("cat", "dog"))


def test_readable_names():
    assert readable_names(["n01440764", "n99999999"]) == ["tench, Tinca tinca", "n99999999"]
    assert readable_names(["n02012849", "n03126707"]) == ["crane (n02012849)", "crane (n03126707)"]
    assert readable_names(["n01440764", "cat"]) == ["n01440764", "cat"]
