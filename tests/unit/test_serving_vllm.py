"""The vLLM adapter: argument vectors against what each version's own command line knows, versions, files, GPUs.

``fixtures/vllm/engine_matrix.csv`` lists the versions that opsctl means to serve; ``command_lines.csv`` says of each
version, read out of its wheel, which flags it lacks.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from opsctl.errors import ConfigurationError, RefusedError, UsageError
from opsctl.serving.adapter import Launch
from opsctl.serving.vllm import MODULE, OPTIONS, VLLM
from opsctl.serving.vllm_versions import features, fits_python, known, line_of, lines, newest, supports, version_key

FIXTURES = Path(__file__).parent / "fixtures" / "vllm"
FILES = ("config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "tokenizer.json",
         "chat.jinja")
# Every argument that puts a flag into the vector, with a value that every version of some age has.
MUCH = {"max_model_len": 8192, "max_num_batched_tokens": 4096, "quantization": "fp8", "enforce_eager": True,
        "enable_prefix_caching": "true", "enable_expert_parallel": True, "speculative_tokens": 1,
        "chat_template_file": "chat.jinja", "reasoning_parser": "deepseek_r1", "tool_call_parser": "deepseek_v3",
        "safetensors_load_strategy": "lazy"}


def rows(name: str) -> list[dict[str, str]]:
    with (FIXTURES / name).open(newline="") as file:
        return list(csv.DictReader(file))


COMMAND_LINES = {row["version"]: row for row in rows("command_lines.csv")}
FLAGS = set(COMMAND_LINES.pop("every")["lacks"].split())
VERSIONS = list(COMMAND_LINES)


def launch(version: str, given: Mapping[str, Any] = {}, **changes: Any) -> Launch:
    return replace(Launch(service="chat", release="v1-0123456789ab", files=Path("/r/files"), paths=FILES,
                          arguments=VLLM.arguments(given), address="10.0.0.11", port=8101, environment=Path("/e"),
                          version=version, agent_python=Path("/a/python")), **changes)


def engine_of(argv: tuple[str, ...]) -> tuple[str, ...]:
    return argv[argv.index("--") + 1:]


def possible(version: str) -> dict[str, Any]:
    """Of ``MUCH`` what this version has."""
    absent = {"--speculative-config": "speculative_tokens", "--safetensors-load-strategy": "safetensors_load_strategy"}
    return {name: value for name, value in MUCH.items()
            if name not in [absent[flag] for flag in absent if not supports(version, flag)]}


# Versions.

@pytest.mark.parametrize("row", [row for row in rows("engine_matrix.csv") if row["engine"] == "vllm"],
                         ids=lambda row: row["versions"])
def test_every_version_of_the_matrix_is_known(row: dict[str, str]) -> None:
    for version in row["versions"].split("-"):
        line = known(version)
        assert line.torch == row["torch"]
        assert row["min_linux_driver"].startswith(line.minimum_driver)
        assert VLLM.command(launch(version)).argv


@pytest.mark.parametrize(("version", "first"), [
    ("0.7.9", None), ("0.8.0", "0.8.0"), ("0.8.5.post1", "0.8.0"), ("0.8.5.post2", "0.8.0"), ("0.8.6", None),
    ("0.9.0rc1", None), ("0.10.1.1", "0.10.0"), ("0.11.0.post2", "0.10.2"), ("0.19.1", "0.17.0"),
    ("0.19.1+cu129", "0.17.0"), ("0.33.0", "0.33.0"), ("0.33.1", None), ("1.0", None), ("nonsense", None),
])
def test_which_line_a_version_belongs_to(version: str, first: str | None) -> None:
    line = line_of(version)
    assert (line.first if line else None) == first


def test_versions_are_ordered_as_pip_orders_them() -> None:
    ordered = ["0.8.5.dev1", "0.8.5a1", "0.8.5rc1", "0.8.5rc2", "0.8.5", "0.8.5.post1", "0.8.5.post10", "0.8.10",
               "0.9", "0.10.0", "0.10.1.1"]
    mixed = ordered[::2] + ordered[1::2]
    assert sorted(mixed, key=version_key) == ordered
    assert version_key("0.9") == version_key("0.9.0") == version_key("0.9.0+cu129")
    from packaging.version import Version
    assert sorted(mixed, key=Version) == ordered


def test_the_data_files_are_in_order_and_say_where_they_are_from() -> None:
    bounds = [version_key(bound) for line in lines() for bound in (line.first, line.last)]
    assert bounds == sorted(bounds)
    assert all(len(row.source) > 10 for row in (*lines(), *features().values()))
    assert newest() == "0.33.0"


@pytest.mark.parametrize(("version", "python", "fits"), [
    ("0.8.5", "3.9", True), ("0.8.5", "3.13", False), ("0.19.1", "3.13", True), ("0.19.1", "3.14", False),
    ("0.32.0", "3.10", False), ("0.33.0", "3.11", True), ("0.33.0", "3.14", True),
])
def test_pythons(version: str, python: str, fits: bool) -> None:
    assert fits_python(known(version), python) is fits
    if not fits:
        with pytest.raises(RefusedError) as refused:
            VLLM.check_version(version, python)
        assert refused.value.code == "engine.python"


def test_an_unknown_version_is_refused_with_the_newest_known() -> None:
    with pytest.raises(RefusedError) as refused:
        VLLM.check_version("0.99.0", "3.12")
    assert refused.value.code == "engine.unknown_version"
    assert newest() in refused.value.hint


# The argument vector.

def test_the_argument_vector() -> None:
    command = VLLM.command(launch("0.33.0", {"max_model_len": 8192}, gpus=("GPU-a", "GPU-b"), tensor_parallel=2))
    assert command.argv == (
        "/a/python", "-I", "-m", "opsctl.serving.front", "--address", "10.0.0.11", "--port", "8101",
        "--metric", "vllm:num_requests_running", "--metric", "vllm:num_requests_waiting",
        "--drain-timeout", "300", "--",
        "/e/bin/python", "-I", "-m", MODULE, "--model", "/r/files",
        "--served-model-name", "chat", "chat@v1-0123456789ab", "--host", "10.0.0.11", "--port", "8101",
        "--uvicorn-log-level", "warning", "--gpu-memory-utilization", "0.9", "--max-num-seqs", "256", "--dtype", "auto",
        "--kv-cache-dtype", "auto", "--distributed-executor-backend", "mp", "--tensor-parallel-size", "2",
        "--max-model-len", "8192", "--shutdown-timeout", "10")
    assert command.environment == {
        "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
        "VLLM_ENGINE_READY_TIMEOUT_S": "1800", "CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_vector_has_only_flags_that_the_version_knows(version: str) -> None:
    lacks = set(COMMAND_LINES[version]["lacks"].split())
    for given in ({}, possible(version)):
        argv = engine_of(VLLM.command(launch(version, given, gpus=("a", "b"), tensor_parallel=2)).argv)
        used = {word.replace("--no-", "--") for word in argv if word.startswith("--")}
        assert used <= FLAGS, "look these up in every version: fixtures/vllm/command_lines.csv"
        assert not used & lacks


@pytest.mark.parametrize("version", VERSIONS)
def test_what_differs_between_versions_is_what_their_sources_say(version: str) -> None:
    lacks = set(COMMAND_LINES[version]["lacks"].split())
    for flag in ("--shutdown-timeout", "--safetensors-load-strategy", "--speculative-config", "--data-parallel-size"):
        assert supports(version, flag) is (flag not in lacks), flag
    dtypes = COMMAND_LINES[version]["kv_cache_dtypes"].split()
    for value in next(option for option in OPTIONS if option.name == "kv_cache_dtype").choices:
        name = f"--kv-cache-dtype {value}"
        assert (name not in features() or supports(version, name)) is (value in dtypes), name


@pytest.mark.parametrize(("version", "drains", "by_uuid", "method", "log", "reasoning"), [
    ("0.8.5.post1", False, False, "deepseek_mtp", True, True),
    ("0.10.0", False, False, "deepseek_mtp", True, False),
    ("0.10.1", False, False, "deepseek_mtp", False, False),
    ("0.11.0", False, False, "mtp", False, False),
    ("0.18.0", True, False, "mtp", False, False),
    ("0.23.0", True, False, "mtp", False, False),
    ("0.24.0", True, True, "mtp", False, False),
    ("0.33.0", True, True, "mtp", False, False),
])
def test_what_came_and_went(version: str, drains: bool, by_uuid: bool, method: str, log: bool, reasoning: bool) -> None:
    command = VLLM.command(launch(version, possible(version), gpus=("GPU-a",)))
    words = " ".join(command.argv)
    assert ("--shutdown-timeout 10" in words) is drains
    assert ("CUDA_VISIBLE_DEVICES" in command.environment) is by_uuid
    assert ("--gpus-by-index GPU-a" in words) is not by_uuid
    assert f'{{"method": "{method}", "num_speculative_tokens": 1}}' in command.argv
    assert ("--disable-log-requests" in words) is log
    assert ("--enable-reasoning" in words) is reasoning


@pytest.mark.parametrize(("gpus", "tensor", "given", "wanted"), [
    ((), 1, {}, []),
    (("a",), 1, {}, []),
    (("a", "b"), 2, {}, ["--distributed-executor-backend", "mp", "--tensor-parallel-size", "2"]),
    (tuple("abcd"), 2, {}, ["--distributed-executor-backend", "mp", "--tensor-parallel-size", "2",
                            "--pipeline-parallel-size", "2"]),
    (tuple("abcdefgh"), 1, {"more_gpus": "data"}, ["--distributed-executor-backend", "mp", "--tensor-parallel-size",
                                                   "1", "--data-parallel-size", "8"]),
])
def test_how_a_model_is_spread(gpus: tuple[str, ...], tensor: int, given: dict[str, Any], wanted: list[str]) -> None:
    argv = engine_of(VLLM.command(launch("0.33.0", given, gpus=gpus, tensor_parallel=tensor)).argv)
    start = argv.index("--kv-cache-dtype") + 2
    assert list(argv[start:start + len(wanted) + 1]) == [*wanted, "--shutdown-timeout"]


@pytest.mark.parametrize(("gpus", "tensor"), [((), 2), (("a", "b", "c"), 2), (("a",), 2)])
def test_gpus_that_cannot_be_dealt_out(gpus: tuple[str, ...], tensor: int) -> None:
    with pytest.raises(ConfigurationError) as wrong:
        VLLM.command(launch("0.33.0", gpus=gpus, tensor_parallel=tensor))
    assert wrong.value.code == "placement.gpus"


def test_a_host_without_gpu_gets_memory_for_its_cache() -> None:
    environment = VLLM.command(launch("0.33.0", {"cpu_kv_cache_gib": 4})).environment
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "4"
    assert not [name for name in environment if name.startswith("CUDA")]


def test_code_of_a_model_is_never_trusted() -> None:
    assert not [option.name for option in OPTIONS if "trust" in option.name]
    assert "trust" not in " ".join(VLLM.command(launch("0.33.0", possible("0.33.0"))).argv)


# Files and arguments.

def check(paths: tuple[str, ...] = FILES, version: str = "0.33.0", **given: Any) -> None:
    VLLM.check(paths, VLLM.arguments(given), version)


@pytest.mark.parametrize("paths", [FILES, ("config.json", "model.safetensors", "tokenizer.model"),
                                   ("config.json", "consolidated.safetensors", "tekken.json", "params.json")])
def test_directories_that_it_serves(paths: tuple[str, ...]) -> None:
    check(paths)


@pytest.mark.parametrize(("paths", "said"), [
    (("model.gguf",), "--engine llamacpp"), (("config.json", "tokenizer.json"), "whole directory"),
    (("config.json", "tokenizer.json", "vae/model.safetensors"), "whole directory"),
    (("model.safetensors", "tokenizer.json"), "whole directory"), (("model.safetensors", "config.json"), "whole"),
])
def test_files_that_it_does_not_serve(paths: tuple[str, ...], said: str) -> None:
    with pytest.raises(RefusedError) as refused:
        check(paths)
    assert refused.value.code == "release.no_model_file"
    assert said in refused.value.hint


@pytest.mark.parametrize("template", ["none.jinja", "config.json", "/etc/passwd"])
def test_a_template_is_a_file_of_the_release(template: str) -> None:
    with pytest.raises(RefusedError):
        check(chat_template_file=template)


@pytest.mark.parametrize(("version", "given"), [
    ("0.8.0", {"speculative_tokens": 1}), ("0.8.0", {"more_gpus": "data"}),
    ("0.10.1.1", {"safetensors_load_strategy": "lazy"}), ("0.17.1", {"safetensors_load_strategy": "prefetch"}),
    ("0.11.0", {"kv_cache_dtype": "fp8_ds_mla"}), ("0.19.1", {"kv_cache_dtype": "nvfp4"}),
])
def test_an_argument_that_a_version_does_not_have(version: str, given: dict[str, Any]) -> None:
    with pytest.raises(RefusedError) as refused:
        check(version=version, **given)
    assert refused.value.code == "release.argument_of_another_version"
    assert version in refused.value.message and next(iter(given)) in refused.value.message
    check(version="0.33.0", **given)


@pytest.mark.parametrize("setting", ["dtype=int3", "reasoning_parser=a b", "tool_call_parser=x;y", "quantization=../x",
                                     "gpu_memory_utilization=1", "enable_prefix_caching=maybe", "max_num_seqs=0",
                                     "trust_remote_code=true", "drain_timeout_s=601"])
def test_settings_that_cannot_be(setting: str) -> None:
    with pytest.raises(UsageError):
        VLLM.parse_settings([setting])


def test_no_option_can_smuggle_a_flag() -> None:
    """A text ends up as one word of the vector, and may not begin as a flag does."""
    for option in OPTIONS:
        if option.kind == "text" and not option.choices and option.name != "chat_template_file":
            assert not re.fullmatch(option.pattern, "--flag")
