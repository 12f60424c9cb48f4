"""The ``config.json`` of a saved model, in timm's format, and the check that timm builds the same model from it."""

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.layers.create_act import _ACT_LAYER_DEFAULT  # timm's names of activations, which have no public table
from timm.layers.create_norm import _NORM_MAP
from timm.models import create_model, get_model_args, is_model
from timm.models._hub import save_config_for_hf  # timm's public save_for_hf writes weights as well
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ...adder_layers.integer.network import IntegerNetwork
from ..class_names import class_names_of
from ..conversion.targets import converted_layers, is_converted
from ..errors import CheckpointError
from ..files import read_json_object, write_json
from ..graph.computed_weights import computed_weight
from ..record import transforms_of
from ..wrappers import timm_models_in, unwrapped
from .weights import CONFIG

_CURRENT = ("num_classes", "in_chans", "global_pool", "img_size")  # arguments that timm reads off the model
_RECORD = ("base", "transforms")
_TRAINING_ONLY = re.compile(r"\b(p|momentum|inplace)=[^,]*(, )?|, inplace$|^inplace$")
_REMEDY = "register the changed network with timm under a name of its own"


def base_architecture(model: nn.Module) -> str:
    """Return the name in timm's registry under which a model was built, before any conversion.

    Raises:
        CheckpointError: The model was not built by timm's factory.
    """
    arguments: Mapping[str, Any] = getattr(model, "_model_args", None) or {}
    name = arguments.get("base") or (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if not isinstance(name, str) or not is_model(name):
        held = timm_models_in(model)
        inside = f", or pass the timm model in it, .{held[0]}" if held else ""
        raise CheckpointError(
            f"cannot save a {type(model).__name__}, expected a model built by timm.create_model, which can be rebuilt "
            "by its name; register your own class with timm.models.register_model, and name it in the model's "
            f"pretrained_cfg['architecture']{inside}"
        )
    return name


def recorded_base(config: Mapping[str, Any]) -> object:
    """Return the base architecture that a ``config.json`` names; of any type, since others may have written it."""
    arguments, architecture = config.get("model_args"), config.get("architecture")
    return arguments.get("base") if architecture == "adder" and isinstance(arguments, dict) else architecture


def describe_(model: nn.Module, architecture: str, facts: Mapping[str, Any]) -> None:
    """Complete the ``pretrained_cfg`` of a model whose entry point is not based on timm's ``build_model_with_cfg``.

    Args:
        model: Model that ``timm.create_model`` returned.
        architecture: Name under which it is registered.
        facts: What is known of its images and classes; they override the model's own.
    """
    if hasattr(model, "_traits"):
        return
    timm_model: Any = model
    own = getattr(model, "pretrained_cfg", None) or {}
    timm_model.pretrained_cfg = timm_model.default_cfg = {**own, **facts, "architecture": architecture}


def check_savable(model: nn.Module) -> None:
    """Refuse a model that would not be the same after ``save`` and ``load``, before work is spent on it.

    Needed are ``pretrained_cfg["architecture"]``, the name in timm's registry, and arguments that rebuild the model.

    Raises:
        CheckpointError: The model cannot be rebuilt by its name, or was changed in a way that is not recorded.
    """
    bare = unwrapped(model, sharded=False)
    check_rebuilds(bare, model_config(bare))


def model_config(model: nn.Module) -> dict[str, Any]:
    """Return timm's ``config.json`` for the model as it is, named ``adder`` if it is converted.

    Raises:
        CheckpointError: The model was not built by timm's factory, or an argument cannot be written.
    """
    base, arguments = base_architecture(model), _arguments(model)
    _check_record(model)
    converted = is_converted(model) or bool(transforms_of(model))  # a fold is not undone by a revert
    if converted:
        arguments |= {"base": base, "transforms": transforms_of(model)}
    described: Any = _Described(model, arguments)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / CONFIG
            architecture = "adder" if converted else base
            known: dict[str, Any] = {"pretrained_cfg": {"architecture": architecture}}
            save_config_for_hf(described, str(path), known | _label_names(model), arguments)
            config = read_json_object(path)
            config["pretrained_cfg"].pop("label_names", None)  # timm reads those beside it
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"cannot save {base} in timm's format: {error}") from error
    for key in ("num_classes", "num_features"):
        if not hasattr(model, key):
            config.pop(key)
            config["pretrained_cfg"].pop(key, None)
    written = config.pop("model_args", {})
    kept = {key: value for key, value in written.items() if key in arguments}
    return {**config, "model_args": kept} if kept else config


def _label_names(model: nn.Module) -> dict[str, list[str]]:
    names = class_names_of(model)
    return {} if names is None else {"label_names": list(names)}


