"""A small double of the Hub on the loopback: as much of its API as its real client needs here.

Repositories live in memory. Every request is kept, with its headers and its body, in order.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

USER, ORGANISATION = "someone", "their-lab"
LFS = (".safetensors", ".png")
COMMIT = "c0ffee" + 34 * "0"


@dataclass
class Repository:
    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    lfs: set[str] = field(default_factory=set)
    commits: list[list[str]] = field(default_factory=list)


@dataclass(frozen=True)
class Asked:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def what(self) -> str:
        """The request in a word."""
        for word, pattern in KINDS.items():
            if re.fullmatch(pattern, f"{self.method} {self.path.partition('?')[0]}"):
                return word
        return f"{self.method} {self.path}"


KINDS = {
    "whoami": r"GET /api/whoami-v2",
    "create": r"POST /api/repos/create",
    "tree": r"GET /api/models/[^/]+/[^/]+/tree/[^/]+",
    "preupload": r"POST /api/models/[^/]+/[^/]+/preupload/main",
    "batch": r"POST /[^/]+/[^/]+\.git/info/lfs/objects/batch",
    "put": r"PUT /lfs/[0-9a-f]+",
    "commit": r"POST /api/models/[^/]+/[^/]+/commit/main",
    "validate": r"POST /api/validate-yaml",
    "info": r"GET /api/models/[^/]+/[^/]+(/revision/[^/]+)?",
    "file": r"(GET|HEAD) /[^/]+/[^/]+/resolve/[^/]+/.+",
}


@dataclass
class Hub:
    """The double's state.

    Attributes:
        token: the one that it takes; role: what that may do.
        asked: every request so far.
        answer: if it gives a status and a message for a request, that is the answer to it.
        public: whether files may be read without a token.
    """

    url: str = ""
    token: str = "hf_" + "Fake" * 8
    role: str = "write"
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    answer: Callable[[Asked], tuple[int, str] | None] = lambda asked: None

    def sequence(self) -> list[str]:
        """The requests in words, the same one only once in a row."""
        words = [asked.what for asked in self.asked if asked.what in KINDS]
        return [word for word, last in zip(words, [None, *words], strict=False) if word != last]

    def of(self, what: str) -> list[Asked]:
        """The requests of one kind."""
        return [asked for asked in self.asked if asked.what == what]


@contextmanager
def hub() -> Iterator[Hub]:
    """A double at work."""
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {key.lower(): value for key, value in self.headers.items()}
            asked = Asked(self.command, self.path, headers, body)
            state.asked.append(asked)
            refused = state.answer(asked)
            if refused is not None:
                return self.say(refused[0], {"error": refused[1]})
            known = headers.get("authorization") == f"Bearer {state.token}"
            if asked.what not in ("put", "file", "info", "tree") and not known:
                return self.say(401, {"error": "Invalid credentials in Authorization header"})
            return getattr(self, f"on_{asked.what}", self.on_unknown)(asked)

        do_GET = do_POST = do_PUT = do_HEAD = handle_any

        def say(self, status: int, value: Any, **headers: str) -> None:
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            for key, text in headers.items():
                self.send_header(key.replace("_", "-"), text)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def on_unknown(self, asked: Asked) -> None:
            self.say(404, {"error": f"not in this double: {asked.what}"})

        def repository(self, asked: Asked) -> Repository | None:
            path = asked.path.removeprefix("/api/models").partition("?")[0]
            name = "/".join(path.split("/")[1:3]).removesuffix(".git")
            found = state.repositories.get(name)
            if found is None:
                self.say(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return found

        def on_whoami(self, asked: Asked) -> None:
            access = {"accessToken": {"role": state.role}}
            self.say(200, {"name": USER, "orgs": [{"name": ORGANISATION}], "auth": access})

        def on_create(self, asked: Asked) -> None:
            given = json.loads(asked.body)
            name = f"{given['organization'] or USER}/{given['name']}"
            private = given.get("visibility") == "private" or given.get("private") is True
            if name in state.repositories:
                url = f"{state.url}/{name}"
                return self.say(409, {"error": "You already created this model repo", "url": url})
            state.repositories[name] = Repository(private, {".gitattributes": b"*.x y\n"})
            return self.say(200, {"url": f"{state.url}/{name}", "name": name})

        def on_info(self, asked: Asked) -> None:
            if (found := self.repository(asked)) is not None:
                name = next(n for n, r in state.repositories.items() if r is found)
                files = [{"rfilename": path} for path in found.files]
                about = {"id": name, "private": found.private, "sha": COMMIT, "siblings": files}
                self.say(200, about)

        def on_tree(self, asked: Asked) -> None:
            if (found := self.repository(asked)) is None:
                return None
            entries = []
            for path, data in found.files.items():
                blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
                entry = {"type": "file", "path": path, "size": len(data), "oid": blob}
                if path in found.lfs:
                    oid = hashlib.sha256(data).hexdigest()
                    entry["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 130}
                entries.append(entry)
            return self.say(200, entries)

        def on_validate(self, asked: Asked) -> None:
            assert json.loads(asked.body)["content"].startswith("---\n")
            self.say(200, {"errors": [], "warnings": []})

        def on_preupload(self, asked: Asked) -> None:
            if self.repository(asked) is None:
                return None
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LFS) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(asked.body)["files"]
            ]
            return self.say(200, {"files": files})

        def on_batch(self, asked: Asked) -> None:
            objects = []
            for one in json.loads(asked.body)["objects"]:
                entry = {"oid": one["oid"], "size": one["size"]}
                if one["oid"] not in state.blobs:
                    entry["actions"] = {"upload": {"href": f"{state.url}/lfs/{one['oid']}"}}
                objects.append(entry)
            self.say(200, {"transfer": "basic", "objects": objects})

        def on_put(self, asked: Asked) -> None:
            oid = asked.path.rpartition("/")[2]
            assert hashlib.sha256(asked.body).hexdigest() == oid
            state.blobs[oid] = asked.body
            self.say(200, {})

        def on_commit(self, asked: Asked) -> None:
            if (found := self.repository(asked)) is None:
                return None
            touched = []
            for line in map(json.loads, asked.body.splitlines()):
                value = line["value"]
                match line["key"]:
                    case "file":
                        found.files[value["path"]] = base64.b64decode(value["content"])
                    case "lfsFile":
                        found.files[value["path"]] = state.blobs[value["oid"]]
                        found.lfs.add(value["path"])
                    case "deletedFile":
                        del found.files[value["path"]]
                    case _:
                        continue
                touched.append(value["path"])
            found.commits.append(touched)
            name = next(n for n, r in state.repositories.items() if r is found)
            url = f"{state.url}/{name}/commit/{COMMIT}"
            return self.say(200, {"success": True, "commitOid": COMMIT, "commitUrl": url})

        def on_file(self, asked: Asked) -> None:
            if (found := self.repository(asked)) is None:
                return None
            path = asked.path.partition("?")[0].split("/", 5)[5]
            if path not in found.files:
                return self.say(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
            data = found.files[path]
            headers = {"X_Repo_Commit": COMMIT, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", asked.headers.get("range", ""))
            if wanted is None:
                return self.say(200, data, **headers)
            first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
            last = min(last, len(data) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(data)}"
            return self.say(206, data[first : last + 1], **headers)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
