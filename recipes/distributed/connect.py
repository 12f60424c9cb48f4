"""Connection of the processes of a run, checked against what the launcher said."""

import os

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from ...convert.errors import RecipeError


def connect() -> PartialState:
    """Connect this process to the others of its run, if there are others.

    Raises:
        RecipeError: There are fewer GPUs than processes on this machine, or the launcher's processes do not find each
            other, so that each would train by itself.
    """
    world, local = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    devices = torch.accelerator.device_count()
    if world > 1 and not devices:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # without it, accelerate treats each process as a separate run
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    if world > 1 and local > devices and not on_cpu:
        raise RecipeError(
            f"there are {local} processes on this machine, expected at most {devices}, the number of GPUs; "
            f"give --num-processes {devices} or fewer"
        )
    state = PartialState(cpu=on_cpu)
    if state.num_processes != world:
        raise RecipeError(
            f"WORLD_SIZE is {world}, but accelerate finds {state.num_processes} processes; start them with "
            "--num-processes N, accelerate launch or torchrun, which also set RANK, LOCAL_RANK and MASTER_ADDR"
        )
    return state
