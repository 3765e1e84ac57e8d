"""GGUF headers: gguf-py reads what we write, we read what gguf-py writes, and nothing damaged is believed."""

import contextlib
import io
import struct

import gguf
import numpy as np
import pytest

from phi3edge.errors import CheckpointError
from phi3edge.gguf_file import ValueType, ggml_types, read_header, write_header

EVERY_TYPE = {
    "general.architecture": (ValueType.STRING, "phi3"),
    "a.uint8": (ValueType.UINT8, 255),
    "a.int8": (ValueType.INT8, -128),
    "a.uint16": (ValueType.UINT16, 65535),
    "a.int16": (ValueType.INT16, -32768),
    "a.uint32": (ValueType.UINT32, 2**32 - 1),
    "a.int32": (ValueType.INT32, -(2**31)),
    "a.float32": (ValueType.FLOAT32, 0.25),
    "a.true": (ValueType.BOOL, True),
    "a.false": (ValueType.BOOL, False),
    "a.string": (ValueType.STRING, "Grüße, 世界 \0 end"),
    "a.uint64": (ValueType.UINT64, 2**64 - 1),
    "a.int64": (ValueType.INT64, -(2**63)),
    "a.float64": (ValueType.FLOAT64, 0.1),
    "b.strings": (ValueType.STRING, ["<s>", "", "▁the"]),
    "b.int32s": (ValueType.INT32, [3, -1, 0]),
    "b.float32s": (ValueType.FLOAT32, [-1.5, 0.0]),
    "b.bools": (ValueType.BOOL, [True, False]),
}
TENSORS = [("norm", 0, (3,), 12), ("token_embd.weight", 8, (5, 64), 340), ("cube", 1, (2, 3, 4), 48)]


def write(path, metadata=EVERY_TYPE, tensors=TENSORS, alignment=32):
    """A whole file, with tensor number i filled with the byte i + 1."""
    with path.open("wb") as file:
        offsets = write_header(file, metadata, tensors, alignment)
        for i, (offset, tensor) in enumerate(zip(offsets, tensors, strict=True)):
            file.write(b"\0" * (offset - file.tell()) + bytes([i + 1]) * tensor[3])
    return path


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "model.gguf")


@pytest.mark.parametrize("alignment", [32, 128])
def test_gguf_py_reads_what_we_write(tmp_path, alignment):
    reader = gguf.GGUFReader(write(tmp_path / "model.gguf", alignment=alignment))
    for key, (kind, value) in EVERY_TYPE.items():
        assert reader.fields[key].contents() == value, key
        assert reader.fields[key].types[-1].value == kind, key
    assert [t.name for t in reader.tensors] == [t[0] for t in TENSORS]
    for i, (ours, theirs) in enumerate(zip(TENSORS, reader.tensors, strict=True)):
        assert tuple(theirs.shape)[::-1] == ours[2]
        assert theirs.tensor_type == ours[1]
        assert theirs.data_offset % alignment == 0
        assert theirs.n_bytes == ours[3]
        assert set(theirs.data.tobytes()) == {i + 1}


@pytest.mark.parametrize("alignment", [32, 128])
def test_we_read_what_we_write(tmp_path, alignment):
    header = read_header(write(tmp_path / "model.gguf", alignment=alignment))
    written = {key: (header.value_types[key], value) for key, value in header.metadata.items()}
    assert written.pop("general.alignment", (ValueType.UINT32, 32))[1] == alignment == header.alignment
    assert written == EVERY_TYPE
    assert [(t.name, t.ggml_type, t.shape, t.nbytes) for t in header.tensors] == TENSORS
    assert header.tensors[0].offset == header.data_offset


