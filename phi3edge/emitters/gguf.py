"""Writes a GGUF file that llama.cpp runs as architecture `phi3` or `phimoe`.

Keys, names and shapes are those of llama.cpp's own converter; where it is known to go wrong, this goes another way:

`general.name`. A GGUF file has no key for the whitespace flags of special tokens. llama.cpp (llama-vocab.cpp) derives
them from the name: with "phi-3" or "phi3" in it, in any case, every special token but <unk>, <s> and <|endoftext|>
swallows the spaces and newlines after it, and the tokens in RULE_TOKENS must exist ("unordered_map::at" otherwise).
Phi-3's tokenizer declares just that (rstrip), so a chat prompt gets other ids where the rule is missed, as it is under
the converter's spelling "Phi 3 Mini 4k Instruct". Here the flags decide and the name follows: `model_name`. Those of
Phi-3-vision swallow after <|assistant|>, not after <|user|> and <|end|>: there the name turns the rule off, and the
chat template leaves out what would be swallowed: `chat_template`.

End of generation. llama.cpp ends a generation at the ids of a few keys and at tokens with well-known texts. A
checkpoint may list more ids (Phi-3: <|endoftext|>, <|assistant|>, <|end|>) than the converter's one: `end_ids`.

Experts. A layer's experts are one tensor for each of gate, up and down, expert after expert: a `Stack`. The attention
factor of `phimoe` is the checkpoint's own mscale, for which the converter writes a formula's. What llama.cpp computes
otherwise than the model is made up for in the weights: phi3edge.centring.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from phi3edge.codecs import codec, is_float
from phi3edge.emitters import Job, Stream, WrittenFile
from phi3edge.emitters._partial_file import PartialFile, next_tensor
from phi3edge.errors import CheckpointError, UnsupportedError, UsageError
from phi3edge.gguf_file import DEFAULT_ALIGNMENT, ValueType, write_header
from phi3edge.gguf_names import tensor_name
from phi3edge.tokenizer import AddedToken, Vocabulary, load_tokenizer
from phi3edge.types import JSON, ModelSpec, QuantPlan, Source, TensorPlan

ARCHITECTURES = ("phi3", "phimoe")
"""Families that llama.cpp has an architecture for, of the same name."""

QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION: the layout of the blocks

SPECIAL_KEYS = {"unk": "unknown", "sep": "seperator", "pad": "padding"}  # the second one is GGUF's spelling

RULE_NAMES = re.compile("(phi)-?3", re.IGNORECASE)
RULE_TOKENS = ("</s>", "<unk>", "<s>", "<|endoftext|>")
RULE_EXEMPT = ("<unk>", "<s>", "<|endoftext|>")

END_KEYS = ("eot", "eom", "fim_pad")  # each holds one id more; the last ends a generation and does nothing else
END_OF_TURN = ("<|end|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>")
END_TEXTS = frozenset(  # what llama.cpp takes for an end by its text: the list in src/llama-vocab.cpp
    {*END_OF_TURN, "</s>", "<|endoftext|>", "<|end_of_text|>", "<end_of_utterance>", "<|return|>", "<|call|>"}
    | {"<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]"}
)

SAMPLING = {
    "sequence": ("sequence", ValueType.STRING),
    "top_k": ("top_k", ValueType.INT32),
    "top_p": ("top_p", ValueType.FLOAT32),
    "min_p": ("min_p", ValueType.FLOAT32),
    "xtc_probability": ("xtc_probability", ValueType.FLOAT32),
    "xtc_threshold": ("xtc_threshold", ValueType.FLOAT32),
    "temperature": ("temp", ValueType.FLOAT32),
    "penalty_last_n": ("penalty_last_n", ValueType.INT32),
    "repetition_penalty": ("penalty_repeat", ValueType.FLOAT32),
    "penalty_repeat": ("penalty_repeat", ValueType.FLOAT32),  # wins over the one before
    "mirostat": ("mirostat", ValueType.INT32),
    "mirostat_tau": ("mirostat_tau", ValueType.FLOAT32),
    "mirostat_eta": ("mirostat_eta", ValueType.FLOAT32),
}
"""Key and kind under `general.sampling` by generation_config.json's key."""

Metadata = dict[str, tuple[ValueType, Any]]


