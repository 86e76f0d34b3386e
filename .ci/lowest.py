"""Print the lowest versions that pyproject.toml admits for the program and its tests, as constraints for pip."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
for requirement in project["dependencies"] + project["optional-dependencies"]["test"]:
    declared = re.match(r"([\w.-]+)>=([\w.]+)", requirement)
    if declared is None:
        raise SystemExit(f"pyproject.toml: {requirement!r} has no lowest version (write name>=version)")
    print(f"{declared[1]}=={declared[2]}")
