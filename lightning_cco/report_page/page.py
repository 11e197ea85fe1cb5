"""``report.html``: one file with the data, the scripts and the libraries in it; nothing is loaded from anywhere."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from typing import Any

from lightning_cco.names import printable
from lightning_cco.report_page.data import to_json

ASSETS = files("lightning_cco.report_page") / "assets"
VENDOR = files("lightning_cco.report_page") / "vendor"
SCRIPTS = (
    "data.js",
    "tree.js",
    "charts.js",
    "what_if.js",
    "head.js",
    "layout.js",
    "graph.js",
    "print_graph.js",
    "layer.js",
    "table.js",
    "sections.js",
    "search.js",
)
"""Our own, in the order in which they run."""


def page(data: Mapping[str, Any]) -> str:
    """The page of a report.

    Scripts run by their hashes alone, which the page's content security policy lists: what comes with the data, such as a module named ``<script>``,
    is shown as text everywhere.

    Args:
        data: The content of ``report.json``.
    """
    shell = _shell()
    title = escape(printable(data["title"] or "lightning_cco", 120))
    before, _, after = shell.partition("{{data}}")
    return before.replace("{{title}}", title) + in_script(to_json(data)) + after


def in_script(text: str) -> str:
    r"""JSON that is safe in a script element, which ends at ``</script`` even inside of quotes.

    >>> in_script('{"a":"</script>"}')
    '{"a":"\\u003c/script>"}'
    """
    return text.replace("<", "\\u003c")


@functools.lru_cache(maxsize=1)
def _shell() -> str:
    """The page without title and data."""
    template = (ASSETS / "page.html").read_text(encoding="utf-8")
    vendored = [(VENDOR / entry["file"]).read_bytes().decode("utf-8") for entry in libraries()]
    own = [(ASSETS / name).read_text(encoding="utf-8") for name in SCRIPTS]
    scripts = [*vendored, *own]
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in scripts)
    policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
    licences = "\n\n".join(_licence(entry) for entry in libraries())
    return (
        template.replace("{{policy}}", policy)
        .replace("{{style}}", (ASSETS / "style.css").read_text(encoding="utf-8"))
        .replace("{{licences}}", escape(licences))
        .replace("{{scripts}}", "\n".join(f"<script>{text}</script>" for text in scripts))
    )


def libraries() -> list[dict[str, Any]]:
    """The bundled libraries: package, version, file, SHA-256 and licence of each."""
    found: list[dict[str, Any]] = json.loads((VENDOR / "versions.json").read_text(encoding="utf-8"))
    return found


def _licence(entry: Mapping[str, Any]) -> str:
    """Package, version and licence, whose text must come with each copy."""
    text = (VENDOR / entry["license_file"]).read_text(encoding="utf-8").strip()
    return f"{entry['package']} {entry['version']} ({entry['license']})\n\n{text}"
