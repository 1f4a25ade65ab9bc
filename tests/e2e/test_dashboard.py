"""The dashboard in a real browser: a deployment's router, wide and narrow windows, light and dark, and axe-core."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, Route, expect, sync_playwright

from hpc_router.state.atomic_files import replace_json
from hpc_router.state.gpu_hours import ExpertUsage, Usage
from hpc_router.state.run_directory import RunDir
from tests.e2e.deployment import cli
from tests.e2e.support import engine, router
from tests.support.needs import need

pytestmark = [pytest.mark.e2e, pytest.mark.browser]
LIMIT_MS = 60_000
BROWSER = (
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync",
)  # fmt: skip
SECRET = "a prompt that no one else may read"


@contextmanager
def browser_page(url: str, *, width: int, height: int, dark: bool) -> Iterator[tuple[Page, list[str]]]:
    """A page of the dashboard, and the errors of its script."""
    chromium, errors = shutil.which("chromium"), list[str]()
    need(chromium is not None, "chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(BROWSER))
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light")
        page.set_default_timeout(LIMIT_MS)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda m: errors.append(m.text) if "Security Policy" in m.text else None)
        page.goto(f"{url}/dashboard")
        yield page, errors
        browser.close()


def connect(page: Page, token: str) -> None:
    page.get_by_label("Token").fill(token)
    page.get_by_role("button", name="Show").click()


def table(page: Page, name: str) -> dict[str, list[str]]:
    """The cells of each row of a table, by the row's name, all of one moment."""
    read = "table => [...table.tBodies[0].rows].map(row => [...row.cells].map(cell => cell.innerText))"
    return {name: cells for name, *cells in page.get_by_role("table", name=name, exact=True).evaluate(read)}


