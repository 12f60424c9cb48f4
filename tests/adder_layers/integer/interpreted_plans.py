"""Runs integer plans by the GPU engine under Triton's interpreter and prints one JSON line per plan.

A program of its own, as is ``../interpreted_checks.py``, for the same reason. Its arguments are names of random layers,
or ``network``.
"""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import random_plans
import torch

from adderkit.adder_layers.backends.triton import launch as gpu
from adderkit.adder_layers.integer import reference
from adderkit.adder_layers.integer.cuda_engine import CudaEngine
from adderkit.adder_layers.integer.plan import Adder

NETWORKS = {"residual_network": random_plans.residual_network, "plain_network": random_plans.plain_network}


def check(name):
    layer = random_plans.LAYERS.get(name)
    builder = random_plans.single(Adder, layer) if layer else NETWORKS[name]()
    plan, image = builder.plan(), builder.image()
    expected = reference.run(plan, image)
    actual = CudaEngine(plan, "cpu").run(image)
    same = actual.dtype == expected.dtype and torch.equal(actual, expected)
    print(json.dumps({"name": name, "same": same, "distinct": expected.unique().numel()}), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        if name == "in-parts":
            gpu.POSITION_LIMIT = 36
            check("residual-six-bits")
        else:
            check(name)
