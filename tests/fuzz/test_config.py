"""Configurations and command lines made wrong at random; tests/fuzz/harness.py says what is asked and how to go on.

A case takes the text of a shipped configuration, or one with every key, changes it in a few places, or takes something
else for a file, adds wrong overrides, and gives it to `config show`, `plan`, `train --dry-run` or `check`.
"""

import os
import random
import re
import socket
from collections.abc import Callable
from pathlib import Path

from swamla_titan.config import load_config, shipped_configs, to_toml
from swamla_titan.config.load import READY_MADE, SECTIONS
from swamla_titan.fields import settings
from tests.fuzz.harness import Bench, Case, fuzz
from tests.tiny_config import TINY

KEYS = [(section, key) for section, cls in SECTIONS.items() for key in settings(cls)]
KEYS += [(section, key) for section, (key, _) in READY_MADE.items()]
# Not by the network; what a case overrides comes after these.
AT_HAND = ("--data.source=builtin", "--data.path=", "--data.name=", "--data.tokenizer=byte")
FROM_AFAR = ("--data.retry_seconds=0",)

NUMBERS = [
    *("0", "-0", "1", "2", "3", "-1", "-2", "7", "64", "1000", "0x10", "0o17", "0b11", "1_000", "+5", "01", "1__0"),
    *(str(2**power + off) for power in (8, 16, 31, 32, 53, 62, 63, 64, 128) for off in (-1, 0, 1)),
    *("1000000000000", "-1000000000000", "-9223372036854775809", "1" * 40, "9" * 309, "-" + "9" * 309, "1" * 4301),
    *(
        "1e3",
        "0.5",
        "-0.0",
        "1e-320",
        "1e308",
        "1e309",
        "-1e309",
        "5e-324",
        "0.1e-400",
        "1.",
        ".5",
        "inf",
        "-inf",
        "nan",
    ),
    *("0.9999999999999999", "1.0000000000000002", "1" * 400 + ".5", "1e" + "9" * 30),
]
STRINGS = [
    *(
        "",
        " ",
        ".",
        "..",
        "/",
        "~",
        "~/x",
        "~nobody/x",
        "~root",
        "$HOME/x",
        "%s%n",
        "{0}",
        "a/b",
        "a/../b",
        "../../x",
        "x/",
    ),
    *(
        "/dev/null",
        "/dev/full",
        "/dev/zero",
        "/dev/tty",
        "/proc/self/mem",
        "/proc/1/environ",
        "/nowhere/x",
        "work",
        "-1",
    ),
    *(
        "a" * 256,
        "a/" * 3000,
        "a" * 100_000,
        "\0",
        "a\0b",
        "\x1b[2J",
        "\u202e",
        "\ufeff",
        "ü",
        "日本",
        "🙂" * 80,
        "\ud7ff",
    ),
    *(
        "true",
        "null",
        "auto",
        "fsdp",
        "adamw",
        "muon",
        "lion",
        "byte",
        "gpt2",
        "local",
        "huggingface",
        "builtin",
        "native",
    ),
    *(
        "*",
        "[",
        "blocks.*",
        "\n",
        "\r\n",
        "\t",
        '"',
        "'",
        "\\",
        "#",
        "=",
        ",",
        "model,data",
        "C:\\x",
        "file:///x",
        "http://x/y",
    ),
]
OTHERS = [
    *("true", "false", "True", "[]", "{}", "[1, 2]", "[[[]]]", '["a"]', "{a = 1}", '{"*" = 1e400}', '{"*" = true}'),
    *(
        "1979-05-27",
        "07:32:00",
        "1979-05-27T07:32:00Z",
        "{a.b.c = 1}",
        "[" * 5000 + "]" * 5000,
        "{a=" * 3000 + "1" + "}" * 3000,
    ),
    *(
        "[1,",
        "{",
        '"',
        "'''",
        '"""x',
        "#",
        "",
        "=",
        "0x",
        "1e",
        "--1",
        '{"blocks.*" = 2}',
        "[" * 400,
        '"\\u0000"',
        '"\\ud800"',
    ),
]


def quoted(text: str) -> str:
    """As a TOML string."""
    return '"' + "".join(f"\\u{ord(c):04x}" if ord(c) < 32 or c in '"\\\x7f' else c for c in text) + '"'


