"""`generate` on a real checkpoint of a run of three steps."""

import base64
import json
import shutil
from pathlib import Path

import pytest
import torch

from swamla_titan.checkpoint.manifest import commit
from swamla_titan.cli import main
from swamla_titan.data.tokenizer import ByteTokenizer
from swamla_titan.errors import UserError
from swamla_titan.escaping import several_lines
from swamla_titan.tools import generate as generate_module
from swamla_titan.tools.generate import Continuation, read_prompts
from tests.tiny_config import tiny_config
from tests.train.runs import checkpoint, snapshot, train

LINE = "-" * 40 + "\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dump folder of a finished run, with the checkpoints of steps 2 and 3.

    The third step moves each weight, of about 0.02, by about as much: step 2 draws bytes of all values, step 3 those of
    the text alone, whatever the roundings.
    """
    return run_of(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def selective(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with selective attention."""
    return run_of(tmp_path_factory.mktemp("selective"), "--model.mla_selective", "true")


def run_of(folder: Path, *model: str) -> Path:
    config = tiny_config(folder)
    settings = (
        "--training.steps",
        "3",
        "--optimizer.lr",
        "0.03",
        "--checkpoint.interval",
        "2",
        "--checkpoint.keep_latest",
        "0",
    )
    assert train(config, *settings, *model, "--data.num_workers", "0", "--validation.interval", "0") == 0
    return folder / "run"