class Emitter:
    """Writes a GGUF file, or numbered parts of one; see phi3edge.emitters.Emitter.

    Raises:
        UnsupportedError: a model or tokenizer that llama.cpp's architectures cannot hold.
        CheckpointError: a tokenizer that cannot be read.
    """

    requires: dict[str, str] = {}

    def __init__(self, job: Job) -> None:
        self._job = job
        self._vocabulary = load_tokenizer(job.checkpoint.path, job.plan.model)
        self.notes = notes(job.plan.model, self._vocabulary)

    @property
    def total_bytes(self) -> int:
        """What the files will take, headers included."""
        job = self._job
        shared = metadata(
            job.plan,
            job.checkpoint.source,
            self._vocabulary,
            file_type=self._file_type,
            context_length=written_context(job.plan.model, job.context),
            generation_config=job.checkpoint.generation_config,
        )
        headers = _headers(job.plan, shared, _shards(job.plan, shared, job.split_max_size))
        tensors = sum(_padded(stack.bytes) for stack in stacks(job.plan))
        return sum(map(len, headers)) + tensors + _constant_bytes(job.plan.model)

    @property
    def _file_type(self) -> int | None:
        imported = any(t.method == "imported" for t in self._job.plan.tensors)  # then it is no mix that llama.cpp knows
        return None if imported else self._job.recipe.gguf_file_type

    def emit(self, stream: Stream, folder: Path, on_bytes: Callable[[int], None] | None = None) -> list[WrittenFile]:
        """Write `<name>.gguf` or its parts; see `write`."""
        job = self._job
        return write(
            job.plan,
            job.checkpoint.source,
            self._vocabulary,
            stream,
            folder,
            job.name,
            file_type=self._file_type,
            context_length=written_context(job.plan.model, job.context),
            generation_config=job.checkpoint.generation_config,
            split_max_size=job.split_max_size,
            on_bytes=on_bytes,
        )


