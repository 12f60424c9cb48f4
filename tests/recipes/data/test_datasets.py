"""Images by a spec: class folders made here, timm's readers, transforms and subsets."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

from adderkit.convert.errors import DatasetError
from adderkit.recipes.configs.recipe import Augmentation
from adderkit.recipes.data.datasets import (
    DataConfig,
    class_names,
    evaluation_transform,
    make_loader,
    open_dataset,
    subset,
    training_transform,
    unlabeled_images,
)

CONFIG = DataConfig((3, 32, 32), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bilinear", 1.0)


@pytest.fixture
def model():
    return timm.create_model("cifar_resnet20")


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8))


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
        ("", None, "no data set is given; name one with --dataset"),
        ("folder", None, "--dataset folder needs --data-dir"),
        ("folder", "/no/such/place", "--data-dir /no/such/place does not exist"),
        ("wds/none", "/no/such/place", "data set 'wds/none', split 'train', cannot be opened"),
        ("torch/none", "/no/such/place", "data set 'torch/none', split 'train', cannot be opened"),
        ("nonsense/none", "/no/such/place", "data set 'nonsense/none', split 'train', cannot be opened"),
    ],
)
def test_what_cannot_be_opened_says_so_in_a_line(spec, data_dir, message):
    with pytest.raises(DatasetError, match=message) as caught:
        open_dataset(spec, data_dir, "train")
    assert "\n" not in str(caught.value)


def test_a_folder_without_images(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(DatasetError, match=r"cannot be opened: .*0 images"):
        open_dataset("folder", str(tmp_path), "train")


@pytest.mark.parametrize(
    ("name", "overlay"),
    [
        ("cifar_resnet20", {}),
        ("resnet18", {"input_size": (3, 48, 48)}),
        ("resnet18", {"input_size": (3, 32, 48), "interpolation": "bicubic", "crop_pct": 0.8}),
        ("resnet18", {"input_size": (3, 32, 32), "crop_mode": "squash"}),
        ("resnet18", {"input_size": (3, 32, 32), "crop_mode": "border"}),
    ],
    ids=["cifar", "center", "oblong-bicubic", "squash", "border"],
)
def test_evaluation_transform_is_timm_s(picture, name, overlay):
    model = timm.create_model(name, pretrained_cfg_overlay=overlay)
    expected = create_transform(**resolve_data_config({}, model=model), is_training=False)(picture)
    assert torch.equal(evaluation_transform(DataConfig.of(model))(picture), expected)


def test_statistics_of_a_stem_of_other_channels():
    config = DataConfig.of(timm.create_model("cifar_resnet20", in_chans=1))
    assert config.input_size == (1, 32, 32)
    assert config.mean == pytest.approx((sum((0.4914, 0.4822, 0.4465)) / 3,))
    assert config.std == pytest.approx((sum((0.2470, 0.2435, 0.2616)) / 3,))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("augmentation", [Augmentation(crop_padding=4), Augmentation()], ids=["padded", "resized"])
def test_training_transform_gives_the_model_s_shape(picture, augmentation, channels):
    config = DataConfig((channels, 24, 32), (0.5,) * channels, (0.2,) * channels, "bilinear", 1.0)
    tensor = training_transform(config, augmentation)(picture if channels == 3 else picture.convert("L"))
    assert tensor.shape == (channels, 24, 32)
    assert tensor.dtype == torch.float32


def test_padded_crops_move_the_image_and_fill_with_black():
    white = Image.new("RGB", (32, 32), "white")
    transform = training_transform(CONFIG, Augmentation(crop_padding=4, hflip=0))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CONFIG.mean, CONFIG.std))
    torch.manual_seed(0)
    share = []
    for _ in range(20):
        pixels = transform(white) * std + mean
        assert pixels[:, 4:-4, 4:-4].sub(1).abs().max() < 1e-6
        assert ((pixels - 1).abs() < 1e-6).logical_or(pixels.abs() < 1e-6).all()
        share.append(pixels.mean().item())
    assert len(set(share)) > 5
    assert min(share) >= 28 * 28 / 32**2 - 1e-6


def test_flips():
    half = Image.fromarray(np.repeat(np.repeat([[0, 255]], 16, 1), 32, 0).astype(np.uint8)).convert("RGB")
    flipped = training_transform(CONFIG, Augmentation(crop_padding=1, hflip=1))(half)
    kept = training_transform(CONFIG, Augmentation(crop_padding=1, hflip=0))(half)
    assert (flipped[:, 16, 4] > flipped[:, 16, -4]).all()
    assert (kept[:, 16, 4] < kept[:, 16, -4]).all()


def test_timm_s_own_augmentation_is_passed_on(picture):
    augmentation = Augmentation(color_jitter=0.4, auto_augment="rand-m9-mstd0.5-inc1", reprob=0.5)
    text = str(training_transform(CONFIG, augmentation))
    assert "RandAugment" in text
    assert "RandomErasing" in text


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
    view.transform = lambda image: "seen"
    assert [view[index] for index in range(3)] == [("seen", dataset[view.indices[i]][1]) for i in range(3)]
    assert view.transform is dataset.transform
    assert class_names(view) == [str(digit) for digit in range(10)]


def test_class_names_of_a_data_set_that_knows_none():
    assert class_names(torch.utils.data.TensorDataset(torch.zeros(1))) is None


@pytest.mark.parametrize(
    ("count", "training", "sizes"),
    [(10, False, [4, 4, 2]), (10, True, [4, 4]), (3, True, [3]), (4, True, [4])],
)
def test_loader_drops_a_partial_batch_only_in_training(count, training, sizes):
    dataset = subset(open_dataset("digits", None, "train"), count, 0)
    loader = make_loader(dataset, lambda image: torch.zeros(1), 4, 0, training=training)
    assert [len(targets) for _, targets in loader] == sizes


def test_loader_shuffles_only_in_training():
    dataset = open_dataset("digits", None, "validation")
    order = [target for _, target in (dataset[index] for index in range(360))]

    def targets(training):
        loader = make_loader(dataset, lambda image: torch.zeros(1), 36, 0, training=training)
        return torch.cat([targets for _, targets in loader]).tolist()

    assert targets(False) == order
    assert targets(True) != order
    assert sorted(targets(True)) == sorted(order)


class TestUnlabeledImages:
    @pytest.fixture
    def gray_model(self):
        overlay = {"input_size": (1, 8, 8), "mean": (0.3053,), "std": (0.3761,)}
        return timm.create_model("cifar_resnet20", in_chans=1, pretrained_cfg_overlay=overlay)

    def test_are_deterministic_under_a_seed(self, gray_model):
        first, again, other = (unlabeled_images("digits", None, gray_model, 64, seed=seed) for seed in (1, 1, 2))
        assert first.shape == (64, 1, 8, 8)
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_do_not_depend_on_global_random_numbers(self, gray_model):
        torch.manual_seed(1)
        first = unlabeled_images("digits", None, gray_model, 16)
        torch.manual_seed(2)
        assert torch.equal(unlabeled_images("digits", None, gray_model, 16), first)

    def test_are_normalized(self, gray_model):
        images = unlabeled_images("digits", None, gray_model, 10**6)
        assert images.shape == (1437, 1, 8, 8)
        assert images.mean().item() == pytest.approx(0, abs=1e-3)
        assert images.std().item() == pytest.approx(1, abs=1e-3)

    def test_of_class_folders(self, image_folder, model):
        images = unlabeled_images("folder", str(image_folder()), model, 5, split="validation")
        assert images.shape == (5, 3, 32, 32)
