"""Commands in the documents are those of the real command line."""

import re
import shlex

import pytest
import typer
import yaml
from documents import DOCUMENTS, ROOT, blocks, inline_code, name_of

from maca_llmc.cli import app as quantize_app
from maca_llmc.recipe.reading import read_recipe

from maca_serve.cli import app as serve_app  # isort: skip

PROGRAMS = {
    "maca-llmc": typer.main.get_command(quantize_app),
    "maca-serve": typer.main.get_command(serve_app),
}
GROUP_OPTIONS = {"--help", "--version"}
UsageError = typer.BadParameter.__base__
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def shell_lines(document):
    """Commands of shell blocks, one a line."""
    for block in blocks(document, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            yield from re.split(r" && ", re.split(r"(?:^|\s)#", line)[0])


def words_of(line):
    """A command's words, its program without a path; none where it is not one of ours."""
    try:
        words = shlex.split(line)
    except ValueError:  # an apostrophe in something that is no command
        return []
    return [words[0].rpartition("/")[2], *words[1:]] if words else []


def parse(words):
    """Parse the words of one of our commands.

    :raises UsageError: not a command, an unknown option, or a missing argument
    """
    program, name, *given = words
    commands = PROGRAMS[program].commands
    if name in GROUP_OPTIONS:
        return
    if name not in commands:
        raise UsageError(f"no command {name}")
    commands[name].make_context(name, given)


def ours(lines):
    found = (words_of(line) for line in lines)
    return [words for words in found if words and words[0] in PROGRAMS and len(words) > 1]


CASES = [(path, words) for path in DOCUMENTS for words in ours(shell_lines(path))]


def test_there_are_commands():
    assert len(CASES) > 20
    assert {words[0] for _, words in CASES} == set(PROGRAMS)


@pytest.mark.parametrize(
    ("document", "words"), CASES, ids=[f"{name_of(p)}: {' '.join(w)}" for p, w in CASES]
)
def test_a_command_of_a_shell_block_parses(document, words):
    parse(words)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_a_command_in_the_text_has_these_names_and_options(document):
    wrong = []
    for words in ours(inline_code(document)):
        try:
            parse([*words, *(["--help"] if len(words) == 2 else [])])
        except UsageError as error:
            if type(error).__name__ != "MissingParameter":  # the text leaves out what it can
                wrong.append((" ".join(words), error.format_message()))
        except typer.Exit:  # --help
            pass
    assert not wrong


@pytest.mark.parametrize("line", ["maca-llmc quantize m --outptu x", "maca-serve dctor x"])
def test_a_wrong_command_is_seen(line):
    with pytest.raises(UsageError):
        parse(words_of(line))


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_make_targets_and_scripts_exist(document):
    lines = [*shell_lines(document), *inline_code(document)]
    commands = [words for words in map(words_of, lines) if words]
    targets = [w[1] for w in commands if w[0] == "make" and len(w) > 1 and w[1].isalpha()]
    scripts = [w[1] for w in commands if w[0] == "python" and len(w) > 1 and w[1].endswith(".py")]
    assert [target for target in targets if target not in TARGETS] == []
    assert [script for script in scripts if not (ROOT / script).is_file()] == []


def recipes():
    found = [(path, text) for path in DOCUMENTS for text in blocks(path, "yaml")]
    return [(path, text) for path, text in found if "Modifier" in text]


@pytest.mark.parametrize(("document", "text"), recipes(), ids=[name_of(p) for p, _ in recipes()])
def test_a_recipe_is_one(document, text, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    (modifier,) = read_recipe(path).modifiers
    (given,) = next(iter(yaml.safe_load(text).values()))["quantize_modifiers"].values()
    assert {name: getattr(modifier, name) for name in given} == given