def a_value(rng: random.Random) -> str:
    """Of any type, as TOML text, which need not be any."""
    return rng.choice([lambda: rng.choice(NUMBERS), lambda: quoted(rng.choice(STRINGS)), lambda: rng.choice(OTHERS)])()


def a_value_of(section: str, key: str, rng: random.Random) -> str:
    """As a rule one that the key alone allows, often at the edge."""
    field = settings(SECTIONS[section]).get(key)
    if field is None or rng.random() < 0.3:
        return a_value(rng)
    if field.choices:
        return quoted(rng.choice(field.choices))
    if isinstance(field.default, bool):
        return rng.choice(["true", "false"])
    if isinstance(field.default, (int, float)):
        edges = [each for each in (field.minimum, field.maximum, field.above, field.below) if each is not None]
        value = rng.choice([*edges, field.default, 2 * field.default, field.default / 2, 3, 64])
        return str(int(value)) if isinstance(field.default, int) else str(float(value))
    return a_value(rng)


# Changes of a text. Each takes and gives the whole.


def change_a_value(text: str, rng: random.Random) -> str:
    found = list(re.finditer(r"^((\w+) *= *)([^\n#]+)", text, re.MULTILINE))
    if not found:
        return text
    one = rng.choice(found)
    sections = [section for section, key in KEYS if key == one[2]]
    value = a_value_of(sections[0], one[2], rng) if sections else a_value(rng)
    return text[: one.start(3)] + value + text[one.end(3) :]


def add_a_key(text: str, rng: random.Random) -> str:
    section, key = rng.choice(KEYS)
    line = f"{key} = {a_value_of(section, key, rng)}\n"
    header = f"[{section}]\n"
    text = re.sub(rf"^(\[{section}\]\n(?:[^\[\n].*\n)*?){key} *=.*\n", r"\1", text, count=1, flags=re.MULTILINE)
    return text.replace(header, header + line, 1) if header in text else f"{text}\n{header}{line}"


def add_unknown_keys(text: str, rng: random.Random) -> str:
    names = [f"{rng.choice(KEYS)[1]}{i}" for i in range(rng.choice([1, 3, 30, 3000, 30_000]))]
    lines = "".join(f"{name} = {rng.choice(['1', quoted('a' * 50)])}\n" for name in names)
    return rng.choice([f"{lines}{text}", f"{text}\n[{rng.choice(['model', 'nosuch', 'optim', 'data.x'])}]\n{lines}"])


def add_structure(text: str, rng: random.Random) -> str:
    section, key = rng.choice(KEYS)
    depth = rng.choice([2, 10, 500, 20_000])
    return text + rng.choice(
        [
            f"\n[{section}]\n[{section}]\n",
            f"\n[[{section}]]\n{key} = 1\n",
            f"\n[{section}.{key}]\nx = 1\n",
            f"\n[{'.'.join('a' * depth)}]\nx = 1\n",
            f"\n{'.'.join('b' * depth)} = 1\n",
            f"\n{section} = 3\n",
            f"\n{section}.{key} = 3\n",
            f"\n[{quoted(rng.choice(STRINGS))}]\nx = 1\n",
            f"\n[{section}]\n{quoted(rng.choice(STRINGS))} = 1\n",
            f"\n[{section}]\n{key} = {'[' * depth}{']' * depth}\n",
            f"\n[optimizer.lr_multipliers]\n{quoted(rng.choice(STRINGS))} = {rng.choice(NUMBERS)}\n",
        ]
    )


def shuffle_lines(text: str, rng: random.Random) -> str:
    lines = text.splitlines(keepends=True)
    for _ in range(rng.randint(1, 5)):
        at, other = rng.randrange(len(lines) + 1), rng.randrange(len(lines) + 1)
        lines.insert(at, lines[other - 1] if lines else "x")
        if rng.random() < 0.5:
            lines.pop(rng.randrange(len(lines)))
    return "".join(lines)