def test_we_read_what_gguf_py_writes(tmp_path):
    path = tmp_path / "theirs.gguf"
    writer = gguf.GGUFWriter(path, "phi3")
    writer.add_custom_alignment(64)
    for method, value in {
        "uint8": 7, "int8": -7, "uint16": 700, "int16": -700, "uint32": 7, "int32": -7, "uint64": 2**40,
        "int64": -(2**40), "float32": 0.5, "float64": 0.1, "bool": True, "string": "ü", "array": ["a", "", "▁b"],
    }.items():  # fmt: skip
        getattr(writer, f"add_{method}")(f"key.{method}", value)
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    writer.add_tensor("weight", weight)
    writer.add_tensor("blocks", np.ones((4, 34), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    header, theirs = read_header(path), gguf.GGUFReader(path)
    assert header.metadata == {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert header.alignment == 64
    assert [(t.name, t.offset, t.nbytes) for t in header.tensors] == [
        (t.name, t.data_offset, t.n_bytes) for t in theirs.tensors
    ]
    assert [t.shape for t in header.tensors] == [(2, 3), (4, 32)]
    first = header.tensors[0]
    assert path.read_bytes()[first.offset : first.offset + first.nbytes] == weight.tobytes()


def test_version_2_reads_the_same(path):
    data = bytearray(path.read_bytes())
    data[4] = 2
    newer = read_header(path)
    path.write_bytes(data)
    older = read_header(path)
    assert older.version == 2
    assert older.metadata == newer.metadata
    assert older.tensors == newer.tensors


def test_block_sizes_are_ggmls():
    theirs = {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    ours = {number: (t.block_size, t.block_bytes) for number, t in ggml_types().items()}
    assert {number: ours[number] for number in theirs} == theirs
    assert all(t.name == gguf.GGMLQuantizationType(number).name.lower() for number, t in ggml_types().items())


def test_bytes_are_deterministic():
    first, second = io.BytesIO(), io.BytesIO()
    assert write_header(first, EVERY_TYPE, TENSORS) == write_header(second, EVERY_TYPE, TENSORS)
    assert first.getvalue() == second.getvalue()


@pytest.mark.parametrize(("kind", "value"), [("UINT8", 256), ("STRING", 3), ("UINT32", "x"), ("FLOAT32", 1e39)])
def test_a_value_that_its_type_cannot_hold_is_refused(kind, value):
    with pytest.raises(ValueError, match=f"'some.key': {kind} cannot hold"):
        write_header(io.BytesIO(), {"some.key": (ValueType[kind], value)}, [])


def test_a_large_vocabulary_is_read_whole(tmp_path):
    words = [f"token {i}" for i in range(50_000)]
    metadata = {
        "tokenizer.ggml.tokens": (ValueType.STRING, words),
        "tokenizer.ggml.merges": (ValueType.STRING, words),
        "tokenizer.ggml.scores": (ValueType.FLOAT32, [0.0] * len(words)),
    }
    path = write(tmp_path / "vocabulary.gguf", metadata, [])
    header = read_header(path)
    assert header.metadata["tokenizer.ggml.tokens"] == header.metadata["tokenizer.ggml.merges"] == words


def u32(*values):
    return struct.pack(f"<{len(values)}I", *values)


def u64(*values):
    return struct.pack(f"<{len(values)}Q", *values)


def text(string):
    data = string if isinstance(string, bytes) else string.encode()
    return u64(len(data)) + data


def record(name=b"w", dims=(32,), kind=0, offset=0):
    return text(name) + u32(len(dims)) + u64(*dims) + u32(kind) + u64(offset)


def file(*parts, tensors=0, pairs=0, version=3, magic=b"GGUF", data=256):
    head = magic + u32(version) + u64(tensors, pairs) + b"".join(parts)
    return head + b"\0" * (-len(head) % 32 + data)


UINT32, STRING, ARRAY = 4, 8, 9
BAD_FILES = {
    "empty": (b"", "expected a GGUF file, got 0 bytes"),
    "bad magic": (file(magic=b"PK\3\4"), "starts with b'GGUF', got b'PK"),
    "version 1": (file(version=1), "expected GGUF version 2 or 3 in little endian, got version 1"),
    "big endian": (file(version=3 << 24), "got a big-endian file"),
    "absurd tensor count": (file(tensors=2**60), "tensors cannot fit"),
    "absurd pair count": (file(pairs=2**63), "metadata pairs cannot fit"),
    "absurd key length": (file(u64(2**64 - 1), pairs=1), "a string of metadata key needs"),
    "key past the end": (file(text("k") + u32(UINT32, 1), u64(250), pairs=2, data=13), "the file ends at"),
    "key not UTF-8": (file(text(b"\xff\xfe") + u32(UINT32, 1), pairs=1), "metadata key is not UTF-8"),
    "unknown value type": (file(text("k") + u32(13), pairs=1), "expected a value type from 0 to 12 .* got 13"),
    "unknown element type": (file(text("k") + u32(ARRAY, 99) + u64(1), pairs=1), "for metadata key 'k', got 99"),
    "array of arrays": (file(text("k") + u32(ARRAY, ARRAY) + u64(1), pairs=1), "'k' is an array of arrays"),
    "absurd array": (file(text("k") + u32(ARRAY, UINT32) + u64(2**50), pairs=1), "elements of 'k' cannot fit"),
    "absurd string array": (file(text("k") + u32(ARRAY, STRING) + u64(2**50), pairs=1), "elements of 'k' cannot fit"),
    "absurd string": (file(text("k") + u32(STRING) + u64(1000), pairs=1), "a string of 'k' needs 1000 bytes"),
    "boolean of 2": (file(text("k") + u32(7) + b"\2", pairs=1), "expected 0 or 1 for the boolean 'k', got 2"),
    "key twice": (file((text("k") + u32(UINT32, 1)) * 2, pairs=2), "metadata key 'k' occurs twice"),
    "alignment 24": (file(text("general.alignment") + u32(UINT32, 24), pairs=1), "a power of two .* got 24"),
    "alignment 0": (file(text("general.alignment") + u32(UINT32, 0), pairs=1), "a power of two .* got 0"),
    "alignment text": (file(text("general.alignment") + u32(STRING) + text("x"), pairs=1), "a power of two .* got 'x'"),
    "five dimensions": (file(record(dims=(1,) * 5), tensors=1), "tensor 'w': expected at most 4 dimensions, got 5"),
    "absurd dimension": (file(record(dims=(2**62, 2**62)), tensors=1), "tensor 'w': its data ends at"),
    "empty dimension": (file(record(dims=(32, 0)), tensors=1), r"expected rows in blocks .* got \(0, 32\)"),
    "unknown type": (file(record(kind=4), tensors=1), "tensor 'w': unknown type 4"),
    "broken block": (file(record(dims=(33,), kind=8), tensors=1), r"rows in blocks of 32 \(q8_0\), got \(33,\)"),
    "unaligned": (file(record(offset=8), tensors=1), "a multiple of 32, got 8"),
    "past the end": (file(record(offset=160), tensors=1), "'w': its data ends at .*, but the file ends at"),
    "absurd offset": (file(record(offset=2**64 - 32), tensors=1), "'w': its data ends at"),
    "overlap": (file(record(b"a"), record(b"b", offset=96), tensors=2), "'a' and 'b' overlap at byte"),
    "tensor twice": (file(record(), record(offset=128), tensors=2), "tensor 'w' occurs twice"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_in_one_line(tmp_path, name):
    data, message = BAD_FILES[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as error:
        read_header(path)
    assert error.value.message.startswith("bad.gguf: ")
    assert "\n" not in error.value.message


def test_every_truncation_is_refused(path):
    whole = path.read_bytes()
    for size in [*range(0, 1000, 7), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            read_header(path)


def test_no_single_byte_crashes_the_reader(path):
    whole = path.read_bytes()
    for at in range(read_header(path).data_offset):
        for value in (0, 255):
            path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
            with contextlib.suppress(CheckpointError):
                read_header(path)


def test_a_missing_file_is_one_clear_error(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_header(tmp_path / "none.gguf")
