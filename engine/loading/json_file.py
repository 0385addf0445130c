"""A JSON file beside a model's weights, read with bounds: it comes from whoever made the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from engine.models.model_error import ModelError

JsonObject = dict[str, object]

_MAX_BYTES = 1 << 27  # an index of a million weights has 100 MB


def read_json_object(path: Path) -> JsonObject:
    """ModelError for a file that is missing, too large, nested without end or no object of JSON."""
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise ModelError(f"{path} has {size:,} bytes, and no such file has more than {_MAX_BYTES:,}; it is damaged")
        content: object = json.loads(path.read_text(encoding="utf-8"))
    except ModelError:
        raise
    except RecursionError as error:
        raise ModelError(f"{path} is nested too deeply to be what it should be; download it again") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}; download it again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds {type(content).__name__} where an object of JSON should be; download it again")
    return content
