"""How fast data preparation is, and whether its memory grows with the file. Seconds of CPU, as other work may run.

    python tests/benchmarks/data_preparation.py [--rows 2000000]

Makes preference rows (half of them with ids, two pairs a prompt, 1% bad, 2% longer in bytes than the context is in
tokens, so that they are tokenized) and prepares a tenth of them, then all, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MAX_TOKENS = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--folder", help="where the files go, several GB; removed at the end")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        make_tokenizer(folder / "tokenizer.json")
        print("      rows   MB read   seconds   CPU seconds   rows/CPU second   peak RSS, MB   quarantined")
        for rows in (given.rows // 10, given.rows):
            data = folder / "pairs.jsonl"
            make_rows(data, rows)
            command = [sys.executable, "-c", "import data_preparation; data_preparation.measure()", str(data)]
            done = subprocess.run(command, cwd=Path(__file__).parent, check=True, stdout=subprocess.PIPE)
            took = json.loads(done.stdout)
            print(
                f"{rows:>10,} {data.stat().st_size / 1e6:>9,.0f} {took['seconds']:>9.1f} {took['cpu']:>13.1f} "
                f"{rows / took['cpu']:>17,.0f} {took['peak_rss'] / 1e6:>14.0f} {took['quarantined']:>13,}"
            )


def measure() -> None:
    """Prepares the file that the command line names, and prints seconds and peak memory."""
    from tutelage.components.core.context import Settings, StageContext
    from tutelage.components.core.store import open_store
    from tutelage.components.core.tracking import NullTracker
    from tutelage.components.data_prep.stage import Config, run

    data = Path(sys.argv[1])
    store = open_store(data.parent / "store")
    context = StageContext("data_prep", Settings(), store=store, tracker=NullTracker(), work=data.parent)
    config = Config.build(data_uri=str(data), model_uri=str(data.parent), max_tokens=MAX_TOKENS)
    began, before = time.perf_counter(), time.process_time()
    result = run(config, context, dataset=data.parent / "dataset")
    seconds, cpu = time.perf_counter() - began, time.process_time() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "cpu": cpu, "peak_rss": peak, "quarantined": result.rows - result.kept}))


def make_rows(path: Path, rows: int) -> None:
    """About 700 bytes a row."""
    draw = random.Random(1)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(20, 60))) for _ in range(20_000)]
    prompt = ""
    with path.open("w", encoding="utf-8") as file:
        for row in range(rows):
            if row % 2 == 0:
                prompt = f"Question {row}: {draw.choice(texts)[:120]}"
            pair = {"id": f"pair-{row}", "prompt": prompt} if row % 2 else {"prompt": prompt}
            pair |= {"chosen": draw.choice(texts), "rejected": draw.choice(texts), "source": "made"}
            if row % 50 == 7:
                pair["chosen"] = f"{pair['chosen']} " * 6
            if row % 100 == 8:
                pair["rejected"] = pair["chosen"]
            file.write(json.dumps(pair) + "\n")


def make_tokenizer(path: Path) -> None:
    """A byte-level BPE tokenizer of 1,000 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([" ".join(WORDS)] * 10, trainer)
    tokenizer.save(str(path))


_SYLLABLES = ("ba", "con", "di", "es", "for", "ga", "in", "ker", "lo", "men", "ne", "or", "pre", "qui", "ra", "sta")
WORDS = [first + second for first in _SYLLABLES for second in _SYLLABLES]

if __name__ == "__main__":
    main()
