"""A local Hub server: the part of the Hub's HTTP API that `huggingface_hub` 1.31 to 2.4 uses with Xet disabled.

Serves unmodified clients (`huggingface_hub`, `transformers`, `datasets`) through `HF_ENDPOINT`, from repositories
stored as files (`hub_repository.py`). Unknown requests get status 404. Faults can be injected.

As on the Hub, LFS files are served by a redirect to another origin (`localhost`; the API is at `127.0.0.1`), which must
never receive a token, and each static Space has an origin of its own (`USER-NAME.static.localhost`). There is one user,
`user`, with the token `TOKEN`. Tests use the fixture `hub`:

    def test(hub):
        hub.put("user/plays", {"train.txt": b"To be"}, repo_type="datasets")  # commit without a client
        datasets.load_dataset("user/plays")                                   # any client in this process
        hub.fail("PUT", "/lfs/", "disconnect")                                # abort the next upload half way
"""

import base64
import hashlib
import json
import mimetypes
import re
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from .hub_repository import LARGE, LFS, HubError, Repository, model_card_errors, space_card_errors

TOKEN = "hf_" + "ThisTokenIsFalse" * 2  # split, so that a search for the token does not match this file
Response = tuple[int, bytes, dict[str, str]]  # status, body, headers


def retry_without_pauses(monkeypatch) -> None:
    """Let huggingface_hub retry at once; it would do so five times in 23 seconds."""
    pause = time.sleep  # a pause of zero would occupy the core while a process is awaited
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: pause(min(seconds, 1e-3)))


