"""The verbs of what lies on a host: releases brought, planned, removed."""

from __future__ import annotations

import argparse
from typing import Any

from opsctl.agent import gc, job, stage
from opsctl.agent.pace import LEAST_BYTES_PER_S, Pace, read_limit, write_limit
from opsctl.agent.paths import Paths
from opsctl.agent.settings import read_settings
from opsctl.agent.verbs import FOR_EVER_S, AddVerb, Arguments, folder, release_of, service, waiting, watch, work


def register(verb: AddVerb) -> None:
    one = verb("stage", _stage, "bring a release and its engine here, as a unit of its own; watch it")
    release_of(one)
    one.add_argument("--rate-limit", type=_rate, metavar="BYTES_PER_S",
                     help="of its files; given again, or left out, it counts for a stage that runs already")
    waiting(one, FOR_EVER_S)
    one = verb("stage-status", _stage_status, "how far staging is", acts=False)
    release_of(one)
    waiting(one, 0)
    release_of(verb("stage-plan", _plan, "what staging a release would do; writes nothing", acts=False))
    one = verb("gc", _gc, "remove a service's releases that nobody here serves, and engines that no release needs")
    one.add_argument("--service", required=True, type=service)
    one.add_argument("--keep", action="append", default=[], type=folder, metavar="VERSION-DIGEST12")
    one.add_argument("--dry-run", action="store_true", help="only tell what would go")
    release_of(verb("work-stage", _work_stage, "what the unit of stage runs", audited=False))


def _stage(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    read_settings(paths)
    name, verb = _stage_job(arguments)
    if stage.is_staged(paths, arguments.service, arguments.release):
        return {"state": "done", "result": {"changed": False, "release": arguments.release}}
    write_limit(paths.rate_limit(name), arguments.rate_limit)  # before it starts: its first byte counts
    job.start(paths, name, verb)
    return watch(paths, name, verb, arguments.wait_s)


def _stage_status(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    return watch(paths, *_stage_job(arguments), arguments.wait_s, raising=False)


def _stage_job(arguments: Arguments) -> tuple[str, list[str]]:
    """The job's name and what its unit runs."""
    return stage.job_name(arguments.service, arguments.release), [
        "work-stage", "--service", arguments.service, "--release", arguments.release]


def _plan(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    return stage.plan_stage(paths, read_settings(paths).gateway_url, arguments.service, arguments.release)


def _gc(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    return gc.collect(paths, arguments.service, arguments.keep, dry_run=arguments.dry_run)


def _work_stage(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    name, verb = _stage_job(arguments)
    limit = paths.rate_limit(name)
    return work(name, verb, paths, lambda reporter: stage.stage(
        paths, read_settings(paths).gateway_url, arguments.service, arguments.release, report=reporter.progress,
        doing=reporter.doing, pace=Pace(lambda: read_limit(limit))))


def _rate(text: str) -> int:
    value = int(text)
    if value < LEAST_BYTES_PER_S:
        raise argparse.ArgumentTypeError(f"{text} is below {LEAST_BYTES_PER_S} bytes per second")
    return value
