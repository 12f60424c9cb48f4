"""The command line: one short function per verb. Everything heavy is imported inside, so that ``--help`` is quick."""

import sys
from functools import partial
from typing import Annotated, Any, NoReturn

import typer

from adderkit.recipes.terminal.errors import fail, line_of
from adderkit.recipes.terminal.options import (
    BatchSize,
    Checkpoint,
    DataDir,
    Dataset,
    InChans,
    Json,
    NumClasses,
    Pretrained,
    Workers,
    print_json,
)
from adderkit.recipes.verbs.exchange_verbs import exchange_app
from adderkit.recipes.verbs.integer_verbs import integer_app
from adderkit.recipes.verbs.recipes import recipes_app

app = typer.Typer(
    name="adderkit",
    help="Turn convolutional timm models into adder networks and fine-tune them back to accuracy.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(recipes_app, name="recipes")
app.add_typer(integer_app)
app.add_typer(exchange_app)


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere.")] = False,
) -> None:
    """Options that every verb has."""


@app.command()
def convert(
    model: Annotated[str, typer.Option(help="timm name, hf-hub:… or a saved folder.")],
    to: Annotated[str, typer.Option(help="What convolutions become; 'adder' is the one target there is.")] = "adder",
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder to write; default MODEL-adder.")] = None,
    include: Annotated[list[str] | None, typer.Option(help="Modules to convert: path, glob or re:REGEX.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Modules to leave; wins over --include.")] = None,
    skip_first: Annotated[bool, typer.Option(help="Keep the first convolution.")] = True,
    skip_last: Annotated[bool, typer.Option(help="Keep the classifier.")] = True,
    skip_depthwise: Annotated[bool, typer.Option(help="Keep depthwise convolutions.")] = False,
    skip_gates: Annotated[bool, typer.Option(help="Keep unnormalized convolutions on 1x1 maps, as in gates.")] = True,
    norm: Annotated[str, typer.Option(help="Where no normalization follows: insert, skip or error.")] = "insert",
    min_fidelity: Annotated[
        float | None, typer.Option(min=0, max=1, help="Layers less faithful go back to convolutions.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="mults=N%: multiplications to spend on keeping the worst layers.")
    ] = None,
    dataset: Dataset = None,
    data_dir: DataDir = None,
    calibration_images: Annotated[int, typer.Option(min=16, help="Unlabeled images to calibrate on.")] = 512,
    calibration_steps: Annotated[int, typer.Option(min=0, help="Adam steps a layer; 0 only scales weights.")] = 240,
    matching_steps: Annotated[int, typer.Option(min=0, help="Steps of the fit of all layers together.")] = 120,
    calibration_memory: Annotated[float, typer.Option(min=0.1, help="GB that calibration may take.")] = 2.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of images and samples.")] = 0,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = True,
    num_classes: NumClasses = None,
    in_chans: InChans = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    json: Json = False,
) -> None:
    """Convert a CNN to an adder network; with --dataset also calibrate it on unlabeled training images."""
    from adderkit.recipes.terminal.tables import plan_table, show
    from adderkit.recipes.verbs.convert import ConversionJob, run_conversion

    if to != "adder":
        raise typer.BadParameter(f"'{to}' is unknown, expected 'adder'", param_hint="--to")
    job = ConversionJob(
        model=model,
        output=output,
        include=tuple(include or ("*",)),
        exclude=tuple(exclude or ()),
        skip_first=skip_first,
        skip_last=skip_last,
        skip_depthwise=skip_depthwise,
        skip_gates=skip_gates,
        norm=norm,  # type: ignore[arg-type]  # checked by AdderConfig
        min_fidelity=min_fidelity,
        budget=budget,
        dataset=dataset,
        data_dir=data_dir,
        images=calibration_images,
        steps=calibration_steps,
        matching_steps=matching_steps,
        memory=calibration_memory,
        seed=seed,
        checkpoint=checkpoint,
        pretrained=pretrained,
        num_classes=num_classes,
        in_chans=in_chans,
    )
    result = run_conversion(job, dry_run=dry_run, announce=_announce)
    if json:
        print_json(result.to_dict())
        return
    show(plan_table(result.plan, result.calibration))
    print(result.summary())


@app.command()
def finetune(
    model: Annotated[
        str | None, typer.Argument(help="Converted folder, or a timm name to train the CNN itself.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Recipe name or YAML file; default distill or cnn.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value; changes a recipe's setting.")] = None,
    dataset: Dataset = None,
    data_dir: DataDir = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the training images.")] = None,
    batch_size: BatchSize = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of weights, order and augmentation.")] = None,
    workers: Annotated[int | None, typer.Option("--workers", "-j", min=0, help="Loader processes.")] = None,
    save_every: Annotated[int | None, typer.Option(min=0, help="Steps between saves within an epoch.")] = None,
    teacher: Annotated[str | None, typer.Option(help="CNN to distil from; default: the one converted.")] = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = True,
    num_classes: NumClasses = None,
    in_chans: InChans = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Run folder; default runs/TIME-MODEL.")] = None,
    resume: Annotated[str | None, typer.Option(help="Run folder to continue; takes no other option.")] = None,
    num_processes: Annotated[int | None, typer.Option(min=1, help="Processes of this machine, one a GPU.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print plan, steps and memory; write nothing.")] = False,
    json: Json = False,
) -> None:
    """Fine-tune a converted model by distillation, or train a CNN."""
    from adderkit.recipes.configs.files import load_recipe, parse_settings
    from adderkit.recipes.runs.folder import RunFolder, new_run_folder
    from adderkit.recipes.terminal.tables import show, summary_table
    from adderkit.recipes.training import run as loop
    from adderkit.recipes.training.dry_run import dry_run as plan_run
    from adderkit.recipes.training.models import Job, default_recipe
    from adderkit.recipes.training.recovery import run_with_recovery

    if (model is None) == (resume is None):
        raise typer.BadParameter("give either a model to begin with, or --resume RUN_DIR", param_hint="MODEL")
    if num_processes is not None and num_processes > 1 and not dry_run:
        from adderkit.recipes.distributed.launch import launch

        sys.exit(launch(sys.argv[1:], num_processes))
    flags: dict[str, Any] = {"dataset": dataset, "data_dir": data_dir, "epochs": epochs, "batch_size": batch_size}
    flags |= {"lr": lr, "seed": seed, "workers": workers, "save_every": save_every}
    given = {key: value for key, value in flags.items() if value is not None}
    if resume is not None:
        others = (dry_run, given, recipe, set_, teacher, checkpoint, output, not pretrained, num_classes, in_chans)
        if any(others):
            raise typer.BadParameter("a run continues as it was begun; give no other option", param_hint="--resume")
        folder = RunFolder(resume)
        begin = partial(loop.resume, folder)
    else:
        assert model is not None
        settings = load_recipe(recipe or default_recipe(model)).changed({**given, **parse_settings(set_ or ())})
        job = Job(model, teacher, pretrained, checkpoint, num_classes, in_chans)
        if dry_run:
            planned = plan_run(job, settings, num_processes or 1)
            print_json(planned.to_dict()) if json else print(planned.text(), end="")
            return
        folder = new_run_folder(output, model, settings)
        begin = partial(loop.start, job, settings, folder)
    rows = run_with_recovery(begin, folder)
    if not loop.is_main_process():
        return
    if json:
        print_json({"output": str(folder.path), "rows": rows})
        return
    show(summary_table(rows))
    print(f"best model: {folder.best}")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Saved folder, or a timm name.")],
    dataset: Dataset = None,
    data_dir: DataDir = None,
    split: Annotated[str, typer.Option(help="Split to evaluate on.")] = "validation",
    batch_size: BatchSize = None,
    workers: Workers = 4,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = True,
    num_classes: NumClasses = None,
    in_chans: InChans = None,
    record: Annotated[bool, typer.Option("--record", help="Keep it in the folder's report, for publish.")] = False,
    json: Json = False,
) -> None:
    """Measure top-1, top-5, loss and images per second."""
    from adderkit.recipes.terminal.tables import metrics_table, show
    from adderkit.recipes.training.models import Job
    from adderkit.recipes.verbs.evaluate import evaluate_model

    job = Job(model, None, pretrained, checkpoint, num_classes, in_chans)
    metrics = evaluate_model(job, dataset, data_dir, split, batch_size or 128, workers, record=record)
    if json:
        print_json({"model": model, "dataset": dataset, "split": split, **metrics.to_dict()})
    else:
        show(metrics_table([(model, metrics)]))


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Saved folder, or a timm name (built without weights).")],
    num_classes: NumClasses = None,
    in_chans: InChans = None,
    input_size: Annotated[
        tuple[int, int, int] | None,
        typer.Option(help="Channels, height and width of the image; default: the model's own.", metavar="C H W"),
    ] = None,
    chart: Annotated[str | None, typer.Option(help="Also draw the layers: FILE.png or FILE.svg.")] = None,
    json: Json = False,
) -> None:
    """Count operations, bytes and energy of a model for one image, beside the CNN of the same shape."""
    from adderkit.recipes.terminal.tables import show
    from adderkit.recipes.verbs.inspect import cost_tables, run_inspection

    found = run_inspection(model, num_classes, in_chans, input_size, chart, _announce)
    if json:
        print_json({"model": model, **found.to_dict()})
        return
    for table in cost_tables(found):
        show(table)


