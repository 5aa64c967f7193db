"""preprocessor_config.json -> pixels: equal to transformers' own processors, and refusals that name the key."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image

from pipeline.pictures.preprocessing import read_preprocessing, wd_tagger

SIZES = [(40, 57), (333, 200), (64, 64), (101, 31)]
PLAIN: dict[str, Any] = {
    "image_processor_type": "ViTImageProcessor",
    "size": 32,
    "resample": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("ViT", {"size": {"height": 32, "width": 48}}),
        ("ViT", {"size": {"height": 32, "width": 32}, "do_normalize": False, "rescale_factor": 0.01}),
        ("ViT", {"size": {"height": 32, "width": 32}, "do_rescale": False}),
        ("CLIP", {"size": {"shortest_edge": 40}, "crop_size": {"height": 33, "width": 30}}),
        ("Siglip", {"size": {"height": 32, "width": 32}}),
        ("Beit", {"size": {"height": 32, "width": 32}}),
    ],
)
def test_pixels_equal_those_of_transformers_own_processor(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    # ViT -> ViTImageProcessorPil: the backend that needs no torchvision.
    theirs = getattr(transformers, f"{kind}ImageProcessorPil")(**settings)
    theirs.save_pretrained(tmp_path)
    ours = read_preprocessing(json.loads((tmp_path / "preprocessor_config.json").read_text()))
    for size in SIZES:
        expected_NCHW = theirs(noise(*size), return_tensors="np")["pixel_values"]
        pixels_NHWC = ours.normalised(ours.resized(noise(*size))[None])
        assert pixels_NHWC.shape[1:3] == ours.size
        np.testing.assert_allclose(pixels_NHWC.transpose(0, 3, 1, 2), expected_NCHW, atol=1e-5)


def test_older_files_with_a_single_size_are_read_like_newer_ones() -> None:
    older = {"feature_extractor_type": "ViTFeatureExtractor", "size": 224, "do_resize": True, "do_normalize": True}
    newer = {"image_processor_type": "ViTImageProcessorFast", "size": {"height": 224, "width": 224}, "do_rescale": True}
    rest = {key: PLAIN[key] for key in ("resample", "image_mean", "image_std")}
    assert read_preprocessing(older | rest) == read_preprocessing(newer | rest | {"rescale_factor": 1 / 255})
    clip = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224}
    newer_clip = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 224}, "crop_size": 224}
    assert read_preprocessing(clip | rest) == read_preprocessing(newer_clip | rest)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"image_processor_type": "DonutImageProcessor"}, "DonutImageProcessor"),
        ({"image_processor_type": "ConvNextImageProcessor"}, "ConvNextImageProcessor is none of Beit, CLIP"),
        ({"image_processor_type": None}, "missing"),
        ({"do_resize": False}, "do_resize"),
        ({"do_pad": True}, "do_pad"),
        ({"size": {"shortest_edge": 32}}, "short side"),
        ({"size": {"shortest_edge": 32, "longest_edge": 64}}, "longest_edge"),
        ({"do_center_crop": True, "crop_size": 48}, r"crop_size \(48, 48\) is larger"),
        ({"do_center_crop": True}, "crop_size is None"),
        ({"resample": None}, "resample"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"image_std": None}, "image_std"),
    ],
)
def test_unsupported_settings_are_refused_by_key(changed: dict[str, Any], named: str) -> None:
    read_preprocessing(PLAIN)
    with pytest.raises(ValueError, match=named):
        read_preprocessing(PLAIN | changed)


def test_a_wd_tagger_gets_the_whole_picture_on_a_white_square_in_bgr() -> None:
    tagger = wd_tagger(40, 40)
    red = Image.new("RGB", (40, 20), (255, 0, 0))
    (values_HWC,) = tagger.normalised(tagger.resized(red)[None])
    assert values_HWC.dtype == np.float32
    np.testing.assert_array_equal(values_HWC[[0, 9, 30, 39]], 255)
    np.testing.assert_array_equal(values_HWC[12:28], np.broadcast_to(np.float32([0, 0, 255]), (16, 40, 3)))
