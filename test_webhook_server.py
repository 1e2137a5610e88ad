"""Tests of the receiver, section by section in the order of webhook_server.py: real sockets, real files, no fixed ports.

    python3 -m unittest                     all of them
    python3 test_webhook_server.py Store    the classes or tests whose name holds a word
"""
from __future__ import annotations

import ast
import contextlib
import dataclasses
import http.client
import io
import json
import logging
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from pathlib import Path
from unittest import mock

import webhook_server as receiver
from webhook_server import (
    AppointmentEvent, Config, EventReader, Filter, InvalidEvent, JSONError, Log, Outcome, Redactor, RequestIds,
    RequestRecord, SQLite, Schema, SchemaError, SetupError, Store, StoreLocked, StoreUnavailable, Submission,
    WebhookServer, canonical_json, canonical_timestamp, ecma_pattern, json_equal, parse_json)

try:
    import resource
except ImportError:             # Windows
    resource = None

HERE = Path(__file__).absolute().parent
PROGRAM = HERE / "webhook_server.py"
PATH = "/webhook/appointments"
WAIT = 180                      # seconds after which something awaited counts as not coming: a machine may be busy
POSIX = os.name == "posix"


# =============================================================================
# Helpers: what the tests of several sections use.
# =============================================================================

def event(**members):
    """A valid event; members given replace or add, those that are ... (Ellipsis) are left out."""
    whole = {"event_type": "scheduled", "appointment_id": "APT-1", "patient_id": "PAT-1",
             "timestamp": "2025-01-10T14:00:00Z", **members}
    return {name: value for name, value in whole.items() if value is not ...}


def until(condition, what="the awaited"):
    """Wait until condition() is true, and give what it gave; fails after WAIT seconds."""
    deadline = time.monotonic() + WAIT
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not come in {WAIT} s")
        time.sleep(0.005)


class Answer:
    """What came back: status, headers (names in lower case), body as bytes and, where it is JSON, as `json`."""

    def __init__(self, response):
        self.status, self.body = response.status, response.read()
        self.headers = {name.lower(): value for name, value in response.getheaders()}

    @property
    def json(self):
        return json.loads(self.body)


class FolderTest(unittest.TestCase):
    """A test with an empty folder of its own, self.folder (a Path), gone afterwards."""

    def setUp(self):
        temporary = tempfile.TemporaryDirectory(prefix="webhook-test-")
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)
        self.database = self.folder / "events.db"

    def program(self, *arguments, stdin=b"", environment=(), **options):
        """Run the command line to its end: (exit code, stdout, stderr) as text."""
        done = subprocess.run([sys.executable, "-S", "-I", str(PROGRAM), *map(str, arguments)], input=stdin,
                              capture_output=True, timeout=WAIT, cwd=self.folder,
                              env={**clean_environment(), **dict(environment)}, **options)
        return done.returncode, done.stdout.decode(), done.stderr.decode()


class ServerTest(FolderTest):
    """A test that talks to a server in this process."""

    def start(self, **settings):
        """A running WebhookServer on a free port with a database in self.folder, stopped after the test."""
        on_event, logger = settings.pop("on_event", None), settings.pop("logger", None)
        settings = {"port": 0, "database": str(self.database), "log_file": str(self.folder / "server.log"),
                    "shutdown_timeout": 2, **settings}
        server = WebhookServer(Config(**settings), on_event=on_event, logger=logger)
        server.start()
        self.addCleanup(server.stop)
        return server

    def connect(self, server):
        """A connected socket with a timeout, closed after the test."""
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=WAIT)
        self.addCleanup(connection.close)
        return connection

    def call(self, server, method="GET", path=PATH, body=None, **headers):
        """One request on a connection of its own; body may be bytes, or a value to be sent as JSON."""
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=WAIT)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            return Answer(connection.getresponse())
        finally:
            connection.close()

    def post(self, server, body=None, **headers):
        """POST one event."""
        return self.call(server, "POST", PATH, event() if body is None else body, **headers)

    def exchange(self, server, data):
        """Send bytes, close our sending half, give all that comes back until the server closes."""
        connection = self.connect(server)
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return read_all(connection)

    def log_text(self, server):
        """The log of a server that is stopped for it."""
        server.stop()
        return (self.folder / "server.log").read_text()


def read_all(connection):
    """All bytes until the other side closes; a reset counts as the end."""
    pieces = []
    with contextlib.suppress(ConnectionError):
        while True:
            piece = connection.recv(65536)
            if not piece:
                break
            pieces.append(piece)
    return b"".join(pieces)


def statuses(answers):
    """The status codes in the bytes of several answers."""
    return [int(code) for code in re.findall(rb"HTTP/1\.1 (\d{3}) ", answers)]


def post_bytes(body, *lines, version="1.1"):
    """The bytes of a POST of `body` (bytes, or a value sent as JSON) with further header lines."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = [f"POST {PATH} HTTP/{version}", "Host: localhost", f"Content-Length: {len(body)}", *lines]
    return ("\r\n".join(head) + "\r\n\r\n").encode("latin-1") + body


def rows(database, query="SELECT count(*) FROM appointment_events"):
    """All rows of a query; the single value when there is just one of one column."""
    with contextlib.closing(sqlite3.connect(str(database), timeout=10)) as connection:
        found = connection.execute(query).fetchall()
    return found[0][0] if len(found) == 1 and len(found[0]) == 1 else found


def insert_rows(database, count, notes="'note ' || value"):
    """Put rows into the table beside the server."""
    with contextlib.closing(sqlite3.connect(str(database), timeout=10)) as connection, connection:
        connection.execute(f"""
            WITH RECURSIVE numbers (value) AS (
                SELECT 1 UNION ALL SELECT value + 1 FROM numbers WHERE value < {count})
            INSERT INTO appointment_events (event_type, appointment_id, patient_id, timestamp, notes, received_at,
                                            payload)
            SELECT 'scheduled', 'APT-' || value, 'PAT-' || (value % 7), '2025-01-10T14:00:00Z', {notes},
                   '2025-01-10T14:00:01Z', '{{"n": ' || value || '}}' FROM numbers""")


def clean_environment():
    """The environment without settings of ours."""
    return {name: value for name, value in os.environ.items() if not name.startswith("WEBHOOK_")}


MEGABYTE = 1024 * 1024


def in_threads(count, run):
    """Call run(number) in `count` threads at once, and wait for all."""
    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def rules(schema, value):
    """The keywords that refuse a value, in the order of the schema."""
    return [problem.rule for problem in Schema(schema).errors(value)]


# =============================================================================
# Config
# =============================================================================

class ConfigTest(unittest.TestCase):

    def test_a_flag_wins_over_the_environment_and_that_over_the_default(self):
        environment = {"WEBHOOK_PORT": "9001", "WEBHOOK_HOST": "::1"}
        config = Config.read({"port": "9002", "host": None}, environment)
        self.assertEqual((config.port, config.host, config.max_body), (9002, "::1", MEGABYTE))

    def test_hosts_and_origins_that_could_never_match_are_refused(self):
        for name, bad, good in (("allowed_host", ("http://desk.example", "desk.example:80", "a b"), ("desk.example", "[::1]")),
                                ("allowed_origin", ("desk.example", "https://desk.example/", "null"),
                                 ("https://desk.example", "http://[::1]:8000"))):
            for value in bad:
                with self.subTest(value), self.assertRaisesRegex(SetupError, name):
                    Config(**{name: ["localhost" if name == "allowed_host" else "http://localhost", value]})
            for value in (",".join(good), [", ".join(good) + ","], list(good)):
                self.assertEqual(getattr(Config(**{name: value}), name), good)

    def test_every_setting_can_come_from_a_flag_the_environment_or_the_library(self):
        for field in dataclasses.fields(Config):
            with self.subTest(field.name):
                text = ",".join(field.default) if isinstance(field.default, tuple) else str(field.default)
                expected = getattr(Config(), field.name)
                self.assertEqual(getattr(Config.read({field.name: text}, {}), field.name), expected)
                variable = {"WEBHOOK_" + field.name.upper(): text}
                self.assertEqual(getattr(Config.read({}, variable), field.name), expected)
                self.assertEqual(getattr(Config(**{field.name: field.default}), field.name), expected)

    def test_every_setting_has_a_help_text(self):
        for field in dataclasses.fields(Config):
            self.assertGreater(len(field.metadata["help"]), 5, field.name)

    def test_an_empty_variable_counts_as_not_set(self):
        self.assertEqual(Config.read({}, {"WEBHOOK_PORT": ""}).port, 8000)

    def test_a_wrong_value_is_refused_by_the_name_under_which_it_came(self):
        for flags, environment, name in (({"busy_timeout": "soon"}, {}, "--busy-timeout: "),
                                         ({}, {"WEBHOOK_MAX_BODY": "1MB"}, "WEBHOOK_MAX_BODY: ")):
            with self.subTest(name), self.assertRaises(SetupError) as caught:
                Config.read(flags, environment)
            self.assertTrue(str(caught.exception).startswith(name + "must be "), caught.exception)
        with self.assertRaisesRegex(SetupError, "^port: must be a whole number from 0 to 65535$"):
            Config(port=65536)

    def test_numbers_that_only_python_would_read_are_refused(self):
        for value in ("+5", "1_0", " 5", "5 ", "-1", "0x10", "1e3", "٣", "8000.0", "", "9" * 400, True, None, [8000]):
            with self.subTest(repr(value)[:20]), self.assertRaises(SetupError):
                Config(port=value)
        self.assertEqual(Config(port="8080").port, 8080)

    def test_times_are_seconds_above_0(self):
        for value in ("0", "-1", "nan", "inf", "1e3", "2s", "", "9" * 400, True, None, float("inf"), 0.0):
            with self.subTest(repr(value)[:20]), self.assertRaises(SetupError):
                Config(busy_timeout=value)
        for value in ("0.5", 0.5):
            self.assertEqual(Config(busy_timeout=value).busy_timeout, 0.5)

    def test_a_choice_is_one_of_those_named_in_the_error(self):
        with self.assertRaisesRegex(SetupError, "duplicates: must be one of conflict, ok"):
            Config(duplicates="maybe")
        self.assertEqual(Config(duplicates="ok").duplicates, "ok")

    def test_a_list_is_separated_by_commas_and_knows_no_case(self):
        self.assertEqual(Config(allowed_host="A.example, b.example,").allowed_host, ("a.example", "b.example"))
        self.assertEqual(Config(allowed_host=["A.example"]).allowed_host, ("a.example",))

    def test_a_path_may_be_an_object_but_never_empty_or_with_nul(self):
        self.assertEqual(Config(database=Path("x.db")).database, "x.db")
        for value in ("", "a\0b", 5, None):
            with self.subTest(repr(value)), self.assertRaises(SetupError):
                Config(database=value)

    def test_settings_cannot_be_changed_afterwards(self):
        with self.assertRaises(dataclasses.FrozenInstanceError):
            Config().port = 1


# =============================================================================
# JSON
# =============================================================================

class JSONTest(unittest.TestCase):

    def refusal(self, body):
        """What is said about a body: 'reason at line N column N'. It must be refused."""
        with self.assertRaises(JSONError) as caught:
            parse_json(body)
        error = caught.exception
        self.assertEqual(str(error), f"Invalid JSON: {error.reason} at line {error.line} column {error.column}")
        return str(error)[len("Invalid JSON: "):]

    def test_json_is_read_with_its_text(self):
        body = ' {"a": [1, -0.5e1, "é\\u00e9\\ud83d\\ude00", true, null]}\r\n'.encode()
        self.assertEqual(parse_json(body), ({"a": [1, -5.0, "éé😀", True, None]}, body.decode()))

    def test_what_python_would_take_and_the_rfc_does_not_is_refused_with_its_place(self):
        for body, said in (
                (b'{"a": NaN}', "NaN and Infinity are not JSON at line 1 column 7"),
                (b"[1,\n-Infinity]", "NaN and Infinity are not JSON at line 2 column 1"),
                (b"[Infinityx]", "NaN and Infinity are not JSON at line 1 column 2"),
                (b"\xef\xbb\xbf{}",
                 "the text starts with a byte order mark (BOM), expected plain UTF-8 at line 1 column 1"),
                ('{"a": 1}'.encode("utf-16"), "the text is not UTF-8 at line 1 column 1"),
                ('{"a": 1}'.encode("utf-16-le"),
                 "the text seems to be UTF-16 or UTF-32, expected UTF-8 at line 1 column 2"),
                ('{"a": 1}'.encode("utf-16-be"),
                 "the text seems to be UTF-16 or UTF-32, expected UTF-8 at line 1 column 1"),
                ('{"a": 1}'.encode("utf-32-be"),
                 "the text seems to be UTF-16 or UTF-32, expected UTF-8 at line 1 column 1"),
                (b'["\\ud83d"]', "half of a surrogate pair in a string at line 1 column 3"),
                (b'["\\ude00\\ud83d"]', "half of a surrogate pair in a string at line 1 column 3"),
                (b'["\\ud83d\\\\ude00"]', "half of a surrogate pair in a string at line 1 column 3"),
                (b'{"\\ud83d": 1}', "half of a surrogate pair in a string at line 1 column 3"),
                (b'["a\\u0000"]', "U+0000 in a string at line 1 column 4"),
                (b'{"a": 1,\n "a": 2}', "a member name that the object already has at line 2 column 2"),
                (b'{"A": 1, "\\u0041": 2}', "a member name that the object already has at line 1 column 10"),
                (b'{"a": {"b": 1, "c": [], "b": 1}}', "a member name that the object already has at line 1 column 25"),
                (b"[1e999]", "a number out of range at line 1 column 2"),
                (b"[-1E+999x]", "a number out of range at line 1 column 2")):
            with self.subTest(body):
                self.assertEqual(self.refusal(body), said)

    def test_what_looks_like_it_and_is_json_is_taken(self):
        for body, value in ((b'["\\\\u0000", "\\\\ud83d"]', ["\\u0000", "\\ud83d"]), (b'["NaN"]', ["NaN"]),
                            (b"[1e-999]", [0.0]), (b'[{"a": 1}, {"a": 1}]', [{"a": 1}, {"a": 1}]),
                            (b'{"a": {"a": 1}}', {"a": {"a": 1}}), (b'{"A": 1, "a": 2}', {"A": 1, "a": 2}),
                            ("\ufeff".join('""').encode(), "\ufeff"), (b'"\x7f"', "\x7f")):
            with self.subTest(body):
                self.assertEqual(parse_json(body)[0], value)

    def test_text_that_is_not_json_is_refused_with_its_place(self):
        for body, said in ((b"", "the text is empty, expected a JSON value at line 1 column 1"),
                           (b" \n ", "the text is empty, expected a JSON value at line 2 column 2"),
                           (b"appointment", "expecting a value at line 1 column 1"),
                           (b"{'a': 1}", "expecting property name enclosed in double quotes at line 1 column 2"),
                           (b'{"a" 1}', "expecting ':' delimiter at line 1 column 6"),
                           (b'{"a": 1', "expecting ',' delimiter at line 1 column 8"),
                           (b'{"a":\n tru}', "expecting a value at line 2 column 2"),
                           (b'["abc', "unterminated string at line 1 column 2"),
                           (b'["a\nb"]', "invalid control character at line 1 column 4"),
                           (b"{} {}", "more text after the JSON value at line 1 column 4"),
                           (b'{"\xc3\xa9": "\xff"}', "the text is not UTF-8 at line 1 column 8"),
                           (b'"\xed\xa0\x80"', "the text is not UTF-8 at line 1 column 2")):
            with self.subTest(body):
                self.assertEqual(self.refusal(body), said)
        for body in (b"01", b"1.", b".5", b"+1", b"1e", b"--1", b"0x1", b"[1,]", b'{"a":1,}', b"[,]", b"True",
                     b'"\\x41"', b'"\\u12"', b"/**/1", b"'a'", b"\xc2\xa01", b"1\x0b", b'"\t"', "١".encode(), b"nul",
                     b"]", b"[}", b"{]"):
            with self.subTest(body):
                self.assertRegex(self.refusal(body), r" at line \d+ column \d+$")

    def test_a_refusal_never_repeats_the_text(self):
        for body in (b'{"secret": 1, "secret": 2}', b'["secret\\u0000"]', b'{"secret" 1}', b"secret", b'["secret',
                     b'"\\secret"'):
            with self.subTest(body):
                self.assertNotIn("secret", self.refusal(body))

    def test_64_levels_are_read_and_one_more_is_refused(self):
        self.assertEqual(parse_json(b"[" * 64 + b"]" * 64)[1], "[" * 64 + "]" * 64)
        self.assertEqual(self.refusal(b"[" * 65 + b"]" * 65), "nested deeper than 64 levels at line 1 column 65")

    def test_brackets_side_by_side_or_in_a_string_are_no_depth(self):
        for text in ("[" + "{}," * 1000 + "[]]", json.dumps("[" * 1000), json.dumps('"[' * 1000),
                     "[" + '"\\\\",[],' * 100 + "1]"):
            with self.subTest(text[:20]):
                self.assertEqual(parse_json(text.encode())[0], json.loads(text))

    def test_a_bomb_of_a_million_brackets_is_refused(self):
        for bomb in (b"[" * 1000000, b'{"a":' * 200000, b"{" * 1000000, b'{"\\u0000' + b"[" * 1000000, b"[\n" * 500000):
            with self.subTest(bomb[:9]):
                self.assertRegex(self.refusal(bomb), "nested deeper than 64 levels|U.0000 in a string")

    def test_a_number_has_at_most_100_characters(self):
        self.assertEqual(parse_json(b"9" * 100)[0], int("9" * 100))
        for number in (b"9" * 101, b"9" * 1000000, b"-0." + b"9" * 1000000, b"1e" + b"9" * 1000000):
            with self.subTest(number[:4]):
                self.assertEqual(self.refusal(b"[0, " + number + b"]"),
                                 "a number longer than 100 characters at line 1 column 5")

    def test_a_megabyte_made_to_be_slow_is_read_or_refused(self):
        """A quadratic reader would take minutes for each."""
        def filled(start, piece, end):
            return start + piece * ((MEGABYTE - len(start)) // len(piece)) + end
        names = b",".join(b'"%x":1' % number for number in range(90000))
        for name, body, taken in (("backslashes", filled(b'["\\u0000', b"\\", b""), False),
                                  ("escaped quotes", filled(b'{"\\ud800', b'\\"', b""), False),
                                  ("names and no values", filled(b"{", b'"a":', b""), False),
                                  ("objects with a name", filled(b"[", b'{"a":1},', b'"\\ud83d\\ude00"]'), True),
                                  ("spaces after each string", filled(b'["\\ud83d\\ude00"', b',""' + b" " * 50, b"]"),
                                   True), ("one name twice, far apart", b'{"z":1,' + names + b',"z":1}', False),
                                  ("as many names as go in", b"{" + names + b"}", True),
                                  ("surrogate pairs", filled(b'"', b"\\ud83d\\ude00", b'"'), True)):
            with self.subTest(name):
                if taken:
                    self.assertEqual(parse_json(body)[1], body.decode())
                else:
                    self.refusal(body)

    def test_random_bytes_are_read_as_json_does_or_refused_as_json(self):
        chance = random.Random(8259)
        pieces = [b"{", b"}", b"[", b"]", b",", b":", b'"', b'"a"', b'"b":', b"1", b"-", b"1e5", b"true", b"null", b" ",
                  b"\n", b"\\", b"\\u0041", b"\\u0000", b"\\ud83d", b"NaN", b"1e999", b"\0", b"\xff", b"\xef\xbb\xbf",
                  "é".encode(), b"9" * 101]
        taken = 0
        for _ in range(5000):
            body = b"".join(chance.choice(pieces) for _ in range(chance.randint(1, 7)))
            with contextlib.suppress(JSONError):
                value = parse_json(body)[0]
                self.assertEqual(json.loads(body.decode(), object_pairs_hook=self.without_twins), value)
                text = json.dumps(value, allow_nan=False, ensure_ascii=False)
                self.assertNotIn("\\u0000", text.encode().decode(), body)     # encode() refuses half surrogate pairs
                taken += 1
        self.assertGreater(taken, 100)

    def without_twins(self, pairs):
        self.assertEqual(len(dict(pairs)), len(pairs))
        return dict(pairs)


# =============================================================================
# Schema
# =============================================================================

class TimestampTest(unittest.TestCase):

    def test_spellings_of_one_instant_have_one_canonical_form(self):
        for text in ("2025-01-10T14:00:00Z", "2025-01-10t14:00:00z", "2025-01-10 14:00:00", "2025-01-10T14:00",
                     "2025-01-10T14", "2025-01-10T14:00:00.000Z", "2025-01-10T14:00:00,0Z", "2025-01-10T14:00:00+00:00",
                     "2025-01-10T14:00:00-00:00", "2025-01-10T16:00:00+02:00", "2025-01-10T16:00:00+02",
                     "2025-01-10T16:00:00+0200", "2025-01-10T09:30:00-04:30", "20250110T140000Z",
                     "2025-W02-5T14:00:00Z", "2025W025T1400", "2025-010T14:00:00Z", "2025010T14Z",
                     "2025-01-11T00:00:00+10:00"):
            with self.subTest(text):
                self.assertEqual(canonical_timestamp(text), "2025-01-10T14:00:00Z")

    def test_the_canonical_form_is_kept_as_it_is(self):
        for text in ("2025-01-10T14:00:00Z", "2024-02-29T23:59:59.123456789Z", "0001-01-01T00:00:00Z",
                     "9999-12-31T23:59:59Z"):
            self.assertEqual(canonical_timestamp(text), text)

    def test_up_to_9_fraction_digits_count_and_trailing_zeros_do_not(self):
        for fraction, expected in ((".25", ".25"), (".250000000", ".25"), (".000000001", ".000000001"), (",5", ".5"),
                                   (".0", "")):
            self.assertEqual(canonical_timestamp(f"2025-01-10T14:00:00{fraction}Z"), f"2025-01-10T14:00:00{expected}Z")
        self.assertRaises(ValueError, canonical_timestamp, "2025-01-10T14:00:00.1234567890Z")

    def test_24_o_clock_is_the_next_day(self):
        self.assertEqual(canonical_timestamp("2024-12-31T24:00:00"), "2025-01-01T00:00:00Z")
        self.assertRaises(ValueError, canonical_timestamp, "2024-12-31T24:00:01")

    def test_a_leap_second_is_taken_where_utc_can_have_one(self):
        self.assertEqual(canonical_timestamp("2017-01-01T00:59:60.5+01:00"), "2016-12-31T23:59:60.5Z")
        self.assertRaises(ValueError, canonical_timestamp, "2016-12-31T23:59:60+01:00")

    def test_what_is_no_date_time_is_refused(self):
        for text in ("", "2025-01-10", "14:00:00", "2025-02-29T00:00Z", "2025-13-01T00:00", "2025-00-10T00:00",
                     "2025-01-32T00:00", "2025-366T00:00", "2025-000T00:00", "2025-W53-1T00:00", "2025-W00-1T00:00",
                     "2025-W02-8T00:00", "2025-01-10T25:00", "2025-01-10T14:60", "2025-01-10T14:00:61",
                     "2025-01-10T14:00+24:00", "2025-01-10T14:00+01:60", "2025-01-10T14:00 Z", "2025-01-10T14:00:00.Z",
                     "2025-1-10T14:00", "25-01-10T14:00", "2025-01-10T14:00:00Z\n", " 2025-01-10T14:00:00Z",
                     "２025-01-10T14:00:00Z", "2025-01-10T1٤:00:00Z", "2025-01-10X14:00", "0000-01-01T00:00",
                     "1736517600", "now", "0001-01-01T00:00:00+00:01", "9999-12-31T23:59:59-00:01", "9999-12-31T24:00",
                     "0000-W01-1T00", "9999-W53-1T00"):
            with self.subTest(text), self.assertRaises(ValueError):
                canonical_timestamp(text)


class FormatTest(unittest.TestCase):

    def test_every_format_takes_what_its_standard_takes(self):
        for name, good, bad in (
                ("iso8601", ["2025-01-10 14:00", "2025-01-10T14:00:00.5+02:00"],
                 ["2025-01-10", "tomorrow", "2025-02-30T00:00:00Z"]),
                ("date-time", ["2025-01-10T14:00:00Z", "2025-01-10t14:00:00.1234567890123+02:00",
                               "1998-12-31T15:59:60.1-08:00"],
                 ["2025-01-10T14:00:00", "2025-01-10 14:00:00Z", "2025-02-30T00:00:00Z", "2025-01-10T24:00:00Z",
                  "2025-01-10T14:00Z"]),
                ("date", ["2024-02-29"], ["2025-02-29", "2025-1-10", "20250110", "2025-01-10T00:00:00Z", ""]),
                ("time", ["14:00:00Z", "23:59:60Z", "14:00:00.5-05:00"],
                 ["14:00:00", "24:00:00Z", "14:00Z", "22:59:60Z"]),
                ("duration", ["PT30M", "P1Y2M3DT4H5M6S", "P4W"], ["P", "PT", "P1", "1D", "P1Y1W", "P1D2M", "PT1D",
                                                                  "P1Y2D"]),
                ("email", ["joe@example.com", '"joe b"@example.com', "a@[127.0.0.1]", "a@[IPv6:::1]"],
                 ["joe", "@x", "joe@", ".a@x.org", "a..b@x.org", "a b@x.org", "a@x@y", "a@[300.0.0.1]",
                  "a" * 320 + "@x.org"]),
                ("uuid", ["2eb8aa08-aa98-11ea-b4aa-73b441d16380"],
                 ["2eb8aa08aa9811eab4aa73b441d16380", "2eb8aa08-aa98-11ea-b4aa-73b441d1638g"]),
                ("uri", ["http://a.example:80/b?c=%20#d", "urn:isbn:1", "mailto:a@b.c", "http://[::1]/"],
                 ["/a", "a b:c", "http://a b", "http://%zz", "http://[::1", "http://[1:2]/", "a:b\\c", "1a:b", ":b"]),
                ("ipv4", ["127.0.0.1"], ["256.0.0.1", "127.0.0", "127.0.0.01", "127.0.0.1.", "1२7.0.0.1"]),
                ("ipv6", ["::1", "::ffff:1.2.3.4"], [":::1", "1::2::3", "12345::", "::1%eth0", "1.2.3.4"]),
                ("hostname", ["a.example", "xn--4gbwdl.xn--wgbh1c"], ["-a.example", "a_b", "a..b", "a" * 64, ".a", "",
                                                                      "a.b."]),
                ("json-pointer", ["", "/a~0b~1c/0", "/"], ["a", "/~", "/~2", "#/a"]),
                ("regex", ["^[a-z]+$", "\\p{L}{2}"], ["(", "\\a", "a**", "x" * 1001])):
            for text in good:
                with self.subTest(format=name, good=text):
                    self.assertEqual(rules({"format": name}, text), [])
            for text in bad:
                with self.subTest(format=name, bad=text[:30]):
                    self.assertEqual(rules({"format": name}, text), ["format"])

    def test_a_format_speaks_of_texts_only_and_an_unknown_one_of_nothing(self):
        self.assertEqual(rules({"format": "ipv4"}, 5), [])
        self.assertEqual(rules({"format": "zip-code"}, "x"), [])

    def test_a_megabyte_made_to_be_slow_is_just_refused(self):
        for name, start, piece, end in (("email", "", "a.", ""), ("email", '"', "\\a", ""), ("uri", "a://", "%41", "<"),
                                        ("uri", "a:/", "/", "<"), ("hostname", "", "a-", ""),
                                        ("duration", "P", "1", ""), ("json-pointer", "", "/", "~"),
                                        ("iso8601", "2025-01-10T14:00:00.", "1", "Z"), ("ipv6", "", ":", ""),
                                        ("regex", "", "\\p{L}", "")):
            with self.subTest(name + " " + start + piece):
                self.assertEqual(rules({"format": name}, start + piece * (MEGABYTE // len(piece)) + end), ["format"])


class PatternTest(unittest.TestCase):
    """Regular expressions mean what ECMA-262 says, also where Python's would mean something else."""

    def test_a_pattern_matches_what_ecma_262_matches(self):
        for pattern, good, bad in (("^a$", ["a"], ["a\n", "ba"]), ("a", ["bab"], ["b"]), ("^\\d$", ["5"], ["٥"]),
                                   ("^\\w$", ["a"], ["é"]), ("^\\D$", ["٥"], ["5"]), ("^\\W$", ["é"], ["a"]),
                                   ("^\\s$", [" ", "\u00a0", "\ufeff"], ["\x1c", "\x85"]),
                                   ("^\\S$", ["\x1c", "\x85"], ["\u2028", "\ufeff"]), ("^[^\\S]$", [" "], ["a"]),
                                   ("^.$", ["😀", "\x85"], ["\u2028", "\r"]), ("^\\p{L}+$", ["Zoë", "ж"], ["5"]),
                                   ("^\\P{L}$", ["5"], ["ж"]), ("^[\\p{Lu}\\d]+$", ["É5"], ["é"]),
                                   ("^\\p{Letter}$", ["a"], ["1"]), ("^\\p{gc=Nd}$", ["٥"], ["a"]),
                                   ("^(?<y>a)\\k<y>$", ["aa"], ["a"]), ("^(a|b)\\1$", ["bb"], ["ab"]),
                                   ("^\\u{1F600}$", ["😀"], ["u"]), ("^\\ud83d\\ude00$", ["😀"], ["a"]),
                                   ("^\\cJ\\x41\\u0042\\0$", ["\nAB\0"], ["JAB0"]), ("^[]$", [], ["", "]"]),
                                   ("^[^]$", ["]", "\n"], [""]), ("^a{,2}$", ["a{,2}"], ["aa"]),
                                   ("^[[]$", ["["], ["]"]), ("^\\/\\-$", ["/-"], ["\\/"]),
                                   ("^(?=a)a(?!b)", ["ac"], ["ab"]), ("(?<=a)b", ["ab"], ["cb"]),
                                   ("^[a\\-z]$", ["-"], ["b"]), ("^[\\b]$", ["\b"], ["b"]),
                                   ("^A-\\d{4}(-[A-Z])?$", ["A-0001", "A-0001-B"], ["A-1", "B-0001"])):
            search = ecma_pattern(pattern).search
            with self.subTest(pattern):
                self.assertEqual([text for text in good if not search(text)], [])
                self.assertEqual([text for text in bad if search(text)], [])

    def test_what_ecma_262_does_not_know_is_refused(self):
        for pattern in ("\\a", "\\A", "\\Z", "(?P<n>a)", "(?i)a", "(?i:a)", "(?#c)", "(?>a)", "a*+", "a**", "(", ")",
                        "[", "[z-a]", "*", "\\p{Greek}", "\\p{Lx}", "\\p", "\\u{110000}", "\\", "(?<a>b)(?<a>c)",
                        "(" * 5000 + ")" * 5000, "\\2", "a{99999999999999}", "[\\B]"):
            with self.subTest(pattern[:20]), self.assertRaises(ValueError):
                ecma_pattern(pattern)

    def test_a_property_that_is_not_supported_says_which_are(self):
        with self.assertRaisesRegex(ValueError,
                                    r"\\p\{Script=Greek\} is not supported, only general categories such as \\p\{L\}"):
            ecma_pattern("\\p{Script=Greek}")

    def test_a_pattern_that_would_fill_the_memory_is_refused(self):
        with self.assertRaisesRegex(ValueError, "too long"):
            ecma_pattern("\\p{L}" * 200)
        self.assertTrue(ecma_pattern("^" + "\\p{L}" * 20).search("ж" * 20))


