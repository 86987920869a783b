"""Says what torchq.hf needs, before the imports behind this one fail."""


def check() -> None:
    """Raises ImportError where transformers is missing or too old."""
    try:
        from transformers import __version__ as version
    except ImportError as error:
        raise ImportError("torchq.hf needs transformers: pip install 'transformers>=5'") from error
    if int(version.partition(".")[0]) < 5:
        raise ImportError(f"torchq.hf needs transformers 5 or later, and this is {version}.")


check()
