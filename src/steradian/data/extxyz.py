"""Frames from extended XYZ text, read strictly: what a lenient reader would guess at is told with its line.

The format: a line with the number of atoms, a comment line of ``key=value`` pairs, a line per atom whose columns
``Properties=name:type:width:...`` names (https://github.com/libAtoms/extxyz).
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import atomic_numbers

from steradian.config.text import not_utf8, parse_json
from steradian.data.labels import USUAL_KEYS, RawFrame, units_named
from steradian.graph.structures import DataError

__all__ = ["read_extxyz"]

# A word, or KEY=VALUE; a value may be quoted ("..." or '...') or stand in brackets ({...} or [...], nested once).
VALUE = r'"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])*\'|\{[^{}]*\}|\[(?:[^\[\]]|\[[^\[\]]*\])*\]'
ENTRY = re.compile(rf'\s*(?:("(?:\\.|[^"\\])*"|[^\s=]+)(?:\s*=\s*({VALUE}|[^\s]*))?)')
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(nan|inf|infinity)", re.IGNORECASE | re.ASCII)
TRUTH = {"T": True, "F": False, "true": True, "false": False, "True": True, "False": False, "TRUE": True,
         "FALSE": False}  # fmt: skip
PLAIN = {"lattice": "Lattice", "properties": "Properties", "pbc": "pbc"}  # read in any case of letters
MATRICES = ("Lattice", "virial", "stress")  # ASE writes these column by column


def read_extxyz(path: Path) -> Iterator[RawFrame]:
    """Frames of an (extended) XYZ file, plain or compressed (.gz, .bz2, .xz).

    Raises:
        DataError: with frame and line: a truncated frame, an unknown element, a key given twice, an unclosed quote, a
            row with too few or too many columns, text where a number belongs, bytes that are not UTF-8.
    """
    opener: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(path.suffix.lower(), open)
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            for frame, (line, comment, rows) in enumerate(_chunks(file, path)):
                where = f"{path}, frame {frame}"
                try:
                    yield _frame(comment, rows, where)
                except _Mistake as mistake:
                    raise DataError(f"{where} (line {line + mistake.row}): {mistake}") from None
    except UnicodeDecodeError:
        raise DataError(not_utf8(path)) from None
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError) as error:
        raise DataError(f"{path}: not a complete {path.suffix[1:]} file ({error})") from None


class _Mistake(ValueError):
    """Something wrong in a frame, ``row`` lines below its first."""

    def __init__(self, row: int, message: str) -> None:
        super().__init__(message)
        self.row = row


def _chunks(file: Any, path: Path) -> Iterator[tuple[int, str, list[list[str]]]]:
    """First line number, comment and rows of words of every frame."""
    number = frame = 0
    while line := file.readline():
        number += 1
        if not line.strip():
            continue
        where = f"{path}, frame {frame} (line {number})"
        word = line.split()[0]
        if not (word.isascii() and word.isdecimal()):
            raise DataError(f"{where}: expected the number of atoms, found '{line.strip()[:40]}'")
        count, start = int(word), number
        if count == 0:
            raise DataError(f"{where}: a frame without atoms")
        comment, rows, text = file.readline(), [], ""
        for _ in range(count if comment else 0):
            text = file.readline()
            if not (words := text.split()):
                break
            rows.append(words)
        if len(rows) < count:
            raise DataError(f"{where}: the file is truncated: {count} atoms announced, {len(rows)} found")
        if not text.endswith("\n") and _is_cut(rows):
            raise DataError(
                f"{where}: the file is truncated: it ends without a line end, in the middle of the number "
                f"'{rows[-1][-1]}' (line {start + 1 + count}; add a line end if it is whole)"
            )
        number += 1 + count
        yield start, comment, rows
        frame += 1


def _is_cut(rows: list[list[str]]) -> bool:
    """Whether the last number has fewer digits after its point than every other of its column (or of its row)."""
    others = [row[-1] for row in rows[:-1]] or rows[-1][1:-1]
    digits = [len(word.partition(".")[2]) for word in others]
    return bool(digits) and len(rows[-1][-1].partition(".")[2]) < min(digits)


def _frame(comment: str, rows: list[list[str]], where: str) -> RawFrame:
    info = _comment(comment)
    lattice, pbc = info.pop("Lattice", None), info.pop("pbc", None)
    other = next((name for name in USUAL_KEYS["cell"] if name in info and np.size(info[name]) == 9), None)
    if lattice is None and other is not None:
        raise _Mistake(1, f"no Lattice, but '{other}' holds nine numbers: call it Lattice")
    if lattice is not None and np.shape(lattice) != (3, 3):
        raise _Mistake(1, f"not valid extended XYZ: Lattice holds {np.size(lattice)} values, not nine numbers")
    arrays = _columns(info.pop("Properties", None), rows)
    numbers = arrays.pop("Z", None)
    if "species" in arrays:
        symbols = _numbers_of(arrays.pop("species"))
        if numbers is not None and (np.asarray(numbers) != symbols).any():
            raise _Mistake(2, "the columns 'species' and 'Z' name different elements")
        numbers = symbols
    if numbers is None or "pos" not in arrays:
        raise _Mistake(1, "not valid extended XYZ: Properties names no column 'species' (or 'Z'), or none 'pos'")
    labels = {**arrays, **info}
    if "energy" in info:  # columns of one row look like labels of the frame
        labels = {name: value for name, value in labels.items() if name not in ("energies", "stresses")}
    return RawFrame(
        where,
        numbers,
        arrays.pop("pos"),
        np.zeros((3, 3)) if lattice is None else lattice,
        lattice is not None if pbc is None else _truths(pbc),
        {name: value for name, value in labels.items() if name != "pos"},
        units_named(info),
    )


def _truths(pbc: Any) -> np.ndarray:
    values = np.asarray(pbc)
    if values.shape not in ((), (3,)) or not all(value in (0, 1) for value in values.ravel().tolist()):
        raise _Mistake(1, f"not valid extended XYZ: pbc is {pbc}; expected three truth values, such as pbc='T T F'")
    return values.astype(bool)


# ------------------------------------------------------------------------------------------------------- the comment


def _comment(line: str) -> dict[str, Any]:
    """Keys and values of a comment line; words without ``=`` are true, as in ASE."""
    info: dict[str, Any] = {}
    assigned = set()
    for entry in ENTRY.finditer(line.rstrip()):
        key, text = entry.groups()
        if text is None:
            info.setdefault(key, True)
            continue
        key = key[1:-1] if key[0] == '"' else key
        key = PLAIN.get(key.lower(), key)
        if key in assigned:
            raise _Mistake(1, f"the key '{key}' is given twice in the comment line")
        assigned.add(key)
        # What follows a value without a space belongs to a quote that opens or closes elsewhere.
        if text[:1] in ("\"'{[") and (len(text) == 1 or not re.fullmatch(VALUE, text)):
            raise _Mistake(1, f"not valid extended XYZ: {key}={text[:1]} is not closed")
        if line[entry.end() : entry.end() + 1].strip() and text[:1] in "\"'{[":
            raise _Mistake(1, f"not valid extended XYZ: no space after the value of {key}")
        info[key] = _value(key, text)
    return info


def _value(key: str, text: str) -> Any:
    quoted = text[:1] in ("'", '"', "{", "[")
    if quoted:
        text = re.sub(r"\\(.)", r"\1", text[1:-1]) if text[0] in "'\"" else text[1:-1]
    if text.startswith("_JSON "):
        try:
            return parse_json(text[6:])
        except ValueError as error:
            raise _Mistake(1, f"'{key}' is {error}") from None
    words = re.findall(r"[^\s,\[\]]+", text)
    if words and all(NUMBER.fullmatch(word) for word in words):
        values = np.array([float(word) for word in words])
        if key in MATRICES and len(values) == 9:
            # The vectors of a lattice follow each other; a stress is written column by column.
            return values.reshape(3, 3) if key == "Lattice" else values.reshape(3, 3).T
        whole = all(re.fullmatch(r"[+-]?\d{1,18}", word) for word in words)
        values = np.array([int(word) for word in words]) if whole else values
        return values[0] if len(values) == 1 else values
    if words and all(word in TRUTH for word in words):
        truths = [TRUTH[word] for word in words]
        return truths[0] if len(truths) == 1 else truths
    return text


# ----------------------------------------------------------------------------------------------------------- the rows


def _columns(properties: Any, rows: list[list[str]]) -> dict[str, np.ndarray]:
    """Arrays of the columns by their names."""
    given = properties is not None
    fields = str(properties).split(":") if given else ["species", "S", "1", "pos", "R", "3"]
    if len(fields) % 3 or not all(width.isdecimal() and int(width) > 0 for width in fields[2::3]):
        raise _Mistake(1, f"not valid extended XYZ: Properties={':'.join(fields)} is no list of name:type:width")
    widths = [int(width) for width in fields[2::3]]
    total = sum(widths)
    for row, words in enumerate(rows):
        if len(words) < total or (given and len(words) > total):
            raise _Mistake(2 + row, f"not valid extended XYZ: {len(words)} columns; Properties names {total}")
    arrays: dict[str, np.ndarray] = {}
    start = 0
    for name, kind, width in zip(fields[::3], fields[1::3], widths):
        if name in arrays:
            raise _Mistake(1, f"Properties names the column '{name}' twice")
        words = [word for row in rows for word in row[start : start + width]]
        try:
            values = _converted(kind, words)
        except ValueError as error:
            row = next(index for index, word in enumerate(words) if word == str(error)) // width
            wanted = {"R": "number", "I": "whole number", "L": "truth value (T or F)"}[kind]
            raise _Mistake(2 + row, f"not valid extended XYZ: '{error}' in column '{name}' is no {wanted}") from None
        except KeyError:
            raise _Mistake(1, f"not valid extended XYZ: the column type {kind} is not S, R, I or L") from None
        arrays[name] = values.reshape(len(rows), width) if width > 1 else values
        start += width
    return arrays


def _converted(kind: str, words: list[str]) -> np.ndarray:
    """Values of words. Raises ValueError with the first word that is none, KeyError for an unknown kind."""
    if kind == "S":
        return np.array(words, dtype=object)
    if kind == "L":
        wrong = [word for word in words if word not in TRUTH]
        values: list[Any] = [TRUTH.get(word) for word in words]
    else:
        number = {"R": float, "I": int}[kind]
        try:
            values, joined = [number(word) for word in words], "".join(words)
            # Python reads 1_000 and digits of every script; no program writes coordinates so.
            wrong = [] if joined.isascii() and "_" not in joined else [w for w in words if not NUMBER.fullmatch(w)]
        except ValueError:
            wrong = [word for word in words if not _is(number, word)]
    if wrong:
        raise ValueError(wrong[0])
    return np.array(values)


def _is(number: Any, word: str) -> bool:
    try:
        number(word)
    except ValueError:
        return False
    return bool(NUMBER.fullmatch(word))


def _numbers_of(symbols: np.ndarray) -> np.ndarray:
    numbers = np.zeros(len(symbols), dtype=np.int64)
    for row, symbol in enumerate(symbols):
        number = atomic_numbers.get(symbol.capitalize())
        if number is None:
            raise _Mistake(2 + row, f"unknown element '{symbol}'")
        numbers[row] = number
    return numbers
