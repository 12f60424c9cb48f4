"""Predictions on examples, compared with those made one by one from the data set itself."""

import io
import shutil

import pytest
import timm
import torch
from PIL import Image

import adderkit
from adderkit.convert.calibration.batchnorm import reestimate_batchnorm_
from adderkit.convert.errors import DatasetError, ModelSourceError
from adderkit.convert.model_source import ModelSource
from adderkit.recipes.configs.recipe import Recipe
from adderkit.recipes.data.datasets import DataConfig, open_dataset, subset
from adderkit.recipes.data.loaders import Transformed, evaluation_transform, unlabeled_images
from adderkit.recipes.reporting.examples import find_examples
from adderkit.recipes.training.models import Job


@pytest.fixture(scope="module")
def folders(cnn_folder, adder_folder, tmp_path_factory):
    """Student and teacher; BatchNorm measured on the images, so that untrained networks tell them apart."""
    place, saved = tmp_path_factory.mktemp("lively"), []
    for source in (adder_folder, cnn_folder):
        model = adderkit.load(source)
        reestimate_batchnorm_(model, [unlabeled_images("digits", None, model, 256)])
        saved.append(adderkit.save(model, place / source.name))
    return saved


@pytest.fixture(scope="module")
def found(folders):
    student, teacher = folders
    model = adderkit.load(student)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    examples = find_examples(model, Job(ModelSource(str(student)), str(teacher)), Recipe(dataset="digits"))
    assert model.training
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    return examples


@pytest.fixture(scope="module")
def expected(folders):
    """Images and probabilities of student and teacher, of the same 256 images."""
    models = [adderkit.load(folder) for folder in folders]
    images = subset(open_dataset("digits", None, "validation", 1), 256, 0)
    raw = [images[index] for index in range(256)]
    prepared = Transformed(images, evaluation_transform(DataConfig.of(models[0])))
    batch = torch.stack([prepared[index][0] for index in range(256)])
    with torch.no_grad():
        return raw, [model(batch).softmax(1) for model in models]


def test_the_first_images_and_those_that_differ(found, expected):
    _, (student, teacher) = expected
    differing = (student.argmax(1) != teacher.argmax(1)).nonzero()[:, 0].tolist()
    assert 0 < len(differing) < 256  # else the fixture shows nothing
    assert (found.images, found.agreeing, found.no_teacher) == (256, 256 - len(differing), None)
    assert [each.number for each in found.first] == [1, 2, 3, 4, 5, 6]
    assert [each.number for each in found.differing] == [index + 1 for index in differing if index >= 6][:6]


def test_pictures_and_guesses(found, expected):
    raw, (student, teacher) = expected
    for each in (*found.first, *found.differing):
        picture, label = raw[each.number - 1]
        assert Image.open(io.BytesIO(each.picture)).tobytes() == picture.tobytes()
        assert each.truth == str(label)
        for guesses, probabilities in ((each.student, student), (each.teacher, teacher)):
            best = probabilities[each.number - 1].topk(3)
            assert [guess.label for guess in guesses] == [str(index) for index in best.indices.tolist()]
            assert [guess.probability for guess in guesses] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_pictures_are_small_and_bare(image_folder, tmp_path):
    """Photographs lose size and what a camera wrote beside the pixels; few classes give few guesses."""
    folder = adderkit.save(timm.create_model("cifar_resnet20", num_classes=2), tmp_path / "color")
    root = image_folder(size=(300, 200))
    for path in root.rglob("*.png"):
        Image.open(path).save(path, icc_profile=b"where it was taken")
    assert "icc_profile" in Image.open(path).info
    found = find_examples(
        adderkit.load(folder), Job(ModelSource(str(folder))), Recipe(dataset="folder", data_dir=str(root))
    )
    assert (found.images, found.agreeing) == (8, None)
    assert "records no teacher; give one with --teacher" in found.no_teacher
    for each in found.first:
        picture = Image.open(io.BytesIO(each.picture))
        assert (picture.size, picture.mode, picture.info) == ((96, 64), "RGB", {})
        assert each.truth in ("cat", "dog")
        assert {guess.label for guess in each.student} == {"cat", "dog"}
        assert each.teacher == ()


def test_teacher_that_is_gone(adder_folder, tmp_path, caplog):
    """A recorded teacher may be missing, with a warning; one that the user names must load."""
    folder = shutil.copytree(adder_folder, tmp_path / "net")
    shutil.rmtree(folder / "teacher")
    model = adderkit.load(folder)
    found = find_examples(model, Job(ModelSource(str(folder))), Recipe(dataset="digits"))
    assert found.no_teacher.startswith("the teacher that the model records cannot be loaded")
    assert "/nowhere" not in found.no_teacher
    assert "cannot build the teacher: " in caplog.text
    assert "net/teacher" in caplog.text
    assert (found.agreeing, found.differing, found.first[0].teacher) == (None, (), ())
    with pytest.raises(ModelSourceError, match="cannot build the teacher: timm has no model 'gone'"):
        find_examples(model, Job(ModelSource(str(folder)), "gone"), Recipe(dataset="digits"))


def test_another_data_set(adder_folder, image_folder):
    with pytest.raises(DatasetError, match="has 2 classes, expected 10"):
        find_examples(
            adderkit.load(adder_folder),
            Job(ModelSource(str(adder_folder))),
            Recipe(dataset="folder", data_dir=str(image_folder())),
        )
