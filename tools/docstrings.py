"""How docstrings go to the site: an extension of Griffe, which reads them for mkdocs.yml.

torchq's docstrings end in a doctest, and name parameters as `x`. Griffe shows a doctest as code only in a section of
its own, `Examples:`. So one is put around each.
"""

import re
from typing import Any

import griffe

DOCTEST = re.compile(r"^>>> .*?(?=\n\n(?!>>> )|\Z)", re.DOTALL | re.MULTILINE)


class Doctests(griffe.Extension):
    """Puts the doctests of each docstring into a section, as Griffe's Google style wants them."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Is called once for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = DOCTEST.sub(in_section, obj.docstring.value)


def in_section(doctest: re.Match[str]) -> str:
    """Gives the doctest, indented, below the title of the section."""
    return "Examples:\n" + "\n".join(f"    {line}".rstrip() for line in doctest[0].splitlines())
