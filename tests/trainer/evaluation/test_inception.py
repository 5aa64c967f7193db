"""Inception as FID takes it, with random weights: nothing is downloaded, so the published ones are not tried here."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from trainer.evaluation.inception import FEATURES, Inception

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """Of the published file's names, which count no batches."""
    torch.manual_seed(0)
    return {name: t.clone() for name, t in Inception().state_dict().items() if "num_batches" not in name}


def saved(tensors: dict[str, torch.Tensor], path: Path) -> Path:
    save_file(tensors, path)
    return path


def test_it_has_the_parameters_of_the_published_network(weights: dict[str, torch.Tensor]) -> None:
    """Those of torch-fidelity 0.4.0, to whose features ours were equal to the bit with the same random weights."""
    trained = {name: t for name, t in weights.items() if "running" not in name}
    assert sum(t.numel() for t in trained.values()) == 23_850_960
    assert len(weights) == 94 * 5 + 2
    assert weights["Mixed_6c.branch7x7dbl_3.conv.weight"].shape == (160, 160, 1, 7)
    assert weights["Mixed_7c.branch3x3dbl_3b.bn.running_var"].shape == (384,)
    assert weights["fc.weight"].shape == (1008, 2048)


def test_features_are_those_of_each_picture_alone_whatever_its_size(
    weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    model = Inception.load(saved(weights, tmp_path / "inception.safetensors"))
    generator = np.random.default_rng(0)
    for shape in ((64, 64, 3), (320, 200, 3)):
        pictures = list(generator.integers(0, 256, (2, *shape), dtype=np.uint8))
        together_NC = model.features(pictures)
        assert together_NC.shape == (2, FEATURES)
        torch.testing.assert_close(together_NC[1:], model.features(pictures[1:]), atol=1e-5, rtol=1e-4)
        assert not torch.equal(together_NC[0], together_NC[1])


def test_weights_of_another_network_and_pickles_are_refused(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    imagenet = weights | {"fc.weight": torch.zeros(1000, FEATURES), "fc.bias": torch.zeros(1000)}
    with pytest.raises(ValueError, match=r"\(1000, 2048\).*2015-12-05"):
        Inception.load(saved(imagenet, tmp_path / "a.safetensors"))
    partial = {name: t for name, t in weights.items() if not name.startswith("Mixed_7c")}
    with pytest.raises(ValueError, match="2015-12-05"):
        Inception.load(saved(partial, tmp_path / "b.safetensors"))
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "c.pth")
    with pytest.raises(ValueError, match=r"can run code.*save_file"):
        Inception.load(tmp_path / "c.pth")
    with pytest.raises(ValueError, match="not a file"):
        Inception.load(tmp_path / "none.safetensors")
