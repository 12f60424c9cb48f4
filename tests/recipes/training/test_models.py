"""From names to things: what does not fit together is refused before the first step."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.layers import FrozenBatchNormAct2d
from torchvision.ops import FrozenBatchNorm2d

import adderkit
from adderkit.convert.conversion.targets import is_converted
from adderkit.convert.errors import AdderkitError, DatasetError, ModelSourceError, RecipeError
from adderkit.convert.model_source import ModelSource
from adderkit.recipes.configs.recipe import Recipe
from adderkit.recipes.data.datasets import DataConfig
from adderkit.recipes.data.loaders import evaluation_transform
from adderkit.recipes.training import models
from adderkit.recipes.training.models import (
    Job,
    build_student,
    build_teacher,
    check_norms,
    check_single_images,
    default_recipe,
    open_split,
    teacher_of,
)

DIGITS = Recipe(dataset="digits")
DISTIL = Recipe(dataset="digits", distill_loss_weight=1.0)


def test_a_fresh_model_takes_the_data_set_s_facts():
    model = build_student(Job(ModelSource("cifar_resnet20", pretrained=False)), DIGITS)
    data = DataConfig.of(model)
    assert model.num_classes == 10
    assert (data.input_size, data.mean, data.std) == ((1, 8, 8), (0.3053,), (0.3761,))


def test_small_images_are_evaluated_whole():
    """As they are trained on; timm's settings of this network would cut 4 of 32 pixels away and enlarge the rest."""
    model = build_student(Job(ModelSource("mobilenetv2_035", pretrained=False)), Recipe(dataset="digits", img_size=32))
    frame = np.pad(np.full((30, 30), 255, np.uint8), 1)
    found = evaluation_transform(DataConfig.of(model))(Image.fromarray(frame))
    assert float(found[:, [0, -1]].max()) < 0 < float(found[:, 1:-1, 1:-1].min())


def test_a_fresh_model_for_class_folders(image_folder):
    recipe = Recipe(dataset="folder", data_dir=str(image_folder(classes=("a", "b", "c"))))
    assert build_student(Job(ModelSource("cifar_resnet20", pretrained=False)), recipe).num_classes == 3


def test_image_size_and_numbers_given_win():
    job = Job(ModelSource("cifar_resnet20", pretrained=False, num_classes=12, in_chans=3))
    model = build_student(job, Recipe(dataset="digits", img_size=16))
    assert model.num_classes == 12
    assert DataConfig.of(model).input_size == (3, 16, 16)


def test_a_network_of_fixed_size_is_built_for_it():
    model = build_student(Job(ModelSource("cifar_vgg_small", pretrained=False)), DIGITS)
    assert DataConfig.of(model).input_size == (1, 8, 8)


def test_a_fixed_size_cannot_be_changed(tmp_path):
    folder = adderkit.save(timm.create_model("cifar_vgg_small"), tmp_path / "vgg")
    with pytest.raises(RecipeError, match="img_size is 16, expected 32: the model's image size is fixed"):
        build_student(Job(ModelSource(str(folder))), Recipe(dataset="digits", img_size=16))


def test_a_folder_is_loaded_as_it_is(adder_folder):
    assert is_converted(build_student(Job(ModelSource(str(adder_folder))), DIGITS))


def test_a_folder_and_a_checkpoint_are_too_much(cnn_folder, tmp_path):
    with pytest.raises(ModelSourceError, match="not both"):
        build_student(Job(ModelSource(str(cnn_folder), checkpoint=str(tmp_path / "other.safetensors"))), DIGITS)


def test_missing_weights_name_the_remedies():
    with pytest.raises(ModelSourceError, match=r"no pretrained weights.*--checkpoint.*--no-pretrained"):
        build_student(Job(ModelSource("cifar_resnet20")), DIGITS)


def test_weights_from_a_checkpoint(cnn_folder):
    model = build_student(Job(ModelSource("cifar_resnet20", checkpoint=str(cnn_folder))), DIGITS)
    assert model.fc.weight.equal(adderkit.load(cnn_folder).fc.weight)


