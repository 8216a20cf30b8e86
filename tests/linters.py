"""Programs of the test extra, which are beside the interpreter, whether that is on the PATH or not."""

from __future__ import annotations

import sys
from pathlib import Path

SHELLCHECK = str(Path(sys.executable).parent / "shellcheck")
HADOLINT = str(Path(sys.executable).parent / "hadolint")
