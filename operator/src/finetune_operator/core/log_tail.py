"""The last lines of a failed container's log, fit for a status: few, short, printable, and without secrets.

Called for an attempt's log when its end is first recorded, and by failure.py for a container's termination message.
Secrets are masked before anything is cut, so that no cut leaves the half of one. Pure: the log comes as text, and the
values to hide as an argument.
"""

from __future__ import annotations

import base64
import re
import unicodedata
from collections.abc import Iterable, Iterator
from urllib.parse import quote

MASK = "***"
MAX_LINE_LENGTH = 300
"""Characters of one line, the ellipsis of a cut included."""
MIN_SECRET_LENGTH = 4
"""Shorter values are words, not secrets; masking them would leave nothing to read."""
_MIN_PART = 4
"""So much of a secret is hidden at either end of the text, where reading the log may have cut it."""

_ESCAPES = re.compile(
    r"\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?"  # operating system commands: titles, links
    r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"  # control sequences: colours, cursor
    r"|\x1b[ -/]*[0-~]?"
)
_UNPRINTABLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})

_KEY_EDGE = r"[A-Z0-9 ]{0,40}PRIVATE KEY[A-Z ]{0,10}-----"
_KEY_BLOCK = re.compile(rf"-----BEGIN {_KEY_EDGE}.*?(?:-----END {_KEY_EDGE}|\Z)", re.DOTALL)
_KEY_BLOCK_END = re.compile(rf"\A.*?-----END {_KEY_EDGE}", re.DOTALL)
"""What is left of a block of which the log's tail has only the end."""

_SECRET_WORD = (
    r"secret|passw(?:or)?d|passphrase|api[_-]?key|access[_-]?key|private[_-]?key|credential|signature|authorization"
)
_NAME = rf"(?<![\w.-])[\w.-]*(?:token|{_SECRET_WORD})[\w.-]{{0,60}}"
_ASSIGNMENT = re.compile(
    rf"(?P<name>{_NAME})(?P<between>\\?[\"']?\s{{0,4}}(?:=>|:=|=|:)\s{{0,4}})"
    r"(?P<value>[bfru]{0,2}(?:\\?\"(?:[^\"\\]|\\[^\"])*\\?\"?|'[^']*'?)|[^\s,;&]+)",
    re.IGNORECASE,
)
_FLAG = re.compile(
    rf"(?<![\w.-])(?P<name>--?[\w.-]*(?:token|{_SECRET_WORD})[\w.-]{{0,60}})(?P<between>\s{{1,4}})(?P<value>[^\s-]\S*)",
    re.IGNORECASE,
)
_NO_SECRET = re.compile(
    r"tokens|tokeni[sz]|token[_-]?(?:ids?|count|length|type|budget|path|file)|token(?:Path|File|Id)"
    r"|(?:bos|eos|pad|unk|sep|cls|mask|per|additional_special|special)[_-]?token",
    re.IGNORECASE,
)
"""Names of language models' tokens, which are no secret: tokens_per_second, tokenizer, eos_token_id."""
_REASON = re.compile(r"^No[A-Z]|(?:Missing|Error|Exception|Failed|Denied|Invalid|Required|NotFound|NotUsable)$")
"""Names that begin a sentence and get no value: "SecretMissing: the token is empty"."""

_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\beyJ[\w-]{6,}\.[\w-]{2,}(?:\.[\w-]*){0,3}"), MASK),  # JSON web tokens
    (re.compile(r"\bhf_\w{6,}"), MASK),
    (re.compile(r"\b(?:gh[pousr]_|github_pat_|glpat-|xox[a-z]-|sk-|nvapi-|npm_|pypi-)[\w-]{10,}"), MASK),
    (re.compile(r"\b(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{12,}"), MASK),
    (re.compile(r"(?i)\b(bearer|basic)\s{1,4}[\w.~+/=-]{6,}"), rf"\1 {MASK}"),
    # user:password@ of an address, also where the password has a slash
    (
        re.compile(r"(?i)\b([a-z][a-z0-9+.-]{0,20}://)(?:[^\s/?#@]{0,512}@|[^\s:/@]{0,256}:[^\s@]{1,256}@)"),
        rf"\1{MASK}@",
    ),
    # the 40 characters of an AWS secret key beside a word that says so
    (re.compile(r"(?i)\b((?:aws|secret|key)\W[^\n]{0,60}?)(?<![\w/+])[a-z0-9/+]{40}(?![\w/+=])"), rf"\1{MASK}"),
)


