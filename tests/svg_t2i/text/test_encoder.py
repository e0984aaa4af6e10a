"""The text encoder against transformers' own hidden states, one text at a time and without padding."""

import hashlib
import logging
import shutil

import pytest
import torch
import transformers
from tokenizers import processors
from torch.nn.functional import normalize
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from autoencoder.common.config import UserError
from svg_t2i.text.encoder import MAX_CUT_REPORTS, SYSTEM_PROMPTS, TextEncoder, _fingerprint, build_prompt
from svg_t2i.text.loading import load_model
from svg_t2i.text.toy import make_toy_text_encoder

CAPTIONS = [f"a {size} {colour} circle, left" for size in ("small", "large") for colour in ("red", "green", "blue")]
TEXTS = ["a red circle", "", "a large green circle, left of a small blue circle, left of a red circle", "blue"]
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
FAMILIES = {
    # Attention logits far beyond the cap: leaving it out would show.
    "Gemma2Model": {
        **HEADS, "head_dim": 8, "attn_logit_softcapping": 0.5, "initializer_range": 0.5, "sliding_window": 6,
    },
    "Gemma2ForCausalLM": {**HEADS, "head_dim": 8},
    "LlamaForCausalLM": HEADS,
    "Qwen2Model": HEADS,
    "T5EncoderModel": {"d_kv": 8, "d_ff": 48, "num_heads": 4},
    "T5ForConditionalGeneration": {"d_kv": 8, "d_ff": 48, "num_heads": 4},
    "BertModel": {"num_attention_heads": 4, "max_position_embeddings": 30},
    "CLIPTextModel": {"num_attention_heads": 4, "max_position_embeddings": 30},
}  # fmt: skip


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory):
    return make_toy_text_encoder(CAPTIONS, tmp_path_factory.mktemp("toy"), hidden_size=64)


@pytest.fixture(scope="module")
def toy(toy_folder):
    return TextEncoder.from_pretrained(toy_folder)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, toy_folder, tmp_path_factory):
    """Folder of a small random model of each family, with the toy tokenizer."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = AutoTokenizer.from_pretrained(toy_folder)
    tokenizer.save_pretrained(folder)
    model_class = getattr(transformers, request.param)
    sizes = {"hidden_size": 32, "d_model": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_layers": 3}
    known = model_class.config_class().to_dict()
    config = model_class.config_class(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **{name: value for name, value in sizes.items() if name in known},
        **FAMILIES[request.param],
    )
    torch.manual_seed(1)
    model_class(config).save_pretrained(folder)
    return request.param, folder


def test_features_are_the_second_to_last_hidden_states(family):
    name, folder = family
    encoder = TextEncoder.from_pretrained(folder, max_length=30)
    text = encoder.encode(TEXTS)
    peer_class = getattr(transformers, name.replace("T5ForConditionalGeneration", "T5EncoderModel"))
    peer = peer_class.from_pretrained(folder, attn_implementation="eager").eval()
    expected = []
    for row in encoder.tokenize(TEXTS):
        with torch.no_grad():
            expected.append(peer(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states[-2][0])
    assert text.lengths == tuple(map(len, expected))
    assert text.features.shape == (sum(text.lengths), encoder.hidden_size)
    torch.testing.assert_close(text.features, torch.cat(expected), atol=2e-5, rtol=1e-4)


def test_the_last_layer_and_what_follows_do_not_run(family):
    _, folder = family
    encoder = TextEncoder.from_pretrained(folder, max_length=30)
    expected = encoder.encode(TEXTS).features
    ran = []
    for name, module in encoder.model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    torch.testing.assert_close(encoder.encode(TEXTS).features, expected, atol=0, rtol=0)
    layer_name = next(name for name, module in encoder.model.named_modules() if module is encoder.last_layer)
    previous = layer_name.removesuffix("2") + "1"
    assert ran[-1] == previous  # neither the last layer nor the final norm, pooler or decoder
    assert ran.count(previous) == 1


def test_a_wider_batch_changes_nothing(toy):
    """Padding must not reach true tokens, and order must be kept."""
    together = toy.encode(TEXTS)
    alone = [toy.encode([text]) for text in TEXTS]
    assert together.lengths == tuple(single.lengths[0] for single in alone)
    torch.testing.assert_close(together.features, torch.cat([single.features for single in alone]))


def test_features_can_be_trained_upon(toy):
    """An inference-mode tensor could not be saved for the backward pass of the DiT's caption embedder."""
    projection = torch.nn.Linear(64, 3)
    projection(toy.encode(["red"]).features).sum().backward()
    assert projection.weight.grad.abs().sum() > 0


