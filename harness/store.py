"""The results store: one SQLite database per run, written by one process, append-only, every row sealed.

Each row carries a SHA-256 over its content and the digest of the row before it, because SQLite's pages have no
checksums: a flipped byte or an edited number is found when the database is opened. A torn write-ahead log is found
when the supervisor compares with the files of the cells. A writer that closes the database checks it once more and
leaves the SHA-256 of the whole file beside it, which the next writer removes before it changes anything: where it
matches, readers need not look at every row again; where it does not, the file was changed by somebody else.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_type_hints

from harness import atomic
from harness.endings import STATUSES
from harness.errors import BadOutput, HarnessError, Infrastructure

APPLICATION_ID = 0x50545148  # "PTQH"
SCHEMA_VERSION = 1


class Damaged(HarnessError):
    """The database is not as it was written."""


class Run(NamedTuple):
    """One start of the supervisor that recorded something: when, with what words, on what machine (JSON)."""

    created: str
    request: str
    provenance: str


class Attempt(NamedTuple):
    """How one attempt at a cell ended. ``cell`` and ``attempt`` together are unique."""

    cell: str
    attempt: int
    run: int
    status: str
    reason: str | None
    returncode: int | None
    load_seconds: float | None
    quantize_seconds: float | None
    evaluate_seconds: float | None
    peak_memory_bytes: int | None
    bits_per_weight: float | None
    packed_bytes: int | None
    created: str


class Measured(NamedTuple):
    """One number of a cell on a task. ``cell``, ``task`` and ``metric`` together are unique."""

    cell: str
    task: str
    metric: str
    value: float
    stderr: float | None
    n: int
    higher_is_better: int
    seconds: float
    created: str


@dataclass(frozen=True)
class Contents:
    """All rows, oldest first."""

    runs: list[Run]
    attempts: list[Attempt]
    measured: list[Measured]


_FINITE = "BETWEEN -1.7e308 AND 1.7e308"
_STRICT = " STRICT" if sqlite3.sqlite_version_info >= (3, 37) else ""
_SECONDS = f"REAL CHECK ({{0}} >= 0 AND {{0}} {_FINITE})"
_SCHEMA = {
    "runs": "created TEXT NOT NULL, request TEXT NOT NULL, provenance TEXT NOT NULL",
    "attempts": f"""cell TEXT NOT NULL CHECK (length(cell) = 16), attempt INTEGER NOT NULL CHECK (attempt >= 1),
        run INTEGER NOT NULL CHECK (run >= 1), status TEXT NOT NULL CHECK (status IN {STATUSES}), reason TEXT,
        returncode INTEGER, load_seconds {_SECONDS.format("load_seconds")},
        quantize_seconds {_SECONDS.format("quantize_seconds")}, evaluate_seconds {_SECONDS.format("evaluate_seconds")},
        peak_memory_bytes INTEGER CHECK (peak_memory_bytes >= 0),
        bits_per_weight REAL CHECK (bits_per_weight > 0 AND bits_per_weight {_FINITE}),
        packed_bytes INTEGER CHECK (packed_bytes >= 0), created TEXT NOT NULL,
        CHECK ((status = 'ok') = (reason IS NULL)), UNIQUE (cell, attempt)""",
    "measured": f"""cell TEXT NOT NULL CHECK (length(cell) = 16), task TEXT NOT NULL CHECK (task <> ''),
        metric TEXT NOT NULL CHECK (metric <> ''), value REAL NOT NULL CHECK (value {_FINITE}),
        stderr REAL CHECK (stderr >= 0 AND stderr {_FINITE}), n INTEGER NOT NULL CHECK (n >= 0),
        higher_is_better INTEGER NOT NULL CHECK (higher_is_better IN (0, 1)),
        seconds {_SECONDS.format("seconds")} NOT NULL, created TEXT NOT NULL, UNIQUE (cell, task, metric)""",
}
_CREATE = {
    table: f"CREATE TABLE {table} (seq INTEGER PRIMARY KEY, digest TEXT NOT NULL, {columns}){_STRICT}"
    for table, columns in _SCHEMA.items()
}
_ROWS: dict[str, type[Run] | type[Attempt] | type[Measured]] = {"runs": Run, "attempts": Attempt, "measured": Measured}
_REALS = {
    name for kind in _ROWS.values() for name, hint in get_type_hints(kind).items() if hint in (float, float | None)
}
# Shares, and perplexities of probabilities that are at most 1: half a rounding error beyond is still a number.
_SHARE, _PERPLEXITY = (0.0, 1 + 1e-9), (1 - 1e-6, math.inf)
_POSSIBLE = dict.fromkeys(("acc", "acc_norm", "acc_bytes", "exact_match"), _SHARE) | dict.fromkeys(
    ("token_perplexity", "word_perplexity", "byte_perplexity", "perplexity"), _PERPLEXITY
)
_FULL = ("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_BUSY", "SQLITE_LOCKED")


class Store:
    """The one writer of a run's database. Every method commits before it returns; Infrastructure when it cannot."""

    def __init__(self, path: Path) -> None:
        """Open, or create. Raises Damaged for a damaged database, HarnessError for a foreign or newer one."""
        self._path = path
        with _told(path):
            if not path.exists():
                checksum_path(path).unlink(missing_ok=True)  # of one that is lost
                with atomic.replacing(path) as temporary:
                    _create(temporary)
            self._connection = _connect(path, "rw")
            try:
                _check_kind(self._connection, path)
                _is_as_closed(path)
                if (found := _pragma(self._connection, "integrity_check")) != "ok":
                    raise _damaged(path, str(found))
                contents, self._digests = _read(self._connection, path)
                checksum_path(path).unlink(missing_ok=True)  # from here on it would be of an earlier state
                self._connection.execute("PRAGMA journal_mode = WAL")
                self._connection.execute("PRAGMA synchronous = FULL")
                self._inode = _inode(path)
            except BaseException:
                self._connection.close()
                raise
        self.run = len(contents.runs)

    def begin(self, run: Run) -> None:
        """Record a start; the attempts that follow belong to it."""
        self._insert("runs", [run])
        self.run += 1

    def add_attempt(self, attempt: Attempt) -> None:
        """Record an end, and fold the log into the database so that a lost log loses at most the attempt at hand."""
        self._insert("attempts", [attempt])
        with _told(self._path):
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def add_measured(self, rows: Sequence[Measured]) -> None:
        """Record all numbers of one task together. Raises BadOutput for one that cannot be."""
        for row in rows:
            if not math.isfinite(row.value) or (row.stderr is not None and not math.isfinite(row.stderr)):
                raise BadOutput(f"{row.task}: {row.metric} is {row.value} with standard error {row.stderr}")
            least, most = _POSSIBLE.get(row.metric, (-math.inf, math.inf))
            if not least <= row.value <= most:
                raise BadOutput(f"{row.task}: {row.metric} is {row.value}, which is not between {least} and {most}")
        self._insert("measured", rows)

    def close(self) -> None:
        """Leave one plain file that can be read where nobody may write, unless a reader is at it just now."""
        with contextlib.suppress(sqlite3.OperationalError):  # a reader holds it: readable with its log beside it
            self._connection.execute("PRAGMA journal_mode = DELETE")
        self._connection.close()
        with contextlib.suppress(OSError, sqlite3.OperationalError):  # without it readers look at every row
            _leave_checksum(self._path)

    def _insert(self, table: str, rows: Sequence[Run | Attempt | Measured]) -> None:
        digest = self._digests[table]
        marks = ", ".join("?" * (len(_ROWS[table]._fields) + 1))
        columns = ", ".join(_ROWS[table]._fields)
        insert = f"INSERT INTO {table} ({columns}, digest) VALUES ({marks})"
        with _told(self._path), self._transaction():
            for row in rows:
                values = _stored(row)
                digest = _seal(digest, values)
                at = self._connection.execute(insert, (*values, digest)).lastrowid
                back = self._connection.execute(f"SELECT {columns} FROM {table} WHERE seq = ?", (at,)).fetchone()
                if repr(back) != repr(values):  # its seal would not fit what is read: the store would count as damaged
                    raise BadOutput(f"the results store would keep {back!r:.300} for {values!r:.300}")
        self._digests[table] = digest

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._same_file()
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def _same_file(self) -> None:
        """SQLite reports success when its file was deleted under it: the name must still mean the file we opened."""
        if _inode(self._path) != self._inode:
            raise Infrastructure(
                "the results store was deleted or moved while the run was going", where=str(self._path),
                fix="run the same command again: it keeps what is in the folder",
            )  # fmt: skip


