"""From what a user names (a timm model, a Hub repository, a folder, a file) to a model, or one clear line."""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from timm.models import create_model, is_model, is_model_pretrained, list_models, split_model_name_tag
from torch import Tensor, nn

from .checkpoint import registry as registry  # so that timm knows our names
from .checkpoint.folder import CONFIG, WEIGHTS, base_architecture, load
from .checkpoint.foreign_weights import state_dict_from
from .errors import CheckpointError, ModelSourceError
from .files import check_folder_target
from .hub import quiet_hub


def is_folder(name: str) -> bool:
    """Whether a model is named by a folder with a ``config.json`` rather than by its architecture."""
    return name.startswith("local-dir:") or ((Path(name) / CONFIG).is_file() and not is_model(name))


def build_model(
    name: str,
    *,
    pretrained: bool = True,
    checkpoint: str | Path | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a model with the weights asked for; never quietly with random ones.

    Args:
        name: A timm name (``resnet50``, ``resnet50.a1_in1k``), ``hf-hub:…``, ``local-dir:…`` or a folder.
        pretrained: Whether weights are wanted; without a checkpoint they come from the Hub.
        checkpoint: A folder or a file of weights to use instead.
        **kwargs: Model arguments, such as ``num_classes``; ``None`` means the default.

    Returns:
        The model in evaluation mode.

    Raises:
        ModelSourceError: The name is unknown, or the weights cannot be had; the message names the remedies.
        CheckpointError: The checkpoint is damaged or does not fit.
    """
    arguments = {key: value for key, value in kwargs.items() if value is not None}
    if is_folder(name):
        if checkpoint is not None:
            raise ModelSourceError(f"{name} has weights of its own; give either the folder or --checkpoint, not both")
        _refuse(arguments, name)
        return load(name, pretrained)
    if checkpoint is not None and Path(checkpoint).is_dir():
        _refuse(arguments, str(checkpoint))
        return _from_folder(name, checkpoint)
    if not name.startswith("hf-hub:"):
        _check_name(name)
    if checkpoint is not None:
        model = _create(name, False, arguments)
        load_weights_(model, name, state_dict_from(checkpoint), checkpoint)
        return model
    return _create(name, pretrained, arguments)


def default_folder(name: str, ending: str) -> Path:
    """Where the result of a verb goes when nobody says: ``<name of the model><ending>`` in the current folder."""
    if name.startswith("hf-hub:"):
        return Path(name.split("/")[-1].split("@")[0] + ending)
    return Path(Path(name.removeprefix("local-dir:")).resolve().name + ending)


def check_target(name: str, folder: Path, *, write: bool, checkpoint: str | None = None, reason: str = "") -> None:
    """Find out before the work whether what is made of a model may go to a folder.

    Args:
        name: The model, a saved folder or a timm name.
        folder: Where the result is to go.
        write: Whether it will be written; not in a dry run.
        checkpoint: Folder or file that the model's weights come from, where they are not its own.
        reason: Why the model's own folder is kept, for the message.

    Raises:
        ModelSourceError: The folder is the model's own, or what is written would replace the checkpoint.
        AdderkitError: It cannot be written to.
    """
    if is_folder(name) and Path(name.removeprefix("local-dir:")).resolve() == folder.resolve():
        raise ModelSourceError(f"--output {folder} is the model itself{reason}; name another folder")
    replaced = (folder.resolve(), (folder / WEIGHTS).resolve())
    if checkpoint is not None and Path(checkpoint).resolve() in replaced:
        raise ModelSourceError(
            f"--output {folder} would replace the weights in {checkpoint}{reason}: name another folder"
        )
    if write:
        check_folder_target(f"--output {folder}", folder)


def lacks_weights(name: str) -> bool:
    """Whether timm knows a network by this name, but no pretrained weights for it."""
    return not name.startswith("hf-hub:") and is_model(name) and not is_model_pretrained(name)


def _refuse(arguments: Mapping[str, Any], folder: str) -> None:
    if arguments:
        given = ", ".join(f"{key}={value}" for key, value in arguments.items())
        raise ModelSourceError(f"{folder} is saved with arguments of its own, so {given} cannot be given")


def _from_folder(name: str, folder: str | Path) -> nn.Module:
    model = load(folder)
    found = base_architecture(model)
    if found != split_model_name_tag(name)[0]:
        raise ModelSourceError(f"{folder} holds a {found}, expected a {name}: name the architecture it holds")
    return model


def _create(name: str, pretrained: bool, arguments: Mapping[str, Any]) -> nn.Module:
    if pretrained and lacks_weights(name):
        raise ModelSourceError(
            f"timm has no pretrained weights for {name!r}; give yours with --checkpoint FILE|DIR, "
            "or take random ones with --no-pretrained"
        )
    try:
        with quiet_hub():
            model: nn.Module = create_model(name, pretrained=pretrained, **arguments)
    except CheckpointError:
        raise
    except Exception as error:
        if not pretrained:
            raise ModelSourceError(f"{name} cannot be built: {error}") from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelSourceError(
            f"the pretrained weights of {name!r} cannot be had ({type(error).__name__}: {reason}); "
            "give yours with --checkpoint FILE|DIR, or take random ones with --no-pretrained"
        ) from error
    return model.eval()


def _check_name(name: str) -> None:
    architecture = split_model_name_tag(name)[0]
    if architecture == "adder":
        raise ModelSourceError("'adder' is what saved adder networks are called; name a CNN or a saved folder")
    if is_model(architecture):
        return
    if "/" in name or name.startswith(".") or Path(name).exists():
        raise ModelSourceError(f"{name} is neither a timm model nor a folder with a {CONFIG}")
    near = get_close_matches(architecture, list_models(), n=3, cutoff=0.5)
    hint = f"; did you mean {', '.join(near)}?" if near else "; see timm.list_models()"
    raise ModelSourceError(f"timm knows no model {name!r}{hint}")


def load_weights_(model: nn.Module, name: str, weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Load weights whole: shapes and names are compared before the first tensor is written.

    Args:
        model: The model to load them into.
        name: What an error calls it.
        weights: Tensors by their names in the model.
        path: The file they are from.

    Raises:
        CheckpointError: Names or shapes are not the model's.
    """
    own = model.state_dict()
    # Counters, which files from old versions of PyTorch lack.
    state = {key: value for key, value in own.items() if key.endswith(".num_batches_tracked")} | dict(weights)
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    differing = [key for key in own if key in state and own[key].shape != state[key].shape]
    if missing or unexpected or differing:
        parts = [
            f"{len(keys)} {what} (such as {keys[0]})"
            for what, keys in (
                ("missing", missing),
                ("unexpected", unexpected),
                ("of another shape", differing),
            )
            if keys
        ]
        raise CheckpointError(
            f"{path} does not fit {name}: tensors {', '.join(parts)}; "
            "check the architecture, --num-classes and --in-chans"
        )
    model.load_state_dict(state)
