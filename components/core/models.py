"""Policies, reward models and value models: loading, saving and the modules that the trainers run.

All weights are safetensors; remote code runs only where the user says so.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from tutelage.components.core.config import Architecture
from tutelage.components.core.errors import ArtifactError
from tutelage.components.core.manifest import Manifest, write_manifest
from tutelage.components.core.model_source import HUB_ID

WHOLE = "Give a directory with config.json and complete safetensors weights, or a hub id that can be reached."

transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()


def load_tokenizer(source: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory or hub id, with a padding token. Raises ArtifactError without an end token."""
    named = _named(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(**named, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ArtifactError(
            f"its tokenizer cannot be loaded: {_first_line(error)}",
            where=str(source),
            fix="Give a directory with tokenizer.json and tokenizer_config.json, or a hub id that can be reached.",
        ) from None
    if tokenizer.eos_token_id is None:
        raise ArtifactError(
            "its tokenizer has no end-of-sequence token",
            where=str(source),
            fix="Set eos_token in tokenizer_config.json.",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_policy(
    source: str | Path, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A causal language model from a directory or hub id, dropout as its config says, in evaluation mode.

    Raises ArtifactError where it is not there, or not whole: a reward model has no output layer, for one.
    """
    return _from_pretrained(AutoModelForCausalLM, source, dtype=dtype, trust_remote_code=trust_remote_code)


def load_scalar_model(
    source: str | Path, *, fresh_head: Literal["reward", "value"] | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A backbone with one linear output per position (AutoModelForSequenceClassification, num_labels=1).

    fresh_head: "reward" draws a new head from N(0, 1/(d+1)) (variance), "value" sets it to zero, both without bias
    (details of RLHF with PPO, R2 and P2); None keeps the head in the directory, which must have one.
    Raises ArtifactError where the model is not there, not whole, or no reward model where one is needed.
    """
    with _loading(source):
        config = AutoConfig.from_pretrained(**_named(source), trust_remote_code=trust_remote_code)
    if fresh_head is None:
        fix = "Give the directory of a reward model."
        if not any("SequenceClassification" in name for name in config.architectures or []):
            raise ArtifactError("it is no reward model: it has no scalar head", where=str(source), fix=fix)
        if config.num_labels != 1:
            raise ArtifactError(f"its head gives {config.num_labels} numbers, not one", where=str(source), fix=fix)
    model = _from_pretrained(
        AutoModelForSequenceClassification,
        source,
        new=() if fresh_head is None else ("score.", "classifier."),
        num_labels=1,
        pad_token_id=_pad_id(config),
        trust_remote_code=trust_remote_code,
    )
    head = scalar_head(model)
    if fresh_head is not None:
        with torch.no_grad():
            if fresh_head == "reward":
                head.weight.normal_(0.0, 1.0 / math.sqrt(head.in_features + 1))
            else:
                head.weight.zero_()
            if head.bias is not None:
                head.bias.zero_()
    return model


def build_policy(architecture: Architecture, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A Llama with random weights from torch's global generator; input and output embeddings are tied."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=architecture.hidden_size,
        intermediate_size=architecture.intermediate_size,
        num_hidden_layers=architecture.layers,
        num_attention_heads=architecture.heads,
        num_key_value_heads=architecture.heads,
        max_position_embeddings=architecture.context,
        attention_dropout=architecture.dropout,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocabulary` tokens, with <s>, </s> and <pad>, learned from the texts."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    special = ["<s>", "</s>", "<pad>"]
    trainer = BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


def check_agreement(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, where: str) -> None:
    """Raises ArtifactError if the tokenizer has tokens that the model has no embedding for."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ArtifactError(
            f"tokenizer and model disagree: {len(tokenizer)} tokens, {rows} embeddings",
            where=where,
            fix="Take both from one model.",
        )


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    kind: Literal["policy", "reward_model"],
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    extra: Mapping[str, Any] | None = None,
    files: tuple[Path, ...] = (),
    state: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> Manifest:
    """Writes weights (safetensors), tokenizer, `files` and, last, the manifest.

    state: the weights, where the model does not hold them whole (sharded training). dtype: casts a copy of them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    state = dict(state or model.state_dict())
    if dtype is not None:
        state = _cast(state, dtype)
    model.save_pretrained(directory, state_dict=state)
    if dtype is not None:
        path = directory / "config.json"
        path.write_text(
            json.dumps({**json.loads(path.read_text()), "dtype": str(dtype).removeprefix("torch.")}, indent=2) + "\n"
        )
    tokenizer.save_pretrained(directory)
    for path in files:
        shutil.copy(path, directory / path.name)
    return write_manifest(directory, kind=kind, config=dict(config), inputs=dict(inputs), extra=dict(extra or {}))


def scalar_head(model: PreTrainedModel) -> nn.Linear:
    """The linear layer that turns a hidden state into the scalar; decoders name it `score`. Raises ArtifactError."""
    head = getattr(model, "score", None)
    if isinstance(head, nn.Linear):
        return head
    # Encoders have a `classifier` on a pooled state; read at the last token it would give numbers without meaning.
    raise ArtifactError(
        f"{type(model).__name__} has no scalar head named score",
        where=str(model.config.name_or_path),
        fix="Use a decoder model.",
    )


class ScalarModel(nn.Module):
    """A scalar per position: a reward model reads it at the last real token, a value model everywhere.

    `gain` and `bias` normalise the output (details of RLHF with PPO, R3); they are kept in the model's config.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.gain = float(getattr(model.config, "reward_gain", 1.0))
        self.bias = float(getattr(model.config, "reward_bias", 0.0))

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids [B,T], padded on the right, to values [B,T] in float32."""
        hidden = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        return scalar_head(self.model)(hidden).squeeze(-1).float() * self.gain + self.bias

    def rewards(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """The value at the last real token of each row: input_ids [B,T], lengths [B] to rewards [B]."""
        values = self(input_ids)
        return values.gather(1, (lengths - 1).unsqueeze(1)).squeeze(1)

    def normalise(self, mean: float, std: float) -> None:
        """Sets gain and bias so that rewards of this mean and std come out as 0 and 1: g = 1/s, b = -m/s."""
        if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
            raise ValueError(f"cannot normalise rewards of mean {mean} and std {std}")
        self.gain, self.bias = self.gain / std, (self.bias - mean) / std
        self.model.config.reward_gain, self.model.config.reward_bias = self.gain, self.bias


def _from_pretrained(
    auto: Any,
    source: str | Path,
    *,
    trust_remote_code: bool,
    dtype: torch.dtype = torch.float32,
    new: tuple[str, ...] = (),
    **more: Any,
) -> PreTrainedModel:
    """new: prefixes of the weights that the source need not have."""
    with _loading(source):
        model, found = auto.from_pretrained(
            **_named(source), dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code,
            output_loading_info=True, **more,
        )  # fmt: skip
    if missing := sorted(name for name in found["missing_keys"] if not name.startswith(new)):
        more_missing = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ArtifactError(f"the weight {missing[0]}{more_missing} is missing", where=str(source), fix=WHOLE)
    return model.eval()


@contextlib.contextmanager
def _loading(source: str | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = _first_line(error)
        if "ignore_mismatched_sizes" in reason:
            reason = "its weights have other shapes than config.json says"
        raise ArtifactError(f"the model cannot be loaded: {reason}", where=str(source), fix=WHOLE) from None


def _named(source: str | Path) -> dict[str, str]:
    """How from_pretrained takes a directory or a hub id, with or without @revision. ArtifactError for neither."""
    text = str(source)
    if Path(text).is_dir():
        return {"pretrained_model_name_or_path": text}
    if not HUB_ID.fullmatch(text):
        raise ArtifactError("there is no model directory", where=text, fix=WHOLE)
    name, _, revision = text.partition("@")
    return {"pretrained_model_name_or_path": name, "revision": revision or "main"}


def _cast(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tied weights stay one tensor, which is then written once."""
    cast: dict[tuple[int, torch.Size], Tensor] = {}
    for tensor in state.values():
        if tensor.is_floating_point():
            cast.setdefault((tensor.data_ptr(), tensor.shape), tensor.to(dtype))
    return {name: cast.get((tensor.data_ptr(), tensor.shape), tensor) for name, tensor in state.items()}


def _pad_id(config: Any) -> int | None:
    text = config.get_text_config()
    if getattr(text, "pad_token_id", None) is not None:
        return int(text.pad_token_id)
    end = getattr(text, "eos_token_id", None)
    return end[0] if isinstance(end, list) else end


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
