"""The README files name files, options and presets; all of them exist."""
import re
from pathlib import Path

import pytest

import infer
import train

TOP = Path(train.__file__).parent
PAGES = [TOP / "README.md", *sorted(TOP.glob("[a-z]*/README.md"))]
TEXT = {page: page.read_text() for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(TOP)))
def test_every_linked_or_named_file_is_there(page):
    linked = re.findall(r"\]\(([^)#:]+)\)", TEXT[page])
    named = re.findall(r"\b(?:examples|weights|tests|benchmarks|experiments|figures)/[\w./-]*\w", TEXT[page])
    missing = [n for n in linked if not (page.parent / n).exists()]
    missing += [n for n in named if not ((TOP / n).exists() or (page.parent / n).exists())]
    assert missing == []


def test_every_folder_has_a_page():
    assert {page.parent.name for page in PAGES[1:]} == {"examples", "weights", "experiments", "benchmarks", "tests", "figures"}


@pytest.mark.parametrize("program", [train, infer])
def test_every_option_in_a_command_exists(program, capsys):
    with pytest.raises(SystemExit):
        program.parse(["--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    commands = re.findall(rf"python {program.__name__}\.py[^`\n]*", "\n".join(TEXT.values()))
    assert len(commands) > 5
    assert {o for c in commands for o in re.findall(r"--[a-z-]+", c)} - known == set()


def test_every_preset_is_in_the_table_of_parameters():
    text = TEXT[TOP / "README.md"]
    table = text[text.index("| preset |"):].split("\n\n")[0]
    assert set(re.findall(r"`([a-z-]+)`", table)) == set(train.PRESETS)
