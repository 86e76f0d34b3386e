"""``steradian config``: the schema, a resolved file, a new file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from steradian.config import ConfigError, RunConfig, dump_config, json_schema, load_config

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Configuration files: schema, resolved values, a new one.")


@app.command()
def schema() -> None:
    """Print the JSON schema, for editors that complete and check YAML."""
    typer.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))


@app.command()
def show(
    config: Annotated[Path, typer.Argument(help="YAML file.")],
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override.")] = None,
) -> None:
    """Print a configuration with every default written out; mistakes are explained."""
    typer.echo(dump_config(load_config(config, settings or [])), nl=False)


@app.command()
def new(
    path: Annotated[Path, typer.Argument(help="File to write.")],
    data: Annotated[Path | None, typer.Option("--data", help="Training file to write into it.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
) -> None:
    """Write a commented configuration to start from."""
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists; choose another name or give --overwrite")
    path.write_text(commented(path.stem, data), encoding="utf-8")
    typer.echo(f"wrote {path}; train with: steradian train {path}")


def commented(name: str, data: Path | None) -> str:
    """Every section with its defaults, each line with what the schema says about it."""
    values = RunConfig(name=name).model_dump(mode="json")
    if data is not None:
        values["data"]["train"] = str(data)
    schema_of = json_schema()
    lines = [
        "# Every value is the default: delete what you do not change.",
        "# steradian config schema lists what else is allowed.",
    ]
    _write(values, schema_of, schema_of, 0, lines)
    return "\n".join(lines) + "\n"


def _write(values: dict[str, Any], node: dict[str, Any], root: dict[str, Any], depth: int, lines: list[str]) -> None:
    for key, value in values.items():
        entry = _resolved(node.get("properties", {}).get(key, {}), root, value)
        indent = "  " * depth
        note = entry.get("description", "")
        if isinstance(value, dict) and value:
            if depth == 0:
                lines.append("")
            summary = note.strip().splitlines()[0] if note else ""
            lines.append(f"{indent}{key}:" + (f"  # {summary}" if summary else ""))
            _write(value, entry, root, depth + 1, lines)
            continue
        text = json.dumps(value, ensure_ascii=False)
        choices = entry.get("enum")
        note = note or (" | ".join(str(choice) for choice in choices) if choices else "")
        lines.append(f"{indent}{key}: {text}" + (f"  # {' '.join(note.split())}" if note else ""))


def _resolved(entry: dict[str, Any], root: dict[str, Any], value: Any) -> dict[str, Any]:
    """Follow a reference, and of several sections take the one whose kind the value has."""
    note = entry.get("description")
    if "$ref" in entry:
        target = root["$defs"][entry["$ref"].rsplit("/", 1)[1]]
        return {**target, **({"description": note} if note else {})}
    options = entry.get("oneOf") or []
    for option in options:
        found = _resolved(option, root, value)
        kind = found.get("properties", {}).get("kind", {})
        if isinstance(value, dict) and value.get("kind") == kind.get("const", kind.get("default")):
            return found
    return entry