def clean_tail(text: str, *, lines: int, secrets: Iterable[str] = ()) -> tuple[str, ...]:
    """The last `lines` lines of a log that hold anything, oldest first, each of at most MAX_LINE_LENGTH characters.

    Escape sequences and other control characters are removed, of a line that was written over by carriage returns (a
    progress bar) the last state is kept, and secrets are masked as in mask_secrets.
    """
    hidden = tuple(_forms(secrets))
    printable = "\n".join(_printable(line) for line in _ESCAPES.sub("", text).split("\n"))
    kept = [line.rstrip() for line in _masked(printable, hidden).split("\n")]
    last = [line for line in kept if line][-lines:] if lines > 0 else []
    # Masks and removed characters could in theory form a secret anew out of its surroundings.
    safe = (MASK if any(secret in line for secret in hidden) else line for line in last)
    return tuple(line if len(line) <= MAX_LINE_LENGTH else f"{line[: MAX_LINE_LENGTH - 1]}…" for line in safe)


def mask_secrets(text: str, secrets: Iterable[str] = ()) -> str:
    """The text with MASK in place of the given values and of whatever looks like a credential.

    Of the given values also the URL-quoted and base64 forms, the single lines of one that has several, and a part of
    one at the very start or end of the text. By its looks: private keys, JSON web tokens, tokens of hubs and services,
    AWS keys, bearer and basic authorisation, the user part of addresses, and values assigned to a name such as
    password or apiKey. Numbers of language-model tokens (tokens=512, eos_token_id: 2) stay.
    """
    return _masked(text, tuple(_forms(secrets)))


def _masked(text: str, hidden: tuple[str, ...]) -> str:
    for secret in hidden:
        text = text.replace(secret, MASK)
    for secret in hidden:
        text = _mask_cut(text, secret)
    text = _KEY_BLOCK.sub(MASK, text)
    text = _KEY_BLOCK_END.sub(MASK, text)
    for pattern, instead in _PATTERNS:
        text = pattern.sub(instead, text)
    text = _ASSIGNMENT.sub(_mask_value, text)
    return _FLAG.sub(_mask_value, text)


def _mask_cut(text: str, secret: str) -> str:
    """Hide the start of the secret that the text ends with, and the end of it that the text starts with."""
    for length in range(min(len(secret) - 1, len(text)), _MIN_PART - 1, -1):
        if text.endswith(secret[:length]):
            text = text[:-length] + MASK
            break
    for length in range(min(len(secret) - 1, len(text)), _MIN_PART - 1, -1):
        if text.startswith(secret[-length:]):
            return MASK + text[length:]
    return text


def _mask_value(match: re.Match[str]) -> str:
    name, value = match["name"], match["value"]
    if _NO_SECRET.search(name) and not re.search(_SECRET_WORD, name, re.IGNORECASE):
        return match[0]
    if match["between"].strip() == ":" and _REASON.search(name):
        return match[0]
    quote_mark = value[0] if value[0] in "\"'" else ""
    return f"{name}{match['between']}{quote_mark}{MASK}{quote_mark}"


def _forms(secrets: Iterable[str]) -> Iterator[str]:
    """Every form in which a value could stand in the log, longest first."""
    found: set[str] = set()
    for secret in secrets:
        whole = secret.strip()
        for part in {whole, *whole.splitlines()}:
            plain = part.strip()
            if len(plain) < MIN_SECRET_LENGTH:
                continue
            encoded = plain.encode("utf-8", "replace")
            found |= {plain, quote(encoded, safe=""), base64.b64encode(encoded).decode().rstrip("=")}
            found.add("\n".join(_printable(line).strip() for line in plain.split("\n")))
    yield from sorted((form for form in found if len(form) >= MIN_SECRET_LENGTH), key=lambda form: (-len(form), form))


def _printable(line: str) -> str:
    """The line as a terminal would leave it: after its last carriage return, without control characters."""
    states = [state for state in line.split("\r") if state.strip()]
    line = (states[-1] if states else "").replace("\t", " ")
    if line.isascii() and line.isprintable():
        return line
    return "".join(char for char in line if unicodedata.category(char) not in _UNPRINTABLE)
