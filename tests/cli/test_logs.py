"""Log lines: one for each event, with everything that the event carries."""

import io
import json
import logging
from collections.abc import Iterator

import pytest

from spotjax.telemetry import logs


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def lines(form: str, level: str = "info") -> list[str]:
    stream = io.StringIO()
    logs.set_up(level, form, stream)  # type: ignore[arg-type]
    log = logging.getLogger("spotjax.test")
    log.debug("quiet")
    log.info("moved %d", 3, extra={"bytes": 5, "instance": "i-0"})
    try:
        raise ValueError("two\nlines")
    except ValueError:
        log.exception("failed")
    return stream.getvalue().splitlines()


def test_text_lines_show_what_the_event_carries() -> None:
    moved, failed = lines("text")
    assert moved.endswith("Z info spotjax.test moved 3 bytes=5 instance=i-0")
    assert " error spotjax.test failed Traceback" in failed and "two\\nlines" in failed


def test_json_lines_are_objects_with_what_the_event_carries() -> None:
    moved, failed = map(json.loads, lines("json"))
    assert moved.pop("time") > 1e9
    assert moved == {"level": "info", "logger": "spotjax.test", "message": "moved 3", "bytes": 5, "instance": "i-0"}
    assert failed["error"].endswith("ValueError: two\nlines")


def test_the_level_is_the_least_that_is_shown() -> None:
    assert len(lines("text", "debug")) == 3
    assert len(lines("text", "error")) == 1
