"""A machine without Spotjax becomes a worker that serves, by the script of ``spotjax bootstrap`` alone."""

from pathlib import Path

import pytest

from spotjax.tools.bare_machine import MachineUnavailable
from spotjax.tools.try_bootstrap import attempt


@pytest.mark.slow
def test_a_bare_machine_joins_serves_is_left_alone_by_the_next_boot_and_leaves(tmp_path: Path, programs: Path) -> None:
    try:
        trial = attempt(tmp_path / "machine", programs)
    except MachineUnavailable as reason:
        pytest.skip(str(reason))
    assert trial.text and "spot-a has joined" in trial.log
    armed, called_off = [next(i for i, each in enumerate(trial.said) if word in each) for word in ("-P +20", "-c")]
    restarted = trial.said.index("systemctl restart spotjax-worker.service")
    assert armed < restarted < called_off, "a machine that does not join would shut down"
    assert trial.said.count("systemctl restart spotjax-worker.service") == 1
    assert trial.said.count("systemctl start spotjax-worker.service") == 1
    restarted = trial.alone.index("systemctl restart spotjax-worker.service")
    assert "-P +20" in trial.alone[0] and restarted and "shutdown -c" not in trial.alone
