"""Which engine a caption job uses, by what is configured and what the machine or cluster has."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from captioner.sampling import Sampling
from pipeline.captions import engine_choice
from pipeline.captions.command import CaptionJob, parse_args
from pipeline.captions.engine_choice import VllmPlace, choose_engine, make_task
from pipeline.captions.engine_config import CaptionSettings
from pipeline.core.errors import UsageError

OTHER = Path("/other environment/bin/python")
WITH_OTHER = {"py_executable": f"'{OTHER}'"}
ClusterOf = Callable[..., None]


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cluster, a GPU, vLLM in another environment."""
    for name in ("RAY_ADDRESS", "HDM_CAPTION_MODEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(engine_choice, "_has_gpu", lambda: True)
    monkeypatch.setattr(engine_choice, "_other_python", lambda: OTHER)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


@pytest.fixture
def cluster_of(monkeypatch: pytest.MonkeyPatch) -> ClusterOf:
    """cluster_of({"CPU": 1}, ...) joins a cluster of nodes with these resources."""

    def join(*nodes: Mapping[str, float]) -> None:
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
        monkeypatch.setattr("pipeline.core.cluster.nodes", lambda: [dict(node) for node in nodes])

    return join


def job_of(*flags: object) -> CaptionJob:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["caption.py", "--dataset", "none", *map(str, flags)])
        return parse_args("")


def choose(*flags: object) -> tuple[str, str, VllmPlace]:
    """Engine, model and place."""
    job, place = choose_engine(job_of(*flags), lambda: None)
    return job.engine, job.model, place


def test_without_a_model_the_captions_are_made_from_tags_and_one_line_says_how_to_get_others(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert choose() == ("tags", "", VllmPlace())
    assert capsys.readouterr().out == (
        "caption: captions are made from tags: no model is given by --model or HDM_CAPTION_MODEL\n"
    )


def test_engine_tags_is_not_explained(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HDM_CAPTION_MODEL", "pixtral")
    assert choose("--engine", "tags")[0] == "tags"
    assert capsys.readouterr().out == ""


def test_on_one_machine_the_environment_with_vllm_beside_the_project_runs_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = VllmPlace(runtime_env=WITH_OTHER)
    assert choose("--model", "a") == ("vllm", "a", place)
    monkeypatch.setenv("HDM_CAPTION_MODEL", "b")
    assert choose() == ("vllm", "b", place)
    assert choose("--model", "a") == ("vllm", "a", place)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert choose() == ("vllm", "b", VllmPlace())


@pytest.mark.parametrize("engine", ["auto", "vllm"])
def test_without_vllm_anywhere_the_job_says_what_installs_it(
    engine: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine_choice, "_other_python", lambda: None)
    monkeypatch.setenv("HDM_CAPTION_MODEL", "pixtral")
    if engine == "vllm":
        with pytest.raises(UsageError, match="run: make captioner"):
            choose("--engine", engine)
    else:
        assert choose("--engine", engine)[0] == "tags"
        assert "run: make captioner" in capsys.readouterr().out


def test_only_engine_vllm_uses_a_machine_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine_choice, "_has_gpu", lambda: False)
    assert choose("--engine", "vllm", "--model", "pixtral") == ("vllm", "pixtral", VllmPlace(runtime_env=WITH_OTHER))
    monkeypatch.setenv("HDM_CAPTION_MODEL", "pixtral")
    assert choose()[0] == "tags"
    assert "has no GPU; give --engine vllm to use its CPU" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [("--model", "pixtral"), ("--retry-rejected",), ("--try", 5)])
def test_flags_that_need_a_model_are_refused_rather_than_ignored(
    flags: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_choice, "_has_gpu", lambda: False)
    monkeypatch.setenv("HDM_CAPTION_MODEL", "pixtral")
    with pytest.raises(UsageError, match=f"{flags[0]} needs a model, and none can run: this machine has no GPU"):
        choose(*flags)


def test_a_captioner_node_runs_the_model_whatever_this_machine_has(
    monkeypatch: pytest.MonkeyPatch, cluster_of: ClusterOf
) -> None:
    monkeypatch.setattr(engine_choice, "_has_gpu", lambda: False)
    monkeypatch.setattr(engine_choice, "_other_python", lambda: None)
    monkeypatch.setenv("HDM_CAPTION_MODEL", "pixtral")
    cluster_of({"CPU": 1}, {"CPU": 8, "GPU": 1, "captioner": 1})
    place = VllmPlace(resources={"captioner": 0.01}, is_remote=True)
    assert choose() == choose("--engine", "vllm") == ("vllm", "pixtral", place)


def test_in_a_cluster_without_a_captioner_node_the_job_says_how_to_start_one(
    monkeypatch: pytest.MonkeyPatch, cluster_of: ClusterOf, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HDM_CAPTION_MODEL", "pixtral")
    cluster_of({"CPU": 1}, {"CPU": 8, "GPU": 1, "trainer": 1})
    assert choose()[0] == "tags"
    assert "start-ray.sh worker HEAD:6379 --resources '{\"captioner\": 1}'" in capsys.readouterr().out
    with pytest.raises(UsageError, match="no node of this Ray offers the resource captioner"):
        choose("--engine", "vllm")


def test_with_wait_a_captioner_node_that_joins_later_is_used_and_tags_never_are(
    monkeypatch: pytest.MonkeyPatch, cluster_of: ClusterOf, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HDM_CAPTION_MODEL", "pixtral")
    cluster_of({"CPU": 1}, {"CPU": 1})
    with pytest.raises(UsageError, match="--wait needs a model, and none can run"):
        choose("--wait", 0.1)
    assert "waiting for a captioner node" in capsys.readouterr().err
    monkeypatch.setattr("time.sleep", lambda seconds: cluster_of({"CPU": 1}, {"CPU": 1, "captioner": 1}))
    assert choose("--wait", 60)[0] == "vllm"


def test_a_cluster_of_one_machine_is_treated_like_that_machine(
    monkeypatch: pytest.MonkeyPatch, cluster_of: ClusterOf
) -> None:
    monkeypatch.setenv("HDM_CAPTION_MODEL", "pixtral")
    cluster_of({"CPU": 8, "GPU": 4})
    assert choose() == ("vllm", "pixtral", VllmPlace(runtime_env=WITH_OTHER))
    cluster_of({"CPU": 8})  # its GPUs are not for Ray
    assert choose()[0] == "tags"


def test_flags_of_the_card_reach_the_engine_and_only_the_kv_cache_changes_captions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_choice, "resolve_model", lambda config: (config, "pixtral@1"))
    flags: tuple[Any, ...] = ("--model", "p", "--max-model-len", 5000, "--gpu-memory", 0.8, "--at-once", 7)
    job, place = choose_engine(job_of(*flags), lambda: None)
    task = make_task(job, place, "none")
    assert (task.engine.max_model_len, task.engine.gpu_memory, task.engine.concurrency) == (5000, 0.8, 7)
    settings = CaptionSettings(
        engine="vllm", model="pixtral@1", prompt_version=job.prompt, sampling=Sampling(), max_side=768
    )
    assert task.settings == settings
    assert settings.provenance("x") | {"kv cache": "fp8"} == replace(settings, kv_cache="fp8").provenance("x")
