# ruff: noqa: B006 (KFP reads a component's defaults and never changes them)
from kfp import dsl

from tutelage.components.core.images import TRAIN_IMAGE


# The verdict is the one unnamed output: kfp.local resolves no other in the condition of a dsl.If.
@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def evaluation(
    dataset: dsl.Input[dsl.Dataset],
    sft: dsl.Input[dsl.Model],
    policy: dsl.Input[dsl.Model],
    evaluation: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
    reward_model: dsl.Input[dsl.Model] = None,
    model_uri: str = "",
    champion_uri: str = "",
    reward_uri: str = "",
    gold: str = "none",
    min_win_rate: float = 0.5,
    max_kl: float = 20.0,
    seed: int = 0,
    overrides: dict = {},
    settings: dict = {},
) -> str:
    """Evaluation: compares the policy with where it came from, on prompts nobody trained on, and judges the gate.

    Args:
        dataset: Prepared records; the prompts held out are answered.
        sft: The model before optimization, which the policy has to beat.
        policy: The model to judge.
        evaluation: evaluation.json with every number and its interval, and samples.jsonl.
        report: A self-contained HTML report.
        metrics: The policy's headline numbers.
        reward_model: The learned reward that the policy was optimized against, if there is one.
        model_uri: The base model, compared too; empty leaves it out.
        champion_uri: The model in production, compared too; empty leaves it out.
        reward_uri: A reward model to judge by where the run trained none.
        gold: A reward that nobody trained, to judge by; "none" judges by the learned reward.
        min_win_rate: The gate: the least share of prompts on which the policy beats the model before optimization.
        max_kl: The gate: the largest divergence from the model before optimization, in nats per response.
        seed: Seed of sampling and of the intervals.
        overrides: Any other key of the stage's configuration.
        settings: What preflight resolved for the whole run.

    Returns:
        The verdict: "promote" or "hold".
    """
    from tutelage.components.core.figures import write_figures
    from tutelage.components.core.launch import launch
    from tutelage.components.core.parameters import configure
    from tutelage.components.evaluation.stage import Config

    config = configure(
        Config,
        overrides,
        model_uri=model_uri,
        champion_uri=champion_uri,
        reward_uri=reward_uri,
        gold=gold,
        min_win_rate=min_win_rate,
        max_kl=max_kl,
        seed=seed,
    )
    result = launch(
        "evaluation",
        config,
        settings,
        inputs={
            "dataset": dataset.path,
            "sft": sft.path,
            "policy": policy.path,
            "reward_model": reward_model.path if reward_model else "",
        },
        outputs={"evaluation": evaluation.path, "report": report.path},
    )
    metrics.metadata.update(write_figures(result, metrics.path))
    return str(result["verdict"])
