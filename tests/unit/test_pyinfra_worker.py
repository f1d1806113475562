"""pyinfra in its worker process, against servers on the loopback: what it answers, whom it believes, how it ends."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from played_host import Played, fleet_of, host_of, play, when_asked
from session_server import make_key, serving

from opsctl.engines import pyinfra
from opsctl.engines.events import Event, TaskStarted, discard
from opsctl.engines.pyinfra import HostFacts, Order, Worker, carry_out, gather
from opsctl.engines.pyinfra_job import EVENTS_FD, Job, read_job, write_job
from opsctl.engines.session import Session
from opsctl.errors import ExitCode, OpsctlError, RefusedError
from opsctl.fleet.model import Fleet, Host
from opsctl.releases.remote import ask

STAGED = {"staged": True, "engine_built": True}
MISSING = {"staged": False, "engine_built": False, "fetch_bytes": 7, "link_files": 0, "fits": True}
RUNNING = {"state": "running", "phase": "fetch", "done": 1, "total": 7}
V2 = "v2-0123456789ab"
SOON_S = 8.0


def stage(host: str, release: str = V2, rate_limit: int = 0) -> Order:
    return Order(host, "stage", {"service": "chat", "release": release, "rate_limit": rate_limit})


def cutover(host: str, instance: str) -> Order:
    return Order(host, "cutover", {"instance": instance, "release": V2, "from_release": "v1-ba9876543210",
                                   "owner": "run:R", "min_speed_percent": 50})


def gc(host: str) -> Order:
    return Order(host, "gc", {"service": "chat", "keep": [V2]})


@pytest.fixture(scope="module")
def client_key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_key(tmp_path_factory.mktemp("client") / "login")


@dataclasses.dataclass
class Row:
    """Three hosts, gpu-1 with root as its user, the others with sudo; and their fleet."""

    fleet: Fleet
    played: dict[str, Played]

    @property
    def hosts(self) -> tuple[Host, ...]:
        return self.fleet.hosts


@pytest.fixture
def row(tmp_path: Path, client_key: Path) -> Iterator[Row]:
    names = ("gpu-1", "gpu-2", "gpu-3")
    with ExitStack() as stack:
        servers = {name: stack.enter_context(serving(tmp_path / name, client_key)) for name in names}
        played = {name: play(servers[name], tmp_path / name / "played") for name in names}
        for one in played.values():
            one.tell("stage-plan", MISSING)
            one.tell("stage", RUNNING)
            one.tell("cutover", RUNNING)
            one.tell("gc --dry-run", {"changed": False, "removed": [{"release": "v0-000000000000", "bytes": 9}]})
            one.tell("gc", {"changed": True, "bytes": 9})
        hosts = [host_of(servers[name], client_key, name, "root" if name == "gpu-1" else "ann") for name in names]
        yield Row(fleet_of(tmp_path, hosts, *servers.values()), played)


def code_of(answer: object) -> str:
    assert isinstance(answer, OpsctlError), answer
    return answer.code


def test_hosts_are_asked_and_answer(row: Row) -> None:
    row.played["gpu-2"].tell("stage-plan", STAGED)
    found = gather(row.fleet, row.hosts, plans=[("chat", V2)])
    assert list(found) == ["gpu-1", "gpu-2", "gpu-3"]
    assert found["gpu-1"] == HostFacts({"instances": [], "releases": []}, {("chat", V2): MISSING})
    assert isinstance(found["gpu-2"], HostFacts)
    assert found["gpu-2"].stage_plans == {("chat", V2): STAGED}
    assert row.played["gpu-3"].asked() == [["state", "--json"], ["stage-plan", "--service", "chat", "--release", V2]]
    assert row.played["gpu-1"].as_root() == {""}
    assert row.played["gpu-2"].as_root() == {"yes"}


def test_nobody_to_ask_starts_nothing(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyinfra, "_Process", None)
    assert gather(row.fleet, []) == {}
    assert carry_out(row.fleet, [], discard) == {}


def test_orders_begin_and_what_is_done_already_is_nothing(row: Row) -> None:
    row.played["gpu-2"].tell("stage-plan", STAGED)
    seen: list[Event] = []
    done = carry_out(row.fleet, [stage(host.name, rate_limit=200) for host in row.hosts], seen.append)
    assert done["gpu-1", "stage", V2] == done["gpu-3", "stage", V2] == RUNNING
    assert done["gpu-2", "stage", V2] == {"state": "done", "result": {"changed": False, "release": V2}}
    assert row.played["gpu-1"].asked()[-1] == [
        "stage", "--service", "chat", "--release", V2, "--rate-limit", "200", "--wait-s", "0"]
    assert [asked[0] for asked in row.played["gpu-2"].asked()] == ["stage-plan"]
    assert {event.host for event in seen if isinstance(event, TaskStarted)} == {"gpu-1", "gpu-2", "gpu-3"}


def test_one_host_that_fails_keeps_no_other_from_going_on(row: Row) -> None:
    row.played["gpu-2"].fail("stage", "release.tampered", 5)
    orders = [order for host in row.hosts for order in (stage(host.name), cutover(host.name, "chat.0"))]
    done = carry_out(row.fleet, orders, discard)
    error = done["gpu-2", "stage", V2]
    assert isinstance(error, RefusedError)
    assert (error.code, error.message, error.log_tail) == ("release.tampered", "gpu-2: stage says no.", ("last line",))
    assert code_of(done["gpu-2", "cutover", "chat.0"]) == "order.not_begun"
    assert "cutover" not in [asked[0] for asked in row.played["gpu-2"].asked()]
    for name in ("gpu-1", "gpu-3"):
        assert done[name, "stage", V2] == done[name, "cutover", "chat.0"] == RUNNING


def test_all_hosts_that_fail_are_told_all_the_same(row: Row) -> None:
    """pyinfra raises then, and calls nobody back."""
    for one in row.played.values():
        one.fail("cutover", "cutover.moved", 5)
    done = carry_out(row.fleet, [cutover(host.name, "chat.0") for host in row.hosts], discard)
    assert {code_of(answer) for answer in done.values()} == {"cutover.moved"}


def test_a_fact_that_fails_leaves_it_to_the_command_to_say_why(row: Row) -> None:
    row.played["gpu-1"].fail("stage-plan", "fetch.failed", 1)
    row.played["gpu-2"].tell("stage-plan", stdout="not json\n")
    row.played["gpu-3"].fail("stage-plan", "fetch.failed", 1)  # on all hosts: pyinfra would say that none is left
    done = carry_out(row.fleet, [stage(host.name) for host in row.hosts], discard)
    assert set(map(str, done.values())) == {str(RUNNING)}
    found = gather(row.fleet, row.hosts, plans=[("chat", V2)])
    assert code_of(found["gpu-1"]) == "fetch.failed"
    assert code_of(found["gpu-2"]) == "host.no_answer"


def test_hosts_with_different_orders_keep_their_own_order(row: Row) -> None:
    """By their number on each host, pyinfra would take the first order of each for one and the same."""
    orders = [stage("gpu-1"), cutover("gpu-1", "chat.0"), cutover("gpu-1", "chat.1"), gc("gpu-1"),
              gc("gpu-2"), cutover("gpu-2", "chat.1"), cutover("gpu-2", "chat.0"), stage("gpu-2"),
              cutover("gpu-3", "chat.0")]
    seen: list[Event] = []
    done = carry_out(row.fleet, orders, seen.append)
    assert set(done) == {order.key for order in orders}
    assert not any(isinstance(answer, OpsctlError) for answer in done.values())
    acts = {name: [asked[:2] if asked[0] == "cutover" else asked[:1] for asked in one.asked()
                   if asked[0] not in ("state", "stage-plan") and "--dry-run" not in asked]
            for name, one in row.played.items()}
    assert acts == {"gpu-1": [["stage"], ["cutover", "chat.0"], ["cutover", "chat.1"], ["gc"]],
                    "gpu-2": [["gc"], ["cutover", "chat.1"], ["cutover", "chat.0"], ["stage"]],
                    "gpu-3": [["cutover", "chat.0"]]}
    assert done["gpu-2", "gc", "chat"] == {"changed": True, "bytes": 9}


NAMES_OF_OPERATIONS = """
import json, sys
from opsctl.engines import pyinfra_worker as worker
worker.run(worker.read_job(sys.stdin.readline()), lambda *event, **more: None)
state = worker.ctx_state.get()
print(json.dumps([sorted(state.get_op_meta(operation).names) for operation in state.get_op_order()]))
"""


def test_different_orders_are_different_operations(row: Row) -> None:
    orders = (stage("gpu-1"), cutover("gpu-2", "chat.0"), gc("gpu-3"))
    names = json.loads(script_in_worker(NAMES_OF_OPERATIONS, Job(row.fleet, ("gpu-1", "gpu-2", "gpu-3"), (), orders)))
    assert names == [["pyinfra_parts.stage"], ["pyinfra_parts.cutover"], ["pyinfra_parts.gc"]]


def same_as_a_session_says(fleet: Fleet, host: Host) -> OpsctlError:
    """Asserts that the worker refuses a host in a session's words."""
    with pytest.raises(OpsctlError) as caught, Session(fleet, host) as session:
        ask(session, ["state", "--json"], host=host.name)
    found = gather(fleet, fleet.hosts)[host.name]
    assert isinstance(found, type(caught.value))
    assert found.as_document() == caught.value.as_document()
    assert found.exit_code is caught.value.exit_code
    ordered = carry_out(fleet, [stage(one.name) for one in fleet.hosts], discard)[host.name, "stage", V2]
    assert isinstance(ordered, OpsctlError)
    assert ordered.code == found.code
    return found


