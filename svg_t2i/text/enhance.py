"""Prompt rewriting by the causal text encoder, before it encodes the result.

The encoder's own weights generate: its embedding is also its output layer (Gemma ties the two), so nothing more is
loaded. Greedy, at most 196 new tokens; the answer is cut to 4 clauses and 256 characters, and the subject, count and
attributes of the original stay: where a word of it went missing, the original becomes the first clause.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from autoencoder.common.config import UserError
from svg_t2i.text.encoder import TextEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_NEW_TOKENS, MAX_CLAUSES, MAX_CHARACTERS = 196, 4, 256
INSTRUCTION = """\
Rewrite each image prompt in more detail. Keep every subject, number, colour and place exactly; add setting, light and \
style in at most three short clauses.

Prompt: two dogs on a beach
Rewritten: two dogs on a beach, wet sand with shallow waves, low evening sun, natural photograph

Prompt: a red cube left of a green ball
Rewritten: a red cube left of a green ball, plain white table, soft studio light, sharp focus

Prompt: {prompt}
Rewritten:"""
_SMALL_WORDS = {"a", "an", "the", "of", "in", "on", "at", "to", "and", "or", "with", "by", "for", "from", "is", "are"}


def enhance(prompt: str, encoder: TextEncoder) -> str:
    """`prompt` rewritten in at most 4 clauses and 256 characters; a prompt with no better version comes back as it is.

    Raises:
        UserError: the prompt is empty, or the text encoder cannot write.
    """
    prompt = " ".join(prompt.split())
    if not prompt:
        raise UserError("enhance wants a prompt; this one is empty")
    return tidy(_continue(INSTRUCTION.format(prompt=prompt), encoder), prompt)


@torch.no_grad()
def _continue(text: str, encoder: TextEncoder) -> str:
    """The first line that the model writes after `text`."""
    tokenizer, hook = encoder.tokenizer, getattr(encoder.model, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(encoder.model)  # with offload, generation begins before the first forward pass
    if encoder.device.type == "meta":
        raise UserError(
            "enhance needs the whole text encoder; use enable_model_cpu_offload instead of the sequential one"
        )
    tokens = tokenizer(text, return_tensors="pt", add_special_tokens=True).to(encoder.device)
    width = tokens["input_ids"].shape[1]
    written = causal_model(encoder.model).generate(
        input_ids=tokens["input_ids"],
        attention_mask=tokens["attention_mask"],
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        stopping_criteria=[_end_of_line(tokenizer, width)],
    )
    return tokenizer.decode(written[0, width:], skip_special_tokens=True).strip().split("\n")[0]


def _end_of_line(tokenizer: PreTrainedTokenizerBase, width: int) -> Callable[..., Tensor]:
    """Stop when the text behind the first `width` tokens has come to the end of its first line."""

    def ended(input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        lines = tokenizer.decode(input_ids[0, width:]).lstrip()
        return torch.tensor(["\n" in lines], device=input_ids.device)

    return ended


def causal_model(model: PreTrainedModel) -> PreTrainedModel:
    """The language model whose trunk is `model`, sharing all its weights.

    Raises:
        UserError: the model is no causal one, or has an output layer of its own, which a text encoder does not load.
    """
    from transformers import AutoModelForCausalLM

    kind = model.config.model_type
    try:
        with torch.device("meta"):
            causal = AutoModelForCausalLM.from_config(model.config)
    except ValueError as error:
        raise UserError(f"enhance needs a causal text encoder such as Gemma-2, not {kind!r}") from error
    if not model.config.get_text_config().tie_word_embeddings:
        raise UserError(
            f"enhance needs a text encoder whose embedding is its output layer, as Gemma's; {kind!r} has two"
        )
    setattr(causal, causal.base_model_prefix, model)
    causal.set_output_embeddings(_tied_output(model))
    return causal.eval()


def _tied_output(model: PreTrainedModel) -> torch.nn.Linear:
    weight = model.get_input_embeddings().weight
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = weight
    return layer


def tidy(written: str, prompt: str) -> str:
    """Clean a rewriting: no quotes or labels, no clause twice, the original's words kept, 4 clauses, 256 characters."""
    written = re.sub(r"^\s*(rewritten|prompt)\s*:\s*", "", written, flags=re.IGNORECASE)
    written = re.sub(r"[\"“”*_#`]", "", " ".join(written.split())).strip(" .,;:-")
    rewritten = _joined(_clauses(written))
    if missing(prompt, rewritten):
        own = _clauses(prompt)
        new = [clause for clause in _clauses(written) if clause.lower() not in map(str.lower, own)]
        rewritten = _joined([prompt, *new], MAX_CLAUSES - len(own) + 1)
    return rewritten if rewritten and not missing(prompt, rewritten) else prompt


def _clauses(text: str) -> list[str]:
    """The parts of a text between commas, semicolons and full stops, each once."""
    clauses = (clause.strip(" .") for clause in re.split(r"[,;.]\s+|[;.]$", text))
    return list(dict.fromkeys(clause for clause in clauses if clause))


def _joined(clauses: Sequence[str], most: int = MAX_CLAUSES) -> str:
    """The first `most` clauses, as many as fit into the characters."""
    result = ""
    for clause in clauses[: max(1, most)]:
        longer = f"{result}, {clause}" if result else clause
        if len(longer) > MAX_CHARACTERS:
            break
        result = longer
    return result


def missing(prompt: str, rewritten: str) -> set[str]:
    """Words of the prompt (but articles and the like) that the rewriting lost."""
    words = [set(re.findall(r"\w+", text.lower())) for text in (prompt, rewritten)]
    return words[0] - words[1] - _SMALL_WORDS
