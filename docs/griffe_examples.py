"""What the reference's build reads otherwise than written: `Example:` in a docstring is a section of examples."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Griffe knows `Examples:`; one is singular here."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the section of each object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
