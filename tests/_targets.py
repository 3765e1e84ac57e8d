"""A target file of a user's own."""

from pathlib import Path

TEMPLATE = """
summary = "a toaster"
formats = {{ gguf = {{ name = "llama.cpp", recipe = "q8_0", kv_cache = "f16" }} }}
context = 512
gates = {{ {gates} }}

[memory]
device = "1 GB"
app = "{app}"
source = "its manual"

[bandwidth]
gb_per_s = 1
source = "its manual"
"""


def write_target(path: Path, app: str = "1 GB", gates: str = "") -> Path:
    """A target with this much memory for the app, and these gates."""
    path.write_text(TEMPLATE.format(app=app, gates=gates))
    return path
