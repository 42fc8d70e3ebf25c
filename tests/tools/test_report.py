"""`sharded-optim report`: the page says what the run folder says, is whole without a network, and is not broken by what a run is called."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

import sharded_optim as so
from sharded_optim.cli.commands import app
from sharded_optim.tools import report
from sharded_optim.tools.report import write_report
from sharded_optim.tools.report.palette import DARK, LIGHT, PLACEHOLDERS
from sharded_optim.tools.report.sections import rms, spikes
from sharded_optim.tools.runs import RunFolderError, read_run
from tests.run_folders import CONFIG, tensor_names, training_record, validation_record, write_run

HOSTILE = "</script><script>document.title='broken'</script>\"' onload=x $a_b$ <b> \x00 \ud800 é"
VOID = {"meta", "link", "input", "br"}


@dataclass
class Page(HTMLParser):
    """What a page has: elements with their attributes, the JSON of its figures, and its text."""

    text: str
    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    data: list[dict[str, Any]] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._is_json = False
        self.feed(self.text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._is_json = tag == "script" and dict(attrs).get("type") == "application/json"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if self._is_json:
            self.data.append(json.loads(data))
            self._is_json = False
        else:
            self.words.append(data)

    def series(self, name: str) -> dict[int, Any]:
        """The values of one curve, by step."""
        every = [(figure["steps"], each) for figure in self.data for each in figure["series"]]
        (found,) = (dict(zip(steps, each["values"], strict=True)) for steps, each in every if each["name"] == name)
        return {step: value for step, value in found.items() if value is not None}

    def has(self, text: str) -> bool:
        return text in " ".join(" ".join(self.words).split())


def page_of(*folders: Path, **options: Any) -> Page:
    path, _ = write_report(folders, output=folders[0] / "report.html", **options)
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page of a run with all figures, and a spike in a step."""
    folder = tmp_path_factory.mktemp("usual")
    write_run(folder, spikes={50: tensor_names(1)[0]})
    return page_of(folder)


def test_values_in_the_page_equal_those_in_the_file(tmp_path: Path) -> None:
    records = write_run(tmp_path, steps=60, validation_every=20)
    training = {record["step"]: record for record in records if "train_loss_bits" in record}
    page = page_of(tmp_path)
    assert page.series("training") == {step: record["train_loss_bits"] for step, record in training.items()}
    assert page.series("validation") == {record["step"]: record["val_bits_per_byte"] for record in records if "val_bits_per_byte" in record}
    for name in ("observe", "agree", "matrices", "update"):
        assert page.series(name) == {step: record["optimizer"][f"ms/{name}"] for step, record in training.items()}
    (heat_map,) = (figure for figure in page.data if figure.get("rows"))
    assert [each["name"] for each in heat_map["series"]] == tensor_names(10)
    for each in heat_map["series"]:
        assert each["values"] == pytest.approx([record["optimizer"][f"rms/{each['name']}"] for record in training.values()], rel=1e-5)


def test_a_run_that_was_resumed_is_one_curve(tmp_path: Path) -> None:
    write_run(tmp_path, steps=60)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps(training_record(40, train_loss_bits=1.25)) + "\n")
    page = page_of(tmp_path)
    losses = page.series("training")
    assert list(losses) == [10, 20, 30, 40]
    assert losses[40] == 1.25
    assert page.has("was resumed; the records before were dropped from step 40 on")


def test_a_page_is_made_while_a_line_is_half_written(tmp_path: Path) -> None:
    write_run(tmp_path, steps=30, status="running or interrupted")
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 40, "train_lo')
    page = page_of(tmp_path)
    assert list(page.series("training")) == [10, 20, 30]
    assert page.has("running or interrupted")


def test_several_runs_are_in_the_same_figures_each_with_its_name(tmp_path: Path) -> None:
    for seed, name in enumerate(("first", "second")):
        write_run(tmp_path / name, steps=40, seed=seed, config=CONFIG.replace("0.004", f"0.00{4 + seed}"))
    page = page_of(tmp_path / "first", tmp_path / "second")
    (loss, *_) = page.data
    names = [each["name"] for each in loss["series"]]
    assert names == ["training, first", "training, second"], "validation comes at step 50"
    assert page.series("training, first") != page.series("training, second")
    rows = [attributes.get("class") for tag, attributes in page.elements if tag == "tr"]
    assert rows.count("differs") == 1, "the learning rate alone differs"


