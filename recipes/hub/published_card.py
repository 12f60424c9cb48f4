"""The model card of a published folder: what the model is, costs and reaches, how it was made, and where it ends."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ...convert.checkpoint.model_card import beginning, front_matter
from ...convert.cost.report import Cost
from ..reporting.evaluations import Evaluation, eval_results, hub_dataset
from ..runs.provenance import part_of
from .licenses import License

_LONGEST = 80  # characters of a text from the report

_LIMITS = """
## Limits

- It needs adderkit: without it timm says `Unknown model (adder)`, and so does the snippet that the Hub offers.
- What is saved is multiplications, not time: on CPUs and GPUs an addition is no faster than a multiplication.
- Fine-tune it with adderkit too: the gradients of its layers are AdderNet's, and BatchNorm is measured afresh.
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
    """All that a card says.

    Args:
        repository: ``user/name``.
        base: Architecture in timm's registry.
        converted: Whether the model is an adder network.
        pruned: Whether it lost channels.
        license: See ``licenses``.
        base_model: The Hub's name of the model it was made from.
        cost: Of the model, for one image.
        evaluations: What was measured.
        report: The published ``adder_report.json``.
        pictures: Paths of training curves beside the card.
        chart: Path of the cost chart beside the card.
    """

    repository: str
    base: str
    converted: bool
    pruned: bool
    license: License
    base_model: str | None
    cost: Cost
    evaluations: Sequence[Evaluation]
    report: Mapping[str, Any]
    pictures: Sequence[str]
    chart: str


def published_card(facts: CardFacts) -> str:
    """The whole card, Markdown with front matter."""
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
    training = part_of(part_of(facts.report, "training"), "recipe").get("dataset")
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
        base_model_relation="finetune" if facts.base_model else None,  # of the Hub's four, the one that fits
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
        "transform = timm.data.create_transform(**data)  # for images of Pillow\n"
        f"logits = model(torch.zeros(1, {size}))\n```\n"
    )


def _cost(facts: CardFacts) -> str:
    cost = facts.cost
    shape = "x".join(map(str, cost.input_shape))
    rows = (
        ("the CNN of this shape, all that runs", cost.honest_before),
        ("this model, all that runs", cost.honest),
        ("the CNN, weight layers alone, as papers count", cost.headline_before),
        ("this model, as papers count", cost.headline),
    )
    lines = [
        f"\n## Cost of one image of {shape}\n",
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
    plan, calibration, training = (part_of(report, key) for key in ("plan", "calibration", "training"))
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
            f"- Calibrated on {images} unlabeled images: {steps} steps for each layer, {together} for all together, "
            f"seed {seed}."
        )
    if recipe := part_of(training, "recipe"):
        dataset, epochs, size, rate, seed = (
            _plain(recipe.get(key)) for key in ("dataset", "epochs", "batch_size", "lr", "seed")
        )
        lines.append(
            f"- Trained on {dataset}, epoch {_plain(training.get('epoch'))} of a run of {epochs}, batch size {size}, "
            f"learning rate {rate}, seed {seed}."
        )
    versions = ", ".join(f"{_plain(name)} {_plain(each)}" for name, each in part_of(report, "versions").items())
    lines.append(f"- Saved with {versions}.")
    lines.append(f"- SHA-256 of the weights: `{report['sha256']}`.")
    lines.append("- Everything else, layer by layer: `adder_report.json`.\n")
    commands = [_line(each) for each in report["commands"] if each.startswith(("adderkit ", "convert "))]
    if commands:
        lines.append("```bash\n" + "\n".join(commands) + "\n```\n")
    lines += [f"![{picture.rpartition('/')[2].removesuffix('.png')}]({picture})\n" for picture in facts.pictures]
    return "\n".join(lines)


def _plain(value: object) -> str:
    """What somebody else may have written into the report, on one line of Markdown that is nothing but text."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", _line(str(value))[:_LONGEST])


def _line(text: str) -> str:
    return "".join(sign if sign.isprintable() else " " for sign in text)