def _check_record(model: nn.Module) -> None:
    """Refuse a model with layers that its record does not explain, or tensors that its base does not have."""
    recorded = {path for transform in transforms_of(model) for path in transform.get("modules", ())}
    unknown = next((path for path in converted_layers(model) if path not in recorded), None)
    if unknown is not None:
        raise CheckpointError(
            f"{unknown!r} is converted, but not by a conversion of this model, so it could not be rebuilt: "
            "convert the timm model itself, not a module in it or around it"
        )
    for path, module in model.named_modules():
        computed = computed_weight(module)
        if computed:
            raise CheckpointError(f"{path!r} cannot be rebuilt by timm: {computed}")


class _Described:
    """A model as timm's function sees it: with other arguments, and with the facts that a network may lack."""

    def __init__(self, model: nn.Module, arguments: Mapping[str, Any]) -> None:
        self._model, self._model_args = model, arguments

    def __getattr__(self, name: str) -> Any:
        defaults = {"num_classes": self._model_args.get("num_classes", 0), "num_features": None}
        return getattr(self._model, name, defaults[name]) if name in defaults else getattr(self._model, name)


def _arguments(model: nn.Module) -> dict[str, Any]:
    """Return the arguments that rebuild the model: those it was built with, except for what was changed since."""
    recorded = {key: value for key, value in getattr(model, "_model_args", {}).items() if key not in _RECORD}
    current = {key: value for key, value in get_model_args(model).items() if key in _CURRENT}
    # The user's own entry point takes the arguments that it was given; it may not know others.
    takes_all = hasattr(model, "_traits") or isinstance(model, IntegerNetwork)
    arguments = {**recorded, **{key: value for key, value in current.items() if takes_all or key in recorded}}
    return {key: _by_name(key, value, model) for key, value in arguments.items()}


def _by_name(key: str, value: Any, model: nn.Module) -> Any:
    """Return timm's name for a class of activations or normalizations; other values as they are."""
    if not callable(value):
        return value
    for names in (_ACT_LAYER_DEFAULT, _NORM_MAP):
        for name, layer in names.items():
            if layer is value:
                return name
    shown = value.__name__ if isinstance(value, type) else repr(value)
    raise CheckpointError(
        f"cannot save {base_architecture(model)}: its argument {key} is {shown:.80}, which {CONFIG} cannot hold, "
        f"expected a name that timm knows, such as act_layer='silu'; or {_REMEDY}, which sets it"
    )


def check_rebuilds(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Build a model from a configuration and compare it with the one that the configuration was written for.

    Raises:
        CheckpointError: timm cannot build it, or it has other tensors or other layers.
    """
    name = recorded_base(config)
    try:
        with tempfile.TemporaryDirectory() as scratch, torch.random.fork_rng(devices=[]):
            write_json(Path(scratch) / CONFIG, config)
            twin = create_model(f"local-dir:{scratch}", pretrained=False)
    except Exception as error:  # whatever a network's own code may raise
        reason = " ".join(str(error).split())
        given = {key: value for key, value in config.get("model_args", {}).items() if key not in _RECORD}
        raise CheckpointError(
            f"cannot save {name}: timm cannot build it again with the arguments {given} ({reason}); let the function "
            "that is registered accept them"
        ) from error
    found = _difference(model, twin)
    if found is not None:
        path, ours, theirs = found
        raise CheckpointError(
            f"cannot save {name}: {path} is {ours}, but {theirs} when timm builds the network again, since a change "
            f"after timm.create_model is not recorded; {_REMEDY}"
        )


def _difference(model: nn.Module, twin: nn.Module) -> tuple[str, str, str] | None:
    """Return the first tensor or layer that differs, in the model and in its twin; ``None`` if all are equal."""
    ours, theirs = ({key: str(list(value.shape)) for key, value in net.state_dict().items()} for net in (model, twin))
    for key in (*ours, *theirs):
        if ours.get(key) != theirs.get(key):
            return key, ours.get(key, "missing"), theirs.get(key, "missing")
    layers = dict(twin.named_modules())
    for path, layer in model.named_modules():
        other = layers.get(path)
        if other is not None and not any(layer.children()) and _form(layer) != _form(other):
            return path, str(layer), str(other)
    return None


def _form(layer: nn.Module) -> str:
    """Return what a layer without children computes in evaluation, as far as its class and its text say."""
    kind = _NormBase if isinstance(layer, _NormBase) else type(layer)
    known = type(layer).__module__.startswith(("torch.", "timm."))
    return f"{kind.__name__}({_TRAINING_ONLY.sub('', layer.extra_repr()) if known else ''})"
