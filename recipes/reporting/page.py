"""Self-contained HTML page of a report: no script, no network access, no other file."""

from base64 import b64encode
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ...convert.conversion.targets import ADDER
from ...convert.cost.area import name_equal_cnn
from ...convert.cost.energy import PRECISIONS, arithmetic_energy
from ...convert.cost.operations import Operations
from ...convert.cost.report import LayerCost
from ..runs.plots import LINES, TITLES
from .cost_image import layer_groups
from .evaluations import Evaluation
from .examples import Example, Examples, Guess
from .facts import LayerFact, ReportFacts, number
from .markup import Html, join, short, tag
from .parts import before_after, change_tile, engineering, layer_list, layer_row, table, tile, tiles
from .svg_charts import Line, line_chart

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_STYLE = Path(__file__).with_name("page.css")
_TINY = 48  # pixels; wider images are smoothed when they are enlarged
_PJ, _UJ = 1e-12, 1e6  # J, pJ

_ADDER = (
    "An adder layer outputs the negative L1 distance between window and filter, ",
    tag("span", "-Σ|x - w|", class_="whole"),
    ", whereas a convolution outputs Σx·w: it needs additions but no multiplications.",
)
_COUNTING = """All operations are counted, including the first and last layers, normalizations, activations and residual
sums. Papers count only weight layers, and count the first and last layers as adder layers."""
_ENERGY = """Energy of the arithmetic only, from the table by Horowitz (ISSCC 2014, 45 nm). On CPUs and GPUs an addition
takes as long as a multiplication: the savings need hardware designed for additions."""
_AREA = """The area is the number of transistors that compute one image in a million cycles, by logic synthesis, without
memory and wiring. Activations have 8 bits unless the model is quantized to fewer; the CNN has 8-bit weights and the
same requantization."""
_FIDELITY = """Correlation between the output of each adder layer and that of the convolution it replaced, averaged
over channels and for the worst channel, on images that were not used for the fit. It was measured during calibration,
before any training; 1 means equal up to scale and offset."""
_PRICES = {"mults": "multiplications", "adds": "additions", "params": "parameters"}
_SETTINGS = {
    "dataset": "data set",
    "epochs": "planned epochs",
    "batch_size": "batch size",
    "lr": "learning rate",
    "opt": "optimizer",
    "seed": "seed",
}


def page(facts: ReportFacts) -> str:
    """Return the page as HTML."""
    sections = {
        "conversion": ("What was converted, and why", _conversion(facts)),
        "pruning": ("What was pruned", _pruning(facts)),
        "cost": ("Cost per image", _cost(facts)),
        "fidelity": ("Fidelity of each layer", _fidelity(facts)),
        "training": ("Training", _training(facts)),
        "accuracy": ("Accuracy", _accuracy(facts)),
        "examples": ("Examples", _examples(facts.examples)),
        "provenance": ("How it was made", _making(facts)),
    }
    shown = {mark: section for mark, section in sections.items() if section[1]}
    links = (tag("a", mark.capitalize(), href=f"#{mark}") for mark in shown)
    parts = (tag("section", tag("h2", title), text, id=mark) for mark, (title, text) in shown.items())
    body = tag("body", _header(facts), tag("nav", *links, aria_label="Sections"), tag("main", *parts))
    return f"<!DOCTYPE html>\n{tag('html', _head(facts.name), body, lang='en')}\n"


def _head(name: str) -> Html:
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="generator", content="adderkit report"),
        tag("link", rel="icon", href="data:,"),  # otherwise a browser requests one
        tag("title", f"{name}: adderkit report"),
        tag("style", Html(_STYLE.read_text(encoding="utf-8"))),
    )


