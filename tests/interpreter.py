"""Triton's interpreter, without what it does again and again."""

import inspect
from functools import cache


def patch_once() -> None:
    """Has a kernel's launch replace the language's functions by interpreted ones once.

    By itself the interpreter does so again in each call of one jitted function by another: a look at some hundred
    attributes, to find nothing left to replace: a fifth to nearly half of the time of the tests looked at.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    replace, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    if hasattr(launch, "__wrapped__"):
        return
    running: list[set[str]] = []  # the modules that are replaced, while a kernel runs

    @cache
    def modules(fn) -> set[str]:
        """Those of the language that a function sees: what the interpreter itself looks for."""
        seen = [value for value in fn.__globals__.values() if inspect.ismodule(value)]
        return {value.__name__ for value in seen if value in (tl, tl.core)}

    def replace_once(fn):
        if not running:
            return replace(fn)
        if running[-1] and modules(fn) <= running[-1]:
            return None  # none but a launch, which is the first to ask, restores what it has replaced
        running[-1] |= modules(fn)
        return replace(fn)

    def launch_once(self, *args, **kwargs):
        running.append(set())
        try:
            return launch(self, *args, **kwargs)
        finally:
            running.pop()

    launch_once.__wrapped__ = launch
    interpreter._patch_lang, interpreter.GridExecutor.__call__ = replace_once, launch_once
