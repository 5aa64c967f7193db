"""Text encoders: prompts -> hidden states of a frozen causal language model (HDM report, section 3.2).

Qwen3-0.6B, Gemma3-1B, the text part of a larger multimodal Gemma3, and a small embedded default built from a dataset's
captions all have the same layout on disk and are loaded by the same code.

Axes: B batch, T text tokens, D width of the encoder.
"""

import math
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

# Texts are short: tokenizer threads would gain nothing and warn about every fork. The variable is read at import.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoConfig

from trainer.encoders.pretrained import cached_folder, first_line, frozen_dtype, pretrained_folder, quiet

# Few lengths, so few compiled graphs, with little padding. Without a compiler a smaller multiple is faster.
LENGTH_MULTIPLE = 32

_KEPT_AT_END = 32  # tokens of a text that is too long: its quality, era, rating and meta words

_CONFIG_FILES = ("config.json",)
_MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
_KIND = ("text encoder", "config.json, tokenizer.json and *.safetensors", "Qwen/Qwen3-0.6B")

TextLayers = Literal["last", "average"]


class TextEncoder:
    """A frozen language model with its tokenizer.

    layers: "last" returns the last hidden state, after the model's final norm. "average" returns the mean over all
    layers of their layer-normalised hidden states (arXiv 2506.08210, section 4). prefix: the model reads a constant
    token before every text, whose state is dropped. The first token of a causal model is an attention sink: its state
    hardly depends on the token (arXiv 2309.17453), so without a prefix the first word of every text is lost.

    Both are the XUTConfig.text_layers and XUTConfig.text_prefix of the model that gets the states.
    """

    def __init__(self, model: Any, tokenizer: Any, layers: TextLayers = "last", prefix: bool = False) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.layers = layers
        self.prefix = prefix
        self.cut_texts = 0  # so far
        self.dim = int(model.config.get_text_config().hidden_size)
        special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        # For empty texts, which many tokenizers turn into no token at all, and for padding that is masked.
        self._empty_token = next(token for token in special if token is not None)
        self._padding_token = next(token for token in reversed(special) if token is not None)
        # BOS, or the end-of-text token of models without BOS, such as Qwen3.
        self._prefix_tokens = [self._empty_token] if prefix else []

    def lengths(self, texts: Sequence[str], max_tokens: int) -> list[int]:
        """Tokens of each text, at most max_tokens, without prefix and padding."""
        ids = self.tokenizer(list(texts), verbose=False, add_special_tokens=not self.prefix)["input_ids"]
        return [max(1, min(len(row), max_tokens)) for row in ids]

    @torch.no_grad()
    def encode(
        self, texts: Sequence[str], max_tokens: int, multiple: int = LENGTH_MULTIPLE, padding_is_text: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Embeddings (B, T, D), float32, 0 at padding, and a mask (B, T), True at real tokens.

        T is the length of the longest text rounded up to a multiple, at most max_tokens. Longer texts are cut before
        their last quarter, at most _KEPT_AT_END tokens, and counted in `cut_texts`: a training text ends with quality,
        era, rating and meta words, and before them comes the caption, whose end is the least loss. Padding is on the
        right, where it cannot affect the real tokens of a causal model. Every text has at least one token.

        padding_is_text, for the public weights: T is max_tokens, longer texts are cut at their end, padding has the
        hidden states that the model computes for it, and the mask is True everywhere.
        """
        assert texts, "nothing to encode"
        if max_tokens < 1:
            raise ValueError(f"max_tokens {max_tokens} must be at least 1")
        # With a prefix, the BOS that some tokenizers add would be a second one.
        ids = self.tokenizer(list(texts), verbose=False, add_special_tokens=not self.prefix)["input_ids"]
        self.cut_texts += sum(len(row) > max_tokens for row in ids)
        end = _kept_at_end(max_tokens, padding_is_text)
        ids = [_shortened(row, max_tokens, end) or [self._empty_token] for row in ids]
        longest = max(len(row) for row in ids)
        length = max_tokens if padding_is_text else min(max_tokens, math.ceil(longest / multiple) * multiple)
        padding = self._padding_token if padding_is_text else self._empty_token  # which is masked anyway
        ids_BT = torch.tensor([self._prefix_tokens + row + [padding] * (length - len(row)) for row in ids])
        mask_BT = torch.arange(length) < torch.tensor([len(row) for row in ids])[:, None]
        ids_BT, mask_BT = ids_BT.to(self.model.device), mask_BT.to(self.model.device)
        # Padding on the right cannot affect the real tokens of a causal model, so they need no mask.
        attended = {"attention_mask": mask_BT.long()} if padding_is_text else {}
        average = self.layers == "average"
        output = self.model(input_ids=ids_BT, use_cache=False, output_hidden_states=average, **attended)
        hidden_BTD: Tensor = output.last_hidden_state
        if average:  # normalised first, or the deep layers would dominate by their scale
            layers = [F.layer_norm(layer_BTD, layer_BTD.shape[-1:]) for layer_BTD in output.hidden_states[1:]]
            hidden_BTD = torch.stack(layers).mean(0)
        hidden_BTD = hidden_BTD[:, len(self._prefix_tokens) :].to(torch.float32)
        if padding_is_text:
            return hidden_BTD, torch.ones_like(mask_BT)
        return hidden_BTD.masked_fill(~mask_BT[:, :, None], 0), mask_BT

    def unread(self, text: str, max_tokens: int, padding_is_text: bool = False) -> str:
        """The part of a text that `encode` cuts out, as it was written; "" if all of it is read."""
        places = self.tokenizer(text, verbose=False, add_special_tokens=not self.prefix, return_offsets_mapping=True)[
            "offset_mapping"
        ]
        if len(places) <= max_tokens:
            return ""
        end = _kept_at_end(max_tokens, padding_is_text)
        cut = places[max_tokens - end : len(places) - end]
        return text[cut[0][0] : cut[-1][1]].strip()

    @torch.no_grad()
    def statistics(self, texts: Sequence[str], max_tokens: int, batch: int = 32) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each feature over all tokens of these texts, (D,) each, float32 on the CPU.

        In the last layer of a language model a few features have most of the energy and a mean far from 0. Without
        standardisation (XUTConfig.text_features) they drown what tells texts apart.
        """
        count = 0
        total_D, squares_D = torch.zeros(self.dim, dtype=torch.float64), torch.zeros(self.dim, dtype=torch.float64)
        for start in range(0, len(texts), batch):
            hidden_BTD, mask_BT = self.encode(texts[start : start + batch], max_tokens)
            tokens_KD = hidden_BTD[mask_BT].cpu().double()
            count += len(tokens_KD)
            total_D += tokens_KD.sum(0)
            squares_D += tokens_KD.square().sum(0)
        assert count, "no texts"
        mean_D = total_D / count
        deviation_D = (squares_D / count - mean_D.square()).clamp(min=0).sqrt()
        # A feature that does not vary must not be blown up.
        return mean_D.float(), deviation_D.clamp(min=max(1e-6, 0.01 * deviation_D.median().item())).float()


def _kept_at_end(max_tokens: int, padding_is_text: bool) -> int:
    """Tokens at the end of a text that is too long that are kept."""
    return 0 if padding_is_text else min(_KEPT_AT_END, max_tokens // 4)


def _shortened(row: list[int], most: int, end: int) -> list[int]:
    """At most `most` tokens: the first ones and the last `end`."""
    return row if len(row) <= most else row[: most - end] + row[len(row) - end :]


def load_text_encoder(
    name: str | Path, device: torch.device | str = "cpu", layers: TextLayers = "last", prefix: bool = False
) -> TextEncoder:
    """Loads an encoder from a folder, without network access, or from a Hugging Face hub name, downloaded once.

    It computes in bfloat16 on a GPU and in float32 elsewhere. Only complete weights in safetensors are accepted, and
    code that comes with a model never runs. Raises ValueError if the model cannot be loaded.
    """
    folder = pretrained_folder(name, _MODEL_FILES, *_KIND)
    from transformers import AutoModel, AutoTokenizer  # lazy: takes seconds, which `text_width` does not need

    with quiet("transformers"):
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            model, report = AutoModel.from_pretrained(
                folder,
                dtype=frozen_dtype(device),
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(_not_loaded(name, error)) from error
    if report["missing_keys"]:  # transformers would initialise these randomly
        missing = f"{len(report['missing_keys'])} weights are missing, such as {min(report['missing_keys'])}"
        raise ValueError(_not_loaded(name, ValueError(missing)))
    # The language model alone: the vision tower of a multimodal model would only take memory.
    return TextEncoder(model.get_decoder().to(device), tokenizer, layers, prefix)


def text_width(name: str | Path) -> int:
    """The width D of `load_text_encoder(name)`, from its config alone. Raises ValueError if it cannot be read."""
    folder = pretrained_folder(name, _CONFIG_FILES, *_KIND)
    with quiet("transformers"):
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(_not_loaded(name, error)) from error
    return int(config.get_text_config().hidden_size)


def token_counts(texts: Sequence[str], name: str) -> list[int] | None:
    """The number of tokens of each text; None if the text encoder `name` is not on this machine.

    For "local" the tokenizer is trained on these texts.
    """
    if name == "local":
        tokenizer = _train_tokenizer(texts)
    else:
        folder = cached_folder(name)
        if folder is None or not (folder / "tokenizer.json").is_file():
            return None
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [len(encoding.ids) for encoding in tokenizer.encode_batch(list(texts))]


def _not_loaded(name: str | Path, error: Exception) -> str:
    return (
        f"the text encoder {str(name)!r} cannot be loaded ({first_line(error)}). It needs config.json, tokenizer.json "
        "and weights as *.safetensors, of a model that transformers supports without remote code"
    )


# --- The embedded default -------------------------------------------------------------------------------------------

_VOCABULARY = 2048  # at most
_END = "<|endoftext|>"

# 64 texts of 32 tokens take 8 ms on one CPU core, plus 3 ms for the tokenizer. Twice the heads and feed-forward width
# take 12 ms, and a linear probe reads no more from them.
_WIDTH = 128
_HEADS, _HEAD_DIM = 2, 16
_MLP_WIDTH = 32
# The image model sees text as a bag of tokens, so related words must be combined here. The first layer attends to three
# tokens, the second to all before. A linear probe on "ball" then recovers the colour word before it in 100% of the
# sample dataset's texts; with two layers of full attention, in 78%.
_WINDOW = 3
_LAYERS = ("sliding_attention", "full_attention")
# RMS of what a sublayer that copies one token adds to embeddings of RMS 1: enough for a probe to read, while a token's
# nearest embedding is still its own (cosine 0.8 on average).
_ATTENTION_GAIN = 0.7
_MLP_GAIN = 0.25


def build_local_text_encoder(captions: Iterable[str], folder: Path, seed: int) -> None:
    """Writes an encoder folder: a tokenizer trained on the captions and a random Qwen3, determined by the seed.

    The folder must not exist yet and appears whole.
    """
    tokenizer = _train_tokenizer(captions)
    model = _random_qwen3(tokenizer.get_vocab_size(), tokenizer.token_to_id(_END), seed)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with quiet("transformers"):
        model.save_pretrained(partial)
        from transformers import PreTrainedTokenizerFast

        wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END, pad_token=_END)
        wrapped.save_pretrained(partial)
    partial.rename(folder)


def _train_tokenizer(captions: Iterable[str]) -> Tokenizer:
    """Byte-pair encoding of lower-case text.

    Frequent words become single tokens while the vocabulary has room. Unseen text falls back to pieces and bytes, so
    nothing but case is lost.
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
    """A random Qwen3 whose unit-variance embeddings dominate the residual stream, so that tokens stay distinct."""
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
    with torch.random.fork_rng(devices=[]):  # transformers initialises from the global generator
        model = Qwen3ForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    gains = {"o_proj": _ATTENTION_GAIN, "down_proj": _MLP_GAIN}
    for name, p in model.named_parameters():
        if p.dim() == 2:
            fan_in = 1 if "embed_tokens" in name else p.shape[1]
            gain = next((gain for part, gain in gains.items() if part in name), 1.0)
            p.data.normal_(0, gain / fan_in**0.5, generator=generator)
    return model
