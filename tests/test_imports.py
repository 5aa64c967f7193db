"""Imports go one way: what each package may import, and where each heavy package is wired in."""

import ast
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pipeline", "captioner", "trainer")
MOST_FILES = 14  # directly in one folder, __init__.py aside
MOST_JOB_LINES = 130

# Lowest first: a package may import those of lower levels, those named beside it in `WITHIN_A_LEVEL`, and itself.
PIPELINE_LEVELS = (
    ("core",),
    ("storage",),
    ("pictures", "tagging"),
    ("sources", "ingestion", "captions", "scores", "curation", "drawings", "exports"),
    ("reporting",),
    ("jobs",),
)
TRAINER_LEVELS = (
    ("model", "encoders", "optimization", "health"),
    ("diffusion", "runs"),
    ("samples", "drawing"),
    ("recipe", "evaluation", "web", "exporting"),
    ("training",),
    ("cluster", "cost"),
    ("jobs",),
)
WITHIN_A_LEVEL = {("ingestion", "sources"), ("curation", "sources")}
SHARED_WITH_TRAINER = {"core", "storage", "pictures", "tagging"}

# Each heavy package is imported in these files, and nowhere else.
ONLY_IN = {
    "ray": {
        "pipeline/core/cluster.py",
        "pipeline/core/dataflow.py",
        "pipeline/core/metrics.py",
        "pipeline/core/row_pipeline.py",
        "pipeline/core/shard_progress.py",
        "trainer/cluster/failed_start.py",
        "trainer/cluster/launch.py",
        "trainer/cluster/monitor.py",
        "trainer/cluster/policies.py",
        "trainer/cluster/recording.py",
        "trainer/cluster/replicas.py",
        "trainer/cluster/sample_stream.py",
    },
    "simplejpeg": {"pipeline/pictures/damage.py"},
    "transformers": {
        "pipeline/pictures/classifiers.py",
        "trainer/encoders/random_encoders.py",
        "trainer/encoders/text.py",
        "trainer/encoders/vision.py",
    },
    "diffusers": {
        "trainer/encoders/load_codec.py",
        "trainer/encoders/random_encoders.py",
        "trainer/exporting/diffusers_export.py",
        "trainer/exporting/exported/constants.py",
        "trainer/exporting/exported/hdm_codec.py",
        "trainer/exporting/exported/hdm_transformer.py",
        "trainer/exporting/exported/pipeline.py",
    },
    "onnxruntime": {"pipeline/pictures/onnx_model.py"},
    "prometheus_client": {"pipeline/reporting/dataset_metrics.py", "trainer/web/page_metrics.py"},
    "tokenizers": {"trainer/encoders/text.py"},
    "peft": {"trainer/runs/lora.py"},
    "vllm": {"captioner/engines/vllm.py"},
    "mistral_common": {"captioner/engines/vllm.py"},
    "aiohttp": {"captioner/engines/openai.py", "pipeline/storage/s3.py"},
    "s3fs": {"pipeline/storage/s3.py"},
    "pynvml": {"trainer/health/gpu_state.py"},
    "tensorboard": {"trainer/training/run_log.py"},
    "torchao": {"trainer/model/float8.py"},
    "wandb": {"trainer/training/run_log.py"},
    "gradio": {"trainer/web/page.py", "trainer/web/server.py"},
    "torchmetrics": {"trainer/evaluation/fidelity.py"},
    "jinja2": {
        "pipeline/captions/trial.py",
        "pipeline/reporting/report_page.py",
        "trainer/evaluation/gallery.py",
    },
}
# Runs on a machine that has torch and nothing else.
TORCH_ONLY = ("trainer/model/", "trainer/optimization/", "trainer/diffusion/", "trainer/training/loop.py")
# Only in type annotations of these: importing them does not import torch.
NO_TORCH = (
    "trainer/samples/blocks.py",
    "trainer/samples/order.py",
    "trainer/samples/row_groups.py",
    "trainer/samples/training_text.py",
)


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
MODULES = {name.removesuffix("/__init__.py").removesuffix(".py").replace("/", "."): name for name in FILES}
# file -> the project's files that it imports
GRAPH = {name: {MODULES[i] for i in imports if i in MODULES} - {name} for name, imports in FILES.items()}


def _part(name: str) -> str:
    """The second folder of "trainer/model/xut.py", "jobs" for a file directly in a package."""
    folders = name.split("/")[1:-1]
    return folders[0] if folders else "jobs"


