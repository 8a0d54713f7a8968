"""The page at `/`, in a real browser: what is shown, what is sent, and what happens when things go wrong."""

import base64
import dataclasses
import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from scripted import BASE, ScriptedEngine, event, ids, loopback, say, scripted_app, scripted_bank
from tiny import tiny_base, tiny_correction
from trimtab.cli import build_parser
from trimtab.errors import EngineFailure, Overloaded
from trimtab.server import page
from trimtab.server.app import create_app
from trimtab.server.engine.config import EngineConfig
from trimtab.server.engine.engine import Engine
from trimtab.server.engine.event import Event
from trimtab.server.engine.request import Request
from trimtab.steering.bank import Bank
from trimtab.steering.correction import HeadCorrection

pytest.importorskip("playwright", reason="playwright is not installed: pip install '.[dev]'")

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Locator, Page, expect

from browser import CHROMIUM, NO_CHROMIUM, PATIENCE, PacedEngine, Visit, chromium, receipt, steps, visit

expect.set_options(timeout=PATIENCE)
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
ROOT = Path(__file__).resolve().parent.parent
GOOD = json.loads((ROOT / "corrections/smollm2-135m-instructions/correction.json").read_text())["report"]
POOR = json.loads((ROOT / "results/qwen-gsm8k/correction.json").read_text())["report"]
POOR["policies"][-1] |= {"flips": None, "kl_fired": None, "kl_token": None}  # of a teacher, as reports have it now
HEADS = ("brief", "polite")  # of scripted_bank
BOTH = {"brief": GOOD, "polite": POOR}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


def bank_with(reports: dict[str, dict[str, Any]], **fields: Any) -> Bank:
    """scripted_bank, its heads with reports and other fields."""
    source, bank = scripted_bank(), Bank(8, "cpu")
    for name in source.names:
        found = source.get(name)
        if name in HEADS:
            assert isinstance(found, HeadCorrection)
            found = dataclasses.replace(found, report=reports.get(name), **fields)
        bank.add(found)
    return bank


@contextmanager
def opened(
    browser: Browser, engine: Any, bank: Bank | None = None, keys: tuple[str, ...] = (), **options: Any
) -> Iterator[Visit]:
    """The page of an app with this engine, once it has loaded its corrections or asks for a key."""
    app = create_app(engine, BASE, bank or scripted_bank(), api_keys=keys)
    with loopback(app, engine) as url, visit(browser, url, **options) as visited:
        ready = "#key-form:not([hidden]), #corrections article"
        visited.page.locator(ready).first.wait_for(state="attached")
        yield visited


def ask(page: Page, text: str = "hi") -> None:
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press("Enter")


def answered(page: Page, name: str = "brief") -> Locator:
    """The last answer of that name, once it is complete."""
    found = page.get_by_role("article", name=name).and_(page.locator(".answer")).last
    expect(found.get_by_text("ended")).to_be_visible()
    return found


def token(answer: Locator, text: str) -> Locator:
    return answer.get_by_role("option", name=text, exact=True).first


def script_of(text: str, receipts: Any) -> Callable[[Request, int], list[Event]]:
    return lambda request, index: steps(request, text, receipts)


(A, B) = ids("ab")
FLIP = {
    "open": True, "fired": True, "base_token": A, "steered_token": B, "base_logprob": math.log(0.25),
    "steered_logprob": math.log(0.5), "base_token_logprob": math.log(0.375), "steered_token_logprob": math.log(0.625),
    "kl": 0.125, "strength": 1.25,
}  # fmt: skip
FIRED = FLIP | {"steered_token": A, "steered_token_logprob": math.log(0.75)}
MIXED = script_of("abc", [receipt(0.1), receipt(1.6, **FIRED), receipt(3.2, **FLIP), receipt(9.0)])


# The response


