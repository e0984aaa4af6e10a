"""The pages that the tests of this folder read, and the commands in them."""

import os
import re
from pathlib import Path

from autoencoder.common.config import REPO_ROOT

DOCUMENTS = [REPO_ROOT / "README.md", REPO_ROOT / "CONTRIBUTING.md", *sorted((REPO_ROOT / "docs").glob("*.md"))]


def commands(text: str) -> list[tuple[str, str]]:
    """(folder the command runs in, command) of all bash blocks, which start and end at the repository's root."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL):
        folder, variables = ".", {}
        for line in block.replace("\\\n", " ").splitlines():
            command = line.split("#")[0].strip()
            for name, value in variables.items():
                command = command.replace(f"${name}", value)
            if command.startswith("cd "):
                folder = os.path.normpath(Path(folder, command[3:]))
            elif assignment := re.fullmatch(r"(\w+)=(\S+)", command):
                variables[assignment[1]] = assignment[2]
            elif command:
                found.append((folder, command))
        assert folder == ".", f"a block ends in {folder}: the next one starts from the root\n{block}"
    return found


def without_variables(command: str) -> str:
    return re.sub(r"^([A-Z_]+=\S*\s+)*", "", command)


def stated_outputs(text: str) -> list[tuple[str, str]]:
    """(last command of a bash block, what a text block right behind it says that it prints)."""
    blocks = re.findall(r"(```bash\n(?:(?!```).)*```)\n+```text\n(.*?)```", text, flags=re.DOTALL)
    return [(commands(block)[-1][1], output) for block, output in blocks]
