# SPDX-License-Identifier: GPL-3.0-or-later
# This one file is GPL-3.0-or-later: ansible-core loads it, and it subclasses a class of ansible-core's.
# It imports nothing of opsctl's, and nothing of opsctl's imports it.
"""Writes one JSON line for each thing Ansible does, to the descriptor named in OPSCTL_EVENTS_FD."""

from __future__ import annotations

import json
import os
import time

from ansible.plugins.callback import CallbackBase

DOCUMENTATION = r"""
name: opsctl_events
type: stdout
short_description: one JSON event per line
description: Writes one JSON event per line to the descriptor named in the environment variable OPSCTL_EVENTS_FD.
extends_documentation_fragment: [default_callback]
"""

KEPT = ("msg", "rc", "stdout", "stderr", "module_stderr", "exception", "censored", "diff", "results")
TEXT_LIMIT = 4000


class CallbackModule(CallbackBase):
    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "stdout"
    CALLBACK_NAME = "opsctl_events"

    def __init__(self):
        super().__init__()
        descriptor = int(os.environ.get("OPSCTL_EVENTS_FD", "1"))
        self._out = os.fdopen(descriptor, "w", buffering=1, closefd=False, encoding="utf-8")

    def _emit(self, event, **fields):
        line = json.dumps({"t": round(time.time(), 3), "event": event, **fields}, default=str)
        self._out.write(line + "\n")

    def _result(self, event, result, **fields):
        outcome = result._result
        kept = {}
        for key in KEPT:
            value = outcome.get(key)
            if value in (None, "", [], {}) or key == "results":
                continue
            kept[key] = value[-TEXT_LIMIT:] if isinstance(value, str) else value
        label = ""
        if "item" in outcome:
            label = str(self._get_item_label(outcome))
        self._emit(event, host=result._host.get_name(), task=result._task.get_name(),
                   changed=bool(outcome.get("changed", False)), item=label, is_loop="results" in outcome,
                   **kept, **fields)

    def v2_playbook_on_play_start(self, play):
        self._emit("play", name=play.get_name())

    def v2_playbook_on_task_start(self, task, is_conditional):
        self._emit("task", task=task.get_name(), path=task.get_path(), action=task.action)

    def v2_playbook_on_handler_task_start(self, task):
        self._emit("task", task=task.get_name(), path=task.get_path(), action=task.action)

    def v2_runner_on_start(self, host, task):
        self._emit("host_start", host=host.get_name(), task=task.get_name())

    def v2_runner_on_ok(self, result):
        self._result("ok", result)

    def v2_runner_item_on_ok(self, result):
        self._result("item_ok", result)

    def v2_runner_on_failed(self, result, ignore_errors=False):
        self._result("failed", result, ignored=ignore_errors)

    def v2_runner_item_on_failed(self, result):
        self._result("item_failed", result)

    def v2_runner_on_skipped(self, result):
        self._result("skipped", result)

    def v2_runner_on_unreachable(self, result):
        self._result("unreachable", result)

    def v2_playbook_on_no_hosts_matched(self):
        self._emit("no_hosts_matched")

    def v2_playbook_on_stats(self, stats):
        self._emit("stats", hosts={host: stats.summarize(host) for host in sorted(stats.processed)})
