"""What rounding each tensor costs: the KL divergence from the float model, predicted for every codec it may be in.

Rounding a linear's weight by dW moves its output at token t by d_t = dW x_t. To second order that costs a sequence
KL = 1/2 E (sum over t of g_t d_t)^2, where g_t is the gradient of log p(y) by the output at t, for y drawn from the
model itself: the Fisher information is both the KL's Hessian and the mean of g g^T (Martens, arXiv 1412.1193). What one
weight does to the tokens of a sequence belongs together; the outputs o of a linear count as independent:

    KL = 1/2 * sum over o of the mean over sequences of (sum over t of g_to * d_to)^2

The float model runs forward once over a few sequences, its hidden states kept in files, then backward block by block:
one block's weights, inputs and gradients are in memory, and of a mixture one expert's. dW is what the codec really
does, to a sample of the rows that is drawn by g^2.

An expert counts by the tokens that chose it, so that one that no token chose costs nothing: what its siblings cost
already is of all tokens, two experts each.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from phi3edge.cache import cache_dir
from phi3edge.centring import mixture_decoder
from phi3edge.codecs import codec, is_float
from phi3edge.errors import OutputError
from phi3edge.files import write_text
from phi3edge.forward import LINEARS, Basis, Decoder, Weights, load_block, load_outer, load_outside
from phi3edge.mixture import Mixture, MixtureDecoder
from phi3edge.mixture_backward import Backward
from phi3edge.phi3small import decoder_of
from phi3edge.progress import Stages, silent
from phi3edge.reference import fingerprint
from phi3edge.types import ModelSpec

SAMPLED_ROWS = 128
"""Rows of a weight that each codec rounds."""

JOINT = 1.35
"""Measured KL over the formula's, in the blocks and the embedding: what errors of one linear's outputs do together.
Between 1.14 and 1.57 for attn_qkv, attn_output, ffn_gate_up and ffn_down of the demo, at 3 and at 4 bits; the head's is
0.85 to 1, for each logit is its own."""

KEPT_BY_METHOD = {"gptq": 0.31}
"""Loss of a linear rounded by a method over that of rounding to nearest with a weighted search, where that is not 1. On
the demo, calibrated near to what was measured on: Q4_0 in all blocks 0.047 of 0.156; a mix for 134 MB 0.050, where
0.019 for the embedding, which no method calibrates, and 0.100 for the linears were predicted."""

_VERSION = 2  # of the kept losses; raise it whenever the same inputs give others

_LOGIT_TOKENS = 256  # computed at once: the widest array is of their logits


def kept_losses(
    checkpoint: Basis,
    spec: ModelSpec,
    ids: np.ndarray,
    codecs: Mapping[str, Sequence[str]],
    method: str,
    weighted: bool,
    device: str = "cpu",
    stages: Stages = silent,
) -> dict[str, dict[str, float]]:
    """What `predict_losses` predicts, for rounding by a method; kept in the cache.

    Raises:
        OutputError: the cache cannot be written.
    """
    basis = getattr(checkpoint, "basis", None)  # a checkpoint itself has none
    tried = sorted((tensor, tuple(names)) for tensor, names in codecs.items())
    said = repr((_VERSION, fingerprint(checkpoint.path), basis, ids.shape, ids.tobytes(), tried, weighted))
    kept = cache_dir() / "sensitivity" / f"{hashlib.sha256(said.encode()).hexdigest()[:32]}.json"
    if not kept.is_file():
        found = predict_losses(checkpoint, spec, ids, codecs, weighted, device, stages)
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"cannot keep what rounding costs in {kept.parent}: {error.strerror}",
                "PHI3EDGE_CACHE names another folder",
            ) from error
        write_text(kept, json.dumps(found))
    losses: dict[str, dict[str, float]] = json.loads(kept.read_text())
    share = {t.name: 1.0 if t.role == "embedding" else KEPT_BY_METHOD.get(method, 1.0) for t in spec.tensors}
    return {tensor: {c: share[tensor] * loss for c, loss in by_codec.items()} for tensor, by_codec in losses.items()}


def predict_losses(
    checkpoint: Basis,
    spec: ModelSpec,
    ids: np.ndarray,
    codecs: Mapping[str, Sequence[str]],
    weighted: bool = True,
    device: str = "cpu",
    stages: Stages = silent,
) -> dict[str, dict[str, float]]:
    """Predict the KL that each codec costs each tensor, rounded to nearest.

    Args:
        checkpoint: the opened checkpoint, in the basis in which it is rounded; `Centred` is computed as llama.cpp does.
        spec: the model.
        ids: token ids, int64, shape (sequences, tokens).
        codecs: the codecs to try, by the tensor's name; tensors without an entry are left out.
        weighted: whether the search of a linear's scales knows its inputs' mean squares.
        device: where to compute; a mixture of experts on the CPU only.
        stages: shows progress.

    Returns:
        Nats per token, by tensor name and codec.
    """
    run = _MixtureRun if spec.experts else _Run
    with tempfile.TemporaryDirectory(prefix="phi3edge-") as work, stages("sensitivity", 2 * spec.layers + 1) as advance:
        return run(checkpoint, spec, ids, codecs, weighted, Path(work), device).losses(advance)


class _Run:
    """One set of sequences on its way through the model and back."""

    def __init__(
        self,
        checkpoint: Basis,
        spec: ModelSpec,
        ids: np.ndarray,
        codecs: Mapping[str, Sequence[str]],
        weighted: bool,
        work: Path,
        device: str,
    ) -> None:
        self._checkpoint, self._spec, self._ids, self._codecs, self._work = checkpoint, spec, ids, codecs, work
        self._weighted = weighted
        self._device = torch.device(device)
        self._decoder = self._decoder_of(device)
        self._names = {(t.role, t.layer, t.expert): t.name for t in spec.tensors}

    def _decoder_of(self, device: str) -> Decoder:
        return decoder_of(self._spec, device)

    def losses(self, advance: Callable[[int], None]) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        with torch.no_grad():
            embedded = self._decoder.embed(load_outer(self._checkpoint, self._spec, "embedding")[self._ids])
            self._write(0, embedded)
            for layer in range(self._spec.layers):
                self._write(layer + 1, self._forward(layer))
                advance(1)
        gradient = self._head(found)
        advance(1)
        for layer in reversed(range(self._spec.layers)):
            gradient = self._block(layer, gradient, found)
            advance(1)
        self._embedding(gradient, found)
        return found

    def _forward(self, layer: int) -> Tensor:
        """The hidden states that come out of a block."""
        weights = load_block(self._checkpoint, self._spec, layer, self._device)
        return torch.cat([self._decoder.block(h[None], weights, layer=layer) for h in self._read(layer)])

    def _head(self, found: dict[str, dict[str, float]]) -> Tensor:
        """The head's losses, and the gradient of log p(y) by the last hidden states, (sequences, tokens, hidden)."""
        outer = load_outside(self._checkpoint, self._spec, self._device)
        weight, scale = outer["head"], self._spec.logit_scale
        drawn = torch.Generator(self._device).manual_seed(0)
        role = "embedding" if self._spec.tied else "head"
        energy = torch.zeros(len(weight), device=self._device)
        inputs, gradients = [], []
        for h in self._read(self._spec.layers).flatten(0, 1).split(_LOGIT_TOKENS):
            h = h.detach().requires_grad_()
            x = self._decoder.normed("output_norm", h, outer)
            p = self._decoder.logits(x.detach(), outer).softmax(-1)
            energy += (p * (1 - p)).sum(0) * scale**2
            y = p.multinomial(1, generator=drawn)
            by_logits = -p.scatter_add(1, y, -torch.ones_like(y, dtype=p.dtype))
            x.backward(by_logits @ weight * scale)
            inputs.append(x.detach())
            gradients.append(h.grad)
        x = torch.cat(inputs)

        def lost(rows: Tensor, d: Tensor) -> Tensor:  # E g^2 of a logit is known exactly, and it has one token
            parts = [self._decoder.logits(part, outer).softmax(-1)[:, rows] for part in x.split(_LOGIT_TOKENS)]
            p = torch.cat(parts)
            return (p * (1 - p) * (scale * d).square()).sum(0)

        self._measure(self._names[role, None, None], weight, x, energy, lost, found)
        return torch.cat(gradients).view(*self._ids.shape, -1)

    def _block(self, layer: int, gradient: Tensor, found: dict[str, dict[str, float]]) -> Tensor:
        """The losses of a block's linears, and the gradient by its input from that by its output."""
        weights = load_block(self._checkpoint, self._spec, layer, self._device)
        inputs: dict[str, list[Tensor]] = {role: [] for role in LINEARS}
        outputs: dict[str, list[Tensor]] = {role: [] for role in LINEARS}
        before = []
        for h, after in zip(self._read(layer), gradient, strict=True):
            h = h[None].detach().requires_grad_()
            seen: dict[str, tuple[Tensor, Tensor]] = {}
            self._traced(h, weights, seen, layer).backward(after[None])
            for role, (x, y) in seen.items():
                inputs[role].append(x.detach()[0])
                outputs[role].append(y.grad[0])
            before.append(h.grad)
        for role in LINEARS:
            x, g = torch.stack(inputs.pop(role)), torch.stack(outputs.pop(role))

            def lost(rows: Tensor, d: Tensor, g: Tensor = g) -> Tensor:
                return JOINT * (g[..., rows] * d).sum(1).square().sum(0)

            energy = g.square().sum((0, 1))
            self._measure(self._names[role, layer, None], weights[role], x, energy, lost, found)
        return torch.cat(before)

    def _traced(self, h: Tensor, weights: Weights, seen: dict[str, tuple[Tensor, Tensor]], layer: int) -> Tensor:
        """Decoder.block, with each linear's input and output kept; the outputs get gradients."""

        def apply(role: str, x: Tensor) -> Tensor:
            y = self._decoder.apply(role, x, weights)
            y.retain_grad()
            seen[role] = x, y
            return y

        decoder = self._decoder
        x = decoder.attend(apply("attn_qkv", decoder.normed("attn_norm", h, weights)), layer)
        h = h + apply("attn_output", x)
        x = decoder.gate(apply("ffn_gate_up", decoder.normed("ffn_norm", h, weights)))
        return h + apply("ffn_down", x)

    def _embedding(self, gradient: Tensor, found: dict[str, dict[str, float]]) -> None:
        """The embedding's losses: each row counts as often as its token comes."""
        name = self._names["embedding", None, None]
        table = load_outer(self._checkpoint, self._spec, "embedding")
        sequences = np.arange(len(self._ids))[:, None] * self._spec.vocab_size
        kinds, places = torch.from_numpy((sequences + self._ids).reshape(-1)).unique(return_inverse=True)
        g = torch.zeros(len(kinds), self._spec.hidden_size)
        g.index_add_(0, places, gradient.flatten(0, 1).cpu())  # of a token in a sequence, wherever it comes
        g *= self._spec.embedding_scale
        tokens, places = (kinds % self._spec.vocab_size).unique(return_inverse=True)
        rows = table[tokens].numpy()
        for tried in self._codecs.get(name, ()):
            d = torch.from_numpy(_error(rows, tried, None))[places]
            lost = JOINT * float((g * d).square().sum()) / (2 * self._ids.size)
            found.setdefault(name, {}).setdefault(tried, 0.0)
            found[name][tried] += lost

    def _measure(
        self,
        name: str,
        weight: Tensor,
        x: Tensor,
        energy: Tensor,
        lost: Callable[[Tensor, Tensor], Tensor],
        found: dict[str, dict[str, float]],
    ) -> None:
        """Losses of one linear with each of its codecs.

        Args:
            name: of its tensor.
            weight: (rows, columns).
            x: its inputs, (..., columns).
            energy: sum of g^2 over the tokens, (rows,).
            lost: gives twice the loss, summed over all tokens, from some rows and their d, (..., rows).
            found: where the losses go.
        """
        tried = self._codecs.get(name, ())
        if not tried:
            return
        rows, shares = _draw(energy, SAMPLED_ROWS)
        important = x.square().flatten(0, -2).mean(0).cpu().numpy() if self._weighted else None
        chosen = weight[rows].cpu().numpy()
        for one in tried:
            dw = torch.from_numpy(_error(chosen, one, important)).to(x.device)
            found.setdefault(name, {})[one] = float(lost(rows, linear(x, dw)) @ shares) / (2 * self._ids.size)

    def _write(self, layer: int, h: Tensor) -> None:
        np.save(self._work / f"hidden-{layer}.npy", h.cpu().numpy())

    def _read(self, layer: int) -> Tensor:
        """Hidden states that go into a block, (sequences, tokens, hidden)."""
        return torch.from_numpy(np.load(self._work / f"hidden-{layer}.npy")).to(self._device)


