"""The page in a headless Chromium, from a file: keyboard, phone width, reloads, an empty console."""

import time

import pytest

from finetune.report import write_report

pytestmark = pytest.mark.browser


def open_page(driver, folder):
    driver.get(write_report([folder]).as_uri())
    return {name: driver.find_element("id", name) for name in ("time", "split", "play", "now")}


def source(driver, kind):
    return driver.find_element("css selector", f"img.{kind}").get_attribute("src")


def wait_until(driver, is_expected):
    """Wait until the text of the time slider is as expected; on a busy machine, scripts take their time."""
    from selenium.webdriver.support.wait import WebDriverWait

    WebDriverWait(driver, 20).until(lambda driver: is_expected(driver.find_element("id", "now").text))


def console(driver):
    return [entry["message"] for entry in driver.get_log("browser")]


def test_page_sliders_work_by_keyboard(browser, make_run):
    with browser.chromium() as driver:
        controls = open_page(driver, make_run(num_frames=5))
        newest = source(driver, "chosen")
        assert controls["now"].text == "200 kimg, image 5 of 5"

        controls["time"].send_keys("\ue011")  # Home
        assert controls["time"].get_attribute("aria-valuetext") == "0 kimg, image 1 of 5"
        assert source(driver, "chosen") == source(driver, "start") != newest
        controls["time"].send_keys("\ue014")  # arrow to the right
        assert controls["now"].text == "50 kimg, image 2 of 5"
        controls["split"].send_keys("\ue010")  # End
        assert controls["split"].get_attribute("aria-valuetext") == "100 % start"

        driver.refresh()  # as the page does by itself during a run
        wait_until(driver, lambda now: now == "50 kimg, image 2 of 5")
        play = driver.find_element("id", "play")
        play.click()
        assert play.get_attribute("aria-pressed") == "true"
        wait_until(driver, lambda now: now != "50 kimg, image 2 of 5")
        assert console(driver) == []


def test_page_fits_a_phone_and_shows_values_of_curves(browser, make_run):
    with browser.chromium(phone=True) as driver:
        open_page(driver, make_run("00000-a-name-that-is-far-too-long-for-the-screen-of-any-phone"))
        width = driver.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert width[0] <= width[1] == 360
        chart = driver.find_element("css selector", ".chart svg")
        driver.execute_script(
            "const x = arguments[0].getBoundingClientRect().right - 1;"
            "arguments[0].dispatchEvent(new PointerEvent('pointermove', {clientX: x, bubbles: true}))",
            chart,
        )
        shown = driver.find_element("css selector", ".legend output").get_attribute("textContent")
        assert shown == "0.120 at 200"
        assert console(driver) == []


def test_page_reloads_while_the_run_goes_on(browser, make_run):
    with browser.chromium() as driver:
        folder = make_run(kimg=100.0)
        page = write_report([folder])
        page.write_text(page.read_text().replace('data-reload="30"', 'data-reload="1"'))
        driver.get(page.as_uri())
        write_report([folder])
        time.sleep(3)
        body = driver.find_element("tag name", "body")
        assert body.get_attribute("data-reload") == "30"
        assert console(driver) == []