@pytest.fixture
def generate(capsys: pytest.CaptureFixture[str]):
    def run(folder: Path, *arguments: str) -> str:
        """What the command prints."""
        capsys.readouterr()
        assert main(["generate", str(folder), *arguments]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]):
    def run(folder: Path, *arguments: str) -> str:
        """The one message of a command that is refused; it prints nothing else."""
        capsys.readouterr()
        assert main(["generate", str(folder), *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("error: ") == 1
        return captured.err

    return run


def test_a_dump_folder_stands_for_its_newest_checkpoint(trained, generate):
    arguments = ("--prompt", "The", "--max-new-tokens", "30", "--temperature", "2")
    text = generate(trained, *arguments)
    assert text.startswith("The")
    assert len(text) > len("The\n")
    assert generate(checkpoint(trained, 3), *arguments) == text
    assert generate(checkpoint(trained, 2), *arguments) != text


def test_a_budget_of_memory_wants_layers_that_drop_tokens(trained, selective, generate, refusal):
    arguments = ("--prompt", "The", "--max-new-tokens", "40", "--temperature", "1.5")
    why = refusal(trained, *arguments, "--memory-budget", "8")
    assert "memory_budget = 8: no layer drops tokens without model.mla_selective" in why
    assert "memory_budget = 2: expected >= 3" in refusal(selective, *arguments, "--memory-budget", "2")
    of_all = generate(selective, *arguments)
    assert generate(selective, *arguments, "--memory-budget", "42") == of_all  # the last token is never read
    assert generate(selective, *arguments, "--memory-budget", "3") != of_all


def test_the_average_of_the_weights_writes_in_their_place(trained, tmp_path, generate, refusal):
    """Of learning rate 0 it is the same as the weights; else it is not.

    A step of 0.1 is five times a weight: the average of six such steps writes another letter in one place of six.
    """
    arguments = ("--prompt", "The", "--max-new-tokens", "60", "--temperature", "1")
    config = tiny_config(tmp_path)
    settings = ("--training.steps", "6", "--data.num_workers", "0", "--validation.interval", "0", "--ema.decay", "0.9")
    for lr in ("0", "0.1"):
        folder = tmp_path / lr
        settings_of_lr = ("--lr_schedule.warmup_steps", "0", "--optimizer.lr", lr, "--job.dump_folder", str(folder))
        assert train(config, *settings, *settings_of_lr) == 0
        is_same = generate(folder, *arguments) == generate(folder, *arguments, "--ema")
        assert is_same == (lr == "0")
    assert "holds no average of the weights: it was trained with ema.decay = 0" in refusal(trained, "--ema")


def test_a_seed_gives_its_text_again_and_another_seed_another(trained, generate):
    texts = [generate(trained, "--max-new-tokens", "30", "--seed", seed) for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_prompts_of_a_batch_are_continued_as_they_are_alone(trained, generate):
    prompts = ["The import statement", "A", "", "Two\nlines of naïve text"]
    arguments = ("--max-new-tokens", "20", "--temperature", "0", "--prompt")
    alone = [generate(trained, *arguments, prompt) for prompt in prompts]
    assert len(set(alone)) == len(prompts)
    assert generate(trained, *arguments, *prompts) == "".join(text + LINE for text in alone)


def test_no_more_than_max_new_tokens_and_fewer_are_a_beginning_of_more(trained, generate, monkeypatch):
    """A token is shown as a character, which a byte of a longer one is not by itself."""
    monkeypatch.setattr(ByteTokenizer, "token_bytes", lambda _, token: chr(0x4E00 + token).encode())
    few, more = (
        generate(trained, "--temperature", "0", "--prompt", "Some", "--max-new-tokens", n).removesuffix("\n")
        for n in ("7", "20")
    )
    assert len(few) == len("Some") + 7
    assert len(more) == len("Some") + 20
    assert more.startswith(few)


def test_the_last_length_that_fits(trained, generate, refusal):
    """The last new token is printed and never read, so it may stand behind max_seq_len."""
    room = 512 - len("Some") + 1
    assert generate(trained, "--prompt", "Some", "--max-new-tokens", str(room))
    message = refusal(trained, "--prompt", "Some", "--max-new-tokens", str(room + 1))
    assert "prompt 0 has 4 tokens, which with max_new_tokens = 510 exceeds max_seq_len = 512" in message
    longest = "x" * 512
    assert len(generate(trained, "--prompt", longest, "--max-new-tokens", "1", "--temperature", "0")) == 514
    assert generate(trained, "--prompt", longest, "a", "--max-new-tokens", "1").count(LINE) == 2
    assert "prompt 0 has 512 tokens" in refusal(trained, "--prompt", longest, "--max-new-tokens", "2")
    assert "prompt 1 has 513 tokens" in refusal(trained, "--prompt", "a", longest + "x", "--max-new-tokens", "1")


@pytest.mark.parametrize(
    "arguments, part",
    [
        (("--max-new-tokens", "0"), "max_new_tokens = 0: expected >= 1"),
        (("--prompt", "x" * 600), "prompt 0 has 600 tokens"),
        (("--temperature", "-1"), "temperature = -1.0: expected >= 0"),
        (("--top-k", "-1"), "top_k = -1: expected >= 0"),
        (("--top-p", "0"), "top_p = 0.0: expected > 0 and <= 1"),
        (("--prompt",), "prompts: expected at least one"),
        (("--temperature", "nan"), "temperature = nan: expected >= 0"),
        (("--temperature", "inf"), "temperature = inf: expected >= 0"),
        (("--top-p", "nan"), "top_p = nan: expected > 0"),
        (("--top-p", "-inf"), "top_p = -inf: expected > 0"),
        (("--max-new-tokens", "-1"), "max_new_tokens = -1: expected >= 1"),
        (("--max-new-tokens", "9" * 24), "exceeds max_seq_len = 512"),
        (("--seed", "9" * 24), "seed = 999999999999999999999999: expected 0 ... 9223372036854775807"),
        (("--seed", "9" * 4000), f"seed = {'9' * 40}: expected 0 ..."),
        (("--seed", "9223372036854775808"), "seed = 9223372036854775808: expected 0 ..."),
        (("--seed", "-1"), "seed = -1: expected 0 ..."),
    ],
)
def test_values_out_of_range_are_refused(trained, refusal, arguments, part):
    assert part in refusal(trained, *arguments)


@pytest.mark.parametrize("options", [("--seed", "1.5"), ("--seed", ""), ("--top-k", "1e3"), ("--seed", "9" * 5000)])
def test_what_is_no_whole_number_is_refused_by_the_parser(trained, capsys, options):
    with pytest.raises(SystemExit) as ended:
        main(["generate", str(trained), *options])
    assert ended.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_the_largest_values_are_taken(trained, generate):
    huge = ("--seed", "9223372036854775807", "--top-k", "9" * 24, "--temperature", "1e308")
    assert generate(trained, "--max-new-tokens", "3", *huge)


def test_options_are_looked_at_before_the_checkpoint(tmp_path, refusal):
    assert "seed = -1" in refusal(tmp_path / "nowhere", "--seed", "-1")


def test_under_document_mask_an_empty_prompt_is_refused(trained, tmp_path, refusal, generate):
    """End of text at position 0, alone, is not what such a model was trained on."""
    parts, folder = tmp_path / "parts", tmp_path / "masked"
    shutil.copytree(checkpoint(trained, 3), parts)
    config = (parts / "config.toml").read_text()
    (parts / "config.toml").write_text(config.replace("document_mask = false", "document_mask = true"))
    (parts / "manifest.json").unlink()
    commit(parts, folder, {})
    for prompts in (("",), ("a", "")):
        assert "an empty prompt: this model was trained with data.document_mask = true" in refusal(
            folder, "--prompt", *prompts
        )
    assert generate(folder, "--prompt", "a").startswith("a")


def test_what_would_drive_a_terminal_is_printed_escaped(trained, generate):
    text = generate(trained, "--prompt", "a\x1b]0;title\x07b\tc\nd\x9b", "--max-new-tokens", "1", "--temperature", "0")
    assert text.startswith("a\\x1b]0;title\\x07b\tc\nd\\x9b")


def test_a_prompt_is_read_as_utf_8_under_every_locale(trained, generate):
    escaped = "caf\udcc3\udca9"  # the bytes of an argument as Python gives them where the locale has no UTF-8
    assert generate(trained, "--prompt", escaped, "--max-new-tokens", "1").startswith("café")


def test_sampling_options_reach_the_sampler(trained, generate):
    greedy = generate(trained, "--max-new-tokens", "20", "--temperature", "0")
    for narrow in (("--top-k", "1"), ("--top-p", "1e-6"), ("--temperature", "1e-6")):
        assert generate(trained, "--max-new-tokens", "20", *narrow) == greedy
    assert generate(trained, "--max-new-tokens", "20", "--temperature", "5") != greedy


def test_a_damaged_checkpoint_is_refused_where_it_was_asked_for_by_name(trained, tmp_path, generate, refusal):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    data = next(checkpoint(run, 3).glob("*.distcp"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    before = snapshot(run)
    assert f"{data.name} has changed since it was written" in refusal(checkpoint(run, 3))
    # The newest whole one of a run is another.
    assert generate(run, "--temperature", "2") == generate(checkpoint(run, 2), "--temperature", "2")
    (checkpoint(run, 2) / "manifest.json").unlink()
    assert "manifest.json is missing: the checkpoint was not finished" in refusal(checkpoint(run, 2))
    assert "no intact checkpoint" in refusal(run)
    (checkpoint(run, 2) / "manifest.json").write_text(before["checkpoints/step-00000002/manifest.json"].decode())
    assert snapshot(run) == before


def test_what_is_no_checkpoint_is_refused(tmp_path, refusal):
    for path in (tmp_path, tmp_path / "nowhere"):
        assert f"{path}: neither a checkpoint nor the dump folder of a run that has one" in refusal(path)


def test_keys_of_the_configuration_are_refused(trained, refusal):
    assert "--model.dim: this command takes no configuration keys" in refusal(trained, "--model.dim", "3")


def test_a_checkpoint_brings_the_vocabulary_that_lay_in_a_file(tiny, generate, tmp_path, monkeypatch):
    vocabulary = tmp_path / "mine.tiktoken"
    ranks = [bytes([i]) for i in range(256)] + [b"th", b"the"]
    vocabulary.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks)))
    monkeypatch.chdir(tmp_path)
    assert train(tiny, "--data.tokenizer", "./mine.tiktoken", "--training.steps", "1") == 0
    vocabulary.unlink()
    moved = tmp_path / "elsewhere"
    shutil.copytree(checkpoint(tmp_path / "run", 1), moved)
    monkeypatch.chdir("/")
    assert generate(moved, "--prompt", "the", "--max-new-tokens", "3").startswith("the")


def continuation(pieces: list[bytes], *stop: str) -> Continuation:
    """Of tokens that stand for these bytes."""
    tokenizer = ByteTokenizer()
    tokenizer.token_bytes = pieces.__getitem__
    return Continuation(tokenizer, stop)


def test_a_character_is_given_when_its_last_byte_has_come():
    growing = continuation([b"a\xe2", b"\x82", b"\xac!", b"\xff", b"\xf0\x9f"])
    texts = []
    for token in range(5):
        assert not growing.add(token)
        texts.append(growing.text)
    growing.finish()
    assert [*texts, growing.text] == ["a", "a", "a€!", "a€!�", "a€!�", "a€!��"]


def test_a_continuation_ends_before_the_first_stop_string_and_shows_nothing_of_it():
    growing = continuation([b"one\n", b"\nt", b"wo END"], "END", "\n\n")
    assert [growing.add(0), growing.text] == [False, "one"]
    assert [growing.add(1), growing.text] == [True, "one"]
    growing.finish()
    assert growing.text == "one"
    growing = continuation([b"an E", b"Nd", b" EN"], "END")
    assert not any(growing.add(token) for token in range(3))
    assert growing.text == "an ENd "
    growing.finish()
    assert growing.text == "an ENd EN"


def test_a_file_of_prompts_is_answered_line_by_line(trained, generate, refusal, tmp_path):
    """In the order of the file, whatever the batches, with what stood beside the prompts; each as it is alone."""
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    texts = ["The", "A much longer text of a few words", "Naïve", "of"]
    records = [{"prompt": texts[0], "id": 7}, texts[1], {"id": "x", "prompt": texts[2]}, texts[3]]
    prompts.write_text("\n".join(map(json.dumps, records)) + "\n\n", encoding="utf-8")
    arguments = ("--max-new-tokens", "9", "--temperature", "0")
    assert generate(trained, "--prompts", str(prompts), "--output", str(out), "--batch-size", "3", *arguments) == ""
    given = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [each.get("id") for each in given] == [7, None, "x", None]
    for text, each in zip(texts, given):
        alone = generate(trained, "--prompt", text, *arguments)
        assert several_lines(text + each["text"]) + "\n" == alone
        assert each["prompt"] == text
        assert each["tokens"] == 9 if each["ended"] == "length" else each["ended"] == "eot"
    stop = next(each["text"][2] for each in given if len(each["text"]) > 2)
    again = tmp_path / "again.jsonl"
    generate(trained, "--prompts", str(prompts), "--output", str(again), "--stop", stop, *arguments)
    for full, cut in zip(given, map(json.loads, again.read_text(encoding="utf-8").splitlines())):
        assert cut["text"] == full["text"].partition(stop)[0]
        assert (cut["ended"] == "stop") == (stop in full["text"])
    generate(trained, "--prompts", str(prompts), "--output", str(again), *arguments)
    assert again.read_text(encoding="utf-8") == out.read_text(encoding="utf-8"), "an older file is replaced"
    assert "is no file" in refusal(trained, "--output", str(tmp_path))
    assert "cannot be written (File name too long)" in refusal(trained, "--output", str(tmp_path / ("x" * 250)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.jsonl", "out.jsonl", "prompts.jsonl"]


@pytest.mark.parametrize(
    "content, problem",
    [
        (b'{"prompt": "a"}\n{"prompt": ', "line 2: no JSON"),
        (b'{"prompt": "a"}\n{"text": "b"}', 'line 2: expected a string, or an object with a string "prompt"'),
        (b'"a"\n\xff', "line 2: no JSON in UTF-8"),
        (b"\n \n", "no prompts"),
        (b"[" * 100_000, "line 1: no JSON"),
    ],
)
def test_a_file_of_prompts_that_cannot_be_read_is_refused_with_its_line(content, problem, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=problem):
        read_prompts(str(path))
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(str(tmp_path / "none.txt"))


def test_a_text_file_has_a_prompt_in_each_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffZwölf\r\n\n{not JSON}\n".encode())
    assert read_prompts(str(path)) == [{"prompt": "Zwölf"}, {"prompt": "{not JSON}"}]


def test_a_conversation_continues_each_line_and_goes_on_after_an_error(trained, generate, monkeypatch, capsys):
    lines = iter(["The", "", "x" * 600, "of"])

    def typed(prompt):
        print(prompt, end="")
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    arguments = ("--max-new-tokens", "9", "--temperature", "0")
    alone = [generate(trained, "--prompt", text, *arguments) for text in ("The", "of")]
    capsys.readouterr()
    assert main(["generate", str(trained), "--interactive", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"> {alone[0]}> > > {alone[1]}> \n"
    assert "error: prompt 0 has 600 tokens" in captured.err


def test_options_that_contradict_each_other_are_refused(trained, refusal, tmp_path):
    assert "leave out" in refusal(trained, "--interactive", "--prompt", "a")
    assert "not both" in refusal(trained, "--prompts", "file", "--prompt", "a")
    assert "batch_size = 0" in refusal(trained, "--batch-size", "0")
    assert "stop: an empty string" in refusal(trained, "--stop", "")
    assert "there is no folder" in refusal(trained, "--output", str(tmp_path / "no" / "file"))


def test_dtype_is_that_of_the_weights(trained, generate, monkeypatch):
    seen = []
    stream = generate_module.stream
    monkeypatch.setattr(generate_module, "stream", lambda model, *a, **k: seen.append(model) or stream(model, *a, **k))
    for dtype in ("bfloat16", "float32"):
        generate(trained, "--max-new-tokens", "3", "--dtype", dtype)
    generate(trained, "--max-new-tokens", "3")
    assert [model.activation_dtype for model in seen] == [torch.bfloat16, torch.float32, torch.float32]
