"""What the documents name exists: links, commands, flags, settings, fields, modules, functions."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_args, get_type_hints

import msgspec
import pytest
from documents import DOCUMENTS, ROOT, anchors, blocks, commands, inline_code, links
from google.protobuf import json_format, symbol_database
from google.protobuf.descriptor import Descriptor
from grpc_health.v1 import health_pb2

from spotjax import cli, settings
from spotjax.api.errors import STATUS
from spotjax.api.proto.spotjax.v1 import fleet_pb2, generation_pb2
from spotjax.config import TYPES, ServeConfig
from spotjax.fleet.capacity import file as capacity_file
from spotjax.fleet.capacity.file import CapacitySettings
from spotjax.fleet.providers.registry import provider_config

TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in DOCUMENTS}
each_document = pytest.mark.parametrize("name", TEXTS)
PROTOS = (generation_pb2, fleet_pb2)
PACKAGES = {"models": ROOT / "models", "meshes": ROOT / "meshes", "tools": ROOT / "tools"}
"""Where packages lie that are not below ``spotjax/``."""


def subcommands() -> dict[str, argparse.ArgumentParser]:
    """The parser of every ``spotjax`` command."""
    action = next(a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    """Those of a command, and of the commands below it."""
    flags = {flag for action in parser._actions for flag in action.option_strings}
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return flags.union(*(flags_of(command) for action in below for command in action.choices.values()))


ALL_FLAGS = set.union(flags_of(cli.parser()), *map(flags_of, subcommands().values()))


def source_of(module: str) -> Path | None:
    """The file of a dotted module name, without importing it."""
    parts = module.split(".")
    base = PACKAGES.get(parts[1], ROOT / "spotjax" / parts[1]) if len(parts) > 1 else ROOT / "spotjax"
    path = base.joinpath(*parts[2:])
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


def modules_below(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(p for p in path.rglob("*.py") if "proto" not in p.parts)


@each_document
def test_every_link_within_the_repository_leads_somewhere(name: str) -> None:
    for link in links(TEXTS[name]):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), f"{name} links to {link}"
        assert target.resolve().is_relative_to(ROOT), f"{name} links out of the repository: {link}"
        if anchor:
            assert anchor in anchors(target.read_text()), f"{name} links to {link}"


@each_document
def test_every_command_is_one_that_the_parser_takes(name: str) -> None:
    known = subcommands()
    for program, *words in commands(TEXTS[name], "spotjax"):
        shown = " ".join([program, *words])
        if not words:
            continue  # the program's name
        assert words[0] in known, f"{name}: {shown}"
        for word in words[1:]:
            if word.startswith("--"):
                assert word.split("=")[0] in flags_of(known[words[0]]), f"{name}: {shown}"


@pytest.mark.parametrize("name", ["docs/support.md", "CHANGELOG.md"])
def test_every_command_is_named(name: str) -> None:
    assert {f"`{command}`" for command in subcommands()} <= set(
        re.findall(r"`[\w-]+`", TEXTS[name].replace("`spotjax ", "`"))
    )


@each_document
def test_commands_in_blocks_parse_as_they_stand(name: str) -> None:
    text = "\n".join(f"```\n{code}```" for code in blocks(TEXTS[name], ""))
    for _, *words in commands(text, "spotjax"):
        cli.parser().parse_args(words)


@each_document
def test_every_flag_that_stands_alone_belongs_to_a_command(name: str) -> None:
    for code in inline_code(TEXTS[name]):
        if code.startswith("--"):
            assert code.split()[0] in ALL_FLAGS, f"{name}: {code}"


@each_document
def test_modules_and_tools_that_are_run_exist_and_know_their_flags(name: str) -> None:
    for _, *words in commands(TEXTS[name], "python", "python3", ".venv/bin/python"):
        if words[:1] != ["-m"] or not words[1].startswith("spotjax"):
            continue
        source = source_of(words[1])
        assert source is not None, f"{name}: {words[1]}"
        own = source.read_text()
        for flag in (word for word in words[2:] if word.startswith("--")):
            serves = words[1] == "spotjax.serve" and flag in flags_of(subcommands()["serve"])
            assert serves or f'"{flag}"' in own, f"{name}: {words[1]} {flag}"


@each_document
def test_every_make_target_exists(name: str) -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for _, *words in commands(TEXTS[name], "make"):
        assert {word for word in words if "=" not in word} <= targets, f"{name}: make {' '.join(words)}"


@each_document
def test_every_variable_is_a_setting(name: str) -> None:
    known = {f"{settings.PREFIX}{setting.upper()}" for setting in TYPES} | settings.OTHER_VARIABLES
    assert set(re.findall(r"\bSPOTJAX_[A-Z_]*[A-Z]\b", TEXTS[name])) <= known


def test_operations_names_every_setting_in_all_three_spellings_with_its_default() -> None:
    text = TEXTS["docs/operations.md"]
    defaults = ServeConfig()
    for setting in TYPES:
        flag, default = f"--{setting.replace('_', '-')}", getattr(defaults, setting)
        row = next((line for line in text.splitlines() if line.startswith(f"| `{flag}`")), "")
        assert f"`SPOTJAX_{setting.upper()}` | `{setting}` |" in row, setting
        shown = row.split(" | ")[3].strip("` ")
        assert shown == (settings.shown_value(default) or "empty"), setting


def test_operations_names_every_kind_of_event() -> None:
    recorded = set()
    for path in modules_below(ROOT / "spotjax/fleet"):
        recorded |= set(re.findall(r'\.record\(\s*"(\w+)"', path.read_text()))
    section = TEXTS["docs/operations.md"].split("## Events")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == recorded


def test_api_names_every_method_field_and_error() -> None:
    text = TEXTS["docs/api.md"]
    spoken = set(re.findall(r"\w+", text))
    for proto in PROTOS:
        for service in proto.DESCRIPTOR.services_by_name.values():
            assert {method.name for method in service.methods} <= spoken
        for message in proto.DESCRIPTOR.message_types_by_name.values():
            assert {field.name for field in message.fields} <= spoken, message.name
    for error, status in STATUS.items():
        assert f"| `{error.__name__}` | `{status.name}` |" in text


def test_settings_and_providers_in_toml_examples_load(tmp_path: Path) -> None:
    for name, text in TEXTS.items():
        for number, code in enumerate(blocks(text, "toml")):
            path = tmp_path / f"{number}.toml"
            path.write_text(code)
            if (provider := tomllib.loads(code).get("provider")) is not None:
                assert provider_config(provider, name)
                if "capacity" in tomllib.loads(code):
                    assert capacity_file.read(path)
                continue
            assert settings.from_file(path), name


def test_clouds_names_every_setting_of_a_capacity_file_with_its_default_and_meaning() -> None:
    hints = get_type_hints(CapacitySettings, include_extras=True)
    for setting in msgspec.structs.fields(CapacitySettings):
        shown = settings.shown_value(setting.default) if isinstance(setting.default, str | float | int) else ""
        shown = f"`{shown}`" if isinstance(setting.default, str) else shown or "must be given"
        meaning = get_args(hints[setting.name])[1].description
        assert f"| `{setting.name}` | {shown} | {meaning} |" in TEXTS["docs/clouds.md"].splitlines(), setting.name


def message_of(method: str) -> Descriptor:
    """Request message of ``package.Service/Method``."""
    service, name = method.split("/")
    for proto in (*PROTOS, health_pb2):
        for candidate in proto.DESCRIPTOR.services_by_name.values():
            if candidate.full_name == service:
                return candidate.methods_by_name[name].input_type
    raise LookupError(f"no service {service}")


@each_document
def test_requests_in_json_are_messages(name: str) -> None:
    for _, *words in commands(TEXTS[name], "grpcurl"):
        if "-d" in words:
            kind = symbol_database.Default().pool.FindMessageTypeByName(message_of(words[-1]).full_name)
            message = json_format.Parse(words[words.index("-d") + 1], message_class(kind)())
            assert message is not None


def message_class(kind: Descriptor) -> type:
    from google.protobuf.message_factory import GetMessageClass

    return GetMessageClass(kind)


def test_every_module_that_the_architecture_names_exists() -> None:
    named = [code for code in inline_code(TEXTS["docs/architecture.md"]) if re.fullmatch(r"[\w/]+(\.py|/)", code)]
    assert len(named) > 40
    for code in named:
        assert (ROOT / code).exists() or (ROOT / "spotjax" / code).exists(), code


def test_every_package_has_its_line_in_the_architecture() -> None:
    table = TEXTS["docs/architecture.md"].split("## Packages")[1].split("```")[0]
    for package in [*(ROOT / "spotjax").glob("*/__init__.py"), *(path / "__init__.py" for path in PACKAGES.values())]:
        assert f"| `{package.parent.relative_to(ROOT)}/`" in table


def test_every_name_that_the_architecture_gives_is_defined() -> None:
    sources = [*modules_below(ROOT / "spotjax"), *(p for base in PACKAGES.values() for p in modules_below(base))]
    defined = set()
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                defined.add(node.name)
                if isinstance(node, ast.ClassDef):
                    defined |= {f"{node.name}.{part.name}" for part in node.body if hasattr(part, "name")}
    messages = {name for proto in PROTOS for name in proto.DESCRIPTOR.message_types_by_name}
    text = TEXTS["docs/architecture.md"]
    named = {code for code in inline_code(text) if re.fullmatch(r"[A-Z]\w+(\.\w+)?|[a-z]+_\w+", code)}
    assert len(named) > 40
    assert named <= defined | messages | {"psum"}, named - defined - messages
    for name, module in re.findall(r"`([\w.]+)`\s\(`([\w/]+\.py)`\)", text):
        path = ROOT / module if (ROOT / module).exists() else ROOT / "spotjax" / module
        assert re.search(rf"(def|class) {name.split('.')[-1]}\b", path.read_text()), f"{name} in {module}"


def packages_in_order() -> list[tuple[list[str], bool]]:
    """The rows of the table of packages: paths below the root, and whether they may use jax."""
    table = TEXTS["docs/architecture.md"].split("## Packages")[1].split("```")[0]
    rows = re.findall(r"^\| (`.+?) \|.*\| (.+?) \|$", table, re.MULTILINE)
    return [(re.findall(r"`([^`]+)`", paths), jax != "no") for paths, jax in rows]


def imported(path: Path) -> set[str]:
    """Dotted names that a module imports when it is loaded."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_imports_go_downwards_as_the_architecture_says() -> None:
    rank = {path: number for number, (paths, _) in enumerate(packages_in_order()) for path in paths}
    rank["meshes/"] = rank["models/"]  # these two know each other
    place = {source.resolve(): number for path, number in rank.items() for source in modules_below(ROOT / path)}
    for source, number in place.items():
        for name in imported(source):
            target = source_of(name) if name.startswith("spotjax.") else None
            if target is not None and target.resolve() in place:
                assert number <= place[target.resolve()], f"{source.relative_to(ROOT)} imports {name}"


def test_what_needs_no_jax_loads_none() -> None:
    names = []
    for path in [path for paths, jax in packages_in_order() if not jax for path in paths]:
        if path.startswith("spotjax/"):
            names += [
                s.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for s in modules_below(ROOT / path)
            ]
    assert len(names) > 60
    program = f"import sys, {', '.join(names)}; sys.exit('jax' in sys.modules or 'flax' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


@each_document
def test_python_examples_import_what_exists(name: str) -> None:
    for code in blocks(TEXTS[name], "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom):
                assert node.module is not None
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), f"{name}: {ast.unparse(node)}"
