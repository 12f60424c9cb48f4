"""The example of a converted backbone in docs/usage.md runs as it stands, with a small network and few images."""

import re
from pathlib import Path

import pytest
import torch

import adderkit

ROOT = Path(__file__).parents[3]
SMALL = {
    '"resnet50.a1_in1k", pretrained=True': '"test_resnet"',
    "images)  # no labels": "images, adderkit.CalibrationConfig(steps=1, samples=64, matching_steps=1))",
}


@pytest.fixture
def example():
    """The code block of the section, for a network that needs no download."""
    text = (ROOT / "docs" / "usage.md").read_text(encoding="utf-8")
    section = text.split("### Backbones for segmentation and detection\n")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1)
    for before, after in SMALL.items():
        assert before in code
        code = code.replace(before, after)
    return code


def test_trains_a_segmentation_head_on_a_converted_backbone(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    images, masks = torch.randn(16, 3, 64, 64), torch.randint(21, (2, 64, 64))
    seen = {"images": images, "loader": [(images[:2], masks)] * 2}
    exec(compile(example, "docs/usage.md", "exec"), seen)
    adders = {n: m for n, m in seen["backbone"].named_modules() if isinstance(m, adderkit.AdderConv2d)}
    convolutions = [m for m in seen["teacher"].modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(adders) == len(convolutions) - 1  # all but the first
    for path, layer in adders.items():
        assert layer.weight.grad.square().mean().sqrt() == pytest.approx(0.2, rel=1e-3), path
    assert seen["model"].eval()(images[:2]).shape == (2, 21, 64, 64)
    assert len(adderkit.load("backbone-adder")(images[:2])) == len(seen["model"].lateral)
