"""Models of a few thousand parameters and a tokenizer of 64 words."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WORDS = 64


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Words w4 to w63 (id = number) between spaces; <unk> 0, <s> 1, </s> 2, <pad> 3."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3} | {f"w{number}": number for number in range(4, WORDS)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture(scope="session")
def llama() -> Callable[..., Any]:
    """llama(seed, **config): a new Llama of 64 tokens, width 32 and 2 layers; head=True: with a scalar head instead.

    Weights are large enough that logits differ by several units, as a trained model's do.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    def build(seed: int = 0, *, head: bool = False, **values: Any) -> Any:
        shape = {
            "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "initializer_range": 0.3,
        }  # fmt: skip
        torch.manual_seed(seed)
        if head:
            return LlamaForSequenceClassification(LlamaConfig(**shape | {"num_labels": 1} | values)).eval()
        return LlamaForCausalLM(LlamaConfig(**shape | values)).eval()

    return build
