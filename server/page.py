"""The page at `/`: ask, and see where the model hesitated and what the correction did there.

Invariant: one response holds all of it, put together once, and asks nothing of any other host: the policy that goes
with it lets the browser run the one script and the one style whose hashes it names, and speak to this server alone.

    add_routes(app)
"""

import base64
import hashlib
from pathlib import Path

from fastapi import FastAPI
from starlette.responses import Response

FILES = Path(__file__).parent / "web"
SCRIPTS = ("dom", "words", "wire", "tip", "figures", "answer", "settings", "corrections", "chat")  # in this order
_STYLE, _SCRIPT = "<style></style>", '<script type="module"></script>'  # the places in page.html


def add_routes(app: FastAPI) -> None:
    """Serve the page at `/`."""
    content, headers = build()

    @app.get("/", include_in_schema=False)
    async def show_page() -> Response:
        return Response(content, headers=headers, media_type="text/html; charset=utf-8")


def build() -> tuple[bytes, dict[str, str]]:
    """The page and its headers."""
    html, style = _read("page.html"), _read("page.css")
    script = "\n".join(_read(f"{name}.js") for name in SCRIPTS)
    assert html.count(_STYLE) == html.count(_SCRIPT) == 1
    html = html.replace(_STYLE, f"<style>{style}</style>").replace(_SCRIPT, f'<script type="module">{script}</script>')
    policy = {
        "default-src": "'none'",
        "script-src": _hash(script),
        "style-src": _hash(style),
        "connect-src": "'self'",
        "img-src": "data:",  # the icon
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return html.encode(), {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }


def _read(name: str) -> str:
    return (FILES / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