def get(path: str, **options: Any) -> httpx.Response:
    """Over a socket: in memory needs an event loop, and the browser's may be running in this thread."""
    engine = ScriptedEngine(say("x"))
    with loopback(scripted_app(engine, **options), engine) as url:
        return httpx.get(url + path)


def test_the_page_is_one_response_that_the_browser_is_told_to_keep_closed() -> None:
    response = get("/")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert (policy["default-src"], policy["connect-src"]) == ("'none'", "'self'")
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        (content,) = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", response.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[directive] == f"'sha256-{digest}'", "the one that is there, and no other"
    assert set(re.findall(r"https?://[^'\"]+", response.text)) == {"http://www.w3.org/2000/svg"}


def test_the_page_needs_no_key_and_can_be_switched_off() -> None:
    assert get("/", api_keys=("secret",)).status_code == 200
    assert get("/v1/models", api_keys=("secret",)).status_code == 401
    assert get("/", with_page=False).status_code == 404
    assert build_parser().parse_args(["serve", "demo", "--no-page"]).no_page
    assert not build_parser().parse_args(["serve", "demo"]).no_page


def test_every_file_of_the_page_is_in_it() -> None:
    content, _ = page.build()
    for path in page.FILES.iterdir():
        if path.name != "page.html":
            assert path.read_bytes() in content, path.name


# Tokens


@in_a_browser
def test_tokens_are_shaded_outlined_and_counted(browser: Browser) -> None:
    with opened(browser, ScriptedEngine(MIXED)) as visited:
        ask(visited.page)
        answer = answered(visited.page)
        found = answer.get_by_role("option")
        shades = found.evaluate_all("nodes => nodes.map(node => [node.textContent, node.dataset.u, node.className])")
        assert shades == [
            ["a", "0", "token"],
            ["b", "3", "token fired"],
            ["c", "6", "token fired flip"],
            ["■", "8", "token end"],
        ]
        expect(answer).to_contain_text("50.0 % 2 of 4")
        expect(answer.get_by_role("img", name="Entropy step by step")).to_have_accessible_name(
            "Entropy step by step: 4 steps, mean 3.48 nats; fired at 2 (50.0 %), flips 1"
        )
        expect(answer.get_by_role("img", name="Histogram")).to_have_accessible_name(
            "Histogram of the entropy, in nats: "
            "0 to 0.25: 1, 1.5 to 1.75: 1, 3 to 3.25: 1, 4.75 and more: 1; tau at 0.75"
        )
        expect(visited.page.locator("#status")).to_contain_text("brief: 4 steps")


@in_a_browser
def test_a_flip_tells_both_tokens_and_their_probabilities_on_hover_and_on_focus(browser: Browser) -> None:
    with opened(browser, ScriptedEngine(MIXED)) as visited:
        ask(visited.page)
        flip, tip = token(answered(visited.page), "c"), visited.page.get_by_role("tooltip")
        told = ["Step 3", "3.20 nats", "strength 1.25", "c 25.0 % → 50.0 %", "a 37.5 % → b 62.5 %", "0.125 nats"]
        flip.hover()
        for part in told:
            expect(tip).to_contain_text(part)
        tip.hover()
        expect(tip).to_be_visible()
        visited.page.get_by_label("Message").hover()
        expect(tip).to_be_hidden()
        flip.focus()
        expect(flip).to_have_accessible_description(re.compile(r"a 37.5 % → b 62.5 %"))
        visited.page.keyboard.press("Escape")
        expect(tip).to_be_hidden()


@in_a_browser
def test_the_table_says_the_same_and_grows_no_second_time(browser: Browser) -> None:
    with opened(browser, ScriptedEngine(MIXED)) as visited:
        ask(visited.page)
        answer = answered(visited.page)
        toggle = answer.get_by_role("button", name="Receipts as a table")
        for _ in range(3):
            toggle.click()
        rows = answer.get_by_role("row")
        expect(rows).to_have_count(1 + 4)
        cells = rows.nth(3).locator("th, td").all_text_contents()
        assert cells == ["3", "c", "3.20", "fired, flip", "a 37.5 %", "b 62.5 %", "25.0 %", "50.0 %", "0.125"]


