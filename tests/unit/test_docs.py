"""What documents and docstrings name exists: modules and what they hold, files, pages and their headings."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "steradian"
PAGES = [*(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")), *sorted(ROOT.glob("docs/*.md"))]
CODE = [*sorted(SOURCE.rglob("*.py")), *sorted(ROOT.glob("benchmarks/*.py"))]
ROLE = re.compile(r":(?:mod|class|func|meth|attr|data|exc):`~?([^`]+)`")
DOTTED = re.compile(r"(?<![\w/.-])steradian(?:\.[A-Za-z_]\w*)+")
#: In pages, names in backticks below the package: `operators.efa.rules.resolved_phase`.
SHORT = re.compile(r"`((?:{})(?:\.\w+)+)".format("|".join(path.name for path in SOURCE.iterdir() if path.is_dir())))
FILE = re.compile(r"`((?:[\w-]+/)+[\w-]+\.(?:py|md|yaml|json|png|sh))`")
LINK = re.compile(r"\]\(([^)#:]*)(?:#([\w-]+))?\)")
#: Names of attributes of live objects, and of keys of the configuration, that look like those of modules.
OTHERS = re.compile(r"steradian\.(gates|layers)$|(data|training|graph)\.[a-z_]+|config\.yaml")


def module_of(path: Path) -> str:
    parts = ("steradian", *path.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in SOURCE.rglob("*.py")}


@cache
def names_in(path: Path) -> set[str]:
    """All that a module defines, stores or imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
        elif isinstance(node, ast.alias):
            found.add((node.asname or node.name).split(".")[0])
    return found


@cache
def exists(name: str) -> bool:
    """Whether a full name is that of a module, or of something in one; methods may be inherited from anywhere."""
    parts = name.split(".")
    module = next(".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in MODULES)
    rest = parts[module.count(".") + 1 :]
    inside = not rest or rest[0] in names_in(MODULES[module])
    return inside and all(any(name in names_in(path) for path in MODULES.values()) for name in rest[1:])


def is_known(target: str, path: Path) -> bool:
    """Whether the target of a role is here, in this package, or in another one that is installed."""
    if target.startswith("."):
        package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
        return exists(package + target)
    head, *rest = target.split(".")
    if head == "steradian":
        return exists(target)
    if rest and importlib.util.find_spec(head) is not None:
        return True
    return head in names_in(path) and all(any(name in names_in(other) for other in MODULES.values()) for name in rest)


def unknown_names(path: Path, text: str) -> Iterator[str]:
    text = re.sub(r"^ *(from|import) .*$", "", text, flags=re.MULTILINE)
    yield from (name for name in DOTTED.findall(text) if not OTHERS.match(name) and not exists(name))
    if path.suffix == ".py":
        yield from (target for target in ROLE.findall(text) if not is_known(re.sub(r"\s", "", target), path))
    else:
        short = (name for name in SHORT.findall(text) if not OTHERS.match(name))
        yield from (name for name in short if not exists(f"steradian.{name}"))


def headings(path: Path) -> set[str]:
    found = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in found}


def broken_links(path: Path, text: str) -> Iterator[str]:
    for file in FILE.findall(text):
        if not any((folder / file).is_file() for folder in (ROOT, SOURCE, ROOT / "benchmarks")):
            yield file
    for file, heading in LINK.findall(text):
        target = path.parent / file if file else path
        if not target.exists() or (heading and heading not in headings(target)):
            yield f"{file}#{heading}"


@pytest.mark.parametrize("path", PAGES + CODE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_is_named_exists(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not [*unknown_names(path, text), *(broken_links(path, text) if path.suffix == ".md" else ())]


def test_the_reader_sees_what_does_not_exist() -> None:
    page = ROOT / "docs" / "api.md"
    wrong = "`steradian.kernels.cpu`, `steradian.potential.Potental`, `operators.efa.rules.gone`"
    assert len(list(unknown_names(page, wrong))) == 3
    assert not list(unknown_names(page, "`steradian.potential.Potential.train`, `operators.efa.rules`, `data.train`"))
    module = SOURCE / "operators" / "mara" / "gate.py"
    assert list(unknown_names(module, ":mod:`.paper`, :mod:`.gone`, :class:`torch.Tensor`, :meth:`Gone`")) == [
        ".gone",
        "Gone",
    ]
    assert list(broken_links(page, "`kernels/cpu.py`, `polynomials/cpu.py`, [a](mara.md#cost), [b](mara.md#gone)")) == [
        "kernels/cpu.py",
        "mara.md#gone",
    ]