def write(
    plan: QuantPlan,
    source: Source,
    vocabulary: Vocabulary,
    stream: Stream,
    folder: Path,
    name: str,
    *,
    file_type: int | None,
    context_length: int | None = None,
    generation_config: JSON | None = None,
    split_max_size: int | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> list[WrittenFile]:
    """Write `<name>.gguf`, or `<name>-00001-of-0000N.gguf` and so on, in one pass.

    The data goes to hidden neighbours of the files, which get their names once everything is on the disk; whatever
    interrupts that, nothing stays that looks finished, and what was there before stays as it was.

    Args:
        plan: what is written, and in which order.
        source: where the checkpoint came from.
        vocabulary: its tokenizer.
        folder: where the files go; made if it is missing.
        name: of the file, without its suffix.
        stream: each tensor of the plan, in the plan's order, with its packed rows: C-contiguous buffers of bytes
            (uint8 arrays, say) that nobody changes afterwards.
        file_type: llama.cpp's number of the mix (llama_ftype), for people and tools; None leaves it out.
        context_length: written as the model's context length instead of the checkpoint's.
        generation_config: the checkpoint's, whose settings for sampling llama.cpp's programs take as their defaults.
        split_max_size: files are at most this large, in bytes, headers included; None writes one file.
        on_bytes: called with the number of bytes of each buffer once it is written.

    Returns:
        The files, in the order of their numbers; llama.cpp loads the first.

    Raises:
        OutputError: the disk is full, or the folder cannot be written.
        UsageError: a tensor that is larger than `split_max_size`.
        CheckpointError: a setting for sampling that is not of its kind.
        UnsupportedError: a model that llama.cpp's architectures cannot hold.
    """
    shared = metadata(
        plan,
        source,
        vocabulary,
        file_type=file_type,
        context_length=context_length,
        generation_config=generation_config,
    )
    shards = _shards(plan, shared, split_max_size)
    names = _file_names(name, len(shards))
    tensors = iter(stream)
    with ExitStack() as stack:
        files: list[PartialFile] = []
        for shard, header, file_name in zip(shards, _headers(plan, shared, shards), names, strict=True):
            file = stack.enter_context(PartialFile(folder / file_name))
            file.write(header)
            for _, data in constants(plan.model) if not files else ():
                file.write(data)
                file.write(bytes(_padded(len(data)) - len(data)))
            for held in shard:
                _write_stack(file, held, tensors, on_bytes)
            file.close()
            files.append(file)
        if (extra := next(tensors, None)) is not None:
            raise RuntimeError(f"expected no tensor after the plan's last, got {extra[0].tensor.name!r}")
        # The first file last: llama.cpp starts from it, so a set without it does not load.
        for file in reversed(files):
            file.publish()
    return [WrittenFile(file.path, file.bytes, file.sha256) for file in files]


def metadata(
    plan: QuantPlan,
    source: Source,
    vocabulary: Vocabulary,
    *,
    file_type: int | None,
    context_length: int | None = None,
    generation_config: JSON | None = None,
) -> Metadata:
    """The key-value pairs of the file, in the order in which they are written.

    Raises:
        UnsupportedError: a model that llama.cpp's architectures cannot hold.
        CheckpointError: a setting for sampling that is not of its kind.
    """
    spec = plan.model
    architecture = spec.family
    if architecture not in ARCHITECTURES:
        raise UnsupportedError(f"llama.cpp has no architecture for family {architecture}")
    if any(t.codec == "f16" for t in plan.tensors if t.tensor.role == "router"):
        raise UnsupportedError(
            "a router is too small for f16 as llama.cpp needs it", "give role router f32 in the recipe"
        )
    if spec.heads * spec.head_dim != spec.hidden_size:
        raise UnsupportedError(
            f"llama.cpp's {architecture} needs heads * head_dim = hidden_size, got {spec.heads} * {spec.head_dim}"
            f" and {spec.hidden_size}"
        )
    u32, f32, text, boolean = ValueType.UINT32, ValueType.FLOAT32, ValueType.STRING, ValueType.BOOL
    pairs: Metadata = {
        "general.architecture": (text, architecture),
        "general.type": (text, "model"),
        "general.name": (text, model_name(spec.name, vocabulary)),
        "general.size_label": (text, size_label(spec.parameters)),
    }
    pairs |= _origin(source)
    pairs |= _sampling(generation_config or {})
    pairs |= {
        f"{architecture}.context_length": (u32, context_length or spec.context_length),
        f"{architecture}.rope.scaling.original_context_length": (u32, spec.original_context_length),
        f"{architecture}.embedding_length": (u32, spec.hidden_size),
        f"{architecture}.feed_forward_length": (u32, spec.intermediate_size),
        f"{architecture}.block_count": (u32, spec.layers),
        f"{architecture}.attention.head_count": (u32, spec.heads),
        f"{architecture}.attention.head_count_kv": (u32, spec.kv_heads),
        f"{architecture}.attention.layer_norm_rms_epsilon": (f32, spec.norm_eps),
        f"{architecture}.rope.dimension_count": (u32, spec.rope.dim),
        f"{architecture}.rope.freq_base": (f32, spec.rope.theta),
    }
    if spec.experts:
        pairs[f"{architecture}.expert_count"] = (u32, spec.experts.count)
        pairs[f"{architecture}.expert_used_count"] = (u32, spec.experts.used)
    if file_type is not None:
        pairs["general.file_type"] = (u32, file_type)
    if spec.rope.by_length:
        pairs[f"{architecture}.rope.scaling.attn_factor"] = (f32, spec.rope.attention_factor)
    pairs[f"{architecture}.attention.sliding_window"] = (u32, spec.sliding_window or 0)
    if any(not is_float(t.codec) for t in plan.tensors):
        pairs["general.quantization_version"] = (u32, QUANTIZATION_VERSION)

    pairs["tokenizer.ggml.model"] = (text, vocabulary.model)
    pairs["tokenizer.ggml.pre"] = (text, vocabulary.pre)
    pairs["tokenizer.ggml.tokens"] = (text, vocabulary.tokens)
    if vocabulary.scores:
        pairs["tokenizer.ggml.scores"] = (f32, vocabulary.scores)
    pairs["tokenizer.ggml.token_type"] = (ValueType.INT32, vocabulary.types)
    if vocabulary.merges:
        pairs["tokenizer.ggml.merges"] = (text, vocabulary.merges)
    ids = vocabulary.special_ids | end_ids(spec, vocabulary)
    for kind, index in ids.items():
        pairs[f"tokenizer.ggml.{SPECIAL_KEYS.get(kind, kind)}_token_id"] = (u32, index)
    pairs["tokenizer.ggml.add_bos_token"] = (boolean, vocabulary.add_bos)
    pairs["tokenizer.ggml.add_eos_token"] = (boolean, vocabulary.add_eos)
    if vocabulary.model == "llama" and not vocabulary.add_space_prefix:
        pairs["tokenizer.ggml.add_space_prefix"] = (boolean, False)
    if vocabulary.other_templates:
        pairs["tokenizer.chat_templates"] = (text, sorted(map(_template_name, vocabulary.other_templates)))
        for template, body in sorted(vocabulary.other_templates.items()):
            pairs[f"tokenizer.chat_template.{_template_name(template)}"] = (text, body)
    if vocabulary.chat_template is not None:
        pairs["tokenizer.chat_template"] = (text, chat_template(vocabulary))
    return pairs


def constants(spec: ModelSpec) -> list[tuple[str, bytes]]:
    """Tensors that are no weights: LongRoPE's factors, float32, shape (rotated channels / 2,)."""
    rope = spec.rope
    lists = (("rope_factors_long", rope.long_factors), ("rope_factors_short", rope.short_factors))
    return [(f"{name}.weight", np.array(factors, "<f4").tobytes()) for name, factors in lists if factors is not None]


def written_context(spec: ModelSpec, context: int) -> int | None:
    """The context length to write for an artifact that shall hold `context` tokens; None for the checkpoint's.

    It is what llama.cpp opens a file with by default. It takes LongRoPE's factors once, by the size of that context,
    and ignores an attention window: for a target within the original context or the window, that is what is written.
    """
    exact = [spec.original_context_length] if spec.rope.by_length else []
    exact += [spec.sliding_window] if spec.sliding_window is not None else []
    return min((end for end in exact if context <= end < spec.context_length), default=None)


def notes(spec: ModelSpec, vocabulary: Vocabulary) -> list[str]:
    """One line for everything about the tokenizer that the file cannot say; for the plan and the report."""
    found = list(vocabulary.notes)
    rule = _applies_rule(vocabulary)
    wrong = [t.content for t in vocabulary.added if t.rstrip != (rule and _rule_strips(t))]
    if wrong:
        state, more = "on" if rule else "off", f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        which = ", ".join(wrong[:8]) + more
        note = f"llama.cpp has rstrip on or off for all special tokens; {state} is wrong for {which}"
        if made_up := _stripped_in_chat(vocabulary):
            note += f"; the chat template makes up for {', '.join(made_up)}"
        found.append(note)
    written = end_ids(spec, vocabulary).values()
    for index in spec.eos_token_ids:
        token = vocabulary.tokens[index]
        if index not in written and token not in END_TEXTS:
            found.append(f"generation does not stop at {token!r} (id {index}): a GGUF file has no key left for it")
    return found


def model_name(name: str, vocabulary: Vocabulary) -> str:
    """The name to write, which contains "Phi-3" exactly if llama.cpp's rule for it suits the vocabulary.

    >>> model_name("my-fine-tune", phi3_vocabulary)
    'my-fine-tune (Phi-3)'
    >>> model_name("phi-3-with-other-words", other_vocabulary)
    'phi 3-with-other-words'
    """
    if _applies_rule(vocabulary):
        return name if RULE_NAMES.search(name) else f"{name} (Phi-3)"
    return RULE_NAMES.sub(r"\1 3", name)


def chat_template(vocabulary: Vocabulary) -> str | None:
    """The chat template, which leaves out the white space that the tokenizer swallows and llama.cpp would not.

    A chat's token ids stay what they were: the tokenizer's own, of either template.
    """
    template = vocabulary.chat_template
    for token in _stripped_in_chat(vocabulary):
        quoted = json.dumps(token)
        template = (
            f"{{% set chat %}}{template}{{% endset %}}{{% for part in chat.split({quoted}) %}}"
            f"{{{{ part if loop.first else {quoted} + part.lstrip() }}}}{{% endfor %}}"
        )
    return template


def _stripped_in_chat(vocabulary: Vocabulary) -> list[str]:
    """Tokens of the chat template that swallow the white space after them, where llama.cpp has that off."""
    if _applies_rule(vocabulary):
        return []
    return [t.content for t in vocabulary.added if t.rstrip and t.content in (vocabulary.chat_template or "")]


def _applies_rule(vocabulary: Vocabulary) -> bool:
    """Whether llama.cpp's rule gives the special tokens the flags that the tokenizer declares.

    All of them for Phi-3. Where a fine-tune added tokens with other flags neither way is right for all; then those in
    the chat template count, since every prompt has them.
    """
    if not set(RULE_TOKENS) <= set(vocabulary.tokens):
        return False
    in_chat = [t for t in vocabulary.added if t.content in (vocabulary.chat_template or "")]
    counted = in_chat or vocabulary.added
    return sum(t.rstrip != _rule_strips(t) for t in counted) < sum(t.rstrip for t in counted)


def _rule_strips(token: AddedToken) -> bool:
    return token.content not in RULE_EXEMPT


def end_ids(spec: ModelSpec, vocabulary: Vocabulary) -> dict[str, int]:
    """Ids that end a generation, by the kind of their key: "eos" first, then END_KEYS.

    The tokenizer's own EOS stays "eos" if the checkpoint's list has it. "eot" goes to a token that is known to end a
    turn, be it EOS: without the key llama.cpp picks one of several by chance. Tokens that llama.cpp recognizes by
    their text take a key only if one is left.
    """
    ids = list(dict.fromkeys(spec.eos_token_ids))
    if not ids:
        return {}
    eos = vocabulary.special_ids.get("eos")
    found = {"eos": eos if eos in ids else ids[0]}
    turn_ends = [index for index in ids if vocabulary.tokens[index] in END_OF_TURN]
    if turn_ends:
        found["eot"] = turn_ends[0]
    rest = [index for index in ids if index not in found.values()]
    rest.sort(key=lambda index: vocabulary.tokens[index] in END_TEXTS)  # stable: unrecognized ones first
    return found | dict(zip((key for key in END_KEYS if key not in found), rest, strict=False))


def size_label(parameters: int) -> str:
    """Number of weights in the form of GGUF's naming convention: 3.8B, 135M."""
    for scale, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if parameters >= scale or suffix == "K":
            break
    digits = max(2 - len(str(round(parameters / scale)).lstrip("0")), 0)
    return f"{parameters / scale:.{digits}f}{suffix}"


def _origin(source: Source) -> Metadata:
    """Licence, repository and revision; `general.base_model` is where model pages look for them."""
    text = ValueType.STRING
    pairs: Metadata = {}
    if source.licence:
        pairs["general.license"] = (text, source.licence)
    if source.repository and "/" in source.repository:
        owner, _, repository = source.repository.partition("/")
        url = f"https://huggingface.co/{source.repository}"
        pairs["general.source.url"] = (text, f"{url}/tree/{source.revision}" if source.revision else url)
        pairs["general.source.repo_url"] = (text, url)
        pairs["general.base_model.count"] = (ValueType.UINT32, 1)
        pairs["general.base_model.0.name"] = (text, repository)
        if source.revision:
            pairs["general.base_model.0.version"] = (text, source.revision)
        pairs["general.base_model.0.organization"] = (text, owner)
        pairs["general.base_model.0.repo_url"] = (text, url)
    return pairs


def _sampling(generation_config: JSON) -> Metadata:
    """Settings for sampling that are neither null nor empty. Like the converter, this does not look at `do_sample`."""
    pairs: Metadata = {}
    found = {SAMPLING[key]: key for key in SAMPLING if key in generation_config}
    for (name, kind), key in found.items():
        value = generation_config[key]
        if value is None:
            continue
        if kind is ValueType.STRING:
            fits, expected = isinstance(value, str), "a string"
        elif kind is ValueType.INT32:
            fits, expected = type(value) is int and -(2**31) <= value < 2**31, "an integer of 32 bits"
        else:
            fits, expected = type(value) in (int, float) and abs(value) < 3.4e38, "a finite number"
        if not fits:
            raise CheckpointError(
                f"generation_config.json: {key} is {value!r:.60}; expected {expected}", f"correct or remove {key} there"
            )
        if value != "":
            pairs[f"general.sampling.{name}"] = (kind, value)
    return pairs


def _template_name(name: str) -> str:
    return re.sub("[^a-zA-Z0-9]", "_", name)


# Files


@dataclass(frozen=True, slots=True)
class Stack:
    """A tensor of the file: one of the plan's, or all experts of one role and layer.

    Attributes:
        tensors: what it holds, in the order of the data; all in one codec, all of one shape.
    """

    tensors: tuple[TensorPlan, ...]

    @property
    def name(self) -> str:
        """In the file."""
        return tensor_name(self.tensors[0].tensor)

    @property
    def bytes(self) -> int:
        """Size of its data."""
        return sum(t.bytes for t in self.tensors)

    @property
    def record(self) -> tuple[str, int, tuple[int, ...], int]:
        """Name, ggml type, shape and bytes, for the header."""
        first = self.tensors[0]
        count = () if first.tensor.expert is None else (len(self.tensors),)
        return self.name, codec(first.codec).GGML_TYPE, (*count, *first.tensor.shape), self.bytes


def stacks(plan: QuantPlan) -> list[Stack]:
    """The tensors of the file, in order.

    Raises:
        UnsupportedError: experts of one layer in several codecs, which one tensor cannot hold.
    """
    found = [Stack(tuple(group)) for _, group in groupby(plan.tensors, key=lambda t: tensor_name(t.tensor))]
    for stack in found:
        if len(codecs := sorted({t.codec for t in stack.tensors})) > 1:
            raise UnsupportedError(f"{stack.name} is one tensor for all experts; it cannot be {' and '.join(codecs)}")
    return found


def _file_names(name: str, count: int) -> list[str]:
    if count == 1:
        return [f"{name}.gguf"]
    return [f"{name}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]


def _split_keys(number: int, count: int, tensors: int) -> Metadata:
    if count == 1:
        return {}
    return {
        "split.no": (ValueType.UINT16, number),
        "split.count": (ValueType.UINT16, count),
        "split.tensors.count": (ValueType.INT32, tensors),
    }


def _shards(plan: QuantPlan, shared: Metadata, limit: int | None) -> list[list[Stack]]:
    """The file's tensors by part, in order, each part filled as far as its limit allows."""
    found = stacks(plan)
    if limit is None:
        return [found]
    extra = constants(plan.model)
    room = [
        limit - len(_header(shared | _split_keys(0, 2, 0), found, extra)) - _constant_bytes(plan.model),
        limit - len(_header(_split_keys(0, 2, 0), found)),
    ]
    largest = max(found, key=lambda stack: stack.bytes)
    if _padded(largest.bytes) > min(room):
        raise UsageError(
            f"{largest.name} has {largest.bytes} bytes, which does not fit into files of {limit} bytes",
            f"allow files of {limit - min(room) + _padded(largest.bytes)} bytes or more",
        )
    number = used = 0
    numbered = []
    for stack in found:
        size = _padded(stack.bytes)
        if used + size > room[min(number, 1)]:
            number, used = number + 1, 0
        used += size
        numbered.append((number, stack))
    return [[stack for _, stack in group] for _, group in groupby(numbered, key=lambda pair: pair[0])]


def _headers(plan: QuantPlan, shared: Metadata, shards: list[list[Stack]]) -> list[bytes]:
    """Each file's header; the shared pairs and the constants are in the first."""
    extra = constants(plan.model)
    count = sum(map(len, shards)) + len(extra)
    rest = [_header(_split_keys(n, len(shards), count), shard) for n, shard in enumerate(shards) if n]
    return [_header(shared | _split_keys(0, len(shards), count), shards[0], extra), *rest]


def _header(pairs: Metadata, found: Sequence[Stack], extra: Sequence[tuple[str, bytes]] = ()) -> bytes:
    header = io.BytesIO()
    records = [(name, codec("f32").GGML_TYPE, (len(data) // 4,), len(data)) for name, data in extra]
    write_header(header, pairs, [*records, *(stack.record for stack in found)])
    return header.getvalue()


def _constant_bytes(spec: ModelSpec) -> int:
    return sum(_padded(len(data)) for _, data in constants(spec))


def _padded(size: int) -> int:
    return -(-size // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


def _write_stack(file: PartialFile, stack: Stack, tensors: Any, on_bytes: Callable[[int], None] | None) -> None:
    """Write the next tensors of the stream, which must be those of the stack, and pad it."""
    for expected in stack.tensors:
        size = 0
        for chunk in next_tensor(tensors, expected):
            written = file.write(chunk)
            size += written
            if on_bytes is not None:
                on_bytes(written)
        if size != expected.bytes:
            raise RuntimeError(f"tensor {expected.tensor.name!r}: expected {expected.bytes} bytes, got {size}")
    file.write(bytes(_padded(stack.bytes) - stack.bytes))
