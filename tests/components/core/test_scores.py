"""Log-probs and entropies against a naive log-softmax over all logits, in value and gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tutelage.components.core import scores
from tutelage.components.core.batches import Sequence, collate
from tutelage.components.core.scores import Policy, SequenceScores, has_plain_head


def batch() -> tuple[Tensor, Tensor]:
    """Four ragged rows of 64 words, one without a prompt."""
    generator = torch.Generator().manual_seed(5)
    rows = [(11, 4), (7, 1), (12, 11), (5, 0)]
    groups = [
        (Sequence("", tuple(torch.randint(4, 64, (length,), generator=generator).tolist()), prompt),)
        for length, prompt in rows
    ]
    made = collate(groups, 3)
    return made.input_ids, made.mask


def naive(model: Any, input_ids: Tensor, mask: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Shift by one, log-softmax over all logits of the model's own forward, gather; entropies -sum p log p."""
    logps = torch.log_softmax(model(input_ids=input_ids).logits[:, :-1].double() / temperature, -1)
    taken = logps.gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    entropy = -(logps.exp() * logps).sum(-1)
    front = torch.zeros(len(input_ids), 1, dtype=torch.double)
    return torch.cat([front, taken], 1) * mask, torch.cat([front, entropy], 1) * mask


def gradients(model: Any, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("chunk", [2**25, 64 * 3], ids=["whole", "chunks"])
def test_logps_entropies_and_gradients_are_those_of_a_naive_log_softmax(
    llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, temperature: float, chunk: int
) -> None:
    monkeypatch.setattr(scores, "CHUNK_ELEMENTS", chunk)
    model = llama()
    input_ids, mask = batch()
    logps, entropies = Policy(model)(input_ids, mask, temperature=temperature, entropy=True)
    wanted, wanted_entropies = naive(model, input_ids, mask, temperature)
    assert logps.dtype == entropies.dtype == torch.float32
    assert wanted[mask].std() > 0.5  # logits that differ: a wrong gather would show
    torch.testing.assert_close(logps.double(), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(entropies.double(), wanted_entropies, rtol=0, atol=1e-5)
    assert not entropies.requires_grad
    weights = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1))
    for one, other in zip(
        gradients(model, (logps * weights).sum()), gradients(model, (wanted * weights).sum()), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_chunks_change_nothing(llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    policy, (input_ids, mask) = Policy(model), batch()
    logps, entropies = policy(input_ids, mask, entropy=True)
    whole = gradients(model, logps.sum())
    for rows in (1, 5, int(mask.sum()) - 1):
        monkeypatch.setattr(scores, "CHUNK_ELEMENTS", 64 * rows)
        parts, part_entropies = policy(input_ids, mask, entropy=True)
        torch.testing.assert_close(parts, logps, rtol=0, atol=1e-6)
        torch.testing.assert_close(part_entropies, entropies, rtol=0, atol=1e-6)
        for one, other in zip(gradients(model, parts.sum()), whole, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(policy(input_ids, mask)[0], logps, rtol=0, atol=1e-6)


def test_chunks_keep_few_logits_alive(llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In a forward and backward over 330 tokens no chunk's output layer sees more than 16 rows."""
    model = llama()
    monkeypatch.setattr(scores, "CHUNK_ELEMENTS", 64 * 16)
    seen: list[int] = []
    policy = Policy(model)
    model.lm_head.register_forward_hook(lambda module, given, output: seen.append(output.shape[0]))
    input_ids = torch.randint(4, 64, (10, 34), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(input_ids, dtype=torch.bool)
    mask[:, 0] = False
    policy(input_ids, mask)[0].sum().backward()
    assert max(seen) == 16
    assert sum(seen) == 2 * 330  # once forward, once recomputed


def test_entropies_are_zero_unless_asked_for(llama: Callable[..., Any]) -> None:
    input_ids, mask = batch()
    assert not Policy(llama())(input_ids, mask)[1].any()


def test_right_padding_of_any_content_changes_nothing(llama: Callable[..., Any]) -> None:
    model = llama()
    policy, (input_ids, mask) = Policy(model), batch()
    lengths = mask.shape[1] - mask.flip(1).int().argmax(1)
    wanted, wanted_entropies = policy(input_ids, mask, entropy=True)
    garbage = torch.randint(0, 64, (4, 20), generator=torch.Generator().manual_seed(3))
    for row, length in enumerate(lengths.tolist()):
        garbage[row, :length] = input_ids[row, :length]
    longer = torch.zeros(garbage.shape, dtype=torch.bool)
    longer[:, : mask.shape[1]] = mask
    got, got_entropies = policy(garbage, longer, entropy=True)
    torch.testing.assert_close(got[:, : mask.shape[1]], wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(got_entropies[:, : mask.shape[1]], wanted_entropies, rtol=0, atol=1e-5)
    assert not got[:, mask.shape[1] :].any()


def test_left_padding_with_mask_and_positions_gives_the_same_logps(llama: Callable[..., Any]) -> None:
    """The contract of left-padded prompts: positions cumsum(mask) - 1, at least 0, give what right padding gives."""
    model = llama()
    input_ids, mask = batch()
    wanted, _ = Policy(model)(input_ids, mask)
    tokens, responses = input_ids[0, :11], mask[0, :11]
    left = torch.cat([torch.full((6,), 3), tokens]).unsqueeze(0)
    attention = torch.cat([torch.zeros(6, dtype=torch.long), torch.ones(11, dtype=torch.long)]).unsqueeze(0)
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=left, attention_mask=attention, position_ids=positions).logits
    logps = torch.log_softmax(logits[0, 6:-1].float(), -1).gather(-1, tokens[1:, None]).squeeze(-1)
    torch.testing.assert_close(logps * responses[1:], wanted[0, 1:11], rtol=0, atol=1e-5)


def test_rows_apart_score_as_they_do_together(llama: Callable[..., Any]) -> None:
    policy, (input_ids, mask) = Policy(llama()), batch()
    together, _ = policy(input_ids, mask)
    for row in range(len(mask)):
        apart, _ = policy(input_ids[row : row + 1], mask[row : row + 1])
        torch.testing.assert_close(apart[0], together[row], rtol=0, atol=1e-5)


def test_a_batch_without_responses_scores_zero(llama: Callable[..., Any]) -> None:
    logps, entropies = Policy(llama())(torch.tensor([[1, 5, 6]]), torch.zeros(1, 3, dtype=torch.bool), entropy=True)
    assert not logps.any()
    assert not entropies.any()


# Families whose logits are more than the output layer on the hidden states


SHAPE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
    "pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def gemma2() -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=2.0, sliding_window=6)
    return Gemma2ForCausalLM(config).eval()


def cohere() -> Any:
    from transformers import CohereConfig, CohereForCausalLM

    torch.manual_seed(0)
    return CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.25)).eval()


def modernbert_decoder() -> Any:
    from transformers import ModernBertDecoderConfig, ModernBertDecoderForCausalLM

    torch.manual_seed(0)
    return ModernBertDecoderForCausalLM(ModernBertDecoderConfig(**SHAPE, cls_token_id=1, sep_token_id=2)).eval()


@pytest.mark.parametrize("build", [gemma2, cohere, modernbert_decoder])
def test_capped_scaled_and_transformed_logits_count(build: Callable[[], Any]) -> None:
    """Soft-capped logits, scaled logits, and a dense layer before the output layer, which no setting tells."""
    model = build()
    input_ids, mask = batch()
    policy = Policy(model)
    assert not policy.plain_head
    logps, entropies = policy(input_ids, mask, temperature=0.8, entropy=True)
    wanted, wanted_entropies = naive(model, input_ids, mask, 0.8)
    torch.testing.assert_close(logps.double(), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(entropies.double(), wanted_entropies, rtol=0, atol=1e-5)
    # The shortcut past the model's own forward would have been wrong.
    hidden = model.base_model(input_ids=input_ids).last_hidden_state
    shortcut = torch.log_softmax(model.get_output_embeddings()(hidden)[:, :-1].float() / 0.8, -1)
    shortcut = shortcut.gather(-1, input_ids[:, 1:, None]).squeeze(-1) * mask[:, 1:]
    assert (shortcut - wanted[:, 1:]).abs().max() > 0.01


def test_a_plain_head_is_found_and_the_mode_is_kept(llama: Callable[..., Any]) -> None:
    model = llama(attention_dropout=0.5)
    for training in (True, False):
        model.train(training)
        assert has_plain_head(model)
        assert model.training == model.model.layers[0].training == training


def test_small_weights_do_not_hide_a_cap() -> None:
    """Logits near zero pass through the cap unchanged; training would make them large."""
    model = gemma2()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert not has_plain_head(model)


# SequenceScores, by hand


def test_sums_means_and_ratios() -> None:
    mask = torch.tensor([[False, True, True], [False, True, False]])
    scores = SequenceScores(
        torch.tensor([[9.0, -1.0, -2.0], [9.0, -4.0, 9.0]]), torch.tensor([[7.0, -1.5, -2.5], [7.0, -1.0, 7.0]]), mask
    )
    assert scores.policy.tolist() == [-3, -4]
    assert scores.reference.tolist() == [-4, -1]
    assert scores.length.tolist() == [2, 1]
    assert scores.policy_mean.tolist() == [-1.5, -4]
    assert scores.log_ratio.tolist() == [1, -3]


def test_nothing_outside_the_mask_counts_not_even_what_is_no_number() -> None:
    mask = torch.tensor([[False, True, False]])
    policy = torch.tensor([[torch.nan, -1.0, -torch.inf]], requires_grad=True)
    scores = SequenceScores(policy, torch.tensor([[-torch.inf, -2.0, torch.nan]]), mask)
    assert scores.log_ratio.tolist() == [1]
    scores.policy_mean.sum().backward()
    assert policy.grad is not None
    assert policy.grad.tolist() == [[0, 1, 0]]


def test_without_a_reference_the_ratio_is_the_policys_log_prob() -> None:
    scores = SequenceScores(torch.tensor([[0.0, -1.0]]), None, torch.tensor([[False, True]]))
    assert scores.reference.tolist() == [0]
    assert scores.log_ratio.tolist() == [-1]


def test_an_empty_response_has_mean_zero() -> None:
    assert SequenceScores(torch.ones(1, 2), None, torch.zeros(1, 2, dtype=torch.bool)).policy_mean.tolist() == [0]


def test_members_of_lists() -> None:
    logps = torch.arange(12.0).view(2, 3, 2)
    scores = SequenceScores(logps, -logps, torch.ones(2, 3, 2, dtype=torch.bool))
    assert scores.policy.shape == (2, 3)
    second = scores.member(1)
    assert second.policy_logps.tolist() == [[2, 3], [8, 9]]
    assert second.reference.tolist() == [-5, -17]
    assert SequenceScores(logps, None, scores.mask).member(0).reference_logps is None
