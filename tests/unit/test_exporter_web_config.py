"""TLS and passwords of the exporter's port: real certificates, real connections, and files that are wrong."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import shutil
import socket
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from opsctl.agent.gpu import exporter as exporter_module
from opsctl.agent.gpu import passwords, web_config
from opsctl.agent.gpu.exporter import Exporter
from opsctl.agent.gpu.passwords import Passwords
from opsctl.agent.paths import Paths
from opsctl.agent.settings import Settings
from opsctl.errors import ConfigurationError

CHEAP = "$pbkdf2-sha256$i=1000$c2FsdHNhbHQ$" + base64.b64encode(
    hashlib.pbkdf2_hmac("sha256", b"secret", b"saltsalt", 1000)).decode().rstrip("=")


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, a host's certificate of it, a client's, and one of nobody's."""
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    for name in ("ca", "other"):
        openssl("req", "-x509", *new, "-keyout", f"{name}.key", "-out", f"{name}.crt", "-subj", f"/CN={name}",
                "-days", "2")
    for name in ("host", "client"):
        openssl("req", *new, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}",
                "-addext", "subjectAltName=IP:127.0.0.1")
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-out", f"{name}.crt",
                "-days", "2", "-copy_extensions", "copy")
    return folder


class Served:
    """An exporter of a host without GPUs, that serves; files are those in its etc/opsctl."""

    def __init__(self, root: Path) -> None:
        self.etc = root / "etc/opsctl"
        self.etc.mkdir(parents=True)
        with socket.create_server(("127.0.0.1", 0)) as found:
            self.port = found.getsockname()[1]
        self.said: list[str] = []
        self.exporter = Exporter(Paths(root), Settings("gpu-1", "127.0.0.1", 0, "http://x", self.port), "0.1",
                                 self.said.append)

    def write(self, text: str) -> None:
        beside = self.etc / "new"
        beside.write_text(text)
        beside.rename(self.etc / "web.toml")

    async def get(self, path: str = "/metrics", scheme: str = "http", context: ssl.SSLContext | None = None,
                  **headers: str) -> int | str:
        """The status, or what went wrong with the connection."""
        def ask() -> int | str:
            request = urllib.request.Request(f"{scheme}://127.0.0.1:{self.port}{path}", headers=headers)
            try:
                with urllib.request.urlopen(request, timeout=5, context=context) as response:
                    return int(response.status)
            except urllib.error.HTTPError as error:
                assert "Basic" in error.headers["WWW-Authenticate"]
                return error.code
            except (urllib.error.URLError, OSError) as error:
                return str(getattr(error, "reason", error))

        return await asyncio.to_thread(ask)

    async def until(self, found: Any, **how: Any) -> None:
        """It may take a moment until a file is seen."""
        last: Any = None
        for _ in range(250):
            last = await self.get(**how)
            if last == found or (isinstance(found, str) and found in str(last)):
                return
            await asyncio.sleep(0.02)
        raise AssertionError(f"{last}, not {found}: {self.said}")


def serve(root: Path, work: Callable[[Served], Awaitable[None]], text: str | None = None) -> None:
    async def whole() -> None:
        one = Served(root)
        if text is not None:
            one.write(text)
        serving = asyncio.create_task(one.exporter.serve())
        try:
            await asyncio.wait_for(work(one), 30)
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
    asyncio.run(whole())


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter_module, "WEB_LOOK_S", 0.02)


def trusting(tls: Path, *, name: str | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(tls / "ca.crt"))
    if name:
        context.load_cert_chain(tls / f"{name}.crt", tls / f"{name}.key")
    return context


def basic(words: str) -> str:
    return f"Basic {base64.b64encode(words.encode()).decode()}"


def test_without_a_file_it_is_open(tmp_path: Path) -> None:
    async def work(one: Served) -> None:
        await one.until(200)
        assert await one.get("/healthz") == 200
    serve(tmp_path, work)


