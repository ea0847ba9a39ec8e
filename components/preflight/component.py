# ruff: noqa: B006 (KFP reads a component's defaults and never changes them)
from typing import NamedTuple

from kfp import dsl

from tutelage.components.core.images import LIGHT_IMAGE


@dsl.component(base_image=LIGHT_IMAGE, install_kfp_package=False)
def preflight(
    pipeline: str,
    data_uri: str,
    model_uri: str,
    data_format: str = "preferences",
    data_overrides: dict = {},
    sft_epochs: float = 1.0,
    sft_learning_rate: float = 2e-5,
    sft_overrides: dict = {},
    reward_objective: str = "",
    reward_learning_rate: float = 1e-5,
    reward_overrides: dict = {},
    policy_method: str = "",
    policy_beta: float = 0.1,
    policy_learning_rate: float = 1e-6,
    policy_overrides: dict = {},
    eval_gold: str = "none",
    eval_reward_uri: str = "",
    eval_overrides: dict = {},
    gate_min_win_rate: float = 0.5,
    gate_max_kl: float = 20.0,
    register_name: str = "tutelage",
    run_seed: int = 0,
    run_store_uri: str = "",
    run_tracking_uri: str = "",
    gpu_count: str = "0",
    pod_memory: str = "16Gi",
) -> NamedTuple("Outputs", [("settings", dict), ("champion_uri", str)]):  # type: ignore[valid-type]
    """Preflight: finds what would make the run fail, before anything expensive starts, and reports all of it at once.

    Args:
        pipeline: Name of the pipeline.
        data_uri: The file of human feedback; its first rows are parsed and its content digested.
        model_uri: The base model; its configuration, tokenizer and weights are looked at.
        data_format: How the rows are to be read.
        data_overrides: Other keys of data preparation.
        sft_epochs: Passes over the demonstrations.
        sft_learning_rate: Peak learning rate of supervised fine-tuning.
        sft_overrides: Other keys of supervised fine-tuning.
        reward_objective: Objective of the reward model; empty where the pipeline trains none.
        reward_learning_rate: Peak learning rate of the reward model.
        reward_overrides: Other keys of the reward model.
        policy_method: Name of the preference objective or policy loss.
        policy_beta: Strength of the pull towards the reference.
        policy_learning_rate: Peak learning rate of policy optimization.
        policy_overrides: Other keys of policy optimization.
        eval_gold: A reward that nobody trained, to judge by.
        eval_reward_uri: A reward model to judge by; empty for none.
        eval_overrides: Other keys of evaluation.
        gate_min_win_rate: Least win rate for promotion.
        gate_max_kl: Largest divergence for promotion.
        register_name: Name of the registered model, and of the MLflow experiment.
        run_seed: Seed of everything that is random.
        run_store_uri: Where checkpoints, records and models are kept.
        run_tracking_uri: The MLflow server.
        gpu_count: Accelerators for each training pod.
        pod_memory: Memory of each training pod.

    Returns:
        settings: What the run resolved to: places and content digests, the same for every run on the same inputs.
        champion_uri: The registered model that the policy has to beat; empty if there is none.
    """
    parameters = dict(locals())
    from tutelage.components.preflight.stage import Config, run

    result = run(Config.build(parameters))
    return result.settings, result.champion_uri