@app.command()
def prune(
    model: Annotated[str, typer.Argument(help="Saved folder, adder network or CNN, or a timm name.")],
    ratio: Annotated[float | None, typer.Option(help="Share of the channels to remove, such as 0.3.")] = None,
    target: Annotated[
        str | None, typer.Option(help="What is to be left: mults=N%, adds=N%, params=N% or energy=N%.")
    ] = None,
    importance: Annotated[
        str, typer.Option(help="variance or taylor (with --dataset), batchnorm, magnitude or random.")
    ] = "variance",
    global_: Annotated[bool, typer.Option("--global", help="Compare channels across layers.")] = False,
    round_to: Annotated[int, typer.Option(min=1, help="Leave a multiple of this many channels.")] = 1,
    iterative: Annotated[int, typer.Option(min=1, help="Rounds, importance measured again in each.")] = 1,
    ignore: Annotated[list[str] | None, typer.Option(help="Layers that keep their channels: path, glob, re:…")] = None,
    dataset: Dataset = None,
    data_dir: DataDir = None,
    calibration_images: Annotated[int, typer.Option(min=16, help="Unlabeled images to measure on.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Of images, positions and the random importance.")] = 0,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder to write; default MODEL-pruned.")] = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = True,
    num_classes: NumClasses = None,
    in_chans: InChans = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would go and write nothing.")] = False,
    json: Json = False,
) -> None:
    """Remove whole channels from an adder network or a CNN."""
    from adderkit.convert.pruning.config import PruneConfig
    from adderkit.recipes.terminal.tables import show
    from adderkit.recipes.verbs.prune import PruningJob, pruning_tables, run_pruning

    kept = tuple(ignore or ())
    config = PruneConfig(ratio, target, importance, global_, round_to, iterative, kept, seed)  # type: ignore[arg-type]
    source = (checkpoint, pretrained, num_classes, in_chans)
    job = PruningJob(model, config, output, dataset, data_dir, calibration_images, *source)
    result = run_pruning(job, dry_run=dry_run, announce=_announce)
    if json:
        print_json(result.to_dict())
        return
    for table in pruning_tables(result.report):
        show(table)
    print(result.summary())


