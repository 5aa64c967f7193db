"""The loader's imports."""

import subprocess
import sys


def test_a_loader_starts_without_torch_ray_and_transformers() -> None:
    """They would cost every loader process seconds and hundreds of megabytes."""
    heavy = "{'torch', 'ray', 'transformers', 'pandas'}"
    listing = f"import sys, trainer.samples.loader; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
