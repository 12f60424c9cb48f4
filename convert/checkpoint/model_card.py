"""Model cards: front matter for the Hub, and a beginning with a snippet that works as pasted.

A saved folder's card (``model_card``) is no more than that; ``recipes.hub.published_card`` says what else is known.
"""

from collections.abc import Sequence
from typing import Any

from huggingface_hub import ModelCardData

_ADDER = """# {name}

`{base}` as an adder network ([AdderNet](https://arxiv.org/abs/1912.13200)): where the CNN multiplies, its layers
output the negative L1 distance between window and filter. Plain timm refuses this checkpoint; import adderkit first.

```python
import adderkit, timm

model = timm.create_model("{source}", pretrained=True).eval()  # or adderkit.load("{ours}")
```
"""

_CNN = """# {name}

`{base}`, a CNN.

```python
import adderkit, timm  # adderkit registers its own architectures with timm

model = timm.create_model("{source}", pretrained=True).eval()
```
"""

_INTEGER = """# {name}

`{base}` in integers: bytes between the layers, sums in int32. Plain timm refuses this checkpoint; import adderkit
first.

```python
import adderkit, timm

model = timm.create_model("{source}", pretrained=True).eval()  # or adderkit.load("{ours}")
```
"""

_REPORT = "\nWhat was converted, how faithful each layer is and what was measured stands in `adder_report.json`.\n"


def model_card(base: str, converted: bool, name: str, integers: bool = False) -> str:
    """The card of a saved folder.

    Args:
        base: Architecture in timm's registry.
        converted: Whether the model is an adder network.
        name: What the folder is called.
        integers: Whether it is an integer network.

    Returns:
        Markdown with front matter.
    """
    tags = ["quantized"] if integers else []
    first = beginning(base, converted, name, f"local-dir:{name}", integers)
    return front_matter(converted, tags) + first + _REPORT * (converted or integers)


def front_matter(converted: bool, tags: Sequence[str] = (), **facts: Any) -> str:
    """What the Hub reads: the files and their loader are timm's, so ``library_name`` is, too.

    Args:
        converted: Whether the model is an adder network.
        tags: Besides the usual ones.
        **facts: More of ``huggingface_hub.ModelCardData``, such as ``license``; those that are ``None`` are left out.
    """
    usual = ["timm", "image-classification", "adderkit", *(["adder", "addernet"] if converted else [])]
    data = ModelCardData(library_name="timm", tags=[*usual, *tags], pipeline_tag="image-classification", **facts)
    return f"---\n{data.to_yaml()}\n---\n\n"


def beginning(base: str, converted: bool, name: str, source: str, integers: bool = False) -> str:
    """Title, one sentence, and how to load the model.

    Args:
        base: Architecture in timm's registry.
        converted: Whether the model is an adder network.
        name: The title.
        source: What timm loads it by: ``local-dir:FOLDER`` or ``hf-hub:user/name``.
        integers: Whether it is an integer network.
    """
    ours = source.removeprefix("local-dir:")
    form = _INTEGER if integers else _ADDER if converted else _CNN
    return form.format(base=base, name=name, source=source, ours=ours)
