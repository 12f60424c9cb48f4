"""Clipping: which gradients count, compared with a step of plain SGD that is written out."""

import pytest
import torch
from torch import nn

import adderkit
from adderkit.adder_layers.modules import adder_layers
from adderkit.convert.model_source import ModelSource
from adderkit.recipes.data.datasets import DataConfig, open_dataset, subset
from adderkit.recipes.data.loaders import Transformed, evaluation_transform
from adderkit.recipes.objectives.logits import distillation_loss
from adderkit.recipes.objectives.teacher import FrozenTeacher
from adderkit.recipes.training import prepare
from adderkit.recipes.training.models import Job

LARGEST, LR = 0.01, 0.5


@pytest.mark.parametrize("eta", [0.0, 0.05])
def test_weights_whose_gradient_is_rescaled_do_not_count(eta, adder_folder, cnn_folder, train, monkeypatch):
    """Of the adder weights alone the gradient's norm is above the bound, hundredfold; so is that of all."""
    monkeypatch.setattr(prepare, "training_transform", lambda config, augmentation: evaluation_transform(config))
    settings = {
        "block_loss_weight": 0.0,
        "opt": "momentum",
        "momentum": 0.0,
        "lr": LR,
        "clip_grad": LARGEST,
        "eta": eta,
        "bn_images": 0,
    }
    _, folder = train("distill", job=Job(ModelSource(str(adder_folder))), batch_size=64, **settings)

    model, teacher = adderkit.load(adder_folder), adderkit.load(cnn_folder)
    images = subset(open_dataset("digits", None, "train", 1), 64, seed=0)
    dataset = Transformed(images, evaluation_transform(DataConfig.of(model)))
    images = torch.stack([dataset[index][0] for index in range(64)])
    adders = [layer.weight for layer in adder_layers(model).values()]
    for layer in adder_layers(model).values():
        layer.sharpness = 1024.0
    distillation_loss(model.train()(images), FrozenTeacher(teacher, DataConfig.of(model))(images), 2.0).backward()

    others = [parameter for parameter in model.parameters() if not any(parameter is weight for weight in adders)]
    counted = others if eta else [*others, *adders]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in counted])
    assert norm > LARGEST
    assert nn.utils.get_total_norm([weight.grad for weight in adders]) > 100 * LARGEST
    after = dict(adderkit.load(folder.last).named_parameters())
    for name, before in model.named_parameters():
        if any(before is weight for weight in adders):
            step = eta / before.grad.square().mean().sqrt() if eta else LARGEST / norm
        else:
            step = LARGEST / norm
        torch.testing.assert_close(after[name], before.detach() - LR * step * before.grad, rtol=1e-3, atol=1e-6)
