"""Names of files are bytes, text is not: how a name that is no UTF-8 is written, printed and opened.

Python keeps such a byte as a lone surrogate, which no file, terminal or library takes.
"""

from __future__ import annotations

import codecs
import json
import re
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PLAINER = "plainer"
"""Error handler for text streams: what they cannot hold is written more plainly, and never an error."""

_LITTER = frozenset(
    {
        "$RECYCLE.BIN",
        ".DS_Store",
        ".Spotlight-V100",
        ".Trashes",
        ".directory",
        ".fseventsd",
        ".snapshot",
        "@eaDir",
        "System Volume Information",
        "Thumbs.db",
        "__MACOSX",
        "desktop.ini",
        "lost+found",
    }
)
_LITTER_PREFIXES = ("._", ".Trash-", ".nfs", ".fuse_hidden")
_SURROGATE = re.compile("[\ud800-\udfff]")
_PLAINER = {
    "→": "->",
    "×": "x",
    "√": "sqrt ",
    "–": "-",
    "─": "-",
    "…": "...",
    "±": "+-",
    "≥": ">=",
    "≤": "<=",
    "\N{NO-BREAK SPACE}": " ",
}


def is_file(path: Path) -> bool:
    """Whether there is a file; no, too, for a name no file can have, of which pathlib makes an error."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """As `is_file`, of a folder."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def exists(path: Path) -> bool:
    """As `is_file`, of anything; what follows a link counts."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def is_litter(name: str) -> bool:
    """Whether a file or folder is one that file systems, desktops and archivers leave everywhere."""
    return name in _LITTER or name.startswith(_LITTER_PREFIXES)


def readable(text: str) -> str:
    r"""Return the text with each byte that is no UTF-8 as `\xe9`."""
    return _SURROGATE.sub(lambda found: _escape(found[0]), text)


def shell_line(*words: object) -> str:
    """Return a command that can be pasted into a shell, whatever names are in it."""
    return " ".join(map(_shell_word, map(str, words)))


def name_bytes(name: str) -> bytes:
    """Return the bytes of a name, to be hashed; of text its UTF-8."""
    return name.encode("utf-8", "surrogateescape")


def json_text(value: object, *, indent: int | None = None, ascii_only: bool = False) -> str:
    """JSON that is valid UTF-8 whatever names are in it; NaN is refused."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    text = _SURROGATE.sub(lambda found: "\\" + _escape(found[0]), text)
    return json.dumps(json.loads(text), indent=indent) if ascii_only else text


@contextmanager
def utf8_path(path: Path) -> Iterator[str]:
    """Name an existing file for libraries that take UTF-8 only: its own name, else that of a link to it."""
    if not _SURROGATE.search(str(path.absolute())):
        yield str(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder, f"file{readable(path.suffix)}")
        link.symlink_to(path.absolute())
        yield str(link)


def _shell_word(word: str) -> str:
    if not _SURROGATE.search(word):
        return shlex.quote(word)
    escaped = word.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{readable(escaped)}'"


def _escape(letter: str) -> str:
    code = ord(letter)
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"


def _plainer(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    plain = [
        _PLAINER.get(letter) or (readable(letter).encode("ascii", "backslashreplace").decode())
        for letter in letters
    ]
    return "".join(plain), error.end


codecs.register_error(PLAINER, _plainer)