def pins(row: Row, **other: str) -> None:
    """Writes known_hosts, with the keys in ``other`` (``gpu_2=...``) in place of the true ones."""
    lines = []
    for name, one in row.played.items():
        key = other.get(name.replace("-", "_"), one.server.key.text)
        lines += [one.server.pin.replace(one.server.key.text, key)] * bool(key)
    row.fleet.known_hosts.write_text("".join(lines), encoding="utf-8")


def test_a_changed_host_key_is_refused_before_login(row: Row, tmp_path: Path) -> None:
    pins(row, gpu_2=make_key(tmp_path / "other").with_suffix(".pub").read_text().split()[1])
    error = same_as_a_session_says(row.fleet, row.hosts[1])
    assert error.code == "host.foreign_key"
    assert row.played["gpu-2"].server.logins == []
    assert row.played["gpu-1"].asked()


def test_a_host_that_is_not_pinned_is_refused_and_nothing_is_written(row: Row) -> None:
    """Left to itself, pyinfra takes a new host's key and writes it down."""
    pins(row, gpu_2="")
    before = row.fleet.known_hosts.read_bytes()
    assert same_as_a_session_says(row.fleet, row.hosts[1]).code == "host.not_trusted"
    assert (row.played["gpu-2"].server.logins, row.fleet.known_hosts.read_bytes()) == ([], before)


