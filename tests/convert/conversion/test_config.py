"""``AdderConfig``: its JSON form, its checks, and the pattern language."""

import dataclasses
import json

import pytest

from adderkit.convert.conversion.config import AdderConfig, parse_terms
from adderkit.convert.errors import AdderkitError
from adderkit.convert.patterns import compile_pattern, matching, nearest_names


@pytest.mark.parametrize(
    "config",
    [
        AdderConfig(),
        AdderConfig(include=("layer4.*", r"re:layer\d\.conv1"), exclude=("*.downsample.*",)),
        AdderConfig(skip_first=False, skip_last=False),
        AdderConfig(terms=2),
        AdderConfig(terms={"layer4.*": 3, "*": 2}),
    ],
    ids=["default", "patterns", "switches", "terms", "terms-by-pattern"],
)
def test_json_round_trip(config):
    assert AdderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_form_of_the_mapping():
    assert AdderConfig(exclude=("a",)).to_dict() == {
        "include": ["*"],
        "exclude": ["a"],
        "skip_first": True,
        "skip_last": True,
        "skip_depthwise": False,
        "skip_gates": True,
        "norm": "insert",
        "version": 1,
    }


def test_terms_stand_in_the_mapping_where_they_are_several():
    assert AdderConfig(terms=2).to_dict()["terms"] == 2
    assert AdderConfig(terms={"b.*": 3, "a": 2}).to_dict()["terms"] == {"b.*": 3, "a": 2}


def test_the_first_pattern_that_matches_gives_the_terms():
    config = AdderConfig(terms={"layer4.0.*": 3, "re:layer[34].*": 2})
    found = {path: config.terms_of(path) for path in ("layer4.0.conv1", "layer4.1.conv1", "layer3.0.conv1", "conv1")}
    assert found == {"layer4.0.conv1": 3, "layer4.1.conv1": 2, "layer3.0.conv1": 2, "conv1": 1}
    assert AdderConfig(terms=4).terms_of("conv1") == 4


@pytest.mark.parametrize("terms", [0, 9, 2.0, True, "2", None, {}, {"a": 0}, {"a": "2"}, {1: 2}, [("a", 2)]])
def test_wrong_terms(terms):
    with pytest.raises(AdderkitError, match=r"terms is .*, expected"):
        AdderConfig(terms=terms)


@pytest.mark.parametrize(
    ("texts", "terms"),
    [
        ([], 1),
        (["2"], 2),
        (["layer4.*=3"], {"layer4.*": 3}),
        (["2", "layer4.*=3"], {"layer4.*": 3, "*": 2}),
        (["b=3", " a=2 ", "1"], {"b": 3, "a": 2, "*": 1}),
        (["re:(?=a).*=2"], {"re:(?=a).*": 2}),
    ],
)
def test_terms_of_the_command_line(texts, terms):
    found = parse_terms(texts)
    assert found == terms
    assert isinstance(found, int) or list(found) == list(terms)


@pytest.mark.parametrize("texts", [["x"], [""], ["=2"], ["a="], ["a=-1"], ["a=²"], ["1.5"], ["2", "3"], ["a=2", "a=2"]])
def test_terms_that_are_none(texts):
    with pytest.raises(AdderkitError, match=r"terms is .*, expected"):
        parse_terms(texts)


def test_missing_keys_take_their_defaults():
    assert AdderConfig.from_dict({"exclude": ["a"]}) == AdderConfig(exclude=("a",))


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        AdderConfig().skip_first = False


def test_unknown_key_names_the_nearest():
    with pytest.raises(AdderkitError, match=r"unknown key 'exlude'.*did you mean 'exclude'"):
        AdderConfig.from_dict({"exlude": []})


def test_unknown_key_far_from_any():
    with pytest.raises(AdderkitError, match="unknown key 'zzz'"):
        AdderConfig.from_dict({"zzz": 1})


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_unknown_version(version):
    with pytest.raises(AdderkitError, match=r"version .*expected 1"):
        AdderConfig.from_dict({"version": version})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("include", "layer4.*"),
        ("include", [1]),
        ("exclude", {"a": 1}),
        ("exclude", None),
        ("skip_first", "yes"),
        ("skip_last", 1),
    ],
)
def test_wrong_types_are_named(key, value):
    with pytest.raises(AdderkitError, match=f"{key} is .*expected"):
        AdderConfig.from_dict({key: value})


@pytest.mark.parametrize("field", ["include", "exclude"])
def test_one_string_is_not_taken_for_a_list_of_letters(field):
    # Its letters would include '*', which matches everything.
    with pytest.raises(AdderkitError, match=field):
        AdderConfig(**{field: "layer4.*"})


@pytest.mark.parametrize("field", ["include", "exclude"])
def test_empty_pattern(field):
    with pytest.raises(AdderkitError, match="empty"):
        AdderConfig(**{field: ("",)})


@pytest.mark.parametrize("field", ["include", "exclude"])
def test_malformed_regular_expression(field):
    with pytest.raises(AdderkitError, match=r"'re:\(' is not a regular expression"):
        AdderConfig(**{field: ("re:(",)})


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("layer1.0.conv1", "layer1.0.conv1", True),
        ("layer1.0.conv1", "layer1x0.conv1", False),
        ("layer1", "layer1.0.conv1", False),
        ("layer4.*", "layer4.0.downsample.0", True),
        ("layer4.*", "layer40.0.conv1", False),
        ("*.conv?", "layer4.0.conv2", True),
        ("layer[12].*", "layer3.0", False),
        (r"re:layer\d\.0", "layer1.0", True),
        (r"re:layer\d", "layer1.0", False),
        (r"re:0\.conv", "layer1.0.conv", False),
        ("re:a|ab", "ab", True),
    ],
    ids=str,
)
def test_patterns_match_whole_paths(pattern, name, expected):
    assert bool(compile_pattern(pattern).fullmatch(name)) is expected
    assert matching((pattern,), name) == (pattern if expected else None)


def test_first_matching_pattern_is_named():
    assert matching(("b", "a*", "*"), "abc") == "a*"
    assert matching((), "abc") is None


def test_nearest_names_best_first():
    names = ["layer1.0.conv1", "layer1.0.conv2", "head"]
    assert nearest_names("layer1.0.conv_1", names)[0] == "layer1.0.conv1"
    assert nearest_names("qqqq", names) == []


def test_configuration_of_an_older_release_is_read():
    old = {"include": ["*"], "exclude": [], "skip_first": True, "skip_last": False, "version": 1}
    assert AdderConfig.from_dict(old) == AdderConfig(skip_last=False)


@pytest.mark.parametrize("norm", ["maybe", None, 1])
def test_norm_of_another_kind(norm):
    with pytest.raises(AdderkitError, match="expected one of insert, skip, error"):
        AdderConfig.from_dict({"norm": norm})
