"""Axes: B batch, T text tokens, D width of the encoder."""

import itertools
import shutil
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from torch import Tensor
from torch.nn.functional import normalize
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from trainer.encoders.text import TextEncoder, TextLayers, build_local_text_encoder, load_text_encoder, text_width

COLOURS = ("red", "orange", "yellow", "green", "aqua", "blue", "purple", "pink")
KINDS = ("ball", "star", "mushroom", "butterfly", "umbrella", "house")
PLACES = ("night sky", "white background", "on the left", "outdoors")


def captions(count: int = 400, seed: int = 0) -> list[str]:
    """Several coloured things and a place, in any order: as the sample dataset's tags are."""
    generator, texts = np.random.default_rng(seed), []
    for _ in range(count):
        kinds = generator.choice(KINDS, size=3, replace=False)
        parts = [f"{generator.choice(COLOURS)} {kind}" for kind in kinds] + [str(generator.choice(PLACES))]
        texts.append(", ".join(str(parts[i]) for i in generator.permutation(4)))
    return texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("text") / "encoder"
    build_local_text_encoder(captions(), made, seed=0)
    return made


@pytest.fixture(scope="module")
def encoder(folder: Path) -> TextEncoder:
    return load_text_encoder(folder)


def tokens(encoder: TextEncoder, texts: Sequence[str]) -> list[list[int]]:
    ids: list[list[int]] = encoder.tokenizer(list(texts))["input_ids"]
    return ids


def word_embeddings(encoder: TextEncoder) -> Tensor:
    weight: Tensor = encoder.model.get_input_embeddings().weight
    return weight


# --- encode ---------------------------------------------------------------------------------------------------------


