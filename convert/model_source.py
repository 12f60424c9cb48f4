"""The model that a user names: a timm model, a Hub repository, a saved folder or a file of weights."""

import dataclasses
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from timm.models import (
    create_model,
    get_pretrained_cfg,
    is_model,
    is_model_pretrained,
    list_models,
    split_model_name_tag,
)
from torch import nn

from .checkpoint.configuration import base_architecture, describe_
from .checkpoint.folder import CONFIG, LOCAL, WEIGHTS, load, local_path
from .checkpoint.report import Report, read_report
from .errors import OWN_NETWORK, CheckpointError, ModelSourceError
from .foreign_weights.loading import load_weights_, require_convolutions
from .foreign_weights.read import read_weights, saved_folder_of
from .hub import PREFIX, quiet_hub, reachable_hub


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model as it is named on the command line.

    Args:
        name: A timm name (``resnet50``, ``resnet50.a1_in1k``), ``hf-hub:user/name``, or a saved folder, also written
            ``local-dir:folder``.
        pretrained: Start from pretrained weights.
        checkpoint: Folder or file of weights to load instead of the pretrained ones.
        num_classes: Number of classes, for a model that is not a saved folder; by default the model's own.
        in_chans: Number of image channels, for a model that is not a saved folder; by default the model's own.
    """

    name: str
    pretrained: bool = True
    checkpoint: str | None = None
    num_classes: int | None = None
    in_chans: int | None = None

    @property
    def folder(self) -> Path | None:
        """The saved folder that the name means; ``None`` for a name of timm or the Hub."""
        if self.name.startswith(LOCAL):
            return local_path(self.name)
        return Path(self.name) if (Path(self.name) / CONFIG).is_file() and not is_model(self.name) else None

    @property
    def checkpoint_folder(self) -> Path | None:
        """The checkpoint, if it is a saved folder; ``None`` for a file, or a folder that only holds weights."""
        return Path(self.checkpoint) if self.checkpoint and (Path(self.checkpoint) / CONFIG).is_file() else None

    @property
    def is_registered(self) -> bool:
        """Whether timm's registry alone says what the model is, and where its pretrained weights are."""
        return self.checkpoint is None and self.folder is None and is_model(split_model_name_tag(self.name)[0])

    @property
    def short_name(self) -> str:
        """The last part of the name, without a revision of the Hub."""
        if self.name.startswith(PREFIX):
            return self.name.split("/")[-1].split("@")[0]
        return (self.folder or Path(self.name)).resolve().name

    @property
    def has_pretrained_weights(self) -> bool:
        """Whether pretrained weights exist; for a Hub repository or an unknown name, whether they might."""
        return self.name.startswith(PREFIX) or not is_model(self.name) or is_model_pretrained(self.name)

    def absolute(self) -> "ModelSource":
        """Return the source with absolute paths, so that it can be built from any working directory."""
        name = self.name if self.folder is None else str(self.folder.resolve())
        checkpoint = None if self.checkpoint is None else str(Path(self.checkpoint).resolve())
        return dataclasses.replace(self, name=name, checkpoint=checkpoint)

    def report(self) -> Report:
        """Read the report of a saved folder; empty for anything else."""
        return Report() if self.folder is None else read_report(self.folder)

    def default_output(self, suffix: str) -> Path:
        """Return the default folder for the result of a verb: the short name and a suffix, in the working directory."""
        return Path(self.short_name + suffix)

    def refuse_target(self, folder: Path, reason: str = "") -> None:
        """Refuse an output folder in which the result would overwrite the model it is made from.

        Args:
            folder: Folder to be written.
            reason: Why the model is kept, for the message; starts with a comma.

        Raises:
            ModelSourceError: The folder is the model's own, or writing it would replace the checkpoint.
        """
        if self.folder is not None and self.folder.resolve() == folder.resolve():
            raise ModelSourceError(f"--output {folder} is the model itself{reason}; give another folder")
        replaced = (folder.resolve(), (folder / WEIGHTS).resolve())
        if self.checkpoint is not None and Path(self.checkpoint).resolve() in replaced:
            raise ModelSourceError(
                f"--output {folder} would replace the weights in {self.checkpoint}{reason}; give another folder"
            )

    def build(self, *, weights: bool = True, **overlay: Any) -> nn.Module:
        """Build the model with the weights that were asked for, never silently with random ones.

        Args:
            weights: Load pretrained weights; with ``False`` nothing is downloaded. A checkpoint is always loaded.
            **overlay: Model arguments in addition to ``num_classes`` and ``in_chans``, or in place of them; ``None``
                means the default.

        Returns:
            The model in evaluation mode.

        Raises:
            ModelSourceError: The name is unknown, or the weights cannot be loaded; the message names the remedies.
            CheckpointError: The checkpoint is damaged or does not fit.
        """
        fields = {"num_classes": self.num_classes, "in_chans": self.in_chans, **overlay}
        arguments = {key: value for key, value in fields.items() if value is not None}
        pretrained = self.pretrained and weights
        if self.folder is not None:
            if self.checkpoint is not None:
                raise ModelSourceError(
                    f"{self.name} has its own weights; give either the folder or --checkpoint, not both"
                )
            _refuse(arguments, self.name)
            return _in_single_precision(load(self.folder, pretrained))
        if self.checkpoint_folder is not None:
            _refuse(arguments, str(self.checkpoint))
            return _from_folder(self.name, self.checkpoint_folder)
        if not self.name.startswith(PREFIX):
            _check_name(self.name)
        if self.checkpoint is None:
            return self._create(pretrained, arguments)
        model = self._create(False, arguments)
        found = read_weights(self.checkpoint)
        require_convolutions(found, self.name)
        load_weights_(model, self.name, found)
        return model

    def _create(self, pretrained: bool, arguments: Mapping[str, Any]) -> nn.Module:
        remedy = "give your own with --checkpoint FILE|DIR, or start from random ones with --no-pretrained"
        if pretrained and not self.has_pretrained_weights:
            raise ModelSourceError(f"timm has no pretrained weights for {self.name!r}; {remedy}")
        try:
            with reachable_hub() if pretrained else quiet_hub():
                model: nn.Module = create_model(self.name, pretrained=pretrained, **arguments)
        except CheckpointError:
            raise
        except Exception as error:
            if not pretrained:
                raise ModelSourceError(f"cannot build {self.name}: {error}") from error
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelSourceError(
                f"cannot load pretrained weights for {self.name!r} ({type(error).__name__}: {reason}); {remedy}"
            ) from error
        self._describe(model, arguments.get("pretrained_cfg_overlay", {}))
        return model.eval()

    def _describe(self, model: nn.Module, overlay: Mapping[str, Any]) -> None:
        """Complete what a network registered by the user says of its images; refuse one of which nothing is known."""
        if self.name.startswith(PREFIX):
            return
        known = get_pretrained_cfg(self.name)
        own = getattr(model, "pretrained_cfg", None)
        if own is None and known is None and not overlay:
            raise ModelSourceError(
                f"{self.name} does not say what images it takes; where it is registered, set model.pretrained_cfg = "
                "{'input_size': (3, 32, 32), 'mean': …, 'std': …}, with mean and std of pixels from 0 to 1"
            )
        facts = known.to_dict() if own is None and known is not None else {}
        describe_(model, split_model_name_tag(self.name)[0], {**facts, **overlay})


