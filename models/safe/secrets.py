"""Values that may hold secrets: saved without the secrets, which are filled in again at use.

A saved value keeps `${oc.env:NAME}` as written. Literal secrets become `***`: user and password of a URI, the values
of its query, the value of NAME=value, the word after --token. A process passes the full server address to its child
processes only in the variable URI_VARIABLE.
"""

import os
import re
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote

from pydantic import PlainSerializer

from flowmask.models.errors import ConfigError
from flowmask.models.files import whole_file

URI_VARIABLE = "FLOWMASK_TRACKING_URI"
HIDDEN = "***"

_REFERENCE = re.compile(r"\$\{oc\.env:([^,{}]+)(?:,([^{}]*))?\}")
_ONLY_REFERENCES = re.compile(r"(?:\$\{oc\.env:[^,{}]+\})+")
# in the reading of SQLAlchemy or urllib3, whichever matches more
_NAME = r"(?:\$\{[^}]*\}|[^:/?#@\s])*"
_USER = re.compile(rf"://({_NAME}(?:@{_NAME})*)(?::([^@\s]*(?:@[^/?#@\s]*)*))?@")
_QUERY = re.compile(r"([?&;#])([^=&;#\s{}]*)(=?)((?:\$\{[^}]*\}|[^&;#\s{}])*)")
# a shell's word after NAME=: quoted parts; a substitution, and a quote that is not closed, go on to the line's end
_WORD = r"""(?:"(?:\\.|[^"\\])*"|'[^']*'|(?:\$\(|[`"']).*$|\\.|\$\{[^}]*\}|[^\s;&|"'`\\])*"""
_ASSIGNED = re.compile(rf"([A-Za-z_]\w*\+?=)({_WORD})")
_FLAG = re.compile(rf"(?i)((?:-[\w-]*(?:token|password|secret|key)|\bbearer|\bbasic)[ \t]+)({_WORD})")
_VARIABLE = re.compile(r"\b([A-Z_][A-Z0-9_]*=)(.*)", re.DOTALL)
_OTHER_REFERENCE = re.compile(r"(?<!\\)\$\{(?!oc\.env:)")  # the shell's own, which a config would take for a key


def masked_uri(uri: str) -> str:
    """A URI for storing and showing: without user information and without the values of its query."""
    found = _USER.sub(_without_user, uri)
    begins = re.search("[?#]", found)
    if begins is None or found.startswith("sqlite"):
        return found
    return found[: begins.start()] + _QUERY.sub(_without_value, found[begins.start() :])


def masked_line(line: str) -> str:
    """A shell line with NAME=*** in place of NAME=value; a value of only `${oc.env:...}` stays."""
    found = _ASSIGNED.sub(lambda m: m[1] + _kept(m[2]), _USER.sub(_without_user, _escaped(line)))
    return _FLAG.sub(lambda m: m[1] + _kept(m[2]), found)


def masked_option(text: str) -> str:
    """An option of srun or sbatch: variables (`ALL,TOKEN=value`) without values, and URIs without users."""
    parts: list[str] = []
    hides = False  # a comma belongs to a hidden variable's value, or begins another variable
    for part in _USER.sub(_without_user, _escaped(text)).split(","):
        found = _VARIABLE.sub(lambda m: m[1] + _kept(m[2]), part)
        if _VARIABLE.search(part) is not None:
            hides = found.endswith(HIDDEN)
        elif hides:
            continue
        parts.append(found)
    return _FLAG.sub(lambda m: m[1] + _kept(m[2]), ",".join(parts))


def write_private(path: Path, content: str) -> None:
    """Replace a file whole; from its first byte on, only this user can read it."""
    with whole_file(path) as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(content.encode())


def lacks(text: str) -> bool:
    """Whether this is a saved value from which a part was removed."""
    return HIDDEN in text


def revealed(text: str, *, key: str) -> str:
    """The value with `${oc.env:NAME}` filled in from this process's environment.

    Raises ConfigError if it is not set.
    """

    def value(match: re.Match[str]) -> str:
        found = os.environ.get(match[1], match[2])
        if found is None:
            raise ConfigError(f"{key} is {text}, but {match[1]} is not set here: export {match[1]}=...")
        return found

    return _REFERENCE.sub(value, text)


def revealed_uri(uri: str) -> str:
    """The complete URI of a server. ConfigError for a saved copy, if this process does not know its secrets."""
    if not lacks(uri):
        return revealed(uri, key="tracking.uri")
    handed_on = os.environ.get(URI_VARIABLE, "")
    if handed_on and masked_uri(handed_on) == uri:
        return handed_on
    raise ConfigError(
        f"tracking.uri is {uri}, from a saved copy, which holds no user, password or query: give tracking.uri again "
        "(with ${oc.env:NAME} a copy can repeat it)"
    )


def without_secrets(text: str, *, uri: str) -> str:
    """A library's message on one line, without the secrets of `uri`."""
    said = _USER.sub(f"://{HIDDEN}@", " ".join(text.split()))
    secret = [part for match in _USER.finditer(uri) for part in (match[1], match[2] or "")]
    begins = re.search("[?#]", uri)
    if begins is not None and not uri.startswith("sqlite"):
        secret += [m[4] if m[3] else m[2] for m in _QUERY.finditer(uri, begins.start())]
    for word in sorted({*secret, *map(unquote, secret)}, key=len, reverse=True):
        if len(word) > 2:  # a shorter one would occur in many words
            said = said.replace(word, HIDDEN)
    return said


def _without_user(match: re.Match[str]) -> str:
    user, password = match[1], match[2]
    safe = _ONLY_REFERENCES.fullmatch(user if password is None else password)  # then a user's name may stay
    return match[0] if safe else f"://{HIDDEN}@"


def _without_value(match: re.Match[str]) -> str:
    mark, name, equals, value = match.groups()
    return f"{mark}{name}={_kept(value)}" if equals else f"{mark}{name and HIDDEN}"


def _kept(value: str) -> str:
    return value if not value or _ONLY_REFERENCES.fullmatch(value.strip("\"'")) else HIDDEN


def _escaped(text: str) -> str:
    return _OTHER_REFERENCE.sub(r"\\${", text)


SecretUri = Annotated[str, PlainSerializer(masked_uri, when_used="json-unless-none")]
SecretLine = Annotated[str, PlainSerializer(masked_line, when_used="json-unless-none")]
SecretOption = Annotated[str, PlainSerializer(masked_option, when_used="json-unless-none")]
