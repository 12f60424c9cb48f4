"""adderkit: convolutional timm models become adder networks, and come back to accuracy.

Importing the package is cheap: a public name is imported when it is first used. As soon as timm is imported too,
our models are registered with it, so that ``timm.create_model("local-dir:…", pretrained=True)`` knows them. As soon as
torch is, it knows our operators, so that ``torch.export.load`` reads programs that hold them.
"""

from importlib import import_module
from sys import modules
from types import ModuleType
from typing import TYPE_CHECKING

from wrapt import register_post_import_hook

if TYPE_CHECKING:
    from .adder_layers.conv import AdderConv2d, adder_conv2d
    from .convert.calibrate import calibrate_
    from .convert.checkpoint import load, save
    from .convert.config import AdderConfig
    from .convert.cost import cost
    from .convert.plan import plan
    from .convert.prune_config import PruneConfig
    from .convert.pruning import prune_
    from .convert.quantize import quantize
    from .convert.quantize_config import QuantizeConfig
    from .convert.rewrite import convert_, revert_
    from .recipes.adaptive_rate import AdaptiveRate

__version__ = "0.1.0"

_HOME = {
    "AdderConv2d": "adder_layers.conv",
    "adder_conv2d": "adder_layers.conv",
    "AdderConfig": "convert.config",
    "plan": "convert.plan",
    "PruneConfig": "convert.prune_config",
    "prune_": "convert.pruning",
    "QuantizeConfig": "convert.quantize_config",
    "quantize": "convert.quantize",
    "convert_": "convert.rewrite",
    "revert_": "convert.rewrite",
    "calibrate_": "convert.calibrate",
    "cost": "convert.cost",
    "save": "convert.checkpoint",
    "load": "convert.checkpoint",
    "AdaptiveRate": "recipes.adaptive_rate",
}

__all__ = [
    "AdaptiveRate",
    "AdderConfig",
    "AdderConv2d",
    "PruneConfig",
    "QuantizeConfig",
    "__version__",
    "adder_conv2d",
    "calibrate_",
    "convert_",
    "cost",
    "load",
    "plan",
    "prune_",
    "quantize",
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
    import_module(".convert.registry", __name__)


def _register_operator(_torch: ModuleType) -> None:
    if f"{__name__}.adder_layers" not in modules:  # else one of its own files imports torch, and is not ready yet
        import_module(".adder_layers.conv", __name__)


register_post_import_hook(_register_models, "timm")
register_post_import_hook(_register_operator, "torch")
