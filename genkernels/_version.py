"""The version, and the commit that the package comes from. Imported by setup.py too: it needs nothing but Python."""

from __future__ import annotations

__version__ = "0.1.0"


def commit() -> str | None:
    """The commit of the checkout that this package runs from, ``-dirty`` where files differ; None outside a
    checkout."""
    import subprocess
    from pathlib import Path

    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # an installed package may lie inside somebody else's repository
    if (top := git("rev-parse", "--show-toplevel")) is None or Path(top).resolve() != root:
        return None
    head = git("rev-parse", "--short=12", "HEAD")
    return f"{head}-dirty" if head and git("status", "--porcelain", "--untracked-files=no") else head
