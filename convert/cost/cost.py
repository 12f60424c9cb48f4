"""Cost of any network: chooses the way of counting that fits the kind of network."""

from collections.abc import Sequence

from torch import Tensor, nn

from ...adder_layers.integer.network import IntegerNetwork
from ..quantization.fake_quantize import FakeQuantized
from ..wrappers import unwrapped
from .count import float_cost
from .integer import integer_cost
from .report import Cost


def cost(model: nn.Module, example_input: Tensor | Sequence[int] | None = None) -> Cost:
    """Count the cost of one forward pass for one image, and its cost in the CNN of the same shape.

    Computations that depend on the weights alone are done once, not for each image, and are not counted. A
    fake-quantized model counts as the float network that it was made from.

    Args:
        model: Any model, converted or not. It is left untouched.
        example_input: Image batch ``[N, C, H, W]`` or size ``(C, H, W)`` of an image; needed only for models without a
            timm configuration.

    Returns:
        The cost of each layer in order of execution. Their total is ``honest``; the papers' count is ``headline``.

    Raises:
        AdderkitError: If the model cannot run on the input.

    Example:
        >>> found = adderkit.cost(model)
        >>> found.multiplications, found.honest_before.multiplications
        >>> [layer.path for layer in found.layers if layer.kind == "adder"]
    """
    model = unwrapped(model)
    if isinstance(model, IntegerNetwork):
        return integer_cost(model)
    if isinstance(model, FakeQuantized):
        model = model.float_model()  # values are rounded only in training
    return float_cost(model, example_input)
