# SPDX-License-Identifier: Apache-2.0
"""The HTML report in a real browser: no errors, pictures with content, details, dark mode, a phone."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from browser import LAPTOP, PHONE, chromium, console, show
from onnx import helper
from small import initializer, mlp, model_of, samples

pytest.importorskip("plotly", reason="reports need plotly (extra 'report')")

from splitfold.compiler import compile
from splitfold.compiler.compiled import Compiled

BLOCKS = 125


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    return compile(mlp(), calibration=[{"x": samples(16, seed=seed)} for seed in range(2)])


@pytest.fixture(scope="module")
def page(compiled: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled.write_report(tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(autouse=True)
def _no_errors(driver: Any) -> Iterator[None]:
    console(driver)
    yield
    assert console(driver) == []


def draw_all(driver: Any) -> list[str]:
    """Scroll to every picture, wait until it is drawn, and return their ids."""
    wait(driver, "return document.readyState === 'complete' && typeof report !== 'undefined'")
    names: list[str] = driver.execute_script("return Object.keys(report.figures)")
    shown = [name for name in names if not driver.execute_script("return byId(arguments[0]).hidden", name)]
    for name in shown:
        driver.execute_script("byId(arguments[0]).scrollIntoView({block: 'center'})", name)
        wait(driver, "return byId(arguments[0]).querySelector('svg.main-svg') !== null", name)
    return shown


def wait(driver: Any, script: str, *arguments: object) -> None:
    end = time.monotonic() + 20
    while not driver.execute_script(script, *arguments):
        assert time.monotonic() < end, f"never true: {script} {arguments}"
        time.sleep(0.02)


def open_layer(driver: Any, name: str) -> None:
    buttons = driver.find_elements("css selector", "#table .layer")
    button = next(b for b in buttons if b.get_attribute("textContent") == name)
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'}); arguments[0].focus()", button)
    button.send_keys("\n")
    wait(driver, "return byId('details').open")


def test_every_picture_has_content(driver: Any, page: Path) -> None:
    show(driver, page)
    for name in draw_all(driver):
        width, height, traces, expected = driver.execute_script(
            "const e = byId(arguments[0]), r = e.querySelector('svg.main-svg').getBoundingClientRect();"
            "return [r.width, r.height, e.data.length, report.figures[arguments[0]].data.length]",
            name,
        )
        assert width > 200, name
        assert height > 100, name
        assert traces == expected, name
        marks = "path.surface, .scatterlayer .js-line, .scatterlayer .js-fill"
        boxes = driver.execute_script(
            "const box = (mark) => { const b = mark.getBBox(); return b.width * b.height; };"
            f"return [...byId(arguments[0]).querySelectorAll('{marks}')].map(box)",
            name,
        )
        assert max(boxes, default=0) > 1000, f"{name} is empty"


def test_the_screen_is_not_blank(driver: Any, page: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="looking at a screenshot needs pillow (extra 'dev')")
    show(driver, page)
    draw_all(driver)
    driver.execute_script("byId('size').scrollIntoView()")
    driver.save_screenshot(str(tmp_path / "shot.png"))
    pixels = np.asarray(image.open(tmp_path / "shot.png").convert("RGB"))
    assert pixels.shape[:2] == LAPTOP[::-1]
    static = np.abs(pixels.astype(int) - (0x00, 0x72, 0xB2)).max(-1) <= 2
    assert static.mean() > 0.05, "tiles of int8 layers are blue"


def test_a_layer_shows_its_details(driver: Any, page: Path, compiled: Compiled) -> None:
    show(driver, page)
    open_layer(driver, "encoder.up")
    assert driver.execute_script("return byId('details-title').textContent") == "encoder.up"
    facts = driver.execute_script(
        "return Object.fromEntries([...document.querySelectorAll('.facts div')].map("
        "(d) => [d.querySelector('dt').textContent, d.querySelector('dd').textContent]))"
    )
    assert facts["operator"] == "MatMul"
    assert facts["weight"] == "32 × 64"
    assert facts["kernel"].endswith(compiled.manifest["realised"]["encoder.up"]["kernel"])
    story = driver.execute_script("return document.querySelector('.story').innerText")
    for record in compiled.records:
        for layer, what in record.applied:
            if layer == "encoder.up":
                assert what in story
    before, after = driver.execute_script(
        "const words = (svg) => [...svg.querySelectorAll('.node text')].map((text) => text.textContent);"
        "return [...document.querySelectorAll('.view svg')].map(words)"
    )
    assert {"MatMul", "Add", "Relu"} <= set(before)
    assert {"QuantizeLinear", "Relu"} <= set(after)
    driver.switch_to.active_element.send_keys("\ue00c")  # Escape
    wait(driver, "return !byId('details').open")


def test_the_graph_zooms_and_moves_by_button_and_key(driver: Any, page: Path) -> None:
    show(driver, page)
    open_layer(driver, "encoder.up")
    box = "return document.querySelector('.view svg').getAttribute('viewBox').split(' ').map(Number)"
    whole = driver.execute_script(box)
    assert whole[2] > 0
    driver.find_element("css selector", ".view [aria-label^='Zoom in']").click()
    closer = driver.execute_script(box)
    assert closer[2] == pytest.approx(whole[2] / 1.3)
    driver.execute_script("document.querySelector('.view svg').focus()")
    driver.switch_to.active_element.send_keys("\ue014")  # right
    assert driver.execute_script(box)[0] > closer[0]
    driver.find_element("css selector", ".view [aria-label^='Fit']").click()
    assert driver.execute_script(box) == pytest.approx(whole)
    driver.execute_script(
        "[...document.querySelectorAll('.view .node')].find((n) => n.textContent.startsWith('Relu'))"
        ".dispatchEvent(new MouseEvent('click', {bubbles: true}))"
    )
    assert driver.execute_script("return byId('details-title').textContent") == "encoder.act"


def test_a_tile_opens_its_layer(driver: Any, page: Path) -> None:
    from selenium.webdriver import ActionChains

    show(driver, page)
    draw_all(driver)
    tile = driver.execute_script(
        "byId('map-after').scrollIntoView({block: 'center'});"
        "const tiles = [...byId('map-after').querySelectorAll('g.slice')];"
        "return tiles.find((tile) => tile.textContent.startsWith('up'))"
    )
    ActionChains(driver).move_to_element(tile).click().perform()
    wait(driver, "return byId('details').open")
    assert driver.execute_script("return byId('details-title').textContent") == "encoder.up"


def test_before_and_after_change_places(driver: Any, page: Path) -> None:
    show(driver, page)
    driver.find_element("css selector", "[data-map='before']").click()
    wait(driver, "return byId('map-before').querySelectorAll('g.slice').length > 0")
    assert driver.execute_script("return byId('map-after').hidden && !byId('map-before').hidden")


def test_the_table_is_filtered_and_sorted(driver: Any, page: Path) -> None:
    show(driver, page)
    names = "return rows.filter((r) => !r.classList.contains('off')).map((r) => r.cells[0].textContent)"
    assert set(driver.execute_script(names)) == {"encoder.up", "encoder.down"}
    driver.find_element("id", "weighted").click()
    assert "encoder.act" in driver.execute_script(names)
    field = driver.find_element("id", "filter")
    field.send_keys("relu")
    assert driver.execute_script(names) == ["encoder.act"]
    field.clear()
    field.send_keys("matmul")
    bytes_header = driver.find_element("css selector", "#table th:nth-child(5) button")
    bytes_header.click()
    assert driver.execute_script(names)[:2] == ["encoder.up", "encoder.down"]
    bytes_header.click()
    assert driver.execute_script(names)[-2:] == ["encoder.down", "encoder.up"]


def _light(driver: Any, script: str) -> float:
    """Return how light the colour that `script` returns is, from 0 to 255."""
    colour: str = driver.execute_script(script)
    return float(np.mean([float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]))


@pytest.mark.parametrize("dark", [False, True])
def test_light_and_dark(driver: Any, page: Path, dark: bool) -> None:
    ground = "return getComputedStyle(document.body).backgroundColor"
    ink = "return getComputedStyle(byId('drift-plot').querySelector('.xtick text')).fill"
    show(driver, page, dark=dark)
    draw_all(driver)
    assert (_light(driver, ground) < 60) == dark
    assert (_light(driver, ink) > 180) == dark
    driver.find_element("id", "theme").click()
    assert (_light(driver, ground) < 60) != dark
    assert (_light(driver, ink) > 180) != dark, "pictures follow the theme"


def test_a_phone_never_scrolls_sideways(driver: Any, page: Path) -> None:
    show(driver, page, PHONE)
    widest = "return Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)"
    assert driver.execute_script(widest) <= PHONE[0]
    driver.execute_script("for (const details of document.querySelectorAll('details')) details.open = true")
    draw_all(driver)
    assert driver.execute_script(widest) <= PHONE[0]
    open_layer(driver, "encoder.up")
    inside = "const d = byId('details'); return d.scrollWidth <= d.clientWidth && d.clientWidth <= innerWidth"
    assert driver.execute_script(inside)


def test_nothing_is_fetched(driver: Any, page: Path) -> None:
    show(driver, page)
    draw_all(driver)
    assert driver.execute_script("return performance.getEntriesByType('resource').map((e) => e.name)") == []
    driver.execute_script("document.body.append(make('img', {src: 'https://example.org/x.png'}))")
    wait(driver, "return document.images[0].complete")
    assert any("Content Security Policy" in message for message in console(driver))


def deep() -> onnx.ModelProto:
    """Return x + tanh(x W + b), `BLOCKS` times over: four nodes a block, each a layer of its own."""
    nodes, weights, name = [], [initializer("last", 32, 8)], "x"
    for block in range(BLOCKS):
        weights += [initializer(f"w{block}", 32, 32, seed=block), initializer(f"b{block}", 32, seed=block)]
        steps = (("MatMul", [f"w{block}"]), ("Add", [f"b{block}"]), ("Tanh", []), ("Sum", ["x"]))
        for kind, reads in steps:
            made = f"{kind}_{block}"
            label = f"/body.{block}/{kind.lower()}/{kind}"
            nodes.append(helper.make_node(kind, [name, *reads], [made], name=label))
            name = made
    nodes.append(helper.make_node("MatMul", [name, "last"], ["y"], name="/head/MatMul"))
    return model_of(nodes, weights)


def test_a_model_of_500_nodes_opens(driver: Any, tmp_path: Path) -> None:
    model = deep()
    made = compile(model, samples(4), pipeline="canonicalize,quantize-weights{bits=4,block=32}")
    file = made.write_report(tmp_path / "report.html")
    driver.execute_cdp_cmd("Network.clearBrowserCache", {})
    show(driver, file)
    wait(driver, "return performance.timing.loadEventEnd > 0")
    times = driver.execute_script(
        "const t = performance.timing, p = performance.getEntriesByName('first-contentful-paint')[0];"
        "return {load: t.loadEventEnd - t.navigationStart, paint: p ? p.startTime : null}"
    )
    print(f"{len(model.graph.node)} nodes, {file.stat().st_size / 1e6:.2f} MB: {json.dumps(times)} ms")
    assert driver.execute_script("return rows.length") >= 4 * BLOCKS
    assert len(driver.find_elements("css selector", "#passes .passrow")) == len(made.records)
    wait(driver, "return byId('map-after').querySelectorAll('g.slice').length > 100")
    open_layer(driver, "body.124.matmul")
    assert driver.execute_script("return document.querySelectorAll('.view svg .node').length") >= 6
