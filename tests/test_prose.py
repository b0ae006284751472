"""Prose in plain terms: no phrase, name or docstring that the project's writing rules forbid."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODE = [*(ROOT / "diffusers_vae").rglob("*.py"), *(ROOT / "training").rglob("*.py")]
PAGES = [
    ROOT / "README.md",
    ROOT / "model_cards" / "template.md",
    *(ROOT / "docs").rglob("*.md"),
    *(ROOT / "diffusers_vae").rglob("*.jinja"),
]
PRESETS = [path for folder in ("diffusers_vae", "training") for path in (ROOT / folder).rglob("*.yaml")]

# What to write instead of a phrase, found as whole words in any case.
PHRASES = {
    "anew": "again",
    "as they are": "unchanged, unconverted",
    "(bring|brings|brought) to size": "resize",
    "(by|of) which": "a second sentence",
    "drawn? (from|for)": "sample",
    "draws": "samples",
    "is not there": "is missing, does not exist",
    "is told|tells|told": "reports, raises, logs",
    "kld": "rate",
    "perceptrons?": "MLP",
    "says": "states, reports, raises, logs",
    "so many": "number of",
    "that of": "the noun again, or a possessive",
}
# What to write instead of a name of a variable, parameter, attribute or function.
NAMES = {
    "here": "what it holds",
    "kld": "rate",
    "known": "what it holds",
    "mu": "mean",
    "own": "what it holds",
    "pixel_values": "images",
    "place": "index, position",
    "places": "indices, positions",
    "rec_loss": "distortion",
    "recon_x": "reconstructions",
    "sigma": "std",
    "there": "what it holds",
    "z": "latents",
}
PREPOSITIONS = [
    "After", "As", "At", "Before", "Between", "Both", "By", "For", "From", "In", "Into", "Like", "Likewise", "Of", "On",
    "Out", "Over", "To", "Under", "Until", "Up", "With", "Within", "Without",
]  # fmt: skip
CLAUSES = ["How", "Of", "What", "When", "Where", "Whether", "Which", "Who", "Whose", "Why"]
# Exceptions: (file, text) with the reason.
EXCEPTIONS = {
    ("diffusers_vae/models/mlp.py", "z"): "argument of `decode`, named as in diffusers",
    ("diffusers_vae/models/stock.py", "z"): "argument of `decode`, named as in diffusers",
    ("diffusers_vae/models/vae.py", "z"): "argument of `decode`, named as in diffusers",
}


def phrases(text):
    """Return the forbidden phrases in prose, without code spans and expressions of templates."""
    prose = " ".join(re.sub(r"```.*?```|`[^`]*`|{{.*?}}|{%.*?%}", "CODE", text, flags=re.DOTALL).split())
    return [found.group() for phrase in PHRASES for found in re.finditer(rf"\b({phrase})\b", prose, re.IGNORECASE)]


def comments(source):
    """Return the comments of Python code, with those on consecutive lines joined."""
    lines = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0]] = token.string.lstrip("# ")
    found = []
    for line, text in lines.items():
        if line - 1 in lines:
            found[-1] += f" {text}"
        else:
            found.append(text)
    return found


def strings(tree):
    """Return the strings of a syntax tree that hold several words: docstrings, messages, help."""
    joined = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    inside = {id(part) for node in joined for part in node.values}
    found = [
        "".join(part.value if isinstance(part, ast.Constant) else "VALUE" for part in node.values) for node in joined
    ]
    found += [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside
    ]
    return [text for text in found if " " in text.strip()]


def names(tree):
    """Return the names of variables, parameters, attributes and functions that code defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.FunctionDef):
            yield node.name


def docstrings(tree):
    """Yield each docstring, including those of attributes, and whether it belongs to a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
            yield text, True
        elif isinstance(node, ast.Module | ast.ClassDef):
            for part in node.body:
                if isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant):
                    yield str(part.value.value), False


def is_fragment(text, of_function):
    """Return whether a docstring begins with a preposition or, for a function, with a subordinate clause."""
    words = re.findall(r"[\w(]+", text)
    return bool(words) and words[0] in (PREPOSITIONS + CLAUSES if of_function else PREPOSITIONS)


def without_exceptions(path, found):
    return [text for text in found if (path.relative_to(ROOT).as_posix(), text) not in EXCEPTIONS]


def by_name(paths):
    return [pytest.param(path, id=path.relative_to(ROOT).as_posix()) for path in sorted(paths)]


@pytest.mark.parametrize("path", by_name(CODE))
def test_code_has_no_forbidden_phrase_name_or_docstring(path):
    source = path.read_text("utf-8")
    tree = ast.parse(source)
    found = [text for prose in [*comments(source), *strings(tree)] for text in phrases(prose)]
    assert not without_exceptions(path, found)
    assert not without_exceptions(path, sorted(NAMES.keys() & set(names(tree))))
    assert not [text for text, of_function in docstrings(tree) if is_fragment(text, of_function)]


@pytest.mark.parametrize("path", by_name(PAGES))
def test_page_has_no_forbidden_phrase(path):
    assert not phrases(path.read_text("utf-8"))


@pytest.mark.parametrize("path", by_name(PRESETS))
def test_preset_has_no_forbidden_phrase(path):
    text = path.read_text("utf-8")
    assert not phrases(" ".join(line.partition("#")[2] for line in text.splitlines()))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Its SHA-256 must be\n    that of the file", ["that of"]),
        ("Told by `that of`, what the perceptron says", ["Told", "perceptron", "says"]),
        ("Return `draws` samples of the latents", []),
        ("{{ protocol.draws }} samples", []),
    ],
)
def test_phrases_are_found_across_lines_and_not_in_code(text, found):
    assert sorted(phrases(text)) == sorted(found)


def test_comments_on_consecutive_lines_are_one_text():
    assert comments("a = 1  # so\n# many\n\n# b\n") == ["so many", "b"]


def test_messages_with_values_are_read():
    assert phrases(strings(ast.parse("raise ValueError(f'{a} is that ' f'of {b}')"))[0]) == ["that of"]


def test_all_kinds_of_definitions_are_read():
    code = "def place(own, *, z=1):\n    self.known = [here for here in z]\n    with a as there: pass\n"
    assert NAMES.keys() & set(names(ast.parse(code))) == {"place", "own", "z", "known", "here", "there"}


@pytest.mark.parametrize(
    ("text", "of_function", "fragment"),
    [
        ("Of the posterior.", False, True),
        ("Likewise.", True, True),
        ("Whether it is there.", True, True),
        ("Whether to add attention.", False, False),
        ("(B, C, H, W) in model range.", False, False),
        ("Return the mean.", True, False),
    ],
)
def test_docstrings_that_are_fragments(text, of_function, fragment):
    assert is_fragment(text, of_function) == fragment


def test_exceptions_are_needed():
    for (name, text), reason in EXCEPTIONS.items():
        tree = ast.parse((ROOT / name).read_text("utf-8"))
        assert reason and text in {*names(tree), *(p for prose in strings(tree) for p in phrases(prose))}, name
