"""What is secret: told by a variable's name, by the look of a text, by the values in this environment.

    is_name(name)     whether a variable of that name holds a secret: HF_TOKEN, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY
    find(text)        secrets that stand in a text literally: TOKEN=…, https://user:password@host, hf_…
    mask(text)        the text without them
    Hider             takes values that are known (those of this environment) out of what is written
    is_file(name)     whether a file of that name holds secrets: .env, id_rsa, .netrc

Names and looks are rules of thumb and can miss one; a value that the environment holds under such a name is
found wherever it appears.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import PurePath

HIDDEN = "[hidden]"
"""What stands where a secret stood."""
FILE = "~/.config/hpcdl/secrets.env"
"""Where a job's node looks for a user's secrets; see hpcdl.launch.secret_file."""
LEAST = 8
"""Shorter values are not looked for in what is written: too many words would be taken for them."""

_NAME = (
    r"(^|_)(ACCESS|AUTH|API|BEARER|REFRESH|ID|SECRET|PRIVATE)?(TOKEN|KEY)$"
    r"|(^|_)(PASSPHRASE|PASSWD|PWD|PAT|JWT|CREDENTIALS?)$|SECRET|PASSWORD|^AWS_"
)
_NO_SECRET = (
    r"_(FILE|PATH|DIR|FOLDER|HELPER|COMMAND|CMD|NAME)$|(^|_)(PUBLIC|SORT|PRIMARY|FOREIGN)_KEY$|^OLDPWD$|^PWD$"
    r"|^AWS_((DEFAULT_)?REGION|(DEFAULT_)?PROFILE|DEFAULT_OUTPUT|CONFIG_\w+|ENDPOINT_URL\w*|CA_BUNDLE|EC2_\w+|STS_\w+"
    r"|MAX_ATTEMPTS|RETRY_MODE|SHARED_\w+|PAGER|ROLE_\w+|EXECUTION_ENV|SDK_\w+)$"
)
_PLACE = r"(~|\$\{?\w+\}?)?(/[\w.@+-]+)+"
"""A path: what a KEY or CREDENTIALS variable often holds instead of the secret itself."""

_LITERAL = r"[^\s\"'`$<>(){}\[\],;|&…]"
"""What a value is made of that stands there itself; `$NAME`, `$(command)` and <placeholder> don't."""
_LOOKS: tuple[tuple[str, str], ...] = (
    ("a password in an address", r"(?i)[a-z][a-z0-9+.-]*://[^\s/@:\"']*:(?P<value>[^\s/@$\"'][^\s/@\"']*)@"),
    ("a token in an address", r"(?i)[a-z][a-z0-9+.-]*://(?P<value>[a-z0-9_-]{20,})@"),
    (
        "a key in an address",
        r"(?i)[?&](?:[a-z_]*token|api_?key|key|sig|signature|password|x-amz-(?:signature|security-token))="
        r"(?P<value>[^\s&#$\"']{4,})",
    ),
    ("a token", r"\b(?P<value>hf_[A-Za-z0-9]{16,}|gh[opsru]_[A-Za-z0-9]{20,}|github_pat_\w{20,})\b"),
    ("a token", r"\b(?P<value>glpat-[\w-]{16,}|xox[abprs]-[\w-]{10,}|sk-[A-Za-z0-9_-]{20,})"),
    ("a token", r"\b(?P<value>(?:AKIA|ASIA)[0-9A-Z]{16}|wandb_v\d_\w{20,})\b"),
    ("a token", r"\b(?P<value>eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,})"),
    ("a private key", r"(?P<value>-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END|\Z))"),
    (
        "a password on a command line",
        r"(?<!\S)--?(?:token|password|passwd|api[-_]key|secret|auth)(?:\s+|=)[\"']?"
        rf"(?P<value>(?!-){_LITERAL}+)",
    ),
    ("a token on a command line", rf"\bwandb\s+login\s+(?:--?\w\S*\s+)*(?P<value>(?!-){_LITERAL}{{8,}})"),
    ("a token in a header", rf"(?i)\b(?:Bearer|Authorization:\s*\w+)\s+(?P<value>{_LITERAL}{{8,}})"),
)
"""What secrets look like, by kind. Compiled when first looked for: that takes longer than a command's start may."""
_ASSIGNED = (
    r"(?<![\w$])(?P<name>[A-Za-z_]\w*)[\"']?\]?(?:=|\s*:\s+|\s+=\s+(?=[\"']))"
    rf"(?=\"(?P<double>[^\"$`\n]+)\"|'(?P<single>[^'\n]+)'|(?P<bare>{_LITERAL}+)(?![\w(\[{{.]))"
)
"""A name and its value, which is only looked at: in `--comment=TOKEN=x` it holds another pair."""
_NO_VALUE = frozenset(
    {"null", "none", "true", "false", "yes", "no", "auto", "str", "int", "0", "1", "*", "...", HIDDEN}
)
_LOWER = frozenset(
    {
        "api_key",
        "apikey",
        "password",
        "passwd",
        "passphrase",
        "secret",
        "access_token",
        "auth_token",
        "secret_key",
    }
)
"""Names in small letters that are secrets'; `pad_token` and `sort_key` are not."""

