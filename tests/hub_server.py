"""A small Hugging Face Hub on this machine: the endpoints that publishing and loading use, and faults on demand.

It keeps everything in memory and writes down every request.
"""

import base64
import dataclasses
import hashlib
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LICENSES = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-nc-4.0", "other")
RELATIONS = ("finetune", "adapter", "merge", "quantized")


def git_blob(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclasses.dataclass
class Repository:
    """Branches are lists of commits, a commit is ``(sha, message, files)``, files are contents by path."""

    private: bool = False
    branches: dict = dataclasses.field(default_factory=dict)
    pull_requests: list = dataclasses.field(default_factory=list)
    count: int = 0

    def commit(self, branch, message, files):
        self.count += 1
        self.branches.setdefault(branch, []).append(
            (hashlib.sha1(b"%d" % self.count).hexdigest(), message, dict(files))
        )
        return self.branches[branch][-1][0]

    def at(self, revision):
        """The commit that a branch or a SHA names, or nothing."""
        revision = unquote(revision)
        if revision in self.branches:
            return self.branches[revision][-1]
        commits = [commit for branch in self.branches.values() for commit in branch]
        return next((commit for commit in commits if commit[0] == revision), None)


@dataclasses.dataclass
class Fault:
    """The next ``times`` requests that match get a status, or the connection is cut while or after they are served."""

    method: str
    pattern: str
    what: int | str  # a status, "cut" or "lose the answer"
    times: int = 1
    body: str | None = None


class Hub:
    """The server; use it in a ``with``."""

    repository = Repository

    def __init__(self, token="hf_right", user="ann"):
        self.token, self.user = token, user
        self.repositories, self.objects, self.faults, self.requests = {}, {}, [], []
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args):
        self.server.shutdown()
        self.server.server_close()

    def fault(self, method, pattern, what, times=1, body=None):
        """Have the next requests that match fail, see ``Fault``."""
        self.faults.append(Fault(method, pattern, what, times, body))

    def files(self, name, revision="main"):
        """What a repository holds: contents by path."""
        return self.repositories[name].at(revision)[2]

    def history(self, name, branch="main"):
        """The commits' messages after the one that a repository begins with."""
        return [message for _, message, _ in self.repositories[name].branches[branch]][1:]

    def seen(self, method, pattern):
        """The requests that match, as ``METHOD path``."""
        return [line for line in self.requests if line.startswith(method) and re.search(pattern, line)]

    def environment(self, home, token=None):
        """What makes a process take this Hub for the real one, with no token but the given one."""
        settings = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        return settings | ({"HF_TOKEN": token} if token else {})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.serve("GET")

    def do_HEAD(self):
        self.serve("HEAD")

    def do_POST(self):
        self.serve("POST")

    def do_PUT(self):
        self.serve("PUT")

    # One request

    def serve(self, method):
        address = urlsplit(self.path)
        self.query = parse_qs(address.query)
        self.hub.requests.append(f"{method} {self.path}")
        faults = self.hub.faults
        fault = next((f for f in faults if f.times and f.method == method and re.search(f.pattern, self.path)), None)
        if fault is not None:
            fault.times -= 1
        length = int(self.headers.get("Content-Length") or 0)
        self.cut_after = None
        if fault is not None and fault.what == "cut":
            if length:
                self.rfile.read(length // 2)
                return self.hang_up()
            self.cut_after = 1000
        self.body = self.rfile.read(length)
        if fault is not None and isinstance(fault.what, int):
            message = fault.body or "injected"
            return self.answer(fault.what, {"error": message}, {"X-Error-Message": message})
        if fault is not None and fault.what == "lose the answer":
            self.answer = lambda *args, **kwargs: None
        self.route(method, address.path)
        if fault is not None and fault.what == "lose the answer":
            self.hang_up()
        return None

    def hang_up(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def route(self, method, path):
        routes = (
            ("POST", r"/api/repos/create", self.create),
            ("POST", r"/api/validate-yaml", self.validate),
            ("GET", r"/api/models/([^/]+/[^/]+)", self.info),
            ("GET", r"/api/models/([^/]+/[^/]+)/revision/([^/]+)", self.info),
            ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", self.tree),
            ("POST", r"/api/models/([^/]+/[^/]+)/branch/(.+)", self.branch),
            ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", self.preupload),
            ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", self.commit),
            ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.batch),
            ("PUT", r"/objects/(\w+)", self.put),
            ("HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.resolve),
            ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.resolve),
        )
        for expected, pattern, action in routes:
            match = re.fullmatch(pattern, path)
            if match and method == expected:
                return action(*match.groups())
        return self.answer(404, {"error": f"no such endpoint: {method} {path}"})

    def answer(self, status, content, headers=()):
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(raw)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw[: self.cut_after])
            if self.cut_after is not None:
                self.wfile.flush()
                self.hang_up()

    def may(self, name, write=False):
        """Whether the request may touch a repository; answers it if not."""
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {self.hub.token}") or (write and given is None):
            self.answer(401, {"error": "Invalid credentials"}, {"X-Error-Message": "Invalid username or password."})
        elif name not in self.hub.repositories or (self.hub.repositories[name].private and given is None):
            status = 404 if given else 401
            self.answer(status, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})
        elif write and name.split("/")[0] != self.hub.user and "create_pr" not in self.query:
            self.answer(403, {"error": "no"}, {"X-Error-Message": "You have no write access."})
        else:
            return self.hub.repositories[name]
        return None

    def commit_at(self, name, revision, write=False):
        repository = self.may(name, write)
        if repository is None:
            return None, None
        found = repository.at(revision)
        if found is None:
            self.answer(404, {"error": "no revision"}, {"X-Error-Code": "RevisionNotFound"})
        return repository, found

    # Endpoints

    def create(self):
        asked = json.loads(self.body)
        owner = asked.get("organization") or self.hub.user
        name = f"{owner}/{asked['name']}"
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self.answer(401, {"error": "no"}, {"X-Error-Message": "Invalid username or password."})
        if owner != self.hub.user:
            return self.answer(403, {"error": "no"}, {"X-Error-Message": f"You may not create in {owner}."})
        answer = {"url": f"{self.hub.url}/{name}", "name": name}
        if name in self.hub.repositories:
            return self.answer(409, {"error": "You already created this model repo", **answer})
        self.hub.repositories[name] = Repository(private=asked.get("visibility") == "private")
        self.hub.repositories[name].commit("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return self.answer(200, answer)

    def validate(self):
        """The rules that hub-docs states for a card's front matter."""
        card = json.loads(self.body)["content"]
        errors = []
        try:
            head = yaml.safe_load(card.split("---")[1])
            if head.get("license") not in LICENSES:
                errors.append(f"license {head.get('license')!r} is unknown")
            if head.get("license") == "other" and not head.get("license_name"):
                errors.append("license_name is missing")
            if head.get("base_model_relation", "finetune") not in RELATIONS:
                errors.append("base_model_relation is unknown")
            for entry in head.get("model-index", ()):
                for result in entry["results"]:
                    _ = result["task"]["type"], result["dataset"]["type"], result["dataset"]["name"]
                    _ = [(metric["type"], metric["value"]) for metric in result["metrics"]]
        except (yaml.YAMLError, KeyError, IndexError, AttributeError, TypeError) as error:
            errors.append(repr(error))
        self.answer(400 if errors else 200, {"errors": [{"message": each} for each in errors], "warnings": []})

    def info(self, name, revision="main"):
        repository, found = self.commit_at(name, revision)
        if found:
            files = [{"rfilename": path, **self.entry(path, raw)} for path, raw in found[2].items()]
            files = [{**file, "blobId": file.pop("oid")} for file in files]
            facts = {"id": name, "modelId": name, "sha": found[0], "private": repository.private}
            self.answer(200, {**facts, "siblings": files})

    def tree(self, name, revision):
        _, found = self.commit_at(name, revision)
        if found:
            rows = [{"type": "file", "path": path, **self.entry(path, raw)} for path, raw in found[2].items()]
            self.answer(200, rows)

    @staticmethod
    def large(path):
        return path.endswith((".safetensors", ".png"))

    def entry(self, path, raw):
        digest = hashlib.sha256(raw).hexdigest()
        lfs = {"oid": digest, "sha256": digest, "size": len(raw), "pointerSize": 130}
        return {"oid": git_blob(raw), "size": len(raw), **({"lfs": lfs} if self.large(path) else {})}

    def branch(self, name, branch):
        repository = self.may(name, write=True)
        if repository is not None:
            main = repository.at("main")
            repository.commit(unquote(branch), main[1], main[2])
            self.answer(200, {})

    def preupload(self, name, revision):
        _, found = self.commit_at(name, revision, write=True)
        if found:
            paths = [file["path"] for file in json.loads(self.body)["files"]]
            modes = [{"path": p, "uploadMode": "lfs" if self.large(p) else "regular"} for p in paths]
            self.answer(200, {"files": [{**mode, "shouldIgnore": False} for mode in modes]})

    def batch(self, name):
        if self.may(name, write=name.split("/")[0] == self.hub.user) is None:
            return
        objects = []
        for asked in json.loads(self.body)["objects"]:
            actions = {"actions": {"upload": {"href": f"{self.hub.url}/objects/{asked['oid']}?signature=s3cret"}}}
            objects.append({**asked, **({} if asked["oid"] in self.hub.objects else actions)})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.answer(400, {"error": "not the object that was announced"})
        self.hub.objects[oid] = self.body
        return self.answer(200, {})

    def commit(self, name, revision):
        repository, found = self.commit_at(name, revision, write=True)
        if not found:
            return None
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit", found[0]) != found[0]:
            return self.answer(412, {"error": "the branch has moved on"})
        files = dict(found[2])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile" and value["oid"] not in self.hub.objects:
                return self.answer(400, {"error": "an object is missing"})
            large = line["key"] == "lfsFile"
            files[value["path"]] = self.hub.objects[value["oid"]] if large else base64.b64decode(value["content"])
        opened = None
        branch = unquote(revision)
        if "create_pr" in self.query:
            opened = f"{self.hub.url}/{name}/discussions/{len(repository.pull_requests) + 1}"
            repository.pull_requests.append(opened)
            branch = f"refs/pr/{len(repository.pull_requests)}"
        sha = repository.commit(branch, header["summary"], files)
        answer = {"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha, "pullRequestUrl": opened}
        return self.answer(200, answer)

    def resolve(self, name, revision, path):
        _, found = self.commit_at(name, revision)
        if not found:
            return None
        headers = {"X-Repo-Commit": found[0]}
        raw = found[2].get(unquote(path))
        if raw is None:
            return self.answer(404, {"error": "no file"}, {**headers, "X-Error-Code": "EntryNotFound"})
        entry = self.entry(path, raw)
        headers["ETag"] = f'"{entry["oid"]}"'
        if "lfs" in entry:
            headers |= {"X-Linked-Etag": f'"{entry["lfs"]["sha256"]}"', "X-Linked-Size": str(len(raw))}
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if start:
            headers["Content-Range"] = f"bytes {start[1]}-{len(raw) - 1}/{len(raw)}"
            return self.answer(206, raw[int(start[1]) :], headers)
        return self.answer(200, raw, headers)
