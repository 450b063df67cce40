"""Models of the Hugging Face hub by their id, ORG/NAME or ORG/NAME@REVISION, through `huggingface_hub`: its cache, its
token, its offline switch. Only weights, configs and tokenizers are fetched, never code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from camelid.errors import CamelidError, InputError, MissingExtra

ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(?:@[\w./-]+)?")
SETTINGS = ["*.json", "*.jinja", "*.model"]
WEIGHTS = ("*.safetensors", "*.bin")  # the second only where there is none of the first


OURS = ("runs", "out", "models")  # where recipes and pages here keep what they make: a slip, not an ORG


def is_hub_id(source: str) -> bool:
    """Whether a MODEL that is no path may be a hub id."""
    return ID.fullmatch(source) is not None and source.partition("/")[0] not in OURS


def snapshot(source: str, cached: bool = False) -> Path:
    """The folder of a hub id, fetched when it is not in the cache, unless only that is looked into (`cached`); its name
    is the commit. Raises InputError when there is no such model or revision, or it must be asked for; CamelidError when
    the hub cannot be reached."""
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise MissingExtra("huggingface_hub", "hub", f"{source}, a model of the hub,") from None
    name, _, revision = source.partition("@")
    fetch: Any = huggingface_hub.snapshot_download
    try:
        for weights in WEIGHTS:
            more = {"local_files_only": True} if cached else {}
            folder = Path(fetch(name, revision=revision or None, allow_patterns=[*SETTINGS, weights], **more))
            if any(folder.glob(weights)):
                break
    except errors.LocalEntryNotFoundError as error:
        reason = f"it is not in the hub's cache, and the hub was not reached: {_short(error)}"
        raise InputError(f"no model at {source}: no such folder; as a hub id, {reason}") from None
    except errors.GatedRepoError:
        raise InputError(f"{source} is gated: ask for it at https://hf.co/{name}, then `hf auth login`") from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise InputError(f"no model at {source}: no such folder, and not on the hub: {_short(error)}") from None
    except (errors.HfHubHTTPError, OSError) as error:
        raise CamelidError(f"{source} could not be fetched: {_short(error)}") from None
    return folder


def _short(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
