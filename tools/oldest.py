"""The oldest versions of the dependencies that pyproject.toml allows, as constraints for pip.

    python tools/oldest.py > oldest.txt && pip install -c oldest.txt -e .

torch is that of constraints.txt: its releases give other numbers, and the tests hold some to the last bit.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def oldest(root: Path = ROOT) -> list[str]:
    """Lines ``name==version``: the lower bound of every dependency, and of torch the version that is tested."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    bounds = [each.replace(">=", "==") for each in project["dependencies"] if not each.startswith("torch>")]
    return [*bounds, *(line for line in pinned if line.startswith("torch=="))]


if __name__ == "__main__":
    print("\n".join(oldest()))