class TestTeacher:
    def test_is_the_one_that_conversion_recorded(self, adder_folder, cnn_folder):
        job = Job(ModelSource(str(adder_folder)))
        assert teacher_of(job) == str(adder_folder / "teacher")
        teacher = build_teacher(job, DISTIL, adderkit.load(adder_folder))
        assert not is_converted(teacher.model)
        assert teacher.model.fc.weight.equal(adderkit.load(cnn_folder).fc.weight)

    def test_that_is_given_wins(self, adder_folder):
        assert teacher_of(Job(ModelSource(str(adder_folder)), teacher="resnet18")) == "resnet18"

    def test_of_a_name_is_none(self):
        assert teacher_of(Job(ModelSource("resnet18"))) is None

    def test_that_is_not_named(self, cnn_folder):
        with pytest.raises(ModelSourceError, match=r"names no teacher; give the original CNN with --teacher"):
            build_teacher(Job(ModelSource(str(cnn_folder))), DISTIL, adderkit.load(cnn_folder))

    def test_that_is_gone(self, adder_folder, tmp_path):
        moved = shutil.copytree(adder_folder, tmp_path / "moved")
        report = json.loads((moved / "adder_report.json").read_text())
        (moved / "adder_report.json").write_text(json.dumps({**report, "teacher": str(tmp_path / "gone")}))
        with pytest.raises(ModelSourceError, match=r"cannot build the teacher: .*gone.*--teacher"):
            build_teacher(Job(ModelSource(str(moved))), DISTIL, adderkit.load(moved))

    def test_moves_with_the_converted_folder(self, adder_folder, cnn_folder, tmp_path):
        moved = shutil.copytree(adder_folder, tmp_path / "moved")
        teacher = build_teacher(Job(ModelSource(str(moved))), DISTIL, adderkit.load(moved))
        assert teacher.model.fc.weight.equal(adderkit.load(cnn_folder).fc.weight)
        shutil.rmtree(moved / "teacher")
        with pytest.raises(ModelSourceError, match=r"cannot build the teacher: .*moved/teacher.*--teacher"):
            build_teacher(Job(ModelSource(str(moved))), DISTIL, adderkit.load(moved))

    @pytest.mark.parametrize("name", ["hf-hub:ann/net", "resnet18.a1_in1k", "local-dir:../net"])
    def test_that_a_folder_would_make_us_download(self, adder_folder, tmp_path, name, monkeypatch):
        """It is used only if the user names it; the folder's own base model comes from where timm says."""
        foreign = shutil.copytree(adder_folder, tmp_path / "foreign")
        report = json.loads((foreign / "adder_report.json").read_text())
        (foreign / "adder_report.json").write_text(json.dumps({**report, "teacher": name, "base": "resnet18"}))
        monkeypatch.setattr(ModelSource, "build", None)
        job = Job(ModelSource(str(foreign)))
        with pytest.raises(ModelSourceError, match=f"foreign names {name} as its teacher, .*--teacher {name}"):
            build_teacher(job, DISTIL, adderkit.load(foreign))
        assert teacher_of(dataclasses.replace(job, teacher=name)) == name
        (foreign / "adder_report.json").write_text(json.dumps({**report, "teacher": "cifar_resnet20.tag"}))
        assert teacher_of(job) == "cifar_resnet20.tag"

    def test_from_a_file_has_the_student_s_classes(self, adder_folder, cnn_folder):
        job = Job(ModelSource(str(adder_folder)), "cifar_resnet20", str(cnn_folder / "model.safetensors"))
        teacher = build_teacher(job, DISTIL, adderkit.load(adder_folder))
        assert teacher.model.fc.weight.equal(adderkit.load(cnn_folder).fc.weight)

    def test_that_is_damaged(self, adder_folder, cnn_folder, tmp_path):
        damaged = shutil.copytree(cnn_folder, tmp_path / "damaged")
        (damaged / "model.safetensors").write_bytes(b"nothing")
        with pytest.raises(AdderkitError, match="damaged"):
            build_teacher(Job(ModelSource(str(adder_folder)), str(damaged)), DISTIL, adderkit.load(adder_folder))

    def test_of_other_classes(self, adder_folder, tmp_path):
        other = adderkit.save(timm.create_model("cifar_resnet20", num_classes=3, in_chans=1), tmp_path / "other")
        with pytest.raises(ModelSourceError, match="has 3 classes, expected 10, like the student"):
            build_teacher(Job(ModelSource(str(adder_folder)), str(other)), DISTIL, adderkit.load(adder_folder))

    def test_of_other_channels(self, adder_folder, tmp_path):
        other = adderkit.save(timm.create_model("cifar_resnet20"), tmp_path / "other")
        with pytest.raises(ModelSourceError, match=r"cannot teach .*takes 3 channels, expected 1"):
            build_teacher(Job(ModelSource(str(adder_folder)), str(other)), DISTIL, adderkit.load(adder_folder))