@dataclass
class Request:
    """A request of a client."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes = b""


@dataclass
class Fault:
    """An injected fault; see `HubServer.fail`."""

    method: str
    path: str
    effect: int | str
    times: float


class HubServer:
    """HTTP server in a daemon thread of this process; `reset` sets an empty folder for its data."""

    def __init__(self):
        self.root = Path("unset")
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()  # serializes commits
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self.http.server_port}"
        self.storage = f"http://localhost:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def reset(self, root: Path) -> None:
        self.root, self.requests, self.faults = root, [], []
        (root / "blobs").mkdir(parents=True)

    def fail(self, method: str, path: str, effect: int | str, times: float = float("inf")) -> None:
        """Inject a fault into requests whose method and path match.

        Args:
            method: Regular expression that matches the complete method.
            path: Regular expression that matches a part of the path.
            effect: An HTTP status; "disconnect": the connection is closed after half of the request body, as are all
                later ones until `faults` is cleared; "lost": the request is processed, but no response is sent; "slow":
                the response is delayed by one second.
            times: Number of requests that fail.
        """
        self.faults.append(Fault(method, path, effect, times))

    def fault(self, method: str, path: str) -> int | str | None:
        """Return the effect of the first fault that matches a request, and count it."""
        with self.lock:
            for fault in self.faults:
                if fault.times and re.fullmatch(fault.method, method) and re.search(fault.path, path):
                    fault.times -= 1
                    if fault.effect == "disconnect":
                        self.faults = [Fault(".*", "", "disconnect", float("inf"))]
                    return fault.effect
        return None

    def repository(self, repo_id: str, repo_type: str = "models") -> Repository:
        repository = Repository(self.root, repo_type, repo_id)
        if not repository.folder.is_dir():
            raise HubError(404, "RepoNotFound", f"{repo_id} does not exist")
        return repository

    def put(self, repo_id: str, files: Mapping[str, bytes], repo_type: str = "models") -> str:
        """Commit files to `main` without a client, creating the repository if necessary. Returns the commit SHA."""
        repository = Repository(self.root, repo_type, repo_id)
        if not repository.folder.exists():
            repository.create()
        return repository.commit("main", {p: repository.store(p, content) for p, content in files.items()}, [], "put")

    def collection(self, slug: str) -> dict:
        """Return a collection by its slug."""
        file = self.root / "collections" / f"{slug}.json"
        if not file.is_file():
            raise HubError(404, message=f"the collection {slug} does not exist")
        return json.loads(file.read_text())

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "models") -> dict[str, bytes]:
        """Return the contents of the files of a revision, by path."""
        entries = self.repository(repo_id, repo_type).read(revision)["files"]
        return {path: (self.root / "blobs" / entry["oid"]).read_bytes() for path, entry in entries.items()}

    def static_site(self, repo_id: str) -> str:
        """Return the URL of a static Space, which browsers resolve to loopback; Python does not."""
        return f"http://{subdomain(repo_id)}.static.localhost:{self.http.server_port}/"


def subdomain(repo_id: str) -> str:
    return re.sub("[^a-z0-9]+", "-", repo_id.lower())


API = r"/api/(?P<type>models|datasets|spaces)/(?P<id>[^/]+/[^/]+)"
WEB = r"/(?:(?P<type>datasets|spaces)/)?(?P<id>[^/]+/[^/]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate_card"),
    ("POST", r"/api/collections", "create_collection"),
    ("GET", r"/api/collections/(?P<slug>[^/]+/[^/]+)", "collection"),
    ("POST", r"/api/collections/(?P<slug>[^/]+/[^/]+)/items", "add_to_collection"),
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
# Programs in browsers may read every response.
CORS = {f"Access-Control-{name}": "*" for name in ("Allow-Origin", "Allow-Headers", "Expose-Headers")}
# Routes that require a token.
WRITES = {"create", "branch", "preupload", "commit", "lfs_batch", "whoami", "create_collection", "add_to_collection"}


class Handler(BaseHTTPRequestHandler):
    """Request handler. Each route is a method that returns JSON data or a `Response`, or raises `HubError`."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise each body waits for the acknowledgement of its headers, up to 40 ms

    def do(self) -> None:
        path, self.query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        request = Request(self.command, self.path, dict(self.headers))
        self.hub.requests.append(request)
        fault, length = self.hub.fault(self.command, path), int(self.headers["Content-Length"] or 0)
        request.body = self.body = self.rfile.read(length // 2 if fault == "disconnect" else length)
        if fault == "slow":
            threading.Event().wait(1)  # tests replace `time.sleep`
        if fault != "disconnect":
            status, body, headers = self.respond("GET" if self.command == "HEAD" else self.command, path, fault)
        if fault in ("disconnect", "lost"):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **CORS, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    do_GET = do_HEAD = do_POST = do_PUT = do_OPTIONS = do

    def log_message(self, *args) -> None:
        """Do not log: `HubServer.requests` records every request."""

    def respond(self, method: str, path: str, fault: int | str | None) -> Response:
        try:
            if isinstance(fault, int):
                raise HubError(fault, message=f"injected fault {fault}")
            if method == "OPTIONS":  # a browser asks before it sends a request to another origin
                return 204, b"", {}
            if site := re.match(r"([\w-]+)\.static\.localhost(:|$)", self.headers["Host"] or ""):
                return self.static_site(site[1], path)
            for route_method, pattern, name in ROUTES:
                if method == route_method and (match := re.fullmatch(pattern, path)):
                    self.params = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                    self.authorize(name)
                    response = vars(Handler)[name](self)
                    return response if isinstance(response, tuple) else (200, json.dumps(response).encode(), {})
            raise HubError(404, message=f"unsupported request: {method} {path}")
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
            return error.status, json.dumps({"error": error.message}).encode(), headers

    def authorize(self, name: str) -> None:
        """Require the token for writes and private repositories; without it, the latter appear not to exist."""
        authorization = self.headers["Authorization"]
        if name.startswith("storage_"):
            assert authorization is None, "the token was sent to the storage"
        elif authorization not in (None, f"Bearer {TOKEN}") or (not authorization and name in WRITES):
            raise HubError(401, message="Invalid credentials in Authorization header")
        elif "id" in self.params:
            repo_type = self.params.get("type", "models")
            if not authorization and not self.hub.root.joinpath(repo_type, self.params["id"]).is_dir():
                raise HubError(401, "RepoNotFound", "Repository not found")
            self.repository = self.hub.repository(self.params["id"], repo_type)
            if not authorization and self.repository.private:
                raise HubError(401, "RepoNotFound", "Repository not found")
            if name in WRITES and not self.params["id"].startswith("user/"):
                raise HubError(403, message="you do not have write access to this repository")

    # -- account, repositories, revisions -----------------------------------------------------------------------------

    def whoami(self):
        return {"type": "user", "name": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    def create(self):
        requested = json.loads(self.body)
        repo_id, kind = (
            f"{requested['organization'] or 'user'}/{requested['name']}",
            f"{requested.get('type', 'model')}s",
        )
        if not repo_id.startswith("user/"):
            raise HubError(403, message="You don't have the rights to create a model under this namespace")
        if kind == "spaces" and requested.get("sdk") not in ("gradio", "static", "docker", "streamlit"):
            raise HubError(400, message='"sdk" is required for a Space')
        url = f"{self.hub.endpoint}/{'' if kind == 'models' else f'{kind}/'}{repo_id}"
        with self.hub.lock:
            repository = Repository(self.hub.root, kind, repo_id)
            if repository.folder.exists():
                return 409, json.dumps({"error": "You already created this repo", "url": url}).encode(), {}
            repository.create(private=requested.get("visibility") == "private")
        return {"url": url}

    def validate_card(self):
        requested = json.loads(self.body)
        check = {"model": model_card_errors, "space": space_card_errors}.get(requested["repoType"], lambda text: [])
        errors = [{"message": error} for error in check(requested["content"])]
        return 400 if errors else 200, json.dumps({"errors": errors, "warnings": []}).encode(), {}

    def info(self):
        commit = self.repository.read(self.params.get("rev", "main"))
        metadata = {"id": self.params["id"], "sha": commit["sha"], "private": self.repository.private, "tags": []}
        return {**metadata, "siblings": [{"rfilename": path} for path in sorted(commit["files"])], "downloads": 0}

    def refs(self):
        heads = self.repository.branches().items()
        branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in heads]
        return {"branches": branches, "tags": [], "converts": []}

    def branch(self):
        with self.hub.lock:
            if self.params["rev"] in self.repository.branches():
                raise HubError(409, message="Reference already exists")
            start = json.loads(self.body).get("startingPoint", "main")
            self.repository.set_branch(self.params["rev"], self.repository.read(start)["sha"])
        return {}

    def commits(self):
        def describe(commit: dict) -> dict:
            date = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(commit["time"]))
            return {"id": commit["sha"], "title": commit["title"], "message": "", "date": date, "authors": []}

        return [describe(commit) for commit in self.repository.history(self.params["rev"])]

    # -- collections --------------------------------------------------------------------------------------------------

    def create_collection(self):
        requested = json.loads(self.body)
        if requested["namespace"] != "user":
            raise HubError(403, message="You don't have the rights to create a collection under this namespace")
        digest = hashlib.sha256(requested["title"].encode()).hexdigest()[:24]
        slug = f"user/{re.sub('[^a-z0-9]+', '-', requested['title'].lower()).strip('-')}-{digest}"
        file = self.collection_file(slug)
        with self.hub.lock:
            if file.exists():
                return 409, json.dumps({"error": "You already have this collection", "slug": slug}).encode(), {}
            content = {"slug": slug, "title": requested["title"], "private": requested["private"], "items": []}
            content |= {"owner": {"name": "user"}, "lastUpdated": "2026-01-01T00:00:00.000Z", "theme": "green"}
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({**content, "position": 0, "upvotes": 0}))
        return self.hub.collection(slug)

    def collection_file(self, slug: str) -> Path:
        return self.hub.root / "collections" / f"{slug}.json"

    def collection(self):
        return self.hub.collection(self.params["slug"])

    def add_to_collection(self):
        content, item = self.hub.collection(self.params["slug"]), json.loads(self.body)["item"]
        self.hub.repository(item["id"], f"{item['type']}s")  # status 404 if it does not exist
        with self.hub.lock:
            if any((one["id"], one["type"]) == (item["id"], item["type"]) for one in content["items"]):
                raise HubError(409, message="This item is already in the collection")
            content["items"].append({"_id": f"{len(content['items']):024x}", "position": len(content["items"]), **item})
            self.collection_file(self.params["slug"]).write_text(json.dumps(content))
        return content

    # -- files --------------------------------------------------------------------------------------------------------

    def tree(self):
        prefix = f"{self.params['path']}/" if "path" in self.params else ""
        entries = {}
        for path, file in sorted(self.repository.read(self.params["rev"])["files"].items()):
            if path.startswith(prefix):
                for parent in [*Path(path).parents][-2::-1]:  # all but ".", outermost first
                    if f"{parent}/".startswith(prefix) and f"{parent}/" != prefix:
                        entries[str(parent)] = {"type": "directory", "path": str(parent), "oid": "", "size": 0}
                entries[path] = file_entry(path, file)
        if prefix and not entries:
            raise HubError(404, "EntryNotFound", f"{prefix} does not exist")
        recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        return [entry for path, entry in entries.items() if recursive or "/" not in path.removeprefix(prefix)]

    def paths_info(self):
        files = self.repository.read(self.params["rev"])["files"]
        return [file_entry(path, files[path]) for path in parse_qs(self.body.decode())["paths"] if path in files]

    def resolve(self):
        commit = self.repository.read(self.params["rev"])
        headers = {"X-Repo-Commit": commit["sha"]}
        file = commit["files"].get(self.params["path"])
        if file is None:
            return 404, b"Entry not found", {**headers, "X-Error-Code": "EntryNotFound"}
        if file["lfs"]:
            redirect = {"X-Linked-Etag": f'"{file["oid"]}"', "X-Linked-Size": str(file["size"])}
            return 302, b"", {**headers, **redirect, "Location": f"{self.hub.storage}/lfs/{file['oid']}"}
        return self.content(file["oid"], headers)

    def storage_get(self):
        return self.content(self.params["oid"], {})

    def content(self, oid: str, headers: dict[str, str]) -> Response:
        """Return a blob, or the requested range of it."""
        body = (self.hub.root / "blobs" / oid).read_bytes()
        headers = {**headers, "ETag": f'"{oid}"', "Accept-Ranges": "bytes"}
        if not (byte_range := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")):
            return 200, body, headers
        first, last = int(byte_range[1]), min(int(byte_range[2] or len(body)), len(body) - 1)
        if first > last:
            return 416, b"", {"Content-Range": f"bytes */{len(body)}"}
        return 206, body[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{len(body)}"}

    def static_site(self, name: str, path: str) -> Response:
        """Serve a file of a public static Space; `index.html` is the file of a folder."""
        for folder in (self.hub.root / "spaces").glob("*/*"):
            repo_id = folder.relative_to(self.hub.root / "spaces").as_posix()
            if subdomain(repo_id) == name and not self.hub.repository(repo_id, "spaces").private:
                files = self.hub.files(repo_id, repo_type="spaces")
                path = unquote(path).removeprefix("/") or "index.html"
                if b"\nsdk: static\n" in files.get("README.md", b"") and path in files:
                    kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
                    return 200, files[path], {"Content-Type": kind}
        raise HubError(404, message=f"no such file: {name}{path}")

    # -- uploads ------------------------------------------------------------------------------------------------------

    def preupload(self):
        present = self.repository.read(self.params["rev"])["files"]

        def plan(path: str, size: int) -> dict:
            mode = "lfs" if LFS.search(path) or size > LARGE else "regular"
            return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": present.get(path, {}).get("oid")}

        return {"files": [plan(file["path"], file["size"]) for file in json.loads(self.body)["files"]]}

    def lfs_batch(self):
        def plan(blob: dict) -> dict:
            if (self.hub.root / "blobs" / blob["oid"]).exists():
                return blob
            return {**blob, "actions": {"upload": {"href": f"{self.hub.storage}/lfs/{blob['oid']}"}}}

        return {"transfer": "basic", "objects": [plan(blob) for blob in json.loads(self.body)["objects"]]}

    def storage_put(self):
        if hashlib.sha256(self.body).hexdigest() != self.params["oid"]:
            raise HubError(400, message="the content does not match its SHA-256")
        (self.hub.root / "blobs" / self.params["oid"]).write_bytes(self.body)
        return 200, b"", {}

    def commit(self):
        head, *lines = [json.loads(line) for line in self.body.splitlines()]
        branch, added, deleted = self.params["rev"], {}, []
        for key, value in [(line["key"], line["value"]) for line in lines]:
            if key == "file":
                added[value["path"]] = self.repository.store(value["path"], base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if not (self.hub.root / "blobs" / value["oid"]).exists():
                    raise HubError(400, message=f"{value['path']} was not uploaded")
                added[value["path"]] = {"oid": value["oid"], "size": value["size"], "lfs": True}
            else:
                deleted.append(value["path"])
        with self.hub.lock:
            if head["value"].get("parentCommit", now := self.repository.read(branch)["sha"]) != now:
                raise HubError(412, message="A commit has happened since. Please refresh and try again.")
            sha = self.repository.commit(branch, added, deleted, head["value"]["summary"])
        return {"commitOid": sha, "commitUrl": f"{self.hub.endpoint}/{self.params['id']}/commit/{sha}"}


def file_entry(path: str, file: dict) -> dict:
    """Return the entry of a file in the Hub's listings."""
    lfs = {"lfs": {"oid": file["oid"], "size": file["size"], "pointerSize": 134}} if file["lfs"] else {}
    return {"type": "file", "path": path, "oid": file["oid"][:40], "size": file["size"], **lfs}


HUB = HubServer()  # one per process: clients read the endpoint when they are imported
