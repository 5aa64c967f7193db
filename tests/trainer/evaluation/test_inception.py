"""Inception for FID, with random weights: the published ones are not downloaded."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from trainer.evaluation.inception import FEATURES, Inception

pytestmark = pytest.mark.usefixtures("one_thread")


def kernel_shapes() -> dict[str, tuple[int, int, int, int]]:
    """Convolution -> output channels, input channels, rows and columns in the published file."""
    found = {
        "Conv2d_1a_3x3": (32, 3, 3, 3),
        "Conv2d_2a_3x3": (32, 32, 3, 3),
        "Conv2d_2b_3x3": (64, 32, 3, 3),
        "Conv2d_3b_1x1": (80, 64, 1, 1),
        "Conv2d_4a_3x3": (192, 80, 3, 3),
    }

    def add(block: str, **kernels: tuple[int, int, int, int]) -> None:
        found.update({f"{block}.{name}": kernel for name, kernel in kernels.items()})

    for block, c, pool in (("Mixed_5b", 192, 32), ("Mixed_5c", 256, 64), ("Mixed_5d", 288, 64)):
        add(block, branch1x1=(64, c, 1, 1), branch5x5_1=(48, c, 1, 1), branch5x5_2=(64, 48, 5, 5))
        add(block, branch3x3dbl_1=(64, c, 1, 1), branch3x3dbl_2=(96, 64, 3, 3), branch3x3dbl_3=(96, 96, 3, 3))
        add(block, branch_pool=(pool, c, 1, 1))
    add("Mixed_6a", branch3x3=(384, 288, 3, 3), branch3x3dbl_1=(64, 288, 1, 1))
    add("Mixed_6a", branch3x3dbl_2=(96, 64, 3, 3), branch3x3dbl_3=(96, 96, 3, 3))
    for block, n in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        add(block, branch1x1=(192, 768, 1, 1), branch_pool=(192, 768, 1, 1))
        add(block, branch7x7_1=(n, 768, 1, 1), branch7x7_2=(n, n, 1, 7), branch7x7_3=(192, n, 7, 1))
        add(block, branch7x7dbl_1=(n, 768, 1, 1), branch7x7dbl_2=(n, n, 7, 1), branch7x7dbl_3=(n, n, 1, 7))
        add(block, branch7x7dbl_4=(n, n, 7, 1), branch7x7dbl_5=(192, n, 1, 7))
    add("Mixed_7a", branch3x3_1=(192, 768, 1, 1), branch3x3_2=(320, 192, 3, 3), branch7x7x3_1=(192, 768, 1, 1))
    add("Mixed_7a", branch7x7x3_2=(192, 192, 1, 7), branch7x7x3_3=(192, 192, 7, 1), branch7x7x3_4=(192, 192, 3, 3))
    for block, c in (("Mixed_7b", 1280), ("Mixed_7c", 2048)):
        add(block, branch1x1=(320, c, 1, 1), branch_pool=(192, c, 1, 1), branch3x3_1=(384, c, 1, 1))
        add(block, branch3x3_2a=(384, 384, 1, 3), branch3x3_2b=(384, 384, 3, 1), branch3x3dbl_1=(448, c, 1, 1))
        add(block, branch3x3dbl_2=(384, 448, 3, 3))
        add(block, branch3x3dbl_3a=(384, 384, 1, 3), branch3x3dbl_3b=(384, 384, 3, 1))
    return found


def random_weights() -> dict[str, torch.Tensor]:
    """Weights at a scale at which activations neither vanish nor explode."""
    generator = np.random.default_rng(0)
    weights = {"fc.weight": np.zeros((1008, FEATURES), np.float32), "fc.bias": np.zeros(1008, np.float32)}
    for name, (out, channels, rows, columns) in kernel_shapes().items():
        kernel = generator.standard_normal((out, channels, rows, columns), np.float32)
        weights[f"{name}.conv.weight"] = kernel * np.float32((2 / (channels * rows * columns)) ** 0.5)
        for part, low, high in (("weight", 0.8, 1.2), ("bias", -0.2, 0.2), ("running_mean", -0.2, 0.2)):
            weights[f"{name}.bn.{part}"] = generator.uniform(low, high, out).astype(np.float32)
        weights[f"{name}.bn.running_var"] = generator.uniform(0.8, 1.2, out).astype(np.float32)
    return {name: torch.from_numpy(array) for name, array in weights.items()}


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return random_weights()


def saved(tensors: dict[str, torch.Tensor], path: Path) -> Path:
    save_file(tensors, path)
    return path


def test_features_equal_those_of_torch_fidelity(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """The network of torch-fidelity 0.4.0, with these weights and the same resizing, gave the same features."""
    model = Inception.load(saved(weights, tmp_path / "inception.safetensors"))
    picture = np.random.default_rng(1).integers(0, 256, (64, 48, 3), np.uint8)
    features_C = model.features([picture])[0]
    assert features_C[[0, 322, 705, 1088, 1474, 1858, 1950]].tolist() == pytest.approx(
        [0.73979, 1.69498, 3.07706, 0.93897, 0.68218, 2.28926, 1.4506], rel=1e-3
    )
    assert float(features_C.sum()) == pytest.approx(1819.547, rel=1e-3)


def test_features_do_not_depend_on_the_other_pictures_or_the_size(weights: dict[str, torch.Tensor]) -> None:
    model = Inception(weights)
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
    renamed = {name.replace("Mixed_7c", "Mixed_7d"): t for name, t in weights.items()}
    transposed = {name: t.mT.contiguous() if "branch7x7_2.conv" in name else t for name, t in weights.items()}
    for number, wrong in enumerate((partial, renamed, transposed)):
        with pytest.raises(ValueError, match="2015-12-05"):
            Inception.load(saved(wrong, tmp_path / f"{number}.safetensors"))
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "c.pth")
    with pytest.raises(ValueError, match=r"can run code.*save_file"):
        Inception.load(tmp_path / "c.pth")
    with pytest.raises(ValueError, match="not a file"):
        Inception.load(tmp_path / "none.safetensors")