class SchemaTest(unittest.TestCase):

    def test_errors_say_where_which_keyword_and_what_was_expected(self):
        for schema, value, expected in (
                ({"type": "object"}, [], ("", "type", "The payload must be of type object")),
                ({"required": ["a"]}, {}, ("/a", "required", "Missing required field: a")),
                ({"required": [""]}, {}, ("/", "required", "Missing required field: (empty name)")),
                ({"properties": {"a": {"required": ["b"]}}}, {"a": {}},
                 ("/a/b", "required", "Missing required field: a.b")),
                ({"dependentRequired": {"a": ["b"]}}, {"a": 1},
                 ("/b", "dependentRequired", "Missing required field: b (as there is a)")),
                ({"properties": {"a": {"type": ["string", "null"]}}}, {"a": 5},
                 ("/a", "type", "Field 'a' must be of type string or null")),
                ({"items": {"enum": ["x", 1]}}, ["x", "y"], ("/1", "enum", "Field '[1]' must be one of: x, 1")),
                ({"const": None}, 1, ("", "const", "The payload must be null")),
                ({"minLength": 1}, "", ("", "minLength", "The payload must not be empty")),
                ({"maxLength": 2}, "abc", ("", "maxLength", "The payload must have at most 2 characters")),
                ({"minimum": 2}, 1, ("", "minimum", "The payload must be at least 2")),
                ({"multipleOf": 0.1}, 0.25, ("", "multipleOf", "The payload must be a multiple of 0.1")),
                ({"pattern": "^A"}, "b", ("", "pattern", "The payload must match the pattern ^A")),
                ({"format": "date"}, "b", ("", "format", "The payload must be a date, for example 2025-01-10")),
                ({"uniqueItems": True}, [1, 1.0], ("", "uniqueItems", "The payload must not contain an item twice")),
                ({"additionalProperties": False}, {"a/b~": 1},
                 ("/a~1b~0", "additionalProperties", "Field 'a/b~' is not a known field")),
                ({"propertyNames": {"maxLength": 1}}, {"ab": 1},
                 ("/ab", "propertyNames", "Field 'ab' has a name that is not allowed")),
                ({"not": {}}, 1, ("", "not", "The payload must not fit the schema in not")),
                (False, 1, ("", "false", "The payload is not allowed"))):
            with self.subTest(schema):
                self.assertEqual(Schema(schema).errors(value), [expected])

    def test_numbers_are_equal_as_in_mathematics_and_true_is_no_number(self):
        for one, other, same in ((1, 1.0, True), (0, -0.0, True), (1, True, False), (0, False, False),
                                 (10 ** 22, 1e22, True), (2 ** 53, 2.0 ** 53, True), (2 ** 53 + 1, 2.0 ** 53, False),
                                 (1e308, 1e308, True), ("1", 1, False), (None, False, False), ([1], [1.0], True),
                                 ({}, [], False), ({"a": 1, "b": [2]}, {"b": [2.0], "a": 1}, True),
                                 (["a", "b"], ["b", "a"], False), ({'a":1,"b': 1}, {"a": 1, "b": 1}, False)):
            with self.subTest(repr((one, other))):
                self.assertIs(json_equal(one, other), same)
                self.assertEqual(rules({"const": one}, other), [] if same else ["const"])
                self.assertEqual(rules({"enum": ["x", one]}, other), [] if same else ["enum"])
                self.assertEqual(rules({"uniqueItems": True}, [one, other]), ["uniqueItems"] if same else [])
        self.assertEqual(rules({"type": "integer"}, 1.0), [])
        self.assertEqual(rules({"type": "number"}, True), ["type"])

    def test_the_text_for_equality_does_not_blow_up_huge_numbers(self):
        self.assertLess(len(canonical_json([1e308] * 1000)), 10000)

    def test_a_multiple_is_meant_as_it_is_written(self):
        for value, divisor, fits in ((0.3, 0.1, True), (0.35, 0.1, False), (4, 2, True), (4.0, 2, True), (5, 2, False),
                                     (1e308, 0.5, True), (1, 1e-300, True), (1e-300, 1e300, False), (True, 2, True)):
            with self.subTest((value, divisor)):
                self.assertEqual(rules({"multipleOf": divisor}, value), [] if fits else ["multipleOf"])

    def test_a_hostile_value_comes_back_as_at_most_100_problems(self):
        many = {str(number): number for number in range(1000)}
        for schema, value in (({"items": {"type": "string"}}, [1] * 100000), ({"additionalProperties": False}, many),
                              ({"propertyNames": {"maxLength": 0}}, many),
                              ({"patternProperties": {"": {"type": "null"}}}, many),
                              ({"unevaluatedProperties": False}, many), ({"unevaluatedItems": False}, [1] * 100000)):
            with self.subTest(schema):
                self.assertEqual(len(Schema(schema).errors(value)), 100)

    def test_a_missing_field_is_told_even_after_a_hundred_other_problems(self):
        schema = Schema({"properties": {"a": {"items": {"type": "string"}}}, "required": ["b"]})
        self.assertIn("Missing required field: b", [problem.message for problem in schema.errors({"a": [1] * 1000})])

    def test_names_in_messages_are_short_and_printable(self):
        problem, = Schema({"additionalProperties": False}).errors({"\x1b[2J\n" + "x" * 1000: 1})
        self.assertTrue(problem.message.isprintable() and problem.path.isprintable())
        self.assertLess(len(problem.message), 200)

    def test_references_lead_to_pointers_anchors_ids_and_further_documents(self):
        documents = {"http://x.example/text": {"type": "string",
                                               "$defs": {"n": {"$anchor": "number", "type": "number"}}}}
        for reference, bad in (("#/$defs/a~1b%20c", 1), ("#id", "x"), ("inner", "x"), ("http://x.example/text", 1),
                               ("http://x.example/text#number", "x")):
            schema = {"$id": "http://y.example/all", "$ref": reference, "$defs": {
                "a/b c": {"type": "string"}, "i": {"$anchor": "id", "type": "integer"},
                "k": {"$id": "inner", "type": "null"}}}
            with self.subTest(reference):
                self.assertEqual([problem.rule for problem in Schema(schema, documents).errors(bad)], ["type"])

    def test_a_schema_may_describe_a_tree_by_itself(self):
        tree = {"type": "object", "properties": {"below": {"type": "array", "items": {"$ref": "#"}}},
                "required": ["name"]}
        self.assertEqual(rules(tree, {"name": 1, "below": [{"name": 2, "below": [{"name": 3}]}]}), [])
        self.assertEqual(Schema(tree).errors({"name": 1, "below": [{"name": 2, "below": [{}]}]})[0].path,
                         "/below/0/below/0/name")

    def test_a_schema_that_is_not_valid_is_refused_with_its_place(self):
        for schema, place in (
                ({"type": "strnig"}, "/type"), ({"properties": {"a": {"minLength": -1}}}, "/properties/a/minLength"),
                ({"required": "a"}, "/required"),
                ({"required": ["a", "a"]}, "/required"), ({"items": [{}]}, "/items"), ({"allOf": []}, "/allOf"),
                ({"anyOf": [{}, 5]}, "/anyOf/1"),
                ({"$ref": "#/$defs/none"}, "/$ref"), ({"$ref": "#none"}, "/$ref"),
                ({"$ref": "http://x.example/"}, "/$ref"), ({"$ref": 5}, "/$ref"),
                ({"$id": "http://x.example/", "$ref": "http://["}, "/$ref"), ({"pattern": "("}, "/pattern"),
                ({"patternProperties": {"a/b(": {}}}, "/patternProperties/a~1b("),
                ({"additionalProperties": False, "patternProperties": 5}, "/patternProperties"),
                ({"additionalProperties": False, "properties": 5}, "/properties"),
                ({"items": {}, "prefixItems": 5}, "/prefixItems"),
                ({"contains": {}, "minContains": "x"}, "/minContains"), ({"if": {}, "then": 5}, "/then"),
                ({"$defs": {"a": {"enum": 5}}}, "/$defs/a/enum"), ({"multipleOf": 0}, "/multipleOf"),
                ({"maximum": float("inf")}, "/maximum"), ({"uniqueItems": 1}, "/uniqueItems"),
                ({"$schema": []}, "/$schema"), ({"allOf": [{"$ref": "#"}]}, ""), ("text", ""), ([], ""), (None, ""),
                ({"dependentSchemas": {"a/b": 5}}, "/dependentSchemas/a~1b"),
                ({"examples": [1], "$ref": "#/examples/-1"}, "/$ref")):
            with self.subTest(schema):
                with self.assertRaises(SchemaError) as caught:
                    Schema(schema)
                error = caught.exception
                if place:
                    self.assertEqual(error.place, place)
                self.assertEqual(str(error), f"at {error.place or '/'}: {error.reason}")

    def test_a_schema_error_is_one_line(self):
        with self.assertRaises(SchemaError) as caught:
            Schema({"properties": {"a\n\x1b[2J": {"type": 5}}})
        self.assertTrue(str(caught.exception).isprintable())

    def test_nothing_nested_without_end_breaks_the_compiler(self):
        for keyword, wrap in (("items", lambda schema: {"type": "array", "items": schema}),
                              ("properties", lambda schema: {"properties": {"a": schema}}),
                              ("not", lambda schema: {"not": schema})):
            with self.subTest(keyword):
                schema = {"type": "string"}
                for _ in range(30):
                    schema = wrap(schema)
                self.assertEqual(Schema(schema).errors("x") == [], keyword != "items")
                for _ in range(5000):
                    schema = wrap(schema)
                self.assertRaisesRegex(SchemaError, "nested too deeply", Schema, schema)

    def test_an_unknown_keyword_is_an_annotation_and_a_misspelt_one_is_listed(self):
        schema = Schema({"properties": {"a": {"maxlength": 1, "tpye": "string"}}, "x-owner": "desk", "requird": ["b"],
                         "definitions": {}})
        self.assertEqual(schema.errors({"a": "long"}), [])
        self.assertEqual(sorted(schema.misspelt), [("", "requird", "required"),
                                                   ("/properties/a", "maxlength", "maxLength"),
                                                   ("/properties/a", "tpye", "type")])
        self.assertEqual(Schema({"properties": {"requird": {}, "lenght": True}}).misspelt, [])

    def test_formats_can_be_left_to_be_annotations(self):
        self.assertEqual(Schema({"format": "date"}, assert_formats=False).errors("x"), [])

    def test_one_schema_serves_many_threads(self):
        schema = Schema({"items": {"anyOf": [{"type": "string"}, {"minimum": 2}]}, "uniqueItems": True})
        results = []

        def check():
            results.extend(len(schema.errors([1, 2, "a"])) for _ in range(100))

        threads = [threading.Thread(target=check) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
        self.assertEqual(results, [1] * 400)

    def test_the_fast_way_accepts_only_what_every_check_accepts(self):
        chance = random.Random(2020)
        accepted = refused = 0
        for _ in range(1500):
            document = random_schema(chance)
            schema = Schema(document)
            for _ in range(12):
                value = random_value(chance, document if chance.random() < 0.7 else {})
                problems = []
                schema._check(value, None, problems, (schema._root,), set())
                if schema.accepts(value):
                    self.assertEqual(problems, [], (document, value))
                    accepted += 1
                refused += bool(problems)
                self.assertEqual(bool(schema.errors(value)), bool(problems), (document, value))
        self.assertGreater(accepted, 1000)
        self.assertGreater(refused, 1000)

    def test_an_ordinary_event_takes_the_fast_way(self):
        self.assertTrue(Schema(receiver.EVENT_SCHEMA).accepts(event(notes=None, room=4)))
        schema = Schema({"type": "object", "additionalProperties": False, "properties": {
            "age": {"type": "integer", "minimum": 0},
            "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]+$"}, "minItems": 1}}})
        self.assertTrue(schema.accepts({"tags": ["a"], "age": 5}))

    def test_nothing_in_a_schema_becomes_code(self):
        name = "a'];import os;raise SystemExit;['\n\"\"\"\\"
        schema = {"properties": {name: {"enum": [name]}}, "required": [name, name + "2"], "additionalProperties": False}
        self.assertEqual([problem.rule for problem in Schema(schema).errors({name: name, "x": 1})],
                         ["required", "additionalProperties"])


TEXTS = ["", "a", "ab", "2025-01-10T14:00:00Z", "é", "1"]
SCALARS = [None, True, False, 0, 1, 1.0, -1, 1.5, 2, 10 ** 30, *TEXTS]


def random_schema(chance, depth=0):
    """A schema of the keywords that the fast way knows, and sometimes of one that it does not."""
    if depth > 2 or chance.random() < 0.1:
        return chance.choice([True, {}, {"type": "string"}, {"type": "integer"}, False] if depth else [True, {}])
    schema = {}
    if chance.random() < 0.6:
        schema["type"] = chance.choice(["object", "array", "string", "number", "integer", "boolean", "null",
                                        ["string", "null"], ["object", "array"], ["integer", "string"],
                                        ["number", "boolean", "object"]])
    for keyword, make in (
            ("minLength", lambda: chance.randint(0, 2)), ("maxLength", lambda: chance.randint(0, 3)),
            ("pattern", lambda: chance.choice(["^a", "\\d"])),
            ("format", lambda: chance.choice(["iso8601", "date-time", "ipv4", "unknown"])),
            ("minimum", lambda: chance.choice([0, 1.0, 1.5])), ("maximum", lambda: chance.choice([1, 2.0, 10 ** 20])),
            ("enum", lambda: chance.sample(TEXTS if chance.random() < 0.5 else SCALARS, 3)),
            ("const", lambda: chance.choice(SCALARS)), ("required", lambda: chance.sample("abc", chance.randint(0, 2))),
            ("minItems", lambda: chance.randint(0, 2)), ("maxItems", lambda: chance.randint(0, 3)),
            ("items", lambda: random_schema(chance, depth + 1)),
            ("properties", lambda: {name: random_schema(chance, depth + 1)
                                    for name in chance.sample("abc", chance.randint(0, 3))}),
            ("additionalProperties", lambda: chance.choice([True, False, False, {"type": "string"}])),
            ("uniqueItems", lambda: True), ("anyOf", lambda: [random_schema(chance, depth + 1) for _ in range(2)])):
        rare, common = ("enum", "const", "uniqueItems", "anyOf"), ("properties", "items")
        if chance.random() < (0.04 if keyword in rare else 0.35 if keyword in common else 0.15):
            schema[keyword] = make()
    return schema


def random_value(chance, schema, depth=0):
    """A value that has some chance to fit."""
    schema = schema if isinstance(schema, dict) else {}
    if chance.random() < 0.2 or depth > 3:
        return chance.choice(SCALARS)
    if "enum" in schema or "const" in schema:
        return chance.choice(schema.get("enum") or [schema.get("const")])
    kind = schema.get("type", chance.choice(["object", "array", "string", "number"]))
    kind = chance.choice(kind) if isinstance(kind, list) else kind
    if kind == "object":
        known = schema.get("properties", {})
        return {name: random_value(chance, known.get(name, {}),
                                   depth + 1) for name in "abcd" if chance.random() < (0.3 if name == "d" else 0.7)}
    if kind == "array":
        return [random_value(chance, schema.get("items", {}), depth + 1) for _ in range(chance.randint(0, 3))]
    return chance.choice({"string": TEXTS, "number": [0, 1.5, 2, 10 ** 30], "integer": [0, 1, 2.0],
                          "boolean": [True, False]}.get(kind, [None]))


SUITE = os.environ.get("JSON_SCHEMA_TEST_SUITE", "")
SUITE_FORMATS = ("date-time", "date", "time", "duration", "email", "uuid", "uri", "ipv4", "ipv6", "hostname",
                 "json-pointer", "regex", "ecmascript-regex", "unknown")


@unittest.skipUnless(SUITE, "JSON_SCHEMA_TEST_SUITE does not name a folder with the official suite")
class SchemaSuiteTest(unittest.TestCase):
    """The official JSON-Schema-Test-Suite: a folder with tests/, remotes/ and metaschemas/ (each known by its $id)."""

    @classmethod
    def setUpClass(cls):
        root = Path(SUITE)
        cls.tests, cls.documents = root / "tests" / "draft2020-12", {}
        for path in sorted((root / "remotes").rglob("*.json")):
            name = path.relative_to(root / "remotes").as_posix()
            if not name.startswith("draft") or name.startswith("draft2020-12/"):
                cls.documents["http://localhost:1234/" + name] = json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(path for path in (root / "metaschemas").rglob("*") if path.is_file()):
            document = json.loads(path.read_text(encoding="utf-8"))
            cls.documents[document["$id"]] = document

    def run_suite(self, paths, least, **options):
        count = 0
        for path in paths:
            for group in json.loads(path.read_text(encoding="utf-8")):
                schema = Schema(group["schema"], self.documents, **options)
                for test in group["tests"]:
                    count += 1
                    with self.subTest(file=path.name, group=group["description"], test=test["description"]):
                        self.assertIs(schema.errors(test["data"]) == [], test["valid"])
        self.assertGreaterEqual(count, least)

    def test_every_required_test_of_draft_2020_12_passes(self):
        self.run_suite(sorted(self.tests.glob("*.json")), 1000, assert_formats=False)

    def test_every_format_that_is_asserted_passes_its_tests(self):
        folder = self.tests / "optional" / "format"
        self.run_suite([folder / (name + ".json") for name in SUITE_FORMATS if (folder / (name + ".json")).exists()],
                       200)

    def test_patterns_pass_the_tests_of_ecma_262(self):
        folder = self.tests / "optional"
        self.run_suite([folder / "ecmascript-regex.json", folder / "non-bmp-regex.json"], 50, assert_formats=False)


# =============================================================================
# Events
# =============================================================================

class EventTest(unittest.TestCase):

    def setUp(self):
        self.reader = EventReader(receiver.EVENT_SCHEMA)

    def read(self, value, reader=None):
        return (reader or self.reader).event(value, json.dumps(value), "2025-01-10T14:00:01.000000Z", "desk")

    def problems(self, value, reader=None):
        """What is wrong with a value that must be refused, the problem that decides the message first."""
        with self.assertRaises(InvalidEvent) as caught:
            self.read(value, reader)
        self.assertEqual(str(caught.exception), caught.exception.problems[0].message)
        return caught.exception.problems

    @staticmethod
    def with_property(name, **changes):
        """A reader by the built-in schema with one property changed."""
        properties = receiver.EVENT_SCHEMA["properties"]
        changed = {**properties, name: {**properties.get(name, {}), **changes}}
        return EventReader({**receiver.EVENT_SCHEMA, "properties": changed})

    def test_a_valid_value_becomes_an_event_with_its_payload_as_it_came(self):
        value = event(timestamp="2025-01-10 16:00:00.50+02:00", notes="bring results", room={"floor": 4})
        self.assertEqual(self.read(value), (
            "scheduled", "APT-1", "PAT-1", "2025-01-10T14:00:00.5Z", "bring results", "2025-01-10T14:00:01.000000Z",
            "desk", json.dumps(value), None))
        self.assertIsNone(self.read(event(notes=None)).notes)

    def test_the_first_stage_that_fails_decides_the_message(self):
        wrong = event(event_type="moved", appointment_id="", timestamp="soon", notes=5)
        stages = (("patient_id", ..., "PAT-1", "Missing required field: patient_id"),
                  ("notes", 5, None, "Field 'notes' must be of type string or null"),
                  ("event_type", "moved", "updated",
                   "Field 'event_type' must be one of: scheduled, cancelled, updated"),
                  ("timestamp", "soon", "2025-01-10T14:00:00Z",
                   "Field 'timestamp' must be an ISO 8601 date-time, for example 2025-01-10T14:00:00Z"),
                  ("appointment_id", "", "APT-1", "Field 'appointment_id' must not be empty"),
                  ("patient_id", "x" * 256, "PAT-1", "Field 'patient_id' must have at most 255 characters"))
        value = {**wrong, "patient_id": ...}
        for name, bad, good, message in stages:
            with self.subTest(name):
                value[name] = bad
                self.assertEqual(self.problems({key: item for key,
                                                item in value.items() if item is not ...})[0].message, message)
                value[name] = good
        self.assertEqual(self.read(value).appointment_id, "APT-1")

    def test_all_problems_are_told_at_once_with_path_and_rule(self):
        found = self.problems({"event_type": "moved", "appointment_id": "", "timestamp": 5})
        self.assertEqual([(problem.path, problem.rule) for problem in found],
                         [("/patient_id", "required"), ("/timestamp", "type"), ("/event_type", "enum"),
                          ("/appointment_id", "minLength")])

    def test_what_is_no_object_is_refused_by_its_type(self):
        for value in (None, True, 5, "text", [], [event()]):
            with self.subTest(repr(value)[:20]):
                problem, = self.problems(value)
                self.assertEqual(problem, ("", "type", "The payload must be of type object"))

    def test_a_message_never_repeats_a_value(self):
        reader = self.with_property("notes", maxLength=3, pattern="^a", format="email")
        for value in (event(event_type="secret"), event(appointment_id="secret" * 50), event(patient_id=["secret"]),
                      event(timestamp="secret"), event(notes="secret"), event(notes={"secret": "secret"}), "secret",
                      ["secret"]):
            with self.subTest(repr(value)[:60]):
                for problem in self.problems(value, reader):
                    self.assertNotIn("secret", "".join(problem))

    def test_an_id_of_spaces_is_empty(self):
        for name in ("appointment_id", "patient_id"):
            for blank in (" ", "\t\n", "\u3000"):
                with self.subTest(name=name, blank=blank):
                    self.assertEqual(self.problems(event(**{name: blank}))[0],
                                     ("/" + name, "minLength", f"Field '{name}' must not be empty"))

    def test_a_new_event_type_in_the_schema_is_taken(self):
        reader = self.with_property("event_type", enum=["scheduled", "no_show"])
        self.assertEqual(self.read(event(event_type="no_show"), reader).event_type, "no_show")
        self.assertEqual(self.problems(event(event_type="updated"), reader)[0].message,
                         "Field 'event_type' must be one of: scheduled, no_show")
        self.assertEqual(reader.event_types, ("scheduled", "no_show"))

    def test_a_new_required_field_in_the_schema_is_required(self):
        reader = EventReader({**receiver.EVENT_SCHEMA, "required": [*receiver.EVENT_SCHEMA["required"], "clinic"]})
        self.assertEqual(self.problems(event(), reader)[0].message, "Missing required field: clinic")
        self.assertEqual(self.read(event(clinic="north"), reader).patient_id, "PAT-1")

    def test_a_new_pattern_for_ids_is_kept(self):
        reader = self.with_property("patient_id", pattern="^PAT-\\d+$")
        self.assertEqual(self.problems(event(patient_id="77"), reader)[0].message,
                         "Field 'patient_id' must match the pattern ^PAT-\\d+$")
        self.assertEqual(self.read(event(), reader).patient_id, "PAT-1")

    def test_a_schema_laxer_than_the_table_still_takes_only_what_the_table_can_hold(self):
        for document in (True, {}, {"type": "object"}, {"properties": {"timestamp": {"format": "date-time"}}},
                         {"properties": {"event_type": True}}):
            reader = EventReader(document)
            with self.subTest(document):
                self.assertEqual(self.read(event(notes=["any"]), reader)[:5],
                                 ("scheduled", "APT-1", "PAT-1", "2025-01-10T14:00:00Z", None))
                for name in receiver.REQUIRED_FIELDS:
                    for bad, rule in ((..., "required"), (5, "type"), (None, "type"), ([], "type"), (" ", None)):
                        problem = self.problems(event(**{name: bad}), reader)[0]
                        self.assertEqual((problem.path, problem.rule), (
                            "/" + name, rule or ("format" if name == "timestamp" else "minLength")))
                for value in (None, [], "x", 5, True, [event()]):
                    self.assertEqual(self.problems(value, reader)[0].rule, "type")

    def test_a_time_that_the_schema_takes_and_no_database_column_can_hold_is_refused(self):
        reader = self.with_property("timestamp", format="date-time")
        for text in ("2025-01-10T14:00:00.1234567890Z", "0000-01-01T00:00:00Z", "9999-12-31T23:59:59-01:00"):
            with self.subTest(text):
                self.assertEqual(self.problems(event(timestamp=text), reader)[0].path, "/timestamp")

    def test_the_fields_that_the_schema_names_are_known(self):
        self.assertEqual(self.reader.field_names, {"event_type", "appointment_id", "patient_id", "timestamp", "notes"})
        self.assertEqual((EventReader(True).field_names, EventReader({}).event_types), (frozenset(), ()))

    def test_a_schema_that_no_event_of_the_table_could_satisfy_makes_no_reader(self):
        for kind in ("integer", ["null", "integer"]):
            with self.subTest(kind), self.assertRaisesRegex(SchemaError, "at /properties/timestamp/type: must allow string"):
                self.with_property("timestamp", type=kind)
        self.with_property("timestamp", type=["null", "string"])

    def test_all_that_is_wrong_is_told_at_once_also_what_only_the_table_asks_for(self):
        problems = self.problems(event(event_type="moved", appointment_id=" ", timestamp="soon"))
        self.assertEqual([problem.path for problem in problems], ["/event_type", "/timestamp", "/appointment_id"])

    def test_a_document_that_is_no_schema_makes_no_reader(self):
        for document in (None, [], "x", {"type": 5}, {"properties": []}, {"properties": {"event_type": {"enum": "x"}}}):
            with self.subTest(document), self.assertRaises(SchemaError):
                EventReader(document)


# =============================================================================
# Store
# =============================================================================

PLAIN_TABLE = """CREATE TABLE appointment_events (
    id INTEGER PRIMARY KEY AUTOINCREMENT, event_type TEXT NOT NULL, appointment_id TEXT NOT NULL,
    patient_id TEXT NOT NULL, timestamp TEXT NOT NULL, notes TEXT, received_at TEXT NOT NULL,
    UNIQUE(appointment_id, timestamp))"""
FORGERY = "x\r\n2025-01-10 14:23:15,123 - webhook - INFO - [-] forged\x1b[2J\u2028\u202e\x00\x85"


def stored_event(number=1, **columns):
    """An AppointmentEvent as the reader makes it; its payload says what its columns say, unless given."""
    members = event(appointment_id=f"APT-{number}", **{name: value for name, value in columns.items()
                                                      if name in ("appointment_id", "patient_id", "timestamp", "notes")})
    made = AppointmentEvent(members["event_type"], members["appointment_id"], members["patient_id"], members["timestamp"],
                            members.get("notes"), "2025-01-10T14:23:15.123456Z", "127.0.0.1", json.dumps(members))
    return made._replace(**columns)


def kinds(outcomes):
    return [(outcome.kind, outcome.event_id) for outcome in outcomes]


def write_rows(database, *statements):
    """Run SQL as another program would; (statement, values) or a statement alone."""
    with contextlib.closing(sqlite3.connect(str(database))) as connection, connection:
        for statement in statements:
            connection.execute(*((statement,) if isinstance(statement, str) else statement))


def files(folder):
    """{name: bytes} of all files in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextlib.contextmanager
def without_root():
    """Give up the rights of root for a while: to it no file is read-only."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


class EngineTest(FolderTest):
    """A test with an engine on self.database."""

    def engine(self):
        engine = SQLite(str(self.database))
        engine.open()
        self.addCleanup(engine.close)
        return engine

    def refused(self, words):
        """Opening must fail with these words; gives the message."""
        engine = SQLite(str(self.database))
        with self.assertRaises(SetupError) as caught:
            engine.open()
        self.assertIn(words, str(caught.exception))
        self.assertNotIn("\n", str(caught.exception))
        return str(caught.exception)


