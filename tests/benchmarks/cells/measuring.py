"""What a cell measures about itself. Nothing heavy is imported before `Watch` is told to."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

BORN = time.perf_counter()


class Watch:
    """Times one training run of this process and counts what the model's embedding reads while it learns."""

    def __init__(self) -> None:
        self.spec: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
        self.facts = json.loads((Path(self.spec["data"]) / "facts.json").read_text())
        self.import_seconds, self.import_rss = 0.0, 0
        self.first_step = 0.0
        self.pad = -1
        self.positions: Any = 0
        self.padding: Any = 0

    def imported(self, began: float) -> None:
        """The imports that began then are done. torch is among them."""
        import torch

        self.import_seconds, self.import_rss = time.perf_counter() - began, peak_rss()
        torch.set_num_threads(self.spec["threads"])
        forward, watch = torch.nn.Embedding.forward, self

        def counted(module: Any, tokens: Any) -> Any:
            if torch.is_grad_enabled():
                watch.first_step = watch.first_step or time.perf_counter() - BORN
                watch.positions += tokens.numel()
                watch.padding += (tokens == watch.pad).sum()  # stays on the device
            return forward(module, tokens)

        torch.nn.Embedding.forward = counted  # type: ignore[method-assign]

    def write(self, *, seconds: float, cpu_seconds: float, tokens: int, train_loss: float, **more: Any) -> None:
        """seconds, cpu_seconds: from the first batch to the last update, the reference's share in it included."""
        import torch

        cuda = torch.cuda.is_available()
        result = {
            "seconds": seconds, "cpu_seconds": cpu_seconds, "tokens": tokens, "train_loss": train_loss,
            "samples": self.spec["steps"] * self.spec["batch_size"],
            "padding": float(self.padding) / max(1, self.positions),
            "positions": int(self.positions),
            "import_seconds": self.import_seconds, "import_rss": self.import_rss, "start_seconds": self.first_step,
            "peak_rss": peak_rss(), "peak_cuda": torch.cuda.max_memory_allocated() if cuda else 0,
            "process_seconds": time.perf_counter() - BORN,
            **more,
        }  # fmt: skip
        Path(self.spec["result"]).write_text(json.dumps(result))


def peak_rss() -> int:
    """Bytes; the most that this process has had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
