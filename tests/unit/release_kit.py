"""Releases for tests: real keys, real signatures, small files, a real HTTP server with its moods."""

from __future__ import annotations

import hashlib
import http.server
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from opsctl.agent import manifest as manifests
from opsctl.agent.manifest import Engine, Release, ReleaseFile
from opsctl.agent.paths import Paths
from opsctl.releases.signing import sign
from opsctl.serving.llamacpp import LLAMACPP

LOCK = "xllamacpp==1.0 --hash=sha256:" + "0" * 64 + "\n"
ENGINE = Engine("llamacpp", "1.0", ">=3.10", LOCK)


@dataclass(frozen=True)
class Keys:
    """A release key pair and the file that trusts it."""

    private: Path
    allowed_signers: Path


def make_keys(folder: Path) -> Keys:
    folder.mkdir(parents=True, exist_ok=True)
    key = folder / "release"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", key], check=True)
    allowed = folder / "allowed_signers"
    public = key.with_suffix(".pub").read_text()
    allowed.write_text(f'opsctl-release namespaces="opsctl-release" {public}')
    return Keys(key, allowed)


def release_of(files: Mapping[str, bytes], version: str = "v1", engine: Engine = ENGINE, **arguments: Any) -> Release:
    entries = tuple(ReleaseFile(path, len(content), hashlib.sha256(content).hexdigest())
                    for path, content in sorted(files.items()))
    return Release("chat", version, "2026-01-01T00:00:00Z", engine, LLAMACPP.arguments(arguments), entries, "test")


def lay_down(folder: Path, files: Mapping[str, bytes], key: Path, version: str = "v1", engine: Engine = ENGINE,
             **arguments: Any) -> Path:
    """Writes a signed release below ``folder`` and returns its directory."""
    manifest = release_of(files, version, engine, **arguments).to_bytes()
    directory = folder / manifests.directory_name(version, manifests.digest(manifest))
    for path, content in files.items():
        target = directory / manifests.FILES / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    (directory / manifests.MANIFEST).write_bytes(manifest)
    (directory / manifests.SIGNATURE).write_bytes(sign(manifest, key))
    return directory


def make_host(root: Path, keys: Keys, port: int = 8100) -> Paths:
    """A host's root with agent.toml, trust and the placement of chat.0."""
    paths = Paths(root)
    paths.placements.mkdir(parents=True)
    paths.allowed_signers.parent.mkdir(parents=True)
    paths.allowed_signers.write_bytes(keys.allowed_signers.read_bytes())
    paths.boot_id.parent.mkdir(parents=True)
    paths.boot_id.write_text("boot-1\n")
    paths.settings.write_text('host = "gpu-1"\nlisten = "127.0.0.1"\nagent_check_port = 9777\n'
                              'gateway_url = "http://127.0.0.1:8480"\n')
    (paths.placements / "chat.0.toml").write_text(
        f'instance = "chat.0"\nservice = "chat"\nindex = 0\naddress = "127.0.0.1"\nport = {port}\ngpus = []\n'
        "tensor_parallel = 1\n")
    return paths


def build_environment(paths: Paths, engine: Engine = ENGINE) -> None:
    """Marks an engine's environment as built."""
    folder = paths.engines / engine.directory
    folder.mkdir(parents=True)
    (folder / ".complete").touch()


@dataclass
class Web:
    """A server's content and its moods. ``asked`` collects (path, Range header)."""

    content: dict[str, bytes]
    url: str = ""
    ranges: bool = True
    etag: str = ""
    knows_if_range: bool = True
    break_after: int = 0  # bytes of a body after which the connection is cut
    breaks_left: int = 0
    asked: list[tuple[str, str]] = field(default_factory=list)
    answer: Callable[[str], bytes | None] | None = None


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    web: Web

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        wanted = self.headers.get("Range", "")
        self.web.asked.append((self.path, wanted))
        body = self.web.answer(self.path) if self.web.answer else self.web.content.get(self.path)
        if body is None:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.web.ranges else 0
        if self.web.knows_if_range and self.headers.get("If-Range", self.web.etag) != self.web.etag:
            start = 0
        if start and start >= len(body):
            self.send_response(416)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if self.web.etag:
            self.send_header("ETag", self.web.etag)
        self.send_header("Content-Length", str(len(body) - start))
        self.send_header("Content-Type", "text/html" if self.path.endswith("/") else "application/octet-stream")
        self.end_headers()
        if self.command == "HEAD":
            return
        rest = body[start:]
        if self.web.breaks_left and len(rest) > self.web.break_after:
            self.web.breaks_left -= 1
            self.wfile.write(rest[:self.web.break_after])
            self.close_connection = True
            return
        self.wfile.write(rest)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(content: Mapping[str, bytes], **moods: Any) -> Iterator[Web]:
    web = replace(Web(dict(content)), **moods)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"web": web}))
    server.daemon_threads = True
    web.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def published(directory: Path, base: str = "/releases/chat") -> dict[str, bytes]:
    """A release directory as a web server's content."""
    return {f"{base}/{directory.name}/{path.relative_to(directory).as_posix()}": path.read_bytes()
            for path in directory.rglob("*") if path.is_file()}
