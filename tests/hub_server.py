"""The Hub on loopback: the part of its HTTP protocol that `huggingface_hub` 1.31 to 2.4 speaks with Xet off.

In: requests of unmodified clients (`huggingface_hub`, `transformers`, `datasets`) that were told `HF_ENDPOINT`. Out: the
Hub's answers, from repositories kept as files (`hub_repository.py`). It refuses what it does not know, and fails if told to.

Large files are served, as on the Hub, by a redirect to another origin (`localhost`, where the API is `127.0.0.1`), which
must never see a token. It knows one user, `user`, whose token is `TOKEN`. Tests use the fixture `hub`:

    def test(hub):
        hub.put("user/plays", {"train.txt": b"To be"}, kind="datasets")  # a commit made without a client
        datasets.load_dataset("user/plays")                              # any client, in this process
        hub.fail("PUT", "/lfs/", "dies")                                 # the next upload breaks off half way
"""

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from .hub_repository import LARGE, Refusal, Repository, faults_of_card

TOKEN = "hf_" + "ThisTokenIsFalse" * 2  # in two parts, so that a search for it does not find this file
Answer = tuple[int, bytes, dict[str, str]]  # status, body, headers


@dataclass
class Request:
    """What a client sent."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes = b""


@dataclass
class Fault:
    """See `HubServer.fail`."""

    method: str
    path: str
    kind: int | str
    times: float


class HubServer:
    """Serves from a thread of this process until the process ends; `reset` gives it an empty folder to keep things in."""

    def __init__(self):
        self.root = Path("nowhere")
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()  # one commit at a time
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self.http.server_port}"
        self.storage = f"http://localhost:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def reset(self, root: Path) -> None:
        self.root, self.requests, self.faults = root, [], []
        (root / "blobs").mkdir(parents=True)

    def fail(self, method: str, path: str, kind: int | str, times: float = float("inf")) -> None:
        """Let the next `times` requests fail whose method matches and whose path has a match.

        Args:
            kind: An HTTP status; "dies": the connection ends when half of the body has arrived, and so does every later
                one, until `faults` is cleared; "lost": all is done, the answer never arrives; "slow": it takes a second.
        """
        self.faults.append(Fault(method, path, kind, times))

    def fault(self, method: str, path: str) -> int | str | None:
        """What goes wrong with this request."""
        with self.lock:
            for fault in self.faults:
                if fault.times and re.fullmatch(fault.method, method) and re.search(fault.path, path):
                    fault.times -= 1
                    if fault.kind == "dies":
                        self.faults = [Fault(".*", "", "dies", float("inf"))]
                    return fault.kind
        return None

    def repository(self, repo_id: str, kind: str = "models") -> Repository:
        repository = Repository(self.root, kind, repo_id)
        if not repository.folder.is_dir():
            raise Refusal(404, "RepoNotFound", f"{repo_id} is not there")
        return repository

    def put(self, repo_id: str, files: Mapping[str, bytes], kind: str = "models") -> str:
        """Commit files to `main` without a client, in a new repository if there is none; returns the commit's SHA."""
        repository = Repository(self.root, kind, repo_id)
        if not repository.folder.exists():
            repository.create()
        return repository.commit("main", {p: repository.store(p, content) for p, content in files.items()}, [], "put")

    def files(self, repo_id: str, revision: str = "main", kind: str = "models") -> dict[str, bytes]:
        """What a revision holds, by path."""
        entries = self.repository(repo_id, kind).read(revision)["files"]
        return {path: (self.root / "blobs" / entry["oid"]).read_bytes() for path, entry in entries.items()}


API = r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)"
WEB = r"/(?:(?P<kind>datasets)/)?(?P<id>[^/]+/[^/]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate_card"),
    ("GET", rf"{API}(?:/revision/(?P<rev>[^/]+))?", "info"),
    ("GET", rf"{API}/refs", "refs"),
    ("GET", rf"{API}/commits/(?P<rev>[^/]+)", "commits"),
    ("GET", rf"{API}/tree/(?P<rev>[^/]+)(?:/(?P<path>.+))?", "tree"),
    ("POST", rf"{API}/paths-info/(?P<rev>[^/]+)", "paths_info"),
    ("POST", rf"{API}/branch/(?P<rev>[^/]+)", "branch"),
    ("POST", rf"{API}/preupload/(?P<rev>[^/]+)", "preupload"),
    ("POST", rf"{API}/commit/(?P<rev>[^/]+)", "commit"),
    ("POST", rf"{WEB}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("GET", rf"{WEB}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "storage_put"),
    ("GET", r"/lfs/(?P<oid>[0-9a-f]{64})", "storage_get"),
]
WRITES = {"create", "branch", "preupload", "commit", "lfs_batch", "whoami"}  # what needs a token


