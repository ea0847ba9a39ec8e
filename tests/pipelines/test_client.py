"""What the client asks of Kubeflow Pipelines, answered by a small server with the API's own paths."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from tutelage.components.core.errors import ConfigError
from tutelage.pipelines.client import Cluster, ClusterError

PARAMETERS = {"data_uri": "s3://b/data.jsonl", "model_uri": "s3://b/model"}
API = "/apis/v2beta1"


class Server(ThreadingHTTPServer):
    """Keeps what was made, by kind, and every request. refuse: path -> (status, message)."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.made: dict[str, list[dict[str, Any]]] = {}
        self.asked: list[tuple[str, str]] = []
        self.refuse: dict[tuple[str, str], tuple[int, str]] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def of(self, kind: str) -> list[dict[str, Any]]:
        return self.made.setdefault(kind, [])


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        path, query = parts.path.removeprefix(API), parse_qs(parts.query)
        wanted = json.loads(query["filter"][0])["predicates"][0]["stringValue"] if "filter" in query else None
        if path == "/healthz":
            self.answer({"multi_user": False})
        elif path.endswith("/versions"):
            newest_first = self.server.of("versions")[::-1]
            assert query["sort_by"] == ["created_at desc"]
            self.answer({"pipeline_versions": newest_first[: int(query["page_size"][0])]})
        else:
            kind = path.strip("/")
            plural = {"recurringruns": "recurringRuns"}.get(kind, kind)
            self.answer({plural: [each for each in self.server.of(kind) if wanted in (None, each["display_name"])]})

    def do_POST(self) -> None:
        parts = urlsplit(self.path)
        path, query = parts.path.removeprefix(API), parse_qs(parts.query)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path == "/pipelines/upload_version":
            package = body.decode().partition("\r\n\r\n")[2].rpartition("\r\n--")[0]
            self.keep("versions", "pipeline_version_id", display_name=query["name"][0], package=package,
                      pipeline_id=query["pipelineid"][0])  # fmt: skip
        elif ":" in path:
            identity, _, action = path.rpartition("/")[2].partition(":")
            next(each for each in self.server.of("recurringruns") if each["recurring_run_id"] == identity)["mode"] = (
                action
            )
            self.answer({})
        else:
            kind = path.strip("/")
            names = {
                "pipelines": "pipeline_id",
                "experiments": "experiment_id",
                "runs": "run_id",
                "recurringruns": "recurring_run_id",
            }
            self.keep(kind, names[kind], **json.loads(body))

    def do_DELETE(self) -> None:
        kind, identity = urlsplit(self.path).path.removeprefix(API).strip("/").split("/")
        self.server.made[kind] = [each for each in self.server.of(kind) if each["recurring_run_id"] != identity]
        self.answer({})

    def keep(self, kind: str, identity: str, **fields: Any) -> None:
        made = {identity: f"{kind}-{len(self.server.asked)}", **fields}
        # Kept before it is answered: the client looks at once.
        if ("POST", urlsplit(self.path).path.removeprefix(API)) not in self.server.refuse:
            self.server.of(kind).append(made)
        self.answer(made)

    def answer(self, body: dict[str, Any]) -> None:
        path = urlsplit(self.path).path.removeprefix(API)
        self.server.asked.append((self.command, path))
        status, message = self.server.refuse.get((self.command, path), (200, ""))
        data = json.dumps(body if status == 200 else {"error": message, "message": message}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def cluster(server: Server) -> Cluster:
    return Cluster(server.url)


class TestSubmit:
    def test_runs_the_version_that_it_uploaded(self, cluster: Cluster, server: Server) -> None:
        run_id = cluster.submit("rlhf", PARAMETERS | {"sft_epochs": 2, "gpu_count": 1}, run_name="first")
        (pipeline,), (version,), (run,) = server.of("pipelines"), server.of("versions"), server.of("runs")
        assert run["run_id"] == run_id
        assert pipeline["display_name"] == "rlhf"
        assert version["pipeline_id"] == pipeline["pipeline_id"]
        assert run["pipeline_version_reference"] == {
            "pipeline_id": pipeline["pipeline_id"], "pipeline_version_id": version["pipeline_version_id"],
        }  # fmt: skip
        assert run["display_name"] == "first"
        assert run["runtime_config"]["parameters"] == PARAMETERS | {"sft_epochs": 2.0, "gpu_count": "1"}
        assert cluster.url_of(run_id) == f"{server.url}/#/runs/details/{run_id}"

    def test_uploads_drop_downs_and_what_is_kuberneteses(self, cluster: Cluster, server: Server) -> None:
        cluster.upload("preference")
        spec, platform = yaml.safe_load_all(server.of("versions")[0]["package"])
        assert "dpo" in spec["root"]["inputDefinitions"]["parameters"]["policy_method"]["literals"]
        assert "exec-sft" in platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]

    def test_does_not_upload_the_newest_version_again(self, cluster: Cluster, server: Server) -> None:
        assert cluster.upload("rlhf") == cluster.upload("rlhf")
        assert len(server.of("versions")) == 1
        server.of("versions").append({"pipeline_version_id": "v9", "display_name": "rlhf-ffffffffff-now"})
        cluster.upload("rlhf")
        assert len(server.of("versions")) == 3, "someone else's version has become the newest"
        assert len(server.of("pipelines")) == 1

    def test_goes_into_the_experiment_of_the_registered_model(self, cluster: Cluster, server: Server) -> None:
        cluster.submit("rlhf", PARAMETERS)
        cluster.submit("rlhf", PARAMETERS | {"register_name": "polite"})
        cluster.submit("rlhf", PARAMETERS, experiment="trials")
        cluster.submit("rlhf", PARAMETERS, experiment="trials")
        assert [each["display_name"] for each in server.of("experiments")] == ["tutelage", "polite", "trials"]

    def test_checks_parameters_before_anything_is_uploaded(self, cluster: Cluster, server: Server) -> None:
        with pytest.raises(ConfigError, match="Did you mean 'sft_epochs'"):
            cluster.submit("rlhf", PARAMETERS | {"sft_epoch": 2})
        assert server.asked == [("GET", "/healthz")] * len(server.asked)


