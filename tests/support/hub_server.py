"""A server on loopback that speaks the protocol of the Hugging Face Hub as its client does: for tests that push models
and load them back, and that load data sets, with faults that can be switched on.

What the real one enforces is enforced: tokens, roles and namespaces, visibility, sizes and SHA-256 of LFS objects, that
they are there before the commit that names them, card metadata, no binary files outside of LFS. Storage has an origin
of its own and takes signed addresses only, so a client that sends its token there fails.

Uploads are plain LFS. Since 1.0 the client decides alone whether it uses Xet instead, where hf_xet is installed: tests
set HF_HUB_DISABLE_XET=1. Downloads are plain since no answer here has the header X-Xet-Hash.
"""

import base64
import hashlib
import json
import re
import secrets
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote

import yaml

LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0", "cc0-1.0", "openrail", "other"}
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npz", ".zip", ".parquet", ".tar")
MAX_REGULAR = 10 * 2**20
KIND = r"((?:models|datasets|spaces)/[^/]+/[^/]+)"
NAME = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?", re.ASCII)


@dataclass(frozen=True)
class User:
    """Whom a token belongs to, and what it allows."""

    name: str
    role: str = "write"
    orgs: tuple[str, ...] = ()


@dataclass(frozen=True)
class File:
    """A file of a commit: its content, or the SHA-256 of the LFS object that holds it."""

    content: bytes | None = None
    lfs: str | None = None


@dataclass(frozen=True)
class Commit:
    oid: str
    message: str
    description: str
    files: dict[str, File]
    parent: str | None


