"""A real browser for tests: Chromium without a window, driven by Selenium, which has an environment of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from client_environments import add_packages

ENVIRONMENT = "browser"
PROGRAMS = ("chromium", "chromedriver")
INSTALL = "apt-get install chromium chromium-driver"
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-extensions")


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """Yields a Selenium driver of a Chromium with an empty profile; skips the test where either is missing."""
    programs = [shutil.which(name) for name in PROGRAMS]
    if None in programs:
        pytest.skip(f"this machine has no chromium with its driver: {INSTALL}")
    add_packages(ENVIRONMENT)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in (*FLAGS, "--lang=en-US", "--window-size=1360,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # A proxy of the environment is not for pages of this machine.
    service = Service(programs[1], env={**os.environ, "LANGUAGE": "en", "NO_PROXY": "127.0.0.1,localhost"})
    driver = webdriver.Chrome(options=options, service=service)
    try:
        yield driver
    finally:
        driver.quit()
