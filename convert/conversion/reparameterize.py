"""Re-parameterize a model (RepVGG, MobileOne, FastViT, …) before it is converted, and refuse it afterwards.

Re-parameterizing merges parallel branches and BatchNorms into one convolution. That is an identity of convolutions:
from the weights of adder layers it would silently compute another network, and a convolutional one. So while a module
holds converted layers, those of its methods that merge them raise an error.
"""

import copy
import dataclasses
import inspect
import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from timm.models import reparameterize_model
from torch import Tensor, nn

from ..errors import AdderkitError
from ..graph.layers import input_size, meta_copy
from ..graph.modes import eval_mode, model_dtype, move_like
from ..record import check_version, record_, require_float
from ..wrappers import unwrapped
from .targets import converted_layers

_logger = logging.getLogger(__name__)
REPARAMETERIZE = "reparameterize"
VERSION = 1
_TIMM_METHODS = ("fuse", "reparameterize", "switch_to_deploy")  # those that timm.utils.reparameterize_model calls
_MERGES = re.compile(r"_*(fuse|reparam|switch_to_deploy|to_deploy|merge_(bn|kernel|branch)|fold_bn|get_\w*kernel_bias)")
_TOLERANCE, _HALF_TOLERANCE = 1e-3, 0.1  # of the largest output, in fp32 and in half precision


@dataclasses.dataclass(frozen=True)
class RefusedMerge:
    """Replacement of a method that would merge converted layers.

    Args:
        method: Name of the method.
        layer: Path of a converted layer, in the module that has the method.
    """

    method: str
    layer: str

    def __call__(self, *_: Any, **__: Any) -> None:
        """Refuse the call.

        Raises:
            AdderkitError: Always.
        """
        raise AdderkitError(
            f"{self.method}() would compute a convolution from the weights of converted layers, such as "
            f"{self.layer!r}, which do not convolve: re-parameterize the model before converting it "
            "(adderkit.reparameterize_, convert --reparameterize)"
        )


def guard_merges_(model: nn.Module) -> None:
    """Replace the methods that would merge converted layers, and put those back that would not any more, in place."""
    for module in model.modules():
        for name in [name for name, value in vars(module).items() if isinstance(value, RefusedMerge)]:
            delattr(module, name)
        methods = merging_methods(module)
        layer = next(iter(converted_layers(module)), None) if methods else None
        if layer:  # none, or the module itself
            for name in methods:
                vars(module)[name] = RefusedMerge(name, layer)


def merging_methods(module: nn.Module) -> list[str]:
    """Return the names of a module's methods that merge its layers: named so, and callable without arguments."""
    return [name for name in dir(type(module)) if _MERGES.match(name) and _needs_no_arguments(type(module), name)]


def _needs_no_arguments(cls: type[nn.Module], name: str) -> bool:
    value = inspect.getattr_static(cls, name)
    if not inspect.isfunction(value):
        return False
    _, *parameters = inspect.signature(value).parameters.values()
    named = (
        parameter for parameter in parameters if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    )
    return all(parameter.default is not parameter.empty for parameter in named)


def advise_to_merge_first(model: nn.Module) -> None:
    """Log a warning if the model can be re-parameterized, which is refused once layers are converted."""
    paths = reparameterizable(model)
    if paths:
        _logger.warning(
            "timm can re-parameterize %s (%d modules, such as %r), which is refused after the conversion: if you want "
            "that, do it first, with adderkit.reparameterize_ or convert --reparameterize",
            type(model).__name__,
            len(paths),
            paths[0],
        )