def _header(facts: ReportFacts) -> Html:
    what = f"{facts.base}{', pruned,' if facts.pruned else ''}"
    if facts.cost.integers:
        kinds = [row.kind for row in facts.cost.weight_layers]
        what += f" quantized to integers: {kinds.count('adder')} of {len(kinds)} weight layers are adder layers."
    elif facts.converted:
        made = Counter(layer.target for layer in facts.layers if layer.target is not None)
        parts = " and ".join(
            f"{count} of {len(facts.layers)} convolutions are {to} layers" for to, count in made.items()
        )
        what += f" as {_network(facts)}: {parts}."
    else:
        what += ": a CNN."
    before, after = facts.cost.honest_before, facts.cost.honest
    first, last = (arithmetic_energy(each, PRECISIONS["fp32"]) * _PJ for each in (before, after))
    shown = [
        change_tile("Multiplications per image", before.multiplications, after.multiplications),
        change_tile("Additions per image", before.additions, after.additions),
        change_tile("Arithmetic energy per image, fp32", first, last, "J"),
    ]
    for each in facts.evaluations[:1]:
        shown.append(
            tile(f"Top-1 on {each.dataset}, {each.split}", f"{_percent(each.top1)} %", f"{each.images:,} images")
        )
    return tag("header", tag("h1", facts.name), tag("p", what), tiles(shown))


def _network(facts: ReportFacts) -> str:
    """Return what the page calls the converted network, with its article."""
    adders_alone = {layer.target for layer in facts.layers} <= {ADDER, None}
    return "an adder network" if adders_alone else "a converted network"


def _conversion(facts: ReportFacts) -> Html:
    if not facts.converted:
        return Html()
    groups = Counter((layer.target, layer.reason) for layer in facts.layers).most_common()
    why = ([_kind(target), reason or "not recorded", f"{count:,}"] for (target, reason), count in groups)
    layers = tag("ol", *map(_described, facts.layers), class_="layers")
    parts = [
        tag("p", *_ADDER) if any(layer.target == ADDER for layer in facts.layers) else Html(),
        table(("decision", "reason", "layers"), why, numbers=1),
        tag("h3", "Layer by layer"),
        layers,
    ]
    return join(parts)


def _described(fact: LayerFact) -> Html:
    layer, terms = fact.layer, getattr(fact.layer, "terms", 1)
    size = "x".join(map(str, layer.kernel_size))
    words = [f"{size}, {layer.in_channels} → {layer.out_channels} channels"]
    words += [f"{terms} terms per weight"] * (terms > 1)
    words += [f"stride {layer.stride[0]}"] * (layer.stride[0] > 1) + [f"{layer.groups} groups"] * (layer.groups > 1)
    head = tag("div", tag("code", fact.path), _kind(fact.target), class_="row")
    return tag(
        "li", head, tag("div", "; ".join([", ".join(words), *([fact.reason] if fact.reason else [])]), class_="faint")
    )


def _kind(target: str | None) -> Html:
    if target is None:
        return tag("span", "convolution", class_="kind kept")
    return tag("span", f"{target} layer", class_="kind adder")


def _pruning(facts: ReportFacts) -> Html:
    """Describe the last pruning; ``config.json`` has the earlier ones."""
    if not facts.pruned:
        return Html()
    noted = facts.pruning
    asked = next((f"{key} {noted[key]}" for key in ("target", "ratio") if key in noted), "amount not recorded")
    text = f"Whole channels were removed, least important first: {asked}, importance {noted.get('importance', '?')}"
    if images := noted.get("images"):
        text += f", measured on {images} unlabeled images"
    rows = [before_after(label, *facts.prices[key], ",.0f") for key, label in _PRICES.items() if key in facts.prices]
    if "energy" in facts.prices:
        first, last = (value / _UJ for value in facts.prices["energy"])
        rows.append(before_after("energy in µJ, fp32", first, last, ",.1f"))
    return join([tag("p", f"{text}."), *([table(("", "before", "after"), rows, numbers=2)] if rows else [])])