@app.command()
def publish(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Saved folder, such as runs/mine/best.")],
    repo: Annotated[str, typer.Option(help="user/name on the Hub; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Only you and your organization see it.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to, made if it is not there.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Build the folder, send nothing.")] = False,
    output: Annotated[str | None, typer.Option("--output", "-o", help="To build; default NAME-published.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a README.md, here and on the Hub.")] = False,
    license: Annotated[str | None, typer.Option("--license", help="Such as mit; default: the base model's.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Its CNN on the Hub; default: as recorded.")] = None,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Publish with adderkit",
    json: Json = False,
) -> None:
    """Build a folder with model card, costs and measurements, and upload it to the Hugging Face Hub."""
    from adderkit.recipes.hub.publishing import PublishJob, run_publish
    from adderkit.recipes.hub.upload import Target

    target = Target(repo, private, revision, create_pr, message)
    result = run_publish(PublishJob(folder, target, output, license, base_model, force, dry_run), _announce)
    if json:
        print_json(result.to_dict())
    else:
        print(result.summary())


@app.command()
def report(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Saved folder, such as runs/mine/best.")],
    output: Annotated[str | None, typer.Option("--output", "-o", help="File; default DIR-report.html.")] = None,
    dataset: Dataset = None,
    data_dir: DataDir = None,
    teacher: Annotated[str | None, typer.Option(help="CNN to compare with; default: the one converted.")] = None,
    json: Json = False,
) -> None:
    """Write one HTML page about a saved model; with --dataset also predictions of a few images."""
    from adderkit.recipes.reporting.report import ReportJob, run_report

    result = run_report(ReportJob(folder, output, dataset, data_dir, teacher), _announce)
    if json:
        print_json(result.to_dict())
    else:
        print(result.summary())


@app.command()
def demo(
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Folder to keep; default: a temporary one.")
    ] = None,
    json: Json = False,
) -> None:
    """The main job on scikit-learn's digits: teacher, convert, calibrate, fine-tune, save, reload, evaluate."""
    from adderkit.recipes.terminal.tables import demo_table, show
    from adderkit.recipes.verbs.demo import run_demo

    rows = run_demo(output, _announce)
    if json:
        print_json({"rows": [{"model": row.model, **row.metrics.to_dict()} for row in rows]})
    else:
        show(demo_table(rows))


def _announce(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry point: 0 done, 1 the work failed (one line, no traceback without --debug), 2 wrong usage."""
    words = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in words
    try:
        app([word for word in words if word != "--debug"], prog_name="adderkit")
    except Exception as error:
        if debug:
            raise
        fail(line_of(error))
    sys.exit(0)


def convert_main() -> NoReturn:
    """Entry point of the console script ``convert``, the same as ``adderkit convert``."""
    main(["convert", *sys.argv[1:]])