def _imports_package(imports: set[str], package: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for name in imports)


def test_the_files_are_found() -> None:
    assert {"pipeline/ingest.py", "trainer/model/xut.py", "captioner/engines/tags.py"} <= set(FILES)
    assert "pipeline/core/jobs.py" in GRAPH["pipeline/ingest.py"]


@pytest.mark.parametrize(("package", "levels"), [("pipeline", PIPELINE_LEVELS), ("trainer", TRAINER_LEVELS)])
def test_a_package_imports_only_packages_below_it(package: str, levels: tuple[tuple[str, ...], ...]) -> None:
    height = {part: number for number, parts in enumerate(levels) for part in parts}
    wrong = []
    for name, imported in GRAPH.items():
        if not name.startswith(f"{package}/"):
            continue
        part = _part(name)
        assert part in height, f"{name}: give {part} a level"
        for other in imported:
            theirs = _part(other)
            same_package = other.startswith(f"{package}/") and other != f"{package}/__init__.py"
            allowed = theirs == part or (part, theirs) in WITHIN_A_LEVEL or height.get(theirs, -1) < height[part]
            if same_package and not allowed:
                wrong.append(f"{name} -> {other}")
    assert not wrong


def test_no_imports_form_a_cycle() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for other in sorted(GRAPH[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in GRAPH:
        visit(name, ())


def test_the_captioner_imports_neither_pipeline_nor_trainer() -> None:
    assert not [n for n, to in GRAPH.items() if n.startswith("captioner/") and any("captioner" not in o for o in to)]


def test_the_pipeline_never_imports_the_trainer() -> None:
    for name, imports in FILES.items():
        if name.startswith("pipeline/"):
            assert not _imports_package(imports, "trainer"), name


def test_the_trainer_imports_only_the_shared_packages_of_the_pipeline() -> None:
    for name, imported in GRAPH.items():
        if name.startswith("trainer/"):
            parts = {_part(o) for o in imported if o.startswith("pipeline/") and o != "pipeline/__init__.py"}
            assert parts <= SHARED_WITH_TRAINER, name
            assert not _imports_package(FILES[name], "captioner"), name


@pytest.mark.parametrize("package", ONLY_IN)
def test_a_heavy_package_is_imported_only_where_it_is_wired_in(package: str) -> None:
    assert {name for name, imports in FILES.items() if _imports_package(imports, package)} == ONLY_IN[package]


@pytest.mark.parametrize("part", TORCH_ONLY)
def test_the_core_of_the_trainer_runs_on_a_machine_with_just_torch(part: str) -> None:
    for name, imports in FILES.items():
        if name.startswith(part):
            for package in ("ray", "pipeline", "captioner", "transformers", "PIL", "pyarrow"):
                assert not _imports_package(imports, package), (name, package)


@pytest.mark.parametrize("name", NO_TORCH)
def test_order_and_texts_of_samples_need_no_torch(name: str) -> None:
    assert not _imports_package(FILES[name], "torch")


@pytest.mark.parametrize("package", PACKAGES)
def test_no_folder_is_crowded(package: str) -> None:
    for folder in {path.parent for path in (ROOT / package).rglob("*.py")}:
        files = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= MOST_FILES, folder


def test_a_job_file_is_a_table_of_contents() -> None:
    for package in PACKAGES:
        for path in (ROOT / package).glob("*.py"):
            text = path.read_text()
            if "__name__ ==" in text:
                assert text.count("\n") <= MOST_JOB_LINES, path


def test_nothing_of_a_job_folder_hides_a_module_that_others_import() -> None:
    """`python pipeline/caption.py` puts pipeline/ first on sys.path."""
    installed = set(sys.stdlib_module_names) | set(packages_distributions())
    imported = {name.split(".")[0] for imports in FILES.values() for name in imports}
    for package in ("pipeline", "trainer"):
        for path in (ROOT / package).iterdir():
            if path.suffix == ".py" or (path.is_dir() and path.name != "__pycache__"):
                assert path.stem not in (installed | imported) - set(PACKAGES), path


def test_tests_mirror_the_tree() -> None:
    """Each folder of tests has a folder of the product beside it, except those of no package."""
    for folder in {path.parent for path in (ROOT / "tests").rglob("test_*.py")}:
        relative = folder.relative_to(ROOT / "tests").as_posix()
        assert relative in (".", "deploy") or (ROOT / relative).is_dir(), relative