def test_tls(tmp_path: Path, tls: Path) -> None:
    async def work(one: Served) -> None:
        await one.until(200, scheme="https", context=trusting(tls))
        assert "certificate verify failed" in str(await one.get(scheme="https", context=ssl.create_default_context()))
        assert await one.get() != 200  # in clear
        old = trusting(tls)
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        assert await one.get(scheme="https", context=old) != 200
        curl = ["curl", "--silent", "--fail", "--cacert", str(tls / "ca.crt"), f"https://127.0.0.1:{one.port}/metrics"]
        assert b"opsctl_agent_info" in await asyncio.to_thread(subprocess.check_output, curl)
    serve(tmp_path, work, f'cert_file = "{tls}/host.crt"\nkey_file = "{tls}/host.key"\nmin_version = "TLS13"\n')


def test_only_clients_with_a_certificate(tmp_path: Path, tls: Path) -> None:
    async def work(one: Served) -> None:
        await one.until(200, scheme="https", context=trusting(tls, name="client"))
        for nobody in (trusting(tls), trusting(tls, name="other")):
            assert await one.get(scheme="https", context=nobody) != 200
    serve(tmp_path, work, f'cert_file = "{tls}/host.crt"\nkey_file = "{tls}/host.key"\n'
                          f'client_ca_file = "{tls}/ca.crt"\n')


def test_a_password_on_every_page(tmp_path: Path) -> None:
    async def work(one: Served) -> None:
        await one.until(401)
        for path in ("/metrics", "/healthz", "/readyz", "/nothing"):
            assert await one.get(path) == 401
        assert await one.get(Authorization=basic("prometheus:secret")) == 200
        for words in ("prometheus:Secret", "prometheus:", "prometheus", "other:secret", ":secret", ""):
            assert await one.get(Authorization=basic(words)) == 401
        for header in ("Bearer secret", "Basic", "Basic *", basic("prometheus:secret") + "x"):
            assert await one.get(Authorization=header) == 401
    serve(tmp_path, work, f'basic_auth_users = ["prometheus:{CHEAP}"]\n')


def test_a_changed_file_counts_and_a_wrong_one_serves_nobody(tmp_path: Path, tls: Path) -> None:
    async def work(one: Served) -> None:
        await one.until(200)
        one.write(f'basic_auth_users = ["prometheus:{CHEAP}"]\n')
        await one.until(401)
        one.write('basic_auth_user = []\n')
        await one.until("refused")
        assert "there is no key basic_auth_user;" in one.said[-1]
        assert await one.get(Authorization=basic("prometheus:secret")) != 200
        assert len(one.said) == 1
        own = one.etc / "host.key"
        own.write_bytes((tls / "host.key").read_bytes())
        (one.etc / "host.crt").write_bytes((tls / "host.crt").read_bytes())
        one.write('cert_file = "host.crt"\nkey_file = "host.key"\n')
        await one.until(200, scheme="https", context=trusting(tls))
        own.write_text("nonsense")  # a certificate that is renewed by halves
        await one.until("refused", scheme="https", context=trusting(tls))
        assert "cannot be used" in one.said[-1]
        own.write_bytes((tls / "host.key").read_bytes())
        await one.until(200, scheme="https", context=trusting(tls))
    serve(tmp_path, work)


@pytest.mark.parametrize("text", [f'basic_auth_users = ["prometheus:{CHEAP}"]\n', "nonsense"])
def test_a_file_that_goes_away_opens_nothing_until_the_agent_begins_anew(tmp_path: Path, text: str) -> None:
    async def work(one: Served) -> None:
        await one.until(401 if text != "nonsense" else "refused")
        (one.etc / "web.toml").unlink()
        await one.until("refused")
        for _ in range(20):
            assert "refused" in str(await one.get())
            await asyncio.sleep(0.01)
        assert "was there and is gone" in one.said[-1]
        assert "systemctl restart opsctl-agent" in one.said[-1]
        one.write(f'basic_auth_users = ["prometheus:{CHEAP}"]\n')
        await one.until(401)
        assert await one.get(Authorization=basic("prometheus:secret")) == 200
    serve(tmp_path, work, text)

    async def anew(one: Served) -> None:
        await one.until(200)
    shutil.rmtree(tmp_path / "etc")
    serve(tmp_path, anew)


