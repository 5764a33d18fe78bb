"""Takes the traces of users out of the bytes of one file, by its format."""

import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .traces import NOTHING, REMOVED_TEXT, Traces


KEPT_FILES = {  # of a model or tokenizer: their words are theirs, whoever is called the same
    *("config.json", "generation_config.json", "adapter_config.json", "training_settings.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "vocab.txt", "tokenizer.model", "preprocessor_config.json", "processor_config.json"),
    *("chat_template.jinja", "chat_template.json", "model.safetensors.index.json"),
}
PICTURES = {".png", ".jpg", ".jpeg", ".gif", ".webp", ".pdf"}  # where an id may be drawn, which no search finds
CLOSED = {".zst", ".7z", ".rar", ".br", ".lz4", ".xpak", ".sqlite", ".db"}  # compressed or paged: not opened here
PACKED = {".gz": (gzip.decompress, lambda data: gzip.compress(data, mtime=0)), ".bz2": (bz2.decompress, bz2.compress)}
PACKED |= {".xz": (lzma.decompress, lzma.compress)}
DELETED_FILES = ("training_args.bin", "events.out.tfevents")  # logs and pickles that nothing needs


@dataclass(frozen=True)
class Cleaned:
    """
    What became of a file.

    Args:
        action (`str`): `"unchanged"`: no trace was found; `"rewritten"`; `"deleted"`; `"left"`: the text of an id stands there
            as something else; `"refused"`: there is a trace, and this format cannot be rewritten.
        how (`str`): How it was searched.
        data (`bytes`, *optional*): The new content, if it was rewritten.
    """

    action: str
    how: str
    data: bytes | None = None


def cleaned(name: str, data: Any, traces: Traces) -> Cleaned:
    """
    A file without removed users.

    Args:
        name (`str`): Its name, which tells the format.
        data (`bytes` or `mmap`): Its content.
        traces ([`Traces`]): The users.
    """
    suffix = PurePath(name).suffix.lower()
    if PurePath(name).name.startswith(DELETED_FILES):
        return Cleaned("deleted" if _in_parts(data, traces) else "unchanged", "bytes")
    if suffix in PICTURES:
        return Cleaned("deleted" if traces.in_bytes(data) else "unchanged", "bytes; what is drawn is not read")
    if suffix in CLOSED:
        return Cleaned("refused" if traces.in_bytes(data) else "unchanged", "bytes; not opened")
    if suffix in PACKED:
        return _cleaned_packed(name, suffix, data, traces)
    if data[:4] == b"PK\x03\x04":
        return _cleaned_zip(data, traces)
    for suffixes, clean, how in FORMATS:
        if suffix in suffixes and PurePath(name).name not in KEPT_FILES:
            return _by_format(name, data, traces, clean, how)
    if PurePath(name).name in KEPT_FILES or suffix in (".safetensors", ".index"):
        return Cleaned("left" if traces.in_bytes(data) else "unchanged", "bytes")
    return _cleaned_text(data, traces)


def _by_format(
    name: str, data: Any, traces: Traces, clean: Callable[[bytes, Traces], bytes | None], how: str
) -> Cleaned:
    whole = bytes(data)
    if not whole.strip():
        return Cleaned("unchanged", how)
    try:
        new = clean(whole, traces)
    except (ValueError, RecursionError, csv.Error, pa.ArrowException):  # not of the format that its name says
        return _cleaned_text(data, traces)
    if new is None:
        return Cleaned("refused" if traces.in_bytes(data) else "unchanged", f"{how}, bytes")
    if traces.in_bytes(new):
        return Cleaned("refused", f"{how}, bytes")
    return Cleaned("rewritten", f"{how}, bytes", new)


def _cleaned_text(data: Any, traces: Traces) -> Cleaned:
    """Text in UTF-8 is rewritten; anything else is searched by its bytes."""
    try:
        text = bytes(data).decode("utf-8") if b"\x00" not in data[:1024] else None
    except UnicodeDecodeError:
        text = None
    if text is None:
        return Cleaned("refused" if traces.in_bytes(data) else "unchanged", "bytes")
    new = traces.without_text(text)
    if new != text:
        return Cleaned("refused" if traces.in_bytes(new.encode()) else "rewritten", "text", new.encode())
    return Cleaned("left" if traces.words_in(text) else "unchanged", "text")


def _cleaned_packed(name: str, suffix: str, data: Any, traces: Traces) -> Cleaned:
    unpack, pack = PACKED[suffix]
    try:
        inner = cleaned(name[: -len(suffix)], unpack(bytes(data)), traces)
    except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
        return Cleaned(
            "refused" if traces.in_bytes(data) else "unchanged", f"bytes; could not be opened ({type(error).__name__})"
        )
    return Cleaned(inner.action, f"{suffix[1:]}: {inner.how}", None if inner.data is None else pack(inner.data))


def _cleaned_zip(data: Any, traces: Traces) -> Cleaned:
    """A zip: each file in it. Those of torch are pickles, which are searched and never rewritten here."""
    try:
        with zipfile.ZipFile(_Reader(data)) as archive:
            infos = archive.infolist()
            if any(PurePath(info.filename).name == "data.pkl" for info in infos):
                found = traces.in_bytes(data) or any(traces.in_bytes(archive.read(info)) for info in infos)
                return Cleaned("refused" if found else "unchanged", "zip: bytes")
            members = [(info, archive.read(info)) for info in infos]
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:  # cut off, encrypted
        return Cleaned(
            "refused" if traces.in_bytes(data) else "unchanged", f"bytes; could not be opened ({type(error).__name__})"
        )
    results = [(info, content, cleaned(info.filename, content, traces)) for info, content in members]
    actions = {result.action for *_, result in results}
    if "refused" in actions or any(traces.in_text(info.filename) for info, _ in members):
        return Cleaned("refused", "zip")
    if not actions & {"rewritten", "deleted"}:
        return Cleaned("left" if "left" in actions else "unchanged", "zip")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for info, content, result in results:
            if result.action != "deleted":
                archive.writestr(info, content if result.data is None else result.data)
    return Cleaned("rewritten", "zip", buffer.getvalue())


class _Reader(io.RawIOBase):
    """`bytes` or an `mmap` as a file, of which no copy is made: an optimizer's state is large."""

    def __init__(self, data: Any) -> None:
        self._data, self._position = data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._data)}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        block = self._data[self._position : self._position + len(buffer)]
        buffer[: len(block)] = block
        self._position += len(block)
        return len(block)


