"""What llama.cpp calls the tensors of its architecture `phi3`: in model files and in importance matrices."""

from phi3edge.types import TensorSpec

TENSOR_NAMES = {
    "embedding": "token_embd.weight",
    "attn_norm": "blk.{layer}.attn_norm.weight",
    "attn_qkv": "blk.{layer}.attn_qkv.weight",
    "attn_output": "blk.{layer}.attn_output.weight",
    "ffn_norm": "blk.{layer}.ffn_norm.weight",
    "ffn_gate_up": "blk.{layer}.ffn_up.weight",
    "ffn_down": "blk.{layer}.ffn_down.weight",
    "output_norm": "output_norm.weight",
    "head": "output.weight",
}
"""By role."""


def tensor_name(tensor: TensorSpec) -> str:
    """The name of a tensor in the file."""
    return TENSOR_NAMES[tensor.role].format(layer=tensor.layer)
