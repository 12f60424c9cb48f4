"""What tests of calibration share: images, and a network with its converted copy."""

import copy

import pytest
import torch

from adderkit.convert.conversion.rewrite import convert_


@pytest.fixture
def pair():
    """Build a network and its converted copy."""

    def build(teacher):
        student = copy.deepcopy(teacher)
        convert_(student, example_input=torch.zeros(1, 3, 8, 8))
        return teacher, student

    return build


@pytest.fixture
def data():
    return torch.randn(64, 3, 8, 8)