class SQLiteTest(EngineTest):

    def test_a_new_file_has_the_promised_tables_and_is_durable_and_private(self):
        engine = self.engine()
        names = [name for name, in rows(self.database, "SELECT name FROM pragma_table_info('appointment_events')")]
        self.assertEqual(names, ["id", "event_type", "appointment_id", "patient_id", "timestamp", "notes", "received_at",
                                 "client", "payload"])
        self.assertEqual(rows(self.database, "PRAGMA journal_mode"), "wal")
        self.assertEqual(rows(self.database, "PRAGMA user_version"), 1)
        self.assertEqual(engine._writer.execute("PRAGMA synchronous").fetchone()[0], 2)
        if POSIX:
            self.assertEqual(self.database.stat().st_mode & 0o077, 0)

    def test_a_group_of_any_size_gets_consecutive_ids_in_order(self):
        engine, last = self.engine(), 0
        for size in (1, 2, 3, 63, 64, 65, 130):
            with self.subTest(size):
                outcomes = engine.write([stored_event(last + number) for number in range(1, size + 1)])
                self.assertEqual(kinds(outcomes), [("stored", last + number) for number in range(1, size + 1)])
                for outcome in outcomes[:1] + outcomes[-1:]:
                    found, = engine.events(Filter(), outcome.event_id - 1, 1)
                    self.assertEqual((found.id, found.appointment_id), (outcome.event_id, f"APT-{outcome.event_id}"))
                last += size

    def test_duplicates_within_one_group_are_decided_there_and_the_first_wins(self):
        for size in (3, 80):
            with self.subTest(size):
                engine, base = self.engine(), size * 1000
                group = [stored_event(base + number) for number in range(size)]
                group[1:1] = [group[0], group[0]._replace(payload='{"other": 1}')]
                outcomes = engine.write(group + group[-1:])
                first, same, other, *rest, last = outcomes
                self.assertEqual((same.kind, same.event_id, same.identical), ("duplicate", first.event_id, True))
                self.assertEqual((other.kind, other.event_id, other.identical), ("duplicate", first.event_id, False))
                self.assertEqual((last.kind, last.event_id), ("duplicate", rest[-1].event_id))
                self.assertEqual({outcome.kind for outcome in [first] + rest}, {"stored"})
                for one, outcome in zip(group, outcomes):
                    self.assertEqual(engine.events(Filter(), outcome.event_id - 1, 1)[0].appointment_id,
                                     one.appointment_id)

    def test_ids_of_deleted_events_are_never_given_again(self):
        engine = self.engine()
        engine.write([stored_event(number) for number in range(1, 6)])
        write_rows(self.database, "DELETE FROM appointment_events WHERE id > 1")
        outcomes = engine.write([stored_event(1), stored_event(7), stored_event(8), stored_event(7)])
        self.assertEqual([outcome.kind for outcome in outcomes], ["duplicate", "stored", "stored", "duplicate"])
        self.assertEqual(outcomes[0].event_id, 1)
        self.assertGreater(outcomes[1].event_id, 5)
        self.assertEqual(dict(rows(self.database, "SELECT appointment_id, id FROM appointment_events")),
                         {"APT-1": 1, "APT-7": outcomes[1].event_id, "APT-8": outcomes[2].event_id})

    def test_one_bad_row_never_fails_its_neighbours(self):
        bad = {"NULL in a column that takes none": stored_event("bad", patient_id=None),
               "a lone surrogate": stored_event("bad", notes="\ud800"),
               "a value that no column takes": stored_event("bad")._replace(notes=object()),
               "a number too large": stored_event("bad")._replace(notes=2 ** 70)}
        for number, (name, row) in enumerate(bad.items()):
            with self.subTest(name):
                good = [stored_event(f"{number}-{at}") for at in range(4)]
                outcomes = self.engine().write(good[:2] + [row] + good[2:] + good[:1])
                self.assertEqual([outcome.kind for outcome in outcomes],
                                 ["stored", "stored", "failed", "stored", "stored", "duplicate"])
                self.assertIsInstance(outcomes[2].error, Exception)
        self.assertEqual(rows(self.database), 4 * len(bad))
        self.assertEqual(self.engine().write([stored_event("bad")])[0].kind, "stored")

    def test_the_same_content_is_identical_however_it_is_written(self):
        engine = self.engine()
        stored = stored_event(1, payload='{"a": 1, "b": [1.0, true, "\\u00e9"], "timestamp": "2025-01-10T14:00:00Z"}')
        engine.write([stored])
        cases = {'{"timestamp": "2025-01-10T15:00:00+01:00", "b": [1, true, "é"], "a": 1.0}': True,
                 '{"a": 1, "b": [1, 1, "é"]}': False, '{"a": 1, "b": [true, 1, "é"]}': False,
                 '{"a": 1}': False, "[]": False, "[" * 100000: False, "": False}
        for payload, identical in cases.items():
            with self.subTest(payload[:80]):
                outcome, = engine.write([stored._replace(payload=payload)])
                self.assertEqual((outcome.kind, outcome.event_id, outcome.identical), ("duplicate", 1, identical))

    def test_a_stored_payload_nested_beyond_measure_fails_nobody(self):
        engine = self.engine()
        for depth in (900, 100000):
            key = stored_event(depth, payload='{"a":' * depth + "1" + "}" * depth)
            engine.write([key])
            outcomes = engine.write([key, stored_event(f"{depth}-next")])
            self.assertEqual([outcome.kind for outcome in outcomes], ["duplicate", "stored"])

    def test_other_content_under_a_stored_key_is_kept_in_the_same_commit(self):
        engine, statements = self.engine(), []
        engine.write([stored_event(1)])
        engine._writer.set_trace_callback(statements.append)
        engine.write([stored_event(1, payload='{"other": 1}', client="10.0.0.1"), stored_event(2)])
        engine._writer.set_trace_callback(None)
        words = [statement.split()[0] for statement in statements]
        self.assertLess(words.index("BEGIN"), words.index("INSERT"))
        self.assertEqual(words.count("COMMIT"), 1)
        self.assertGreater(words.index("COMMIT"), max(at for at, word in enumerate(words) if word == "INSERT"))
        self.assertEqual(rows(self.database, "SELECT event_id, received_at, client, payload FROM conflicting_events"),
                         [(1, "2025-01-10T14:23:15.123456Z", "10.0.0.1", '{"other": 1}')])

    def test_a_retry_of_conflicting_content_is_kept_once_for_each_sender(self):
        engine = self.engine()
        engine.write([stored_event(1)])
        for client in ("10.0.0.1", "10.0.0.1", None, None, "10.0.0.2"):
            engine.write([stored_event(1, payload='{"other": 1}', client=client)])
        engine.write([stored_event(1, payload='{"other": 2}')])
        engine.write([stored_event(1)])
        self.assertEqual(rows(self.database, "SELECT count(*) FROM conflicting_events"), 4)

    def test_a_lock_of_another_program_stores_nothing_and_passes(self):
        engine = self.engine()
        with contextlib.closing(sqlite3.connect(str(self.database), isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with self.assertRaises(StoreLocked):
                engine.write([stored_event(1)])
            with self.assertRaises(StoreLocked):
                engine.probe()
            self.assertEqual(engine.last_id(), 0)
            other.execute("ROLLBACK")
        engine.probe()
        self.assertEqual(kinds(engine.write([stored_event(1)])), [("stored", 1)])

    def test_reading_never_waits_for_a_write_under_way(self):
        engine = self.engine()
        engine.write([stored_event(1)])
        engine._writer.execute("BEGIN EXCLUSIVE")
        with engine._lock:
            self.assertEqual([one.id for one in engine.events(Filter(), 0, 10)], [1])
            self.assertEqual(engine.last_id(), 1)
            with self.assertRaises(StoreLocked):
                engine.probe()
        engine._writer.execute("ROLLBACK")

    def test_readers_cannot_write_and_only_a_few_are_kept(self):
        engine = self.engine()
        engine.write([stored_event(1)])
        all_at_once, connect, found = threading.Barrier(20), engine._connect, []
        with mock.patch.object(engine, "_connect", lambda: (all_at_once.wait(WAIT), connect())[1]):
            threads = [threading.Thread(target=lambda: found.append(engine.last_id())) for _ in range(20)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        self.assertEqual(found, [1] * 20)
        self.assertTrue(0 < len(engine._readers) <= receiver.IDLE_READERS)
        with self.assertRaises(sqlite3.OperationalError):
            engine._readers[0].execute("DELETE FROM appointment_events")

    def test_filters_choose_and_pages_go_on_behind_the_last_id(self):
        engine = self.engine()
        times = ["2025-01-10T14:00:00Z", "2025-01-10T14:00:00.5Z", "2025-01-10T14:00:01Z", "2025-01-11T00:00:00Z"]
        engine.write([stored_event(number % 2, timestamp=time_, patient_id=f"PAT-{number}")
                      for number, time_ in enumerate(times)])
        cases = [(Filter(), 0, 10, None, [1, 2, 3, 4]), (Filter(), 1, 2, None, [2, 3]), (Filter(), 0, 10, 2, [1, 2]),
                 (Filter(appointment_id="APT-1"), 0, 10, None, [2, 4]), (Filter(appointment_id="APT-1"), 2, 10, None, [4]),
                 (Filter(patient_id="PAT-2"), 0, 10, None, [3]), (Filter(event_type="cancelled"), 0, 10, None, []),
                 (Filter(since=times[1]), 0, 10, None, [2, 3, 4]), (Filter(until=times[2]), 0, 10, None, [1, 2]),
                 (Filter(since=times[0], until=times[0]), 0, 10, None, []), (Filter(since="x' OR 1=1 --"), 0, 9, None, [])]
        for wanted, after, limit, up_to, ids in cases:
            with self.subTest(wanted=wanted, after=after):
                self.assertEqual([one.id for one in engine.events(wanted, after, limit, up_to)], ids)

    def test_a_read_ends_where_payloads_have_filled_its_share_of_memory(self):
        engine = self.engine()
        engine.write([stored_event(number, payload=json.dumps({"x": "x" * 700000})) for number in range(1, 6)])
        found, after = [], 0
        while True:
            events = engine.events(Filter(), after, 64)
            if not events:
                break
            found.append([one.id for one in events])
            after = events[-1].id
        self.assertEqual(found, [[1, 2], [3, 4], [5]])

    def test_what_is_not_utf_8_is_read_and_never_quoted_in_an_error(self):
        engine = self.engine()
        write_rows(self.database, "INSERT INTO appointment_events VALUES (1, 'scheduled', 'APT-1', 'PAT-1', "
                   "'2025-01-10T14:00:00Z', CAST(x'4a6f686eff' AS TEXT), '2025-01-10T14:00:00Z', NULL, '{}')")
        self.assertEqual(engine.events(Filter(), 0, 10)[0].notes, "John\ufffd")
        self.assertEqual(engine.write([stored_event(1, timestamp="2025-01-10T14:00:00Z")])[0].kind,
                         "duplicate")

    @unittest.skipUnless(POSIX, "Windows moves no open file")
    def test_nothing_is_said_to_be_stored_in_a_file_that_was_moved_away(self):
        engine = self.engine()
        engine.write([stored_event(1)])
        self.database.rename(self.folder / "moved.db")
        self.database.write_bytes(b"")                  # as when a backup is put in its place
        for call in (lambda: engine.write([stored_event(2)]), engine.probe, lambda: engine.events(Filter(), 0, 1)):
            with self.assertRaisesRegex(StoreUnavailable, "moved or deleted"):
                call()
        (self.folder / "moved.db").rename(self.database)
        engine.probe()
        self.assertEqual(engine.write([stored_event(2)])[0].kind, "stored")

    def test_large_payloads_are_the_same_in_any_order_and_small_ones_in_any_number_too(self):
        for one, other, same in (('{"a": 1, "b": [2]}', '{"b": [2.0], "a": 1}', True),
                                 ('{"a": 1, "timestamp": "x"}', '{"timestamp": "y", "a": 1}', True),
                                 ('{"a": 1}', '{"a": true}', False), ("not JSON", "not JSON", True), ("[1]", "[1.0]", False),
                                 (json.dumps({"a": "x" * 20000, "b": 1}), json.dumps({"b": 1, "a": "x" * 20000}), True),
                                 (json.dumps({"a": "x" * 20000, "b": 1}), json.dumps({"b": 2, "a": "x" * 20000}), False)):
            with self.subTest(one[:30]):
                self.assertEqual(receiver.same_content(stored_event(1, payload=one), other), same)

    def test_an_appointment_is_looked_up_in_the_index_and_a_page_starts_at_its_id(self):
        engine = self.engine()
        queries = [receiver._select(wanted, 5, 100, None) for wanted in (Filter(appointment_id="APT-1"), Filter())]
        plans = [str(engine._writer.execute("EXPLAIN QUERY PLAN " + query, values).fetchall())
                 for query, values in queries]
        self.assertIn("idx_appointment_timestamp (appointment_id=?)", plans[0])
        self.assertIn("USING INTEGER PRIMARY KEY (rowid>?)", plans[1])
        self.assertNotIn("TEMP B-TREE", plans[1])
        for plan in plans:
            self.assertNotIn("SCAN", plan)

    def test_a_path_means_the_same_file_after_the_program_changed_its_folder(self):
        other = self.folder / "other"
        other.mkdir()
        here = os.getcwd()
        self.addCleanup(os.chdir, here)
        os.chdir(self.folder)
        engine = SQLite("events.db")
        engine.open()
        self.addCleanup(engine.close)
        engine.write([stored_event(1)])
        os.chdir(other)
        self.assertEqual(engine.last_id(), 1)
        self.assertEqual(list(other.iterdir()), [])
        os.chdir(here)

    def test_files_that_are_not_ours_are_refused_and_left_byte_for_byte(self):
        def garbage():
            self.database.write_bytes(b"This is a letter, not a database.\n" * 100)

        def filled():
            engine = self.engine()
            engine.write([stored_event(number) for number in range(200)])
            engine.close()

        def damaged():
            filled()
            data = bytearray(self.database.read_bytes())
            data[4096:8192] = bytes(4096)
            self.database.write_bytes(data)

        def cut_off():
            filled()
            self.database.write_bytes(self.database.read_bytes()[:10000])

        def newer():
            write_rows(self.database, "PRAGMA user_version = 2")

        def newer_in_wal_mode():
            write_rows(self.database, "PRAGMA journal_mode = WAL")
            write_rows(self.database, "PRAGMA user_version = 99")

        def of_another_program():
            write_rows(self.database, "CREATE TABLE songs (title)", "PRAGMA user_version = 1")

        def without_its_index():
            self.engine().close()
            write_rows(self.database, "DROP INDEX idx_appointment_timestamp")

        def with_a_table_that_lacks_columns():
            write_rows(self.database, "CREATE TABLE appointment_events (id INTEGER PRIMARY KEY, patient_id TEXT)")
        cases = [(garbage, "not a SQLite database"), (damaged, "damaged"), (cut_off, "damaged"), (newer, "newer version"),
                 (newer_in_wal_mode, "newer version"), (of_another_program, "not ours"), (without_its_index, "ON CONFLICT"),
                 (with_a_table_that_lacks_columns, "lacks appointment_id")]
        for make, words in cases:
            with self.subTest(make.__name__):
                make()
                before = self.database.read_bytes()
                self.assertIn(str(self.database), self.refused(words))
                self.assertEqual(self.database.read_bytes(), before)
                for path in self.folder.iterdir():
                    path.unlink()

    def test_a_path_that_cannot_be_opened_is_told_in_one_line(self):
        for path in (self.folder / "missing" / "events.db", self.folder):
            with self.subTest(path=path):
                with self.assertRaises(SetupError) as caught:
                    SQLite(str(path)).open()
                self.assertNotIn("\n", str(caught.exception))

    @unittest.skipUnless(POSIX, "rights of POSIX")
    def test_a_read_only_file_is_told_at_start_and_left_as_it_is(self):
        write_rows(self.database, PLAIN_TABLE)
        self.database.chmod(0o444)
        self.folder.chmod(0o755)
        before = self.database.read_bytes()
        with without_root():
            self.refused("read-only")
        self.assertEqual(self.database.read_bytes(), before)
        self.database.chmod(0o644)
        self.engine().probe()

    def test_closing_moves_all_into_the_one_file(self):
        engine = self.engine()
        engine.write([stored_event(number) for number in range(10)])
        engine.close()
        self.assertEqual(list(files(self.folder)), ["events.db"])
        self.assertEqual(rows(self.database), 10)

    def test_closing_while_the_checkpointer_works_does_not_hang(self):
        engine, under_way, go_on = self.engine(), threading.Event(), threading.Event()

        def move(connection):
            under_way.set()
            go_on.wait(WAIT)
        engine._checkpointer._move = move
        engine.write([stored_event(1)])
        engine._checkpointer._due.set()
        self.assertTrue(under_way.wait(WAIT))
        closing = threading.Thread(target=engine.close, daemon=True)
        closing.start()
        until(lambda: engine._checkpointer is None or engine._checkpointer._stopping, "the stop")
        go_on.set()
        closing.join(WAIT)
        self.assertFalse(closing.is_alive())


class Asked(Submission):
    """A submission that remembers its outcomes."""

    def __init__(self, made, arrived=None):
        self.event, self.arrived = made, time.monotonic() if arrived is None else arrived
        self.outcomes = []

    def done(self, outcome):
        self.outcomes.append(outcome)


class StoreTest(EngineTest):

    def store(self, busy_timeout=0.3, **settings):
        store = Store(SQLite(str(self.database)), busy_timeout, **settings)
        store.engine.open()
        self.addCleanup(store.stop)
        return store

    def locked(self):
        """Another program that holds the write lock until it is closed."""
        other = sqlite3.connect(str(self.database), isolation_level=None)
        self.addCleanup(other.close)
        other.execute("BEGIN IMMEDIATE")
        return other

    def test_all_that_wait_are_committed_at_once_and_told_in_order(self):
        store, told = self.store(), []
        asked = [Asked(stored_event(number)) for number in range(100)]
        for one in asked:
            one.done = lambda outcome, one=one: told.append((one, outcome.event_id, rows(self.database)))
            store.submit(one)
        with mock.patch.object(store.engine, "write", wraps=store.engine.write) as write:
            store.start()
            store.settle()
        self.assertEqual(told, [(one, number, 100) for number, one in enumerate(asked, 1)])
        self.assertEqual(write.call_count, 1)

    def test_add_waits_for_its_own_outcome(self):
        store = self.store()
        store.start()
        self.assertEqual(store.add(stored_event(1)), Outcome("stored", 1))
        self.assertEqual(store.add(stored_event(1)), Outcome("duplicate", 1, True))
        self.assertEqual(store.add(stored_event(2, patient_id=None)).kind, "failed")
        self.assertEqual(store.add(stored_event(2)).kind, "stored")

    def test_one_key_from_16_threads_is_stored_once(self):
        store, outcomes = self.store(), []
        store.start()

        def add():
            for number in range(20):
                outcomes.append(store.add(stored_event(number)))
        threads = [threading.Thread(target=add) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = [outcome.kind for outcome in outcomes]
        self.assertEqual((found.count("stored"), found.count("duplicate")), (20, 300))
        self.assertEqual(rows(self.database), 20)

    def test_on_stored_follows_the_commit_in_order_and_only_for_what_is_new(self):
        heard = []
        store = self.store(on_stored=heard.append)
        store.start()
        outcomes = [store.add(stored_event(number)) for number in (1, 2, 1, 3)]
        store.settle()
        self.assertEqual([(one.id, one.appointment_id) for one in heard],
                         [(1, "APT-1"), (2, "APT-2"), (outcomes[3].event_id, "APT-3")])

    def test_a_short_lock_of_another_program_is_waited_for_and_is_no_trouble(self):
        troubles = []
        store, other = self.store(WAIT, on_trouble=troubles.append), self.locked()
        asked = Asked(stored_event(1))
        store.submit(asked)
        with mock.patch.object(store.engine, "write", wraps=store.engine.write) as write:
            store.start()
            until(lambda: write.call_count > 1, "a second try")
        other.close()
        self.assertEqual(until(lambda: asked.outcomes), [Outcome("stored", 1)])
        self.assertEqual(troubles, [])

    def test_a_long_lock_fails_after_the_busy_timeout_and_service_comes_back(self):
        troubles = []
        store, other = self.store(0.2, on_trouble=troubles.append), self.locked()
        store.start()
        outcome = store.add(stored_event(1))
        self.assertEqual(outcome.kind, "failed")
        self.assertIsInstance(outcome.error, StoreLocked)
        self.assertIn("locked", store.probe())
        other.close()
        self.assertEqual(store.add(stored_event(1)), Outcome("stored", 1))
        self.assertEqual(store.probe(), "")
        self.assertEqual([bool(trouble) for trouble in troubles], [True, False])

    def test_under_a_lock_only_those_who_waited_long_enough_are_failed(self):
        store, other = self.store(WAIT), self.locked()
        old, new = Asked(stored_event(1), time.monotonic() - WAIT - 1), Asked(stored_event(2))
        self.assertEqual(store._write([old, new]), [new])
        self.assertEqual((old.outcomes[0].kind, new.outcomes), ("failed", []))
        other.close()
        self.assertEqual(store._write([new]), [])
        self.assertEqual(new.outcomes, [Outcome("stored", 1)])

    def test_whatever_breaks_nobody_waits_for_ever(self):
        for error in (sqlite3.OperationalError("disk I/O error"), sqlite3.DatabaseError("malformed"), MemoryError(),
                      RuntimeError("a bug")):
            with self.subTest(repr(error)):
                store = self.store()
                store.start()
                with mock.patch.object(store.engine, "_insert_all", side_effect=error):
                    outcome = store.add(stored_event(repr(error)))
                self.assertEqual(outcome.kind, "failed")
                self.assertEqual(isinstance(outcome.error, StoreUnavailable), isinstance(error, sqlite3.Error))
                self.assertEqual(store.add(stored_event(repr(error))).kind, "stored")

    def test_a_damaged_page_is_trouble_of_the_store_and_not_of_a_row(self):
        store = self.store()
        connection = mock.Mock(wraps=store.engine._writer, in_transaction=True)
        connection.execute.side_effect = sqlite3.DatabaseError("database disk image is malformed")
        with self.assertRaises(sqlite3.DatabaseError):
            store.engine._insert(connection, [stored_event(1)])

    def test_a_stop_commits_all_that_was_submitted(self):
        store = self.store()
        asked = [Asked(stored_event(number)) for number in range(700)]
        for one in asked:
            store.submit(one)
        store.start()
        store.stop()
        self.assertEqual(rows(self.database), 700)
        self.assertEqual({len(one.outcomes) for one in asked}, {1})


class MigrationTest(EngineTest):

    def seed(self, *events_, table=PLAIN_TABLE):
        """A database of the plain kind; events are dicts of columns."""
        write_rows(self.database, table, *(
            (f"INSERT INTO appointment_events ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})",
             tuple(columns.values())) for columns in events_))

    @staticmethod
    def old(number, **columns):
        return {"id": number, "event_type": "scheduled", "appointment_id": f"APT-{number}", "patient_id": "PAT-1",
                "timestamp": "2025-01-10T14:00:00", "received_at": "2025-01-10T14:23:15.123456", **columns}

    def test_events_of_the_plain_table_stay_with_their_ids_and_can_be_used(self):
        self.seed(self.old(3, notes="a note"), self.old(7, timestamp="2025-01-10T16:00:00+02:00"))
        engine = self.engine()
        first, second = engine.events(Filter(), 0, 10)
        self.assertEqual(first[:7], ("scheduled", "APT-3", "PAT-1", "2025-01-10T14:00:00Z", "a note",
                                     "2025-01-10T14:23:15.123456Z", None))
        self.assertEqual(json.loads(first.payload)["notes"], "a note")
        self.assertEqual((second.id, second.timestamp, second.notes), (7, "2025-01-10T14:00:00Z", None))
        self.assertEqual(rows(self.database, "PRAGMA user_version"), 1)
        retry, new = engine.write([stored_event(7, timestamp="2025-01-10T14:00:00Z"), stored_event(8)])
        self.assertEqual((retry.kind, retry.event_id, retry.identical, new.kind), ("duplicate", 7, True, "stored"))
        self.assertGreater(new.event_id, 7)

    def test_a_migrated_file_is_like_a_new_one_and_is_not_migrated_again(self):
        self.seed(self.old(1))
        self.engine().close()
        schema = "SELECT type, name, replace(sql, '\"', '') FROM sqlite_master WHERE name NOT LIKE 'sqlite_%' ORDER BY name"
        migrated = rows(self.database, schema)
        self.assertEqual(kinds(self.engine().write([stored_event(2)])), [("stored", 2)])
        new = SQLite(str(self.folder / "new.db"))
        new.open()
        new.close()
        self.assertEqual(migrated, rows(self.folder / "new.db", schema))

    def test_one_instant_in_two_spellings_is_kept_once_in_the_table_and_once_aside(self):
        self.seed(self.old(1, appointment_id="A", notes="first"),
                  self.old(2, appointment_id="A", timestamp="2025-01-10T15:00:00+01:00", notes="second"))
        self.engine()
        self.assertEqual(rows(self.database, "SELECT id, notes FROM appointment_events"), [(1, "first")])
        (event_id, payload), = rows(self.database, "SELECT event_id, payload FROM conflicting_events")
        self.assertEqual((event_id, json.loads(payload)["notes"]), (1, "second"))

    def test_an_id_that_was_once_given_never_means_another_event(self):
        self.seed(self.old(1), self.old(9))
        write_rows(self.database, "DELETE FROM appointment_events WHERE id = 9")
        self.assertEqual(kinds(self.engine().write([stored_event(5)])), [("stored", 10)])

    def test_no_event_is_lost_whatever_is_in_its_columns(self):
        table = """CREATE TABLE appointment_events (id INTEGER PRIMARY KEY, event_type TEXT, appointment_id TEXT,
            patient_id INTEGER, timestamp TEXT, notes TEXT, received_at TEXT, payload TEXT, "odd ""name" REAL)"""
        self.seed(
            self.old(1, patient_id=17, **{'"odd ""name"': 1.5}), self.old(2, appointment_id=None, patient_id=None),
            self.old(3, timestamp="next Tuesday"), self.old(4, timestamp=None, received_at=None),
            self.old(5, notes=b"\xff blob"), self.old(6, payload='{"room": 12}'), self.old(7, payload="no JSON"),
            self.old(8, payload='{"room": 12}', **{'"odd ""name"': 2.5}), self.old(9, payload='{"a": NaN}'), table=table)
        write_rows(self.database, "UPDATE appointment_events SET event_type = CAST(x'ff41' AS TEXT) WHERE id = 9")
        found = {one.id: one for one in self.engine().events(Filter(), 0, 100)}
        self.assertEqual(sorted(found), list(range(1, 10)))
        payloads = {number: json.loads(one.payload, parse_constant=self.fail) for number, one in found.items()}
        self.assertEqual((found[1].patient_id, payloads[1]['odd "name']), ("17", 1.5))
        self.assertEqual((found[2].appointment_id, found[2].patient_id), ("", ""))
        self.assertEqual((found[3].timestamp, found[4].timestamp), ("next Tuesday", ""))
        self.assertEqual(found[5].notes, "\\xff blob")
        self.assertEqual((found[6].payload, payloads[7]["payload"]), ('{"room": 12}', "no JSON"))
        self.assertEqual(payloads[8], {**payloads[8], "room": 12, 'odd "name': 2.5})
        self.assertEqual((found[9].event_type, payloads[9]["payload"]), ("\\xffA", '{"a": NaN}'))

    def test_every_migrated_event_can_be_read_over_http(self):
        self.seed(self.old(1, notes=b"\xff"), self.old(2, timestamp="never"))
        server = ServerTest.start(self)
        answer = ServerTest.call(self, server)
        self.assertEqual([one["id"] for one in answer.json["events"]], [1, 2])

    def test_a_failure_in_the_middle_leaves_the_old_file_as_it_was(self):
        table = PLAIN_TABLE.replace("id INTEGER PRIMARY KEY AUTOINCREMENT", "id TEXT")
        self.seed(self.old(1), self.old("b7b4-no-number"), table=table)
        before = files(self.folder)
        self.refused("b7b4-no-number")
        self.assertEqual(files(self.folder), before)

    def test_views_of_the_old_table_go_on_working(self):
        self.seed(self.old(1))
        write_rows(self.database, "CREATE VIEW patients AS SELECT DISTINCT patient_id FROM appointment_events")
        self.engine()
        self.assertEqual(rows(self.database, "SELECT * FROM patients"), "PAT-1")

    @unittest.skipUnless(POSIX, "kill -9")
    def test_a_journal_left_by_a_crash_of_the_old_service_is_rolled_back(self):
        self.seed(self.old(1))
        crash = ("import sqlite3, os, signal, sys; c = sqlite3.connect(sys.argv[1]); c.execute('PRAGMA cache_size = 1');"
                 "c.executemany('INSERT INTO appointment_events SELECT NULL, event_type, ?, patient_id, timestamp, notes,"
                 " received_at FROM appointment_events WHERE id = 1', [(str(n),) for n in range(2000)]);"
                 "os.kill(os.getpid(), signal.SIGKILL)")
        subprocess.run([sys.executable, "-c", crash, str(self.database)], check=False)
        self.assertTrue((self.folder / "events.db-journal").exists())
        self.assertEqual([one.id for one in self.engine().events(Filter(), 0, 10)], [1])


class DurabilityTest(ServerTest):

    def launch(self, *arguments, **options):
        """A server in a process of its own: (process, port)."""
        process = subprocess.Popen(
            [sys.executable, "-S", str(PROGRAM), "--port", "0", "--database", str(self.database),
             "--log-file", str(self.folder / "server.log"), *arguments],
            stdout=subprocess.PIPE, env=clean_environment(), **options)
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        line = process.stdout.readline().decode()
        self.assertIn("Listening on", line)
        return process, type("Address", (), {"port": int(line.rsplit(":", 1)[1])})

    @unittest.skipUnless(POSIX, "kill -9")
    def test_every_200_is_a_row_after_kill_9_under_load_from_16_clients(self):
        process, server = self.launch()
        answered, clients = [], []

        def load(client):
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=WAIT)
            with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
                for number in range(100000):
                    key = f"{client}-{number}"
                    connection.request("POST", PATH, json.dumps(event(appointment_id=key)))
                    answer = Answer(connection.getresponse())
                    answered.append((answer.status, answer.json.get("event_id"), key))
        for client in range(16):
            clients.append(threading.Thread(target=load, args=(client,)))
            clients[-1].start()
        until(lambda: len(answered) > 1000, "a load")
        process.send_signal(signal.SIGKILL)
        for client in clients:
            client.join()
        self.assertEqual({status for status, _, _ in answered}, {200})
        restarted = self.start()
        self.assertEqual(self.post(restarted, event(appointment_id="after")).status, 200)
        stored = set(rows(self.database, "SELECT id, appointment_id FROM appointment_events"))
        self.assertEqual({(number, key) for _, number, key in answered} - stored, set())

    def test_a_locked_database_is_503_with_retry_after_and_comes_back(self):
        server = self.start(busy_timeout=0.2)
        with contextlib.closing(sqlite3.connect(str(self.database), isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            answer = self.post(server)
            self.assertEqual(answer.status, 503)
            self.assertGreaterEqual(int(answer.headers["retry-after"]), 1)
            self.assertEqual(self.call(server).json["events"], [])
            self.assertEqual(self.call(server, path="/health").status, 503)
        self.assertEqual(self.post(server).status, 200)
        until(lambda: self.call(server, path="/health").status == 200, "a green health")
        log = self.log_text(server)
        self.assertIn("- ERROR - [-] Events cannot be stored", log)
        self.assertIn("- INFO - [-] Events are stored again", log)

    def test_a_database_that_turns_read_only_is_503_and_comes_back(self):
        server = self.start()
        server.store.engine._writer.execute("PRAGMA query_only = 1")
        self.assertEqual(self.post(server).status, 503)
        self.assertEqual(self.call(server, path="/health/ready").status, 503)
        server.store.engine._writer.execute("PRAGMA query_only = 0")
        self.assertEqual(self.post(server).status, 200)
        self.assertIn("read-only", self.log_text(server))

    @unittest.skipUnless(hasattr(resource, "prlimit"), "limits of another process")
    def test_a_full_disk_is_503_and_an_error_and_red_and_service_comes_back_with_room(self):
        def limit():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        # The log goes to a pipe: the limit would also stop a file
        process, server = self.launch("--log-file", "", preexec_fn=limit, stderr=subprocess.PIPE)
        self.addCleanup(process.stderr.close)
        self.assertEqual(self.post(server, event(appointment_id="first")).status, 200)
        size = (self.folder / "events.db-wal").stat().st_size
        hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, hard))
        self.assertEqual(self.post(server, event(appointment_id="lost", notes="x" * 9000)).status, 503)
        self.assertEqual(self.call(server, path="/health").status, 503)
        self.assertEqual(self.call(server).status, 200)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (hard, hard))
        self.assertEqual(self.post(server, event(appointment_id="second")).status, 200)
        until(lambda: self.call(server, path="/health").status == 200, "a green health")
        self.assertEqual(rows(self.database, "SELECT appointment_id FROM appointment_events ORDER BY id"),
                         [("first",), ("second",)])
        process.terminate()
        log = process.communicate(timeout=WAIT)[1].decode()
        self.assertEqual(process.returncode, 0)
        self.assertRegex(log, r"- ERROR - \[-\] Events cannot be stored[^\n]*disk")
        self.assertRegex(log, r"- INFO - \[-\] Events are stored again")

    def test_a_refused_database_stops_the_start_with_one_line(self):
        self.database.write_bytes(b"no database at all, but long enough to be looked at" * 20)
        before = files(self.folder)
        code, _, complaint = self.program("--port", "0", "--database", self.database)
        self.assertEqual((code, complaint.count("\n")), (2, 1))
        self.assertIn("not a SQLite database", complaint)
        self.assertEqual(files(self.folder), before)


# =============================================================================
# Log
# =============================================================================

class RedactionTest(unittest.TestCase):
    NAMED = ("event_type", "appointment_id", "patient_id", "timestamp", "notes")
    SECRET = "Erika Mustermann"

    def test_patients_data_and_what_the_schema_does_not_name_is_masked(self):
        value = event(appointment_id="APT-1", patient_id=self.SECRET, notes=self.SECRET, phone=self.SECRET,
                      address={"street": self.SECRET}, tags=[self.SECRET], age=71)
        text = Redactor("redacted", self.NAMED).text(value)
        self.assertNotIn(self.SECRET, text)
        self.assertEqual(json.loads(text), {**{name: "***" for name in value}, "event_type": "scheduled",
                                            "appointment_id": "APT-1", "timestamp": "2025-01-10T14:00:00Z"})

    def test_nothing_slips_through_in_another_shape(self):
        cases = {"nested under a named field": {"appointment_id": {"a": self.SECRET}},
                 "a list under a named field": {"appointment_id": [self.SECRET]}, "a text": self.SECRET,
                 "a list": [event(notes=self.SECRET)], "an unreadable body": self.SECRET.encode() + b"{"}
        for name, value in cases.items():
            with self.subTest(name):
                text = Redactor("redacted", self.NAMED).text(value)
                self.assertNotIn("Erika", text)
                self.assertNotEqual(text, "")

    def test_values_of_named_fields_show_what_the_sender_did_wrong(self):
        for value in (12, None, True, 1.5, "é\n"):
            with self.subTest(value):
                self.assertEqual(json.loads(Redactor("redacted", self.NAMED).text({"timestamp": value})),
                                 {"timestamp": value})

    def test_full_shows_all_and_none_nothing(self):
        value = event(notes=self.SECRET, more=[1, {"a": None}])
        self.assertEqual(json.loads(Redactor("full").text(value)), value)
        self.assertEqual(Redactor("full").text(b"\xff\n{"), "'\\xff\\n{'")
        for anything in (value, b"\xff", [], "text"):
            self.assertEqual(Redactor("none", self.NAMED).text(anything), "")
        self.assertEqual(Redactor("full").text(None), "")

    def test_a_redacted_payload_stays_short(self):
        for value in ({f"field{number}": 1 for number in range(100000)}, {"x" * 1000000: 1},
                      {"event_type": "\x00" * 1000000}):
            self.assertLess(len(Redactor("redacted", self.NAMED).text(value)), 5000)

    def test_every_mode_gives_one_line_of_ascii(self):
        hostile = {FORGERY: FORGERY, "event_type": FORGERY, "timestamp": [FORGERY]}
        for mode in ("redacted", "full", "none"):
            for value in (hostile, FORGERY, FORGERY.encode(), [hostile], {"notes": "\ud800"}):
                text = Redactor(mode, self.NAMED).text(value)
                self.assertTrue(text.isascii() and text.isprintable(), text)


class Sink:
    """Keeps what is written; raises `error` while that is set."""

    def __init__(self):
        self.text, self.error, self.closed = "", None, False

    def write(self, data, level):
        if self.error:
            raise self.error
        self.text += data.decode()

    def close(self):
        self.closed = True


def record(**parts):
    return RequestRecord(**{
        "level": 20, "time": 1736518995.125, "request_id": "2025-01-10T14:23:15.123456", "method": "POST", "path": PATH,
        "status": 200, "outcome": "stored", "event_id": 12, "seconds": 0.00123, "client": "127.0.0.1", "payload": None,
        **parts})


LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} - webhook - (DEBUG|INFO|WARNING|ERROR) - \[[-0-9T:.]+\] \S.*")


class LogTest(ServerTest):

    def log(self, level="INFO", mode="redacted", sink=None, start=True):
        sink = sink or Sink()
        log = Log(sink, level, Redactor(mode, ("event_type",)))
        if start:
            log.start()
            self.addCleanup(log.stop)
        return log, sink

    def test_one_line_holds_all_of_a_request(self):
        log, sink = self.log()
        log.request(record(payload={"event_type": "scheduled", "notes": "secret"}))
        log.request(record(time=1736518995.9999, event_id=None, status=404, level=30, outcome="Not here", method="GET"))
        log.stop()
        clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(1736518995))
        self.assertEqual(sink.text.splitlines(), [
            f"{clock},125 - webhook - INFO - [2025-01-10T14:23:15.123456] POST {PATH} 200 stored event_id=12 1.2ms "
            'client=127.0.0.1 payload={"event_type": "scheduled", "notes": "***"}',
            f"{clock},999 - webhook - WARNING - [2025-01-10T14:23:15.123456] GET {PATH} 404 Not here 1.2ms "
            "client=127.0.0.1"])

    @unittest.skipUnless(POSIX, "needs a named pipe")
    def test_a_log_file_that_is_no_file_is_written_and_never_rotated(self):
        pipe = self.folder / "pipe"
        os.mkfifo(pipe)
        reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        self.addCleanup(os.close, reading)
        sink = receiver.FileSink(str(pipe), 4096, 1)
        self.addCleanup(sink.close)
        for _ in range(3):
            sink.write(b"x" * 3000 + b"\n", 20)
            self.assertEqual(os.read(reading, 65536), b"x" * 3000 + b"\n")
        self.assertEqual([path.name for path in self.folder.iterdir()], ["pipe"])

    def test_times_out_of_order_keep_their_own_second(self):
        log, sink = self.log()
        moments = (100.25, 99.75, 101.0, 100.5)
        for moment in moments:
            log.request(record(time=moment))
        log.stop()
        self.assertEqual([line[:23] for line in sink.text.splitlines()], [
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(int(moment))) + f",{int(moment % 1 * 1000):03d}"
            for moment in moments])

    def test_a_level_leaves_out_what_is_below(self):
        levels = ["DEBUG", "INFO", "WARNING", "ERROR"]
        for at, level in enumerate(levels):
            with self.subTest(level):
                log, sink = self.log(level)
                for number, name in enumerate(levels, 1):
                    log.line(name, "a line")
                    log.request(record(level=number * 10))
                log.stop()
                self.assertEqual(re.findall("webhook - ([A-Z]+) ", sink.text), [name for name in levels[at:]
                                                                                for _ in range(2)])

    def test_no_input_forges_a_line_or_moves_the_cursor(self):
        log, sink = self.log(mode="full")
        for part in ("method", "path", "outcome", "client", "payload"):
            log.request(record(**{part: FORGERY}))
        log.request(record(payload={FORGERY: [FORGERY]}))
        log.request(record(payload=FORGERY.encode()))
        log.line("ERROR", FORGERY, stack="Traceback\n  " + FORGERY)
        log.stop()
        heads = [line for line in sink.text.split("\n") if line and not line.startswith("    ")]
        self.assertEqual(len(heads), 8)
        for line in sink.text.split("\n"):
            self.assertTrue(line.isprintable(), repr(line))
        for line in heads:
            self.assertRegex(line, LINE)

    def test_an_exception_comes_with_its_stack_indented(self):
        log, sink = self.log()
        try:
            raise ValueError("2025-01-10 14:23:15,123 - webhook - INFO - forged\nforged")
        except ValueError:
            log.exception("It broke", "2025-01-10T14:23:15.123456")
        log.stop()
        first, *rest = sink.text.splitlines()
        self.assertRegex(first, r"- ERROR - \[2025-01-10T14:23:15.123456\] It broke$")
        self.assertIn("    Traceback", rest[0])
        self.assertTrue(all(line.startswith("    ") for line in rest))

    def test_a_sink_that_fails_stops_nobody_and_what_was_dropped_is_said(self):
        log, sink = self.log()
        sink.error = OSError(28, "No space left on device")
        for number in range(100):
            log.line("INFO", f"lost {number}")
        until(lambda: log._dropped == 100, "100 dropped lines")
        sink.error = None
        log.line("INFO", "back")
        log.stop()
        notice, back = sink.text.splitlines()
        self.assertRegex(notice, r"- WARNING - \[-\] 100 log lines were dropped: No space left on device$")
        self.assertIn("back", back)
        self.assertTrue(sink.closed)

    def test_a_full_queue_drops_and_says_so(self):
        log, sink = self.log(start=False)
        with mock.patch.object(receiver, "LOG_QUEUE", 10):
            for number in range(15):
                log.line("INFO", f"line {number}")
                log.request(record())
        log.start()
        log.stop()
        self.assertIn("20 log lines were dropped: the queue was full", sink.text)
        self.assertEqual(len(sink.text.splitlines()), 11)

    def test_all_is_flushed_at_the_end(self):
        log, sink = self.log()
        for number in range(1000):
            log.line("INFO", f"line {number}.")
        log.stop()
        self.assertEqual(re.findall(r"line (\d+)\.", sink.text), [str(number) for number in range(1000)])

    def test_a_sink_that_never_returns_does_not_keep_the_service_from_ending(self):
        log, sink = self.log()
        stuck, let_go = threading.Event(), threading.Event()

        def write(data, level):
            stuck.set()
            let_go.wait(WAIT)
        sink.write = write
        log.line("INFO", "into a pipe that nobody reads")
        self.assertTrue(stuck.wait(WAIT))
        with mock.patch.object(receiver, "LOG_FLUSH_SECONDS", 0.05):
            log.stop()
        self.assertFalse(sink.closed)
        let_go.set()
        log._thread.join(WAIT)

    def test_a_file_is_rotated_by_size_and_loses_no_line(self):
        path = self.folder / "small.log"
        log, _ = self.log(sink=receiver.FileSink(str(path), 4096, 20))
        for number in range(400):
            log.line("INFO", f"line {number}.")
        log.stop()
        pieces = sorted(self.folder.glob("small.log*"), key=lambda piece: -int(piece.suffix[1:] if piece != path else 0))
        self.assertGreater(len(pieces), 5)
        self.assertTrue(all(piece.stat().st_size <= 4096 for piece in pieces))
        text = "".join(piece.read_text() for piece in pieces)
        self.assertEqual(re.findall(r"line (\d+)\.", text), [str(number) for number in range(400)])
        if POSIX:
            self.assertEqual(path.stat().st_mode & 0o077, 0)

    def test_a_rotation_that_fails_half_way_does_not_silence_the_log_for_ever(self):
        path = self.folder / "small.log"
        sink = receiver.FileSink(str(path), 4096, 2)
        self.addCleanup(sink.close)
        sink.write(b"x" * 4000 + b"\n", 20)
        with mock.patch.object(receiver._LogFile, "_open", side_effect=OSError(24, "Too many open files")):
            for _ in range(2):
                self.assertRaisesRegex(OSError, "Too many open files", sink.write, b"y" * 4000 + b"\n", 20)
        sink.write(b"z\n", 20)
        self.assertEqual(path.read_text(), "z\n")

    def test_large_payloads_wait_as_short_text_and_not_without_bound(self):
        log, sink = self.log(mode="full", start=False)
        shown = [log.shown({"x": "y" * 1000000}) for _ in range(40)]
        self.assertLess(sum(map(len, shown)), receiver.LOG_LARGE + 40 * 100)
        self.assertIn("too many for the log's queue", shown[-1])
        log.request(record(payload=shown[0]))
        log.start()
        log.stop()
        self.assertIn('payload={"x": "yyy', sink.text)

    def test_a_file_that_cannot_be_rotated_is_written_on(self):
        path = self.folder / "small.log"
        sink = receiver.FileSink(str(path), 4096, 2)
        log, _ = self.log(sink=sink)
        with mock.patch.object(os, "rename", side_effect=PermissionError(13, "Permission denied")):
            for number in range(200):
                log.line("INFO", f"line {number}.")
            log.stop()
        self.assertEqual(len(re.findall(r"line (\d+)\.", path.read_text())), 200)

    @unittest.skipUnless(resource, "limits of POSIX")
    def test_a_full_disk_leaves_no_half_line_behind(self):
        path = self.folder / "limited.log"
        script = ("import resource, signal, sys; import webhook_server as w; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
                  "sink = w.FileSink(sys.argv[1], 100000, 2); sink.write(b'first line\\n', 20);"
                  "hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1];"
                  "resource.setrlimit(resource.RLIMIT_FSIZE, (15, hard))\n"
                  "try: sink.write(b'second line\\n', 20)\n"
                  "except OSError: resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard)); sink.write(b'third line\\n', 20)")
        subprocess.run([sys.executable, "-c", script, str(path)], check=True, timeout=WAIT,
                       env={**clean_environment(), "PYTHONPATH": str(PROGRAM.parent)})
        self.assertEqual(path.read_text(), "first line\nthird line\n")

    def test_a_line_after_a_torn_one_starts_on_a_line_of_its_own(self):
        sink, written = receiver.StreamSink(), []
        sink._stream = mock.Mock(**{"fileno.return_value": 99})
        answers = iter([5, BlockingIOError(11, "not now"), None])

        def write(descriptor, data):
            answer = next(answers)
            if isinstance(answer, OSError):
                raise answer
            written.append(bytes(data[:answer]))
            return len(written[-1])
        with mock.patch.object(os, "write", write):
            with self.assertRaises(BlockingIOError):
                sink.write(b"a torn line\n", 20)
            sink.write(b"a whole line\n", 20)
        self.assertEqual(b"".join(written).splitlines(), [b"a tor", b"a whole line"])

    @unittest.skipUnless(POSIX and os.path.exists("/dev/full"), "/dev/full")
    def test_a_closed_pipe_or_a_full_device_as_stderr_never_stops_the_service(self):
        reader, writer = os.pipe()
        os.close(reader)
        full = os.open("/dev/full", os.O_WRONLY)
        for name, stderr in (("a closed pipe", writer), ("a full device", full)):
            with self.subTest(name):
                process = subprocess.Popen([sys.executable, "-S", str(PROGRAM), "--port", "0", "--database",
                                            str(self.database)], stdout=subprocess.PIPE, stderr=stderr,
                                           env=clean_environment())
                os.close(stderr)
                with process:
                    try:
                        port = int(process.stdout.readline().rsplit(b":", 1)[1])
                        server = type("Address", (), {"port": port})
                        self.assertEqual(self.post(server, event(appointment_id=name)).status, 200)
                        process.terminate()
                        self.assertEqual(process.wait(WAIT), 0)
                    finally:
                        process.kill()

    def test_two_services_in_one_process_have_logs_of_their_own(self):
        one = self.start(log_file=str(self.folder / "one.log"), database=str(self.folder / "one.db"))
        two = self.start(log_file=str(self.folder / "two.log"), database=str(self.folder / "two.db"))
        self.post(one, event(appointment_id="APT-of-one"))
        self.post(two, event(appointment_id="APT-of-two"))
        one.stop(), two.stop()
        logs = [(self.folder / name).read_text() for name in ("one.log", "two.log")]
        self.assertEqual([("APT-of-one" in log, "APT-of-two" in log) for log in logs], [(True, False), (False, True)])

    def test_a_logger_of_the_embedding_program_takes_the_lines_with_their_levels(self):
        logger = logging.Logger("theirs")
        handler = logging.StreamHandler(io.StringIO())
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        logger.addHandler(handler)
        server = self.start(logger=logger, log_file=str(self.folder / "o.log"))
        self.post(server, event(notes="secret"))
        self.post(server, event(notes="secret"))
        server.stop()
        text = handler.stream.getvalue()
        self.assertRegex(text, r"INFO \[\S+\] POST /webhook/appointments 200 stored event_id=1")
        self.assertRegex(text, r"WARNING \[\S+\] POST /webhook/appointments 409 ")
        self.assertNotIn("secret", text)

    def test_what_a_running_service_logs_has_the_format_line_by_line(self):
        server = self.start()
        self.post(server)
        self.post(server)
        self.post(server, event(patient_id=...))
        self.post(server, b"{")
        with mock.patch.object(server.store.engine, "_insert_all", side_effect=RuntimeError("a bug")):
            self.assertEqual(self.post(server, event(appointment_id="APT-9")).status, 500)
        lines = self.log_text(server).splitlines()
        heads = [line for line in lines if not line.startswith("    ")]
        for line in heads:
            self.assertRegex(line, LINE)
        found = [(re.search("webhook - ([A-Z]+)", line).group(1), (re.search(r" (\d{3}) ", line) or [0, None])[1])
                 for line in heads]
        self.assertEqual([status for status in found if status[1]],
                         [("INFO", "200"), ("WARNING", "409"), ("WARNING", "400"), ("WARNING", "400"), ("ERROR", "500")])
        self.assertIn("Service started", heads[0])
        self.assertIn("Service stopped", heads[-1])
        self.assertIn("    Traceback (most recent call last):", lines)


