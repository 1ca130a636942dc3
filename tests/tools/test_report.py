"""The page of `report`: what it says of runs, that it needs nothing but itself, and what it refuses."""

import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from random import Random
from typing import Any

import pytest
from rich.console import Console

from swamla_titan.cli import main
from swamla_titan.tools import report as report_module
from swamla_titan.tools import watch
from swamla_titan.tools.history import History
from swamla_titan.tools.watch import panel
from tests.tools.histories import killed_and_resumed, line, start, write
from tests.train.runs import train

FAST = ("--data.num_workers", "0", "--validation.interval", "2", "--checkpoint.interval", "2")


class Page(HTMLParser):
    """The text of a page, its tables' cells, its attributes, and the data that its script draws."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.content = path.read_text()
        self.rows: list[list[str]] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self._open: list[str] = []
        self.feed(self.content)
        self.data: dict[str, Any] = json.loads(self.content.partition('id="data">')[2].partition("</script>")[0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
        self._open.append(tag)

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1] and {"td", "th"} & set(self._open[-3:]):
            self.rows[-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def row(self, name: str) -> list[str]:
        return next(row[1:] for row in self.rows if row and row[0] == name)


def made(out: Path, *arguments: object) -> Page:
    assert main(["report", *map(str, arguments), "--out", str(out)]) == 0
    return Page(out)


def test_the_page_of_a_run_that_was_killed_and_resumed(tmp_path):
    page = made(tmp_path / "page.html", killed_and_resumed(tmp_path / "run"), "--price", "2.5")
    text = re.sub("<[^>]*>", " ", page.content)
    assert re.search(r"trained on\s+8 x H200, then 7 x H200", text)
    assert re.search(r"steps\s+10 of 10", text)
    assert re.search(r"goodput\s+12\.1%", text)
    assert re.search(r"validation loss, lowest\s+2\.5000 \(step 4\)", text)
    hours = (8 * 40 + 7 * 26) / 3600
    assert re.search(rf"GPU-hours\s+{hours:.2f}", text)
    assert re.search(rf"cost\s+{2.5 * hours:.2f} at 2\.5 per GPU-hour", text)
    assert page.row("between starts") == ["0:00:14", "21.2%"]
    assert page.row("steps that a rewind discarded") == ["0:00:01", "1.5%"]
    for told in ("skipped as bad: step 7", "rewound after step 8 to the weights of step 6", "finished after step 10"):
        assert told in text
    (run,) = page.data["runs"]
    assert run["columns"]["step"] == list(range(1, 11))
    assert run["columns"]["loss"][4] == 2
    assert run["columns"]["val_loss"] == [None] * 3 + [2.5] + [None] * 6
    assert run["restarts"] == [4]
    assert [chart["title"] for chart in page.data["charts"]][:2] == ["Loss", "Bits per byte of held-out text"]
    assert all(chart["title"] and chart["unit"] for chart in page.data["charts"])


def test_it_needs_no_network(tmp_path):
    page = made(tmp_path / "page.html", killed_and_resumed(tmp_path / "run"))
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)|fetch\(|XMLHttp|import\(", page.content)
    assert not [each for each in page.attributes if each[1] in ("src", "href", "srcset", "data", "action")]
    assert len(page.content) < 60_000


def test_runs_are_compared_by_what_differs_in_their_configuration(tiny, tmp_path):
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    for steps in ("2", "4"):
        assert train(tiny, *FAST, "--training.steps", steps, "--job.dump_folder", str(folders[0])) == 0
    shutil.copytree(*folders)
    config = folders[1] / "config.toml"
    config.write_text(config.read_text().replace("lr = 0.0003", "lr = 0.0001"))
    page = made(tmp_path / "page.html", *folders)
    assert page.rows[0] == ["", "a/run", "b/run"]
    assert [row for row in page.rows if re.match(r"[a-z_]+\.[a-z_]+$", row[0])] == [
        ["optimizer.lr", "0.0003", "0.0001"]
    ]
    assert page.row("starts") == ["2", "2"]
    # Of a busy machine a step of this model is next to nothing.
    assert all(0 <= float(share.rstrip("%")) <= 100 for share in page.row("goodput"))
    (difference,) = [chart for chart in page.data["charts"] if chart.get("difference")]
    assert difference["title"] == "Difference in loss"
    assert len(page.data["runs"][0]["columns"]["loss"]) == 4
    assert "cost" not in {row[0] for row in page.rows}  # without a price, and on a CPU


def test_nothing_of_a_run_becomes_markup(tmp_path):
    evil = "</script><script>alert(1)</script>"
    more = f"[data]\npath = '{evil}'\n"
    events = [start(0, 5) | {"device": evil}]
    folder = write(tmp_path / "<b>run", [line(1, 11) | {evil: 1.0}], events, more=more)
    page = made(tmp_path / "page.html", folder)
    assert "alert(1)</script>" not in page.content
    assert page.content.count("<script") == 2
    assert evil in page.data["runs"][0]["columns"]
    assert "<b>run" not in page.content.replace('"name":"', "").partition("<script")[0]


def test_a_long_run_is_thinned_out_and_keeps_its_spikes(tmp_path):
    lines = [line(step, 10 + step) for step in range(1, 5001)]
    lines[3210]["loss"] = 99.0
    lines[4000]["loss"] = None
    page = made(tmp_path / "page.html", write(tmp_path / "run", lines, [start(0, 10)], steps=5000))
    (run,) = page.data["runs"]
    assert len(run["columns"]["step"]) == 1000
    assert run["columns"]["step"][-1] == 5000
    low, high = run["bands"]["loss"]
    assert max(high) == 99.0
    assert low[-1] == pytest.approx(10 / 5000)
    assert len(page.content) < 200_000


def test_data_by_source(tmp_path):
    lines = [
        line(step, 10 + step) | {"tokens/web": 75 * step, "tokens/code": 25 * step, "epochs/web": 1, "loss/web": 2.5}
        for step in (1, 2)
    ]
    page = made(tmp_path / "page.html", write(tmp_path / "run", lines, [start(0, 10)], steps=2))
    assert page.row("web") == ["150 tokens (75.0%), epochs 1, loss 2.5"]
    assert page.row("code") == ["50 tokens (25.0%)"]
    titles = {chart["title"]: [key["name"] for key in chart["keys"]] for chart in page.data["charts"]}
    assert titles["Tokens by source"] == ["web", "code"]
    assert titles["Loss by source"] == ["web"]


def test_what_is_refused(tmp_path, capsys):
    run = killed_and_resumed(tmp_path / "run")
    empty = write(tmp_path / "empty", [], [])
    (tmp_path / "mine.html").write_text("<p>mine")
    (tmp_path / "nothing").mkdir()
    out = ("--out", str(tmp_path / "page.html"))
    for arguments, message in {
        ("report", *out): "no run is given",
        ("report", str(tmp_path / "missing"), *out): f"missing: no such folder; there is {empty}, {run}",
        ("report", str(tmp_path / "nothing"), *out): "is no run: it has no metrics.jsonl",
        ("report", str(empty), *out): "no step was logged yet; `swamla-titan watch",
        ("report", str(run), str(run), *out): "the same run is given twice",
        ("report", str(run), *out, "--price", "-1"): "--price -1.0: expected the price",
        ("report", str(run), "--out", str(tmp_path)): "is a folder; name a file, such as",
        ("report", str(run), "--out", str(tmp_path / "mine.html")): "exists, and is no report",
        ("report", str(run), "--out", str(tmp_path / "no" / "page.html")): "cannot be written (No such file",
        ("report", str(run), *out, "--optimizer.lr", "1"): "this command takes no configuration keys",
    }.items():
        assert main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert message in error, arguments
        assert error.count("\n") == 1
    assert (tmp_path / "mine.html").read_text() == "<p>mine"
    made(tmp_path / "page.html", run)
    made(tmp_path / "page.html", run)  # an earlier report is replaced


@pytest.mark.parametrize("seed", range(12))
def test_values_of_any_type_raise_nothing(tmp_path, seed, capsys):
    """The files may be damaged, or of another program; what is no number is left out."""
    random = Random(seed)
    values = [None, True, -1, 0, 3, 1e308, float("nan"), 10**400, 2**70, "text", "", [], [1, "a"], {}, {"a": []}]
    folder = killed_and_resumed(tmp_path / "run")
    for name in ("metrics.jsonl", "events.jsonl"):
        objects = [json.loads(each) for each in (folder / name).read_text().splitlines()]
        for each in objects:
            for key in each:
                if random.random() < 0.3:
                    each[key] = random.choice(values)
        (folder / name).write_text("".join(json.dumps(each) + "\n" for each in objects))
    assert main(["report", str(folder), "--out", str(tmp_path / "page.html"), "--price", "1"]) in (0, 2)
    history = History(folder)
    history.update()
    Console(file=io.StringIO()).print(panel(history, 80))
    for each in history.lines():
        watch._text(history, each)


DRAWN = """
const keys = [{key: "loss", name: "training"}, {key: "val", name: "validation"}];
const chart = {id: 0, title: "Loss", unit: "nats", keys};
const steps = [...Array(101).keys()].map(i => i + 1);
const run = (name, shift) => ({name, restarts: [50], bands: {}, columns: {step: steps,
  loss: steps.map(i => 2 + shift + 1 / i), val: steps.map(i => i % 50 ? null : 2 + shift)}});
