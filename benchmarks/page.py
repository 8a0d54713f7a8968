"""The page at `/` in headless Chromium: how soon it is painted, and whether a long answer stays smooth.

    python benchmarks/page.py [--tokens 500] [--rate 100] [--loads 10]

The server is the real one over a scripted engine, on loopback, in this process; every load has a fresh profile
and a fresh process of the browser, and then is loaded again. Beside each, a page of one word says what the browser
itself takes on this machine. The answer comes in two streams, base and steered side by
side, `--rate` tokens a second each. A long task is the browser's word for 50 ms or more without a chance to react; a
frame is late when the one before it was drawn over 34 ms ago, so that one of 60 Hz was missed. What else the machine
does shows in all of these; the CPU time of the page's main thread is its own. Needs Chromium and the extra `dev`.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import machine
from playwright.sync_api import Browser, CDPSession
from starlette.responses import HTMLResponse

from browser import CHROMIUM, NO_CHROMIUM, PATIENCE, PacedEngine, chromium, receipt, steps, visit
from scripted import ids, loopback, scripted_app
from trimtab.server.engine.event import Event, Receipt
from trimtab.server.engine.request import Request

WORDS = "the tide turns and the small rudder turns the large one while the ship goes on over the water "
LATE = 34.0  # ms
CPU = ("Task", "Script", "Layout", "RecalcStyle")  # all of the main thread's, and its larger parts
WATCH = """() => {
  window.long = [];
  new PerformanceObserver((list) => { for (const task of list.getEntries()) window.long.push(task.duration); })
    .observe({ type: "longtask" });
  window.frames_ = [];
  let last = performance.now();
  const tick = () => {
    const now = performance.now();
    window.frames_.push(now - last);
    last = now;
    requestAnimationFrame(tick);
  };
  requestAnimationFrame(tick);
}"""
PAINTED = """() => new Promise((resolve) => {
  const told = (list) => { for (const one of list.getEntriesByName("first-paint")) resolve(one.startTime); };
  new PerformanceObserver(told).observe({ type: "paint", buffered: true });
})"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the page in a real browser.")
    parser.add_argument("--tokens", type=int, default=500, help="tokens an answer")
    parser.add_argument("--rate", type=float, default=100, help="tokens a second and stream")
    parser.add_argument("--loads", type=int, default=10, help="loads of the page")
    args = parser.parse_args()
    if CHROMIUM is None:
        raise SystemExit(NO_CHROMIUM)
    version = subprocess.run([CHROMIUM, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    engine = PacedEngine(lambda request, index: script(request, args.tokens), 1 / args.rate)
    app = scripted_app(engine)  # type: ignore[arg-type]
    app.add_route("/word", lambda _: HTMLResponse("<!doctype html><link rel=icon href=data:,>word"))
    with loopback(app, engine) as url, chromium() as browser:
        paints = [paint(browser, url) for _ in range(args.loads)]
        smooth = watch(browser, url, args.tokens)
    here = machine.describe()
    print(machine.card(here, browser=version, answer=f"2 streams of {args.tokens} tokens, {args.rate:g} tokens/s each"))
    print()
    for name in paints[0]:
        times = [load[name] for load in paints]
        print(f"{name.replace('_', ' '):>16}  median {statistics.median(times):.0f} ms, worst {max(times):.0f} ms")
    print(f"{'long tasks':>16}  {smooth['long_tasks']}, the longest {smooth['longest_task_ms']:.0f} ms")
    share = f"{smooth['late_frames']} of {smooth['frames']} frames"
    print(f"{'late frames':>16}  {share}; p50 {smooth['frame_ms_p50']:.1f} ms, p99 {smooth['frame_ms_p99']:.1f} ms")
    parts = ", ".join(f"{name.lower()} {smooth[f'{name.lower()}_cpu_s']:.2f}" for name in CPU)
    print(f"{'CPU':>16}  {parts} s, for both answers")
    facts = {"browser": version, "tokens": args.tokens, "rate": args.rate, "loads": args.loads}
    row = {f"{name}_ms_p50": statistics.median(load[name] for load in paints) for name in paints[0]} | smooth
    print(json.dumps({"benchmark": "page", **facts, "machine": here, "results": [row]}))


def paint(browser: Browser, url: str) -> dict[str, float]:
    """In ms from each navigation's start: the first paint, of the page, of it again and of one word; the page's use."""
    with visit(browser, f"{url}/word") as visited:
        word = visited.page.evaluate(PAINTED)
    with visit(browser, url) as visited:
        visited.page.locator("#corrections article").first.wait_for()
        ready: float = visited.page.evaluate("performance.now()")
        painted = visited.page.evaluate(PAINTED)
        visited.page.reload()
        again = visited.page.evaluate(PAINTED)
        return {"first_paint": painted, "reloaded": again, "a_word": word, "usable": ready}


def watch(browser: Browser, url: str, tokens: int) -> dict[str, Any]:
    """How the browser fared while two long answers came."""
    with visit(browser, url) as visited:
        page = visited.page
        page.locator("#corrections article").first.wait_for()
        page.get_by_label("Most tokens").fill(str(tokens))
        page.get_by_label("Message").fill("hi")
        page.evaluate(WATCH)
        counters = page.context.new_cdp_session(page)
        counters.send("Performance.enable", {"timeDomain": "threadTicks"})
        before = cpu_of(counters)
        page.get_by_label("Message").press("Enter")
        ended = page.locator(".answer").get_by_text("ended")
        for i in range(2):
            ended.nth(i).wait_for(timeout=10 * PATIENCE)
        assert page.locator(".token").count() == 2 * tokens
        cpu = {name: seconds - before[name] for name, seconds in cpu_of(counters).items()}
        long, frames = page.evaluate("[window.long, window.frames_]")
    frames.sort()
    return {
        **{f"{name.lower()}_cpu_s": seconds for name, seconds in cpu.items()},
        "long_tasks": len(long),
        "longest_task_ms": max(long, default=0.0),
        "frames": len(frames),
        "late_frames": sum(frame > LATE for frame in frames),
        "frame_ms_p50": frames[len(frames) // 2],
        "frame_ms_p99": frames[math.ceil(0.99 * len(frames)) - 1],
    }


def cpu_of(counters: CDPSession) -> dict[str, float]:
    """CPU seconds of the page's main thread so far: all of it, and its larger parts."""
    found = {one["name"]: one["value"] for one in counters.send("Performance.getMetrics")["metrics"]}
    return {name: found[f"{name}Duration"] for name in CPU}


def script(request: Request, tokens: int) -> list[Event]:
    """A long answer, a third of its steps steered and some of them flips."""
    text = (WORDS * (tokens // len(WORDS) + 1))[: tokens - 1]
    return steps(request, text, [told(i) for i in range(tokens)])


def told(i: int) -> Receipt:
    if i % 3:
        return receipt(i % 7 / 10)
    base, steered = ids("ab") if i % 9 == 0 else ids("aa")
    acted = {"open": True, "fired": True, "base_token": base, "steered_token": steered, "kl": 0.05, "strength": 1.0}
    return receipt(1 + i % 13 / 4, **acted)


if __name__ == "__main__":
    main()
