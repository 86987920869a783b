"""Directories of Hugging Face models: opened in float or in int8, and inputs for them.

A SentenceTransformer's directory holds such a model too, in the folder that its modules.json names first. torchq reads
and writes that one, and leaves the rest of the directory as it is.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from torchq.command_line.console import UserError, working

Batch = dict[str, Tensor]

_IMAGE_SIZE = 224
_LONGEST = 512  # tokens of a text, for models that know no limit


@dataclass(frozen=True)
class Opened:
    """A model out of a directory.

    Args:
        model: in eval mode.
        folder: where its config.json is.
        config: of transformers.
    """

    model: Any
    folder: Path
    config: Any

    @property
    def takes_ids(self) -> bool:
        """Whether its input are tokens."""
        return str(self.model.main_input_name) == "input_ids"

    def tokenizer(self) -> Any:
        """The tokenizer beside the model.

        Raises:
            UserError: there is none.
        """
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        except Exception as error:
            raise UserError(f"{self.folder} has no tokenizer that can be loaded; texts need one: {error}") from error
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        return tokenizer

    def longest(self, tokenizer: Any) -> int:
        """How many tokens a text may have: by a SentenceTransformer's settings, the tokenizer, and the positions."""
        settings = self.folder / "sentence_bert_config.json"
        known = [_json(settings, dict).get("max_seq_length") if settings.exists() else None]
        known += [tokenizer.model_max_length, getattr(self.config, "max_position_embeddings", None), _LONGEST]
        return min(int(length) for length in known if length)


def model_folder(directory: Path) -> Path:
    """Where in a directory the model's config.json is.

    Raises:
        UserError: nowhere.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is no directory. Download a model: hf download NAME --local-dir {directory}")
    modules = directory / "modules.json"
    parts = _json(modules, list) if modules.exists() else [{"path": ""}]
    folder = directory / next((part["path"] for part in parts if isinstance(part, dict) and "path" in part), "")
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} holds no config.json. Pass a directory that save_pretrained wrote.")
    return folder


def open_float(directory: Path) -> Opened:
    """A float model.

    Raises:
        UserError: there is none, or it is quantized already.
    """
    folder = model_folder(directory)
    method = _method(folder)
    if method is not None:
        raise UserError(f"{directory} is quantized already, by {method}. Pass the float model.")
    return _opened(folder)


def open_int8(directory: Path) -> Opened:
    """A model that torchq converted.

    Raises:
        UserError: there is none.
    """
    folder = model_folder(directory)
    method = _method(folder)
    if method != "torchq":
        is_ = "in float" if method is None else f"quantized by {method}"
        raise UserError(f"{directory} is {is_}. Convert it first: torchq convert {directory} OUT")
    return _opened(folder)


def is_int8(directory: Path) -> bool:
    """Whether torchq converted what this directory holds."""
    return _method(model_folder(directory)) == "torchq"


def float_twin(opened: Opened) -> nn.Module:
    """A float model of the same class and shape. Its weights are random, which takes the same time."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(opened.folder, local_files_only=True)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    twin: nn.Module = type(opened.model)._from_config(config, dtype=opened.model.dtype)
    return twin.eval()


def _method(folder: Path) -> str | None:
    quantized = _json(folder / "config.json", dict).get("quantization_config")
    if quantized is None:
        return None
    return str(quantized.get("quant_method", "another tool")) if isinstance(quantized, dict) else "another tool"


def _json(path: Path, kind: type) -> Any:
    """What a file of JSON holds.

    Raises:
        UserError: it can't be read, or holds something else than a `kind`.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} can't be read: {error}. Was it copied as a whole?") from error
    if not isinstance(found, kind):
        raise UserError(f"{path} should hold a {kind.__name__}, and holds a {type(found).__name__}.")
    return found


def _opened(folder: Path) -> Opened:
    _require_transformers()
    import transformers
    from transformers.utils import logging

    import torchq.hf  # noqa: F401  (registers quant_method "torchq")

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with working(f"loading {folder}"):
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        known = [getattr(transformers, name, None) for name in config.architectures or ()]
        cls = next((each for each in known if each is not None), transformers.AutoModel)
        try:
            model = cls.from_pretrained(folder, local_files_only=True)
        except SafetensorError as error:
            raise UserError(f"the weights in {folder} can't be read: {error}. Were they copied as a whole?") from error
    return Opened(model.eval(), folder, config)


def _require_transformers() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError(f"models need transformers ({error}). Install it: pip install transformers") from error


# ---- Inputs ---------------------------------------------------------------------------------------------------------


def read_texts(path: Path, limit: int) -> list[str]:
    """The lines of a file that are not empty, up to `limit`.

    Raises:
        UserError: there is no such file, or it has no text.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read as text: {error}") from error
    texts = [line for line in lines if line.strip()][:limit]
    if not texts:
        raise UserError(f"{path} has no texts. Write one in each line, a hundred or more.")
    return texts


