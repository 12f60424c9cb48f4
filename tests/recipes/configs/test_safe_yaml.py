"""YAML of somebody else: what PyYAML's safe loader reads, but for what grows or has no bounds."""

import pytest
import yaml

from adderkit.recipes.configs.safe_yaml import load_yaml


@pytest.mark.parametrize(
    "text",
    [
        "lr: 0.1",
        "a: [1, 0x10, 1_000, -7, 1:30]",
        "b: {c: null, d: yes, e: 2026-01-02}",
        "x: .inf",
        "",
        "18446744073709551615",
    ],
)
def test_same_as_the_safe_loader(text):
    assert load_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x [1]\nb: *x", r"alias \*x, expected values in full in line 2"),
        ("a: 0x" + "f" * 100, "number 0xffffffffffffffffff…, expected at most 64 bits in line 1"),
        ("a: 18446744073709551616", "number 18446744073709551616…, expected at most 64 bits"),
        ("a: 1" + ":59" * 100, "expected at most 64 bits"),
        ("a: 0." + "1" * 100, "expected fewer digits"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
        ("!!timestamp nothing", "."),
        ("!!bool nothing", "."),
        ("!!int ''", "."),
        ("!!int [1]", "expected a scalar node"),
        ("a: 2026-99-99", "month must be in 1..12"),
        ("[" * 5000, "recursion"),
        ("a: [", "expected the node content"),
    ],
)
def test_one_line_for_what_is_refused(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_yaml(text)
    assert "\n" not in str(caught.value)