def test_an_old_run_leaves_out_what_it_has_not_recorded_and_says_so(tmp_path: Path) -> None:
    write_run(tmp_path, steps=40, optimizer=False)
    page = page_of(tmp_path)
    assert page.series("training")
    label = tmp_path.name
    for note in (
        f"RMS of each tensor of {label}: left out, as records have the largest RMS alone",
        f"Clip factors of {label}: left out, as no record has clipped_share",
        f"Gradient norm of {label}: left out",
        f"Weight decay of {label}: left out, as no record has weight_decay/GROUP",
        f"Time of a step of {label} by part: left out, as no record has ms/PART",
        f"Memory bandwidth of {label}: left out",
        f"Tensors of {label} with a non-finite gradient: left out",
    ):
        assert page.has(note), note
    assert not any(figure.get("rows") for figure in page.data)


def test_a_record_of_a_loss_alone_is_enough(tmp_path: Path) -> None:
    """Without config, summary and every other field."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train_loss_bits": null}\n')
    page = page_of(tmp_path)
    assert page.series("training") == {1: "not finite"}
    assert page.has("has no config that can be read")


def test_the_page_of_a_tracker_has_its_values_and_names_no_unit_that_it_does_not_know(tmp_path: Path) -> None:
    with so.trackers.open(["jsonl"], tmp_path, run="own", config={"model": {"layers": 2}}) as trackers:
        for step in (10, 20):
            trackers.log(step, {"loss": 30.0 / step, "rms/a": 0.5, "clip_factor/a": 1.0, "clipped_share": 0.0, "lr/0": 0.1})
        trackers.log(20, {"validation_loss": 1.75})
    page = page_of(tmp_path / "own")
    assert page.series("training") == {10: 3.0, 20: 1.5}
    assert page.series("validation") == {20: 1.75}
    assert page.has("finished")
    assert page.has("model.layers")
    assert not page.has("world_size"), "no run has that value"
    assert "per byte" not in page.text


def test_a_page_without_a_loss_says_so_and_has_the_other_figures(tmp_path: Path) -> None:
    with so.trackers.open(["jsonl"], tmp_path, run="own") as trackers:
        for step in (10, 20):
            trackers.log(step, {"rms/a": 0.5})
    page = page_of(tmp_path / "own", png=tmp_path / "png")
    assert page.has("Training loss of own: left out, as no record has one")
    (heat_map,) = (figure for figure in page.data if figure.get("rows"))
    assert heat_map["series"] == [{"name": "a", "values": [0.5, 0.5]}]


def test_ranks_of_what_was_not_finite_are_beside_the_tensor(tmp_path: Path) -> None:
    record = training_record(10, tensors=["a"], non_finite_ranks={"a": [1, 3]})
    record["optimizer"] |= {"non_finite/a": 2.0, "non_finite/b": 1.0, "non_finite_tensors": 2.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    rows = re.findall(r"<tr[^>]*>\s*(.*?)\s*</tr>", page_of(tmp_path).text, re.DOTALL)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]
    assert ["10", "a", "2", "1, 3"] in cells
    assert ["10", "b", "1", "-"] in cells


def test_non_finite_values_are_named_and_break_no_figure(tmp_path: Path) -> None:
    names = ["a", "b"]
    write_run(tmp_path, steps=10, tensors=names)
    broken = training_record(20, tensors=names, train_loss_bits=None, largest_rms=None, skipped_steps=1)
    broken["optimizer"] |= {
        "rms/a": None,
        "clip_factor/a": None,
        "non_finite/a": 2.0,
        "grad_norm": None,
        "gb_per_s": None,
        "ms/update": None,
    }
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps(broken) + "\n")
    page = page_of(tmp_path, png=tmp_path / "png")
    assert page.series("training")[20] == "not finite"
    assert page.has("whose gradient was not finite in a step that is recorded")


@pytest.mark.parametrize("place", ["tensor", "config", "summary"])
def test_a_hostile_name_or_value_is_text(tmp_path: Path, place: str) -> None:
    config = CONFIG + f"text: {json.dumps(HOSTILE)}\n".replace("{", "{{").replace("}", "}}") if place == "config" else CONFIG
    tensors = [HOSTILE, "_hidden", "b"] if place == "tensor" else ["a", "b"]
    summary = {"text": HOSTILE, "status": HOSTILE} if place == "summary" else {}
    write_run(tmp_path, steps=30, tensors=tensors, config=config, summary=summary, spikes={20: tensors[0]})
    page = page_of(tmp_path, png=tmp_path / "png")
    assert page.open == []
    scripts = [attributes for tag, attributes in page.elements if tag == "script"]
    assert len(scripts) == len(page.data) + 1, "one for each figure, and the page's own"
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert not any(tag == "b" for tag, _ in page.elements)
    assert page.has("<b>"), "it is shown"


def test_a_run_with_a_hostile_folder_name_is_text(tmp_path: Path) -> None:
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    write_run(folder, steps=20)
    page = page_of(folder)
    assert not any(tag == "img" for tag, _ in page.elements)


def test_nothing_is_fetched(usual: Page) -> None:
    """No address but anchors and inline data in any attribute or style, and no request in the script."""
    for tag, attributes in usual.elements:
        for name in ("src", "href", "action", "data", "poster", "srcset", "xlink:href"):
            assert re.match(r"#|data:", attributes.get(name) or "#"), (tag, attributes)
        for address in re.findall(r"url\(([^)]*)\)", attributes.get("style") or "") + re.findall(
            r"url\(([^)]*)\)", attributes.get("clip-path") or ""
        ):
            assert address.startswith("#")
    assert "//" not in re.sub(r"^\s*//.*$", "", usual.text.split("<script>")[-1], flags=re.MULTILINE)
    assert not re.search(r"@import|url\(\s*['\"]?http|fetch\(|XMLHttpRequest|import\(", usual.text)


def test_ids_are_unique_and_every_reference_has_its_target(usual: Page) -> None:
    ids = [attributes["id"] for _, attributes in usual.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = {(attributes.get("href") or "#")[1:] for tag, attributes in usual.elements if tag in ("a", "use")}
    wanted |= set(re.findall(r"url\(#([^)]*)\)", usual.text)) | {
        name for _, attributes in usual.elements for name in (attributes.get("aria-labelledby") or "").split()
    }
    assert wanted - {""} <= set(ids)


def test_every_figure_has_a_heading_a_text_and_a_table(usual: Page) -> None:
    tags = [tag for tag, _ in usual.elements]
    figures = tags.count("figure")
    assert figures == len(usual.data) >= 8
    assert tags.count("details") == tags.count("h3") == tags.count("figcaption") == figures
    texts = [attributes.get("aria-label") or "" for _, attributes in usual.elements if attributes.get("role") == "img"]
    assert len(texts) == figures
    assert "training: " in texts[0]
    assert "at step 100" in texts[0]
    assert '<th scope="col"></th>' not in usual.text, "a screen reader names the column of each cell"
    headings = [int(tag[1]) for tag in tags if re.fullmatch(r"h[1-6]", tag)]
    assert headings[0] == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(headings)), "no level is left out"


def test_colors_are_those_of_the_readers_scheme(usual: Page) -> None:
    """No color that a drawing was made with is left, and each variable has a value for light and dark."""
    assert not [color for color in PLACEHOLDERS.values() if color in usual.text]
    used = set(re.findall(r"var\(--([\w-]+)\)", usual.text))
    assert used <= LIGHT.keys() == DARK.keys()


@pytest.mark.parametrize("colors", [LIGHT, DARK], ids=["light", "dark"])
def test_text_and_curves_have_enough_contrast(colors: dict[str, str]) -> None:
    """WCAG 2: 4.5 for text, 3 for what else must be seen."""

    def luminance(color: str) -> float:
        parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    surface = luminance(colors["surface"])
    for name, color in colors.items():
        if name not in ("surface", "grid"):
            dark, light = sorted((luminance(color), surface))
            contrast = (light + 0.05) / (dark + 0.05)
            assert contrast >= (4.5 if name in ("ink", "muted", "series-0") else 3.0), (name, contrast)


def test_a_page_of_650_steps_of_60_tensors_is_small_and_soon_made(tmp_path: Path) -> None:
    write_run(tmp_path, steps=650, log_every=1, tensors=tensor_names(60))
    began = time.process_time()
    path, _ = write_report([tmp_path])
    assert time.process_time() - began < 30.0, "about 3 s where nothing else runs"
    assert path == tmp_path / "report.html"
    assert path.stat().st_size < 3e6


def test_a_long_run_of_many_tensors_keeps_its_peaks_and_its_size(tmp_path: Path) -> None:
    """More records and tensors than the page shows: a heat map's cell is the largest of its records."""
    names = tensor_names(130)
    write_run(tmp_path, steps=1300, log_every=1, tensors=names, spikes={701: names[125]}, validation_every=500)
    path, _ = write_report([tmp_path])
    page = Page(path.read_text())
    (heat_map,) = (figure for figure in page.data if figure.get("rows"))
    assert len(heat_map["steps"]) <= rms.MOST_COLUMNS
    assert len(heat_map["series"]) == rms.MOST_ROWS
    (spiking,) = (each for each in heat_map["series"] if each["name"] == names[125])
    assert max(spiking["values"]) == 5.0
    assert path.stat().st_size < 6e6


