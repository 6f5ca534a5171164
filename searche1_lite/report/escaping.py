"""Text that somebody else wrote, made safe to stand in the report: in HTML, in an attribute, in a data block.

Characters that would hide or reorder what stands around them are shown as what they are. `viewer.js` does the same for
the text that it shows.
"""

import html
import json
import re
from typing import Any

_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufffe\uffff\ud800-\udfff]"
)


def visible(text: object) -> str:
    """The text with control characters as their pictures and bidirectional controls by number; tab and newline stay."""
    return _HIDDEN.sub(_shown, str(text))


def _shown(match: re.Match[str]) -> str:
    code = ord(match[0])
    return chr(0x2400 + code) if code < 0x20 else f"⟨U+{code:04X}⟩"


def escape(text: object) -> str:
    """For HTML text and quoted attributes."""
    return html.escape(visible(text))


def script_json(data: Any) -> str:
    """JSON for a `<script type="application/json">`: plain ASCII, with nothing that an HTML parser would act on.

    Raises:
        ValueError: for NaN and infinities, which JSON does not have.
    """
    compact = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return compact.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