def test_dtype(toy_folder, toy):
    half = TextEncoder.from_pretrained(toy_folder, dtype=torch.bfloat16).encode(TEXTS).features
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), toy.encode(TEXTS).features, atol=0.3, rtol=0.05)


# --- tokens -----------------------------------------------------------------------------------------------------


def test_long_text_is_cut_at_the_right_and_reported(toy_folder, caplog):
    encoder = TextEncoder.from_pretrained(toy_folder, max_length=5)
    with caplog.at_level(logging.WARNING):
        text = encoder.encode(["a large red circle left of blue", "a large red circle"])
    assert text.lengths == (5, 5)  # <bos> and four words
    torch.testing.assert_close(text.features[:5], text.features[5:])
    assert len(caplog.records) == 1
    assert "8 tokens" in caplog.text
    assert "max_length=5" in caplog.text
    assert "its prompt begins: 'a large red circle left of blue'" in caplog.text
    for _ in range(2 * MAX_CUT_REPORTS):
        encoder.tokenize(["a large red circle left"])
    assert len(caplog.records) == MAX_CUT_REPORTS


def test_cut_keeps_the_end_token(toy_folder, tmp_path, caplog):
    """T5 and CLIP end every text with a token of their own, which a cut must not lose."""
    shutil.copytree(toy_folder, tmp_path, dirs_exist_ok=True)
    rebuild_tokenizer(tmp_path, "$A <eos>", ["<eos>"])
    encoder = TextEncoder.from_pretrained(tmp_path, max_length=3)
    ids = encoder.tokenize(["large red circle"])[0]
    assert encoder.tokenizer.convert_ids_to_tokens(ids) == ["large", "red", "<eos>"]
    assert "16 characters and 4 tokens was cut to text_encoder.max_length=3" in caplog.text
    caplog.clear()
    encoder.tokenize(["red " * 9000])
    assert "its prompt begins: '" + "red " * 20 + "'" in caplog.text
    assert len(caplog.text) < 400


def test_halves_of_characters_are_left_out(toy_folder):
    encoder = TextEncoder.from_pretrained(toy_folder)
    assert encoder.tokenize(["a \ud83dred circle", "\ufeffa red circle"]) == encoder.tokenize(["a red circle"] * 2)


def rebuild_tokenizer(folder, template, special, **tokens):
    """Replace the tokenizer in `folder` by one with other special tokens added to each text."""
    backend = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    pairs = [(token, backend.token_to_id(token)) for token in special]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=pairs)
    (folder / "tokenizer_config.json").unlink()
    PreTrainedTokenizerFast(tokenizer_object=backend, **tokens).save_pretrained(folder)


def test_empty_text_has_one_token(toy, toy_folder, tmp_path):
    assert toy.tokenize([""]) == [[toy.tokenizer.bos_token_id]]
    shutil.copytree(toy_folder, tmp_path, dirs_exist_ok=True)
    rebuild_tokenizer(tmp_path, "$A", [], eos_token="<eos>")  # as Qwen2: adds nothing, has no start token
    qwen_like = TextEncoder.from_pretrained(tmp_path)
    assert qwen_like.encode(["", "red circle"]).lengths == (1, 2)
    assert qwen_like.tokenize([""]) == [[qwen_like.tokenizer.eos_token_id]]
    rebuild_tokenizer(tmp_path, "$A", [])
    with pytest.raises(UserError, match="empty text has no tokens.*bos_token"):
        TextEncoder.from_pretrained(tmp_path).encode([""])


