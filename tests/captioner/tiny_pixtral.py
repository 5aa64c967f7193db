"""Writes a random Pixtral of about a megabyte in either layout, in seconds.

    .venv-captioner/bin/python tests/captioner/tiny_pixtral.py FOLDER [mistral]

Its answers are nonsense in ASCII that depends on picture, prompt and seed, like the answers of a trained model.
"""

import json
import string
import sys
from pathlib import Path

import mistral_common
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PixtralImageProcessor,
    PixtralProcessor,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
)

from captioner.prompts import TEMPLATES

PATCH = 16  # pixels
SPECIAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
WORDS = 600  # tokens without the special ones
_CHAT = (
    "{{ bos_token }}{% for message in messages %}[INST]{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% else %}[IMG]{% endif %}"
    "{% endfor %}{% endif %}[/INST]{% endfor %}"
)


def save_tiny_pixtral(folder: Path, seed: int = 0) -> Path:
    """Write config, weights, tokenizer and processor; equal for equal seeds."""
    tokenizer = _tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    config = LlavaConfig(
        text_config=MistralConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=8192,
            initializer_range=0.3, bos_token_id=ids["<s>"], eos_token_id=ids["</s>"],
        ),
        vision_config=PixtralVisionConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, head_dim=32,
            image_size=1024, patch_size=PATCH, initializer_range=0.3,
        ),
        image_token_index=ids["[IMG]"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        projector_hidden_act="gelu",
    )  # fmt: skip
    torch.manual_seed(seed)
    LlavaForConditionalGeneration(config).float().save_pretrained(folder)
    processor = PixtralProcessor(
        image_processor=PixtralImageProcessor(
            size={"longest_edge": 1024}, patch_size={"height": PATCH, "width": PATCH}
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        chat_template=_CHAT,
    )
    processor.save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    """Pieces of the prompt's words. Anything but ASCII is unknown, so that all answers are text."""
    bpe = Tokenizer(BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = ByteLevel(add_prefix_space=False)
    bpe.decoder = ByteLevelDecoder()
    alphabet = list(string.ascii_letters + string.digits + string.punctuation + "ĠĊ")
    trainer = BpeTrainer(
        vocab_size=len(SPECIAL) + WORDS, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([template.instructions for template in TEMPLATES.values()], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        additional_special_tokens=[token for token in SPECIAL if token.startswith("[")],
    )


def save_tiny_mistral_layout(folder: Path, seed: int = 0) -> Path:
    """The same in Mistral's layout: params.json, consolidated.safetensors, and a tokenizer cut from tekken."""
    folder.mkdir(parents=True, exist_ok=True)
    size, inner, heads, kv_heads, head, layers, words = 64, 128, 2, 1, 32, 2, 2048
    vision = {
        "hidden_size": size, "num_channels": 3, "image_size": 1024, "patch_size": PATCH, "rope_theta": 1e4,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads, "adapter_bias": True,
        "image_token_id": 10, "max_image_size": 1024,
    }  # fmt: skip
    params = {
        "dim": size, "n_layers": layers, "head_dim": head, "hidden_dim": inner, "n_heads": heads,
        "n_kv_heads": kv_heads, "norm_eps": 1e-5, "vocab_size": words, "rope_theta": 1e6,
        "max_position_embeddings": 8192, "vision_encoder": vision,
    }  # fmt: skip
    (folder / "params.json").write_text(json.dumps(params))
    tekken = json.loads((Path(mistral_common.__file__).parent / "data/tekken_240911.json").read_text())
    tekken["config"]["default_vocab_size"] = words
    tekken["vocab"] = tekken["vocab"][: words - tekken["config"]["default_num_special_tokens"]]
    tekken["multimodal"] = {"image_patch_size": PATCH, "max_image_size": 1024}
    (folder / "tekken.json").write_text(json.dumps(tekken))

    def layer(prefix: str, queries: int, keys: int) -> dict[str, tuple[int, ...]]:
        shapes = {
            "attention.wq": (queries, size), "attention.wk": (keys, size), "attention.wv": (keys, size),
            "attention.wo": (size, queries), "attention_norm": (size,), "ffn_norm": (size,),
            "feed_forward.w1": (inner, size), "feed_forward.w2": (size, inner), "feed_forward.w3": (inner, size),
        }  # fmt: skip
        return {f"{prefix}.{name}": shape for name, shape in shapes.items()}

    shapes: dict[str, tuple[int, ...]] = {
        "tok_embeddings": (words, size), "norm": (size,), "output": (words, size),
        "vision_encoder.patch_conv": (size, 3, PATCH, PATCH), "vision_encoder.ln_pre": (size,),
        "vision_language_adapter.w_in": (size, size), "vision_language_adapter.w_out": (size, size),
    }  # fmt: skip
    for number in range(layers):
        shapes |= layer(f"layers.{number}", heads * head, kv_heads * head)
        shapes |= layer(f"vision_encoder.transformer.layers.{number}", size, size)
    torch.manual_seed(seed)
    weights = {  # those with one axis are norms
        f"{name}.weight": torch.randn(shape) * 0.3 if len(shape) > 1 else torch.ones(shape)
        for name, shape in shapes.items()
    }
    weights |= {f"vision_language_adapter.{name}.bias": torch.zeros(size) for name in ("w_in", "w_out")}
    save_file(weights, folder / "consolidated.safetensors")
    return folder


if __name__ == "__main__":
    save = save_tiny_mistral_layout if sys.argv[2:] == ["mistral"] else save_tiny_pixtral
    print(save(Path(sys.argv[1])))
