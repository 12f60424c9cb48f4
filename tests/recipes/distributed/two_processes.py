"""Runs that ``test_processes.py`` compares; ``run_processes`` starts it."""

import os
import runpy
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from torch import nn

from adderkit.convert.checkpoint import configuration
from adderkit.convert.checkpoint import folder as saving
from adderkit.convert.model_source import ModelSource
from adderkit.recipes.configs.files import load_recipe
from adderkit.recipes.runs.folder import RunFolder
from adderkit.recipes.runs.progress import ProgressBar
from adderkit.recipes.runs.signals import Interrupted
from adderkit.recipes.training import assemble, epoch
from adderkit.recipes.training import run as finetune
from adderkit.recipes.training.adaptive_rate import rescale_
from adderkit.recipes.training.models import Job, build_student

in_double = runpy.run_path(str(Path(__file__).parents[1] / "double_precision.py"))["in_double"]
install_cpu_sync_batchnorm = runpy.run_path(str(Path(__file__).with_name("cpu_sync_batchnorm.py")))["install"]

# 20 steps of 16 images in all, augmented.
SETTINGS = {
    "dataset": "digits",
    "epochs": 1,
    "train_images": 320,
    "bn_images": 0,
    "workers": 0,
    "crop_padding": 1,
    "opt": "momentum",
}
# Adder weights move far, the others little.
FAR = {"lr": 0.0005, "eta": 8.0}


def batch_independent(job, recipe, **options):
    """The student with GroupNorm for BatchNorm, so that the gradient of a batch is the mean of its parts' gradients."""
    model = build_student(job, recipe, **options)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, nn.GroupNorm(1, module.num_features))
    return model


class RateInBackward:
    """AdderNet's published way: each process rescales its own gradient within backward, before the all-reduce."""

    def __init__(self, optimizer, model, eta):
        for module in model.modules():
            if type(module).__name__ == "AdderConv2d":
                module.weight.register_hook(lambda grad: self.rescaled(grad, eta))

    def rescaled(self, grad, eta):
        grad = grad.clone()
        rescale_(grad, eta)
        return grad


def train(kind, adder, place, processes, build=batch_independent, **more):
    """One run of a kind, its global batch the same for any number of processes."""
    recipe = load_recipe("distill").changed({**SETTINGS, "batch_size": 16 // processes, **more})
    assemble.build_student, assemble.build_teacher = in_double(build), in_double(build_teacher)
    # What timm builds has other normalizations.
    configuration.check_rebuilds = saving.check_rebuilds = lambda *_: None
    assemble.AdaptiveRate = RateInBackward if kind == "backward" else AdaptiveRate
    finetune.start(Job(ModelSource(adder)), recipe, RunFolder(Path(place) / kind))


AdaptiveRate, build_teacher, load = assemble.AdaptiveRate, assemble.build_teacher, finetune.load


def killed(kind, adder, place, processes):
    """Cut off in the seventh step on all processes, saved after every third."""
    step = ProgressBar.step

    def stopping(self, *args, **kwargs):
        if self.done == 7:
            raise KeyboardInterrupt
        step(self, *args, **kwargs)

    ProgressBar.step = stopping
    try:
        train(kind, adder, place, processes, clip_grad=1.0, save_every=3, **FAR)
    except KeyboardInterrupt:
        ProgressBar.step = step


def resumed(kind, adder, place):
    """To the end."""
    # The saved model has GroupNorm, which a saved configuration does not tell.
    finetune.load = lambda folder: in_double(batch_independent)(
        Job(ModelSource(adder)), load_recipe("distill").changed({**SETTINGS, **FAR})
    )
    assemble.build_teacher = in_double(build_teacher)
    finetune.resume(RunFolder(Path(place) / kind))


def stopped_in_the_last_step(place):
    """Of the first of two epochs, by a signal to one process; and the same run without a stop."""
    recipe = load_recipe("cnn").changed({**SETTINGS, "epochs": 2, "train_images": 64, "batch_size": 16})
    recipe = recipe.changed({"grad_checkpointing": True})
    job, folder = Job(ModelSource(str(Path(place) / "net"))), RunFolder(Path(place) / "stopped")
    finetune.start(job, recipe, RunFolder(Path(place) / "through"))
    step, rank = epoch._step, int(os.environ["RANK"])

    def stopping(run, state, statistics, losses, images, stop):
        stop.requested |= rank == 1 and (state.epoch, state.batches_done) == (0, 1)
        return step(run, state, statistics, losses, images, stop)

    epoch._step = stopping
    try:
        finetune.start(job, recipe, folder)
    except Interrupted:
        epoch._step = step
    finetune.load = load
    finetune.resume(folder)


def taught_by_what_was_kept(adder, place):
    """Cut off after the first of two epochs, and resumed when the teacher is gone; and the same run without that.

    As on two machines, only the first process sees the folders of the runs.
    """
    own, teacher = Path(place) / os.environ["RANK"], Path(place) / "teacher"
    own.mkdir()
    os.chdir(own)
    recipe = load_recipe("distill").changed({**SETTINGS, "epochs": 2, "train_images": 64, "batch_size": 16})
    job, folder = Job(ModelSource(adder), teacher=str(teacher)), RunFolder("stopped")
    finetune.start(job, recipe, RunFolder("through"))
    train_epoch = finetune.train_epoch

    def stopping(run, state, *rest):
        if state.epoch == 1:
            raise KeyboardInterrupt
        train_epoch(run, state, *rest)

    finetune.train_epoch = stopping
    try:
        finetune.start(job, recipe, folder)
    except KeyboardInterrupt:
        finetune.train_epoch = train_epoch
    PartialState().wait_for_everyone()
    if PartialState().is_main_process:
        shutil.rmtree(teacher)
    PartialState().wait_for_everyone()
    finetune.resume(folder)


def main(environment, adder, place, what="all"):
    """All runs of one of the processes; or the rest of one that two processes began; or those with a teacher."""
    os.environ.update(environment)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(1)
    install_cpu_sync_batchnorm()
    Accelerator.end_training = lambda self: None  # it would end the process group that the next run needs
    if what == "continue":
        resumed("handed", adder, place)
        return
    if what == "teacher":
        taught_by_what_was_kept(adder, place)
        return
    train("step", adder, place, processes, clip_grad=1.0, **FAR)
    train("backward", adder, place, processes, **FAR)
    # At a rate that makes much of the clipping.
    steep = {"lr": 0.3, "sync_bn": True, "model_ema": True}
    train("synced", adder, place, processes, build_student, clip_grad=0.1, **steep)
    if processes == 1:
        train("unclipped", adder, place, processes, build_student, **steep, clip_grad=0.0)
        train("accumulated", adder, place, 2, clip_grad=1.0, grad_accum_steps=2, **FAR)
    else:
        killed("resumed", adder, place, processes)
        resumed("resumed", adder, place)
        killed("handed", adder, place, processes)
        assemble.build_student = build_student
        assemble.build_teacher = build_teacher
        recipe = load_recipe("cnn").changed({**SETTINGS, **FAR, "train_images": 64, "batch_size": 16})
        job = Job(ModelSource("cifar_resnet20", pretrained=False))
        finetune.start(job, recipe, RunFolder(Path(place) / "batchnorm"))
        stopped_in_the_last_step(place)


if __name__ == "process":
    main(*globals()["arguments"])
