"""Phi-3-vision: `Phi3VForCausalLM`, 3-vision and 3.5-vision: its text decoder, which is a Phi-3. Images are left out.

What makes rows of the embedding out of images is a part of its own, with keys and tensors of its own; a prompt without
images does not touch it. Those keys and tensors are known and passed over, anything else is read as strictly as ever.

Sources: Microsoft's modeling_phi3_v.py and the checkpoints' config.json; the tensors' names: mlc-llm's phi3v_loader.py.
"""

from dataclasses import replace

from phi3edge.errors import CheckpointError, UnsupportedError
from phi3edge.families import phi3
from phi3edge.families._fields import short
from phi3edge.hf_config import IMAGES, text_config
from phi3edge.types import JSON, ModelSpec

ARCHITECTURE = "Phi3VForCausalLM"
IMAGE_TENSORS = "model.vision_embed_tokens."


def parse(config: JSON, generation_config: JSON | None, name: str) -> ModelSpec:
    """Read the text decoder of a Phi-3-vision configuration; see `phi3edge.families.phi3.parse`.

    Returns:
        A model of family phi3, which is what it is for every stage after this one.

    Raises:
        UnsupportedError: a key or value that would change the function in a way that phi3edge does not compute.
        CheckpointError: a missing key, or a value of the wrong kind or out of range.
    """
    architectures = config.get("architectures") or [ARCHITECTURE]
    if architectures != [ARCHITECTURE]:
        raise UnsupportedError(
            f"config.json: architectures is {short(architectures)}; family phi3_v reads ['{ARCHITECTURE}']"
        )
    for key in IMAGES:
        if not isinstance(config.get(key) or {}, dict):
            raise CheckpointError(f"config.json: {key} is {short(config[key])}; expected an object")
    spec = phi3.parse(text_config(config), generation_config, name)
    return replace(spec, images=IMAGE_TENSORS)
