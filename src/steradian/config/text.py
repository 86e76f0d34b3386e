"""Text, YAML and JSON that people write: what would be read as something else is refused, in one line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

__all__ = ["not_utf8", "parse_json", "parse_yaml", "printable", "read_text"]

MAX_NODES = 100_000  # values of a configuration once every alias is written out


def printable(text: object) -> str:
    """The text with control characters spelled out: an escape sequence in a file never reaches a terminal."""
    return "".join(
        f"\\x{ord(letter):02x}" if (letter < " " and letter not in "\n\t") or "\x7f" <= letter <= "\x9f" else letter
        for letter in str(text)
    )


def read_text(path: Path) -> str:
    """A whole text file; a byte order mark is left out.

    Raises:
        ValueError: not UTF-8; names the line and the way out.
        OSError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(not_utf8(path)) from None


def not_utf8(path: Path) -> str:
    """What to say of a file that is not UTF-8: the line with the first such byte, or that it is no text at all."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff"):
                return f"{path}: encoded in UTF-16; convert it: iconv -f utf-16 -t utf-8"
            if b"\0" in line:
                break
            try:
                line.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                bad = sum(byte < 32 and byte not in b"\t\n\r\f" for byte in line)
                if bad or sum(byte > 127 for byte in line) > len(line) // 2:
                    break
                byte = line[error.start]
                return (
                    f"{path}, line {number}: the byte 0x{byte:02x} is not UTF-8 (Latin-1 or Windows-1252, "
                    f"where it is '{bytes([byte]).decode('latin-1')}'?); convert it: iconv -f latin1 -t utf-8"
                )
    return f"{path}: not a text file (UTF-8 is read)"


def parse_json(text: str) -> Any:
    """Content of a JSON text. Raises ValueError, with the place: no JSON, a key given twice, nested too deeply."""

    def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the key '{twice}' is given twice")
        return content

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON (line {error.lineno}: {error.msg}; damaged or truncated?)") from None
    except RecursionError:
        raise ValueError("not valid JSON (nested too deeply)") from None


def parse_yaml(text: str) -> Any:
    """Content of a YAML text; keys stay the text they are written as (``No`` is nobelium, a date is a date's text).

    Raises:
        ValueError: no YAML, a key given twice, aliases that make it endless or huge, a number in base 8 or 60.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _count(node, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: " if mark is not None else ""
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ValueError(f"not valid YAML: {place}{printable(reason)}") from None
    except RecursionError:
        raise ValueError("not valid YAML: nested too deeply") from None


class _Loader(yaml.SafeLoader):
    """YAML as data; a mapping's keys are text."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        self.flatten_mapping(node)
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """Values below a node with every alias written out; mistakes that YAML itself lets pass are told here."""
    if id(node) in known:
        if known[id(node)] == 0:
            raise _mistake(node, "an alias inside its own anchor")
        return known[id(node)]
    known[id(node)] = 0
    total = 1
    if isinstance(node, yaml.MappingNode):
        names = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _mistake(key, "a key must be text")
            if key.value in names:
                raise _mistake(key, f"the key '{key.value}' is given twice")
            names.add(key.value)
            total += _count(value, known)
    elif isinstance(node, yaml.SequenceNode):
        total += sum(_count(entry, known) for entry in node.value)
    elif node.tag == "tag:yaml.org,2002:int":
        digits = node.value.lstrip("+-")
        if ":" in digits or (digits.isdecimal() and digits[0] == "0" and len(digits) > 1):
            raise _mistake(node, f"{node.value} would be read in base {60 if ':' in digits else 8}; write it plainly")
    elif node.tag == "tag:yaml.org,2002:float" and ":" in node.value:
        raise _mistake(node, f"{node.value} would be read in base 60; write it plainly")
    if total > MAX_NODES:
        raise _mistake(node, f"more than {MAX_NODES} values, once aliases are written out")
    known[id(node)] = total
    return total


def _mistake(node: yaml.Node, reason: str) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=reason, problem_mark=node.start_mark)
