"""Uploading to a Hub on this machine: one commit whatever breaks, one line of error, and never the token."""

import json
import os
import re
import subprocess
import sys

import pytest

from adderkit.convert.errors import PublishError
from adderkit.recipes.hub.upload import Target

TOKEN = "hf_right"
FILES = ("README.md", "config.json", "model.safetensors")
# huggingface_hub reads its settings when it is imported, hence a process of its own.
SCRIPT = """
import dataclasses, json, pathlib, sys
from adderkit.convert.errors import PublishError
from adderkit.recipes.hub import upload
upload._WAITS = (0.01, 0.01, 0.01)
folder, target, more = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
notes = []
try:
    files = sorted(path.name for path in folder.iterdir())
    done = upload.upload(folder, files, upload.Target(**target), announce=notes.append, **more)
    print(json.dumps({"notes": notes, **dataclasses.asdict(done)}))
except PublishError as error:
    print(json.dumps({"notes": notes, "error": str(error)}))
"""


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "net"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# net\n")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 2000)
    return folder


@pytest.fixture
def send(hub, folder, tmp_path):
    """Upload the folder in a fresh process; what it returned or raised."""

    def run(repository="ann/net", token=TOKEN, overwrite_card=False, **target):
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        environment |= hub.environment(tmp_path / "home", token)
        words = [json.dumps({"repository": repository, **target}), json.dumps({"overwrite_card": overwrite_card})]
        command = [sys.executable, "-c", SCRIPT, str(folder), *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
        assert token is None or token not in done.stdout + done.stderr
        assert "signature" not in done.stdout + done.stderr  # of an address that lets anybody write
        return json.loads(done.stdout)

    return run


def test_one_commit_and_none_without_a_change(hub, send, folder):
    done = send(message="Publish")
    assert done["sent"] == list(FILES)
    assert done["url"] == f"{hub.url}/ann/net/commit/{done['commit']}"
    assert hub.history("ann/net") == ["Publish"]
    stored = hub.files("ann/net")
    assert {name: stored[name] for name in FILES} == {name: (folder / name).read_bytes() for name in FILES}
    hub.requests.clear()
    again = send()
    assert (again["sent"], again["commit"]) == ([], done["commit"])
    assert hub.seen("P", "objects|commit") == []


def test_only_what_changed_is_sent(hub, send, folder):
    send()
    (folder / "config.json").write_text('{"a": 1}')
    hub.requests.clear()
    assert send()["sent"] == ["config.json"]
    assert hub.seen("PUT", "objects") == []
    assert len(hub.history("ann/net")) == 2


def test_card_on_the_hub_is_kept_unless_told_otherwise(hub, send, folder):
    send()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# other\n")
    (folder / "config.json").write_text('{"a": 1}')
    kept = send()
    assert (kept["sent"], kept["card_kept"]) == (["config.json"], True)
    assert hub.files("ann/net")["README.md"].endswith(b"# net\n")
    replaced = send(overwrite_card=True)
    assert (replaced["sent"], replaced["card_kept"]) == (["README.md"], False)
    assert hub.files("ann/net")["README.md"].endswith(b"# other\n")


def test_private(hub, send):
    send(private=True)
    assert hub.repositories["ann/net"].private
    assert send(private=True)["sent"] == []
    send("ann/open")
    assert "exists already and is public" in send("ann/open", private=True)["error"]


def test_branch_is_made(hub, send):
    send(revision="v1.0")
    assert set(hub.repositories["ann/net"].branches) == {"main", "v1.0"}
    assert hub.history("ann/net") == []
    assert hub.files("ann/net", "v1.0")["config.json"] == b"{}"


def test_pull_request(hub, send):
    hub.repositories["bob/net"] = hub.repository()
    hub.repositories["bob/net"].commit("main", "initial commit", {})
    done = send("bob/net", create_pr=True)
    assert done["url"] == f"{hub.url}/bob/net/discussions/1"
    assert hub.history("bob/net") == []
    assert hub.files("bob/net", "refs/pr/1")["config.json"] == b"{}"


@pytest.mark.parametrize(
    ("fault", "notes"),
    [
        (("POST", "repos/create", 500), 1),
        (("POST", "validate-yaml", 503), 1),
        (("GET", "api/models", 502), 1),
        (("POST", "commit/", 500), 1),
        (("POST", "commit/", "cut"), 1),
        (("POST", "commit/", "lose the answer"), 1),
        (("PUT", "objects", "cut"), 0),  # huggingface_hub tries that again itself
        (("PUT", "objects", 500), 0),
    ],
    ids=lambda value: "-".join(map(str, value)).replace("/", "") if isinstance(value, tuple) else str(value),
)
def test_what_breaks_once_is_tried_again(hub, send, folder, fault, notes):
    hub.fault(*fault)
    done = send()
    assert (done["sent"], len(done["notes"])) == (list(FILES), notes)
    assert hub.history("ann/net") == ["Publish with adderkit"]
    assert len(hub.seen("PUT", "objects")) == 1 + (notes == 0)
    assert hub.files("ann/net")["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_what_stays_broken_can_be_resumed(hub, send):
    hub.fault("POST", "commit/", 500, times=4)
    failed = send()
    assert "publish again: files that have arrived are not sent twice" in failed["error"]
    assert len(failed["notes"]) == 3
    assert send()["sent"] == list(FILES)
    assert len(hub.seen("PUT", "objects")) == 1
    assert len(hub.history("ann/net")) == 1


def test_pull_request_is_never_opened_twice(hub, send):
    hub.fault("POST", "commit/", "lose the answer")
    assert "may have been opened nevertheless: check" in send(create_pr=True)["error"]
    assert len(hub.repositories["ann/net"].pull_requests) == 1


@pytest.mark.parametrize(
    ("repository", "token", "message"),
    [
        ("ann/net", "hf_wrong_one", "log in with: hf auth login"),
        ("ann/net", None, "log in with: hf auth login"),
        ("bob/net", TOKEN, "your token does not permit writing to bob/net"),
    ],
    ids=["wrong-token", "no-token", "not-yours"],
)
def test_refused_at_once(hub, send, repository, token, message):
    refused = send(repository, token=token)
    assert message in refused["error"]
    assert "\n" not in refused["error"]
    assert refused["notes"] == []
    assert hub.repositories == {}


def test_not_found(hub, send):
    hub.fault("GET", "api/models", 404)
    assert "check the names" in send()["error"]


def test_front_matter_that_the_hub_refuses(hub, send, folder):
    (folder / "README.md").write_text("---\nlicense: my-own\n---\n")
    refused = send()
    assert re.search(
        r"refuses ann/net \(Invalid metadata .* license 'my-own' is unknown\); fix the cause", refused["error"]
    )
    assert refused["notes"] == []
    assert hub.history("ann/net") == []


def test_token_that_the_server_repeats_is_not_passed_on(hub, send):
    hub.fault("POST", "repos/create", 400, body=f"what is {TOKEN} to me")
    assert "what is *** to me" in send()["error"]


def test_signed_address_is_not_passed_on(hub, send):
    hub.fault("PUT", "objects", 403)
    refused = send()
    assert "objects/" in refused["error"]
    assert refused["notes"] == []


def test_no_hub(hub, send):
    hub.server.server_close()
    hub.url = "http://127.0.0.1:9"
    assert "failed (Connect" in send()["error"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"repository": "net"}, "expected user/name"),
        ({"repository": "a/b/c"}, "is not the name of a repository"),
        ({"repository": "ann/ne t"}, "is not the name of a repository"),
        ({"repository": "ann/../net"}, "is not the name of a repository"),
        ({"repository": ""}, "--repo"),
        ({"repository": "ann/net", "create_pr": True, "revision": "v1"}, "give --create-pr or --revision"),
        ({"repository": "ann/net", "message": " "}, "--message is empty"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_targets_that_are_refused(arguments, message):
    with pytest.raises(PublishError, match=message):
        Target(**arguments)
