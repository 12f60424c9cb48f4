"""Serialize an integer network as a ``quantize`` transform, which rebuilds it without the model it was made from."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ...adder_layers.integer.network import IntegerNetwork
from ...adder_layers.integer.record import empty_plan, structure_of
from ..errors import AdderkitError, CheckpointError
from ..record import Transform, check_version
from .config import QuantizeConfig

QUANTIZE = "quantize"
VERSION = 1


def quantize_transform(network: IntegerNetwork, config: QuantizeConfig) -> Transform:
    """Return the transform, JSON-ready; the tensors are saved as the network's buffers."""
    stem, head = (None if layer is None else _arguments(layer) for layer in (network.stem, network.head))
    plan = {**structure_of(network.plan), "stem": stem, "head": head}
    return {"kind": QUANTIZE, "version": VERSION, "config": config.to_dict(), "plan": plan}


def check_quantize(transform: Mapping[str, Any]) -> None:
    """Reject a ``quantize`` transform of an unknown version; ``network_from`` checks everything else.

    Raises:
        CheckpointError: The version is unknown.
    """
    check_version(transform, VERSION)


def network_from(transform: Mapping[str, Any]) -> IntegerNetwork:
    """Build the network of a recorded ``quantize`` transform; its tensors are zero until they are loaded.

    Raises:
        CheckpointError: The transform is malformed.
    """
    structure = transform.get("plan")
    try:
        QuantizeConfig.from_dict(transform.get("config") or {})
        plan = empty_plan(structure)
        assert isinstance(structure, Mapping)
        stem, head = (_layer(structure.get(name), name) for name in ("stem", "head"))
        return IntegerNetwork(plan, stem, head)  # type: ignore[arg-type]
    except (AdderkitError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the {QUANTIZE!r} transform does not describe a network: {error}") from error


def _arguments(layer: nn.Module) -> dict[str, Any]:
    """Return the arguments that construct a layer, JSON-ready."""
    if isinstance(layer, nn.Linear):
        return {"in_features": layer.in_features, "out_features": layer.out_features}
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    return {name: list(value) if isinstance(value := getattr(layer, name), tuple) else value for name in names}


def _layer(arguments: Any, name: str) -> nn.Module | None:
    """Construct a convolution or linear layer from its recorded arguments; ``None`` without any."""
    if arguments is None:
        return None
    wanted = _arguments(nn.Conv2d(1, 1, 1) if name == "stem" else nn.Linear(1, 1))
    if not isinstance(arguments, Mapping) or set(arguments) != set(wanted):
        raise ValueError(f"{name} is {arguments!r:.80}, expected {', '.join(wanted)}")
    for key, value in arguments.items():
        numbers = value if isinstance(wanted[key], list) else [value]
        least = 0 if key == "padding" else 1
        if not isinstance(numbers, list) or not all(type(each) is int and least <= each < 1 << 24 for each in numbers):
            raise ValueError(f"{key} of {name} is {value!r:.80}, expected whole numbers of at least {least}")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
    layer: nn.Module = nn.Conv2d(**values) if name == "stem" else nn.Linear(**values)  # type: ignore[arg-type]
    return layer.requires_grad_(False)
