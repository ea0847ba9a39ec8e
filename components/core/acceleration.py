"""How the processes of a training run work together: accelerate on one or several, DeepSpeed where they share state."""

from __future__ import annotations

import importlib.util
import os
import warnings

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, InitProcessGroupKwargs

from tutelage.components.core.config import TrainingConfig
from tutelage.components.core.errors import ConfigError, TrainingError


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """accelerate for this process, which torchrun may have started with others. Sets the CPU threads, too.

    Raises ConfigError if DeepSpeed is asked for and not there, TrainingError if accelerate does not do what is asked.
    """
    distributed, cuda = "WORLD_SIZE" in os.environ, torch.cuda.is_available()
    AcceleratorState._reset_state(reset_partial_state=not distributed)
    if not cuda:
        # transformers imports DeepSpeed wherever it is installed, and it would look for devices and warn.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    plugin = _deepspeed(config) if config.zero_stage else None
    # Unless the back end is named, accelerate on CPU takes each process for the only one.
    handlers = [InitProcessGroupKwargs(backend="gloo")] if distributed and not cuda else []
    accelerator = Accelerator(
        cpu=not cuda and plugin is None,  # told to use the CPU, accelerate silently leaves DeepSpeed out
        mixed_precision="no",  # precision is the trainer's own autocast: the same with and without DeepSpeed
        deepspeed_plugin=plugin,
        kwargs_handlers=handlers,
    )
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    sharded = accelerator.distributed_type == DistributedType.DEEPSPEED
    if accelerator.num_processes != processes or sharded != bool(config.zero_stage):
        raise TrainingError(
            f"accelerate runs {accelerator.num_processes} of {processes} processes as {accelerator.distributed_type}",
            fix="Unset the ACCELERATE_* variables of the environment.",
        )
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(config.threads or max(1, len(os.sched_getaffinity(0)) // local))
    return accelerator


def _deepspeed(config: TrainingConfig) -> DeepSpeedPlugin:
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            f"training.zero_stage {config.zero_stage} needs the package deepspeed",
            fix="pip install 'tutelage[deepspeed]', or set zero_stage to 0.",
        )
    import deepspeed

    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # in DeepSpeed's calls
    # DeepSpeed would compile this operation for a minute, and fail without a compiler. gloo does without it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    plugin = DeepSpeedPlugin(
        zero_stage=config.zero_stage,
        gradient_accumulation_steps=1,
        gradient_clipping=config.max_grad_norm,
        zero3_init_flag=False,
        zero3_save_16bit_model=config.zero_stage == 3,  # that is: gathers the weights when they are exported
    )
    settings = plugin.deepspeed_config
    assert settings is not None
    # The batches are ours: DeepSpeed only wants a number.
    settings["train_micro_batch_size_per_gpu"] = 1
    settings["torch_autocast"] = {"enabled": config.precision == "bf16", "dtype": "bfloat16"}
    return plugin
