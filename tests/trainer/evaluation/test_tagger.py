"""Tag agreement equals counts by hand; a tagger in the WD layout is asked for general tags only."""

import csv
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from pipeline.core.errors import UsageError
from trainer.evaluation.tagger import TagAgreement, Tagger, tag_agreement

SIDE = 16  # pixels
ROWS = [("red_hair", 0), ("^_^", 0), ("blue sky", 0), ("Hatsune_Miku", 4), ("general", 9)]


def save_tagger(folder: Path) -> Path:
    """A WD tagger (pictures as BGR, 0 to 255). It finds one of the first three labels if the mean red, green or blue is
    above 128, and always the last two."""
    weights_CL = np.float32([[0, 0, 1, 0, 0], [0, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    bias_L = np.float32([-128, -128, -128, 9, 9])
    nodes = [
        helper.make_node("ReduceMean", ["pixels", "axes"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "weights"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["logits"]),
        helper.make_node("Sigmoid", ["logits"], ["output"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tagger",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["N", SIDE, SIDE, 3])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["N", len(ROWS)])],
        [
            numpy_helper.from_array(np.int64([1, 2]), "axes"),
            numpy_helper.from_array(weights_CL, "weights"),
            numpy_helper.from_array(bias_L, "bias"),
        ],
    )
    folder.mkdir()
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), folder / "model.onnx"
    )
    with (folder / "selected_tags.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("tag_id", "name", "category"), *((n, *row) for n, row in enumerate(ROWS))])
    return folder


def plain(red: int, green: int, blue: int) -> NDArray[np.uint8]:
    return np.full((24, 24, 3), (red, green, blue), np.uint8)


def test_a_wd_tagger_knows_its_general_tags_as_words(tmp_path: Path) -> None:
    tagger = Tagger.load(save_tagger(tmp_path / "tagger"))
    assert list(tagger.columns) == ["red hair", "^_^", "blue sky"]
    asked = tagger.asked(["1girl, hatsune miku, Red hair, ^_^", "a red hair, blue sky", ""])
    assert asked.tolist() == [[True, True, False], [False, False, True], [False, False, False]]


def test_tags_are_found_from_the_threshold_on(tmp_path: Path) -> None:
    tagger = Tagger.load(save_tagger(tmp_path / "tagger"))
    pictures = [plain(255, 0, 255), plain(0, 255, 0)] * 10
    assert tagger.found(pictures).tolist() == [[True, False, True], [False, True, False]] * 10
    assert tagger.found([]).shape == (0, 3)


def test_agreement_and_chance_equal_counts_by_hand() -> None:
    prompts = ["a, b", "a", "c"]
    asked = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 1]], bool)
    found = np.array([[1, 0, 0], [1, 0, 1], [0, 1, 1]], bool)
    # Own: a of (a, b), a, c. Others: (a, b) finds a in picture 1 and b in 2, a in 0, c in 1: 4 of 2 x 4.
    assert tag_agreement(prompts, asked, found) == TagAgreement(asked=4, found=3, share=0.75, chance=0.5)


def test_the_same_prompt_with_another_seed_does_not_count_as_chance() -> None:
    asked, found = np.array([[1, 0], [1, 0], [0, 1]], bool), np.array([[1, 0], [1, 0], [1, 1]], bool)
    # "a" against picture 2, twice found; "b" against pictures 0 and 1, not found.
    assert tag_agreement(["a", "a", "b"], asked, found) == TagAgreement(asked=3, found=3, share=1.0, chance=0.5)
    assert tag_agreement(["a"], asked[:1], found[:1]).chance is None


def test_prompts_without_known_tags_have_no_agreement() -> None:
    nothing = np.zeros((2, 3), bool)
    agreement = tag_agreement(["x", "y"], nothing, ~nothing)
    assert agreement.line() == {"tag_agreement": None, "tag_chance": None}


def test_a_folder_without_a_tagger_is_refused_by_the_name_of_its_flag(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^--tagger .*nowhere is no folder"):
        Tagger.load(tmp_path / "nowhere")
