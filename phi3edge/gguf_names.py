"""What llama.cpp calls the tensors of its architectures `phi3` and `phimoe`: in model files and importance matrices."""

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
    "attn_norm_bias": "blk.{layer}.attn_norm.bias",
    "attn_q": "blk.{layer}.attn_q.weight",
    "attn_q_bias": "blk.{layer}.attn_q.bias",
    "attn_k": "blk.{layer}.attn_k.weight",
    "attn_k_bias": "blk.{layer}.attn_k.bias",
    "attn_v": "blk.{layer}.attn_v.weight",
    "attn_v_bias": "blk.{layer}.attn_v.bias",
    "attn_output_bias": "blk.{layer}.attn_output.bias",
    "ffn_norm_bias": "blk.{layer}.ffn_norm.bias",
    "router": "blk.{layer}.ffn_gate_inp.weight",
    "output_norm_bias": "output_norm.bias",
    "head_bias": "output.bias",
}
"""By role."""

EXPERT_NAMES = {
    "ffn_gate": "blk.{layer}.ffn_gate_exps.weight",
    "ffn_up": "blk.{layer}.ffn_up_exps.weight",
    "ffn_down": "blk.{layer}.ffn_down_exps.weight",
}
"""By role, of a layer's experts: one tensor holds all of them, expert after expert."""


def tensor_name(tensor: TensorSpec) -> str:
    """The name of a tensor in the file; experts of one role and layer share theirs."""
    names = TENSOR_NAMES if tensor.expert is None else EXPERT_NAMES
    return names[tensor.role].format(layer=tensor.layer)