def test_known_hosts_that_pyinfra_would_drop_is_refused(row: Row) -> None:
    server = row.played["gpu-1"].server
    line = f"@cert-authority * {server.key.type} {server.key.text}\n"
    row.fleet.known_hosts.write_text(line + row.fleet.known_hosts.read_text(), encoding="utf-8")
    assert same_as_a_session_says(row.fleet, row.hosts[0]).exit_code is ExitCode.CONFIGURATION


def test_an_unreachable_host_and_a_foreign_login_are_told(row: Row, tmp_path: Path) -> None:
    row.played["gpu-3"].server.close()
    stranger = dataclasses.replace(row.hosts[1], identity_file=str(make_key(tmp_path / "stranger")))
    fleet = dataclasses.replace(row.fleet, hosts=(row.hosts[0], stranger, row.hosts[2]))
    assert same_as_a_session_says(fleet, row.hosts[2]).code == "host.unreachable"
    assert same_as_a_session_says(fleet, stranger).code == "host.login_refused"
    assert isinstance(gather(fleet, fleet.hosts)["gpu-1"], HostFacts)


@pytest.mark.parametrize("words", ["refused", "asking"])
def test_sudo_that_wants_a_password_is_told_and_nobody_is_asked_for_one(words: str, tmp_path: Path, client_key: Path
                                                                       ) -> None:
    """pyinfra would ask the terminal when sudo says so in English."""
    with serving(tmp_path / "server", client_key, sudo=words) as server:
        play(server, tmp_path / "played")
        fleet = fleet_of(tmp_path, [host_of(server, client_key, "gpu-1")], server)
        assert same_as_a_session_says(fleet, fleet.hosts[0]).code == "host.no_sudo"


