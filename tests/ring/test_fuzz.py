"""Requests of all kinds by the thousand: each is answered or refused in time, as the document says, and none does harm.

The slow ones are 10,000.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from fuzz_hooks import MODEL
from hypothesis import HealthCheck, Phase, given, settings
from nasty import Raw, requests
from test_serve import Served
from test_trial import HOSTILE

REQUEST_TIMEOUT_S = 30
REFUSED = {400, 401, 404, 405, 408, 409, 413, 429}


@pytest.fixture(scope="module")
def served(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two ranks of a tiny model; no process of it dies."""
    server = Served(
        model, tmp_path_factory.mktemp("served"), "cluster.workers=2", "cluster.threads=1", "serve.keep_s=60"
    )
    before = [server.rank0(), *server.workers()]
    try:
        yield server
        assert all(each.is_running() for each in before)
        assert server.cluster()["rank0_comings"] == 1
        assert server.client.completions.create(model=MODEL, prompt="a", max_tokens=3).usage.completion_tokens == 3  # type: ignore
    finally:
        ended = server.end()
    assert ended == 0
    assert "Traceback" not in server.errors()


@pytest.mark.parametrize(
    ("phases", "examples", "least"),
    [
        ("fuzzing", 60, 100),
        pytest.param("coverage,fuzzing", 2500, 5000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
    ],
)
def test_what_schemathesis_makes_of_the_document(served: Served, phases: str, examples: int, least: int) -> None:
    command = [str(Path(sys.executable).parent / "schemathesis"), "run", f"{served.url}/openapi.json"]
    command += [f"--phases={phases}", f"--max-examples={examples}", f"--request-timeout={REQUEST_TIMEOUT_S}"]
    command += ["--generation-deterministic", "--continue-on-failure", "--no-color"]
    command += ["--exclude-checks=positive_data_acceptance"]  # what fields say of each other is in no schema
    environ = os.environ | {"SCHEMATHESIS_HOOKS": "fuzz_hooks", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environ, cwd=served.folder, check=False)
    assert done.returncode == 0, done.stdout
    (generated,) = re.findall(r"(\d+) generated", done.stdout)
    assert int(generated) >= least


@pytest.mark.parametrize("schema", HOSTILE, ids=["its stack", "its time"])
def test_a_grammar_that_would_take_rank_0_down(served: Served, schema: dict[str, Any]) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match="reading it takes more than 1 s"):
        served.client.completions.create(model=MODEL, prompt="a", extra_body={"response_format": wanted})


@pytest.mark.parametrize("examples", [150, pytest.param(5000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_what_no_document_allows(served: Served, examples: int) -> None:
    phases = [Phase.generate, Phase.shrink]

    @settings(
        max_examples=examples, deadline=None, phases=phases, suppress_health_check=list(HealthCheck), database=None
    )
    @given(requests)
    def test(asked: Raw) -> None:
        answer = client.request(asked.method, asked.path, content=asked.body, headers=asked.headers)
        if answer.status_code == 200:
            return
        assert answer.status_code in REFUSED, answer.text
        if asked.method != "HEAD":
            error = answer.json()["error"]
            assert error["type"] == "invalid_request_error"
            assert error["message"]

    with httpx2.Client(base_url=served.url, timeout=REQUEST_TIMEOUT_S) as client:
        test()
