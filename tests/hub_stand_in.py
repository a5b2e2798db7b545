"""A stand-in of the Hub's HTTP interface on the loopback, as far as an upload asks it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import yaml

OID = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What it was sent: repositories with their visibility, and files by path. `refuse` is a part
    of the paths that it answers with `status`."""

    url: str = ""
    token: str = "hf_right"
    repositories: dict[str, bool] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0
    refuse: str = ""
    status: int = 403


@contextmanager
def hub() -> Iterator[Hub]:
    """A stand-in that answers until the end."""
    state = Hub()

    class Answers(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def reply(self, status: int, content: object) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def allowed(self) -> bool:
            if self.headers.get("Authorization") != f"Bearer {state.token}":
                self.reply(401, {"error": "Invalid credentials"})
            elif state.refuse and state.refuse in self.path:
                self.reply(state.status, {"error": "not now"})
            else:
                return True
            return False

        def do_PUT(self) -> None:  # to the store, whose address is all that is needed
            content = self.body()
            if state.refuse and state.refuse in self.path:
                return self.reply(state.status, {"error": "not now"})
            assert hashlib.sha256(content).hexdigest() == self.path.rpartition("/")[2]
            state.stored[hashlib.sha256(content).hexdigest()] = content
            self.reply(200, {})

        def do_GET(self) -> None:
            if self.allowed():
                self.reply(*shown(state, self.path))

        def do_POST(self) -> None:
            content = self.body()
            if self.allowed():
                self.reply(*answer(state, self.path, content))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def shown(state: Hub, path: str) -> tuple[int, object]:
    """The status and the JSON for a GET: a repository's files, or what it is."""
    name = re.split("/(?:revision|tree)/", path.removeprefix("/api/models/"))[0]
    if "/tree/" in path:
        files = [{"type": "file", "path": p, "size": 1, "oid": OID} for p in state.files]
        return 200, files
    known = name in state.repositories
    return 200 if known else 404, {
        "id": name, "private": state.repositories.get(name), "sha": OID
    }  # fmt: skip


def answer(state: Hub, path: str, content: bytes) -> tuple[int, object]:
    """The status and the JSON for a POST."""
    if path == "/api/repos/create":
        asked = json.loads(content)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        status = 409 if name in state.repositories else 200
        state.repositories.setdefault(name, asked.get("visibility") == "private")
        return status, {"url": f"{state.url}/{name}"}
    if path == "/api/validate-yaml":  # of the card's front matter
        text = json.loads(content)["content"]
        valid = "base_model" in yaml.safe_load(text.split("---")[1])
        return 200 if valid else 400, {"errors": [], "warnings": []}
    if "/preupload/" in path:
        files = [
            {"path": file["path"], "shouldIgnore": False, "uploadMode": mode(file["path"])}
            for file in json.loads(content)["files"]
        ]
        return 200, {"files": files}
    if path.endswith("/info/lfs/objects/batch"):
        objects = [
            {**each, "actions": {"upload": {"href": f"{state.url}/store/{each['oid']}"}}}
            for each in json.loads(content)["objects"]
        ]
        return 200, {"transfer": "basic", "objects": objects}
    assert "/commit/" in path, path
    for line in content.splitlines():
        entry = json.loads(line)
        value = entry["value"]
        if entry["key"] == "file":
            state.files[value["path"]] = base64.b64decode(value["content"])
        elif entry["key"] == "lfsFile":
            state.files[value["path"]] = state.stored[value["oid"]]
        elif entry["key"] == "deletedFile":
            del state.files[value["path"]]
    state.commits += 1
    name = path.removeprefix("/api/models/").partition("/commit/")[0]
    return 200, {"commitUrl": f"{state.url}/{name}/commit/{OID}", "commitOid": OID}


def mode(path: str) -> str:
    return "lfs" if path.endswith((".safetensors", ".png")) else "regular"