def test_no_data_set(cnn_folder):
    with pytest.raises(DatasetError, match="no data set was given; name one with --dataset"):
        open_split(Recipe(), adderkit.load(cnn_folder), training=True)


@pytest.mark.parametrize("training", [True, False], ids=["train", "validation"])
def test_classes_of_data_and_model_must_agree(image_folder, cnn_folder, training):
    recipe = Recipe(dataset="folder", data_dir=str(image_folder()))
    with pytest.raises(DatasetError, match="has 2 classes, expected 10, as in the model"):
        open_split(recipe, adderkit.load(cnn_folder), training=training)


def test_only_the_training_split_is_cut(cnn_folder):
    recipe = Recipe(dataset="digits", train_images=50)
    sizes = [len(open_split(recipe, adderkit.load(cnn_folder), training=training)) for training in (True, False)]
    assert sizes == [50, 360]


def test_default_recipe(adder_folder, cnn_folder):
    assert default_recipe(ModelSource(str(adder_folder))) == "distill"
    assert default_recipe(ModelSource(f"local-dir:{adder_folder}")) == "distill"
    assert default_recipe(ModelSource(str(cnn_folder))) == "cnn"
    assert default_recipe(ModelSource("resnet18")) == "cnn"


@pytest.mark.parametrize("frozen", [FrozenBatchNorm2d, FrozenBatchNormAct2d])
def test_frozen_batchnorm_is_refused_in_an_adder_network(adder_folder, frozen):
    model = adderkit.load(adder_folder)
    check_norms(model)
    model.features[4].bn1 = frozen(16)
    with pytest.raises(RecipeError, match=rf"features.4.bn1 is a {frozen.__name__}"):
        check_norms(model)


def test_frozen_batchnorm_is_no_matter_in_a_cnn(cnn_folder):
    model = adderkit.load(cnn_folder)
    model.features[4].bn1 = FrozenBatchNorm2d(16)
    check_norms(model)
    assert not is_converted(model)


class TestSingleImages:
    def test_batchnorm_on_logits_is_refused(self):
        """The networks of the AdderNet papers have a BatchNorm after their last 1x1 convolution."""
        model = timm.create_model("cifar_resnet20")
        with pytest.raises(RecipeError, match="the BatchNorm fc_norm sees one value per channel, expected at least 2"):
            check_single_images(model, Recipe(batch_size=1), 50, 1)
        with pytest.raises(RecipeError, match=r"batch_size \(now 8\)"):
            check_single_images(model, Recipe(batch_size=8), 1, 1)
        check_single_images(model, Recipe(batch_size=2), 50, 1)
        check_single_images(model, Recipe(batch_size=1, sync_bn=True), 50, 2)

    def test_maps_of_several_values_are_fine(self):
        model = timm.create_model("resnet10t", num_classes=3)
        check_single_images(model, Recipe(batch_size=1), 50, 1)
        model.train()(torch.randn(1, 3, 64, 64))


def test_evaluation_keeps_the_classifier_of_pretrained_weights(monkeypatch, image_folder):
    """A new one for two classes would be random."""
    monkeypatch.setattr(ModelSource, "_create", lambda self, pretrained, arguments: arguments)
    monkeypatch.setattr(models, "_set_image_size", lambda *_: None)
    recipe = Recipe(dataset="folder", data_dir=str(image_folder()))
    assert build_student(Job(ModelSource("resnet18")), recipe, training=False) == {}
