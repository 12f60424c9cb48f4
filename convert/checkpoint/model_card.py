"""Model cards: front matter for the Hub, a title and a snippet that loads the model.

The card of a saved folder (``model_card``) has nothing else; ``recipes.hub.published_card`` adds what else is known.
"""

from collections.abc import Sequence
from typing import Any

from huggingface_hub import ModelCardData

from ..hub import PREFIX

_ADDER = """# {name}

`{base}` converted to an adder network ([AdderNet](https://arxiv.org/abs/1912.13200)): instead of convolving, its layers
output the negative L1 distance between window and filter. timm can load this checkpoint only after `import adderkit`.

```python
import adderkit, timm

model = timm.create_model("{timm_name}", pretrained=True).eval()  # or adderkit.load("{source}")
```
"""

_CNN = """# {name}

`{base}`, a CNN.

```python
import adderkit, timm  # adderkit registers its own architectures with timm

model = timm.create_model("{timm_name}", pretrained=True).eval()
```
"""

_INTEGER = """# {name}

`{base}` quantized to integers: activations are stored as bytes, sums are int32. timm can load this checkpoint only
after `import adderkit`.

```python
import adderkit, timm

model = timm.create_model("{timm_name}", pretrained=True).eval()  # or adderkit.load("{source}")
```
"""

_REPORT = "\n`adder_report.json` records what was converted, the fidelity of each layer and all measurements.\n"


def model_card(base: str, converted: bool, name: str, integers: bool = False) -> str:
    """Return the card of a saved folder.

    Args:
        base: Architecture in timm's registry.
        converted: Whether the model is an adder network.
        name: Name of the folder.
        integers: Whether the model is an integer network.

    Returns:
        Markdown with front matter.
    """
    tags = ["quantized"] if integers else []
    first = beginning(base, converted, name, name, integers)
    return front_matter(converted, tags) + first + _REPORT * (converted or integers)


def front_matter(converted: bool, tags: Sequence[str] = (), **facts: Any) -> str:
    """Return the front matter, which the Hub reads; ``library_name`` is timm, which loads the files.

    Args:
        converted: Whether the model is an adder network.
        tags: Tags to add to the usual ones.
        **facts: Further arguments of ``huggingface_hub.ModelCardData``, such as ``license``; ``None`` is left out.
    """
    usual = ["timm", "image-classification", "adderkit", *(["adder", "addernet"] if converted else [])]
    data = ModelCardData(library_name="timm", tags=[*usual, *tags], pipeline_tag="image-classification", **facts)
    return f"---\n{data.to_yaml()}\n---\n\n"


def beginning(base: str, converted: bool, name: str, source: str, integers: bool = False) -> str:
    """Return the title, a short description and the snippet that loads the model.

    Args:
        base: Architecture in timm's registry.
        converted: Whether the model is an adder network.
        name: Title of the card.
        source: Folder, or ``hf-hub:user/name``, that the model is loaded from.
        integers: Whether the model is an integer network.
    """
    form = _INTEGER if integers else _ADDER if converted else _CNN
    timm_name = source if source.startswith(PREFIX) else f"local-dir:{source}"
    return form.format(base=base, name=name, source=source, timm_name=timm_name)
