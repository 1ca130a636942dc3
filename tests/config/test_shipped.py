"""`config ls`, `config show` and `config cp`."""

import re
from pathlib import Path

import pytest

from swamla_titan.cli import main
from swamla_titan.config import Override, load_config, shipped_configs
from swamla_titan.config.load import READY_MADE
from swamla_titan.config.sections import KEYS
from swamla_titan.distributed.degrees import fit_degrees
from swamla_titan.model import FLAVORS
from swamla_titan.model.counts import parameter_counts


@pytest.fixture
def output(capsys: pytest.CaptureFixture[str]):
    def run(*arguments: str) -> str:
        capsys.readouterr()
        assert main(["config", *arguments]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]):
    def run(*arguments: str) -> str:
        capsys.readouterr()
        assert main(["config", *arguments]) == 2
        return capsys.readouterr().err

    return run


def test_ls_names_every_configuration_with_its_first_line_and_every_flavor_with_its_size(output):
    lines = output("ls").splitlines()
    for name, path in shipped_configs().items():
        first = path.read_text().splitlines()[0].lstrip("# ").removeprefix(f"{name}: ")
        assert any(line.split()[:1] == [name] and line.endswith(first) for line in lines), name
    for name, shape in FLAVORS.items():
        size = f"{parameter_counts(shape)[0] / 1e6:,.1f}M"
        assert any(f"| `{name}` |" in line and f"| {size} |" in line for line in lines), name


@pytest.mark.parametrize("name", shipped_configs())
def test_show_loads_to_the_same_configuration(output, tmp_path, name):
    shown = tmp_path / "shown.toml"
    shown.write_text(output("show", name))
    assert load_config(shown) == load_config(shipped_configs()[name])


def test_show_explains_every_key_and_applies_overrides(output, tiny, tmp_path):
    text = output("show", str(tiny), "--optimizer.lr", "0.125", "--model.dim=96")
    for setting in KEYS.values():
        assert f"# {setting.doc} (" in text
        assert f"\n{setting.name} = " in text
    assert "\nlr = 0.125\n" in text
    for section, (selector, known) in READY_MADE.items():  # which are not part of a configuration, but of its file
        names = ", ".join(f'"{name}"' for name in known)
        meaning = "a name of ready-made values, which the keys below override."
        assert f"[{section}]\n# {selector}: {meaning} (one of {names})\n" in text
    (tmp_path / "shown.toml").write_text(text)
    overrides = [Override("optimizer", "lr", "0.125"), Override("model", "dim", "96")]
    assert load_config(tmp_path / "shown.toml") == load_config(tiny, overrides)


def test_show_refuses_what_train_would(refusal, tiny):
    assert "[model] dim = 0: expected a whole number >= 2" in refusal("show", str(tiny), "--model.dim", "0")
    message = refusal("show", "smal")
    assert f"smal: no such file, nor a shipped configuration ({', '.join(shipped_configs())})" in message


def test_cp_writes_a_copy_that_keeps_the_comments(output, tmp_path):
    target = tmp_path / "mine.toml"
    assert f"./run_train.sh {target}" in output("cp", "small", str(target))
    assert target.read_text() == shipped_configs()["small"].read_text()
    folder = tmp_path / "folder"
    folder.mkdir()
    output("cp", str(target), str(folder))
    assert (folder / "mine.toml").read_text() == target.read_text()


def test_cp_never_overwrites(refusal, tmp_path):
    target = tmp_path / "mine.toml"
    target.write_text("precious")
    assert f"{target} exists; choose another name or remove it" in refusal("cp", "small", str(target))
    assert target.read_text() == "precious"
    (tmp_path / "small.toml").write_text("precious")
    assert "small.toml exists" in refusal("cp", "small", str(tmp_path))
    (tmp_path / "link.toml").symlink_to(tmp_path / "nowhere.toml")
    assert "link.toml exists" in refusal("cp", "small", str(tmp_path / "link.toml"))
    assert not (tmp_path / "nowhere.toml").exists()


def test_cp_to_a_folder_that_is_not_there(refusal, tmp_path):
    message = refusal("cp", "small", str(tmp_path / "no" / "mine.toml"))
    assert "cannot be written (No such file or directory)" in message


def test_an_unknown_name_lists_those_there_are(refusal, tmp_path):
    assert f"({', '.join(shipped_configs())})" in refusal("cp", "tiny", str(tmp_path / "x.toml"))
    assert not (tmp_path / "x.toml").exists()


def stated_processes(path: Path) -> int:
    """The number of GPUs in a configuration's first line; one process if it names none."""
    found = re.search(r"\b(\d+) GPUs", path.read_text().splitlines()[0])
    return int(found[1]) if found else 1


@pytest.mark.parametrize("name", shipped_configs())
def test_a_shipped_configuration_fits_the_gpus_that_it_names(name):
    path = shipped_configs()[name]
    config = load_config(path)
    degrees = fit_degrees(config.parallel, stated_processes(path))
    assert config.training.global_batch_size % (degrees.data * config.training.local_batch_size) == 0
    assert config.data.streams % degrees.data == 0, "ranks with fewer streams than others would wait"


def test_the_configurations_for_several_gpus_are_for_as_many_and_differ_in_what_they_share():
    shipped = shipped_configs()
    fitted = {
        name: (stated_processes(path), str(fit_degrees(load_config(path).parallel, stated_processes(path))))
        for name, path in shipped.items()
    }
    assert {name: value for name, value in fitted.items() if value[0] > 1} == {
        "ddp": (8, "dp_replicate 8"),
        "fsdp_node": (8, "dp_shard 8"),
        "hsdp_4_nodes": (32, "dp_replicate 4 x dp_shard 8"),
        "tp_fsdp_xl": (32, "dp_shard 4 x tensor 8"),
        "long_context": (8, "context 8"),
        "pipeline": (32, "pipeline 4 x dp_shard 8"),
    }
