"""List the weight layers of a model in order of execution, with the uses of their outputs.

A forward pass is observed, which works for any model that runs. It runs on a copy with ``meta`` tensors (shapes only),
so it needs no arithmetic and no memory; a model that cannot run on ``meta`` is run on real data. If ``torch.fx`` can
trace the model, the uses that it finds are added.
"""

import copy
import dataclasses
import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from timm.models import get_model_input_config
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import AdderkitError
from ..wrappers import timm_models_in
from .fx_uses import symbolic_uses
from .hooks import copy_feature_hooks
from .modes import eval_mode, model_dtype, move_like
from .observe import observe

_logger = logging.getLogger(__name__)
Kinds = tuple[type[nn.Module], ...]
WEIGHT_LAYERS: Kinds = (nn.Conv2d, nn.Linear)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution or linear layer as observed in a forward pass.

    Args:
        path: Path in the model; for a shared module, the first one.
        input_shape: Shape of the input in the first call, ``[N, C, H, W]`` for a convolution.
        output_shape: Shape of the output in the first call.
        calls: Number of calls in a forward pass.
        consumers: Paths of the modules that take the unchanged output.
        functions: Names of the functions and operators that take the unchanged output; ``output`` if the model
            returns it.
        weight_reader: Name of a function outside of the layer that takes a parameter of it; empty if none does.
    """

    path: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    calls: int
    consumers: tuple[str, ...]
    functions: tuple[str, ...] = ()
    weight_reader: str = ""


def is_feature_extractor(model: nn.Module) -> bool:
    """Return whether a model is one of timm's feature extractors (``features_only``), which return maps of features."""
    return hasattr(model, "feature_info") and not hasattr(model, "get_classifier")


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """Return ``(channels, height, width)`` of the images that a model expects, from its timm configuration.

    Raises:
        AdderkitError: If the model has no timm configuration.
    """
    if not getattr(model, "pretrained_cfg", None):
        held = timm_models_in(model)
        inside = f", or pass the timm model in it, .{held[0]}" if held else ""
        raise AdderkitError(
            f"{type(model).__name__} does not specify its input size (it has no timm pretrained_cfg); "
            f"give an example_input of shape [N, C, H, W]{inside}"
        )
    size: tuple[int, int, int] = get_model_input_config(model)["input_size"]
    return size


def trace_layers(
    model: nn.Module, example_input: Tensor | None = None, kinds: Kinds = WEIGHT_LAYERS, *, symbolic: bool = False
) -> list[Layer]:
    """Run the model once and list its ``Conv2d`` and ``Linear`` layers in order of first execution.

    Args:
        model: Any module that takes one image batch. It is left untouched.
        example_input: ``[N, C, H, W]``; by default, zeros of the size in the model's timm configuration.
        kinds: Classes of the layers to list.
        symbolic: Also trace with ``torch.fx``, and add the uses that only the graph has.

    Returns:
        One layer for each distinct module that ran.

    Raises:
        AdderkitError: If the model has layers without weights yet, or cannot run on the input.
    """
    lazy = next((name for name, parameter in model.named_parameters() if is_lazy(parameter)), None)
    if lazy is not None:
        raise AdderkitError(
            f"{lazy!r} has no shape yet, as the model has lazy layers: run it once on a batch of images first"
        )
    if example_input is None:
        example_input = torch.zeros(1, *input_size(model))
    try:
        shapes_only = meta_copy(model)
        layers = _observed(shapes_only, example_input.to("meta", model_dtype(model)), kinds)
    except Exception:
        # Some models cannot be copied, compute sizes from values or keep plain tensors; those run only on real data.
        _logger.debug("cannot run %s on the meta device", type(model).__name__, exc_info=True)
        return _observe_real_pass(model, example_input, kinds)
    uses = symbolic_uses(shapes_only, kinds) if symbolic else None
    return layers if uses is None else [_with_uses(layer, *uses.get(layer.path, ((), ()))) for layer in layers]


def _observe_real_pass(model: nn.Module, example_input: Tensor, kinds: Kinds) -> list[Layer]:
    try:
        with eval_mode(model):
            return _observed(model, move_like(example_input, model), kinds)
    except Exception as error:
        raise AdderkitError(
            f"{type(model).__name__} cannot run on an input of shape {tuple(example_input.shape)}: {error}; "
            "give an example_input that fits"
        ) from error


def _observed(model: nn.Module, example_input: Tensor, kinds: Kinds) -> list[Layer]:
    return [
        Layer(
            path,
            seen.input_shape,
            seen.output_shape,
            seen.calls,
            tuple(seen.consumers),
            tuple(seen.functions),
            seen.weight_reader,
        )
        for path, seen in observe(model, example_input, kinds).items()
    ]


def _with_uses(layer: Layer, consumers: Sequence[str], functions: Sequence[str]) -> Layer:
    return dataclasses.replace(
        layer,
        consumers=tuple(dict.fromkeys((*layer.consumers, *consumers))),
        # The two sometimes name a function differently (``add`` and ``iadd``), so their names are not merged.
        functions=layer.functions or tuple(functions),
    )


def meta_copy(model: nn.Module) -> nn.Module:
    """Return a copy of the model in evaluation mode, with parameters and buffers on the ``meta`` device."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    for module in model.modules():
        # The user's hooks are not copied: they are not for a dry run, and may hold objects that cannot be copied.
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            memo[id(hooks)] = OrderedDict()
    twin = copy.deepcopy(model, memo).eval()
    copy_feature_hooks(model, twin)
    return twin
