"""Each setting of a recipe is an option of ``finetune``, under timm's name."""

import dataclasses
import re

import pytest

from adderkit.recipes.configs.recipe import Recipe
from adderkit.recipes.verbs import finetune


@pytest.fixture
def settings_of(adder_kit, monkeypatch):
    """The recipe that a run would get."""

    def run(*words):
        seen = []

        def start(job, settings, output):
            seen.append(settings)
            raise SystemExit(0)

        monkeypatch.setattr(finetune, "_start", start)
        status, _, err = adder_kit("finetune", "cifar_resnet20", "--no-pretrained", "--dataset", "digits", *words)
        assert status == 0, err
        return seen[0]

    return run


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        (("--opt", "lamb", "--weight-decay", "0.02"), {"opt": "lamb", "weight_decay": 0.02}),
        (("--warmup-epochs", 3, "--warmup-lr=1e-6"), {"warmup_epochs": 3, "warmup_lr": 1e-6}),
        (("--model-ema", "--model-ema-decay", 0.5), {"model_ema": True, "model_ema_decay": 0.5}),
        (("--no-sync-bn", "--channels-last"), {"channels_last": True}),
        (("--aa", "rand-m9", "--crop-padding", 0), {"auto_augment": "rand-m9", "crop_padding": 0}),
        (("--img-size", 16, "--bits", 8), {"img_size": 16, "bits": 8}),
        (("--amp",), {"amp": "fp16"}),
        (("--amp", "--amp-dtype", "bfloat16"), {"amp": "bf16"}),
        (("--no-amp",), {"amp": "no"}),
        (("-b", 4, "-j", 0, "--epochs", 2, "--lr", 0.5), {"batch_size": 4, "workers": 0, "epochs": 2, "lr": 0.5}),
        (("--opt", "lamb", "--set", "opt=adamw"), {"opt": "adamw"}),
    ],
)
def test_settings(settings_of, words, changes):
    expected = dataclasses.replace(settings_of(), **changes)
    assert settings_of(*words) == expected


def test_help_names_every_setting(adder_kit):
    status, out, _ = adder_kit("finetune", "--help")
    assert status == 0
    named = set(re.findall(r"--[a-z-]+", out))
    keys = {field.name for field in dataclasses.fields(Recipe)} - {"version", "description"}
    assert {f"--{key.replace('_', '-')}" for key in keys} <= named
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--weigth-decay", 1), "Possible options: --weight-decay"),
        (("--opt",), "requires an argument"),
        (("--warmup-epochs", "few"), "Invalid value for '--warmup-epochs'"),
        (("--amp-dtype", "fp8"), "'fp8' is not one of 'float16', 'bfloat16'"),
    ],
)
def test_wrong_usage(misused, words, message):
    assert message in misused("finetune", "cifar_resnet20", *words)


def test_a_value_out_of_range(fails):
    assert "bits is 9, expected 0 or one of" in fails("finetune", "cifar_resnet20", "--dataset", "digits", "--bits", 9)
