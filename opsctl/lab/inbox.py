"""Whom the alerts of a lab reach: a webhook and a mail server on ops-1, which keep what they get in one file.

This file is the program, too: it is put on the machine and run there by its own Python, so it needs nothing else.
"""

from __future__ import annotations

import asyncio
import datetime
import email
import email.policy
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.message import EmailMessage
from pathlib import Path
from typing import Any

WEBHOOK_PORT, SMTP_PORT = 8099, 8025
KEPT = "var/log/opsctl-lab-inbox.ndjson"  # below the machine's root
LIMIT = 1_000_000  # bytes of one message
BOTH = ("webhook", "mail")
LOOK_EVERY_S = 0.5
PROGRAM, UNIT = "usr/local/lib/opsctl-lab-inbox.py", "opsctl-lab-inbox.service"
UNIT_TEXT = f"""\
# Written by opsctl lab up: the inbox of the person on call.
[Unit]
Description=lab: webhook on port {WEBHOOK_PORT}, mail on port {SMTP_PORT}
[Service]
ExecStart=/usr/bin/python3 /{PROGRAM} /{KEPT}
Restart=always
[Install]
WantedBy=multi-user.target
"""


def of_webhook(document: dict[str, Any]) -> dict[str, Any]:
    """What is kept of an Alertmanager's POST. Pure."""
    alerts = [{**{key: alert.get("labels", {}).get(key, "") for key in ("alertname", "severity", "host", "gpu", "UUID",
                                                                       "service", "inference_instance")},
               "status": alert.get("status", ""), "summary": alert.get("annotations", {}).get("summary", ""),
               "action": alert.get("annotations", {}).get("action", "")} for alert in document.get("alerts", [])]
    return {"by": "webhook", "status": document.get("status", ""), "alerts": alerts}


def of_mail(recipients: list[str], message: EmailMessage) -> dict[str, Any]:
    """What is kept of a mail; Alertmanager's say in their subject whether it is over. Pure."""
    body = message.get_body(("plain",))
    text = str(body.get_content()).replace("\r\n", "\n") if body is not None else ""
    subject = str(message["Subject"])
    return {"by": "mail", "status": "resolved" if subject.startswith("[over]") else "firing", "to": recipients,
            "subject": subject, "text": text}


def last_statuses(messages: list[dict[str, Any]], alert: str) -> dict[str, str]:
    """What the webhook and the mail last said of an alert: ``{"webhook": "firing", "mail": "resolved"}``. Pure."""
    found = {}
    for one in messages:
        names = {each["alertname"] for each in one["alerts"]} if one["by"] == "webhook" else one["subject"].split()
        if alert in names:
            found[one["by"]] = one["status"]
    return found


def read(root: Path) -> list[dict[str, Any]]:
    """The messages that a machine's inbox has, oldest first; ``root``: the machine's file system."""
    try:
        text = (root / KEPT).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.split("\n")[:-1]]


def about(messages: list[dict[str, Any]], alert: str) -> list[dict[str, Any]]:
    """Those that tell of an alert. Pure."""
    return [one for one in messages if last_statuses([one], alert)]


def last_words(messages: list[dict[str, Any]], alert: str) -> list[dict[str, Any]]:
    """The last that the webhook and the mail said of an alert, in this order. Pure."""
    found = {one["by"]: one for one in about(messages, alert)}
    return [found[by] for by in BOTH if by in found]


@dataclass(frozen=True)
class Waited:
    """What the inbox had in the end, whether that is what was waited for, and how long that took."""

    messages: list[dict[str, Any]]
    came: bool
    waited_s: float


def wait_for(root: Path, alert: str, status: str, within_s: float, tell: Callable[[float], object]) -> Waited:
    """Waits until webhook and mail last said ``status`` of an alert, ``within_s`` seconds at the most.

    ``tell`` is called before each pause with the seconds that were waited.
    """
    began = time.monotonic()
    while True:
        messages = read(root)
        waited_s = time.monotonic() - began
        came = last_statuses(messages, alert) == dict.fromkeys(BOTH, status)
        if came or waited_s > within_s:
            return Waited(messages, came, waited_s)
        tell(waited_s)
        time.sleep(LOOK_EVERY_S)


def install(root: Path) -> None:
    """Puts the program and its unit on a machine's disk, enabled."""
    (root / PROGRAM).parent.mkdir(parents=True, exist_ok=True)
    (root / PROGRAM).write_bytes(Path(__file__).read_bytes())
    (root / "etc/systemd/system" / UNIT).write_text(UNIT_TEXT)
    wanted = root / "etc/systemd/system/multi-user.target.wants"
    wanted.mkdir(exist_ok=True)
    (wanted / UNIT).unlink(missing_ok=True)
    (wanted / UNIT).symlink_to(f"/etc/systemd/system/{UNIT}")


class _Inbox:
    def __init__(self, path: Path) -> None:
        self._path = path

    def _keep(self, one: dict[str, Any]) -> None:
        at = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"at": at, **one}) + "\n")

    async def webhook(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One POST; any other request is none of ours."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
        size = int(headers.get("content-length", "0"))
        well = head[0].startswith("POST ") and 0 < size <= LIMIT
        if well:
            self._keep(of_webhook(json.loads(await reader.readexactly(size))))
        writer.write(b"HTTP/1.1 " + (b"200 OK" if well else b"400 Bad Request")
                     + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    async def smtp(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """As much of SMTP (RFC 5321) as a sender without login or TLS needs."""
        async def say(line: str) -> None:
            writer.write(line.encode() + b"\r\n")
            await writer.drain()

        await say("220 inbox.lab ESMTP")
        recipients: list[str] = []
        while line := (await reader.readline()).decode("latin-1").strip():
            verb = line[:4].upper()
            if verb == "QUIT":
                await say("221 bye")
                break
            if verb == "DATA":
                await say("354 go on")
                text = b""
                while (part := await reader.readline()) not in (b".\r\n", b""):
                    text += part.removeprefix(b".")
                message: EmailMessage = email.message_from_bytes(text, policy=email.policy.default)
                self._keep(of_mail(recipients, message))
                recipients = []
            elif verb == "RCPT":
                recipients.append(line.partition("<")[2].rpartition(">")[0])
            await say("250 ok")
        writer.close()


async def _serve(path: Path) -> None:
    inbox = _Inbox(path)
    servers = [await asyncio.start_server(inbox.webhook, "0.0.0.0", WEBHOOK_PORT),  # noqa: S104 - no way into a lab
               await asyncio.start_server(inbox.smtp, "0.0.0.0", SMTP_PORT)]  # noqa: S104
    await asyncio.gather(*(server.serve_forever() for server in servers))


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1])))
