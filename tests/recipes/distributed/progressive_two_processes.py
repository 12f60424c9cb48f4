"""Runs of pkkd that ``test_progressive_processes.py`` compares; started by accelerate, or as it is for one process."""

import os
import runpy
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from adderkit.convert.checkpoint import configuration
from adderkit.convert.checkpoint import folder as saving
from adderkit.convert.model_source import ModelSource
from adderkit.recipes.configs.files import load_recipe
from adderkit.recipes.objectives import kernels
from adderkit.recipes.runs.folder import RunFolder
from adderkit.recipes.training import assemble
from adderkit.recipes.training import run as finetune
from adderkit.recipes.training.models import Job

in_double = runpy.run_path(str(Path(__file__).parents[1] / "double_precision.py"))["in_double"]

SETTINGS = {
    "dataset": "digits",
    "epochs": 1,
    "train_images": 160,
    "bn_images": 0,
    "workers": 0,
    "crop_padding": 1,
    "hflip": 0.0,
    "adder_init": "keep",
    "lr": 0.01,
    "eta": 0.05,
    "clip_grad": 1.0,
    "sharpness": 1024.0,
    "teacher_lr": 0.02,
}


def batch_independent(model):
    """GroupNorm for BatchNorm, so that the gradient of a batch is the mean of its parts' gradients."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, nn.GroupNorm(1, module.num_features))
    return model


if __name__ == "__main__":
    adder, place = sys.argv[1:]
    processes = int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(1)
    Accelerator.end_training = lambda self: None
    build_student, build_teacher = assemble.build_student, assemble.build_teacher
    assemble.build_student = in_double(lambda *args, **kwargs: batch_independent(build_student(*args, **kwargs)))
    assemble.build_teacher = in_double(lambda *args, **kwargs: batch_independent(build_teacher(*args, **kwargs)))
    configuration.check_rebuilds = saving.check_rebuilds = lambda *_: None  # what timm builds has other normalizations
    make_objective = assemble._make_objective
    assemble._make_objective = lambda *args, **kwargs: make_objective(*args, **kwargs).double()  # the learned heads too
    # These two look at the batch of a process as a whole, as BatchNorm does.
    kernels._standardize = lambda values: values
    kernels._normalize = lambda values: values
    for kind, steps in (("step", 1), ("accumulated", 2)):
        recipe = load_recipe("pkkd").changed(
            {**SETTINGS, "batch_size": 16 // processes // steps, "grad_accum_steps": steps}
        )
        finetune.start(Job(ModelSource(adder)), recipe, RunFolder(Path(place) / kind))
