"""The model card of a published folder: description, cost, accuracy, origin and limits of the model."""

import dataclasses
import re
from collections.abc import Sequence

from ...convert.checkpoint.model_card import beginning, front_matter
from ...convert.checkpoint.report import Report
from ...convert.cost.report import Cost
from ..reporting.evaluations import Evaluation, eval_results, hub_dataset
from ..runs.provenance import part_of
from .licenses import License

_LONGEST = 80  # characters that are shown of a text in the report

_LIMITS = """
## Limits

- The model needs adderkit: without it, timm and the snippet on the Hub's page fail with `Unknown model (adder)`.
- Fewer multiplications do not mean less time: on CPUs and GPUs an addition takes as long as a multiplication.
- Fine-tuning needs adderkit, too: the layers use AdderNet's gradients, and BatchNorm statistics are re-estimated.
"""

_CITATION = """
## Citation

```bibtex
@inproceedings{chen2020addernet,
  title     = {AdderNet: Do We Really Need Multiplications in Deep Learning?},
  author    = {Chen, Hanting and Wang, Yunhe and Xu, Chunjing and Shi, Boxin and Xu, Chao and Tian, Qi and Xu, Chang},
  booktitle = {Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2020}
}
```
"""


@dataclasses.dataclass(frozen=True)
class CardFacts:
    """Everything that a model card states.

    Args:
        repository: Repository on the Hub, ``user/name``.
        base: Architecture in timm's registry.
        converted: Whether the model is an adder network.
        pruned: Whether channels were removed.
        license: License of the model.
        base_model: Hub repository of the model that it was made from; ``None`` for one that is not on the Hub.
        cost: Cost of the model for one image.
        evaluations: Measured accuracies.
        report: Report that is published.
        pictures: Paths of the training curves, relative to the card.
        chart: Path of the cost chart, relative to the card.
    """

    repository: str
    base: str
    converted: bool
    pruned: bool
    license: License
    base_model: str | None
    cost: Cost
    evaluations: Sequence[Evaluation]
    report: Report
    pictures: Sequence[str]
    chart: str


def published_card(facts: CardFacts) -> str:
    """Return the card as Markdown with front matter."""
    name = facts.repository.split("/")[1]
    parts = [
        _front_matter(facts, name),
        beginning(facts.base, facts.converted, name, f"hf-hub:{facts.repository}", bool(facts.cost.integers)),
        _image(facts.cost.input_shape),
        _cost(facts),
        _accuracy(facts.evaluations),
        _making(facts),
        _LIMITS if facts.converted else "",
        _CITATION if facts.converted else "",
    ]
    return "".join(parts)


def _front_matter(facts: CardFacts, name: str) -> str:
    training = part_of(facts.report.training, "recipe").get("dataset")
    used = [training, *(each.dataset for each in facts.evaluations)]
    datasets = list(dict.fromkeys(found for each in used if isinstance(each, str) and (found := hub_dataset(each))))
    results = [result for each in facts.evaluations for result in eval_results(each)]
    return front_matter(
        facts.converted,
        ["pruned"] if facts.pruned else [],
        license=facts.license.identifier,
        license_name=facts.license.name,
        license_link=f"https://huggingface.co/{facts.base_model}" if facts.license.name and facts.base_model else None,
        base_model=facts.base_model,
        base_model_relation="finetune" if facts.base_model else None,  # the best fit of the Hub's four relations
        datasets=datasets or None,
        metrics=["accuracy"] if results else None,
        model_name=name if results else None,
        eval_results=results or None,
    )


def _image(shape: tuple[int, ...]) -> str:
    size = ", ".join(map(str, shape))
    return (
        "\n```python\nimport torch\n\n"
        "data = timm.data.resolve_data_config(model.pretrained_cfg)\n"
        "transform = timm.data.create_transform(**data)  # for Pillow images\n"
        f"logits = model(torch.zeros(1, {size}))\n```\n"
    )


def _cost(facts: CardFacts) -> str:
    cost = facts.cost
    shape = "x".join(map(str, cost.input_shape))
    rows = (
        ("the original CNN, all operations", cost.honest_before),
        ("this model, all operations", cost.honest),
        ("the original CNN, weight layers only, as in papers", cost.headline_before),
        ("this model, weight layers only, as in papers", cost.headline),
    )
    lines = [
        f"\n## Cost of one {shape} image\n",
        "| | multiplications | additions |",
        "|---|---|---|",
        *(f"| {label} | {count.multiplications:,} | {count.additions:,} |" for label, count in rows),
        f"\n{cost.parameters:,} parameters.\n",
        f"![Multiplications and additions of each layer]({facts.chart})\n",
    ]
    return "\n".join(lines)


def _accuracy(evaluations: Sequence[Evaluation]) -> str:
    if not evaluations:
        return "\n## Accuracy\n\nNot measured.\n"
    rows = [
        f"| {_plain(each.dataset)} | {_plain(each.split)} | {each.images:,} | {each.top1:.2f} | {each.top5:.2f} |"
        for each in evaluations
    ]
    head = ["| data set | split | images | top-1 % | top-5 % |", "|---|---|---|---|---|"]
    return "\n## Accuracy\n\n" + "\n".join([*head, *rows]) + "\n"


def _making(facts: CardFacts) -> str:
    report, lines = facts.report, ["\n## How it was made\n"]
    plan, calibration, training = report.plan, report.calibration, report.training
    if facts.base_model:
        lines.append(f"- Made from [`{facts.base_model}`](https://huggingface.co/{facts.base_model}).")
    if isinstance(rows := plan.get("rows"), list):
        lines.append(f"- {_plain(plan.get('converted'))} of {len(rows)} convolutions are adder layers.")
    if calibration:
        calibration = {**calibration, **part_of(calibration, "config")}
        images, steps, together, seed = (
            _plain(calibration.get(key)) for key in ("images", "steps", "matching_steps", "seed")
        )
        lines.append(
            f"- Calibrated on {images} unlabeled images: {steps} steps for each layer, {together} steps for all layers "
            f"together, seed {seed}."
        )
    if recipe := part_of(training, "recipe"):
        dataset, epochs, size, rate, seed = (
            _plain(recipe.get(key)) for key in ("dataset", "epochs", "batch_size", "lr", "seed")
        )
        lines.append(
            f"- Trained on {dataset}: epoch {_plain(training.get('epoch'))} of {epochs}, batch size {size}, "
            f"learning rate {rate}, seed {seed}."
        )
    versions = ", ".join(f"{_plain(name)} {_plain(each)}" for name, each in report.versions.items())
    lines.append(f"- Saved with {versions}.")
    lines.append(f"- SHA-256 of the weights: `{report.sha256}`.")
    lines.append("- Details of every layer are in `adder_report.json`.\n")
    commands = [_line(each) for each in report.commands if each.startswith(("adderkit ", "convert "))]
    if commands:
        lines.append("```bash\n" + "\n".join(commands) + "\n```\n")
    lines += [f"![{picture.rpartition('/')[2].removesuffix('.png')}]({picture})\n" for picture in facts.pictures]
    return "\n".join(lines)


def _plain(value: object) -> str:
    """Return a value that somebody else may have written as one line of Markdown without any markup."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", _line(str(value))[:_LONGEST])


def _line(text: str) -> str:
    return "".join(sign if sign.isprintable() else " " for sign in text)
