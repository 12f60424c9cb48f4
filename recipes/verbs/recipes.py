"""``adderkit recipes``: list, print and copy the shipped recipes."""

from typing import Annotated

import typer

from ..terminal.options import Json
from ..terminal.output import print_json

recipes_app = typer.Typer(help="List, print or copy the shipped training recipes.", no_args_is_help=True)


@recipes_app.command("ls")
def recipes_ls(json: Json = False) -> None:
    """List the shipped recipes."""
    from ..configs.files import load_recipe, recipe_names

    found = {name: load_recipe(name).description for name in recipe_names()}
    if json:
        print_json(found)
    else:
        for name, description in found.items():
            print(f"{name:<20}{description}")


@recipes_app.command("show")
def recipes_show(name: Annotated[str, typer.Argument(metavar="NAME", help="Shipped recipe or YAML file.")]) -> None:
    """Print a recipe with its header."""
    from ..configs.files import load_recipe, recipe_text

    load_recipe(name)
    print(recipe_text(name), end="")


@recipes_app.command("copy")
def recipes_copy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Shipped recipe or YAML file.")],
    file: Annotated[str | None, typer.Argument(metavar="FILE", help="File to write.", show_default="NAME.yaml")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Copy a recipe to a file of your own."""
    from ..configs.files import copy_recipe

    print(f"recipe written: {copy_recipe(name, file, overwrite=overwrite)}")
