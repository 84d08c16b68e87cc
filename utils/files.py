"""Files that are there whole or not at all, whenever the process is killed."""

import json
from pathlib import Path
from typing import Any


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Whole or not at all."""
    write_whole(path, (json.dumps(values, indent=1) + "\n").encode())


def write_whole(path: Path, data: bytes) -> None:
    """Whole or not at all, whenever the process is killed."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    part.replace(path)
