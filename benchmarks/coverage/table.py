"""Document with the results of the sweep over timm: a row for each family, and the failures."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch

Line = Mapping[str, Any]
SMALL = 30_000_000  # parameters; all smaller models are run

HEAD = """# Coverage of timm

Written by `python -m benchmarks.coverage.timm_sweep --report docs/coverage.md` from the results of
`python -m benchmarks.coverage.timm_sweep` with timm {timm}, torch {torch}. Do not edit it by hand.

Plans are made on `meta` tensors at each model's own input size, with the default configuration. A run builds the model
with random weights, converts it, and checks it on two random images of the smallest size that it accepts: forward,
inputs of all adder layers bounded when BatchNorm uses the statistics of the images, save, load (bit-equal), revert
(bit-equal to the original). Nothing is calibrated, so the results show that conversion works, not how accurate it is.

| item | number |
|---|---|
"""


def report(lines: Sequence[Line], families: Mapping[str, Sequence[str]]) -> str:
    """Return the document as Markdown.

    Args:
        lines: Results of the trials; if there are several for one model, the last one counts.
        families: Models by family.
    """
    plans = {line["model"]: line for line in lines if line["kind"] == "plan"}
    runs = {line["model"]: line for line in lines if line["kind"] == "run"}
    known = [name for members in families.values() for name in members]
    text = HEAD.format(timm=timm.__version__, torch=torch.__version__.split("+")[0])
    text += "".join(f"| {what} | {number} |\n" for what, number in _totals(known, plans, runs))
    text += "\n## Families\n\n`+BN`: convolutions that get a BatchNorm2d of their own, because none, or a GroupNorm or "
    text += "LayerNorm, follows.\n\n"
    text += "| family | models | convert | convolutions converted | +BN | skipped, by reason | runs passed |\n"
    text += "|---|---:|---:|---:|---:|---|---:|\n"
    for family, members in sorted(families.items()):
        text += _row(family, members, plans, runs)
    return text + _refusals(plans) + _failures([*plans.values(), *runs.values()])


def _totals(known: Sequence[str], plans: Mapping[str, Line], runs: Mapping[str, Line]) -> list[tuple[str, str]]:
    """Return label and number of each total over all models."""
    planned = [plans[name] for name in known if name in plans]
    with_conv = [line for line in planned if line.get("convolutions", 1)]
    good = [line for line in with_conv if "failure" not in line]
    converting = [line for line in good if line.get("converted")]
    ran = [runs[name] for name in known if name in runs]
    passed = [line for line in ran if "failure" not in line and "refused" not in line]
    bad = {line["model"] for line in (*with_conv, *ran) if "failure" in line}
    agreement = Counter(str(line.get("agreement")) for line in ran)
    sound = len(with_conv) - len(bad & {line["model"] for line in with_conv})
    return [
        ("models of timm", str(len(known))),
        ("planned", str(len(planned))),
        ("with a `Conv2d`", str(len(with_conv))),
        ("of those: something is converted", str(len(converting))),
        ("of those: nothing can be converted, for one clear reason", str(len(good) - len(converting))),
        ("of those: no failure in plan or run", f"{sound} ({100 * sound / max(1, len(with_conv)):.2f} %)"),
        ("convolutions converted", f"{sum(line['converted'] for line in converting):,}"),
        ("of those: BatchNorm2d inserted", f"{sum(line['inserted'] for line in converting):,}"),
        ("of those: transformed weight folded", f"{sum(line['folded'] for line in converting):,}"),
        ("convolutions skipped", f"{sum(sum(line['skipped'].values()) for line in converting):,}"),
        ("models run", str(len(ran))),
        ("of those: all checks passed", str(len(passed))),
        (
            "of those: `torch.fx` can trace the model, and agrees with / differs from the observed run",
            f"{agreement['True']} / {agreement['False']}",
        ),
        (
            "models below 30 M parameters that convert but were not run yet",
            str(sum(line["parameters"] < SMALL and line["model"] not in runs for line in converting)),
        ),
    ]


def _row(family: str, members: Sequence[str], plans: Mapping[str, Line], runs: Mapping[str, Line]) -> str:
    planned = [plans[name] for name in members if name in plans]
    converting = [line for line in planned if line.get("converted")]
    ran = [runs[name] for name in members if name in runs]
    passed = sum("failure" not in line and "refused" not in line for line in ran)
    converted, inserted = (sum(line[key] for line in converting) for key in ("converted", "inserted"))
    reasons: Counter[str] = Counter()
    for line in converting:
        reasons.update(line["skipped"])
    skipped = "; ".join(f"{number} {reason}" for reason, number in reasons.most_common())
    return (
        f"| {family} | {len(planned)} of {len(members)} | {len(converting)} | {converted:,} | {inserted:,} "
        f"| {skipped or '-'} | {f'{passed} of {len(ran)}' if ran else '-'} |\n"
    )


def _refusals(plans: Mapping[str, Line]) -> str:
    """Return the table of models in which nothing can be converted, by reason."""
    models: dict[str, list[str]] = {}
    for name, line in plans.items():
        if "refused" in line:
            models.setdefault(line["refused"].split(": ", 1)[-1], []).append(name)
    text = "\n## Nothing to convert\n\n| reason | models | examples |\n|---|---:|---|\n"
    for reason, names in sorted(models.items(), key=lambda item: -len(item[1])):
        text += f"| {reason} | {len(names)} | {', '.join(names[:3])} |\n"
    return text


def _failures(lines: Sequence[Line]) -> str:
    failed = [line for line in lines if "failure" in line]
    if not failed:
        return "\n## Failures\n\nNone.\n"
    text = "\n## Failures\n\n| model | trial | failure |\n|---|---|---|\n"
    for line in failed:
        text += f"| {line['model']} | {line['kind']} | {line['failure'].replace('|', '/')} |\n"
    return text
