"""Models of a few thousand parameters: a Llama of 64 words, and those that the stages train on a small data set."""

from __future__ import annotations

import importlib
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tutelage.components.core.context import Settings, StageContext
from tutelage.components.core.launch import launch
from tutelage.components.core.store import open_store
from tutelage.components.core.tracking import NullTracker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WORDS = 64

GOOD = ("lovely", "fine", "warm", "bright", "kind", "sound")
BAD = ("awful", "dull", "cold", "dim", "mean", "weak")
THINGS = ("film", "soup", "book", "song", "town", "chair", "road", "tea")
MAX_TOKENS = 80
SHAPE = {"vocabulary": 300, "hidden_size": 32, "layers": 2, "heads": 2, "intermediate_size": 64, "context": MAX_TOKENS}
FOUR_STEPS = {"max_steps": 4, "batch_size": 32, "threads": 1, "learning_rate": 3e-3}


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


class QuietContext(StageContext):
    """The real one; what it logs is kept."""

    def __init__(self, name: str, *, work: Path, store: Path) -> None:
        work.mkdir(parents=True, exist_ok=True)
        super().__init__(name, Settings(), store=open_store(store), tracker=NullTracker(), work=work)
        self.lines: list[str] = []

    def log(self, message: str) -> None:
        self.lines.append(message)


def preference_rows(count: int) -> list[dict[str, Any]]:
    """Pairs of which the chosen response has the better words; lengths are ragged."""
    draw = random.Random(7)
    rows = []
    for number in range(count):
        thing = draw.choice(THINGS)
        chosen, rejected = (
            " ".join(f"{draw.choice(words)} {thing}" for _ in range(draw.randint(1, 4))) + "." for words in (GOOD, BAD)
        )
        prompt = f"On {thing} {number}:\n"
        rows.append({"id": f"pair-{number}", "prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


@pytest.fixture
def make_context(tmp_path: Path) -> Callable[..., QuietContext]:
    """make_context(stage): a context with a store below the test's directory and a scratch directory of its own."""

    def make(name: str, *, store: str = "store", work: str = "work") -> QuietContext:
        return QuietContext(name, work=tmp_path / work, store=tmp_path / store)

    return make


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 pairs, a tenth of them held out, as data preparation leaves them."""
    from tutelage.components.data_prep.stage import Config

    folder = tmp_path_factory.mktemp("dataset")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in preference_rows(240)))
    config = Config.build(data_uri=str(rows), max_tokens=MAX_TOKENS, eval_fraction=0.1)
    launch("data_prep", config, outputs={"dataset": str(folder / "dataset")})
    return folder / "dataset"


@pytest.fixture(scope="session")
def policy(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama that fine-tuning made from nothing in four steps."""
    from tutelage.components.sft.stage import Config

    path = tmp_path_factory.mktemp("policy") / "policy"
    config = Config.build(architecture=SHAPE, max_tokens=MAX_TOKENS, training=FOUR_STEPS)
    launch("sft", config, inputs={"dataset": str(dataset)}, outputs={"policy": str(path)})
    return path


@pytest.fixture(scope="session")
def reward_model(dataset: Path, policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model of the same pairs and policy, also of four steps."""
    from tutelage.components.reward_model.stage import Config

    path = tmp_path_factory.mktemp("reward_model") / "reward_model"
    config = Config.build(max_tokens=MAX_TOKENS, training=FOUR_STEPS)
    inputs = {"dataset": str(dataset), "policy": str(policy)}
    launch("reward_model", config, inputs=inputs, outputs={"reward_model": str(path)})
    return path


OUTPUTS = {"sft": "policy", "reward_model": "reward_model", "policy_optimization": "optimized"}
# What differs from run to run.
TIMED = ("seconds", "speed/tokens_per_second", "speed/samples_per_second", "speed/mfu", "time/", "memory/")


class Stages:
    """Runs the training stages as a user does, on the session's data set and models, with outputs in `folder`."""

    def __init__(self, folder: Path, inputs: dict[str, Path]) -> None:
        self.folder, self.inputs = folder, inputs

    def arguments(self, stage: str, name: str) -> tuple[dict[str, str], dict[str, str]]:
        """Inputs and outputs of the stage; the output is the directory `name`."""
        needed = {
            "sft": ("dataset",), "reward_model": ("dataset", "policy"),
            "policy_optimization": ("dataset", "policy", "reward_model"),
        }[stage]  # fmt: skip
        return {one: str(self.inputs[one]) for one in needed}, {OUTPUTS[stage]: str(self.folder / name)}

    def run(
        self, stage: str, config: dict[str, Any], name: str = "out", **settings: str
    ) -> tuple[dict[str, Any], Path]:
        """In this process. Returns the result and the output's directory."""
        module = importlib.import_module(f"tutelage.components.{stage}.stage")
        inputs, outputs = self.arguments(stage, name)
        return launch(stage, module.Config.build(config), settings, inputs=inputs, outputs=outputs), self.folder / name

    def start(
        self, stage: str, config: dict[str, Any], name: str = "out", settings: dict[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """In a process of its own, `python -m tutelage.components.<stage>`; its stderr is a pipe."""
        files = {}
        for key, values in (("config", config), ("settings", settings or {})):
            files[key] = self.folder / f"{name}.{key}.json"
            files[key].write_text(json.dumps(values))
        command = [sys.executable, "-m", f"tutelage.components.{stage}"]
        command += [word for key, path in files.items() for word in (f"--{key}", str(path))]
        for flag, paths in zip(("--input", "--output"), self.arguments(stage, name), strict=True):
            command += [word for key, path in paths.items() for word in (flag, f"{key}={path}")]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def stages(dataset: Path, policy: Path, reward_model: Path, tmp_path: Path) -> Stages:
    return Stages(tmp_path, {"dataset": dataset, "policy": policy, "reward_model": reward_model})


@pytest.fixture(scope="session")
def weights_of() -> Callable[[Path], dict[str, Any]]:
    """All tensors of a model directory, by name."""
    from safetensors.torch import load_file

    return lambda directory: load_file(directory / "model.safetensors")


@pytest.fixture(scope="session")
def logged() -> Callable[[str, str, str], dict[str, list[tuple[int, float]]]]:
    """(step, value) of each metric that a stage's one MLflow run holds, as they were logged, but for what is timed.

    Takes the database, the run id and the stage.
    """
    from mlflow import MlflowClient

    def read(database: str, run_id: str, stage: str) -> dict[str, list[tuple[int, float]]]:
        client = MlflowClient(database)
        experiments = [one.experiment_id for one in client.search_experiments()]
        tags = f"tags.`tutelage.run_id` = '{run_id}' and tags.`tutelage.stage` = '{stage}'"
        (run,) = client.search_runs(experiments, tags)
        assert run.info.status == "FINISHED"
        return {
            name: [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, name)]
            for name in run.data.metrics
            if not name.startswith(TIMED)
        }

    return read


@pytest.fixture(scope="session")
def series_of() -> Callable[[Path], list[dict[str, float]]]:
    """The rows of a model directory's metrics.jsonl without what is measured in seconds."""

    def read(directory: Path) -> list[dict[str, float]]:
        rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        return [{name: value for name, value in row.items() if not name.startswith(TIMED)} for row in rows]

    return read
