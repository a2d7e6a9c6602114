"""A local server and a headless Chromium, for bench_web.py and for the tests of the page."""

from __future__ import annotations

import contextlib
import functools
import http.server
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Set controls of the page by id, and call back when the image of these values is drawn.
SET_CONTROLS = """
    const [values, done] = arguments;
    const status = document.getElementById('status');
    const observer = new MutationObserver(() => { observer.disconnect(); done(status.textContent); });
    observer.observe(status, { childList: true });
    for (const [id, value] of Object.entries(values)) document.getElementById(id).value = value;
    document.getElementById('controls').dispatchEvent(new Event('input'));
"""


def missing() -> str | None:
    """Return the missing program or package that `chromium` needs, None if there is none."""
    for name in ("chromium", "chromedriver"):
        if shutil.which(name) is None:
            return f"needs {name} (Debian: apt-get install chromium chromium-driver)"
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "needs selenium (pip install selenium)"
    return None


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serve `folder` as `python -m http.server` does, and yield its address."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


@contextlib.contextmanager
def chromium(*arguments: str, downloads: Path | None = None, phone: bool = False) -> Iterator[Any]:
    """Yield a headless Chromium as a selenium driver that records the console."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--window-size=1100,900", *arguments):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    if downloads is not None:
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    if phone:
        metrics = {"width": 360, "height": 740, "pixelRatio": 2, "touch": True}
        options.add_experimental_option("mobileEmulation", {"deviceMetrics": metrics})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        driver.set_script_timeout(120)
        yield driver
    finally:
        driver.quit()


def open_page(driver: Any, address: str) -> str:
    """Open the page of a generator, wait for its first image or an error, and return its status."""
    from selenium.webdriver.support.wait import WebDriverWait

    driver.get(address)

    def status(driver: Any) -> str | None:
        text = driver.find_element("id", "status").text
        return None if text.startswith("Loading") else text

    return WebDriverWait(driver, 120).until(status)


def set_controls(driver: Any, **values: Any) -> str:
    """Set controls by id, wait for the image, and return the status."""
    return driver.execute_async_script(SET_CONTROLS, values)
