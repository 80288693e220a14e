"""A Hub on the loopback: the protocol that huggingface_hub speaks, in memory, with faults on demand.

It answers what huggingface_hub 2.4 asks when it makes repositories and branches, uploads by the LFS protocol
(hf_xet switched off) and downloads; git itself, Xet and the web pages are not there. A dataset's repository is called
"datasets/owner/name". Like the Hub it refuses a commit whose parent has moved (412), hides private repositories from
strangers (401 RepoNotFound), keeps a file that was uploaded even if the commit after it fails, and validates a card's
metadata.

    with Hub() as hub:
        hub.fail("POST", "/commit/", status=500)         # the next such request, once
        ... HfApi(endpoint=hub.url, token=hub.token("me"))
"""

import base64
import dataclasses
import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml


@dataclasses.dataclass
class Commit:
    oid: str
    parent: str | None
    message: str
    files: dict[str, bytes]


@dataclasses.dataclass
class Repository:
    is_private: bool
    commits: dict[str, Commit]
    branches: dict[str, str]

    def find(self, revision: str) -> Commit | None:
        return self.commits.get(self.branches.get(revision, revision))


@dataclasses.dataclass
class Fault:
    method: str
    path: str
    status: int | None  # None: the connection is closed without an answer
    message: str
    times: int
    is_after: bool  # the request has its effect, but its answer is lost
    hook: Callable[[], None] | None


