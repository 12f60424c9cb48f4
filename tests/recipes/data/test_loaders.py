"""Transforms, loaders and unlabeled images."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

from adderkit.recipes.configs.recipe import Augmentation
from adderkit.recipes.data.datasets import DataConfig, open_dataset, subset
from adderkit.recipes.data.loaders import evaluation_transform, make_loader, training_transform, unlabeled_images

CONFIG = DataConfig((3, 32, 32), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bilinear", 1.0)


@pytest.fixture
def model():
    return timm.create_model("cifar_resnet20")


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8))


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


def test_a_data_set_can_be_seen_in_two_ways():
    """By loaders of different transforms at the same time: neither changes the data set."""
    dataset = open_dataset("digits", None, "validation")
    ones, zeros = (make_loader(dataset, lambda image, value=value: torch.full((1,), value), 4, 0, training=False)
                   for value in (1.0, 0.0))  # fmt: skip
    for (first, _), (second, _) in zip(ones, zeros, strict=True):
        assert first.all()
        assert not second.any()
    assert dataset[0][0].size == (8, 8)


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
