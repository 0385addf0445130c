"""Pages for people: GET / (what is served, live, and a chat), GET /docs, and the files of both, all of them our own.

The pages are open, with keys too: they hold nothing of the server's, and what they show they fetch with the key that
their reader gives them.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

from fastapi import APIRouter, Response

from server.errors import ApiError

router = APIRouter()

OWN_FILES = Path(__file__).parents[1] / "pages"
SWAGGER_PACKAGE = "fastapi_offline"  # whose static folder has the files of Swagger UI
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".png": "image/png"}
FILES: dict[str, Path | str] = {
    "page.css": OWN_FILES,
    "page.js": OWN_FILES,
    "docs.js": OWN_FILES,
    "key.js": OWN_FILES,
    "swagger-ui.css": SWAGGER_PACKAGE,
    "swagger-ui-bundle.js": SWAGGER_PACKAGE,
}

_ONLY_OWN = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "connect-src": "'self'",
    "img-src": "'self' data:",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}
_WITH_INLINE_STYLES = _ONLY_OWN | {"style-src": "'self' 'unsafe-inline'"}  # Swagger UI writes style attributes


@router.get("/", include_in_schema=False)
async def home() -> Response:
    return _page("index.html", _ONLY_OWN)


@router.get("/docs", include_in_schema=False)
async def docs() -> Response:
    return _page("docs.html", _WITH_INLINE_STYLES)


@router.get("/static/{name}", include_in_schema=False)
async def static_file(name: str) -> Response:
    if name not in FILES:
        raise ApiError(404, f"there is no /static/{name[:100]}; it has {', '.join(FILES)}")
    return Response(_read(name), media_type=TYPES[Path(name).suffix], headers=_headers(_ONLY_OWN))


def _page(name: str, policy: dict[str, str]) -> Response:
    return Response(_read(name), media_type="text/html", headers=_headers(policy))


def _headers(policy: dict[str, str]) -> dict[str, str]:
    return {
        "Content-Security-Policy": "; ".join(f"{directive} {sources}" for directive, sources in policy.items()),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


@cache
def _read(name: str) -> bytes:
    """A file as it is: half a dozen of them, kept once they were asked for."""
    place = FILES.get(name, OWN_FILES)
    return ((place if isinstance(place, Path) else _static_of(place)) / name).read_bytes()


def _static_of(package: str) -> Path:
    """Its folder of static files, without running its code."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ApiError(501, f"the Python package {package} is not installed; pip install -e . brings it")
    return Path(spec.origin).parent / "static"