def _cost(facts: ReportFacts) -> Html:
    cost = facts.cost
    pairs = {"": (cost.honest_before, cost.honest), ", as in papers": (cost.headline_before, cost.headline)}
    rows = [
        before_after(f"{what}{how}", *(getattr(count, what) for count in counts))
        for how, counts in pairs.items()
        for what in ("multiplications", "additions")
    ]
    for name, form in PRECISIONS.items():
        before, after = (arithmetic_energy(each, form) / _UJ for each in (cost.honest_before, cost.honest))
        rows.append(before_after(f"energy in µJ, {name}", before, after, ",.1f"))
    rows.append(before_after("area in transistors, integers", cost.cnn_area(8), cost.area, ",.0f"))
    shape = "x".join(map(str, cost.input_shape))
    uncounted = f" Not counted, for lack of a formula: {', '.join(cost.uncounted)}." if cost.uncounted else ""
    return join(
        [
            tag("p", f"For an input image of {shape}; {cost.parameters:,} parameters. {_COUNTING}{uncounted}"),
            table(("", "as a CNN", "this model"), rows, numbers=2),
            tag("p", f"As integers, this model takes {name_equal_cnn(cost.area, cost.cnn_area)}."),
            tag("p", _ENERGY, class_="faint"),
            tag("p", _AREA, class_="faint"),
            *_cost_chart(facts),
        ]
    )


def _cost_chart(facts: ReportFacts) -> list[Html]:
    groups = layer_groups(facts.cost)
    counts = [_multiplications(group) for group in groups]
    largest = max([before for before, _ in counts], default=0) or 1
    first = int(facts.cost.honest == facts.cost.honest_before)  # as for a floating-point CNN
    rows = [
        layer_row(
            group[0].path or "(model)",
            " → ".join([engineering(before), engineering(after)][first:]),
            [(before / largest, "before"), (after / largest, "after")][first:],
            f"{before:,} multiplications as a CNN, {after:,} now",
        )
        for group, (before, after) in zip(groups, counts, strict=True)
    ]
    keys = [("before", "as a CNN"), ("after", "this model")][first:]
    note = "Each row includes the normalization and all other operations up to the next layer."
    title = tag("h3", "Multiplications, layer by layer")
    return [title, tag("p", note, class_="faint"), *layer_list(rows, keys)]


def _multiplications(group: Sequence[LayerCost]) -> tuple[int, int]:
    before, after = (sum((getattr(row, when) for row in group), Operations()) for when in ("before", "operations"))
    return before.multiplications, after.multiplications


def _fidelity(facts: ReportFacts) -> Html:
    if not facts.converted:
        return Html()
    found = [(layer, *layer.fidelity) for layer in facts.layers if layer.fidelity is not None]
    if not found:
        command = tag("code", "adderkit convert --dataset NAME")
        return tag("p", "Unknown, since the model was not calibrated; ", command, " calibrates and measures it.")
    rows = [
        layer_row(
            layer.path,
            f"{mean:.3f}, worst {worst:.3f}",
            [(mean, "kept" if layer.target is None else "adder")],
            f"correlation {mean:.3f}, worst channel {worst:.3f}",
        )
        for layer, mean, worst in found
    ]
    back = [("kept", "reverted to a convolution")] * any(layer.target is None for layer, *_ in found)
    return join([tag("p", _FIDELITY), *layer_list(rows, [("adder", "adder layer"), *back])])


def _training(facts: ReportFacts) -> Html:
    noted = [f"{label} {facts.training[key]}" for key, label in _SETTINGS.items() if key in facts.training]
    epochs = [row["epoch"] for row in facts.epochs]
    if not noted and not epochs:
        return tag("p", "Not trained since the conversion." if facts.converted else "No training is recorded.")
    charts = []
    for name, columns in LINES.items():
        lines = [
            Line(label, color, [row.get(column, float("nan")) for row in facts.epochs])
            for column, (label, color) in columns.items()
            if any(column in row for row in facts.epochs)
        ]
        charts.append(line_chart(TITLES[name], epochs, lines))
    missing = (
        [] if epochs else [tag("p", "There are no curves, since the model is not in a run folder.", class_="faint")]
    )
    return join([tag("p", ", ".join(noted)), tag("div", *charts, class_="charts"), *missing])


