"""What mkdocs needs to be told about this repository: where the sources and the results are."""

from __future__ import annotations

import atexit
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.plugins import event_priority

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


@event_priority(100)  # before mkdocstrings reads its settings
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Lay the package out as it installs: `kernels/` and `convert/` are read from their source at the top level."""
    layout = Path(tempfile.mkdtemp(prefix="awq_jax-docs-"))
    atexit.register(shutil.rmtree, layout, ignore_errors=True)
    for source, name in ((ROOT / "awq_jax", ""), (ROOT / "kernels", "kernels"), (ROOT / "convert", "convert")):
        for file in source.rglob("*.py"):
            link = layout / "awq_jax" / name / file.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(layout)]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Results stand beside their numbers in `benchmarks/results`, and are pages of the site too."""
    from mkdocs.structure.files import File

    for source in sorted(RESULTS.iterdir()):
        if source.suffix in (".md", ".json"):
            files.append(File.generated(config, f"results/{source.name}", abs_src_path=str(source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links into `benchmarks/results` lead to those pages; the command line's page shows what ``--help`` prints."""
    for here, there in (("../../benchmarks/results/", "../results/"), ("../benchmarks/results/", "results/"), ("../../docs/", "../")):
        markdown = markdown.replace(f"]({here}", f"]({there}")
    if page.file.src_uri != "reference/cli.md":
        return markdown
    whole = _help()
    helps = {"": whole} | {command: _help(command) for command in re.findall(r"^    (\w+) ", whole, re.M)}
    return markdown + "\n".join(f"## awq-jax {c}\n\n```text\n{text}\n```\n" for c, text in helps.items())


def _help(*command: str) -> str:
    run = subprocess.run(
        [sys.executable, "-m", "awq_jax", *command, "--help"], capture_output=True, text=True, check=True
    )
    return run.stdout.strip()
