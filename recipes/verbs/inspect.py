"""``adderkit inspect``: count the operations, bytes, energy and area of a model."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from ..terminal.options import InChans, Json, NumClasses
from ..terminal.output import announce, print_json

if TYPE_CHECKING:
    from ...convert.cost.report import Cost
    from ...convert.model_source import ModelSource


def inspect(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Saved folder, or timm model name to build without weights.")
    ],
    num_classes: NumClasses = None,
    in_chans: InChans = None,
    input_size: Annotated[
        tuple[int, int, int] | None,
        typer.Option(metavar="C H W", help="Shape of the input image.", show_default="the model's own"),
    ] = None,
    chart: Annotated[str | None, typer.Option(metavar="FILE", help="Also draw a chart: .png or .svg.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier chart.")] = False,
    json: Json = False,
) -> None:
    """Count operations, bytes, energy and area of a model.

    Counts are for one image, next to those of a CNN of the same shape.
    """
    from ...convert.model_source import ModelSource
    from ..terminal.cost_tables import cost_tables
    from ..terminal.tables import show

    source = ModelSource(model, num_classes=num_classes, in_chans=in_chans)
    found = run_inspection(source, input_size, chart, announce, overwrite=overwrite)
    if json:
        print_json({"model": model, **found.to_dict()})
    else:
        show(*cost_tables(found))


def run_inspection(
    source: "ModelSource",
    input_size: tuple[int, int, int] | None = None,
    chart: str | None = None,
    announce: Callable[[str], None] = announce,
    *,
    overwrite: bool = False,
) -> "Cost":
    """Count a model's cost and, if asked to, draw it.

    Args:
        source: Model to count; one that is not a saved folder is built without weights, which counting does not need.
        input_size: ``(channels, height, width)`` of the image; by default the model's own.
        chart: PNG or SVG file to draw.
        announce: Called with a line that names the chart.
        overwrite: Replace an earlier chart.

    Raises:
        AdderkitError: The model or the image size is wrong, or the chart cannot be written.
    """
    from ...convert.cost.cost import cost
    from ...convert.errors import AdderkitError
    from ..reporting.cost_image import check_chart, draw_chart

    if input_size is not None and min(input_size) < 1:
        raise AdderkitError(f"input size is {' '.join(map(str, input_size))}, expected three positive numbers")
    target = (
        check_chart(chart, overwrite=overwrite) if chart is not None else None
    )  # before the count, which may take long
    found = cost(source.build(weights=source.folder is not None), input_size)
    if target is not None:
        draw_chart(found, target, source.short_name)
        announce(f"chart: {target}")
    return found
