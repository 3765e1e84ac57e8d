"""The process a runtime lives in: reads requests from stdin, answers on stdout, until stdin closes.

A message is two little-endian uint32 lengths, that many bytes of JSON, and that many bytes of one array (or none),
whose dtype and shape the JSON gives. A request names a method of the runner's `Session`; the answer is one message, or,
where the method returns an iterator of arrays, one message each and a last one without `more`.

Whatever the native library prints goes to stderr, which the parent keeps in a file.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
import traceback
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

from phi3edge.errors import Phi3EdgeError
from phi3edge.registry import load

_LENGTHS = struct.Struct("<II")


def send(stream: IO[bytes], message: dict[str, Any], array: np.ndarray | None = None) -> None:
    """Writes one message, flushed."""
    data = b""
    if array is not None:
        array = np.ascontiguousarray(array)
        message = {**message, "dtype": array.dtype.str, "shape": array.shape}
        data = array.tobytes()
    text = json.dumps(message).encode()
    stream.write(_LENGTHS.pack(len(text), len(data)))
    stream.write(text)
    stream.write(data)
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[dict[str, Any], np.ndarray | None]:
    """Reads one message.

    Raises:
        EOFError: the other side has closed the stream, or died within a message.
    """
    text_length, data_length = _LENGTHS.unpack(_read(stream, _LENGTHS.size))
    message = json.loads(_read(stream, text_length))
    if "dtype" not in message:
        return message, None
    array = np.frombuffer(_read(stream, data_length), message.pop("dtype"))
    return message, array.reshape(message.pop("shape"))


def _read(stream: IO[bytes], length: int) -> bytes:
    data = stream.read(length)
    if len(data) < length:
        raise EOFError("the other process closed the pipe")
    return data


def _answer(session: Any, request: dict[str, Any], array: np.ndarray | None, stream: IO[bytes]) -> None:
    arguments = request["arguments"] if array is None else {"ids": array, **request["arguments"]}
    result = getattr(session, request["method"])(**arguments)
    if isinstance(result, Iterator):
        for block in result:
            send(stream, {"more": True}, block)
        result = None
    send(stream, {"result": result})


def main() -> None:
    """Serves one runner: argv holds its name, and its `Session`'s arguments as JSON."""
    name, options = sys.argv[1], json.loads(sys.argv[2])
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer; with its end stdin closes
    session = None
    while True:
        try:
            request, array = receive(requests) if session else ({"method": "info", "arguments": {}}, None)
        except EOFError:
            return
        try:
            session = session or load("runners", name).Session(**options)
            _answer(session, request, array, answers)
        except Phi3EdgeError as error:
            send(answers, {"error": error.message, "hint": error.hint})
        except Exception as error:  # the parent reports it; the traceback is in the log
            traceback.print_exc()
            send(answers, {"error": f"{type(error).__name__}: {error}", "hint": None})
        if session is None:
            return
