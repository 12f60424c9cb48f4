"""The README.md of a saved folder: a Hub model card that begins with a snippet that works as pasted."""

from huggingface_hub import ModelCardData

_ADDER = """# {name}

`{base}` as an adder network ([AdderNet](https://arxiv.org/abs/1912.13200)): where the CNN multiplies, its layers
output the negative L1 distance between window and filter. Plain timm refuses this checkpoint; import adderkit first.

```python
import adderkit, timm

model = timm.create_model("local-dir:{name}", pretrained=True).eval()  # or adderkit.load("{name}")
```

What was converted, how faithful each layer is and what was measured stands in `adder_report.json`.
"""

_CNN = """# {name}

`{base}`, a CNN.

```python
import adderkit, timm  # adderkit registers its own architectures with timm

model = timm.create_model("local-dir:{name}", pretrained=True).eval()
```
"""


def model_card(base: str, converted: bool, name: str) -> str:
    """A card with front matter for a saved model.

    Args:
        base: Architecture in timm's registry.
        converted: Whether the model is an adder network.
        name: What the folder is called.

    Returns:
        Markdown.
    """
    tags = ["timm", "image-classification", *(["adder", "addernet"] if converted else [])]
    data = ModelCardData(library_name="timm", tags=tags, pipeline_tag="image-classification")
    return f"---\n{data.to_yaml()}\n---\n\n" + (_ADDER if converted else _CNN).format(base=base, name=name)
