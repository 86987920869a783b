"""Says what torchq.hf needs, before the imports behind this one fail."""

import re

LEAST = "5.17"  # the oldest version with which the tests passed


def check() -> None:
    """Raises ImportError where transformers is missing or too old."""
    try:
        from transformers import __version__ as version
    except ImportError as error:
        raise ImportError(f"torchq.hf needs transformers: pip install 'transformers>={LEAST}'") from error
    if [int(part) for part in re.findall(r"\d+", version)[:2]] < [int(part) for part in LEAST.split(".")]:
        raise ImportError(f"torchq.hf needs transformers {LEAST} or later, and this is {version}.")


check()