@in_a_browser
def test_a_character_of_several_tokens_is_one_piece_with_all_their_receipts(browser: Browser) -> None:
    text = "a😀\n <b>"
    told = [receipt(0.5 + i / 4) for i in range(len(text.encode()) + 1)]
    with opened(browser, ScriptedEngine(script_of(text, told))) as visited:
        ask(visited.page)
        answer = answered(visited.page)
        pieces = answer.get_by_role("option").all_text_contents()
        assert pieces == ["a", "😀", "\n", " ", "<", "b", ">", "■"]
        token(answer, "😀").hover()
        tip = visited.page.get_by_role("tooltip")
        expect(tip).to_contain_text("Step 2 ")
        expect(tip).to_contain_text("Step 5 ")
        expect(tip).not_to_contain_text("Step 6 ")


@in_a_browser
def test_nothing_from_outside_becomes_markup(browser: Browser) -> None:
    attack = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    told = [receipt(1.0)] * (len(attack) + 1)
    poor = POOR | {"verdict": POOR["verdict"] | {"beats": {attack: False}, "summary": attack}}
    with opened(browser, ScriptedEngine(script_of(attack, told)), bank_with({"brief": poor})) as visited:
        ask(visited.page, attack)
        answer = answered(visited.page)
        assert "".join(answer.get_by_role("option").all_text_contents()) == attack + "■"
        visited.page.get_by_role("button", name="Full report").click()
        expect(visited.page.get_by_role("dialog")).to_contain_text(attack)
        assert visited.page.locator("img, body script:not([type])").count() == 0
        expect(visited.page.get_by_text(attack, exact=True).first).to_be_visible()


# What is sent


@in_a_browser
def test_the_base_answers_beside_with_the_same_seed(browser: Browser) -> None:
    engine = ScriptedEngine(MIXED)
    with opened(browser, engine) as visited:
        visited.page.get_by_label("Seed", exact=True).fill("7")
        visited.page.get_by_label("Most tokens").fill("9")
        ask(visited.page)
        answered(visited.page)
        answered(visited.page, "base")
        visited.page.get_by_label("Base beside it").uncheck()
        ask(visited.page, "more")
        expect(visited.page.locator(".turn").last.locator(".answer")).to_have_count(1)
        answered(visited.page)
    assert len(engine.requests) == 3
    steered = {request.steering.correction: request for request in engine.requests[:2]}
    assert set(steered) == {None, "brief"}
    assert {(r.sampling.seed, r.sampling.max_tokens, r.sampling.temperature) for r in engine.requests} == {(7, 9, 0.6)}
    turns = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nabc<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n"
    assert engine.requests[2].prompt == tuple(ids(turns + "<|im_start|>assistant\n")), "it remembers"


@in_a_browser
def test_strength_and_tau_are_the_corrections_own_until_they_are_moved(browser: Browser) -> None:
    engine = ScriptedEngine(MIXED)
    bank = bank_with({}, strength=1.2345)
    with opened(browser, engine, bank) as visited:
        page = visited.page
        page.get_by_label("Base beside it").uncheck()
        ask(page)
        answered(page)
        page.get_by_label("Strength").press("Home")
        page.get_by_label("Gate, tau").press("End")
        expect(page.locator("#tau-is")).to_have_text("4")
        ask(page)
        expect(page.locator(".answer")).to_have_count(2)
        answered(page)
        page.get_by_label("Correction", exact=True).select_option("polite")
        ask(page)
        answered(page, "polite")
        page.get_by_label("Correction", exact=True).select_option("tuned")
        ask(page)
        answered(page, "tuned")
        page.get_by_label("Correction", exact=True).select_option("")
        expect(page.get_by_label("Strength")).to_be_disabled()
        ask(page)
        answered(page, "base")
    asked = [(r.steering.correction, r.steering.strength, r.steering.tau) for r in engine.requests]
    own = scripted_bank().get("tuned")
    assert asked == [
        ("brief", 1.2345, 0.75),
        ("brief", 0, 4),
        ("polite", 1.2345, 0.75),
        ("tuned", own.strength, own.gate.tau),
        (None, None, None),
    ]