def change_bytes(content: bytes, rng: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(5)
        if kind == 0:
            data[at:at] = rng.randbytes(rng.choice([1, 2, 40]))
        elif kind == 1:
            del data[at : at + rng.choice([1, 5, 200])]
        elif kind == 2 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 3:
            data[at:at] = rng.choice(
                [b"\0", b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\r", b"\r\n", b"\xef\xbb\xbf", b"[", b"'''"]
            )
        else:
            data[at:at] = data[: rng.choice([10, 300])]
    return bytes(data)


def encode(text: str, rng: random.Random) -> bytes:
    usual = text.encode(errors="surrogatepass")
    return rng.choice(
        [
            *[lambda: usual] * 24,
            lambda: change_bytes(usual, rng),
            lambda: b"\xef\xbb\xbf" + usual,
            lambda: usual.replace(b"\n", b"\r\n"),
            lambda: text.encode("utf-16", errors="replace"),
            lambda: text.encode("utf-16-le", errors="replace"),
            lambda: text.encode("utf-32", errors="replace"),
            lambda: text.encode("latin-1", errors="replace"),
            lambda: usual[: rng.randrange(len(usual) + 1)],
        ]
    )()


CHANGES: list[Callable[[str, random.Random], str]] = [
    *[change_a_value] * 6,
    *[add_a_key] * 6,
    add_unknown_keys,
    add_structure,
    shuffle_lines,
]


def something_else(path: Path, rng: random.Random) -> str:
    """What stands where a file is asked for; the name to give."""
    kind = rng.randrange(12)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.symlink_to(path.name)
    elif kind == 3:
        path.symlink_to("/dev/zero")
    elif kind == 4:
        with socket.socket(socket.AF_UNIX) as made:
            here = Path.cwd()
            os.chdir(path.parent)  # names of sockets are short
            made.bind(path.name)
            os.chdir(here)
    elif kind == 5:
        path.touch()
    elif kind == 6:
        with path.open("wb") as file:
            file.truncate(1 << 30)
    elif kind == 7:
        path.write_text("x = 1\n")
        path.chmod(0)
    elif kind == 8:
        return rng.choice(
            ["n" * 300, "n/" * 3000, "x\udcff.toml", "", ".", "/", "~", "-", "/dev/stdin", "/dev/tty", "/dev/zero"]
        )
    elif kind == 9:
        return rng.choice([*shipped_configs(), "debgu", "../debug", "debug.toml/x"])
    elif kind == 10:
        path.symlink_to("/proc/self/mem")
    else:
        path.write_bytes(rng.randbytes(rng.choice([1, 100, 100_000])))
    return path.name


def an_override(rng: random.Random) -> list[str]:
    section, key = rng.choice(KEYS)
    wild = [a_value(rng), rng.choice(STRINGS), rng.choice(NUMBERS)]
    text = rng.choice([*wild, *[a_value_of(section, key, rng).strip('"') for _ in range(4)]]).replace("\0", "")
    name = rng.choice(
        [f"--{section}.{key}"] * 24
        + [f"--{key}.{section}", f"--{section}.", f"--{section}.{key}.x", f"--{section}.{key}x"]
    )
    return rng.choice([[name, text], [f"{name}={text}"], [f"{name}={text}"], [name]])


def base_text(rng: random.Random) -> str:
    tiny = TINY.format(folder=".")
    return rng.choice([tiny, tiny, EVERY_KEY, rng.choice(list(shipped_configs().values())).read_text()])


EVERY_KEY = to_toml(load_config(shipped_configs()["debug"]), comments=True)


def make_case(rng: random.Random, folder: Path) -> Case:
    path = folder / "work" / "run.toml"
    name = path.name
    if rng.random() < 0.06:
        name = something_else(path, rng)
    else:
        text = base_text(rng)
        for _ in range(rng.choice([0, 1, 1, 1, 1, 2])):
            text = rng.choice(CHANGES)(text, rng)
        path.write_bytes(encode(text, rng))
    overrides = [part for _ in range(rng.choice([0, 0, 0, 1, 1, 3])) for part in an_override(rng)]
    at_hand = AT_HAND if rng.random() < 0.9 else FROM_AFAR
    command = rng.choice([["config", "show"]] * 8 + [["plan"]] * 5 + [["train", "--dry-run"]] * 5 + [["check"]])
    ranks = rng.choice([[], [], ["--gpus", rng.choice(["1", "8", "0", "-1", "1e3", "4096", *NUMBERS])]])
    if command[0] in ("config", "check"):
        ranks = []
    return Case([*command, name, *at_hand, *overrides, *ranks])


def test_a_configuration_however_wrong_is_handled(bench: Bench):
    fuzz(bench, "config", make_case)
