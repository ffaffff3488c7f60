"""Names of the folders of sweeps and jobs: readable, below every file system's limit, the same for the same words."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

from lowrank.secrets import redacted

# Of a command: what changes neither which jobs there are nor what each finds.
ASIDE = re.compile(r"[+~]*(?:hydra[./]|(?:sweep|checkpoint|track|plan)[.=@])")
SEVERAL = re.compile(r"[^=]*=(?:\w+\(|(?:\\.|'[^']*'|\"[^\"]*\"|[^,\[\](){}'\"]|[\[({][^\])}]*[\])}])*,)")


def file_name(text: str) -> str:
    """A readable file name."""
    return re.sub(r"[^\w.=+-]+", "_", text)[:60].strip("_") or "job"


def sweep_name(overrides: Iterable[str]) -> str:
    """Of a sweep's command: ``adapter.r=4_16-1a2b3c4d``, what has several values first in sight."""
    given = [override for override in overrides if not ASIDE.match(override)]
    digest = hashlib.sha256("\n".join(given).encode()).hexdigest()[:8]
    several = [override for override in given if SEVERAL.match(override)]
    return f"{file_name(redacted(' '.join(several or given[-3:])))}-{digest}"
