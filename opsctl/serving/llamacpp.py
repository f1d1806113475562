"""llama.cpp through the ``xllamacpp`` wheel: the embedded default engine. CPU in the published wheel, GGUF files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from opsctl.errors import RefusedError
from opsctl.serving.adapter import MAXIMUM_DRAIN_S, Adapter, Command, Launch, Option, Value, served_names

SERVER = Path(__file__).parent / "llamacpp_server.py"
LATER_SHARD = re.compile(r"-(\d{5})-of-\d{5}\.gguf$")

OPTIONS = (
    Option("max_model_len", "integer", 4096, "tokens of one request, prompt and answer", 64, 10_000_000),
    Option("parallel", "integer", 4, "requests answered at the same time; more wait", 1, 1024),
    Option("threads", "integer", 0, "CPU threads of the engine; 0: as many as cores", 0, 1024),
    Option("gpu_layers", "integer", -1, "model layers on the GPU; -1: as many as fit", -1, 10_000),
    Option("model_file", "text", "", "which GGUF to load when the release has several"),
    Option("chat_template_file", "text", "", "a Jinja file of the release instead of the model's own template"),
    Option("start_timeout_s", "integer", 600, "how long loading may take before a start counts as failed", 5, 7200),
    Option("drain_timeout_s", "integer", 300, "how long running requests may take to finish on a stop", 0,
           MAXIMUM_DRAIN_S),
)


def model_file(paths: Sequence[str], arguments: Mapping[str, Value]) -> str:
    """The GGUF to load: the named one, or the only one (of a model in shards the first).

    Raises:
        RefusedError: none, several, or the named one is not there.
    """
    named = str(arguments.get("model_file", ""))
    candidates = [path for path in paths if path.endswith(".gguf") and not _later_shard(path)]
    if named and named in paths:
        return named
    if named:
        raise RefusedError("release.no_model_file", f"model_file={named} is not a file of the release.",
                           hint="GGUF files: " + (", ".join(candidates) or "none"))
    candidates = [path for path in candidates if not PurePosixPath(path).name.startswith("mmproj")]
    if not candidates:
        raise RefusedError("release.no_model_file", "the engine llamacpp serves GGUF files, and the release has none.",
                           hint="convert the model with llama.cpp's convert_hf_to_gguf.py, then import the .gguf")
    if len(candidates) > 1:
        raise RefusedError("release.several_model_files",
                           "the release has several GGUF files: " + ", ".join(candidates) + ".",
                           hint=f"say which: --set model_file={candidates[0]}")
    return candidates[0]


def _later_shard(path: str) -> bool:
    shard = LATER_SHARD.search(path)
    return shard is not None and shard.group(1) != "00001"


def check(paths: Sequence[str], arguments: Mapping[str, Value], _version: str = "") -> None:
    """Refuses files that this engine cannot serve.

    Raises:
        RefusedError: no GGUF, several, or a named file that is not there.
    """
    model_file(paths, arguments)
    template = str(arguments.get("chat_template_file", ""))
    if template and template not in paths:
        raise RefusedError("release.no_model_file", f"chat_template_file={template} is not a file of the release.",
                           hint="put it beside the model and import the directory")


def command(launch: Launch) -> Command:
    """The argument vector of one engine process."""
    arguments = launch.arguments
    argv = [
        str(launch.environment / "bin" / "python"), "-I", str(SERVER),
        "--model", str(launch.files / model_file(launch.paths, arguments)),
        "--address", launch.address,
        "--port", str(launch.port),
        "--parallel", str(arguments["parallel"]),
        "--max-model-len", str(arguments["max_model_len"]),
        "--threads", str(arguments["threads"]),
        "--gpu-layers", str(arguments["gpu_layers"]),
        "--drain-timeout", str(arguments["drain_timeout_s"]),
    ]
    for name in served_names(launch.service, launch.release):
        argv += ["--name", name]
    if arguments["chat_template_file"]:
        argv += ["--chat-template-file", str(launch.files / str(arguments["chat_template_file"]))]
    return Command(tuple(argv), {"CUDA_VISIBLE_DEVICES": ",".join(launch.gpus)} if launch.gpus else {})


LLAMACPP = Adapter(
    name="llamacpp",
    module="xllamacpp",
    options=OPTIONS,
    check=check,
    command=command,
    health_path="/health",
    metrics_path="/metrics",
    running_metric="llamacpp:requests_processing",
    waiting_metric="llamacpp:requests_deferred",
    packages=("xllamacpp",),
)
