"""The files of a run, and how an incomplete folder is handled."""

import contextlib
import csv
import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

import adderkit
from adderkit.convert.checkpoint.report import Report
from adderkit.convert.errors import CheckpointError, RecipeError
from adderkit.recipes.configs.recipe import Recipe
from adderkit.recipes.runs.folder import RunFolder, SaveError, new_run_folder
from adderkit.recipes.runs.state import COLUMNS, RunState

ROWS = [
    {"epoch": epoch, "train_loss": 2 - epoch / 3, "eval_loss": 1 / (epoch + 1), "eval_top1": 10.0 * epoch,
     "eval_top5": 60.5, "lr": 0.1**epoch}
    for epoch in range(3)
]  # fmt: skip
SCALES = [{"epoch": epoch, "weight_rms": [0.1, 0.2], "gradient_norm": [1e-3, 2.5]} for epoch in range(3)]
STATE = RunState(epoch=3, losses={"loss": 0.0}, rows=ROWS, layer_scales=SCALES)
SUMS = {"loss": 0.0, "images": 0.0}
MISSING = object()
HEADER = "epoch,train_loss,eval_loss,eval_top1,eval_top5,lr"


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "runs" / "first")
    folder.start({"job": {"model": "x"}, "recipe": {"lr": 0.1}})
    return folder


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("cifar_resnet20").eval()


def test_start_writes_the_arguments(folder):
    expected = {"job": {"model": "x"}, "recipe": {"lr": 0.1}}
    assert yaml.safe_load((folder.path / "args.yaml").read_text()) == expected
    assert folder.arguments() == expected


def test_a_second_start_is_refused_with_the_way_to_go_on(folder):
    with pytest.raises(RecipeError, match=f"holds a run already; continue it with --resume {folder.path}"):
        folder.start({"job": {}})
    assert folder.arguments()["recipe"] == {"lr": 0.1}


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match=r"cannot write --output .*file/run"):
        RunFolder(tmp_path / "file" / "run").start({})


@pytest.mark.parametrize("place", ["nowhere", "."])
def test_no_run_to_resume(tmp_path, place):
    with pytest.raises(RecipeError, match=r"holds no run to resume: .*args.yaml does not exist"):
        RunFolder(tmp_path / place).arguments()


@pytest.mark.parametrize("text", ["", "- 1\n", "job: [", "!!python/object/apply:os.getcwd []"])
def test_damaged_arguments(folder, text):
    (folder.path / "args.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"args.yaml (is not valid YAML|contains a)"):
        folder.arguments()


def test_summary(folder):
    folder.write_summary(ROWS)
    text = (folder.path / "summary.csv").read_text()
    assert text.splitlines()[0] == HEADER == ",".join(COLUMNS)
    found = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(text.splitlines())]
    assert found == ROWS


def test_last_and_best_are_checkpoints(folder, model):
    folder.save_best(model, Report(metrics={"validation": {"top1": 1.0}}))
    folder.save_last(model, Accelerator(cpu=True), STATE, Report())
    for saved in (folder.best, folder.last):
        loaded = adderkit.load(saved).state_dict()
        assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())
    report = json.loads((folder.best / "adder_report.json").read_text())
    assert report["metrics"] == {"validation": {"top1": 1.0}}


@pytest.mark.parametrize("name", ["best", "last"])
def test_model_card_names_the_folder_it_lies_in(folder, model, name):
    folder.save_best(model, Report())
    folder.save_last(model, Accelerator(cpu=True), STATE, Report())
    assert (folder.path / name / "README.md").read_text().count(f"\n# {name}\n") == 1


def test_saving_again_leaves_nothing_else_behind(folder, model):
    for _ in range(2):
        folder.save_best(model, Report())
        folder.save_last(model, Accelerator(cpu=True), STATE, Report())
    assert {path.name for path in folder.path.iterdir()} == {"args.yaml", "best", "last", "previous"}
    assert folder.last.stat().st_mode & 0o777 == 0o755


def test_state_comes_back(folder, model):
    accelerator = Accelerator(cpu=True)
    folder.save_last(model, accelerator, STATE, Report())
    expected = torch.rand(3)
    assert folder.load_last(accelerator) == STATE
    assert torch.equal(torch.rand(3), expected)


def test_no_epoch_finished(folder):
    assert folder.load_last(Accelerator(cpu=True)) == RunState()


