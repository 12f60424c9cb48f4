"""Options that several verbs share."""

from typing import Annotated, Any

import typer

from ..data.unlabeled import UnlabeledImages

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result at --output.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]
Dataset = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Data set: digits, fashion-mnist, folder, hfds/…, wds/… or torch/…."),
]
DataDir = Annotated[str | None, typer.Option(metavar="DIR", help="Folder with the files of the data set.")]
TrainSplit = Annotated[
    str | None, typer.Option(metavar="NAME", help="Training split.", show_default=UnlabeledImages.split)
]
ValSplit = Annotated[str | None, typer.Option(metavar="NAME", help="Evaluation split.", show_default="validation")]
ClassMap = Annotated[
    str | None, typer.Option(metavar="FILE", help="Class index of each class name: .txt or .json.", show_default="none")
]
Device = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Device: cpu, cuda or cuda:N.", show_default="the GPU, if there is one"),
]
CalibrationImages = Annotated[int, typer.Option(min=16, metavar="N", help="Number of unlabeled training images.")]
Checkpoint = Annotated[
    str | None, typer.Option(metavar="PATH", help="File or folder of weights to load instead of pretrained ones.")
]
Teacher = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="CNN to learn from or compare with.", show_default="the converted one"),
]
TeacherCheckpoint = Annotated[
    str | None, typer.Option(metavar="PATH", help="File or folder of weights of --teacher.", show_default=False)
]
Pretrained = Annotated[bool, typer.Option(help="Start from pretrained weights rather than random ones.")]
NumClasses = Annotated[int | None, typer.Option(min=1, metavar="N", help="Number of classes.")]
InChans = Annotated[int | None, typer.Option(min=1, metavar="N", help="Number of input channels.")]
BatchSize = Annotated[int, typer.Option("--batch-size", "-b", min=1, metavar="N", help="Images per forward pass.")]
Workers = Annotated[int, typer.Option("--workers", "-j", min=0, metavar="N", help="Number of data loader processes.")]


def output_option(metavar: str, default: str, help: str = "Folder to write.") -> Any:
    """Return the option ``--output``, which help lists with a default that depends on other arguments."""
    return typer.Option("--output", "-o", metavar=metavar, help=help, show_default=default)


def unlabeled_images(
    dataset: str | None, data_dir: str | None, split: str | None, count: int, seed: int
) -> UnlabeledImages | None:
    """Return the images that ``--dataset`` and the options about it name, if any."""
    if dataset is not None:
        return UnlabeledImages(dataset, data_dir, count, seed, split or UnlabeledImages.split)
    if data_dir is not None:
        raise typer.BadParameter("give --dataset as well", param_hint="--data-dir")
    return None


def check_teacher(teacher: str | None, checkpoint: str | None) -> None:
    """Refuse ``--teacher-checkpoint`` without the architecture that the weights are for."""
    if checkpoint is not None and teacher is None:
        raise typer.BadParameter("give its architecture with --teacher NAME as well", param_hint="--teacher-checkpoint")
