"""The command line: the verbs under one roof, and the entry points.

Verbs import everything heavy inside their functions, so that ``--help`` is quick.
"""

import sys
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer

from adderkit import __version__
from adderkit.convert.user_models import import_models, split_imports
from adderkit.recipes.distributed.worker import follow_launcher
from adderkit.recipes.terminal.errors import fail, one_line
from adderkit.recipes.verbs.bench import bench
from adderkit.recipes.verbs.convert import convert
from adderkit.recipes.verbs.demo import demo
from adderkit.recipes.verbs.evaluate import evaluate
from adderkit.recipes.verbs.export import export
from adderkit.recipes.verbs.finetune import finetune
from adderkit.recipes.verbs.import_checkpoint import import_checkpoint
from adderkit.recipes.verbs.inspect import inspect
from adderkit.recipes.verbs.prune import prune
from adderkit.recipes.verbs.publish import publish
from adderkit.recipes.verbs.quantize import quantize
from adderkit.recipes.verbs.recipes import recipes_app
from adderkit.recipes.verbs.report import report

# In the order of --help.
_VERBS: tuple[Callable[..., Any], ...] = (
    *(convert, finetune, evaluate, inspect, prune, quantize, bench),
    *(export, import_checkpoint, publish, report, demo),
)

app = typer.Typer(
    name="adderkit",
    help="Convert convolutional timm models into adder networks and recover their accuracy.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _verb in _VERBS:
    app.command()(_verb)
app.add_typer(recipes_app, name="recipes")


def _print_version(asked: bool) -> None:
    if asked:
        print(f"adderkit {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; accepted anywhere.")] = False,
    import_: Annotated[
        list[str] | None,
        typer.Option(
            "--import",
            metavar="FILE|MODULE",
            help="Your Python code that registers networks with timm; accepted anywhere.",
        ),
    ] = None,
) -> None:
    """Define the options that every verb accepts."""


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 on success, 1 if the work failed, 2 on wrong usage.

    A failure is printed as one line; ``--debug`` shows its traceback instead.
    """
    follow_launcher()
    words = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in words
    try:
        words, modules = split_imports([word for word in words if word != "--debug"])
        for module in modules:
            import_models(module, debug)
        app(words, prog_name="adderkit")
    except Exception as error:
        if debug:
            raise
        fail(one_line(error))
    sys.exit(0)


def convert_main() -> NoReturn:
    """Run the console script ``convert``, which is ``adderkit convert``."""
    main(["convert", *sys.argv[1:]])
