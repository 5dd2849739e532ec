"""Sealed files and literal text: what every reader and every message of the laboratory rests on."""

import errno
import io
import os
import stat
import sys
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from falign.lab import _files, _text
from falign.lab._files import WriteError, atomic_write, leftovers
from mutations import mutations

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text().filter(lambda key: key != "checksum"), VALUES, max_size=5))
def test_a_sealed_object_is_read_as_it_was(content):
    assert _files.from_json(_files.to_json(content)) == content


def test_the_checksum_is_that_of_the_file_with_zeros_in_its_place():
    written = _files.to_json({"status": "done", "step": 3})
    digits = written.split(b"falign-sha256:")[1][:64]
    assert digits.decode() == sha256(written.replace(digits, b"0" * 64)).hexdigest()


@pytest.mark.parametrize("content", [{"a": 1.5, "name": "ä"}, {"note": _files.BLANK, "b": ["falign-sha256:" * 3]}])
def test_no_damage_to_a_sealed_file_goes_unseen(content):
    written = _files.to_json(content)
    assert _files.from_json(written) == content  # whatever marks it holds itself
    for how, damaged in mutations(written, 300):
        assert _refusal(damaged) in ("its checksum is wrong", "it has no checksum"), how


def _refusal(content: bytes) -> str | None:
    try:
        _files.from_json(content)
    except _files.Unsealed as error:
        return str(error)
    return None


def test_what_json_cannot_hold_is_not_written():
    with pytest.raises(ValueError, match="not JSON compliant"):
        _files.to_json({"loss": float("nan")})


@pytest.mark.parametrize(
    ("given_", "shown"),
    [
        ("fa[lr=0.1] [/x] :smile:", "fa[lr=0.1] [/x] :smile:"),
        ("\x1b[31mred\x07\x9b", "\\x1b[31mred\\x07\\x9b"),
        (os.fsdecode(b"M\xfcller.png"), "M\\xfcller.png"),
        ("η ≤ 0.1\tΔ\n", "η ≤ 0.1\tΔ\n"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\ud800", "\\ud800"),
        ("a\u00a0b", "a\u00a0b"),
        ("\U000e0001", "\\U000e0001"),
    ],
)
def test_what_is_not_seen_is_written_out(given_, shown):
    assert _text.plain(given_) == shown
    stream = io.StringIO()
    console = Console(file=stream, width=80, force_terminal=True, color_system=None)
    _text.print_plain(console, given_)
    table = Table("name")
    table.add_row(_text.plain_cell(given_))
    console.print(table)
    assert shown.strip().expandtabs() in stream.getvalue().expandtabs()


@given(st.text())
def test_every_text_can_be_encoded_and_holds_no_escape(any_text):
    shown = _text.plain(any_text)
    shown.encode()
    assert not any(letter in shown for letter in "\x1b\x07\x08\r\x9b\x00")


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1"])
def test_output_that_is_not_utf8_gets_replacements(encoding, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    _text.echo("η is 0.1")
    _text.print_plain(_text.standard_console(), "angles 12° σ")
    sys.stdout.flush()
    shown = raw.getvalue().decode(encoding)
    assert "? is 0.1" in shown
    assert "angles 12" in shown


@pytest.mark.parametrize("call", ["open", "fsync"])
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EACCES])
def test_a_folder_that_cannot_be_synchronised_is_no_failure(call, number, tmp_path, monkeypatch):
    really, path = getattr(os, call), tmp_path / "table"
    atomic_write(path, b"old")
    refused = []

    def without_folders(what, *more):
        if stat.S_ISDIR(os.stat(what).st_mode):
            refused.append(what)
            raise OSError(number, os.strerror(number))
        return really(what, *more)

    monkeypatch.setattr(os, call, without_folders)
    atomic_write(path, b"new")
    assert path.read_bytes() == b"new"
    assert len(refused) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_synchronised_leaves_what_was_there(tmp_path, monkeypatch):
    def refused(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    path = tmp_path / "table"
    atomic_write(path, b"old")
    monkeypatch.setattr(os, "fsync", refused)
    with pytest.raises(WriteError, match=r"cannot write .*table: Input/output error"):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_half_written_file_has_a_name_that_nobody_can_guess_and_that_fits(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(os, "replace", lambda partial, path: seen.append(partial))
    for name in ("a", "x" * 250):
        atomic_write(tmp_path / name, b"content")
    assert len({path.name[-16:] for path in seen}) == 2
    assert all(len(path.name) < 256 for path in seen)
    assert not leftovers(tmp_path)