def test_a_host_without_the_agent_is_told(tmp_path: Path, client_key: Path) -> None:
    with serving(tmp_path / "server", client_key) as server:
        fleet = fleet_of(tmp_path, [host_of(server, client_key, "gpu-1"),
                                    Host(name="this", address="this", groups=("gpu",), connection="local")], server)
        answers = {**gather(fleet, fleet.hosts), **carry_out(fleet, [stage("gpu-1"), stage("this")], discard)}
    for answer in answers.values():
        assert isinstance(answer, OpsctlError)
        assert answer.code == "host.no_answer"
        assert "ended with 127" in answer.message
        assert "opsctl provision" in answer.hint


@pytest.fixture
def behind_jump(row: Row, client_key: Path) -> Row:
    """gpu-3 is reached through gpu-2, which is reached through gpu-1."""
    first, second, third = row.hosts
    hosts = (first, dataclasses.replace(second, proxy_jump="gpu-1"), dataclasses.replace(third, proxy_jump="gpu-2"))
    return Row(dataclasses.replace(row.fleet, hosts=hosts), row.played)


def test_hosts_behind_jumps_are_reached(behind_jump: Row) -> None:
    found = gather(behind_jump.fleet, behind_jump.hosts)
    assert all(isinstance(answer, HostFacts) for answer in found.values()), found
    forwards = {name: [port for _, port in one.server.forwards] for name, one in behind_jump.played.items()}
    ports = {name: one.server.port for name, one in behind_jump.played.items()}
    assert forwards == {"gpu-1": [ports["gpu-2"]] * 2, "gpu-2": [ports["gpu-3"]], "gpu-3": []}


def test_a_jumps_key_is_checked_too(behind_jump: Row, tmp_path: Path) -> None:
    pins(behind_jump, gpu_1=make_key(tmp_path / "other").with_suffix(".pub").read_text().split()[1])
    assert same_as_a_session_says(behind_jump.fleet, behind_jump.hosts[2]).code == "host.foreign_key"
    assert all(one.server.logins == [] for one in behind_jump.played.values())


def test_a_connection_that_breaks_under_a_command_is_told(row: Row) -> None:
    row.played["gpu-1"].tell("cutover", RUNNING, seconds=60)
    cut = threading.Thread(target=break_when_asked, args=(row.played["gpu-1"], "cutover"))
    cut.start()
    done = carry_out(row.fleet, [cutover("gpu-1", "chat.0"), cutover("gpu-2", "chat.0")], discard)
    cut.join()
    assert code_of(done["gpu-1", "cutover", "chat.0"]) == "host.connection_lost"
    assert done["gpu-2", "cutover", "chat.0"] == RUNNING


def break_when_asked(played: Played, verb: str) -> None:
    when_asked(played, verb)
    for transport in played.server.transports:
        transport.close()


IMPATIENT = """
import json, sys
from opsctl.engines import pyinfra_worker as worker
worker.TIMEOUT_S = 2.0
worker.run(worker.read_job(sys.stdin.readline()), lambda event, **more: print(json.dumps([event, more])))
"""


def test_a_command_without_end_is_given_up(row: Row) -> None:
    row.played["gpu-1"].tell("state", {}, seconds=60)
    said = script_in_worker(IMPATIENT, Job(row.fleet, ("gpu-1", "gpu-2")))
    events = [json.loads(line) for line in said.splitlines()]
    assert [more["error"]["code"] for event, more in events if event == "error"] == ["host.timed_out"]
    assert [more["host"] for event, more in events if event == "document"] == ["gpu-2"]


