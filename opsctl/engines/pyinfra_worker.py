"""One run of pyinfra in a process of its own: a job as JSON on standard input, what came of it as JSON lines on a
descriptor of its own. ``pyinfra.py`` starts it; nothing else imports it, because of its first act.
"""

from gevent import monkey

monkey.patch_all()  # before anything is imported that waits

import getpass  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Iterable, Mapping  # noqa: E402
from contextlib import suppress  # noqa: E402
from typing import Any  # noqa: E402

import gevent  # noqa: E402
import pyinfra  # noqa: E402
from fabric import Connection  # noqa: E402
from paramiko import SSHException  # noqa: E402
from pyinfra.api import BaseStateCallback, Config, Inventory, State, StringCommand  # noqa: E402
from pyinfra.api import Host as PyinfraHost  # noqa: E402
from pyinfra.api.connect import connect_all, disconnect_all  # noqa: E402
from pyinfra.api.exceptions import ConnectError, PyinfraError  # noqa: E402
from pyinfra.api.operations import run_ops  # noqa: E402
from pyinfra.api.state import StateStage  # noqa: E402
from pyinfra.connectors import local, ssh  # noqa: E402
from pyinfra.connectors.util import CommandOutput  # noqa: E402
from pyinfra.context import ctx_config, ctx_host, ctx_inventory, ctx_state  # noqa: E402

from opsctl.engines import pyinfra_parts as parts  # noqa: E402
from opsctl.engines.pyinfra_job import EVENTS_FD, Job, read_job  # noqa: E402
from opsctl.engines.session import Completed, connect, disconnect, lost, no_sudo, timed_out  # noqa: E402
from opsctl.errors import OpsctlError  # noqa: E402
from opsctl.fleet.model import Fleet, Host  # noqa: E402
from opsctl.releases.remote import HOST_PROGRAM, TIMEOUT_S, interpret  # noqa: E402

PARALLEL = 64  # hosts at once; each takes one or two descriptors and 1 MB
LAST = "opsctl_last"  # what the last command on a host left: Completed or OpsctlError

Emit = Callable[..., None]


class NotConnectedError(ConnectError):
    """A host that was not connected, with the reason as a person is told."""

    def __init__(self, error: OpsctlError) -> None:
        super().__init__(error.message)
        self.error = error


class Ssh(ssh.SSHConnector):
    """pyinfra's own connector on the connection that sessions have: strict keys at every hop, no delay, no prompt."""

    connection: Connection | None = None

    def connect(self) -> None:
        try:
            self.connection = connect(_fleet(self.host), _host(self.host))
        except OpsctlError as error:
            raise NotConnectedError(error) from error
        self.client = self.connection.client
        self.host.data._sudo = self.connection.user != "root"

    def disconnect(self) -> None:
        super().disconnect()
        connection, self.connection = self.connection, None
        if connection is not None:  # pyinfra leaves it open
            disconnect(connection)


class Local(local.LocalConnector):
    """This machine."""

    def connect(self) -> None:
        self.host.data._sudo = os.geteuid() != 0


def once(host: PyinfraHost, _: Mapping[str, Any], execute: Callable[[], tuple[int, CommandOutput]]
         ) -> tuple[int, CommandOutput]:
    """Runs a command and keeps what it left. In place of pyinfra's own, which asks the terminal for a sudo password.

    Raises:
        OSError, SSHException: it did not end, or nobody knows; pyinfra takes these for a failure of this host.
    """
    try:
        code, output = execute()
    except TimeoutError:
        host.connector_data[LAST] = timed_out(_host(host), [HOST_PROGRAM], TIMEOUT_S)
        raise
    except (OSError, EOFError, SSHException) as error:
        host.connector_data[LAST] = lost(_host(host), error)
        raise SSHException(str(error)) from error
    broken = _broken(host) if code == -1 else None
    host.connector_data[LAST] = broken or Completed(code if code >= 0 else 255, output.stdout, output.stderr)
    return code, output


