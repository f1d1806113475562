"""A machine's own apt sources, read and turned into the hosts' release."""

from __future__ import annotations

import pytest

from opsctl.bundle.apt_sources import Source, parse_deb822, parse_one_line, render_deb822, sources_for

DEBIAN = "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg"


def rewritten(text: str, own: str = "trixie") -> str:
    sources = parse_deb822(text) if "URIs:" in text else parse_one_line(text)
    return render_deb822(sources_for(sources, own_codename=own, codename="bookworm"))


def test_the_codename_of_another_release_becomes_the_hosts() -> None:
    text = f"Types: deb deb-src\nURIs: http://mirror.example/debian\nSuites: trixie trixie-updates\n" \
           f"Components: main contrib\n{DEBIAN}\n"
    assert rewritten(text) == f"Types: deb\nURIs: http://mirror.example/debian\nSuites: bookworm bookworm-updates\n" \
                              f"Components: main\n{DEBIAN}\n"


def test_security_and_comments_and_one_line_style() -> None:
    text = "# a comment\n" \
           "deb [arch=amd64 signed-by=/k.gpg] http://mirror.example/debian-security trixie-security main # x\n" \
           "deb-src http://mirror.example/debian trixie main\n#deb http://off.example/debian trixie main\n"
    assert rewritten(text) == "Types: deb\nURIs: http://mirror.example/debian-security\nSuites: bookworm-security\n" \
                              "Components: main\nSigned-By: /k.gpg\n"


@pytest.mark.parametrize("stanza", [
    "Types: deb\nURIs: http://vendor.example/node\nSuites: nodistro\nComponents: main",
    "Types: deb\nURIs: http://vendor.example/docker\nSuites: trixie\nComponents: stable",
    "Types: deb\nURIs: http://vendor.example/db\nSuites: trixie-pgdg\nComponents: main",
    "Types: deb\nURIs: http://mirror.example/d\nSuites: trixie-backports trixie-proposed-updates\nComponents: main",
    "Types: deb\nURIs: http://mirror.example/debian\nSuites: trixie\nComponents: main\nEnabled: no",
    "Types: deb-src\nURIs: http://mirror.example/debian\nSuites: trixie\nComponents: main",
    "Types: deb\nURIs: cdrom:[disc]/\nSuites: trixie\nComponents: main",
    "Types: deb\nURIs: http://vendor.example/g\nSuites: stable\nComponents: main\nSigned-By: /etc/v.gpg",
])
def test_what_does_not_serve_the_hosts_release_is_left_out(stanza: str) -> None:
    assert rewritten(stanza + "\n") == ""


def test_a_machine_that_follows_stable() -> None:
    text = f"Types: deb\nURIs: http://mirror.example/d\nSuites: stable stable-updates\nComponents: main\n{DEBIAN}\n"
    assert "Suites: bookworm bookworm-updates\n" in rewritten(text)


def test_a_source_of_the_hosts_release_on_another_system_is_taken_as_it_is() -> None:
    assert "Suites: bookworm\n" in rewritten("deb http://mirror.example/debian bookworm main\n", own="noble")


def test_trust_is_never_carried_over() -> None:
    one_line = "deb [trusted=yes allow-insecure=yes] http://mirror.example/debian trixie main\n"
    deb822 = "Types: deb\nURIs: http://mirror.example/debian\nSuites: trixie\nComponents: main\nTrusted: yes\n"
    for text in (one_line, deb822):
        assert "rusted" not in rewritten(text) and "insecure" not in rewritten(text)


def test_a_key_written_into_the_source_keeps_its_lines() -> None:
    text = "Types: deb\nURIs: http://mirror.example/debian\nSuites: trixie\nComponents: main\nSigned-By:\n" \
           " -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n mDME\n -----END PGP PUBLIC KEY BLOCK-----\n"
    assert rewritten(text).endswith("Signed-By: \n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n mDME\n"
                                    " -----END PGP PUBLIC KEY BLOCK-----\n")


def test_a_mirror_on_disk_is_copied_from() -> None:
    source = Source(("file:/srv/mirror",), ("bookworm",), ("main",), {})
    assert sources_for([source], own_codename="bookworm", codename="bookworm")[0].addresses == ("copy:/srv/mirror",)
