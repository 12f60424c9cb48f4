"""The limit on what a configuration may ask for: real models pass, what weights cannot fill is refused at once."""

import pytest
import timm
import torch

from adderkit.convert.checkpoint.allocation import AllocationLimit, count_elements
from adderkit.convert.errors import CheckpointError


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "levit_128s"])
def test_a_model_is_built_within_the_limit_of_its_own_weights(name):
    elements = count_elements(timm.create_model(name).state_dict())
    with AllocationLimit(elements, "folder") as limit:
        before = limit.left
        timm.create_model(name)
    assert before - limit.left < 1.2 * elements + (1 << 22)


def test_what_is_too_large_is_not_allocated():
    with (
        AllocationLimit(1000, "folder"),
        pytest.raises(CheckpointError, match=r"^folder .* shape \(1048576, 1048576\)"),
    ):
        torch.empty(1 << 20, 1 << 20)


def test_many_small_tensors_count_too():
    with AllocationLimit(0, "folder"), pytest.raises(CheckpointError, match=r"shape \(1,\), far more than its weights"):
        list(map(torch.zeros, [1] * (1 << 15)))


def test_tensors_made_of_others_are_free():
    source = torch.zeros(1 << 10)
    with AllocationLimit(0, "folder") as limit:
        before = limit.left
        result = source + 1
        result.clone()
    assert limit.left == before
    assert result.equal(torch.ones(1 << 10))
