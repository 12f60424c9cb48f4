"""Export a model as one file: ONNX with the adder function, or a ``torch.export`` program."""

import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from timm.models import get_model_input_config
from torch import nn
from torch.export import Dim, ExportedProgram

from ..errors import ExportError
from ..files import atomic_path
from .opsets import DEFAULT_OPSET, NEWEST_OPSET, OLDEST_OPSET

_ONNX_PACKAGES = ("onnx", "onnxscript")


def export_program(model: nn.Module, path: str | Path) -> Path:
    """Write a ``torch.export`` program with a dynamic batch size, which needs adderkit to run.

    Import adderkit before ``torch.export.load`` reads it: that registers the operator ``adderkit::adder_conv2d``.

    Args:
        model: A timm model, converted or not; it is set to evaluation mode.
        path: Path of the file, by convention ``….pt2``.

    Returns:
        The path.

    Raises:
        ExportError: PyTorch cannot trace the model, or the file cannot be written.
    """
    program = _traced(model)
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # paths of this machine
    return _write(path, lambda file: torch.export.save(program, file))


def export_onnx(model: nn.Module, path: str | Path, opset: int = DEFAULT_OPSET) -> Path:
    """Write ONNX with a dynamic batch size, which any runtime can run.

    Args:
        model: A timm model, converted or not; it is set to evaluation mode.
        path: Path of the file, by convention ``….onnx``.
        opset: Version of ONNX's standard operators.

    Returns:
        The path.

    Raises:
        ExportError: Packages are missing, the opset is not supported, or the model cannot be exported.
    """
    for package in _ONNX_PACKAGES:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ExportError(f"exporting ONNX needs {package}: pip install 'adderkit[export]'") from error
    from . import onnx_function

    if not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise ExportError(f"opset is {opset}, expected {OLDEST_OPSET} to {NEWEST_OPSET}")
    program = _traced(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's warnings concern the exporter
            done = torch.onnx.export(
                program,
                dynamo=True,
                dynamic_shapes=({0: "batch"},),  # only the name matters here
                opset_version=opset,
                input_names=["images"],
                output_names=["logits"],
                custom_translation_table={torch.ops.adderkit.adder_conv2d.default: onnx_function.translate},
                verbose=False,
            )
        assert done is not None
        content = onnx_function.complete(done.model_proto, opset)
    except Exception as error:
        raise ExportError(f"the model cannot be exported to ONNX: {_first_line(error)}") from error
    return _write(path, lambda file: file.write(content.SerializeToString()))


def _traced(model: nn.Module) -> ExportedProgram:
    """Trace the model for batches of any size of the images that it is made for."""
    images = torch.zeros(
        2, *get_model_input_config(model)["input_size"]
    )  # a batch of 1 would be specialized to a constant
    try:
        return torch.export.export(model.eval(), (images,), dynamic_shapes=({0: Dim("batch")},))
    except Exception as error:
        raise ExportError(f"PyTorch cannot trace the model for batches of any size: {_first_line(error)}") from error


def _write(path: str | Path, write: Callable[[BinaryIO], Any]) -> Path:
    try:
        with atomic_path(Path(path)) as temporary, temporary.open("wb") as file:
            write(file)
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror or error}") from error
    return Path(path)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
