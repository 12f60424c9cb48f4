"""The record of an integer network, from which it is built again without the model that it was made from."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ...adder_layers.integer.network import IntegerNetwork
from ...adder_layers.integer.record import empty_plan, structure_of
from ..errors import AdderkitError, CheckpointError
from .config import QuantizeConfig
from .fake_quantize import FakeQuantized

STEP = "quantize"
STEP_VERSION = 1


def quantize_step(network: IntegerNetwork, config: QuantizeConfig) -> dict[str, Any]:
    """The record, JSON-ready; the tensors are saved as the network's buffers."""
    stem, head = (None if layer is None else _arguments(layer) for layer in (network.stem, network.head))
    plan = {**structure_of(network.plan), "stem": stem, "head": head}
    return {"step": STEP, "version": STEP_VERSION, "config": config.to_dict(), "plan": plan}


def network_from(step: Mapping[str, Any]) -> IntegerNetwork:
    """The network of a recorded ``quantize`` step, its tensors zero until they are loaded.

    Raises:
        CheckpointError: The record is malformed.
    """
    if step.get("version") != STEP_VERSION:
        raise CheckpointError(
            f"the {STEP!r} step has version {step.get('version')!r:.40}, expected {STEP_VERSION}: "
            "install a newer adderkit"
        )
    form = step.get("plan")
    try:
        QuantizeConfig.from_dict(step.get("config") or {})
        plan = empty_plan(form)
        assert isinstance(form, Mapping)
        stem, head = (_layer(form.get(name), name) for name in ("stem", "head"))
        return IntegerNetwork(plan, stem, head)  # type: ignore[arg-type]
    except (AdderkitError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the {STEP!r} step does not hold a network: {error}") from error


def refuse_integers(model: nn.Module, what: str, *, imitated: bool = False) -> None:
    """Refuse a network that is integers already.

    Args:
        model: Any model.
        what: What it cannot be, and the remedy.
        imitated: Refuse a network that is trained for integers, too.

    Raises:
        AdderkitError: It is such a network.
    """
    if isinstance(model, IntegerNetwork):
        raise AdderkitError(f"the model is quantized and cannot be {what}")
    if imitated and isinstance(model, FakeQuantized):
        raise AdderkitError(f"the model is trained for integers and cannot be {what}")


def _arguments(layer: nn.Module) -> dict[str, Any]:
    """What a layer is built with, JSON-ready."""
    if isinstance(layer, nn.Linear):
        return {"in_features": layer.in_features, "out_features": layer.out_features}
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    return {name: list(value) if isinstance(value := getattr(layer, name), tuple) else value for name in names}


def _layer(arguments: Any, name: str) -> nn.Module | None:
    """A convolution or linear layer from its recorded arguments."""
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
