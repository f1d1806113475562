"""Real builds from a mirror on disk: real apt, apt-ftparchive, gpg; tiny packages, no network, no root."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

import opsctl.bundle.build as building
from opsctl.bundle.build import Built, build_bundle
from opsctl.bundle.closure import Closure, Deb, download_closure
from opsctl.bundle.keys import checking, dearmor, make_bundle_key, signing
from opsctl.bundle.process import run
from opsctl.bundle.repository import indexed_digests, render_release, sorted_index, write_repository
from opsctl.bundle.sums import digest
from opsctl.bundle.verify import SWITCHING, verify_bundle
from opsctl.engines.events import discard
from opsctl.errors import OpsctlError, RefusedError
from opsctl.fleet.systems import default_system

MISSING = [name for name in ("apt-get", "apt-ftparchive", "dpkg-deb", "gpg", "gpgv") if shutil.which(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not on this machine: {', '.join(MISSING)}")


@dataclass
class Site:
    """An operator's machine: a mirror it knows, a fleet directory, an empty cache."""

    root: Path
    fleet: Path
    bundle: Path

    def build(self, *packages: str) -> Built:
        return build_bundle(self.fleet, self.bundle, discard, packages=packages or ("tiny-a",), locks=())

    def trusted_key(self) -> Path:
        return self.fleet / "trust/bundle.asc"

    def verify(self) -> None:
        verify_bundle(self.bundle, self.trusted_key())

    def pool(self) -> list[str]:
        return sorted(path.name for path in (self.bundle / "apt/pool").rglob("*.deb"))

    def publish(self, *debs: Path, codename: str = "bookworm") -> None:
        """Makes these debs what the machine's mirror serves in a suite."""
        mirror = self.root / "mirror"
        for part in ("pool", "dists"):
            if (mirror / part / codename).exists():
                shutil.rmtree(mirror / part / codename)
        closure = Closure(tuple(Deb(deb.name, deb.stat().st_size, "sha256", digest(deb)) for deb in debs),
                          self.root / "debs")
        home, key = self.root / "mirror-key", self.root / "mirror-key.asc"
        with signing(home) as signer, checking(key) as checker:
            write_repository(mirror, codename, closure, signer, previous=self.root / "none", checker=checker)

    def deb(self, name: str, version: str, depends: str = "") -> Path:
        tree = self.root / "trees" / f"{name}-{version}"
        (tree / "DEBIAN").mkdir(parents=True, exist_ok=True)
        (tree / "DEBIAN/control").write_text(
            f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: nobody <nobody@localhost>\n"
            f"Description: a tiny package\n{f'Depends: {depends}' + chr(10) if depends else ''}", encoding="utf-8")
        path = self.root / "debs" / f"{name}_{version.replace(':', '%3a')}_all.deb"
        path.parent.mkdir(exist_ok=True)
        done = run(["dpkg-deb", "--root-owner-group", "--build", str(tree), str(path)])
        assert done.returncode == 0, done.stderr.decode()
        return path


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every site is a copy of: two keys and a mirror with four packages."""
    directory = tmp_path_factory.mktemp("site")
    site = Site(directory, directory / "fleet", directory / "fleet/bundle")
    make_bundle_key(site.fleet / "keys/bundle", site.trusted_key())
    make_bundle_key(directory / "mirror-key", directory / "mirror-key.asc")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(directory / "index"))
        site.publish(site.deb("tiny-a", "1:1.0-1", "tiny-b (>= 2)"), site.deb("tiny-b", "2.0~rc1+x"),
                     site.deb("tiny-b", "3.0"), site.deb("unasked", "1"))
    return directory


@pytest.fixture
def site(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    root = Path(shutil.copytree(model, tmp_path / "site"))
    (root / "mirror-key.gpg").write_bytes(dearmor((root / "mirror-key.asc").read_text()))
    source = f"deb [signed-by={root / 'mirror-key.gpg'}] file:{root / 'mirror'} bookworm main\n"
    (root / "machine.list").write_text(source, encoding="utf-8")
    (root / "apt.conf").write_text(f'Dir::Etc::sourcelist "{root / "machine.list"}";\n'
                                   f'Dir::Etc::sourceparts "{root / "nothing"}";\n', encoding="utf-8")
    monkeypatch.setenv("APT_CONFIG", str(root / "apt.conf"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "cache"))
    return Site(root, root / "fleet", root / "fleet/bundle")


def test_a_bundle_holds_the_closure_and_verifies(site: Site) -> None:
    built = site.build("tiny-a")
    assert built.changed
    assert site.pool() == ["tiny-a_1.0-1_all.deb", "tiny-b_3.0_all.deb"]
    assert [name.split("-")[0] for name in built.wheels] == ["opsctl_agent"]
    site.verify()
    assert sorted(path.name for path in site.bundle.iterdir()) == ["SHA256SUMS", "SHA256SUMS.asc", "apt", "wheels"]


def test_a_second_build_leaves_every_byte_alone(site: Site) -> None:
    site.build()
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in site.bundle.rglob("*") if path.is_file()}
    assert not site.build().changed
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in site.bundle.rglob("*")
                      if path.is_file()}


def test_a_package_that_is_wanted_no_more_leaves_the_pool(site: Site) -> None:
    site.build("tiny-a", "unasked")
    assert "unasked_1_all.deb" in site.pool()
    assert site.build("tiny-a").changed
    assert "unasked_1_all.deb" not in site.pool()
    site.verify()


def test_an_unknown_package_is_named_and_the_old_bundle_stays(site: Site) -> None:
    site.build("tiny-a")
    with pytest.raises(RefusedError) as caught:
        site.build("tiny-a", "tiny-z")
    assert caught.value.code == "bundle.unknown_package"
    assert "tiny-z" in caught.value.message
    site.verify()


def test_packages_that_cannot_be_installed_are_refused(site: Site) -> None:
    site.publish(site.deb("tiny-a", "2", "no-such-thing"))
    with pytest.raises(RefusedError) as caught:
        site.build("tiny-a")
    assert caught.value.code == "bundle.unmet_dependencies"
    assert "no-such-thing" in "\n".join(caught.value.log_tail)


def test_a_mirror_that_does_not_answer_is_refused(site: Site) -> None:
    site.build("tiny-a")
    shutil.rmtree(site.root / "mirror")
    with pytest.raises(RefusedError) as caught:
        site.build("tiny-a")
    assert caught.value.code == "bundle.sources_unreachable"
    assert caught.value.log_tail
    site.verify()


def test_a_mirror_that_is_not_signed_by_whom_the_machine_trusts_is_refused(site: Site) -> None:
    shutil.rmtree(site.root / "mirror-key")
    (site.root / "mirror-key.asc").unlink()
    make_bundle_key(site.root / "mirror-key", site.root / "mirror-key.asc")
    site.publish(site.deb("tiny-a", "9"))
    with pytest.raises(RefusedError) as caught:
        site.build("tiny-a")
    assert caught.value.code == "bundle.sources_unreachable"


def test_a_machine_without_sources_for_the_hosts_is_refused(site: Site) -> None:
    (site.root / "machine.list").write_text("deb http://vendor.example/x stable contrib\n", encoding="utf-8")
    with pytest.raises(RefusedError) as caught:
        site.build("tiny-a")
    assert caught.value.code == "bundle.no_sources"


def test_a_package_that_went_bad_in_the_cache_is_downloaded_again(site: Site) -> None:
    site.build("tiny-a")
    for cached in (site.root / "cache/opsctl/debs").rglob("tiny-b*.deb"):
        content = bytearray(cached.read_bytes())
        content[-1] ^= 1
        cached.write_bytes(content)  # hard-linked: this spoils the bundle in place, too
    with pytest.raises(RefusedError):
        site.verify()
    site.build("tiny-a")
    site.verify()


def test_a_broken_download_says_so_and_keeps_the_old_bundle(site: Site) -> None:
    site.build("tiny-a")
    shutil.rmtree(site.root / "cache")
    next((site.root / "mirror/pool").rglob("tiny-b_3.0*")).unlink()
    with pytest.raises(OpsctlError) as caught:
        site.build("tiny-a")
    assert caught.value.code == "bundle.download_broke_off"
    assert "tiny-b" in "\n".join(caught.value.log_tail)
    site.verify()


def test_a_tampered_bundle_is_made_anew(site: Site) -> None:
    site.build()
    (site.bundle / "wheels/evil.whl").write_bytes(b"evil")
    assert site.build().changed
    site.verify()
    assert not (site.bundle / "wheels/evil.whl").exists()


def test_another_key_signs_everything_anew(site: Site) -> None:
    before = site.build().signed_by
    shutil.rmtree(site.fleet / "keys/bundle")
    shutil.copytree(site.root / "mirror-key", site.fleet / "keys/bundle")
    with pytest.raises(RefusedError) as caught:
        site.build()
    assert caught.value.code == "bundle.key_mismatch"
    shutil.copy(site.root / "mirror-key.asc", site.trusted_key())
    after = site.build()
    assert after.changed
    assert after.signed_by != before


def test_without_a_key_nothing_is_downloaded(site: Site) -> None:
    shutil.rmtree(site.fleet / "keys")
    with pytest.raises(RefusedError) as caught:
        site.build()
    assert caught.value.code == "bundle.no_key"
    assert not list((site.root / "cache").rglob("*.deb"))


NEW_FILES = {"apt/a": "new", "wheels/w": "new", "SHA256SUMS": "new", "SHA256SUMS.asc": "new"}


def write_tree(root: Path, state: str) -> None:
    for name in NEW_FILES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(state, encoding="utf-8")


@pytest.mark.parametrize("first", [True, False], ids=["first build", "rebuild"])
@pytest.mark.parametrize("steps", range(9))
def test_a_switch_that_died_is_finished_by_the_next_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int,
                                                          first: bool) -> None:
    bundle = tmp_path / "bundle"
    if not first:
        write_tree(bundle, "old")
    write_tree(bundle / ".new", "new")
    rename, left = Path.rename, steps

    def dying_rename(path: Path, target: Path) -> Path:
        nonlocal left
        if path.name in building.NAMES:
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", dying_rename)
    if steps < (4 if first else 8):
        with pytest.raises(KeyboardInterrupt):
            building.switch(bundle)
        assert (bundle / SWITCHING).exists()  # which verify reports as incomplete
    else:
        building.switch(bundle)
    monkeypatch.undo()
    building.finish_switch(bundle)
    assert {path.relative_to(bundle).as_posix(): path.read_text() for path in bundle.rglob("*") if path.is_file()} \
        == NEW_FILES


def host_apt(site: Site, *arguments: str, suite: str = "bookworm") -> str:
    """A host's apt, with the bundle as its one source, as the base role writes it."""
    host = site.root / "host" / suite
    for directory in ("lists/partial", "cache/archives/partial", "sources"):
        (host / directory).mkdir(parents=True, exist_ok=True)
    (host / "status").touch()
    (host / "sources/opsctl.sources").write_text(
        f"Types: deb\nURIs: file:{site.bundle / 'apt'}\nSuites: {suite}\nComponents: main\n"
        f"Signed-By: {site.trusted_key()}\n", encoding="utf-8")
    options = {"Dir::State::lists": host / "lists", "Dir::State::status": host / "status",
               "Dir::Cache": host / "cache", "Dir::Etc::sourcelist": os.devnull,
               "Dir::Etc::sourceparts": host / "sources", "APT::Architecture": "amd64",
               "APT::Sandbox::User": "root", "Debug::NoLocking": "1", "APT::Update::Error-Mode": "any"}
    done = run(["apt-get", *(word for key, value in options.items() for word in ("-o", f"{key}={value}")), *arguments])
    return (done.stdout + done.stderr).decode() + f"\nrc={done.returncode}\n"


