#!/usr/bin/env python3
"""Appointment webhook receiver: takes appointment events over HTTP and keeps each of them for good in SQLite.

    python3 webhook_server.py              serve on 127.0.0.1:8000 into appointments.db
    python3 webhook_server.py --help       every command and setting

    from webhook_server import Config, WebhookServer
    with WebhookServer(Config(port=0, database="events.db"), on_event=print) as server:
        print(server.url)

One file, the standard library, Python 3.9 or newer. It reads in the order in which an event flows; each section uses
only those above it:

    Config         settings: flags, environment and defaults out of one list
    JSON           bytes to a value, strictly by RFC 8259
    Schema         JSON Schema draft 2020-12, compiled once
    Events         a value to an AppointmentEvent, or to what is wrong with it
    Store          events on disk: one commit for all who wait, and who commits answers
    Log            lines without patients' data, written in the background
    HTTP           bytes to a request, a request to its route, an answer to bytes
    Service        puts the parts together: start, drain, stop
    Command line   serve, check, send, bench
"""
from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import difflib
import email.utils
import errno
import functools
import gc
import http.client
import io
import ipaddress
import itertools
import json
import logging.handlers
import os
import queue
import re
import select
import selectors
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import unicodedata
from collections import deque
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from json.encoder import encode_basestring_ascii
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Optional
from urllib.parse import unquote, unquote_to_bytes, urlencode, urljoin, urlsplit

try:
    import resource
except ImportError:                    # Windows
    resource = None

__version__ = "1.0.0"


class SetupError(Exception):
    """What the operator has to mend before the service can start: one line for the person at the keyboard, exit 2."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message, 2000))


def printable(text: str, longest: int = 200) -> str:
    """`text` for one log line: shortened, and without characters that end lines, move cursors or turn text around."""
    if len(text) > longest:
        text = text[:longest] + "…"
    return text if text.isprintable() else "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


# =============================================================================
# Config: every setting once; flags, environment, --help and defaults come from it. Knows nothing of who uses them.
# =============================================================================

def _text(value: Any) -> str:
    if not isinstance(value, (str, os.PathLike)) or not str(value) or "\0" in str(value):
        raise ValueError("must be text, not empty and without NUL")
    return str(value)


def _optional_text(value: Any) -> str:
    return _text(value) if value != "" else ""


def _whole(low: int, high: int = 2 ** 40) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        # int() alone would take "+5" and "1_0"
        if not re.fullmatch("[0-9]{1,19}", str(value)) or isinstance(value, bool) or not low <= int(value) <= high:
            raise ValueError(f"must be a whole number of at least {low}" if high == 2 ** 40 else
                             f"must be a whole number from {low} to {high}")
        return int(value)
    return parse


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", str(value)) or float(value) <= 0:
        raise ValueError("must be a number of seconds above 0, such as 2 or 0.5")
    return float(value)


def _one_of(*choices: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return value
    return parse


def _list_of(pattern: str, what: str) -> Callable[[Any], tuple]:
    def parse(value: Any) -> tuple:
        texts = [value] if isinstance(value, str) else value
        items = [item.strip().lower() for text in texts if text for item in _text(text).split(",") if item.strip()]
        if not all(re.fullmatch(pattern, item) for item in items):
            raise ValueError(f"must be {what}")
        return tuple(items)
    return parse


def checked(parse: Callable[[Any], Any], value: Any, where: str) -> Any:
    """parse(value). Raises SetupError that names `where` the value came from."""
    try:
        return parse(value)
    except (ValueError, TypeError) as error:
        raise SetupError(f"{where}: {error}") from None


def _setting(default: Any, help: str, parse: Callable[[Any], Any] = _text, metavar: str = "TEXT") -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "parse": parse, "metavar": metavar})


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of one service, checked when made. Seconds and bytes are plain numbers.

    Raises SetupError that names the setting and says what it must be.
    """
    host: str = _setting("127.0.0.1", "address to listen on; 0.0.0.0 is every IPv4 address, :: every address")
    port: int = _setting(8000, "port to listen on; 0 takes a free one", _whole(0, 65535), "N")
    database: str = _setting("appointments.db", "SQLite file, made if missing; relative to the current folder", metavar="FILE")
    schema: str = _setting("", "JSON Schema of an event (default: schema.json beside the program)",
                           _optional_text, "FILE")
    duplicates: str = _setting("conflict", "answer to an event that comes again unchanged: 409 (conflict) or 200 (ok)",
                               _one_of("conflict", "ok"), "conflict|ok")
    # Senders give up after 5 s or so: 2 s leaves them the time to hear the 503
    busy_timeout: float = _setting(2.0, "how long an event waits for a locked database, then it gets 503",
                                   _seconds, "SECONDS")
    log_file: str = _setting("", "write the log here instead of to stderr", _optional_text, "FILE")
    log_max_bytes: int = _setting(10 * 1024 * 1024, "size at which the log file is rotated", _whole(4096), "BYTES")
    log_backups: int = _setting(5, "rotated log files to keep", _whole(1, 1000), "N")
    log_level: str = _setting("INFO", "lowest level to log", _one_of("DEBUG", "INFO", "WARNING", "ERROR"),
                              "DEBUG|INFO|WARNING|ERROR")
    log_payloads: str = _setting("redacted", "payloads in the log: without patients' data, whole, or not at all",
                                 _one_of("redacted", "full", "none"), "redacted|full|none")
    max_request_line: int = _setting(8192, "longest request line, a longer one gets 414; the default is Apache's",
                                     _whole(64), "BYTES")
    max_header_bytes: int = _setting(16384, "largest header section, a larger one gets 431", _whole(256), "BYTES")
    max_header_fields: int = _setting(100, "most header fields, more get 431; the default is Apache's", _whole(1), "N")
    max_body: int = _setting(1024 * 1024, "largest request body, a larger one gets 413", _whole(1, 2 ** 30), "BYTES")
    max_connections: int = _setting(512, "most connections at once, further ones get 503", _whole(1, 100000), "N")
    max_connections_per_address: int = _setting(128, "most connections at once from one address, further ones get 503",
                                                _whole(1, 100000), "N")
    header_timeout: float = _setting(10.0, "time a sender has for the head of a request, then 408", _seconds, "SECONDS")
    body_timeout: float = _setting(30.0, "time a sender has for a body, then 408; also for taking a piece of an answer", _seconds,
                                   "SECONDS")
    idle_timeout: float = _setting(60.0, "how long a connection may be idle between requests", _seconds, "SECONDS")
    shutdown_timeout: float = _setting(10.0, "how long a stop waits for requests in flight", _seconds, "SECONDS")
    allowed_host: tuple = _setting((), "further host name to answer to (repeat, or separate with commas); by default "
                                   "any, but only local names while listening on a local address",
                                   _list_of(r"[\w.-]+|\[[0-9a-f:.]+\]", "a host name without scheme or port"), "HOST")
    allowed_origin: tuple = _setting((), "web origin whose pages may send requests, such as https://desk.example "
                                     "(repeat, or separate with commas)",
                                     _list_of(r"https?://[^/,\s]+", "an origin such as https://desk.example"), "ORIGIN")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, checked(field.metadata["parse"], getattr(self, field.name), field.name))

    @classmethod
    def read(cls, flags: dict, environment: dict) -> Config:
        """Settings out of flags ({name: text or None}) before WEBHOOK_NAME in the environment before defaults.

        An error names the flag or the variable that it came from. An empty variable counts as not set.
        """
        values = {}
        for field in dataclasses.fields(cls):
            variable = "WEBHOOK_" + field.name.upper()
            if flags.get(field.name) is not None:
                values[field.name] = checked(field.metadata["parse"], flags[field.name], flag_of(field.name))
            elif environment.get(variable):
                values[field.name] = checked(field.metadata["parse"], environment[variable], variable)
        return cls(**values)


def flag_of(name: str) -> str:
    """The flag of a setting: busy_timeout is --busy-timeout."""
    return "--" + name.replace("_", "-")


# =============================================================================
# JSON: bytes to a value, strictly by RFC 8259. Knows nothing of schemas or events.
# =============================================================================

MAX_DEPTH = 64          # .NET's limit; the C scanner recurses, so this also keeps small thread stacks whole
MAX_NUMBER = 100        # characters: int() of a million digits takes seconds

_SPACE = re.compile(r"[ \t\n\r]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
# The closing quote is optional: a pattern that insisted on it would start again at every quote of a text without one,
# which takes minutes
_TOKEN = re.compile(r'"(?:[^"\\]+|\\.)*"?|[{}\[\]]|[-+.\w]+', re.DOTALL)
_MARK = re.compile(r'"(?:[^"\\]+|\\.)*"?|[{}\[\]]', re.DOTALL)
_SUSPECT = re.compile(r"\\u(?:0000|[dD][89a-fA-F])").search      # U+0000 or half of a surrogate pair, perhaps
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|.)", re.DOTALL)


class JSONError(ValueError):
    """Text that is not JSON, or JSON that we do not take. `reason` never repeats the text; `line`, `column` from 1."""

    def __init__(self, reason: str, text: str, position: int) -> None:
        self.reason = reason
        self.line = text.count("\n", 0, position) + 1
        self.column = position - (text.rfind("\n", 0, position) + 1) + 1
        super().__init__(f"Invalid JSON: {reason} at line {self.line} column {self.column}")


class _Fault(Exception):
    """The scanner met something that `inspect_json` will find and name."""


def _members(pairs: list) -> dict:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise _Fault
    return members


def _integer(text: str) -> int:
    if len(text) > MAX_NUMBER:
        raise _Fault
    return int(text)


def _float(text: str) -> float:
    number = float(text) if len(text) <= MAX_NUMBER else float("inf")
    if number in (float("inf"), float("-inf")):
        raise _Fault
    return number


def _constant(name: str) -> None:
    raise _Fault


_SCAN = json.JSONDecoder(object_pairs_hook=_members, parse_int=_integer, parse_float=_float,
                         parse_constant=_constant).scan_once


def parse_json(body: bytes) -> tuple:
    """(value, text) of a UTF-8 body that is one JSON value by RFC 8259.

    Refused beyond the grammar, with JSONError: duplicate names, U+0000 and lone surrogates in strings (no database
    keeps them faithfully), depth over 64, numbers over 100 characters or out of a double's range.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        before = body[:error.start].decode()
        raise JSONError("the text is not UTF-8", before, len(before)) from None
    # The ordinary event has neither; what has is read by the slow reader first, before the C scanner recurses into it
    if "\\u" in text and _SUSPECT(text) or text.count("{") + text.count("[") > MAX_DEPTH and _is_deep(text):
        inspect_json(text)
    try:
        value, end = _SCAN(text, 0 if text[:1] == "{" else _SPACE.match(text).end())
    except StopIteration as stop:
        raise JSONError(_reason_of(text, "expecting a value"), text, stop.value) from None
    except json.JSONDecodeError as error:
        reason = error.msg.split(": ")[0].removesuffix(" at").removesuffix(" starting")
        raise JSONError(_reason_of(text, reason[:1].lower() + reason[1:]), text, error.pos) from None
    except _Fault:
        inspect_json(text)
        raise JSONError("something is not JSON", text, 0) from None
    if end != len(text):
        end = _SPACE.match(text, end).end()
        if end != len(text):
            raise JSONError("more text after the JSON value", text, end)
    return value, text


def _is_deep(text: str) -> bool:
    depth = 0
    for word in _MARK.findall(text):
        if word in ("{", "["):
            depth += 1
            if depth > MAX_DEPTH:
                return True
        elif depth and word in ("}", "]"):
            depth -= 1
    return False


def _reason_of(text: str, otherwise: str) -> str:
    """Why nothing of `text` can be read, where that is more than the scanner's word for it."""
    if not text.strip(" \t\n\r"):
        return "the text is empty, expected a JSON value"
    if text[0] == "\ufeff":
        return "the text starts with a byte order mark (BOM), expected plain UTF-8"
    if "\0" in text[:2]:
        return "the text seems to be UTF-16 or UTF-32, expected UTF-8"
    return otherwise


def inspect_json(text: str) -> None:
    """Raise JSONError for the first thing that parse_json refuses beyond the grammar. Reads token by token, slowly."""
    containers: list = []                             # for each open container its names so far, None in an array
    for token in _TOKEN.finditer(text):
        word, at = token.group(), token.start()
        if word in ("{", "["):
            containers.append(set() if word == "{" else None)
            if len(containers) > MAX_DEPTH:
                raise JSONError(f"nested deeper than {MAX_DEPTH} levels", text, at)
        elif word in ("}", "]"):
            if containers:
                containers.pop()
        elif word[0] == '"':
            _inspect_string(text, word, at)
            if containers and containers[-1] is not None and text.startswith(":", _SPACE.match(text, token.end()).end()):
                _inspect_name(text, word, at, containers[-1])
        elif len(word) > 2:
            _inspect_word(text, word, at)


def _inspect_word(text: str, word: str, at: int) -> None:
    number = _NUMBER.match(word)
    if number and len(number.group()) > MAX_NUMBER:
        raise JSONError(f"a number longer than {MAX_NUMBER} characters", text, at)
    if number and float(number.group()) in (float("inf"), float("-inf")):
        raise JSONError("a number out of range", text, at)
    if word.startswith(("NaN", "Infinity", "-Infinity")):
        raise JSONError("NaN and Infinity are not JSON", text, at)


def _inspect_name(text: str, word: str, at: int, names: set) -> None:
    try:
        name = json.loads(word) if "\\" in word else word[1:-1]
    except ValueError:                                  # the scanner will say it better
        return
    if name in names:
        raise JSONError("a member name that the object already has", text, at)
    names.add(name)


def _inspect_string(text: str, word: str, at: int) -> None:
    high = None                                         # where a high surrogate waits for its low one
    for escape in _ESCAPE.finditer(word) if "\\u" in word else ():
        code = int(escape.group(1), 16) if escape.group(1) else -1
        if high is not None and not (0xDC00 <= code <= 0xDFFF and escape.start() == high + 6):
            break
        if code == 0:
            raise JSONError("U+0000 in a string", text, at + escape.start())
        if high is None and 0xDC00 <= code <= 0xDFFF:
            high = escape.start()
            break
        high = escape.start() if 0xD800 <= code <= 0xDBFF else None
    if high is not None:
        raise JSONError("half of a surrogate pair in a string", text, at + high)


# =============================================================================
# Schema: JSON Schema draft 2020-12, compiled once. Knows nothing of HTTP, SQL or appointments.
# =============================================================================

MOST_PROBLEMS = 100     # of one value: a hostile megabyte must not come back as a hundred
LONGEST_NAME = 100      # characters of a member name in a message or a path
LONGEST_REGEX = 1000    # characters of one in a payload (format: regex): Python's compiler takes seconds for a megabyte

# -- timestamps

# Spellings that need no calendar: valid as they stand, and (the first) canonical as they stand
_SURE = r"(?!000[01]|9999)[0-9]{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])T(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]"
_ORDINARY_TIMESTAMP = re.compile(_SURE + "Z").fullmatch
_VALID_TIMESTAMP = re.compile(_SURE + r"(?:\.[0-9]{1,9})?(?:Z|[-+](?:[01][0-9]|2[0-3]):[0-5][0-9])").fullmatch
_TIMESTAMP = re.compile(r"""
    (?P<year>[0-9]{4}) (?: -(?P<month>[0-9]{2})-(?P<day>[0-9]{2}) | (?P<month2>[0-9]{2})(?P<day2>[0-9]{2})
                         | -?W(?P<week>[0-9]{2})-?(?P<weekday>[1-7]) | -?(?P<ordinal>[0-9]{3}) )
    [Tt\ ]
    (?P<hour>[0-9]{2}) (?: :(?P<minute>[0-9]{2}) (?: :(?P<second>[0-9]{2}) (?:[.,](?P<fraction>[0-9]{1,9}))? )?
                         | (?P<minute2>[0-9]{2}) (?: (?P<second2>[0-9]{2}) (?:[.,](?P<fraction2>[0-9]{1,9}))? )? )?
    (?: [Zz] | (?P<sign>[-+])(?P<offset_hour>[0-9]{2})(?: :?(?P<offset_minute>[0-9]{2}) )? )?
    """, re.VERBOSE)


def canonical_timestamp(text: str) -> str:
    """The instant of an ISO 8601 date-time, in UTC, one spelling for each: 2025-01-10T14:00:00Z.

    Takes calendar, week and ordinal dates, extended or basic, T or a space, 1 to 9 fraction digits (trailing zeros are
    dropped), any offset (none is UTC), 24:00:00, and second 60 where UTC can have a leap second. Raises ValueError.
    Does not use datetime.fromisoformat, which takes other texts on each Python. Hot path: the ordinary spelling is
    recognised as a whole and is its own canonical form (0.3 against 4 us).
    """
    if _ORDINARY_TIMESTAMP(text):
        return text
    match = _TIMESTAMP.fullmatch(text)
    if not match:
        raise ValueError("not an ISO 8601 date-time")
    part = match.groupdict()
    hour, minute = int(part["hour"]), int(part["minute"] or part["minute2"] or 0)
    second, fraction = int(part["second"] or part["second2"] or 0), (part["fraction"] or part["fraction2"] or "").rstrip("0")
    offset_hour, offset_minute = int(part["offset_hour"] or 0), int(part["offset_minute"] or 0)
    midnight = hour == 24 and not minute and not second and not fraction
    if not (hour < 24 or midnight) or minute > 59 or second > 60 or offset_hour > 23 or offset_minute > 59:
        raise ValueError("not a time of day")
    minutes = hour * 60 + minute - (offset_hour * 60 + offset_minute) * (-1 if part["sign"] == "-" else 1)
    try:
        moment = _date(part) + timedelta(minutes=minutes, seconds=min(second, 59))
    except OverflowError:
        raise ValueError("outside the years 0001 to 9999") from None
    if second == 60 and (moment.hour, moment.minute) != (23, 59):
        raise ValueError("a leap second is only at 23:59:60 UTC")
    return (f"{moment.year:04d}-{moment.month:02d}-{moment.day:02d}T{moment.hour:02d}:{moment.minute:02d}:"
            f"{second:02d}{'.' + fraction if fraction else ''}Z")


def _date(part: dict) -> datetime:
    year = int(part["year"])
    if part["week"]:
        if not 1 <= int(part["week"]) <= 53:
            raise ValueError("no such week")
        day = datetime.strptime(f"{year:04d}-{part['week']}-{part['weekday']}", "%G-%V-%u")
        if day.isocalendar()[1] != int(part["week"]):
            raise ValueError("no such week in that year")
        return day
    if part["ordinal"]:
        day = datetime(year, 1, 1) + timedelta(days=int(part["ordinal"]) - 1)
        if day.year != year:
            raise ValueError("no such day in that year")
        return day
    return datetime(year, int(part["month"] or part["month2"]), int(part["day"] or part["day2"]))


# -- formats: text to whether it is one

_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOSTNAME = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*")
_IPV4 = re.compile(r"(?:(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])(?:\.(?!\Z)|\Z)){4}")
_UUID = re.compile("[0-9A-Fa-f]{8}-(?:[0-9A-Fa-f]{4}-){3}[0-9A-Fa-f]{12}")
_BAD_TILDE = re.compile("~(?![01])").search
_BAD_PERCENT = re.compile("%(?![0-9A-Fa-f]{2})").search
_DURATION = re.compile(r"P(?!\Z)(?:[0-9]+W|(?:[0-9]+Y(?:[0-9]+M(?:[0-9]+D)?)?|[0-9]+M(?:[0-9]+D)?|[0-9]+D)?"
                       r"(?:T(?:[0-9]+H(?:[0-9]+M(?:[0-9]+S)?)?|[0-9]+M(?:[0-9]+S)?|[0-9]+S))?)")
_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_EMAIL = re.compile(rf'(?:{_ATOM}(?:\.{_ATOM})*|"(?:[\x20\x21\x23-\x5b\x5d-\x7e]|\\[\x20-\x7e])*")@'
                    r"(?:\[(?P<literal>[^\]]*)\]|(?P<host>[^@\[]*))")
# Single classes, with % looked at apart: a repeated group of a megabyte would take 200 MB of backtracking
_PLAIN = "A-Za-z0-9._~!$&'()*+,;=-"
_URI = re.compile(rf"[A-Za-z][A-Za-z0-9+.-]*:(?://(?:[%:{_PLAIN}]*@)?"
                  rf"(?:\[(?P<ip6>[0-9A-Fa-f:.]+)\]|\[[vV][0-9A-Fa-f]+\.[:{_PLAIN}]+\]|[%{_PLAIN}]*)(?::[0-9]*)?"
                  rf"(?:/[%:@/{_PLAIN}]*)?|(?!//)[%:@/{_PLAIN}]*)(?:\?[%:@/?{_PLAIN}]*)?(?:#[%:@/?{_PLAIN}]*)?")
_DATE_TIME = re.compile("[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2}(?:\\.[0-9]+)?(?:[Zz]|[-+][0-9]{2}:[0-9]{2})")


def _raises_nothing(function: Callable, text: str) -> bool:
    try:
        function(text)
        return True
    except (ValueError, OverflowError):
        return False


def _is_iso8601(text: str) -> bool:
    return _VALID_TIMESTAMP(text) is not None or _raises_nothing(canonical_timestamp, text)


def _is_date_time(text: str) -> bool:
    """RFC 3339 section 5.6: a subset of ISO 8601 but for the number of fraction digits and the year 0000."""
    if _VALID_TIMESTAMP(text):
        return True
    if not _DATE_TIME.fullmatch(text) or text[11:13] == "24":
        return False
    shifted = str(int(text[:4]) % 400 + 2000) + text[4:]        # the same calendar, and no offset leaves the years
    return _raises_nothing(canonical_timestamp, re.sub(r"\.[0-9]+", "", shifted))


def _is_date(text: str) -> bool:
    return _is_date_time(text + "T00:00:00Z")


def _is_time(text: str) -> bool:
    return _is_date_time("2000-06-30T" + text)


def _is_ipv6(text: str) -> bool:
    return re.fullmatch("[0-9A-Fa-f:.]+", text) is not None and _raises_nothing(ipaddress.IPv6Address, text)


def _is_email(text: str) -> bool:
    match = _EMAIL.fullmatch(text) if len(text) <= 320 else None        # RFC 5321 section 4.5.3.1: 64 + @ + 255
    if not match:
        return False
    literal = match.group("literal")
    if literal is None:
        return _HOSTNAME.fullmatch(match.group("host")) is not None
    return _is_ipv6(literal[5:]) if literal[:5].lower() == "ipv6:" else _IPV4.fullmatch(literal) is not None


def _is_uri(text: str) -> bool:
    match = None if _BAD_PERCENT(text) else _URI.fullmatch(text)
    return match is not None and (match.group("ip6") is None or _is_ipv6(match.group("ip6")))


def _is_json_pointer(text: str) -> bool:
    return text[:1] in ("", "/") and not _BAD_TILDE(text)


def _is_regex(text: str) -> bool:
    return len(text) <= LONGEST_REGEX and _raises_nothing(ecma_pattern, text)


def _fullmatch(pattern: re.Pattern) -> Callable[[str], bool]:
    return lambda text: pattern.fullmatch(text) is not None


# name: (check, what a message asks for)
FORMATS = {
    "iso8601": (_is_iso8601, "an ISO 8601 date-time, for example 2025-01-10T14:00:00Z"),
    "date-time": (_is_date_time, "an RFC 3339 date-time with offset, for example 2025-01-10T14:00:00Z"),
    "date": (_is_date, "a date, for example 2025-01-10"),
    "time": (_is_time, "a time with offset, for example 14:00:00Z"),
    "duration": (_fullmatch(_DURATION), "an ISO 8601 duration, for example PT30M"),
    "email": (_is_email, "an e-mail address"),
    "uuid": (_fullmatch(_UUID), "a UUID"),
    "uri": (_is_uri, "a URI with scheme"),
    "ipv4": (_fullmatch(_IPV4), "an IPv4 address"),
    "ipv6": (_is_ipv6, "an IPv6 address"),
    "hostname": (_fullmatch(_HOSTNAME), "a host name"),
    "json-pointer": (_is_json_pointer, "a JSON Pointer"),
    "regex": (_is_regex, f"an ECMA-262 regular expression of at most {LONGEST_REGEX} characters"),
}

# -- patterns: ECMA-262 with the flag u, told to Python's re

_ECMA_SPACE = "\\t-\\r \xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff"
_ECMA_NOT_SPACE = ("\\x00-\\x08\\x0e-\\x1f!-\x9f\xa1-\u167f\u1681-\u1fff\u200b-\u2027\u202a-\u202e\u2030-\u205e\u2060-\u2fff"
                   "\u3001-\ufefe\uff00-\U0010ffff")
_ECMA_GROUP = re.compile(r"\((?:\?(?:[:=!]|<[=!]|<(?P<name>[A-Za-z_$][A-Za-z0-9_$]*)>))?")
_ECMA_QUANTIFIER = re.compile(r"(?:[*+?]|\{[0-9]+(?:,[0-9]*)?\})\??")
_ECMA_ESCAPE = re.compile(r"\\(?:(?P<high>u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})|u(?P<u>[0-9a-fA-F]{4})"
                          r"|u\{(?P<point>[0-9a-fA-F]{1,6})\}|x(?P<x>[0-9a-fA-F]{2})|c(?P<control>[A-Za-z])"
                          r"|k<(?P<k>[A-Za-z_$][A-Za-z0-9_$]*)>|(?P<p>[pP])\{(?P<property>[^}]*)\}|(?P<number>[1-9][0-9]*)"
                          r"|(?P<nul>0(?![0-9]))|(?P<class>[dDwWsSbB])|(?P<same>[fnrtv])|(?P<sign>[^A-Za-z0-9]))", re.DOTALL)
_CATEGORIES = {"letter": "L", "uppercase_letter": "Lu", "lowercase_letter": "Ll", "titlecase_letter": "Lt",
               "modifier_letter": "Lm", "other_letter": "Lo", "mark": "M", "number": "N", "decimal_number": "Nd",
               "digit": "Nd", "letter_number": "Nl", "other_number": "No", "punctuation": "P", "punct": "P", "symbol": "S",
               "separator": "Z", "other": "C", "control": "Cc"}
_CATEGORY_NAMES = frozenset("C L M N P S Z Cc Cf Cn Co Cs Ll Lm Lo Lt Lu Mc Me Mn Nd Nl No Pc Pd Pe Pf Pi Po Ps Sc Sk Sm So "
                            "Zl Zp Zs".split())
LONGEST_TRANSLATION = 2 ** 16       # characters: \p{L} becomes nearly 2,000, and re keeps what it compiled


