"""What README and docs say must be so."""

import dataclasses
import re
import shutil
from pathlib import Path

import pytest

from swamla_titan.cli import main
from swamla_titan.config import load_config, shipped_configs, with_vocabulary
from swamla_titan.config.load import SECTIONS
from swamla_titan.config.sections import ActivationCheckpoint
from swamla_titan.fields import settings
from swamla_titan.model.counts import flavor_table
from swamla_titan.tools.activations import recomputed_share
from swamla_titan.tools.plan import plan
from tests.patches import apply_patch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = sorted((ROOT / "docs").glob("*.md"))
MEMORY, CONFIGURATION, WALK, EXTENDING, FAULTS = (
    (ROOT / "docs" / f"{name}.md").read_text() for name in ("memory", "configuration", "walk", "extending", "faults")
)
# Of each diff of the page on extending: the section that has it, and the diff.
DIFFS = [
    (section, diff)
    for section in re.split(r"^## ", EXTENDING, flags=re.MULTILINE)
    for diff in re.findall(r"^```diff\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
]


def test_its_table_of_sizes_is_the_one_that_the_command_prints(capsys):
    assert main(["config", "ls"]) == 0
    printed = capsys.readouterr().out
    assert "\n".join(flavor_table()) in CONFIGURATION
    assert "\n".join(flavor_table()) in printed
    assert all(name in printed for name in shipped_configs())


def test_it_is_short_and_every_file_and_room_that_it_and_the_walk_name_exists():
    assert len(README.splitlines()) < 150
    for name in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`(swamla_titan/[\w./]+)`", README):
        assert (ROOT / name).exists(), name
    rooms = re.findall(r"^  (\w+)/ ", WALK, flags=re.MULTILINE)
    assert sorted(rooms) == sorted(path.parent.name for path in (ROOT / "swamla_titan").glob("*/__init__.py"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page):
    text = page.read_text()
    assert f"docs/{page.name}" in README, "a page that nobody finds"
    for name in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (page.parent / name).exists(), name
    for name in re.findall(r"`((?:swamla_titan|train_configs|tests|scripts|benchmarks)/[\w./]+)`", text):
        assert (ROOT / name).exists(), name
    for section, key in re.findall(r"`(?:--|\[)?([a-z_]+\d?)\.([a-z_\d]+)\b(?!\()", text):
        if section in SECTIONS and key not in ("jsonl", "safetensors") and f"{section}.{key}" not in SECTIONS:
            assert key in {"flavor", *settings(SECTIONS[section])}, f"{section}.{key}"
    for script in re.findall(r"python (benchmarks/\w+\.py)", text):
        assert (ROOT / script).exists(), script


def test_the_walk_is_short_and_its_doors_are_where_it_says():
    path = dict(re.findall(r"^\| `(swamla_titan/[\w./]+)` \| (\d+) \|", WALK, flags=re.MULTILINE))
    assert 20 <= len(path) <= 25
    assert f"through {len(path)} files of some {round(sum(map(int, path.values())), -2):,} lines" in WALK
    for file, lines in path.items():
        assert int(lines) == pytest.approx((ROOT / file).read_text().count("\n"), rel=0.1, abs=10), file
    doors = re.findall(r"`(\w+)`\s+\(`(swamla_titan/[\w./]+\.py)`\)", WALK)
    assert len(doors) > 10
    for name, file in doors:
        assert re.search(rf"^((def|class) )?{name}\b", (ROOT / file).read_text(), flags=re.MULTILINE), (name, file)


@pytest.mark.parametrize("section, diff", DIFFS, ids=range(len(DIFFS)))
def test_a_diff_of_the_page_on_extending_makes_of_the_package_what_it_shows(section, diff, tmp_path):
    """It is one patch, abridged, which a test applies of which its section speaks."""
    shown = lines_by_file(diff)
    [patch] = [
        each
        for each in (ROOT / "tests").rglob("*.patch")
        if all(is_part(lines, of_file(each, name)) for name, lines in shown.items())
    ]
    mentioned = [(ROOT / name).read_text() for name in re.findall(r"`(tests/[\w/]+\.py)`", section)]
    assert any("apply_patch(" in text and patch.stem in text for text in mentioned)

    touched = re.findall(r"^diff --git a/(\S+)", patch.read_text(), re.M)
    promised = re.findall(r"^\| `([\w/.]+)`", section, re.M)
    for name in touched:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tmp_path / name)
            assert name in promised
        else:
            assert any(each.endswith("/") and name.startswith(each) for each in promised), name
    [number] = re.findall(rf"^\| [\w ]+ \| (\d+)[^|]*\|[^|]*`{patch.relative_to(ROOT)}`", EXTENDING, re.M)
    assert int(number) >= sum(name.startswith("swamla_titan/") for name in touched)

    apply_patch(patch, tmp_path)
    for name, lines in shown.items():
        before = (ROOT / name).read_text().splitlines() if (ROOT / name).exists() else []
        after = (tmp_path / name).read_text().splitlines()
        compile("\n".join(after), name, "exec")
        assert is_part([line[1:] for line in lines if line[0] in " -"], before), name
        assert is_part([line[1:] for line in lines if line[0] in " +"], after), name
        assert not {line[1:] for line in lines if line[0] == "-"}.intersection(after), name


def lines_by_file(diff: str) -> dict[str, list[str]]:
    """The lines of an abridged diff, by the file that they are of."""
    found: dict[str, list[str]] = {}
    for line in diff.splitlines():
        if heading := re.fullmatch(r"(?:--- a|\+\+\+ b)/(.+)", line):
            name = heading[1]
        elif line != "--- /dev/null":
            found.setdefault(name, []).append(line)
    return found


def of_file(patch: Path, name: str) -> list[str]:
    """The lines of a patch for one file."""
    parts = patch.read_text().split("diff --git ")
    return next((part.splitlines() for part in parts if part.startswith(f"a/{name} ")), [])


def is_part(lines: list[str], text: list[str]) -> bool:
    """Whether `text` has these lines in their order, perhaps with others between."""
    remaining = iter(text)
    return all(line in remaining for line in lines)


def test_entries_of_the_log_open_with_a_verdict_and_are_in_its_index():
    log = (ROOT / "LOG.md").read_text()
    entries = re.findall(r"^## (\d{4}-\d\d-\d\d: .*)\n\n(.*)", log, flags=re.MULTILINE)
    assert len(entries) == log.count("\n## ")
    for title, opening in entries:
        assert opening.startswith("**Verdict.** "), title
        anchor = re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        assert f"](#{anchor}) |" in log, f"not in the index: {title}"


def test_each_fault_is_proved_by_tests_that_exist():
    faults = re.findall(r"^\| ([A-Z]\d+) \|", FAULTS, flags=re.MULTILINE)
    assert len(faults) == len(set(faults)) > 50
    paragraphs = re.findall(r"^Tests: .*?(?=\n\n|\Z)", FAULTS, flags=re.MULTILINE | re.DOTALL)
    proofs = re.split(r"(?<![\w`])((?:[A-Z]\d+, )*[A-Z]\d+) (?=`)", "\n".join(paragraphs))
    proved = [name for names in proofs[1::2] for name in names.split(", ")]
    assert sorted(proved) == sorted(faults)
    tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", FAULTS)
    assert len(tests) >= len(faults)
    for file, name in tests:
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), flags=re.MULTILINE), f"{file}::{name}"


def test_the_table_of_what_checkpointing_saves_is_plan_s():
    rows = re.findall(
        r"^\| `(\w+)`(?:, `(\w+)`[^|]*)? \| (?:`(\w+)`)? ?\| ([\d.]+) \| ([\d.]+) \| ([\d.]+%)? ?\|$", MEMORY, re.M
    )
    assert len(rows) == 7
    for mode, selective, modules, activations, total, more in rows:
        settings = ActivationCheckpoint(mode, selective or "operators", modules=modules or "block")
        config = load_config(shipped_configs()["large"])
        config = with_vocabulary(dataclasses.replace(config, activation_checkpoint=settings), 50257)
        memory = plan(config, 1).worst.memory
        assert (f"{memory.activations / 2**30:.1f}", f"{memory.total / 2**30:.1f}") == (activations, total), mode
        assert (f"{recomputed_share(config):.1%}" if more else "") == more


def test_no_build_of_the_ci_goes_without_its_commands():
    assert "./run_tests.sh" in (ROOT / ".ci" / "run").read_text()
    assert "./run_train.sh" in README
    assert "./run_tests.sh" in README