class Handler(BaseHTTPRequestHandler):
    """One request, one answer. Each route is a method that returns what is answered, or raises a `Refusal`."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do(self) -> None:
        path, self.query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        request = Request(self.command, self.path, dict(self.headers))
        self.hub.requests.append(request)
        fault, length = self.hub.fault(self.command, path), int(self.headers["Content-Length"] or 0)
        request.body = self.body = self.rfile.read(length // 2 if fault == "dies" else length)
        if fault == "slow":
            time.sleep(1)
        if fault != "dies":
            answer = self.answer_to("GET" if self.command == "HEAD" else self.command, path, fault)
        if fault in ("dies", "lost"):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.send_response(answer[0])
        for name, value in {"Content-Length": str(len(answer[1])), **answer[2]}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else answer[1])

    do_GET = do_HEAD = do_POST = do_PUT = do

    def log_message(self, *args) -> None:
        """Silence: `HubServer.requests` has it all."""

    def answer_to(self, method: str, path: str, fault: int | str | None) -> Answer:
        try:
            if isinstance(fault, int):
                raise Refusal(fault, message=f"told to answer {fault}")
            for wanted, pattern, name in ROUTES:
                if method == wanted and (match := re.fullmatch(pattern, path)):
                    self.part = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                    self.authorize(name)
                    answer = vars(Handler)[name](self)
                    return answer if isinstance(answer, tuple) else (200, json.dumps(answer).encode(), {})
            raise Refusal(404, message=f"this Hub has no {method} {path}")
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            return refusal.status, json.dumps({"error": refusal.message}).encode(), headers

    def authorize(self, name: str) -> None:
        """Who writes needs the token, and who reads what is private. To strangers that looks like what is not there."""
        given = self.headers["Authorization"]
        if name.startswith("storage_"):
            assert given is None, "the token has left the Hub"
        elif given not in (None, f"Bearer {TOKEN}") or (not given and name in WRITES):
            raise Refusal(401, message="Invalid credentials in Authorization header")
        elif "id" in self.part:
            kind = self.part.get("kind", "models")
            if not given and (not self.hub.root.joinpath(kind, self.part["id"]).is_dir()):
                raise Refusal(401, "RepoNotFound", "Repository not found")
            self.repository = self.hub.repository(self.part["id"], kind)
            if not given and self.repository.private:
                raise Refusal(401, "RepoNotFound", "Repository not found")
            if name in WRITES and not self.part["id"].startswith("user/"):
                raise Refusal(403, message="you do not have write access to this repository")

    # -- the account, repositories, revisions -------------------------------------------------------------------------

    def whoami(self):
        return {"type": "user", "name": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    def create(self):
        wanted = json.loads(self.body)
        repo_id, kind = f"{wanted['organization'] or 'user'}/{wanted['name']}", f"{wanted.get('type', 'model')}s"
        if not repo_id.startswith("user/"):
            raise Refusal(403, message="You don't have the rights to create a model under this namespace")
        url = f"{self.hub.endpoint}/{'datasets/' if kind == 'datasets' else ''}{repo_id}"
        with self.hub.lock:
            repository = Repository(self.hub.root, kind, repo_id)
            if repository.folder.exists():
                return 409, json.dumps({"error": "You already created this repo", "url": url}).encode(), {}
            repository.create(private=wanted.get("visibility") == "private")
        return {"url": url}

    def validate_card(self):
        errors = [{"message": fault} for fault in faults_of_card(json.loads(self.body)["content"])]
        return 400 if errors else 200, json.dumps({"errors": errors, "warnings": []}).encode(), {}

    def info(self):
        commit = self.repository.read(self.part.get("rev", "main"))
        about = {"id": self.part["id"], "sha": commit["sha"], "private": self.repository.private, "tags": []}
        return {**about, "siblings": [{"rfilename": path} for path in sorted(commit["files"])], "downloads": 0}

    def refs(self):
        heads = self.repository.branches().items()
        branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in heads]
        return {"branches": branches, "tags": [], "converts": []}

    def branch(self):
        with self.hub.lock:
            if self.part["rev"] in self.repository.branches():
                raise Refusal(409, message="Reference already exists")
            start = json.loads(self.body).get("startingPoint", "main")
            self.repository.point(self.part["rev"], self.repository.read(start)["sha"])
        return {}

    def commits(self):
        def listed(commit: dict) -> dict:
            date = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(commit["time"]))
            return {"id": commit["sha"], "title": commit["title"], "message": "", "date": date, "authors": []}

        return [listed(commit) for commit in self.repository.history(self.part["rev"])]

    # -- what is in them ----------------------------------------------------------------------------------------------

    def tree(self):
        within = f"{self.part['path']}/" if "path" in self.part else ""
        entries = {}
        for path, file in sorted(self.repository.read(self.part["rev"])["files"].items()):
            if path.startswith(within):
                for parent in [*Path(path).parents][-2::-1]:  # all but ".", from the top
                    if f"{parent}/".startswith(within) and f"{parent}/" != within:
                        entries[str(parent)] = {"type": "directory", "path": str(parent), "oid": "", "size": 0}
                entries[path] = listed(path, file)
        if within and not entries:
            raise Refusal(404, "EntryNotFound", f"{within} does not exist")
        deep = self.query.get("recursive", ["false"])[0].lower() == "true"
        return [entry for path, entry in entries.items() if deep or "/" not in path.removeprefix(within)]

    def paths_info(self):
        files = self.repository.read(self.part["rev"])["files"]
        return [listed(path, files[path]) for path in parse_qs(self.body.decode())["paths"] if path in files]

    def resolve(self):
        commit = self.repository.read(self.part["rev"])
        headers = {"X-Repo-Commit": commit["sha"]}
        file = commit["files"].get(self.part["path"])
        if file is None:
            return 404, b"Entry not found", {**headers, "X-Error-Code": "EntryNotFound"}
        if file["large"]:
            linked = {"X-Linked-Etag": f'"{file["oid"]}"', "X-Linked-Size": str(file["size"])}
            return 302, b"", {**headers, **linked, "Location": f"{self.hub.storage}/lfs/{file['oid']}"}
        return self.content(file["oid"], headers)

    def storage_get(self):
        return self.content(self.part["oid"], {})

    def content(self, oid: str, headers: dict[str, str]) -> Answer:
        """A blob, or the range of it that was asked for."""
        body = (self.hub.root / "blobs" / oid).read_bytes()
        headers = {**headers, "ETag": f'"{oid}"', "Accept-Ranges": "bytes"}
        if not (asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")):
            return 200, body, headers
        first, last = int(asked[1]), min(int(asked[2] or len(body)), len(body) - 1)
        if first > last:
            return 416, b"", {"Content-Range": f"bytes */{len(body)}"}
        return 206, body[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{len(body)}"}

    # -- uploads ------------------------------------------------------------------------------------------------------

    def preupload(self):
        present = self.repository.read(self.part["rev"])["files"]

        def plan(path: str) -> dict:
            mode = "lfs" if LARGE.search(path) else "regular"
            return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": present.get(path, {}).get("oid")}

        return {"files": [plan(file["path"]) for file in json.loads(self.body)["files"]]}

    def lfs_batch(self):
        def plan(each: dict) -> dict:
            if (self.hub.root / "blobs" / each["oid"]).exists():
                return each
            return {**each, "actions": {"upload": {"href": f"{self.hub.storage}/lfs/{each['oid']}"}}}

        return {"transfer": "basic", "objects": [plan(each) for each in json.loads(self.body)["objects"]]}

    def storage_put(self):
        if hashlib.sha256(self.body).hexdigest() != self.part["oid"]:
            raise Refusal(400, message="the content is not what its name says")
        (self.hub.root / "blobs" / self.part["oid"]).write_bytes(self.body)
        return 200, b"", {}

    def commit(self):
        head, *lines = [json.loads(line) for line in self.body.splitlines()]
        branch, added, deleted = self.part["rev"], {}, []
        for key, value in [(line["key"], line["value"]) for line in lines]:
            if key == "file":
                added[value["path"]] = self.repository.store(value["path"], base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if not (self.hub.root / "blobs" / value["oid"]).exists():
                    raise Refusal(400, message=f"{value['path']} was not uploaded")
                added[value["path"]] = {"oid": value["oid"], "size": value["size"], "large": True}
            else:
                deleted.append(value["path"])
        with self.hub.lock:
            if head["value"].get("parentCommit", now := self.repository.read(branch)["sha"]) != now:
                raise Refusal(412, message="A commit has happened since. Please refresh and try again.")
            sha = self.repository.commit(branch, added, deleted, head["value"]["summary"])
        return {"commitOid": sha, "commitUrl": f"{self.hub.endpoint}/{self.part['id']}/commit/{sha}"}


def listed(path: str, file: dict) -> dict:
    """A file as the lists of the Hub show it."""
    large = {"lfs": {"oid": file["oid"], "size": file["size"], "pointerSize": 134}} if file["large"] else {}
    return {"type": "file", "path": path, "oid": file["oid"][:40], "size": file["size"], **large}


HUB = HubServer()  # one for the process: clients read its address once, when they are imported
