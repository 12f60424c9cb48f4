"""Mixup and cutmix, beside timm's own way of training with them."""

import numpy as np
import pytest
import timm
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy

from adderkit.convert.errors import RecipeError
from adderkit.recipes.configs.recipe import Recipe
from adderkit.recipes.data.mixing import Mixing
from adderkit.recipes.data.reproducible import seed_everything
from adderkit.recipes.objectives.objective import Objective

CLASSES = 10


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("cifar_resnet20", num_classes=CLASSES, in_chans=1).eval()


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return torch.randn(8, 1, 8, 8), torch.randint(CLASSES, (8,))


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_the_loss_is_that_of_timm(mode, mixup, cutmix, model, batch):
    """timm smooths the labels before it mixes them; here the loss does it."""
    recipe = Recipe(
        mixup=mixup, cutmix=cutmix, mixup_mode=mode, mixup_prob=0.7, mixup_switch_prob=0.3, smoothing=0.1, batch_size=8
    )
    mixing, objective = Mixing(recipe, model, range(100)), Objective(recipe, None, None)
    for seed in range(4):
        images, targets = (each.clone() for each in batch)
        np.random.seed(seed)
        theirs, soft = Mixup(mixup, cutmix, None, 0.7, 0.3, mode, True, 0.1, CLASSES)(images, targets)
        expected = SoftTargetCrossEntropy()(model(theirs), soft)
        images, targets = (each.clone() for each in batch)
        np.random.seed(seed)
        mixed = mixing(0, images, targets)
        assert mixed[0].equal(theirs)
        torch.testing.assert_close(objective(model, *mixed)["loss"], expected)


def test_a_step_is_mixed_by_its_own_random_numbers(train, monkeypatch):
    """They follow from seed, epoch, batch and process; from ``mixup_off_epoch`` on there is none."""
    plain, trained = [], []
    mix, loss = Mixing.__call__, Objective.forward

    def before(self, epoch, images, targets):
        plain.append((images.clone(), targets))
        return mix(self, epoch, images, targets)

    def after(self, model, images, targets):
        trained.append((images.clone(), targets))
        return loss(self, model, images, targets)

    monkeypatch.setattr(Mixing, "__call__", before)
    monkeypatch.setattr(Objective, "forward", after)
    train(epochs=2, mixup=0.5, mixup_off_epoch=1, seed=3)
    for number, (images, targets) in enumerate(plain[:2]):
        seed_everything(3, 0, number, 0)
        expected = Mixup(0.5, label_smoothing=0, num_classes=CLASSES)(images, targets)
        assert all(ours.equal(theirs) for ours, theirs in zip(trained[number], expected, strict=True))
    assert all(ours is theirs or ours.equal(theirs) for ours, theirs in zip(trained[2], plain[2], strict=True))
    assert len(trained) == 4


def test_nothing_is_mixed_by_default(model, batch):
    images, targets = Mixing(Recipe(), model, range(3))(0, *batch)
    assert images is batch[0]
    assert targets is batch[1]


def test_a_single_odd_batch(train):
    with pytest.raises(RecipeError, match=r"the only batch has 31 images, expected an even number .*\(now 32\)"):
        train(train_images=31, cutmix=1.0)
    train(train_images=31, batch_size=16, cutmix=1.0)  # the last, partial batch is left out


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mixup": 0.2, "batch_size": 33}, "batch_size is 33, expected an even number with mixup or cutmix"),
        ({"cutmix": -1}, "cutmix is -1.0, expected at least 0"),
        ({"mixup_prob": 2}, "mixup_prob is 2.0, expected a number between 0 and 1"),
        ({"mixup_mode": "half"}, "mixup_mode is 'half', expected batch, pair or elem"),
    ],
)
def test_refused(values, message):
    with pytest.raises(RecipeError, match=message):
        Recipe().changed(values)
