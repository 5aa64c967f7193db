"""Which engine `--engine auto` chooses, and where vLLM runs: on nodes of the cluster that offer the resource
`captioner`, or on this machine."""

import importlib.util
import io
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from pipeline.captions.command import MODEL_VARIABLE, CaptionJob
from pipeline.captions.engine_config import CaptionSettings, EngineConfig, ResolvedModel, resolve_model
from pipeline.captions.model_captions import CaptionTask
from pipeline.core.errors import UsageError

CAPTIONER: Final = "captioner"  # custom resource of nodes with vLLM
_ENVIRONMENT: Final = ".venv-captioner"
_START_NODE: Final = (
    f"docker compose up --detach captioner, or sh deploy/start-ray.sh worker HEAD:6379 --resources "
    f"'{{\"{CAPTIONER}\": 1}}' in {_ENVIRONMENT}"
)


@dataclass(frozen=True, kw_only=True)
class VllmPlace:
    """Where vLLM runs: what its actors and tasks request from Ray."""

    resources: Mapping[str, float] = field(default_factory=dict)  # custom ones
    runtime_env: Mapping[str, Any] = field(default_factory=dict)  # names the Python with vLLM if this job's has none
    is_remote: bool = False  # the model's folder and vLLM may be on other machines only

    def resolve(self, config: EngineConfig) -> ResolvedModel:
        """`resolve_model` where the model is. Raises its UsageError."""
        if not self.is_remote:
            return resolve_model(config)
        from pipeline.core.cluster import run_on_node

        work = partial(_resolve_with_vllm, config)
        return run_on_node(work, self.resources, self.runtime_env, f"looking up {config.model}")

    def run(self, work: Callable[[], None], connect: Callable[[], object], gpus: int) -> None:
        """Does work that starts an engine with this many GPUs, if there are any, and shows what it prints."""
        if not self.is_remote and not self.runtime_env:
            work()
            return
        connect()
        from pipeline.core.cluster import nodes_of, run_on_node

        has_gpus = any(node.get("GPU") for node in nodes_of(CAPTIONER))
        printed = run_on_node(
            partial(_printed, work), self.resources, self.runtime_env, "the trial", gpus if has_gpus else 0
        )
        print(printed, end="", flush=True)


def choose_engine(job: CaptionJob, connect: Callable[[], object]) -> tuple[CaptionJob, VllmPlace]:
    """The job with the engine and the model that it uses, and where vLLM runs.

    `connect` connects to Ray, for a model that a cluster may run. Prints one line if `auto` chooses tags. Raises
    UsageError if the flags need a model and none can run.
    """
    if job.engine in ("tags", "openai"):
        return job, VllmPlace()
    place = _find_vllm(job, connect) if job.configured_model else f"no model is given by --model or {MODEL_VARIABLE}"
    if isinstance(place, VllmPlace):
        return replace(job, engine="vllm", model=job.configured_model), place
    if job.engine == "vllm":
        raise UsageError(f"--engine vllm cannot run: {place}")
    if job.needs_model or job.wait:
        raise UsageError(f"{job.needs_model or '--wait'} needs a model, and none can run: {place}")
    print(f"caption: captions are made from tags: {place}", flush=True)
    return replace(job, engine="tags"), VllmPlace()


def make_task(job: CaptionJob, place: VllmPlace, dataset: str) -> CaptionTask:
    """What each worker gets, for a job whose engine is chosen. Raises UsageError if the model cannot be used."""
    engine, model = place.resolve(
        EngineConfig(
            engine=job.engine, model=job.model, url=job.url, tensor_parallel=job.tensor_parallel,
            concurrency=job.concurrency, timeout=job.answer_timeout, tries=job.tries,
            max_model_len=job.max_model_len, gpu_memory=job.gpu_memory, kv_cache=job.kv_cache,
        )
    )  # fmt: skip
    settings = CaptionSettings(
        engine=job.engine, model=model, prompt_version=job.prompt, sampling=job.sampling, max_side=job.max_side,
        kv_cache=job.kv_cache,
    )  # fmt: skip
    return CaptionTask(
        dataset=dataset, folder=job.folder, engine=engine, settings=settings, restart_after=job.restart_after,
        retry_rejected=job.retry_rejected,
    )  # fmt: skip


def _find_vllm(job: CaptionJob, connect: Callable[[], object]) -> VllmPlace | str:
    """Where vLLM can run, or why it cannot, with the remedy. Without a GPU only if --engine vllm demands it."""
    connected = bool(os.environ.get("RAY_ADDRESS"))
    if connected:
        connect()
        from pipeline.core.cluster import nodes, wait_for_node

        if resources := wait_for_node(CAPTIONER, job.wait):
            return VllmPlace(resources=resources, is_remote=True)
        if len(nodes()) > 1:  # what this machine has tells nothing about the others, unless the command says so
            if job.engine == "vllm" and importlib.util.find_spec("vllm"):
                return VllmPlace()
            return f"no node of this Ray offers the resource {CAPTIONER}; start one: {_START_NODE}"
        has_gpu = any(node.get("GPU") for node in nodes())
    else:
        has_gpu = _has_gpu()
    if job.engine == "auto" and not has_gpu:
        return (
            "this machine has no GPU; give --engine vllm to use its CPU, or --engine openai --url ADDRESS for a server"
            + (f", or start a node with one: {_START_NODE}" if connected else "")
        )
    if importlib.util.find_spec("vllm"):
        return VllmPlace()
    if python := _other_python():
        # A shell reads it: paths may have spaces.
        return VllmPlace(runtime_env={"py_executable": shlex.quote(str(python))})
    return "vLLM is not installed on this machine; run: make captioner"


def _has_gpu() -> bool:
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1") or not shutil.which("nvidia-smi"):
        return False
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return listed.returncode == 0 and "GPU" in listed.stdout


def _other_python() -> Path | None:
    """The Python of the environment with vLLM beside the project or beside this job's environment."""
    for folder in (Path(__file__).parents[2], Path(sys.prefix).parent):
        python = folder / _ENVIRONMENT / "bin" / "python"
        if python.exists() and any((folder / _ENVIRONMENT / "lib").glob("python*/site-packages/vllm")):
            return python
    return None


def _resolve_with_vllm(config: EngineConfig) -> ResolvedModel:
    if importlib.util.find_spec("vllm") is None:
        raise UsageError(
            f"the node that offers {CAPTIONER} has no vLLM in its environment ({sys.prefix}): start it in "
            f"{_ENVIRONMENT}, which make captioner sets up"
        )
    try:
        return resolve_model(config)
    except UsageError as error:
        raise UsageError(f"on the {CAPTIONER} node {socket.gethostname()}: {error}") from None


def _printed(work: Callable[[], None]) -> str:
    """What the work prints."""
    with redirect_stdout(io.StringIO()) as printed:
        work()
    return printed.getvalue()
