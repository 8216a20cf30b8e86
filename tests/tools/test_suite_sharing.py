"""How the suite is divided over processes: tests of a file have servers in common, and live tests the machine."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_tests_of_a_file_run_in_one_process() -> None:
    files = ["tests/meshes/test_slices.py", "tests/meshes/test_shape.py"]
    command = [sys.executable, "-m", "pytest", "-n", "2", "-v", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=150)
    ran = set(re.findall(r"\[(gw\d)\].* PASSED (\S+?)::", done.stdout))
    assert sorted(file for _, file in ran) == sorted(files), "each of them in one process, and both did run"
