"""AdderNet's adaptive local learning rate, applied between clipping and the optimizer's step.

The published code rescales inside autograd's backward. There the gradient no longer scales with the loss (loss scaling
in fp16 starves the layer), every micro-batch is normalized on its own, and so is every replica. Here the whole,
final gradient of the step is rescaled once: after the all-reduce, after unscaling, after clipping. With sharded weights
(FSDP2), the norm is still that of the whole layer.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...convert.conversion.targets import converted_layers
from ...convert.errors import AdderkitError
from ..distributed.sharding import full_tensor, local_part


class AdaptiveRate:
    """Scale the gradient of every adder layer to norm ``eta · sqrt(k)`` just before each optimizer step.

    ``alpha = eta · sqrt(k) / ||grad||₂``, k the number of elements of the whole layer's weight (AdderNet, arXiv
    1912.13200, equations 12 and 13). So the root mean square of the gradient is ``eta``, whatever the loss scale.
    Works with any ``torch.optim`` or timm optimizer, also inside accelerate's wrapper and with a gradient scaler, with
    DDP and with FSDP2 (``fully_shard``), and may be made before or after these. It does not work where weights are
    flattened into one tensor, as by DeepSpeed's ZeRO and the first FSDP: the layers cannot be told apart there.

    Example:
        >>> model = timm.create_model("resnet18")
        >>> adderkit.convert_(model)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> adderkit.AdaptiveRate(optimizer, model)
        >>> torch.nn.functional.cross_entropy(model(images), labels).backward()
        >>> optimizer.step()  # each adder layer's gradient has a root mean square of 0.2

    Args:
        optimizer: Optimizer whose steps use the rescaled gradients.
        model: Model whose adder layers are rescaled; or their weights themselves, once they are sharded.
        eta: Root mean square of the rescaled gradient: 0.2 in the authors' code for ResNets, 0.1 in the paper for
            LeNet-5.

    Raises:
        ValueError: ``eta`` is not positive, or there is no adder layer.
        AdderkitError: At a step, where the optimizer's parameters are not the layers' weights.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, model: nn.Module | Iterable[nn.Parameter], eta: float = 0.2
    ) -> None:
        if not eta > 0:
            raise ValueError(f"eta is {eta}, expected a positive number such as 0.2")
        if isinstance(model, nn.Module):
            layers = list(converted_layers(model, "adaptive_rate").values())
            self._weights = lambda: [layer.weight for layer in layers]  # fully_shard gives them other ones
        else:
            given: list[Tensor] = list(model)
            self._weights = lambda: given
        if not self._weights():
            raise ValueError("the model has no adder layer, so there is no gradient to rescale; convert it first")
        self.eta = eta
        # timm's Lookahead steps through the optimizer inside it and never calls hooks of its own.
        stepping = getattr(optimizer, "_base_optimizer", optimizer)
        self._handle: RemovableHandle = stepping.register_step_pre_hook(self._before_step)

    def remove(self) -> None:
        """Detach from the optimizer."""
        self._handle.remove()

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        weights = self._weights()
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not any(id(weight) in known for weight in weights):
            raise AdderkitError(
                "the optimizer steps on none of the adder layers' weights, expected the weights themselves: give "
                "AdaptiveRate the model and its optimizer, and train with DDP or FSDP2; DeepSpeed's ZeRO and the first "
                "FSDP step on flat copies, in which layers cannot be told apart"
            )
        # A fused optimizer divides by the loss scale itself, in the step that follows.
        pending = getattr(optimizer, "grad_scale", None)
        for weight in weights:
            if weight.grad is not None:
                rescale_(weight.grad, self.eta)
                if pending is not None:
                    local_part(weight.grad).mul_(pending)


def rescale_(grad: Tensor, eta: float) -> None:
    """Scale a gradient in place to norm ``eta · sqrt(k)``; one that is nearly zero stays so, as in the authors' code.

    Args:
        grad: Gradient of a whole weight, k elements; where it is sharded, called on all processes.
        eta: Root mean square afterwards.
    """
    wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
    norm = full_tensor(torch.linalg.vector_norm(wide)).clamp_min(1e-12)
    local_part(grad).copy_(local_part(wide) * (eta * grad.numel() ** 0.5 / norm))
