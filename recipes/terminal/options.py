"""Options that several verbs of the command line have, and the one way to answer ``--json``."""

from json import dumps, loads
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Dataset = Annotated[str | None, typer.Option(help="digits, fashion-mnist, folder, or timm's hfds/…, wds/…, torch/….")]
DataDir = Annotated[str | None, typer.Option(help="Where the data set's files are.")]
Checkpoint = Annotated[str | None, typer.Option(help="Weights to take instead of the Hub's: a file or a folder.")]
Pretrained = Annotated[bool, typer.Option(help="Start from pretrained weights; --no-pretrained: random ones.")]
NumClasses = Annotated[int | None, typer.Option(min=1, help="Number of classes.")]
InChans = Annotated[int | None, typer.Option(min=1, help="Channels of the images.")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", "-b", min=1, help="Images in a forward pass.")]
Workers = Annotated[int, typer.Option("--workers", "-j", min=0, help="Loader processes.")]


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object; JSON knows no NaN, so a loss that is one comes out as null."""
    print(dumps(loads(dumps(value), parse_constant=lambda _: None)))
