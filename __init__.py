"""adderkit: conversion of convolutional timm models to adder networks, and training that recovers their accuracy.

Importing the package is quick: each public name is imported when it is first used. Once timm is imported as well, our
models are registered with it, so that ``timm.create_model("local-dir:…", pretrained=True)`` finds them. Once torch is
imported, our operators are registered with it, so that ``torch.export.load`` reads programs that use them.
"""

from importlib import import_module
from sys import modules
from types import ModuleType
from typing import TYPE_CHECKING

from wrapt import register_post_import_hook

if TYPE_CHECKING:
    from .adder_layers.conv import AdderConv2d, adder_conv2d
    from .convert.calibration.calibrate import calibrate_
    from .convert.calibration.config import CalibrationConfig
    from .convert.checkpoint.configuration import check_savable
    from .convert.checkpoint.folder import load, save
    from .convert.checkpoint.report import Report
    from .convert.conversion.config import AdderConfig
    from .convert.conversion.plan import plan
    from .convert.conversion.reparameterize import reparameterize_
    from .convert.conversion.rewrite import convert_, revert_
    from .convert.cost.cost import cost
    from .convert.pruning.config import PruneConfig
    from .convert.pruning.prune import prune_
    from .convert.quantization.config import QuantizeConfig
    from .convert.quantization.quantize import quantize
    from .recipes.training.adaptive_rate import AdaptiveRate

__version__ = "0.1.0"

_HOME = {
    "AdderConv2d": "adder_layers.conv",
    "adder_conv2d": "adder_layers.conv",
    "AdderConfig": "convert.conversion.config",
    "plan": "convert.conversion.plan",
    "PruneConfig": "convert.pruning.config",
    "prune_": "convert.pruning.prune",
    "QuantizeConfig": "convert.quantization.config",
    "quantize": "convert.quantization.quantize",
    "reparameterize_": "convert.conversion.reparameterize",
    "convert_": "convert.conversion.rewrite",
    "revert_": "convert.conversion.rewrite",
    "CalibrationConfig": "convert.calibration.config",
    "calibrate_": "convert.calibration.calibrate",
    "cost": "convert.cost.cost",
    "check_savable": "convert.checkpoint.configuration",
    "save": "convert.checkpoint.folder",
    "load": "convert.checkpoint.folder",
    "Report": "convert.checkpoint.report",
    "AdaptiveRate": "recipes.training.adaptive_rate",
}

__all__ = [
    "AdaptiveRate",
    "AdderConfig",
    "AdderConv2d",
    "CalibrationConfig",
    "PruneConfig",
    "QuantizeConfig",
    "Report",
    "__version__",
    "adder_conv2d",
    "calibrate_",
    "check_savable",
    "convert_",
    "cost",
    "load",
    "plan",
    "prune_",
    "quantize",
    "reparameterize_",
    "revert_",
    "save",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'adderkit' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)


def _register_models(_timm: ModuleType) -> None:
    import_module(".convert.checkpoint.registry", __name__)


def _register_operator(_torch: ModuleType) -> None:
    if f"{__name__}.adder_layers" not in modules:  # else one of its files is importing torch, and is not ready yet
        import_module(".adder_layers.ops", __name__)


register_post_import_hook(_register_models, "timm")
register_post_import_hook(_register_operator, "torch")
