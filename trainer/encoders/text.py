"""Prompt -> embeddings: hidden states of a frozen causal language model.

The only file that knows transformers. Qwen3-0.6B, Gemma3-1B (or the text part of a larger Gemma3, which also sees) and
a small embedded default, made from a dataset's own captions, are saved in the same layout and loaded by the same code.

Legend: B batch, T text tokens, D width of the encoder.
"""

import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

# Texts are short: threads of the tokenizer would gain nothing and warn about every fork of the process. Read at import.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoConfig
from transformers.utils import logging

from trainer.encoders.pretrained import first_line, folder_at_hand, frozen_dtype, model_folder

# Few lengths, so few compiled graphs, and yet little padding. Without a compiler a smaller multiple is faster.
LENGTH_MULTIPLE = 32

_CONFIG_FILES = ("config.json",)
_MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
_KIND = ("text encoder", "config.json, tokenizer.json and *.safetensors", "Qwen/Qwen3-0.6B")

TextLayers = Literal["last", "average"]


class TextEncoder:
    """A frozen language model with its tokenizer.

    layers: "last" gives its last hidden state, as the model itself normalises it; "average" the mean over all of its
    layers, each normalised without weights (arXiv 2506.08210, section 4), which needs XUTConfig.text_layers="average".
    """

    def __init__(self, model: Any, tokenizer: Any, layers: TextLayers = "last") -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.layers = layers
        self.dim = int(model.config.get_text_config().hidden_size)
        special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        # Stands for an empty text, which many tokenizers turn into no token at all, and fills up short ones.
        self._empty_token = next(token for token in special if token is not None)
        self._padding_token = next(token for token in reversed(special) if token is not None)

    @torch.no_grad()
    def encode(
        self, texts: Sequence[str], max_tokens: int, multiple: int = LENGTH_MULTIPLE, padding_is_text: bool = False
    ) -> tuple[Tensor, Tensor]:
        """fp32 embeddings (B, T, D), 0 at padding, and the mask (B, T), True at real tokens.

        T is the longest text's length rounded up to a `multiple`, and max_tokens at most; what is longer is cut.
        Padding is on the right, where it cannot reach a causal model's real tokens. Every text has a token at least.

        padding_is_text, as the public weights were trained: T is max_tokens, padding keeps the hidden states that the
        model gives it, and the mask is True everywhere.
        """
        assert texts, "nothing to encode"
        if max_tokens < 1:
            raise ValueError(f"max_tokens {max_tokens} must be at least 1")
        ids = self.tokenizer(list(texts), verbose=False)["input_ids"]
        ids = [row[:max_tokens] or [self._empty_token] for row in ids]
        longest = max(len(row) for row in ids)
        length = max_tokens if padding_is_text else min(max_tokens, math.ceil(longest / multiple) * multiple)
        padding = self._padding_token if padding_is_text else self._empty_token  # which is masked anyway
        ids_BT = torch.tensor([row + [padding] * (length - len(row)) for row in ids])
        mask_BT = torch.arange(length) < torch.tensor([len(row) for row in ids])[:, None]
        ids_BT, mask_BT = ids_BT.to(self.model.device), mask_BT.to(self.model.device)
        average = self.layers == "average"
        output = self.model(
            input_ids=ids_BT, attention_mask=mask_BT.long(), use_cache=False, output_hidden_states=average
        )
        hidden_BTD: Tensor = _average(output.hidden_states[1:]) if average else output.last_hidden_state
        if padding_is_text:
            return hidden_BTD.to(torch.float32), torch.ones_like(mask_BT)
        return hidden_BTD.to(torch.float32).masked_fill(~mask_BT[:, :, None], 0), mask_BT


def _average(layers: Sequence[Tensor]) -> Tensor:
    """The mean of (B, T, D) hidden states, each normalised first: deep layers are larger and would outvote the rest."""
    return torch.stack([F.layer_norm(hidden_BTD, hidden_BTD.shape[-1:]) for hidden_BTD in layers]).mean(0)