def test_apt_takes_the_bundle_with_signed_by(site: Site) -> None:
    site.build("tiny-a")
    update = host_apt(site, "update")
    assert update.endswith("rc=0\n"), update
    assert "W:" not in update
    plan = host_apt(site, "-s", "install", "tiny-a")
    assert "Inst tiny-b (3.0 opsctl:bookworm [all])" in plan
    assert "Inst tiny-a (1:1.0-1 opsctl:bookworm [all])" in plan


def test_apt_refuses_a_bundle_whose_index_was_changed(site: Site) -> None:
    site.build("tiny-a")
    for name in ("Packages", "Packages.gz", "Packages.xz"):
        (site.bundle / "apt/dists/bookworm/main/binary-amd64" / name).unlink()
    packages = site.bundle / "apt/dists/bookworm/main/binary-amd64/Packages"
    packages.write_bytes(b"Package: evil\n")
    assert host_apt(site, "update").endswith("rc=100\n")


def test_the_index_does_not_depend_on_the_order_of_files() -> None:
    one, two = b"Package: a\nFilename: pool/a\nSHA256: 1", b"Package: b\nFilename: pool/b\nSHA256: 2"
    assert sorted_index(one + b"\n\n" + two + b"\n\n") == sorted_index(two + b"\n\n\n" + one + b"\n")
    assert indexed_digests(sorted_index(two + b"\n\n" + one)) == {"pool/a": "1", "pool/b": "2"}


def test_a_release_file_names_itself_and_its_indexes() -> None:
    text = render_release({"main/binary-amd64/Packages": b""}, codename="trixie",
                          date="Sat, 21 Nov 2026 00:00:00 -0000")
    assert "Origin: opsctl\n" in text
    assert "Suite: trixie\nCodename: trixie\n" in text
    assert "Date: Sat, 21 Nov 2026 00:00:00 +0000\n" in text
    assert "Valid-Until" not in text
    assert text.endswith("SHA256:\n e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855 0 "
                         "main/binary-amd64/Packages\n")


def test_a_download_with_nothing_to_do_starts_no_download(site: Site) -> None:
    download_closure(("tiny-a",), default_system(), discard)
    events: list[object] = []
    closure = download_closure(("tiny-a",), default_system(), events.append)
    assert len(closure.debs) == 2
    assert not [event for event in events if "Debian packages" in str(event)]