def test_a_single_string_is_refused(toy):
    with pytest.raises(ValueError, match="sequence of texts"):
        toy.encode("red circle")


@pytest.mark.parametrize("max_length", [0, 1, 1_000_000])
def test_max_length_must_fit_the_model(toy_folder, max_length):
    with pytest.raises(UserError, match=f"max_length={max_length} .*at most 8192"):
        TextEncoder.from_pretrained(toy_folder, max_length=max_length)


# --- system prompts ---------------------------------------------------------------------------------------------


def test_system_prompts_are_verbatim():
    digests = {name: hashlib.sha256(prompt.encode()).hexdigest()[:16] for name, prompt in SYSTEM_PROMPTS.items()}
    expected = {  # of the texts in the specification
        "base": "51a34d84c56f65dc",
        "align": "a0de02b3f2f0ea54",
        "aesthetics": "b64e40eea7fb4945",
        "real": "d40a3707a6d06455",
        "4grid": "83b8363135045686",
        "empty": hashlib.sha256(b"").hexdigest()[:16],
    }
    assert digests == expected


def test_build_prompt():
    assert build_prompt("a cat").endswith("<Prompt Start> a cat")
    assert build_prompt("a cat", "align").count("alignment") == 1
    assert build_prompt("a cat", "empty") == "a cat"
    assert build_prompt("", "align") == ""
    with pytest.raises(UserError, match="'alin' does not exist; choose one of base, align"):
        build_prompt("a cat", "alin")


# --- loading ----------------------------------------------------------------------------------------------------


def test_save_and_load_again(toy, tmp_path):
    toy.save_pretrained(tmp_path)
    again = TextEncoder.from_pretrained(tmp_path)
    assert again.fingerprint() == toy.fingerprint()
    torch.testing.assert_close(again.encode(TEXTS).features, toy.encode(TEXTS).features, atol=0, rtol=0)


def test_fingerprint_knows_weights_and_words_but_not_dtype(toy, toy_folder, tmp_path):
    for dtype in (torch.bfloat16, torch.float16):  # which rounds otherwise than bf16, and is then read as stored
        loaded = TextEncoder.from_pretrained(toy_folder, dtype=dtype)
        assert (loaded.model.dtype, loaded.fingerprint()) == (dtype, toy.fingerprint())
    half = load_model(str(toy_folder), torch.float16)
    assert _fingerprint(half, toy.tokenizer) != toy.fingerprint()
    assert TextEncoder(half, toy.tokenizer).fingerprint() == toy.fingerprint()
    same = make_toy_text_encoder(CAPTIONS, tmp_path / "same", hidden_size=64)
    other_seed = make_toy_text_encoder(CAPTIONS, tmp_path / "seed", hidden_size=64, seed=1)
    other_words = make_toy_text_encoder([*CAPTIONS[1:], CAPTIONS[0].replace("a", "ab")], tmp_path / "w", 64)
    assert TextEncoder.from_pretrained(same).fingerprint() == toy.fingerprint()
    renamed = shutil.copytree(toy_folder, tmp_path / "renamed")
    vocabulary = (renamed / "tokenizer.json").read_text()
    (renamed / "tokenizer.json").write_text(vocabulary.replace('"green"', '"groen"'))
    others = {TextEncoder.from_pretrained(folder).fingerprint() for folder in (other_seed, other_words, renamed)}
    assert len(others | {toy.fingerprint()}) == 4


