"""One cell of TRL's columns: `shipped` is the library as it comes, `tuned` is what its own options do for speed.

    python trl_column.py SPECIFICATION

Both get text, as a user's file has it, in the order in which this project comes by it, and the same optimizer,
learning rate, schedule, batch size, steps and seed. Nothing is saved or evaluated on the way.

Shipped, of TRL 1.16: bf16 autocast, activation checkpointing, 8 examples per forward, batches in the data's order,
the reference model run beside the policy.
Tuned: the benchmark's precision, no activation checkpointing, examples of about one length batched together (by its
own sampler, which needs a column of lengths for pairs), the reference's log-probs computed once over examples sorted by
length, and as many examples per forward as was fastest.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from measuring import Watch

WATCH = Watch()
SPEC = WATCH.spec
TUNED = SPEC["column"] == "trl_tuned"
ONLINE = SPEC["row"] in ("grpo", "rloo")


def main() -> None:
    began = time.perf_counter()
    trainer_class, config_class, dataset_class = classes()
    WATCH.imported(began)
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SPEC["policy"])
    WATCH.pad = tokenizer.pad_token_id
    precomputing = timed_precomputation(trainer_class)
    torch.manual_seed(SPEC["seed"])
    start = SPEC["scalar"] if SPEC["row"] == "reward_model" else SPEC["policy"]
    more: dict[str, Any] = {"reward_funcs": sentiment()} if ONLINE else {}
    trainer = trainer_class(
        model=start,
        args=config_class(**options()),
        train_dataset=dataset_class.from_list(examples(tokenizer)),
        processing_class=tokenizer,
        **more,
    )
    clock, cpu = time.perf_counter(), time.process_time()
    result = trainer.train()
    seconds = time.perf_counter() - clock + precomputing[0]
    cpu_seconds = time.process_time() - cpu + precomputing[1]
    trainer.save_model(SPEC["output"])
    tokenizer.save_pretrained(SPEC["output"])
    seen = int(trainer.state.num_input_tokens_seen if ONLINE else WATCH.positions - WATCH.padding)
    if not ONLINE and seen != WATCH.facts["tokens"]:
        raise SystemExit(f"{seen} tokens were trained on, the data has {WATCH.facts['tokens']}: the columns differ")
    figures = {name: value for row in trainer.state.log_history for name, value in row.items()}
    WATCH.write(
        seconds=seconds, cpu_seconds=cpu_seconds, tokens=seen, train_loss=result.training_loss,
        response_length=figures.get("completions/mean_length"),
    )  # fmt: skip


def classes() -> tuple[Any, Any, Any]:
    from datasets import Dataset

    if SPEC["row"] == "sft":
        from trl import SFTConfig, SFTTrainer

        return SFTTrainer, SFTConfig, Dataset
    if SPEC["row"] == "reward_model":
        from trl import RewardConfig, RewardTrainer

        return RewardTrainer, RewardConfig, Dataset
    if SPEC["row"] == "grpo":
        from trl import GRPOConfig, GRPOTrainer

        return GRPOTrainer, GRPOConfig, Dataset
    if SPEC["row"] == "rloo":
        from trl import RLOOConfig, RLOOTrainer

        return RLOOTrainer, RLOOConfig, Dataset
    from trl import DPOConfig, DPOTrainer

    return DPOTrainer, DPOConfig, Dataset


def options() -> dict[str, Any]:
    """The trainer's configuration: first what all columns share."""
    per_forward = SPEC["trl_rows"] if TUNED else min(8, SPEC["batch_size"])
    chosen: dict[str, Any] = {
        "output_dir": SPEC["output"], "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
        "seed": SPEC["seed"], "max_steps": SPEC["steps"], "per_device_train_batch_size": per_forward,
        "gradient_accumulation_steps": SPEC["batch_size"] // per_forward,
        "learning_rate": SPEC["learning_rate"], "lr_scheduler_type": "linear", "warmup_steps": 0,
        "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-8, "weight_decay": 0.0, "max_grad_norm": 1.0,
        "use_cpu": SPEC["device"] == "cpu",
    }  # fmt: skip
    if ONLINE:
        chosen |= {
            "num_generations": SPEC["group"], "max_completion_length": SPEC["max_new_tokens"],
            "temperature": SPEC["temperature"], "beta": SPEC["beta"], "shuffle_dataset": False,
        }  # fmt: skip
    else:
        chosen |= {"max_length": SPEC["max_tokens"], "train_sampling_strategy": "sequential"}
    if SPEC["row"].startswith("dpo"):
        chosen["beta"] = SPEC["beta"]
    if not TUNED:
        return chosen | SPEC.get("trl_options", {})
    chosen |= {"bf16": SPEC["precision"] == "bf16", "gradient_checkpointing": False}
    if not ONLINE:
        chosen |= {"train_sampling_strategy": "group_by_length"}
    if SPEC["row"] in ("dpo", "dpo_ratings", "reward_model"):
        chosen["remove_unused_columns"] = False  # or the column of lengths would be gone before the sampler looks
    if SPEC["row"].startswith("dpo"):
        chosen |= {"precompute_ref_log_probs": True}
    return chosen | SPEC.get("trl_options", {})


def examples(tokenizer: Any) -> list[dict[str, Any]]:
    """Rows for TRL, which adds the end token but, for a tokenizer like this one, no start token."""
    folder = Path(SPEC["data"])
    (path,) = folder.glob("*.train.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    ordered = [records[index] for index in json.loads((folder / "order.json").read_text())]
    rows = [{**record, "prompt": f"{tokenizer.bos_token}{record['prompt']}"} for record in ordered]
    if SPEC["row"] == "sft":
        return [{"prompt": row["prompt"], "completion": row["response"]} for row in rows]
    if ONLINE:
        return [{"prompt": row["prompt"]} for row in rows]
    pairs = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    if TUNED:
        for pair in pairs:
            longest = max(pair["chosen"], pair["rejected"], key=len)
            pair["length"] = len(tokenizer.encode(pair["prompt"] + longest)) + 1
        pairs.sort(key=lambda pair: pair["length"])
    return pairs


def sentiment() -> Any:
    """The reward: the sentiment of prompt and response by a lexicon, as this project's source `vader` gives it."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyser = SentimentIntensityAnalyzer()

    def vader(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        texts = (prompt.removeprefix("<s>") + text for prompt, text in zip(prompts, completions, strict=True))
        return [float(analyser.polarity_scores(text)["compound"]) for text in texts]

    return vader


def timed_precomputation(trainer_class: Any) -> list[float]:
    """[seconds, CPU seconds] that the trainer spends on the reference before it trains."""
    spent = [0.0, 0.0]
    if hasattr(trainer_class, "_precompute_ref_logps"):
        inner = trainer_class._precompute_ref_logps

        def outer(self: Any, *given: Any, **named: Any) -> Any:
            clock, cpu = time.perf_counter(), time.process_time()
            result = inner(self, *given, **named)
            spent[0] += time.perf_counter() - clock
            spent[1] += time.process_time() - cpu
            return result

        trainer_class._precompute_ref_logps = outer
    return spent


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")
    main()
