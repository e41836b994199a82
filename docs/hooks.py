"""What the build of the documentation adds to MkDocs: docstrings are written with a few roles of Sphinx."""

from __future__ import annotations

import re
from typing import Any

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|exc|data):<code>~?([^<]+)</code>")
_SHORT = re.compile(r":(?:class|func|meth|mod|attr|exc|data):<code>~([^<]+)</code>")
_MATH = re.compile(r"<p>\.\. math:: (.*?)</p>", re.S)


def on_page_content(html: str, **kwargs: Any) -> str:
    """Show a role as the code that it names, and a formula as its source: there is no renderer without a network."""
    html = _SHORT.sub(lambda match: f"<code>{match[1].rpartition('.')[2]}</code>", html)
    html = _ROLE.sub(r"<code>\1</code>", html)
    return _MATH.sub(r"<pre><code>\1</code></pre>", html)