# Keyboard


@in_a_browser
def test_everything_can_be_done_from_the_keyboard(browser: Browser) -> None:
    with opened(browser, ScriptedEngine(MIXED)) as visited:
        page, keys = visited.page, visited.page.keyboard
        expect(page.get_by_label("Message")).to_be_focused()
        keys.type("one")
        keys.press("Shift+Enter")
        keys.type("two")
        keys.press("Enter")
        expect(page.locator(".asked")).to_have_text("one\ntwo")
        answer = answered(page)
        keys.press("Shift+Tab")  # the answers stand before the message: table, tokens
        keys.press("Shift+Tab")
        expect(token(answer, "a")).to_be_focused()
        for key, text in (("ArrowDown", "c"), ("ArrowLeft", "b"), ("End", "end of the answer"), ("ArrowUp", "c")):
            keys.press(key)
            expect(token(answer, text)).to_be_focused()
            expect(page.get_by_role("tooltip")).to_contain_text("Step")
        keys.press("Home")
        expect(token(answer, "a")).to_be_focused()
        keys.press("Tab")
        expect(answer.get_by_role("button", name="Receipts as a table")).to_be_focused()
        expect(page.get_by_role("tooltip")).to_be_hidden()
        keys.press("Enter")
        expect(answer.get_by_role("row").first).to_be_visible()


@in_a_browser
def test_a_bar_of_the_picture_leads_to_its_token(browser: Browser) -> None:
    with opened(browser, ScriptedEngine(MIXED)) as visited:
        ask(visited.page)
        answer = answered(visited.page)
        bars = answer.locator(".strip path.fired").bounding_box()
        assert bars is not None  # it holds the bars of steps 2 and 3
        visited.page.mouse.click(bars["x"] + bars["width"] * 0.75, bars["y"] + bars["height"] - 2)
        expect(token(answer, "c")).to_be_focused()


# Stop