def read(path: Path, mode: Literal["ro", "rw"] = "ro") -> Contents:
    """All rows of a store, also while a run is writing it. Raises HarnessError for a damaged, foreign or newer one.

    ``rw`` also writes nothing, unless a writer was killed and left something to roll back.
    """
    if not path.is_file():
        raise HarnessError("no results here", where=str(path), fix="give the folder that `harness run --out` wrote to")
    with _told(path):
        connection = _connect(path, mode)
        try:
            connection.execute("BEGIN")
            _check_kind(connection, path)  # takes the lock: from here on no writer changes the file
            return _fetched(connection) if _is_as_closed(path) else _read(connection, path)[0]
        finally:
            connection.close()


def _create(path: Path) -> None:
    """An empty store, made under another name so that there is never half of one."""
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        for statement in _CREATE.values():
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    finally:
        connection.close()


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    connection = sqlite3.connect(f"file:{_quoted(path)}?mode={mode}", uri=True, isolation_level=None, timeout=10)
    for pragma in ("trusted_schema = OFF", "cell_size_check = ON", "mmap_size = 0"):
        connection.execute(f"PRAGMA {pragma}")
    return connection


def _check_kind(connection: sqlite3.Connection, path: Path) -> None:
    if _pragma(connection, "application_id") != APPLICATION_ID:
        raise HarnessError("this is not a results store of harness", where=str(path), fix="give another run folder")
    version = _pragma(connection, "user_version")
    if version != SCHEMA_VERSION:
        raise HarnessError(
            f"the results store has schema version {version}; this harness reads version {SCHEMA_VERSION}",
            where=str(path),
            fix="install the harness that wrote it" if int(str(version)) > SCHEMA_VERSION else "run into another --out",
        )
    found = {sql.removesuffix(" STRICT") for (sql,) in connection.execute("SELECT sql FROM sqlite_master") if sql}
    if found != {sql.removesuffix(" STRICT") for sql in _CREATE.values()}:
        raise _damaged(path, "its tables are not those of a results store")


