"""A checkpoint's config as vLLM reads it, with the defaults of its model type."""

import json
import tempfile
from pathlib import Path
from typing import Any

# Names code beside the config, for which transformers would ask at the terminal.
_REMOTE_CODE = "auto_map"


def read_config(config: dict[str, Any]) -> Any:
    """vLLM's config object of a model config.

    Args:
        config: the content of a config.json.

    Raises:
        Exception: whatever vLLM raises for a config that it does not know.
    """
    from vllm.transformers_utils.config import get_config

    with tempfile.TemporaryDirectory() as folder:
        write_config(config, Path(folder))
        return get_config(folder, trust_remote_code=False)


def write_config(config: dict[str, Any], folder: Path) -> None:
    """Write a config.json without its remote code.

    Args:
        config: its content.
        folder: where to.
    """
    content = {key: value for key, value in config.items() if key != _REMOTE_CODE}
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
