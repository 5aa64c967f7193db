"""Datasets, checkpoints and model folders are read from formats without code; unpickling runs code."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = [path for package in ("pipeline", "captioner", "trainer") for path in sorted((ROOT / package).rglob("*.py"))]
READS_PICKLES = (
    "pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve",
    "torch.load", "torch.jit.load", "torch.hub.load", "torch.package", "numpy.load", "pandas.read_pickle",
    "pyarrow.deserialize",
)  # fmt: skip
# The driver's own shards, sent through Ray to its workers.
# Descriptions of shards, from a job's driver to its own tasks.
ALLOWED = {f"pipeline/core/{name}.py": {"pickle"} for name in ("dataflow", "row_pipeline", "shard_progress")}
# Loads the folder, including its code, that it has just written.
LOADS_OWN_CODE = "trainer/exporting/diffusers_export.py"


def _names(tree: ast.AST) -> Iterator[str]:
    """Full names of everything that a file imports and of the attributes that it uses of it."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {
                (a.asname or a.name.split(".")[0]): (a.name if a.asname else a.name.split(".")[0]) for a in node.names
            }
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            aliases |= {(alias.asname or alias.name): f"{node.module}.{alias.name}" for alias in node.names}
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, _, rest = ast.unparse(node).partition(".")
            yield f"{aliases.get(first, first)}.{rest}"


def readers_of_pickles(source: str) -> set[str]:
    """The READS_PICKLES that a source uses."""
    names = set(_names(ast.parse(source)))
    return {bad for bad in READS_PICKLES if any(name == bad or name.startswith(f"{bad}.") for name in names)}


def keywords(source: str) -> set[str]:
    """Names of keyword arguments that are not the constant False, such as allow_pickle=True."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    given = [keyword for call in calls for keyword in call.keywords]
    return {k.arg for k in given if k.arg and not (isinstance(k.value, ast.Constant) and k.value.value is False)}


def test_the_scan_finds_every_kind_of_import() -> None:
    for source, found in {
        "import torch\ntorch.load(path)": "torch.load",
        "from torch import load as read\nread(path)": "torch.load",
        "import torch as t\nt.jit.load(path)": "torch.jit.load",
        "def f():\n    from pickle import loads": "pickle",
        "import numpy as np\nnp.load(path)": "numpy.load",
    }.items():
        assert readers_of_pickles(source) == {found}, source
    assert readers_of_pickles("import torch, json\njson.load(file); torch.save") == set()
    assert keywords("f(a=True, b=False, c=x)") == {"a", "c"}


def test_no_file_reads_a_pickle() -> None:
    found = {path.relative_to(ROOT).as_posix(): readers_of_pickles(path.read_text()) for path in FILES}
    assert {name: names for name, names in found.items() if names} == ALLOWED


def loads_of_weights(source: str) -> list[str]:
    """Calls of the model loaders of transformers and diffusers."""
    calls = [ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    loads = [call for call in calls if call.partition("(")[0].endswith(".from_pretrained")]
    return [call for call in loads if not call.startswith(("AutoTokenizer.", "AutoConfig."))]


def test_models_are_loaded_from_safetensors_without_remote_code() -> None:
    seen = 0
    for path in FILES:
        name, source = path.relative_to(ROOT).as_posix(), path.read_text()
        assert "allow_pickle" not in keywords(source), name
        if name != LOADS_OWN_CODE:
            assert "trust_remote_code" not in keywords(source), name
            assert all("use_safetensors=True" in call for call in loads_of_weights(source)), name
            seen += len(loads_of_weights(source))
    assert seen >= 3  # text encoder, VAE, classifier