class _MixtureRun(_Run):
    """The same for a mixture of experts, of whose weights those of one expert are in memory at a time."""

    _decoder: MixtureDecoder

    def _decoder_of(self, device: str) -> MixtureDecoder:
        return mixture_decoder(self._checkpoint, self._spec, device)

    def losses(self, advance: Callable[[int], None]) -> dict[str, dict[str, float]]:
        unseen = {tensor: dict.fromkeys(tried, 0.0) for tensor, tried in self._codecs.items()}
        return unseen | super().losses(advance)

    def _forward(self, layer: int) -> Tensor:
        return Mixture(self._checkpoint, self._spec, False, self._decoder).block(self._read(layer), layer)[0]

    def _block(self, layer: int, gradient: Tensor, found: dict[str, dict[str, float]]) -> Tensor:
        def watch(role: str, expert: int | None, weight: Tensor, x: Tensor, g: Tensor, sequences: Tensor) -> None:
            def lost(rows: Tensor, d: Tensor) -> Tensor:
                sums = torch.zeros(len(self._ids), len(rows)).index_add_(0, sequences, g[:, rows] * d)
                return JOINT * sums.square().sum(0)

            self._measure(self._names[role, layer, expert], weight, x, g.square().sum(0), lost, found)

        backward = Backward(self._checkpoint, self._spec, self._decoder)
        return backward.block(self._read(layer), layer, gradient, watch)


def _draw(energy: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Rows in proportion to their energy, evenly spaced in its running sum, and how many rows each stands for."""
    if count >= len(energy):
        return torch.arange(len(energy), device=energy.device), torch.ones_like(energy)
    running = energy.double().cumsum(0)
    points = (torch.arange(count, dtype=torch.float64, device=energy.device) + 0.5) / count * running[-1]
    rows, counts = torch.searchsorted(running, points).unique(return_counts=True)
    return rows, (counts / count * running[-1] / energy[rows]).to(energy.dtype)


def _error(rows: np.ndarray, name: str, importance: np.ndarray | None) -> np.ndarray:
    """What a codec makes of rows, less the rows themselves."""
    module = codec(name)
    return module.dequantize(module.quantize(rows, None if is_float(name) else importance)) - rows
