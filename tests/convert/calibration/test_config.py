"""Calibration settings: their defaults, their round trip, and clear errors."""

import dataclasses
import json
import subprocess
import sys

import pytest

import adderkit
from adderkit.convert.calibration.config import Budget, CalibrationConfig, HybridPolicy, TermPolicy, parse_budget
from adderkit.convert.errors import AdderkitError


def test_round_trip_through_json():
    config = CalibrationConfig(steps=0, samples=7, matching_steps=3, batch_size=2, memory=1, seed=5)
    assert CalibrationConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert CalibrationConfig.from_dict({}) == CalibrationConfig()


def test_frozen_and_public():
    with pytest.raises(dataclasses.FrozenInstanceError):
        adderkit.CalibrationConfig().steps = 1


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        ("steps", -1, 0),
        ("samples", 0, 1),
        ("matching_steps", 1.5, 0),
        ("batch_size", 1, 2),
        ("memory", 0, 1),
        ("seed", "0", 0),
        ("steps", True, 0),
    ],
)
def test_value_that_is_refused(name, value, least):
    with pytest.raises(AdderkitError, match=rf"{name} is .*, expected a whole number of at least {least}"):
        CalibrationConfig(**{name: value})


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"step": 1}, "unknown key 'step' in the calibration configuration; did you mean 'steps'"),
        ({"version": 2}, "calibration configuration has version 2, expected 1"),
    ],
)
def test_mapping_that_is_refused(mapping, message):
    with pytest.raises(AdderkitError, match=message):
        CalibrationConfig.from_dict(mapping)


@pytest.mark.parametrize("module", ["calibration.config", "pruning.config", "cost.report"])
def test_needs_no_torch(module):
    code = f"import sys, adderkit.convert.{module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("text", ["mults=30%", " mults=30.0% "])
def test_parse_budget(text):
    assert parse_budget(text) == Budget(0.3)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("adds=125%", Budget(None, 1.25)),
        ("mults=30%,adds=112.5%", Budget(0.3, 1.125)),
        ("adds=100% , mults=0%", Budget(0.0, 1.0)),
    ],
)
def test_budget_of_additions(text, budget):
    assert parse_budget(text) == budget


@pytest.mark.parametrize("text", ["adds=99%", "adds=125%,adds=125%", "mults=30%,", "adds=1.25", "mults=30% adds=125%"])
def test_wrong_budget_of_additions(text):
    with pytest.raises(AdderkitError, match="budget is"):
        parse_budget(text)


@pytest.mark.parametrize("policy", [{}, {"fidelity": 1.1}, {"fidelity": -0.1}, {"additions": 0.9}])
def test_wrong_aims_of_terms(policy):
    with pytest.raises(AdderkitError, match=r"aim|expected"):
        TermPolicy(**policy)


@pytest.mark.parametrize("text", ["30%", "mults=30", "adds=30%", "mults=130%", "mults=-1%", ""])
def test_budget_of_another_form(text):
    with pytest.raises(AdderkitError, match="expected mults=N%"):
        parse_budget(text)


@pytest.mark.parametrize("policy", [{"min_fidelity": 1.5}, {"budget": -0.1}])
def test_policy_out_of_range(policy):
    with pytest.raises(AdderkitError, match="expected a number from 0 to 1"):
        HybridPolicy(**policy)