@dataclass
class Repo:
    name: str
    """NAMESPACE/NAME of a model; that of a data set begins with datasets/."""
    private: bool
    gated: bool = False
    """Whether its files are for those only whom its owner lets in."""
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    """The newest commit by branch or refs/pr/N."""

    def commit(self, ref: str, message: str, description: str, files: dict[str, File], parent: str | None) -> Commit:
        content = json.dumps([parent, message, sorted((k, str(v)) for k, v in files.items()), secrets.token_hex(4)])
        commit = Commit(hashlib.sha1(content.encode()).hexdigest(), message, description, files, parent)
        self.commits[commit.oid] = commit
        self.refs[ref] = commit.oid
        return commit

    def at(self, revision: str) -> Commit | None:
        return self.commits.get(self.refs.get(revision, revision))


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose "METHOD /path" matches `pattern`."""

    pattern: str
    kind: str
    """halfway: the connection breaks after half of the body. unanswered: all is done, then it breaks. status: an error
    response."""
    times: int = 1
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    body: str = ""


class _Error(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, **fields):
        self.status, self.message, self.code, self.fields = status, message, code, fields


class HubServer:
    """`with HubServer({"hf_...": User("ann")}) as hub:` serves the Hub at `hub.url`, with a storage of its own."""

    def __init__(self, tokens: dict[str, User]):
        self.tokens = tokens
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, dict[str, str]]] = []
        """"METHOD /path" and headers of each, in order of arrival."""
        self.uploads: list[str] = []
        """SHA-256 of each object that was stored, once per upload."""
        self.signed: dict[str, tuple[str, int]] = {}
        """The object and size that may be put, by signature."""
        self.lock = threading.RLock()
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for handler in (_Hub, _Storage)]
        for server in self._servers:
            server.hub, server.daemon_threads = self, True
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)

    def __enter__(self):
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Everything in a repository, by path."""
        return {
            path: self.objects[file.lfs] if file.lfs else file.content
            for path, file in self.repos[repo].at(revision).files.items()
        }

    def put(self, name: str, files: dict[str, bytes], **settings: bool) -> Commit:
        """A commit of these files to the main branch of a repository, which is created if it is missing."""
        repo = self.repos.get(name) or self.create(name)
        for setting, value in settings.items():
            setattr(repo, setting, value)
        stored = dict(repo.at("main").files)
        for path, content in files.items():
            stored[path] = File(content=content)
            if path.endswith(LFS_SUFFIXES) or b"\0" in content:
                oid = hashlib.sha256(content).hexdigest()
                self.objects[oid] = content
                stored[path] = File(lfs=oid)
        return repo.commit("main", "put", "", stored, repo.refs["main"])

    def create(self, name: str, private: bool = False) -> Repo:
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        repo = self.repos[name] = Repo(name, private)
        repo.commit("main", "initial commit", "", {".gitattributes": File(attributes.encode())}, None)
        return repo


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def setup(self):
        super().setup()
        self.hub = self.server.hub

    def log_message(self, *_):
        pass

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except OSError:  # the client has gone
            self.close_connection = True

    def _serve(self):
        self.path_only, _, query = self.path.partition("?")
        self.query = parse_qs(query)
        request = f"{self.command} {unquote(self.path_only)}"
        length = int(self.headers.get("Content-Length", 0))
        with self.hub.lock:
            self.hub.requests.append((request, {name.lower(): value for name, value in self.headers.items()}))
            fault = next((f for f in self.hub.faults if f.times > 0 and re.search(f.pattern, request)), None)
            if fault:
                fault.times -= 1
        if fault and fault.kind == "halfway":
            self.rfile.read(length // 2)
            return self._break()
        self.body = self._chunked() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        if fault and fault.kind == "status":
            return self._send(fault.status, fault.body.encode(), fault.headers | {"Content-Type": "application/json"})
        try:
            with self.hub.lock:
                status, content, headers = self.answer()
        except _Error as error:
            status, headers = error.status, {"X-Error-Message": error.message, "Content-Type": "application/json"}
            if error.code:
                headers["X-Error-Code"] = error.code
            content = json.dumps({"error": error.message} | error.fields).encode()
        if fault and fault.kind == "unanswered":
            return self._break()
        self._send(status, content, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _chunked(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _break(self) -> None:
        """Reset the connection."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.shutdown(socket.SHUT_RD)
        self.connection.close()

    def answer(self) -> tuple[int, bytes, dict[str, str]]:
        raise NotImplementedError

    def _part(self, content: bytes, headers: dict[str, str]) -> tuple[int, bytes, dict[str, str]]:
        """What the header Range asks for, FIRST-LAST or FIRST-, or all."""
        headers |= {"Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return 200, content, headers
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        if first > last:
            return 416, b"", headers | {"Content-Range": f"bytes */{len(content)}"}
        headers |= {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
        return 206, content[first : last + 1], headers


def _json(value, status: int = 200) -> tuple[int, bytes, dict[str, str]]:
    return status, json.dumps(value).encode(), {"Content-Type": "application/json; charset=utf-8"}


class _Storage(_Handler):
    def answer(self):
        if "Authorization" in self.headers:
            raise _Error(400, "Only one auth mechanism allowed: the address is signed")
        oid, signature = self.path_only.rpartition("/")[2], self.query.get("signature", [""])[0]
        expected, size = self.hub.signed.get(signature, (None, 0))
        if expected != oid:
            raise _Error(403, "SignatureDoesNotMatch")
        if self.command == "PUT":
            if len(self.body) != size or hashlib.sha256(self.body).hexdigest() != oid:
                raise _Error(400, "XAmzContentSHA256Mismatch")
            self.hub.objects[oid] = self.body
            self.hub.uploads.append(oid)
            return 200, b"", {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'}
        return self._part(self.hub.objects[oid], {"ETag": f'"{oid}"', "Content-Type": "binary/octet-stream"})


class _Hub(_Handler):
    def answer(self):
        path = self.path_only
        self.user = self._user()
        routes = [
            ("GET", r"/api/whoami-v2", self.whoami),
            ("POST", r"/api/repos/create", self.create),
            ("POST", r"/api/validate-yaml", self.validate_yaml),
            ("POST", r"/api/((?:models|spaces)/[^/]+/[^/]+)/preupload/([^/]+)", self.preupload),
            ("POST", r"/api/((?:models|spaces)/[^/]+/[^/]+)/commit/([^/]+)", self.commit),
            ("POST", r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", self.branch),
            ("GET", rf"/api/{KIND}/refs", self.refs),
            ("GET", rf"/api/{KIND}/tree/([^/]+)(?:/(.+))?", self.tree),
            ("POST", rf"/api/{KIND}/paths-info/([^/]+)", self.paths_info),
            ("GET", rf"/api/{KIND}(?:/revision/([^/]+))?", self.info),
            ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.batch),
            ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/verify", self.verify),
            ("GET|HEAD", r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.resolve),
        ]
        for methods, pattern, serve in routes:
            found = re.fullmatch(pattern, path)
            if found and self.command in methods.split("|"):
                return serve(*(part and unquote(part).removeprefix("models/") for part in found.groups()))
        raise _Error(404, f"Sorry, we can't find the page you are looking for: {self.command} {path}")

    def _user(self) -> User | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        scheme, _, token = header.partition(" ")
        if scheme != "Bearer" or token not in self.hub.tokens:
            raise _Error(401, "Invalid credentials in Authorization header")
        return self.hub.tokens[token]

    def _owns(self, namespace: str) -> bool:
        return self.user is not None and namespace in (self.user.name, *self.user.orgs)

    def _repo(self, name: str, write: bool = False, for_request: bool = False) -> Repo:
        """The repository if the user may see it, or write to it; a pull request may come from everybody."""
        repo = self.hub.repos.get(name)
        owns = self._owns(name.removeprefix("datasets/").removeprefix("spaces/").partition("/")[0])
        if repo is None or (repo.private and not owns):
            if self.user is None:
                raise _Error(401, "Invalid username or password.", "RepoNotFound")
            raise _Error(404, "Repository not found", "RepoNotFound")
        if write:
            if self.user is None:
                raise _Error(401, "Invalid username or password.")
            if self.user.role == "read" or not (owns or for_request):
                raise _Error(403, "Forbidden: you must use a write token to upload to a repository.")
        return repo

    def _let_in(self, repo: Repo) -> None:
        if repo.gated and not self._owns(repo.name.removeprefix("datasets/").partition("/")[0]):
            message = f"Access to {repo.name} is restricted and you are not in the authorized list."
            raise _Error(401 if self.user is None else 403, message, "GatedRepo")

    def _at(self, repo: Repo, revision: str | None) -> Commit:
        commit = repo.at(revision or "main")
        if commit is None:
            raise _Error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def whoami(self):
        if self.user is None:
            raise _Error(401, "Invalid username or password.")
        token = {"displayName": "test", "role": self.user.role, "createdAt": "2026-01-01T00:00:00.000Z"}
        return _json(
            {
                "type": "user",
                "id": hashlib.sha1(self.user.name.encode()).hexdigest()[:24],
                "name": self.user.name,
                "orgs": [{"type": "org", "name": org, "roleInOrg": "write"} for org in self.user.orgs],
                "auth": {"type": "access_token", "accessToken": token},
            }
        )

    def create(self):
        if self.user is None:
            raise _Error(401, "Invalid username or password.")
        values = json.loads(self.body)
        namespace, name = values.get("organization") or self.user.name, values["name"]
        kind = values.get("type", "model")
        if kind not in ("model", "space"):
            raise _Error(400, "this server has models and Spaces only")
        if kind == "space" and values.get("sdk") not in ("gradio", "docker", "static"):
            raise _Error(400, f'"sdk" must be one of gradio, docker, static, got {values.get("sdk")}')
        if not NAME.fullmatch(name):
            raise _Error(400, f"Invalid repo name: {name}")
        if self.user.role == "read" or not self._owns(namespace):
            raise _Error(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        full = f"{'spaces/' if kind == 'space' else ''}{namespace}/{name}"
        if full in self.hub.repos:
            raise _Error(409, f"You already created this {kind} repo", url=f"{self.hub.url}/{full}")
        private = values.get("visibility") == "private" or values.get("private") is True  # before 1.0: private
        self.hub.create(full, private)
        return _json({"url": f"{self.hub.url}/{full}", "name": full, "id": secrets.token_hex(12)})

    def validate_yaml(self):
        content = json.loads(self.body)["content"]
        if errors := card_errors(content):
            body = {"errors": [{"message": error} for error in errors], "warnings": []}
            return _json(body, status=400)
        return _json({"errors": [], "warnings": []})

    def preupload(self, name, revision):
        commit = self._at(self._repo(name, True, "create_pr" in self.query), revision)
        answers = []
        for file in json.loads(self.body)["files"]:
            sample = base64.b64decode(file["sample"])
            lfs = file["path"].endswith(LFS_SUFFIXES) or b"\0" in sample or file["size"] > MAX_REGULAR
            answer = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if known := commit.files.get(file["path"]):
                answer["oid"] = known.lfs or _git_oid(known.content)
            answers.append(answer)
        return _json({"files": answers, "commitOid": commit.oid})

    def batch(self, name):
        values = json.loads(self.body)
        repo = self._repo(name, True, for_request="ref" not in values)
        assert values["operation"] == "upload" and values["hash_algo"] == "sha256"
        if "basic" not in values["transfers"]:
            raise _Error(400, f"transfers must hold basic, got {values['transfers']}")
        if "ref" in values:
            self._at(repo, values["ref"]["name"])
        objects = []
        for wanted in values["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"], "authenticated": True}
            if wanted["oid"] not in self.hub.objects:
                verify = {"href": f"{self.hub.url}/{name}.git/info/lfs/verify"}
                answer["actions"] = {"upload": {"href": self._signed(wanted["oid"], wanted["size"])}, "verify": verify}
            objects.append(answer)
        status, content, _ = _json({"transfer": "basic", "objects": objects})
        return status, content, {"Content-Type": "application/vnd.git-lfs+json"}

    def _signed(self, oid: str, size: int = 0) -> str:
        signature = secrets.token_hex(16)
        self.hub.signed[signature] = oid, size
        return f"{self.hub.storage_url}/lfs/{oid}?signature={signature}"

    def verify(self, name):
        self._repo(name, True, for_request=True)
        values = json.loads(self.body)
        if len(self.hub.objects.get(values["oid"], b"")) != values["size"]:
            raise _Error(404, "LFS object not found")
        return _json({})

    def commit(self, name, revision):
        repo = self._repo(name, True, "create_pr" in self.query)
        parent = self._at(repo, revision)
        if revision not in repo.refs:
            raise _Error(400, f"not a branch: {revision}")
        if self.headers["Content-Type"] != "application/x-ndjson":
            raise _Error(400, f"Unexpected content type {self.headers['Content-Type']}")
        header, *operations = (json.loads(line) for line in self.body.splitlines())
        assert header["key"] == "header"
        header = header["value"]
        if header.get("parentCommit", parent.oid) != parent.oid:
            raise _Error(412, "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for operation in operations:
            key, value = operation["key"], operation["value"]
            if key == "file":
                content = base64.b64decode(value["content"])
                if b"\0" in content or len(content) > MAX_REGULAR:
                    raise _Error(400, f"Your push was rejected because it contains binary files: {value['path']}")
                files[value["path"]] = File(content=content)
            elif key == "lfsFile":
                if len(self.hub.objects.get(value["oid"], b"")) != value["size"]:
                    raise _Error(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                files[value["path"]] = File(lfs=value["oid"])
            elif key == "deletedFile":
                if value["path"] not in files:
                    raise _Error(404, f"A file with this name doesn't exist: {value['path']}", "EntryNotFound")
                del files[value["path"]]
            else:
                raise _Error(400, f"unknown operation {key}")
        if "README.md" in files and (errors := card_errors(files["README.md"].content.decode())):
            raise _Error(400, "; ".join(errors))
        if files == parent.files:
            raise _Error(400, "No files have been modified since last commit")
        ref, answer = revision, {"success": True, "hookOutput": ""}
        if "create_pr" in self.query:
            number = 1 + sum(other.startswith("refs/pr/") for other in repo.refs)
            ref = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{number}"
        commit = repo.commit(ref, header["summary"], header["description"], files, parent.oid)
        return _json(answer | {"commitOid": commit.oid, "commitUrl": f"{self.hub.url}/{name}/commit/{commit.oid}"})

    def branch(self, name, branch):
        repo = self._repo(name, write=True)
        if branch in repo.refs:
            raise _Error(409, f'Reference already exists: "refs/heads/{branch}"')
        if branch.startswith("refs/"):
            raise _Error(400, f'Invalid reference for a branch: "{branch}"')
        start = json.loads(self.body).get("startingPoint") if self.body else None
        repo.refs[branch] = self._at(repo, start).oid
        return _json({"success": True})

    def refs(self, name):
        repo = self._repo(name)
        branches = [
            {"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": oid}
            for ref, oid in repo.refs.items()
            if not ref.startswith("refs/pr/")
        ]
        return _json({"branches": branches, "tags": [], "converts": []})

    def tree(self, name, revision, folder):
        commit, folder = self._at(self._repo(name), revision), folder.strip("/") + "/" if folder else ""
        entries = [entry for path, entry in self._entries(commit).items() if path.startswith(folder)]
        if folder and not entries:
            raise _Error(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        if self.query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
            entries = [entry for entry in entries if "/" not in entry["path"][len(folder) :]]
        return _json(entries)

    def paths_info(self, name, revision):
        entries = self._entries(self._at(self._repo(name), revision))
        asked = json.loads(self.body) if "json" in self.headers["Content-Type"] else parse_qs(self.body.decode())
        return _json([entries[path] for path in asked["paths"] if path in entries])

    def _entries(self, commit: Commit) -> dict[str, dict]:
        """What the API says of all files and folders, by path."""
        entries = {}
        for path, file in sorted(commit.files.items()):
            parts = path.split("/")
            for folder in ("/".join(parts[:depth]) for depth in range(1, len(parts))):
                oid = hashlib.sha1(folder.encode()).hexdigest()
                entries.setdefault(folder, {"type": "directory", "path": folder, "size": 0, "oid": oid})
            size = len(self.hub.objects[file.lfs]) if file.lfs else len(file.content)
            entries[path] = {"type": "file", "path": path, "size": size, "oid": _oid(file, size)}
            if file.lfs:
                pointer = len(_pointer(file.lfs, size))
                entries[path]["lfs"] = {"oid": file.lfs, "size": size, "pointerSize": pointer}
        return entries

    def info(self, name, revision):
        repo, name = self._repo(name), name.removeprefix("datasets/")
        commit = self._at(repo, revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        values = {"_id": hashlib.sha1(name.encode()).hexdigest()[:24], "id": name, "modelId": name, "sha": commit.oid}
        values |= {"author": name.partition("/")[0], "private": repo.private, "disabled": False}
        values |= {"gated": "manual" if repo.gated else False}
        return _json(values | {"siblings": siblings, "tags": [], "downloads": 0, "likes": 0})

    def resolve(self, name, revision, path):
        repo = self._repo(name)
        self._let_in(repo)
        commit = self._at(repo, revision)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        file = commit.files.get(path)
        if file is None:
            message = {"error": "Entry not found"}
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return 404, json.dumps(message).encode(), headers
        if file.lfs is None:
            return self._part(
                file.content, headers | {"ETag": f'"{_git_oid(file.content)}"', "Content-Type": "text/plain"}
            )
        size = len(self.hub.objects[file.lfs])
        headers |= {"X-Linked-Size": str(size), "X-Linked-Etag": f'"{file.lfs}"', "ETag": f'"{_oid(file, size)}"'}
        return 302, b"Found", headers | {"Location": self._signed(file.lfs)}


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _pointer(oid: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n".encode()


def _oid(file: File, size: int) -> str:
    return _git_oid(file.content if file.lfs is None else _pointer(file.lfs, size))


def card_errors(content: str) -> list[str]:
    """What the Hub would refuse in the metadata of a card."""
    found = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", content, re.S)
    if not found:
        return []
    data = yaml.safe_load(found.group(1))
    if not isinstance(data, dict):
        return ["metadata must be a mapping"]
    errors = []
    if "license" in data and data["license"] not in LICENSES:
        errors.append(f'"license" must be one of {", ".join(sorted(LICENSES))}')
    if not isinstance(data.get("tags", []), list) or not all(isinstance(tag, str) for tag in data.get("tags", [])):
        errors.append('"tags" must be an array of strings')
    for key in ("datasets", "base_model"):
        values = data.get(key, [])
        for value in values if isinstance(values, list) else [values]:
            if not all(NAME.fullmatch(part) for part in str(value).split("/")) or str(value).count("/") > 1:
                errors.append(f'"{key}" must be names of repositories, got {value}')
    for place, model in enumerate(data.get("model-index", [])):
        if not isinstance(model.get("name"), str):
            errors.append(f'"model-index[{place}].name" is required')
        for result in model.get("results", []):
            if not result.get("task", {}).get("type"):
                errors.append(f'"model-index[{place}].results.task.type" is required')
            if not {"name", "type"} <= result.get("dataset", {}).keys():
                errors.append(f'"model-index[{place}].results.dataset" must have a name and a type')
            if not all({"type", "value"} <= metric.keys() for metric in result.get("metrics", [])):
                errors.append(f'"model-index[{place}].results.metrics" must have types and values')
    return errors