# =============================================================================
# HTTP
# =============================================================================

LIMITS = receiver.Limits(request_line=8192, header_bytes=16384, header_fields=100, body=1024 * 1024)


def head_bytes(*lines, first="GET /health HTTP/1.1", host="Host: localhost"):
    """The bytes of a head with further header lines."""
    return "\r\n".join(filter(None, (first, host, *lines))).encode("latin-1") + b"\r\n\r\n"


def cut(data, *places):
    """`data` in pieces, cut at the places."""
    edges = [0, *sorted(places), len(data)]
    return [data[start:end] for start, end in zip(edges, edges[1:])]


def read_head(pieces, limits=LIMITS):
    """What a head that comes in pieces says, as a dict; the status of its refusal; None when its end never came."""
    buffer = b""
    try:
        for piece in pieces:
            buffer += piece
            end = receiver.find_head(buffer, limits)
            if end >= 0:
                head = receiver.Head()
                receiver.parse_head(buffer[:end], head, limits)
                return {name: getattr(head, name) for name in (*receiver.Head.__annotations__, "fields", "method", "target",
                        "path", "query", "http11", "host", "chunked", "keep_alive", "expect_continue")}
    except receiver.Refusal as refusal:
        assert refusal.close, "a head that is not understood must end the connection"
        return refusal.status
    return None


def read_chunked(pieces, limits=LIMITS):
    """(body, what follows it) of a chunked body that comes in pieces; the status of its refusal; None without end."""
    decoder = receiver.ChunkedBody(limits)
    following = b""
    try:
        for piece in pieces:
            if decoder.rest is None:
                decoder.feed(piece)
            else:
                following += piece
    except receiver.Refusal as refusal:
        return refusal.status
    return None if decoder.rest is None else (bytes(decoder.body), decoder.rest + following)


class RawAnswer:
    """One answer out of the bytes of a connection."""

    def __init__(self, status, headers, body):
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self):
        return json.loads(self.body)


def answers_in(data, *methods):
    """Every answer in `data`; fails when one is cut short. `methods` of the requests; those not given are GET."""
    answers, file, methods = [], io.BytesIO(data), list(methods)
    while file.tell() < len(data):
        head, found, _ = data[file.tell():].partition(b"\r\n\r\n")
        assert found, "half an answer"
        file.seek(len(head) + 4, io.SEEK_CUR)
        first, *lines = head.decode("latin-1").split("\r\n")
        version, status, _ = first.split(" ", 2)
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        status, body = int(status), b""
        if status == 100:
            answers.append(RawAnswer(status, headers, body))
            continue
        method = methods.pop(0) if methods else "GET"
        if "content-length" in headers and method != "HEAD":
            body = file.read(int(headers["content-length"]))
            assert len(body) == int(headers["content-length"]), "half an answer"
        elif "transfer-encoding" in headers and method != "HEAD":
            whole = read_chunked([data[file.tell():]], LIMITS._replace(body=2 ** 40))
            assert whole, "half an answer"
            body = whole[0]
            file.seek(len(data) - len(whole[1]))
        elif status != 204 and method != "HEAD":
            assert headers["connection"] == "close", "an answer whose end cannot be told"
            body = file.read()
        assert version == "HTTP/1.1"
        answers.append(RawAnswer(status, headers, body))
    return answers


class HTTPTest(ServerTest):
    """A test that looks at whole answers."""

    def proper(self, answer):
        """What every answer must have; gives the answer."""
        if answer.status == 100:
            return answer
        self.assertRegex(answer.headers["x-request-id"], r"\A\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\Z")
        self.assertEqual("nosniff", answer.headers["x-content-type-options"])
        self.assertEqual("no-store", answer.headers["cache-control"])
        self.assertEqual("webhook-server", answer.headers["server"])
        self.assertRegex(answer.headers["date"], r"\A\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT\Z")
        if answer.status >= 400 and answer.body and "checks" not in answer.json:
            self.assertLessEqual({"error", "message", "request_id"}, set(answer.json))
            self.assertEqual(answer.headers["x-request-id"], answer.json["request_id"])
            self.assertEqual(receiver.REASONS[answer.status], answer.json["error"])
            self.assertEqual("application/json", answer.headers["content-type"])
        return answer

    def call(self, *arguments, **options):
        return self.proper(super().call(*arguments, **options))

    def talk(self, server, data, *methods):
        """Send bytes, end our sending half, give all answers, each looked at."""
        return [self.proper(answer) for answer in answers_in(self.exchange(server, data), *methods)]

    def talk_statuses(self, server, data, *methods):
        return [answer.status for answer in self.talk(server, data, *methods)]

    def read_answer(self, connection, method="GET"):
        """One answer from a connection that stays open."""
        response = http.client.HTTPResponse(connection, method=method)
        response.begin()
        return self.proper(Answer(response))


class RequestIdTest(unittest.TestCase):

    def ids(self, *microseconds):
        clock = iter(microseconds)
        return RequestIds(lambda: next(clock) * 1000 + 999)

    def test_an_id_is_utc_with_microseconds_and_the_time_is_the_same_with_z(self):
        ids = self.ids(1736518995123456, 1736518996000000, 1736518995999999)
        self.assertEqual([ids.next(), ids.next(), ids.next()], [(text, text + "Z") for text in (
            "2025-01-10T14:23:15.123456", "2025-01-10T14:23:16.000000", "2025-01-10T14:23:16.000001")])

    def test_ids_rise_also_when_the_clock_stands_or_is_set_back(self):
        ids = self.ids(*[1736518995999998] * 5, 1736510000000000, 1736518999000000)
        made = [ids.next()[0] for _ in range(7)]
        self.assertEqual(made, sorted(set(made)))
        self.assertEqual(made[2:4], ["2025-01-10T14:23:16.000000", "2025-01-10T14:23:16.000001"])

    def test_after_a_clock_that_was_wrong_the_time_is_the_time_and_the_id_still_rises(self):
        ids = self.ids(4102444799000000, 1736518995123456, 1736518995123457, 1736519000000000)
        made = [ids.next() for _ in range(4)]
        self.assertEqual([text for _, text in made],
                         ["2099-12-31T23:59:59.000000Z", "2025-01-10T14:23:15.123456Z", "2025-01-10T14:23:15.123457Z",
                          "2025-01-10T14:23:20.000000Z"])
        self.assertEqual([number for number, _ in made], sorted({number for number, _ in made}))

    def test_threads_never_share_an_id(self):
        ids, made = RequestIds(), []
        in_threads(8, lambda number: made.extend([ids.next()[0] for _ in range(2000)]))
        self.assertEqual(len(set(made)), 16000)


