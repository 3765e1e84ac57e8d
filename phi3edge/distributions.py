"""Next-token distributions kept light: the most likely tokens exactly, the rest by its mass and a few drawn from it.

A vocabulary of 32,064 log-probabilities a token is 64 kB, and wikitext-2's test text 11 GB; kept like this a token
takes 1 kB. What is kept is enough to hold any other distribution q against it, given all of q:

    KL(p || q) = sum over tokens of p log(p / q) + q - p        (the sums of q and of p are both 1)

whose terms are all at least 0. The TOP likeliest tokens' terms are computed as they are, and the rest's, whose mass is
P, as P times the mean of log(p / q) + q / p - 1 over DRAWN tokens drawn from it in proportion to p: an estimate without
bias (J. Schulman, "Approximating KL divergence", 2020, estimator k3), whose standard error the drawn tokens tell. A
term that is 0 where p = q and never negative also makes the rounding of what is kept a matter of its square.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_NAMES = ("tokens", "surprisals", "rest")
TOP, DRAWN = 192, 64
"""Tokens kept exactly, and tokens drawn from the rest."""

_STEPS = 2048  # to a nat: what is kept of a log-probability is off by at most 1/4096; of float16 it could be 1/256


@dataclass(frozen=True, slots=True)
class Distributions:
    """Distributions of many rows.

    Attributes:
        tokens: uint16 or uint32, shape (..., TOP + DRAWN): ids, the likeliest first, then those drawn from the rest.
        surprisals: uint16, the same shape: -log p, in steps of 1/2048 nat; 32 nats stand for all more.
        rest: float32, shape (...): mass of all but the TOP.
    """

    tokens: np.ndarray
    surprisals: np.ndarray
    rest: np.ndarray

    def __getitem__(self, at: Any) -> Distributions:
        """Some rows: an index of the leading axes."""
        return Distributions(self.tokens[at], self.surprisals[at], self.rest[at])

    @property
    def top1(self) -> np.ndarray:
        """The most likely token, shape (...)."""
        return self.tokens[..., 0].astype(np.int64)

    def copy(self) -> Distributions:
        """The same, in memory of its own."""
        return Distributions(np.array(self.tokens), np.array(self.surprisals), np.array(self.rest))

    def likeliest(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The likeliest tokens and their probabilities, both of shape (..., at most count), the first first."""
        return self.tokens[..., :count].astype(np.int64), np.exp(self.surprisals[..., :count] / -float(_STEPS))

    def kl(self, log_probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """KL(these || others), of two-dimensional rows.

        Args:
            log_probs: the others' log-probabilities, float32, shape (rows, vocabulary).

        Returns:
            Nats a row, float64, shape (rows,); and the variance that drawing tokens causes in each.
        """
        top = np.minimum(TOP, self.tokens.shape[-1])
        q = np.take_along_axis(log_probs, self.tokens.astype(np.int64), -1).astype(np.float64)
        p = self.surprisals / -float(_STEPS)
        head = np.exp(p[:, :top])
        rest = self.rest.astype(np.float64)
        shift = np.log((1 - rest) / head.sum(-1))[:, None]  # what rounding took from the sum
        head, ratio = head * np.exp(shift), q - p
        ratio[:, :top] -= shift
        terms = np.expm1(ratio) - ratio  # q / p - 1 - log(q / p)
        exact = (head * terms[:, :top]).sum(-1)
        if terms.shape[-1] == top:  # a vocabulary that is kept whole
            return exact, np.zeros_like(exact)
        drawn = terms[:, top:]
        mean = drawn.mean(-1)
        error = np.square(drawn - np.where(np.isfinite(mean), mean, 0)[:, None]).sum(-1) / (DRAWN - 1) / DRAWN
        return exact + rest * mean, rest**2 * np.where(np.isfinite(mean), error, 0)


def keep(log_probs: np.ndarray, random: np.random.Generator) -> Distributions:
    """Keep distributions.

    Args:
        log_probs: float32, shape (rows, vocabulary).
        random: draws the tokens: one number a row, for they are drawn evenly spaced along the rest's mass.
    """
    rows, vocabulary = log_probs.shape
    top = min(TOP, vocabulary)
    found = np.argpartition(log_probs, vocabulary - top, -1)[:, vocabulary - top :]
    values = np.take_along_axis(log_probs, found, -1)
    order = np.argsort(-values, -1, kind="stable")
    tokens = np.take_along_axis(found, order, -1)
    rest = np.zeros(rows, np.float32)
    if top < vocabulary:
        mass = np.exp(log_probs, dtype=np.float64)
        np.put_along_axis(mass, tokens, 0.0, -1)
        below = mass.cumsum(-1)
        rest = below[:, -1].astype(np.float32)
        at = (np.arange(DRAWN) + random.random((rows, 1))) / DRAWN * below[:, -1:]
        drawn = np.stack([np.searchsorted(b, a, "right") for b, a in zip(below, at, strict=True)])
        tokens = np.concatenate([tokens, np.minimum(drawn, vocabulary - 1)], -1)
    surprisals = np.minimum(np.rint(-_STEPS * np.take_along_axis(log_probs, tokens, -1)), 2**16 - 1)
    return Distributions(tokens.astype(_ids(vocabulary)), surprisals.astype(np.uint16), rest)


class Keeper:
    """Writes distributions into three files of a folder, row by row in order; a context manager.

    Args:
        folder: where they go.
        shape: (chunks, rows) of what will be added.
        vocabulary: tokens of it.
    """

    def __init__(self, folder: Path, shape: tuple[int, int], vocabulary: int) -> None:
        width = TOP + DRAWN if vocabulary > TOP else vocabulary
        shapes = {"tokens": (*shape, width), "surprisals": (*shape, width), "rest": shape}
        dtypes = {"tokens": np.dtype(_ids(vocabulary)), "surprisals": np.dtype("<u2"), "rest": np.dtype("<f4")}
        self._files = {name: (folder / f"{name}.npy").open("wb") for name in _NAMES}
        for name, file in self._files.items():
            header = {"descr": dtypes[name].str, "fortran_order": False, "shape": shapes[name]}
            np.lib.format.write_array_header_1_0(file, header)
        self._random = np.random.default_rng(0)

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def add(self, log_probs: np.ndarray) -> Distributions:
        """Keep the next rows; log_probs float32, shape (rows, vocabulary). Returns what was kept of them."""
        kept = keep(log_probs, self._random)
        for name, file in self._files.items():
            file.write(getattr(kept, name).tobytes())
        return kept


def open_kept(folder: Path) -> Distributions:
    """What a Keeper wrote, as memory maps."""
    return Distributions(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in _NAMES))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities of float32 logits, shape (tokens, vocabulary)."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True, dtype=np.float64)).astype(np.float32)


def _ids(vocabulary: int) -> type[np.unsignedinteger]:
    return np.uint16 if vocabulary <= 2**16 else np.uint32
