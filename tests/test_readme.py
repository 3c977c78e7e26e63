"""The README names files, options and presets; all of them exist."""
import re
from pathlib import Path

import pytest

import infer
import train

TOP = Path(train.__file__).parent
TEXT = (TOP / "README.md").read_text()


def test_every_linked_or_named_file_is_there():
    named = re.findall(r"\]\(([^)#:]+)\)", TEXT) + re.findall(r"\b(?:examples|weights|tests|figures)/[\w.-]*\w", TEXT)
    assert len(named) > 10 and [n for n in named if not (TOP / n).exists()] == []


@pytest.mark.parametrize("program", [train, infer])
def test_every_option_in_a_command_exists(program, capsys):
    with pytest.raises(SystemExit):
        program.parse(["--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    commands = re.findall(rf"python {program.__name__}\.py[^`\n]*", TEXT)
    assert len(commands) > 5
    assert {o for c in commands for o in re.findall(r"--[a-z-]+", c)} - known == set()


def test_every_preset_is_in_the_table_of_parameters():
    table = TEXT[TEXT.index("| preset |"):].split("\n\n")[0]
    assert set(re.findall(r"`([a-z-]+)`", table)) == set(train.PRESETS)