def test_full_clip_loads_its_text_tower_only(toy_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(toy_folder)
    tokenizer.save_pretrained(tmp_path)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**small, "vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
    config = transformers.CLIPConfig(text_config=text, vision_config={**small, "image_size": 32, "patch_size": 16})
    clip = transformers.CLIPModel(config).eval()
    clip.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="max_length=256 .*at most 77"):
        TextEncoder.from_pretrained(tmp_path)
    encoder = TextEncoder.from_pretrained(tmp_path, max_length=77)
    assert not any("vision" in name for name, _ in encoder.model.named_modules())
    long = " ".join(["red"] * 200)
    ids = torch.tensor(encoder.tokenize([long]))
    expected = clip.text_model(input_ids=ids, output_hidden_states=True).hidden_states[-2][0]
    torch.testing.assert_close(encoder.encode([long]).features, expected.detach(), atol=1e-5, rtol=1e-4)


def test_missing_folder(tmp_path):
    with pytest.raises(UserError, match="nowhere.*no such folder.*google/gemma-2-2b"):
        TextEncoder.from_pretrained(tmp_path / "nowhere")


def test_hub_refusal_names_the_licence(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("You are trying to access a gated repo.\nMake sure to ...")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", refuse)
    with pytest.raises(UserError, match="gated repo.*accept it at https://huggingface.co/google/gemma-2-2b"):
        TextEncoder.from_pretrained("google/gemma-2-2b")


def test_incomplete_folders(toy_folder, tmp_path):
    without_weights = shutil.copytree(toy_folder, tmp_path / "a")
    (without_weights / "model.safetensors").unlink()
    without_tokenizer = shutil.copytree(toy_folder, tmp_path / "b")
    (without_tokenizer / "tokenizer.json").unlink()
    empty = tmp_path / "c"
    empty.mkdir()
    broken = shutil.copytree(toy_folder, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes((toy_folder / "model.safetensors").read_bytes()[:1000])
    for folder in (without_weights, without_tokenizer, empty, broken):
        with pytest.raises(UserError, match="cannot be read as a Hugging Face model.*config.json"):
            TextEncoder.from_pretrained(folder)
    other = shutil.copytree(toy_folder, tmp_path / "d")
    transformers.LlamaModel(
        transformers.LlamaConfig(vocab_size=8, hidden_size=32, intermediate_size=8, num_hidden_layers=1, **HEADS)
    ).save_pretrained(tmp_path / "llama")
    shutil.copy(tmp_path / "llama" / "model.safetensors", other)
    with pytest.raises(
        UserError, match="lacks 2[0-9] weights of the 'gemma2' model.*another shape .embed_tokens.weight"
    ):
        TextEncoder.from_pretrained(other)


def test_models_without_a_list_of_layers_are_refused(toy):
    """Albert runs one set of weights three times: there is no last layer to stop before."""
    sizes = {"hidden_size": 32, "embedding_size": 16, "intermediate_size": 48, "num_attention_heads": 4}
    albert = transformers.AlbertModel(transformers.AlbertConfig(vocab_size=50, num_hidden_layers=3, **sizes))
    with pytest.raises(UserError, match="AlbertModel has no list of 3 layers"):
        TextEncoder(albert, toy.tokenizer)


# --- the toy ----------------------------------------------------------------------------------------------------


def test_toy_features_tell_words_apart(toy):
    """Nearest-centroid decoding of each token from its features alone: words keep their identity in any caption."""
    features = normalize(toy.encode(CAPTIONS).features, dim=-1)
    ids = torch.tensor([token for row in toy.tokenize(CAPTIONS) for token in row])
    similarity = features @ features.T
    same, different = ids[:, None] == ids, ids[:, None] != ids
    assert similarity[same].min() > 0.9
    assert similarity[different].max() < 0.6
    assert similarity[same].min() < 1 - 1e-4  # yet the words before it show


def test_toy_knows_the_words_of_system_prompts(toy):
    for prompt in SYSTEM_PROMPTS.values():
        assert toy.tokenizer.unk_token_id not in toy.tokenize([prompt + "A Large, RED circle"])[0]
    assert toy.tokenizer.unk_token_id in toy.tokenize(["purple"])[0]


def test_toy_leaves_the_global_generator_alone(tmp_path):
    torch.manual_seed(7)
    make_toy_text_encoder(["x"], tmp_path)
    drawn = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(3))
