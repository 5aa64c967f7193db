"""The file layout of a checkpoint and its prompt, from small copies of real config files and from hub names."""

import json
from pathlib import Path
from typing import Any

import pytest

from captioner.prompt_layout import PromptLayout, detect_layout
from captioner.prompts import build_prompt
from captioner.requests import CaptionRequest

TAGS = {"special": ["1girl", "solo"], "general": ["white hair", "green eyes"]}
HF_CONFIG: dict[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "image_token_index": 10,
    "text_config": {"model_type": "mistral"},
    "vision_config": {"model_type": "pixtral"},
}
HF_TOKENS = {
    "<unk>": 0,
    "<s>": 1,
    "</s>": 2,
    "[INST]": 3,
    "[/INST]": 4,
    "[IMG]": 10,
    "[IMG_BREAK]": 12,
    "[IMG_END]": 13,
}


def tokenizer(tokens: dict[str, int], post_processor: Any = None) -> dict[str, Any]:
    added = [{"id": number, "content": token, "special": True} for token, number in tokens.items()]
    return {"added_tokens": added, "post_processor": post_processor, "model": {"type": "BPE"}}


def hf_files(**changed: Any) -> dict[str, Any]:
    """Files of a folder in the Hugging Face layout; None leaves one out."""
    files = {
        "config.json": HF_CONFIG,
        "tokenizer.json": tokenizer(HF_TOKENS),
        "tokenizer_config.json": {"bos_token": "<s>"},
        "processor_config.json": {"image_token": "[IMG]", "processor_class": "PixtralProcessor"},
    }
    return {**files, **{name.replace("_json", ".json"): value for name, value in changed.items()}}


def folder_of(root: Path, files: dict[str, Any]) -> Path:
    for name, value in files.items():
        if value is not None:
            (root / name).write_text(value if isinstance(value, str) else json.dumps(value))
    return root


MISTRAL = {"params.json": {"dim": 5120, "vision_encoder": {"patch_size": 16}}, "tekken.json": {"config": {}}}


def test_the_hugging_face_layout_is_prompted_with_text(tmp_path: Path) -> None:
    layout = detect_layout(folder_of(tmp_path, hf_files()))
    assert layout == PromptLayout(kind="hf", bos="<s>")
    prompt = build_prompt(CaptionRequest("danbooru:1", TAGS))
    assert layout.texts(prompt) == (f"<s>[INST]{prompt.instructions}", f"{prompt.hints}[/INST]")


def test_the_mistral_layout_takes_chat_messages(tmp_path: Path) -> None:
    layout = detect_layout(folder_of(tmp_path, MISTRAL))
    assert layout == PromptLayout(kind="mistral")
    prompt = build_prompt(CaptionRequest("danbooru:1", TAGS))
    picture = {"type": "image_pil"}
    assert prompt.content(picture) == [
        {"type": "text", "text": prompt.instructions},
        picture,
        {"type": "text", "text": prompt.hints},
    ]


def test_the_chat_template_of_a_folder_is_ignored(tmp_path: Path) -> None:
    wrong = {"chat_template": "<|user|>\n<|image_1|>\n{{ content }}<|end|>\n<|assistant|>\n"}
    layout = detect_layout(folder_of(tmp_path, hf_files(chat_template_json=wrong, config_json=HF_CONFIG)))
    assert "[INST]" in "".join(layout.texts(build_prompt(CaptionRequest("danbooru:1", {}))))
    assert "<|user|>" not in "".join(layout.texts(build_prompt(CaptionRequest("danbooru:1", {}))))


TEMPLATE_POST_PROCESSOR = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
}


