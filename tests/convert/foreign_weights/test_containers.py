"""Which state dict of a checkpoint is taken: the one that timm takes, and else the only one."""

import pytest
import torch
from timm.models import load_state_dict

from adderkit.convert.errors import CheckpointError
from adderkit.convert.foreign_weights.containers import find_state_dicts
from adderkit.convert.foreign_weights.read import read_weights


def state(number):
    """A state dict that tells which it is."""
    return {"a.weight": torch.full((2,), float(number)), "a.bias": torch.zeros(2)}


OPTIMIZER = {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": state(0), "state_dict_ema": state(1), "optimizer": OPTIMIZER},
        {"model": state(0), "model_ema": state(1), "epoch": 3},
        {"model": state(0), "model_ema": None},
        {"model": state(0), "state_dict": state(1)},
        {"model_ema": state(0), "state_dict_ema": state(1), "model": state(2)},
        {"best_acc1": torch.tensor(71.5), "state_dict": state(0), "optimizer": OPTIMIZER},  # torch's ImageNet example
        state(0),
    ],
    ids=["train.py", "deit", "no-average", "both", "two-averages", "example", "plain"],
)
def test_same_as_timm(tmp_path, content):
    torch.save(content, tmp_path / "weights.pth")
    expected = load_state_dict(str(tmp_path / "weights.pth"))
    read = read_weights(tmp_path / "weights.pth")
    assert read.tensors.keys() == expected.keys()
    assert all(torch.equal(read.tensors[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        (
            {"model_state_dict": state(0), "optimizer_state_dict": OPTIMIZER, "loss": torch.ones(())},
            ["model_state_dict"],
        ),
        ({"net": state(0), "acc": 91.7, "epoch": 3}, ["net"]),
        ({"network": state(0)}, ["network"]),
        ({"module": state(0), "ds_version": "0.9"}, ["module"]),
        ({"params": state(0), "params_ema": state(1)}, ["params_ema", "params"]),
        ({"model": {"state_dict": state(0)}}, ["model.state_dict"]),
        ({"model": state(0), "ema": {"decay": 0.9, "shadow": state(1)}}, ["ema.shadow", "model"]),
        ({"model": state(0), "ema": {"decay": 0.9, "shadow_params": [torch.ones(2)]}}, ["model"]),
        ({"epoch": 3, "resnet": state(0), "optimizer": OPTIMIZER}, ["resnet"]),
        ({"state_dict": state(0), "callbacks": {"early": {"best": torch.ones(())}}}, ["state_dict"]),
        ({"student": state(0), "teacher": state(1)}, ["student", "teacher"]),
        ({"optimizer": OPTIMIZER}, []),
        ([state(0)], []),
    ],
)
def test_containers_and_their_order(content, keys):
    found = find_state_dicts(content)
    assert [each.key for each in found] == keys
    assert all("a.weight" in each.values for each in found)


def test_several_without_a_known_name_are_refused(tmp_path):
    torch.save({"student": state(0), "teacher": state(1)}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"several state dicts, student, teacher, expected one.*\['student'\]"):
        read_weights(tmp_path / "weights.pth")


def test_mapping_that_is_in_a_file_many_times(tmp_path):
    inner = {str(number): {} for number in range(100)}
    for _ in range(10):
        inner = {str(number): inner for number in range(100)}
    torch.save({"model": inner}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="does not hold a state dict"):
        read_weights(tmp_path / "weights.pth")
