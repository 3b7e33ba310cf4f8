"""A Hugging Face Hub on 127.0.0.1, in memory: enough of its interface to push models and to load them back.

    with running_hub() as hub:
        subprocess.run([sys.executable, "script.py"], env=hub.env(tmp_path / "home"), timeout=300, check=True)
        hub.files("tester/model")["config.json"]

Client code runs in a subprocess, as huggingface_hub reads HF_ENDPOINT when it is imported.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

USER = "tester"
Reply = tuple[int, Any, dict[str, str]]  # status, body (bytes, or what becomes JSON), headers


@dataclass
class Commit:
    """One version of a repository."""

    sha: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repo:
    """History in order of arrival, whatever the branch, and the commit each branch points to."""

    commits: list[Commit]
    branches: dict[str, Commit]

    def at(self, revision: str) -> Commit | None:
        """The commit a branch name or a commit hash stands for."""
        return self.branches.get(revision) or next((c for c in self.commits if c.sha == revision), None)


@dataclass
class Hub:
    """A running hub; `requests` lists what was asked, as "METHOD /path"."""

    url: str = ""
    lfs_from: int | None = None
    repos: dict[str, Repo] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Path -> content at a branch or commit; KeyError if there is no such repository or revision."""
        commit = self.repos[repo_id].at(revision)
        if commit is None:
            raise KeyError(f"{repo_id} has no revision {revision!r}, only {list(self.repos[repo_id].branches)}")
        return dict(commit.files)

    def env(self, hf_home: str | Path) -> dict[str, str]:
        """This process's environment, turned to this hub with `hf_home` as the only cache."""
        dropped = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
        kept = {k: v for k, v in os.environ.items() if k not in dropped and not k.lower().endswith("_proxy")}
        own = {"HF_ENDPOINT": self.url, "HF_TOKEN": "hf_dummy", "HF_HOME": str(hf_home)}
        return kept | own | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


@contextmanager
def running_hub(lfs_from: int | None = None) -> Iterator[Hub]:
    """A hub that lives as long as the block.

    Args:
        lfs_from: files of this many bytes and more travel by the LFS protocol; by default none do.
    """
    hub = Hub(lfs_from=lfs_from)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _error(status: int, code: str) -> Reply:
    return status, {"error": code}, {"X-Error-Code": code}


def _blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


_MODEL, _REVISION = "/api/models/(?P<repo_id>[^/]+/[^/]+)", "(?P<revision>[^/]+)"
_ROUTES = [
    ("POST", "/api/repos/create", "create_repo"),
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/validate-yaml", "validate_yaml"),
    ("GET", f"{_MODEL}(/revision/{_REVISION})?", "info"),
    ("GET", f"{_MODEL}/tree/{_REVISION}(/(?P<folder>.+))?", "tree"),
    ("POST", f"{_MODEL}/branch/(?P<name>[^/]+)", "branch"),
    ("POST", f"{_MODEL}/preupload/{_REVISION}", "preupload"),
    ("POST", f"{_MODEL}/commit/{_REVISION}", "commit"),
    ("POST", r"/(?P<repo_id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]+)", "lfs_put"),
    ("GET", f"/(?P<repo_id>[^/]+/[^/]+)/resolve/{_REVISION}/(?P<path>.+)", "resolve"),
]


