"""[[data.sources]]: names, weights that add up to 1, keys that default to those of [data], overrides of a table."""

from pathlib import Path

import pytest

from swamla_titan.cli import main
from swamla_titan.config import load_config, split_overrides, to_toml
from swamla_titan.config.mixture import data_of_sources, weights_of, weights_problem
from swamla_titan.errors import UserError

WEB = '[[data.sources]]\nname = "web"\npath = "web"\nweight = 0.7\ntext_key = "content"\n'
DOCS = '[[data.sources]]\nname = "docs"\nsource = "builtin"\nweight = 0.3\n'


def write(path: Path, tables: str = WEB + DOCS, data: str = "") -> Path:
    path.write_text(f'[data]\nsource = "local"\ntext_key = "body"\n{data}{tables}')
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "run.toml")


def refusal(path: Path, *arguments: str) -> list[str]:
    overrides, rest = split_overrides(arguments)
    assert not rest
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return [line.strip() for line in str(caught.value).splitlines()][1:]


def test_keys_of_a_source_replace_those_of_data(path: Path):
    config = load_config(write(path, WEB + DOCS + '[[data.sources]]\nname = "b"\npath = "b"\nweight = 0\n'))
    found = data_of_sources(config.data)
    assert list(found) == ["b", "docs", "web"]
    assert [(each.source, each.path, each.text_key) for each in found.values()] == [
        ("local", "b", "body"),
        ("builtin", "", "body"),
        ("local", "web", "content"),
    ]
    assert all(each.sources == () for each in found.values())
    assert weights_of(config.data) == {"b": 0.0, "docs": 0.3, "web": 0.7}
    plain = load_config(path, split_overrides(["--data.sources", "[]", "--data.path", "x"])[0])
    assert data_of_sources(plain.data) == {"": plain.data}


def test_what_is_written_loads_to_the_same(path: Path, tmp_path: Path):
    config = load_config(path)
    for comments in (True, False):
        again = tmp_path / "again.toml"
        again.write_text(to_toml(config, comments))
        assert load_config(again, warn=pytest.fail) == config
    assert main(["config", "show", str(path)]) == 0


def test_the_command_line_replaces_keys_of_a_table(path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["--data.sources.web.weight", "0.25", "--data.sources.docs.weight=0.75", "--data.sources.web.path", "w"]
    config = load_config(path, split_overrides(arguments)[0])
    assert [(each.name, each.weight, each.path) for each in config.data.sources] == [
        ("web", 0.25, "w"),
        ("docs", 0.75, ""),
    ]
    assert main(["config", "show", str(path), *arguments]) == 0
    assert '{name = "web", weight = 0.25, path = "w", text_key = "content"},' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "--data.sources.NAME.key value" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "arguments, part",
    [
        ("--data.sources.wbe.weight 0.3", "no such table; did you mean `web`?; [[data.sources]]: web, docs"),
        (
            "--data.sources.web.wieght 0.3",
            "unknown key; did you mean `weight`?; keys of [[data.sources]]: name, weight",
        ),
        ("--data.sources.web.weight much", 'number 1: weight = "much": expected a number >= 0 and <= 1'),
        ("--data.sources.web.weight 0.5", "the weights add up to 0.8, not to 1; in the same proportions they would be"),
        ("--data.path corpus", '[data] path: "corpus" stands beside [[data.sources]]: give each of these its own path'),
        ("--data.sources.docs.name web", '2 sources are called "web": names must differ'),
        ("--data.sources.web.name a/b", '"a/b" is no name of a source: it consists of letters, digits, _ and -'),
        ("--data.sources.web.name b.c", '"b.c" is no name of a source'),
        ("--data.sources.web.source lokal", 'web: source: "lokal": expected one of "builtin", "local"'),
        ("--data.sources.docs.path x", 'docs: path: "x" has no effect with data.source = "builtin"'),
        ("--data.sources.web.split x", 'web: split: "x" has no effect with data.source = "local"'),
        (
            "--data.sources.docs.source huggingface",
            'docs: path: data.source = "huggingface" needs the name of a dataset',
        ),
    ],
)
def test_what_is_wrong_with_a_table_is_refused(path: Path, arguments: str, part: str):
    lines = refusal(path, *arguments.split())
    assert any(part in line for line in lines), lines


def test_all_errors_of_a_file_are_reported_together_with_exit_code_2(path: Path, capsys: pytest.CaptureFixture[str]):
    write(path, WEB.replace("0.7", "0.6") + DOCS.replace("docs", "web") + "[training]\nseqlen = 3\n", 'path = "x"\n')
    assert main(["train", str(path)]) == 2
    text = capsys.readouterr().err
    assert "4 errors in the configuration" in text
    for part in ("add up to 0.9", "2 sources are called", "stands beside", "unknown key; did you mean `seq_len`?"):
        assert part in text
    write(path, WEB + DOCS + '[[data.sources]]\npath = "x"\ncolour = 1\nweight = -1\n')
    lines = refusal(path)
    for part in ("number 3: name is missing", "number 3: colour = 1: unknown key", "number 3: weight = -1: expected"):
        assert any(part in line for line in lines), lines


def test_a_key_of_data_that_every_source_replaces_is_refused(path: Path):
    write(path, WEB + '[[data.sources]]\nname = "b"\npath = "b"\nweight = 0.3\ntext_key = "text"\n')
    assert refusal(path) == [
        '[data] text_key: "body" has no effect, because every [[data.sources]] has its own: leave it out'
    ]


@pytest.mark.parametrize(
    "weights, problem",
    [
        ([0.1] * 10, None),
        ([1.0], None),
        ([0.333333, 0.333333, 0.333334], None),
        ([0.5, 0.5, 0.0], None),
        ([0.3333333, 0.6666667], "the weight 0.3333333 of s0 has more than 6 digits behind the point: round it"),
        ([0.0, 0.0], "all weights are 0"),
        ([0.5, 0.6], "add up to 1.1, not to 1; in the same proportions they would be s0 = 0.4545, s1 = 0.5455"),
        ([0.2, 0.2, 0.2], "s0 = 0.3334, s1 = 0.3333, s2 = 0.3333"),
        ([0.4, 0.4, 0.001], "s0 = 0.499376, s1 = 0.499376, s2 = 0.001248"),
        ([0.7, 0.1, 0.1], "add up to 0.9, not to 1; in the same proportions they would be s0 = 0.7778, s1 = 0.1111"),
    ],
)
def test_weights_add_up_to_1_as_decimal_numbers(weights: list[float], problem: str | None):
    found = weights_problem([(f"s{number}", weight) for number, weight in enumerate(weights)])
    assert found is None if problem is None else problem in (found or "")
    if found and "proportions" in found:
        parts = found.partition("would be ")[2].split(", ")
        scaled = [(part.partition(" = ")[0], float(part.partition(" = ")[2])) for part in parts]
        assert weights_problem(scaled) is None
