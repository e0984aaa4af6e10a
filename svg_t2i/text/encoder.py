"""Text conditioning: system prompts, and any Hugging Face text model as a frozen encoder.

What is unusual here:
- The features are the hidden states *before* the last layer (`hidden_states[-2]`). The forward pass is left at the
  door of that layer: neither it, nor the final norm, nor a language-model head is ever computed.
- Padding exists only inside `TextEncoder.encode`. What leaves it is packed: the tokens of all texts one after another
  and their number per text.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from autoencoder.common.config import UserError
from autoencoder.sources.captions import clean_text
from svg_t2i.text.loading import caps_attention, checked_source, load_model, load_tokenizer
from svg_t2i.transformer.packing import TextFeatures, upload

if TYPE_CHECKING:  # transformers takes seconds to import, which --help need not wait for
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

# Model inputs of the released weights, verbatim; each but the last ends with a space.
SYSTEM_PROMPTS = {
    "base": "You are an assistant designed to generate high-quality images based on user prompts. <Prompt Start> ",
    "align": "You are an assistant designed to generate high-quality images with the highest degree of image-text "
    "alignment based on textual prompts. <Prompt Start> ",
    "aesthetics": "You are an assistant designed to generate high-quality images with highest degree of aesthetics "
    "based on user prompts. <Prompt Start> ",
    "real": "You are an assistant designed to generate superior images with the superior degree of image-text "
    "alignment based on textual prompts or user prompts. <Prompt Start> ",
    "4grid": "You are an assistant designed to generate four high-quality images with highest degree of aesthetics "
    "arranged in 2x2 grids based on user prompts. <Prompt Start> ",
    "empty": "",
}

PROMPT_START = "<Prompt Start> "  # ends every system prompt
SHOWN_CHARACTERS = 80  # of a prompt in a truncation warning
MAX_CUT_REPORTS = 20  # truncation warnings per encoder: enough to see the pattern, few enough to read


def build_prompt(caption: str, kind: str = "base") -> str:
    """Put the system prompt `kind` before a caption. The empty caption is the unconditional one and stays empty.

    Raises:
        UserError: if `kind` is not a key of `SYSTEM_PROMPTS`.
    """
    if kind not in SYSTEM_PROMPTS:
        raise UserError(f"system prompt {kind!r} does not exist; choose one of {', '.join(SYSTEM_PROMPTS)}")
    return SYSTEM_PROMPTS[kind] + caption if caption else ""


_known: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # model → its tokenizer, and their fingerprint


class _LastLayerReached(Exception):
    """Ends a forward pass; carries what the last layer would have been given, (B, L, D)."""

    def __init__(self, hidden_states: Tensor):
        super().__init__()
        self.hidden_states = hidden_states


def _leave(layer: nn.Module, args: tuple, kwargs: dict) -> None:
    raise _LastLayerReached(args[0] if args else kwargs["hidden_states"])


class TextEncoder:
    """A frozen Hugging Face text model, causal or bidirectional: texts in, packed features out.

    Attributes:
        hidden_size: width D of the features (2304 for Gemma-2-2b).
        max_length: most tokens kept of a text, special tokens included.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int = 256):
        config = model.config.get_text_config()
        model.config.use_cache = False  # a causal model would otherwise keep keys and values for a next token
        if caps_attention(config) and config._attn_implementation != "eager":
            model.set_attn_implementation("eager")
        tokenizer.truncation_side = "right"
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.hidden_size: int = config.hidden_size
        self.last_layer = _last_layer(model)
        self._most_positions = _most_positions(model, tokenizer)
        self._causal_width = config.sliding_window if config.model_type == "gemma2" else 0
        self._num_cut = 0
        self._check_length(max_length)

    def _check_length(self, max_length: int) -> None:
        special = self.tokenizer.num_special_tokens_to_add()
        if not special < max_length <= self._most_positions:
            raise UserError(
                f"text_encoder.max_length={max_length} does not fit {self.model.config.model_type!r}: it must exceed "
                f"the {special} special tokens and be at most {self._most_positions}"
            )

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike,
        max_length: int = 256,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> TextEncoder:
        """Load model and tokenizer from a folder in Hugging Face format or from the Hub.

        Of a multi-part model only the text encoder is built: T5 without its decoder, CLIP without its vision tower.

        Raises:
            UserError: if the folder does not exist, a part of it is missing or unreadable, the Hub refuses, or
                `max_length` exceeds the positions the model knows.
        """
        source = checked_source(path_or_id)
        encoder = cls(load_model(source, stored_dtype_before(dtype)), load_tokenizer(source), max_length)
        encoder.fingerprint()  # of the weights as they are stored
        return encoder.to(device, dtype)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write model and tokenizer in Hugging Face format, as `from_pretrained` reads them."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TextEncoder:
        """Move or convert the weights; returns self."""
        self.model.to(device=device, dtype=dtype)
        return self

    def fingerprint(self) -> str:
        """Identity of weights and tokenizer, 16 hex digits: the same for every dtype loaded and for any folder name.

        It covers the names and shapes of all weights, a sample of each weight's values rounded to bf16, and the whole
        vocabulary. Weights in fp16 have lost what that rounding needs: then their files are read again as stored.

        Raises:
            UserError: the weights are in fp16, and the files they came from are no longer there.
        """
        tokenizer, known = _known.get(self.model, (None, ""))
        if tokenizer is not self.tokenizer:
            model = self.model
            if model.dtype == torch.float16:
                model = load_model(checked_source(model.config.name_or_path), stored_dtype_before(torch.float16))
            known = _fingerprint(model, self.tokenizer)
            _known[self.model] = self.tokenizer, known
        return known

    @property
    def is_exact(self) -> bool:
        """Whether the weights are neither rounded to fp16 nor quantised, so that they have their fingerprint."""
        return self.model.dtype != torch.float16 and getattr(self.model, "hf_quantizer", None) is None

    @torch.no_grad()
    def encode(self, texts: Sequence[str], max_length: int | None = None) -> TextFeatures:
        """Features of texts as they are (system prompts already applied); "" is the unconditional text.

        max_length: most tokens kept of a text; None for the encoder's own limit.

        Returns:
            TextFeatures: (sum L_i, D) in the model's dtype on its device, and the L_i ≥ 1 as host integers.
        """
        if isinstance(texts, str) or not texts:
            raise ValueError(f"encode takes a non-empty sequence of texts, got {texts!r}")
        rows = self.tokenize(texts, max_length)
        # Multiples of 8 suit the tensor cores, but a model with absolute positions may have no room for them.
        width = min(8 * math.ceil(max(map(len, rows)) / 8), self._most_positions)
        pad = self.tokenizer.pad_token_id or 0
        input_ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])  # (B, L)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])  # (B, L)
        true_tokens = mask.flatten().nonzero().squeeze(1)  # (sum L_i,), found on the host

        device = torch.device("cpu") if self.device.type == "meta" else self.device  # its hooks move them
        input_ids, mask = upload(input_ids, device), upload(mask, device)
        hidden = self._before_last_layer(input_ids, mask)  # (B, L, D), with an offload on another device
        packed = hidden.flatten(0, 1).index_select(0, upload(true_tokens, hidden.device))  # (sum L_i, D)
        return TextFeatures(packed, tuple(map(len, rows)))

    def tokenize(self, texts: Sequence[str], max_length: int | None = None) -> list[list[int]]:
        """Token ids of each text with its special tokens: at least one, at most `max_length`. Cuts are logged."""
        max_length = self.max_length if max_length is None else max_length
        self._check_length(max_length)
        texts = [clean_text(text) for text in texts]
        rows = self.tokenizer(texts, verbose=False)["input_ids"]
        for i, row in enumerate(rows):
            if len(row) > max_length:
                rows[i] = self.tokenizer(texts[i], truncation=True, max_length=max_length)["input_ids"]
                self._report_cut(texts[i], len(row), max_length)
            elif not row:
                rows[i] = [self._start_token()]
        return rows

    def _start_token(self) -> int:
        """What stands for "" where the tokenizer adds nothing of its own (Qwen2): a sequence needs one token."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return token
        raise UserError(
            "the empty text has no tokens: the text encoder's tokenizer adds no special token and names neither a "
            "bos_token nor an eos_token; set one of them in its tokenizer_config.json"
        )

    def _report_cut(self, text: str, num_tokens: int, max_length: int) -> None:
        self._num_cut += 1
        if self._num_cut > MAX_CUT_REPORTS:
            return
        prompt = text.rpartition(PROMPT_START)[2]
        log.warning(
            "a text of %d characters and %d tokens was cut to text_encoder.max_length=%d; its prompt begins: %r%s",
            len(text),
            num_tokens,
            max_length,
            prompt[:SHOWN_CHARACTERS],
            " (further cuts are not reported)" if self._num_cut == MAX_CUT_REPORTS else "",
        )

    def _before_last_layer(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Run the model up to, and without, its last layer. (B, L), (B, L) → (B, L, D)."""
        hook = self.last_layer.register_forward_pre_hook(_leave, with_kwargs=True)
        if mask.shape[1] <= self._causal_width:
            mask = causal_mask(mask, self.model.dtype)  # that of transformers copies a number, waiting for the device
        try:
            self.model(input_ids=input_ids, attention_mask=mask)
        except _LastLayerReached as reached:
            return reached.hidden_states
        finally:
            hook.remove()
        raise RuntimeError(f"{type(self.model).__name__} finished without running {type(self.last_layer).__name__}")


