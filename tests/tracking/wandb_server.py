"""What wandb's client needs of its server, on 127.0.0.1 and in memory: runs, their files, sweeps and agents.

It answers the GraphQL operations that `wandb sweep`, `wandb agent` and a training send, and keeps what they say. An
operation it does not know is answered with an error and noted in ``unknown``.
"""

import itertools
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY, PROJECT = "somebody", "trial"
Answer = dict[str, Any]


@dataclass
class Run:
    """What the server was told of one run."""

    name: str
    upserts: list[dict[str, Any]] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    exit_codes: list[int] = field(default_factory=list)
    preempted: bool = False  # to be handed out once more
    history_at_exit: int = 0  # lines with an objective when it last ended

    @property
    def config(self) -> dict[str, Any]:
        """The last configuration, without what wandb says of itself."""
        sent = [json.loads(upsert["config"]) for upsert in self.upserts if upsert.get("config")]
        return {key: entry["value"] for key, entry in (sent[-1] if sent else {}).items() if key != "_wandb"}

    @property
    def tags(self) -> list[str]:
        """The last tags."""
        sent = [upsert["tags"] for upsert in self.upserts if upsert.get("tags")]
        return sent[-1] if sent else []


class WandbServer:
    """The server; use it as a context manager.

    Args:
        trials: the values that a sweep hands out, a run each; an agent that asks for more is told to exit.
    """

    def __init__(self, trials: list[dict[str, Any]] | None = None) -> None:
        self.trials = list(trials or [])
        self.runs: dict[str, Run] = {}
        self.sweeps: dict[str, str] = {}  # name: configuration as YAML
        self.operations: list[tuple[str, dict[str, Any]]] = []
        self.unknown: list[str] = []
        self.stop: Callable[[Run], bool] = lambda _: False  # whether a run in training is to end early
        self._given: dict[str, Answer] = {}  # values of each trial by its run
        self._numbers = itertools.count(1)
        self._lock = threading.RLock()
        self._http = _Listener(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> "WandbServer":
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    # ------------------------------------------------------------------------------------------------- GraphQL

    def answer(self, query: str, variables: dict[str, Any]) -> Answer:
        """The answer to one operation."""
        named = re.search(r"(?:query|mutation)\s+(\w+)", query)
        name = named[1] if named else ""
        with self._lock:
            self.operations.append((name, variables))
            found = getattr(self, f"_{name}", None)
            if found is None:
                self.unknown.append(name)
                return {"errors": [{"message": f"no operation {name!r}"}], "data": None}
            return {"data": found(variables)}

    def run(self, name: str) -> Run:
        """The run of that name, a new one if it was not heard of."""
        return self.runs.setdefault(name, Run(name))

    def _Viewer(self, _: Answer) -> Answer:
        teams = {"edges": [{"node": {"id": "1", "name": ENTITY}}]}
        viewer = {"id": "1", "entity": ENTITY, "username": ENTITY, "name": ENTITY, "flags": "{}", "teams": teams}
        return {"viewer": {**viewer, "email": "", "admin": False, "apiKeys": {"edges": []}}, "serverInfo": None}

    _GetViewer = _Viewer

    def _ServerFeaturesQuery(self, _: Answer) -> Answer:
        return {"serverInfo": {"features": []}}

    def _OrganizationCoreWeaveOrganizationID(self, _: Answer) -> Answer:
        return {"entity": {"organization": None}}

    def _UpsertBucket(self, said: Answer) -> Answer:
        name = said.get("name") or said.get("id")
        known = name in self.runs
        run = self.run(name)
        run.upserts.append(said)
        project = {"id": "1", "name": said.get("project") or PROJECT, "entity": {"id": "1", "name": ENTITY}}
        bucket = {"id": name, "name": name, "displayName": said.get("displayName") or name, "description": None}
        rest = {"config": "{}", "sweepName": said.get("sweep"), "project": project, "historyLineCount": 0}
        return {"upsertBucket": {"bucket": {**bucket, **rest}, "inserted": not known}}

    def _RunResumeStatus(self, said: Answer) -> Answer:
        run = self.runs.get(said["name"])
        if run is None:
            return {"model": {"id": "1", "name": PROJECT, "entity": {"id": "1", "name": ENTITY}, "bucket": None}}
        config = next((u["config"] for u in reversed(run.upserts) if u.get("config")), "{}")
        bucket = {
            "id": run.name,
            "name": run.name,
            "summaryMetrics": json.dumps(run.summary),
            "displayName": run.name,
            "logLineCount": 0,
            "historyLineCount": len(run.history),
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(line) for line in run.history[-1:]]),
            "eventsTail": "[]",
            "config": config,
            "tags": run.tags,
            "wandbConfig": json.dumps(json.loads(config).get("_wandb", {}).get("value", {})),
        }
        return {"model": {"id": "1", "name": PROJECT, "entity": {"id": "1", "name": ENTITY}, "bucket": bucket}}

    def _CreateRunFiles(self, said: Answer) -> Answer:
        files = [{"name": n, "uploadUrl": f"{self.url}/upload/{said['run']}/{n}"} for n in said["files"]]
        return {"createRunFiles": {"runID": said["run"], "uploadHeaders": [], "files": files}}

    # ------------------------------------------------------------------------------------------------ artifacts

    def _CreateArtifact(self, said: Answer) -> Answer:
        return {"createArtifact": {"artifact": {"id": "1", "state": "COMMITTED", "artifactSequence": {"id": "1"}}}}

    def _ArtifactType(self, _: Answer) -> Answer:
        return {"project": None}

    def _UseArtifact(self, _: Answer) -> Answer:
        return {"useArtifact": {"artifact": {"id": "1"}}}

    # --------------------------------------------------------------------------------------------------- sweeps

    def _UpsertSweep(self, said: Answer) -> Answer:
        name = f"sweep{next(self._numbers)}"
        self.sweeps[name] = said["config"]
        project = {"id": "1", "name": PROJECT, "entity": {"id": "1", "name": ENTITY}}
        return {
            "upsertSweep": {"sweep": {"name": name, "id": name, "project": project}, "configValidationWarnings": []}
        }

    def _SweepWithRuns(self, said: Answer) -> Answer:
        sweep = {
            "id": said["sweep"],
            "name": said["sweep"],
            "config": self.sweeps[said["sweep"]],
            "runs": {"edges": []},
        }
        return {"project": {"sweep": sweep}}

    def _CreateAgent(self, _: Answer) -> Answer:
        return {"createAgent": {"agent": {"id": "agent1"}}}

    def _Heartbeat(self, said: Answer) -> Answer:
        running = [name for name, is_running in json.loads(said["runState"]).items() if is_running]
        commands: list[Answer] = []
        if running:
            commands = [{"type": "stop", "run_id": name} for name in running if self.stop(self.run(name))]
        elif again := [run for run in self.runs.values() if run.preempted]:
            again[0].preempted = False
            commands = [
                {"type": "resume", "run_id": again[0].name, "program": "recsys", "args": self._given[again[0].name]}
            ]
        elif self.trials:
            values = {key: {"value": value} for key, value in self.trials.pop(0).items()}
            name = f"run{next(self._numbers)}"
            self._given[name] = values
            commands = [{"type": "run", "run_id": name, "program": "recsys", "args": values}]
        else:
            commands = [{"type": "exit"}]
        return {"agentHeartbeat": {"agent": {"id": said.get("id")}, "commands": json.dumps(commands)}}

    # ----------------------------------------------------------------------------------------------- file stream

    def stream(self, name: str, sent: Answer) -> None:
        """Take one parcel of a run's history, summary and end."""
        with self._lock:
            run = self.run(name)
            for file, part in sent.get("files", {}).items():
                lines = (
                    [json.loads(line) for line in part["content"]] if file.endswith((".jsonl", "summary.json")) else []
                )
                if file == "wandb-history.jsonl":
                    run.history += lines
                elif file == "wandb-summary.json" and lines:
                    run.summary = lines[-1]
            run.preempted |= bool(sent.get("preempting"))
            if sent.get("complete"):
                run.exit_codes.append(sent.get("exitcode"))
                run.history_at_exit = len([line for line in run.history if "objective" in line])


class _Listener(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: the client drops its connections when it is done."""


def _handler(server: WandbServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def _reply(self, answer: Any) -> None:
            text = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_GET(self) -> None:
            self._reply({})

        def do_POST(self) -> None:
            body = self._body()
            if self.path == "/graphql":
                asked = json.loads(body)
                self._reply(server.answer(asked["query"], asked.get("variables") or {}))
                return
            streamed = re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path)
            if streamed:
                server.stream(streamed[1], json.loads(body))
            self._reply({})

        def do_PUT(self) -> None:
            _, _, run, name = self.path.split("/", 3)
            server.run(run).files[name] = self._body()
            self._reply({})

        def log_message(self, format: str, *_: object) -> None:
            pass

    return Handler
