"""The rules of the house that a machine can check; which way imports point is checked by import-linter (pyproject)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "src" / "steradian"
FILES = sorted(SOURCE.rglob("*.py"))
LINES_OF_A_FILE, LINES_OF_A_FUNCTION, FILES_AT_TOP_LEVEL = 500, 60, 9
#: Packages that need not be there: a module that imports one at its top is itself imported on first use only.
#: Without LLVM plain PyTorch computes.
OPTIONAL = {
    *("cuequivariance_torch", "llvmlite", "mace", "nequip", "nvalchemiops", "tblite"),
    *("tensorboard", "torch_geometric", "triton", "wandb"),
}
#: Dictionaries and keys that tell tensors apart by identity: such a cache gives the old answer after an edit in place.
BY_IDENTITY = re.compile(r"\b(Weak(Id|Tensor)KeyDictionary|id\()")
#: What breaks a rule today: imports inside functions, functions, files. An entry leaves with its mend; none comes.
STANDING_IMPORTS: set[str] = set()
STANDING_FUNCTIONS: set[str] = set()
STANDING_FILES: set[str] = set()
STANDING_CACHES: set[str] = set()
STANDING_AT_TOP_LEVEL: set[str] = set()


def path_of(file: Path) -> str:
    return file.relative_to(SOURCE).as_posix()


def module_of(file: Path) -> str:
    parts = ("steradian", *file.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imported(node: ast.AST) -> list[str]:
    """Modules that one statement imports; the names of ``from a import b`` count as modules where they are ours."""
    if isinstance(node, ast.Import):
        return [name.name for name in node.names]
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        inner = [f"{node.module}.{name.name}" for name in node.names]
        ours = [name for name in inner if name in MODULES]
        return ours if len(ours) == len(inner) else [node.module, *ours]
    return []


def at_top(node: ast.AST) -> Iterator[ast.AST]:
    """All that runs when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if not is_function(child) and not is_for_types(child):
            yield child
            yield from at_top(child)


def inside_functions(file: Path) -> Iterator[str]:
    """Our own modules that are imported inside functions."""
    for function in filter(is_function, ast.walk(tree_of(file))):
        for node in ast.walk(function):
            yield from (name for name in imported(node) if name.split(".")[0] == "steradian")


@cache
def needs_optional(module: str) -> bool:
    """Whether the import of one of our modules imports an optional package, by itself or by what it imports."""
    names = [name for node in at_top(tree_of(MODULES[module])) for name in imported(node)]
    return any(name.split(".")[0] in OPTIONAL for name in names) or any(
        needs_optional(name) for name in names if name in MODULES and name != module
    )


def test_imports_inside_functions_are_for_optional_packages_and_the_command_line():
    found = {
        f"{path_of(file)}: {module}"
        for file in FILES
        if path_of(file).split("/")[0] != "cli"
        for module in inside_functions(file)
        if module not in MODULES or not needs_optional(module)
    }
    assert found == STANDING_IMPORTS


def test_nobody_imports_the_front_door():
    """``steradian`` itself imports everything on first use: through it any module could reach any other."""
    names = {path_of(file): imported(node) for file in FILES for node in ast.walk(tree_of(file))}
    assert not [path for path, found in names.items() if "steradian" in found]


def test_files_and_functions_are_short():
    long = {path_of(file) for file in FILES if len(file.read_text(encoding="utf-8").splitlines()) > LINES_OF_A_FILE}
    assert long == STANDING_FILES
    functions = {
        f"{path_of(file)}: {node.name}"
        for file in FILES
        for node in ast.walk(tree_of(file))
        if is_function(node) and node.end_lineno - node.lineno + 1 > LINES_OF_A_FUNCTION
    }
    assert functions == STANDING_FUNCTIONS


def keeps_tensors(file: Path) -> bool:
    """Whether a file keeps results by the identity of a tensor, or has a cached function that takes tensors."""
    cached = [
        node
        for node in filter(is_function, ast.walk(tree_of(file)))
        if any(re.search(r"\b(lru_)?cache\b", ast.unparse(mark)) for mark in node.decorator_list)
        and any("Tensor" in ast.unparse(argument.annotation) for argument in node.args.args if argument.annotation)
    ]
    return bool(cached or BY_IDENTITY.search(file.read_text(encoding="utf-8")))


def test_nothing_is_kept_by_the_identity_of_a_tensor():
    found = {path_of(file) for file in FILES if keeps_tensors(file)}
    # tell frames and nodes of a text apart within one call, not tensors
    found -= {"training/prepare.py", "config/text.py"}
    assert found == STANDING_CACHES


def test_few_files_lie_at_top_level():
    top = {file.name for file in SOURCE.glob("*.py")}
    assert len(top - STANDING_AT_TOP_LEVEL) <= FILES_AT_TOP_LEVEL


def test_the_rules_see_what_they_forbid(tmp_path):
    """The reader of the rules itself: a module that breaks them is told apart from one that does not."""
    text = "def f():\n    from steradian.graph import Graph\n    import steradian.build\n    return Graph\n"
    function = ast.parse(text).body[0]
    assert [imported(node) for node in ast.walk(function) if imported(node)] == [
        ["steradian.graph"],
        ["steradian.build"],
    ]
    cached = tmp_path / "cached.py"
    cached.write_text("@lru_cache(maxsize=2)\ndef rows(index: Tensor):\n    return index\n", encoding="utf-8")
    assert keeps_tensors(cached)
    assert not keeps_tensors(Path(__file__).parents[1] / "systems.py")
    assert BY_IDENTITY.search("rows = WeakIdKeyDictionary()")
    assert BY_IDENTITY.search("kept[id(tensor)]")
    assert not BY_IDENTITY.search("valid(tensor)")
    assert needs_optional("steradian.operators.efa.triton")
    assert not needs_optional("steradian.units")