def state_file(**changes):
    """What a run on one process writes, changed."""
    whole = {"epoch": 3, "batches_done": 0, "skipped": 0, "skipped_in_a_row": 0, "lr": 0.1, "images_per_second": None,
             "rows": ROWS, "layer_scales": SCALES, "sums": [SUMS]}  # fmt: skip
    return json.dumps({key: value for key, value in {**whole, **changes}.items() if value is not MISSING})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "damaged: expected a run state"),
        (state_file(rows=[{"epoch": 0}]), "damaged: expected a run state with rows of epoch"),
        (state_file(rows=[3]), "damaged"),
        (state_file(rows=[{**ROWS[0], "lr": "high"}]), "damaged"),
        (state_file(epoch=-1), "damaged"),
        (state_file(batches_done=1.5), "damaged"),
        (state_file(lr=MISSING), "damaged"),
        (state_file(layer_scales=[{**SCALES[0], "weight_rms": [0.1]}]), "damaged"),
        (state_file(layer_scales=[{**SCALES[0], "weight_rms": ["0.1", 0.2]}]), "damaged"),
        (state_file(layer_scales=[{"epoch": 0}]), "damaged"),
        (state_file(layer_scales={}), "damaged"),
        (state_file(sums=[[0.0, 0.0]]), "damaged"),
        (state_file(sums=[{"loss": 0.0}]), "damaged"),
        (state_file(sums=[{**SUMS, "task": "low"}]), "damaged"),
        (state_file(images_per_second="fast"), "damaged"),
        (state_file(rows=[{**ROWS[0], "loss": 1.0}]), "damaged"),
        (state_file(more=1), "damaged"),
        (state_file(sums=[]), "damaged"),
        (state_file(sums=[SUMS, {"images": 0.0}]), "damaged"),
    ],
)
def test_damaged_state(folder, model, text, message):
    accelerator = Accelerator(cpu=True)
    folder.save_last(model, accelerator, STATE, Report())
    (folder.last / "state" / "run_state.json").write_text(text)
    with pytest.raises((RecipeError, CheckpointError), match=message):
        folder.load_last(accelerator)


def test_state_is_read_as_written(folder, model):
    rows = [{**row, "train_task": 0.1, "train_distill": 0.7} for row in ROWS[:2]]
    losses = {"loss": 0.1 + 0.2, "task": 1 / 3, "distill": 1e-17}
    state = RunState(2, 17, losses, 96, 1e-3, 3, 1, 12.5, rows, SCALES)
    folder.save_last(model, Accelerator(cpu=True), state, Report())
    assert folder.load_last(Accelerator(cpu=True)) == state


def test_one_process_continues_from_the_sums_and_steps_of_two(folder, model):
    """Three batches of each of two processes, in windows of one, are three windows of two of one process."""
    folder.save_last(model, Accelerator(cpu=True), STATE, Report())
    sums = [{"loss": 1.5, "images": 48}, {"loss": 2.0, "images": 48}]
    (folder.last / "state" / "run_state.json").write_text(state_file(batches_done=3, sums=sums))
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    state = folder.load_last(Accelerator(cpu=True, gradient_accumulation_steps=2))
    assert (state.batches_done, state.losses, state.images) == (6, {"loss": 3.5}, 96)


@pytest.mark.parametrize("there", ["train/cat/1.png", "notes.txt", ".git/config"])
def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path, there):
    (tmp_path / there).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / there).touch()
    before = sorted(tmp_path.rglob("*"))
    name = there.partition("/")[0]
    with pytest.raises(RecipeError, match=rf"--output {tmp_path} holds {name}, expected a new or empty folder; give"):
        RunFolder(tmp_path).start({})
    assert sorted(tmp_path.rglob("*")) == before


def test_what_a_start_that_was_killed_leaves_is_no_obstacle(tmp_path):
    (tmp_path / ".partial" / "last").mkdir(parents=True)
    for name in (".lock", ".args.yaml.x8f3"):
        (tmp_path / name).touch()
    RunFolder(tmp_path).start({"job": {}})
    assert RunFolder(tmp_path).arguments() == {"job": {}}


def saved_twice(folder, model):
    """An accelerator with an optimizer, and two saves of different positions."""
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    for epoch in (1, 2):
        folder.save_last(model, accelerator, RunState(epoch=epoch, losses={"loss": 0.0}), Report())
    return accelerator