def ecma_pattern(source: str) -> re.Pattern:
    """The compiled re.Pattern that matches, by search(), what ECMA-262 (flag u) matches. Raises ValueError."""
    translated, at = [], 0
    while at < len(source):
        text, at = _ecma_term(source, at)
        translated.append(text)
    pattern = "".join(translated)
    if len(pattern) > LONGEST_TRANSLATION:
        raise ValueError("the regular expression is too long")
    try:
        return re.compile(pattern, re.ASCII)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"not a usable regular expression: {getattr(error, 'msg', error)}") from None


def _ecma_term(source: str, at: int) -> tuple:
    """(Python's text for the term of `source` that begins at `at`, where the next one begins)."""
    char = source[at]
    if char == "\\":
        return _ecma_escape(source, at, False)
    if char == "[":
        return _ecma_class(source, at)
    if char == "(":
        match = _ECMA_GROUP.match(source, at)
        if source.startswith("(?", at) and match.end() == at + 1:
            raise ValueError("a group that ECMA-262 does not know")
        name = match.group("name")
        return f"(?P<{name.replace('$', '_dollar_')}>" if name else match.group(), match.end()
    quantifier = _ECMA_QUANTIFIER.match(source, at)
    if quantifier:
        if _ECMA_QUANTIFIER.match(source, quantifier.end()):        # a*+ is possessive in Python 3.11
            raise ValueError("nothing to repeat")
        return quantifier.group(), quantifier.end()
    special = {"$": r"\Z", ".": "[^\n\r\u2028\u2029]", "^": "^", "|": "|", ")": ")"}
    return special.get(char) or re.escape(char), at + 1


def _ecma_escape(source: str, at: int, in_class: bool) -> tuple:
    match = _ECMA_ESCAPE.match(source, at)
    if not match:
        raise ValueError(f"the escape {printable(source[at:at + 2])} is not ECMA-262")
    kind, value = match.lastgroup, match.group(match.lastgroup)
    if kind == "class":
        text = _ecma_class_escape(value, in_class)
    elif kind == "property":
        text = _category_class(value, match.group("p") == "P", in_class)
    elif kind in ("k", "number") and not in_class:
        text = f"(?P={value.replace('$', '_dollar_')})" if kind == "k" else f"(?:\\{value})"
    elif kind == "same":
        text = "\\" + value
    elif kind == "sign":
        text = re.escape(value)
    elif kind == "high":
        text = re.escape(json.loads('"\\' + value + '"'))
    elif kind in ("u", "x", "point", "nul"):
        if int(value, 16) > 0x10FFFF:
            raise ValueError("a code point above U+10FFFF")
        text = re.escape(chr(int(value, 16)))
    elif kind == "control":
        text = re.escape(chr(ord(value) % 32))
    else:
        raise ValueError(f"the escape {printable(match.group())} is not allowed in a character class")
    return text, match.end()


def _ecma_class_escape(value: str, in_class: bool) -> str:
    if value in "sS":
        text = _ECMA_SPACE if value == "s" else _ECMA_NOT_SPACE
        return text if in_class else f"[{text}]"
    if value == "B" and in_class:
        raise ValueError(r"the escape \B is not allowed in a character class")
    return "\\" + value                                 # the same with re.ASCII


def _ecma_class(source: str, at: int) -> tuple:
    negated = source.startswith("[^", at)
    at += 2 if negated else 1
    parts = []
    while True:
        if at >= len(source):
            raise ValueError("a character class [ without its ]")
        char = source[at]
        if char == "]":
            break
        if char == "\\":
            text, at = _ecma_escape(source, at, True)
        else:
            text, at = ("-" if char == "-" and parts and source[at + 1:at + 2] not in ("]", "") else re.escape(char)), at + 1
        parts.append(text)
    if not parts:
        return ("[\\s\\S]" if negated else "(?!)"), at + 1
    return f"[{'^' if negated else ''}{''.join(parts)}]", at + 1


@functools.lru_cache(maxsize=256)
def _category_class(name: str, negated: bool, in_class: bool) -> str:
    """\\p{L} and the like as ranges of code points, by unicodedata: any general category. Kept, as it takes 0.2 s."""
    wanted = name.partition("=")[2] if name.split("=")[0] in ("gc", "General_Category") else name
    wanted = _CATEGORIES.get(wanted.lower(), wanted)
    if wanted not in _CATEGORY_NAMES:
        raise ValueError(f"\\p{{{printable(name, 40)}}} is not supported, only general categories such as \\p{{L}}")
    ranges, start = [], None
    for code in range(0x110001):
        inside = code < 0x110000 and unicodedata.category(chr(code)).startswith(wanted) != negated
        if inside and start is None:
            start = code
        elif not inside and start is not None:
            ranges.append(f"{re.escape(chr(start))}-{re.escape(chr(code - 1))}")
            start = None
    return "".join(ranges) if in_class else f"[{''.join(ranges)}]"


# -- values

def canonical_json(value: Any) -> str:
    """One text for all JSON values that are equal as JSON Schema sees it: 1 is 1.0, true is not 1, order is nothing.

    Text and not a tuple, as hashes of numbers can be made to collide and those of texts cannot.
    """
    if isinstance(value, str):
        return encode_basestring_ascii(value)
    if value is None or value is True or value is False:
        return "null" if value is None else "true" if value else "false"
    if isinstance(value, dict):
        return "{" + ",".join(sorted(f"{encode_basestring_ascii(k)}:{canonical_json(v)}" for k, v in value.items())) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(canonical_json, value)) + "]"
    if -2 ** 53 < value < 2 ** 53:
        return repr(int(value)) if value == int(value) else repr(value)
    # Beyond, as a float where that is exact: 1e308 written out would make 50 MB of a megabyte of them
    return repr(float(value)) if isinstance(value, float) or abs(value) < 1e308 and float(value) == value else repr(value)