def test_a_link_to_nothing_is_not_no_file(tmp_path: Path) -> None:
    path = tmp_path / "web.toml"
    path.symlink_to("web.toml.new")
    with pytest.raises(ConfigurationError, match=r"web\.toml"):
        web_config.read(path)


@pytest.mark.parametrize(("text", "words"), [
    ("", "guards nothing"), ("# basic_auth_users = ['x']\n", "guards nothing"),
    ("basic_auth_users = []\n", "basic_auth_users is empty"), ("nonsense", "cannot be read"),
    ("tls = 1", "there is no key tls"),
    ("cert_file = 3", "cert_file is 3, expected text"),
    ('basic_auth_users = "x"', "expected a list"), ('cert_file = "a"', "cert_file is there, and key_file is not"),
    ('key_file = "a"', "key_file is there, and cert_file is not"),
    ('client_ca_file = "a"', "client_ca_file is there, and cert_file is not"),
    ('cert_file = "a"\nkey_file = "b"', "/a and key_file "), ('cert_file = "a"\nkey_file = "b"\nmin_version = "TLS11"',
                                                            "min_version is TLS11, expected TLS12 or TLS13"),
    ('cert_file = "a"\nkey_file = "b"\nclient_ca_file = "c"\nclient_auth_type = "RequestClientCert"',
     "client_auth_type is RequestClientCert"),
    ('basic_auth_users = ["prometheus"]', "entry 1 of basic_auth_users is not NAME:HASH"),
    ('basic_auth_users = ["a:$2y$10$abc"]', "the hash of a in basic_auth_users is bcrypt"),
    ('basic_auth_users = ["a:secret"]', "is no hash"),
    ('basic_auth_users = ["a:$scrypt$ln=20,r=8,p=1$c2FsdHNhbHQ$c2FsdHNhbHQ"]', "takes more than 32 MiB"),
    ('basic_auth_users = ["a:$scrypt$ln=13,r=8,p=1$c2Fs$c2FsdHNhbHQ"]', "less than 8 bytes"),
])
def test_what_is_wrong_with_it_is_said(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "web.toml"
    path.write_text(text)
    with pytest.raises(ConfigurationError) as error:
        web_config.read(path)
    assert words in error.value.message
    assert str(path) in error.value.message
    assert "secret" not in error.value.message.replace("basic_auth_users", "")


def test_a_hash_is_made_and_found_right(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "opsctl.agent.gpu.web_config", "hash", "prometheus"], check=True,
                          input="geheim ä\n", capture_output=True, text=True)
    name, _, text = done.stdout.strip().partition(":")
    assert (name, text[:8]) == ("prometheus", "$scrypt$")
    check = passwords.checker(text)
    assert (check("geheim ä"), check("geheim a"), check("")) == (True, False, False)
    path = tmp_path / "web.toml"
    path.write_text(f'basic_auth_users = ["{done.stdout.strip()}"]\n')
    assert web_config.read(path).passwords is not None


@pytest.mark.parametrize("words", [[], ["hash"], ["hash", "a:b"], ["other", "a"]])
def test_how_it_is_called(words: list[str]) -> None:
    assert web_config.main(words) == 2


def test_a_password_is_checked_once_and_a_wrong_one_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check takes a fifth of a second on purpose; a scrape each second must not."""
    asked: list[str] = []
    monkeypatch.setattr(passwords, "checker", lambda _: lambda password: asked.append(password) or password == "secret")

    async def work() -> None:
        guard = Passwords({"prometheus": "x"})
        for _ in range(3):
            assert await guard.admit(basic("prometheus:secret"))
            assert not await guard.admit(basic("prometheus:wrong"))
            assert not await guard.admit(basic("nobody:secret"))  # asks as long as for a name that is there
        for number in range(100):
            assert await guard.admit(basic("prometheus:secret") + " " * number)
        assert len(guard._good) <= passwords.REMEMBERED

    asyncio.run(work())
    assert asked[:7] == ["secret", "wrong", "secret", "wrong", "secret", "wrong", "secret"]
