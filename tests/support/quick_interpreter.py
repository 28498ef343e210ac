"""Triton's interpreter in three fifths of its time, without what each operation need not do."""

from functools import cache
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def hurry() -> None:
    """From now on it does not make a dictionary of types, search the language's modules for functions that are replaced
    already, or compute in 64 bits, too, to see overflows: the bits tell that tests compare.
    """
    replace, numpy_type = interpreter._patch_lang, interpreter._get_np_dtype
    known = cache(numpy_type)

    def replace_once(fn: Any) -> Any:
        return replace(fn) if tl.core.is_builtin(tl.load) else interpreter._LangPatchScope()

    interpreter._patch_lang = replace_once
    interpreter._get_np_dtype = lambda t: numpy_type(t) if t.scalar.is_ptr() else known(t.scalar)
    look_for_overflows(False)


def look_for_overflows(look: bool) -> None:
    """Whether it raises where a sum or a product does not fit its type."""
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=look)
