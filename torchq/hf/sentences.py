"""Calibration of a SentenceTransformer from a list of texts."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from torchq.config import QConfig
from torchq.conversion import convert
from torchq.errors import BadTypeError, BadValueError, door

M = TypeVar("M", bound=nn.Module)


@door("torchq.hf.convert_sentence_transformer")
def convert_sentence_transformer(
    model: M,
    texts: Iterable[str],
    *,
    config: QConfig | None = None,
    batch_size: int = 32,
    prompt: str | None = None,
    inplace: bool = False,
    progress: bool | None = None,
) -> M:
    """`torchq.convert` of a SentenceTransformer, calibrated on texts. What is returned encodes, saves and is pooled.

    Args:
        model: a SentenceTransformer, on the CPU.
        texts: some hundred typical ones.
        config: see `torchq.convert`.
        batch_size: how many texts go through the model at once. Padding is no data.
        prompt: put before each text, as `model.encode(texts, prompt=...)` does.
        inplace: see `torchq.convert`.
        progress: see there.

    Raises:
        TypeError: `model` is no SentenceTransformer, or a text is no string.
        ValueError: no texts, or what `torchq.convert` raises.
    """
    prepare = getattr(model, "preprocess", None) or getattr(model, "tokenize", None)
    if prepare is None:
        raise BadTypeError(f"model must be a SentenceTransformer, got {type(model).__name__}.")
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise BadTypeError(f"texts must be a list of strings, got {texts!r}.")
    texts = list(texts)
    wrong = next((text for text in texts if not isinstance(text, str)), None)
    if wrong is not None:
        raise BadTypeError(f"texts must be a list of strings, got one with {wrong!r}.")
    if not texts or batch_size < 1:
        raise BadValueError(f"there must be texts, in batches of at least 1; got {len(texts)} by {batch_size}.")
    more = {} if prompt is None else {"prompt": prompt}
    batches = [prepare(texts[i : i + batch_size], **more) for i in range(0, len(texts), batch_size)]
    return convert(model, batches, config=config, forward=_embed, inplace=inplace, progress=progress)


def _embed(model: nn.Module, features: Mapping[str, Any]) -> Tensor:
    embeddings: Tensor = model(dict(features))["sentence_embedding"]
    return embeddings
