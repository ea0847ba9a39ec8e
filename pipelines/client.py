"""Kubeflow Pipelines: upload a pipeline, run it once, run it by the clock."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutelage.components.core.errors import ConfigError, TutelageError
from tutelage.pipelines.definition import compile_pipeline, definition_of, load_pipeline
from tutelage.pipelines.parameters import check_parameters

if TYPE_CHECKING:
    import kfp

_INTERVAL = re.compile(r"(\d+)([mhd])")
_SECONDS = {"m": 60, "h": 3600, "d": 86400}


class ClusterError(TutelageError):
    """Kubeflow Pipelines cannot be reached, or refuses."""


class Cluster:
    """A Kubeflow Pipelines server.

    host: its address; empty: the kubeconfig's cluster, or the one that this pod is in. namespace: of a multi-user
    installation. token: a bearer token, where the server wants one. Every method raises ClusterError.
    """

    def __init__(self, host: str = "", *, namespace: str = "", token: str = "") -> None:
        import kfp

        self.host, self.namespace = host or "the kubeconfig's cluster", namespace or None
        with self._explained(), _quiet():
            self.client: kfp.Client = kfp.Client(
                host=host or None, namespace=namespace or "kubeflow", existing_token=token or None
            )

    def upload(self, name: str) -> tuple[str, str]:
        """The ids of pipeline `name` and of its newest version, which is what this release compiles.

        A version with the same content is not uploaded again as long as it is the newest.
        """
        import kfp_server_api as api

        with tempfile.TemporaryDirectory(prefix="tutelage-upload-") as folder, self._explained(), _quiet():
            package = compile_pipeline(name, Path(folder) / f"{name}.yaml")
            digest = hashlib.sha256(package.read_bytes()).hexdigest()[:10]
            pipeline_id = self.client.get_pipeline_id(name)
            if pipeline_id is None:
                made = api.V2beta1Pipeline(name=name, display_name=name, namespace=self.namespace)
                pipeline_id = self.client.pipelines.pipeline_service_create_pipeline(made).pipeline_id
            newest = self.client.list_pipeline_versions(pipeline_id, page_size=1, sort_by="created_at desc")
            for version in newest.pipeline_versions or ():
                if f"-{digest}-" in version.display_name:
                    return pipeline_id, version.pipeline_version_id
            label = f"{name}-{digest}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
            version = self.client.upload_pipeline_version(str(package), label, pipeline_id=pipeline_id)
            return pipeline_id, version.pipeline_version_id

    def submit(
        self, name: str, parameters: Mapping[str, Any], *, run_name: str = "", experiment: str = "", root: str = ""
    ) -> str:
        """Starts a run of pipeline `name` and returns its id. Raises ConfigError for wrong parameters.

        experiment: of Kubeflow Pipelines; the registered model's name, if not given. root: where KFP keeps artifacts.
        """
        values, experiment = self._checked(name, parameters, experiment)
        pipeline_id, version_id = self.upload(name)
        with self._explained(), _quiet():
            found = self.client.create_experiment(experiment, namespace=self.namespace)
            run = self.client.run_pipeline(
                found.experiment_id,
                run_name or f"{name} {time.strftime('%Y-%m-%d %H:%M:%S')}",
                params=values,
                pipeline_id=pipeline_id,
                version_id=version_id,
                pipeline_root=root or None,
            )
        return str(run.run_id)

    def schedule(
        self,
        name: str,
        parameters: Mapping[str, Any],
        *,
        cron: str = "",
        every: str = "",
        schedule_name: str = "",
        experiment: str = "",
    ) -> str:
        """Runs pipeline `name` by the clock, and returns the schedule's id. A schedule of the same name is replaced.

        cron: 6 fields, seconds first. every: a time such as 30m, 12h or 7d. Each run takes the version of the pipeline
        that is newest then; runs do not overlap, and those that were missed are not made up for.
        """
        trigger = _trigger(cron, every)
        values, experiment = self._checked(name, parameters, experiment)
        pipeline_id, _ = self.upload(name)
        import kfp_server_api as api

        with self._explained(), _quiet():
            found = self.client.create_experiment(experiment, namespace=self.namespace)
            body = api.V2beta1RecurringRun(
                display_name=schedule_name or name,
                experiment_id=found.experiment_id,
                # A reference without a version means the newest, whenever the clock strikes.
                pipeline_version_reference=api.V2beta1PipelineVersionReference(pipeline_id=pipeline_id),
                runtime_config=api.V2beta1RuntimeConfig(parameters=values),
                trigger=trigger,
                mode=api.RecurringRunMode.ENABLE,
                max_concurrency="1",
                no_catchup=True,
            )
            return self._replace(body)

    def url_of(self, run_id: str) -> str:
        """The run's page, where the address of the user interface is known."""
        return f"{self.host.rstrip('/')}/#/runs/details/{run_id}" if self.host.startswith("http") else ""

    def _replace(self, body: Any) -> str:
        """There is no update: the old schedules of that name are stopped, and removed once the new one is there."""
        old = [run.recurring_run_id for run in self._schedules(body.display_name)]
        for identity in old:
            self.client.disable_recurring_run(identity)
        try:
            made = self.client.recurring_runs.recurring_run_service_create_recurring_run(body)
        except Exception:
            for identity in old:
                self.client.enable_recurring_run(identity)
            raise
        for identity in old:
            self.client.delete_recurring_run(identity)
        return str(made.recurring_run_id)

    def _schedules(self, name: str) -> list[Any]:
        wanted = json.dumps({"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]})
        found = self.client.list_recurring_runs(page_size=100, namespace=self.namespace, filter=wanted)
        return list(found.recurring_runs or ())

    @staticmethod
    def _checked(name: str, parameters: Mapping[str, Any], experiment: str) -> tuple[dict[str, Any], str]:
        definition = definition_of(load_pipeline(name))
        values = check_parameters(definition, parameters)
        default = definition["root"]["inputDefinitions"]["parameters"]["register_name"]["defaultValue"]
        return values, experiment or str(values.get("register_name", default))

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        import kfp_server_api as api
        import urllib3

        try:
            yield
        except api.ApiException as error:
            raise ClusterError(_reason(error), where=self.host, fix=_advice(error.status)) from None
        except (urllib3.exceptions.HTTPError, OSError) as error:
            what = f"Kubeflow Pipelines cannot be reached: {_innermost(error)}"
            raise ClusterError(what, where=self.host, fix="Check --host, or forward its port.") from None


def _trigger(cron: str, every: str) -> Any:
    import kfp_server_api as api

    if bool(cron) == bool(every):
        raise ConfigError("a schedule has either a cron expression or an interval", fix="Give --cron or --every.")
    if cron:
        if len(cron.split()) != 6:
            fix = "Write seconds first: '0 0 3 * * 1' is Mondays at three."
            raise ConfigError(f"cron expression {cron!r} has not 6 fields", fix=fix)
        return api.V2beta1Trigger(cron_schedule=api.V2beta1CronSchedule(cron=cron))
    found = _INTERVAL.fullmatch(every)
    if found is None or not int(found[1]):
        raise ConfigError(f"{every!r} is no interval", where="--every", fix="Write 30m, 12h or 7d.")
    seconds = int(found[1]) * _SECONDS[found[2]]
    return api.V2beta1Trigger(periodic_schedule=api.V2beta1PeriodicSchedule(interval_second=str(seconds)))


def _reason(error: Any) -> str:
    """The server's own words, which it wraps in JSON, and those in layers of 'Failed to ...'."""
    try:
        body = json.loads(error.body)
        text = str(body.get("message") or body.get("error"))
    except (TypeError, ValueError, AttributeError):
        text = str(error.reason)
    return f"Kubeflow Pipelines answered {error.status}: {text[:600]}"


def _advice(status: int | None) -> str:
    if status in (401, 403):
        return "Log in: give --token, and --namespace in a multi-user installation."
    return "See the log of ml-pipeline." if status and status >= 500 else "Correct the request."


def _innermost(error: BaseException) -> str:
    inner: BaseException | None = getattr(error, "reason", None)
    while isinstance(inner, BaseException):
        error, inner = inner, getattr(inner, "reason", None)
    return str(error).rpartition(": ")[2] or type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """kfp.Client prints links and warns of versions long gone; the command line says what matters itself."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
