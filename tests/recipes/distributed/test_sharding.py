"""Weights divided among processes by FSDP2: the adaptive rate and the loop are those of one process."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from adderkit import AdaptiveRate, AdderConv2d
from adderkit.convert.errors import AdderkitError, RecipeError
from adderkit.recipes.configs.recipe import Recipe
from adderkit.recipes.distributed.sharding import check_sharding, refuse_second_model

SCRIPT = Path(__file__).with_name("sharded.py")


@pytest.fixture(scope="module")
def place(tmp_path_factory, adder_folder, run_processes):
    folder = tmp_path_factory.mktemp("sharded")
    for processes in (1, 2):
        run_processes(SCRIPT, processes, str(folder), str(adder_folder))
    return folder


@pytest.mark.parametrize("way", ["torch", "accelerate"])
def test_the_adaptive_rate_takes_the_norm_of_the_whole_layer(place, way):
    """Twenty steps; one layer has three filters for two processes, one has a single filter."""
    plain, sharded = (torch.load(place / f"{name}.pt", weights_only=True) for name in ("plain", way))
    assert plain.keys() == sharded.keys()
    for name, value in plain.items():
        torch.testing.assert_close(sharded[name], value, rtol=1e-4, atol=1e-5)


def weights(folder, name="last"):
    return load_file(folder / name / "model.safetensors")


@pytest.mark.parametrize("kept", ["last", "best"])
def test_a_sharded_run_saves_the_whole_model(place, kept):
    whole, sharded = weights(place / "whole", kept), weights(place / "sharded", kept)
    assert whole.keys() == sharded.keys()
    for name, value in whole.items():
        if "running" not in name and not name.endswith("tracked"):  # measured on each process's smaller batches
            torch.testing.assert_close(sharded[name], value, rtol=1e-5, atol=1e-6)


def test_a_sharded_run_resumes_exactly(place):
    straight, resumed = weights(place / "sharded"), weights(place / "resumed")
    assert [name for name, value in straight.items() if not value.equal(resumed[name])] == []
    assert (place / "sharded" / "summary.csv").read_text() == (place / "resumed" / "summary.csv").read_text()


@pytest.mark.parametrize(
    ("kind", "name"), [(DistributedType.DEEPSPEED, "DeepSpeed"), (DistributedType.FSDP, "the first FSDP")]
)
def test_flat_partitions_are_refused(kind, name):
    accelerator = SimpleNamespace(distributed_type=kind, is_fsdp2=False)
    with pytest.raises(RecipeError, match=rf"set up for {name}, expected DDP or FSDP2.*--fsdp_version 2"):
        check_sharding(accelerator)


def test_a_moving_average_is_refused_where_the_model_is_divided():
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=True)
    check_sharding(accelerator)
    refuse_second_model(accelerator, Recipe(), "model_ema")
    with pytest.raises(RecipeError, match=r"model_ema is True, expected it off under FSDP2.*--set model_ema=false"):
        refuse_second_model(accelerator, Recipe(model_ema=True), "teacher_lr", "model_ema")


def test_an_optimizer_of_flat_copies_is_noticed():
    layer = AdderConv2d(3, 2, 3)
    flat = torch.nn.Parameter(layer.weight.detach().flatten())
    optimizer = torch.optim.SGD([flat], lr=0.1)
    AdaptiveRate(optimizer, layer)
    with pytest.raises(AdderkitError, match=r"none of the adder layers' weights.*DDP or FSDP2"):
        optimizer.step()
