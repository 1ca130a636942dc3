"""What the README says must be so."""

import re
from pathlib import Path

from swamla_titan.cli import main
from swamla_titan.config import shipped_configs
from swamla_titan.model.sizes import flavor_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_its_table_of_sizes_is_the_one_that_the_command_prints(capsys):
    assert main(["config", "ls"]) == 0
    printed = capsys.readouterr().out
    assert "\n".join(flavor_table()) in README
    assert "\n".join(flavor_table()) in printed
    assert all(name in printed for name in shipped_configs())


def test_every_file_and_room_it_names_exists():
    for name in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`(swamla_titan/[\w./]+)`", README):
        assert (ROOT / name).exists(), name
    for room in re.findall(r"^  (\w+)/ ", README, flags=re.MULTILINE):
        assert (ROOT / "swamla_titan" / room).is_dir(), room


def test_no_build_of_the_ci_goes_without_its_commands():
    assert "./run_tests.sh" in (ROOT / ".ci" / "run").read_text()
    assert "./run_train.sh" in README
    assert "./run_tests.sh" in README
