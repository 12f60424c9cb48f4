"""Run of a command line in several processes of one machine, with accelerate's launcher."""

import logging
import os

import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ...convert.errors import RecipeError

_OPTION = "--num-processes"


def launch(words: list[str], processes: int) -> int:
    """Run ``python -m adderkit WORDS`` in several processes of this machine, one per GPU, or on the CPU without GPUs.

    Args:
        words: The command line; ``--num-processes`` is removed from it.
        processes: Number of processes.

    Returns:
        The exit status: 0, or 1 if a process failed or a signal stopped them. The processes print the reason.

    Raises:
        RecipeError: If there are fewer GPUs than processes.
    """
    devices = torch.cuda.device_count()
    if devices and processes > devices:
        raise RecipeError(f"{_OPTION} is {processes}, expected at most {devices}, the number of GPUs")
    if not devices:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    # All given, so that a configuration file of accelerate does not change them; the recipe sets the precision.
    options = ["--multi_gpu", "--num_processes", str(processes), "--num_machines", "1"]
    options += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    arguments = launch_command_parser().parse_args([*options, "--module", "adderkit", *without_option(words)])
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes print their own errors
    try:
        launch_command(arguments)
    except (ChildFailedError, SignalException):
        return 1
    return 0


def without_option(words: list[str]) -> list[str]:
    """Return a command line without ``--num-processes N`` or ``--num-processes=N``."""
    kept, skip = [], False
    for word in words:
        if not skip and not word.startswith(_OPTION):
            kept.append(word)
        skip = word == _OPTION
    return kept
