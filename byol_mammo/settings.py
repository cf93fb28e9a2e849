"""Errors that a user can mend, flags from a dataclass, exit codes, the version of a piece of code.

Imports Python's own library alone.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import hashlib
import io
import os
import re
import signal
import sys
import tokenize
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn


class MammoError(Exception):
    """An error that the user can mend; the message says what, where and how."""


def check_settings(
    values: Any, choices: dict[str, tuple[str, ...]], ranges: dict[str, tuple[float, float]]
) -> None:
    """Raise MammoError for an attribute of `values` that is none of its choices or outside its range."""
    for name, known in choices.items():
        value = getattr(values, name)
        open_ended = [choice[: -len("NAME")] for choice in known if choice.endswith(":NAME")]
        if value not in known and not value.startswith(tuple(open_ended)):
            raise MammoError(f"--{name} {value}: choose one of {', '.join(known)}")
    for name, (low, high) in ranges.items():
        value = getattr(values, name)
        if not low <= value <= high:
            raise MammoError(f"--{name} {value}: must lie between {low:g} and {high:g}")


def setting_help(script: str) -> dict[str, str]:
    """The one-line comment of each constant of a script, by lower-case name."""
    source = Path(script).read_text(encoding="utf-8")
    found = re.findall(r"^([A-Z][A-Z_]+) = [^#\n]+  # (.+)$", source, flags=re.MULTILINE)
    return {name.lower(): comment for name, comment in found}


class _Parser(argparse.ArgumentParser):
    hint = ""

    def error(self, message: str) -> NoReturn:
        raise MammoError(f"{message} ({self.hint})")


INSTALLED = {
    "prepare_dataset.py": "byol-mammo-prepare",
    "train_byol_mammo.py": "byol-mammo-train",
    "train_classifier.py": "byol-mammo-classify",
}


def command_of(script: str) -> str:
    """How to start a script in the way in which this program was started."""
    return INSTALLED[script] if Path(sys.argv[0]).name in INSTALLED.values() else f"python {script}"


def make_parser(doc: str | None, hint: str = "see --help") -> argparse.ArgumentParser:
    """A parser that raises MammoError, ending with `hint`; `doc` up to the contents describes it."""
    form = argparse.RawDescriptionHelpFormatter
    description = (doc or "").split("Contents")[0]
    parser = _Parser(description=description, formatter_class=form, allow_abbrev=False)
    parser.hint = hint
    return parser


def with_underscores(words: Sequence[str]) -> list[str]:
    """A command line with '_' for '-' in the names of its flags."""
    return [
        re.sub("^--[^=]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), word) for word in words
    ]


def nearest(name: str, candidates: Iterable[str]) -> str:
    """The candidate most like `name`, whatever the case of letters; '' where none is like it."""
    lowered = {candidate.lower(): candidate for candidate in candidates}
    close = difflib.get_close_matches(name.lower(), list(lowered), n=1, cutoff=0.5)
    return lowered[close[0]] if close else ""


def parse_fields(
    settings: Any, parser: argparse.ArgumentParser, comments: dict[str, str], argv: Sequence[str] | None
) -> dict[str, Any]:
    """Values by name: the fields of the dataclass `settings` as flags, and what else the parser knows.

    `comments` are the flags' help (see setting_help). Raises MammoError on a typo.
    """
    for field in dataclasses.fields(settings):
        text = f"{comments[field.name]} (default: {field.default!r})".replace("%", "%%")
        if isinstance(field.default, bool):
            parser.add_argument(f"--{field.name}", action="store_true", help=text)
            parser.add_argument(f"--no_{field.name}", dest=field.name, action="store_false")
            parser.set_defaults(**{field.name: field.default})
        elif isinstance(field.default, tuple):
            start = list(field.default)
            parser.add_argument(f"--{field.name}", nargs="+", action="extend", default=start, help=text)
        else:
            kind = {"int": int, "float": float, "str": str}[str(field.type)]
            parser.add_argument(f"--{field.name}", type=kind, default=field.default, help=text)
    words = with_underscores(sys.argv[1:] if argv is None else argv)
    namespace, unknown = parser.parse_known_intermixed_args(words)
    if unknown:
        flags = [option for action in parser._actions for option in action.option_strings]
        near = nearest(unknown[0].split("=")[0], flags)
        hint = f"; did you mean {near}?" if near else "; see --help"
        raise MammoError(f"unknown argument {unknown[0]}{hint}")
    several = (field.name for field in dataclasses.fields(settings) if isinstance(field.default, tuple))
    return vars(namespace) | {name: tuple(getattr(namespace, name)) for name in several}


class StoppedError(Exception):
    """A signal was obeyed, and all is in order for the same command to go on."""

    def __init__(self, number: int, rest: str = "the same command goes on where it stopped") -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; {rest}")
        self.code = 128 + number


READER_GONE = 128 + 13  # exit code of a program that SIGPIPE ends


def escape_names() -> None:
    """Print names of files that are no text in the output's encoding with escapes, not an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def end_without_reader() -> int:
    """READER_GONE, after a BrokenPipeError: who read the output, as `head` does, has gone.

    What is still to be flushed at the interpreter's end goes nowhere, as Python's signal module advises.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return READER_GONE


def changed_flags(config: Any, recorded: dict[str, Any], free: Iterable[str]) -> list[str]:
    """Fields of a dataclass, but those in `free`, that are not as recorded: '--name then -> now'."""
    # Until 2026-11-28 images kept their own scale.
    now, then = dataclasses.asdict(config), {"target_spacing_mm": 0.0, **recorded}
    names = [name for name in now if name not in free and now[name] != then.get(name)]
    return [f"--{name} {then.get(name)} -> {now[name]}" for name in names]


def exit_code(job: Callable[[], None], memory_advice: str) -> int:
    """Do a script's job: 0, or 2 after an error that the user can mend, or 128 + signal number.

    READER_GONE where nobody reads the output any more.
    """
    import torch
    from torch import distributed

    code = 2
    escape_names()
    try:
        job()
        sys.stdout.flush()  # here: at the interpreter's end an error could no longer be told
        return 0
    except BrokenPipeError:
        return end_without_reader()
    except StoppedError as stopped:
        code, message = stopped.code, str(stopped)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
        message = "interrupted; the same command goes on from what was saved, if anything was"
    except MammoError as error:
        message = f"error: {error}"
    except torch.cuda.OutOfMemoryError:
        message = f"error: the GPU's memory is full; {memory_advice}"
    except OSError as error:
        message = (
            f"error: {error.filename or 'file'}: {error.strerror or error}; once that is mended the "
            "same command goes on where it stopped"
        )
    except RuntimeError as error:
        if not distributed.is_initialized():
            raise
        reason = " ".join(str(error).split())[:300]
        message = f"error: {reason}"
        # A collective that fails is how the others learn that a process has died.
        if isinstance(error, distributed.DistError) or "gloo" in reason:
            message = (
                f"error: the processes of the run lost each other ({reason}); the log of the first one "
                "that ended says why. The same command goes on from last.pth"
            )
        else:
            traceback.print_exc()  # now: leaving the group may take its time
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
    try:
        print(message, file=sys.stderr)
    except BrokenPipeError:
        end_without_reader()
    return code


def code_version(parts: Iterable[tuple[Any, str, str]]) -> str:
    """SHA-256 of pieces of source code, the same on every Python and for edited comments and docstrings.

    Each part is a file and what the first line of the piece and the first line after it begin with
    (the latter '' = to the end of the file). The text is hashed and not its syntax tree, because the
    tree of the same code differs between versions of Python.
    """
    lines: list[str] = []
    read: dict[Any, list[tuple[str, str]]] = {}  # a file may have several parts, and reading takes time
    for file, start, end in parts:
        if file not in read:
            read[file] = _without_words(Path(file).read_text(encoding="utf-8"))
        code = read[file]
        first = next(i for i, (line, _) in enumerate(code) if line.startswith(start))
        rest = [i for i, (line, _) in enumerate(code) if end and i > first and line.startswith(end)]
        lines += [bare for _, bare in code[first : rest[0] if rest else None] if bare]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _without_words(source: str) -> list[tuple[str, str]]:
    """Each line as it stands, and without comment and docstring."""
    lines = source.splitlines()
    bare = list(lines)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            bare[row - 1] = bare[row - 1][:column]
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            first, last = node.body[0].lineno, node.body[0].end_lineno or 0
            bare[first - 1 : last] = [""] * (last - first + 1)
    return [(line, stripped.rstrip()) for line, stripped in zip(lines, bare, strict=True)]