def checksum_path(path: Path) -> Path:
    """Beside the store: the SHA-256 that its file had when it was last found whole."""
    return path.with_name(f"{path.name}.sha256")


def _leave_checksum(path: Path) -> None:
    """Check every row of a closed store, then write the checksum of its file; not while somebody else writes it."""
    connection = _connect(path, "ro")
    try:
        connection.execute("BEGIN")
        _read(connection, path)
        if not _log(path).exists():
            atomic.write_text(checksum_path(path), _sha256(path) + "\n")
    finally:
        connection.close()


def _is_as_closed(path: Path) -> bool:
    """Whether every byte of the file is as :func:`_leave_checksum` found it; False while a writer is at it.

    Raises Damaged when somebody else changed the file: nothing else tells that rows were cut off its end.
    """
    try:
        expected = checksum_path(path).read_bytes().strip()
    except OSError:
        return False
    if _log(path).exists() or expected != _sha256(path).encode():
        raise _damaged(path, "its file was changed after it was closed")
    return True


def _log(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fetched(connection: sqlite3.Connection) -> Contents:
    # The fields are those of the query, so that nothing need be counted again for each of many rows.
    make = tuple.__new__
    tables = {table: [make(kind, row) for row in _selected(connection, table)] for table, kind in _ROWS.items()}
    return Contents(**tables)  # type: ignore[arg-type]  # one list of its own kind of row a table


def _selected(connection: sqlite3.Connection, table: str) -> Iterator[tuple[object, ...]]:
    return connection.execute(f"SELECT {', '.join(_ROWS[table]._fields)} FROM {table} ORDER BY seq")


def _read(connection: sqlite3.Connection, path: Path) -> tuple[Contents, dict[str, str]]:
    digests = {}
    for table in _ROWS:
        seals = [seal for (seal,) in connection.execute(f"SELECT digest FROM {table} ORDER BY seq")]
        digests[table] = _verified(table, list(_selected(connection, table)), seals, path)
    return _fetched(connection), digests


def _verified(table: str, rows: list[tuple[object, ...]], seals: list[str], path: Path) -> str:
    digest = table
    for number, (row, seal) in enumerate(zip(rows, seals, strict=True), 1):
        digest = _seal(digest, row)
        if digest != seal:
            raise _damaged(path, f"row {number} of {table} is not as it was written")
    return digest


def _seal(previous: str, row: tuple[object, ...]) -> str:
    return hashlib.sha256(f"{previous}\n{row!r}".encode()).hexdigest()


def _stored(row: Run | Attempt | Measured) -> tuple[object, ...]:
    """The values as SQLite gives them back: what is in a REAL column as a float, and a negative zero as zero."""
    return tuple(
        float(value) + 0.0 if name in _REALS and isinstance(value, int | float) else value
        for name, value in zip(row._fields, row, strict=True)
    )


def _damaged(path: Path, what: str) -> Damaged:
    return Damaged(
        f"the results store is damaged: {what}", where=str(path),
        fix=f"run the same command: it keeps the file as {path.name}.bad and reads the results again from cells/",
    )  # fmt: skip


def set_aside(path: Path) -> Path:
    """Rename a damaged store, its log and its checksum to ``….bad``, and return the store's new name.

    What was set aside before is overwritten: the results are in the folders of the cells.
    """
    bad = path.with_name(f"{path.name}.bad")
    for file in (path, _log(path), checksum_path(path)):
        with contextlib.suppress(FileNotFoundError):
            file.replace(file.with_name(file.name.replace(path.name, bad.name, 1)))
    path.with_name(f"{path.name}-shm").unlink(missing_ok=True)
    return bad


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """SQLite's errors in words: the machine's (Infrastructure), a bad number's (BadOutput), a damaged file's."""
    try:
        yield
    except (sqlite3.IntegrityError, sqlite3.ProgrammingError, sqlite3.InterfaceError, OverflowError) as error:
        raise BadOutput(f"the results store refused a row: {error}") from error
    except UnicodeDecodeError as error:  # Python's, of a text that SQLite hands over as it lies there
        raise _damaged(path, f"a text is none: {error}") from error
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", "")
        if name.startswith(_FULL):
            raise Infrastructure(
                f"the results store cannot be used: {error} ({name})", where=str(path),
                fix="make room or make the folder writable, then run the same command: what is recorded is kept",
            ) from error  # fmt: skip
        raise _damaged(path, str(error)) from error


def _pragma(connection: sqlite3.Connection, name: str) -> object:
    return connection.execute(f"PRAGMA {name}").fetchone()[0]


def _quoted(path: Path) -> str:
    return str(path.resolve()).replace("%", "%25").replace("?", "%3f").replace("#", "%23")


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_dev, stat.st_ino
