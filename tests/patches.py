"""Applies the patches by which tests extend a copy of the package."""

from pathlib import Path


def apply_patch(patch: Path, root: Path) -> list[str]:
    """Apply a unified diff to the files under `root`, each hunk where its old lines are; returns their names."""
    touched = []
    for part in patch.read_text().split("diff --git ")[1:]:
        head, *hunks = part.split("\n@@ ")
        name = head.splitlines()[0].rpartition(" b/")[2]
        path = root / name
        text = path.read_text() if path.exists() else ""
        for hunk in hunks:
            lines = hunk.splitlines()[1:]
            old, new = ("".join(f"{line[1:]}\n" for line in lines if line[0] in f" {sign}") for sign in "-+")
            assert not old or text.count(old) == 1, f"{name} has changed: adapt {patch.name} where it has\n{old}"
            text = text.replace(old, new) if old else new
        path.write_text(text)
        touched.append(name)
    return touched