def json_equal(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal as JSON Schema sees it."""
    return canonical_json(one) == canonical_json(other)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) or isinstance(value, float) and value.is_integer()


TYPES = {
    "object": lambda value: isinstance(value, dict), "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str), "number": _is_number, "integer": _is_integer,
    "boolean": lambda value: isinstance(value, bool), "null": lambda value: value is None,
}


class Problem(NamedTuple):
    """One thing that is wrong with a value: where (JSON Pointer, RFC 6901), which keyword says so, what was expected."""
    path: str
    rule: str
    message: str


class SchemaError(ValueError):
    """A schema that is not valid: `place` is a JSON Pointer into it, `reason` one line."""

    def __init__(self, place: str, reason: str) -> None:
        super().__init__(printable(f"at {place or '/'}: {reason}", 1000))
        self.place, self.reason = place, reason


def _short_name(name: Any) -> str:
    return printable(str(name), LONGEST_NAME)


def _steps(at: Optional[tuple]) -> list:
    """Names and indexes from the root to a place; a place is None or (place above, name or index)."""
    steps = []
    while at is not None:
        at, step = at
        steps.append(step)
    return steps[::-1]


def _escaped(name: str) -> str:
    """A member name as a step of a JSON Pointer."""
    return name.replace("~", "~0").replace("/", "~1")


def _pointer(at: Optional[tuple]) -> str:
    return "".join("/" + _escaped(_short_name(step)) for step in _steps(at))


def _dotted(at: Optional[tuple]) -> str:
    text = ""
    for step in _steps(at):
        text += f"[{step}]" if isinstance(step, int) else f"{'.' if text else ''}{_short_name(step) or '(empty name)'}"
    return text


def _subject(at: Optional[tuple]) -> str:
    """What a message calls a place: Field 'address.zip', or The payload."""
    return f"Field '{_dotted(at)}'" if at else "The payload"


def _listed(values: list) -> str:
    return printable(", ".join(value if isinstance(value, str) else json.dumps(value) for value in values), 500)


# -- compilation. A check is check(value, at, problems, scope, seen): it appends to problems, and adds to the set `seen`
# the names or indexes of `value` that it has evaluated. `scope` is the tuple of resources entered, for $dynamicRef.

_SCHEMA, _SCHEMAS, _SCHEMA_MAP = "a schema", "an array of schemas that is not empty", "an object of schemas"
_COUNT, _NUMBER_KIND, _TEXT, _FLAG, _ANY = "a whole number of at least 0", "a number", "text", "true or false", "anything"
_NAMES, _NAME_MAP, _PATTERN = "an array of different texts", "an object of arrays of texts", "a regular expression"
KEYWORDS = {            # keyword: the kind of value that it takes
    "$id": _TEXT, "$schema": _TEXT, "$ref": _TEXT, "$anchor": _TEXT, "$dynamicRef": _TEXT, "$dynamicAnchor": _TEXT,
    "$vocabulary": _ANY, "$comment": _TEXT, "$defs": _SCHEMA_MAP,
    "prefixItems": _SCHEMAS, "items": _SCHEMA, "contains": _SCHEMA, "additionalProperties": _SCHEMA,
    "properties": _SCHEMA_MAP, "patternProperties": _SCHEMA_MAP, "dependentSchemas": _SCHEMA_MAP, "propertyNames": _SCHEMA,
    "if": _SCHEMA, "then": _SCHEMA, "else": _SCHEMA, "allOf": _SCHEMAS, "anyOf": _SCHEMAS, "oneOf": _SCHEMAS,
    "not": _SCHEMA, "unevaluatedItems": _SCHEMA, "unevaluatedProperties": _SCHEMA,
    "type": "one of the types " + ", ".join(TYPES) + ", or an array of them", "const": _ANY, "enum": "an array",
    "multipleOf": "a number above 0", "maximum": _NUMBER_KIND, "exclusiveMaximum": _NUMBER_KIND,
    "minimum": _NUMBER_KIND, "exclusiveMinimum": _NUMBER_KIND, "maxLength": _COUNT, "minLength": _COUNT,
    "pattern": _PATTERN, "maxItems": _COUNT, "minItems": _COUNT, "uniqueItems": _FLAG, "maxContains": _COUNT,
    "minContains": _COUNT, "maxProperties": _COUNT, "minProperties": _COUNT, "required": _NAMES,
    "dependentRequired": _NAME_MAP, "format": _TEXT, "contentEncoding": _TEXT, "contentMediaType": _TEXT,
    "contentSchema": _SCHEMA, "title": _TEXT, "description": _TEXT, "default": _ANY, "deprecated": _FLAG,
    "readOnly": _FLAG, "writeOnly": _FLAG, "examples": "an array",
}
KINDS = {
    _SCHEMA: lambda value: isinstance(value, (dict, bool)),
    _SCHEMAS: lambda value: isinstance(value, list) and bool(value),
    _SCHEMA_MAP: lambda value: isinstance(value, dict),
    _COUNT: lambda value: _is_integer(value) and value >= 0,
    _NUMBER_KIND: lambda value: _is_number(value) and abs(value) < float("inf"),
    "a number above 0": lambda value: _is_number(value) and 0 < value < float("inf"),
    _TEXT: lambda value: isinstance(value, str), _PATTERN: lambda value: isinstance(value, str),
    _FLAG: lambda value: isinstance(value, bool), _ANY: lambda value: True,
    "an array": lambda value: isinstance(value, list),
    _NAMES: lambda value: _is_names(value),
    _NAME_MAP: lambda value: isinstance(value, dict) and all(map(_is_names, value.values())),
    KEYWORDS["type"]: lambda value: isinstance(value, str) and value in TYPES or bool(value) and _is_names(value) and
    all(name in TYPES for name in value),
}
_NAMES_IN_ORDER = list(KEYWORDS)
VALIDATION_KEYWORDS = frozenset(_NAMES_IN_ORDER[_NAMES_IN_ORDER.index("type"):_NAMES_IN_ORDER.index("format")])
DRAFT = "https://json-schema.org/draft/2020-12/schema"
VALIDATION_VOCABULARY = "https://json-schema.org/draft/2020-12/vocab/validation"
_IN_PLACE = ("allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentSchemas")


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value) and len(set(value)) == len(value)


class _Resource:
    """A schema with a URI of its own, and its anchors."""
    __slots__ = ("uri", "root", "anchors", "dynamic", "validates")

    def __init__(self, uri: str, root: Any, validates: bool) -> None:
        self.uri, self.root, self.validates = uri, root, validates
        self.anchors: dict = {}         # name: (schema, pointer)
        self.dynamic: set = set()       # those that $dynamicAnchor made


def _join(base: str, reference: str) -> str:
    """RFC 3986 resolution, also for urn: and tag:, of which urljoin knows nothing."""
    try:
        return base.partition("#")[0] + reference if reference[:1] in ("#", "") else urljoin(base, reference)
    except ValueError:                                  # http://[ is no URI; nothing will be found under it
        return reference


def _subschemas(schema: dict) -> Iterator[tuple]:
    """(keyword, pointer below, subschema) of every subschema of `schema`."""
    for keyword, value in schema.items():
        kind = KEYWORDS.get(keyword)
        if kind == _SCHEMA:
            yield keyword, "/" + keyword, value
        elif kind == _SCHEMAS and isinstance(value, list):
            for index, item in enumerate(value):
                yield keyword, f"/{keyword}/{index}", item
        elif kind == _SCHEMA_MAP and isinstance(value, dict):
            for name, item in value.items():
                yield keyword, f"/{keyword}/{_escaped(name)}", item


class Schema:
    """A JSON Schema (draft 2020-12: every vocabulary, `format` asserted), compiled once; may be used by many threads.

    `document` is the schema as JSON; `documents`, {uri: schema}, are others that it may refer to: nothing is fetched.
    Raises SchemaError. Unknown keywords are annotations; `misspelt` lists those that look like a known one, as
    (pointer, keyword, suggestion), and `unchecked` the formats that are annotations here, as (pointer, format).
    """

    def __init__(self, document: Any, documents: Optional[dict] = None, assert_formats: bool = True) -> None:
        self._documents = documents or {}
        self.assert_formats = assert_formats
        self.misspelt: list = []
        self.unchecked: list = []
        self._resources: dict = {}
        self._nodes: dict = {}          # id of a schema: [its check]; ids stay good, as the resources keep the documents
        try:
            for uri, other in self._documents.items():
                self._index(other, self._resource(uri.rstrip("#"), other), "", False)
            self._root = self._resource("", document)
            self._index(document, self._root, "", True)
            self._check = self.compile(document, self._root, "")
            self._refuse_loops(document, self._root)
            self.accepts = _Accelerator(self, self._root).function(document)
        except RecursionError:
            raise SchemaError("", "nested too deeply") from None

    def errors(self, value: Any) -> list:
        """The Problems of a JSON value, in the order of the schema; at most 100, none when it is valid.

        Hot path: `accepts` is the same schema as Python code, for the keywords that events need; it only ever says
        that a value is valid (0.9 against 9 us). Whatever it does not accept is judged by the checks below.
        """
        if self.accepts(value):
            return []
        problems: list = []
        try:
            self._check(value, None, problems, (self._root,), set())
        except RecursionError:
            return [Problem("", "$ref", "The schema refers to itself without end for this payload")]
        if len(problems) > MOST_PROBLEMS:               # what is cut off lies deepest: a missing field is not
            problems.sort(key=lambda problem: problem.path.count("/"))
        return problems[:MOST_PROBLEMS]

    # -- names

    def _resource(self, uri: str, root: Any) -> _Resource:
        validates = True
        metaschema = self._documents.get(str(root.get("$schema"))) if isinstance(root, dict) else None
        if isinstance(metaschema, dict) and isinstance(metaschema.get("$vocabulary"), dict):
            validates = VALIDATION_VOCABULARY in metaschema["$vocabulary"]
        resource = self._resources[uri] = _Resource(uri, root, validates)
        return resource

    def _index(self, schema: Any, resource: _Resource, pointer: str, own: bool) -> None:
        """Register every $id and anchor below `schema`."""
        if not isinstance(schema, dict):
            return
        identity = schema.get("$id")
        if isinstance(identity, str) and (resource.root is not schema or identity):
            uri = _join(resource.uri, identity).rstrip("#")
            if resource.root is schema:                 # the document's own name, besides the one it was given
                resource.uri, self._resources[uri] = uri, resource
            else:
                inherited = resource.validates
                resource, pointer = self._resource(uri, schema), ""
                resource.validates = inherited if "$schema" not in schema else resource.validates
        for keyword in ("$anchor", "$dynamicAnchor"):
            if isinstance(schema.get(keyword), str):
                resource.anchors[schema[keyword]] = (schema, pointer)
        if isinstance(schema.get("$dynamicAnchor"), str):
            resource.dynamic.add(schema["$dynamicAnchor"])
        if own:
            self._look_for_misspelt(schema, pointer)
        for _, below, item in _subschemas(schema):
            self._index(item, resource, pointer + below, own)

    def _look_for_misspelt(self, schema: dict, pointer: str) -> None:
        if isinstance(schema.get("format"), str) and schema["format"] not in FORMATS:
            self.unchecked.append((pointer, schema["format"]))
        for keyword in schema:
            if keyword not in KEYWORDS and not keyword.startswith("x-"):
                close = {name.lower(): name for name in KEYWORDS}
                found = difflib.get_close_matches(keyword.lower(), close, 1, 0.75)
                if found:
                    self.misspelt.append((pointer, keyword, close[found[0]]))

    def _entered(self, schema: dict, resource: _Resource) -> _Resource:
        """The resource that `schema`, found in `resource`, belongs to: its own when it has an $id."""
        identity = schema.get("$id")
        return self._resources.get(_join(resource.uri, identity).rstrip("#"), resource) if isinstance(identity, str) else resource

    def resolve(self, reference: str, resource: _Resource, place: str) -> tuple:
        """(schema, resource, pointer) that a $ref in `resource` leads to. Raises SchemaError at `place`."""
        uri, _, fragment = _join(resource.uri, reference).partition("#")
        target = self._resources.get(uri)
        if target is None:
            raise SchemaError(place, f"the reference {_short_name(reference)} leads nowhere: no document of that name")
        fragment = unquote(fragment)
        if fragment and fragment[0] != "/":
            if fragment not in target.anchors:
                raise SchemaError(place, f"the reference {_short_name(reference)} leads nowhere: no such anchor")
            schema, pointer = target.anchors[fragment]
            return schema, target, pointer
        schema = target.root
        pointer = ""
        for step in fragment.split("/")[1:]:
            name = step.replace("~1", "/").replace("~0", "~")
            try:
                schema = schema[int(name)] if isinstance(schema, list) and name.isdigit() else schema[name]
            except (KeyError, IndexError, ValueError, TypeError):
                raise SchemaError(place, f"the reference {_short_name(reference)} leads nowhere") from None
            pointer += "/" + step
            if isinstance(schema, dict) and isinstance(schema.get("$id"), str):
                target, pointer = self._entered(schema, target), ""
        return schema, target, pointer

    # -- checks

    def compile(self, schema: Any, resource: _Resource, place: str) -> Callable:
        """The check of one schema. Raises SchemaError."""
        if schema is True:
            return _check_nothing
        if schema is False:
            return _check_false
        if not isinstance(schema, dict):
            raise SchemaError(place, "a schema must be an object, true or false")
        node = self._nodes.get(id(schema))
        if node is not None:
            return lambda *arguments: node[0](*arguments)       # it may be in the making: a recursive schema
        node = self._nodes[id(schema)] = [None]
        resource = self._entered(schema, resource)
        checks, last = [], []
        known = [(keyword, value) for keyword, value in schema.items() if keyword in KEYWORDS]
        for keyword, value in known:                    # all of them first, as compilers look at their neighbours
            if not KINDS[KEYWORDS[keyword]](value):
                raise SchemaError(f"{place}/{keyword}", f"{keyword} must be {KEYWORDS[keyword]}")
        for keyword, value in known:
            make = COMPILERS.get(keyword)
            if make is None or keyword in VALIDATION_KEYWORDS and not resource.validates:
                for _, below, item in _subschemas({keyword: value}):        # annotations and $defs: checked, not run
                    self.compile(item, resource, place + below)
                continue
            check = make(self, schema, value, resource, f"{place}/{keyword}")
            if check is not None:
                (last if keyword.startswith("unevaluated") else checks).append(check)
        node[0] = _node(tuple(checks), tuple(last), resource)
        return node[0]

    def _refuse_loops(self, document: Any, resource: _Resource) -> None:
        """Refuse schemas that apply themselves to the same value again: they would never end."""
        finished: set = set()
        found = [(document, resource, "")]              # schemas to start from; grows by those for other values

        def visit(schema: Any, resource: _Resource, place: str, above: tuple) -> None:
            if not isinstance(schema, dict) or id(schema) in finished:
                return
            if id(schema) in above:
                raise SchemaError(place, "the schema refers to itself without end")
            resource = self._entered(schema, resource)
            above += (id(schema),)
            for keyword, below, item in _subschemas(schema):
                if keyword in _IN_PLACE:
                    visit(item, resource, place + below, above)
                else:
                    found.append((item, resource, place + below))
            for keyword in ("$ref", "$dynamicRef"):
                if keyword in schema:
                    visit(*self.resolve(schema[keyword], resource, f"{place}/{keyword}"), above)
            finished.add(id(schema))

        for start in found:
            visit(*start, ())


def _check_nothing(value: Any, at: Optional[tuple], problems: list, scope: tuple, seen: set) -> None:
    pass


def _check_false(value: Any, at: Optional[tuple], problems: list, scope: tuple, seen: set) -> None:
    problems.append(Problem(_pointer(at), "false", f"{_subject(at)} is not allowed"))


def _node(checks: tuple, last: tuple, resource: _Resource) -> Callable:
    def check(value: Any, at: Optional[tuple], problems: list, scope: tuple, seen: set) -> None:
        if len(problems) >= MOST_PROBLEMS:
            return
        if scope[-1] is not resource:
            scope += (resource,)
        own = set() if last else seen           # unevaluated* must not see what schemas around this one evaluated
        for one in checks:
            one(value, at, problems, scope, own)
        for one in last:
            one(value, at, problems, scope, own)
        if last:
            seen |= own
    return check


def _simple(applies: Callable, holds: Callable, rule: str, expected: str) -> Callable:
    """A check for values to which the keyword applies: `holds(value)` or a problem that says what was expected."""
    def check(value: Any, at: Optional[tuple], problems: list, scope: tuple, seen: set) -> None:
        if applies(value) and not holds(value):
            problems.append(Problem(_pointer(at), rule, f"{_subject(at)} must {expected}"))
    return check


def _compile_type(schema: Schema, around: dict, value: Any, resource: _Resource, place: str) -> Callable:
    names = [value] if isinstance(value, str) else value
    tests = [TYPES[name] for name in names]
    return _simple(lambda item: True, lambda item: any(test(item) for test in tests), "type",
                   f"be of type {' or '.join(names)}")


def _compile_enum(schema: Schema, around: dict, value: list, resource: _Resource, place: str) -> Callable:
    allowed = frozenset(map(canonical_json, value))
    return _simple(lambda item: True, lambda item: canonical_json(item) in allowed, "enum", f"be one of: {_listed(value)}")


def _compile_const(schema: Schema, around: dict, value: Any, resource: _Resource, place: str) -> Callable:
    wanted = canonical_json(value)
    return _simple(lambda item: True, lambda item: canonical_json(item) == wanted, "const", f"be {_listed([value])}")


def _is_multiple(value: Any, divisor: Any) -> bool:
    if isinstance(value, int) and isinstance(divisor, int):
        return value % divisor == 0
    if value in (float("inf"), float("-inf")):
        return False
    (over, under), (times, parts) = (Decimal(repr(number)).as_integer_ratio() for number in (value, divisor))
    return over * parts % (under * times) == 0          # as written: 0.3 is three times 0.1


def _compile_limit(holds: Callable, applies: Callable, expected: str, of_one: str = "") -> Callable:
    """A compiler for keywords that compare: holds(value, limit). `expected` has a hole for the limit; `of_one` is said
    instead where the limit is 1."""
    def compile_keyword(schema: Schema, around: dict, limit: Any, resource: _Resource, place: str) -> Callable:
        text = of_one if of_one and limit == 1 else expected.format(limit)
        return _simple(applies, lambda value: holds(value, limit), place.rpartition("/")[2], text)
    return compile_keyword


def _pattern(source: str, place: str) -> re.Pattern:
    try:
        return ecma_pattern(source)
    except ValueError as error:
        raise SchemaError(place, str(error)) from None


def _compile_pattern(schema: Schema, around: dict, value: str, resource: _Resource, place: str) -> Callable:
    search = _pattern(value, place).search
    return _simple(TYPES["string"], lambda text: search(text) is not None, "pattern",
                   f"match the pattern {printable(value)}")


def _compile_format(schema: Schema, around: dict, value: str, resource: _Resource, place: str) -> Optional[Callable]:
    if not schema.assert_formats or value not in FORMATS:
        return None
    return _simple(TYPES["string"], FORMATS[value][0], "format", f"be {FORMATS[value][1]}")


def _compile_unique(schema: Schema, around: dict, value: bool, resource: _Resource, place: str) -> Optional[Callable]:
    return _simple(TYPES["array"], lambda items: len(set(map(canonical_json, items))) == len(items), "uniqueItems",
                   "not contain an item twice") if value else None


def _missing(problems: list, at: Optional[tuple], name: str, rule: str, why: str = "") -> None:
    here = (at, name)
    problems.append(Problem(_pointer(here), rule, f"Missing required field: {_dotted(here)}{why}"))


def _compile_required(schema: Schema, around: dict, value: list, resource: _Resource, place: str) -> Callable:
    def check(item: Any, at: Optional[tuple], problems: list, scope: tuple, seen: set) -> None:
        if isinstance(item, dict):
            for name in value:
                if name not in item:
                    _missing(problems, at, name, "required")
    return check


def _compile_dependent_required(schema: Schema, around: dict, value: dict, resource: _Resource, place: str) -> Callable:
    def check(item: Any, at: Optional[tuple], problems: list, scope: tuple, seen: set) -> None:
        if isinstance(item, dict):
            for name, others in value.items():
                for other in others if name in item else ():
                    if other not in item:
                        _missing(problems, at, other, "dependentRequired", f" (as there is {_short_name(name)})")
    return check


# -- checks that apply further schemas to members and items

def _each(schema: Schema, value: list, resource: _Resource, place: str) -> list:
    return [schema.compile(item, resource, f"{place}/{index}") for index, item in enumerate(value)]


def _each_member(schema: Schema, value: dict, resource: _Resource, place: str) -> list:
    return [(name, schema.compile(item, resource, f"{place}/{_escaped(name)}")) for name, item in value.items()]


def _compile_properties(schema: Schema, around: dict, value: dict, resource: _Resource, place: str) -> Callable:
    checks = _each_member(schema, value, resource, place)

    def check(item: Any, at: Optional[tuple], problems: list, scope: tuple, seen: set) -> None:
        if isinstance(item, dict):
            for name, one in checks:
                if name in item:
                    one(item[name], (at, name), problems, scope, set())
                    seen.add(name)
    return check


def _compile_pattern_properties(schema: Schema, around: dict, value: dict, resource: _Resource, place: str) -> Callable:
    checks = [(_pattern(name, f"{place}/{_escaped(name)}").search, schema.compile(item, resource, f"{place}/{_escaped(name)}"))
              for name, item in value.items()]

    def check(item: Any, at: Optional[tuple], problems: list, scope: tuple, seen: set) -> None:
        if isinstance(item, dict):
            for search, one in checks:
                for name in item:
                    if search(name):
                        one(item[name], (at, name), problems, scope, set())
                        seen.add(name)
    return check


def _rest_of_object(rule: str, is_rest: Callable, one: Callable) -> Callable:
    """A check of the members for which is_rest(name, seen)."""
    def check(item: Any, at: Optional[tuple], problems: list, scope: tuple, seen: set) -> None:
        if isinstance(item, dict):
            for name in [name for name in item if is_rest(name, seen)]:
                if len(problems) >= MOST_PROBLEMS:
                    return
                if one is _check_false:
                    here = (at, name)
                    problems.append(Problem(_pointer(here), rule, f"{_subject(here)} is not a known field"))
                else:
                    one(item[name], (at, name), problems, scope, set())
                seen.add(name)
    return check


def _compile_additional(schema: Schema, around: dict, value: Any, resource: _Resource, place: str) -> Callable:
    known = frozenset(around.get("properties", ()))
    searches = [_pattern(name, place).search for name in around.get("patternProperties", ())]
    return _rest_of_object("additionalProperties", lambda name, seen: name not in known and
                           not any(search(name) for search in searches), schema.compile(value, resource, place))


def _compile_unevaluated_properties(schema: Schema, around: dict, value: Any, resource: _Resource, place: str) -> Callable:
    return _rest_of_object("unevaluatedProperties", lambda name, seen: name not in seen,
                           schema.compile(value, resource, place))


def _compile_property_names(schema: Schema, around: dict, value: Any, resource: _Resource, place: str) -> Callable:
    one = schema.compile(value, resource, place)

    def check(item: Any, at: Optional[tuple], problems: list, scope: tuple, seen: set) -> None:
        for name in item if isinstance(item, dict) else ():
            if len(problems) >= MOST_PROBLEMS:
                return
            if not _holds(one, name, None, scope, set()):
                here = (at, name)
                problems.append(Problem(_pointer(here), "propertyNames", f"{_subject(here)} has a name that is not allowed"))
    return check


def _compile_prefix_items(schema: Schema, around: dict, value: list, resource: _Resource, place: str) -> Callable:
    checks = _each(schema, value, resource, place)

    def check(items: Any, at: Optional[tuple], problems: list, scope: tuple, seen: set) -> None:
        if isinstance(items, list):
            for index, (one, item) in enumerate(zip(checks, items)):
                one(item, (at, index), problems, scope, set())
                seen.add(index)
    return check


def _rest_of_array(rule: str, first: int, one: Callable) -> Callable:
    """A check of the items from `first` on that are not seen yet (`items` comes before anything else sees them)."""
    def check(items: Any, at: Optional[tuple], problems: list, scope: tuple, seen: set) -> None:
        if isinstance(items, list):
            skip = seen if rule == "unevaluatedItems" else ()
            for index in range(first, len(items)):
                if index not in skip:
                    if len(problems) >= MOST_PROBLEMS:
                        return
                    if one is _check_false:
                        here = (at, index)
                        problems.append(Problem(_pointer(here), rule, f"{_subject(here)} is one item too many"))
                    else:
                        one(items[index], (at, index), problems, scope, set())
            seen.update(range(first, len(items)))
    return check


def _compile_items(schema: Schema, around: dict, value: Any, resource: _Resource, place: str) -> Callable:
    return _rest_of_array("items", len(around.get("prefixItems", ())), schema.compile(value, resource, place))


def _compile_unevaluated_items(schema: Schema, around: dict, value: Any, resource: _Resource, place: str) -> Callable:
    return _rest_of_array("unevaluatedItems", 0, schema.compile(value, resource, place))


def _compile_contains(schema: Schema, around: dict, value: Any, resource: _Resource, place: str) -> Callable:
    one = schema.compile(value, resource, place)
    bounds = around if resource.validates else {}
    least, most = bounds.get("minContains", 1), bounds.get("maxContains", float("inf"))

    def check(items: Any, at: Optional[tuple], problems: list, scope: tuple, seen: set) -> None:
        if not isinstance(items, list):
            return
        matching = [index for index, item in enumerate(items) if _holds(one, item, at, scope, set())]
        seen.update(matching)
        if len(matching) < least:
            problems.append(Problem(_pointer(at), "minContains" if "minContains" in bounds else "contains",
                                    f"{_subject(at)} must contain at least {least} items that match the schema's contains"))
        if len(matching) > most:
            problems.append(Problem(_pointer(at), "maxContains",
                                    f"{_subject(at)} must contain at most {most} items that match the schema's contains"))
    return check


# -- checks that apply further schemas to the same value

def _holds(check: Callable, value: Any, at: Optional[tuple], scope: tuple, seen: set) -> bool:
    """Whether `value` passes; what was evaluated counts only then."""
    problems: list = []
    own: set = set()
    check(value, at, problems, scope, own)
    if not problems:
        seen |= own
    return not problems


def _compile_all_of(schema: Schema, around: dict, value: list, resource: _Resource, place: str) -> Callable:
    checks = _each(schema, value, resource, place)

    def check(item: Any, at: Optional[tuple], problems: list, scope: tuple, seen: set) -> None:
        for one in checks:
            one(item, at, problems, scope, seen)
    return check


def _counting(rule: str, expected: str, fits: Callable) -> Callable:
    """A compiler for keywords that count how many of their schemas hold."""
    def compile_keyword(schema: Schema, around: dict, value: Any, resource: _Resource, place: str) -> Callable:
        checks = _each(schema, value, resource, place) if isinstance(value, list) else [schema.compile(value, resource, place)]

        def check(item: Any, at: Optional[tuple], problems: list, scope: tuple, seen: set) -> None:
            own = set() if rule == "not" else seen
            if not fits(sum(_holds(one, item, at, scope, own) for one in checks)):
                problems.append(Problem(_pointer(at), rule, f"{_subject(at)} must {expected}"))
        return check
    return compile_keyword


def _compile_if(schema: Schema, around: dict, value: Any, resource: _Resource, place: str) -> Callable:
    base = place[:-len("/if")]
    condition = schema.compile(value, resource, place)
    then, otherwise = (schema.compile(around.get(name, True), resource, f"{base}/{name}") for name in ("then", "else"))

    def check(item: Any, at: Optional[tuple], problems: list, scope: tuple, seen: set) -> None:
        (then if _holds(condition, item, at, scope, seen) else otherwise)(item, at, problems, scope, seen)
    return check


def _compile_dependent_schemas(schema: Schema, around: dict, value: dict, resource: _Resource, place: str) -> Callable:
    checks = _each_member(schema, value, resource, place)

    def check(item: Any, at: Optional[tuple], problems: list, scope: tuple, seen: set) -> None:
        for name, one in checks if isinstance(item, dict) else ():
            if name in item:
                one(item, at, problems, scope, seen)
    return check


def _compile_ref(schema: Schema, around: dict, value: str, resource: _Resource, place: str) -> Callable:
    return schema.compile(*schema.resolve(value, resource, place))


def _compile_dynamic_ref(schema: Schema, around: dict, value: str, resource: _Resource, place: str) -> Callable:
    """Core 8.2.3.2: like $ref, but where that leads to a $dynamicAnchor, the outermost one of that name is meant."""
    target, home, pointer = schema.resolve(value, resource, place)
    plain = schema.compile(target, home, pointer)
    name = value.partition("#")[2]
    if name not in home.dynamic or home.anchors[name][0] is not target:
        return plain
    candidates = {}
    for other in set(schema._resources.values()):
        if name in other.dynamic:
            candidates[other] = schema.compile(other.anchors[name][0], other, other.anchors[name][1])

    def check(item: Any, at: Optional[tuple], problems: list, scope: tuple, seen: set) -> None:
        one = next((candidates[entered] for entered in scope if entered in candidates), plain)
        one(item, at, problems, scope, seen)
    return check


def _is_at_most(value: Any, limit: Any) -> bool:
    return len(value) <= limit


def _is_at_least(value: Any, limit: Any) -> bool:
    return len(value) >= limit


COMPILERS = {           # keyword: compiler(schema, the schema around the keyword, value, resource, place)
    "$ref": _compile_ref, "$dynamicRef": _compile_dynamic_ref,
    "type": _compile_type, "enum": _compile_enum, "const": _compile_const,
    "multipleOf": _compile_limit(_is_multiple, _is_number, "be a multiple of {}"),
    "maximum": _compile_limit(lambda value, limit: value <= limit, _is_number, "be at most {}"),
    "exclusiveMaximum": _compile_limit(lambda value, limit: value < limit, _is_number, "be less than {}"),
    "minimum": _compile_limit(lambda value, limit: value >= limit, _is_number, "be at least {}"),
    "exclusiveMinimum": _compile_limit(lambda value, limit: value > limit, _is_number, "be more than {}"),
    "maxLength": _compile_limit(_is_at_most, TYPES["string"], "have at most {} characters"),
    "minLength": _compile_limit(_is_at_least, TYPES["string"], "have at least {} characters", "not be empty"),
    "maxItems": _compile_limit(_is_at_most, TYPES["array"], "have at most {} items"),
    "minItems": _compile_limit(_is_at_least, TYPES["array"], "have at least {} items", "not be empty"),
    "maxProperties": _compile_limit(_is_at_most, TYPES["object"], "have at most {} fields"),
    "minProperties": _compile_limit(_is_at_least, TYPES["object"], "have at least {} fields", "not be empty"),
    "pattern": _compile_pattern, "format": _compile_format, "uniqueItems": _compile_unique,
    "required": _compile_required, "dependentRequired": _compile_dependent_required,
    "properties": _compile_properties, "patternProperties": _compile_pattern_properties,
    "additionalProperties": _compile_additional, "propertyNames": _compile_property_names,
    "unevaluatedProperties": _compile_unevaluated_properties, "prefixItems": _compile_prefix_items,
    "items": _compile_items, "contains": _compile_contains, "unevaluatedItems": _compile_unevaluated_items,
    "allOf": _compile_all_of, "anyOf": _counting("anyOf", "fit at least one of the schemas in anyOf", bool),
    "oneOf": _counting("oneOf", "fit exactly one of the schemas in oneOf", lambda count: count == 1),
    "not": _counting("not", "not fit the schema in not", lambda count: count == 0),
    "if": _compile_if, "dependentSchemas": _compile_dependent_schemas,
}


# -- the same as code

class _TooMuch(Exception):
    """A keyword that the accelerator leaves to the checks."""


class _Accelerator:
    """Writes a schema as one Python function that returns True for valid values and False for "ask the checks".

    What comes from the schema goes into the code only as named constants, so no schema can inject code.
    """
    SUPPORTED = frozenset({"type", "enum", "const", "required", "properties", "additionalProperties", "minLength",
                           "maxLength", "pattern", "format", "items", "minItems", "maxItems", "minimum", "maximum"})
    CLASSES = {"object": "dict", "array": "list", "string": "str"}
    TESTS = {"object": "{0}.__class__ is dict", "array": "{0}.__class__ is list", "string": "{0}.__class__ is str",
             "null": "{0} is None", "boolean": "{0}.__class__ is bool",
             "number": "({0}.__class__ is int or {0}.__class__ is float)",
             "integer": "({0}.__class__ is int or {0}.__class__ is float and {0}.is_integer())"}

    def __init__(self, schema: Schema, resource: _Resource) -> None:
        self._schema, self._resource = schema, resource
        self._constants: dict = {}
        self._lines: list = []
        self._variables = itertools.count(1)

    def function(self, document: Any) -> Callable[[Any], bool]:
        """accepts(value)."""
        try:
            self._write(document, "v", 2)
        except _TooMuch:
            return lambda value: False
        names = "".join(f", {name}={name}" for name in self._constants)
        source = "\n".join([f"def accepts(v{names}):", "  try:", *self._lines, "    return True",
                            "  except KeyError:", "    return False"])
        namespace = dict(self._constants)
        exec(compile(source, "<schema>", "exec"), namespace)
        return namespace["accepts"]

    def _constant(self, value: Any) -> str:
        name = f"c{len(self._constants)}"
        self._constants[name] = value
        return name

    def _refuse(self, depth: int, condition: str) -> None:
        self._lines.append("  " * depth + f"if {condition}: return False")

    def _write(self, schema: Any, name: str, depth: int) -> None:
        if schema is True:
            return
        if schema is False or not self._resource.validates or depth > 18:       # Python nests 20 loops and no more
            raise _TooMuch
        if any(keyword in COMPILERS and keyword not in self.SUPPORTED or keyword == "$id" and depth > 2
               for keyword in schema):
            raise _TooMuch
        types = schema.get("type", [])
        types = [types] if isinstance(types, str) else types
        if types:
            self._refuse(depth, "not (" + " or ".join(self.TESTS[one].format(name) for one in types) + ")")
        self._write_values(schema, name, depth)
        groups = (("string", self._write_string, ("minLength", "maxLength", "pattern", "format")),
                  ("object", self._write_object, ("required", "properties", "additionalProperties")),
                  ("array", self._write_array, ("items", "minItems", "maxItems")))
        for kind, write, keywords in groups:
            if (not types or kind in types) and any(keyword in schema for keyword in keywords):
                if types == [kind]:
                    write(schema, name, depth)
                else:                                   # isinstance, not class: nothing may slip past a check
                    self._lines.append("  " * depth + f"if isinstance({name}, {self.CLASSES[kind]}):")
                    write(schema, name, depth + 1)
                    self._lines.append("  " * depth + "  pass")

    def _write_values(self, schema: dict, name: str, depth: int) -> None:
        for keyword in ("enum", "const"):
            if keyword in schema:
                values = schema[keyword] if keyword == "enum" else [schema[keyword]]
                if not all(isinstance(value, str) for value in values):
                    raise _TooMuch
                self._refuse(depth, f"{name}.__class__ is not str or {name} not in {self._constant(frozenset(values))}")
        for keyword, sign in (("minimum", ">="), ("maximum", "<=")):
            if keyword in schema:
                limit = self._constant(schema[keyword])
                self._refuse(depth, f"isinstance({name}, (int, float)) and {name}.__class__ is not bool and "
                                    f"not {name} {sign} {limit}")

    def _write_string(self, schema: dict, name: str, depth: int) -> None:
        if "maxLength" in schema:
            self._refuse(depth, f"not {self._constant(schema.get('minLength', 0))} <= len({name}) <= "
                                f"{self._constant(schema['maxLength'])}")
        elif schema.get("minLength"):
            self._refuse(depth, f"len({name}) < {self._constant(schema['minLength'])}")
        if "pattern" in schema:
            self._refuse(depth, f"{self._constant(ecma_pattern(schema['pattern']).search)}({name}) is None")
        if schema.get("format") in FORMATS and self._schema.assert_formats:
            self._refuse(depth, f"not {self._constant(FORMATS[schema['format']][0])}({name})")

    def _write_object(self, schema: dict, name: str, depth: int) -> None:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        for field in required:
            if field not in properties:
                self._refuse(depth, f"{self._constant(field)} not in {name}")
        for field, below in properties.items():
            member, key = f"v{next(self._variables)}", self._constant(field)
            if field in required:                       # a KeyError ends it: cheaper than to ask first
                self._lines.append("  " * depth + f"{member} = {name}[{key}]")
                self._write(below, member, depth)
            else:
                self._lines.append("  " * depth + f"if {key} in {name}:")
                self._lines.append("  " * depth + f"  {member} = {name}[{key}]")
                self._write(below, member, depth + 1)
        extra = schema.get("additionalProperties", True)
        if extra is False:
            self._refuse(depth, f"not {name}.keys() <= {self._constant(frozenset(properties))}")
        elif extra is not True:
            raise _TooMuch

    def _write_array(self, schema: dict, name: str, depth: int) -> None:
        for keyword, sign in (("minItems", "<"), ("maxItems", ">")):
            if keyword in schema:
                self._refuse(depth, f"len({name}) {sign} {self._constant(schema[keyword])}")
        if "items" in schema:
            item = f"v{next(self._variables)}"
            self._lines.append("  " * depth + f"for {item} in {name}:")
            self._write(schema["items"], item, depth + 1)
            self._lines.append("  " * depth + "  pass")


# =============================================================================
# Events: a JSON value to an AppointmentEvent, or to what is wrong with it, in stages. Knows nothing of HTTP or SQL.
# =============================================================================

# What a stored event must have, whatever schema.json says
REQUIRED_FIELDS = ("event_type", "appointment_id", "patient_id", "timestamp")
EVENT_SCHEMA = {
    "$schema": DRAFT,
    "title": "AppointmentEvent",
    "description": "What happened to an appointment. Further members are kept with the event.",
    "type": "object",
    "required": list(REQUIRED_FIELDS),
    "properties": {
        "event_type": {"type": "string", "enum": ["scheduled", "cancelled", "updated"]},
        "appointment_id": {"type": "string", "minLength": 1, "maxLength": 255},
        "patient_id": {"type": "string", "minLength": 1, "maxLength": 255},
        "timestamp": {"type": "string", "format": "iso8601"},
        "notes": {"type": ["string", "null"]},
    },
}


class AppointmentEvent(NamedTuple):
    """One event. Its fields are the columns of the table; `id` is None until it is stored.

    `timestamp` is canonical UTC such as 2025-01-10T14:00:00Z, `payload` the JSON text as it came.
    """
    event_type: str
    appointment_id: str
    patient_id: str
    timestamp: str
    notes: Optional[str]
    received_at: str
    client: Optional[str]
    payload: str
    id: Optional[int] = None


class InvalidEvent(ValueError):
    """A value that is no valid event. `problems` is a list of Problem, the one that decides the message first."""

    def __init__(self, problems: list) -> None:
        super().__init__(problems[0].message)
        self.problems = problems
        self.for_log = problems[0].message


def _stage(problem: Problem) -> int:
    """The stage a problem belongs to: the first stage that fails decides the message of the answer."""
    top_level = problem.path.count("/") <= 1
    if problem.rule == "required" and top_level:
        return 0
    if problem.rule == "type" and top_level:
        return 1
    if problem.path == "/event_type":
        return 2
    if problem.path == "/timestamp":
        return 3
    if problem.path in ("/appointment_id", "/patient_id") and problem.rule == "minLength":
        return 4
    return 5


def _refuse_if_never_text(document: Any) -> None:
    """Raise SchemaError where a required field may not be text: no event could satisfy both schema and table."""
    for name in REQUIRED_FIELDS:
        field = document.get("properties", {}).get(name) if isinstance(document, dict) else None
        types = field.get("type", "string") if isinstance(field, dict) else "string"
        if types != "string" and "string" not in types:
            raise SchemaError(f"/properties/{name}/type", "must allow string, which is how the table keeps it")


class EventReader:
    """Makes events out of JSON values by one schema."""

    def __init__(self, document: Any) -> None:
        """Raises SchemaError for a document that is not a valid schema."""
        self.schema = Schema(document)
        _refuse_if_never_text(document)
        self._errors = self.schema.errors
        self._floor = Schema({"type": "object", "required": list(REQUIRED_FIELDS), "properties": {
            name: {"type": "string", "format": "iso8601"} if name == "timestamp" else {"type": "string"}
            for name in REQUIRED_FIELDS}})
        properties = document.get("properties") if isinstance(document, dict) else None
        self.field_names = frozenset(properties if isinstance(properties, dict) else ())
        kinds = properties.get("event_type") if self.field_names else None
        self.event_types = tuple(kinds.get("enum", ())) if isinstance(kinds, dict) else ()

    def event(self, value: Any, payload: str, received_at: str, client: Optional[str] = None) -> AppointmentEvent:
        """The event that `value` (with `payload` as its text) describes. Raises InvalidEvent with all problems."""
        problems = self._errors(value)
        if not problems:
            try:
                event_type, appointment_id = value["event_type"], value["appointment_id"]
                patient_id, notes = value["patient_id"], value.get("notes")
                # strip() refuses what is not text and finds what is blank; both are ids nobody can look up
                if event_type.strip() and appointment_id.strip() and patient_id.strip():
                    return AppointmentEvent(event_type, appointment_id, patient_id,
                                            canonical_timestamp(value["timestamp"]),
                                            notes if notes.__class__ is str else None, received_at, client, payload)
            except (KeyError, TypeError, AttributeError, ValueError):
                pass                                    # the schema is laxer than the table: say what is missing
        named = {problem.path for problem in problems}
        problems = problems + [problem for problem in self._floor_problems(value) if problem.path not in named]
        raise InvalidEvent(sorted(problems, key=_stage))

    def _floor_problems(self, value: Any) -> list:
        problems = self._floor.errors(value)
        if isinstance(value, dict):
            named = {problem.path for problem in problems}
            problems += [Problem("/" + name, "minLength", f"Field '{name}' must not be empty")
                         for name in REQUIRED_FIELDS
                         if isinstance(value.get(name), str) and not value[name].strip() and "/" + name not in named]
        return problems


Contract = EventReader


def content_digest(payload: str) -> bytes:
    """ADAPTER"""
    return b""


# =============================================================================
# Store: events on disk, one commit for all who wait. Knows SQL; knows nothing of HTTP or logs.
# =============================================================================

DATA_VERSION = 1
COLUMNS = AppointmentEvent._fields[:-1]
EVENTS_TABLE = """
CREATE TABLE {name} (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    event_type TEXT NOT NULL, appointment_id TEXT NOT NULL, patient_id TEXT NOT NULL,
    timestamp TEXT NOT NULL,      -- canonical UTC
    notes TEXT,
    received_at TEXT NOT NULL,    -- UTC
    client TEXT,                  -- who sent it
    payload TEXT NOT NULL         -- the JSON as it came: no extra field is lost
)"""
# The same unique index finds duplicates and looks up appointments; a second one would only cost writes
EVENTS_INDEX = "CREATE UNIQUE INDEX idx_appointment_timestamp ON appointment_events (appointment_id, timestamp)"
CONFLICTS_TABLE = """
CREATE TABLE conflicting_events (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    event_id INTEGER NOT NULL,    -- the stored event that has the same key
    received_at TEXT NOT NULL, client TEXT,
    payload TEXT NOT NULL
)"""
CONFLICTS_INDEX = "CREATE INDEX idx_conflicting_event_id ON conflicting_events (event_id)"
# A repeated retry of the same conflicting content is kept once, or a stubborn sender would fill the disk. Only the last
# ten are compared: a sender of ever new content would else make each look-up longer than the one before.
INSERT_CONFLICT = """
INSERT INTO conflicting_events (event_id, received_at, client, payload)
SELECT :event_id, :received_at, :client, :payload WHERE NOT EXISTS (SELECT 1 FROM (
    SELECT client, payload FROM conflicting_events WHERE event_id = :event_id ORDER BY id DESC LIMIT 10)
    WHERE client IS :client AND payload = :payload)"""
DAMAGED = "the file is damaged; restore a backup, or save what is left with sqlite3's .recover"
GROUP = 512                     # most events in one commit: bounds how long the first of them waits for the last
CHECKPOINT_EVENTS = 5000        # events in the WAL, some 8 MiB, that make it worth moving into the main file
CHECKPOINT_SECONDS = 5.0        # how often fewer are moved
LOCK_STEP = 0.1                 # seconds of one try for a locked database: between tries who waited too long is told
LONGEST_COMPARED = 16384        # characters of a payload that is compared number by number
MOST_READ = 1024 * 1024         # characters of payloads in one read: a reader that stalls keeps no more in memory
IDLE_READERS = 8                # connections kept for reading, with 2 MiB of pages each; more come when more read at once
FULL_CHECK_BYTES = 256 * 1024 * 1024        # larger files are not read whole at start: it would take seconds


class StoreUnavailable(Exception):
    """Nothing of this group is stored: the database is locked, full, read-only or broken. The text says which."""


class StoreLocked(StoreUnavailable):
    """Another process holds the write lock; trying again is worth it."""


class Outcome(NamedTuple):
    """What became of one event: kind "stored", "duplicate" (event_id is then the one stored before) or "failed";
    "passed" marks a place in the queue that had no event."""
    kind: str
    event_id: Optional[int] = None
    identical: bool = False
    error: Optional[Exception] = None


class Filter(NamedTuple):
    """Which events to read. Times are canonical UTC, since inclusive, until exclusive, both of the appointment."""
    appointment_id: Optional[str] = None
    patient_id: Optional[str] = None
    event_type: Optional[str] = None
    since: Optional[str] = None
    until: Optional[str] = None


def _insert_statement(rows: int) -> str:
    row = "(" + ", ".join("?" * len(COLUMNS)) + ")"
    return (f"INSERT INTO appointment_events ({', '.join(COLUMNS)}) VALUES {', '.join([row] * rows)} "
            "ON CONFLICT (appointment_id, timestamp) DO NOTHING")


# Hot path: one statement for up to 64 rows gives the GIL away once, not 64 times, and SQLite works while Python reads
# the next requests. One for each number of rows, as a group of 63 made of powers of two would be six statements; 64
# rows stay below SQLite's old limit of 999 values.
MOST_ROWS = 64
INSERTS = tuple(map(_insert_statement, range(MOST_ROWS + 1)))
# What a value can be blamed for; all other errors are the disk's or the file's. ProgrammingError: of a value that
# sqlite3 cannot bind, since Python 3.12
ROW_ERRORS = (sqlite3.IntegrityError, sqlite3.DataError, sqlite3.InterfaceError, sqlite3.ProgrammingError,
              ValueError, TypeError, OverflowError)


def same_content(event: AppointmentEvent, stored_payload: str) -> bool:
    """Whether the payload of `event` equals the stored one as JSON, the spelling of the same instant aside."""
    if event.payload == stored_payload:
        return True
    try:
        old, new = json.loads(stored_payload), json.loads(event.payload)
        if not (isinstance(old, dict) and isinstance(new, dict)):
            return False
        old.pop("timestamp", None), new.pop("timestamp", None)
        # The writer waits for this: C is quick, and only small payloads are worth to see that 1 is 1.0, too
        return json.dumps(old, sort_keys=True) == json.dumps(new, sort_keys=True) or \
            len(event.payload) <= LONGEST_COMPARED and json_equal(old, new)
    except (ValueError, TypeError, RecursionError):     # stored by other hands than ours
        return False


class _Checkpointer:
    """Moves what is in the WAL into the main file, on a thread of its own, so that no commit waits for it.

    SQLite starts the WAL anew only when all of it is moved, which under load never happens by itself. So when the thread
    has moved the bulk (2,000 pages in 5 to 15 ms), the writer moves the few pages that came meanwhile (40 in 1 ms).
    P99 at 64 connections: 11 ms, against 16 ms when the writer does it all.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._events = 0                # committed since the WAL was last started anew
        self._due = threading.Event()
        self._bulk_is_moved = self._stopping = False
        self._thread = threading.Thread(target=self._run, name="webhook-checkpoint", daemon=True)
        self._thread.start()

    def committed(self, events: int, writer: sqlite3.Connection) -> None:
        """Called by the writer after each commit."""
        self._events += events
        if self._bulk_is_moved:
            self._move(writer)
            self._events, self._bulk_is_moved = 0, False
        elif self._events >= CHECKPOINT_EVENTS:
            self._due.set()

    def stop(self) -> None:
        """End the thread."""
        self._stopping = True
        self._due.set()
        self._thread.join()
        self._connection.close()

    def _run(self) -> None:
        while not self._stopping:                       # looked at after clear(), which may have undone the set() of stop()
            self._due.wait(CHECKPOINT_SECONDS)
            if self._events and not self._bulk_is_moved and not self._stopping:
                self._move(self._connection)
                self._bulk_is_moved = self._events >= CHECKPOINT_EVENTS     # else the writer finds all moved, or goes on
            self._due.clear()

    @staticmethod
    def _move(connection: sqlite3.Connection) -> None:
        with contextlib.suppress(sqlite3.Error):        # busy, or a full disk: what is committed stays in the WAL
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()


class SQLite:
    """One SQLite file: a lock-guarded connection that writes, and connections that read and never wait for it."""

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)               # connections are made later, too: chdir must not lead them astray
        self._lock = threading.Lock()
        self._writer: Optional[sqlite3.Connection] = None
        self._checkpointer: Optional[_Checkpointer] = None
        self._inode = 0
        self._readers: deque = deque()

    # -- opening

    def open(self) -> None:
        """Open, make or migrate the file. Raises SetupError, and then has changed nothing."""
        try:
            if os.path.exists(self.path) and not os.path.isfile(self.path):
                raise SetupError(f"database {self.path}: it is a {'folder' if os.path.isdir(self.path) else 'device or pipe'}, "
                                 "not a file")
            if os.path.exists(self.path) and os.path.getsize(self.path):
                self._inspect()
            else:                                       # patients' data: for the owner only; -wal and -shm copy that
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
            self._writer = self._connect()
            self._writer.execute("PRAGMA cache_size = -65536")      # KiB: a million scattered keys fit
            self._prepare(self._writer)
            self._checkpointer = _Checkpointer(self._connect())
            self._inode = os.stat(self.path).st_ino
        except (OSError, sqlite3.Error) as error:
            self.close()
            raise SetupError(f"database {self.path}: {_reason(error)}") from None
        except BaseException:
            self.close()
            raise

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(f"{Path(self.path).as_uri()}?mode=rw", uri=True, timeout=2, isolation_level=None,
                                     check_same_thread=False, cached_statements=MOST_ROWS + 16)
        # Others may have written what is not UTF-8: sqlite3's own error would quote it, into answer and log
        connection.text_factory = _lenient_text
        return connection

    def _inspect(self) -> None:
        """Read what is there through a read-only connection, so that a file we refuse stays as it is."""
        # A journal that a crash left must be rolled back before anybody can read; a read-only connection could not
        mode = "rw" if os.path.exists(self.path + "-journal") else "ro"
        uri = f"{Path(self.path).as_uri()}?mode={mode}"
        with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=2)) as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version > DATA_VERSION:
                raise SetupError(f"database {self.path}: written by a newer version of this program "
                                 f"(data version {version}, this program knows {DATA_VERSION}); it was not changed")
            if os.path.getsize(self.path) <= FULL_CHECK_BYTES:
                found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
                if found != "ok":
                    raise SetupError(f"database {self.path}: {DAMAGED}; it was not changed "
                                     f"({found.splitlines()[-1]})")
            columns = _columns_of(connection)
            # Another program's file may have our version number, too
            missing = set(COLUMNS if version else REQUIRED_FIELDS if columns else ()) - set(columns)
            if missing:
                raise SetupError(f"database {self.path}: its table appointment_events is not ours, it lacks "
                                 f"{', '.join(sorted(missing))}")
            if version:
                # These fail without the unique index, and without the other table
                connection.execute("EXPLAIN " + INSERTS[1], [""] * len(COLUMNS))
                connection.execute("EXPLAIN " + INSERT_CONFLICT, dict.fromkeys(("event_id", "received_at", "client", "payload")))

    def _prepare(self, connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA synchronous = FULL")         # an answered event outlives a power cut
        connection.execute("BEGIN IMMEDIATE")
        with _rollback_on_error(connection):
            if connection.execute("PRAGMA user_version").fetchone()[0] == 0:
                if _columns_of(connection):
                    try:
                        _migrate_plain_table(connection)
                    except ValueError as error:
                        raise SetupError(f"database {self.path}: {error}; it was not changed") from None
                else:
                    connection.execute(EVENTS_TABLE.format(name="appointment_events"))
                    connection.execute(EVENTS_INDEX)
                    connection.execute(CONFLICTS_TABLE)
                    connection.execute(CONFLICTS_INDEX)
                connection.execute(f"PRAGMA user_version = {DATA_VERSION}")
            connection.execute("COMMIT")
        # Only now, as this changes the file and a migration that fails must not
        if connection.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
            raise SetupError(f"database {self.path}: SQLite's WAL mode does not work on this file system")
        # The checkpointer comes first; this bounds the WAL, at 64 MiB, where events are huge or scattered
        connection.execute("PRAGMA wal_autocheckpoint = 16384")
        connection.execute(f"PRAGMA busy_timeout = {int(LOCK_STEP * 1000)}")

    # -- writing

    def write(self, events: list) -> list:
        """Store `events` in one durable transaction: an Outcome for each. Raises StoreUnavailable: none is stored."""
        with self._lock:
            connection = self._writer
            self._refuse_if_moved()
            try:
                # A deferred transaction that reads first gets SQLITE_BUSY at its first write, whatever the timeout
                connection.execute("BEGIN IMMEDIATE")
                with _rollback_on_error(connection):
                    outcomes = self._insert_all(connection, events)
                    connection.execute("COMMIT")
                self._checkpointer.committed(len(events), connection)
                return outcomes
            except sqlite3.Error as error:
                raise _unavailable(error) from error

    def _refuse_if_moved(self) -> None:
        """An event must not be said to be stored in a file that nobody will find again."""
        try:
            moved = os.stat(self.path).st_ino != self._inode
        except OSError:
            moved = True
        if moved:
            raise StoreUnavailable("the file was moved or deleted while it is in use; restart the service")

    def _insert_all(self, connection: sqlite3.Connection, events: list) -> list:
        outcomes: list = []
        for at in range(0, len(events), MOST_ROWS):
            outcomes += self._insert(connection, events[at:at + MOST_ROWS])
        return outcomes

    def _insert(self, connection: sqlite3.Connection, chunk: list) -> list:
        """Insert `chunk`, at most MOST_ROWS events; its outcomes."""
        values: list = []
        for event in chunk:
            values += event[:-1]
        try:
            cursor = connection.execute(INSERTS[len(chunk)], values)
        except ROW_ERRORS as error:
            if len(chunk) == 1:
                return [Outcome("failed", error=error)]
            # One bad row must not fail its neighbours
            return [self._insert(connection, [event])[0] for event in chunk]
        if cursor.rowcount < len(chunk):
            return self._sort_out(connection, chunk, cursor.rowcount)
        # AUTOINCREMENT counts up by one within a statement. Hot path: _make and the constructor take three times as long
        first, new = cursor.lastrowid - len(chunk) + 1, tuple.__new__
        return [new(Outcome, ("stored", event_id, False, None)) for event_id in range(first, first + len(chunk))]

    def _sort_out(self, connection: sqlite3.Connection, chunk: list, stored: int) -> list:
        """All but `stored` of `chunk` were duplicates: tell which, and keep those with other content."""
        # AUTOINCREMENT never gives an id again or a lower one: the rows just stored have the highest
        new = {(row[1], row[2]): row[0] for row in connection.execute(
            "SELECT id, appointment_id, timestamp FROM appointment_events ORDER BY id DESC LIMIT ?", (stored,))}
        outcomes = []
        for event in chunk:
            event_id = new.pop((event.appointment_id, event.timestamp), None)       # the first of a key was stored
            outcomes.append(Outcome("stored", event_id) if event_id else self._duplicate(connection, event))
        return outcomes

    @staticmethod
    def _duplicate(connection: sqlite3.Connection, event: AppointmentEvent) -> Outcome:
        stored_id, payload = connection.execute(
            "SELECT id, payload FROM appointment_events WHERE appointment_id = ? AND timestamp = ?",
            (event.appointment_id, event.timestamp)).fetchone()
        identical = same_content(event, payload)
        if not identical:
            _keep_conflict(connection, stored_id, event)
        return Outcome("duplicate", stored_id, identical)

    def probe(self) -> None:
        """Write durably without changing anything. Raises StoreUnavailable."""
        if not self._lock.acquire(timeout=LOCK_STEP):   # the writer may not let go of it while the database is locked
            raise StoreLocked("the database is busy")
        try:
            self._refuse_if_moved()
            self._writer.execute("BEGIN IMMEDIATE")
            with _rollback_on_error(self._writer):
                self._writer.execute(f"PRAGMA user_version = {DATA_VERSION}")
                self._writer.execute("COMMIT")
        except sqlite3.Error as error:
            raise _unavailable(error) from error
        finally:
            self._lock.release()

    # -- reading

    def events(self, wanted: Filter, after: int, limit: int, up_to: Optional[int] = None) -> list:
        """Events with id > after (and <= up_to) in order of id: at most `limit`, fewer where payloads are large, none only
        at the end. Raises StoreUnavailable."""
        query, values = _select(wanted, after, limit, up_to)
        with self._reading() as connection:
            events, size = [], 0
            for row in connection.execute(query, values):
                events.append(AppointmentEvent._make(row))
                size += len(events[-1].payload)
                if size > MOST_READ:
                    break
        return events

    def last_id(self) -> int:
        """The highest id, 0 when there is none. Raises StoreUnavailable."""
        with self._reading() as connection:
            return connection.execute("SELECT max(id) FROM appointment_events").fetchone()[0] or 0

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """A connection that reads, for a query whose rows are all fetched before the end, so that no snapshot stays."""
        self._refuse_if_moved()             # or SQLite would replay our WAL into whatever file has its name now
        try:
            try:
                connection = self._readers.pop()
            except IndexError:
                connection = self._connect()
                connection.execute("PRAGMA query_only = 1")
            try:
                yield connection
            finally:
                if len(self._readers) < IDLE_READERS:
                    self._readers.append(connection)
                else:
                    connection.close()
        except sqlite3.Error as error:
            raise _unavailable(error) from error

    def close(self) -> None:
        """Put everything into the main file and close."""
        if self._checkpointer is not None:
            self._checkpointer.stop()
            self._checkpointer = None
        while self._readers:
            self._readers.pop().close()
        if self._writer is not None:
            with self._lock, contextlib.suppress(sqlite3.Error):
                self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._writer.close()
            self._writer = None


def _select(wanted: Filter, after: int, limit: int, up_to: Optional[int]) -> tuple:
    """(query, values) that read events."""
    clauses, values = ["id > ?"], [after]
    for clause, value in (("id <= ?", up_to), ("appointment_id = ?", wanted.appointment_id),
                          ("patient_id = ?", wanted.patient_id), ("event_type = ?", wanted.event_type),
                          # without the Z, "…:00" sorts before "…:00.5" as the instants do
                          ("rtrim(timestamp, 'Z') >= ?", wanted.since and wanted.since.rstrip("Z")),
                          ("rtrim(timestamp, 'Z') < ?", wanted.until and wanted.until.rstrip("Z"))):
        if value is not None:
            clauses.append(clause)
            values.append(value)
    # A look-up by appointment goes through its index and sorts the few rows; + keeps it from scanning by id
    order = "+id" if wanted.appointment_id is not None else "id"
    query = (f"SELECT {', '.join(COLUMNS)}, id FROM appointment_events WHERE {' AND '.join(clauses)} "
             f"ORDER BY {order} LIMIT ?")
    return query, values + [limit]


@contextlib.contextmanager
def _rollback_on_error(connection: sqlite3.Connection) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if connection.in_transaction:                   # SQLite has itself rolled back some, such as a full disk
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
        raise


def _lenient_text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _unavailable(error: sqlite3.Error) -> StoreUnavailable:
    text = str(error)
    kind = StoreLocked if "locked" in text or "busy" in text else StoreUnavailable
    return kind(_reason(error))


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    hints = {"unable to open database file": "cannot be opened: does its folder exist, and may this user write there?",
             "database disk image is malformed": DAMAGED,
             "file is not a database": "the file is not a SQLite database; it was not changed",
             "attempt to write a readonly database": "the file or its folder is read-only for this user",
             "database or disk is full": "the disk is full"}
    return hints.get(text, text)


def _columns_of(connection: sqlite3.Connection) -> list:
    return [row[1] for row in connection.execute("PRAGMA table_info(appointment_events)")]


def _migrate_plain_table(connection: sqlite3.Connection) -> None:
    """Rebuild a table of version 0 (no client, no payload, timestamps as the sender wrote them) as ours.

    Ids stay. Two rows that turn out to be one instant of one appointment: the first is kept in the table, the others
    in conflicting_events. Raises ValueError when a row cannot be kept.
    """
    columns = _columns_of(connection)
    key = "id" if "id" in columns else "rowid"
    names = ", ".join('"' + name.replace('"', '""') + '"' for name in columns)
    connection.execute(EVENTS_TABLE.format(name="migrated_events"))
    connection.execute("CREATE UNIQUE INDEX idx_migrated ON migrated_events (appointment_id, timestamp)")
    connection.execute(CONFLICTS_TABLE)
    connection.execute(CONFLICTS_INDEX)
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    highest = connection.execute("SELECT max(seq) FROM sqlite_sequence WHERE name = 'appointment_events'").fetchone()[0] or 0
    connection.text_factory = lambda data: data.decode("utf-8", "backslashreplace")     # ids must stay different
    for event_id, *values in connection.execute(f"SELECT {key}, {names} FROM appointment_events ORDER BY {key}"):
        event = _migrated_event(dict(zip(columns, values)), now)
        try:
            connection.execute(f"INSERT INTO migrated_events (id, {', '.join(COLUMNS)}) VALUES (?{', ?' * len(COLUMNS)})",
                               (event_id, *event[:-1]))
        except sqlite3.IntegrityError as error:
            first = connection.execute("SELECT id FROM migrated_events WHERE appointment_id = ? AND timestamp = ?",
                                       (event.appointment_id, event.timestamp)).fetchone()
            if first is None:
                raise ValueError(f"the event with id {printable(str(event_id))} cannot be migrated ({error})") from None
            _keep_conflict(connection, first[0], event)
        highest = max(highest, event_id if isinstance(event_id, int) else 0)
    connection.text_factory = _lenient_text
    # An id that was once given to a sender never means another event
    connection.execute("DELETE FROM sqlite_sequence WHERE name = 'migrated_events'")
    connection.execute("INSERT INTO sqlite_sequence (name, seq) VALUES ('migrated_events', ?)", (highest,))
    connection.execute("DROP TABLE appointment_events")
    connection.execute("DROP INDEX idx_migrated")
    # The newer way of ALTER TABLE fails where a view reads the table that is missing just now
    connection.execute("PRAGMA legacy_alter_table = ON")
    connection.execute("ALTER TABLE migrated_events RENAME TO appointment_events")
    connection.execute(EVENTS_INDEX)


def _migrated_event(row: dict, now: str) -> AppointmentEvent:
    """The event in a row of the old table, {column: value}. What our table has no column for goes into the payload; NULL
    becomes an empty text where ours takes none; a timestamp that cannot be read stays as it is."""
    row = {name: value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else value
           for name, value in row.items() if value is not None}
    payload = row.pop("payload", None)
    content = {name: value for name, value in row.items() if name not in ("id", "received_at", "client")}
    try:
        parsed = parse_json(str(payload).encode())[0]
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        payload = json.dumps({**content, "payload": payload} if payload is not None else content)
    elif not all(name in COLUMNS for name in content):
        payload = json.dumps({**content, **parsed})
    event_type, appointment_id, patient_id, timestamp = (str(row.get(name, "")) for name in REQUIRED_FIELDS)
    return AppointmentEvent(event_type, appointment_id, patient_id, _canonical_or_same(timestamp), row.get("notes"),
                            _canonical_or_same(str(row.get("received_at") or now)), row.get("client"), payload)


def _canonical_or_same(timestamp: str) -> str:
    try:
        return canonical_timestamp(timestamp)
    except ValueError:
        return timestamp


def _keep_conflict(connection: sqlite3.Connection, stored_id: int, event: AppointmentEvent) -> None:
    connection.execute(INSERT_CONFLICT, {"event_id": stored_id, "received_at": event.received_at,
                                         "client": event.client, "payload": event.payload})


class Submission:
    """One event on its way to the disk. The store calls done(outcome) after the commit, on the writer's thread."""
    __slots__ = ("event", "arrived")

    def done(self, outcome: Outcome) -> None:
        """Tell whoever waits. Must not block and must not raise."""
        raise NotImplementedError


class _Waiting(Submission):
    """A submission whose submitter waits in its own thread; without an event it only marks its place in the queue."""
    __slots__ = ("outcome", "_ready")

    def __init__(self, event: Optional[AppointmentEvent]) -> None:
        self.event, self.arrived = event, time.monotonic()
        self.outcome: Optional[Outcome] = None
        self._ready = threading.Event()

    def done(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self._ready.set()

    def wait(self) -> Outcome:
        self._ready.wait()
        return self.outcome


class Store:
    """Group commit over an engine: one thread takes all that wait, commits once, and tells each its outcome.

    done() runs on the thread that commits, so that whoever waits can be answered there and then: waking a thread for
    each answer costs more than the disk does. An engine has open, write, probe, events, last_id and close as SQLite has.
    """

    def __init__(self, engine: SQLite, busy_timeout: float,
                 on_stored: Optional[Callable[[AppointmentEvent], None]] = None,
                 on_trouble: Callable[[str], None] = lambda text: None) -> None:
        """`on_stored(event)` follows each commit in order; `on_trouble(text)` tells when writing starts to fail, and ""
        when it works again. Both run on the writer's thread."""
        self.engine = engine
        self._busy_timeout = busy_timeout
        self._on_stored = on_stored
        self._on_trouble = on_trouble
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="webhook-writer", daemon=True)
        self._trouble = ""
        self.submit = self._queue.put       # hot path: straight into the C queue

    def start(self) -> None:
        """Start writing."""
        self._thread.start()

    def lead(self, submissions: list) -> None:
        """ADAPTER"""
        for one in submissions:
            self.submit(one)

    def steps(self, wanted, after, up_to=None):
        """ADAPTER"""
        while True:
            events = self.engine.events(wanted, after, 64, up_to)
            if not events:
                return
            after = events[-1].id
            yield events, after

    def event(self, event_id):
        """ADAPTER"""
        found = self.engine.events(Filter(), event_id - 1, 1, up_to=event_id)
        return found[0] if found else None

    def last_id(self):
        """ADAPTER"""
        return self.engine.last_id()

    def health(self, wait=0.04):
        """ADAPTER"""
        return self.probe()

    def add(self, event: AppointmentEvent, digest=None) -> Outcome:
        """Store one event and wait. A "failed" outcome carries its error."""
        waiting = _Waiting(event)
        self.submit(waiting)
        return waiting.wait()

    def settle(self) -> None:
        """Wait until everything submitted before this call is done."""
        waiting = _Waiting(None)
        self.submit(waiting)
        waiting.wait()

    def stop(self) -> None:
        """Commit what is queued, end the thread, close the engine."""
        if self._thread.ident is not None:
            self._queue.put(None)
            self._thread.join()
        self.engine.close()

    def _run(self) -> None:
        get, size = self._queue.get, self._queue.qsize
        group: list = []
        while True:
            if not group:
                group.append(get())
            for _ in range(min(size(), GROUP - len(group))):
                group.append(get())
            stopping = None in group
            if stopping:
                group = [submission for submission in group if submission is not None]
            group = self._write(group)
            if stopping:
                if not group and not size():
                    return
                self._queue.put(None)

    def _write(self, group: list) -> list:
        """Commit `group` and tell each its outcome. Returns those to try again: the database was locked."""
        events = [submission.event for submission in group if submission.event is not None]
        try:
            outcomes = self.engine.write(events) if events else []
        except StoreLocked as error:
            oldest = time.monotonic() - self._busy_timeout
            late = [one for one in group if one.arrived <= oldest]
            if late:                                    # who only had to wait a little has no trouble
                self._report(str(error))
                self._tell(late, itertools.repeat(Outcome("failed", error=error)))
            return [one for one in group if one.arrived > oldest]
        except Exception as error:                      # whatever it is, nobody may wait for ever
            self._report(str(error) or repr(error))
            self._tell(group, itertools.repeat(Outcome("failed", error=error)))
            return []
        if self._trouble and events:
            self._report("")
        if len(events) < len(group):                    # some only mark their place
            found = iter(outcomes)
            outcomes = [next(found) if one.event is not None else Outcome("passed") for one in group]
        self._tell(group, outcomes)
        return []

    def _tell(self, group: list, outcomes: Iterable) -> None:
        on_stored = self._on_stored
        for submission, outcome in zip(group, outcomes):
            submission.done(outcome)
            if on_stored is not None and outcome.kind == "stored":
                on_stored(submission.event._replace(id=outcome.event_id))

    def _report(self, trouble: str) -> None:
        if trouble != self._trouble:
            self._trouble = trouble
            self._on_trouble(trouble)

    def probe(self) -> str:
        """Try to write, for at most the busy timeout; "" when that works, else what is wrong."""
        deadline = time.monotonic() + self._busy_timeout
        while True:
            try:
                self.engine.probe()
                return ""
            except StoreLocked as error:
                if time.monotonic() > deadline:
                    return str(error)
            except StoreUnavailable as error:
                return str(error)


# =============================================================================
# Log: one line a request, without patients' data, written in the background. Knows nothing of sockets or SQL.
# =============================================================================

LEVELS = {"DEBUG": 10, "INFO": 20, "WARNING": 30, "ERROR": 40}
LEVEL_NAMES = {number: name for name, number in LEVELS.items()}
PERSONAL_FIELDS = frozenset({"patient_id", "notes"})
MASK = '"***"'
LOG_QUEUE = 20000               # lines that may wait; what comes on top is dropped and counted
LOG_LARGE = 16 * 1024 * 1024    # characters of large payloads that may wait there
LOG_BATCH = 32                  # lines a write: formatting more at a stretch would hold the GIL for milliseconds
LOG_PAUSE = 0.05                # seconds between looks into the queue: nobody has to wake the writer
# Seconds of sleep before each full batch: threads that wait for the interpreter's lock get it at once, not after 5 ms
# (P95 at 64 connections 9 -> 5 ms)
LOG_BREATH = 0.0003
LONGEST_SHOWN = 4096            # characters of a redacted payload in a line
MOST_SHOWN = 50                 # its members
LOG_FLUSH_SECONDS = 5.0         # at exit: nobody may be reading the other end of a pipe


class Redactor:
    """Payloads as text for the log, by the setting --log-payloads."""

    def __init__(self, mode: str, named_fields: Iterable = ()) -> None:
        """`named_fields`: the fields that the schema names; the values of all others are masked."""
        self.mode = mode
        self._shown = {name: f"{encode_basestring_ascii(name)}: " for name in set(named_fields) - PERSONAL_FIELDS}
        self._masked = {name: f"{encode_basestring_ascii(name)}: {MASK}" for name in PERSONAL_FIELDS}

    def event(self, event):
        """ADAPTER"""
        return self.text(json.loads(event.payload))

    def invalid(self, value, problems):
        """ADAPTER"""
        return self.text(value)

    def unreadable(self, body):
        """ADAPTER"""
        return self.text(body)

    def text(self, value: Any) -> str:
        """One line of ASCII for a JSON value; bytes are a body that could not be read."""
        if self.mode == "none" or value is None:
            return ""
        if isinstance(value, bytes):
            return ascii(value)[1:] if self.mode == "full" else f"({len(value)} bytes)"
        if self.mode == "full":
            return json.dumps(value)
        if not isinstance(value, dict):
            return MASK
        shown, masked, parts = self._shown, self._masked, []
        # Hot path: no call and no formatting for a member of an ordinary event (0.8 against 1.8 us for five)
        for name, item in value.items() if len(value) <= MOST_SHOWN else itertools.islice(value.items(), MOST_SHOWN):
            if name in masked:
                parts.append(masked[name])
            elif name not in shown:
                parts.append(f"{encode_basestring_ascii(name[:LONGEST_SHOWN])}: {MASK}")
            elif item.__class__ is str:
                parts.append(shown[name] + encode_basestring_ascii(item if len(item) < 256 else item[:LONGEST_SHOWN]))
            else:
                parts.append(shown[name] + (MASK if isinstance(item, (dict, list)) else json.dumps(item)))
        text = "{" + ", ".join(parts) + "}"
        return text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + "..."


class Shown(str):
    """Text of a payload that is ready for the log."""


class RequestRecord(NamedTuple):
    """What the log keeps of one request; made into text later, by the log's own thread."""
    level: int
    time: float
    request_id: str
    method: str
    path: str
    status: int
    outcome: str
    event_id: Optional[int]
    seconds: float
    client: str
    payload: Any


class _LogFile(logging.handlers.RotatingFileHandler):
    """The standard library's rotation over an unbuffered file: a failed write leaves nothing behind to be repeated."""

    def _open(self) -> Any:
        return open(self.baseFilename, "ab", buffering=0, opener=lambda path, flags: os.open(path, flags, 0o600))


class FileSink:
    """Log lines to a file that is rotated by size."""

    def __init__(self, path: str, max_bytes: int, backups: int) -> None:
        """Raises SetupError."""
        self._max_bytes = max_bytes
        try:
            self._file = _LogFile(path, maxBytes=max_bytes, backupCount=backups)
            # A pipe has no end to look at, and to rotate /dev/stderr would rename the system's
            self._is_file = os.path.isfile(path) and not os.path.abspath(path).startswith(("/dev/", "/proc/"))
        except OSError as error:
            raise SetupError(f"log file {path}: {error.strerror}") from None

    def write(self, data: bytes, level: int) -> None:
        """Append whole lines. Raises OSError."""
        if not self._is_file:
            _write_all(self._file.stream.write, data)
            return
        if self._file.stream is None:                   # a rotation failed half way
            self._file.stream = self._file._open()
        size = self._file.stream.tell()
        if size and size + len(data) > self._max_bytes:
            self._rotate()
            size = self._file.stream.tell()
        try:
            _write_all(self._file.stream.write, data)
        except OSError:
            with contextlib.suppress(OSError):          # half a line would join the next one
                self._file.stream.truncate(size)
                self._file.stream.seek(size)
            raise

    def _rotate(self) -> None:
        """Rotate, or go on with the same file where its folder does not allow that: a long log is better than none."""
        try:
            self._file.doRollover()
        except OSError:
            if self._file.stream is None:
                self._file.stream = self._file._open()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class StreamSink:
    """Log lines to stderr, past Python's own buffers."""

    def __init__(self) -> None:
        self._stream = sys.stderr
        self._torn = b""                # a line end, when the last write broke off somewhere in a line

    def write(self, data: bytes, level: int) -> None:
        """Write whole lines. Raises OSError."""
        try:
            descriptor = self._stream.fileno()
        except (OSError, ValueError, AttributeError):   # replaced by a program that embeds us, or none at all
            if self._stream is not None:
                self._stream.write(data.decode())
            return
        torn, self._torn = self._torn, b"\n"
        _write_all(lambda rest: os.write(descriptor, rest), torn + data)
        self._torn = b""

    def close(self) -> None:
        """Leave stderr open: it is not ours."""


class LoggerSink:
    """Log lines to a logging.Logger of the program that embeds us."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def write(self, data: bytes, level: int) -> None:
        """One record a call; its message is ours without time, name and level."""
        self._logger.log(level, "%s", data.decode().rstrip("\n"))

    def close(self) -> None:
        """The logger is not ours."""


def _write_all(write: Callable[[bytes], Optional[int]], data: bytes) -> None:
    while data:
        data = data[write(data) or 0:]


class Log:
    """A queue of lines and the thread that writes them. Nothing that happens to the sink ever stops the service."""

    def __init__(self, sink: Any, level: str = "INFO", redactor: Optional[Redactor] = None) -> None:
        self.level = LEVELS[level]
        self._sink = sink
        self._one_by_one = isinstance(sink, LoggerSink)
        self._redactor = redactor or Redactor("none")
        self._queue: deque = deque()
        self._dropped = 0               # lines not written since the last notice
        self._large = 0                 # characters that shown() made since the queue was last empty
        self._dropping = threading.Lock()
        self._why = "the queue was full"
        self._second, self._prefix = -1, ""
        self._frames: dict = {}         # see _frame
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="webhook-log", daemon=True)

    def start(self) -> None:
        """Start writing."""
        self._thread.start()

    def stop(self) -> None:
        """Write what is queued and close."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(LOG_FLUSH_SECONDS)
        if not self._thread.is_alive():
            self._sink.close()

    def request(self, record: tuple) -> None:
        """Queue the line of one request: a RequestRecord, or its members as a plain tuple, which takes 0.5 us less to make.

        Hot path: an append; formatting here would cost a third of the rate.
        """
        record = (LEVELS.get(record[0], record[0]),) + record[1:]
        if record[0] >= self.level:
            if len(self._queue) < LOG_QUEUE:
                self._queue.append(record)
            else:
                self._drop(1)

    def shown(self, payload: Any) -> Shown:
        """What the log will say of a large payload, made now: a megabyte of objects must not wait in the queue."""
        text = self._redactor.text(payload)
        with self._dropping:
            if self._large + len(text) > LOG_LARGE:
                return Shown(f"({len(text)} characters, too many for the log's queue just now)")
            self._large += len(text)
        return Shown(text)

    def _drop(self, lines: int) -> None:
        with self._dropping:
            self._dropped += lines

    def line(self, level: str, message: str, request_id: str = "-", stack: str = "") -> None:
        """Queue one line; `stack` follows it, indented so that it cannot pass for a line of its own."""
        if LEVELS[level] >= self.level:
            text = f"[{request_id}] {printable(message, 2000)}"
            for extra in stack.splitlines():
                text += "\n    " + printable(extra, 2000)
            self.request((LEVELS[level], time.time(), text))

    def exception(self, message: str, request_id: str = "-") -> None:
        """Queue an ERROR with the stack of the exception being handled."""
        self.line("ERROR", message, request_id, traceback.format_exc())

    def _run(self) -> None:
        while not self._stop.wait(LOG_PAUSE):
            self._write_queued()
            self._large = 0
        self._write_queued()

    def _write_queued(self) -> None:
        while self._queue:
            count = 1 if self._one_by_one else min(len(self._queue), LOG_BATCH)
            batch = [self._queue.popleft() for _ in range(count)]
            if count == LOG_BATCH:
                self._stop.wait(LOG_BREATH)
            try:
                self._write(batch)
            except Exception as error:                  # a closed pipe, a full disk, or whatever a foreign logger raises
                self._drop(count)
                self._why = getattr(error, "strerror", None) or repr(error)
                if self._stop.is_set():                 # the last look: do not try 20,000 times
                    self._queue.clear()

    def _write(self, batch: list) -> None:
        if self._dropped:
            dropped = self._dropped
            notice = (30, time.time(), f"[-] {dropped} log lines were dropped: {printable(self._why)}")
            self._sink.write(self._formatted(notice).encode(), 30)
            self._drop(-dropped)
            self._why = "the queue was full"
        self._sink.write("".join(map(self._formatted, batch)).encode("utf-8", "backslashreplace"), batch[0][0])

    def _formatted(self, record: tuple) -> str:
        """The line of a record, with its end. Hot path: 2.5 us with an ordinary event's payload."""
        text = record[2] if len(record) == 3 else self._request_text(record)
        if self._one_by_one:
            return text + "\n"
        moment = record[1]
        milliseconds = int((moment - self._second) * 1000)
        if not 0 <= milliseconds < 1000:
            self._second = int(moment)
            self._prefix = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self._second))
            milliseconds = int((moment - self._second) * 1000)
        return f"{self._prefix},{milliseconds:03d} - webhook - {LEVEL_NAMES[record[0]]} - {text}\n"

    def _request_text(self, record: RequestRecord) -> str:
        _, _, request_id, method, path, status, outcome, event_id, seconds, client, payload = record
        try:
            before, after = self._frames[method, path, status, outcome, client]
        except KeyError:
            before, after = self._frame(method, path, status, outcome, client)
        number = "" if event_id is None else f" event_id={event_id}"
        shown = payload
        return f"[{request_id}{before}{number} {seconds * 1000:.1f}{after}{' payload=' if shown else ''}{shown}"

    def _frame(self, *parts: Any) -> tuple:
        """What stands in a line before and after the duration. Kept, as most requests have the same; made of printable
        characters only, whoever named them."""
        method, path, status, outcome, client = (printable(str(part), 1000) for part in parts)
        if len(self._frames) >= 1000:
            self._frames.clear()
        frame = self._frames[parts] = (f"] {method} {path} {status} {outcome}", f"ms client={client}")
        return frame