class _Handler(BaseHTTPRequestHandler):
    """A request's route names the method that makes the reply; HEAD is GET without the body."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet

    def _answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {path}")
            status, content, headers = self._reply(path)
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _reply(self, path: str) -> Reply:
        if self.command == "POST" and not self.headers.get("Authorization", "").startswith("Bearer "):
            return _error(401, "Unauthorized")
        for method, pattern, name in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == self.command.replace("HEAD", "GET"):
                found = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                if "repo_id" in found:
                    self.repo_id, self.revision = found.pop("repo_id"), found.pop("revision", "main")
                    if self.repo_id not in self.hub.repos:
                        return _error(404, "RepoNotFound")
                    self.repo = self.hub.repos[self.repo_id]
                    commit = self.repo.at(self.revision)
                    if commit is None:
                        return _error(404, "RevisionNotFound")
                    self.at = commit
                return getattr(self, name)(**found)
        return _error(404, f"{self.command} {path} is not served by the loopback hub")

    def create_repo(self) -> Reply:
        wanted = json.loads(self.body)
        repo_id = f"{wanted.get('organization') or USER}/{wanted['name']}"
        status = 409 if repo_id in self.hub.repos else 200
        first = Commit(hashlib.sha1(repo_id.encode()).hexdigest(), "initial commit", {})
        self.hub.repos.setdefault(repo_id, Repo([first], {"main": first}))
        return status, {"url": f"{self.hub.url}/{repo_id}"}, {}

    def whoami(self) -> Reply:
        return 200, {"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}}, {}

    def validate_yaml(self) -> Reply:
        return 200, {"errors": [], "warnings": []}, {}

    def info(self) -> Reply:
        siblings = [{"rfilename": path} for path in self.at.files]
        return 200, {"id": self.repo_id, "sha": self.at.sha, "tags": [], "siblings": siblings}, {}

    def tree(self, folder: str = "") -> Reply:
        inside = {p: data for p, data in self.at.files.items() if not folder or p.startswith(f"{folder}/")}
        if folder and not inside:
            return _error(404, "EntryNotFound")
        rows = [{"type": "file", "path": p, "size": len(d), "oid": _blob_id(d)} for p, d in inside.items()]
        return 200, rows, {}

    def branch(self, name: str) -> Reply:
        start = self.repo.at(json.loads(self.body).get("startingPoint", "main"))
        if start is None:
            return _error(404, "RevisionNotFound")
        status = 409 if name in self.repo.branches else 201
        self.repo.branches.setdefault(name, start)
        return status, {}, {}

    def preupload(self) -> Reply:
        rows = []
        for path, size in ((file["path"], file["size"]) for file in json.loads(self.body)["files"]):
            lfs, old = self.hub.lfs_from is not None and size >= self.hub.lfs_from, self.at.files.get(path)
            oid = None if old is None else hashlib.sha256(old).hexdigest() if lfs else _blob_id(old)
            mode = "lfs" if lfs else "regular"
            rows.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {"files": rows}, {}

    def lfs_batch(self) -> Reply:
        objects = json.loads(self.body)["objects"]
        for wanted in objects:
            if wanted["oid"] not in self.hub.large:
                wanted["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}
        return 200, {"transfer": "basic", "objects": objects}, {}

    def lfs_put(self, oid: str) -> Reply:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return _error(400, "content and object id differ")
        self.hub.large[oid] = self.body
        return 200, {}, {}

    def commit(self) -> Reply:
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        if self.revision not in self.repo.branches or header["value"].get("parentCommit", self.at.sha) != self.at.sha:
            return _error(412, "only the head of a branch can be committed to")
        files = dict(self.at.files)
        for key, value in ((operation["key"], operation["value"]) for operation in operations):
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            else:  # deletedFile, deletedFolder
                gone = value["path"].rstrip("/")
                files = {p: d for p, d in files.items() if p != gone and not p.startswith(f"{gone}/")}
        sha = hashlib.sha1(f"{self.at.sha} {len(self.repo.commits)}".encode() + self.body).hexdigest()
        commit = Commit(sha, header["value"]["summary"], files)
        self.repo.commits.append(commit)
        self.repo.branches[self.revision] = commit
        return 200, {"commitUrl": f"{self.hub.url}/{self.repo_id}/commit/{sha}", "commitOid": sha}, {}

    def resolve(self, path: str) -> Reply:
        if path not in self.at.files:
            return 404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.at.sha}
        data = self.at.files[path]
        return 200, data, {"X-Repo-Commit": self.at.sha, "ETag": f'"{_blob_id(data)}"'}

    def log_message(self, format: str, *args: Any) -> None:
        """Silent; `Hub.requests` is the log."""
