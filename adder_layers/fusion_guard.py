"""Keep functions of PyTorch that compute a convolution from a layer's weight away from layers that do not convolve.

They take any ``Conv2d``, read its weight, and return a convolution: an adder layer would silently become one.
"""

import copy
from types import SimpleNamespace
from typing import Any

import torch.nn.utils.fusion
import torch.utils.mkldnn
from torch import nn


def refuse_fusion_of(layer_class: type[nn.Module]) -> None:
    """Let ``fuse_conv_bn_eval`` and ``to_mkldnn`` raise ``TypeError`` for layers of a class.

    Args:
        layer_class: Subclass of ``nn.Conv2d`` whose layers do not compute a convolution.
    """

    def deepcopy(module: nn.Module) -> nn.Module:
        _check(module, layer_class, "fuse_conv_bn_eval")
        return copy.deepcopy(module)

    def to_mkldnn(module: nn.Module, *arguments: Any, **keywords: Any) -> nn.Module:
        _check(module, layer_class, "to_mkldnn")
        return unguarded(module, *arguments, **keywords)  # type: ignore[no-any-return]

    fusion: Any = torch.nn.utils.fusion
    # The copy that it begins with is replaced, not the function, which may have been imported under another name.
    fusion.copy = SimpleNamespace(deepcopy=deepcopy)
    mkldnn: Any = torch.utils.mkldnn
    unguarded, mkldnn.to_mkldnn = mkldnn.to_mkldnn, to_mkldnn


def _check(module: nn.Module, layer_class: type[nn.Module], function: str) -> None:
    for path, layer in module.named_modules():
        if isinstance(layer, layer_class):
            raise TypeError(
                f"{function} computes a convolution from the weight, but {repr(path) if path else 'the layer'} is an "
                f"{type(layer).__name__}, which computes distances to it: fuse the convolutional network before it is "
                "converted"
            )