def script_in_worker(script: str, job: Job) -> str:
    done = subprocess.run([sys.executable, "-c", script], input=write_job(job), capture_output=True, text=True,
                          check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


COUNT_SOCKETS = """
import os, sys
from opsctl.engines import pyinfra_worker as worker

def sockets():
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return sum(os.path.lexists(link) and os.readlink(link).startswith("socket:") for link in links)

job = worker.read_job(sys.stdin.readline())
before, counts = sockets(), []
worker.run(job, lambda event, **more: counts.append(sockets()))
print(before, max(counts), sockets())
"""


def test_no_connection_is_left_open(behind_jump: Row) -> None:
    """pyinfra's own disconnect leaves all of them."""
    job = Job(behind_jump.fleet, ("gpu-1", "gpu-2", "gpu-3"))
    before, most, after = map(int, script_in_worker(COUNT_SOCKETS, job).split())
    assert (most > before, after) == (True, before)


def test_two_runs_at_once_do_not_meet(row: Row) -> None:
    """In one process they would: pyinfra's state is one of the whole process."""
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(carry_out, row.fleet, [stage("gpu-1"), stage("gpu-2")], discard)
        second = pool.submit(carry_out, row.fleet, [cutover("gpu-2", "chat.0"), cutover("gpu-3", "chat.0")], discard)
        assert set(first.result()) == {("gpu-1", "stage", V2), ("gpu-2", "stage", V2)}
        assert set(second.result()) == {("gpu-2", "cutover", "chat.0"), ("gpu-3", "cutover", "chat.0")}
        assert {str(answer) for answer in (first.result() | second.result()).values()} == {str(RUNNING)}


def test_a_prepared_worker_does_one_job_and_another_takes_its_place(row: Row) -> None:
    with Worker() as worker:
        worker.prepare()
        first = pid_of(worker)
        worker.prepare()
        assert pid_of(worker) == first
        assert len(gather(row.fleet, row.hosts, worker=worker)) == 3
        worker.prepare()
        assert pid_of(worker) != first
        os.kill(pid_of(worker), signal.SIGKILL)
        os.waitid(os.P_PID, pid_of(worker), os.WEXITED | os.WNOWAIT)
        assert isinstance(gather(row.fleet, row.hosts, worker=worker)["gpu-1"], HostFacts)
        worker.prepare()
        last = pid_of(worker)
    assert not Path(f"/proc/{last}").exists()


def pid_of(worker: Worker) -> int:
    process = worker._process
    assert process is not None
    return process._process.pid


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_worker_that_is_killed_is_told_for_each_order_that_was_not_answered(row: Row, number: signal.Signals
                                                                              ) -> None:
    """And it goes at once: pyinfra's own takes long to notice SIGINT."""
    row.played["gpu-2"].tell("cutover", RUNNING, seconds=60)
    orders = [stage("gpu-1"), cutover("gpu-2", "chat.0")]
    with Worker() as worker:
        worker.prepare()
        pid = pid_of(worker)
        killed: list[float] = []

        def kill() -> None:
            when_asked(row.played["gpu-2"], "cutover")
            killed.append(time.monotonic())
            os.kill(pid, number)

        killer = threading.Thread(target=kill)
        killer.start()
        done = carry_out(row.fleet, orders, discard, worker=worker)
        killer.join()
    assert time.monotonic() - killed[0] < SOON_S
    answers = [done[order.key] for order in orders]
    lost = answers[1]
    assert isinstance(lost, OpsctlError)
    assert lost.code == "pyinfra.stopped"
    assert number.name in lost.message
    assert "same command again" in lost.hint


def test_a_silent_worker_is_given_up(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyinfra, "SILENCE_S", 2.0)
    row.played["gpu-1"].tell("state", {}, seconds=50)
    assert code_of(gather(row.fleet, row.hosts[:1])["gpu-1"]) == "pyinfra.stopped"


def test_ctrl_c_ends_the_worker(row: Row) -> None:
    row.played["gpu-1"].tell("stage", RUNNING, seconds=60)
    previous = signal.signal(signal.SIGALRM, _interrupt)
    worker = Worker()
    worker.prepare()
    pid = pid_of(worker)
    signal.setitimer(signal.ITIMER_REAL, 3.0)
    try:
        with pytest.raises(KeyboardInterrupt), worker:
            carry_out(row.fleet, [stage("gpu-1")], discard, worker=worker)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert not Path(f"/proc/{pid}").exists()


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


CONTROLLER = """
import signal, sys
for number in map(int, sys.argv[1:]):
    signal.signal(number, signal.SIG_IGN)  # and whoever is started from here inherits that
from opsctl.engines import pyinfra
from opsctl.engines.pyinfra_job import read_job
from opsctl.engines.events import discard
job = read_job(sys.stdin.readline())
with pyinfra.Worker() as worker:
    worker.prepare()
    print(worker._process._process.pid, flush=True)
    pyinfra.carry_out(job.fleet, job.orders, discard, worker=worker)
"""


@pytest.mark.parametrize("ignored", [[], [signal.SIGTERM, signal.SIGINT]])
def test_the_worker_dies_with_its_controller(row: Row, ignored: list[int]) -> None:
    row.played["gpu-1"].tell("stage", RUNNING, seconds=60)
    controller = subprocess.Popen([sys.executable, "-c", CONTROLLER, *(str(int(number)) for number in ignored)],
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert controller.stdin
    assert controller.stdout
    controller.stdin.write(write_job(Job(row.fleet, ("gpu-1",), orders=(stage("gpu-1"),))))
    controller.stdin.close()
    pid = int(controller.stdout.readline())
    when_asked(row.played["gpu-1"], "stage")
    controller.kill()
    controller.wait()
    controller.stdout.close()
    until = time.monotonic() + SOON_S
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < until, "the worker lives on"
        threading.Event().wait(0.02)


def test_a_job_survives_its_way_and_carries_no_variables(row: Row) -> None:
    job = Job(row.fleet, ("gpu-1",), (("chat", V2),), (stage("gpu-1"), cutover("gpu-1", "chat.0"), gc("gpu-1")))
    line = write_job(job)
    again = read_job(line)
    assert "not to be carried" not in line
    assert (again.chosen, again.plans, again.orders) == (job.chosen, job.plans, job.orders)
    assert [dataclasses.replace(host, variables={}) for host in row.hosts] == list(again.fleet.hosts)
    assert again.fleet.known_hosts == row.fleet.known_hosts


def test_a_worker_without_a_job_ends(tmp_path: Path) -> None:
    with socket.socket() as unused:
        done = subprocess.run([sys.executable, "-P", "-m", "opsctl.engines.pyinfra_worker"], stdin=subprocess.DEVNULL,
                              env={**os.environ, EVENTS_FD: str(unused.fileno())}, capture_output=True, check=False,
                              timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_files_of_the_working_folder_are_no_modules(row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "json.py").write_text("raise RuntimeError\n")
    (tmp_path / "pyinfra.py").write_text("raise RuntimeError\n")
    monkeypatch.chdir(tmp_path)
    assert isinstance(gather(row.fleet, row.hosts)["gpu-1"], HostFacts)


def test_the_command_line_never_has_pyinfra_or_gevent(row: Row) -> None:
    script = ("import sys\nimport opsctl.cli.main, opsctl.engines.pyinfra, opsctl.engines.session\n"
              "print(*sorted({name.partition('.')[0] for name in sys.modules}))")
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"gevent", "pyinfra", "ansible"} & set(loaded)


def test_the_worker_never_has_ansible(row: Row) -> None:
    script = ("import opsctl.engines.pyinfra_worker, sys\n"
              "print(*sorted({name.partition('.')[0] for name in sys.modules}))")
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert "ansible" not in loaded
    assert "pyinfra" in loaded


