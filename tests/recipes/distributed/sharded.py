"""What ``test_sharding.py`` runs in several processes, and in one to compare with."""

import os
import runpy
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import fully_shard

from adderkit import AdaptiveRate, AdderConv2d
from adderkit.convert.model_source import ModelSource
from adderkit.recipes.configs.files import load_recipe
from adderkit.recipes.runs.folder import RunFolder
from adderkit.recipes.training import assemble
from adderkit.recipes.training import run as finetune
from adderkit.recipes.training.models import Job

in_double = runpy.run_path(str(Path(__file__).parents[1] / "double_precision.py"))["in_double"]
install_cpu_sync_batchnorm = runpy.run_path(str(Path(__file__).with_name("cpu_sync_batchnorm.py")))["install"]


def network():
    """Three filters and one, so that two processes get uneven shards and an empty one; two terms."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3), AdderConv2d(4, 3, 3), nn.GroupNorm(1, 3), AdderConv2d(3, 1, 1, terms=2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(9, 3))


def batches(rank, processes):
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        images = torch.randn(8, 3, 7, 7, generator=generator)
        labels = torch.randint(0, 3, (8,), generator=generator)
        yield images.chunk(processes)[rank], labels.chunk(processes)[rank]


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def plain(place):
    """One process by itself; the reference of both ways to shard."""
    model = network()
    optimizer = optimizer_of(model)
    AdaptiveRate(optimizer, model)
    for images, labels in batches(0, 1):
        nn.functional.cross_entropy(model(images), labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    torch.save(model.state_dict(), Path(place) / "plain.pt")


def by_torch(place, rank, processes):
    """``fully_shard`` as its manual has it: each layer, then the model, then the optimizer."""
    PartialState(cpu=True)
    model = network()
    for layer in model:
        if isinstance(layer, AdderConv2d):
            fully_shard(layer)
    fully_shard(model)
    optimizer = optimizer_of(model)
    AdaptiveRate(optimizer, model)
    for images, labels in batches(rank, processes):
        nn.functional.cross_entropy(model(images), labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    state = {name: value.full_tensor() for name, value in model.state_dict().items()}
    if rank == 0:
        torch.save(state, Path(place) / "torch.pt")


def sharding_on_the_cpu():
    """accelerate takes FSDP for GPUs only, although torch has it on the CPU too."""
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    os.environ.pop("ACCELERATE_USE_CPU", None)


def by_accelerate(place, rank, processes):
    """The adaptive rate is there before ``prepare`` puts other weights into model and optimizer."""
    sharding_on_the_cpu()
    model = network()
    optimizer = optimizer_of(model)
    AdaptiveRate(optimizer, model)
    accelerator = Accelerator(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))
    model, optimizer = accelerator.prepare(model, optimizer)
    for images, labels in batches(rank, processes):
        accelerator.backward(nn.functional.cross_entropy(model(images), labels))
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    state = accelerator.get_state_dict(model)
    if rank == 0:
        torch.save(state, Path(place) / "accelerate.pt")


def runs(place, adder, processes, sharded):
    """A run of the loop, and on several processes the same again, stopped and resumed."""
    changes = {"dataset": "digits", "epochs": 1, "train_images": 64, "bn_images": 32, "workers": 0, "sync_bn": True}
    changes |= {"opt": "momentum", "lr": 0.3, "clip_grad": 0.1, "batch_size": 16 // processes}
    recipe = load_recipe("distill").changed(changes)
    for module, name in ((assemble, "build_student"), (finetune, "load"), (assemble, "build_teacher")):
        setattr(module, name, in_double(getattr(module, name)))
    name = "sharded" if sharded else "whole"
    if sharded:
        sharding_on_the_cpu()
        os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_CPU_RAM_EFFICIENT_LOADING="false")
    Accelerator.end_training = lambda self: None  # it would end the process group that the next run needs
    finetune.start(Job(ModelSource(adder)), recipe, RunFolder(Path(place) / name))
    if not sharded:
        return
    folder = RunFolder(Path(place) / "resumed")
    finish = finetune._finish_epoch

    def stopping(*arguments):
        raise KeyboardInterrupt

    finetune._finish_epoch = stopping
    try:
        finetune.start(Job(ModelSource(adder)), recipe.changed({"save_every": 2}), folder)
    except KeyboardInterrupt:
        finetune._finish_epoch = finish
    finetune.resume(folder)


def main(environment, place, adder):
    """All of it, once for this process."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    install_cpu_sync_batchnorm()
    processes, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if processes == 1:
        plain(place)
        runs(place, adder, 1, False)
    else:
        by_torch(place, rank, processes)
        by_accelerate(place, rank, processes)
        AcceleratorState._reset_state()
        runs(place, adder, processes, True)


if __name__ == "process":
    main(*globals()["arguments"])
