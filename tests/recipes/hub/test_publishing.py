"""The published folder: files, card, report and license; then the whole way, to a Hub on this machine and back."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import yaml

import adderkit
from adderkit.convert.checkpoint.report import read_report
from adderkit.convert.files import sha256
from adderkit.recipes.hub import publishing, upload

PNG = b"\x89PNG\r\n"


@pytest.fixture
def saved(adder_folder, tmp_path):
    """A copy of the adder network, in the folder in which the command line runs."""
    return shutil.copytree(adder_folder, tmp_path / "runs" / "mine" / "best")


@pytest.fixture
def quick(monkeypatch):
    """No real chart, which takes longer than all the rest."""
    monkeypatch.setattr(publishing, "draw_chart", lambda cost, target, title: target.write_bytes(PNG))


@pytest.fixture
def publish(adder_kit, saved):
    """A dry run; the JSON that it prints."""

    def run(*words, folder=saved):
        status, out, err = adder_kit("publish", folder, "--repo", "ann/net", "--dry-run", "--json", *words)
        assert status == 0, err
        return json.loads(out)

    return run


@pytest.fixture
def refused(adder_kit, saved):
    """The one line that stops a dry run."""

    def run(*words, folder=saved, repo="ann/net"):
        status, out, err = adder_kit("publish", folder, "--repo", repo, "--dry-run", *words)
        line = err.splitlines()[-1]
        assert (status, out) == (1, "")
        assert line.startswith("error: ")
        assert "unexpected" not in line
        return line

    return run


def card(folder):
    """Front matter and body of a card."""
    _, head, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), body


def change_report(folder, **facts):
    path = folder / "adder_report.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


# The folder


def test_folder(publish, saved, tmp_path):
    before = {path: sha256(path) for path in saved.rglob("*") if path.is_file()}
    value = publish()
    built = tmp_path / "net-published"
    assert value["output"] == built.name
    assert value["upload"] is None
    assert {row["path"]: row["bytes"] for row in value["files"]} == {
        path.relative_to(built).as_posix(): path.stat().st_size for path in built.rglob("*") if path.is_file()
    }
    names = ["README.md", "config.json", "model.safetensors", "adder_report.json", "images/cost.png"]
    assert [row["path"] for row in value["files"]] == names
    assert (built / "images" / "cost.png").read_bytes().startswith(PNG)
    assert {path: sha256(path) for path in saved.rglob("*") if path.is_file()} == before
    assert read_report(built).teacher is None
    actual, expected = (adderkit.load(folder).state_dict() for folder in (built, saved))
    assert all(actual[name].equal(expected[name]) for name in expected)


def test_report(quick, publish, saved, tmp_path):
    change_report(
        saved,
        commands=["adderkit convert --model /home/ann/teacher --data-dir=/data/secret/images"],
        training={"recipe": {"dataset": "digits", "data_dir": "/data/secret", "seed": 7}},
    )
    publish()
    report = read_report(tmp_path / "net-published")
    assert report.sha256 == sha256(saved / "model.safetensors")
    assert report.commands == ("adderkit convert --model teacher --data-dir=images",)
    assert report.training["recipe"] == {"dataset": "digits", "data_dir": "secret", "seed": 7}
    assert report.cost == json.loads(json.dumps(adderkit.cost(adderkit.load(saved)).to_dict()))
    assert report.plan["converted"] == 3
    assert report.to_dict().keys() >= {"versions", "architecture", "base", "license", "repository", "card_sha256"}
    assert str(tmp_path.parent) not in json.dumps(report.to_dict())


def test_pictures_of_the_run(quick, publish, saved, tmp_path):
    run = saved.parent
    (run / "plots").mkdir()
    for path in (run / "plots" / "loss.png", run / "plots" / "accuracy.png"):
        path.write_bytes(PNG + path.name.encode())
    (run / "args.yaml").write_text("job: {}\n")
    files = [row["path"] for row in publish()["files"]]
    assert files[-2:] == ["images/accuracy.png", "images/loss.png"]
    _, body = card(tmp_path / "net-published")
    assert set(re.findall(r"!\[[^]]+\]\(([^)]+)\)", body)) == {"images/cost.png", *files[-2:]}
    assert (tmp_path / "net-published" / "images" / "loss.png").read_bytes() == PNG + b"loss.png"


# The card


def test_card_of_a_report_that_somebody_else_wrote(quick, publish, saved, tmp_path):
    hostile = "<script>x</script>\n\n# Free | [money](http://x) ```\ud800"
    digest = read_report(saved).sha256
    entry = {"dataset": "digits", "split": "train", "images": 5, "top1": 50.0, "top5": 100, "sha256": digest}
    odd = [{"dataset": hostile}, {"images": 10**400}, {"top1": 10**400}, {"top5": float("nan")}, {"images": True}]
    change_report(
        saved,
        evaluations=[entry, *({**entry, "split": f"odd {index}", **each} for index, each in enumerate(odd))],
        plan={"rows": 7, "converted": hostile},
        calibration={"images": hostile},
        training={"epoch": hostile, "recipe": {"dataset": f"hfds/{hostile}", "lr": hostile}},
        versions={hostile: hostile},
        commands=["adderkit convert\n```\n# Free", "```", "rm -rf /"],
        source=f"hf-hub:{hostile}",
    )
    publish("--license", "mit")
    head, body = card(tmp_path / "net-published")
    assert [result["metrics"][0]["value"] for result in head["model-index"][0]["results"]] == [0.5]
    assert head.keys() & {"base_model", "datasets"} == set()
    lines = body.splitlines()
    assert not [line for line in lines if line.startswith(("# Free", "rm ")) or "<script>" in line]
    assert lines.count("```") == lines.count("```bash") + lines.count("```python") + lines.count("```bibtex")
    assert "| digits | train | 5 | 50.00 | 100.00 |" in lines
    assert not any("odd" in line for line in lines)


def test_card_of_a_model_that_was_measured_twice(quick, publish, saved, adder_kit, tmp_path):
    words = ("evaluate", saved, "--dataset", "digits", "-j", "0", "--record", "--json")
    before = sha256(saved / "model.safetensors")
    adder_kit(*words, "--split", "train")
    found = json.loads(adder_kit(*words)[1])
    adder_kit(*words)  # takes the place of the one before
    assert sha256(saved / "model.safetensors") == before
    publish("--license", "MIT", "--base-model", "timm/resnet20")
    head, body = card(tmp_path / "net-published")
    (index,) = head.pop("model-index")
    assert head == {
        "library_name": "timm",
        "license": "mit",
        "base_model": "timm/resnet20",
        "base_model_relation": "finetune",
        "metrics": ["accuracy"],
        "pipeline_tag": "image-classification",
        "tags": ["timm", "image-classification", "adderkit", "adder", "addernet"],
    }
    assert [result["dataset"]["split"] for result in index["results"]] == ["train", "validation"]
    top1, top5 = index["results"][1]["metrics"]
    assert (top1["type"], top1["value"]) == ("accuracy", pytest.approx(found["top1"] / 100, abs=1e-6))
    assert top5["value"] == pytest.approx(found["top5"] / 100, abs=1e-6)
    assert f"| digits | validation | 360 | {found['top1']:.2f} | {found['top5']:.2f} |" in body
    model = adderkit.load(saved)
    assert f"{adderkit.cost(model).honest.multiplications:,}" in body


def test_card_that_was_edited_is_kept(quick, publish, saved, tmp_path):
    publish()
    readme = tmp_path / "net-published" / "README.md"
    ours = readme.read_text()
    publish("--license", "mit")
    assert "license: mit" in readme.read_text()  # nobody had touched it
    readme.write_text("# mine\n")
    publish("--license", "mit")
    assert readme.read_text() == "# mine\n"
    publish("--force")
    assert readme.read_text() == ours


class Killed(BaseException):
    pass


@pytest.mark.parametrize("earlier", [False, True], ids=["new", "again"])
def test_a_killed_build_can_be_repeated(quick, saved, tmp_path, monkeypatch, earlier):
    """Stopped before each of its files, in a new folder or in one of an earlier build with other facts."""
    monkeypatch.chdir(tmp_path)

    def build(output, license="mit"):
        target = upload.Target("ann/net")
        publishing.run_publish(
            publishing.PublishJob(str(saved), target, output, license, dry_run=True), lambda line: None
        )
        folder = tmp_path / output
        return {each.relative_to(folder).as_posix(): each.read_bytes() for each in folder.rglob("*") if each.is_file()}

    expected, replace, stopped = build("straight"), pathlib.Path.replace, 0
    for count in range(20):
        if earlier:
            build(f"built{count}", "apache-2.0")
        left = [count]

        def dying(self, target, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return replace(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(pathlib.Path, "replace", dying)
            try:
                build(f"built{count}")
            except Killed:
                stopped += 1
        assert build(f"built{count}") == expected
        if left[0] >= 0:
            break
    assert stopped >= 4  # weights, configuration, report and card


def test_an_edited_card_is_checked_before_anything_is_sent(quick, publish, refused, saved, tmp_path):
    publish()
    readme = tmp_path / "net-published" / "README.md"
    readme.write_text("---\nmodel-index: nonsense\n---\n# mine\n")
    assert "model-index is 'nonsense', expected a list of models" in refused()
    publish("--force")


# What is refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--license", " "], "--license is empty"),
        (["--base-model", "a b"], "--base-model 'a b' is not the name of a repository"),
        (["--create-pr", "--revision", "v1"], "give --create-pr or --revision"),
        (["--output", "runs/mine/best"], "is the model itself"),
        (["--output", "runs"], "holds files that do not belong to a copy of ann/net"),
    ],
    ids=["license", "base-model", "branch", "itself", "other-folder"],
)
def test_options_that_do_not_fit(refused, words, message):
    assert message in refused(*words)


def test_offline(quick, adder_kit, saved):
    """The tests' own process may not reach a Hub: the folder is built, and one line says why nothing was sent."""
    status, out, err = adder_kit("publish", saved, "--repo", "ann/net")
    assert (status, out) == (1, "")
    assert err.splitlines()[-1] == "error: HF_HUB_OFFLINE is set, so the Hub cannot be used; unset it to publish"


