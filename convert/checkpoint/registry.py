"""Our names in timm's registry: the paper's networks, and ``adder``, the way back from a saved adder network.

A checkpoint of ours says ``architecture: "adder"`` and ``model_args: {base, transforms}``. With adderkit imported,
``timm.create_model("local-dir:…", pretrained=True)`` arrives here; without it, timm refuses: ``Unknown model (adder)``.
Were the checkpoint to call itself by its base's name, timm would load it as a CNN and compute the wrong function.
"""

from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from timm.models import create_model, get_pretrained_cfg, is_model, load_pretrained, register_model
from torch import nn

from ...adder_layers.integer.network import IntegerNetwork
from ..errors import CheckpointError
from ..hub import PREFIX, fetch
from ..models import cifar as cifar_models  # registers the paper's networks
from .replay import replay
from .weights import CONFIG, WEIGHTS, check_transforms, checked_weights


@register_model
def adder(
    pretrained: bool = False,
    base: str = "",
    transforms: Sequence[Mapping[str, Any]] = (),
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    cache_dir: str | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a base model, replay what was done to it, and load the saved weights.

    Args:
        pretrained: Load the weights that ``pretrained_cfg`` points to.
        base: Name of the base model in timm's registry.
        transforms: Record of what was done to the base model.
        pretrained_cfg: The saved configuration, as timm passes it.
        pretrained_cfg_overlay: Values that replace some of it.
        cache_dir: Where the Hub's files are kept.
        **kwargs: Model arguments of the base, such as ``num_classes``.

    Returns:
        The adder network.

    Raises:
        CheckpointError: The base is not a plain registered name, or the transforms do not fit it.
    """
    if not isinstance(base, str) or not is_model(base) or base == "adder":
        # A name such as hf-hub:… or local-dir:… would reach beyond the checkpoint that is being loaded.
        raise CheckpointError(f"base is {base!r} in the checkpoint, expected the name of a registered timm model")
    kwargs.pop("pretrained_model_args", None)
    foreign = sorted(set(kwargs) & set(signature(create_model).parameters))
    if foreign:  # such as checkpoint_path, which would bring in another file
        raise CheckpointError(
            f"model_args holds {', '.join(foreign)} in the checkpoint, expected arguments of {base} only"
        )
    if not transforms:
        raise CheckpointError(
            "transforms is empty in the checkpoint, expected at least one: an adder network records how it was made"
        )
    saved = pretrained_cfg if isinstance(pretrained_cfg, Mapping) else getattr(pretrained_cfg, "to_dict", dict)()
    model = _structure(base, transforms, kwargs)
    config = {**model.pretrained_cfg, **saved, **(pretrained_cfg_overlay or {}), "architecture": "adder"}
    model.pretrained_cfg = model.default_cfg = config
    if pretrained:
        folder = _saved_folder(config, cache_dir)
        if isinstance(model, IntegerNetwork):
            return _load_integers(model, folder)
        given = {}
        if folder is not None:
            given = {"source": "", "state_dict": checked_weights(folder)}
            check_transforms(folder, model)
        load_pretrained(
            model,
            {**config, **given},
            num_classes=model.num_classes,
            in_chans=kwargs.get("in_chans") or config["input_size"][0],
            filter_fn=cifar_models.drop_other_head,
            cache_dir=cache_dir,
        )
    result: nn.Module = model
    return result


def _structure(base: str, transforms: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]) -> Any:
    """Build the model that the transforms describe, without its weights."""
    model: Any = replay(transforms, lambda: create_model(base, pretrained=False, **arguments))
    if isinstance(model, IntegerNetwork):  # built without the base model, whose facts it still needs
        known: Any = get_pretrained_cfg(base)
        model.pretrained_cfg = known.to_dict()
        model.num_classes = arguments.get("num_classes", known.num_classes)
    return model


def _load_integers(network: nn.Module, folder: Path | None) -> nn.Module:
    """The weights of an integer network: only whole ones of a saved folder, since its plan has to fit."""
    if folder is None:
        raise CheckpointError("an integer network is loaded from the folder it was saved in: local-dir:… or hf-hub:…")
    state = checked_weights(folder)
    check_transforms(folder, network)
    try:
        network.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{folder} does not hold a sound integer network: {error}") from error
    return network


def _saved_folder(config: Mapping[str, Any], cache_dir: str | None) -> Path | None:
    """Where a saved model's files are, fetched from the Hub if need be; ``None`` for weights of another kind.

    timm would take any file of weights that it finds there, and compares no checksum.
    """
    if config.get("source") == "hf-hub":
        return fetch(f"{PREFIX}{config['hf_hub_id']}", (WEIGHTS, CONFIG), cache_dir)
    return Path(config["file"]) if config.get("source") == "local-dir" else None