class TestSchedule:
    def test_takes_the_newest_version_one_run_at_a_time_and_no_missed_ones(
        self, cluster: Cluster, server: Server
    ) -> None:
        made = cluster.schedule("rlhf", PARAMETERS, cron="0 0 3 * * 1", schedule_name="weekly")
        (schedule,) = server.of("recurringruns")
        assert schedule["recurring_run_id"] == made
        assert schedule["pipeline_version_reference"] == {"pipeline_id": server.of("pipelines")[0]["pipeline_id"]}
        assert schedule["trigger"] == {"cron_schedule": {"cron": "0 0 3 * * 1"}}
        assert (schedule["max_concurrency"], schedule["no_catchup"], schedule["mode"]) == ("1", True, "ENABLE")
        assert schedule["runtime_config"] == {"parameters": PARAMETERS}
        assert len(server.of("versions")) == 1

    def test_replaces_the_one_of_its_name_and_no_other(self, cluster: Cluster, server: Server) -> None:
        cluster.schedule("rlhf", PARAMETERS, every="12h", schedule_name="a")
        other = cluster.schedule("rlhf", PARAMETERS, every="7d", schedule_name="b")
        new = cluster.schedule("rlhf", PARAMETERS | {"run_seed": 1}, every="30m", schedule_name="a")
        assert [each["recurring_run_id"] for each in server.of("recurringruns")] == [other, new]
        intervals = [each["trigger"]["periodic_schedule"]["interval_second"] for each in server.of("recurringruns")]
        assert intervals == ["604800", "1800"]

    def test_keeps_the_old_one_going_where_the_new_one_is_refused(self, cluster: Cluster, server: Server) -> None:
        cluster.schedule("rlhf", PARAMETERS, every="12h")
        server.refuse["POST", "/recurringruns"] = (400, "Failed to create: no such cron")
        with pytest.raises(ClusterError, match="answered 400: Failed to create: no such cron"):
            cluster.schedule("rlhf", PARAMETERS, every="1h")
        (kept,) = server.of("recurringruns")
        assert kept["mode"] == "enable"

    @pytest.mark.parametrize(
        ("when", "complaint"),
        [
            ({"cron": "0 3 * * 1"}, "has not 6 fields"),
            ({"every": "soon"}, "'soon' is no interval"),
            ({"every": "0h"}, "is no interval"),
            ({}, "either a cron expression or an interval"),
            ({"cron": "0 0 3 * * 1", "every": "1h"}, "either a cron expression or an interval"),
        ],
    )
    def test_a_wrong_time_is_refused(
        self, cluster: Cluster, server: Server, when: dict[str, str], complaint: str
    ) -> None:
        with pytest.raises(ConfigError, match=complaint):
            cluster.schedule("rlhf", PARAMETERS, **when)
        assert server.of("pipelines") == []


class TestErrors:
    def test_a_server_that_is_not_there(self) -> None:
        with pytest.raises(ClusterError, match=r"cannot be reached: .*refused .*127\.0\.0\.1:9.*--host"):
            Cluster("http://127.0.0.1:9").submit("rlhf", PARAMETERS)

    def test_a_login_that_is_missing(self, cluster: Cluster, server: Server) -> None:
        server.refuse["POST", "/runs"] = (401, "Unauthenticated")
        with pytest.raises(ClusterError, match=r"answered 401: Unauthenticated.*--token"):
            cluster.submit("rlhf", PARAMETERS)

    def test_a_fault_of_the_server(self, cluster: Cluster, server: Server) -> None:
        server.refuse["POST", "/runs"] = (500, "Internal Server Error: database is down")
        with pytest.raises(ClusterError, match=r"answered 500: .*database is down.*ml-pipeline"):
            cluster.submit("rlhf", PARAMETERS)
