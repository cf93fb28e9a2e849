"""What every script needs before anything else. Imports nothing but Python's own library."""

from __future__ import annotations

import ast
import hashlib
import io
import tokenize
from collections.abc import Iterable
from pathlib import Path


def code_version(parts: Iterable[tuple[str | Path, str, str]]) -> str:
    """SHA-256 of pieces of source code, the same on every Python and for edited comments and docstrings.

    Each part is a file and what the first line of the piece and the first line after it begin with
    (the latter '' = to the end of the file). The text is hashed and not its syntax tree, because the
    tree of the same code differs between versions of Python.
    """
    lines: list[str] = []
    for file, start, end in parts:
        code = _without_words(Path(file).read_text(encoding="utf-8"))
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
            text = node.body[0]
            bare[text.lineno - 1 : text.end_lineno] = [""] * (text.end_lineno - text.lineno + 1)
    return [(line, stripped.rstrip()) for line, stripped in zip(lines, bare, strict=True)]
