"""Every number has an upper bound, and what no reader should take in is refused with one message, at once."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from swamla_titan.config import Override, load_config, shipped_configs
from swamla_titan.config.sections import KEYS
from swamla_titan.config.toml import LARGEST_FILE, shown, toml
from swamla_titan.errors import UserError
from swamla_titan.fields import INTEGERS, LONGEST_STRING, TABLE
from swamla_titan.kernels.attention.masks import window_pairs

BUILTIN = 'data.source = "builtin"\n'
NUMBERS = [name for name, setting in KEYS.items() if setting.kind in (int, float, TABLE, INTEGERS)]
STRINGS = [name for name, setting in KEYS.items() if setting.kind is str and not setting.choices]
PATHS = ["job.dump_folder", "data.path", "data.tokenizer", "compile.cache_folder", "validation.path"]
PATHS += ["checkpoint.initial_load"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.toml"


def refusal(path: Path, content: str | bytes | None = None, *overrides: Override) -> str:
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    text = str(caught.value)
    assert len(text) < 6000
    return text


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_an_upper_bound_that_holds_in_a_file_and_on_the_command_line(name: str, path: Path):
    section, _, key = name.rpartition(".")
    setting = KEYS[name]
    kind = setting.kind
    bound = setting.below if setting.maximum is None else setting.maximum
    assert bound is not None
    assert bound <= 1e30
    beyond = [str(2 * int(bound) + 1), "9" * 309, "inf", "nan", "true", '"1"', "[1]", "1979-05-27"]
    beyond += ["1e31"] if kind is not int else []
    form = {TABLE: '{{"*" = {}}}', INTEGERS: "[{}]"}.get(kind, "{}")
    for text in beyond:
        text = form.format(text)
        assert f"[{section}] {key} = " in refusal(path, f"{BUILTIN}{section}.{key} = {text}\n")
    path.write_text(BUILTIN)
    for text in beyond[:4]:
        text = form.format(text)
        assert f"[{section}] {key} = " in refusal(path, None, Override(section, key, text))


@pytest.mark.parametrize("name", STRINGS)
def test_every_string_is_bounded_and_text(name: str, path: Path):
    section, _, key = name.partition(".")
    for value in ("a" * (LONGEST_STRING + 1), "a\0b", "a\x1b[2J", "a\nb", "a\x85"):
        if name == "data.text_separator" and len(value) < 9:
            continue  # what stands between documents may be anything
        assert f"[{section}] {key} = " in refusal(path, f"{BUILTIN}{section}.{key} = {toml(value)}\n")
    path.write_text(BUILTIN)
    assert "UTF-8" in refusal(path, None, Override(section, key, "a\udcffb"))


@pytest.mark.parametrize("name", PATHS)
def test_every_path_is_expanded_and_refused_where_it_can_be_none(name: str, path: Path, monkeypatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    section, _, key = name.partition(".")
    path.write_text(BUILTIN)

    def value(text: str, *more: Override) -> str:
        found: str = getattr(getattr(load_config(path, [Override(section, key, text), *more]), section), key)
        return found

    more = (Override("data", "source", "local"),) if name == "data.path" else ()
    assert value("~/x", *more) == f"{tmp_path}/x"
    assert value("~root/x", *more) == f"{os.path.expanduser('~root')}/x"
    assert value("a~b/~c/", *more) == "a~b/~c/"
    for text, part in (
        ("~nobody-of-this-name/x", "there is no home folder of ~nobody-of-this-name"),
        ("$HOME/x", "write out $HOME"),
        ("a/${HOME}", "write out ${HOME}"),
        ("a/" + "b" * 256, "at most 255 bytes"),
        ("ü" * 128, "at most 255 bytes"),
    ):
        assert part in refusal(path, None, Override(section, key, text), *more), text


@pytest.mark.parametrize("folder", ["", ".", "./", "..", "../..", "/", "//", "a/..", "./a/../.", "/a/.."])
def test_a_run_has_a_folder_of_its_own(folder: str, path: Path):
    path.write_text(BUILTIN)
    assert "give it a folder of its own" in refusal(path, None, Override("job", "dump_folder", folder))


@pytest.mark.parametrize("folder", ["a", "a/", "./a", "../a", "/a", "a/../b", "...", "~x/y"[1:]])
def test_any_other_folder_will_do(folder: str, path: Path):
    path.write_text(BUILTIN)
    assert load_config(path, [Override("job", "dump_folder", folder)]).job.dump_folder == folder


@pytest.mark.parametrize(
    "content, part",
    [
        (BUILTIN.encode("utf-16"), "it is in UTF-16; save it as UTF-8"),
        (BUILTIN.encode("utf-16-le"), "it is in UTF-16; save it as UTF-8"),
        (BUILTIN.encode("utf-16-be"), "it is in UTF-16; save it as UTF-8"),
        (BUILTIN.encode("utf-32-be"), "it is in UTF-32; save it as UTF-8"),
        (b"[data]\nx = 1\0\n", "line 2 has a NUL byte"),
        (b"[data]\n\nx = '\xff'\n", "line 3 is not UTF-8"),
        ("[data]\nx = " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("[data]\nx = " + "{a=" * 5000 + "1" + "}" * 5000, "nested too deeply"),
        ("[data]\nx = " + "1" * 4301, "not a TOML file: Exceeds the limit"),
        ("[" + "a." * 100_000 + "a]", "more than 1000 dots"),
        ("a." * 100_000 + "a = 1", "more than 1000 dots"),
        ("a = 1979-13-45", "not a TOML file"),
        ("x = '" + "a" * LARGEST_FILE + "'", "more than 1024 KiB"),
        ("[model]\nflavor = []\n", "[model] flavor = []: unknown flavor"),
        ("[model]\nflavor = {a = 1}\n", "unknown flavor"),
        ("[model]\nflavor = 'x" + "y" * 9999 + "'\n", "unknown flavor"),
        ("x = '" + "y" * 500_000 + "'\n", "(500000 characters): every key belongs in a section"),
        ("[data]\n" + "z" * 500_000 + " = 1\n", "unknown key"),
        ("[" + "z" * 500_000 + "]\n", "unknown section"),
        ("['\\u001b[2J']\n", "unknown section"),
    ],
    ids=range(20),
)
def test_a_file_that_cannot_be_read_or_should_not_be(content: str | bytes, part: str, path: Path):
    text = refusal(path, content)
    assert str(path) in text
    assert part in text
    assert "\x1b" not in text


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_and_windows_ends_of_lines_are_fine(ends: str, mark: bytes, path: Path):
    path.write_bytes(mark + "[data]\nsource = 'builtin'\n[job]\nseed = 5\n".replace("\n", ends).encode())
    assert load_config(path).job.seed == 5
    path.write_bytes(mark + b"[data]\r\nsource = 'builtin'\n[job]\nseed = 6\r\n")
    assert load_config(path).job.seed == 6


@pytest.mark.parametrize(
    "text",
    [
        "optimizer.lr_multipliers = {'%s' = 1}",
        "checkpoint.allow = '%s'",
        "job.dump_folder = '%s'",
        "lr_schedule.name = '%s'",
    ],
)
def test_a_long_string_that_is_refused_is_not_shown_whole(text: str, path: Path):
    long = "./" * 1500 if "folder" in text else "z" * 3000
    assert len(refusal(path, f"{BUILTIN}{text % long}\n")) < 1000


def test_errors_without_end_are_counted_and_the_first_are_listed(path: Path):
    stray, unknown = ("".join(f"key{i} = 1\n" for i in range(count)) for count in (60_000, 20_000))
    text = refusal(path, f"{stray}[data]\n{unknown}")
    assert text.splitlines()[0].endswith(" errors in the configuration")
    assert len(text.splitlines()) == 22
    assert "... and " in text.splitlines()[-1]


def test_special_files_are_refused_and_not_waited_for(path: Path, tmp_path: Path, monkeypatch):
    assert "Is a directory" in refusal(tmp_path)
    os.mkfifo(path)
    assert "it is a pipe, device or socket, not a file" in refusal(path)
    for device in ("/dev/zero", "/dev/null"):
        assert "it is a pipe, device or socket, not a file" in refusal(Path(device))
    path.unlink()
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("run.toml")
        assert "cannot be read" in refusal(Path("run.toml"))
    path.unlink()
    path.symlink_to(path)
    assert "cannot be read (Too many levels of symbolic links)" in refusal(path)
    with (tmp_path / "sparse.toml").open("wb") as file:
        file.truncate(1 << 40)
    assert "more than 1024 KiB" in refusal(tmp_path / "sparse.toml")
    assert "cannot be read (File name too long)" in refusal(tmp_path / ("n" * 300))
    assert "not a TOML file" in refusal(tmp_path / "a\0b")


@pytest.mark.parametrize(
    "text, part",
    [
        (
            "training.global_batch_size=1048576 training.seq_len=131072 model.max_seq_len=131072",
            "tokens that a step may have",
        ),
        ("model.num_layers=1024 model.dim=131072 model.ffn_hidden_dim=1048576", "140737488355328 parameters"),
        (
            "parallel.dp_shard=1024 parallel.tensor=16 parallel.context=4",
            "dp_shard 1024 x tensor 16 x context 4 are more than 32768 ranks",
        ),
        (
            "parallel.pipeline=4 training.global_batch_size=1000000 training.local_batch_size=1",
            "1000000 micro-batches through 4 stages",
        ),
        ("parallel.pipeline=128 model.num_layers=1024", "1024 layers cannot be cut in 128 stages"),
    ],
)
def test_keys_that_are_too_large_together_are_refused(text: str, part: str, path: Path):
    path.write_text(BUILTIN)
    overrides = [Override(*each.partition("=")[0].split("."), each.partition("=")[2]) for each in text.split()]
    assert part in refusal(path, None, *overrides)


def test_shipped_configurations_keep_to_all_bounds():
    assert all(load_config(path) for path in shipped_configs().values())


def test_what_is_shown_is_short_and_in_one_line():
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    for value in ("a" * 5_000_000, "\n" * 50, deep, list(range(100_000)), 10**5000, {"a": "b" * 9999}, "\udcff"):
        text = shown(value)
        assert len(text) < 320
        assert text.isprintable()


@pytest.mark.parametrize(
    "seq_len, window, sink", [(1, 1, 0), (7, 3, 0), (7, 3, 2), (7, 3, 9), (7, 7, 4), (7, 9, 4), (64, 16, 4)]
)
def test_pairs_are_counted_without_looking_at_each_token(seq_len: int, window: int, sink: int):
    seen = sum(t - s < window or s < sink for t in range(seq_len) for s in range(t + 1))
    assert window_pairs(seq_len, window, sink) == seen
    assert window_pairs(1 << 24, 256, 4) == 256 * 257 // 2 + ((1 << 24) - 256) * 256 + 10 + ((1 << 24) - 256 - 4) * 4
