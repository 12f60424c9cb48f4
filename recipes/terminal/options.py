"""Options that several verbs share."""

from typing import Annotated

import typer

from ..data.unlabeled import UnlabeledImages

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]
Dataset = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="digits, fashion-mnist, folder, or a timm reader: hfds/…, wds/…, torch/…."),
]
DataDir = Annotated[str | None, typer.Option(metavar="DIR", help="Folder with the files of the data set.")]
CalibrationImages = Annotated[int, typer.Option(min=16, help="Number of unlabeled training images to use.")]
Checkpoint = Annotated[
    str | None, typer.Option(metavar="PATH", help="Load weights from this file or folder instead of the Hub.")
]
Pretrained = Annotated[bool, typer.Option(help="Start from pretrained weights rather than random ones.")]
NumClasses = Annotated[int | None, typer.Option(min=1, help="Number of classes.")]
InChans = Annotated[int | None, typer.Option(min=1, help="Number of input channels.")]
BatchSize = Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Images per forward pass.")]
Workers = Annotated[int, typer.Option("--workers", "-j", min=0, help="Number of data loader processes.")]


def unlabeled_images(dataset: str | None, data_dir: str | None, count: int) -> UnlabeledImages | None:
    """Return the images that ``--dataset``, ``--data-dir`` and ``--calibration-images`` name, if any."""
    if dataset is not None:
        return UnlabeledImages(dataset, data_dir, count)
    if data_dir is not None:
        raise typer.BadParameter("give --dataset as well", param_hint="--data-dir")
    return None
