"""Prompt rewriting: greedy decoding against a plain loop, and the cleaning."""

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel, Gemma2Config, Gemma2ForCausalLM

from autoencoder.common.config import UserError
from svg_t2i.text import enhance as enhance_module
from svg_t2i.text.encoder import TextEncoder
from svg_t2i.text.enhance import _continue, causal_model, enhance, tidy


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    assert enhance_module.MAX_NEW_TOKENS == 196
    monkeypatch.setattr(enhance_module, "MAX_NEW_TOKENS", 24)


@torch.no_grad()
def test_decoding_is_greedy_with_the_encoder_s_own_weights(toy_pipeline):
    encoder = toy_pipeline.networks.text_encoder
    text = "a picture of very much noise"  # words that this tokenizer knows
    ids = torch.tensor([encoder.tokenizer(text)["input_ids"]])
    start = ids.shape[1]
    causal = causal_model(encoder.model)
    assert causal.lm_head.weight is encoder.model.embed_tokens.weight
    for _ in range(24):
        hidden = encoder.model(input_ids=ids).last_hidden_state[:, -1]
        ids = torch.cat([ids, (hidden @ encoder.model.embed_tokens.weight.T).argmax(dim=1, keepdim=True)], dim=1)
        if ids[0, -1] == encoder.tokenizer.eos_token_id:
            break
    expected = encoder.tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()
    assert len(expected.split()) > 3
    assert _continue(text, encoder) == expected


def test_a_causal_checkpoint_writes_what_its_own_class_writes(toy_parts, tmp_path):
    """The published Gemma is saved with its language-model head, which the text encoder does not load."""
    tokenizer = AutoTokenizer.from_pretrained(toy_parts / "text_encoder")
    own = Gemma2ForCausalLM(Gemma2Config.from_pretrained(toy_parts / "text_encoder")).eval()
    torch.nn.init.normal_(own.model.embed_tokens.weight, std=0.5)
    own.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    text = "a picture of very much noise"  # words that this tokenizer knows
    tokens = tokenizer(text, return_tensors="pt")
    names = ("input_ids", "attention_mask")
    written = own.generate(**{name: tokens[name] for name in names}, max_new_tokens=24, do_sample=False)
    expected = tokenizer.decode(written[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert len(expected.split()) > 3
    assert _continue(text, TextEncoder.from_pretrained(tmp_path)) == expected


def test_writing_leaves_the_encoder_as_it_was(toy_pipeline):
    before = toy_pipeline.networks.text_encoder.encode(["noise"]).features
    assert toy_pipeline.enhance("very much noise").startswith("very much noise")
    assert torch.equal(toy_pipeline.networks.text_encoder.encode(["noise"]).features, before)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ('"two red foxes in snow, soft light, soft light."', "two red foxes in snow, soft light"),
        ("Rewritten: two red foxes in snow; a, b, c, d, e", "two red foxes in snow, a, b, c"),
        ("a fox, soft light", "two red foxes in snow, a fox, soft light"),  # the count and the colour were lost
        ("", "two red foxes in snow"),
        ("two red foxes in snow, " + "long " * 60, "two red foxes in snow"),
    ],
)
def test_tidy_keeps_the_prompt_and_four_clauses(written, expected):
    assert tidy(written, "two red foxes in snow") == expected
    assert len(tidy(written, "two red foxes in snow")) <= 256


@pytest.mark.parametrize(
    ("prompt", "written", "expected"),
    [
        # the place stands behind what the limit cuts off: not kept, so the prompt goes first
        ("a fox in snow", "a fox, " + "long " * 50 + "in snow", "a fox in snow, a fox"),
        # four clauses of its own leave no room for new ones
        ("a fox, snow, dawn, mist", "a fox, birds", "a fox, snow, dawn, mist"),
        ("a fox, snow", "a fox, birds, trees, stones, a lake", "a fox, snow, birds, trees"),
        ("very " * 60 + "red fox", "a fox, birds", ("very " * 60).strip() + " red fox"),
    ],
)
def test_what_is_kept_is_judged_by_what_comes_out(prompt, written, expected):
    assert tidy(written, prompt) == expected


def test_what_cannot_write_says_so(toy_pipeline):
    with pytest.raises(UserError, match="this one is empty"):
        enhance("  ", toy_pipeline.networks.text_encoder)
    bert = BertModel(BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    bert.config.tie_word_embeddings = False
    with pytest.raises(UserError, match="enhance needs"):
        causal_model(bert)
