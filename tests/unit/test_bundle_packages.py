"""What is mirrored, and how apt's answers are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from opsctl.bundle.debs import Deb, parse_printed_uris, unknown_packages
from opsctl.bundle.packages import role_packages
from opsctl.errors import ConfigurationError

PRINTED = """\
'http://mirror.example/debian/pool/main/h/haproxy/haproxy_2.6.12-1%2bdeb12u4_amd64.deb' \
haproxy_2.6.12-1+deb12u4_amd64.deb 2043620 SHA256:e1a6
'http://mirror.example/debian/pool/main/a/audit/libaudit1_3.0.9-1_amd64.deb' libaudit1_1%3a3.0.9-1_amd64.deb 44500 \
SHA256:00ff
"""


def write_defaults(roles: Path, role: str, text: str) -> None:
    (roles / role / "defaults").mkdir(parents=True)
    (roles / role / "defaults/main.yml").write_text(text, encoding="utf-8")


def test_printed_uris() -> None:
    assert parse_printed_uris(PRINTED) == (Deb("haproxy_2.6.12-1+deb12u4_amd64.deb", 2043620, "sha256", "e1a6"),
                                           Deb("libaudit1_1%3a3.0.9-1_amd64.deb", 44500, "sha256", "00ff"))


@pytest.mark.parametrize(("cached", "pool"), [
    ("libaudit1_1%3a3.0.9-1_amd64.deb", "libaudit1_3.0.9-1_amd64.deb"),
    ("haproxy_2.6.12-1+deb12u4_amd64.deb", "haproxy_2.6.12-1+deb12u4_amd64.deb"),
])
def test_the_pool_has_no_epochs(cached: str, pool: str) -> None:
    assert Deb(cached, 1, "sha256", "0").pool_name == pool


@pytest.mark.parametrize(("said", "names"), [
    ("Reading package lists...\nE: Unable to locate package nginx-lite\n", ("nginx-lite",)),
    ("E: Package 'chrony' has no installation candidate\nE: Unable to locate package foo\n", ("chrony", "foo")),
    ("E: Unable to locate package a1.2\nE: Couldn't find any package by glob 'a1.2'\n", ("a1.2",)),
    ("E: Unable to correct problems, you have held broken packages.\n", ()),
])
def test_unknown_packages(said: str, names: tuple[str, ...]) -> None:
    assert unknown_packages(said) == names


def test_role_packages_are_every_list_that_says_so(tmp_path: Path) -> None:
    write_defaults(tmp_path, "base", "base_packages: [chrony, python3-venv]\nbase_user: root\n")
    write_defaults(tmp_path, "lb", "load_balancer_packages:\n  - haproxy\n  - chrony\n")
    write_defaults(tmp_path, "empty", "---\n")
    assert role_packages(tmp_path) == ("chrony", "haproxy", "python3-venv")


@pytest.mark.parametrize(("text", "code", "named"), [
    ("base_packages: chrony\n", "bundle.not_a_package_list", "base_packages"),
    ("base_packages: ['haproxy=2.6*']\n", "bundle.not_a_package_name", "haproxy=2.6*"),
    ("base_packages: [1.5]\n", "bundle.not_a_package_name", "1.5"),
    ("base_packages: ['-oDir=/']\n", "bundle.not_a_package_name", "-oDir=/"),
    ("base_user: root\n", "bundle.no_packages", "names a package"),
])
def test_a_wrong_package_list_is_named(tmp_path: Path, text: str, code: str, named: str) -> None:
    write_defaults(tmp_path, "base", text)
    with pytest.raises(ConfigurationError) as caught:
        role_packages(tmp_path)
    assert caught.value.code == code
    assert named in caught.value.message