def test_pngs_are_pictures_of_the_charts(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    _, pngs = write_report([tmp_path / "run"], png=tmp_path / "pictures")
    assert {"loss.png", "rms_run.png", "lr.png", "step_time_run.png"} <= {path.name for path in pngs}
    assert sorted(tmp_path.glob("pictures/*")) == sorted(pngs)
    for path in pngs:
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert image.width > 900


def test_the_page_is_loaded_again_only_where_that_is_asked_for(tmp_path: Path) -> None:
    write_run(tmp_path, steps=20)
    assert not [each for _, each in page_of(tmp_path).elements if each.get("http-equiv")]
    (found,) = [each for _, each in page_of(tmp_path, refresh=30).elements if each.get("http-equiv")]
    assert found == {"http-equiv": "refresh", "content": "30"}
    with pytest.raises(ValueError, match="at least 1, not 0"):
        write_report([tmp_path], refresh=0)


def test_spikes_are_those_of_the_definition(tmp_path: Path) -> None:
    """RMS of 2.3 or more; a loss more than 3.2 deviations above the running mean; those less than 10 records apart are one."""
    names = tensor_names(3)
    write_run(tmp_path, steps=1000, tensors=names, spikes={500: names[0], 530: names[1], 900: names[2]})
    records = read_run(tmp_path).records.training
    assert [(step, name) for step, name, _ in spikes.rms_spikes(records)] == [(500, names[0]), (900, names[2])]
    losses = [record.loss for record in records if record.loss is not None]
    step, _ = spikes.loss_spikes(records)[-1]
    before = losses[: step // 10 - 1][-spikes.RUNNING_LOSSES :]
    mean = math.fsum(before) / len(before)
    deviation = math.sqrt(math.fsum((loss - mean) ** 2 for loss in before) / len(before))
    assert step == 900
    assert losses[step // 10 - 1] > mean + 3.2 * deviation


# -------------------------------------------------------------------------------------------------------------------------- command


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def test_the_command_prints_the_paths_that_it_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    write_run(tmp_path / "a", steps=20)
    result = run(tmp_path / "a", "-o", tmp_path / "x.html", "--png", tmp_path / "p", "--open")
    assert result.exit_code == 0, result.output
    assert set(result.stdout.split()) == {str(tmp_path / "x.html"), *map(str, (tmp_path / "p").iterdir())}
    assert opened == [(tmp_path / "x.html").as_uri()]


def test_what_is_no_run_a_run_without_records_and_a_run_given_twice_are_refused(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.yaml").write_text("steps: 3\n")
    for arguments, message in (
        ([tmp_path / "absent"], f"is no run folder: there is no such folder; run folders beside it, newest first: {tmp_path}/new"),
        ([tmp_path / "new"], "has no record of training yet"),
        ([tmp_path / "new", tmp_path / "x" / ".." / "new"], "is given twice"),
    ):
        (tmp_path / "x").mkdir(exist_ok=True)
        result = run(*arguments)
        assert result.exit_code == 2
        assert message in result.stderr
    assert not list(tmp_path.rglob("*.html"))
    with pytest.raises(RunFolderError):
        write_report([tmp_path / "absent"])


@pytest.mark.parametrize(("missing", "package"), [("matplotlib", "matplotlib"), ("jinja2", "jinja2"), ("yaml", "pyyaml")])
def test_without_a_package_the_command_says_what_to_install(
    missing: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path, steps=20)
    for name in [name for name in sys.modules if name.startswith("sharded_optim.tools.report.") or name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
        if name.startswith("sharded_optim.tools.report.") and name.count(".") == 3:  # else `from package import module` finds it there
            monkeypatch.delattr(report, name.rpartition(".")[2])
    monkeypatch.setitem(sys.modules, missing, None)
    result = run(tmp_path)
    assert result.exit_code == 2
    assert f"needs {package}, which is not installed; pip install" in result.stderr


def test_a_validation_without_a_training_record_of_its_step_is_in_the_page(tmp_path: Path) -> None:
    write_run(tmp_path, steps=20)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps(validation_record(25)) + "\n")
    assert list(page_of(tmp_path).series("validation")) == [25]
