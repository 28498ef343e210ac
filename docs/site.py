"""A hook of mkdocs: the pages at the top of the repository are pages of the site, too."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
AT_THE_TOP = ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")


def on_files(files: Files, config: Any) -> Files:
    """Add them, with links as from docs/."""
    for name in AT_THE_TOP:
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links out of docs/ lead to the pages above; a link to the folder of rows becomes its name."""
    markdown = re.sub(r"\]\(\.\./(?=[A-Z]+\.md)", "](", markdown)
    return re.sub(r"\[([^\]]+)\]\(results/?\)", r"`docs/results/`", markdown)
