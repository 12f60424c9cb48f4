"""``adderkit recipes``: list, show and copy the shipped recipes."""

from typing import Annotated

import typer

from ..terminal.options import Json
from ..terminal.output import print_json

recipes_app = typer.Typer(help="Recipes: settings of training runs.", no_args_is_help=True)


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
def recipes_show(name: Annotated[str, typer.Argument(help="Recipe name or YAML file.")]) -> None:
    """Print a recipe, header included; redirect it to a file to make your own."""
    from ..configs.files import load_recipe, recipe_text

    load_recipe(name)
    print(recipe_text(name), end="")


@recipes_app.command("copy")
def recipes_copy(
    name: Annotated[str, typer.Argument(help="Recipe name or YAML file.")],
    file: Annotated[str | None, typer.Argument(help="File to write; default NAME.yaml here.")] = None,
) -> None:
    """Write a recipe, header included, to a file of your own to change; an existing file is not overwritten."""
    from ..configs.files import copy_recipe

    print(f"recipe written: {copy_recipe(name, file)}")
