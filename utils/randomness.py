"""Random numbers named by what they are for.

Every draw of a run comes from a generator keyed by (seed, purpose, step, ...): a resumed run, or one with another
number of loading processes, draws the same numbers, and no generator's state has to be stored in a checkpoint.
"""

import hashlib


def keyed_seed(*key: int | str) -> int:
    """A seed below 2**63 from any key, the same on every machine and run."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