@in_a_browser
@pytest.mark.parametrize("way", ["Escape", "Stop"])
def test_a_stop_ends_the_work_and_frees_the_slots(browser: Browser, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base()
    base.eos = frozenset()  # no answer ends by itself
    bank = Bank(base.hidden, base.device)
    bank.add(tiny_correction(base, "brief", tau=0.0))
    engine = Engine(base, bank, EngineConfig(slots=2))
    step, taken = engine._core.step, 0

    def slow_step() -> list[Event]:
        nonlocal taken
        taken += 1
        time.sleep(0.02)
        return step()

    monkeypatch.setattr(engine._core, "step", slow_step)
    with loopback(create_app(engine, base, bank), engine) as url, visit(browser, url) as visited:
        page = visited.page
        page.locator("#corrections article").first.wait_for()
        page.get_by_label("Most tokens").fill("400")
        ask(page)
        answers = page.locator(".answer")
        expect(answers).to_have_count(2)
        for i in range(2):
            expect(answers.nth(i).get_by_role("option").first).to_be_attached()
        if way == "Stop":
            page.get_by_role("button", name="Stop").click()
        else:
            page.keyboard.press(way)
        for i in range(2):
            expect(answers.nth(i)).to_contain_text("by you")
        deadline = time.monotonic() + PATIENCE / 1000
        while engine.stats().used and time.monotonic() < deadline:
            time.sleep(0.01)
        assert engine.stats().used == 0
        assert taken < 400, "it did not run to its end"
        expect(page.get_by_role("button", name="Send")).to_be_visible()


# When things go wrong


@in_a_browser
def test_a_refusal_is_told_in_the_servers_words_and_can_be_tried_again(browser: Browser) -> None:
    engine = ScriptedEngine(MIXED, refusal=Overloaded("the queue is full"))
    with opened(browser, engine) as visited:
        visited.allowed.append("503")
        visited.page.get_by_label("Base beside it").uncheck()
        ask(visited.page)
        alert = visited.page.locator(".answer").get_by_role("alert")
        expect(alert).to_contain_text("the queue is full")
        expect(alert).to_contain_text("the server asks for 1 s")
        engine.refusal = None
        alert.get_by_role("button").click()
        answered(visited.page)
        expect(visited.page.locator(".turn")).to_have_count(1)


@in_a_browser
def test_a_mistake_is_told_and_the_next_question_does_not_repeat_it(browser: Browser) -> None:
    engine = ScriptedEngine(MIXED)
    with opened(browser, engine) as visited:
        visited.allowed.append("400")
        visited.page.get_by_label("Base beside it").uncheck()
        ask(visited.page, "x" * 300)
        alert = visited.page.locator(".answer").get_by_role("alert")
        expect(alert).to_contain_text("This model's maximum context length is 200 tokens")
        expect(alert.get_by_role("button")).to_have_count(0)
        ask(visited.page, "hi")
        answered(visited.page)
    assert engine.requests[0].prompt == tuple(ids("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"))


@in_a_browser
def test_what_had_come_before_a_failure_is_kept(browser: Browser) -> None:
    def script(request: Request, index: int) -> list[Event]:
        failed = event(request, index, None, finish="error", error="out of memory")
        return [*steps(request, "abc", [receipt(1.0)] * 4)[:2], failed]

    with opened(browser, ScriptedEngine(script)) as visited:
        visited.page.get_by_label("Base beside it").uncheck()
        ask(visited.page)
        answer = answered(visited.page)
        expect(answer.get_by_role("alert")).to_contain_text("out of memory")
        assert answer.get_by_role("option").all_text_contents() == ["a", "b"]


@in_a_browser
def test_a_server_that_goes_is_missed_and_its_return_is_noticed(browser: Browser) -> None:
    engine = ScriptedEngine(MIXED)
    with opened(browser, engine) as visited:
        visited.allowed.append("net::ERR")
        banner = visited.page.locator("#trouble")
        visited.page.context.set_offline(True)
        ask(visited.page)
        expect(visited.page.locator(".answer").first).to_contain_text("The server cannot be reached")
        expect(banner).to_contain_text("Looking again")
        visited.page.context.set_offline(False)
        expect(banner).to_be_hidden()
        visited.page.locator(".answer").first.get_by_role("button", name="Ask again").click()
        answered(visited.page)


@in_a_browser
def test_a_stream_that_breaks_off_says_so(browser: Browser) -> None:
    with opened(browser, ScriptedEngine(MIXED)) as visited:
        whole = 'data: {"choices":[{"index":0,"delta":{"content":"ab"},"finish_reason":null}]}\n\n'
        visited.page.route("**/chat/completions", lambda route: route.fulfill(status=200, body=whole))
        ask(visited.page)
        expect(visited.page.locator(".answer").first).to_contain_text("The connection broke in the middle")
        expect(visited.page.locator(".tokens").first).to_have_text("ab")


@in_a_browser
def test_a_key_is_asked_for_and_stays_in_the_tab(browser: Browser) -> None:
    with opened(browser, ScriptedEngine(MIXED), keys=("secret",), allowed=["401"]) as visited:
        page = visited.page
        expect(page.get_by_text("the API key is missing or wrong").first).to_be_visible()
        key = page.get_by_label("Key", exact=True)
        expect(key).to_be_focused()
        key.fill("wrong")
        key.press("Enter")
        expect(key).to_have_value("")
        expect(page.get_by_text("the API key is missing or wrong").first).to_be_visible()
        key.fill("secret")
        key.press("Enter")
        expect(key).to_be_hidden()
        ask(page)
        answered(page)
        assert page.evaluate("Object.values(sessionStorage)") == ["secret"]
        assert page.evaluate("localStorage.length + document.cookie.length") == 0


# Corrections


@in_a_browser
def test_what_a_correction_beats_and_does_not_beat_is_said_in_words(browser: Browser) -> None:
    with opened(browser, ScriptedEngine(MIXED), bank_with(BOTH)) as visited:
        page = visited.page
        panel = page.get_by_role("region", name="Corrections")
        good, poor, bare = (panel.get_by_role("article", name=name) for name in ("brief", "polite", "tuned"))
        expect(good).to_contain_text("Beats base, shuffled-rewards; does not beat random-positions.")
        expect(poor).to_contain_text("Does not beat base, random-positions, shuffled-rewards.")
        expect(bare).to_contain_text("Never evaluated")
        for name, shown in (("brief", "brief"), ("polite", "polite (see its report)")):
            expect(page.get_by_label("Correction", exact=True).get_by_role("option", name=name)).to_have_text(shown)
        poor.get_by_role("button", name="Full report").click()
        report = page.get_by_role("dialog", name="polite")
        expect(report).to_contain_text("do not serve it")
        expect(report.get_by_role("row", name="correction − base +0.043")).to_contain_text("[−0.003, +0.090]")
        expect(report.get_by_role("row", name=re.compile("^shuffled-rewards 0"))).to_be_visible()
        teacher = report.get_by_role("row", name=re.compile("^teacher 0"))
        expect(teacher.get_by_role("cell").last).to_have_text("")
        page.keyboard.press("Escape")
        expect(report).to_be_hidden()


@in_a_browser
def test_a_report_that_cannot_be_shown_hides_no_other_correction(browser: Browser) -> None:
    reports = {"brief": {"differences": 5, "verdict": 1}, "polite": POOR}
    with opened(browser, ScriptedEngine(MIXED), bank_with(reports)) as visited:
        panel = visited.page.get_by_role("region", name="Corrections")
        expect(panel.get_by_role("article", name="brief")).to_contain_text("Its report cannot be shown")
        expect(panel.get_by_role("article", name="polite")).to_contain_text("Does not beat base")
        ask(visited.page)
        answered(visited.page)


# For everybody


@in_a_browser
@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 360)])
def test_axe_finds_no_serious_fault(browser: Browser, scheme: Any, width: int) -> None:
    engine = ScriptedEngine(MIXED)
    size = {"width": width, "height": 800}
    with opened(browser, engine, bank_with(BOTH), color_scheme=scheme, viewport=size) as visited:
        page = visited.page
        faults = {"welcome": find_faults(page)}
        ask(page)
        answer = answered(page)
        answer.get_by_role("button", name="Receipts as a table").click()
        token(answer, "c").focus()
        faults["answer"] = find_faults(page)
        engine.refusal = EngineFailure("broken")
        visited.allowed.append("500")
        ask(page)
        expect(page.locator(".answer").last.get_by_role("alert")).to_be_visible()
        faults["error"] = find_faults(page)
        if width < 800:
            page.get_by_role("button", name="Settings").click()
            faults["settings"] = find_faults(page)
        page.get_by_role("button", name="Full report").first.click()
        faults["report"] = find_faults(page)
    assert faults == {state: [] for state in faults}


