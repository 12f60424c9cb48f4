"""Sharded weights: access to local parts and full tensors, and what cannot be combined with sharding."""

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.tensor import DTensor

from ...convert.errors import RecipeError
from ..configs.recipe import Recipe

_FLAT = {DistributedType.DEEPSPEED: "DeepSpeed", DistributedType.MEGATRON_LM: "Megatron-LM"}


def local_part(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor that may be sharded, gathered or reduced; called on all processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_sharding(accelerator: Accelerator) -> None:
    """Refuse ways to shard weights that accelerate may be configured for and the training loop does not support.

    Raises:
        RecipeError: Weights are sharded by other means than FSDP2.
    """
    kind = _FLAT.get(accelerator.distributed_type)
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        kind = "the first FSDP"
    if kind is not None:
        raise RecipeError(
            f"accelerate is set up for {kind}, expected DDP or FSDP2: the adaptive rate needs the gradient of each "
            "layer by itself, which flat partitions do not keep apart; start with --num-processes N, or with "
            "accelerate launch --use_fsdp --fsdp_version 2"
        )


def refuse_second_model(accelerator: Accelerator, recipe: Recipe, *names: str) -> None:
    """Refuse, where weights are sharded, settings that need a second model beside the one in training.

    Args:
        accelerator: The accelerator of the run.
        recipe: All settings.
        names: Keys of the recipe that need a second model where they are not 0.

    Raises:
        RecipeError: One of them is on.
    """
    for name in names:
        value = getattr(recipe, name)
        if accelerator.is_fsdp2 and value:
            off = "false" if value is True else "0"
            raise RecipeError(
                f"{name} is {value}, expected it off under FSDP2, which shards one model only; "
                f"start with --num-processes N instead, or --set {name}={off}"
            )
