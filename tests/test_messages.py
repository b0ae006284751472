"""Names and messages as people are shown them."""

import ast

import pytest

from diffusers_vae.messages import hiding_passwords, message, quoted, showable, without_passwords

ODD = [
    "\x1b[31mred\x1b[0m",
    "a\nerror: b",
    "\r\t\0\x07\x7f\x9b",
    "\u202etxt.exe",
    "\udcff\ud800",
    "\u2028\u200b\U000e0001",
]
PLAIN = ["runs/mnist vae-1", "Zürich ✓ 学習 😀", r"C:\runs\a", "<!-- `x` \"y\" 'z'"]


@pytest.mark.parametrize("name", ODD)
def test_what_is_not_printable_is_escaped(name):
    assert showable(name).isprintable() and showable(name).encode()
    assert ast.literal_eval(f'"{showable(name)}"') == name


@pytest.mark.parametrize("name", PLAIN)
def test_other_names_are_left_as_they_are(name):
    assert showable(name) == name == message(name)


@pytest.mark.parametrize("name", [*ODD, *PLAIN, 'end")', "back\\"])
def test_quoted_is_that_string_in_python(name):
    assert ast.literal_eval(quoted(name)) == name and quoted(name).isprintable() and quoted(name)[0] == '"'


def test_no_line_of_a_message_passes_for_another():
    assert message("two files:\na\x1b.png\nerror: b.png") == "two files:\n  a\\x1b.png\n  error: b.png"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at https://ann:secret@hub.lan/x?", "at https://***@hub.lan/x?"),
        ("('http://ann:se@cr#t?@hub.lan:80', 3)", "('http://***@hub.lan:80', 3)"),
        ("https://secret@hub.lan", "https://***@hub.lan"),
        ("https://hub.lan/ann/a@b, mail ann@hub.lan", "https://hub.lan/ann/a@b, mail ann@hub.lan"),
    ],
)
def test_passwords_are_blotted_out(text, shown):
    assert without_passwords(text) == shown == message(text)
    with pytest.raises(OSError) as error, hiding_passwords():
        raise ConnectionError(text)
    assert str(error.value) == shown


def test_errors_without_a_password_stay_what_they_are():
    with pytest.raises(FileNotFoundError, match="no file"), hiding_passwords():
        raise FileNotFoundError("no file")
