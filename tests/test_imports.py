"""Imports go one way (the README's file map): what the core may not know, and where each heavy package is wired in."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pipeline", "captioner", "trainer")
# Each heavy package is imported in the files that wire it in, and nowhere else.
ONLY_IN = {
    "ray": {"pipeline/cluster.py", "pipeline/dataflow.py", "trainer/launch.py", "trainer/replicas.py"},
    "transformers": {"pipeline/classifiers.py", "trainer/stand_ins.py", "trainer/text.py"},
    "diffusers": {
        "trainer/diffusers_export.py",
        "trainer/exported/constants.py",
        "trainer/exported/hdm_codec.py",
        "trainer/exported/hdm_transformer.py",
        "trainer/exported/pipeline.py",
        "trainer/stand_ins.py",
        "trainer/vae.py",
    },
    "onnxruntime": {"pipeline/classifiers.py"},
    "prometheus_client": {"pipeline/exporter.py", "trainer/page_figures.py"},
    "tokenizers": {"trainer/text.py"},
    "peft": {"trainer/lora.py"},
    "vllm": {"captioner/engines/vllm.py"},
    "mistral_common": {"captioner/engines/vllm.py"},
    "aiohttp": {"captioner/engines/openai.py", "pipeline/s3.py"},
    "s3fs": {"pipeline/s3.py"},
    "tensorboard": {"trainer/run_log.py"},
    "wandb": {"trainer/run_log.py"},
    "gradio": {"trainer/page.py"},
    "torchmetrics": {"trainer/fidelity.py"},
    "jinja2": {"pipeline/caption_trial.py", "pipeline/report_page.py", "trainer/gallery.py"},
}
# What the trainer may use of the pipeline.
SHARED_WITH_TRAINER = {
    "pipeline.classifiers",
    "pipeline.cluster",
    "pipeline.images",
    "pipeline.jobs",
    "pipeline.records",
    "pipeline.shards",
    "pipeline.tags",
}
TORCH_ONLY = ("trainer/model", "trainer/flow.py", "trainer/positions.py", "trainer/sampler.py", "trainer/loop.py")


def _imports(path: Path) -> set[str]:
    """Full names of all modules that a file imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


FILES = {
    path.relative_to(ROOT).as_posix(): _imports(path) for package in PACKAGES for path in (ROOT / package).rglob("*.py")
}


def _imports_package(imports: set[str], package: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for name in imports)


def test_the_files_are_found() -> None:
    assert {"pipeline/ingest.py", "trainer/model/xut.py", "captioner/engines/tags.py"} <= set(FILES)


@pytest.mark.parametrize("package", ONLY_IN)
def test_a_heavy_package_is_imported_only_where_it_is_wired_in(package: str) -> None:
    assert {name for name, imports in FILES.items() if _imports_package(imports, package)} == ONLY_IN[package]


def test_the_captioner_knows_neither_pipeline_nor_trainer() -> None:
    for name, imports in FILES.items():
        if name.startswith("captioner/"):
            assert not _imports_package(imports, "pipeline"), name
            assert not _imports_package(imports, "trainer"), name


def test_the_pipeline_never_imports_the_trainer() -> None:
    for name, imports in FILES.items():
        if name.startswith("pipeline/"):
            assert not _imports_package(imports, "trainer"), name


def test_the_trainer_uses_only_the_shared_part_of_the_pipeline() -> None:
    for name, imports in FILES.items():
        if name.startswith("trainer/"):
            used = {i for i in imports if i.startswith("pipeline.") and i.count(".") == 1}
            assert used <= SHARED_WITH_TRAINER, name
            assert not _imports_package(imports, "captioner"), name


@pytest.mark.parametrize("part", TORCH_ONLY)
def test_the_core_of_the_trainer_runs_on_a_machine_with_just_torch(part: str) -> None:
    for name, imports in FILES.items():
        if name.startswith(part):
            for package in ("ray", "pipeline", "captioner", "transformers", "PIL", "pyarrow"):
                assert not _imports_package(imports, package), (name, package)


def test_no_file_of_a_job_folder_hides_a_module_that_others_import() -> None:
    """`python pipeline/caption.py` puts pipeline/ first on sys.path."""
    imported = {name.split(".")[0] for imports in FILES.values() for name in imports}
    for name in FILES:
        folder, _, file = name.partition("/")
        stem = file.removesuffix(".py").split("/")[0]
        assert stem not in imported, f"{folder}/{stem}"
