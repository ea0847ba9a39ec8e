"""Scores what each column trained, by one measure on the same held-out examples: plain transformers, float32.

    python scoring.py SPECIFICATION

sft: nats per response token. reward_model: Bradley-Terry loss per pair. dpo: its loss per pair against the model all
started from. Online: minus the mean reward of two samples to each prompt.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

SPEC: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
ROWS = 16
SAMPLES = 2


def main() -> None:
    torch.set_num_threads(SPEC["threads"])
    records = held_out()
    found = {column: score(load(directory), records) for column, directory in SPEC["outputs"].items()}
    Path(SPEC["result"]).write_text(json.dumps(found))


def held_out() -> list[dict[str, str]]:
    (path,) = Path(SPEC["data"]).glob("*.eval.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@torch.inference_mode()
def score(model: Any, records: list[dict[str, str]]) -> float:
    tokenizer = AutoTokenizer.from_pretrained(SPEC["policy"])
    if SPEC["row"] == "sft":
        logps, counts = response_logps(model, tokenizer, records, "response")
        return float(-logps.sum() / counts.sum())
    if SPEC["row"] == "reward_model":
        chosen, rejected = (rewards(model, tokenizer, records, part) for part in ("chosen", "rejected"))
        return float(-F.logsigmoid(chosen - rejected).mean())
    if SPEC["row"] in ("grpo", "rloo"):
        return -sampled_reward(model, tokenizer, records)
    reference = load(SPEC["policy"])
    parts = ("chosen", "rejected")
    chosen, rejected = (
        response_logps(model, tokenizer, records, part)[0] - response_logps(reference, tokenizer, records, part)[0]
        for part in parts
    )
    return float(-F.logsigmoid(SPEC["beta"] * (chosen - rejected)).mean())


def load(directory: str) -> Any:
    auto = AutoModelForSequenceClassification if SPEC["row"] == "reward_model" else AutoModelForCausalLM
    return auto.from_pretrained(directory, dtype=torch.float32).to(SPEC["device"]).eval()


def encoded(tokenizer: Any, record: dict[str, str], part: str) -> tuple[Tensor, int]:
    """Tokens of prompt and response, and how many are the prompt's."""
    prompt = [tokenizer.bos_token_id, *tokenizer.encode(record["prompt"], add_special_tokens=False)]
    response = [*tokenizer.encode(record[part], add_special_tokens=False), tokenizer.eos_token_id]
    return torch.tensor(prompt + response), len(prompt)


def response_logps(model: Any, tokenizer: Any, records: list[dict[str, str]], part: str) -> tuple[Tensor, Tensor]:
    """Summed log-probs of the responses [R] and their numbers of tokens [R]. Right padding needs no mask."""
    sums, counts = [], []
    for start in range(0, len(records), ROWS):
        rows = [encoded(tokenizer, record, part) for record in records[start : start + ROWS]]
        ids = torch.nn.utils.rnn.pad_sequence([row for row, _ in rows], batch_first=True, padding_value=0)
        logps = model(input_ids=ids.to(model.device), use_cache=False).logits[:, :-1].log_softmax(-1).cpu()
        picked = logps.gather(2, ids[:, 1:].unsqueeze(2)).squeeze(2)
        for row, (tokens, prompt) in zip(picked, rows, strict=True):
            sums.append(row[prompt - 1 : len(tokens) - 1].sum())
            counts.append(torch.tensor(len(tokens) - prompt))
    return torch.stack(sums), torch.stack(counts)


def rewards(model: Any, tokenizer: Any, records: list[dict[str, str]], part: str) -> Tensor:
    one_by_one = (encoded(tokenizer, record, part)[0].unsqueeze(0).to(model.device) for record in records)
    return torch.stack([model(input_ids=tokens, use_cache=False).logits.squeeze().cpu() for tokens in one_by_one])


def sampled_reward(model: Any, tokenizer: Any, records: list[dict[str, str]]) -> float:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    torch.manual_seed(0)
    analyser = SentimentIntensityAnalyzer()
    prompts = [record["prompt"] for record in records]
    tokenizer.padding_side = "left"
    batch = tokenizer([f"{tokenizer.bos_token}{prompt}" for prompt in prompts], return_tensors="pt", padding=True)
    width = batch["input_ids"].shape[1]
    drawn = model.generate(
        input_ids=batch["input_ids"].to(model.device), attention_mask=batch["attention_mask"].to(model.device),
        do_sample=True, temperature=SPEC["temperature"], top_k=0, max_new_tokens=SPEC["max_new_tokens"],
        num_return_sequences=SAMPLES, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    texts = tokenizer.batch_decode(drawn[:, width:], skip_special_tokens=True)
    scores = [analyser.polarity_scores(prompts[n // SAMPLES] + text)["compound"] for n, text in enumerate(texts)]
    return sum(scores) / len(scores)


if __name__ == "__main__":
    main()
