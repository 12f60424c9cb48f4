"""``adderkit publish``: build a folder for the Hugging Face Hub and upload it."""

from typing import Annotated

import typer

from ..terminal.options import Json, output_option
from ..terminal.output import announce, print_json


def publish(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Saved folder, such as runs/mine/best.")],
    repo: Annotated[str, typer.Option(metavar="USER/NAME", help="Hub repository; created if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Create the repository as a private one.")] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="Branch to commit to; created if it does not exist.")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Build the folder without uploading it.")] = False,
    output: Annotated[str | None, output_option("DIR", "NAME-published", "Folder to build.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an edited README.md, here and on the Hub.")] = False,
    license: Annotated[
        str | None,
        typer.Option(metavar="ID", help="License identifier, such as mit.", show_default="the base model's"),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(metavar="USER/NAME", help="The original CNN on the Hub.", show_default="as recorded")
    ] = None,
    message: Annotated[str, typer.Option(metavar="TEXT", help="Commit message.")] = "Publish with adderkit",
    json: Json = False,
) -> None:
    """Upload a saved model to the Hugging Face Hub.

    First builds a folder with model card, costs and measurements.
    """
    from ..hub.publishing import PublishJob, run_publish
    from ..hub.upload import Target

    target = Target(repo, private, revision, create_pr, message)
    result = run_publish(PublishJob(folder, target, output, license, base_model, force, dry_run), announce)
    if json:
        print_json(result.to_dict())
    else:
        print(result.summary())
