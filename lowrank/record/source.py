"""The source code that a run's numbers come from: its hash, its commit, and what of it is not committed.

Asking git never fails a run and never holds it up: what git does not answer in time is left out, and said to be.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache as once
from pathlib import Path

from lowrank.disk import write_text
from lowrank.models.cache import cache

PACKAGE = Path(__file__).resolve().parents[1]
CODE = ("lowrank", "conf", "hydra_plugins", "train.py")  # of the checkout: what code.patch is about
FOLDERS = "code-folders.json"
SECONDS, MOST = 5.0, 1_000_000  # for all questions to git together; bytes of a patch


@once
def entry() -> Path | None:
    """The checkout's train.py; an installed package has none. It counts whichever command a run is started with."""
    beside = PACKAGE.parent
    return beside / "train.py" if (beside / "conf/config.yaml").is_file() and (beside / "train.py").is_file() else None


@once
def package_files() -> dict[str, str]:
    """The hashes of this package's files and its entry's, by names that do not depend on where they lie: as they are
    when they are first asked for, since a later edit is not what this process has imported."""
    found = {f"lowrank/{path.relative_to(PACKAGE).as_posix()}": path for path in PACKAGE.rglob("*.py")}
    if (script := entry()) is not None:
        found[script.name] = script
    return {name: file_hash(path) for name, path in found.items()}


def files(classes: Iterable[type]) -> dict[str, str]:
    """The hashes of a run's source code by name: this package, its entry, and of the classes that a configuration
    names, and what they derive from, the files outside installed packages."""
    found = dict(package_files())
    for cls in classes:
        found |= {f"{one.__module__} ({path.name})": file_hash(path) for one, path in own_files(cls)}
    return found


def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def own_files(cls: type) -> Iterator[tuple[type, Path]]:
    """A class of the user's own, and its bases that are too, with their files; one made in a shell has no file."""
    for one in cls.__mro__:
        try:
            path = Path(inspect.getfile(one)).resolve()
        except (TypeError, OSError):
            continue
        if path.is_file() and not path.is_relative_to(PACKAGE) and not installed(path):
            yield one, path


def installed(path: Path) -> bool:
    """Whether a file belongs to Python or to an installed package, whose version says what it is."""
    homes = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return any(path.is_relative_to(home) for home in homes) or not {"site-packages", "dist-packages"}.isdisjoint(
        path.parts
    )


def code_hash(found: Mapping[str, str]) -> str:
    """One hash over names and hashes."""
    return hashlib.sha256("".join(f"{name} {found[name]}\n" for name in sorted(found)).encode()).hexdigest()


def own_modules(classes: Iterable[type]) -> dict[str, str]:
    """Of the user's own classes: module → the folder on the import path in which it was found."""
    found = {}
    for one, path in (pair for cls in classes for pair in own_files(cls)):
        depth = one.__module__.count(".") + (path.name == "__init__.py")
        found[one.__module__] = str(path.parents[depth])
    return found


def remember(folders: Iterable[str]) -> None:
    """Keeps, for this user and not in a run directory, the folders from which own classes have trained: what a run
    directory says is somebody's word, and no reason to import code from there."""
    known = remembered()
    if not known.issuperset(folders):
        with suppress(OSError):  # a cache that cannot be written to
            cache().mkdir(parents=True, exist_ok=True)
            write_text(cache() / FOLDERS, json.dumps(sorted({*known, *folders})) + "\n")


def remembered() -> set[str]:
    try:
        return set(json.loads((cache() / FOLDERS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return set()


@dataclass(frozen=True)
class Checkout:
    """Where in a git history the code lies, and what of it is not committed."""

    commit: str | None
    patch: str  # as git apply takes it, from the checkout's folder; "" where all is committed

    def to_dict(self) -> dict[str, object] | None:
        """What summary.json holds of it; None where there is no git."""
        return {"commit": self.commit, "dirty": bool(self.patch)} if self.commit else None


@once
def checkout() -> Checkout:
    """Of the code that this process runs, asked once: later edits are not what it has imported."""
    return read_checkout(PACKAGE.parent, time.monotonic() + SECONDS)


def read_checkout(root: Path, until: float) -> Checkout:
    """``until``: when to give up, on the monotonic clock."""
    tracked = git(root, until, "ls-files", "--error-unmatch", "lowrank/__init__.py")
    commit = git(root, until, "rev-parse", "HEAD") if tracked is not None else None
    if commit is None:
        return Checkout(None, "")
    paths = [name for name in CODE if (root / name).exists()]
    plain = ("--no-ext-diff", "--no-textconv", "--no-color", "--relative", "--src-prefix=a/", "--dst-prefix=b/")
    changed = git(root, until, "diff", *plain, "HEAD", "--", *CODE)
    listed = git(root, until, "ls-files", "--others", "--exclude-standard", "-z", "--", *paths)
    if changed is None or listed is None:
        return Checkout(commit.strip(), "# what is uncommitted could not be asked of git in time\n")
    names = [name for name in listed.split("\0") if name]
    return Checkout(commit.strip(), bounded([changed, *(new_file(root, name) for name in names)]))


def git(root: Path, until: float, *arguments: str) -> str | None:
    """What git answers, up to a little more than MOST; None where there is no git, or no answer in time."""
    left = until - time.monotonic()
    if left <= 0:
        return None
    quiet = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    options = ("-c", "core.quotepath=false", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null")
    with tempfile.TemporaryFile() as answer:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *options, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=answer,
                stderr=subprocess.DEVNULL,
                env={**quiet, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"},
                timeout=left,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        answer.seek(0)
        return answer.read(MOST + 1).decode("utf-8", errors="replace") if done.returncode == 0 else None


def new_file(root: Path, name: str) -> str:
    """A file that git does not know, as a patch that makes it."""
    try:
        fits = not (root / name).is_symlink() and (root / name).stat().st_size <= MOST
        text = (root / name).read_bytes().decode("utf-8") if fits else None
    except (OSError, ValueError):
        text = None
    if text is None:
        return f"# {name}: uncommitted, and left out (a link, no text, or too large)\n"
    lines = text.split("\n")
    whole = lines[-1] == ""  # with a newline at its end
    lines = lines[:-1] if whole else lines
    head = f"diff --git a/{name} b/{name}\nnew file mode 100644\n"
    if not lines:
        return head
    body = "".join(f"+{line}\n" for line in lines) + ("" if whole else "\\ No newline at end of file\n")
    return f"{head}--- /dev/null\n+++ b/{name}\n@@ -0,0 +1,{len(lines)} @@\n{body}"


def bounded(parts: Iterable[str]) -> str:
    """The parts one after another, as far as they are not too much together."""
    kept = ""
    for part in parts:
        if len(kept) + len(part) > MOST:
            return f"{kept}# more than {MOST:,} characters are uncommitted: the rest is left out\n"
        kept += part
    return kept
