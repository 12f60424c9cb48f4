"""Build a saved model: its base architecture, the transforms in its record, and its weights."""

from collections.abc import Mapping, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

from timm.models import create_model, get_pretrained_cfg, is_model, load_pretrained
from timm.models._builder import pretrained_cfg_for_features  # not among the public names
from torch import nn

from ...adder_layers.integer.network import IntegerNetwork
from ..errors import OWN_NETWORK, CheckpointError
from ..hub import PREFIX, fetch
from ..models.cifar import drop_other_head
from ..record import transforms_of
from .feature_extractor import build_extractor, extractor_weights
from .replay import replay
from .weights import CONFIG, WEIGHTS, check_transforms, checked_weights, to_model_names


def build_saved(
    base: str,
    transforms: Sequence[Mapping[str, Any]],
    arguments: dict[str, Any],
    pretrained_cfg: Mapping[str, Any],
    *,
    pretrained: bool,
    cache_dir: str | None,
) -> nn.Module:
    """Build a base model, replay what was done to it, and load the saved weights.

    Args:
        base: Name of the base model in timm's registry.
        transforms: Record of what was done to the base model.
        arguments: Model arguments of the base model, such as ``num_classes``.
        pretrained_cfg: The saved configuration; it overrides that of the base model.
        pretrained: Load the weights that the configuration points to.
        cache_dir: Folder where the Hub's files are cached.

    Raises:
        CheckpointError: The base is not a plain registered name, or the transforms or the weights do not fit it.
    """
    if not isinstance(base, str) or not is_model(base) or base == "adder":
        # A name such as hf-hub:… or local-dir:… would reach beyond the checkpoint that is being loaded.
        raise CheckpointError(
            f"base is {base!r} in the checkpoint, expected the name of a registered timm model; {OWN_NETWORK}"
        )
    foreign = sorted(set(arguments) & set(signature(create_model).parameters))
    if foreign:  # such as checkpoint_path, which would bring in another file
        raise CheckpointError(
            f"model_args holds {', '.join(foreign)} in the checkpoint, expected arguments of {base} only"
        )
    if not transforms:
        raise CheckpointError(
            "transforms is empty in the checkpoint, expected at least one: an adder network records how it was made"
        )
    model: Any = _structure(base, transforms, arguments)
    if isinstance(model, IntegerNetwork):
        classes: Any = arguments.get("num_classes", pretrained_cfg.get("num_classes"))
        if classes is not None:
            model.num_classes = classes
    config = {**getattr(model, "pretrained_cfg", {}), **pretrained_cfg, "architecture": "adder"}
    extracts = bool(arguments.get("features_only"))
    model.pretrained_cfg = model.default_cfg = pretrained_cfg_for_features(config) if extracts else config
    if pretrained:
        folder = _saved_folder(config, cache_dir)
        if isinstance(model, IntegerNetwork):
            return _load_integers(model, folder)
        given: dict[str, Any] = {}
        if folder is not None:
            state = checked_weights(folder)
            check_transforms(folder, transforms)
            read = partial(extractor_weights, source=str(folder)) if extracts else to_model_names
            given = {"source": "", "state_dict": read(model, state)}
        elif extracts:
            raise CheckpointError("a feature extractor is loaded from a saved folder: local-dir:… or hf-hub:…")
        load_pretrained(
            model,
            {**config, **given},
            num_classes=getattr(model, "num_classes", 0),
            in_chans=arguments.get("in_chans") or config["input_size"][0],
            filter_fn=drop_other_head,
            cache_dir=cache_dir,
        )
    result: nn.Module = model
    return result


def _structure(base: str, transforms: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]) -> Any:
    """Build the model that the transforms describe, without its weights."""
    build = build_extractor if arguments.get("features_only") else replay
    model: Any = build(transforms, lambda: create_model(base, pretrained=False, **arguments))
    if isinstance(model, IntegerNetwork):  # built without the base model, whose facts it still needs
        known = get_pretrained_cfg(base)
        facts: Any = known.to_dict() if known is not None else {}
        model.pretrained_cfg = facts
    return model


def _load_integers(network: nn.Module, folder: Path | None) -> nn.Module:
    """Load the weights of an integer network: only all of a saved folder, since its plan has to fit."""
    if folder is None:
        raise CheckpointError("an integer network is loaded from the folder it was saved in: local-dir:… or hf-hub:…")
    state = checked_weights(folder)
    check_transforms(folder, transforms_of(network))
    try:
        network.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{folder} does not hold a valid integer network: {error}") from error
    return network


def _saved_folder(config: Mapping[str, Any], cache_dir: str | None) -> Path | None:
    """Return the folder of a saved model, downloaded from the Hub if needed; ``None`` for weights from elsewhere.

    timm would load any file of weights that it finds there, without comparing checksums.
    """
    if config.get("source") == "hf-hub":
        return fetch(f"{PREFIX}{config['hf_hub_id']}", (WEIGHTS, CONFIG), cache_dir)
    return Path(config["file"]) if config.get("source") == "local-dir" else None
