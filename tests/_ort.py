"""ONNX Runtime's block operators and its own quantizer on the CPU: oracle and yardstick of the affine codecs."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi import _pybind_state as native

from phi3edge.codecs._affine import AffineCodec
from phi3edge.types import Quantized

MICROSOFT = "com.microsoft"


def _run(op: str, inputs: dict[str, np.ndarray | None], feeds: dict[str, np.ndarray], **attributes: int) -> np.ndarray:
    """One node's output; `inputs` in the operator's order, those without a value being feeds."""
    constants = [numpy_helper.from_array(np.ascontiguousarray(a), n) for n, a in inputs.items() if a is not None]
    fed = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in feeds.items()
    ]
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    node = helper.make_node(op, list(inputs), ["out"], domain=MICROSOFT, **attributes)
    graph = helper.make_graph([node], "one", fed, [out], constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def _parts(codec: AffineCodec, packed: np.ndarray, columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The sections of packed rows as the operators take them, scales as float32."""
    codes, scales, zero_points = np.split(packed, np.cumsum(codec.sections(columns)[:2]), axis=1)
    return codes, np.ascontiguousarray(scales).view(np.float16).astype(np.float32), zero_points


def matmul_nbits(codec: AffineCodec, packed: np.ndarray, x: np.ndarray, accuracy_level: int = 1) -> np.ndarray:
    """The product of x and the transposed weight: float32 (tokens, columns) to (tokens, rows)."""
    rows, columns = len(packed), x.shape[1]
    codes, scales, zero_points = _parts(codec, packed, columns)
    blocks = codes.reshape(rows, columns // codec.BLOCK_SIZE, -1)
    inputs = {"x": None, "codes": blocks, "scales": scales} | ({} if codec.signed else {"zero_points": zero_points})
    sizes = {"K": columns, "N": rows, "bits": codec.bits, "block_size": codec.BLOCK_SIZE}
    return _run("MatMulNBits", inputs, {"x": x}, **sizes, accuracy_level=accuracy_level)


def gather_block_quantized(codec: AffineCodec, packed: np.ndarray, ids: np.ndarray, columns: int) -> np.ndarray:
    """Rows `ids` of the weight, float32."""
    codes, scales, zero_points = _parts(codec, packed, columns)
    inputs = {"codes": codes, "ids": None, "scales": scales} | ({} if codec.signed else {"zero_points": zero_points})
    sizes = {"bits": codec.bits, "block_size": codec.BLOCK_SIZE, "gather_axis": 0, "quantize_axis": 1}
    return _run("GatherBlockQuantized", inputs, {"ids": ids}, **sizes)


def quantize(codec: AffineCodec, weight: np.ndarray) -> Quantized:
    """What onnxruntime's own quantizer makes of float32 (rows, columns), with float32 scales."""
    rows, columns = weight.shape
    blocks = columns // codec.BLOCK_SIZE
    codes = np.zeros((rows, blocks, codec.BLOCK_SIZE * codec.bits // 8), np.uint8)
    scales = np.zeros((rows, blocks), np.float32)
    zero_points = np.zeros((rows, -(-blocks * codec.bits // 8)), np.uint8)
    kernel = native.quantize_matmul_4bits if codec.bits == 4 else native.quantize_matmul_8bits
    transposed = np.ascontiguousarray(weight.T)
    kernel(codes, transposed, scales, zero_points, codec.BLOCK_SIZE, rows, columns, codec.signed)

    def unpacked(data: np.ndarray) -> np.ndarray:
        return data if codec.bits == 8 else np.stack([data & 15, data >> 4], axis=-1).reshape(rows, -1)

    own_zeros = None if codec.signed else np.ascontiguousarray(unpacked(zero_points)[:, :blocks])
    return Quantized(codec.NAME, unpacked(codes.reshape(rows, -1)), scales, zero_points=own_zeros)
