"""What README and docs say must be so."""

import dataclasses
import re
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

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = sorted((ROOT / "docs").glob("*.md"))
MEMORY, CONFIGURATION, WALK, EXTENDING, FAULTS = (
    (ROOT / "docs" / f"{name}.md").read_text() for name in ("memory", "configuration", "walk", "extending", "faults")
)


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


def test_the_diffs_of_the_page_on_extending_are_parts_of_patches_that_tests_apply():
    applied = {line for patch in (ROOT / "tests").rglob("*.patch") for line in patch.read_text().splitlines()}
    blocks = re.findall(r"^```diff\n(.*?)^```", EXTENDING, flags=re.MULTILINE | re.DOTALL)
    shown = [line for block in blocks for line in block.splitlines()]
    assert len(blocks) >= 3
    assert all(line in applied for line in shown), [line for line in shown if line not in applied]


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
