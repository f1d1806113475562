"""Renders templates as ansible.builtin.template does, without Ansible."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import urlsplit

import jinja2

from opsctl.resources import resource

FILTERS = {"to_json": json.dumps, "urlsplit": lambda url, part: getattr(urlsplit(url), part)}


def environment() -> jinja2.Environment:
    made = jinja2.Environment(trim_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined,
                              autoescape=False)  # noqa: S701 - configuration files, not HTML
    made.filters.update(FILTERS)
    return made


def render(template: str, **variables: object) -> str:
    """``template``: a path below the resources, ``templates/haproxy.cfg.j2``."""
    return environment().from_string(path_of(template).read_text()).render(**variables)


def path_of(name: str) -> Path:
    folder, _, rest = name.partition("/")
    return resource(folder) / rest
