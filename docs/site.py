"""The README as the site's first page (a hook of mkdocs)."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_MOVED = {"](docs/": "](", "](src/valdi_jax/config.py)": "](api.md#configuration)"}


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add ``index.md``, its links as seen from ``docs/``."""
    text = (Path(config.docs_dir).parent / "README.md").read_text()
    for old, new in _MOVED.items():
        text = text.replace(old, new)
    files.append(File.generated(config, "index.md", content=text))
    return files