# =============================================================================
# HTTP: bytes to a head and a body, an answer to bytes. Knows no socket, no thread and no route.
# =============================================================================

REASONS = {200: "OK", 204: "No Content", 400: "Bad Request", 403: "Forbidden", 404: "Not Found",
           405: "Method Not Allowed", 406: "Not Acceptable", 408: "Request Timeout", 409: "Conflict",
           411: "Length Required", 413: "Payload Too Large", 414: "URI Too Long", 415: "Unsupported Media Type",
           417: "Expectation Failed", 431: "Request Header Fields Too Large", 500: "Server Error",
           501: "Not Implemented", 503: "Service Unavailable", 505: "HTTP Version Not Supported"}
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"})
RETRY_AFTER = {"Retry-After": "1"}

# RFC 9110 section 5.6.2 and RFC 9112 sections 3 and 5, byte for byte: no folding, no space before the colon, no bare
# CR or LF, no NUL or other control but TAB in a value. A head is read as latin-1, so that a byte is a character.
_TCHAR = "[!#$%&'*+.^_`|~0-9A-Za-z-]"
_VALUE = "[\t\x20-\x7e\x80-\xff]*"
_REQUEST_LINE = re.compile(f"({_TCHAR}+) ([\x21-\x7e]+) HTTP/([0-9])\\.([0-9])")
# White space around a value is stripped afterwards: in the pattern it would cost the square of 16,000 spaces. The second
# branch swallows all that follows a line which is no field: else findall would try again at every character of it.
_FIELDS = re.compile(f"({_TCHAR}+):({_VALUE})\r\n|(.+)", re.DOTALL)
_TRAILER_LINE = re.compile(f"{_TCHAR}+:{_VALUE}".encode("latin-1"))
_BEGINS_LIKE_A_METHOD = re.compile(_TCHAR.encode())
_BARE_LF = re.compile(rb"(?<!\r)\n")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+,;=%-]*)(?::[0-9]*)?")
_ABSOLUTE = re.compile(r"https?://([^/?#@]+)(/[^#]*|\?[^#]*)?", re.IGNORECASE)
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?")
_EMPTY_LINES = re.compile(rb"(?:\r\n)*")
LONGEST_CHUNK_LINE = 256
_WEIGHT = re.compile(r"0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?")         # RFC 9110 section 12.4.2
_WHERE_READERS_DISAGREE = ("host", "content-length", "transfer-encoding")


