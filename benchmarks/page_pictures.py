"""The page at `/` as it looks, light and dark: results/page/*.png, the first of which the README shows.

    trimtab serve demo & python benchmarks/page_pictures.py [--ask "..."]

Asks the server one question, without and with its correction, and takes a picture of the answers while the mouse rests
on the first token that the correction changed. Needs Chromium and the extra `dev`.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from playwright.sync_api import Browser

from browser import CHROMIUM, NO_CHROMIUM, PATIENCE, chromium, visit

ROOT = Path(__file__).resolve().parent.parent
QUESTION = 'Write one short sentence about the sea that contains the words "lantern" and "garden".'


def main() -> None:
    parser = argparse.ArgumentParser(description="Take pictures of the page.")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of a server with a correction")
    parser.add_argument("--ask", default=QUESTION, help="the question")
    parser.add_argument("--seed", type=int, default=1, help="of both answers")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "page", help="the folder of the pictures")
    args = parser.parse_args()
    if CHROMIUM is None:
        raise SystemExit(NO_CHROMIUM)
    with chromium() as browser:
        for scheme in ("light", "dark"):
            picture(browser, args.url, scheme, args.ask, args.seed, args.out / f"{scheme}.png")


def picture(browser: Browser, url: str, scheme: str, question: str, seed: int, path: Path) -> None:
    """Raises playwright's TimeoutError when the correction changed no token: another seed may do."""
    with visit(browser, url, viewport={"width": 1320, "height": 780}, color_scheme=scheme) as visited:
        page = visited.page
        page.locator("#corrections article").first.wait_for()
        page.get_by_label("Seed", exact=True).fill(str(seed))
        page.get_by_label("Message").fill(question)
        page.get_by_label("Message").press("Enter")
        for i in range(2):
            page.locator(".answer").get_by_text("ended").nth(i).wait_for(timeout=10 * PATIENCE)
        page.locator(".token.flip").first.hover()
        page.get_by_role("tooltip").wait_for()
        page.screenshot(path=path)


if __name__ == "__main__":
    main()
