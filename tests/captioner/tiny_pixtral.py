"""A random Pixtral of about a megabyte in Hugging Face's layout: real files for the real engine, made in seconds.

    .venv-captioner/bin/python tests/captioner/tiny_pixtral.py FOLDER

What it says is nonsense in ASCII, but it depends on picture, prompt and seed as a trained model's words do.
"""

import string
import sys
from pathlib import Path

import torch
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
WORDS = 600  # tokens, beside the special ones
_CHAT = (
    "{{ bos_token }}{% for message in messages %}[INST]{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% else %}[IMG]{% endif %}"
    "{% endfor %}{% endif %}[/INST]{% endfor %}"
)


def save_tiny_pixtral(folder: Path, seed: int = 0) -> Path:
    """Writes config, weights, tokenizer and processor; the same for the same seed."""
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
    """Pieces of the prompt's own words; whatever is not ASCII is unknown, so that all it can say is text."""
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


if __name__ == "__main__":
    print(save_tiny_pixtral(Path(sys.argv[1])))
