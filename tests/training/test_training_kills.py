"""A training that is killed at any moment goes on to the same weights, metrics and pictures."""

import subprocess
import sys
from pathlib import Path

import pytest

KILL_LOOP = Path(__file__).parents[1] / "kill_loop.py"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "every"), [("flow", 19), ("decoder", 13)])
def test_a_killed_training_goes_on_as_if_nothing_had_happened(tmp_path, kind, every):
    words = [sys.executable, str(KILL_LOOP), kind, str(tmp_path), str(every)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "after 0 something was not as it should be" in done.stdout