ssh.execute_command_with_sudo_retry = local.execute_command_with_sudo_retry = once  # type: ignore[assignment]


def _broken(host: PyinfraHost) -> OpsctlError | None:
    """A command without an exit code: its connection broke, which shows in a moment, or a signal ended it."""
    connection = getattr(host.connector, "connection", None)
    if connection is None:
        return None
    connection.transport.join(0.5)
    if connection.transport.is_active():
        return None
    return lost(_host(host), connection.transport.get_exception() or EOFError("it was closed"))


def heard(host: PyinfraHost, verb: str) -> dict[str, Any]:
    """The document that the last command on a host left.

    Raises:
        OpsctlError: of the host's own kind and words, or why it could not be asked.
    """
    last = host.connector_data[LAST]
    if isinstance(last, OpsctlError):
        raise last
    if host.data._sudo and last.returncode == 127 and "sudo" in last.stderr:
        raise no_sudo(_host(host), _user(host), last.stderr, "sudo is not installed there")
    if host.data._sudo and last.returncode == 1 and "sudo:" in last.stderr:
        allowed, said = host.run_shell_command(StringCommand("true"), _sudo=True, _timeout=int(TIMEOUT_S))
        if not allowed:  # asked of sudo itself, because its words come in the host's language
            raise no_sudo(_host(host), _user(host), said.stderr)
    return interpret(last, verb, host.name)


class Results(BaseStateCallback):
    """Tells what came of connecting and of each order."""

    def __init__(self, job: Job, emit: Emit) -> None:
        self._orders = {name: [number for number, order in enumerate(job.orders) if order.host == name]
                        for name in job.chosen}
        self._job = job
        self._emit = emit
        self._told: set[int] = set()

    def host_connect_error(self, state: State, host: PyinfraHost, error: Exception) -> None:  # type: ignore[override]
        if not isinstance(error, NotConnectedError):
            raise error
        self._emit("error", host=host.name, error=_document(error.error))

    def operation_host_start(self, state: State, host: PyinfraHost, op_hash: str) -> None:  # type: ignore[override]
        if op_hash in state.ops[host]:  # pyinfra says so of hosts too that it will skip
            self._emit("begins", host=host.name, order=self._number(host, op_hash))

    def operation_end(self, state: State, op_hash: str) -> None:  # type: ignore[override]
        """Tells of one operation on all hosts. When it failed on all that were left, pyinfra does not call this."""
        for host in state.inventory:
            data = state.ops[host].get(op_hash)
            if data is None or not data.operation_meta.is_complete():
                continue
            number = self._number(host, op_hash)
            if number not in self._told:
                self._told.add(number)
                self._tell(host, number, acted=data.operation_meta.did_error() or data.operation_meta.did_change())

    def _number(self, host: PyinfraHost, op_hash: str) -> int:
        return self._orders[host.name][host.op_hash_order.index(op_hash)]

    def _tell(self, host: PyinfraHost, number: int, *, acted: bool) -> None:
        if not acted:
            self._emit("nothing", host=host.name, order=number)
            return
        try:
            self._emit("document", host=host.name, order=number,
                       document=heard(host, self._job.orders[number].operation))
        except OpsctlError as error:
            self._emit("error", host=host.name, order=number, error=_document(error))


def run(job: Job, emit: Emit) -> None:
    """Does the job on all its hosts; what fails on one is told and keeps no other from going on."""
    pyinfra.is_cli = True  # operations are ordered by where they are called, and not by their number on each host
    state = _state(job)
    results = Results(job, emit)
    state.add_callback_handler(results)
    ctx_state.set(state)
    ctx_inventory.set(state.inventory)
    ctx_config.set(state.config)
    try:
        state.set_stage(StateStage.Connect)
        with _while_hosts_are_left(state):
            connect_all(state)
        state.set_stage(StateStage.Prepare)
        if job.orders:
            _each(state, lambda host: _prepare(host, [order for order in job.orders if order.host == host.name]))
            state.set_stage(StateStage.Execute)
            with _while_hosts_are_left(state):
                run_ops(state)
            for op_hash in state.get_op_order():
                results.operation_end(state, op_hash)
        else:
            _each(state, lambda host: _facts(host, job, emit))
    finally:
        state.set_stage(StateStage.Disconnect)
        disconnect_all(state)
    emit("end")


