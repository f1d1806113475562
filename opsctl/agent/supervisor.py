"""``opsctl-agent``: the load balancer's voice, the exporter of this host's GPUs (``gpu/exporter.py``), and their guard
(``guard/keeper.py``).

One event loop. Systemd is asked in the background, so an answer never waits for it; drains, marks and the current
release are a few small files, read as they are when the question comes. However exporter or guard fail, the voice goes
on.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Protocol

from opsctl.agent import systemd, unfinished
from opsctl.agent.drains import FULL, boot_clock, least_weight, read_drains
from opsctl.agent.gpu.exporter import Exporter
from opsctl.agent.gpu.reader import View
from opsctl.agent.guard.hands import Hands
from opsctl.agent.guard.keeper import Keeper
from opsctl.agent.paths import Paths
from opsctl.agent.setter.client import Setter
from opsctl.agent.settings import instance_names, read_settings
from opsctl.agent.state import agent_version
from opsctl.agent.voice import Facts, answer
from opsctl.errors import OpsctlError

POLL_S = 0.5
SYSTEMD_TIMEOUT_S = 5.0
QUESTION_TIMEOUT_S = 2.0
QUESTION_LIMIT = 256
AGAIN_S = 10.0
LEAVE_S = 5.0


class Guarded(Protocol):
    """What the guard says of an instance."""

    def weight(self, instance: str) -> int: ...

    def down(self, instance: str) -> str: ...

    def stopped(self, instance: str) -> bool: ...


class Unguarded:
    """Nothing is known against any instance."""

    def weight(self, _: str) -> int:
        return FULL

    def down(self, _: str) -> str:
        return ""

    def stopped(self, _: str) -> bool:
        return False


def look(paths: Paths, instance: str, active: str, guard: Guarded) -> Facts:
    """The facts of one instance now; ``active`` is its unit's last known ActiveState."""
    if "/" in instance or not (paths.placements / f"{instance}.toml").is_file():
        return Facts(placed=False)
    service, _, index = instance.rpartition(".")
    try:
        release = str(paths.current(service, int(index)).readlink())
    except (OSError, ValueError):
        release = ""
    cut_off = unfinished.of_earlier_boot(paths, instance)
    return Facts(placed=True, release=release, active=active, draining=paths.draining(instance).exists(),
                 unfinished=cut_off, tried=not cut_off and has_record(paths, instance),
                 weight=min(least_weight(read_drains(paths, instance)), guard.weight(instance)),
                 cannot=guard.down(instance), stopped=guard.stopped(instance))


def has_record(paths: Paths, instance: str) -> bool:
    """Whether the undo of a first start or cutover of ``instance`` is written down."""
    return paths.undo(instance).exists()


class Voice:
    """Serves the agent-check protocol on one TCP address."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self._active: dict[str, str] = {}
        self.guard: Guarded = Unguarded()

    def active(self, instance: str) -> str:
        """The last known ActiveState of its unit, empty when there is none."""
        return self._active.get(instance, "")

    def answer(self, instance: str) -> str:
        return answer(look(self._paths, instance, self.active(instance), self.guard))

    async def serve(self, address: str, port: int) -> asyncio.Server:
        return await asyncio.start_server(self._one, address, port, limit=QUESTION_LIMIT, reuse_address=True)

    async def poll(self) -> None:
        """Refreshes what systemd says; what it does not say stays as it was."""
        instances = instance_names(self._paths)
        units = [f"inference@{instance}.service" for instance in instances]
        if units:
            found = systemd.parse_show(await _output(systemd.show_arguments(units)), units)
            known = {instance: found[unit].active for instance, unit in zip(instances, units, strict=True)}
            self._active.update({instance: active for instance, active in known.items() if active})

    async def poll_for_ever(self) -> None:
        complained = False
        while True:
            try:
                await self.poll()
                complained = False
            except (OSError, asyncio.TimeoutError) as error:
                if not complained:
                    _say(f"systemd does not answer ({error or 'timeout'}); going on with what was known")
                complained = True
            await asyncio.sleep(POLL_S)

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.TimeoutError, ValueError):
            question = await asyncio.wait_for(reader.readline(), QUESTION_TIMEOUT_S)
            writer.write(self.answer(question.decode(errors="replace").strip()).encode() + b"\n")
            await writer.drain()
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def _output(argv: list[str]) -> str:
    process = await asyncio.create_subprocess_exec(
        *argv, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env=systemd.ENVIRONMENT)
    try:
        out, err = await asyncio.wait_for(process.communicate(), SYSTEMD_TIMEOUT_S)
    except asyncio.TimeoutError:
        process.kill()
        raise
    if process.returncode:
        raise OSError(err.decode(errors="replace").strip())
    return out.decode(errors="replace")


def notify(state: str) -> None:
    """``READY=1``, ``WATCHDOG=1``: tells systemd, if it wants to hear."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)


