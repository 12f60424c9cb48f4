"""License and base model of what is published: inherited where they are known, asked for where they are not."""

import pytest
import timm

from adderkit.convert.checkpoint.report import Report
from adderkit.convert.errors import PublishError
from adderkit.recipes.hub.licenses import HUB_LICENSES, base_model_of, license_of


def with_license(name):
    return {"pretrained_cfg": {"license": name}}


# License


@pytest.mark.parametrize(
    ("saved", "expected"),
    [
        ("apache-2.0", ("apache-2.0", None)),
        ("CC-BY-NC-4.0", ("cc-by-nc-4.0", None)),
        ("seer-license", ("other", "seer-license")),
    ],
)
def test_license_is_inherited(saved, expected):
    assert license_of(None, Report(), with_license(saved)) == expected
    assert license_of(None, Report(source="resnet50.a1_in1k"), with_license(saved)) == expected
    assert license_of(" MIT ", Report(), with_license(saved)) == ("mit", None)


@pytest.mark.parametrize(
    ("report", "config"),
    [
        ({}, {}),
        ({}, {"pretrained_cfg": None}),
        ({}, with_license(None)),
        ({}, with_license("unknown")),
        ({}, with_license("other")),
        ({"source": None}, with_license("apache-2.0")),
        ({"imported": {"file": "x.pth"}}, with_license("apache-2.0")),
    ],
    ids=["no-config", "null", "none", "unknown", "other", "random-weights", "imported"],
)
def test_license_must_be_given(report, config):
    with pytest.raises(PublishError, match="give it with --license"):
        license_of(None, Report.from_dict(report), config)


@pytest.mark.parametrize(("given", "hint"), [("apach-2.0", "did you mean apache-2.0"), ("§", "repositories-licenses")])
def test_license_that_is_not_in_our_list_is_used_with_a_warning(given, hint):
    lines = []
    assert license_of(given, Report(), {}, lines.append) == (given, None)
    (line,) = lines
    assert line.startswith(f"warning: --license {given!r} is not a license identifier that adderkit knows")
    assert hint in line


def test_empty_license():
    with pytest.raises(PublishError, match="--license is empty"):
        license_of(" ", Report(), {})


def test_every_license_of_timm_has_a_form_on_the_hub():
    names = {timm.get_pretrained_cfg(name).license for name in timm.list_pretrained()} - {None, "unknown"}
    found = {name: license_of(None, Report(), with_license(name)) for name in names}
    assert {license.identifier for license in found.values()} <= HUB_LICENSES | {"other"}
    assert all((license.name is None) == (name in HUB_LICENSES) for name, license in found.items())
    assert {"apache-2.0", "mit"} <= {license.identifier for license in found.values()}


# Base model


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("resnet50.a1_in1k", "timm/resnet50.a1_in1k"),
        ("hf-hub:ann/teacher@v1", "ann/teacher"),
        ("/home/ann/teacher", None),
        ("teacher", None),
        ("cifar_resnet20", None),
        (None, None),
        (7, None),
    ],
)
def test_base_model(source, expected):
    assert base_model_of(None, Report.from_dict({"source": source})) == expected
    assert base_model_of("bob/other", Report.from_dict({"source": source})) == "bob/other"


@pytest.mark.parametrize("given", ["a b", "a/b/c", "", "../x"])
def test_base_model_of_another_form(given):
    with pytest.raises(PublishError, match="--base-model"):
        base_model_of(given, Report())