_FILES = (
    r"\.env(\..*)?|.*\.env|\.netrc|_netrc|\.pgpass|\.git-credentials|\.pypirc|\.npmrc|id_(rsa|dsa|ecdsa|ed25519)(_.*)?"
    r"|.*\.(pem|key|p12|pfx|jks|keystore|kdbx|ppk)|credentials(\..*)?|.*secrets?(\.(ya?ml|json|toml|ini|txt|cfg|conf))?"
    r"|\.?(hf_|wandb_|api_|access_)?(token|api_?key)(\.txt)?"
)
_FOLDERS = frozenset({".aws", ".ssh", ".gnupg", ".azure", ".kube", ".docker"})


@dataclass(frozen=True, slots=True)
class Found:
    """A secret that stands in a text."""

    what: str
    """What kind, in words."""
    value: str
    start: int
    end: int


def is_name(name: str) -> bool:
    """Whether a variable of this name holds a secret, as far as a name tells."""
    plain = re.sub(r"[^A-Z0-9_]", "_", name.upper())
    return bool(re.search(_NAME, plain)) and not re.search(_NO_SECRET, plain)


def is_value(name: str, value: str) -> bool:
    """Whether a variable's value is a secret itself, and not the place of one, a variable's name or nothing."""
    plain = value.strip()
    if not is_name(name) or not plain or plain.lower() in _NO_VALUE or plain.startswith("$"):
        return False
    return not (re.fullmatch(_PLACE, value) and re.search(r"(KEY|CREDENTIALS?)$", name.upper()))


def is_file(path: str) -> bool:
    """Whether a file holds secrets, as far as its name tells."""
    pure = PurePath(path)
    if pure.suffix in (".py", ".md", ".rst") or re.search(
        r"(example|sample|template|dist)$", pure.name, re.I
    ):
        return False
    return bool(re.fullmatch(_FILES, pure.name, re.I)) or not _FOLDERS.isdisjoint(pure.parts)


def find(text: str) -> list[Found]:
    """The secrets that stand in a text literally, from its beginning on; none twice."""
    found = [
        Found(what, match["value"], *match.span("value"))
        for what, look in _looks()
        for match in look.finditer(text)
    ]
    for match in _assigned().finditer(text):
        name, kind = match["name"], match.lastgroup or "bare"
        meant = (
            name.isupper()
            or name.lower() in _LOWER
            or text[max(0, match.start() - 8) : match.start()].rstrip().endswith("export")
        )
        if meant and is_value(name, match[kind]):
            found.append(Found(f"a value of {name}", match[kind], *match.span(kind)))
    apart: list[Found] = []
    for each in sorted(found, key=lambda one: (one.start, -one.end)):
        if not apart or each.start >= apart[-1].end:
            apart.append(each)
    return apart


@cache
def _looks() -> list[tuple[str, re.Pattern[str]]]:
    return [(what, re.compile(look)) for what, look in _LOOKS]


@cache
def _assigned() -> re.Pattern[str]:
    return re.compile(_ASSIGNED)


def mask(text: str) -> str:
    """The text without what looks like a secret."""
    for each in reversed(find(text)):
        text = f"{text[: each.start]}{HIDDEN}{text[each.end :]}"
    return text


class Hider:
    """Takes known secrets out of what is written.

    Args:
        values: the secrets. One of several lines is looked for line by line; as JSON and a URL have it, too.
        least: shorter ones are left alone.
    """

    def __init__(self, values: Iterable[str], least: int = LEAST) -> None:
        lines = {line.strip() for value in values for line in value.splitlines()}
        self.values = tuple(sorted((line for line in lines if len(line) >= least), key=len, reverse=True))
        forms = {form for value in self.values for form in _forms(value)}
        longest_first = sorted(forms, key=len, reverse=True)
        text = "|".join(map(re.escape, longest_first))
        self._text = re.compile(text) if text else None
        self._bytes = re.compile(text.encode("utf-8", "surrogateescape")) if text else None

    def hide(self, text: str) -> str:
        """The text without them."""
        return self._text.sub(HIDDEN, text) if self._text else text

    def hide_bytes(self, data: bytes) -> bytes:
        """The same for bytes."""
        return self._bytes.sub(HIDDEN.encode(), data) if self._bytes else data


def _forms(value: str) -> set[str]:
    from urllib.parse import quote

    as_json = {json.dumps(value, ensure_ascii=strict)[1:-1] for strict in (True, False)}
    return {value, repr(value)[1:-1], quote(value, safe=""), *as_json}


def values(environment: Mapping[str, str]) -> list[str]:
    """The secrets in an environment, by their variables' names; passwords in addresses as well."""
    named = [value for name, value in environment.items() if is_value(name, value)]
    in_addresses = [
        each.value
        for value in environment.values()
        if "://" in value and "@" in value
        for each in find(value)
    ]
    return [*named, *in_addresses]


def hide(text: str) -> str:
    """The text without the secrets of this process's environment, as it was when first asked."""
    return of_this_process().hide(text)


@cache
def of_this_process() -> Hider:
    """A Hider of this process's environment."""
    return Hider(values(os.environ))