def reparameterizable(model: nn.Module) -> list[str]:
    """Return the paths of the modules that ``timm.utils.reparameterize_model`` would change, outermost first."""
    paths = [path for path, module in model.named_modules() if path and _is_handled_by_timm(module)]
    if not paths:
        return []
    try:
        merged = meta_copy(model)
        with torch.device("meta"):  # where some create their convolution
            reparameterize_model(merged, inplace=True)
    except Exception:
        _logger.debug("cannot re-parameterize %s on the meta device", type(model).__name__, exc_info=True)
        return paths
    left = {path: list(_tensor_names(module)) for path, module in merged.named_modules()}
    return [path for path in paths if left.get(path) != list(_tensor_names(model.get_submodule(path)))]


def _is_handled_by_timm(module: nn.Module) -> bool:
    return any(callable(getattr(module, name, None)) for name in _TIMM_METHODS)


def _tensor_names(module: nn.Module) -> list[str]:
    return list(module.state_dict(keep_vars=True))


@torch.no_grad()
def reparameterize_(model: nn.Module, example_input: Tensor | None = None) -> list[str]:
    """Merge the branches and BatchNorms of a CNN as ``timm.utils.reparameterize_model`` does, in place.

    To be done before ``convert_``, and before the model is copied as teacher. It is recorded, so that a model that was
    converted afterwards can be saved and loaded.

    Example:
        >>> model = timm.create_model("repvgg_a0", pretrained=True)
        >>> adderkit.reparameterize_(model)
        >>> teacher = copy.deepcopy(model)
        >>> adderkit.convert_(model)

    Args:
        model: The model to change.
        example_input: ``[N, C, H, W]``, for models that do not say what images they take.

    Returns:
        The paths of the merged modules.

    Raises:
        AdderkitError: The model is converted or quantized, has nothing to merge, or would compute something else.
    """
    model = unwrapped(model, "re-parameterized")
    require_float(model, "re-parameterized", "re-parameterize the CNN that it was made from")
    converted = converted_layers(model)
    if converted:
        raise AdderkitError(
            f"{next(iter(converted))!r} and {len(converted) - 1} other layers are converted, and cannot be merged into "
            "convolutions: re-parameterize the CNN before converting it"
        )
    paths = reparameterizable(model)
    if not paths:
        raise AdderkitError(
            f"{type(model).__name__} has no branches or BatchNorms that timm.utils.reparameterize_model would merge: "
            "convert it as it is"
        )
    _check_same(model, torch.randn(2, *input_size(model)) if example_input is None else example_input)
    apply_reparameterize_(model, {})
    record_(model, {"kind": REPARAMETERIZE, "version": VERSION})
    return paths


def check_reparameterize(transform: Mapping[str, Any]) -> None:
    """Refuse a transform of another version.

    Raises:
        CheckpointError: The version is unknown.
    """
    check_version(transform, VERSION)


def apply_reparameterize_(model: nn.Module, transform: Mapping[str, Any]) -> None:
    """Merge what timm merges, in place. New layers get the mode of the model, and parameters train as before."""
    known = {module: module.training for module in model.modules()}
    trains = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with torch.no_grad():
        reparameterize_model(model, inplace=True)
    for module in model.modules():
        module.training = known.get(module, model.training)
    for parameter in model.parameters():  # timm detaches some, which freezes them
        parameter.requires_grad_(trains.get(parameter, any(trains.values())))


def _check_same(model: nn.Module, images: Tensor) -> None:
    """Refuse a model that computes something else once it is merged, which happens with faulty methods."""
    images = move_like(images, model)
    merged = reparameterize_model(copy.deepcopy(model).eval(), inplace=True)
    with eval_mode(model):
        before, after = model(images), merged(images)
    if not isinstance(before, Tensor):
        return
    limit = _TOLERANCE if model_dtype(model) in (torch.float32, torch.float64) else _HALF_TOLERANCE
    error = float((after - before).abs().max() / before.abs().max().clamp_min(1e-6))
    if not error < limit:
        raise AdderkitError(
            f"the outputs of {type(model).__name__} change by {error:.1%} when timm re-parameterizes it, expected less "
            f"than {limit:.1%}: convert it as it is"
        )
