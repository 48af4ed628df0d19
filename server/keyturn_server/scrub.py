"""Strikes out anything that looks like a secret, in logs and in providers' error texts.

Ids, names of models and plain sentences stay. Every repetition is bounded or starts at one place
only, so the time is linear in the text: a long one is no way to stall the sidecar.
"""

from __future__ import annotations

import re
from typing import Final

STRUCK: Final = "***"

# The one named group that matches is what stays in front of the secret.
_SECRETS: Final = re.compile(
    r"""
      # Authorization values: with a digit, in mixed case, or too long for a word.
      (?P<scheme> \b (?:bearer|basic) \s{1,8} )
          (?= [^\s"',;]*\d | (?-i: [^\s"',;]*[a-z][A-Z] ) | [^\s"',;]{16} ) [^\s"',;]{6,}
      # Providers' keys, masked ones too.
    | \b (?:sk|pk|rk|gsk|csk|xai|pplx|nvapi|hf|fw|tgp|r8) [-_] (?= [\w.*-]*[\d*] | [\w.*-]{16} ) [\w.*-]{8,}
    | \b AIza[\w-]{10,}
    | \b (?-i: AQ\.[\w-]{20,} )
      # Our handles and tickets, and our ciphertexts.
    | \b kt[ht]\d_[\w-]+
      # Our callers' tokens.
    | \b kta_[\w-]{8,}
    | \b v1\.[0-9a-f]{16}\.[\w-]+
      # A master key.
    | \b [0-9a-f]{64} \b
      # Passwords in URLs and parameters.
    | (?P<user> (?<![a-z0-9+.-]) [a-z][a-z0-9+.-]{0,30} :// [^\s:/@]{0,256} : ) \S{1,512} (?=@)
    | (?P<parameter> \b (?:password|passwd|pwd|secret|api_?key|access_token) = ) [^\s&"',;]+
      # What a sentence calls a key: "Incorrect API key provided: …", "api-key: …".
    | (?P<said> \b (?:key|token|secret) \b [^:=\n]{0,24} [:=] \s{0,4} ["']? ) (?= [\w+/.-]*\d ) [\w+/.-]{16,}
      # Letters in mixed case and digits, longer than ids are.
    | (?<!\w) (?=\w*\d) (?-i: (?=\w*[a-z]) (?=\w*[A-Z]) ) [a-z0-9]{32,} =* (?![\w=])
      # Base64 and its kin: long, and in a part of it no words, as the path of a model has them.
    | (?<![\w/+-]) (?=[\w/+-]*\d) (?=[\w/+-]*[a-z]) (?=[\w/+-]*[a-z0-9]{16}) [\w/+-]{40,} =* (?![\w/+-])
    """,
    re.VERBOSE | re.IGNORECASE,
)


def scrub(text: str) -> str:
    """`text` with everything that looks like a secret replaced by `***`."""
    return _SECRETS.sub(lambda match: (match[match.lastgroup] if match.lastgroup else "") + STRUCK, text)