def test_what_a_person_reads(quick, adder_kit, saved, tmp_path):
    status, out, err = adder_kit("publish", saved, "--repo", "ann/net", "--dry-run")
    assert (status, err) == (0, "building net-published/\n")
    size = (tmp_path / "net-published" / "model.safetensors").stat().st_size
    assert f"{size:,}  model.safetensors\n" in out
    assert "evaluate DIR --dataset … --record" in out
    assert "nothing was sent (--dry-run)" in out


def test_a_run_is_not_a_model(refused, saved):
    (saved.parent / "args.yaml").write_text("job: {}\n")
    assert "publish its best model: " in refused(folder=saved.parent)


def test_damaged_weights(refused, saved):
    raw = bytearray((saved / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (saved / "model.safetensors").write_bytes(raw)
    assert "SHA-256 differs" in refused()


@pytest.mark.parametrize("kind", ["name", "run", "checkpoint"])
def test_where_nothing_can_be_recorded(adder_kit, saved, kind):
    (saved / "state").mkdir()
    model = {
        "name": ["cifar_resnet20", "--no-pretrained"],
        "run": [saved],
        "checkpoint": [saved, "--checkpoint", saved],
    }
    status, _, err = adder_kit("evaluate", *model[kind], "--dataset", "digits", "--record")
    assert status == 1
    assert ("protected by checksums" if kind == "run" else "writes into a saved folder") in err


# The whole way

WAY = """
import contextlib, io, json, pathlib, re, sys
import adderkit, timm, torch
from adderkit import cli

folder, images = sys.argv[1], torch.rand(2, 1, 8, 8)

def run(*words):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:
        cli.main([str(word) for word in words])
    return out.getvalue()

def outputs(model):
    with torch.inference_mode():
        return model.eval()(images)

done = json.loads(run("publish", folder, "--repo", "ann/net", "--revision", "v1", "--json"))
run("publish", folder, "--repo", "ann/net", "--private")
run("publish", folder, "--repo", "ann/other")
here = outputs(adderkit.load(folder))
blocks = re.findall(r"```python\\n(.*?)```", pathlib.Path("other-published/README.md").read_text(), re.S)
pasted = {}
exec("\\n".join(blocks), pasted)
ways = {
    "revision": adderkit.load("hf-hub:ann/net@v1"),
    "commit": adderkit.load("hf-hub:ann/net@" + done["upload"]["commit"]),
    "timm": timm.create_model("hf-hub:ann/other", pretrained=True),
    "timm-revision": timm.create_model("hf-hub:ann/net@v1", pretrained=True),
    "pasted": pasted["model"],
}
same = {name: bool(outputs(model).equal(here)) for name, model in ways.items()}
other_head = timm.create_model("hf-hub:ann/other", pretrained=True, num_classes=3).num_classes
errors = {}
for name in ("hf-hub:ann/other@nowhere", "hf-hub:ann/none", "hf-hub:ann/altered"):
    for loader in (adderkit.load, lambda name: timm.create_model(name, pretrained=True)):
        try:
            loader(name)
            errors.setdefault(name, []).append("loaded")
        except Exception as error:
            errors.setdefault(name, []).append(str(error))
answer = {"same": same, "errors": errors, "other_head": other_head, "logits": list(pasted["logits"].shape)}
print(json.dumps(answer))
"""


def test_there_and_back(hub, saved, tmp_path):
    """Publish by the command line, then load by every way that there is, in a process that knows this Hub only."""
    token = "hf_right"
    hub.repositories["ann/altered"] = hub.repository()
    files = {path.name: path.read_bytes() for path in saved.iterdir() if path.is_file()}
    weights = files["model.safetensors"]
    files["model.safetensors"] = weights[:-1] + bytes([weights[-1] ^ 1])
    hub.repositories["ann/altered"].commit("main", "altered", files)
    hub.fault("GET", "resolve/.*model.safetensors", "cut")
    home = tmp_path / "home"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= hub.environment(home, token)
    done = subprocess.run(
        [sys.executable, "-c", WAY, str(saved)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["same"] == dict.fromkeys(("revision", "commit", "timm", "timm-revision", "pasted"), True)
    assert (found["other_head"], found["logits"]) == (3, [1, 10])
    assert "exists already and is public" in done.stderr  # ann/net with --private
    assert all("SHA-256 differs" in error for error in found["errors"]["hf-hub:ann/altered"])
    assert "loaded" not in str(found["errors"])
    assert set(hub.files("ann/other")) >= {"README.md", "config.json", "images/cost.png", "adder_report.json"}
    assert hub.repositories["ann/net"].branches["main"][-1][2].keys() == {".gitattributes"}
    assert token not in done.stdout + done.stderr
    for path in (*tmp_path.rglob("*"), *saved.rglob("*")):
        assert not path.is_file() or token.encode() not in path.read_bytes()