def test_embeddings_are_the_last_hidden_states_of_the_causal_model(folder: Path, encoder: TextEncoder) -> None:
    texts = captions(5)
    whole = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    embeddings_BTD, mask_BT = encoder.encode(texts, 64)
    for ids, row_TD, mask_T in zip(tokens(encoder, texts), embeddings_BTD, mask_BT, strict=True):
        with torch.no_grad():
            reference = whole(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
        torch.testing.assert_close(row_TD[mask_T], reference, atol=1e-5, rtol=0)


def test_a_text_does_not_depend_on_the_others_in_its_batch(encoder: TextEncoder) -> None:
    texts = ["red ball", "", ", ".join(captions(3)), *captions(4)]
    together_BTD, mask_BT = encoder.encode(texts, 128)
    for text, row_TD, mask_T in zip(texts, together_BTD, mask_BT, strict=True):
        alone_1TD, alone_1T = encoder.encode([text], 128)
        torch.testing.assert_close(row_TD[mask_T], alone_1TD[alone_1T], atol=1e-5, rtol=0)
        assert not row_TD[~mask_T].any()


@pytest.mark.parametrize(
    ("words", "max_tokens", "length"), [(1, 256, 32), (32, 256, 32), (33, 256, 64), (33, 48, 48), (100, 48, 48)]
)
def test_batches_are_as_long_as_their_longest_text_in_steps_of_32(
    encoder: TextEncoder, words: int, max_tokens: int, length: int
) -> None:
    text = " ".join(["red"] * words)
    assert [len(ids) for ids in tokens(encoder, [text])] == [words]
    embeddings_BTD, mask_BT = encoder.encode([text, "red"], max_tokens)
    assert embeddings_BTD.shape == (2, length, encoder.dim)
    assert mask_BT.dtype == torch.bool
    assert mask_BT.sum(1).tolist() == [min(words, max_tokens), 1]
    assert mask_BT[1].nonzero().tolist() == [[0]]


def test_another_multiple_changes_the_padding_alone(encoder: TextEncoder) -> None:
    wide_BTD, _ = encoder.encode(["red ball, blue star"], 64)
    short_BTD, mask_BT = encoder.encode(["red ball, blue star"], 64, multiple=8)
    assert short_BTD.shape[1] == 8
    assert mask_BT.sum() == 5
    torch.testing.assert_close(short_BTD, wide_BTD[:, :8], atol=1e-5, rtol=0)


def test_averaged_layers_are_the_mean_of_each_layers_normalised_states(folder: Path) -> None:
    encoder = load_text_encoder(folder, layers="average")
    embeddings_BTD, mask_BT = encoder.encode(["red ball, blue star", "red"], 64, multiple=8)
    assert not embeddings_BTD[~mask_BT].any()
    ids = tokens(encoder, ["red ball, blue star"])
    states = encoder.model(input_ids=torch.tensor(ids), output_hidden_states=True).hidden_states
    assert len(states) == 1 + encoder.model.config.num_hidden_layers
    normalised = [(h[0] - h[0].mean(1, keepdim=True)) / h[0].std(1, keepdim=True, correction=0) for h in states[1:]]
    torch.testing.assert_close(embeddings_BTD[0][mask_BT[0]], sum(normalised) / len(normalised), atol=1e-4, rtol=1e-4)


def test_an_empty_text_has_one_real_token(encoder: TextEncoder) -> None:
    embeddings_BTD, mask_BT = encoder.encode(["", "red"], 64)
    assert mask_BT.sum(1).tolist() == [1, 1]
    assert embeddings_BTD[0, 0].norm() > 1
    assert (embeddings_BTD[0, 0] - embeddings_BTD[1, 0]).norm() > 1


def test_a_text_that_is_too_long_keeps_its_beginning_and_its_last_words(encoder: TextEncoder) -> None:
    caption = ", ".join(captions(20))
    states_BTD, mask_BT = encoder.encode([f"red star, {caption}, night sky, outdoors"], 32)
    assert mask_BT.sum() == 32
    ids = tokens(encoder, [f"red star, {caption}, night sky, outdoors"])[0]
    kept = ids[:24] + ids[-8:]
    with torch.no_grad():
        reference = encoder.model(input_ids=torch.tensor([kept])).last_hidden_state[0]
    torch.testing.assert_close(states_BTD[0], reference, atol=1e-5, rtol=0)


def test_texts_that_are_cut_are_counted(folder: Path) -> None:
    encoder = load_text_encoder(folder)
    encoder.encode(["red star", "blue ball, " * 40], 32)
    encoder.encode(["green house, " * 40], 32)
    assert encoder.cut_texts == 2


# --- Prefix and statistics --------------------------------------------------------------------------------------------


def test_a_prefix_is_one_constant_token_whose_state_is_dropped(folder: Path) -> None:
    encoder = load_text_encoder(folder, prefix=True)
    texts = ["red house", "star", ""]
    states_BTD, mask_BT = encoder.encode(texts, 64)
    end = encoder.tokenizer.eos_token_id
    assert encoder.tokenizer.bos_token_id is None, "the encoder has no BOS, so its end-of-text token is the prefix"
    for text, row_TD, mask_T in zip(texts, states_BTD, mask_BT, strict=True):
        ids = [end, *(tokens(encoder, [text])[0] or [end])]
        with torch.no_grad():
            reference = encoder.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        torch.testing.assert_close(row_TD[mask_T], reference[1:], atol=1e-5, rtol=0)


def test_a_prefix_does_not_count_as_text(folder: Path) -> None:
    encoder = load_text_encoder(folder, prefix=True)
    long = "red house, " * 50
    states_BTD, mask_BT = encoder.encode([long], 32)
    assert states_BTD.shape[1] == mask_BT.sum() == 32


def test_statistics_standardize_the_features_of_their_texts(folder: Path) -> None:
    encoder = load_text_encoder(folder, prefix=True)
    texts = captions(40)
    mean_D, deviation_D = encoder.statistics(texts, 64, batch=7)
    states_BTD, mask_BT = encoder.encode(texts, 64)
    standard_KD = (states_BTD[mask_BT] - mean_D) / deviation_D
    assert standard_KD.mean(0).abs().max() < 1e-4
    assert (standard_KD.square().mean(0) - 1).abs().max() < 1e-3


def test_one_word_prompts_differ_from_each_other_and_from_the_empty_prompt(folder: Path) -> None:
    encoder = load_text_encoder(folder, prefix=True)
    mean_D, deviation_D = encoder.statistics(captions(40), 64)
    states_BTD, _ = encoder.encode([*KINDS, ""], 64)
    direction_BD = normalize((states_BTD[:, 0] - mean_D) / deviation_D, dim=1)
    cosine_BB = direction_BD @ direction_BD.T
    assert cosine_BB.fill_diagonal_(-1).max() < 0.8


def test_the_encoder_is_frozen_and_its_output_can_be_trained_upon(encoder: TextEncoder) -> None:
    embeddings_BTD, _ = encoder.encode(["red ball"], 32)
    assert not any(p.requires_grad for p in encoder.model.parameters())
    layer = torch.nn.Linear(encoder.dim, 1)
    layer(embeddings_BTD).sum().backward()
    assert layer.weight.grad is not None


def test_no_room_for_tokens_is_refused(encoder: TextEncoder) -> None:
    with pytest.raises(ValueError, match="max_tokens 0"):
        encoder.encode(["red"], 0)


# --- load -----------------------------------------------------------------------------------------------------------


def test_a_folder_is_loaded_without_network_and_without_output(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError(f"connects to {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load_text_encoder(folder).encode(["red ball", "never seen: Ω"], 32)
    assert capfd.readouterr() == ("", "")


def test_the_width_is_known_before_loading(folder: Path, encoder: TextEncoder) -> None:
    assert text_width(folder) == encoder.dim == encoder.encode(["red"], 32)[0].shape[-1]


def test_half_precision_is_that_of_the_weights_alone(
    folder: Path, encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.encoders.text.frozen_dtype", lambda device: torch.bfloat16)
    rounded = load_text_encoder(folder)
    assert rounded.model.dtype == torch.bfloat16
    half, _ = rounded.encode(["red ball"], 32)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, encoder.encode(["red ball"], 32)[0], atol=0.1, rtol=0)


@pytest.mark.parametrize("load", [load_text_encoder, text_width])
@pytest.mark.parametrize("name", ["not/a/folder", "nobody/no-such-model"])
def test_a_name_that_is_found_nowhere_is_refused_with_an_example(
    load: Callable[[str], object], name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=rf"{name}.*is not a folder.*Qwen/Qwen3-0.6B"):
        load(name)
    assert capfd.readouterr() == ("", "")


def test_a_folder_without_safetensors_is_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"cannot be loaded.*weights as \*\.safetensors"):
        load_text_encoder(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be loaded.*needs config\.json"):
        load_text_encoder(tmp_path)
    with pytest.raises(ValueError, match=r"cannot be loaded.*needs config\.json"):
        text_width(tmp_path)


def cut_short(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:-1000])


def without_a_layer(weights: Path) -> None:
    kept = {name: tensor for name, tensor in load_file(weights).items() if "layers.1" not in name}
    save_file(kept, weights, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "why"),
    [(cut_short, "incomplete"), (without_a_layer, r"weights are missing, such as layers\.1"), (Path.unlink, "no file")],
)
def test_incomplete_weights_are_refused_in_one_line(
    folder: Path, tmp_path: Path, damage: Callable[[Path], None], why: str, capfd: pytest.CaptureFixture[str]
) -> None:
    damaged = Path(shutil.copytree(folder, tmp_path / "damaged"))
    damage(damaged / "model.safetensors")
    with pytest.raises(ValueError, match=rf"damaged.*cannot be loaded.*{why}.*It needs config\.json") as refused:
        load_text_encoder(damaged)
    assert "\n" not in str(refused.value)
    assert capfd.readouterr() == ("", "")


# --- the layouts of Qwen3-0.6B and Gemma3-1B ------------------------------------------------------------------------

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
# Shorter than a text, as Gemma3's 512 tokens are not.
GEMMA = {"sliding_window": 4, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
EYES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def save_qwen3(folder: Path) -> PreTrainedModel:
    """Its tokenizer knows bytes and one special token, which begins no text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(vocab={"<|endoftext|>": 0} | {letter: i + 1 for i, letter in enumerate(letters)})
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), tie_word_embeddings=True, **SIZES))
    return save(model, tokenizer, folder)


def save_gemma3(folder: Path) -> PreTrainedModel:
    """Its tokenizer falls back to bytes, and begins every text with <bos>, without which Gemma3 is lost."""
    tokenizer = gemma_tokenizer()
    return save(Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=len(tokenizer), **SIZES, **GEMMA)), tokenizer, folder)


def save_gemma3_with_eyes(folder: Path) -> PreTrainedModel:
    """As those from 4B up: the text model lies beside a vision tower."""
    tokenizer = gemma_tokenizer()
    text = {"vocab_size": len(tokenizer), **SIZES, **GEMMA}
    config = Gemma3Config(text_config=text, vision_config=EYES, mm_tokens_per_image=4)
    return save(Gemma3ForConditionalGeneration(config), tokenizer, folder)


def gemma_tokenizer() -> GemmaTokenizer:
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "r", "e", "d"]
    return GemmaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, add_bos_token=True)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedModel:
    # As large as embeddings of 1 make them: the random start of transformers leaves attention without an effect.
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.dim() == 2:
            p.data.normal_(0, p.shape[1] ** -0.5, generator=generator)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval()


@pytest.fixture(scope="module", params=[save_qwen3, save_gemma3, save_gemma3_with_eyes])
def layout(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    made = tmp_path_factory.mktemp("layout") / "encoder"
    return request.param(made), made


TEXTS = ["red", "", "a red ball, and a blue star far behind it", "Ω 猫"]


def test_each_layout_gives_the_hidden_states_of_its_own_causal_model(layout: tuple[PreTrainedModel, Path]) -> None:
    whole, made = layout
    encoder = load_text_encoder(made)
    assert text_width(made) == encoder.dim == 32
    embeddings_BTD, mask_BT = encoder.encode(TEXTS, 64)
    for ids, row_TD, mask_T in zip(tokens(encoder, TEXTS), embeddings_BTD, mask_BT, strict=True):
        with torch.no_grad():
            input_ids = torch.tensor([ids or [encoder.tokenizer.eos_token_id]])
            reference = whole(input_ids=input_ids, output_hidden_states=True).hidden_states[-1][0]
        torch.testing.assert_close(row_TD[mask_T], reference, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layers", ["last", "average"])
def test_each_layout_encodes_a_text_alone_as_in_a_padded_batch(
    layout: tuple[PreTrainedModel, Path], layers: TextLayers
) -> None:
    encoder = load_text_encoder(layout[1], layers=layers)
    together_BTD, mask_BT = encoder.encode(TEXTS, 64)
    assert len(set(mask_BT.sum(1).tolist())) == len(TEXTS)
    for text, row_TD, mask_T in zip(TEXTS, together_BTD, mask_BT, strict=True):
        alone_1TD, alone_1T = encoder.encode([text], 64, multiple=1)
        assert alone_1T.all()
        torch.testing.assert_close(row_TD[mask_T], alone_1TD[0], atol=1e-5, rtol=0)
        assert not row_TD[~mask_T].any()


@pytest.mark.parametrize("make", [save_gemma3, save_gemma3_with_eyes])
def test_gemma3_texts_begin_with_bos_and_its_embeddings_are_scaled(
    make: Callable[[Path], PreTrainedModel], tmp_path: Path
) -> None:
    make(tmp_path / "gemma3")
    encoder = load_text_encoder(tmp_path / "gemma3")
    assert not any("vision" in name for name, _ in encoder.model.named_parameters())
    assert [ids[:2] for ids in tokens(encoder, ["red", ""])] == [[2, 262], [2]]
    assert encoder.encode(["", "red"], 64)[1].sum(1).tolist() == [1, 4]
    assert encoder.encode(["red " * 40], 8)[1].sum() == 8
    ids = torch.tensor([[2, 262]])
    weights = load_file(tmp_path / "gemma3" / "model.safetensors")
    words = next(tensor for name, tensor in weights.items() if name.endswith("embed_tokens.weight"))
    torch.testing.assert_close(encoder.model.get_input_embeddings()(ids), words[ids] * 32**0.5)


def test_qwen3_texts_begin_with_their_first_word(tmp_path: Path) -> None:
    save_qwen3(tmp_path / "qwen3")
    encoder = load_text_encoder(tmp_path / "qwen3")
    assert encoder.tokenizer.convert_ids_to_tokens(tokens(encoder, ["red"])[0]) == ["r", "e", "d"]
    assert encoder.encode(["", "red"], 64)[1].sum(1).tolist() == [1, 3]


# --- the embedded default -------------------------------------------------------------------------------------------


def test_each_hidden_state_is_nearest_to_its_own_words_embedding(encoder: TextEncoder) -> None:
    texts = captions(200, seed=1)
    embeddings_BTD, mask_BT = encoder.encode(texts, 64)
    similarity = normalize(embeddings_BTD[mask_BT], dim=-1) @ normalize(word_embeddings(encoder), dim=-1).T
    expected = torch.tensor([token for ids in tokens(encoder, texts) for token in ids])
    assert (similarity.argmax(1) == expected).float().mean() > 0.99


def test_a_noun_tells_its_own_colour_among_those_of_the_text(encoder: TextEncoder) -> None:
    """A linear probe, fitted on 300 texts and judged on 100; a bag of words would be right in about a third."""
    kinds = {ids[0]: kind for ids, kind in zip(tokens(encoder, KINDS), KINDS, strict=True)}
    hidden, colour, text_of = [], [], []
    embeddings_BTD, _ = encoder.encode(texts := captions(400, seed=2), 64)
    for n, (text, ids) in enumerate(zip(texts, tokens(encoder, texts), strict=True)):
        for place, token in enumerate(ids):
            if token in kinds:
                hidden.append(embeddings_BTD[n, place])
                colour.append(COLOURS.index(text.split(f" {kinds[token]}")[0].split()[-1]))
                text_of.append(n)
    x, y = torch.stack(hidden).double(), torch.nn.functional.one_hot(torch.tensor(colour)).double()
    fitted = torch.tensor(text_of) < 300
    probe = torch.linalg.solve(x[fitted].T @ x[fitted] + torch.eye(encoder.dim), x[fitted].T @ y[fitted])
    right = (x[~fitted] @ probe).argmax(1) == y[~fitted].argmax(1)
    assert right.double().mean() > 0.97


def test_the_last_tokens_of_different_captions_differ(encoder: TextEncoder) -> None:
    # The same last words, and what differs lies far outside the first layer's window.
    texts = [f"{a} ball, {b} star, night sky, on the left" for a, b in itertools.product(COLOURS, COLOURS)]
    embeddings_BTD, mask_BT = encoder.encode(texts, 64)
    last_BD = embeddings_BTD[torch.arange(len(texts)), mask_BT.sum(1) - 1]
    distance = torch.cdist(last_BD, last_BD) + torch.eye(len(texts)) * 1e9
    # Four orders above the noise of fp32; the states themselves have a norm of about 11.
    assert distance.min() > 0.1


def test_every_word_of_the_captions_is_one_token(encoder: TextEncoder) -> None:
    words = {word for text in captions() for word in text.replace(",", "").split()}
    assert all(len(ids) == 1 for ids in tokens(encoder, sorted(words)))
    assert len(encoder.tokenizer) <= 2048


@pytest.mark.parametrize("text", ["red zebra", "crème brûlée, 猫 ^_^", "a\tb\nc", "1girl, 2boys"])
def test_unseen_words_fall_back_to_pieces_without_loss(encoder: TextEncoder, text: str) -> None:
    assert encoder.tokenizer.decode(tokens(encoder, [text])[0]).strip() == text


def test_case_makes_no_difference(encoder: TextEncoder) -> None:
    assert tokens(encoder, ["Red BALL"]) == tokens(encoder, ["red ball"])


def test_more_words_than_the_vocabulary_holds_are_cut_into_pieces_without_loss(tmp_path: Path) -> None:
    words = ["".join(parts) for parts in itertools.product("bdgklmnprst", "aeiou", "bdgklmnprst", "aeiou")]
    text = " ".join(words)
    assert len(words) > 2048
    build_local_text_encoder([text], tmp_path / "large", seed=0)
    tokenizer = load_text_encoder(tmp_path / "large").tokenizer
    assert len(tokenizer) <= 2048
    assert tokenizer.decode(tokenizer(text)["input_ids"]).strip() == text


def test_the_same_captions_and_seed_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    build_local_text_encoder(captions(), tmp_path / "again", seed=0)
    build_local_text_encoder(captions(), tmp_path / "other", seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    files = sorted(file.name for file in folder.iterdir())
    assert sorted(file.name for file in (tmp_path / "again").iterdir()) == files
    for name in files:
        same = [(tmp_path / copy / name).read_bytes() == (folder / name).read_bytes() for copy in ("again", "other")]
        assert same == [True, name != "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "other"]


@pytest.mark.parametrize("padding_is_text", [False, True])
def test_what_is_not_read_of_a_long_text_is_told(encoder: TextEncoder, padding_is_text: bool) -> None:
    words = [f"{colour} {kind}" for colour in COLOURS for kind in KINDS]
    text = ", ".join(words)
    assert encoder.unread("red ball", 40) == ""
    unread = encoder.unread(text, 40, padding_is_text)
    assert unread in text
    before, after = text.split(unread)
    read = tokens(encoder, [before])[0] + tokens(encoder, [after])[0]
    assert len(read) <= 40 + 2, "joined anew, a word beside the cut may be two tokens"
    assert (after.strip() == "") == padding_is_text
    shortened, _ = encoder.encode([text], 40, 1, padding_is_text)
    changed, _ = encoder.encode([text.replace(unread, unread.upper())], 40, 1, padding_is_text)
    assert shortened.shape == changed.shape