@pytest.mark.parametrize(("changed", "bos"), [
    ({}, "<s>"),
    ({"tokenizer_json": tokenizer(HF_TOKENS, TEMPLATE_POST_PROCESSOR)}, ""),
    ({"tokenizer_config_json": {"bos_token": "<s>", "add_bos_token": True}}, ""),
    ({"tokenizer_config_json": {"bos_token": {"content": "<s>"}, "add_bos_token": False}}, "<s>"),
    ({"tokenizer_json": tokenizer({t: n for t, n in HF_TOKENS.items() if t != "<s>"})}, ""),
    ({"tokenizer_config_json": None}, "<s>"),
])  # fmt: skip
def test_the_start_token_occurs_once(tmp_path: Path, changed: dict[str, Any], bos: str) -> None:
    assert detect_layout(folder_of(tmp_path, hf_files(**changed))).bos == bos


@pytest.mark.parametrize("processor", [{}, {"image_token": "<pic>"}, {"image_token": {"content": "<pic>"}}])
def test_the_image_token_is_that_of_the_processor_or_the_config(tmp_path: Path, processor: dict[str, Any]) -> None:
    tokens = {token: number for token, number in HF_TOKENS.items() if token != "[IMG]"} | {"<pic>": 10}
    files = hf_files(tokenizer_json=tokenizer(tokens), processor_config_json=processor)
    assert detect_layout(folder_of(tmp_path, files)).image_token == "<pic>"


@pytest.mark.parametrize(("files", "message"), [
    ({}, "neither config.json .* nor params.json"),
    (hf_files(config_json={**HF_CONFIG, "architectures": ["Qwen2VLForConditionalGeneration"]}), "Qwen2VL"),
    (hf_files(config_json={**HF_CONFIG, "vision_config": {"model_type": "clip_vision_model"}}), "clip_vision_model"),
    (hf_files(config_json={"model_type": "llama"}), "give a Pixtral checkpoint"),
    (hf_files(config_json="{broken"), "cannot read .*config.json"),
    (hf_files(config_json="[]"), "no JSON object"),
    (hf_files(processor_config_json=None), "no processor_config.json: download"),
    (hf_files(tokenizer_json=None), "no tokenizer.json: download"),
    (hf_files(tokenizer_json=tokenizer({"[IMG]": 10})), r"no token \[INST\] \[/INST\]"),
    (hf_files(tokenizer_json=tokenizer({"[INST]": 3, "[/INST]": 4})), r"no token \[IMG\]"),
    ({"params.json": {"dim": 5120}, "tekken.json": {}}, "no vision_encoder"),
    ({"params.json": MISTRAL["params.json"]}, "no tekken.json"),
])  # fmt: skip
def test_another_folder_is_refused_with_advice(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        detect_layout(folder_of(tmp_path, files))
    assert "\n" not in str(refused.value)


def test_older_folders_have_a_preprocessor_config(tmp_path: Path) -> None:
    files = hf_files(processor_config_json=None, preprocessor_config_json={"patch_size": 16})
    assert detect_layout(folder_of(tmp_path, files)).image_token == "[IMG]"


def test_a_folder_with_both_layouts_is_read_as_hugging_face(tmp_path: Path) -> None:
    assert detect_layout(folder_of(tmp_path, {**MISTRAL, **hf_files()})).kind == "hf"


@pytest.mark.parametrize(("name", "layout"), [
    ("mistral-community/pixtral-12b", PromptLayout(kind="hf")),
    ("mistralai/Pixtral-12B-2409", PromptLayout(kind="mistral")),
    ("owner/pixtral-12b-FP8-dynamic", PromptLayout(kind="hf")),
])  # fmt: skip
def test_the_layout_of_a_hub_name_follows_from_the_name(name: str, layout: PromptLayout) -> None:
    assert detect_layout(name) == layout


@pytest.mark.parametrize(("name", "message"), [
    ("no/such/folder", "is not a folder"),
    ("/no/such", "is not a folder"),
    ("./pixtral", "is not a folder"),
    ("pixtral-12b", "is not a folder"),
    ("owner/llava-7b", "download it and give its folder"),
])  # fmt: skip
def test_other_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        detect_layout(name)