def _refuse(arguments: Mapping[str, Any], folder: str) -> None:
    if arguments:
        given = ", ".join(f"{key}={value}" for key, value in arguments.items())
        raise ModelSourceError(f"{folder} has its own model arguments, expected no others, but got {given}")


def _from_folder(name: str, folder: Path) -> nn.Module:
    model = _in_single_precision(load(folder))
    found = base_architecture(model)
    if found != split_model_name_tag(name)[0]:
        raise ModelSourceError(f"{folder} contains a {found}, expected a {name}; give the architecture it contains")
    return model


def _in_single_precision(model: nn.Module) -> nn.Module:
    """Return a model that was saved in half precision in single precision, in which the verbs compute."""
    half = any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in model.state_dict().values())
    return model.float() if half else model


def _check_name(name: str) -> None:
    architecture = split_model_name_tag(name)[0]
    if architecture == "adder":
        raise ModelSourceError("'adder' is reserved for saved adder networks, expected a CNN or a saved folder")
    if is_model(architecture):
        return
    if Path(name).is_file():
        folder = saved_folder_of(Path(name))
        remedy = f"give the folder {folder}" if folder else "give its architecture, and the file with --checkpoint"
        raise ModelSourceError(f"{name} is a file, expected a timm model or a saved folder: {remedy}")
    if "/" in name or name.startswith(".") or Path(name).exists():
        raise ModelSourceError(f"{name} is neither a timm model nor a folder with a {CONFIG}")
    near = get_close_matches(architecture, list_models(), n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else "see timm.list_models()"
    raise ModelSourceError(f"timm has no model {name!r}; {hint}; {OWN_NETWORK}")