class RefusalTest(unittest.TestCase):
    """What is answered, and what the log may have of it."""

    def test_what_the_sender_wrote_is_in_the_answer_and_not_in_the_log(self):
        refusal = receiver.Refusal(400, "Unknown filter {}; {} is known", "John\r\n", "a")
        self.assertEqual((refusal.message, refusal.note),
                         ("Unknown filter John\\r\\n; a is known", "Unknown filter ...; ... is known"))
        self.assertEqual((receiver.Refusal(400, "plain {}").message, receiver.Refusal(400, "a", note="b").note),
                         ("plain {}", "b"))

    def test_no_message_in_the_program_is_made_of_anything_else_but_names_of_ours(self):
        """A text of the sender can get into a message only as one of `quoted`."""
        ours = {"limits", "self", "known", "name", "part", "limit", "allow", "MEDIA_TYPES", "MAX_LIMIT", "types", "error",
                "map", "str"}
        seen = 0
        for node in ast.walk(ast.parse(PROGRAM.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("Refusal", "Malformed", "Busy"):
                message = node.args[0 if node.func.id == "Busy" else 1]
                seen += 1
                if isinstance(message, ast.JoinedStr):
                    used = {name.id for name in ast.walk(message) if isinstance(name, ast.Name)}
                    self.assertLessEqual(used, ours, ast.unparse(node))
                else:
                    self.assertIn(ast.unparse(message).split("(")[0].strip("'\"")[:5],
                                  {"str", "messa", "reaso"} | {ast.unparse(message).strip("'\"")[:5]
                                                              if isinstance(message, ast.Constant) else "str"})
        self.assertGreater(seen, 40)


class HeadTest(unittest.TestCase):
    """Bytes to the head of a request, by RFC 9112."""

    # Each bad head, and the good one beside it
    REFUSED = (
        ("2.2: a line ended by a bare LF", b"GET / HTTP/1.1\nHost: a\r\n\r\n", 400,
         b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"),
        ("2.2: a field ended by a bare LF", b"GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n", 400,
         b"GET / HTTP/1.1\r\nHost: a\r\nX: b\r\n\r\n"),
        ("2.2: a bare CR in a value", head_bytes("X: a\rContent-Length: 5"), 400, head_bytes("X: a Content-Length: 5")),
        ("2.2: a bare CR in the request line", head_bytes(first="GET /\r HTTP/1.1"), 400, head_bytes()),
        ("2.2: white space before the first field", head_bytes(host=" Host: localhost"), 400, head_bytes()),
        ("2.3: HTTP/2 spoken to an HTTP/1 server", head_bytes(first="GET / HTTP/2.0"), 505, head_bytes()),
        ("2.3: a version with more digits", head_bytes(first="GET / HTTP/1.10"), 400,
         head_bytes(first="GET / HTTP/1.9")),
        ("2.3: a version in lower case", head_bytes(first="GET / http/1.1"), 400, head_bytes()),
        ("3: no version, as HTTP/0.9", head_bytes(first="GET /"), 400, head_bytes(first="GET / HTTP/1.0")),
        ("3: two spaces", head_bytes(first="GET  / HTTP/1.1"), 400, head_bytes()),
        ("3: a tab for a space", head_bytes(first="GET\t/ HTTP/1.1"), 400, head_bytes()),
        ("3: a space in the target", head_bytes(first="GET /a b HTTP/1.1"), 400,
         head_bytes(first="GET /a%20b HTTP/1.1")),
        ("3: a space at the end", head_bytes(first="GET / HTTP/1.1 "), 400, head_bytes()),
        ("3: a space at the start", head_bytes(first=" GET / HTTP/1.1"), 400, head_bytes()),
        ("3.1: a method that is no token", head_bytes(first="G(T / HTTP/1.1"), 400, head_bytes(first="PUT / HTTP/1.1")),
        ("3.2: a target that is no path", head_bytes(first="GET health HTTP/1.1"), 400, head_bytes()),
        ("3.2: raw bytes beyond ASCII in the target", head_bytes(first="GET /\xe9 HTTP/1.1"), 400,
         head_bytes(first="GET /%C3%A9 HTTP/1.1")),
        ("3.2: a fragment", head_bytes(first="GET /#a HTTP/1.1"), 400, head_bytes(first="GET /%23a HTTP/1.1")),
        ("3.2: half an escape", head_bytes(first="GET /%4 HTTP/1.1"), 400, head_bytes(first="GET /%41 HTTP/1.1")),
        ("3.2: an escape that is not hex", head_bytes(first="GET /?a=%zz HTTP/1.1"), 400,
         head_bytes(first="GET /?a=%5a HTTP/1.1")),
        ("3.2.2: another scheme", head_bytes(first="GET ftp://a/ HTTP/1.1"), 400,
         head_bytes(first="GET http://a/ HTTP/1.1")),
        ("3.2.2: a user in the target", head_bytes(first="GET http://u@a/ HTTP/1.1"), 400,
         head_bytes(first="GET http://a:80/ HTTP/1.1")),
        ("3.2.2: no host in the target", head_bytes(first="GET http:///a HTTP/1.1"), 400,
         head_bytes(first="GET HTTP://a HTTP/1.1")),
        ("3.2.2: only a port in the target", head_bytes(first="GET http://:80/ HTTP/1.1"), 400,
         head_bytes(first="GET http://[::1]:80/ HTTP/1.1")),
        ("3.2.3: a tunnel", head_bytes(first="CONNECT a:443 HTTP/1.1"), 400, head_bytes(first="GET /a:443 HTTP/1.1")),
        ("3.2.4: * for another method", head_bytes(first="GET * HTTP/1.1"), 400,
         head_bytes(first="OPTIONS * HTTP/1.1")),
        ("3.2: no Host", head_bytes(host=""), 400, head_bytes(host="", first="GET / HTTP/1.0")),
        ("3.2: two Hosts", head_bytes("Host: localhost"), 400, head_bytes("Hosts: localhost")),
        ("3.2: a list of Hosts", head_bytes(host="Host: a, b"), 400, head_bytes(host="Host: a,b")),
        ("3.2: a Host with a path", head_bytes(host="Host: a/b"), 400, head_bytes(host="Host: a")),
        ("3.2: a Host with a user", head_bytes(host="Host: u@a"), 400, head_bytes(host="Host: a:8000")),
        ("3.2: a port that is no number", head_bytes(host="Host: a:b"), 400, head_bytes(host="Host: a:")),
        ("3.2: a port without a host", head_bytes(host="Host: :80"), 400, head_bytes(host="Host:")),
        ("3.2: an address left open", head_bytes(host="Host: [::1"), 400, head_bytes(host="Host: [::1]")),
        ("5.1: a space before the colon", head_bytes("Content-Length : 5"), 400, head_bytes("Content-Length: 5")),
        ("5.1: a tab before the colon", head_bytes("X\t: 5"), 400, head_bytes("X:\t5\t")),
        ("5.1: a name that is no token", head_bytes("X[]: 5"), 400, head_bytes("X_!: 5")),
        ("5.1: no name", head_bytes(": 5"), 400, head_bytes("X: :5")),
        ("5: no colon, which would hide all that follows", head_bytes("X", "Content-Length: 5"), 400, head_bytes("X:")),
        ("5.2: a folded value", head_bytes("X: a", " b"), 400, head_bytes("X: a b")),
        ("5.2: a value folded with a tab", head_bytes("X: a", "\tb"), 400, head_bytes("X: a\tb")),
        ("9110 5.5: a NUL in a value", head_bytes("X: a\0b"), 400, head_bytes("X: a\xffb")),
        ("9110 5.5: a control in a value", head_bytes("X: a\x1bb"), 400, head_bytes("X: a[b")),
        ("9110 5.5: DEL in a value", head_bytes("X: a\x7fb"), 400, head_bytes("X: a~b")),
        ("6.1: length and coding", head_bytes("Content-Length: 5", "Transfer-Encoding: chunked"), 400,
         head_bytes("Transfer-Encoding: chunked")),
        ("6.1: two codings", head_bytes("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"), 400,
         head_bytes("Transfer-Encoding: Chunked")),
        ("6.1: chunked below another coding", head_bytes("Transfer-Encoding: chunked, gzip"), 501,
         head_bytes("Transfer-Encoding: \tchunked ")),
        ("6.1: identity", head_bytes("Transfer-Encoding: identity"), 501, head_bytes("TE: identity")),
        ("6.1: a coding that only looks like it", head_bytes("Transfer-Encoding: xchunked"), 501, head_bytes()),
        ("6.1: an empty coding", head_bytes("Transfer-Encoding:"), 501, head_bytes()),
        ("6.1: chunked in HTTP/1.0", head_bytes("Transfer-Encoding: chunked", first="POST / HTTP/1.0"), 400,
         head_bytes("Content-Length: 5", first="POST / HTTP/1.0")),
        ("6.2: two lengths", head_bytes("Content-Length: 5", "Content-Length: 5"), 400,
         head_bytes("Content-Length: 5")),
        ("6.2: a list of lengths", head_bytes("Content-Length: 5, 5"), 400, head_bytes("Content-Length: 55")),
        ("6.2: a plus", head_bytes("Content-Length: +5"), 400, head_bytes("Content-Length: 05")),
        ("6.2: a minus", head_bytes("Content-Length: -5"), 400, head_bytes("Content-Length: 0")),
        ("6.2: Python's underscore", head_bytes("Content-Length: 1_0"), 400, head_bytes("Content-Length: 10")),
        ("6.2: a space inside", head_bytes("Content-Length: 1 0"), 400, head_bytes("Content-Length:  10 ")),
        ("6.2: hex", head_bytes("Content-Length: 0x5"), 400, head_bytes("Content-Length: 5")),
        ("6.2: a fraction", head_bytes("Content-Length: 5.0"), 400, head_bytes("Content-Length: 5")),
        ("6.2: digits of another script", head_bytes("Content-Length: \xb2"), 400, head_bytes("Content-Length: 2")),
        ("6.2: empty", head_bytes("Content-Length:"), 400, head_bytes("Content-Length: 0")),
        ("6.2: more than fits", head_bytes("Content-Length: " + "9" * 4000), 413,
         head_bytes("Content-Length: " + "0" * 4000)),
        ("6.2: a byte too many", head_bytes("Content-Length: 1048577"), 413, head_bytes("Content-Length: 1048576")),
        ("9110 10.1.1: another expectation", head_bytes("Expect: a-pony"), 417, head_bytes("Expect: 100-Continue")),
        ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, head_bytes()),
        ("a NUL before the end has come", b"GET / HTTP/1.1\r\nX: \0", 400, head_bytes()),
    )

    def test_each_rule_of_the_rfc_refuses_what_breaks_it_and_takes_its_neighbour(self):
        for rule, bad, status, good in self.REFUSED:
            with self.subTest(rule):
                self.assertEqual(status, read_head([bad]))
                self.assertIsInstance(read_head([good]), dict)

    def test_a_refused_head_is_never_taken_when_it_comes_byte_by_byte(self):
        for rule, bad, _, good in self.REFUSED:
            with self.subTest(rule):
                self.assertIsInstance(read_head(cut(bad, *range(1, len(bad)))), int)
                self.assertEqual(read_head([good]), read_head(cut(good, *range(1, len(good)))))

    def test_a_head_says_what_the_request_is(self):
        head = read_head([head_bytes("X-A:  one ", "x-a:two", "Connection: Keep-Alive",
                                     first="POST /a%20b?c=d?e HTTP/1.1",
                                     host="Host: LocalHost:8000") + b"body"])
        self.assertEqual(("POST", "/a%20b", "c=d?e", "localhost", None, False, True, False),
                         tuple(head[name] for name in ("method", "path", "query", "host", "length", "chunked",
                                                       "keep_alive", "expect_continue")))
        self.assertEqual("one, two", head["fields"]["x-a"])

    def test_an_absolute_target_goes_before_the_host_header(self):
        for target, host, path, query in (("http://a.example/b?c", "a.example", "/b", "c"),
                                          ("https://A:1", "a", "/", ""), ("http://a?c", "a", "/", "c"),
                                          ("HTTP://[::1]:8/", "[::1]", "/", "")):
            with self.subTest(target):
                head = read_head([head_bytes(first=f"GET {target} HTTP/1.1", host="Host: other.example")])
                self.assertEqual((host, path, query), (head["host"], head["path"], head["query"]))
                self.assertNotIn("other", head["fields"]["host"])

    def test_who_keeps_the_connection_open(self):
        for version, lines, stays in (("1.1", (), True), ("1.1", ("Connection: close",), False),
                                      ("1.1", ("Connection: x, CLOSE",), False), ("1.1", ("Connection: closed",), True),
                                      ("1.1", ("Connection: x", "Connection: close"), False), ("1.0", (), False),
                                      ("1.0", ("Connection: Keep-Alive",), True),
                                      ("1.0", ("Connection: keep-alive, close",), False)):
            with self.subTest(version=version, lines=lines):
                self.assertEqual(stays, read_head([head_bytes(*lines, first=f"GET / HTTP/{version}")])["keep_alive"])

    def test_limits_hold_to_the_byte_however_the_head_is_cut(self):
        limits = receiver.Limits(request_line=100, header_bytes=300, header_fields=5, body=10)
        for what, make, most, status in (
                ("request line", lambda size: head_bytes(first="GET /" + "a" * (size - 14) + " HTTP/1.1"), 100, 414),
                ("headers", lambda size: head_bytes("X: " + "a" * (size - 20)), 300, 431),
                ("fields", lambda size: head_bytes(*["X: a"] * (size - 1)), 5, 431)):
            for size, wanted in ((most, dict), (most + 1, status)):
                data = make(size)
                with self.subTest(what, size=size):
                    for place in range(1, len(data)):
                        result = read_head(cut(data, place), limits)
                        self.assertEqual(wanted, result if isinstance(result, int) else type(result), f"cut at {place}")

    def test_a_short_header_limit_says_nothing_about_the_request_line(self):
        data = head_bytes(first="GET /" + "a" * 1000 + " HTTP/1.1")
        limits = LIMITS._replace(header_bytes=256)
        self.assertEqual(read_head([data], limits), read_head(cut(data, 900), limits))
        self.assertIsInstance(read_head([data], limits), dict)

    def test_an_endless_line_is_refused_as_soon_as_it_is_too_long(self):
        self.assertEqual(414, read_head([b"GET /" + b"a" * 8192]))
        self.assertIsNone(read_head([b"GET /" + b"a" * 8000]))
        self.assertEqual(431, read_head([b"GET / HTTP/1.1\r\nX: " + b"a" * 16390]))
        self.assertIsNone(read_head([b"GET / HTTP/1.1\r\nX: " + b"a" * 16000]))

    def test_stalling_with_a_line_of_blanks_costs_the_attacker_more_than_us(self):
        blanks = head_bytes("X:" + " " * 16000 + "\x01")
        ordinary = head_bytes("X:" + "a" * 16000 + "\x01")

        def cost(data):
            start = time.thread_time()
            self.assertEqual(400, read_head([data]))
            return time.thread_time() - start
        self.assertLess(min(cost(blanks) for _ in range(3)), 100 * min(cost(ordinary) for _ in range(3)) + 0.05)

    def test_any_bytes_are_taken_alike_however_they_are_cut_or_refused_by_a_refusal(self):
        chance = random.Random(9112)
        seeds = [good for _, _, _, good in self.REFUSED] + [bad for _, bad, _, _ in self.REFUSED if len(bad) < 500]
        scraps = [b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\0", b" ", b"\t", b":", b",", b"\xff", b"Content-Length: 3\r\n",
                  b"Transfer-Encoding: chunked\r\n", b"Host: b\r\n", b"%", b"HTTP/1.1", b"/"]
        taken = 0
        for _ in range(3000):
            data = bytearray(chance.choice(seeds))
            for _ in range(chance.randrange(4)):
                at = chance.randrange(len(data) + 1)
                data[at:at + chance.choice((0, 0, 1, 3))] = chance.choice(scraps)
            data = bytes(data)
            whole = read_head([data])
            pieces = read_head(cut(data, *(chance.randrange(len(data) + 1) for _ in range(3))))
            if whole is None or isinstance(whole, dict):
                self.assertEqual(whole, pieces, data)
                taken += whole is not None
            else:
                self.assertIsInstance(pieces, int, data)
        self.assertGreater(taken, 300)


class ChunkedTest(unittest.TestCase):
    """Chunked bodies, RFC 9112 section 7.1."""

    TAKEN = (
        ("one chunk", b"5\r\nhello\r\n0\r\n\r\n", b"hello"),
        ("several, sizes in either case and with zeros", b"A\r\n0123456789\r\n00a\r\nabcdefghij\r\n000\r\n\r\n",
         b"0123456789abcdefghij"),
        ("no bytes at all", b"0\r\n\r\n", b""),
        ("line ends within the data", b"4\r\n\r\n\r\n\r\n0\r\n\r\n", b"\r\n\r\n"),
        ("extensions, which are ignored", b"5;a=b;c=\"d;e\"\r\nhello\r\n0 ; x\r\n\r\n", b"hello"),
        ("trailers, which are ignored", b"5\r\nhello\r\n0\r\nContent-Length: 3\r\nX: y\r\n\r\n", b"hello"),
    )
    REFUSED = (
        ("a size with 0x", b"0x5\r\nhello\r\n0\r\n\r\n", 400),
        ("a negative size", b"-5\r\nhello\r\n0\r\n\r\n", 400),
        ("a size with a plus", b"+5\r\nhello\r\n0\r\n\r\n", 400),
        ("a size with an underscore", b"1_0\r\nhello\r\n0\r\n\r\n", 400),
        ("a blank before the size", b" 5\r\nhello\r\n0\r\n\r\n", 400),
        ("a blank behind the size", b"5 \r\nhello\r\n0\r\n\r\n", 400),
        ("no size", b"\r\nhello\r\n0\r\n\r\n", 400),
        ("no hex", b"g\r\nhello\r\n0\r\n\r\n", 400),
        ("a size of more bytes than there are", b"ffffffffffffffff\r\nhello\r\n0\r\n\r\n", 400),
        ("a size beyond the limit", b"100001\r\nhello\r\n0\r\n\r\n", 413),
        ("a size line ended by LF", b"5\nhello\r\n0\r\n\r\n", 400),
        ("a size line ended by CR", b"5\rhello\r\n0\r\n\r\n", 400),
        ("LF hidden in an extension", b"5;\nx\r\nhello\r\n0\r\n\r\n", 400),
        ("NUL in an extension", b"5;\0\r\nhello\r\n0\r\n\r\n", 400),
        ("a chunk longer than its size", b"4\r\nhello\r\n0\r\n\r\n", 400),
        ("a chunk shorter than its size", b"6\r\nhello\r\n0\r\n\r\n", 400),
        ("a chunk ended by LF", b"5\r\nhello\n0\r\n\r\n", 400),
        ("a chunk ended by anything else", b"5\r\nhello000\r\n\r\n", 400),
        ("a trailer without a colon", b"0\r\nabc\r\n\r\n", 400),
        ("a folded trailer", b"0\r\nX: y\r\n z\r\n\r\n", 400),
        ("a trailer ended by LF", b"0\r\nX: y\n\r\n", 400),
        ("a long extension", b"5;" + b"x" * 300 + b"\r\nhello\r\n0\r\n\r\n", 400),
        ("endless trailers", b"0\r\n" + b"X: 12345678\r\n" * 1300, 431),
    )

    def test_a_chunked_body_is_put_together(self):
        for what, data, body in self.TAKEN:
            with self.subTest(what):
                self.assertEqual((body, b""), read_chunked([data]))

    def test_what_follows_the_body_is_given_back_wherever_the_bytes_are_cut(self):
        for what, data, body in self.TAKEN:
            data += b"GET / HTTP/1.1\r\n"
            with self.subTest(what):
                for place in range(len(data)):
                    self.assertEqual((body, b"GET / HTTP/1.1\r\n"), read_chunked(cut(data, place)))
                self.assertEqual((body, b"GET / HTTP/1.1\r\n"), read_chunked(cut(data, *range(len(data)))))

    def test_what_two_readers_could_take_differently_is_refused(self):
        for what, data, status in self.REFUSED:
            with self.subTest(what):
                self.assertEqual(status, read_chunked([data]))
                self.assertIsInstance(read_chunked(cut(data, *range(1, len(data)))), int)

    def test_limits_hold_to_the_byte_however_the_body_is_cut(self):
        small = LIMITS._replace(body=20)
        for data, wanted in ((b"a\r\n0123456789\r\na\r\n0123456789\r\n0\r\n\r\n", (b"0123456789" * 2, b"")),
                             (b"a\r\n0123456789\r\nb\r\n0123456789x\r\n0\r\n\r\n", 413),
                             (b"1;" + b"x" * 254 + b"\r\nz\r\n0\r\n\r\n", (b"z", b"")),
                             (b"1;" + b"x" * 255 + b"\r\nz\r\n0\r\n\r\n", 400)):
            with self.subTest(data[:30], wanted=wanted):
                for place in range(1, len(data)):
                    self.assertEqual(wanted, read_chunked(cut(data, place), small), f"cut at {place}")

    def test_a_body_without_its_end_is_not_a_body(self):
        for what, data, _ in self.TAKEN:
            for place in range(len(data)):
                self.assertIsNone(read_chunked([data[:place]]), what)

    def test_any_bytes_give_the_same_body_however_they_are_cut_or_a_refusal(self):
        chance = random.Random(71)
        for _ in range(3000):
            data = bytearray(chance.choice(self.TAKEN)[1])
            for _ in range(chance.randrange(3)):
                at = chance.randrange(len(data) + 1)
                data[at:at + chance.choice((0, 1))] = chance.choice((b"\r", b"\n", b"\r\n", b"0", b"f", b";", b" "))
            data = bytes(data)
            whole = read_chunked([data])
            pieces = read_chunked(cut(data, *(chance.randrange(len(data)) for _ in range(4))))
            if isinstance(whole, int):
                self.assertIsInstance(pieces, int, data)
            else:
                self.assertEqual(whole, pieces, data)


class RoutingTest(unittest.TestCase):
    """A request to its route; queries; Accept; Date."""

    def refusal(self, function, *arguments):
        with self.assertRaises(receiver.Refusal) as caught:
            function(*arguments)
        return caught.exception

    def test_every_route_of_the_table_is_found_and_heads_like_it_gets(self):
        for route in receiver.ROUTES:
            path = route.path.replace("{event_id}", "57")
            with self.subTest(path, method=route.method):
                wanted = (route, (57,) if path != route.path else ())
                self.assertEqual(wanted, receiver.match_route(route.method, path))
                if route.method == "GET":
                    self.assertEqual(wanted, receiver.match_route("HEAD", path))

    def test_a_path_is_decoded_once(self):
        for path, found in (("/health", True), ("/%68ealth", True), ("/%2568ealth", False), ("/health%2Flive", False),
                            ("/health/live", True), ("/webhook/appointments/%35", True), ("/Health", False)):
            with self.subTest(path):
                if found:
                    receiver.match_route("GET", path)
                else:
                    self.assertEqual(404, self.refusal(receiver.match_route, "GET", path).status)

    def test_no_other_spelling_reaches_a_route(self):
        for path in ("//health", "/health/", "/./health", "/x/../health", "/%2e%2e/health", "/health/..", "/health;a=b",
                     "/health%00", "/webhook/appointments/", "/webhook/appointments/-1", "/webhook/appointments/+1",
                     "/webhook/appointments/1_0", "/webhook/appointments/1e3", "/webhook/appointments/%20 1",
                     "/webhook/appointments/%D9%A1", "/webhook/appointments/1%0A", "/webhook/appointments/" + "9" * 19):
            with self.subTest(path):
                self.assertEqual(404, self.refusal(receiver.match_route, "GET", path).status)

    def test_an_overlong_or_broken_utf_8_path_is_a_400(self):
        for path in ("/%c0%afhealth", "/%ff", "/health/%ed%a0%80"):
            with self.subTest(path):
                self.assertEqual(400, self.refusal(receiver.match_route, "GET", path).status)
        self.assertEqual(404, self.refusal(receiver.match_route, "GET", "/%c3%a9").status)

    def test_another_method_is_told_which_ones_there_are(self):
        for method, path, allow in (("DELETE", "/webhook/appointments", "GET, HEAD, OPTIONS, POST"),
                                    ("POST", "/health", "GET, HEAD, OPTIONS"),
                                    ("TRACE", "/health", "GET, HEAD, OPTIONS")):
            with self.subTest(method, path=path):
                refusal = self.refusal(receiver.match_route, method, path)
                self.assertEqual((405, {"Allow": allow}), (refusal.status, refusal.fields))

    def test_a_query_is_decoded_once_and_each_name_is_taken_once(self):
        for query, values in (("", {}), ("a=1&b=2", {"a": "1", "b": "2"}), ("a=1&", {"a": "1"}),
                              ("a=x+y%2B", {"a": "x y+"}),
                              ("a=%2541", {"a": "%41"}), ("a=b=c", {"a": "b=c"}), ("%61=%C3%A9", {"a": "é"})):
            with self.subTest(query):
                self.assertEqual(values, receiver.parse_query(query, ("a", "b")))

    def test_a_wrong_query_is_told_which_name_is_wrong(self):
        for query, named in (("c=1", "c"), ("a=1&a=1", "a"), ("a=", "a"), ("a", "a"), ("A=1", "A"), ("a=%ff", "UTF-8"),
                             ("%0d%0aX=1", r"\\r\\nX")):
            with self.subTest(query):
                refusal = self.refusal(receiver.parse_query, query, ("a", "b"))
                self.assertEqual(400, refusal.status)
                self.assertRegex(refusal.message, rf"\b{named}\b" if named.isalnum() else named)
        self.assertNotRegex(self.refusal(receiver.parse_query, "%0d%0aX=1", ()).message, r"[\r\n]")

    def test_accept_chooses_by_weight_and_then_by_closeness(self):
        for accept, chosen in (("", "application/json"), ("*/*", "application/json"), ("text/csv", "text/csv"),
                               ("application/*", "application/json"), ("text/*", "text/csv"),
                               ("text/csv, */*", "text/csv"), ("text/csv;q=0.1, */*;q=0.2", "application/json"),
                               ("application/json;q=0.5, application/x-ndjson;q=0.9", "application/x-ndjson"),
                               ("application/json;q=0, */*", "application/x-ndjson"), ("TEXT/CSV ; Q=1.0", "text/csv"),
                               ("application/json; charset=utf-8", "application/json"),
                               ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", "application/json"),
                               ("text/html", None), ("text/csv;q=0", None), ("*/*;q=0", None),
                               ("text/csv;q=0.0000", None),
                               ("text/csv;q=7", None), ("text/csv;q=1.5", None), ("text/csv;q=nan", None),
                               ("csv", None)):
            with self.subTest(accept):
                self.assertEqual(chosen, receiver.wanted_type(accept, receiver.MEDIA_TYPES))

    def test_the_date_is_that_of_the_rfc_in_every_second(self):
        for second in (1, 951782400, 951782400 + 86399, 1736518995, 4102444799):
            self.assertEqual(receiver.http_date(second), receiver.BaseHTTPRequestHandler.date_time_string(None, second))


class RulesTest(unittest.TestCase):
    """The ruling of a head: what equal heads share."""

    def rules(self, loopback=True, **settings):
        config = Config(**settings)
        endpoints = receiver.Endpoints(config, None, None, {})
        endpoints.rules = receiver.Rules(config, None, b"", None, endpoints, loopback)
        return endpoints.rules

    def test_a_head_that_comes_again_is_judged_once_and_one_that_does_not_is_not_kept(self):
        rules = self.rules()
        again = head_bytes()
        first, second = rules.ruling(again), rules.ruling(again)
        self.assertIsNot(first, second)
        self.assertIs(rules.ruling(again), second)
        for number in range(20 * receiver.HEADS_KEPT):
            rules.ruling(head_bytes(f"webhook-id: {number}"))
        self.assertIs(rules.ruling(again), second)

    def test_however_many_heads_come_again_only_so_many_are_kept(self):
        rules = self.rules()
        heads = [head_bytes(f"X: {number}") for number in range(2 * receiver.HEADS_KEPT)]
        for head in heads:
            rules.ruling(head)
            rules.ruling(head)
        self.assertEqual(len(rules._kept), receiver.HEADS_KEPT)
        self.assertIs(rules.ruling(heads[-1]), rules.ruling(heads[-1]))

    def test_a_large_head_is_never_kept(self):
        rules, large = self.rules(), head_bytes("X: " + "a" * receiver.HEAD_KEPT_BYTES)
        rulings = [rules.ruling(large) for _ in range(3)]
        self.assertEqual(len(set(map(id, rulings))), 3)

    def test_it_never_raises_and_says_what_was_understood(self):
        rules = self.rules()
        for rule, bad, status, good in HeadTest.REFUSED:
            with self.subTest(rule):
                self.assertEqual(rules.ruling(bad).refusal.status, status)
                self.assertNotEqual(getattr(rules.ruling(good).refusal, "status", 200), status)
        ruling = rules.ruling(head_bytes("no colon", first=f"POST {PATH}?patient_id=P HTTP/1.1"))
        self.assertEqual((ruling.method, ruling.pattern, ruling.refusal.status), ("POST", PATH, 400))

    def test_the_log_gets_the_route_and_never_what_was_sent(self):
        rules = self.rules()
        for first, method, pattern in ((f"GET {PATH}/57 HTTP/1.1", "GET", PATH + "/{event_id}"),
                                       ("GET /JOHN HTTP/1.1", "GET", "-"), (f"JOHN {PATH} HTTP/1.1", "-", PATH),
                                       ("GET /%4a HTTP/1.1", "GET", "-"), ("GET /%68ealth HTTP/1.1", "GET", "/health")):
            ruling = rules.ruling(head_bytes(first=first))
            self.assertEqual((ruling.method, ruling.pattern), (method, pattern))

    def test_what_is_ordinary(self):
        rules = self.rules(allowed_origin="https://desk.example")
        post = f"POST {PATH} HTTP/1.1"
        size = f"Content-Length: {receiver.ORDINARY_BODY}"
        self.assertTrue(rules.ruling(head_bytes(size, first=post)).ordinary)
        for lines in ([f"Content-Length: {receiver.ORDINARY_BODY + 1}"], ["Transfer-Encoding: chunked"], [],
                      [size, "Connection: close"], [size, "Origin: https://desk.example"], [size, "Origin: http://evil"],
                      [size, "Content-Encoding: gzip"], [size, "Expect: a-pony"]):
            with self.subTest(lines):
                self.assertFalse(rules.ruling(head_bytes(*lines, first=post)).ordinary)
        self.assertFalse(rules.ruling(head_bytes(size, first=f"POST {PATH} HTTP/1.0")).ordinary)
        self.assertFalse(rules.ruling(head_bytes(size, first="POST /health HTTP/1.1")).ordinary)

    def test_small_limits_hold_for_every_head(self):
        rules = self.rules(max_request_line=64, max_header_bytes=256)
        for head, status in ((head_bytes(first=f"GET /{'a' * 64} HTTP/1.1"), 414), (head_bytes("X: " + "a" * 300), 431),
                             (head_bytes(), None)):
            self.assertEqual(getattr(rules.ruling(head).refusal, "status", None), status)

    def test_an_address_is_always_ours_and_a_name_only_where_it_is_named(self):
        for settings, loopback, host, served in (
                ({}, True, "10.244.0.5:8000", True), ({}, True, "[fd00::5]:8000", True), ({}, True, "clinic.example", False),
                ({"allowed_host": "clinic.example"}, False, "10.244.0.5:8000", True),
                ({"allowed_host": "clinic.example"}, False, "clinic.example", True),
                ({"allowed_host": "clinic.example"}, False, "evil.example", False),
                ({"host": "0.0.0.0"}, False, "evil.example", True), ({}, True, "127.0.0.1.evil.example", False),
                ({}, True, "1.2.3.4.5", False), ({}, True, "0x7f000001", False), ({}, True, "2130706433", False)):
            with self.subTest(host, **settings):
                ruling = self.rules(loopback, **settings).ruling(head_bytes(host="Host: " + host))
                self.assertEqual(ruling.refusal is None, served)


class ReceiveTest(HTTPTest):
    """POST /webhook/appointments."""

    def test_an_event_is_answered_with_its_id_and_is_in_the_table(self):
        server = self.start()
        answer = self.post(server, event(notes="Grüße", room=4))
        self.assertEqual(answer.status, 200)
        self.assertEqual(answer.json, {"status": "success", "message": "Event received and stored", "event_id": 1,
                                       "request_id": answer.headers["x-request-id"]})
        self.assertRegex(answer.json["request_id"], r"\A\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\Z")
        found = rows(self.database, "SELECT event_type, appointment_id, patient_id, timestamp, notes, client, "
                                    "payload LIKE '%\"room\": 4%' FROM appointment_events")
        self.assertEqual(found, [("scheduled", "APT-1", "PAT-1", "2025-01-10T14:00:00Z", "Grüße", "127.0.0.1", 1)])

    def test_the_first_stage_that_fails_decides_the_message(self):
        server = self.start()
        for body, path, rule, message in (
                (b"{", "", "json", "Invalid JSON: expecting property name enclosed in double quotes at line 1 column 2"),
                (event(patient_id=..., event_type=7), "/patient_id", "required", "Missing required field: patient_id"),
                (event(event_type="moved", patient_id=7), "/patient_id", "type",
                 "Field 'patient_id' must be of type string"),
                (event(event_type="moved", timestamp="soon"), "/event_type", "enum",
                 "Field 'event_type' must be one of: scheduled, cancelled, updated"),
                (event(timestamp="soon", patient_id=""), "/timestamp", "format",
                 "Field 'timestamp' must be an ISO 8601 date-time, for example 2025-01-10T14:00:00Z"),
                (event(patient_id=""), "/patient_id", "minLength", "Field 'patient_id' must not be empty"),
                (event(patient_id="x" * 256), "/patient_id", "maxLength",
                 "Field 'patient_id' must have at most 255 characters")):
            with self.subTest(message):
                answer = self.post(server, body)
                self.assertEqual((answer.status, answer.json["error"]), (400, "Bad Request"))
                self.assertEqual(answer.json["message"], message)
                self.assertEqual(answer.json["errors"][0], {"path": path, "rule": rule, "message": message})
        self.assertEqual(rows(self.database), 0)

    def test_a_duplicate_is_a_409_that_names_the_stored_event_and_whether_it_is_the_same(self):
        server = self.start()
        self.assertEqual(self.post(server).status, 200)
        for again, identical in ((event(), True), (event(timestamp="2025-01-10 15:00:00.0+01:00"), True),
                                 (event(notes="another"), False)):
            with self.subTest(again):
                answer = self.post(server, again)
                self.assertEqual((answer.status, answer.json["error"]), (409, "Conflict"))
                self.assertEqual((answer.json["event_id"], answer.json["identical"]), (1, identical))
        self.assertEqual(rows(self.database), 1)
        self.assertEqual(json.loads(rows(self.database, "SELECT payload FROM conflicting_events")),
                         event(notes="another"))
        self.assertEqual(self.log_text(server).count(" - WARNING - "), 3)

    def test_with_duplicates_ok_an_identical_retry_is_a_200_and_other_content_still_a_409(self):
        server = self.start(duplicates="ok")
        self.assertEqual(self.post(server).json["status"], "success")
        answer = self.post(server)
        self.assertEqual((answer.status, answer.json["status"], answer.json["event_id"]), (200, "duplicate", 1))
        self.assertEqual(self.post(server, event(notes="another")).status, 409)
        self.assertRegex(self.log_text(server), "WARNING - .* 200 duplicate event_id=1 ")

    def test_a_bug_is_a_500_whose_stack_is_in_the_log_under_the_request_id(self):
        server = self.start()
        with mock.patch.object(server._endpoints.rules.contract, "event", side_effect=RuntimeError("a bug")):
            answer = self.post(server)
        self.assertEqual((answer.status, answer.json["error"]), (500, "Server Error"))
        self.assertEqual(self.post(server).status, 200)
        self.assertRegex(self.log_text(server), r"ERROR - \[" + re.escape(answer.json["request_id"]) +
                         r"\] Unexpected error\n    Traceback[^\0]*\n    RuntimeError: a bug\n")

    def test_of_16_clients_that_send_the_same_events_each_event_is_taken_once(self):
        server = self.start()
        answers = []

        def client(number):
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=WAIT)
            for step in range(40):
                key = f"A{(number * 7 + step) % 40}"
                connection.request("POST", PATH, json.dumps(event(appointment_id=key)).encode())
                answer = Answer(connection.getresponse())
                answers.append((answer.status, key, answer.json["event_id"]))
            connection.close()

        threads = [threading.Thread(target=client, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        taken = [answer[1:] for answer in answers if answer[0] == 200]
        refused = {answer[1:] for answer in answers if answer[0] == 409}
        self.assertEqual((len(answers), len(taken), len(refused)), (640, 40, 40))
        self.assertEqual(refused, set(taken))
        self.assertEqual(set(rows(self.database, "SELECT appointment_id, id FROM appointment_events")), set(taken))


class PageTest(HTTPTest):
    """Reading what is stored."""

    def fill(self, server, count, notes="'note ' || value"):
        """Put rows into the table beside the server."""
        insert_rows(self.database, count, notes)

    def table(self, server):
        """All events as rows of CSV."""
        text = self.call(server, Accept="text/csv").body.decode()
        return list(receiver.csv.reader(io.StringIO(text, newline="")))

    def ids(self, server, query):
        """The ids of one page."""
        answer = self.call(server, path=PATH + query)
        self.assertEqual(200, answer.status, answer.body)
        return [one["id"] for one in answer.json["events"]]

    def test_an_event_is_read_back_with_its_columns_and_its_payload_as_it_came(self):
        server = self.start()
        body = b'{"event_type": "updated", "appointment_id": "A", "patient_id": "P", \r\n "timestamp": ' \
               b'"2025-01-10T15:00:00+01:00", "notes": "\\u00e9\\n", "extra": [1.50, 1e2]}'
        sent = self.post(server, body)
        one = self.call(server, path=f"{PATH}/{sent.json['event_id']}")
        self.assertEqual({"id": 1, "event_type": "updated", "appointment_id": "A", "patient_id": "P",
                          "timestamp": "2025-01-10T14:00:00Z", "notes": "é\n", "client": "127.0.0.1",
                          "received_at": sent.json["request_id"] + "Z", "payload": json.loads(body)}, one.json)
        self.assertIn(b"1.50, 1e2", one.body)
        self.assertNotIn(b"\n", one.body)
        self.assertEqual({"events": [one.json], "next": None}, self.call(server, path=PATH).json)
        self.assertEqual(404, self.call(server, path=PATH + "/2").status)

    def test_each_filter_finds_its_events_and_filters_add_up(self):
        server = self.start()
        for number, (kind, appointment, patient, timestamp) in enumerate((
                ("scheduled", "A", "P", "2025-01-10T14:00:00Z"), ("updated", "A", "P", "2025-01-10T14:00:00.5Z"),
                ("cancelled", "A", "Q", "2025-01-10T14:00:01Z"),
                ("scheduled", "B é&=+%", "Q", "2025-01-11T00:00:00Z")), 1):
            sent = self.post(server, event(event_type=kind, appointment_id=appointment, patient_id=patient,
                                           timestamp=timestamp))
            self.assertEqual(number, sent.json["event_id"])
        for query, ids in (("", [1, 2, 3, 4]), ("appointment_id=A", [1, 2, 3]), ("patient_id=Q", [3, 4]),
                           ("event_type=scheduled", [1, 4]), ("appointment_id=A&event_type=scheduled", [1]),
                           ("appointment_id=B+%C3%A9%26%3D%2B%25", [4]), ("appointment_id=C", []),
                           ("since=2025-01-10T14:00:00Z", [1, 2, 3, 4]), ("since=2025-01-10T14:00:00.1Z", [2, 3, 4]),
                           ("until=2025-01-10T14:00:00Z", []), ("until=2025-01-10T14:00:00.5Z", [1]),
                           ("until=2025-01-10T14:00:01", [1, 2]), ("since=2025-01-10T16:00:01%2B02:00", [3, 4]),
                           ("since=2025-01-10T16:00:01+02:00", [3, 4]), ("since=2025-01-10+14:00:01+0000", [3, 4]),
                           ("since=2025-01-10+14:00", [1, 2, 3, 4]),
                           ("since=2026-01-01T00:00Z&until=2025-01-01T00:00Z", []),
                           ("after=2", [3, 4]), ("after=0", [1, 2, 3, 4]), ("after=9223372036854775807", []),
                           ("limit=2", [1, 2]), ("after=1&limit=1&appointment_id=A", [2]),
                           ("limit=1000", [1, 2, 3, 4])):
            with self.subTest(query):
                self.assertEqual(ids, self.ids(server, "?" + query if query else ""))

    def test_a_wrong_filter_is_a_400_that_names_it(self):
        server = self.start()
        for query, name in (("limit=0", "limit"), ("limit=1001", "limit"), ("limit=-1", "limit"),
                            ("limit=%2B5", "limit"),
                            ("limit=1_0", "limit"), ("limit=%D9%A1", "limit"), ("limit=1&limit=1", "limit"),
                            ("after=x", "after"), ("after=9223372036854775808", "after"), ("after=", "after"),
                            ("since=yesterday", "since"), ("until=2025-13-01T00:00:00Z", "until"),
                            ("since=" + "T" * 8000, "since"),
                            ("since=2025-01-10T14:00:00Z%0A", "since"), ("event_type=moved", "event_type"),
                            ("patient=P", "patient"), ("appointment_id=%00", "appointment_id")):
            with self.subTest(query[:40]):
                answer = self.call(server, path=f"{PATH}?{query}")
                self.assertEqual(400, answer.status)
                self.assertRegex(answer.json["message"], rf"\b{name}\b")

    def test_the_cursor_walks_through_all_and_keeps_the_filters(self):
        server = self.start()
        self.fill(server, 250)
        seen, path, pages = [], PATH + "?patient_id=PAT-3&limit=10", 0
        while path:
            page = self.call(server, path=path).json
            seen += [one["id"] for one in page["events"]]
            path, pages = page["next"], pages + 1
        self.assertEqual([number for number in range(1, 251) if number % 7 == 3], seen)
        self.assertEqual(4, pages)

    def test_a_page_has_a_hundred_events_unless_asked_otherwise_and_next_only_when_there_is_more(self):
        server = self.start()
        self.fill(server, 101)
        self.assertEqual(100, len(self.ids(server, "")))
        self.assertEqual(PATH + "?after=100", self.call(server, path=PATH).json["next"])
        self.assertIsNone(self.call(server, path=PATH + "?limit=101").json["next"])

    def test_the_form_follows_accept(self):
        server = self.start()
        self.post(server, event(notes='say "hi",\r\nthen go'))
        for accept, content_type in (("application/json", "application/json"), ("*/*", "application/json"),
                                     ("application/x-ndjson", "application/x-ndjson"),
                                     ("application/jsonl", "application/x-ndjson"),
                                     ("text/csv", "text/csv; charset=utf-8")):
            with self.subTest(accept):
                answer = self.call(server, Accept=accept)
                self.assertEqual((200, content_type), (answer.status, answer.headers["content-type"]))
        self.assertEqual(event(notes='say "hi",\r\nthen go'),
                         json.loads(self.call(server, Accept="application/x-ndjson").body)["payload"])
        table = self.table(server)
        self.assertEqual(["id", *receiver.COLUMNS], table[0])
        self.assertEqual(["1", "scheduled", "APT-1", "PAT-1", "2025-01-10T14:00:00Z", 'say "hi",\r\nthen go'],
                         table[1][:6])
        refused = self.call(server, Accept="image/png")
        self.assertEqual(406, refused.status)
        self.assertIn("text/csv", refused.json["message"])

    def test_a_formula_in_a_cell_is_not_run_by_the_one_who_opens_the_table(self):
        server = self.start()
        formulas = ("=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "＝1", "＋1", "－1", "＠1")
        for number, text in enumerate(formulas):
            self.post(server, event(appointment_id=f"{text}{number}", patient_id=text, notes=text))
        self.post(server, event(patient_id="a=1", notes=""))
        table = self.table(server)[1:]
        for text, row in zip(formulas, table):
            self.assertEqual(["'" + text] * 2, [row[3], row[5]])
            self.assertTrue(row[2].startswith("'" + text))
        self.assertEqual(["a=1", ""], [table[-1][3], table[-1][5]])

    def test_head_answers_like_get_without_the_body(self):
        server = self.start()
        self.post(server)
        for path, accept in ((PATH, "*/*"), (PATH, "text/csv"), (PATH + "/1", "*/*"), (PATH + "/9", "*/*"),
                             ("/health/live", "*/*"), ("/schema.json", "*/*"), (PATH + "?limit=x", "*/*")):
            with self.subTest(path, accept=accept):
                get = self.call(server, "GET", path, Accept=accept)
                head = self.call(server, "HEAD", path, Accept=accept)
                self.assertEqual((get.status, b""), (head.status, head.body))
                for name in ("content-type", "content-length", "transfer-encoding"):
                    self.assertEqual(get.headers.get(name), head.headers.get(name))

    def test_many_rows_are_streamed_in_order(self):
        server = self.start()
        self.fill(server, 12000)
        lines = self.call(server, Accept="application/x-ndjson").body.splitlines()
        self.assertEqual([json.loads(line)["id"] for line in lines], list(range(1, 12001)))
        some = self.call(server, path=PATH + "?after=700&limit=1200", Accept="application/x-ndjson").body.splitlines()
        self.assertEqual([701, 1900, 1200], [json.loads(some[0])["id"], json.loads(some[-1])["id"], len(some)])

    def test_a_reader_that_stalls_in_a_stream_holds_up_nobody(self):
        server = self.start()
        self.fill(server, 20000, "printf('%01000d', value)")
        slow = self.connect(server)
        slow.sendall(head_bytes("Accept: application/x-ndjson", first=f"GET {PATH} HTTP/1.1"))
        self.assertIn(b" 200 ", slow.recv(100))
        for number in range(20):
            self.assertEqual(200, self.post(server, event(appointment_id=f"other-{number}")).status)
        with contextlib.closing(sqlite3.connect(str(self.database), timeout=10)) as connection:
            self.assertEqual(0, connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0])

    def test_a_page_of_huge_events_ends_early_and_goes_on_behind_its_next(self):
        server = self.start()
        self.fill(server, 60, "printf('%0300000d', value)")
        seen, path, pages = [], PATH + "?limit=1000", 0
        while path:
            page = self.call(server, path=path)
            self.assertLess(len(page.body), receiver.PAGE_BYTES + 1000000)
            seen += [one["id"] for one in page.json["events"]]
            path, pages = page.json["next"], pages + 1
        self.assertEqual((list(range(1, 61)), True), (seen, pages > 1))

    def test_a_store_that_cannot_be_read_is_a_503_in_every_form(self):
        server = self.start()
        self.post(server)
        gone = receiver.StoreUnavailable("the disk is gone")
        for path, accept in ((PATH, "application/json"), (PATH, "text/csv"), (PATH + "/1", "*/*")):
            with mock.patch.multiple(server.store, steps=mock.Mock(side_effect=gone), last_id=mock.Mock(side_effect=gone),
                                     event=mock.Mock(side_effect=gone)):
                answer = self.call(server, path=path, Accept=accept)
            self.assertEqual((answer.status, answer.headers["retry-after"]), (503, "1"))
            self.assertEqual(self.call(server, path=path, Accept=accept).status, 200)

    def test_a_page_that_takes_long_to_find_ends_early_and_goes_on_where_it_looked(self):
        server = self.start()
        self.fill(server, 20000)
        with mock.patch.object(receiver, "PAGE_SECONDS", 0.0):
            path, seen, pages = PATH + "?patient_id=PAT-3&event_type=scheduled&limit=1000", [], 0
            while path:
                answer = self.call(server, path=path)
                self.assertEqual(answer.status, 200, answer.body)
                seen += [one["id"] for one in answer.json["events"]]
                path, pages = answer.json["next"], pages + 1
        self.assertEqual(seen, [number for number in range(1, 20001) if number % 7 == 3])
        self.assertGreater(pages, 3)

    def test_a_stream_that_takes_too_long_is_broken_off_and_says_how_to_go_on(self):
        server = self.start()
        self.fill(server, 1200)
        with mock.patch.object(receiver, "READ_SECONDS", 0.0):
            data = self.exchange(server, head_bytes("Accept: text/csv", first=f"GET {PATH} HTTP/1.1"))
        self.assertFalse(data.endswith(b"0\r\n\r\n"))
        self.assertIn("go on with after=", self.log_text(server))

    def test_what_other_hands_put_into_the_table_comes_out_as_json_all_the_same(self):
        server = self.start()
        odd = ("{\"a\": Infinity}", "{\"a\": NaN}", "", "{\"a\": 1", "not json", "\"\ud83d\"", "{\"a\":\n1}")
        with contextlib.closing(sqlite3.connect(str(self.database), timeout=10)) as connection, connection:
            for number, payload in enumerate(odd):
                connection.execute("INSERT INTO appointment_events (event_type, appointment_id, patient_id, timestamp, notes, "
                                   "received_at, payload) VALUES ('scheduled', ?, 9e999, 'x', x'ff00', '', CAST(? AS TEXT))",
                                   (f"A{number}", payload.encode("utf-8", "surrogatepass")))
        strict = {"parse_constant": self.fail}
        page = json.loads(self.call(server).body, **strict)["events"]
        lines = [json.loads(line, **strict) for line in self.call(server, Accept="application/x-ndjson").body.splitlines()]
        self.assertEqual(page, lines)
        self.assertEqual([one["payload"] for one in page][:5] + [page[6]["payload"]], [*odd[:5], {"a": 1}])
        self.assertEqual(len(self.table(server)), len(odd) + 1)
        self.assertEqual(self.call(server, path=PATH + "/1").json["payload"], odd[0])

    def test_answers_are_sent_in_pieces_that_a_socket_takes(self):
        server = self.start()
        for number in range(15):
            self.post(server, event(appointment_id=f"A{number}", notes="n" * 100000))
        connection = self.connect(server)
        connection.sendall(head_bytes("Connection: close", first=f"GET {PATH} HTTP/1.1"))
        sizes = re.findall(rb"\r\n([0-9a-f]+)\r\n", read_all(connection))
        self.assertGreater(len(sizes), 10)
        self.assertLessEqual(max(int(size, 16) for size in sizes), receiver.PIECE)

    def test_an_http_1_0_reader_gets_a_stream_that_ends_with_the_connection(self):
        server = self.start()
        self.fill(server, 700)
        answer, = self.talk(server, head_bytes("Accept: text/csv", first=f"GET {PATH} HTTP/1.0"))
        self.assertNotIn("transfer-encoding", answer.headers)
        self.assertEqual(701, len(answer.body.splitlines()))

    def test_a_stream_that_breaks_off_never_looks_whole(self):
        server = self.start()
        self.fill(server, 1200)
        steps = server.store.steps

        def breaking(*arguments):
            for number, step in enumerate(steps(*arguments)):
                if number == 3:
                    raise receiver.StoreUnavailable("the disk is gone")
                yield step
        with mock.patch.object(server.store, "steps", breaking):
            data = self.exchange(server, head_bytes("Accept: application/x-ndjson", first=f"GET {PATH} HTTP/1.1"))
        self.assertEqual([200], statuses(data))
        self.assertFalse(data.endswith(b"0\r\n\r\n"))
        self.assertIn("broken off", self.log_text(server))


class HealthTest(HTTPTest):
    """/health, /health/live, /health/ready."""

    def test_health_tells_of_each_part(self):
        server = self.start()
        until(lambda: "free_bytes" in self.call(server, path="/health").json["checks"]["disk"], "the first check of the disk")
        answer = self.call(server, path="/health")
        self.assertEqual((200, "ok"), (answer.status, answer.json["status"]))
        self.assertEqual({"database", "disk", "log", "service"}, set(answer.json["checks"]))
        self.assertEqual({"ok"}, {check["status"] for check in answer.json["checks"].values()})
        self.assertGreater(answer.json["checks"]["disk"]["free_bytes"], 0)
        for path in ("/health/live", "/health/ready"):
            self.assertEqual((200, "ok"),
                             (self.call(server, path=path).status, self.call(server, path=path).json["status"]))

    def test_a_locked_database_is_seen_and_health_comes_back_by_itself(self):
        server = self.start(busy_timeout=0.2)
        with contextlib.closing(sqlite3.connect(str(self.database), isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            until(lambda: self.call(server, path="/health").status == 503, "the trouble")
            answer = self.call(server, path="/health")
            self.assertEqual((503, "failing", "failing"),
                             (answer.status, answer.json["status"], answer.json["checks"]["database"]["status"]))
            self.assertIn("retry-after", answer.headers)
            self.assertTrue(answer.json["checks"]["database"]["message"])
            self.assertEqual(503, self.call(server, path="/health/ready").status)
            self.assertEqual(200, self.call(server, path="/health/live").status)
            other.execute("ROLLBACK")
        until(lambda: self.call(server, path="/health").status == 200, "health")

    def test_a_disk_that_takes_nothing_is_seen(self):
        server = self.start()
        full = OSError(28, "No space left on device")
        with mock.patch.object(receiver.tempfile, "TemporaryFile", side_effect=full):
            until(lambda: self.call(server, path="/health").status == 503, "the trouble")
            answer = self.call(server, path="/health")
        self.assertEqual((503, {"status": "failing", "message": "No space left on device"}),
                         (answer.status, answer.json["checks"]["disk"]))
        self.assertEqual("ok", answer.json["checks"]["database"]["status"])

    def test_asking_all_the_time_does_not_wear_the_disk(self):
        server = self.start()
        with mock.patch.object(receiver.tempfile, "TemporaryFile", side_effect=OSError(28, "full")) as written:
            for _ in range(50):
                self.call(server, path="/health")
        self.assertIn(written.call_count, range(1, 10))

    def test_it_answers_at_once_whatever_store_and_disk_do(self):
        server, hangs = self.start(busy_timeout=30), threading.Event()
        self.addCleanup(hangs.set)
        self.assertEqual(self.call(server, path="/health").status, 200)
        with contextlib.closing(sqlite3.connect(str(self.database), isolation_level=None)) as other, \
                mock.patch.object(receiver.tempfile, "TemporaryFile", side_effect=lambda **_: hangs.wait()), \
                mock.patch.object(receiver, "CHECK_SECONDS", 0.0):
            other.execute("BEGIN EXCLUSIVE")
            began = time.monotonic()
            answer = self.call(server, path="/health")
            seconds = time.monotonic() - began
            self.assertLess(seconds, 10, "a busy timeout of 30 s must not be waited for")
            until(lambda: self.call(server, path="/health").json["checks"]["disk"]["status"] == "failing", "the hanging disk")
            self.assertIn(answer.status, (200, 503))
            hangs.set()
            other.execute("ROLLBACK")
        until(lambda: self.call(server, path="/health").status == 200, "health")

    def test_a_log_that_cannot_be_written_is_red_in_health_and_events_are_still_taken(self):
        server = self.start()
        with mock.patch.object(server.log, "trouble", return_value="5 log lines were dropped: the queue was full"):
            answer = self.call(server, path="/health")
            self.assertEqual((answer.status, answer.json["checks"]["log"]["status"]), (503, "failing"))
            self.assertEqual(self.call(server, path="/health/ready").status, 200)

    def test_the_contract_is_served_as_it_is_on_disk(self):
        answer = self.call(self.start(), path="/schema.json")
        self.assertEqual((HERE / "schema.json").read_bytes(), answer.body)
        self.assertEqual("application/schema+json", answer.headers["content-type"])


class PollerTest(HTTPTest):
    """The poller is for speed alone: with and without it a sender sees the same."""

    def test_it_leaves_large_bodies_to_their_own_threads(self):
        server = self.start()
        for size, ordinary in ((receiver.ORDINARY_BODY, True), (receiver.ORDINARY_BODY + 1, False)):
            head = server._endpoints.rules.ruling(head_bytes(f"Content-Length: {size}", first=f"POST {PATH} HTTP/1.1"))
            self.assertEqual(head.ordinary, ordinary)
        self.assertEqual(self.post(server, event(notes="n" * 100000)).status, 200)
        self.assertRegex(self.log_text(server), 'payload=.*"patient_id": "\\*{3}".*"notes": "\\*{3}"')

    STEPS = (post_bytes(event()), post_bytes(event()), post_bytes(event(notes="x")), post_bytes(b"{"), post_bytes(b"{"),
             post_bytes(b"["), post_bytes(event(patient_id=...)), post_bytes(event(patient_id=...)),
             post_bytes(event(patient_id="")), post_bytes(event(appointment_id="A2"), "Connection: keep-alive"),
             post_bytes(event(appointment_id="A5"), "Expect: 100-continue"),
             b"\r\n" + post_bytes(event(appointment_id="A6")),
             post_bytes(event(appointment_id="A7", notes="n" * 70000)), post_bytes(b""),
             f"GET {PATH} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode(),
             post_bytes(event(appointment_id="A8"), "Origin: http://elsewhere"))

    def conversation(self, server):
        """[(status, fields, body)] of all steps on one connection, without what differs from run to run."""
        connection, heard = self.connect(server), []
        for step in self.STEPS:
            connection.sendall(step)
            answer = self.read_answer(connection)
            fields = {name: value for name, value in answer.headers.items() if name not in ("date", "x-request-id")}
            heard.append((answer.status, fields, re.sub(rb"\d{4}-\d\d-\d\dT[0-9:]{8}\.\d{6}", b"-", answer.body)))
        return heard, read_all(connection)

    def start_with_poller(self):
        server = self.start()
        if server._server.poller is None:
            self.skipTest("this system has no epoll, so there is no poller")
        return server

    def test_with_and_without_it_the_answers_are_the_same(self):
        server = self.start_with_poller()
        heard, rest = self.conversation(server)
        for name, module, attribute in (("without epoll", receiver.select, "epoll"),
                                        ("and without a send that does not block", receiver, "SENDS_AT_ONCE")):
            with self.subTest(name), mock.patch.object(module, attribute, None):
                other = self.start(database=str(self.folder / f"{attribute}.db"),
                                   log_file=str(self.folder / f"{attribute}.log"))
                self.assertIsNone(other._server.poller)
                self.assertEqual(self.conversation(other), (heard, rest))
        self.assertEqual([status for status, _, _ in heard],
                         [200, 409, 409, *[400] * 6, 200, 200, 200, 200, 400, 200, 403])

    def test_it_wakes_the_own_thread_of_a_connection_only_for_what_is_not_ordinary(self):
        server = self.start_with_poller()
        connection = self.connect(server)
        connection.sendall(post_bytes(event(appointment_id="first")))       # a first one is read by the own thread
        self.read_answer(connection)
        hand_over = receiver.Connection.hand_over
        with mock.patch.object(receiver.Connection, "hand_over", autospec=True, side_effect=hand_over) as handed:
            for number in range(20):
                connection.sendall(post_bytes(event(appointment_id=f"AP{number:03}")))
                self.assertEqual(self.read_answer(connection).status, 200)
            for number in range(20):                                        # heads that never come again
                connection.sendall(post_bytes(event(appointment_id=f"AQ{number:03}"), f"webhook-id: {number}"))
                self.assertEqual(self.read_answer(connection).status, 200)
            self.assertEqual(handed.call_count, 0)
            for body, turns in ((b"{", 0), (b"[", 0), (b"n" * 10000, 1)):   # refused, refused, large
                before = handed.call_count
                connection.sendall(post_bytes(body))
                self.assertEqual(self.read_answer(connection).status, 400)
                self.assertEqual(handed.call_count - before, turns)

    def test_a_refused_event_is_not_answered_before_those_that_wait(self):
        server = self.start_with_poller()
        connection = self.connect(server)
        connection.sendall(post_bytes(event(appointment_id="first")))
        self.read_answer(connection)
        handler, = server._server.open_connections
        with contextlib.closing(sqlite3.connect(str(self.database), isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            connection.sendall(post_bytes(event(appointment_id="waits")))
            until(lambda: handler.outbox.promised == 2, "the event")
            with mock.patch.object(server._server.endpoints, "receive_event", wraps=server._server.endpoints.receive_event) as read:
                connection.sendall(post_bytes(b"{"))
                until(lambda: read.called, "the second request")
            other.execute("ROLLBACK")
        connection.shutdown(socket.SHUT_WR)
        self.assertEqual(statuses(read_all(connection)), [200, 400])

    def test_events_that_wait_behind_a_lock_are_answered_in_order_when_it_is_gone(self):
        server = self.start_with_poller()
        connection = self.connect(server)
        connection.sendall(post_bytes(event(appointment_id="first")))
        self.read_answer(connection)
        handler, = server._server.open_connections
        with contextlib.closing(sqlite3.connect(str(self.database), isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            for number in range(10):                    # each in a look of its own
                connection.sendall(post_bytes(event(appointment_id=f"A{number}")))
                until(lambda: handler.outbox.promised == number + 2, "the event")
            self.assertEqual(self.call(server, path="/health/live").status, 200)
            other.execute("ROLLBACK")
        connection.shutdown(socket.SHUT_WR)
        self.assertEqual([answer.json["event_id"] for answer in answers_in(read_all(connection))], list(range(2, 12)))
        self.assertEqual(rows(self.database, "SELECT appointment_id FROM appointment_events WHERE id > 1 ORDER BY id"),
                         [(f"A{number}",) for number in range(10)])


class ConnectionTest(HTTPTest):
    """Requests and answers on real sockets."""

    def test_one_connection_serves_many_requests(self):
        server = self.start()
        connection = self.connect(server)
        for number in range(5):
            connection.sendall(post_bytes(event(appointment_id=f"A{number}")))
            self.assertEqual(number + 1, self.read_answer(connection).json["event_id"])
            connection.sendall(head_bytes())
            self.assertEqual(200, self.read_answer(connection).status)
            connection.sendall(post_bytes(b"{"))
            self.assertEqual("json", self.read_answer(connection).json["errors"][0]["rule"])

    def test_pipelined_requests_of_all_kinds_are_answered_in_order(self):
        server = self.start()
        requests, methods, wanted = [], [], []
        for number in range(20):
            list_it = head_bytes(first=f"GET {PATH}?appointment_id=A{number} HTTP/1.1")
            for data, method, status in ((post_bytes(event(appointment_id=f"A{number}")), "POST", 200),
                                         (post_bytes(event(appointment_id=f"A{number}")), "POST", 409),
                                         (list_it, "GET", 200),
                                         (post_bytes(b"[]"), "POST", 400),
                                         (head_bytes(first="HEAD /health/live HTTP/1.1"), "HEAD", 200),
                                         (head_bytes(first="GET /nowhere HTTP/1.1"), "GET", 404)):
                requests.append(data)
                methods.append(method)
                wanted.append(status)
        answers = self.talk(server, b"".join(requests), *methods)
        self.assertEqual(wanted, [answer.status for answer in answers])
        stored = [answer.json["event_id"] for answer in answers[::6]]
        self.assertEqual(stored, [answer.json["event_id"] for answer in answers[1::6]])
        self.assertEqual([[number] for number in stored],
                         [[one["id"] for one in answer.json["events"]] for answer in answers[2::6]])
        ids = [answer.headers["x-request-id"] for answer in answers]
        self.assertEqual(sorted(set(ids)), ids)

    def test_many_pipelined_events_are_all_stored_and_answered_in_order(self):
        server = self.start()
        answers = self.talk(server, b"".join(post_bytes(event(appointment_id=f"A{number}")) for number in range(500)))
        self.assertEqual(list(range(1, 501)), [answer.json["event_id"] for answer in answers])

    def test_a_request_may_be_cut_anywhere(self):
        server = self.start()
        connection = self.connect(server)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        size = len(post_bytes(event(appointment_id="A100")))
        for place in range(1, size):
            for piece in cut(post_bytes(event(appointment_id=f"A{place + 100}")), place):
                connection.sendall(piece)
            self.assertEqual(place, self.read_answer(connection).json["event_id"])

    def test_a_request_may_come_byte_by_byte_with_the_next_one_behind_it(self):
        server = self.start()
        connection = self.connect(server)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        chunked = head_bytes("Transfer-Encoding: chunked", first=f"POST {PATH} HTTP/1.1")
        body = json.dumps(event(appointment_id="A2")).encode()
        for byte in post_bytes(event()) + chunked + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) + head_bytes():
            connection.sendall(bytes((byte,)))
        connection.shutdown(socket.SHUT_WR)
        first, second, third = answers_in(read_all(connection))
        self.assertEqual((1, 2, 200), (first.json["event_id"], second.json["event_id"], third.status))

    def test_empty_lines_before_a_request_are_passed_over(self):
        self.assertEqual([200, 200],
                         self.talk_statuses(self.start(), b"\r\n" + head_bytes() + b"\r\n\r\n" + post_bytes(event())))

    def test_who_asks_first_is_told_to_continue(self):
        server = self.start()
        connection = self.connect(server)
        body = json.dumps(event()).encode()
        for number, framing in enumerate((f"Content-Length: {len(body)}", "Transfer-Encoding: chunked")):
            connection.sendall(head_bytes(framing, "Expect: 100-continue", first=f"POST {PATH} HTTP/1.1"))
            interim = b""
            while not interim.endswith(b"\r\n\r\n"):
                interim += connection.recv(1)
            self.assertEqual(b"HTTP/1.1 100 Continue\r\n\r\n", interim)
            connection.sendall(body if not number else b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
            self.assertEqual((200, 409)[number], self.read_answer(connection).status)

    def test_who_asks_first_is_refused_before_the_body_is_sent(self):
        server = self.start(max_body=100)
        for status, first, line in ((413, f"POST {PATH} HTTP/1.1", "Content-Length: 101"),
                                    (404, "POST /nowhere HTTP/1.1", "Content-Length: 10"),
                                    (405, "PUT /health HTTP/1.1", "Content-Length: 10")):
            with self.subTest(status):
                connection = self.connect(server)
                connection.sendall(head_bytes(line, "Expect: 100-continue", first=first))
                answer, = answers_in(read_all(connection))
                self.assertEqual((status, "close"), (self.proper(answer).status, answer.headers["connection"]))

    def test_who_asks_first_and_sends_all_the_same_is_not_told_to_continue(self):
        self.assertEqual([200], self.talk_statuses(self.start(), post_bytes(event(), "Expect: 100-continue")))

    def test_heads_that_never_come_again_do_not_fill_the_memory(self):
        server = self.start()
        requests = (head_bytes(f"X: {number}", first="HEAD /health/live HTTP/1.1")
                    for number in range(receiver.HEADS_KEPT + 100))
        self.assertEqual({200}, set(self.talk_statuses(server, b"".join(requests), *["HEAD"] * 2000)))
        self.assertLessEqual(len(server._endpoints.rules._kept), receiver.HEADS_KEPT)

    def test_http_1_0_gets_one_answer_unless_it_asks_for_more(self):
        server = self.start()
        answer, = self.talk(server, post_bytes(event(), version="1.0") + head_bytes())
        self.assertEqual((200, "close"), (answer.status, answer.headers["connection"]))
        first, second = self.talk(server, post_bytes(event(), "Connection: keep-alive", version="1.0") + head_bytes())
        self.assertEqual((409, "keep-alive", 200), (first.status, first.headers["connection"], second.status))

    def test_connection_close_is_the_last_request(self):
        server = self.start()
        answer, = self.talk(server, post_bytes(event(), "Connection: close") + post_bytes(event(appointment_id="late")))
        self.assertEqual((200, "close"), (answer.status, answer.headers["connection"]))
        self.assertEqual(1, rows(self.database))

    def test_a_chunked_body_is_an_event_like_any_other(self):
        server = self.start()
        body = json.dumps(event()).encode()
        pieces = cut(body, 1, 10, 50)
        chunked = b"".join(b"%x;note=x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\nX: y\r\n\r\n"
        head = head_bytes("Transfer-Encoding: chunked", first=f"POST {PATH} HTTP/1.1")
        self.assertEqual([200, 409, 200], self.talk_statuses(server, head + chunked + head + chunked + head_bytes()))

    def test_a_chunked_body_that_is_too_long_or_broken_ends_the_connection(self):
        server = self.start(max_body=1000)
        head = head_bytes("Transfer-Encoding: chunked", first=f"POST {PATH} HTTP/1.1")
        for status, body in ((413, b"200\r\n" + b"a" * 512 + b"\r\n" + b"200\r\n" + b"a" * 512 + b"\r\n0\r\n\r\n"),
                             (400, b"5\r\nhellooo\r\n0\r\n\r\n"), (400, b"5\r\nhel")):
            with self.subTest(body[:10]):
                self.assertEqual([status], self.talk_statuses(server, head + body + head_bytes()))

    def test_options_tells_what_a_path_takes(self):
        server = self.start()
        for path, allow in ((PATH, "GET, HEAD, OPTIONS, POST"), ("/health", "GET, HEAD, OPTIONS"),
                            ("*", "GET, HEAD, OPTIONS, POST")):
            answer, following = self.talk(server, head_bytes(first=f"OPTIONS {path} HTTP/1.1") + head_bytes())
            self.assertEqual((204, allow, b"", 200),
                             (answer.status, answer.headers["allow"], answer.body, following.status))
            self.assertNotIn("content-length", answer.headers)
        self.assertEqual(404, self.call(server, "OPTIONS", "/nowhere").status)

    # The status, the request, whether the connection goes on
    STATUSES = (
        (404, head_bytes(first="GET /nowhere HTTP/1.1"), True),
        (404, head_bytes("Content-Length: 2", first="POST /nowhere HTTP/1.1") + b"{}", False),
        (405, head_bytes(first=f"DELETE {PATH} HTTP/1.1"), True),
        (405, head_bytes("Content-Length: 2", first=f"PUT {PATH} HTTP/1.1") + b"{}", False),
        (406, head_bytes("Accept: image/png", first=f"GET {PATH} HTTP/1.1"), True),
        (411, head_bytes(first=f"POST {PATH} HTTP/1.1"), False),
        (413, head_bytes("Content-Length: 1048577", first=f"POST {PATH} HTTP/1.1") + b"a" * 1048577, False),
        (414, head_bytes(first=f"GET /{'a' * 8192} HTTP/1.1"), False),
        (415, post_bytes(event(), "Content-Encoding: gzip"), False),
        (417, post_bytes(event(), "Expect: a-pony"), False),
        (431, head_bytes("X: " + "a" * 16384), False),
        (431, head_bytes(*["X: a"] * 100), False),
        (405, head_bytes(first=f"BREW {PATH} HTTP/1.1"), True),
        (404, head_bytes(first="BREW /nowhere HTTP/1.1"), True),
        (501, head_bytes("Transfer-Encoding: gzip", first=f"POST {PATH} HTTP/1.1") + b"a", False),
        (505, head_bytes(first="GET /health HTTP/3.0"), False),
        (400, post_bytes(b"{"), True),
        (400, head_bytes("Content-Length: 9", first=f"POST {PATH} HTTP/1.1") + b"{}", False),
    )

    def test_whatever_is_refused_has_its_status_and_with_a_body_unread_it_closes(self):
        server = self.start()
        for status, request, goes_on in self.STATUSES:
            with self.subTest(status, request=request[:50]):
                answers = self.talk(server, request + (head_bytes() if status != 400 or goes_on else b""))
                self.assertEqual([status, 200] if goes_on else [status], [answer.status for answer in answers])
                self.assertEqual(None if goes_on else "close", answers[0].headers.get("connection"))
                if status == 405:
                    self.assertEqual("GET, HEAD, OPTIONS, POST", answers[0].headers["allow"])
                if status == 415:
                    self.assertEqual("identity", answers[0].headers["accept-encoding"])

    def test_who_is_still_sending_a_large_body_can_read_why_it_was_refused(self):
        server = self.start()
        size = 8 * 1024 * 1024
        for status, first in ((413, f"POST {PATH} HTTP/1.1"), (413, "POST /nowhere HTTP/1.1"),
                              (405, "PUT /health HTTP/1.1")):
            length = size if status == 413 else 1024 * 1024
            with self.subTest(status, first=first):
                connection = self.connect(server)
                connection.sendall(head_bytes(f"Content-Length: {length}", first=first))
                connection.sendall(b"a" * length)
                answer, = answers_in(read_all(connection))
                self.assertEqual(status, self.proper(answer).status)

    def test_the_log_names_method_and_path_of_what_was_refused_by_its_head(self):
        server = self.start()
        for line in ("Content-Length: 1048577", "Content-Length: +1", "Expect: a-pony", "no colon"):
            self.talk(server, head_bytes(line, first=f"POST {PATH}?patient_id=PAT-1 HTTP/1.1"))
        text = self.log_text(server)
        self.assertEqual(["413", "400", "417", "400"], re.findall(rf"WARNING - \[.*\] POST {PATH} (\d+) ", text))
        self.assertNotIn("PAT-1", text)

    def test_head_gets_no_body_also_when_its_head_is_refused(self):
        answer, = self.talk(self.start(), head_bytes("no colon", first="HEAD /health HTTP/1.1"), "HEAD")
        self.assertEqual((400, b""), (answer.status, answer.body))
        self.assertGreater(int(answer.headers["content-length"]), 0)

    def test_a_read_sees_the_events_that_were_sent_before_it_on_the_same_connection(self):
        server = self.start()
        for number in range(1, 21):
            read = head_bytes(first=f"GET {PATH}/{number} HTTP/1.1")
            self.assertEqual([200, 200],
                             self.talk_statuses(server, post_bytes(event(appointment_id=f"A{number}")) + read))

    def test_a_body_of_the_greatest_size_is_taken(self):
        server = self.start(max_body=4096)
        body = json.dumps(event()).encode()
        self.assertEqual([200], self.talk_statuses(server, post_bytes(body + b" " * (4096 - len(body)))))
        self.assertEqual([413], self.talk_statuses(server, post_bytes(body + b" " * (4097 - len(body)))))

    def test_any_content_type_is_read_as_json(self):
        server = self.start()
        for number, kind in enumerate(("application/x-www-form-urlencoded", "text/plain; charset=utf-16", "nonsense")):
            self.assertEqual(200, self.post(server, event(appointment_id=f"A{number}"), Content_Type=kind).status)

    @unittest.skipUnless(receiver.SENDS_AT_ONCE, "here each connection's own thread sends its answers")
    def test_without_a_thread_for_late_answers_a_connection_ends_and_the_service_goes_on(self):
        server = self.start()
        connection = self.connect(server)
        connection.sendall(post_bytes(event()))
        self.read_answer(connection)
        handler, = server._server.open_connections
        with mock.patch.object(receiver.threading.Thread, "start", side_effect=RuntimeError("can't start new thread")):
            handler.outbox.promised += 1
            handler.outbox.send(b"x" * 50000000)       # more than any socket's buffer takes
        self.assertTrue(set(read_all(connection)) <= {ord("x")})
        until(lambda: not server._server.open_connections, "the end of the connection")
        self.assertEqual(self.post(server, event(appointment_id="A2")).status, 200)

    def test_who_never_reads_answers_loses_only_its_own(self):
        server = self.start()
        deaf = self.connect(server)
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.settimeout(0.5)
        with contextlib.suppress(OSError):
            deaf.sendall(head_bytes(first="GET /schema.json HTTP/1.1") * 20000)
        for number in range(20):
            self.assertEqual(200, self.post(server, event(appointment_id=f"A{number}")).status)

    def test_a_sender_that_leaves_after_its_event_has_still_delivered_it(self):
        server = self.start()
        connection = self.connect(server)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                              struct.pack("ii", 1, 0) if POSIX else struct.pack("hh", 1, 0))
        connection.sendall(post_bytes(event()))
        until(lambda: rows(self.database) == 1, "the event")
        connection.close()
        self.assertEqual(409, self.post(server).status)


class LimitTest(HTTPTest):
    """Limits on connections and on time."""

    def test_one_connection_too_many_is_told_so_and_the_others_are_unharmed(self):
        server = self.start(max_connections=3)
        good = [self.connect(server) for _ in range(3)]
        for number, connection in enumerate(good):
            connection.sendall(post_bytes(event(appointment_id=f"A{number}")))
            self.assertEqual(200, self.read_answer(connection).status)
        for number in range(6):
            refused = self.connect(server)
            if number % 2:
                refused.sendall(post_bytes(event(appointment_id="refused")))
            answer, = answers_in(read_all(refused))
            self.assertEqual((503, "close", "1"), (self.proper(answer).status, answer.headers["connection"],
                                                   answer.headers["retry-after"]))
        for connection in good:
            connection.sendall(head_bytes())
            self.assertEqual(200, self.read_answer(connection).status)
        good[0].close()

        def served():
            with contextlib.suppress(OSError, http.client.HTTPException):
                return self.call(server, path="/health").status == 200
        until(served, "the free place")

    @unittest.skipUnless(sys.platform == "linux", "only Linux has all of 127.0.0.0/8")
    def test_one_address_cannot_take_the_place_of_another(self):
        server = self.start(max_connections=10, max_connections_per_address=2)
        greedy = [self.connect(server) for _ in range(2)]
        for connection in greedy:
            connection.sendall(head_bytes())
            self.read_answer(connection)
        answer, = answers_in(read_all(self.connect(server)))
        self.assertEqual(503, answer.status)
        self.assertIn("address", answer.json["message"])
        other = socket.create_connection(("127.0.0.1", server.port), timeout=WAIT, source_address=("127.0.0.2", 0))
        self.addCleanup(other.close)
        other.sendall(head_bytes())
        self.assertEqual(200, self.read_answer(other).status)

    def test_a_head_that_does_not_come_to_its_end_is_a_408(self):
        server = self.start(header_timeout=0.3)
        connections = [self.connect(server) for _ in range(3)]
        for connection, begun in zip(connections, (b"G", b"GET /health HTTP/1.1\r\nX", head_bytes()[:-2])):
            connection.sendall(begun)
        for connection in connections:
            answer, = answers_in(read_all(connection))
            self.assertEqual((408, "close"), (self.proper(answer).status, answer.headers["connection"]))

    def trickle(self, connection, byte):
        """Send a byte again and again until the other side ends; give what it answered."""
        connection.settimeout(0.02)
        deadline, data = time.monotonic() + WAIT, b""
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < deadline:
                with contextlib.suppress(socket.timeout):
                    piece = connection.recv(65536)
                    if not piece:
                        return data
                    data += piece
                    continue
                connection.sendall(byte)
        return data

    def test_trickling_keeps_nobody_beyond_the_time_of_the_whole(self):
        server = self.start(header_timeout=0.4, body_timeout=0.4)
        for begun, byte in ((b"GET /health HTTP/1.1\r\nX: ", b"a"),
                            (head_bytes("Content-Length: 100000", first=f"POST {PATH} HTTP/1.1"), b" "),
                            (head_bytes("Transfer-Encoding: chunked", first=f"POST {PATH} HTTP/1.1"), b"1\r\n \r\n")):
            with self.subTest(begun[:30]):
                connection = self.connect(server)
                connection.sendall(begun)
                answer, = answers_in(self.trickle(connection, byte))
                self.assertEqual(408, self.proper(answer).status)

    def test_trickling_a_second_head_is_watched_too(self):
        server = self.start(header_timeout=0.4)
        connection = self.connect(server)
        connection.sendall(head_bytes() + b"GET /health HT")
        data = self.trickle(connection, b"T")
        self.assertEqual([200, 408], [answer.status for answer in answers_in(data)])

    def test_idle_connections_are_ended_without_a_word(self):
        server = self.start(idle_timeout=0.3, header_timeout=0.3)
        used, unused = self.connect(server), self.connect(server)
        used.sendall(post_bytes(event()))
        self.assertEqual(200, self.read_answer(used).status)
        self.assertEqual(b"", read_all(used))
        self.assertEqual(b"", read_all(unused))

    def test_a_reader_that_takes_nothing_is_let_go(self):
        server = self.start(body_timeout=0.3, max_connections=1)
        deaf = self.connect(server)
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.settimeout(0.3)
        with contextlib.suppress(OSError):
            deaf.sendall(head_bytes(first="GET /schema.json HTTP/1.1") * 20000)

        def served():
            with contextlib.suppress(OSError, http.client.HTTPException):
                return self.call(server, path="/health").status == 200
        until(served, "the place of the one that does not read")

    def test_a_budget_is_counted_in_all_and_half_of_it_for_each_address(self):
        budget = receiver.Budget(4)
        self.assertEqual([budget.take("a", 1), budget.take("a", 1), budget.take("a", 1), budget.take("b", 2),
                          budget.take("c", 1)], [True, True, False, True, False])
        budget.give("a", 1)
        self.assertEqual([budget.take("b", 1), budget.take("c", 1), budget.take("a", 1)], [False, True, False])
        for address, amount in (("a", 1), ("b", 2), ("c", 1)):
            budget.give(address, amount)
        self.assertEqual([budget.take("a", 2), budget.take("b", 2)], [True, True])

    def test_one_read_too_many_is_told_to_come_again_and_events_are_still_taken(self):
        with mock.patch.object(receiver, "READS", 4):
            server = self.start()
        insert_rows(self.database, 3000, "printf('%03000d', value)")
        deaf = [self.connect(server) for _ in range(2)]
        for connection in deaf:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(head_bytes("Accept: text/csv", first=f"GET {PATH} HTTP/1.1"))
            connection.recv(1)
        answer = self.call(server, path=PATH)
        self.assertEqual((answer.status, answer.headers["retry-after"]), (503, "1"))
        self.assertEqual([self.post(server, event(appointment_id="A")).status, self.call(server, path="/health").status],
                         [200, 200])
        for connection in deaf:
            connection.close()
        until(lambda: self.call(server, path=PATH).status == 200, "the end of the reads")
        self.assertRegex(self.log_text(server), "WARNING - .* 503 Too many reads are under way")

    def test_one_large_body_too_many_is_told_to_come_again_and_small_ones_are_taken(self):
        server = self.start(max_body=100000)
        server._server.large = receiver.Budget(200000)
        begun = post_bytes(event(notes="n" * 60000))
        slow = self.connect(server)
        slow.sendall(begun[:1000])
        until(lambda: [one.phase for one in server._server.open_connections] == [receiver.Phase.BODY], "the first body")
        slow.sendall(begun[1000:60000])
        until(lambda: server._server.large._used >= 59000, "the rest of it")
        chunked = head_bytes("Transfer-Encoding: chunked", first=f"POST {PATH} HTTP/1.1") + b"ea60\r\n"
        for head, body in ((begun[:1000], begun[1000:]), (chunked, b" " * 60000)):
            connection = self.connect(server)
            connection.sendall(head)
            until(lambda: [one.phase for one in server._server.open_connections].count(receiver.Phase.BODY) == 2, "its head")
            connection.sendall(body)
            answer, = answers_in(read_all(connection))
            self.assertEqual((answer.status, answer.headers["retry-after"], answer.headers["connection"]),
                             (503, "1", "close"))
        self.assertEqual(self.post(server, event(appointment_id="small")).status, 200)
        slow.sendall(begun[60000:])
        self.assertEqual(self.read_answer(slow).status, 200)
        until(lambda: not server._server.large._used, "what was held")
        self.assertEqual(self.talk_statuses(server, begun), [409])

    def test_a_sender_that_pipelines_without_end_waits_for_its_answers(self):
        """Else its answers would pile up in the store."""
        server = self.start()
        with contextlib.closing(sqlite3.connect(str(self.database), isolation_level=None)) as other:
            connection = self.connect(server)
            connection.sendall(post_bytes(event()))
            self.read_answer(connection)
            handler, = server._server.open_connections
            other.execute("BEGIN IMMEDIATE")
            most = 0
            sending = threading.Thread(target=connection.sendall, args=(b"".join(
                post_bytes(event(appointment_id=f"B{number}")) for number in range(2000)),))
            sending.start()
            until(lambda: handler.outbox.is_full, "the limit")
            for _ in range(200):
                most = max(most, handler.outbox.promised - handler.outbox.sent)
                time.sleep(0.0005)
            other.execute("ROLLBACK")
        self.assertLessEqual(most, receiver.MAX_PIPELINED + 1)
        reading = threading.Thread(target=lambda: (sending.join(), connection.shutdown(socket.SHUT_WR)))
        reading.start()
        found = statuses(read_all(connection))
        reading.join()
        self.assertEqual((len(found), set(found) - {503}), (2000, {200}))

    @unittest.skipUnless(receiver.SENDS_AT_ONCE, "here each connection's own thread sends its answers")
    def test_a_late_answer_that_nobody_takes_ends_its_connection(self):
        server = self.start(body_timeout=0.3)
        connection = self.connect(server)
        connection.sendall(post_bytes(event()))
        self.read_answer(connection)
        handler, = server._server.open_connections
        handler.outbox.promised += 1
        handler.outbox.send(b"x" * 50000000)            # more than any socket's buffer takes
        until(lambda: not server._server.open_connections, "the end of the connection")
        self.assertTrue(handler.timed_out)
        self.assertEqual(self.post(server, event(appointment_id="A2")).status, 200)

    @unittest.skipUnless(POSIX, "needs 600 open files in one process")
    def test_300_slow_senders_are_not_felt_by_a_good_one(self):
        server = self.start(max_connections_per_address=400, header_timeout=60)
        slow = [self.connect(server) for _ in range(300)]
        for number, connection in enumerate(slow):
            connection.sendall((b"POST /webhook/appointments HTTP/1.1\r\nX: ", post_bytes(event())[:-1])[number % 2])
        good = self.connect(server)
        for number in range(100):
            good.sendall(post_bytes(event(appointment_id=f"good-{number}")))
            self.assertEqual(200, self.read_answer(good).status)
        for connection in slow[:150]:
            connection.sendall(b"y")
        self.assertEqual(200, self.call(server, path="/health").status)
        self.assertEqual(100, rows(self.database))
        for connection in slow:
            connection.close()


class ListenTest(HTTPTest):
    """Where the service listens, and who is said to have sent."""

    def test_localhost_is_listened_to_on_every_family_that_the_machine_has(self):
        server = self.start(host="localhost")
        both = len(server._server.listeners) > 1        # some machines have no IPv6, or no name for it
        self.assertEqual(server.url, f"http://{'localhost' if both else '127.0.0.1'}:{server.port}")
        for address in {one[4][0] for one in socket.getaddrinfo("localhost", None, type=socket.SOCK_STREAM)}:
            with contextlib.suppress(OSError), socket.create_connection((address, server.port), timeout=WAIT) as connection:
                connection.sendall(head_bytes("Connection: close", first="GET /health/live HTTP/1.1"))
                self.assertEqual(statuses(read_all(connection)), [200], address)
        self.assertTrue(server._server.loopback)

    def test_an_address_of_the_other_family_of_a_name_may_be_missing(self):
        both = [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("2001:db8::1", 0, 0, 0)),
                (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]
        with mock.patch.object(receiver.socket, "getaddrinfo", return_value=both):
            server = self.start(host="clinic.example")
        self.assertEqual(len(server._server.listeners), 1)
        self.assertEqual(self.post(server).status, 200)
        with mock.patch.object(receiver.socket, "getaddrinfo", return_value=both[:1]), \
                self.assertRaisesRegex(SetupError, "no network interface of this machine has that address"):
            self.start(host="clinic.example", database=str(self.folder / "other.db"))

    def test_a_sender_by_ipv4_is_known_by_its_ipv4_address(self):
        try:
            server = self.start(host="::")
        except SetupError:
            self.skipTest("this machine has no IPv6")
        self.assertEqual(self.post(server).status, 200)
        self.assertEqual(rows(self.database, "SELECT client FROM appointment_events"), "127.0.0.1")
        self.assertIn("client=127.0.0.1", self.log_text(server))

    def test_what_keeps_it_from_listening_says_what_to_do(self):
        for number, words in ((13, "may not take a port below 1024"), (98, "choose another with --port"),
                              (99, "no network interface")):
            number = {13: receiver.errno.EACCES, 98: receiver.errno.EADDRINUSE, 99: receiver.errno.EADDRNOTAVAIL}[number]
            with self.subTest(words), mock.patch.object(receiver.Server, "_listener", side_effect=OSError(number, "x")), \
                    self.assertRaisesRegex(SetupError, words):
                WebhookServer(Config(port=80, database=str(self.database))).start()


class SiteTest(HTTPTest):
    """Browsers that other sites send here."""

    def test_a_page_of_another_site_cannot_post_or_read(self):
        server = self.start()
        own = f"http://127.0.0.1:{server.port}"
        for status, headers in ((200, {}), (200, {"Origin": own}),
                                (200, {"Origin": own, "Sec_Fetch_Site": "same-origin"}),
                                (200, {"Sec_Fetch_Site": "none"}), (403, {"Origin": "http://evil.example"}),
                                (403, {"Origin": "null"}), (403, {"Origin": "http://127.0.0.1:1"}),
                                (403, {"Origin": own + ".evil.example"}),
                                (403, {"Origin": f"http://x@127.0.0.1:{server.port}"}),
                                (403, {"Sec_Fetch_Site": "cross-site"}), (403, {"Sec_Fetch_Site": "same-site"}),
                                (403, {"Origin": own, "Sec_Fetch_Site": "cross-site"})):
            with self.subTest(headers):
                before = rows(self.database)
                sent = self.post(server, event(appointment_id=str(headers)), **headers)
                self.assertEqual([status, status], [sent.status, self.call(server, path=PATH, **headers).status])
                self.assertEqual(before + (status == 200), rows(self.database))
                self.assertNotIn("access-control-allow-origin", sent.headers)

    def test_an_opaque_origin_is_foreign_also_where_no_host_is_named(self):
        server = self.start()
        for host, version in (("", "1.0"), ("Host:", "1.1")):
            head = f"GET {PATH} HTTP/{version}"
            self.assertEqual([403], self.talk_statuses(server, head_bytes("Origin: null", first=head, host=host)))
            self.assertEqual([200], self.talk_statuses(server, head_bytes(first=head, host=host)))

    def test_a_foreign_name_that_leads_to_this_machine_is_refused(self):
        server = self.start()
        for host, status in (("localhost", 200), ("LOCALHOST:1", 200), ("127.0.0.1", 200), ("127.9.9.9", 200),
                             ("[::1]:8000", 200),
                             ("desk.localhost", 200), ("evil.example", 403), ("localhost.evil.example", 403),
                             ("127.0.0.1.evil.example", 403), ("evil-localhost", 403), ("[::2]", 200), ("10.244.0.5:8000", 200),
                             ("10.244.0.5.evil.example", 403), ("0x7f.1", 403), ("[::2].evil.example", 400),
                             ("%6cocalhost", 403)):
            with self.subTest(host):
                self.assertEqual(status, self.call(server, path=PATH, Host=host).status)

    def test_the_name_in_an_absolute_target_counts_not_the_host_header(self):
        server = self.start()
        for target, host, status in (("http://localhost/health", "evil.example", 200),
                                     ("http://evil.example/health", "localhost", 403)):
            request = head_bytes(first=f"GET {target} HTTP/1.1", host="Host: " + host)
            self.assertEqual([status], self.talk_statuses(server, request))
        self.assertEqual([403], self.talk_statuses(server, head_bytes(
            "Origin: http://evil.example", first="GET http://localhost/health HTTP/1.1", host="Host: evil.example")))

    def test_allowed_hosts_are_answered_besides_the_local_ones(self):
        server = self.start(allowed_host="clinic.example,other.example")
        for host, status in (("Clinic.Example:8000", 200), ("other.example", 200), ("localhost", 200),
                             ("x.clinic.example", 403)):
            self.assertEqual(status, self.call(server, path=PATH, Host=host).status, host)

    def test_every_name_is_answered_where_others_can_reach_us_unless_some_are_named(self):
        server = self.start(host="0.0.0.0")
        self.assertEqual(200, self.call(server, path=PATH, Host="clinic.example").status)
        named = self.start(host="0.0.0.0", allowed_host="clinic.example", database=str(self.folder / "2.db"))
        for host, status in (("clinic.example", 200), ("b.example", 403)):
            self.assertEqual(status, self.call(named, path=PATH, Host=host).status, host)

    def test_pages_of_an_allowed_origin_may_send_and_read_the_answer(self):
        server = self.start(allowed_origin="https://desk.example")
        headers = {"Origin": "https://desk.example", "Sec_Fetch_Site": "cross-site"}
        for answer in (self.post(server, **headers), self.post(server, **headers),
                       self.call(server, path="/nowhere", **headers),
                       self.call(server, path=PATH, **headers)):
            self.assertEqual("https://desk.example", answer.headers["access-control-allow-origin"])
            self.assertIn("X-Request-ID", answer.headers["access-control-expose-headers"])
        for origin in ("http://desk.example", "https://desk.example:444", "https://desk.example.evil.example"):
            answer = self.post(server, Origin=origin)
            self.assertEqual((403, None), (answer.status, answer.headers.get("access-control-allow-origin")), origin)

    def test_a_preflight_is_granted_to_an_allowed_origin_only(self):
        server = self.start(allowed_origin="https://desk.example")
        preflight = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "content-type"}
        granted = self.call(server, "OPTIONS", PATH, Origin="https://desk.example", **preflight)
        self.assertEqual((204, "https://desk.example", "Content-Type"), (
            granted.status, granted.headers["access-control-allow-origin"],
            granted.headers["access-control-allow-headers"]))
        self.assertIn("POST", granted.headers["access-control-allow-methods"])
        refused = self.call(server, "OPTIONS", PATH, Origin="https://evil.example", **preflight)
        self.assertEqual(403, refused.status)
        self.assertFalse([name for name in refused.headers if name.startswith("access-control")])


class HostileTest(HTTPTest):
    """What attackers try on the wire."""

    def test_a_second_request_cannot_be_smuggled_behind_the_first(self):
        server = self.start()
        hidden = post_bytes(event(appointment_id="SMUGGLED"))
        first = f"POST {PATH} HTTP/1.1"
        whole = b"2\r\n{}\r\n0\r\n\r\n"
        for what, lines, body in (
                ("both lengths", ("Content-Length: 4", "Transfer-Encoding: chunked"), b"0\r\n\r\n"),
                ("both lengths, turned", ("Transfer-Encoding: chunked", "Content-Length: 4"), b"0\r\n\r\n"),
                ("two lengths", ("Content-Length: 0", f"Content-Length: {len(hidden)}"), b""),
                ("a list of lengths", (f"Content-Length: 0, {len(hidden)}",), b""),
                ("a plus", ("Content-Length: +0",), b""),
                ("an underscore", ("Content-Length: 0_0",), b""),
                ("a space before the colon", ("Transfer-Encoding : chunked", "Content-Length: 0"), b""),
                ("a folded line", ("X: y", " Transfer-Encoding: chunked", "Content-Length: 0"), b""),
                ("a folded coding", ("Transfer-Encoding:", " chunked"), b"0\r\n\r\n"),
                ("a bare CR", ("X: y\rTransfer-Encoding: chunked", "Content-Length: 0"), b""),
                ("a bare LF", ("X: y\nContent-Length: 0",), b""),
                ("a NUL", ("Content-Length: 0\0",), b""),
                ("a form feed", ("Transfer-Encoding: \x0cchunked",), b"0\r\n\r\n"),
                ("no colon", ("Content-Length 5", "Content-Length: 0"), b""),
                ("a coding under another", ("Transfer-Encoding: gzip, chunked",), b"0\r\n\r\n"),
                ("a coding that looks alike", ("Transfer-Encoding: chunke\xe4",), b"0\r\n\r\n"),
                ("two codings", ("Transfer-Encoding: identity", "Transfer-Encoding: chunked"), b"0\r\n\r\n"),
                ("no length", (), b""),
                ("a chunk of negative size", ("Transfer-Encoding: chunked",), b"-1\r\n" + whole),
                ("a chunk with 0x", ("Transfer-Encoding: chunked",), b"0x0\r\n\r\n" + whole),
                ("a chunk of huge size", ("Transfer-Encoding: chunked",), b"fffffffffffffffff\r\n" + whole),
                ("a chunk size that wraps to 0", ("Transfer-Encoding: chunked",), b"10000000000000000\r\n\r\n"),
                ("a chunk extension with LF", ("Transfer-Encoding: chunked",), b"2;\n" + whole),
                ("a chunk that is too long", ("Transfer-Encoding: chunked",), b"1\r\n{}\r\n0\r\n\r\n")):
            with self.subTest(what):
                answers = self.talk(server, head_bytes(*lines, first=first) + body + hidden)
                self.assertEqual([True], [answer.status in (400, 411, 501, 413) for answer in answers])
                self.assertEqual("close", answers[0].headers["connection"])
        self.assertEqual(0, rows(self.database))
        self.assertEqual([400, 200], self.talk_statuses(server, post_bytes(b"{}") + hidden))

    def test_a_body_that_looks_like_a_request_stays_a_body(self):
        server = self.start()
        hidden = post_bytes(event(appointment_id="SMUGGLED"))
        self.assertEqual([400, 200], self.talk_statuses(server, post_bytes(hidden) + head_bytes()))
        self.assertEqual([200, 200], self.talk_statuses(
            server, head_bytes(f"Content-Length: {len(hidden)}") + hidden + head_bytes()))
        self.assertEqual(0, rows(self.database))

    def test_answers_cannot_be_split_and_no_script_gets_into_them(self):
        server = self.start(allowed_origin="https://desk.example")
        for request in (head_bytes(first="GET /%0d%0aSet-Cookie:a=b HTTP/1.1"),
                        head_bytes(first=f"GET {PATH}?%0d%0aSet-Cookie:a=b HTTP/1.1"),
                        head_bytes(first=f"GET {PATH}?%3Cscript%3E=1 HTTP/1.1"),
                        head_bytes("Origin: https://desk.example%0d%0aX: y")):
            answer, = self.talk(server, request)
            self.assertNotIn("set-cookie", answer.headers)
            self.assertNotIn(b"\r", answer.body)
            self.assertEqual("application/json", answer.headers["content-type"])

    def test_the_log_cannot_be_forged_from_the_request_line(self):
        server = self.start()
        self.talk(server, head_bytes(first="GET /%0a2025-01-10%20FORGED HTTP/1.1"))
        self.talk(server, head_bytes(first=f"GET {PATH}?%0aFORGED%1b[2J=1 HTTP/1.1"))
        self.talk(server, head_bytes(first=f"GET {PATH}?patient_id=PAT-SECRET HTTP/1.1"))
        text = self.log_text(server)
        self.assertEqual([], [line for line in text.splitlines() if not re.match(r"\d{4}-.* - webhook - ", line)])
        self.assertNotIn("\x1b", text)
        self.assertNotIn("PAT-SECRET", text)

    def test_tls_spoken_to_us_is_answered_in_words(self):
        answer, = self.talk(self.start(), bytes.fromhex("1603010200010001fc0303") + bytes(range(100)))
        self.assertEqual(400, answer.status)
        self.assertIn("TLS", answer.json["message"])

    def test_random_bytes_never_make_a_500_or_stop_the_service(self):
        server = self.start()
        chance = random.Random(20250110)
        seeds = [request for _, request, _ in ConnectionTest.STATUSES if len(request) < 5000] + [
            post_bytes(event()),
            head_bytes("Transfer-Encoding: chunked", first=f"POST {PATH} HTTP/1.1") + b"2\r\n{}\r\n0\r\n\r\n",
            head_bytes(first=f"GET {PATH}?limit=5&since=2025-01-10T14:00:00Z HTTP/1.1"), bytes(range(256)),
            b"\r\n" * 50]
        for _ in range(400):
            data = bytearray(chance.choice(seeds) + chance.choice(seeds))
            for _ in range(chance.randrange(6)):
                at = chance.randrange(len(data))
                data[at:at + chance.randrange(3)] = chance.choice((b"\r\n", b"\0", b"%", b"\xff", b":", b" ", b"0",
                                                                   b"{", b"\n",
                                                                   bytes(chance.randrange(256) for _ in range(5))))
            found = statuses(self.exchange(server, bytes(data)))
            self.assertLessEqual(set(found), set(receiver.REASONS) | {100}, data)
            self.assertNotIn(500, found, data)
            self.assertNotIn(503, found, data)
        self.assertEqual(200, self.call(server, path="/health").status)
        self.assertEqual([], [line for line in self.log_text(server).splitlines() if " - ERROR - " in line])


class ShutdownTest(HTTPTest):
    """What stop() does to connections."""

    def closed(self, server):
        """Whether nothing is accepted any more."""
        try:
            socket.create_connection(("127.0.0.1", server.port), timeout=WAIT).close()
        except ConnectionError:
            return True
        return False

    def stopping(self, server):
        """Begin to stop in a thread; gives it once nothing more is accepted."""
        thread = threading.Thread(target=server.stop)
        thread.start()
        self.addCleanup(thread.join)
        until(lambda: self.closed(server), "the end of accepting")
        return thread

    def test_a_request_that_is_half_sent_is_answered_and_stored(self):
        server = self.start(shutdown_timeout=WAIT)
        in_body, in_head, in_chunk = (self.connect(server) for _ in range(3))
        data = post_bytes(event())
        chunked = head_bytes("Transfer-Encoding: chunked", first=f"POST {PATH} HTTP/1.1")
        body = json.dumps(event(appointment_id="A2")).encode()
        in_body.sendall(data[:-5])
        in_head.sendall(data[:40])
        in_chunk.sendall(chunked + b"%x\r\n" % len(body))
        self.call(server, path="/health")
        stop = self.stopping(server)
        for connection, rest, status in ((in_body, data[-5:], 200), (in_chunk, body + b"\r\n0\r\n\r\n", 200),
                                         (in_head, data[40:], 409)):
            connection.sendall(rest)
            answer, = answers_in(read_all(connection))
            self.assertEqual((status, "close"), (self.proper(answer).status, answer.headers["connection"]))
        stop.join(WAIT)
        self.assertFalse(stop.is_alive())
        self.assertEqual(2, rows(self.database))

    def test_idle_connections_end_and_nothing_is_accepted_after(self):
        server = self.start(shutdown_timeout=WAIT)
        used, unused = self.connect(server), self.connect(server)
        used.sendall(post_bytes(event()))
        self.assertEqual(200, self.read_answer(used).status)
        server.stop()
        self.assertEqual([b"", b""], [read_all(used), read_all(unused)])
        self.assertTrue(self.closed(server))

    def test_a_connection_that_the_system_took_for_us_is_still_answered(self):
        server = self.start(shutdown_timeout=WAIT)
        accept, held, go_on = server._server._accept_one, threading.Event(), threading.Event()

        def accept_late(listener):
            held.set()
            go_on.wait()
            return accept(listener)
        with mock.patch.object(server._server, "_accept_one", accept_late):
            waiting = [self.connect(server)]
            held.wait()
            waiting.insert(0, self.connect(server))
            waiting[0].sendall(post_bytes(event()))
            stop = threading.Thread(target=server.stop)
            stop.start()
            until(lambda: server._server.draining, "the stop")
            go_on.set()
            stop.join()
        answer, = answers_in(read_all(waiting[0]))
        self.assertEqual(200, self.proper(answer).status)

    def test_to_look_for_what_has_come_leaves_no_timeout_behind_that_would_cut_an_answer(self):
        for by_writer in sorted({receiver.SENDS_AT_ONCE, False}):
            with self.subTest(by_writer), mock.patch.object(receiver, "SENDS_AT_ONCE", by_writer):
                ours, theirs = socket.socketpair()
                self.addCleanup(ours.close)
                self.addCleanup(theirs.close)
                handler = receiver.Connection.__new__(receiver.Connection)
                handler.socket = ours
                self.assertEqual((handler._recv_waiting(0.001), ours.gettimeout()), (b"", None))
                theirs.sendall(b"GET")
                self.assertEqual((handler._recv_waiting(WAIT), ours.gettimeout()), (b"GET", None))

    def test_who_pipelines_on_while_the_service_drains_can_read_its_last_answer(self):
        server = self.start()
        connection = self.connect(server)
        connection.sendall(post_bytes(event()))
        self.assertEqual(self.read_answer(connection).status, 200)
        server._server.draining = True             # as stop() sets it before it looks at connections
        connection.sendall(post_bytes(event(appointment_id="A2")) * 500)
        connection.shutdown(socket.SHUT_WR)
        data = b""
        while True:
            piece = connection.recv(65536)              # a reset would raise here
            if not piece:
                break
            data += piece
        answer, = answers_in(data)
        self.assertEqual((answer.status, answer.headers["connection"]), (200, "close"))

    def test_a_second_stop_is_harmless(self):
        server = self.start()
        server.stop()
        server.stop()
        self.assertEqual(1, (self.folder / "server.log").read_text().count("Service stopped"))

    def test_who_will_not_finish_is_cut_after_the_time_allowed(self):
        server = self.start(shutdown_timeout=0.3)
        stuck = self.connect(server)
        stuck.sendall(post_bytes(event())[:-1])
        self.call(server, path="/health")
        server.stop()
        read_all(stuck)
        self.assertEqual(0, rows(self.database))
        self.assertIn("connections cut after 0.3 seconds: 1", (self.folder / "server.log").read_text())

    def test_no_answer_is_lost_or_halved_when_a_load_is_stopped(self):
        server = self.start(shutdown_timeout=WAIT)
        answered, running = [], threading.Barrier(5)

        def load(client):
            connection = self.connect(server)
            data = b""
            with contextlib.suppress(ConnectionError):
                for number in range(100000):
                    connection.sendall(post_bytes(event(appointment_id=f"{client}-{number}")))
                    piece = connection.recv(65536)
                    data += piece
                    if number == 20:
                        running.wait(WAIT)
                    if not piece:
                        break
            answered.extend(answer.status for answer in answers_in(data))
        threads = [threading.Thread(target=load, args=(client,)) for client in range(4)]
        for thread in threads:
            thread.start()
        running.wait(WAIT)
        server.stop()
        for thread in threads:
            thread.join(WAIT)
        self.assertEqual({200}, set(answered))
        self.assertEqual(len(answered), rows(self.database))

    def test_waiting_pipelined_events_are_answered_before_the_end(self):
        server = self.start(shutdown_timeout=WAIT)
        connection = self.connect(server)
        connection.sendall(b"".join(post_bytes(event(appointment_id=f"A{number}")) for number in range(200)))
        until(lambda: rows(self.database), "the first event")
        server.stop()
        answers = answers_in(read_all(connection))
        self.assertEqual({200}, {answer.status for answer in answers})
        self.assertEqual(len(answers), rows(self.database))


# =============================================================================
# Service
# =============================================================================

PARTS = ("Config", "JSON", "Schema", "Events", "Store", "Log", "HTTP", "Service", "Command line")


def can_connect(port):
    """Whether somebody listens on a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def our_threads():
    """The names of the service's threads in this process."""
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("webhook-"))


def open_files():
    """How many files this process has open, 0 where the system does not tell."""
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def command(*arguments, stdin=b"", environment=()):
    """Run the command line in this process: (exit code, stdout, stderr) as text."""
    out, err = io.StringIO(), io.StringIO()
    with mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin))), mock.patch.object(signal, "signal"), \
            mock.patch.dict(os.environ, {**clean_environment(), **dict(environment)}, clear=True), \
            contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = receiver.main(list(map(str, arguments)))
    return code, out.getvalue(), err.getvalue()


class RunningTest(ServerTest):
    """A test that runs the program in processes of its own."""

    def run_program(self, *arguments, environment=(), **options):
        """The program, running; killed after the test if it still does."""
        options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        process = subprocess.Popen([sys.executable, "-S", "-I", str(PROGRAM), *map(str, arguments)], cwd=self.folder,
                                   env={**clean_environment(), **dict(environment)}, **options)

        def end():
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
        self.addCleanup(end)
        return process

    def serve(self, *arguments, **options):
        """A server that listens, with its `port`."""
        process = self.run_program("--port", 0, "--database", self.database, *arguments, **options)
        process.line = process.stdout.readline().decode()
        process.port = int(process.line.rpartition(":")[2])
        return process

    def begin_event(self, port):
        """A connection whose event the server has begun to read, and the bytes that are left to send."""
        head, body = post_bytes(event(), "Expect: 100-continue").split(b"\r\n\r\n")
        connection = socket.create_connection(("127.0.0.1", port), timeout=WAIT)
        self.addCleanup(connection.close)
        connection.sendall(head + b"\r\n\r\n")
        self.assertTrue(connection.recv(100).startswith(b"HTTP/1.1 100 "))
        return connection, body


class EmbeddingTest(ServerTest):

    def config(self, **settings):
        return Config(**{"port": 0, "database": str(self.database), "log_file": str(self.folder / "server.log"),
                         "shutdown_timeout": 2, **settings})

    def test_a_with_block_starts_and_stops_the_service(self):
        with WebhookServer(self.config()) as server:
            self.assertEqual(server.url, f"http://127.0.0.1:{server.port}")
            self.assertEqual(self.post(server).status, 200)
        self.assertFalse(can_connect(server.port))
        self.assertEqual(our_threads(), [])
        self.assertEqual(rows(self.database), 1)

    def test_on_event_gets_what_is_on_disk_already(self):
        seen = []
        server = self.start(on_event=lambda stored: seen.append((stored, rows(self.database))))
        self.post(server, event(notes="first"))
        stored, count = until(lambda: seen and seen[0], "the call")
        self.assertEqual((stored.id, stored.appointment_id, stored.notes, count), (1, "APT-1", "first", 1))

    def test_on_event_is_called_once_for_each_stored_event_in_order_of_id(self):
        seen = []
        server = self.start(on_event=lambda stored: seen.append((stored.id, stored.appointment_id)))
        for number in (1, 2, 2, 3):
            self.post(server, event(appointment_id=f"APT-{number}"))
        self.post(server, event(appointment_id="APT-4", patient_id=...))
        server.stop()
        self.assertEqual([appointment for _, appointment in seen], ["APT-1", "APT-2", "APT-3"])
        self.assertEqual(seen, rows(self.database, "SELECT id, appointment_id FROM appointment_events ORDER BY id"))

    def test_an_on_event_that_raises_or_exits_gets_the_next_event_all_the_same(self):
        seen = []

        def on_event(stored):
            seen.append(stored.id)
            raise (ValueError("mine"), SystemExit(3))[stored.id % 2]
        server = self.start(on_event=on_event)
        for number in range(3):
            self.assertEqual(self.post(server, event(appointment_id=f"APT-{number}")).status, 200)
        log = self.log_text(server)
        self.assertEqual(seen, [1, 2, 3])
        self.assertIn("ERROR - [-] on_event failed for event 2", log)
        self.assertIn("ValueError: mine", log)

    def test_a_slow_on_event_keeps_no_sender_waiting_and_stop_waits_for_it(self):
        go_on, seen = threading.Event(), []

        def on_event(stored):
            go_on.wait(WAIT)
            seen.append(stored.id)
        server = self.start(on_event=on_event)
        self.addCleanup(go_on.set)
        for number in range(5):
            self.assertEqual(self.post(server, event(appointment_id=f"APT-{number}")).status, 200)
        self.assertEqual(seen, [])
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        until(lambda: not can_connect(server.port), "the end of listening")
        self.assertTrue(stopping.is_alive())
        go_on.set()
        stopping.join(WAIT)
        self.assertEqual(seen, [1, 2, 3, 4, 5])

    def test_on_event_may_stop_the_service(self):
        with WebhookServer(self.config(), on_event=lambda stored: server.stop()) as server:
            self.assertEqual(self.post(server).status, 200)
            until(lambda: not can_connect(server.port), "the end of listening")
        until(lambda: our_threads() == [], "the end of all threads")
        self.assertIn("Service stopped", (self.folder / "server.log").read_text())

    def test_a_logger_gets_the_log_and_no_file_is_made(self):
        logger, records = logging.Logger("mine"), []
        handler = logging.Handler()
        handler.emit = records.append
        logger.addHandler(handler)
        with WebhookServer(self.config(), logger=logger) as server:
            self.post(server, event(event_type="nonsense"))
        self.assertEqual([record.levelname for record in records], ["INFO", "WARNING", "INFO"])
        self.assertIn("Service started", records[0].getMessage())
        self.assertIn(f"POST {PATH} 400", records[1].getMessage())
        self.assertFalse((self.folder / "server.log").exists())

    def test_two_services_in_one_process_know_nothing_of_each_other(self):
        one, other = self.start(), self.start(database=str(self.folder / "other.db"), duplicates="ok",
                                              log_file=str(self.folder / "other.log"))
        self.assertEqual([self.post(server).status for server in (one, other, one, other)], [200, 200, 409, 200])
        one.stop()
        self.assertEqual(self.call(other, path="/health").status, 200)
        self.assertEqual((rows(self.database), rows(self.folder / "other.db")), (1, 1))

    def test_stop_may_come_before_start_and_again_and_from_many_threads(self):
        early = WebhookServer(self.config())
        early.stop()
        self.assertRaises(RuntimeError, early.start)
        server = self.start(database=str(self.folder / "other.db"))
        stopping = [threading.Thread(target=server.stop) for _ in range(5)]
        for thread in stopping:
            thread.start()
        for thread in stopping:
            thread.join(WAIT)
            self.assertFalse(thread.is_alive())
        server.stop()
        self.assertEqual(our_threads(), [])
        self.assertEqual((self.folder / "server.log").read_text().count("Service stopped"), 1)

    def test_it_starts_only_once_and_says_so(self):
        server = WebhookServer(self.config())
        with self.assertRaisesRegex(RuntimeError, "has not started"):
            server.url
        with server, self.assertRaisesRegex(RuntimeError, "starts once"):
            server.start()
        with self.assertRaisesRegex(RuntimeError, "starts once"):
            server.start()

    def test_a_start_that_fails_leaves_nothing_running_and_no_file_open(self):
        for part, name in ((receiver.SQLite, "open"), (receiver.Log, "start"), (receiver.Callbacks, "start"),
                           (receiver.Store, "start"), (receiver.Server, "start")):
            with self.subTest(fails=f"{part.__name__}.{name}"):
                before = open_files()
                server = WebhookServer(self.config(), on_event=print)
                with mock.patch.object(part, name, side_effect=RuntimeError("can't start new thread")):
                    self.assertRaisesRegex(SetupError, "new thread", server.start)
                self.assertEqual(our_threads(), [])
                self.assertNotIn("Service stopped", (self.folder / "server.log").read_text())
                self.assertEqual(open_files(), before)
        with WebhookServer(self.config(), on_event=print) as server:
            self.assertEqual(self.call(server, path="/health").status, 200)

    def test_what_keeps_it_from_starting_is_named_in_one_line(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            files = {"text.db": "no database " * 100, "cut.json": '{"type":\n "object"',
                     "kind.json": '{"properties": {"a": {"type": 5}}}',
                     "lost.json": '{"$ref": "#/$defs/none"}',
                     "pattern.json": '{"properties": {"a\\nb": {"pattern": "("}}}'}
            for name, text in files.items():
                (self.folder / name).write_text(text)
            for settings, words in (
                    ({"port": taken.getsockname()[1]}, ["port", "in use"]),
                    ({"host": "203.0.113.1"}, ["203.0.113.1"]),
                    ({"host": "no such host"}, ["no such host"]),
                    ({"host": "ü" * 100}, ["cannot listen on"]),
                    ({"database": self.folder / "none" / "events.db"}, ["none", "No such file"]),
                    ({"database": self.folder}, [str(self.folder)]),
                    ({"database": self.folder / "text.db"}, ["text.db", "database"]),
                    ({"schema": self.folder / "none.json"}, ["none.json", "No such file"]),
                    ({"schema": self.folder}, [str(self.folder), "directory"]),
                    ({"schema": self.folder / "cut.json"}, ["cut.json", "line 2"]),
                    ({"schema": self.folder / "kind.json"}, ["kind.json", "/properties/a/type"]),
                    ({"schema": self.folder / "lost.json"}, ["lost.json", "/$ref", "#/$defs/none"]),
                    ({"schema": self.folder / "pattern.json"}, ["pattern.json", "/pattern"]),
                    ({"log_file": self.folder}, [str(self.folder), "directory"])):
                with self.subTest(settings=settings):
                    before = open_files()
                    with self.assertRaises(SetupError) as caught:
                        WebhookServer(self.config(**settings)).start()
                    for word in words:
                        self.assertIn(word, str(caught.exception))
                    self.assertNotIn("\n", receiver.printable(str(caught.exception), 1000))
                    self.assertEqual((our_threads(), open_files()), ([], before))
        self.assertEqual((self.folder / "text.db").read_text(), files["text.db"])

    @unittest.skipUnless(POSIX and os.geteuid() != 0,
                         "root may read everything" if POSIX else "needs POSIX permissions")
    def test_files_that_may_not_be_touched_are_named(self):
        for setting, name in (("database", "locked.db"), ("schema", "locked.json"), ("log_file", "locked.log")):
            with self.subTest(setting):
                (self.folder / name).write_bytes(b"x")
                (self.folder / name).chmod(0)
                with self.assertRaisesRegex(SetupError, name):
                    WebhookServer(self.config(**{setting: self.folder / name})).start()

    def test_a_busy_port_leaves_the_database_unmade(self):
        with WebhookServer(self.config(database=self.folder / "first.db")) as first:
            self.assertRaises(SetupError, WebhookServer(self.config(port=first.port)).start)
        self.assertFalse(self.database.exists())

    def test_without_schema_json_the_built_in_one_serves_with_a_warning(self):
        with mock.patch.object(receiver, "DEFAULT_SCHEMA_FILE", self.folder / "schema.json"):
            server = self.start()
        self.assertEqual([self.post(server).status, self.post(server, event(notes=5)).status], [200, 400])
        self.assertEqual(self.call(server, path="/schema.json").json, receiver.EVENT_SCHEMA)
        self.assertIn(f"WARNING - [-] schema {self.folder / 'schema.json'} is missing: the built-in schema is used",
                      self.log_text(server))

    def test_formats_and_drafts_that_are_not_checked_are_told_at_start(self):
        document = json.loads(json.dumps(receiver.EVENT_SCHEMA))
        document["$schema"] = "http://json-schema.org/draft-07/schema#"
        document["properties"]["timestamp"]["format"] = "iso-8601"
        own = self.folder / "own.json"
        own.write_text(json.dumps(document))
        log = self.log_text(self.start(schema=str(own)))
        self.assertIn(f"{own}: the format iso-8601 at /properties/timestamp is not known and not checked", log)
        self.assertIn("it says that it follows http://json-schema.org/draft-07/schema#, but is read by draft 2020-12", log)
        self.assertEqual(len(re.findall("WARNING", log)), 2)

    def test_who_opens_it_to_other_machines_is_told_what_that_means(self):
        self.assertIn("WARNING - [-] Other machines can reach this service", self.log_text(self.start(host="0.0.0.0")))
        os.remove(self.folder / "server.log")
        self.assertNotIn("WARNING", self.log_text(self.start()))

    def test_a_schema_json_that_is_there_and_cannot_be_read_is_not_passed_over(self):
        (self.folder / "schema.json").mkdir()
        with mock.patch.object(receiver, "DEFAULT_SCHEMA_FILE", self.folder / "schema.json"):
            with self.assertRaisesRegex(SetupError, "schema.json"):
                WebhookServer(self.config())

    def test_a_schema_that_looks_misspelt_or_too_lax_starts_with_a_warning(self):
        (self.folder / "own.json").write_text('{"required": ["patient_id"], "properties": {"notes": {"maxLenght": 5}}}')
        log = self.log_text(self.start(schema=str(self.folder / "own.json")))
        self.assertIn(f"WARNING - [-] schema {self.folder / 'own.json'}: the unknown keyword maxLenght at /properties/notes", log)
        self.assertIn("did you mean maxLength?", log)
        self.assertIn("appointment_id is not required by it", log)
        self.assertNotIn("patient_id is not", log)
        (self.folder / "own.json").write_text(json.dumps({"allOf": [{"required": receiver.REQUIRED_FIELDS}]}))
        self.assertEqual(receiver.read_schema(str(self.folder / "own.json"))[2], [])
        plain = self.start(database=str(self.folder / "other.db"), log_file=str(self.folder / "other.log"))
        plain.stop()
        self.assertNotIn("WARNING", (self.folder / "other.log").read_text())

    def test_an_edited_schema_changes_what_is_taken(self):
        schema = json.loads(json.dumps(receiver.EVENT_SCHEMA))
        schema["properties"]["event_type"]["enum"].append("moved")
        schema["properties"]["room"] = {"type": "string", "pattern": "^R[0-9]+$"}
        schema["required"].append("room")
        (self.folder / "own.json").write_text(json.dumps(schema))
        server = self.start(schema=self.folder / "own.json")
        self.assertEqual(self.post(server, event(event_type="moved", room="R4")).status, 200)
        self.assertEqual(self.post(server, event(event_type="moved")).json["message"], "Missing required field: room")
        self.assertEqual(self.post(server, event(room="4")).json["errors"][0]["path"], "/room")

    def test_the_program_around_may_go_to_another_folder(self):
        before = os.getcwd()
        self.addCleanup(os.chdir, before)
        os.chdir(self.folder)
        server = self.start(database="events.db")
        os.chdir(before)
        self.post(server)
        self.assertEqual(len(self.call(server).json["events"]), 1)
        self.assertEqual(self.call(server, path="/health").status, 200)

    def test_a_database_called_memory_is_a_file_like_any_other(self):
        before = os.getcwd()
        self.addCleanup(os.chdir, before)
        os.chdir(self.folder)
        server = self.start(database=":memory:")
        os.chdir(before)
        self.post(server)
        server.stop()
        self.assertEqual(rows(self.folder / ":memory:"), 1)


# =============================================================================
# Command line
# =============================================================================

class ServeTest(RunningTest):

    def test_the_first_line_says_where_it_listens_and_the_log_goes_to_stderr(self):
        server = self.serve()
        self.assertEqual(server.line, f"Listening on http://127.0.0.1:{server.port}\n")
        self.assertEqual(self.post(server).status, 200)
        server.terminate()
        out, err = server.communicate(timeout=WAIT)
        self.assertEqual((server.returncode if POSIX else 0, out), (0, b""))
        self.assertIn(b"INFO - [-] Service started on", err)

    @unittest.skipUnless(POSIX, "Windows ends a process without asking it")
    def test_a_signal_ends_it_with_everything_on_disk_and_exit_0(self):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            with self.subTest(number.name):
                self.database = self.folder / f"{number.name}.db"
                server = self.serve()
                self.post(server)
                self.assertTrue(Path(f"{self.database}-wal").exists())
                server.send_signal(number)
                err = server.communicate(timeout=WAIT)[1].decode()
                self.assertEqual(server.returncode, 0)
                self.assertFalse(Path(f"{self.database}-wal").exists())
                self.assertEqual(rows(self.database), 1)
                self.assertRegex(err, r"200 stored event_id=1 .*\n.*Service stopped\n\Z")

    @unittest.skipUnless(POSIX, "Windows ends a process without asking it")
    def test_a_request_in_flight_is_answered_before_it_exits(self):
        server = self.serve()
        connection, rest = self.begin_event(server.port)
        server.terminate()
        until(lambda: not can_connect(server.port), "the end of listening")
        connection.sendall(rest)
        self.assertEqual(statuses(read_all(connection)), [200])
        server.communicate(timeout=WAIT)
        self.assertEqual((server.returncode, rows(self.database)), (0, 1))

    @unittest.skipUnless(POSIX, "Windows ends a process without asking it")
    def test_a_second_signal_exits_at_once(self):
        server = self.serve("--shutdown-timeout", 600)
        self.begin_event(server.port)
        server.terminate()
        until(lambda: not can_connect(server.port), "the end of listening")
        self.assertIsNone(server.poll())
        until(lambda: server.poll() is not None or server.terminate(), "the end")       # the same one, twice, is one
        server.communicate()
        self.assertEqual(server.returncode, 128 + signal.SIGTERM)

    def test_a_busy_port_is_exit_2_and_one_line(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            code, out, err = self.program("serve", "--port", port, "--database", self.database)
        self.assertEqual((code, out), (2, ""))
        self.assertEqual(err, f"webhook_server.py: cannot listen on 127.0.0.1 port {port}: the port is in use by "
                              "another program; choose another with --port\n")
        self.assertFalse(self.database.exists())

    def test_the_environment_sets_and_flags_win(self):
        server = self.serve("--duplicates", "conflict", environment={
            "WEBHOOK_DATABASE": "env.db", "WEBHOOK_DUPLICATES": "ok", "WEBHOOK_MAX_BODY": "300",
            "WEBHOOK_IDLE_TIMEOUT": "",
            "WEBHOOK_LOG_FILE": "env.log"})
        self.assertEqual([self.post(server).status for _ in range(2)], [200, 409])
        self.assertEqual(self.post(server, event(notes="x" * 300)).status, 413)
        self.assertFalse((self.folder / "env.db").exists())
        self.assertTrue((self.folder / "env.log").exists())

    @unittest.skipUnless(POSIX, "needs a pipe without a reader and /dev/full")
    def test_nobody_has_to_read_what_it_prints(self):
        read_end, write_end = os.pipe()
        os.close(read_end)
        self.addCleanup(os.close, write_end)
        full = open("/dev/full" if os.path.exists("/dev/full") else os.devnull, "w")
        self.addCleanup(full.close)
        for name, streams in (("a pipe without a reader", {"stdout": write_end, "stderr": write_end}),
                              ("a full disk", {"stdout": full, "stderr": full}),
                              ("closed", {"preexec_fn": lambda: [os.close(number) for number in (0, 1, 2)]})):
            with self.subTest(name):
                log = self.folder / f"{name}.log"
                server = self.run_program("--port", 0, "--database", self.database, "--log-file", log, **streams)
                text = until(lambda: log.exists() and log.read_text(), "the log")
                server.port = int(re.search(r"http://127\.0\.0\.1:([0-9]+)", text)[1])
                self.assertIn(self.post(server).status, (200, 409))
                server.terminate()
                self.assertEqual(server.wait(WAIT), 0)
                self.assertEqual(rows(self.database), 1)


class KeyboardTest(RunningTest):
    """What the person at the keyboard can get wrong: one line that names it, exit 2, never a traceback."""

    def assert_usage(self, result, *words):
        code, out, err = result
        self.assertEqual((code, out), (2, ""))
        self.assertRegex(err, r"\Awebhook_server\.py: [^\n]+\n\Z")
        for word in words:
            self.assertIn(word, err)

    def test_wrong_words_and_flags(self):
        for arguments, word in (
                (["nonsense"], "nonsense"), ([""], "COMMAND"), (["--prot", 1], "--prot"), (["--por", 1], "--por"),
                (["--port"], "--port"), (["serve", "extra"], "extra"), (["--port", 0, "check"], "check"),
                (["--a\nb"], r"--a\nb"), (["--\udcff"], r"\udcff"), (["--", "serve"], "serve"),
                (["check"], "check: "), (["check", "--nonsense", "x"], "--nonsense"),
                (["check", "none.json"], "none.json"),
                (["check", self.folder], str(self.folder)), (["check", ""], "."), (["check", "x\0y"], "x"),
                (["check", "--schema", "none.json", "-"], "none.json"),
                (["check", "--schema", self.folder, "-"], "schema"),
                (["send", "one", "two"], "two"), (["send", "none.json"], "none.json"),
                (["send", self.folder], str(self.folder)),
                (["send", "--nonsense"], "--nonsense"), (["send", "-", "--notes", "x"], "--notes"),
                (["bench", "extra"], "extra"), (["bench", "--seconds", "0"], "--seconds"),
                (["bench", "--seconds", "nan"], "--seconds"), (["bench", "--seconds", "9" * 400], "--seconds"),
                (["bench", "--connections", ""], "--connections"),
                (["bench", "--connections", "1,,2"], "--connections"),
                (["bench", "--connections", "-1"], "--connections"),
                (["bench", "--connections", "9" * 400], "--connections"),
                (["bench", "--folder", self.folder / "none"], "none"), (["bench", "--load", "nonsense"], "--load")):
            with self.subTest(arguments):
                self.assert_usage(command(*arguments), word)

    def test_every_number_and_choice_refuses_nonsense_and_names_flag_or_variable(self):
        for field in dataclasses.fields(Config):
            if field.metadata["metavar"] in ("TEXT", "FILE", "HOST", "ORIGIN"):
                continue
            flag, variable = receiver.flag_of(field.name), "WEBHOOK_" + field.name.upper()
            for value in ("-1", "+5", "1_0", "0x10", "1e3", "nan", "9" * 5000, "\u0663", "ü\u202e\n", " 5", "x\0y",
                          str(self.folder)):
                with self.subTest(flag, value=value[:20]):
                    self.assert_usage(command(flag, value), flag)
                    self.assert_usage(command(environment={variable: value.replace("\0", "0x")}), variable)
            with self.subTest(flag, value=""):
                self.assert_usage(command(flag, ""), flag)
            Config(**{field.name: field.default})

    def test_texts_that_lead_nowhere(self):
        database = ["--port", 0, "--database", self.database]
        for arguments in ([*database, "--host", ""], [*database, "--host", "no such host"],
                          [*database, "--host", "ü" * 300],
                          [*database, "--host", "x\0y"], [*database, "--log-file", self.folder],
                          [*database, "--log-file", self.folder / "none" / "log"],
                          [*database, "--log-file", "x" * 5000],
                          [*database, "--schema", self.folder], [*database, "--schema", "x" * 5000],
                          ["--port", 0, "--database", ""], ["--port", 0, "--database", "x\0y"],
                          ["--port", 0, "--database", self.folder],
                          ["--port", 0, "--database", self.folder / "x" / "y"],
                          ["--port", 0, "--database", self.folder / ("x" * 5000)]):
            with self.subTest([str(argument)[:30] for argument in arguments[2:]]):
                self.assert_usage(command(*arguments))

    def test_help_and_version_are_exit_0(self):
        for arguments in (["--help"], ["-h"], ["serve", "--help"], ["check", "--help"], ["send", "-h"], ["bench", "-h"],
                          ["--version"], ["--port", "1", "--help"], ["--help", "nonsense"]):
            with self.subTest(arguments):
                code, out, err = command(*arguments)
                self.assertEqual((code, err), (0, ""))
                self.assertIn("webhook_server.py", out)

    @unittest.skipUnless(POSIX, "needs /dev/full and pipes without a reader")
    def test_output_that_cannot_be_written_is_no_traceback(self):
        (self.folder / "bad.ndjson").write_text('{"a": 1}\n' * 200)
        read_end, write_end = os.pipe()
        os.close(read_end)
        self.addCleanup(os.close, write_end)
        for arguments in (["--help"], ["check", "--help"], ["check", "bad.ndjson"], ["--version"]):
            with self.subTest(arguments, stdout="a pipe without a reader"):
                process = self.run_program(*arguments, stdout=write_end)
                self.assertEqual((process.communicate(timeout=WAIT)[1], process.returncode), (b"", 1))
            if os.path.exists("/dev/full"):
                with self.subTest(arguments, stdout="/dev/full"), open("/dev/full", "w") as full:
                    process = self.run_program(*arguments, stdout=full)
                    self.assertEqual((process.communicate(timeout=WAIT)[1], process.returncode),
                                     (b"webhook_server.py: No space left on device\n", 2))
        if os.path.exists("/dev/full"):
            with open("/dev/full", "w") as full:
                self.assertEqual(self.run_program("nonsense", stdout=full, stderr=full).wait(WAIT), 2)

    @unittest.skipUnless(os.path.exists("/proc/self/stat"),
                         "needs to see whether a process sleeps, as in Linux's /proc")
    def test_ctrl_c_is_exit_130_without_a_word(self):
        with socket.create_server(("127.0.0.1", 0)) as silent:
            sending = self.run_program("send", "--url", f"http://127.0.0.1:{silent.getsockname()[1]}")
            reading = self.run_program("check", "-", stdin=subprocess.PIPE)
            silent.settimeout(WAIT)
            connection = silent.accept()[0]
            with connection:
                received = b""
                while b"Test event" not in received:
                    received += connection.recv(65536)
                reading.stdin.write(b"[" * 1000000)         # more than a pipe holds: it has begun to read
                reading.stdin.flush()
                for process in (sending, reading):
                    until(lambda: Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "S")
                    process.send_signal(signal.SIGINT)
                    self.assertEqual((process.wait(WAIT), process.stdout.read(), process.stderr.read()),
                                     (130, b"", b""))


class CheckTest(FolderTest):
    GOOD, BAD = json.dumps(event()), json.dumps(event(patient_id=...))
    MISSING = "Missing required field: patient_id"

    def check(self, data, *arguments):
        """Exit code and output of check for one file, the file's name left out."""
        file = self.folder / "events.json"
        file.write_bytes(data if isinstance(data, bytes) else data.encode())
        code, out, err = command("check", file, *arguments)
        self.assertEqual(err, "")
        return code, [line.replace(f"{file}:", "") for line in out.splitlines()]

    def test_valid_events_are_exit_0_and_silence(self):
        for name, data in (("one event", self.GOOD), ("pretty", json.dumps(event(), indent=2)),
                           ("array", f"[{self.GOOD}, {self.GOOD}]"),
                           ("empty array", "[]"), ("NDJSON", f"{self.GOOD}\n{self.GOOD}\n"),
                           ("one line", self.GOOD + "\n"),
                           ("CRLF", f"{self.GOOD}\r\n{self.GOOD}\r\n"),
                           ("empty lines", f"\n{self.GOOD}\n\n \n{self.GOOD}\n\n")):
            with self.subTest(name):
                self.assertEqual(self.check(data), (0, []))

    def test_each_problem_is_a_line_with_its_place(self):
        many = json.dumps(event(event_type="x", patient_id=5))
        for name, data, lines in (
                ("one event", self.BAD, [f"1: /patient_id {self.MISSING}"]),
                ("after empty lines", f"\n\n{self.BAD}", [f"3: /patient_id {self.MISSING}"]),
                ("array", f"[{self.GOOD},\n{self.BAD},\n{self.GOOD}]", [f"2: /1/patient_id {self.MISSING}"]),
                ("pretty array", json.dumps([event(), event(patient_id=...)], indent=1),
                 [f"8: /1/patient_id {self.MISSING}"]),
                ("NDJSON", f"{self.GOOD}\n\n{self.BAD}\n", [f"3: /patient_id {self.MISSING}"]),
                ("CRLF", f"{self.GOOD}\r\n{self.BAD}\r\n", [f"2: /patient_id {self.MISSING}"])):
            with self.subTest(name):
                self.assertEqual(self.check(data), (1, lines))
        code, lines = self.check(many)
        self.assertEqual((code, [line.split(" ")[1] for line in lines]), (1, ["/patient_id", "/event_type"]))

    def test_text_that_is_not_json_is_shown_with_line_and_column(self):
        for name, data, start in (
                ("empty", "", "1: / "), ("blank", " \n ", "2: / "), ("cut short", '{"a":\n', "2: / "),
                ("words", "hello", "1: / "),
                ("a BOM", b"\xef\xbb\xbf" + self.GOOD.encode(), "1: / "),
                ("UTF-16", self.GOOD.encode("utf-16"), "1: / "),
                ("not UTF-8", b'{"a": "\xff"}', "1: / "), ("pretty", '{\n "a": 1,\n "b": nope\n}', "3: / "),
                ("NaN", "[NaN]", "1: / "),
                ("a nesting bomb", "[" * 100000, "1: / ")):
            with self.subTest(name):
                code, lines = self.check(data)
                self.assertEqual((code, len(lines)), (1, 1))
                self.assertTrue(lines[0].startswith(start), lines)
                self.assertIn("Invalid JSON", lines[0])

    def test_one_broken_line_of_ndjson_hides_no_other(self):
        for name, data, numbers in (("first", "{broken\n" + f"{self.GOOD}\n{self.BAD}\n", [1, 3]),
                                    ("middle", f"{self.BAD}\n" + '{"a": 1,}\n' + self.GOOD, [1, 2]),
                                    ("last, cut short", f"{self.GOOD}\n" + '{"event_type": "sche', [2])):
            with self.subTest(name):
                code, lines = self.check(data)
                self.assertEqual((code, sorted({int(line.split(":")[0]) for line in lines})), (1, numbers))

    def test_what_is_no_object_is_a_problem_at_the_root(self):
        for data, place in (("5", "1: / "), ("null", "1: / "), ('"x"', "1: / "), ("[5]", "1: /0 ")):
            with self.subTest(data):
                code, lines = self.check(data)
                self.assertEqual(code, 1)
                self.assertTrue(lines[0].startswith(place), lines)

    def test_no_value_and_no_forged_line_comes_out(self):
        own = self.folder / "own.json"
        own.write_text(json.dumps({"required": receiver.REQUIRED_FIELDS, "additionalProperties": {"maxLength": 30}}))
        code, lines = self.check(json.dumps(event(**{"a\n1: / forged\x1b[2J\u202e": "Secret" * 9})), "--schema", own)
        self.assertEqual((code, len(lines)), (1, 1))
        self.assertTrue(lines[0].isprintable())
        self.assertNotIn("Secret", lines[0])

    def test_many_files_are_read_and_one_that_is_missing_does_not_hide_the_others(self):
        (self.folder / "good.json").write_text(self.GOOD)
        (self.folder / "bad.json").write_text(self.BAD)
        code, out, err = self.program("check", "none.json", "good.json", "bad.json")
        self.assertEqual((code, out), (2, f"bad.json:1: /patient_id {self.MISSING}\n"))
        self.assertEqual(err, "webhook_server.py: none.json: No such file or directory\n")
        self.assertEqual(self.program("check", "good.json"), (0, "", ""))

    def test_standard_input_is_read_for_a_dash(self):
        self.assertEqual(self.program("check", "-", stdin=self.BAD.encode()),
                         (1, f"<stdin>:1: /patient_id {self.MISSING}\n", ""))
        self.assertEqual(command("check", "-", stdin=self.GOOD.encode()), (0, "", ""))

    def test_the_schema_can_be_named_by_flag_or_environment(self):
        (self.folder / "own.json").write_text('{"properties": {"room": {"maximum": 5}}}')
        environment = {"WEBHOOK_SCHEMA": str(self.folder / "own.json")}
        data = json.dumps(event(room=9)).encode()
        self.assertEqual(command("check", "-", stdin=data), (0, "", ""))
        self.assertEqual(command("check", "-", stdin=data, environment=environment)[0], 1)
        code, out, err = command("check", "--schema", self.folder / "own.json", "-", stdin=data)
        self.assertEqual((code, out.split(" ")[1]), (1, "/room"))
        self.assertIn("event_type is not required by it", err)

    @unittest.skipUnless(POSIX and sys.platform != "darwin", "file names are any bytes only on Linux")
    def test_a_file_name_of_any_bytes_can_be_printed(self):
        name = os.fsdecode(b"\xff\xfe.json")
        (self.folder / name).write_text(self.BAD)
        code, out, err = self.program("check", name)
        self.assertEqual((code, out), (1, f"\\udcff\\udcfe.json:1: /patient_id {self.MISSING}\n"))


class SendTest(ServerTest):

    def test_a_test_event_is_posted_and_status_and_body_are_printed(self):
        server = self.start()
        code, out, err = command("send", "--url", server.url)
        status, body = out.splitlines()
        self.assertEqual((code, status, json.loads(body)["event_id"], err), (0, "200", 1, ""))
        self.assertEqual(rows(self.database, "SELECT event_type, notes FROM appointment_events"),
                         [("scheduled", "Test event")])
        self.assertEqual(command("send", "--url", server.url + "/")[0], 0)

    def test_members_can_be_given_and_what_is_refused_is_exit_1(self):
        server = self.start()
        given = ["--url", server.url, "--appointment-id", "APT-ü", "--timestamp", "2025-01-10T14:00:00Z"]
        self.assertEqual(command("send", *given, "--event-type", "cancelled", "--notes", "")[0], 0)
        self.assertEqual(rows(self.database, "SELECT event_type, appointment_id, notes FROM appointment_events"),
                         [("cancelled", "APT-ü", "")])
        code, out, _ = command("send", *given)
        self.assertEqual((code, out.splitlines()[0]), (1, "409"))
        code, out, _ = command("send", "--url", server.url, "--patient-id", "")
        self.assertEqual((code, out.splitlines()[0]), (1, "400"))

    def test_a_file_is_sent_as_it_is(self):
        server, file = self.start(), self.folder / "event.json"
        file.write_text(json.dumps(event(extra="kept"), indent=3))
        self.assertEqual(command("send", "--url", server.url, file)[0], 0)
        self.assertEqual(rows(self.database, "SELECT payload FROM appointment_events"), file.read_text())
        code, out, _ = command("send", "--url", server.url, "-", stdin=b"{nonsense")
        self.assertEqual((code, out.splitlines()[0]), (1, "400"))

    def test_a_path_in_the_address_is_taken(self):
        server = self.start()
        code, out, _ = command("send", "--url", f"{server.url}/nowhere?x=1")
        self.assertEqual((code, out.splitlines()[0]), (1, "404"))
        self.assertEqual(command("send", "--url", server.url + PATH)[0], 0)

    def test_no_proxy_sees_the_event(self):
        server = self.start()
        self.assertEqual(command("send", "--url", server.url, environment={
            "http_proxy": "http://127.0.0.1:1", "HTTP_PROXY": "http://127.0.0.1:1"})[0], 0)

    def test_a_wrong_address_is_exit_2(self):
        for url in ("", "nonsense", "ftp://127.0.0.1", "http://", "http://[::1", "http://127.0.0.1:x",
                    "http://127.0.0.1:99999",
                    "http://127.0.0.1:0", "http://me:secret@127.0.0.1", "http://127.0.0.1/ü", "http://127.0.0.1/a b",
                    "http://127.0.0.1/\r\nX: y", "file:///etc/passwd", "http://" + "\udcff"):
            with self.subTest(url):
                code, out, err = command("send", "--url", url)
                self.assertEqual((code, out), (2, ""))
                self.assertRegex(err, r"\Awebhook_server\.py: --url: [^\n]+\n\Z")

    def answer_once(self, data):
        """The address of a server that answers one request with `data` and closes."""
        listener = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(listener.close)

        def answer():
            with listener.accept()[0] as connection:
                connection.recv(65536)
                connection.sendall(data)
        thread = threading.Thread(target=answer)
        thread.start()
        self.addCleanup(thread.join)
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    def test_no_answer_or_a_strange_one_is_one_line_and_exit_1(self):
        with socket.create_server(("127.0.0.1", 0)) as closed:
            nobody = f"http://127.0.0.1:{closed.getsockname()[1]}"
        for url, word in ((nobody, "refused"), ("http://" + "x" * 70, "cannot send"),
                          (self.answer_once(b""), "closed"), (self.answer_once(b"220 mail\r\n"), "cannot send"),
                          (self.answer_once(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"), "cannot send")):
            with self.subTest(word):
                code, out, err = command("send", "--url", url)
                self.assertEqual((code, out), (1, ""))
                self.assertRegex(err, r"\Awebhook_server\.py: cannot send to [^\n]+\n\Z")
                self.assertIn(word, err.replace("reset", "closed"))

    def test_a_redirect_is_not_followed(self):
        server = self.start()
        url = self.answer_once(b"HTTP/1.1 302 Found\r\nLocation: " + server.url.encode() +
                               b"/health\r\nContent-Length: 0\r\n\r\n")
        code, out, _ = command("send", "--url", url)
        self.assertEqual((code, out.splitlines()[0]), (1, "302"))


class BenchTest(RunningTest):

    def test_a_short_run_prints_a_row_for_each_round_and_rows_equal_200s(self):
        code, out, err = self.program("bench", "--seconds", "0.2", "--connections", "1, 16", "--folder", self.folder)
        self.assertEqual(code, 0, err)
        *head, titles, one, sixteen = out.splitlines()
        self.assertIn(f"{os.cpu_count()} cores", head[0])
        for title in ("requests/s", "P50 ms", "P95 ms", "P99 ms", "rows = 200s"):
            self.assertIn(title, titles)
        for row, connections in ((one, 1), (sixteen, 16)):
            number, rate, p50, p95, p99, not_200, verdict = row.split()
            self.assertEqual((int(number), int(not_200), verdict), (connections, 0, "yes"))
            self.assertGreater(int(rate), 0)
            self.assertTrue(0 < float(p50) <= float(p95) <= float(p99))
        self.assertEqual(err, "measuring at 1 connections for 0.2 s\nmeasuring at 16 connections for 0.2 s\n")
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_without_words_it_measures_at_1_16_and_64(self):
        options = receiver.make_parser().parse_args(["bench"])
        self.assertEqual((options.connections, options.seconds), ("1,16,64", "3"))

    @unittest.skipUnless(POSIX, "sends signals")
    def test_a_run_that_is_ended_early_leaves_nothing_behind(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            with self.subTest(number.name):
                bench = self.run_program("bench", "--seconds", 600, "--connections", 1, "--folder", self.folder)
                self.assertEqual(bench.stderr.readline(), b"measuring at 1 connections for 600 s\n")
                log = next(self.folder.glob("*/server.log")).read_text()
                port = int(re.search(r"http://127\.0\.0\.1:([0-9]+)", log)[1])
                self.assertTrue(can_connect(port))
                bench.send_signal(number)
                bench.communicate(timeout=WAIT)
                self.assertEqual(bench.returncode, 130)
                self.assertFalse(can_connect(port))
                self.assertEqual(list(self.folder.iterdir()), [])

    @unittest.skipUnless(POSIX, "needs ulimit")
    def test_connections_that_cannot_be_made_are_one_line(self):
        done = subprocess.run([sys.executable, str(PROGRAM), "bench", "--seconds", "0.2", "--connections", "100"],
                              stdin=subprocess.DEVNULL, capture_output=True, timeout=WAIT, env=clean_environment(),
                              preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40)))
        self.assertEqual(done.returncode, 2)
        self.assertNotIn(b"Traceback", done.stderr)
        self.assertIn(b"100 connections could not be made", done.stderr)


# =============================================================================
# Documents: what they say is so.
# =============================================================================

def settings_table():
    """The table of settings as README.md must have it, a line for each setting."""
    lines = ["| flag | environment | default | what it does |", "|---|---|---|---|"]
    for field in dataclasses.fields(Config):
        default = "" if field.default in ("", ()) else f"`{field.default}`"
        text = field.metadata["help"].replace("|", "\\|")
        lines.append(f"| `{receiver.flag_of(field.name)}` | `WEBHOOK_{field.name.upper()}` | {default} | {text} |")
    return lines


class DocumentTest(ServerTest):
    source = PROGRAM.read_text(encoding="utf-8")

    def test_the_program_starts_on_the_bare_standard_library(self):
        code, out, err = self.program("--help")
        self.assertEqual((code, err), (0, ""))
        self.assertIn("--busy-timeout SECONDS", out)

    def test_nothing_is_imported_from_outside_the_standard_library(self):
        if not hasattr(sys, "stdlib_module_names"):
            self.skipTest("this Python cannot name its standard library")
        names = set()
        for node in ast.walk(ast.parse(self.source)):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module.split(".")[0])
        self.assertIn("sqlite3", names)
        self.assertEqual(names - set(sys.stdlib_module_names), set())

    def test_help_names_every_setting_with_its_default_and_every_command(self):
        text = " ".join(command("--help")[1].split())
        for field in dataclasses.fields(Config):
            with self.subTest(field.name):
                flag, metavar = receiver.flag_of(field.name), field.metadata["metavar"]
                self.assertIn(f"{flag} {metavar} {field.metadata['help']}", text)
                if field.default not in ("", ()):
                    self.assertIn(f"{field.metadata['help']} (default: {field.default})", text)
        for name in ("serve", "check", "send", "bench"):
            self.assertRegex(text, rf" {name} [a-z]")

    def test_readme_has_a_row_for_every_setting(self):
        readme = (HERE / "README.md").read_text(encoding="utf-8").splitlines()
        table = settings_table()
        missing = [line for line in table[2:] if line not in readme]
        self.assertEqual(missing, [], "README.md needs this table:\n\n" + "\n".join(table) + "\n")

    @unittest.skipUnless(POSIX and shutil.which("curl"), "needs a shell and curl")
    def test_every_answer_in_the_readme_is_what_comes_back(self):
        server = self.start(database=str(self.folder / "appointments.db"))
        blocks = re.findall(r"```(\w*)\n(.*?)```", (HERE / "README.md").read_text(encoding="utf-8"), re.DOTALL)
        tried = 0
        for (kind, commands), (_, expected) in zip(blocks, blocks[1:]):
            if kind != "sh" or commands.startswith("./run.sh") or "sqlite3 " in commands and not shutil.which("sqlite3"):
                continue
            commands = commands.replace("http://127.0.0.1:8000", server.url).replace(
                "python3 webhook_server.py", f"'{sys.executable}' -S -I '{PROGRAM}'")
            done = subprocess.run(["sh", "-c", commands], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=WAIT,
                                  cwd=self.folder, env=clean_environment())
            with self.subTest(commands[:80]):
                self.assertEqual(self.without_times(done.stdout.decode()), self.without_times(expected))
            tried += 1
        self.assertGreater(tried, 10)

    @staticmethod
    def without_times(text):
        text = re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}", "(now)", text.replace("\r\n", "\n"))
        return re.sub(r'"free_bytes": \d+', "(free)", text).strip()

    def test_readme_has_no_place_left_to_fill_in(self):
        self.assertNotRegex((HERE / "README.md").read_text(encoding="utf-8"), r"BENCH_OUTPUT|SETTINGS_TABLE|TODO")

    def test_readme_names_no_flag_that_does_not_exist(self):
        known = set()
        for arguments in (["--help"], ["check", "-h"], ["send", "-h"], ["bench", "-h"]):
            known |= set(re.findall(r"--[a-z][a-z0-9-]*", command(*arguments)[1]))
        readme = (HERE / "README.md").read_text(encoding="utf-8")
        written = set(re.findall(r"`(--[a-z][a-z0-9-]*)", readme))
        self.assertEqual(written - known, set())
        self.assertEqual(set(re.findall(r"WEBHOOK_[A-Z_]+[A-Z]", readme)) - {
            "WEBHOOK_" + field.name.upper() for field in dataclasses.fields(Config)} - {"WEBHOOK_NAME"}, set())

    def test_the_built_in_schema_is_schema_json(self):
        self.assertEqual(json.loads((HERE / "schema.json").read_text(encoding="utf-8")), receiver.EVENT_SCHEMA)

    def test_the_table_of_contents_is_true(self):
        listed = re.findall(r"(?m)^    ([A-Z][A-Za-z ]*?)  +\S", receiver.__doc__)
        banners = re.findall(r"(?m)^# ={77}\n# ([A-Z][A-Za-z ]*): .+\n# ={77}$", self.source)
        self.assertEqual(listed, banners)
        self.assertEqual(listed, list(PARTS))

    @unittest.skipUnless(POSIX, "a script for sh")
    def test_run_sh_starts_what_it_is_told_from_any_folder(self):
        if not (HERE / "run.sh").exists():
            self.skipTest("run.sh is not here")
        environment = {**clean_environment(), "PYTHON": sys.executable}

        def run(*arguments, **changes):
            done = subprocess.run([str(HERE / "run.sh"), *arguments], stdin=subprocess.DEVNULL, capture_output=True,
                                  cwd=self.folder, timeout=WAIT, env={**environment, **changes})
            return done.returncode, done.stdout.decode(), done.stderr.decode()
        self.assertIn("examples:", run("help")[1])
        self.assertEqual(run("--version"), (0, f"webhook_server.py {receiver.__version__}\n", ""))
        self.assertIn("--seconds", run("bench", "--seconds", "x")[2])
        (self.folder / "an event.json").write_text(json.dumps(event()))
        self.assertEqual(run("check", "an event.json"), (0, "", ""))
        link = self.folder / "link"
        link.symlink_to(HERE / "run.sh")
        done = subprocess.run([str(link), "--version"], capture_output=True, timeout=WAIT, env=environment)
        self.assertEqual(done.stdout.decode(), f"webhook_server.py {receiver.__version__}\n")
        code, out, err = run("start", PYTHON="false")
        self.assertEqual((code, out, err.count("\n")), (2, "", 1))
        self.assertIn("3.9", err)


# =============================================================================
# Running them: whole classes side by side, in as many processes as there are cores and one more.
# =============================================================================

def setUpModule():
    """A program that is started with nohup, or by a script in the background, inherits signals as ignored."""
    for name, default in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) == signal.SIG_IGN:
            signal.signal(getattr(signal, name), default)


def chosen_tests(words):
    """{name of a class: its tests}, all of them or those whose id holds one of the words."""
    chosen = {}
    for name, kind in list(globals().items()):
        if isinstance(kind, type) and issubclass(kind, unittest.TestCase) and kind.__module__ == __name__:
            names = unittest.defaultTestLoader.getTestCaseNames(kind)
            names = [test for test in names if not words or any(word.lower() in f"{name}.{test}".lower() for word in words)]
            if names:
                chosen[name] = unittest.TestSuite(map(kind, names))
    return chosen


def work(words):
    """A worker: run the classes named on stdin, a line of JSON on stdout for each."""
    chosen, out = chosen_tests(words), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)                           # what a test prints is no result
    setUpModule()
    for line in sys.stdin:
        text = io.StringIO()
        result = unittest.TextTestRunner(stream=text, verbosity=0).run(chosen[line.strip()])
        print(json.dumps({"ran": result.testsRun, "skipped": len(result.skipped), "failures": len(result.failures) +
                          len(result.unexpectedSuccesses), "errors": len(result.errors),
                          "text": "" if result.wasSuccessful() else text.getvalue().rpartition("-" * 70)[0]}),
              file=out, flush=True)


class Worker:
    """A process that runs classes one after the other. A class that kills its process counts as an error of its own."""

    def __init__(self, words):
        self._command = [sys.executable, str(HERE / "test_webhook_server.py"), "--worker", *words]
        self._process = None

    def run(self, name):
        if self._process is None:
            self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._process.stdin.write(name + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            code, self._process = self._process.wait(), None
            return {"ran": 1, "skipped": 0, "failures": 0, "errors": 1, "text": f"ERROR: {name} ended its process: {code}\n"}
        return json.loads(line)

    def end(self):
        if self._process is not None:
            self._process.communicate()


def main():
    """All tests, or those whose name holds one of the words given; the summary is unittest's."""
    words = sys.argv[1:]
    if words[:1] == ["--worker"]:
        return work(words[1:])
    classes = sorted(chosen_tests(words).items(), key=lambda item: item[1].countTestCases())
    if not classes:
        sys.exit("no test has such a name")
    waiting, lock = [name for name, _ in classes], threading.Lock()
    totals, began = {"ran": 0, "skipped": 0, "failures": 0, "errors": 0}, time.monotonic()

    def serve():
        worker = Worker(words)
        while True:
            with lock:
                if not waiting:
                    break
                name = waiting.pop()        # those with the most tests first
            result = worker.run(name)
            with lock:
                print(result.pop("text") or f"{name}: {result['ran']} tests", file=sys.stderr, flush=True)
                for key in totals:
                    totals[key] += result[key]
        worker.end()

    threads = [threading.Thread(target=serve) for _ in range(min(len(classes), (os.cpu_count() or 1) + 1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bad = totals["failures"] + totals["errors"]
    notes = ", ".join(f"{key}={totals[key]}" for key in ("failures", "errors", "skipped") if totals[key])
    print("-" * 70 + f"\nRan {totals['ran']} tests in {time.monotonic() - began:.3f}s\n\n"
          f"{'FAILED' if bad else 'OK'}{f' ({notes})' if notes else ''}", file=sys.stderr)
    return sys.exit(bool(bad))


if __name__ == "__main__":
    main()