def _accuracy(facts: ReportFacts) -> Html:
    if not facts.evaluations:
        command = "adderkit evaluate DIR --dataset NAME --record"
        return tag("p", "Not measured. To add it: ", tag("code", command))
    this = _network(facts).partition(" ")[2] if facts.converted else "this model"
    rows = [
        *(_accuracy_row("teacher", each) for each in facts.teacher_evaluations),
        *(_accuracy_row(this, each) for each in facts.evaluations),
    ]
    return table(("model and data set", "images", "top-1 %", "top-5 %"), rows, numbers=3)


def _accuracy_row(model: str, found: Evaluation) -> list[str]:
    name = join([model, tag("div", f"{found.dataset}, {found.split}", class_="faint")])
    return [name, f"{found.images:,}", _percent(found.top1), _percent(found.top5)]


def _percent(value: object) -> str:
    found = number(value)
    return "?" if found is None else f"{found:.2f}"


def _examples(examples: Examples | None) -> Html:
    if examples is None:
        command = "adderkit report DIR --dataset NAME"
        return tag("p", "Omitted, since no data set was given. To add them: ", tag("code", command))
    text = f"{len(examples.first)} of {examples.images} random validation images of {examples.dataset}."
    if examples.agreeing is not None:
        text += f" The model and its teacher agree on {examples.agreeing} of the {examples.images}."
    if examples.no_teacher:
        text += f" No comparison with a teacher: {examples.no_teacher}."
    parts = [tag("p", text), tag("ul", *map(_example, examples.first), class_="examples")]
    if examples.differing:
        parts.append(tag("h3", "Disagreements between model and teacher"))
        parts.append(tag("ul", *map(_example, examples.differing), class_="examples"))
    return join(parts)


def _example(example: Example) -> Html:
    width = int.from_bytes(example.picture[16:20], "big")  # from the PNG header
    picture = tag(
        "img",
        src=f"data:image/png;base64,{b64encode(example.picture).decode()}",
        alt=f"image {example.number}: {short(example.truth)}",
        class_="tiny" if width <= _TINY else None,
    )
    columns = {"model": example.student, **({"teacher": example.teacher} if example.teacher else {})}
    rows = [
        tag("tr", *(_guess(guess, example.truth, rank) for guess in row))
        for rank, row in enumerate(zip(*columns.values(), strict=True))
    ]
    head = tag("thead", tag("tr", *(tag("th", name) for name in columns)))
    words = tag(
        "div", tag("p", tag("strong", example.truth)), tag("table", head, tag("tbody", *rows)), class_="guesses"
    )
    return tag("li", picture, words)


def _guess(guess: Guess, truth: str, rank: int) -> Html:
    wrong = rank == 0 and guess.label != truth
    probability = tag("span", f"{100 * guess.probability:.1f} %", class_="whole")
    return tag("td", "✗ " if wrong else "", probability, " ", guess.label, class_="wrong" if wrong else None)


def _making(facts: ReportFacts) -> Html:
    parts, found = [], facts.calibration
    if found:
        images, steps, matching, seed = (found.get(key, "?") for key in ("images", "steps", "matching_steps", "seed"))
        text = (
            f"Calibrated on {images} unlabeled images: {steps} steps for each layer, {matching} steps for all layers "
        )
        parts.append(tag("p", f"{text}together, seed {seed}."))
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    rows = [["weights, SHA-256", tag("code", facts.digest)], ["saved with", versions or "not recorded"]]
    return join([*parts, *(tag("pre", command) for command in facts.commands), table((), rows)])
