"""Settings that change how a model is computed, and not what: compiled, checkpointed, and with the channels last."""

import json
import runpy
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

import adderkit
from adderkit.convert.errors import RecipeError
from adderkit.convert.model_source import ModelSource
from adderkit.recipes.runs.folder import RunFolder
from adderkit.recipes.training import assemble
from adderkit.recipes.training import run as finetune
from adderkit.recipes.training.models import Job

in_double = runpy.run_path(str(Path(__file__).parents[1] / "double_precision.py"))["in_double"]
EXACT = {"train_images": 96, "model_ema": True, "clip_grad": 1.0}  # three steps


def saved(folder):
    return {path.relative_to(folder.path): load_file(path) for path in sorted(folder.path.rglob("*.safetensors"))}


def same(folder, other, rtol):
    ours, theirs = saved(folder), saved(other)
    assert ours.keys() == theirs.keys()
    for path, tensors in theirs.items():
        assert ours[path].keys() == tensors.keys()
        for name, value in tensors.items():
            atol = rtol * value.abs().max().item()
            torch.testing.assert_close(ours[path][name], value, rtol=rtol, atol=atol, msg=f"{path} {name}")


def test_compiled_is_the_same(train, adder_folder, monkeypatch):
    """Bit by bit with a compiler that changes nothing; no saved name tells of it."""
    asked, compile_model = [], torch.compile

    def noted(model, **how):
        asked.append(how)
        return compile_model(model, **how)

    monkeypatch.setattr(torch, "compile", noted)
    job = Job(ModelSource(str(adder_folder)))
    rows, folder = train("distill", folder="compiled", job=job, torchcompile="eager", **EXACT)
    expected, plain = train("distill", folder="plain", job=job, **EXACT)
    assert asked == [{"backend": "eager"}]
    assert rows == expected
    same(folder, plain, 0)


def test_compiled_is_resumed(train, straight, same_run, tmp_path, stop_at, monkeypatch):
    job, recipe = straight.arguments("cnn", epochs=2, torchcompile="eager", model_ema=True, model_ema_decay=0.5)
    through, folder = RunFolder(tmp_path / "through"), RunFolder(tmp_path / "run")
    rows = finetune.start(job, recipe, through)
    stop_at("epoch 1/1", 1)
    with pytest.raises(KeyboardInterrupt):
        finetune.start(job, recipe, folder)
    monkeypatch.undo()
    assert finetune.resume(folder) == rows
    same_run(folder, through)


def test_unknown_compiler(train):
    with pytest.raises(RecipeError, match=r"torchcompile is 'indutcor', expected one of .*inductor"):
        train(torchcompile="indutcor")


def test_checkpointed_is_the_same(train, tmp_path):
    """The same gradients from activations that are computed twice; running statistics alone differ, as in timm."""
    cfg = {"input_size": (1, 16, 16)}
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=10, in_chans=1, drop_path_rate=0.3, pretrained_cfg_overlay=cfg)
    adderkit.save(model, tmp_path / "net")
    passes = []
    weights = []
    for on in (False, True):
        passes.append(0)
        with pytest.MonkeyPatch.context() as patch:
            forward = type(model.layer2[0]).forward

            def counted(self, images, forward=forward):
                passes[-1] += 1
                return forward(self, images)

            patch.setattr(type(model.layer2[0]), "forward", counted)
            job = Job(ModelSource(str(tmp_path / "net")))
            _, folder = train(folder=f"run-{on}", job=job, grad_checkpointing=on, train_images=32, bn_images=0)
        weights.append(dict(adderkit.load(folder.last).named_parameters()))
    assert passes[1] > passes[0]
    assert [name for name, value in weights[0].items() if not value.equal(weights[1][name])] == []


def test_a_model_that_cannot_checkpoint(train):
    with pytest.raises(RecipeError, match=r"grad_checkpointing is on, and CifarResNet cannot do it .*; turn it off"):
        train(grad_checkpointing=True)


@pytest.mark.parametrize("recipe", ["cnn", "distill"])
def test_channels_last_is_the_same(recipe, train, adder_folder, monkeypatch):
    """Up to rounding; what is saved is laid out as always."""
    layouts, train_epoch = [], finetune.train_epoch

    def watched(run, *rest):
        weights = [value for value in run.bare_model.parameters() if value.ndim == 4 and value.shape[-1] > 1]
        layouts.append({value.is_contiguous(memory_format=torch.channels_last) for value in weights})
        train_epoch(run, *rest)

    monkeypatch.setattr(finetune, "train_epoch", watched)
    monkeypatch.setattr(assemble, "build_student", in_double(assemble.build_student))
    if recipe == "distill":
        monkeypatch.setattr(assemble, "build_teacher", in_double(assemble.build_teacher))
    job = Job(ModelSource(str(adder_folder))) if recipe == "distill" else None
    rows, folder = train(recipe, folder="last", job=job, channels_last=True, **EXACT)
    expected, plain = train(recipe, folder="first", job=job, **EXACT)
    assert layouts[0] == {True}
    assert rows[0]["train_loss"] == pytest.approx(expected[0]["train_loss"], rel=1e-6)
    assert rows[0]["eval_loss"] == pytest.approx(expected[0]["eval_loss"], rel=1e-6)
    same(folder, plain, 1e-6)
    assert adderkit.load(folder.best)
    assert json.loads((folder.last / "adder_report.json").read_text())["training"]["recipe"]["channels_last"]
