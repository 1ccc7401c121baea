"""A request that rank 0 dies of: it is found, told so, and not asked again; the others are answered."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path

import openai
import poisoned
import pytest
from fakes import byte_tokenizer
from test_serve import Served
from waiting import wait_until

POISON = byte_tokenizer().encode("~")[0]
OTHER = {"model": "little", "prompt": "Once upon a time", "max_tokens": 600, "temperature": 0, "stream": True}
ENDLESS = {"logit_bias": {str(token): -100 for token in (POISON, 257)}}


class Poisoned(Served):
    """A server whose rank 0 dies of a token, and says so in `deaths` before."""

    def start(self) -> subprocess.Popen[bytes]:
        self.deaths = self.folder / "deaths"
        self._command[1:3] = [poisoned.__file__, str(self.deaths), str(POISON)]
        return super().start()


def test_a_request_that_rank_0_dies_of_is_found(model: Path, tmp_path: Path) -> None:
    server = Poisoned(model, tmp_path, "cluster.workers=1", "cluster.threads=1")
    try:
        expected = "".join(streamed(server))
        came: list[str] = []

        def listen() -> None:
            came.extend(streamed(server))

        listener = threading.Thread(target=listen)
        listener.start()
        wait_until(lambda: server.cluster()["unfinished"] == 1, "it is not asked")
        with pytest.raises(openai.InternalServerError, match="has died each time that it was asked") as refused:
            server.client.with_options(max_retries=2).completions.create(model="little", prompt="a~b", max_tokens=3)
        assert refused.value.status_code == 500
        assert refused.value.code == "rank0_died"
        assert len(server.deaths.read_text().splitlines()) == 2, "once among others, once alone; then not again"
        listener.join(90)
        assert "".join(came) == expected
        assert server.client.completions.create(model="little", prompt="a", max_tokens=3).choices[0].text
        assert "it is not asked again" in server.errors()
    finally:
        assert server.end() == 0


def streamed(server: Served) -> list[str]:
    """The texts of an answer that takes a while."""
    chunks = server.client.completions.create(**OTHER, **ENDLESS)  # type: ignore[call-overload]
    return [chunk.choices[0].text for chunk in chunks]
