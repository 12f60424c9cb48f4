"""Images by a spec: class folders made here, timm's readers, and subsets."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from adderkit.convert.errors import DatasetError
from adderkit.recipes.data.datasets import DataConfig, class_names, open_dataset, subset


def test_class_folders(image_folder):
    root = str(image_folder(classes=("ant", "bee", "cat"), count=3))
    dataset = open_dataset("folder", root, "train")
    assert len(dataset) == 9
    assert class_names(dataset) == ["ant", "bee", "cat"]
    for index in range(9):
        image, target = dataset[index]
        assert image.mode == "RGB"
        assert image.getpixel((0, 0))[0] == 60 * target + 40


def test_class_folders_in_gray(image_folder):
    assert open_dataset("folder", str(image_folder()), "train", in_chans=1)[0][0].mode == "L"


@pytest.mark.parametrize(("in_chans", "mode"), [(1, "L"), (3, "RGB")])
def test_small_data_sets_have_the_channels_asked_for(in_chans, mode):
    assert open_dataset("digits", None, "train", in_chans)[0][0].mode == mode


def test_timm_s_name_of_the_validation_folder(image_folder):
    root = image_folder(splits=("train", "val"))
    files = {path.name for path in (root / "val").rglob("*.png")}
    assert len(open_dataset("folder", str(root), "validation")) == 2 * len(files)


@pytest.mark.parametrize("split", ["validation", "validaton", "train"])
def test_a_split_that_is_not_there_is_never_replaced_by_the_rest(image_folder, split):
    root = str(image_folder(splits=("train" if split != "train" else "validation",)))
    with pytest.raises(DatasetError, match=split):
        open_dataset("folder", root, split)


@pytest.mark.parametrize(
    ("spec", "data_dir", "message"),
    [
        ("mnist", None, "--dataset is 'mnist', expected digits, fashion-mnist, folder"),
        ("", None, "no data set was given; name one with --dataset"),
        ("folder", None, "--dataset folder needs --data-dir"),
        ("folder", "/no/such/place", "--data-dir /no/such/place does not exist"),
        ("wds/none", "/no/such/place", "data set 'wds/none', split 'train', cannot be opened"),
        ("torch/none", "/no/such/place", "data set 'torch/none', split 'train', cannot be opened"),
        ("nonsense/none", "/no/such/place", "--dataset is 'nonsense/none', expected digits, fashion-mnist, folder"),
    ],
)
def test_what_cannot_be_opened_says_so_in_a_line(spec, data_dir, message):
    with pytest.raises(DatasetError, match=message) as caught:
        open_dataset(spec, data_dir, "train")
    assert "\n" not in str(caught.value)


def test_a_folder_without_images(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(DatasetError, match=r"train has 0 images; expected class folders"):
        open_dataset("folder", str(tmp_path), "train")


def test_statistics_of_a_stem_of_other_channels():
    config = DataConfig.of(timm.create_model("cifar_resnet20", in_chans=1))
    assert config.input_size == (1, 32, 32)
    assert config.mean == pytest.approx((sum((0.4914, 0.4822, 0.4465)) / 3,))
    assert config.std == pytest.approx((sum((0.2470, 0.2435, 0.2616)) / 3,))


def test_subset_is_of_fixed_choice():
    dataset = open_dataset("digits", None, "train")

    def first(count, seed):
        return subset(dataset, count, seed).indices

    assert first(20, 0) == first(20, 0)
    assert first(20, 0) != first(20, 1)
    assert len(set(first(500, 3))) == 500
    assert first(20, 0) == first(50, 0)[:20]


@pytest.mark.parametrize("count", [0, 1437, 10**6])
def test_subset_of_all(count):
    dataset = open_dataset("digits", None, "train")
    assert subset(dataset, count, 0) is dataset


def test_subset_is_a_data_set():
    dataset = open_dataset("digits", None, "train")
    view = subset(dataset, 20, 0)
    assert len(view) == 20
    assert [view[index] for index in range(3)] == [dataset[view.indices[index]] for index in range(3)]
    assert class_names(view) == [str(digit) for digit in range(10)]


def test_class_names_of_a_data_set_that_knows_none():
    assert class_names(torch.utils.data.TensorDataset(torch.zeros(1))) is None


class TestTorchvision:
    def test_class_folders_are_read_strictly(self, image_folder):
        root = image_folder(count=2)
        Image.fromarray(np.full((2, 2), 40000, np.uint16)).save(root / "train" / "cat" / "0.png")
        (root / "train" / "dog" / "1.png").write_bytes(b"x")
        dataset = open_dataset("torch/folder", str(root), "train")
        assert class_names(dataset) == ["cat", "dog"]
        assert [dataset[0][0].getpixel((0, 0)), dataset[0][1], dataset[2][1]] == [(156, 156, 156), 0, 1]
        with pytest.raises(DatasetError, match=r"cannot read .*/dog/1.png: it is not in an image format"):
            dataset[3]

    def test_a_hidden_folder_is_no_class(self, image_folder):
        root = image_folder(classes=("cat", ".ipynb_checkpoints"))
        with pytest.raises(DatasetError, match=r"would treat .*/.ipynb_checkpoints as a class; .*--dataset folder"):
            open_dataset("torch/folder", str(root), "train")

    def test_a_missing_split_is_not_the_whole_folder(self, image_folder):
        with pytest.raises(DatasetError, match="has no split 'validation'"):
            open_dataset("torch/image_folder", str(image_folder(splits=("train",))), "validation")


def test_images_have_one_or_three_channels(image_folder):
    with pytest.raises(DatasetError, match="takes 4 channels, expected 1 or 3"):
        open_dataset("folder", str(image_folder()), "train", 4)
