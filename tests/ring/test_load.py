"""The server under more clients than it runs at once, by the script that loads it: none lost, none mixed up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "load.py"


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["worker", "master", "front"])
def test_no_answer_is_lost_or_mixed_up_when_one_dies(smollm2: Path, tmp_path: Path, victim: str) -> None:
    told = tmp_path / "told.json"
    words = ["--clients", "12", "--at-once", "8", "--minutes", "0.1", "--requests", "8", "--longest", "24"]
    words += ["--dtype", "float32", "--exact", "--model-folder", str(smollm2), "--faults", f"{victim}@1"]
    command = [sys.executable, str(SCRIPT), *words, "--json", str(told)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (load,) = json.loads(told.read_text())
    assert load["answers"] == load["equal"] >= 12
    (strike,) = load["strikes"]
    assert strike["under_way"] == 12, "it was struck in the middle"
    assert strike["whole_s"] > 0
    assert (load["resumed"] > 0) == (victim == "front")