def load_text_encoder(
    name: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    layers: TextLayers = "last",
) -> TextEncoder:
    """From a folder, without touching the network, or from a name of the Hugging Face hub, downloaded once.

    dtype: None is bfloat16 on a GPU and fp32 elsewhere. Weights in safetensors only, and all of them; code that comes
    with a model is never run. ValueError, with the mend, where that fails.
    """
    folder = model_folder(name, _MODEL_FILES, *_KIND)
    from transformers import AutoModel, AutoTokenizer  # seconds, which whoever only asks for a width should not wait

    with quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            model, report = AutoModel.from_pretrained(
                folder,
                dtype=dtype or frozen_dtype(device),
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(_not_loaded(name, error)) from error
    if report["missing_keys"]:  # which transformers would leave random
        missing = f"{len(report['missing_keys'])} weights are missing, such as {min(report['missing_keys'])}"
        raise ValueError(_not_loaded(name, ValueError(missing)))
    # Of a model that also sees, the language model alone, which is its own decoder: the rest would only take memory.
    return TextEncoder(model.get_decoder().to(device), tokenizer, layers)


def text_width(name: str | Path) -> int:
    """The D of `load_text_encoder(name)`, read from its config alone."""
    folder = model_folder(name, _CONFIG_FILES, *_KIND)
    with quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(_not_loaded(name, error)) from error
    return int(config.get_text_config().hidden_size)


def token_counts(texts: Sequence[str], name: str) -> list[int] | None:
    """Tokens of each text by the tokenizer of the text encoder `name`, by one made from these texts for "local"; None
    where it is not on this machine."""
    if name == "local":
        tokenizer = _train_tokenizer(texts)
    else:
        folder = folder_at_hand(name)
        if folder is None or not (folder / "tokenizer.json").is_file():
            return None
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [len(encoding.ids) for encoding in tokenizer.encode_batch(list(texts))]


def _not_loaded(name: str | Path, error: Exception) -> str:
    return (
        f"the text encoder {str(name)!r} cannot be loaded ({first_line(error)}). It needs config.json, tokenizer.json "
        "and weights as *.safetensors, of a model that transformers knows without code of its own"
    )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps transformers' remarks and its progress bar for loading, which takes a second, off the terminal."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


# --- The embedded default -------------------------------------------------------------------------------------------

_VOCABULARY = 2048  # at most
_END = "<|endoftext|>"

# 64 texts of 32 tokens in 8 ms on one CPU core, besides 3 ms of tokenizer; twice the heads and feed-forward take 12 ms
# and tell a probe no more.
_WIDTH = 128
_HEADS, _HEAD_DIM = 2, 16
_MLP_WIDTH = 32
# The image model takes text as a bag of tokens, so what belongs together must meet here. The first layer sees three
# tokens: with it a linear probe on "ball" tells the colour word before it in 100% of the sample dataset's texts, with
# two layers that see everything in 78%. The second layer sees all that went before.
_WINDOW = 3
_LAYERS = ("sliding_attention", "full_attention")
# Root mean square of what a sublayer adds to embeddings of 1, if it copied one token: enough to be read by a probe,
# and the nearest embedding is still the token's own (cosine 0.8 on average).
_ATTENTION_GAIN = 0.7
_MLP_GAIN = 0.25


def build_local_text_encoder(captions: Iterable[str], folder: Path, seed: int) -> None:
    """Makes a tokenizer for these captions and a random Qwen3 that keeps its tokens apart; the same for the same seed.

    The folder appears whole or not at all. It must not exist yet.
    """
    tokenizer = _train_tokenizer(captions)
    model = _random_qwen3(tokenizer.get_vocab_size(), tokenizer.token_to_id(_END), seed)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with quiet_transformers():
        model.save_pretrained(partial)
        from transformers import PreTrainedTokenizerFast

        wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END, pad_token=_END)
        wrapped.save_pretrained(partial)
    partial.rename(folder)


def _train_tokenizer(captions: Iterable[str]) -> Tokenizer:
    """Byte-pair encoding in lower case. Words become whole, frequent ones first, while the vocabulary has room; what
    was never seen falls back to pieces and bytes, so no text loses anything but its case.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        min_frequency=1,
        special_tokens=[_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    return tokenizer


def _random_qwen3(vocabulary: int, end: int, seed: int) -> Any:
    """Embeddings of unit variance dominate the residual stream; attention and feed-forward add their gains to it."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=_WIDTH,
        intermediate_size=_MLP_WIDTH,
        num_hidden_layers=len(_LAYERS),
        num_attention_heads=_HEADS,
        num_key_value_heads=_HEADS,
        head_dim=_HEAD_DIM,
        layer_types=list(_LAYERS),
        use_sliding_window=True,
        sliding_window=_WINDOW,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=end,
        pad_token_id=end,
    )
    with torch.random.fork_rng(devices=[]):  # transformers draws weights of its own from the global generator
        model = Qwen3ForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    gains = {"o_proj": _ATTENTION_GAIN, "down_proj": _MLP_GAIN}
    for name, p in model.named_parameters():
        if p.dim() == 2:
            fan_in = 1 if "embed_tokens" in name else p.shape[1]
            gain = next((gain for part, gain in gains.items() if part in name), 1.0)
            p.data.normal_(0, gain / fan_in**0.5, generator=generator)
    return model