async def _watchdog() -> None:
    every_s = int(os.environ.get("WATCHDOG_USEC", "0")) / 2e6
    while every_s:
        notify("WATCHDOG=1")
        await asyncio.sleep(every_s)


async def _keep(what: str, work: Callable[[], Awaitable[None]]) -> None:
    """Does ``work`` for ever; when it breaks it is said and begun again, and nobody else notices."""
    while True:
        try:
            await work()
            return
        except Exception as error:  # noqa: BLE001 - the voice goes on, whatever happened there
            _say(f"{what}: unexpected {type(error).__name__}: {error}; beginning again")
            await asyncio.sleep(AGAIN_S)


def _shown(keeper: Keeper, view: View) -> None:
    """A sample goes to the guard; whatever becomes of it there, the reader is heard on."""
    try:
        keeper.see(view.gpus_now(), view.good if view.good is not None else boot_clock())
    except Exception as error:  # noqa: BLE001 - the guard's own loop meets it too, and begins again
        _say(f"guard: unexpected {type(error).__name__}: {error}")


async def supervise(paths: Paths) -> None:
    """Serves until SIGTERM."""
    settings = read_settings(paths)
    voice = Voice(paths)
    with suppress(OSError, asyncio.TimeoutError):  # the loop below says so if it stays that way
        await voice.poll()
    server = await voice.serve(settings.listen, settings.agent_check_port)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    hands = Hands(Setter(paths.setter_socket), _say)
    keeper = Keeper(paths, settings.host, hands, voice.active, _say)
    voice.guard = keeper
    exporter = Exporter(paths, settings, agent_version(), _say, guard=lambda: keeper.document,
                        on_sample=lambda: _shown(keeper, exporter.reader.view))
    background = [asyncio.create_task(voice.poll_for_ever()), asyncio.create_task(_watchdog()),
                  asyncio.create_task(_keep("GPU reader", exporter.tend)),
                  asyncio.create_task(_keep("kernel log", exporter.hear_kernel)),
                  asyncio.create_task(_keep("metrics", exporter.serve)),
                  asyncio.create_task(_keep("guard", keeper.tend))]
    _say(f"answering for {settings.host} on {settings.listen}:{settings.agent_check_port}")
    notify("READY=1")
    await stop.wait()
    notify("STOPPING=1")
    for task in background:
        task.cancel()
    await asyncio.gather(*background, return_exceptions=True)
    with suppress(OSError, asyncio.TimeoutError):  # the setter does it by itself a little later
        await asyncio.wait_for(keeper.leave(), LEAVE_S)
    server.close()


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def main() -> int:
    """The ``opsctl-agent`` command."""
    try:
        asyncio.run(supervise(Paths()))
    except OpsctlError as error:
        _say(f"{error.message} {error.hint}")
        return int(error.exit_code)
    except OSError as error:
        _say(f"cannot listen: {error}")
        time.sleep(1)  # the address may still be coming up at boot; systemd starts us again
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
