"""Find layers whose weight is computed by something else than the layer: hooks, parametrizations, adapters."""

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

# Hooks of torch that assign a tensor before each forward pass, and the functions that make it a parameter again.
_HOOKS: dict[type, tuple[str, str]] = {
    BasePruningMethod: ("a mask (torch.nn.utils.prune)", "torch.nn.utils.prune.remove(layer, {name!r})"),
    WeightNorm: ("weight_norm", "torch.nn.utils.remove_weight_norm(layer, {name!r})"),
    SpectralNorm: ("spectral_norm", "torch.nn.utils.remove_spectral_norm(layer, {name!r})"),
}


def computed_weight(module: nn.Module) -> str:
    """Return how a tensor of the module is computed in each forward pass, and how to fix it; empty if none is.

    Args:
        module: Any layer.
    """
    if parametrize.is_parametrized(module):
        name = next(iter(module.parametrizations))  # type: ignore[arg-type]
        remedy = f"torch.nn.utils.parametrize.remove_parametrizations(layer, {name!r})"
        return f"its {name} is computed by a parametrization; fix it with {remedy}"
    for hook in module._forward_pre_hooks.values():
        for cls, (by, remedy) in _HOOKS.items():
            if isinstance(hook, cls):
                name = getattr(hook, "_tensor_name", None) or hook.name  # type: ignore[attr-defined]
                return f"its {name} is computed by {by}; fix it with {remedy.format(name=name)}"
    return ""


def not_its_own(module: nn.Module, path: str) -> str:
    """Return why a convolution does not simply compute with its own weight; empty if it does.

    Args:
        module: A convolution.
        path: Its path in the model.
    """
    computed = computed_weight(module)
    if computed:
        return computed
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return "its weight is not a parameter"
    if {"forward", "_conv_forward"} & vars(module).keys():
        return "its forward() was replaced on this instance, for example by an accelerate hook"
    if path.rpartition(".")[2] == "base_layer":
        return "an adapter changes it; merge the adapter first, for example with peft's merge_and_unload()"
    return ""