def tokenized(opened: Opened, texts: Sequence[str], batch_size: int, max_length: int | None) -> Iterator[Batch]:
    """Batches of texts as the model takes them.

    Raises:
        UserError: the model takes no tokens, or has no tokenizer.
    """
    if not opened.takes_ids:
        raise UserError(f"{type(opened.model).__name__} takes {opened.model.main_input_name}, and no texts.")
    tokenizer = opened.tokenizer()
    longest = max_length or opened.longest(tokenizer)
    for start in range(0, len(texts), batch_size):
        part = list(texts[start : start + batch_size])
        batch = dict(tokenizer(part, padding=True, truncation=True, max_length=longest, return_tensors="pt"))
        yield _for_decoder(opened, batch)


def random_batch(opened: Opened, size: int, tokens: int) -> Batch:
    """An input of this shape, the same at each call; of an image model, `size` images, and of a speech model, sounds.

    Raises:
        UserError: the model takes something else.
    """
    config, name = opened.config, str(opened.model.main_input_name)
    if name not in _EXAMPLES:
        raise UserError(
            f"{type(opened.model).__name__} takes {name}, of which torchq makes no example. "
            "Use torchq.verify and torchq.profile_layers in Python."
        )
    batch = _EXAMPLES[name](opened, size, tokens)
    placed = any(hasattr(config, key) for key in ("image_token_id", "image_token_index"))  # images among the tokens
    if opened.takes_ids and hasattr(config, "vision_config") and not placed:
        batch |= _images(opened, size, tokens)
    return runs(opened, _for_decoder(opened, batch))


def runs(opened: Opened, batch: Batch) -> Batch:
    """The same batch, with which the model can be called.

    Raises:
        UserError: it can't.
    """
    try:
        with torch.no_grad():
            opened.model(**batch)
    except Exception as error:
        raise UserError(
            f"{type(opened.model).__name__} can't be called with {' and '.join(batch)} alone: {error}. "
            "Use torchq.convert, verify and profile_layers in Python."
        ) from error
    return batch


def _ids(opened: Opened, size: int, tokens: int, *, limit: str = "max_position_embeddings") -> Batch:
    config = opened.config.get_text_config()
    longest = getattr(config, limit, None)
    if longest is not None and tokens > longest:
        raise UserError(f"{type(opened.model).__name__} takes {longest} tokens at most, got {tokens}.")
    ids = torch.randint(config.vocab_size, (size, tokens), generator=_random(), dtype=torch.int64, device="cpu")
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _images(opened: Opened, size: int, tokens: int) -> Batch:
    config = getattr(opened.config, "vision_config", opened.config)
    sides = getattr(config, "image_size", _IMAGE_SIZE)
    height, width = sides if isinstance(sides, (tuple, list)) else (sides, sides)
    return {"pixel_values": _normal(opened, size, getattr(config, "num_channels", 3), height, width)}


def _sounds(opened: Opened, size: int, tokens: int) -> Batch:
    step = getattr(opened.config, "inputs_to_logits_ratio", _SAMPLES)
    return {"input_values": _normal(opened, size, tokens * step + _SAMPLES)}


def _spectra(opened: Opened, size: int, tokens: int) -> Batch:
    """Of as many frames as Whisper wants, twice its positions; of others, as many as tokens."""
    frames = 2 * getattr(opened.config, "max_source_positions", tokens)
    bins = getattr(opened.config, "num_mel_bins", 80)
    batch = {"input_features": _normal(opened, size, bins, frames)}
    if getattr(opened.config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = _ids(opened, size, tokens, limit="max_target_positions")["input_ids"]
    return batch


_SAMPLES = 400  # what the first convolutions of speech models see at once, and about what they step by
_EXAMPLES: dict[str, Callable[[Opened, int, int], Batch]] = {
    "input_ids": _ids,
    "pixel_values": _images,
    "input_values": _sounds,
    "input_features": _spectra,
}


def _normal(opened: Opened, *shape: int) -> Tensor:
    return torch.randn(shape, generator=_random(), dtype=torch.float32, device="cpu").to(opened.model.dtype)


def _random() -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed(0)


def _for_decoder(opened: Opened, batch: Batch) -> Batch:
    """With an input for the decoder, where there is one that does not make its own."""
    if getattr(opened.config, "is_encoder_decoder", False) and "input_ids" in batch:
        batch["decoder_input_ids"] = batch["input_ids"]
    return batch
