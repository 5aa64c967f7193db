"""One small dataset and one undisturbed run for all tests of training jobs."""

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from subprocess import CompletedProcess

import pytest

RunJob = Callable[..., CompletedProcess[str]]
StartJob = Callable[..., "subprocess.Popen[str]"]

STEPS = 12
# Every step is logged and every fourth one saved; one evaluation, at the end.
SETTINGS = ("--steps", STEPS, "--set", "log_every=1", "--set", "checkpoint_every=4", "--set", f"evaluate_every={STEPS}")


def training(dataset: Path, run: Path, *more: object) -> tuple[object, ...]:
    """The command that `run_job` and `start_job` take; `more` stands in for two workers."""
    start = ("trainer/run.py", "--stage", "demo", "--dataset", dataset, "--run", run, "--audit", run / "audit")
    return (*start, *SETTINGS, *(more or ("--workers", 2)))


@pytest.fixture(scope="session")
def dataset(run_job: RunJob, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn, and curated for the demo stage."""
    folder = tmp_path_factory.mktemp("dataset")
    for job in (
        ("pipeline/sample_data.py", "--out", folder / "raw", "--images", 200),
        ("pipeline/ingest.py", "--raw", folder / "raw", "--dataset", folder / "dataset"),
        ("pipeline/caption.py", "--dataset", folder / "dataset"),
        ("pipeline/curate.py", "--dataset", folder / "dataset"),
    ):
        done = run_job(*job)
        assert done.returncode == 0, done.stderr[-2000:]
    return folder / "dataset"


@pytest.fixture(scope="session")
def whole(run_job: RunJob, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two workers, which talk over gloo, that nothing happens to."""
    run = tmp_path_factory.mktemp("runs") / "two workers"
    done = run_job(*training(dataset, run))
    assert done.returncode == 0, done.stderr[-2000:]
    return run


@pytest.fixture(scope="session")
def random_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a random model of the demo stage and its text encoder, made without training."""
    import torch  # seconds, which tests of other things should not wait

    from trainer.checkpoint import Checkpoints, training_state
    from trainer.ema import EMA
    from trainer.latents import load_codec
    from trainer.model.xut import XUT, XUTConfig
    from trainer.stages import STAGES
    from trainer.text import build_local_text_encoder, text_width

    run = tmp_path_factory.mktemp("runs") / "random"
    stage = STAGES["demo"]
    build_local_text_encoder(["red star", "blue fish"], run / "text_encoder", seed=0)
    config = XUTConfig.tiny(
        in_channels=load_codec(stage.codec).channels, patch_size=1, text_dim=text_width(run / "text_encoder")
    )
    torch.manual_seed(0)
    model = XUT(config)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)  # a new model's last layer gives nothing
    state = training_state(
        stage_name="demo",
        epoch=0,
        position=32,
        first_epoch=0,
        seed=0,
        config={"stage": asdict(stage), "model": config.to_dict(), "example_prompts": ["red star"]},
        selection="abc",
    )
    tensors = {"model": model.state_dict(), "ema": EMA(model, 0.9).state_dict()}
    Checkpoints.of_stage(run, "demo").save(1, tensors, state)
    return run


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny matrices: on a busy machine threads would wait for each other a hundred times as long as they compute."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
