# SPDX-License-Identifier: Apache-2.0
"""The HTML report: what it says, what it escapes, what it needs, and that the commands write it."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from command_line import Run
from onnx import helper
from small import initializer, mlp, model_of, samples, saved

pytest.importorskip("plotly", reason="reports need plotly (extra 'report')")

from splitfold.compiler import Tolerance, compile
from splitfold.compiler.compiled import Compiled
from splitfold.compiler.debug.report import reopen, write_report
from splitfold.compiler.debug.report.collect import collect
from splitfold.compiler.debug.report.data import DriftFacts
from splitfold.compiler.debug.report.grids import activation_grid_of, weight_grid_of
from splitfold.compiler.debug.report.side import make_side
from splitfold.compiler.debug.report.steps import records_from
from splitfold.compiler.debug.report.template import render
from splitfold.compiler.errors import ReportError
from splitfold.compiler.locate import Located
from splitfold.compiler.realisation import Unrealised
from splitfold.passes.identity import layers_of
from splitfold.runtime.errors import ArtifactError

NASTY = '</script><b>&"%{x}'
CALIBRATION = [{"x": samples(16, seed=seed)} for seed in range(2)]


@dataclass
class Page(html.parser.HTMLParser):
    """A page, taken apart."""

    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    scripts: dict[str, str] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    style: str = ""
    open: str | None = None

    def __post_init__(self) -> None:
        super().__init__()

    @staticmethod
    def read(text: str) -> Page:
        page = Page()
        page.feed(text)
        return page

    @staticmethod
    def of(path: Path) -> Page:
        return Page.read(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open = (dict(attrs).get("id") or "code") if tag == "script" else tag

    def handle_endtag(self, tag: str) -> None:
        self.open = None

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script" and self.open:
            self.scripts[self.open] = self.scripts.get(self.open, "") + data
        elif self.open == "style":
            self.style += data
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    @property
    def data(self) -> dict[str, Any]:
        return dict(json.loads(self.scripts["data"]))


def compiled_mlp(pipeline: str | None = None) -> Compiled:
    return compile(mlp(), calibration=CALIBRATION, pipeline=pipeline)


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    return compiled_mlp()


@pytest.fixture(scope="module")
def page(compiled: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page.of(compiled.write_report(tmp_path_factory.mktemp("report") / "report.html"))


def with_custom_operator(name: str) -> onnx.ModelProto:
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"], name=name),
        helper.make_node("Thing", ["h"], ["t"], name="thing", domain="custom"),
        helper.make_node("MatMul", ["t", "w2"], ["y"], name="last"),
    ]
    return model_of(nodes, [initializer("w1", 32, 64), initializer("w2", 64, 8)], domains=["custom"])


def test_nothing_is_fetched(page: Page) -> None:
    for tag, attributes in page.tags:
        assert not {"src", "srcset", "poster", "action"} & set(attributes), tag
        assert (attributes.get("href") or "#").startswith("#")
        assert tag != "link"
    assert "function openLayer" in page.scripts["code"]
    assert "function graphView" in page.scripts["code"]
    addresses = set(re.findall(r"https?://[^\s\"'`]+", page.scripts["code"] + page.style + str(page.tags)))
    assert addresses <= {"http://www.w3.org/2000/svg"}, "a namespace is no address; anything else would be"
    (policy,) = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "http" not in policy


def test_it_says_what_the_records_say(compiled: Compiled, page: Page) -> None:
    for record in compiled.records:
        assert record.text in page.text
        for layer, what in (*record.applied, *record.skipped):
            assert what in page.text
            assert layer in page.text
    (found,) = compiled.manifest["deviation"].values()
    assert f"{found['sqnr_db']:.1f} dB SQNR" in page.text
    assert f"cosine {found['cosine']:.4f}" in page.text
    assert "Verified The outputs, as deployed" in page.text
    assert compiled.manifest["source"] in page.text
    assert compiled.manifest["pipeline"] in page.text


def test_every_layer_is_there_with_its_numbers(compiled: Compiled, page: Page) -> None:
    named = {layer for node in compiled.model.graph for layer in layers_of(node)}
    layers = {layer["name"]: dict(layer["facts"]) for layer in page.data["layers"]}
    assert named <= set(layers)
    assert {"encoder.up", "encoder.down", "encoder.act"} <= set(layers)
    assert layers["encoder.up"]["weight"] == "32 × 64"
    assert layers["encoder.up"]["precision"].startswith("float → int8")
    for layer, item in compiled.manifest["realised"].items():
        assert layers[layer]["kernel"].endswith(item["kernel"])
        assert layers[layer]["low-bit kernel"] == "yes"
    for name in ("encoder.up", "encoder.down"):
        assert re.match(r"[−\d.]+ dB$", layers[name]["local SQNR"])


def test_bytes_add_up(compiled: Compiled) -> None:
    data = collect(compiled)
    assert sum(row.before.size for row in data.layers if row.before) == data.size[0]
    assert sum(row.after.size for row in data.layers if row.after) == data.size[1]
    assert data.size[0] == 4 * (32 * 64 + 64 + 64 * 8)
    assert [sum(row[at] for row in data.precisions) for at in (1, 2)] == list(data.size)


def test_figures_are_what_plotly_knows(page: Page) -> None:
    objects = pytest.importorskip("plotly.graph_objects")
    figures = page.data["figures"]
    assert {"map-after", "map-before", "drift-plot", "distribution-0"} <= set(figures)
    colours = re.compile(r'"--[a-z0-9-]+"')
    for name, figure in figures.items():
        drawn = objects.Figure(json.loads(colours.sub('"#123456"', json.dumps(figure))))
        assert drawn.data, name
    tiles = figures["map-after"]["data"][0]
    assert len(set(tiles["ids"])) == len(tiles["ids"])
    sums = dict.fromkeys(tiles["ids"], 0)
    for parent, size in zip(tiles["parents"], tiles["values"], strict=True):
        sums[parent] = sums.get(parent, 0) + size
    sizes = dict(zip(tiles["ids"], tiles["values"], strict=True))
    assert any(sums[tile] for tile in sizes)
    assert all(sums[tile] in (0, size) for tile, size in sizes.items())


def test_the_graph_around_a_layer_holds_its_nodes_and_edges(compiled: Compiled, page: Page) -> None:
    graph, names = page.data["graph"], [layer["name"] for layer in page.data["layers"]]
    number = names.index("encoder.up")
    for side, expected in enumerate(({"MatMul", "Add", "Relu"}, {"QuantizeLinear", "Relu"})):
        drawing, nodes, left_out = graph["views"][number][side]
        shown = {graph["texts"][graph["sides"][side]["nodes"][node][0]] for node in nodes}
        assert expected <= shown
        assert left_out == 0
        assert len(graph["drawings"][drawing]["places"]) == 2 * len(nodes)
        edges = {(start, end) for start, end, _ in graph["sides"][side]["edges"]}
        drawn = {(nodes[e[0]], nodes[e[1]]) for e in graph["drawings"][drawing]["edges"]}
        assert drawn == {(a, b) for a, b in edges if a in nodes and b in nodes}


@pytest.mark.parametrize(
    ("pipeline", "layer"),
    [
        ("quantize-activations", "encoder.up"),
        ("quantize-activations{form=qdq}", "encoder.up"),
        ("quantize-dynamic", "encoder.up"),
        ("quantize-weights{bits=4,block=32}", "encoder.up"),
        ("quantize-weights{bits=8,block=16,symmetric=false}", "encoder.down"),
        ("quantize-weights{bits=2,block=32}", "encoder.up"),
        ("quantize-weights{bits=4,block=32,form=qdq}", "encoder.up"),
        ("quantize-weights{bits=8,block=32,form=qdq,symmetric=false}", "encoder.down"),
    ],
)
def test_grids_hold_the_weight(pipeline: str, layer: str) -> None:
    made = compile(
        mlp(),
        calibration=CALIBRATION,
        pipeline=f"canonicalize,{pipeline}",
        tolerance=Tolerance(cosine=None),
        unrealised=Unrealised.KEEP,
    )
    grid = weight_grid_of(make_side(made.model, None).weighted[layer][0])
    assert grid is not None
    weight = onnx.numpy_helper.to_array(mlp().graph.initializer[0 if layer == "encoder.up" else 2])
    stored = grid.values if grid.values.shape == weight.shape else grid.values.T
    assert np.abs(stored - weight).max() <= grid.steps.max() * 0.5001
    assert np.abs(stored - weight).max() > 0
    assert (grid.low.min() - 1e-6 <= stored).all()
    assert (stored <= grid.high.max() + 1e-6).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [("", "int8, one grid for each of 32 rows"), (",bits=4,block=16", "4 bits, 64 blocks of 16")],
)
def test_a_tables_grid_holds_its_rows(options: str, words: str) -> None:
    nodes = [
        helper.make_node("ArgMax", ["x"], ["rows"], axis=1, keepdims=0, name="choose"),
        helper.make_node("Gather", ["table", "rows"], ["rows_read"], name="/embed/Gather"),
    ]
    nodes.append(helper.make_node("Slice", ["rows_read", "from", "to", "axis"], ["y"], name="cut"))
    ends = [onnx.numpy_helper.from_array(np.array([v]), n) for n, v in (("from", 0), ("to", 8), ("axis", 1))]
    model = model_of(nodes, [initializer("table", 32, 32), *ends])
    made = compile(
        model, {"x": samples(4)}, pipeline=f"canonicalize,quantize-embeddings{{min-bytes=0{options}}}"
    )
    grid = weight_grid_of(make_side(made.model, None).weighted["embed"][0])
    assert grid is not None
    assert grid.words == words
    error = np.abs(grid.values - onnx.numpy_helper.to_array(model.graph.initializer[0]))
    assert (error.reshape(grid.steps.size, -1).max(1) <= 0.5001 * grid.steps).all()


def test_an_activations_grid_is_that_of_its_node() -> None:
    made = compiled_mlp("canonicalize,quantize-activations{calibrator=minmax}")
    grid = activation_grid_of(make_side(made.model, None).weighted["encoder.up"][0].inputs[0])
    assert grid is not None
    assert grid.value == "x"
    seen = np.concatenate([batch["x"] for batch in CALIBRATION])
    assert grid.scale == pytest.approx((seen.max() - seen.min()) / 255)
    assert (grid.low, grid.high) == pytest.approx((seen.min(), seen.max()), abs=grid.scale)


def test_names_are_text_and_never_markup(tmp_path: Path) -> None:
    made = compile(with_custom_operator(NASTY), pipeline="canonicalize,quantize-weights{bits=4,block=32}")
    nasty = Page.of(made.write_report(tmp_path / "nasty.html"))
    plain = compile(with_custom_operator("plain"), pipeline="canonicalize,quantize-weights{bits=4,block=32}")
    normal = Page.of(plain.write_report(tmp_path / "normal.html"))
    assert [tag for tag, _ in nasty.tags if tag != "wbr"] == [tag for tag, _ in normal.tags if tag != "wbr"]
    assert NASTY in {layer["name"] for layer in nasty.data["layers"]}
    assert NASTY in nasty.text
    labels = nasty.data["figures"]["map-after"]["data"][0]["labels"]
    assert not any("<" in label for label in labels), "plotly reads tags in labels"


def test_what_cannot_be_run_is_named(tmp_path: Path) -> None:
    made = compile(with_custom_operator("first"), pipeline="canonicalize,quantize-weights{bits=4,block=32}")
    page = Page.of(made.write_report(tmp_path / "report.html"))
    assert "Not verified The outputs were not compared" in page.text
    assert re.search(r"Missing kernels of the original model, .*drift.*: .*custom::Thing", page.text)
    assert "4 bits, block 32" in page.text
    assert "id" in dict(next(a for t, a in page.tags if t == "section" and a.get("id") == "layers"))
    assert not [a for _, a in page.tags if a.get("id") == "drift"]


def test_an_unchanged_model_says_that_all_is_equal(tmp_path: Path) -> None:
    page = Page.of(compiled_mlp("canonicalize").write_report(tmp_path / "report.html"))
    assert re.search(r"All \d+ values that both models compute are equal", page.text)
    assert "drift-plot" not in page.data["figures"]


def test_it_says_where_padding_is_left_out(compiled: Compiled, tmp_path: Path) -> None:
    data = collect(compiled)
    assert data.drift_facts is not None
    assert data.drift_facts.padding is None
    assert "padding" not in Page.read(render(data)).text
    kept = dataclasses.replace(data.outputs[0], sqnr_db=12.34)
    data = dataclasses.replace(data, drift_facts=DriftFacts(3, "attention_mask", (kept,)))
    page = Page.read(render(data))
    assert "12.3 dB without padding" in page.text
    assert "Measured over 3 batches, without the padded positions (zeros of attention_mask)" in page.text


def test_records_survive_the_manifest(compiled: Compiled) -> None:
    manifest = json.loads(json.dumps(compiled.manifest))
    for record, read in zip(compiled.records, records_from(manifest), strict=True):
        kept = dataclasses.replace(record, seconds=0.0, deviation=None, measured={})
        assert dataclasses.replace(read, deviation=None, measured={}) == kept
        assert read.measured == pytest.approx(record.measured, abs=0.01)
        assert (read.deviation is None) == (record.deviation is None)
        if read.deviation is not None and record.deviation is not None:
            assert dataclasses.asdict(read.deviation) == pytest.approx(dataclasses.asdict(record.deviation))


def test_places_that_cannot_be_written(compiled: Compiled, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="there is no folder"):
        compiled.write_report(tmp_path / "absent" / "report.html")
    with pytest.raises(ArtifactError, match="it is a folder"):
        compiled.write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_old_report(
    compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "report.html"
    file.write_text("old")

    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ArtifactError, match=r"No space|no space"):
        write_report(compiled, file)
    monkeypatch.undo()
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_without_plotly_it_says_what_to_install(
    compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ReportError, match=re.escape("pip install 'splitfold[report]'")):
        compiled.write_report(tmp_path / "report.html")
    result = run("compile", "model.onnx", "-o", "made", "--preset", "int4", "--report", code=1)
    assert "splitfold[report]" in result.stderr
    assert not Path("made").exists(), "it is said before the work is done"


def test_the_commands_write_it(run: Run) -> None:
    result = run("compile", "model.onnx", "-o", "made", "--calibration", "data.npz", "--report")
    assert "made/report.html" in result.stdout
    fresh = Page.of(Path("made/report.html"))
    result = run("report", "made", "--model", "model.onnx", "--data", "data.npz", "-o", "again.html")
    assert "again.html" in result.stdout
    again = Page.of(Path("again.html"))
    assert again.data["layers"] == fresh.data["layers"]
    assert re.search(r"passes in [\d.]+ m?s", fresh.text)
    assert not re.search(r"passes in [\d.]+ m?s", again.text), "a manifest keeps no times"


def test_another_original_is_refused(run: Run, tmp_path: Path) -> None:
    run("compile", "model.onnx", "-o", "made", "--preset", "int4")
    saved(mlp(seed=9), Path("other.onnx"))
    result = run("report", "made", "--model", "other.onnx", "-o", "x.html", code=1)
    assert "this is not the model that made was made from" in result.stderr
    assert not Path("x.html").exists()
    with pytest.raises(ArtifactError, match="carries no readable manifest"):
        reopen(tmp_path / "model.onnx", Located(tmp_path / "model.onnx"))
