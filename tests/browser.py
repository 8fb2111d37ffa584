# SPDX-License-Identifier: Apache-2.0
"""A headless Chromium for tests of pages, or a reason why there is none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip
LAPTOP, PHONE = (1440, 900), (390, 844)


@contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """Yield a selenium driver with an empty profile; skips where selenium or Chromium is not installed."""
    selenium = pytest.importorskip("selenium", reason="tests of pages need selenium (extra 'dev')")
    assert selenium
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    browser, bridge = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or bridge is None:
        pytest.skip("tests of pages need the packages chromium and chromium-driver")
    options = ChromeOptions()
    options.binary_location = browser
    for flag in (*_FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options=options, service=ChromeService(bridge))
    driver.set_script_timeout(30)
    try:
        yield driver
    finally:
        driver.quit()


def show(driver: Any, page: Path, size: tuple[int, int] = LAPTOP, *, dark: bool = False) -> None:
    """Open `page`, a report, in a window of `size`, for a system in light or dark, and wait for its scripts:
    on a busy machine the driver may return before they ran."""
    from selenium.webdriver.support.ui import WebDriverWait

    width, height = size
    device = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == PHONE}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", device)
    theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [theme]})
    driver.get("about:blank")
    driver.get(page.as_uri())
    ready = "return document.readyState === 'complete' && typeof rows !== 'undefined'"
    WebDriverWait(driver, 30).until(lambda page: page.execute_script(ready))


def console(driver: Any) -> list[str]:
    """Return what the page wrote to the console since the last call, errors and warnings."""
    entries = driver.get_log("browser")
    return [entry["message"] for entry in entries if entry["level"] in ("SEVERE", "WARNING")]
