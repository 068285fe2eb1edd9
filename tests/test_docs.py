"""What the documents tell to do can be done."""

import ast
import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from napari_unet.cli.app import app

HOME = Path(__file__).parents[1]
PAGES = [HOME / "README.md", *sorted((HOME / "docs").glob("*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


@every_page
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text("utf-8"))
    assert [name for name in targets if not (page.parent / name).is_file()] == []


@every_page
def test_what_scripts_import_is_there(page):
    for script in re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.S):
        tree = ast.parse(script)
        tree.body = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
        exec(compile(tree, page.name, "exec"), {})


@every_page
def test_commands_and_options_are_there(page):
    text = page.read_text("utf-8")
    for line in re.findall(r"(?:^|`)(napari-unet [^`\n]+)", text, re.M):
        _, *words = shlex.split(line, comments=True)
        command = get_command(app)
        while hasattr(command, "commands") and words and words[0] in command.commands:
            command = command.commands[words.pop(0)]
        known = {"--help"}.union(*(p.opts + p.secondary_opts for p in command.params))
        given = {word for word in words if word.startswith("-")}
        assert given <= known, line
        assert not hasattr(command, "commands") or given, line