def _state(job: Job) -> State:
    data = {"opsctl_fleet": job.fleet, "_timeout": int(TIMEOUT_S)}
    inventory = Inventory((list(job.chosen), data))
    for host in inventory:
        host.connector_cls = Local if _host(host).connection == "local" else Ssh
    return State(inventory, Config(PARALLEL=min(len(job.chosen), PARALLEL)), check_for_changes=False)


def _each(state: State, work: Callable[[PyinfraHost], None]) -> None:
    """Works on all hosts at once. pyinfra itself would take them one after the other."""

    def one(host: PyinfraHost) -> None:
        with ctx_config.use(state.config.copy()), ctx_host.use(host):
            work(host)

    gevent.joinall([state.pool.spawn(one, host) for host in state.inventory.get_active_hosts()], raise_error=True)


def _prepare(host: PyinfraHost, orders: Iterable[Any]) -> None:
    for order in host.loop(orders):
        match order.operation:  # a line each: that is how operations are told apart
            case "stage":
                parts.stage(**order.arguments)
            case "cutover":
                parts.cutover(**order.arguments)
            case "gc":
                parts.gc(**order.arguments)
            case other:
                raise ValueError(f"{other} is no operation")


def _facts(host: PyinfraHost, job: Job, emit: Emit) -> None:
    try:
        emit("document", host=host.name, document=_fact(host, "state", parts.HostState))
        for service, release in job.plans:
            emit("document", host=host.name, plan=[service, release],
                 document=_fact(host, "stage-plan", parts.StagePlan, service=service, release=release))
    except OpsctlError as error:
        emit("error", host=host.name, error=_document(error))


def _fact(host: PyinfraHost, verb: str, fact: type[parts.HostDocument], **arguments: Any) -> parts.Document:
    found = host.get_fact(fact, **arguments, _ignore_errors=True)  # a failure is told by the caller, with its reason
    return heard(host, verb) if found is None else found


class _while_hosts_are_left(suppress):  # noqa: N801 - a context manager, as suppress is
    """pyinfra raises when no host is left, and each has told why by then; anything else goes on."""

    def __init__(self, state: State) -> None:
        super().__init__(PyinfraError)
        self._state = state

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        return not self._state.active_hosts and bool(super().__exit__(kind, error, trace))


def _fleet(host: PyinfraHost) -> Fleet:
    fleet: Fleet = host.data.opsctl_fleet
    return fleet


def _host(host: PyinfraHost) -> Host:
    return _fleet(host).host(host.name)


def _user(host: PyinfraHost) -> str:
    connection = getattr(host.connector, "connection", None)
    return str(connection.user) if connection else getpass.getuser()


def _document(error: OpsctlError) -> dict[str, Any]:
    return {**error.as_document(), "exit_code": int(error.exit_code)}


def main() -> int:
    """Waits for a job, does it, and is gone; nothing when standard input ends without one."""
    for number in (signal.SIGINT, signal.SIGTERM):  # at once, and whatever whoever started us had ignored
        signal.signal(number, signal.SIG_DFL)
    text = sys.stdin.readline()
    if not text.endswith("\n"):
        return 0
    with os.fdopen(int(os.environ[EVENTS_FD]), "w", buffering=1) as out:

        def emit(event: str, **fields: Any) -> None:
            out.write(json.dumps({"event": event, **fields}) + "\n")

        run(read_job(text), emit)
    return 0


if __name__ == "__main__":
    sys.exit(main())