def find_faults(page: Page) -> list[str]:
    """What axe calls serious or critical, and where."""
    found = Axe().run(page).response
    assert found["passes"], "it ran"
    return [
        f"{fault['id']}: {node['html']}"
        for fault in found["violations"]
        if fault["impact"] in ("serious", "critical")
        for node in fault["nodes"]
    ]


@in_a_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_ramp_is_even_and_text_on_it_is_legible(browser: Browser, scheme: Any) -> None:
    with opened(browser, ScriptedEngine(MIXED), color_scheme=scheme) as visited:
        shades = visited.page.locator(".ramp i").evaluate_all(
            "nodes => nodes.map(node => getComputedStyle(node).backgroundColor)"
        )
        ink = visited.page.evaluate("getComputedStyle(document.body).color")
    labs = [oklab(shade) for shade in shades]
    ends = math.dist(labs[0], labs[-1])
    distances = [math.dist(one, other) for one, other in pairwise(labs)]
    assert len(labs) == 9
    assert ends > 0.15
    assert distances == pytest.approx([ends / 8] * 8, rel=0.05), "equal steps in Oklab, on a line"
    assert all(contrast(oklab(ink), lab) >= 4.5 for lab in labs)


def oklab(css: str) -> tuple[float, ...]:
    """A computed colour, as Chromium writes those that were given in oklch, or mixed in oklab."""
    kind, numbers = re.fullmatch(r"(oklab|oklch)\(([^)]*)\)", css).groups()  # type: ignore[union-attr]
    lightness, a, b = map(float, numbers.split())
    if kind == "oklch":
        a, b = a * math.cos(math.radians(b)), a * math.sin(math.radians(b))
    return lightness, a, b


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """WCAG's, of two colours in Oklab."""
    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def luminance(lab: tuple[float, ...]) -> float:
    lightness, a, b = lab
    l, m, s = (
        (lightness + x * a + y * b) ** 3
        for x, y in ((0.3963377774, 0.2158037573), (-0.1055613458, -0.0638541728), (-0.0894841775, -1.2914855480))
    )
    red = 4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s
    green = -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s
    blue = -0.0041960863 * l - 0.7034186147 * m + 1.7076147010 * s
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@in_a_browser
def test_it_fits_360_pixels_and_moves_nothing_for_who_asks_for_that(browser: Browser) -> None:
    engine = PacedEngine(MIXED, pace=600)
    size = {"width": 360, "height": 700}
    with opened(browser, engine, bank_with(BOTH), viewport=size, reduced_motion="reduce") as visited:
        page = visited.page
        fits = """[document.documentElement, document.getElementById("talk")].every(
            (box, i) => box.scrollWidth <= box.clientWidth && (i || box.scrollHeight <= box.clientHeight))"""
        assert page.evaluate(fits)
        expect(page.get_by_label("Strength")).to_be_hidden()
        ask(page)
        waiting = page.locator("[aria-busy] .tokens").first
        assert waiting.evaluate("node => getComputedStyle(node, '::after').animationName") == "none"
        page.keyboard.press("Escape")
        engine.pace = 0.0
        ask(page)
        answered(page).get_by_role("button", name="Receipts as a table").click()
        assert page.evaluate(fits)
        page.get_by_role("button", name="Settings").click()
        expect(page.get_by_label("Strength")).to_be_visible()
        assert page.evaluate(fits)
        page.get_by_role("button", name="Close").click()
        expect(page.get_by_label("Strength")).to_be_hidden()


@in_a_browser
def test_an_answer_is_only_ever_added_to(browser: Browser) -> None:
    text = "abcdefgh" * 25
    engine = PacedEngine(script_of(text, [receipt(i % 40 / 10) for i in range(len(text) + 1)]), pace=0.002)
    with opened(browser, engine) as visited:
        visited.page.get_by_label("Base beside it").uncheck()
        visited.page.evaluate(
            """() => {
                window.removed = 0;
                new MutationObserver((seen) => {
                    for (const { target, removedNodes } of seen)
                        if (target.className === "tokens") window.removed += removedNodes.length;
                }).observe(document.getElementById("turns"), { childList: true, subtree: true });
            }"""
        )
        ask(visited.page)
        answer = answered(visited.page)
        assert "".join(answer.get_by_role("option").all_text_contents()) == text + "■"
        assert visited.page.evaluate("window.removed") == 0