class Hub:
    """The server; `requests` lists what was asked, as "METHOD path"."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}  # LFS objects by sha256
        self.tokens: dict[str, str] = {}
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.quota: int | None = None  # bytes of LFS objects
        self.refuses_each = False  # a full quota is reported for each object, and not for the whole request
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def token(self, user: str) -> str:
        """A token with which that user may write to repositories of that name."""
        token = "hf_" + hashlib.sha256(user.encode()).hexdigest()[:34]
        self.tokens[token] = user
        return token

    def fail(
        self,
        method: str,
        path: str,
        *,
        status: int | None = None,
        message: str = "",
        times: int = 1,
        is_after: bool = False,
        hook: Callable[[], None] | None = None,
    ) -> None:
        """Let the next requests of a method whose path contains a text fail; without a status, drop the connection.

        `is_after` loses the answer of a request that was carried out. A `hook` is run before the request instead of
        a failure: something that happens on the Hub in the meantime.
        """
        self.faults.append(Fault(method, path, status, message, times, is_after, hook))

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.method == method and fault.path in path and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None

    def create(self, repo_id: str, *, is_private: bool = False) -> Repository:
        repository = Repository(is_private, {}, {})
        self.repositories[repo_id] = repository
        self.commit(
            repo_id, {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}, "initial commit"
        )
        return repository

    def commit(self, repo_id: str, files: dict[str, bytes | None], message: str, branch: str = "main") -> Commit:
        """A commit of somebody; None deletes a file."""
        with self.lock:
            repository = self.repositories[repo_id]
            parent = repository.find(branch)
            merged = dict(parent.files if parent else {})
            for path, content in files.items():
                if content is None:
                    merged.pop(path, None)
                else:
                    merged[path] = content
            oid = hashlib.sha1(f"{repo_id} {branch} {len(repository.commits)} {message}".encode()).hexdigest()
            commit = Commit(oid, parent.oid if parent else None, message, merged)
            repository.commits[oid] = commit
            repository.branches[branch] = oid
            return commit

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        commit = self.repositories[repo_id].find(revision)
        assert commit is not None
        return commit.files

    def num_commits(self, repo_id: str, revision: str = "main") -> int:
        repository, commit, number = self.repositories[repo_id], self.repositories[repo_id].find(revision), 0
        while commit is not None:
            commit, number = repository.commits.get(commit.parent or ""), number + 1
        return number


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        self.status, self.message, self.code = status, message, code


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".bin", ".png", ".gguf", ".arrow"))


def owner_of(repo_id: str) -> str:
    return repo_id.removeprefix("datasets/").split("/")[0]


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer leaves in one piece: in two, the second would wait 40 ms for the first one's receipt
    disable_nagle_algorithm = True

    def log_message(self, *args: object) -> None:
        pass

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        fault = self.hub.take_fault(self.command, path)
        if fault is not None and fault.hook is not None:
            fault.hook()
            fault = None
        self.is_cut = fault is not None and fault.status is None and self.command == "GET"
        if self.is_cut:
            fault = None  # half of the answer is sent, and then no more
        if fault is not None and fault.status is None and not fault.is_after:
            # In the middle: part of what is sent has arrived, and nobody answers.
            self.rfile.read(min(1000, int(self.headers.get("Content-Length") or 0)))
            self.close_connection = True
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        if fault is not None and not fault.is_after:
            self.send(fault.status, {"error": fault.message}, {"X-Error-Message": fault.message})
            return
        try:
            with self.hub.lock:
                status, content, headers = self.respond(path, body)
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            self.send(refusal.status, {"error": refusal.message}, headers)
            return
        if fault is not None:
            self.close_connection = True
            return
        self.send(status, content, headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def send(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if self.is_cut else data)
        self.close_connection = self.close_connection or self.is_cut

    def respond(self, path: str, body: bytes) -> tuple[int, object, dict[str, str]]:
        if path == "/api/whoami-v2":
            return 200, {"name": self.user(), "type": "user", "orgs": []}, {}
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.validate(json.loads(body)["content"])
        if path.startswith("/lfs/"):
            self.hub.stored[path.removeprefix("/lfs/")] = body
            return 200, {}, {}
        if match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            self.writable(match[1])
            return 200, {"transfer": "basic", "objects": [self.lfs(one) for one in json.loads(body)["objects"]]}, {}
        if match := re.fullmatch(r"/((?:datasets/)?[\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve(*match.groups())
        if match := re.fullmatch(r"/api/(?:models|(datasets))/([\w.-]+/[\w.-]+)(?:/([\w-]+)(?:/([^?]+))?)?", path):
            repo_id = f"datasets/{match[2]}" if match[1] else match[2]
            return self.api(repo_id, match[3] or "revision", match[4] or "main", body)
        raise Refusal(404, f"The double does not know {self.command} {path}")

    def api(self, repo_id: str, action: str, rest: str, body: bytes) -> tuple[int, object, dict[str, str]]:
        if action == "auth-check":
            (self.writable if rest == "write" else self.readable)(repo_id)
            return 200, {}, {}
        if action == "preupload":
            self.writable(repo_id)
            commit = self.commit_of(repo_id, rest)
            files = [self.upload_mode(commit, one["path"]) for one in json.loads(body)["files"]]
            return 200, {"files": files}, {}
        if action == "commit":
            return self.commit(repo_id, rest, [json.loads(line) for line in body.splitlines()])
        if action == "branch":
            repository = self.writable(repo_id)
            if rest in repository.branches:
                raise Refusal(409, "Reference already exists")
            start = json.loads(body or b"{}").get("startingPoint", "main")
            repository.branches[rest] = self.commit_of(repo_id, start).oid
            return 200, {}, {}
        if action == "refs":
            branches = self.readable(repo_id).branches.items()
            refs = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in branches]
            return 200, {"branches": refs, "converts": [], "tags": [], "pullRequests": []}, {}
        if action == "tree":
            revision, _, folder = rest.partition("/")
            files = self.commit_of(repo_id, revision).files
            return 200, [self.describe(path, files[path]) for path in files if path.startswith(folder)], {}
        if action == "revision":
            commit = self.commit_of(repo_id, rest)
            siblings = [{"rfilename": path} for path in sorted(commit.files)]
            is_private = self.hub.repositories[repo_id].is_private
            return 200, {"id": repo_id, "sha": commit.oid, "siblings": siblings, "private": is_private, "tags": []}, {}
        raise Refusal(404, f"The double does not know {action}")

    def user(self) -> str:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if not token:
            raise Refusal(401, "Invalid username or password.")
        if token not in self.hub.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.tokens[token]

    def readable(self, repo_id: str) -> Repository:
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.is_private and not self.is_owner(repo_id)):
            status = 404 if self.headers.get("Authorization") else 401
            raise Refusal(status, "Repository not found", "RepoNotFound")
        return repository

    def is_owner(self, repo_id: str) -> bool:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        return self.hub.tokens.get(token) == owner_of(repo_id)

    def writable(self, repo_id: str) -> Repository:
        repository = self.readable(repo_id)
        if self.user() != owner_of(repo_id):
            raise Refusal(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return repository

    def commit_of(self, repo_id: str, revision: str) -> Commit:
        commit = self.readable(repo_id).find(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def create(self, wanted: dict) -> tuple[int, object, dict[str, str]]:
        user = self.user()
        owner = wanted.get("organization") or user
        if owner != user:
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        prefix = "datasets/" if wanted.get("type") == "dataset" else ""
        repo_id = f"{prefix}{owner}/{wanted['name']}"
        if repo_id in self.hub.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{repo_id}"}, {}
        self.hub.create(repo_id, is_private=wanted.get("visibility") == "private" or wanted.get("private", False))
        return 200, {"url": f"{self.hub.url}/{repo_id}"}, {}

    def validate(self, content: str) -> tuple[int, object, dict[str, str]]:
        match = re.match(r"---\r?\n(.*?)\r?\n---", content, re.DOTALL)
        try:
            metadata = yaml.safe_load(match[1]) if match else {}
            errors = card_errors(metadata)
        except yaml.YAMLError as error:
            errors = [str(error)]
        return (400 if errors else 200), {"errors": [{"message": error} for error in errors], "warnings": []}, {}

    def lfs(self, wanted: dict) -> dict:
        answer = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] in self.hub.stored:
            return answer  # it has it already
        used = sum(map(len, self.hub.stored.values()))
        if self.hub.quota is not None and used + wanted["size"] > self.hub.quota:
            message = "Private repository storage limit reached, please upgrade your plan"
            if self.hub.refuses_each:
                return answer | {"error": {"code": 403, "message": message}}
            raise Refusal(403, message)
        return answer | {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}}

    def upload_mode(self, commit: Commit, path: str) -> dict:
        content = commit.files.get(path)
        digest = None
        if content is not None:
            digest = hashlib.sha256(content).hexdigest() if is_large(path) else git_oid(content)
        return {
            "path": path,
            "uploadMode": "lfs" if is_large(path) else "regular",
            "shouldIgnore": False,
            "oid": digest,
        }

    def commit(self, repo_id: str, branch: str, lines: list[dict]) -> tuple[int, object, dict[str, str]]:
        repository = self.writable(repo_id)
        header = lines[0]["value"]
        head = self.commit_of(repo_id, branch)
        if header.get("parentCommit") not in (None, head.oid):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        changes: dict[str, bytes | None] = {}
        for line in lines[1:]:
            path = line["value"]["path"]
            if line["key"] == "file":
                changes[path] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                if line["value"]["oid"] not in self.hub.stored:
                    raise Refusal(400, f"{path} was not uploaded")
                changes[path] = self.hub.stored[line["value"]["oid"]]
                assert hashlib.sha256(self.hub.stored[line["value"]["oid"]]).hexdigest() == line["value"]["oid"]
            elif line["key"] == "deletedFile":
                changes[path] = None
        assert branch in repository.branches
        commit = self.hub.commit(repo_id, changes, header["summary"], branch)
        return 200, {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{commit.oid}", "commitOid": commit.oid}, {}

    def describe(self, path: str, content: bytes) -> dict:
        entry = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
        if is_large(path):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return entry

    def resolve(self, repo_id: str, revision: str, path: str) -> tuple[int, object, dict[str, str]]:
        commit = self.commit_of(repo_id, revision)
        if path not in commit.files:
            raise Refusal(404, f"Entry not found: {path}", "EntryNotFound")
        content = commit.files[path]
        digest = hashlib.sha256(content).hexdigest() if is_large(path) else git_oid(content)
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        if is_large(path):
            headers |= {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start = int(match[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return 206, content[start:], headers
        return 200, content, headers


def card_errors(metadata: dict | None) -> list[str]:
    """What the Hub's documentation of a card's metadata forbids, as far as our cards use it."""
    errors = []
    for entry in (metadata or {}).get("model-index", []):
        if not isinstance(entry.get("name"), str):
            errors.append('"model-index[0].name" is required')
        for result in entry.get("results", []):
            if not isinstance(result.get("task", {}).get("type"), str):
                errors.append('"task.type" is required')
            dataset = result.get("dataset", {})
            errors += [
                f'"dataset.{key}" is required' for key in ("name", "type") if not isinstance(dataset.get(key), str)
            ]
            for metric in result.get("metrics", []):
                if not isinstance(metric.get("type"), str) or metric.get("value") is None:
                    errors.append('"metrics" need "type" and "value"')
    base = (metadata or {}).get("base_model")
    for name in base if isinstance(base, list) else [base] if base else []:
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
            errors.append(f'"base_model" with value {name} is not valid')
    return errors
