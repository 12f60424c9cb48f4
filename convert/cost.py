"""What a network costs for one image: multiplications, additions and parameters, layer by layer."""

import dataclasses
from typing import Any

from torch import Tensor, nn

from ..adder_layers.conv import AdderConv2d
from .graph import Layer, trace_layers


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """Operations of one convolution, adder or linear layer for one image.

    A product and its accumulation count as one multiplication and one addition; an L1 term as two additions, the
    subtraction and the accumulation (AdderNet, arXiv 1912.13200, tables 2 and 3).

    Args:
        path: Module path.
        cls: Class name.
        output_shape: ``(channels, height, width)``, or ``(features,)``.
        multiplications: For one image.
        additions: For one image.
        parameters: Number of parameters.
    """

    path: str
    cls: str
    output_shape: tuple[int, ...]
    multiplications: int
    additions: int
    parameters: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """Operations of all convolution, adder and linear layers, and all parameters of the model."""

    layers: tuple[LayerCost, ...]
    parameters: int

    @property
    def multiplications(self) -> int:
        """Multiplications for one image."""
        return sum(layer.multiplications for layer in self.layers)

    @property
    def additions(self) -> int:
        """Additions for one image."""
        return sum(layer.additions for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return {
            "multiplications": self.multiplications,
            "additions": self.additions,
            "parameters": self.parameters,
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
        }


def cost(model: nn.Module, example_input: Tensor | None = None) -> Cost:
    """Count the operations of one forward pass of one image.

    Args:
        model: Any model; one from timm says itself what images it takes.
        example_input: ``[1, C, H, W]``, for models that do not.

    Returns:
        A row for each layer in order of execution. Normalisations and activations are not counted, as in the papers.

    Raises:
        AdderkitError: The model cannot run on the input.
    """
    modules = dict(model.named_modules())
    rows = [_layer_cost(modules[layer.path], layer) for layer in trace_layers(model, example_input)]
    return Cost(tuple(rows), sum(parameter.numel() for parameter in model.parameters()))


def _layer_cost(module: nn.Module, layer: Layer) -> LayerCost:
    assert isinstance(module, nn.Conv2d | nn.Linear)
    shape = layer.output_shape[1:]
    if isinstance(module, nn.Conv2d):
        terms = layer.calls * shape[-1] * shape[-2] * module.weight.numel()
    else:
        positions = 1
        for size in shape[:-1]:
            positions *= size
        terms = layer.calls * positions * module.weight.numel()
    adder = isinstance(module, AdderConv2d)
    return LayerCost(
        path=layer.path,
        cls=type(module).__name__,
        output_shape=tuple(shape),
        multiplications=0 if adder else terms,
        additions=2 * terms if adder else terms,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
    )