const options = {axis: "step", axisName: "step", smooth: 0, hidden: new Set(), range: null, width: 600};
const runs = [run("a<b", 0), run("b", 0.25)], one = draw(chart, runs, options);
const difference = draw({...chart, difference: true}, runs, options);
const rounded = number => +number.toFixed(9);
console.log(JSON.stringify({
  ticks: ticks(0.3, 2.2, 5, false),
  logarithmic: ticks(1, 1000, 5, true),
  shown: [1234567, 0.0003, 98765, 0.5, null].map(shown),
  names: one.all.map(line => line.name),
  circles: one.svg.match(/<circle/g).length,
  paths: one.svg.match(/<path/g).length,
  escaped: !one.svg.includes("a<b"),
  labels: [one.svg.includes(">nats</text>"), one.svg.includes(">step</text>")],
  differences: difference.seen.map(line => [line.name, rounded(line.drawn[line.drawn.length - 1][1])]),
  hidden: draw(chart, runs, {...options, hidden: new Set(["0|loss", "0|val"])}).seen.length,
  near: nearest(one.seen, one.scaled(one.px(49.8))).map(({point}) => point && point[0]),
  smooth: smoothed([[1, 4], [2, 4], [3, 4]], 0.9).map(([, y]) => rounded(y)),
  at: [at([[0, 0], [2, 4]], 1), at([[0, 0]], 1)],
  empty: draw(chart, [{...runs[0], columns: {step: []}}], options).svg,
}));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node, to run the page's script")
def test_the_script_draws_axes_lines_and_differences():
    template = (Path(report_module.__file__).parent / "report.html").read_text()
    script = template.rpartition("<script>")[2].partition("</script>")[0]
    ended = subprocess.run(["node", "-"], input=script + DRAWN, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found == {
        "ticks": [0.5, 1, 1.5, 2],
        "logarithmic": [1, 3, 10, 30, 100, 300, 1000],
        "shown": ["1.235M", "3e-4", "98.77K", "0.5", "–"],  # noqa: RUF001
        "names": ["a<b: training", "a<b: validation", "b: training", "b: validation"],
        "circles": 4,
        "paths": 4,
        "escaped": True,
        "labels": [True, True],
        "differences": [["b: training", 0.25], ["b: validation", 0.25]],
        "hidden": 2,
        "near": [50, 50, 50, 50],
        "smooth": [4, 4, 4],
        "at": [2, None],
        "empty": "",
    }