class Refusal(Exception):
    """What a sender did wrong or cannot have now, as it is answered: a status, a message, further members and fields.

    What the sender wrote never stands in `message` itself: it fills the holes {} of it, out of `quoted`, in the answer;
    the log gets `note`, which has three dots in their place. `close`: the rest of the connection has not been read.
    """
    close = False

    def __init__(self, status: int, message: str, *quoted: str, note: str = "", close: bool = False,
                 fields: Optional[dict] = None, **members: Any) -> None:
        super().__init__(status)
        self.status, self.fields, self.members = status, fields or {}, members
        self.message, self.note = message, note or message
        if quoted:
            self.message = message.format(*(printable(text, 100) for text in quoted))
            self.note = message.format(*["..."] * len(quoted))
        if close:
            self.close = True


class Malformed(Refusal):
    """A request that cannot be read: nobody can tell where the next one would begin, so the connection ends."""
    close = True


class Busy(Refusal):
    """A 503 because too much is under way: the sender's affair, and no trouble of ours."""

    def __init__(self, message: str, close: bool = False) -> None:
        super().__init__(503, message, close=close, fields=RETRY_AFTER)


class Limits(NamedTuple):
    """How much of a request is read: bytes, and a number of header fields."""
    request_line: int
    header_bytes: int
    header_fields: int
    body: int


class Head:
    """The head of a request: what its request line and fields say; of one that could not be read, as much as was."""
    method = target = path = "-"
    query = ""
    http11 = True
    host = ""                           # in lower case, without its port
    length: Optional[int] = None        # of the body, in bytes; None where no length is given
    chunked = keep_alive = expect_continue = False

    def __init__(self) -> None:
        self.fields: dict = {}

    def get(self, name: str, default: str = "") -> str:
        """The value of a field by its lower-case name; the values of a repeated one joined by commas."""
        return self.fields.get(name, default)


def find_head(buffer: bytes, limits: Limits) -> int:
    """Where the head in `buffer` ends, behind its empty line; -1 while more is needed. Raises Malformed."""
    end = buffer.find(b"\r\n\r\n")
    line = buffer.find(b"\r\n", 0, limits.request_line + 2)
    if line < 0 and len(buffer) > limits.request_line + 1:             # its LF may be still to come
        raise Malformed(414, f"The request line is longer than {limits.request_line} bytes")
    # From the line's CR LF on; as long as the end has not come, all but one byte of it may be there
    last = end if end >= 0 else len(buffer) - 3
    if 0 <= line < last - limits.header_bytes - 2:
        raise Malformed(431, f"The header section is longer than {limits.header_bytes} bytes")
    if end >= 0:
        return end + 4
    if buffer and buffer[0] != 13 and not _BEGINS_LIKE_A_METHOD.match(buffer):
        if buffer[0] == 0x16:
            raise Malformed(400, "This is not HTTP, it looks like TLS: use http://")
        raise Malformed(400, "This is not HTTP")
    if _BARE_LF.search(buffer) or b"\0" in buffer:
        raise Malformed(400, "Lines must end with CR LF and hold no NUL")
    return -1


def parse_head(data: bytes, head: Head, limits: Limits) -> None:
    """Fill `head` from complete bytes (RFC 9112), the empty line included. Raises Refusal; `head` then says what was
    understood before."""
    line, _, rest = data[:-2].decode("latin-1").partition("\r\n")
    _parse_request_line(line, head)
    _parse_fields(rest, head, limits)
    _parse_framing(head, limits)
    _parse_connection(head)
    _parse_host(head)


def _parse_request_line(line: str, head: Head) -> None:
    match = _REQUEST_LINE.fullmatch(line)
    if not match:
        raise Malformed(400, "The request line is not 'METHOD /path HTTP/1.1'")
    method, target, major, minor = match.groups()
    if major != "1":
        raise Malformed(505, "Only HTTP/1.0 and HTTP/1.1 are spoken here")
    head.method, head.target, head.http11 = method, target, minor != "0"
    if target[0] != "/" and not (method == "OPTIONS" and target == "*"):
        absolute = _ABSOLUTE.fullmatch(target)          # section 3.2.2
        if not absolute:
            raise Malformed(400, "The request target must be a path")
        head.host, target = absolute.group(1), absolute.group(2) or "/"
        if target[0] != "/":
            target = "/" + target
    if "#" in target or "%" in target and _BAD_PERCENT(target):
        raise Malformed(400, "The request target is not a valid path: '%' must be followed by two hex digits, and '#' "
                             "has no place in it")
    head.path, _, head.query = target.partition("?")


def _parse_fields(lines: str, head: Head, limits: Limits) -> None:
    """Hot path, where heads differ: one findall over all fields (5 against 12 us for a head of eight)."""
    found = _FIELDS.findall(lines)
    if len(found) > limits.header_fields or found and found[-1][2].count("\r\n") + len(found) > limits.header_fields:
        raise Malformed(431, f"More than {limits.header_fields} header fields")
    if found and found[-1][2]:
        raise Malformed(400, "A header line is not 'name: value'")
    fields = head.fields = {name.lower(): value.strip(" \t") for name, value, _ in found}
    if len(fields) < len(found):
        fields.clear()
        for name, value, _ in found:
            name, value = name.lower(), value.strip(" \t")
            if name in fields:
                if name in _WHERE_READERS_DISAGREE:
                    raise Malformed(400, f"More than one {name} header")
                value = fields[name] + ", " + value
            fields[name] = value


def _parse_framing(head: Head, limits: Limits) -> None:
    """Length of the body (RFC 9112 section 6): where two readers may disagree on it, smuggling begins, so refuse."""
    length, coding = head.fields.get("content-length"), head.fields.get("transfer-encoding")
    if coding is not None:
        if length is not None:
            raise Malformed(400, "Both Content-Length and Transfer-Encoding")
        if not head.http11:
            raise Malformed(400, "Transfer-Encoding in HTTP/1.0")
        if coding.lower() != "chunked":
            raise Malformed(501, "The only Transfer-Encoding known here is chunked")
        head.chunked = True
    elif length is not None:
        if not (length.isdigit() and length.isascii()):
            raise Malformed(400, "Content-Length must be digits only")
        head.length = int(length.lstrip("0")[:20] or 0)
        if head.length > limits.body:
            raise Malformed(413, f"The body is longer than {limits.body} bytes")


def _parse_connection(head: Head) -> None:
    """Whether more requests may follow (RFC 9112 section 9.3), and whether the sender waits for our 100 (RFC 9110
    section 10.1.1)."""
    head.keep_alive = head.http11
    if "connection" in head.fields:
        options = {option.strip().lower() for option in head.fields["connection"].split(",")}
        head.keep_alive = "close" not in options and (head.http11 or "keep-alive" in options)
    if "expect" in head.fields:
        head.expect_continue = head.http11
        if head.fields["expect"].lower() != "100-continue":
            raise Malformed(417, "The only expectation known here is 100-continue")


def _parse_host(head: Head) -> None:
    host = head.fields.get("host", "")
    if "host" not in head.fields and head.http11:
        raise Malformed(400, "The Host header is missing")
    if head.host and _HOST.fullmatch(host):
        host = head.fields["host"] = head.host          # RFC 9112 section 3.2.2: an absolute target goes before it
    match = _HOST.fullmatch(host)
    if not match or host and not match.group(1):        # RFC 9110 section 4.2.1: an http URI has a host
        raise Malformed(400, "The Host header is not valid")
    head.host = match.group(1).lower()


class ChunkedBody:
    """Decoder of a chunked body (RFC 9112 section 7.1): feed() bytes until `rest` is not None: it is what follows."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._buffer = bytearray()
        self._awaited = 0               # bytes of the current chunk with its CR LF; 0: a line is next
        self._in_trailer = False
        self._trailer = 0
        self.body = bytearray()
        self.rest: Optional[bytes] = None

    def feed(self, data: bytes) -> None:
        """Take more bytes. Raises Malformed (400, 413, 431)."""
        buffer, at = self._buffer, 0
        buffer += data
        while self.rest is None:
            if self._awaited:
                end = at + self._awaited
                if len(buffer) < end:
                    break
                if buffer[end - 2:end] != b"\r\n":
                    raise Malformed(400, "A chunk of the body does not end with CR LF")
                self.body += buffer[at:end - 2]
                at, self._awaited = end, 0
                continue
            end = buffer.find(b"\r\n", at, at + LONGEST_CHUNK_LINE + 2)
            if end < 0:
                if len(buffer) - at > LONGEST_CHUNK_LINE + 1 or b"\n" in buffer[at:]:      # its LF may be still to come
                    raise Malformed(400, "A line of the chunked body is too long or does not end with CR LF")
                break
            line, at = bytes(buffer[at:end]), end + 2
            if self._in_trailer:
                if not self._trailer_line(line):
                    self.rest = bytes(buffer[at:])
            else:
                self._size_line(line)
        del buffer[:at]

    def _size_line(self, line: bytes) -> None:
        match = _CHUNK_SIZE.fullmatch(line)
        if not match:
            raise Malformed(400, "A chunk size of the body is not well-formed")
        size = int(match.group(1), 16)
        if len(self.body) + size > self._limits.body:
            raise Malformed(413, f"The body is longer than {self._limits.body} bytes")
        self._in_trailer = not size
        if size:
            self._awaited = size + 2

    def _trailer_line(self, line: bytes) -> bool:
        """Check one line; False for the empty one that ends the body. Trailers are not used for anything."""
        self._trailer += len(line) + 2
        if self._trailer > self._limits.header_bytes:
            raise Malformed(431, "The trailer section is too long")
        if line and not _TRAILER_LINE.fullmatch(line):
            raise Malformed(400, "A trailer line is not 'name: value'")
        return bool(line)


def parse_query(query: str, known: Iterable) -> dict:
    """Parameters of a query string, each at most once. Raises Refusal that names the wrong one."""
    values: dict = {}
    for pair in filter(None, query.split("&")):
        name, _, value = pair.partition("=")
        try:
            name, value = (unquote_to_bytes(part.replace("+", " ")).decode() for part in (name, value))
        except UnicodeDecodeError:
            raise Refusal(400, "The query is not UTF-8") from None
        if name not in known:
            raise Refusal(400, f"Unknown filter {{}}; known are {', '.join(known)}", name)
        if name in values:
            raise Refusal(400, f"Filter {name} is given twice")
        if not value or "\0" in value:
            raise Refusal(400, f"Filter {name} must not be empty or hold U+0000")
        values[name] = value
    return values


def wanted_type(accept: str, offered: Iterable) -> Optional[str]:
    """The offered media type that an Accept header likes best (RFC 9110 section 12.5.1); None if it takes none."""
    weights: dict = {}
    for part in (accept or "*/*").lower().split(","):
        pattern, *parameters = (piece.strip() for piece in part.split(";"))
        weight = next((p[2:] for p in parameters if p.startswith("q=")), "1")
        weights.setdefault(pattern, float(weight) if _WEIGHT.fullmatch(weight) else 0.0)
    best, best_rank = None, (0.0, 0)
    for media_type in offered:
        patterns = ("*/*", media_type.partition("/")[0] + "/*", media_type)
        closeness = max((at for at, pattern in enumerate(patterns) if pattern in weights), default=0)
        rank = (weights.get(patterns[closeness], 0.0), closeness)
        if rank[0] and rank > best_rank:                # the closest pattern decides, also where it says no
            best, best_rank = media_type, rank
    return best


class Response:
    """An answer: status, body (bytes, or an iterator of bytes that is streamed) and what the log notes of it."""
    __slots__ = ("status", "body", "content_type", "fields", "note", "event_id", "close", "level")

    def __init__(self, status: int, body: Any, content_type: str = "application/json", fields: Optional[dict] = None,
                 note: str = "ok", event_id: Optional[int] = None, close: bool = False) -> None:
        self.status, self.body, self.content_type, self.fields = status, body, content_type, fields or {}
        self.note, self.event_id, self.close = note, event_id, close
        self.level = level_of(status)

    @property
    def streamed(self) -> bool:
        """Whether the body is made while it is sent."""
        return not isinstance(self.body, bytes)


def level_of(status: int) -> str:
    """How loud the log is about an answer: what is ours to mend is an ERROR."""
    if status < 400:
        return "INFO"
    return "ERROR" if status in (500, 503) else "WARNING"          # a 501 or 505 is the sender's fault


def json_response(document: dict, status: int = 200, **parts: Any) -> Response:
    """A Response with `document` as its JSON body; `parts` as Response has them."""
    return Response(status, json.dumps(document, allow_nan=False).encode(), **parts)


def encode(response: Response, head: Head, request_id: str, date: str, fields: dict, close: bool) -> bytes:
    """The bytes of an answer to the request with `head`, its body included unless that is streamed or not wanted."""
    lines = [f"HTTP/1.1 {response.status} {REASONS[response.status]}", "Server: webhook-server", f"Date: {date}"]
    if response.status != 204:
        lines.append(f"Content-Type: {response.content_type}")
        if not response.streamed:
            lines.append(f"Content-Length: {len(response.body)}")
        elif head.http11:
            lines.append("Transfer-Encoding: chunked")
    lines += [f"X-Request-ID: {request_id}", "X-Content-Type-Options: nosniff", "Cache-Control: no-store"]
    lines += [f"{name}: {value}" for name, value in {**response.fields, **fields}.items()]
    if close:
        lines.append("Connection: close")
    elif not head.http11:
        lines.append("Connection: keep-alive")
    data = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")
    if response.streamed or head.method == "HEAD":
        return data
    return data + response.body


def http_date(seconds: int) -> str:
    """Seconds since 1970 as a Date header (RFC 9110 section 5.6.7)."""
    return email.utils.formatdate(seconds, usegmt=True)


class RequestIds:
    """Ids of requests: UTC with microseconds, strictly increasing, so unique and sortable within a process."""

    def __init__(self, now: Callable[[], int] = time.time_ns) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._last = 0
        self._second = -1000000         # where the current second starts, in microseconds
        self._prefix = ""

    def next(self) -> tuple:
        """(id, time of receipt), such as 2025-01-10T14:23:15.123456 and the same with Z.

        The id runs ahead of the time where the clock was set back: it has to be sortable, and the time to be true. Hot
        path: the text of the current second is kept (0.5 against 1.1 us).
        """
        now = self._now() // 1000
        with self._lock:
            number = self._last = max(now, self._last + 1)
            micros = number - self._second
            if micros >= 1000000:
                micros = number % 1000000
                self._second = number - micros
                self._prefix = utc_seconds(number // 1000000)
            text = f"{self._prefix}.{micros:06d}"
        if number - now < 1000000:
            return text, text + "Z"
        return text, f"{utc_seconds(now // 1000000)}.{now % 1000000:06d}Z"


def utc_seconds(seconds: int) -> str:
    """Seconds since 1970 as 2025-01-10T14:23:15."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


# =============================================================================
# Endpoints: what each route answers, and by which rules a request reaches it. Knows no socket.
# =============================================================================

LOOPBACK = re.compile(r"localhost|.*\.localhost|127\.[0-9.]+|\[?::1\]?", re.IGNORECASE)
MEDIA_TYPES = {"application/json": "application/json", "application/x-ndjson": "application/x-ndjson",
               "application/ndjson": "application/x-ndjson", "application/jsonl": "application/x-ndjson",
               "text/csv": "text/csv; charset=utf-8"}
# Bytes of a body that is read and checked beside others. A larger one waits for its turn in its connection's own thread:
# a megabyte takes 50 ms to check
ORDINARY_BODY = 8192
PAGE_BYTES = 1024 * 1024        # size at which a page of JSON ends, whatever its limit
PAGE_SECONDS = 2.0              # time after which it ends: `next` goes on where it looked last
READ_SECONDS = 3600.0           # time that a stream may take
DEFAULT_LIMIT, MAX_LIMIT = 100, 1000
HEADS_KEPT, HEAD_KEPT_BYTES = 1024, 2048
HEALTH_SECONDS = 0.04           # how long /health waits for its checks, then it tells what was found last


class Parameter(NamedTuple):
    """A parameter of a query: parse(text) raises ValueError that says what it must be."""
    parse: Callable[[str], Any]
    description: str


def _instant(text: str) -> str:
    # "+02:00" not percent-encoded arrives as " 02:00"; a space cannot stand there otherwise
    text = re.sub(r"\A([0-9W-]{7,10}[Tt ][0-9:.,]{2,18}) ([0-9]{2}:?[0-9]{2})\Z", r"\1+\2", text)
    try:
        return canonical_timestamp(text)
    except ValueError:
        raise ValueError("must be an ISO 8601 date-time, for example 2025-01-10T14:00:00Z") from None


PARAMETERS = {
    "appointment_id": Parameter(str, "events of this appointment"),
    "patient_id": Parameter(str, "events of this patient"),
    "event_type": Parameter(str, "events of this type"),
    "since": Parameter(_instant, "appointments at this time or later"),
    "until": Parameter(_instant, "appointments before this time"),
    "after": Parameter(_whole(0, 2 ** 63 - 1), "events with a higher id: where the last page ended"),
    "limit": Parameter(_whole(1), "how many events at most"),
}


class Request(Submission):
    """One request that has been read: by which ruling, its body, who sent it and when.

    An endpoint that takes an event leaves it in `event`; it is answered by answer_to_event() once it is on disk.
    `payload` is what the log shows of a body whose event was refused.
    """
    __slots__ = ("ruling", "body", "id", "received_at", "started", "address", "connection", "payload", "digest")

    def __init__(self, ruling: Ruling, body: bytes, ids: tuple, connection: Any) -> None:
        self.ruling, self.body, self.connection = ruling, body, connection
        self.id, self.received_at = ids
        self.address = connection.address
        self.started = self.arrived = time.monotonic()
        self.event = self.digest = None
        self.payload = ""

    @property
    def lane(self) -> Any:
        """Outcomes for one connection come in order."""
        return self.connection

    def done(self, outcome: Outcome) -> None:
        """Have the connection answer: called by whoever committed the event."""
        self.connection.deliver(self, outcome)


