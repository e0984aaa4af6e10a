"""Text models and tokenizers of Hugging Face, read without running anything that they bring along.

Code in their folders is never run (`trust_remote_code=False`), safetensors come before pickled weights, and pickled
weights are read with torch's `weights_only`.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from autoencoder.common.config import UserError, first_line
from autoencoder.common.hub import announce, folder_or_hub_name, nearest
from autoencoder.common.weights import report_load

if TYPE_CHECKING:  # transformers takes seconds to import, which --help need not wait for
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError, pickle.UnpicklingError)
GEMMA_LICENCE = (
    " Gemma's weights ask for a licence first: accept it at https://huggingface.co/google/gemma-2-2b and sign in "
    "with `hf auth login`."
)


def checked_source(path_or_id: str | os.PathLike) -> str:
    """A folder that exists, or a name that the Hub may know.

    Raises:
        UserError: a missing folder.
    """
    wanted = (
        "a folder in Hugging Face format (config.json, weights, tokenizer) or the name of a model on the Hub such as "
        "'google/gemma-2-2b'"
    )
    return folder_or_hub_name(path_or_id, "text_encoder.path", wanted)


def set_loading_bars(shown: bool) -> None:
    """Whether transformers shows its progress bars while it loads and writes weights. They take seconds."""
    from transformers.utils import logging

    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()


def caps_attention(text_config: Any) -> bool:
    """Whether the model caps its attention logits, as Gemma-2 does; the fused kernels leave that out."""
    return bool(getattr(text_config, "attn_logit_softcapping", None))


def load_model(source: str, dtype: torch.dtype | str) -> PreTrainedModel:
    """A text model on the CPU; of a multi-part model only the text encoder.

    source: of `checked_source`. dtype: "auto" for that of the file.

    Raises:
        UserError: a part of it is missing or unreadable, it brings code or a pickle that could run some, or the Hub
            refuses.
    """
    from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, AutoConfig, AutoModel, AutoModelForTextEncoding

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads and forked data workers do not mix
    try:
        config = pretrained(AutoConfig, source)
        text_config = config.get_text_config()
        only_text = type(text_config) in MODEL_FOR_TEXT_ENCODING_MAPPING
        model, info = pretrained_model(
            AutoModelForTextEncoding if only_text else AutoModel,
            source,
            config=text_config if only_text else config,
            dtype=dtype,
            attn_implementation="eager" if caps_attention(text_config) else None,
            ignore_mismatched_sizes=True,  # they are reported below
            output_loading_info=True,
        )
    except ERRORS as error:
        raise UserError(_loading_advice(source, error)) from error
    mismatched = (key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])  # names in 4.x
    unset = {*info["missing_keys"], *mismatched}
    unset = sorted(name for name in unset if "pooler" not in name)
    if unset:
        raise UserError(
            f"text_encoder.path={source!r} lacks {len(unset)} weights of the {config.model_type!r} model in its "
            f"config.json, or has them in another shape ({', '.join(unset[:3])} …); give a complete checkpoint"
        )
    report_load(f"text encoder {source}", len(model.state_dict()), {"not used": info["unexpected_keys"]})
    return model


def skeleton(path_or_id: str | os.PathLike) -> PreTrainedModel | None:
    """The text model of a folder without values (on the meta device); None where only a name of the Hub is known."""
    from transformers import AutoConfig, AutoModel

    source = checked_source(path_or_id)
    if not Path(source).is_dir():
        return None
    try:
        with torch.device("meta"):
            return AutoModel.from_config(pretrained(AutoConfig, source).get_text_config(), trust_remote_code=False)
    except ERRORS as error:
        raise UserError(_loading_advice(source, error)) from error


def load_tokenizer(path_or_id: str | os.PathLike) -> PreTrainedTokenizerBase:
    """The tokenizer of a text encoder, from a folder in Hugging Face format or from the Hub.

    A saved pipeline has it in the folder tokenizer/ beside.

    Raises:
        UserError: as `checked_source` and `load_model`.
    """
    from transformers import AutoTokenizer

    source = checked_source(path_or_id)
    beside = Path(source).parent / "tokenizer"
    if Path(source).is_dir() and not any(Path(source).glob("*token*")) and beside.is_dir():
        source = str(beside)
    try:
        return pretrained(AutoTokenizer, source)
    except ERRORS as error:
        raise UserError(_loading_advice(source, error)) from error


def pretrained(kind: Any, source: str, **arguments: Any) -> Any:
    """`kind.from_pretrained(source)` of transformers, which runs no code of the folder. Says that the Hub is asked."""
    if not Path(source).is_dir():
        announce(source)
    return kind.from_pretrained(source, trust_remote_code=False, **arguments)


def pretrained_model(kind: Any, source: str, **arguments: Any) -> Any:
    """`pretrained` of a model: from safetensors, and only where there are none from pickled weights."""
    safetensors = any(Path(source).glob("*.safetensors")) or None  # None: of the Hub, what it has, in the same order
    return pretrained(kind, source, use_safetensors=safetensors, weights_only=True, **arguments)


def whole_model(kind: Any, source: str) -> Any:
    """`pretrained_model`, where a weight that is not there is a ValueError: transformers goes on with a random one."""
    model, info = pretrained_model(kind, source, output_loading_info=True)
    if missing := sorted(set(info["missing_keys"]) & {name for name, _ in model.named_parameters()}):
        raise ValueError(f"it lacks {len(missing)} weights of a {type(model).__name__}, {missing[0]} among them")
    return model


def reason_of(error: BaseException) -> str:
    """Why a library could not load something, in one line, without advice to let strangers' code run."""
    text = str(error)
    if "trust_remote_code" in text:
        return "it needs code of its own, which is never run here: give a model that transformers itself knows"
    if any(isinstance(one, pickle.UnpicklingError) for one in _chain(error)) or "weights_only" in text.lower():
        return "its pickled weights are damaged or hold more than tensors, which could run code: get safetensors"
    return first_line(error)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it was raised in the handling of: older transformers hide the pickle's behind others."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _loading_advice(source: str, error: Exception) -> str:
    reason = reason_of(error)
    if Path(source).is_dir():
        return (
            f"text_encoder.path={source!r} cannot be read as a Hugging Face model ({reason}); it needs config.json, "
            "model.safetensors and the tokenizer's files, complete"
        )
    licence = GEMMA_LICENCE if "gemma" in source.lower() else ""
    return (
        f"text_encoder.path={source!r} is no folder here{nearest(source)} and could not be had from the Hugging Face "
        f"Hub ({reason}).{licence} Without network, copy the model to a folder and give its path."
    )