class TextCache:
    """The features of the last texts, so that a text encoder runs once for a prompt that is drawn again.

    With model offload this saves bringing its weights to the device, which takes longer than encoding.
    """

    def __init__(self, most: int = 64):
        self.most = most
        self._kept: OrderedDict[tuple, TextFeatures] = OrderedDict()
        self._encoder: TextEncoder | None = None

    def encode(self, encoder: TextEncoder, text: str, max_length: int | None, device: torch.device) -> TextFeatures:
        """The features of one text, as `TextEncoder.encode` gives them, on the device."""
        if encoder is not self._encoder:
            self._kept.clear()
            self._encoder = encoder
        key = text, max_length or encoder.max_length, encoder.model.dtype
        if key not in self._kept:
            self._kept[key] = encoder.encode([text], max_length).to(device)
        self._kept.move_to_end(key)
        while len(self._kept) > self.most:
            self._kept.popitem(last=False)
        return self._kept[key].to(device)


def stored_dtype_before(dtype: torch.dtype) -> torch.dtype | str:
    """What weights are loaded in on the way to `dtype`: fp16 rounds differently from bf16, so first as stored."""
    return "auto" if dtype == torch.float16 else dtype


def causal_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """mask (B, L), nonzero at true tokens -> (B, 1, L, L), to be added to logits: the least number where a token must
    not look, behind itself or at padding."""
    earlier = mask.new_ones(mask.shape[1], mask.shape[1], dtype=torch.bool).tril()
    seen = earlier & mask.bool()[:, None, None]
    return torch.zeros(seen.shape, dtype=dtype, device=mask.device).masked_fill_(~seen, torch.finfo(dtype).min)


def _last_layer(model: PreTrainedModel) -> nn.Module:
    """The last of the model's stack of layers: the outermost ModuleList of `num_hidden_layers` entries."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module[-1]
    raise UserError(f"{type(model).__name__} has no list of {count} layers, so it cannot serve as text encoder")


def _most_positions(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Longest token sequence the model takes: 77 for CLIP; a model with relative positions (T5) names no limit."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(positions, tokenizer.model_max_length) if positions else 1 << 30


def _fingerprint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    digest = hashlib.sha256(model.config.get_text_config().model_type.encode())
    # Rounding to bf16 makes the sample the same for fp32 and bf16; poolers are unused and may be untrained.
    weights = {name: weight for name, weight in sorted(model.named_parameters()) if "pooler" not in name}
    digest.update(str([(name, tuple(weight.shape)) for name, weight in weights.items()]).encode())
    samples = [weight.detach().flatten()[:: math.ceil(weight.numel() / 64)] for weight in weights.values()]
    digest.update(torch.cat(samples).to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes())
    digest.update(str(sorted(tokenizer.get_vocab().items())).encode())
    digest.update(str(tokenizer("A red Circle, 3 px")["input_ids"]).encode())  # special tokens, case, splitting
    return digest.hexdigest()[:16]