class Endpoints:
    """The endpoints, and what every answer shares. An endpoint takes a Request and gives a Response, or None when it
    has left an event in the request. `rules` may be exchanged at any time; `checks` are those of /health."""

    def __init__(self, config: Config, store: Store, log: Log, checks: dict) -> None:
        self.rules: Rules = None
        self.store, self.log, self.checks = store, log, checks
        self.ids, self._date = RequestIds(), PerSecond(http_date)
        self._identical_is_fine = config.duplicates == "ok"
        # Held by the one thread that works on a large body or a read: each more would have everybody wait longer for the
        # interpreter's lock (120 bodies of 1 MiB: a good sender's P99 was 550 ms, and is 100)
        self.heavy = Turns()
        self._stored = self._stored_template()

    # -- taking events

    def receive_event(self, request: Request) -> None:
        """POST /webhook/appointments."""
        if len(request.body) <= ORDINARY_BODY:
            self._read_event(request)
            return
        with self.heavy:                                # with the digest, so that the writer need not look into it
            self._read_event(request)
            request.digest = content_digest(request.event.payload)

    def _read_event(self, request: Request) -> None:
        rules = self.rules
        try:
            value, text = parse_json(request.body)
            request.body = b""                          # its text is in the event: a megabyte need not be kept twice
            request.event = rules.contract.event(value, text, request.received_at, request.address)
        except JSONError as error:
            request.payload = rules.redactor.unreadable(request.body)
            raise Refusal(400, str(error), errors=[{"path": "", "rule": "json", "message": str(error)}]) from None
        except InvalidEvent as error:
            request.payload = rules.redactor.invalid(value, error.problems)
            raise Refusal(400, str(error), note=error.for_log,
                          errors=[problem._asdict() for problem in error.problems]) from None

    def answer_to_event(self, request: Request, outcome: Outcome) -> Response:
        """The answer to an event after its commit, or after what went wrong."""
        stored_id = outcome.event_id
        if outcome.kind == "stored":
            return stored_response(request.id, stored_id)
        if outcome.kind != "duplicate":
            try:
                raise outcome.error
            except Exception as error:
                return self.failed(request, error)
        if outcome.identical and self._identical_is_fine:
            response = json_response({"status": "duplicate", "message": "Event was already stored",
                                      "request_id": request.id, "event_id": stored_id}, note="duplicate",
                                     event_id=stored_id)
            response.level = "WARNING"
            return response
        message = "Duplicate event: this appointment_id and timestamp are already stored"
        if not outcome.identical:
            message += ", with other content; this one was kept separately"
        return self.refused(request, Refusal(409, message, event_id=stored_id, identical=outcome.identical))

    # -- reading events

    def show_event(self, request: Request, event_id: int) -> Response:
        """GET /webhook/appointments/{event_id}."""
        event = self.store.event(event_id)
        if event is None:
            raise Refusal(404, "There is no event with this id")
        return Response(200, event_text(event).encode(), note="read", event_id=event_id)

    def list_events(self, request: Request) -> Response:
        """GET /webhook/appointments: a page of JSON, or all as NDJSON or CSV."""
        head = request.ruling.head
        given = parse_query(head.query, PARAMETERS)
        media_type = wanted_type(head.get("accept"), MEDIA_TYPES)
        if media_type is None:
            raise Refusal(406, f"Events come as {', '.join(MEDIA_TYPES)}")
        values = self._values(given)
        wanted = Filter(*map(values.get, Filter._fields))
        after, limit = values.get("after", 0), values.get("limit")
        if media_type == "application/json":
            if limit is not None and limit > MAX_LIMIT:
                raise Refusal(400, f"Filter limit must be a whole number from 1 to {MAX_LIMIT}")
            pieces = self._page(wanted, after, limit or DEFAULT_LIMIT, given)
        elif media_type == "text/csv":
            pieces = self._stream(wanted, after, limit, csv_lines, csv_lines([("id",) + COLUMNS]))
        else:
            pieces = self._stream(wanted, after, limit, event_lines, b"")
        return self._as_it_comes(self._in_turns(pieces), MEDIA_TYPES[media_type])

    def _values(self, given: dict) -> dict:
        values = {}
        for name, text in given.items():
            try:
                values[name] = PARAMETERS[name].parse(text)
            except ValueError as error:
                raise Refusal(400, f"Filter {name} {error}") from None
        types = self.rules.contract.event_types
        if types and values.get("event_type", types[0]) not in types:
            raise Refusal(400, f"Filter event_type must be one of: {', '.join(map(str, types))}")
        return values

    def _page(self, wanted: Filter, after: int, limit: int, given: dict) -> Iterator[bytes]:
        """A page of JSON in pieces: `limit` events, or fewer where they are large or take long to find."""
        ends_at, count, size, following = time.monotonic() + PAGE_SECONDS, 0, 0, None
        text = '{"events": ['
        for events, looked_at in self.store.steps(wanted, after):
            for event in events:
                if count == limit or size >= PAGE_BYTES:
                    following = after
                    break
                line = event_text(event)
                text += f", {line}" if count else line
                count, size, after = count + 1, size + len(line), event.id
            if following is None and time.monotonic() > ends_at:
                following = looked_at
            if following is not None:
                following = "/webhook/appointments?" + urlencode({**given, "after": following})
                break
            if text:
                yield text.encode()
            text = ""
        yield f'{text}], "next": {json.dumps(following)}}}'.encode()

    def _stream(self, wanted: Filter, after: int, limit: Optional[int], lines: Callable, first: bytes) -> Iterator[bytes]:
        """All events that are stored by now, in pieces."""
        ends_at, left = time.monotonic() + READ_SECONDS, limit or sys.maxsize
        if first:
            yield first
        for events, _ in self.store.steps(wanted, after, self.store.last_id()):
            events = events[:left]
            left -= len(events)
            if events:
                yield lines(events)
            if not left:
                return
            if time.monotonic() > ends_at:
                raise StoreUnavailable(f"it took longer than {READ_SECONDS:g} seconds; go on with after=")

    def _in_turns(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """The pieces, each made while no other is; nobody's turn lasts until a reader has taken its piece."""
        while True:
            with self.heavy:
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece

    @staticmethod
    def _as_it_comes(pieces: Iterator[bytes], content_type: str) -> Response:
        """A Response of pieces: with its length where there is only one."""
        first, second = next(pieces, b""), next(pieces, None)
        if second is None:
            return Response(200, first, content_type, note="read")
        return Response(200, itertools.chain((first, second), pieces), content_type, note="read")

    # -- the rest

    def live(self, request: Request) -> Response:
        """GET /health/live."""
        return json_response({"status": "ok", "checks": {}})

    def ready(self, request: Request) -> Response:
        """GET /health/ready: whatever is needed to take events."""
        return self._health({name: check for name, check in self.checks.items() if name in NEEDED})

    def health(self, request: Request) -> Response:
        """GET /health."""
        return self._health(self.checks)

    def _health(self, checks: dict) -> Response:
        ends_at, found = time.monotonic() + HEALTH_SECONDS, {}
        for check in checks.values():                   # all begin before the first is waited for
            check(0.0)
        for name, check in checks.items():
            found[name] = check(max(0.0, ends_at - time.monotonic()))
        if all(one["status"] == "ok" for one in found.values()):
            return json_response({"status": "ok", "checks": found})
        return json_response({"status": "failing", "checks": found}, 503, fields=RETRY_AFTER, note="failing")

    def show_schema(self, request: Request) -> Response:
        """GET /schema.json."""
        return Response(200, self.rules.schema_text, "application/schema+json")

    def options(self, request: Request) -> Response:
        """OPTIONS: what a path takes; the answer to a preflight of an allowed origin."""
        ruling = request.ruling
        allow = allowed_methods(ROUTES if ruling.head.target == "*" else [route for route, _ in routes_at(ruling.head.path)])
        fields = {"Allow": allow}
        if ruling.answer_fields:
            fields.update({"Access-Control-Allow-Methods": allow, "Access-Control-Allow-Headers": "Content-Type",
                           "Access-Control-Max-Age": "600"})
        return Response(204, b"", fields=fields)

    # -- what every answer shares

    def date(self) -> str:
        """The Date header of now."""
        return self._date.text(int(time.time()))

    def encoded(self, request: Request, response: Response, close: bool) -> bytes:
        """The bytes of an answer, without a body that is streamed."""
        ruling = request.ruling
        return encode(response, ruling.head, request.id, self.date(), ruling.answer_fields, close)

    def stored(self, request: Request, event_id: int) -> bytes:
        """The bytes of the answer to an ordinary event that is stored. Hot path: a template (1 against 9 us)."""
        number = str(event_id)
        text, length = self._stored
        return (text % (self.date(), length + len(number), request.id, request.id, number)).encode()

    def _stored_template(self) -> tuple:
        """(answer to a stored event with holes for date, length, request id twice and event id; length without the id)."""
        response = stored_response("@id" + " " * 23, "@number")         # an id has 26 characters
        text = encode(response, Head(), "@id", "@date", {}, False).decode().replace("%", "%%")
        length = len(response.body)
        for hole, kind in ((f"Length: {length}", "Length: %d"), ('"@number"', "%s"), ("@id" + " " * 23, "%s"),
                           ("@id", "%s"), ("@date", "%s")):
            text = text.replace(hole, kind)
        return text, length - len('"@number"')

    def refused(self, request: Request, refusal: Refusal) -> Response:
        """The answer to a Refusal."""
        response = json_response({"error": REASONS[refusal.status], "message": refusal.message, "request_id": request.id,
                                  **refusal.members}, refusal.status, fields=refusal.fields, note=refusal.note,
                                 event_id=refusal.members.get("event_id"), close=refusal.close)
        if isinstance(refusal, Busy):
            response.level = "WARNING"
        return response

    def failed(self, request: Request, error: Exception) -> Response:
        """The answer to an exception: a Refusal as it says, 503 when the store cannot work now, else a bug and a 500."""
        if isinstance(error, Refusal):
            return self.refused(request, error)
        if isinstance(error, StoreUnavailable):
            return self.refused(request, Refusal(503, f"Nothing can be stored or read now: {error}; try again",
                                                 fields=RETRY_AFTER))
        self.log.exception("Unexpected error", request.id)
        return self.refused(request, Refusal(500, "Unexpected error; see the log entry with this request id", close=True))

    def note(self, request: Request, status: int, level: str, note: str, event_id: Optional[int]) -> None:
        """The one place where a request ends: log it. Hot path: a plain tuple, 0.5 us less than a RequestRecord."""
        ruling, event = request.ruling, request.event
        payload = request.payload
        if event is not None:
            payload = self.rules.redactor.event(event)
        self.log.request((level, time.time(), request.id, ruling.method, ruling.pattern, status, note, event_id,
                          time.monotonic() - request.started, request.address, payload))


NEEDED = ("database", "disk", "service")        # the checks of /health/ready


def stored_response(request_id: str, event_id: Any) -> Response:
    """The answer to an event that is stored."""
    return json_response({"status": "success", "message": "Event received and stored", "request_id": request_id,
                          "event_id": event_id}, note="stored", event_id=event_id)


def event_text(event: AppointmentEvent) -> str:
    """An event as one line of JSON: the columns as members, the payload as it came.

    What other hands have put into the table, and is not what we put there, still comes out as RFC 8259.
    """
    columns = {"id": event.id, **event._asdict()}
    payload = columns.pop("payload")
    try:
        parse_json(payload.encode())
    except (ValueError, AttributeError):
        payload = json.dumps(payload, default=_text_of_bytes)
    # Raw line breaks in JSON are white space between tokens, never part of a string
    payload = payload.replace("\n", " ").replace("\r", " ")
    line = json.dumps(columns, ensure_ascii=False, default=_text_of_bytes)
    return f'{line[:-1]}, "payload": {payload}}}'


def _text_of_bytes(value: bytes) -> str:
    return value.decode("utf-8", "replace")


def event_lines(events: list) -> bytes:
    """Events as NDJSON."""
    return "".join(event_text(event) + "\n" for event in events).encode()


def csv_cell(value: Any) -> Any:
    """A cell that no spreadsheet runs as a formula (OWASP, CSV injection): such text gets an apostrophe in front."""
    if isinstance(value, str) and value.startswith(tuple("=+-@\t\r\n＝＋－＠")):
        return "'" + value
    return value


def csv_lines(rows: Iterable) -> bytes:
    """RFC 4180 text of rows: events, whose id comes first, or tuples as they are."""
    text = io.StringIO()
    writer = csv.writer(text)
    for row in rows:
        if isinstance(row, AppointmentEvent):
            row = (row.id,) + row[:-1]
        writer.writerow(map(csv_cell, row))
    return text.getvalue().encode()


class Route(NamedTuple):
    """A row of the table of routes; {event_id} in a path stands for a number, given to the endpoint. `reads`: it reads
    events, of which only few are under way at once."""
    method: str
    path: str
    endpoint: str
    summary: str
    reads: bool = False


ROUTES = (
    Route("POST", "/webhook/appointments", "receive_event", "take one event"),
    Route("GET", "/webhook/appointments", "list_events", "stored events", True),
    Route("GET", "/webhook/appointments/{event_id}", "show_event", "one stored event", True),
    Route("GET", "/health", "health", "all that is checked: database, disk, on_event"),
    Route("GET", "/health/live", "live", "the process answers"),
    Route("GET", "/health/ready", "ready", "events can be taken"),
    Route("GET", "/schema.json", "show_schema", "what an event looks like"),
)
OPTIONS = Route("OPTIONS", "*", "options", "what a path takes")
UNMATCHED = Route("-", "-", "", "what no route is for")


def match_route(method: str, path: str) -> tuple:
    """(Route, arguments) of a request, HEAD as GET. Raises Refusal (400, 404, 405 with Allow)."""
    found = routes_at(path)
    for route, arguments in found:
        if route.method == method or route.method == "GET" and method == "HEAD":
            return route, arguments
    allow = allowed_methods([route for route, _ in found])
    raise Refusal(405, f"This path takes {allow}", fields={"Allow": allow})


def routes_at(path: str) -> list:
    """[(Route, arguments)] of a path, each segment of it decoded once. Raises Refusal (400, 404)."""
    found = [(route, ()) for route in ROUTES if route.path == path]
    if not found:
        try:
            segments = [unquote_to_bytes(segment).decode() for segment in path.split("/")]
        except UnicodeDecodeError:
            raise Refusal(400, "The path is not UTF-8") from None
        matches = [(route, _arguments(route.path.split("/"), segments)) for route in ROUTES]
        found = [(route, arguments) for route, arguments in matches if arguments is not None]
    if not found:
        raise Refusal(404, "There is nothing at this path")
    return found


def _arguments(pattern: list, segments: list) -> Optional[tuple]:
    """What stands in the holes of a route's path; None where it is another path."""
    if len(pattern) != len(segments):
        return None
    arguments = []
    for expected, segment in zip(pattern, segments):
        if expected[:1] == "{":
            if not re.fullmatch("[0-9]{1,18}", segment, re.ASCII):
                return None
            arguments.append(int(segment))
        elif expected != segment:
            return None
    return tuple(arguments)


def allowed_methods(routes: Iterable) -> str:
    """The Allow field for routes."""
    methods = {route.method for route in routes} | {"OPTIONS"}
    if "GET" in methods:
        methods.add("HEAD")
    return ", ".join(sorted(methods))


class Ruling:
    """What we do with every request that has one head: its route and endpoint, or its refusal.

    A ruling follows from the bytes of the head and the Rules alone, since equal bytes from elsewhere get the same one.
    `ordinary`: a small event on a connection that stays open, which the poller may take. `method` and `pattern` are
    what the log says of the request: never what was sent.
    """
    __slots__ = ("head", "route", "endpoint", "arguments", "refusal", "answer_fields", "ordinary", "method", "pattern")

    def __init__(self, head: Head) -> None:
        self.head, self.route, self.arguments, self.answer_fields = head, UNMATCHED, (), {}
        self.endpoint: Optional[Callable] = None
        self.refusal: Optional[Refusal] = None
        self.ordinary = False
        self.method = self.pattern = "-"


class Rules:
    """All that an operator may change while we run: the contract, who may reach us under which name. Made as a whole,
    and exchanged as a whole."""

    def __init__(self, config: Config, contract: Contract, schema_text: bytes, redactor: Redactor,
                 endpoints: Endpoints, loopback: bool) -> None:
        """`loopback`: only this machine can reach us."""
        self.contract, self.schema_text, self.redactor = contract, schema_text, redactor
        self.limits = Limits(config.max_request_line, config.max_header_bytes, config.max_header_fields, config.max_body)
        self._config, self._endpoints, self._loopback = config, endpoints, loopback
        self._kept: dict = {}
        self._met: set = set()          # hashes of heads that came once
        self._lock = threading.Lock()

    def ruling(self, data: bytes) -> Ruling:
        """The Ruling of a complete head. Never raises.

        Hot path: a sender writes the same head again and again, so equal bytes are judged once (0.1 against 11 us). One
        that came only once is not kept: signed heads never come again, and would drive out those that do.
        """
        ruling = self._kept.get(data)
        if ruling is None:
            ruling = self._judge(data)
            if len(data) <= HEAD_KEPT_BYTES:
                self._keep(data, ruling)
        return ruling

    def _keep(self, data: bytes, ruling: Ruling) -> None:
        number = hash(data)
        with self._lock:
            if number in self._met:
                if len(self._kept) >= HEADS_KEPT:
                    del self._kept[next(iter(self._kept))]
                self._kept[data] = ruling
            elif len(self._met) >= 4 * HEADS_KEPT:
                self._met.clear()
            self._met.add(number)

    def _judge(self, data: bytes) -> Ruling:
        head = Head()
        ruling = Ruling(head)
        try:
            find_head(data, self.limits)
            parse_head(data, head, self.limits)
            self._decide(ruling)
        except Refusal as refusal:
            if head.chunked or head.length:             # the body stays unread
                refusal.close = True
            ruling.refusal = refusal.with_traceback(None)
        if head.method in METHODS:
            ruling.method = head.method
        with contextlib.suppress(Refusal):
            ruling.pattern = routes_at(head.path)[0][0].path
        return ruling

    def _decide(self, ruling: Ruling) -> None:
        """Find what the head alone decides. Raises Refusal."""
        head = ruling.head
        self._check_site(ruling)
        if head.method == "OPTIONS":
            ruling.route = OPTIONS
        else:
            ruling.route, ruling.arguments = match_route(head.method, head.path)
        ruling.endpoint = getattr(self._endpoints, ruling.route.endpoint)
        if head.method == "POST" and head.length is None and not head.chunked:
            # A sender who forgot the length may send a body all the same: it must not pass for a request
            raise Malformed(411, "Content-Length is missing")
        if head.get("content-encoding", "identity").lower() != "identity":
            raise Refusal(415, "The body must not be compressed", fields={"Accept-Encoding": "identity"})
        ruling.ordinary = (ruling.route.endpoint == "receive_event" and head.length is not None and
                           head.length <= ORDINARY_BODY and head.keep_alive and head.http11 and not ruling.answer_fields)

    def _check_site(self, ruling: Ruling) -> None:
        """Refuse pages of other sites (Origin, Fetch Metadata), and names that an attacker points at this machine."""
        head, host = ruling.head, ruling.head.host
        if host and not self._is_ours(host):
            raise Refusal(403, "The Host {} is not served here; --allowed-host adds one", host)
        origin = head.get("origin").lower()
        if origin and origin in self._config.allowed_origin:
            ruling.answer_fields = {"Access-Control-Allow-Origin": head.get("origin"), "Vary": "Origin",
                                    "Access-Control-Expose-Headers": "X-Request-ID"}
            return
        # An opaque origin, "null", belongs to no site, so also not to a request without Host
        if origin and origin.partition("://")[1:] != ("://", head.get("host").lower()):
            raise Refusal(403, "Requests from pages of other sites, here {}, are refused; --allowed-origin adds a site",
                          origin)
        if head.get("sec-fetch-site", "none").lower() not in ("none", "same-origin"):
            raise Refusal(403, "Requests from pages of other sites are refused; --allowed-origin adds a site")

    def _is_ours(self, host: str) -> bool:
        """Whether we answer to this name. A literal address cannot be pointed elsewhere; a name can."""
        config = self._config
        if LOOPBACK.fullmatch(host) or host == config.host.lower() or host in config.allowed_host:
            return True
        return is_address(host.strip("[]")) or not (self._loopback or config.allowed_host)


def is_address(text: str) -> bool:
    """Whether `text` is an IP address and no name."""
    try:
        ipaddress.ip_address(text)
        return True
    except ValueError:
        return False


NO_RULING = Ruling(Head())      # of a request whose head could not be read


# =============================================================================
# Connections: sockets and threads: the poller that leads, connection threads, limits. Knows no route and no SQL.
# =============================================================================

# What each thread may do to the socket of a connection:
#
#     thread        reads         sends                                    shuts down          closes
#     accept        -             a 503, to one too many                   that one            that one
#     connection    when awake    when nothing is owed                     to linger           at its end
#     poller        when parked   answers to what it has committed         -                   -
#     writer        -             answers to what it has committed         -                   -
#     late          -             what did not fit into the socket         -                   -
#     clock         -             -                                        what took too long  -
#     stop()        -             -                                        what is idle        -
#
# A connection is in one phase at a time, and a phase has its time limit:
#
#     CONNECTED  no byte has come               header_timeout    IDLE    parked, between requests     idle_timeout
#     HEAD       half a head has come           header_timeout    SEND    the peer takes an answer     body_timeout
#     BODY       half a body has come           body_timeout      LINGER  refused, may finish sending  LINGER_SECONDS
#     WORK       checking, storing, reading     none: that is our own affair
#
# What must hold, whoever does what:
#
# 1. One thread at a time reads a connection: its own, or while that is parked the poller. Handing over is one release of
#    a lock; there is no moment at which both may read.
# 2. Answers leave in the order of their requests. A submitted event is answered by whoever commits it; its outbox counts
#    how many are owed. The own thread sends only when none is (Outbox.settle), and the poller commits or refuses only
#    events of connections that owe nothing else: all others queue behind what is owed.
# 3. Only the own thread closes a socket, when nothing is owed any more, as the number of a closed one is given away anew.

# Windows has no non-blocking send on a blocking socket: there each connection's thread waits for its own answers
SENDS_AT_ONCE = hasattr(socket, "MSG_DONTWAIT")
SEND_AT_ONCE = getattr(socket, "MSG_DONTWAIT", 0) | getattr(socket, "MSG_NOSIGNAL", 0)
PIECE = 65536           # bytes of one recv, and of one piece of an answer: what a socket takes at once
LOOK = 256              # connections that the poller reads before it commits: the first of them waits for the last
MAX_PIPELINED = 32      # answers of one connection that may be outstanding before it is read on
READS = 32              # reads of events under way at once; half of them from one address
LARGE_BYTES = 32 * 1024 * 1024          # bytes of large bodies in memory at once; half of them from one address
DRAIN_GRACE = 0.01      # seconds that a new connection has for its first bytes while the service stops
LINGER_SECONDS = 2.0    # how long a refused sender may go on sending before we close, so that it can read our answer
LINGER_BYTES = 16 * 1024 * 1024
REAP_SECONDS = 0.25     # between looks at the connections' times
REFUSED_KEPT = 128      # refused connections that may read their 503 at leisure
TELL_WAITING = 1.0      # seconds after which a stop says for whom it waits


class Phase:
    """What a connection waits for; most have a time limit, watched by the clock."""
    CONNECTED, IDLE, HEAD, BODY, WORK, SEND, LINGER = range(7)
    DOING = ("connected", "idle", "sending a head", "sending a body", "being served", "taking an answer", "refused")


class Budget:
    """How much of something may be in use at once: `most` in all, and half of it for one address."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._used = 0
        self._by_address: dict = {}
        self._lock = threading.Lock()

    def take(self, address: str, amount: int) -> bool:
        """Use `amount` more, or False: it is too much."""
        with self._lock:
            mine = self._by_address.get(address, 0) + amount
            if self._used + amount > self._most or mine > (self._most + 1) // 2:
                return False
            self._used += amount
            self._by_address[address] = mine
            return True

    def give(self, address: str, amount: int) -> None:
        """Use `amount` less."""
        with self._lock:
            self._used -= amount
            self._by_address[address] -= amount
            if not self._by_address[address]:
                del self._by_address[address]


class Outbox:
    """What one connection owes its sender, in order. `owed` answers are still to be made by who commits their events.

    The reading thread counts up `promised`, and who commits counts up `sent`: each is written by one thread at a time.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.promised = self.sent = 0
        self._settled: Optional[threading.Lock] = None  # held until nothing is owed, for a thread that waits for that
        self._late: Optional[bytearray] = None          # what did not fit into the socket's buffer
        self._late_lock = threading.Lock()
        self._late_thread: Optional[threading.Thread] = None
        self._late_since = 0.0                          # when its current piece began to be sent

    @property
    def is_full(self) -> bool:
        """Whether so much is outstanding that nothing more is read before it is sent."""
        return self.promised - self.sent > MAX_PIPELINED or self._late_thread is not None

    def is_stuck(self, now: float, seconds: float) -> bool:
        """Whether the peer has taken nothing of a late answer for `seconds`."""
        return 0.0 < self._late_since < now - seconds

    def send(self, data: bytes) -> None:
        """Called by who commits: send a promised answer without blocking; a thread of its own sends what does not fit."""
        if self._late is None:
            try:
                sent = self._connection.socket.send(data, SEND_AT_ONCE)
            except BlockingIOError:
                sent = 0
            except OSError:                             # gone; its own thread will notice
                sent = len(data)
            data = data[sent:]
        if data:
            self._send_later(data)
        self.sent += 1
        settled = self._settled
        if settled is not None and self.sent == self.promised:
            self._settled = None
            settled.release()

    def settle(self) -> None:
        """Wait until all that is owed was sent. Called by the thread that reads, so nothing more is promised meanwhile."""
        if self.sent != self.promised:
            settled = threading.Lock()
            settled.acquire()
            self._settled = settled
            if self.sent != self.promised:              # looked at after it is set: send() sees it, or we see its count
                settled.acquire()
            self._settled = None
        late = self._late_thread
        if late is not None:
            late.join()
            self._late_thread = None

    def _send_later(self, data: bytes) -> None:
        with self._late_lock:
            if self._late is None:
                thread = threading.Thread(target=self._send_late, name="webhook-late", daemon=True)
                try:
                    thread.start()
                except RuntimeError:                    # the system gives no more threads: no answer, rather than half
                    self._connection.shut_down(reading_only=False)
                    return
                self._late, self._late_thread = bytearray(), thread
            self._late += data

    def _send_late(self) -> None:
        while True:
            with self._late_lock:
                data = bytes(self._late)
                if not data:
                    self._late = None
                    return
                del self._late[:]
            self._late_since = time.monotonic()
            try:
                self._connection.socket.sendall(data)
            except OSError:
                self._connection.close_connection = True
            self._late_since = 0.0


class Poller:
    """Reads ordinary events of all idle connections, and commits and answers what one look at them has brought.

    Hot path: a thread for each connection has to be woken by the system and then to wait for the interpreter's lock, for
    every request; a thread that only commits has to be woken and waited for, too. This one finds many requests ready at
    each look, and nobody else runs. What is not exactly one whole small event wakes the connection's own thread, which
    may wait for the rest of it; what would keep us waiting, a locked database, the store hands to its own thread.
    """

    def __init__(self, server: Server) -> None:
        self._server, self._endpoints = server, server.endpoints
        self._epoll = select.epoll()
        self._connections: dict = {}    # file descriptor: Connection
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._epoll.register(self._wake_receiver.fileno(), select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, name="webhook-poller", daemon=True)
        self._thread.start()

    def watch(self, connection: Connection) -> None:
        """Read for `connection` until something comes that is for its own thread: then call its hand_over(bytes)."""
        descriptor = connection.socket.fileno()
        self._connections[descriptor] = connection
        self._epoll.register(descriptor, select.EPOLLIN)

    def stop(self) -> None:
        """End the thread. No connection may be watched any more."""
        self._wake_sender.close()
        self._thread.join()
        self._wake_receiver.close()
        self._epoll.close()

    def _run(self) -> None:
        poll, connections, take = self._epoll.poll, self._connections, self._take
        lead, stop = self._endpoints.store.lead, self._wake_receiver.fileno()
        while True:
            group: list = []
            for descriptor, _ in poll(-1, LOOK):
                if descriptor == stop:
                    return
                connection, data = connections[descriptor], b""
                try:
                    data = connection.socket.recv(PIECE, socket.MSG_DONTWAIT)
                    if take(connection, data, group):
                        continue
                except BlockingIOError:
                    continue
                except Exception:       # the end, or a bug: its own thread meets it again and answers
                    pass
                self._epoll.unregister(descriptor)
                del connections[descriptor]
                connection.hand_over(data)
            if group:
                lead(group)

    def _take(self, connection: Connection, data: bytes, group: list) -> bool:
        """Put the one ordinary event in `data` into the group, or refuse it; False when there is anything else in it."""
        endpoints, outbox = self._endpoints, connection.outbox
        end = data.find(b"\r\n\r\n") + 4
        if not 3 < end <= HEAD_KEPT_BYTES:
            return False
        ruling = endpoints.rules.ruling(data[:end])
        if not ruling.ordinary or len(data) - end != ruling.head.length or self._server.draining or outbox.is_full:
            return False
        owes = outbox.promised != outbox.sent
        request = Request(ruling, data[end:], endpoints.ids.next(), connection)
        connection.since = request.started
        try:
            endpoints.receive_event(request)
        except Refusal as refusal:
            if owes:                    # what came before has to be answered before
                return False
            outbox.promised += 1
            connection.answer_at_once(request, endpoints.refused(request, refusal))
            return True
        outbox.promised += 1
        if owes:
            endpoints.store.submit(request)
        else:
            group.append(request)
        return True


class Connection(BaseHTTPRequestHandler):
    """One connection, in a thread of its own: reads requests strictly, has them answered, sends.

    Between requests the thread is parked and the poller reads; it wakes this thread for all but ordinary events.
    """

    def setup(self) -> None:
        """Called once, before handle()."""
        # For the life of the connection
        self.socket = self.request
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.address = self.client_address[0]
        self.endpoints: Endpoints = self.server.endpoints
        self.outbox = Outbox(self)
        self.close_connection = False
        self.timed_out = self.was_cut = False           # set by the clock, or by stop(), which then end our recv
        self._pipelined = False                         # whether requests came before their predecessors were answered
        # For the request that is being read
        self.phase, self.since = Phase.CONNECTED, time.monotonic()
        self._buffer = b""                              # what came behind the last request
        self._held: list = []                           # (budget, amount) that this request uses
        # While the poller reads for us
        self._parked = threading.Lock()
        self._parked.acquire()
        self._handed = b""
        self.server.opened(self)

    def finish(self) -> None:
        """Called once after handle(). Nobody may still want to send when the socket is closed: its number is reused."""
        try:
            self.outbox.settle()
        finally:
            self.server.closed(self)

    def handle(self) -> None:
        """Requests until one side closes."""
        while not self.close_connection:
            self.handle_one_request()

    def handle_one_request(self) -> None:
        """Read one request and have it answered."""
        if self.outbox.is_full:
            self.outbox.settle()
        buffer = self._buffer or self._wait_for_request()
        if not buffer:
            self.close_connection = True
            return
        request = Request(NO_RULING, b"", self.endpoints.ids.next(), self)
        try:
            self._read(request, buffer)
            response = self._serve(request)
        except Exception as error:
            response = self.endpoints.failed(request, error)
        request.body = b""
        if response is not None:
            self._respond(request, response)
        while self._held:
            budget, amount = self._held.pop()
            budget.give(self.address, amount)

    def _serve(self, request: Request) -> Optional[Response]:
        """The answer to a request; None when whoever commits its event will send it. Raises Refusal."""
        ruling = request.ruling
        if ruling.refusal is not None:
            return self.endpoints.refused(request, ruling.refusal)
        direct = ruling.ordinary and SENDS_AT_ONCE and not self.server.draining
        if not direct:
            self.outbox.settle()                        # a pipelined reader sees what was sent before it
        if ruling.route.reads:
            self._hold(self.server.reads, 1, "Too many reads are under way; try again")
        response = ruling.endpoint(request, *ruling.arguments)
        if response is not None:
            return response
        request.arrived = time.monotonic()
        if direct:
            self.outbox.promised += 1
            self.endpoints.store.submit(request)
            return None
        return self.endpoints.answer_to_event(request, self.endpoints.store.add(request.event, request.digest))

    def _hold(self, budget: Budget, amount: int, message: str, close: bool = False) -> None:
        if not budget.take(self.address, amount):
            raise Busy(message, close)
        self._held.append((budget, amount))

    # -- reading

    def _wait_for_request(self) -> bytes:
        if self.phase != Phase.CONNECTED:
            self.phase, self.since = Phase.IDLE, time.monotonic()
        # Looked at after the phase is set, as stop() sets `draining` before it looks at phases: one of us sees the other
        if self.timed_out:
            return b""
        if self.server.draining:                        # what has come already is still answered
            return self._recv_waiting(DRAIN_GRACE)
        if self.phase == Phase.IDLE and self.server.poller is not None:
            self.server.poller.watch(self)
            self._parked.acquire()
            return self._handed
        return self._recv()

    def hand_over(self, data: bytes) -> None:
        """Called by the poller: go on with `data` in our own thread; b"" when the connection has ended."""
        self._handed = data
        self._parked.release()

    def _read(self, request: Request, buffer: bytes) -> None:
        """Read the request that begins with `buffer`, and keep what follows it. Raises Refusal.

        Hot path: head and body are found by position in what one recv gave, and the head is looked up among those seen
        before (against readline and email.parser: +43 %). What came in pieces goes the slow way.
        """
        end = buffer.find(b"\r\n\r\n") + 4
        if end == 3 or buffer[0] == 13:
            buffer, end = self._more_head(buffer)
        request.ruling = ruling = self.endpoints.rules.ruling(buffer[:end])
        head = ruling.head
        if ruling.refusal is not None:
            self._buffer = buffer[end:]
            return
        at = end + (head.length or 0)
        if head.chunked or len(buffer) < at:
            request.body = self._more_body(head, buffer[end:])
        else:
            request.body, self._buffer = buffer[end:at], buffer[at:]
        if self._buffer:
            self._pipelined = True
        self.phase = Phase.WORK

    def _recv(self) -> bytes:
        """What the peer sent, b"" when it ended, broke, or took too long."""
        try:
            return self.socket.recv(PIECE)
        except OSError:
            return b""

    def _recv_in_turn(self) -> bytes:
        """As _recv, for what may be much: a hundred threads that each get a piece now would all want the interpreter."""
        if not SENDS_AT_ONCE:
            return self._recv()
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        poll.poll()
        with self.endpoints.heavy, contextlib.suppress(OSError):
            return self.socket.recv(PIECE, socket.MSG_DONTWAIT)
        return b""

    def _recv_waiting(self, seconds: float) -> bytes:
        """What has come already or comes within `seconds`, b"" when that is nothing."""
        with contextlib.suppress(OSError):
            if SENDS_AT_ONCE:                           # a timeout would also be one for who sends our answers
                poll = select.poll()
                poll.register(self.socket, select.POLLIN)
                poll.poll(seconds * 1000)
                return self.socket.recv(PIECE, socket.MSG_DONTWAIT)
            self.socket.settimeout(seconds or 0.001)
            try:
                return self.socket.recv(PIECE)
            finally:
                self.socket.settimeout(None)
        return b""

    def _more_head(self, buffer: bytes) -> tuple:
        """(bytes, where the head in them ends), reading on as long as it takes. Raises Malformed."""
        if self.phase != Phase.CONNECTED:
            self.since = time.monotonic()
        self.phase = Phase.HEAD
        limits, piece, looked_at = self.endpoints.rules.limits, buffer, 0
        while True:
            if buffer[:2] == b"\r\n":                   # RFC 9112 section 2.2: empty lines before a request
                buffer = buffer[_EMPTY_LINES.match(buffer).end():]
            # Trickled bytes are looked at when a line ends, or it would cost the square of their number
            if b"\n" in piece or not looked_at or len(buffer) - looked_at > 1024:
                looked_at = len(buffer)
                end = find_head(buffer, limits)
                if end >= 0:
                    return buffer, end
            piece = self._recv()
            if not piece:
                raise self._ended("head", self.server.config.header_timeout)
            buffer += piece

    def _more_body(self, head: Head, begun: bytes) -> bytes:
        """The body, of which `begun` has come; keeps what follows it. Raises Refusal."""
        self.phase, self.since = Phase.BODY, time.monotonic()
        if head.expect_continue and not begun:
            self._send(b"HTTP/1.1 100 Continue\r\n\r\n", Phase.BODY)
        if head.chunked:
            decoder = ChunkedBody(self.endpoints.rules.limits)
            decoder.feed(begun)
            while decoder.rest is None:
                decoder.feed(self._recv_body(len(decoder.body)))
            self._buffer = decoder.rest
            return bytes(decoder.body)
        pieces, size = [begun], len(begun)
        while size < head.length:
            pieces.append(self._recv_body(size))
            size += len(pieces[-1])
        body = b"".join(pieces)
        self._buffer = body[head.length:]
        return body[:head.length]

    def _recv_body(self, have: int) -> bytes:
        """More of a body of which we have `have` bytes: a large one is counted as it comes."""
        piece = self._recv_in_turn()
        if not piece:
            raise self._ended("body", self.server.config.body_timeout)
        if have + len(piece) > ORDINARY_BODY:
            self._hold(self.server.large, len(piece), "Too many large bodies are being received; try again", close=True)
        return piece

    def _ended(self, part: str, limit: float) -> Refusal:
        if self.was_cut:
            return Busy("The service is stopping", close=True)
        if self.timed_out:
            return Malformed(408, f"The {part} of the request took longer than {limit:g} seconds")
        return Malformed(400, f"The connection ended before the whole {part} had come")

    # -- answering

    def deliver(self, request: Request, outcome: Outcome) -> None:
        """Called by who has committed an event: send and log its answer. Never blocks on a socket, never raises.

        Hot path: waking 64 threads, each to send its own answer, would halve the rate; the disk would not.
        """
        endpoints = self.endpoints
        try:
            if outcome.kind == "stored":
                self.outbox.send(endpoints.stored(request, outcome.event_id))
                endpoints.note(request, 200, "INFO", "stored", outcome.event_id)
            else:
                self.answer_at_once(request, endpoints.answer_to_event(request, outcome))
        except Exception:                               # the others of the group must have their answers
            endpoints.log.exception("An answer could not be sent", request.id)

    def answer_at_once(self, request: Request, response: Response) -> None:
        """Send and log a promised answer from a thread that must not wait."""
        self.outbox.send(self.endpoints.encoded(request, response, False))
        self.endpoints.note(request, response.status, response.level, response.note, response.event_id)

    def _respond(self, request: Request, response: Response) -> None:
        """Send a Response from this thread, after all answers that are owed."""
        head = request.ruling.head
        close = response.close or not head.keep_alive or self.server.draining or self.timed_out
        if response.streamed and not head.http11:
            close = True                                # HTTP/1.0: the end of the connection ends the body
        note = response.note
        if self._send(self.endpoints.encoded(request, response, close)) and response.streamed:
            note = self._stream(request, response)
            close = close or note != response.note
        self.endpoints.note(request, response.status, response.level, note, response.event_id)
        if close:
            self.close_connection = True
            if response.close or self._pipelined or self._recv_waiting(0):          # more may be on its way
                self._linger()

    def _stream(self, request: Request, response: Response) -> str:
        """Send the pieces of a body as they are made. Returns the note for the log."""
        head = request.ruling.head
        if head.method == "HEAD":
            return response.note
        try:
            for made in response.body:
                for at in range(0, len(made), PIECE):
                    piece = made[at:at + PIECE]
                    if head.http11:
                        piece = b"%x\r\n%b\r\n" % (len(piece), piece)
                    if not self._send(piece):
                        return "cut by the stop" if self.was_cut else "receiver left"
            if head.http11:
                self._send(b"0\r\n\r\n")
        except Exception as error:                      # the status is sent: a missing end tells that it went wrong
            self.endpoints.failed(request, error)
            self.close_connection = True
            return f"broken off: {error}" if isinstance(error, StoreUnavailable) else "broken off"
        return response.note

    def _send(self, data: bytes, phase_after: int = Phase.WORK) -> bool:
        """Send all of `data` after what is owed; False when the peer is gone or does not read."""
        self.outbox.settle()
        self.phase, self.since = Phase.SEND, time.monotonic()
        try:
            self.socket.sendall(data)
        except OSError:
            self.close_connection = True
            return False
        self.phase, self.since = phase_after, time.monotonic()
        return True

    def _linger(self) -> None:
        """Let the peer finish sending (RFC 9112 section 9.6): closing on unread bytes would destroy our answer."""
        self.phase, self.since = Phase.LINGER, time.monotonic()
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
        size = 0
        while size < LINGER_BYTES and not self.timed_out:
            piece = self._recv_in_turn()
            if not piece:
                return
            size += len(piece)

    # -- ending, called on other threads

    def expire(self, now: float, limits: dict) -> None:
        """Called by the clock: end what has waited longer than limits[phase]. Its own thread then answers or closes."""
        phase, deaf = self.phase, self.outbox.is_stuck(now, limits[Phase.SEND])
        if (deaf or phase in limits and now - self.since > limits[phase]) and not self.timed_out:
            self.timed_out = True
            self.shut_down(reading_only=phase != Phase.SEND and not deaf)

    def end_if_idle(self) -> None:
        """Called by a stop: nothing more has to come."""
        if self.phase in (Phase.CONNECTED, Phase.IDLE):
            self.shut_down(reading_only=True)

    def cut(self) -> None:
        """Called by a stop that has waited long enough."""
        self.was_cut = True
        self.shut_down(reading_only=False)

    def shut_down(self, reading_only: bool) -> None:
        """End what the peer sends, and unless `reading_only` what we send."""
        half = socket.SHUT_RDWR
        if reading_only and os.name == "posix":         # Windows does not wake a recv when only reading is shut down
            half = socket.SHUT_RD
        with contextlib.suppress(OSError):
            self.socket.shutdown(half)


class Server(ThreadingHTTPServer):
    """Accepts connections within the limits, watches their times, ends them."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024
    allow_reuse_address = os.name == "posix"            # on Windows it would let two servers share a port
    STACK = 1024 * 1024                                 # bytes: 512 connections must not want 4 GiB; musl's 128 KiB is short
    STACK_LOCK = threading.Lock()

    def __init__(self, config: Config, endpoints: Endpoints) -> None:
        """Bind and listen. Raises SetupError."""
        self.config, self.endpoints = config, endpoints
        self.draining = False
        self.reads, self.large = Budget(READS), Budget(max(LARGE_BYTES, 2 * config.max_body))
        self.poller: Optional[Poller] = None
        self._lock = threading.Lock()
        self._connections: set = set()
        self._count = 0
        self._by_address: dict = {}
        self._refused: deque = deque()                  # (when to close it, socket)
        self._told_full_at = 0.0
        self._accepting = threading.Thread(target=self._accept, name="webhook-accept", daemon=True)
        super().__init__(("", 0), Connection, bind_and_activate=False)
        self.socket.close()                             # made by the base class, for one address
        self.listeners = self._listen()
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self.socket = self.listeners[0]
        self.server_address = self.socket.getsockname()
        host, self.port = self.server_address[:2]
        self.loopback = all(LOOPBACK.fullmatch(one.getsockname()[0]) for one in self.listeners)
        if len(self.listeners) > 1:
            host = config.host
        self.url = f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    # -- listening

    def _listen(self) -> list:
        """A listener for each address of the host, all on one port: localhost is 127.0.0.1 and ::1."""
        config, listeners, port = self.config, [], self.config.port
        try:
            found = socket.getaddrinfo(config.host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            for family, address in dict.fromkeys((one[0], one[4]) for one in found):
                try:
                    listeners.append(self._listener(family, (address[0], port) + address[2:]))
                    port = port or listeners[0].getsockname()[1]
                except OSError as error:
                    # A name may have an address of a family that this machine does not speak
                    if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT) or len(found) == 1:
                        raise
            if not listeners:
                raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
        except (OSError, UnicodeError) as error:
            for listener in listeners:
                listener.close()
            raise SetupError(f"cannot listen on {config.host} port {config.port}: {_why_not_listening(error)}") from None
        return listeners

    def _listener(self, family: int, address: tuple) -> socket.socket:
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            if family == socket.AF_INET6:
                # "::" takes IPv4 too; beside other listeners each takes its own family
                with contextlib.suppress(OSError, AttributeError):
                    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(address[0] != "::"))
            if self.allow_reuse_address:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(self.request_queue_size)
        except OSError:
            listener.close()
            raise
        return listener

    def start(self) -> None:
        """Accept from now on, in threads of our own; expire() has to be called every REAP_SECONDS."""
        if SENDS_AT_ONCE and getattr(select, "epoll", None):            # Linux
            self.poller = Poller(self)
        self._accepting.start()

    # -- accepting

    def _accept(self) -> None:
        with selectors.DefaultSelector() as selector:
            for listener in self.listeners:
                listener.setblocking(False)
                selector.register(listener, selectors.EVENT_READ)
            selector.register(self._wake_receiver, selectors.EVENT_READ)
            while not self.draining:
                for key, _ in selector.select():
                    if key.fileobj is not self._wake_receiver:
                        self._accept_one(key.fileobj)
        for listener in self.listeners:                 # closing the listener would reset what the system has accepted
            while self._accept_one(listener):
                pass
            listener.close()

    def _accept_one(self, listener: socket.socket) -> bool:
        try:
            connection, address = listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self._tell_full(f"cannot accept connections: {error.strerror}; raise the limit of open files (ulimit -n)")
                time.sleep(0.05)                        # the connection stays in the queue; do not spin on it
            return False
        connection.setblocking(True)
        host = address[0]
        if host.startswith("::ffff:"):                  # IPv4 on a listener that takes both
            host = host[7:]
        self.process_request(connection, (host,) + address[1:])
        return True

    def process_request(self, request: socket.socket, client_address: tuple) -> None:
        """Start a thread for a connection, or refuse it when there are too many."""
        config, address, reason = self.config, client_address[0], ""
        with self._lock:
            mine = self._by_address.get(address, 0)
            if self._count >= config.max_connections:
                reason = "There are too many connections"
            elif mine >= config.max_connections_per_address:
                reason = "There are too many connections from your address"
            else:
                self._count += 1
                self._by_address[address] = mine + 1
        if not reason:
            try:
                self._start_thread(request, client_address)
                return
            except RuntimeError:                        # the system gives no more threads
                self._forget(address)
                reason = "There are too many connections"
        self._refuse(request, address, reason)

    def _start_thread(self, request: socket.socket, client_address: tuple) -> None:
        thread = threading.Thread(target=self.process_request_thread, args=(request, client_address), daemon=True)
        with self.STACK_LOCK:                           # the size is the whole process's: for all services in it
            before = threading.stack_size(self.STACK)
            try:
                thread.start()
            finally:
                threading.stack_size(before)

    def _refuse(self, connection: socket.socket, address: str, reason: str) -> None:
        endpoints, head, request_id = self.endpoints, NO_RULING.head, self.endpoints.ids.next()[0]
        response = json_response({"error": REASONS[503], "message": reason, "request_id": request_id}, 503, fields=RETRY_AFTER)
        with contextlib.suppress(OSError):
            connection.setblocking(False)
            connection.send(encode(response, head, request_id, endpoints.date(), {}, True))
            connection.shutdown(socket.SHUT_WR)
        self._tell_full(f"{reason}: refused one from {address} ({self._count} are open)")
        self._refused.append((time.monotonic() + 1, connection))
        while len(self._refused) > REFUSED_KEPT:
            self._refused.popleft()[1].close()

    def _tell_full(self, message: str) -> None:
        if time.monotonic() - self._told_full_at > 1:   # once a second: an attack must not fill the log
            self._told_full_at = time.monotonic()
            self.endpoints.log.line("WARNING", message)

    def process_request_thread(self, request: socket.socket, client_address: tuple) -> None:
        """A connection from setup to close, on its own thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._forget(client_address[0])

    def _forget(self, address: str) -> None:
        with self._lock:
            self._count -= 1
            self._by_address[address] -= 1
            if not self._by_address[address]:
                del self._by_address[address]

    def handle_error(self, request: Any, client_address: tuple) -> None:
        """A bug outside of any request, or a peer that was gone before setup."""
        if not isinstance(sys.exc_info()[1], OSError):
            self.endpoints.log.exception("Unexpected error on a connection")

    def opened(self, connection: Connection) -> None:
        """Called by a connection at its start."""
        with self._lock:
            self._connections.add(connection)

    def closed(self, connection: Connection) -> None:
        """Called by a connection at its end."""
        with self._lock:
            self._connections.discard(connection)

    @property
    def open_connections(self) -> list:
        """The connections that are open now."""
        with self._lock:
            return list(self._connections)

    # -- ending

    def expire(self) -> None:
        """Called every REAP_SECONDS: end what has taken too long."""
        config, now = self.config, time.monotonic()
        limits = {Phase.CONNECTED: config.header_timeout, Phase.IDLE: config.idle_timeout,
                  Phase.HEAD: config.header_timeout, Phase.BODY: config.body_timeout, Phase.SEND: config.body_timeout,
                  Phase.LINGER: LINGER_SECONDS}
        for connection in self.open_connections:
            connection.expire(now, limits)
        while self._refused and self._refused[0][0] < now:
            self._refused.popleft()[1].close()

    def stop(self, seconds: float, on_wait: Callable[[str], None] = lambda text: None) -> int:
        """Accept no more, answer what has come, end idle connections; after `seconds` cut all. Returns how many were cut.

        `on_wait(text)` is told for whom a stop waits, when it does not end within a second.
        """
        began, told = time.monotonic(), False
        self.draining = True
        self._wake_sender.close()
        if self._accepting.ident is not None:
            self._accepting.join()
        self.server_close()
        while self._count and time.monotonic() < began + seconds:
            for connection in self.open_connections:
                connection.end_if_idle()
            if not told and time.monotonic() > began + TELL_WAITING:
                told = True
                on_wait(self._waiting_for())
            time.sleep(0.01)
        cut = self.open_connections
        for connection in cut:
            connection.cut()
        while self._count and time.monotonic() < began + seconds + 1:
            time.sleep(0.01)
        if self.poller is not None and not self._count:
            self.poller.stop()
        while self._refused:
            self._refused.popleft()[1].close()
        return len(cut)

    def _waiting_for(self) -> str:
        waiting = [f"{one.address} ({Phase.DOING[one.phase]})" for one in self.open_connections]
        more = f" and {len(waiting) - 5} more" if len(waiting) > 5 else ""
        return f"{len(waiting)} connections: {', '.join(waiting[:5])}{more}"

    def server_close(self) -> None:
        """Close the listeners."""
        for listener in self.listeners:
            listener.close()
        self._wake_sender.close()
        self._wake_receiver.close()


def _why_not_listening(error: Exception) -> str:
    """What the operator can do about it."""
    number = getattr(error, "errno", None)
    if number == errno.EADDRINUSE:
        return "the port is in use by another program; choose another with --port"
    if number in (errno.EACCES, errno.EPERM):
        return "this user may not take a port below 1024; choose another with --port, or put a proxy in front"
    if number == errno.EADDRNOTAVAIL:
        return "no network interface of this machine has that address; 0.0.0.0 is all of them"
    if isinstance(error, socket.gaierror):
        return f"that name leads to no address ({error.strerror})"
    return getattr(error, "strerror", None) or str(error)


# =============================================================================
# Service: makes the parts, hands them to each other, starts and stops them. Two can live in one process.
# =============================================================================

def _check(trouble: str) -> dict:
    return {"status": "failing", "message": trouble} if trouble else {"status": "ok"}


def _check_disk(database: str) -> dict:
    """Write and delete a small file beside the database."""
    folder = os.path.dirname(os.path.abspath(database))
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(65536))
            probe.flush()
            os.fsync(probe.fileno())
        return {**_check(""), "free_bytes": shutil.disk_usage(folder).free}
    except OSError as error:
        return _check(error.strerror or str(error))


