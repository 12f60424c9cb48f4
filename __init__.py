"""adderkit: conversion of convolutional timm models to adder networks, and training that recovers their accuracy.

Importing the package is quick: each public name is imported when it is first used. Once timm is imported as well, our
models are registered with it, so that ``timm.create_model("local-dir:…", pretrained=True)`` finds them. Once torch is
imported, our operators are registered with it, so that ``torch.export.load`` reads programs that use them.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from sys import meta_path, modules
from types import ModuleType
from typing import TYPE_CHECKING

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


class _PostImportHooks:
    """Finder that calls a function when a module has been imported; the other finders and their loaders import it.

    The package wrapt has such hooks too, but its import takes longer than that of the whole command line.
    """

    def __init__(self, hooks: dict[str, Callable[[ModuleType], None]]) -> None:
        self._hooks = hooks

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None, /
    ) -> ModuleSpec | None:
        if name not in self._hooks:
            return None
        others = (finder for finder in meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_call(module: ModuleType) -> None:
                execute(module)
                hook = self._hooks.pop(module.__name__, None)
                if hook is not None:
                    hook(module)

            vars(spec.loader)["exec_module"] = execute_and_call
        return spec


def _install_hooks(hooks: dict[str, Callable[[ModuleType], None]]) -> None:
    """Call each function with its module: now if that has been imported, else when it is."""
    for name, hook in hooks.items():
        if name in modules:
            hook(modules[name])
    meta_path.insert(0, _PostImportHooks({name: hook for name, hook in hooks.items() if name not in modules}))


_install_hooks({"timm": _register_models, "torch": _register_operator})
