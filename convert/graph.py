"""How a model runs: the order of its weight layers, and what each convolution's output goes into.

Forward hooks record which module received the very tensor that a convolution returned. That works for any model that
runs, traced or not. The pass is made on a copy whose tensors are ``meta`` (shapes only), so it costs no arithmetic
and no memory; a model that cannot run on ``meta`` is run as it is.
"""

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import AdderkitError
from .modes import evaluation_mode
from .placement import model_dtype, placed


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution or linear layer as it was met in a forward pass.

    Args:
        path: Its name in the model; of a shared module, the first.
        input_shape: Shape of its first input, ``[N, C, H, W]`` for a convolution.
        output_shape: Shape of its first output.
        calls: How often a forward pass calls it.
        consumers: Paths of the modules that take its output unchanged.
    """

    path: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    calls: int
    consumers: tuple[str, ...]


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """``(channels, height, width)`` of the images a model expects, from its timm configuration.

    Raises:
        AdderkitError: The model carries no such configuration.
    """
    if not getattr(model, "pretrained_cfg", None):
        raise AdderkitError(
            f"{type(model).__name__} does not say what images it takes (no timm pretrained_cfg); "
            "give an example_input of shape [N, C, H, W]"
        )
    from timm.models import (
        get_model_input_config,  # here: timm's import brings in our registry, which needs this module
    )

    size: tuple[int, int, int] = get_model_input_config(model)["input_size"]
    return size


def trace_layers(model: nn.Module, example_input: Tensor | None = None) -> list[Layer]:
    """Run the model once and list its ``Conv2d`` and ``Linear`` layers in order of first execution.

    Args:
        model: Any module that takes one image batch. It is left untouched.
        example_input: ``[N, C, H, W]``; by default zeros of the size in the model's timm configuration.

    Returns:
        A layer for each distinct module that ran.

    Raises:
        AdderkitError: The model cannot run on the input.
    """
    if example_input is None:
        example_input = torch.zeros(1, *input_size(model))
    try:
        return _record(_meta_copy(model), example_input.to("meta", model_dtype(model)))
    except Exception:
        # Some models cannot be copied, compute sizes from values or keep plain tensors; those run only for real.
        pass
    try:
        with evaluation_mode(model):
            return _record(model, placed(example_input, model))
    except Exception as error:
        raise AdderkitError(
            f"{type(model).__name__} cannot run on an input of shape {tuple(example_input.shape)}: {error}; "
            "give an example_input that fits"
        ) from error


def _meta_copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose parameters and buffers have shapes but no storage."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    for module in model.modules():
        # Hooks stay behind: they belong to the user, not to a dry run, and may hold what cannot be copied.
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            memo[id(hooks)] = OrderedDict()
    return copy.deepcopy(model, memo).eval()


@torch.no_grad()
def _record(model: nn.Module, example_input: Tensor) -> list[Layer]:
    names = {module: name for name, module in model.named_modules()}
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    calls: dict[str, int] = {}
    # A tensor is kept alive, or its id might be used again; its version tells whether it was changed in place since.
    produced: dict[int, tuple[Tensor, int, str]] = {}
    consumers: dict[str, list[str]] = {}

    def before(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        # Containers pass a tensor on before their children see it; only what computes can consume.
        if isinstance(module, nn.Identity) or (any(module.children()) and not is_normalisation(module)):
            return
        for value in (*inputs, *named.values()):
            tensor, version, source = produced.get(id(value), (None, 0, ""))
            if tensor is not None and tensor._version == version:
                takers = consumers.setdefault(source, [])
                if names[module] not in takers:
                    takers.append(names[module])

    def after(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear) and isinstance(output, Tensor):
            name = names[module]
            first = next(iter((*inputs, *named.values())))
            shapes.setdefault(name, (tuple(first.shape), tuple(output.shape)))
            calls[name] = calls.get(name, 0) + 1
            produced[id(output)] = (output, output._version, name)

    with _hooks(model, before, after):
        model(example_input)
    return [Layer(name, *shapes[name], calls[name], tuple(consumers.get(name, ()))) for name in shapes]


def is_normalisation(module: nn.Module) -> bool:
    """Whether the module re-centres and re-scales its input by statistics that follow the input."""
    batch = nn.modules.batchnorm._NormBase
    return isinstance(module, batch | nn.GroupNorm | nn.LayerNorm)


@contextmanager
def _hooks(model: nn.Module, before: Callable[..., None], after: Callable[..., None]) -> Iterator[None]:
    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