class Callbacks:
    """Runs on_event for each stored event, in order, on a thread of its own.

    At most 10,000 events wait; then commits wait too, so that a slow callback slows senders instead of eating memory.
    """

    def __init__(self, on_event: Callable[[AppointmentEvent], None], log: Log) -> None:
        self._on_event, self._log = on_event, log
        self._queue: queue.Queue = queue.Queue(10000)
        self.put = self._queue.put
        self._thread = threading.Thread(target=self._run, name="webhook-callbacks", daemon=True)

    def start(self) -> None:
        """Start calling."""
        self._thread.start()

    def stop(self) -> None:
        """Call for what is queued, then end."""
        self._queue.put(None)
        self._thread.join()

    def is_calling(self) -> bool:
        """Whether this code was called by on_event."""
        return threading.current_thread() is self._thread

    def _run(self) -> None:
        while True:
            event = self._queue.get()
            if event is None:
                return
            try:
                self._on_event(event)
            except BaseException:                       # foreign code: not even its sys.exit() may end this thread
                self._log.exception(f"on_event failed for event {event.id}")


DEFAULT_SCHEMA_FILE = Path(__file__).resolve().with_name("schema.json")


def load_schema(path: str) -> tuple:
    """(document, its text as bytes, a warning or "") of the file.

    Raises SetupError when it is not JSON, or missing where `path` names it; else the built-in schema stands in.
    """
    file = Path(path) if path else DEFAULT_SCHEMA_FILE
    try:
        data = file.read_bytes()
    except OSError as error:
        # One that is there and cannot be read is a contract that was meant: taking another would be a surprise
        if path or not isinstance(error, FileNotFoundError):
            raise SetupError(f"schema {file}: {error.strerror}") from None
        return EVENT_SCHEMA, json.dumps(EVENT_SCHEMA, indent=2).encode(), \
            f"schema {file} is missing: the built-in schema is used"
    try:
        return parse_json(data)[0], data, ""
    except JSONError as error:
        raise SetupError(f"schema {file}: {error}") from None


