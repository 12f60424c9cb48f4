"""A teacher that trains alongside learns the same on one process and on two, with and without accumulation."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("progressive_two_processes.py")
LAUNCHER = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")


def largest_difference(folder, other, name):
    """Largest difference of an element, relative to the largest of its tensor, or to 0.01 where all are smaller."""
    ours, theirs = (load_file(each / "last" / name) for each in (folder, other))
    assert ours.keys() == theirs.keys()
    return max(((ours[key] - theirs[key]).abs().max() / theirs[key].abs().max().clamp_min(0.01)).item() for key in ours)


@pytest.mark.slow
def test_two_processes_and_accumulation_are_one_larger_batch(adder_folder, cnn_folder, tmp_path):
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    for launcher, name in (((), "one"), (LAUNCHER, "two")):
        command = [sys.executable, *launcher, str(SCRIPT), str(adder_folder), str(tmp_path / name)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=400)
        assert done.returncode == 0, done.stderr
    one = tmp_path / "one" / "step"
    for other in (tmp_path / "one" / "accumulated", tmp_path / "two" / "step", tmp_path / "two" / "accumulated"):
        for name in ("model.safetensors", "state/model_1.safetensors"):
            assert largest_difference(other, one, name) < 1e-9  # all in fp64, so that rounding stays small
    before = load_file(cnn_folder / "model.safetensors")["features.4.conv1.weight"]
    after = load_file(one / "last" / "state" / "model_1.safetensors")
    assert (after["teacher.model.features.4.conv1.weight"] - before).abs().max() > 0.001
    heads = [value for key, value in after.items() if "heads" in key]
    assert len(heads) == 2
    assert all((head.flatten(1) - torch.eye(len(head))).abs().max() > 1e-5 for head in heads)  # not the identity
