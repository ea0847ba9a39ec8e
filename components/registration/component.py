# ruff: noqa: B006 (KFP reads a component's defaults and never changes them)
from typing import NamedTuple

from kfp import dsl

from tutelage.components.core.images import LIGHT_IMAGE


@dsl.component(base_image=LIGHT_IMAGE, install_kfp_package=False)
def registration(
    policy: dsl.Input[dsl.Model],
    evaluation: dsl.Input[dsl.Artifact],
    report: dsl.Input[dsl.HTML],
    name: str,
    pipeline: str = "",
    settings: dict = {},
) -> NamedTuple("Outputs", [("model_uri", str), ("version", str)]):  # type: ignore[valid-type]
    """Registration: publishes a promoted policy to the store and registers it, by reference, as a version of the model.

    Args:
        policy: The policy that passed the gate.
        evaluation: The evaluation that let it pass.
        report: The evaluation's report, kept with the registered version.
        name: Name of the registered model.
        pipeline: Name of the pipeline, kept with the registered version.
        settings: What preflight resolved for the whole run.

    Returns:
        model_uri: Where the model was published.
        version: The registered version; empty where there is no registry.
    """
    from tutelage.components.core.launch import launch
    from tutelage.components.registration.stage import Config

    inputs = {"policy": policy.path, "evaluation": evaluation.path, "report": report.path}
    result = launch("registration", Config(name=name, pipeline=pipeline), settings, inputs=inputs)
    return result["model_uri"], result["version"]