def read_schema(path: str) -> tuple:
    """(EventReader, text of the schema as bytes, warnings) of the file, or of schema.json beside the program.

    Raises SetupError that names file, place and reason.
    """
    document, text, warning = load_schema(path)
    try:
        reader = EventReader(document)
    except SchemaError as error:
        raise SetupError(f"schema {path or DEFAULT_SCHEMA_FILE}: {error}") from None
    warnings = [warning] if warning else []
    where = f"schema {path or DEFAULT_SCHEMA_FILE}"
    warnings += [f"{where}: the unknown keyword {keyword} at {place or '/'} is ignored; did you mean {suggestion}?"
                 for place, keyword, suggestion in reader.schema.misspelt]
    warnings += [f"{where}: the format {name} at {place or '/'} is not known and not checked"
                 for place, name in reader.schema.unchecked]
    dialect = document.get("$schema", DRAFT) if isinstance(document, dict) else DRAFT
    if dialect.rstrip("#") != DRAFT:
        warnings.append(f"{where}: it says that it follows {dialect}, but is read by draft 2020-12")
    missed = {problem.path for problem in reader.schema.errors({})}
    warnings += [f"{where}: {name} is not required by it, but events without it are refused anyway"
                 for name in REQUIRED_FIELDS if "/" + name not in missed]
    return reader, text, warnings


class WebhookServer:
    """The whole service, to be embedded or run by the command line.

        with WebhookServer(Config(port=0, database="events.db"), on_event=callback) as server:
            print(server.url)           # http://127.0.0.1:49152

    `on_event(event)` gets each AppointmentEvent after its commit, in order, on a thread of its own; stop() waits until
    it was called for all that was stored. `logger` takes the log instead of stderr or log_file. Starts once; raises
    SetupError when something keeps it from starting.
    """

    def __init__(self, config: Optional[Config] = None, on_event: Optional[Callable[[AppointmentEvent], None]] = None,
                 logger: Optional[logging.Logger] = None) -> None:
        config = config or Config()
        # The readers open the file later: by then the program around us may be in another folder
        self.config = config = dataclasses.replace(config, database=os.path.abspath(config.database))
        reader, schema_text, self._warnings = read_schema(config.schema)
        sink = LoggerSink(logger) if logger else StreamSink() if not config.log_file else \
            FileSink(config.log_file, config.log_max_bytes, config.log_backups)
        self.log = Log(sink, config.log_level, Redactor(config.log_payloads, reader.field_names))
        self._callbacks = Callbacks(on_event, self.log) if on_event is not None else None
        self.store = Store(SQLite(config.database), config.busy_timeout,
                           self._callbacks.put if self._callbacks else None, self._tell_trouble)
        checks = {"database": lambda wait: _check(self.store.health(wait)), "disk": lambda wait: _check_disk(config.database),
                  "service": lambda wait: _check("stopping" if self._server is None or self._server.draining else "")}
        self._endpoints = Endpoints(config, self.store, self.log, checks)
        self._contract, self._schema_text = reader, schema_text
        self._redactor = Redactor(config.log_payloads, reader.field_names)
        self._server: Optional[Server] = None
        self._lock = threading.RLock()                  # a signal handler may call stop() in the midst of stop()
        self._started = False
        self._running = contextlib.ExitStack()          # what ends each part, the last one started on top
        self._running.callback(self.log.stop)

    @property
    def url(self) -> str:
        """Where it listens, such as http://127.0.0.1:8000. Known once it has started."""
        return self._bound().url

    @property
    def port(self) -> int:
        """The port that it has, also where 0 was asked for. Known once it has started."""
        return self._bound().port

    def _bound(self) -> Server:
        if self._server is None:
            raise RuntimeError("this WebhookServer has not started")
        return self._server

    def start(self) -> WebhookServer:
        """Listen. Raises SetupError; then nothing runs, and nothing was made but perhaps the files named."""
        with self._lock:
            if self._started:
                raise RuntimeError("a WebhookServer starts once; make another one")
            self._started = True
            try:
                self._start_parts()
            except BaseException as error:
                self._running.close()
                if isinstance(error, RuntimeError):     # how threading says that the system gives no more threads
                    raise SetupError(f"cannot start: {error}") from None
                raise
        return self

    def _start_parts(self) -> None:
        running = self._running
        server = Server(self.config, self._endpoints)   # the port first: a busy one must not touch the database
        running.callback(server.server_close)
        self._endpoints.rules = Rules(self.config, self._contract, self._schema_text, self._redactor, self._endpoints, server.loopback)
        self.store.engine.open()
        running.callback(self.store.engine.close)
        self.log.start()
        for warning in self._warnings:
            self.log.line("WARNING", warning)
        running.callback(self._say_stopped)
        if self._callbacks:
            self._callbacks.start()
            running.callback(self._callbacks.stop)
        self.store.start()
        running.callback(self.store.stop)
        self._reaping = threading.Event()

        def reap():
            while not self._reaping.wait(REAP_SECONDS):
                server.expire()
        threading.Thread(target=reap, daemon=True, name="webhook-clock").start()
        running.push(lambda *_: self._reaping.set())
        running.callback(self._drain, server)
        server.start()
        self._server = server
        self.log.line("INFO", f"Service started on {server.url}, database {self.config.database}")
        if not server.loopback:
            self.log.line("WARNING", "Other machines can reach this service, and it asks nobody who they are: let a proxy or a "
                                     "firewall decide who may send and read")

    def stop(self) -> None:
        """Accept no more, answer what is in flight, commit, checkpoint, call on_event for the rest, flush the log.

        May be called at any time, from any thread and more than once: a second call waits until all is done. Called
        by on_event itself it returns at once, as on_event has to return before all is done.
        """
        if self._callbacks and self._callbacks.is_calling():
            threading.Thread(target=self.stop, name="webhook-stop").start()
            return
        with self._lock:
            self._started = True                        # one that was stopped does not start any more
            self._running.close()

    def _say_stopped(self) -> None:
        if self._server is not None:                    # a start that failed has nothing to say
            self.log.line("INFO", "Service stopped")

    def _drain(self, server: Server) -> None:
        cut = server.stop(self.config.shutdown_timeout)
        if cut:
            self.log.line("WARNING", f"connections cut after {self.config.shutdown_timeout:g} seconds: {cut}")

    def __enter__(self) -> WebhookServer:
        return self.start()

    def __exit__(self, *exception: Any) -> None:
        self.stop()

    def _tell_trouble(self, trouble: str) -> None:
        if trouble:
            self.log.line("ERROR", f"Events cannot be stored and are answered 503: {trouble}. Senders should try again; "
                                   "fix this and the service recovers by itself")
        else:
            self.log.line("INFO", "Events are stored again")


# =============================================================================
# Command line: serve, check, send, bench. Knows terminals, signals and exit codes.
# =============================================================================

EXIT_FINE, EXIT_NO, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130

EXAMPLES = """examples:
  python3 webhook_server.py                         take events on http://127.0.0.1:8000
  python3 webhook_server.py --port 9000 --database /srv/events.db
  python3 webhook_server.py send                    post a test event to the server started above
  python3 webhook_server.py check events.ndjson     would these events be taken?"""


class _Parser(argparse.ArgumentParser):
    """Takes flags in full only, and leaves the line for a mistake to main()."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=32), **options)

    def error(self, message: str) -> None:
        raise SetupError(": ".join(self.prog.split()[1:] + [f"{message} (--help shows how)"]))


def add_settings(parser: argparse.ArgumentParser) -> None:
    """A flag for each setting of Config."""
    group = parser.add_argument_group(
        "settings", "Each can also come from the environment, --busy-timeout as WEBHOOK_BUSY_TIMEOUT; a flag wins.")
    for field in dataclasses.fields(Config):
        many = isinstance(field.default, tuple)
        default = "" if many or field.default == "" else f" (default: {field.default})"
        group.add_argument(flag_of(field.name), dest=field.name, metavar=field.metadata["metavar"],
                           action="append" if many else "store",
                           help=(field.metadata["help"] + default).replace("%", "%%"))


def make_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(prog="webhook_server.py", usage="webhook_server.py [COMMAND] [SETTINGS]", epilog=EXAMPLES,
                     description="Takes appointment events over HTTP and keeps each of them for good in SQLite.")
    parser.add_argument("--version", action="version", version=f"webhook_server.py {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", prog="webhook_server.py", parser_class=_Parser,
                                     title="commands", description="COMMAND --help tells more.")
    add_settings(commands.add_parser(
        "serve", help="take events; the command when none is given", usage="webhook_server.py [serve] [SETTINGS]",
        description="Take events until SIGTERM or Ctrl-C; what is in flight is still answered. A second one ends at once."))
    check = commands.add_parser(
        "check", help="tell which events in files would be refused, and why; needs no server",
        description="Validate events in JSON (one event, or an array of them) or NDJSON (one on each line).\n"
                    "Prints 'file:line: /path message' for each problem. Exit 0: all are valid, 1: some are not, 2: a file\n"
                    "cannot be read.")
    check.add_argument("files", nargs="+", metavar="FILE", help="file to read; - is standard input")
    check.add_argument("--schema", metavar="FILE", help="JSON Schema of an event (default: WEBHOOK_SCHEMA, or schema.json "
                                                        "beside the program)")
    send = commands.add_parser(
        "send", help="post one event and print the answer",
        description="Post a test event, or the one in FILE, and print status and body of the answer.\n"
                    "Exit 0: it was taken (2xx), 1: it was not.")
    send.add_argument("file", nargs="?", metavar="FILE", help="what to send, as it is; - is standard input")
    send.add_argument("--url", default="http://127.0.0.1:8000",
                      help="server to send to, with a path if it is not /webhook/appointments (default: %(default)s)")
    for name in REQUIRED_FIELDS + ("notes",):
        send.add_argument(flag_of(name), metavar="TEXT", help=f"{name} of the test event")
    bench = commands.add_parser(
        "bench", help="measure how fast it is on this machine",
        description="Start a server on a temporary database, load it from separate processes, print requests a second and\n"
                    "latencies, and compare the rows in the database with the answers 200.")
    bench.add_argument("--seconds", default="3", help="time of each round (default: %(default)s)")
    bench.add_argument("--connections", metavar="N,N", default="1,16,64", help="a round for each (default: %(default)s)")
    bench.add_argument("--folder", help="where the temporary database goes (default: the system's temporary folder)")
    bench.add_argument("--load", metavar="URL", help=argparse.SUPPRESS)
    return parser


def main(arguments: Optional[list] = None) -> int:
    """Run a command; gives the exit code. The person at the keyboard gets one line for a mistake, never a traceback."""
    _open_missing_streams()
    if hasattr(sys.stdout, "reconfigure"):              # a terminal may lack a letter of somebody's message
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = run_command(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()                              # what cannot be written shows here, and not after us
        return code
    except SetupError as error:
        return _complain(str(error))
    except BrokenPipeError:                             # the reader of our output left, as with | head
        _silence(sys.stdout)
        return EXIT_NO
    except OSError as error:
        _silence(sys.stdout)
        return _complain(f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def run_command(arguments: list) -> int:
    """Parse and run; gives the exit code."""
    if arguments and arguments[0] in ("-h", "--help"):
        parser = make_parser()
        add_settings(parser)                            # serving is the default, so its settings belong here
        print(parser.format_help(), end="")
        return EXIT_FINE
    if not arguments or arguments[0].startswith("-") and arguments[0] != "--version":
        arguments.insert(0, "serve")
    try:
        options = make_parser().parse_args(arguments)
    except SystemExit as done:                          # argparse has printed help or version
        return done.code
    return {"serve": run_serve, "check": run_check, "send": run_send, "bench": run_bench}[options.command](options)


def _open_missing_streams() -> None:
    """Where we were started with a stream closed, open nothing there, or the database would get its number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))


def _silence(stream: Any) -> None:
    """Let what still waits in a stream that cannot be written go nowhere: Python would try again at exit, and exit 120."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _complain(message: str) -> int:
    """One line on stderr for the person at the keyboard; gives the exit code for it."""
    try:
        print(f"webhook_server.py: {printable(message, 1000)}", file=sys.stderr, flush=True)
    except OSError:
        _silence(sys.stderr)
    return EXIT_USAGE


# -- serve

SAME_SIGNAL = 0.1       # seconds: some supervisors signal a process and, a moment later, the group that it leads


def run_serve(options: argparse.Namespace) -> int:
    """Serve until SIGTERM, SIGINT or SIGHUP; a second one exits at once."""
    config = Config.read(vars(options), dict(os.environ))
    _raise_file_limit(config.max_connections)
    # An Event would not do: set() in a handler waits for ever for the lock that wait() around it may hold
    came, wake = [], queue.SimpleQueue()

    def on_signal(number: int, frame: Any) -> None:
        if not came:
            came.append(time.monotonic())
            wake.put(number)
        elif time.monotonic() - came[0] > SAME_SIGNAL:
            os._exit(128 + number)

    server = WebhookServer(config)
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGBREAK"):
        # Under nohup a hang-up is to be ignored
        if hasattr(signal, name) and not (name == "SIGHUP" and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN):
            signal.signal(getattr(signal, name), on_signal)
    with server:
        try:
            print(f"Listening on {server.url}", flush=True)
        except OSError:                                 # nobody is there to read it
            _silence(sys.stdout)
        gc.collect()
        gc.freeze()                                     # what lives as long as we is not searched for garbage again
        while not came:
            with contextlib.suppress(queue.Empty):
                wake.get(timeout=1)                     # Windows takes no Ctrl-C in an endless wait
    return EXIT_FINE


def _raise_file_limit(connections: int) -> None:
    """Each connection is an open file; many systems start with 1,024 and allow more."""
    if resource is not None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = connections + 256
        if soft != resource.RLIM_INFINITY and soft < wanted:
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE,
                                   (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


# -- check

def run_check(options: argparse.Namespace) -> int:
    """Print every problem of the events in files; 1 if there is any, 2 if a file cannot be read."""
    reader, _, warnings = read_schema(options.schema or os.environ.get("WEBHOOK_SCHEMA", ""))
    for warning in warnings:
        _complain(warning)
    code = EXIT_FINE
    for name in options.files:
        try:
            data = _read_input(name)
        except SetupError as error:
            code = _complain(str(error))
            continue
        shown = "<stdin>" if name == "-" else printable(name, 4096)
        for line, path, message in check_text(reader, data):
            code = max(code, EXIT_NO)
            print(f"{shown}:{line}: {printable(path) or '/'} {printable(message, 500)}")
    return code


def _read_input(name: str) -> bytes:
    try:
        return sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except (OSError, ValueError) as error:              # ValueError: a NUL in the name
        raise SetupError(f"{name or 'a file without a name'}: {getattr(error, 'strerror', None) or error}") from None


def check_text(reader: EventReader, data: bytes) -> Iterator[tuple]:
    """(line, path, message) of every problem in JSON (an event, or an array of them) or NDJSON."""
    try:
        value, text = parse_json(data)
    except JSONError as error:
        lines = [(number, line) for number, line in enumerate(data.splitlines(), 1) if line.strip()]
        # Lines that are JSON each for itself make NDJSON, whichever of them are broken
        if len(lines) > 1 and 2 * sum(_is_json(line) for _, line in lines) >= len(lines):
            for number, line in lines:
                yield from _check_line(reader, line, number)
        else:
            yield error.line, "", str(error)
        return
    if isinstance(value, list):
        for index, (item, line) in enumerate(zip(value, _item_lines(text))):
            for problem in _problems(reader, item):
                yield line, f"/{index}{problem.path}", problem.message
    else:
        first = text.count("\n", 0, len(text) - len(text.lstrip())) + 1
        for problem in _problems(reader, value):
            yield first, problem.path, problem.message


def _is_json(line: bytes) -> bool:
    try:
        parse_json(line)
        return True
    except JSONError:
        return False


def _check_line(reader: EventReader, line: bytes, number: int) -> Iterator[tuple]:
    try:
        value = parse_json(line)[0]
    except JSONError as error:
        yield number, "", f"Invalid JSON: {error.reason} at column {error.column}"
        return
    for problem in _problems(reader, value):
        yield number, problem.path, problem.message


def _problems(reader: EventReader, value: Any) -> list:
    try:
        reader.event(value, "", "")
        return []
    except InvalidEvent as error:
        return error.problems


def _item_lines(text: str) -> Iterator[int]:
    """The line on which each item of the array `text` begins."""
    at, line, counted = text.index("[") + 1, 1, 0
    while True:
        at = _SPACE.match(text, at).end()
        if text[at] == "]":
            return
        line, counted = line + text.count("\n", counted, at), at
        yield line
        at = _SPACE.match(text, _SCAN(text, at)[1]).end()
        at += text[at] == ","


# -- send

def run_send(options: argparse.Namespace) -> int:
    """Post one event; print status and body."""
    given = {name: getattr(options, name) for name in REQUIRED_FIELDS + ("notes",) if getattr(options, name) is not None}
    address = _address("--url", options.url)
    if options.file is None:
        now = datetime.now(timezone.utc)
        body = json.dumps({
            "event_type": "scheduled", "appointment_id": f"TEST-{now:%Y%m%d%H%M%S%f}", "patient_id": "TEST-PATIENT",
            "timestamp": now.strftime("%Y-%m-%dT%H:%M:%SZ"), "notes": "Test event", **given}).encode()
    elif given:
        raise SetupError(f"send: FILE is sent as it is, {flag_of(next(iter(given)))} cannot change it")
    else:
        body = _read_input(options.file)
    path = address.path if address.path.strip("/") else "/webhook/appointments"
    try:
        status, text = _post(address, path + (f"?{address.query}" if address.query else ""), body)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        _complain(f"cannot send to {options.url}: {reason}")
        return EXIT_NO
    print(status)
    print(text.decode("utf-8", "replace"))
    return EXIT_FINE if 200 <= status < 300 else EXIT_NO


def _address(flag: str, text: str) -> Any:
    """The parts of an http address. Raises SetupError."""
    with contextlib.suppress(ValueError):               # a port that is no number, brackets that are no IPv6 address
        parts = urlsplit(text)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and parts.username is None \
                and re.fullmatch("[!-~]+", text):
            return parts
    raise SetupError(f"{flag}: {printable(text)} is not an address such as http://127.0.0.1:8000")


def _post(address: Any, target: str, body: bytes) -> tuple:
    """(status, body) of the answer. Takes no proxy, which would see patients' data, and follows no redirect."""
    if address.scheme == "http":
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=30)
    elif hasattr(http.client, "HTTPSConnection"):
        connection = http.client.HTTPSConnection(address.hostname, address.port, timeout=30)
    else:
        raise SetupError("this Python has no ssl module, which https:// needs")
    with contextlib.closing(connection):
        connection.request("POST", target, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()


# -- bench

def run_bench(options: argparse.Namespace) -> int:
    """Measure a server of our own; 1 when rows and 200s differ, or not every answer was 200."""
    seconds = checked(_seconds, options.seconds, "--seconds")
    levels = [checked(_whole(1, 10000), level.strip(), "--connections") for level in options.connections.split(",")]
    if options.load:
        _raise_file_limit(levels[0])
        print(json.dumps(bench_load(_address("--load", options.load), levels[0], seconds)))
        return EXIT_FINE
    folder = options.folder or tempfile.gettempdir()
    if not os.path.isdir(folder):
        raise SetupError(f"--folder: {folder} is not a folder")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)       # end as with Ctrl-C: our server ends with us
    print(f"Server and load share this machine ({os.cpu_count()} cores); senders elsewhere leave the server more of it.\n"
          f"Each connection posts its next event when it has the answer; each 200 waits for the disk.\n"
          f"A sync of 4 KiB in {printable(folder)} takes {_sync_milliseconds(folder):.2f} ms.\n"
          f"{'connections':>11} {'requests/s':>11} {'P50 ms':>8} {'P95 ms':>8} {'P99 ms':>8} {'not 200':>8} "
          f"{'rows = 200s':>12}", flush=True)
    fine = True
    for level in levels:
        with tempfile.TemporaryDirectory(prefix="webhook-bench-", dir=folder) as database_folder:
            fine = _bench_round(database_folder, level, seconds) and fine
    return EXIT_FINE if fine else EXIT_NO


def _sync_milliseconds(folder: str) -> float:
    """The median of 20: what the disk allows, whatever the server does."""
    times = []
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(20):
            began = time.perf_counter()
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
            times.append(time.perf_counter() - began)
    return sorted(times)[10] * 1000


def _bench_round(folder: str, connections: int, seconds: float) -> bool:
    database = os.path.join(folder, "events.db")
    with contextlib.ExitStack() as children:
        server = _start_child(children, [
            "serve", "--port", "0", "--database", database, "--log-file", os.path.join(folder, "server.log"),
            "--max-connections", str(connections + 64), "--max-connections-per-address", str(connections + 64)])
        url = server.stdout.readline().decode().rpartition(" ")[2].strip()
        if not url:
            raise SetupError("bench: the server to measure did not start")
        shares = [connections] if connections < 16 else [connections - connections // 2, connections // 2]
        loads = [_start_child(children, ["bench", "--load", url, "--seconds", f"{seconds:.6f}", "--connections", str(share)])
                 for share in shares]
        if [load.stdout.readline() for load in loads] != [b"ready\n"] * len(loads):
            raise SetupError(f"bench: {connections} connections could not be made")
        for load in loads:
            load.stdin.write(b"go\n")
            load.stdin.flush()
        _show_progress(connections, seconds)
        results = [json.loads(load.stdout.read() or b'{"microseconds": [], "not_200": 1, "seconds": 1}') for load in loads]
    with contextlib.closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("SELECT count(*) FROM appointment_events").fetchone()[0]
    times = sorted(itertools.chain.from_iterable(result["microseconds"] for result in results))
    lost = sum(result["not_200"] for result in results)
    rate = sum(len(result["microseconds"]) / result["seconds"] for result in results)
    p50, p95, p99 = (times[int(len(times) * part)] / 1000 for part in (0.50, 0.95, 0.99)) if times else (0, 0, 0)
    verdict = "yes" if rows == len(times) else f"NO: {rows} rows, {len(times)} 200s"
    print(f"{connections:11} {rate:11.0f} {p50:8.2f} {p95:8.2f} {p99:8.2f} {lost:8} {verdict:>12}", flush=True)
    return rows == len(times) and not lost


def _start_child(children: contextlib.ExitStack, arguments: list) -> subprocess.Popen:
    """This program in a process of its own, ended at the latest when `children` is left."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WEBHOOK_")}
    child = subprocess.Popen([sys.executable, "-S", "-I", os.path.abspath(__file__)] + arguments,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    children.callback(child.stdin.close)
    children.callback(child.stdout.close)
    children.callback(child.wait)
    children.callback(child.terminate)
    return child


def _show_progress(connections: int, seconds: float) -> None:
    """Until the time of a round is over: a line on stderr that counts on a terminal, and stands elsewhere."""
    live, end = sys.stderr.isatty(), time.monotonic() + seconds
    try:
        if not live:
            print(f"measuring at {connections} connections for {seconds:g} s", file=sys.stderr, flush=True)
        while time.monotonic() < end:
            if live:
                print(f"\r{connections} connections: {max(0, end - time.monotonic()):.1f} s left ", end="",
                      file=sys.stderr, flush=True)
            time.sleep(min(0.2, seconds))
        if live:
            print("\r" + " " * 40 + "\r", end="", file=sys.stderr, flush=True)
    except OSError:
        _silence(sys.stderr)


def bench_load(address: Any, connections: int, seconds: float) -> dict:
    """Post unique events over `connections` connections, one at a time on each, for `seconds` from the word go on stdin.

    Gives {"microseconds": [time of each 200], "not_200": number of other answers and broken connections,
    "seconds": time from first to last}.
    """
    selector, started, times, counter, failed = selectors.DefaultSelector(), {}, [], itertools.count(), 0
    for _ in range(connections):
        connection = socket.create_connection((address.hostname, address.port), timeout=10)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        selector.register(connection, selectors.EVENT_READ)
        started[connection] = 0.0

    def post(connection: socket.socket) -> None:
        number = next(counter)
        body = (f'{{"event_type": "scheduled", "appointment_id": "BENCH-{os.getpid()}-{number}", '
                f'"patient_id": "PAT-{number % 5000}", "timestamp": "2025-01-10T14:00:00Z", '
                f'"notes": "Follow-up in room 4, bring earlier results."}}')
        started[connection] = time.perf_counter()
        with contextlib.suppress(OSError):              # recv will tell
            connection.sendall((f"POST /webhook/appointments HTTP/1.1\r\nHost: {address.netloc}\r\n"
                                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}").encode())

    print("ready", flush=True)
    if not sys.stdin.readline():                        # whoever started us is gone
        raise KeyboardInterrupt
    begin = now = time.perf_counter()
    for connection in started:
        post(connection)
    while started:
        ready = selector.select(10)
        if not ready:
            failed += len(started)
            break
        for key, _ in ready:
            connection = key.fileobj
            try:
                answer = connection.recv(65536)         # our answers come in one piece
            except OSError:
                answer = b""
            now = time.perf_counter()
            began = started.pop(connection)
            if answer.startswith(b"HTTP/1.1 200 "):
                times.append(int((now - began) * 1e6))
            else:
                failed += 1
            if now < begin + seconds and answer:
                post(connection)
            else:
                selector.unregister(connection)
                connection.close()
    return {"microseconds": times, "not_200": failed, "seconds": now - begin}


if __name__ == "__main__":
    sys.exit(main())
