"""Weights that are divided among processes: what the loop needs of them whole, and what it cannot do with them."""

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.tensor import DTensor

from ...convert.errors import RecipeError
from ..configs.recipe import Recipe

_FLAT = {DistributedType.DEEPSPEED: "DeepSpeed", DistributedType.MEGATRON_LM: "Megatron-LM"}


def held(tensor: Tensor) -> Tensor:
    """What this process has of a tensor that may be divided among several."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be divided, gathered or summed up; called on all processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_sharding(recipe: Recipe, accelerator: Accelerator) -> None:
    """Refuse what accelerate may be configured for and the loop does not do.

    Raises:
        RecipeError: Weights are divided by another means than FSDP2, or the recipe wants a second model beside it.
    """
    kind = _FLAT.get(accelerator.distributed_type)
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        kind = "the first FSDP"
    if kind is not None:
        raise RecipeError(
            f"accelerate is set up for {kind}, expected DDP or FSDP2: the adaptive rate needs the gradient of each "
            "layer for itself, and flat partitions have none; start with --num-processes N, or with accelerate launch "
            "--use_fsdp --fsdp_version 2"
        )
    if accelerator.is_fsdp2:
        for name in ("model_ema", "teacher_lr"):
            if getattr(recipe, name):
                raise RecipeError(
                    f"{name} is {getattr(recipe, name)}, expected it off under FSDP2, which divides one model only; "
                    f"start with --num-processes N instead, or --set {name}=0"
                )
