"""Strikes out anything that looks like a secret, in logs and in providers' error texts."""

from __future__ import annotations

import re
from typing import Final

STRUCK: Final = "***"

_SECRETS: Final = re.compile(
    r"""
      (?P<scheme> \b(?:bearer|basic) \s+ ) [^\s"',;]+                            # Authorization values
    | \b(?:sk|pk|rk|gsk|xai|pplx)[-_][A-Za-z0-9_*.\-]{6,}               # providers' keys, masked too
    | \bAIza[A-Za-z0-9_-]{10,}                                                  # Google's
    | \bkt[ht]\d_[A-Za-z0-9_-]+                                                 # our handles and tickets
    | \bv1\.[0-9a-f]{16}\.[A-Za-z0-9_-]+                                        # our ciphertexts
    | \b[0-9a-fA-F]{64}\b                                                       # a master key
    | (?P<user> [a-z][a-z0-9+.-]*:// [^\s:/@]* : ) [^\s@]+ (?=@)                # a password in a URL
    | (?<![\w/+-]) (?=[\w+/-]*\d) (?=[\w+/-]*[A-Za-z]) [\w+/-]{40,} =* (?![\w/+-]) # anything long and random
    """,
    re.VERBOSE | re.IGNORECASE,
)


def scrub(text: str) -> str:
    """`text` with everything that looks like a secret replaced by `***`."""
    return _SECRETS.sub(lambda match: (match["scheme"] or match["user"] or "") + STRUCK, text)