def _in_parts(data: Any, traces: Traces) -> bool:
    return traces.in_bytes(data) or (data[:4] == b"PK\x03\x04" and _cleaned_zip(data, traces).action == "refused")


def _without_json(data: bytes, traces: Traces) -> bytes | None:
    text = data.decode("utf-8")
    value = json.loads(text)
    left = traces.without(value)
    if left == value:
        return None
    indent = next((len(line) - len(line.lstrip(" ")) for line in text.splitlines()[1:2]), 0) or None
    new = json.dumps(None if left is NOTHING else left, indent=indent, ensure_ascii=text.isascii())
    return (new + text[len(text.rstrip()) :]).encode()


def _without_json_lines(data: bytes, traces: Traces) -> bytes | None:
    text = data.decode("utf-8")
    lines = text.split("\n")
    left = []
    for line in lines:
        if not line.strip():
            left.append(line)
            continue
        value = json.loads(line)
        found = traces.without(value)
        if found is NOTHING:
            continue
        left.append(line if found == value else json.dumps(found, ensure_ascii=line.isascii()))
    return None if left == lines else "\n".join(left).encode()


def _without_rows(data: bytes, traces: Traces, delimiter: str) -> bytes | None:
    text = data.decode("utf-8-sig")
    rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    columns = [number for number, name in enumerate(rows[0]) if name in traces.user_columns]
    left = [
        [traces.without_text(cell) for cell in row]
        for row in rows
        if not any(number < len(row) and traces.is_user(row[number]) for number in columns)
    ]
    if left == rows:
        return None
    buffer = io.StringIO(newline="")
    csv.writer(buffer, delimiter=delimiter, lineterminator="\r\n" if "\r\n" in text else "\n").writerows(left)
    return buffer.getvalue().encode()


def _without_csv(data: bytes, traces: Traces) -> bytes | None:
    return _without_rows(data, traces, ",")


def _without_tsv(data: bytes, traces: Traces) -> bytes | None:
    return _without_rows(data, traces, "\t")


def _without_parquet(data: bytes, traces: Traces) -> bytes | None:
    file = pq.ParquetFile(io.BytesIO(data))
    table = file.read()
    left = _without_table(table, traces)
    if left is None:
        return None
    codec = (
        file.metadata.row_group(0).column(0).compression
        if file.metadata.num_row_groups and file.metadata.num_columns
        else "NONE"
    )
    buffer = io.BytesIO()
    pq.write_table(left, buffer, compression=codec if codec != "UNCOMPRESSED" else "NONE")
    return buffer.getvalue()


def _without_arrow(data: bytes, traces: Traces) -> bytes | None:
    is_file = data[:6] == b"ARROW1"
    source = pa.BufferReader(data)
    table = (pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)).read_all()
    left = _without_table(table, traces)
    if left is None:
        return None
    buffer = io.BytesIO()
    with (pa.ipc.new_file if is_file else pa.ipc.new_stream)(buffer, left.schema) as writer:
        writer.write_table(left)
    return buffer.getvalue()


def _without_table(table: pa.Table, traces: Traces) -> pa.Table | None:
    """A table without the rows of removed users, and without their ids elsewhere; `None` if it does not name them."""
    rows = table.to_pylist()
    left = [(number, traces.without(row)) for number, row in enumerate(rows)]
    kept = [(number, row) for number, row in left if row is not NOTHING]
    metadata = {key: _without_bytes(value, traces) for key, value in (table.schema.metadata or {}).items()}
    is_same = all(row == rows[number] for number, row in kept)
    if is_same and len(kept) == len(rows) and metadata == (table.schema.metadata or {}):
        return None
    if is_same:  # other rows keep their types, whatever they are
        table = table.take(pa.array([number for number, _ in kept], pa.int64()))
    else:
        table = pa.Table.from_pylist([row for _, row in kept], schema=table.schema)
    return table.replace_schema_metadata(metadata or None)


def _without_bytes(value: bytes, traces: Traces) -> bytes:
    for form in sorted(traces.forms, key=len, reverse=True):
        value = value.replace(form, REMOVED_TEXT.encode())
    return value


FORMATS: tuple[tuple[set[str], Callable[[bytes, Traces], bytes | None], str], ...] = (
    ({".json"}, _without_json, "JSON"),
    ({".jsonl", ".ndjson"}, _without_json_lines, "JSON lines"),
    ({".csv"}, _without_csv, "rows"),
    ({".tsv"}, _without_tsv, "rows"),
    ({".parquet"}, _without_parquet, "parquet"),
    ({".arrow"}, _without_arrow, "arrow"),
)