@pytest.mark.parametrize("damage", ["missing", "cut", "one bit"])
@pytest.mark.parametrize("name", ["state/optimizer.bin", "state/run_state.json", "model.safetensors", "checksums.json"])
def test_a_damaged_save_gives_way_to_the_one_before(folder, model, name, damage):
    accelerator = saved_twice(folder, model)
    path = folder.last / name
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:20] if damage == "cut" else data[:9] + bytes([data[9] ^ 1]) + data[10:])
    said = []
    folder.recover(said.append)
    assert folder.load_last(accelerator).epoch == 1
    assert len(said) == 2
    assert said[0].startswith(f"{folder.last} is damaged: ")
    assert said[1] == f"resuming from the save before, {folder.previous}"


def test_whole_saves_are_left_alone(folder, model):
    accelerator = saved_twice(folder, model)
    (folder.last / "README.md").write_text("notes of mine")
    said = []
    folder.recover(said.append)
    assert folder.load_last(accelerator).epoch == 2
    assert folder.previous.is_dir()
    assert said == []


def test_two_damaged_saves_are_one_clear_error(folder, model):
    saved_twice(folder, model)
    for place in (folder.last, folder.previous):
        (place / "model.safetensors").unlink()
    with pytest.raises(RecipeError, match=f"no save in {folder.path} is intact; start a new run, from {folder.best}"):
        folder.recover(lambda line: None)


def test_a_state_of_something_else_is_one_clear_error(folder, model):
    accelerator = Accelerator(cpu=True)
    folder.save_last(model, accelerator, STATE, Report())
    accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(RecipeError, match=r"cannot restore .*state: "):
        folder.load_last(accelerator)


def test_the_model_is_saved_as_evaluated(folder, model):
    entered = []

    @contextlib.contextmanager
    def as_evaluated():
        entered.append(True)
        yield

    folder.save_last(model, Accelerator(cpu=True), STATE, Report(), as_evaluated())
    assert entered == [True]


@pytest.mark.parametrize(("error", "told"), [(OSError, SaveError), (KeyboardInterrupt, KeyboardInterrupt)])
@pytest.mark.parametrize("name", ["best", "last"])
def test_an_interrupted_exchange_is_put_right(folder, model, monkeypatch, name, error, told):
    """The old folder has been moved away and the new one cannot be moved in."""
    save = {
        "best": lambda: folder.save_best(model, Report()),
        "last": lambda: folder.save_last(model, Accelerator(cpu=True), STATE, Report()),
    }[name]
    save()
    rename = Path.rename

    def failing(self, target):
        if Path(target) == folder.path / name:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(told):
        save()
    monkeypatch.undo()
    folder.recover(lambda line: None)
    assert adderkit.load(folder.path / name).num_classes == 10


def test_new_run_folder_is_the_one_asked_for():
    assert new_run_folder("here", "resnet18", Recipe()).path == Path("here")


@pytest.mark.parametrize("model", ["resnet18.a1_in1k", "hf-hub:timm/resnet18", "some/dir/net/", "a b/c:d"])
def test_new_run_folder_is_named_after_model_and_data(model):
    path = new_run_folder(None, model, Recipe(dataset="hfds/user/birds")).path
    assert path.parent == Path("runs")
    assert path.name.endswith("birds")
    assert all(sign.isalnum() or sign in "-_" for sign in path.name)


class Killed(BaseException):
    """Nothing that code would catch."""


def test_a_kill_at_any_file_operation_of_a_save_leaves_a_whole_one(folder, model, monkeypatch):
    """Before the k-th renaming, replacing, removing or writing of a file, for every k there is."""
    accelerator = saved_twice(folder, model)
    original = {name: getattr(Path, name) for name in ("rename", "replace", "open", "mkdir", "rmdir")}
    kept = shutil.copytree(folder.path, folder.path.with_name("kept"))
    kills = 0
    while True:
        shutil.rmtree(folder.path)
        shutil.copytree(kept, folder.path)
        left = kills

        def killing(name):
            def call(self, *args, **kwargs):
                nonlocal left
                if left == 0:
                    raise Killed
                left -= 1
                return original[name](self, *args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in original:
                patch.setattr(Path, name, killing(name))
            try:
                folder.save_last(model, accelerator, RunState(epoch=3), Report())
            except Killed:
                kills += 1
            else:
                break
        folder.recover(lambda line: None)
        assert folder.load_last(accelerator).epoch in (2, 3)
    assert kills > 15
    assert folder.load_last(accelerator).epoch == 3
