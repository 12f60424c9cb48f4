"""One trial of the sweep: plan a model, or convert, run, save, load and revert it. Never raises."""

import copy
import tempfile
import traceback
from collections import Counter
from typing import Any

import timm
import torch
from torch import Tensor, nn

from adderkit.adder_layers.modules import adder_layers
from adderkit.convert.calibration.batchnorm import updating_statistics
from adderkit.convert.checkpoint.folder import load, save
from adderkit.convert.conversion.plan import ConversionPlan, plan
from adderkit.convert.conversion.rewrite import convert_, revert_
from adderkit.convert.errors import AdderkitError, NoModuleMatchedError
from adderkit.convert.graph.fx_uses import symbolic_uses
from adderkit.convert.graph.hooks import hooked
from adderkit.convert.graph.layers import WEIGHT_LAYERS, input_size
from adderkit.convert.graph.observe import observe

SIZES = (32, 64, 96, 128, 160, 192, 224)
LARGEST_SCALE = 100.0  # root mean square at the input of an adder layer; normalized activations stay far below


def trial(kind: str, name: str) -> dict[str, Any]:
    """Run one trial.

    Args:
        kind: ``plan`` or ``run``.
        name: Name of the model in timm.

    Returns:
        The results; ``refused`` is a clear reason why nothing can be converted, ``failure`` any other error.
    """
    torch.manual_seed(0)
    line: dict[str, Any] = {"kind": kind, "model": name}
    try:
        (_plan if kind == "plan" else _run)(name, line)
    except NoModuleMatchedError as error:
        line["refused"] = str(error)
    except AdderkitError as error:
        line["failure"] = f"refused: {error}"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        message = (str(error).splitlines() or [""])[0]
        line["failure"] = f"{type(error).__name__}: {message:.200} ({where.filename.split('/')[-1]}:{where.lineno})"
    return line


def _plan(name: str, line: dict[str, Any]) -> None:
    """Plan on the ``meta`` device, at the model's own input size."""
    model = _on_meta(name)
    line["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    line["convolutions"] = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    if line["convolutions"]:
        line.update(_counts(plan(model)))


def _counts(made: ConversionPlan) -> dict[str, Any]:
    skipped = Counter(_kind_of(row.reason) for row in made.rows if row.decision == "skip")
    return {
        "converted": len(made.paths("convert")),
        "inserted": sum(row.inserted for row in made.rows),
        "folded": sum(row.decision == "convert" and "Std" in row.cls for row in made.rows),
        "terms": sum(row.products for row in made.rows),
        "converted_terms": sum(row.products for row in made.rows if row.decision == "convert"),
        "skipped": dict(skipped),
    }


def _kind_of(reason: str) -> str:
    """Return a reason without module names."""
    return reason.split(" '")[0]


def _run(name: str, line: dict[str, Any]) -> None:
    """Convert a model with random weights, run, save, load and revert it, and check each step."""
    side = _smallest_side(name)
    line["side"] = side
    model = timm.create_model(name, pretrained=False).eval()
    image = torch.randn(2, input_size(model)[0], side, side)
    line["agreement"] = _agreement(model, image)
    original = _output(model, image)
    made = convert_(model, example_input=image[:1])
    line["converted"] = len(made.paths("convert"))
    output = _output(model, image)
    line["shape"] = output.shape == original.shape
    line["largest_input"], line["bounded"] = _bounded(model, image)
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder)
        line["reload"] = _same(_output(load(folder), image), output)
    revert_(model)
    line["revert"] = _same(_output(model, image), original)
    for check in ("shape", "bounded", "reload", "revert"):
        if not line[check]:
            line["failure"] = f"check {check!r} failed"


def _bounded(model: nn.Module, image: Tensor) -> tuple[float, bool]:
    """Return the largest root mean square that reaches an adder layer, and whether all of them and the output are sane.

    BatchNorm uses the statistics of the images: its own are those of the convolution until the model is calibrated. So
    an adder layer whose output goes on without a normalization shows as a large input of the next one.
    """
    measured = copy.deepcopy(model)
    scales: list[float] = []
    layers = adder_layers(measured)
    with (
        updating_statistics(measured),
        hooked(layers, pre=lambda _, inputs: scales.append(float(inputs[0].square().mean().sqrt()))),
    ):
        finite = bool(_output(measured, image).isfinite().all())
    largest = max(scales, default=0.0)
    return largest, finite and largest < LARGEST_SCALE


def _on_meta(name: str) -> nn.Module:
    try:
        with torch.device("meta"):
            model: nn.Module = timm.create_model(name, pretrained=False)
    except (RuntimeError, NotImplementedError):  # some models compute values, such as rates, when they are built
        model = timm.create_model(name, pretrained=False)
    return model


def _smallest_side(name: str) -> int:
    """Return the side of the smallest square images that the model accepts."""
    model = _on_meta(name).eval()
    channels, own, _ = input_size(model)
    device = next(model.parameters()).device
    for side in SIZES:
        if side >= own:
            break
        try:
            with torch.no_grad():
                model(torch.zeros(1, channels, side, side, device=device))
        except Exception:
            continue
        return side
    return own


def _agreement(model: nn.Module, image: Tensor) -> bool | None:
    """Return whether observation and symbolic tracing find the same uses; ``None`` if the model cannot be traced."""
    uses = symbolic_uses(copy.deepcopy(model), WEIGHT_LAYERS)
    if uses is None:
        return None
    seen = observe(model, image[:1], WEIGHT_LAYERS)
    return all(
        path in uses and (set(layer.consumers), bool(layer.functions)) == (set(uses[path][0]), bool(uses[path][1]))
        for path, layer in seen.items()
    )


@torch.no_grad()
def _output(model: nn.Module, image: Tensor) -> Tensor:
    output = model(image)
    return torch.cat([part.flatten() for part in output]) if isinstance(output, list | tuple) else output


def _same(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.nan_to_num(), second.nan_to_num())