def violations(page: Page) -> list[tuple[str, str]]:
    return [(found["id"], found["impact"]) for found in Axe().run(page).response["violations"]]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The address and the token of a router with one expert that serves, and one that no engine serves."""
    need(shutil.which("chromium") is not None, "chromium")
    run = tmp_path_factory.mktemp("dashboard") / "run"
    with engine("m") as at:
        for expert, url in (("math", at), ("law", "http://127.0.0.1:9")):
            cli("register", "--run", str(run), "--expert", expert, "--url", url)
        used = ExpertUsage({"busy": 7200.0, "idle": 21_600.0}, tokens=9_876_544, last_request_at=1.0)
        replace_json(RunDir(run).gpu_hours_json, Usage(2.0, {"math": used, "law": ExpertUsage()}).to_json())
        with router(run, "policy=model_field") as client:
            for _ in range(5):
                client.chat.completions.create(
                    model="math", messages=[{"role": "user", "content": SECRET}], max_tokens=2
                )
            yield str(client.base_url).removesuffix("/v1/"), str(client.api_key)


@pytest.mark.parametrize(("width", "height", "dark"), [(1280, 900, False), (360, 740, True)])
def test_a_reader_sees_what_happens(address: tuple[str, str], width: int, height: int, dark: bool) -> None:
    url, token = address
    with browser_page(url, width=width, height=height, dark=dark) as (page, errors):
        assert violations(page) == []
        connect(page, "not the token")
        expect(page.get_by_role("status")).to_have_text("The router does not accept this token.", timeout=LIMIT_MS)
        connect(page, token)
        page.wait_for_selector("#content:not([hidden])")
        expect(page.get_by_role("status")).to_contain_text("1 of 2 experts ready", timeout=LIMIT_MS)
        expect(page.locator("#window")).to_contain_text("Rates and latencies of the last", timeout=LIMIT_MS)
        expect(page.locator("#attention")).to_contain_text("law has no ready replica", timeout=LIMIT_MS)
        experts = table(page, "Experts")
        assert list(experts) == ["law", "math"]
        assert experts["math"][0] == "1 of 1"
        assert experts["math"][-2] == "0"
        expect(page.locator("#queues-none")).to_be_visible()
        hours = table(page, "GPU hours since the first launch")
        assert {name: cells[:-1] for name, cells in hours.items()} == {
            "math": ["8.00 h", "75 % (6.00 h)", "2.00 h", "0.00 h", "0.00 h", "1,234,568"]
        }
        waiting = table(page, "Replicas that are not ready yet")
        assert list(waiting) == ["law-x0.g1"]
        assert "ejected" in waiting["law-x0.g1"][0]
        assert set(table(page, "Replicas in service")) == {"law-x0.g1", "math-x0.g1"}
        page.get_by_label("Only those that are ejected").check()
        assert set(table(page, "Replicas in service")) == {"law-x0.g1"}
        page.get_by_text("Keys that").click()
        assert page.locator('dd[data-key="policy.kind"]').inner_text() == '"model_field"'
        assert violations(page) == []
        for narrower in (width, width // 2 + 200):
            page.set_viewport_size({"width": narrower, "height": height})
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is cut"
        content = page.content()
        assert SECRET not in content
        assert token not in content
        assert errors == []


def test_the_keyboard_reaches_everything_and_a_reload_forgets_the_token(address: tuple[str, str]) -> None:
    url, token = address
    with browser_page(url, width=1280, height=900, dark=False) as (page, errors):
        page.keyboard.press("Tab")
        page.keyboard.type(token)
        page.keyboard.press("Enter")
        page.wait_for_selector("#content:not([hidden])")
        page.keyboard.press("Tab")
        page.keyboard.press("Space")
        expect(page.get_by_label("Only those that are ejected")).to_be_checked()
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        expect(page.locator("#settings")).to_be_visible()
        page.reload()
        expect(page.get_by_label("Token")).to_be_visible()
        assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0
        assert errors == []


def test_two_hundred_replicas_and_hostile_texts(address: tuple[str, str]) -> None:
    """The router's answer is replaced in the browser. Texts of the data never become HTML, and a second overview
    changes the rows instead of making new ones."""
    url, token = address
    hostile = "<img src=x onerror=alert(1)><b>bold</b>"
    with browser_page(url, width=1280, height=900, dark=False) as (page, errors):
        real: dict[str, Any] = page.request.get(f"{url}/overview", headers={"authorization": f"Bearer {token}"}).json()
        one = real["experts"][1]["replicas"][0]

        def made(in_flight: int) -> dict[str, Any]:
            replicas = [one | {"replica": f"math-{n}.g1", "sick": hostile, "in_flight": in_flight} for n in range(200)]
            queues = {"interactive": {"waiting": 0, "oldest_s": None}, "batch": {"waiting": 3, "oldest_s": 65.0}}
            more = {"waiting": 3, "wait_s": 9.5, "queues": queues}
            expert = real["experts"][1] | {"expert": hostile, "replicas": replicas} | more
            event = {"at": 1.0, "kind": hostile, "replica": hostile, "expert": None, "reason": hostile, "by": hostile}
            return real | {"experts": [expert], "attention": [hostile], "events": [event]}

        lines = "".join(json.dumps(made(number)) + "\n" for number in (1, 2))

        def fulfil(route: Route) -> None:
            route.fulfill(status=200, content_type="application/x-ndjson", body=lines)

        page.route("**/overview?follow=true", fulfil)
        connect(page, token)
        page.wait_for_selector("#content:not([hidden])")
        rows = page.get_by_role("table", name="Replicas in service").get_by_role("row")
        expect(rows).to_have_count(201)
        assert rows.nth(200).get_by_role("cell").nth(1).inner_text().startswith("2 of")
        assert table(page, "Requests that wait") == {hostile: ["batch", "3", "65 s", "about 9.50 s"]}
        assert page.locator("#content img, #content b").count() == 0
        assert page.locator("#attention").inner_text() == hostile
        expect(page.get_by_role("status")).to_contain_text("the connection ended; trying again", timeout=LIMIT_MS)
        assert errors == []


def test_the_page_comes_back_after_its_worker_was_killed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with engine("m") as at:
        cli("register", "--run", str(run), "--expert", "math", "--url", at)
        with router(run, "policy=model_field") as client:
            url, token = str(client.base_url).removesuffix("/v1/"), str(client.api_key)
            with browser_page(url, width=1280, height=900, dark=False) as (page, _):
                connect(page, token)
                expect(page.get_by_role("status")).to_contain_text("1 of 1 experts ready", timeout=LIMIT_MS)
                pids = json.loads(cli("status", "--run", str(run), "--json").stdout)["router"]["workers"]
                page.route("**/overview?follow=true", lambda route: route.abort())
                os.kill(pids[0]["pid"], signal.SIGKILL)
                expect(page.get_by_role("status")).to_contain_text("trying again", timeout=LIMIT_MS)
                page.unroute_all()
                expect(page.get_by_role("status")).to_contain_text("1 of 1 experts ready", timeout=LIMIT_MS)
