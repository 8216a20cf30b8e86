"""The image's recipe: what it copies is there and enough, what it starts exists, and the manifests fit it."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from linters import HADOLINT

from spotjax import cli
from spotjax.bootstrap.kubernetes.configuration import CACHE, DATA_PORT, GRPC_PORT, STATE
from spotjax.bootstrap.kubernetes.pods import USER

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def instructions() -> list[tuple[str, str]]:
    """Instruction and arguments of every line of the Dockerfile, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in lines if line.strip()]


INSTRUCTIONS = instructions()


def only(name: str) -> str:
    """The arguments of an instruction that is there once."""
    (arguments,) = [arguments for instruction, arguments in INSTRUCTIONS if instruction == name]
    return arguments


def variables() -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in only("ENV").split())


def copied() -> dict[str, str]:
    """What comes from the context, and where to."""
    found = {}
    for instruction, arguments in INSTRUCTIONS:
        if instruction == "COPY" and not arguments.startswith("--from"):
            *sources, target = arguments.split()
            found |= dict.fromkeys(sources, target)
    return found


def in_context(path: str) -> bool:
    """Whether ``.dockerignore`` lets something of the top level through; its last line that fits decides."""
    kept = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#") and fnmatch.fnmatch(path, line.removeprefix("!")):
            kept = line.startswith("!")
    return kept


def test_a_linter_has_nothing_to_say() -> None:
    done = subprocess.run([HADOLINT, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_is_copied_is_there_and_nothing_else_is_sent() -> None:
    sources = copied()
    assert all((ROOT / source).exists() for source in sources)
    assert all(in_context(source) for source in sources)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tops = {line.partition("/")[0] for line in tracked.splitlines()}
    assert {top for top in tops if in_context(top)} == set(sources)


def test_what_is_copied_is_a_whole_project(tmp_path: Path) -> None:
    context, installed = tmp_path / "src", tmp_path / "installed"
    context.mkdir()
    for source, target in copied().items():
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, context / target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, context / target)
    pip = [sys.executable, "-m", "pip", "--quiet", "install", "--no-deps", "--no-build-isolation", "--no-compile"]
    subprocess.run([*pip, "--target", str(installed), str(context)], check=True)
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import spotjax, spotjax.meshes.shape, spotjax.tools.load;"
        "from spotjax.models import catalog; from spotjax import cli;"
        "assert all(m.__file__.startswith(sys.argv[1]) for m in (spotjax, spotjax.meshes.shape, catalog));"
        "cli.main(['bootstrap', 'slurm', '--join', 'a:1', '--join-token', '/t'])"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", program, str(installed)], capture_output=True, text=True, check=True
    )
    assert "srun" in done.stdout
    assert list((installed / "spotjax/models/tiny").iterdir())


def test_every_accelerator_is_an_extra_that_jax_has() -> None:
    text = (ROOT / "Dockerfile").read_text()
    named = re.search(r"ACCELERATOR is (.+?):", text)
    assert named is not None
    accelerators = re.split(r", | or ", named[1])
    extras = PROJECT["project"]["optional-dependencies"]
    assert [extras[name] for name in accelerators] == [[]] + [[f"jax[{name}]"] for name in accelerators[1:]]
    assert ("ARG", f"ACCELERATOR={accelerators[0]}") in INSTRUCTIONS
    (install,) = [
        arguments for name, arguments in INSTRUCTIONS if name == "RUN" and " install --constraint" in arguments
    ]
    assert install.endswith('install --constraint constraints.txt ".[${ACCELERATOR}]"')


def test_python_is_one_that_the_project_takes() -> None:
    version = re.fullmatch(r"PYTHON=3\.(\d+)", INSTRUCTIONS[0][1])
    assert version is not None
    assert PROJECT["project"]["requires-python"] == ">=3.11,<3.14"
    assert 11 <= int(version[1]) < 14


def test_the_manifests_fit_the_image() -> None:
    assert only("USER") == f"{USER}:{USER}"
    assert only("EXPOSE").split() == [str(GRPC_PORT), str(DATA_PORT)]
    known = variables()
    assert (known["SPOTJAX_CACHE"], known["HOME"], known["XDG_STATE_HOME"]) == (CACHE, CACHE, STATE)
    (command,) = json.loads(only("ENTRYPOINT"))
    assert command in PROJECT["project"]["scripts"]
    made = next(arguments for name, arguments in INSTRUCTIONS if name == "RUN" and "useradd" in arguments)
    assert f"--uid {USER} --gid {USER}" in made and made.endswith(f"{CACHE} {STATE}")


def test_what_it_runs_are_commands() -> None:
    options, _, probe = only("HEALTHCHECK").partition(" CMD ")
    assert options.startswith("--interval")
    for words in (json.loads(probe)[1:], json.loads(only("CMD"))):
        cli.parser().parse_args(words)


def test_it_ends_as_an_unprivileged_user_in_a_stage_without_sources() -> None:
    last = max(number for number, (name, _) in enumerate(INSTRUCTIONS) if name == "FROM")
    final = INSTRUCTIONS[last:]
    assert [arguments for name, arguments in final if name == "COPY"] == ["--from=build /opt/spotjax /opt/spotjax"]
    assert "USER" in [name for name, _ in final]
