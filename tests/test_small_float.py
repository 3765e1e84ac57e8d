"""Phi-3-small's float reference, against a plain implementation of the description: loops over heads, in float64."""

from pathlib import Path

import numpy as np
import pytest
import torch
from _small import CONTEXT, ORIGINAL, SMALL, Small, longrope, small_config, small_tensors, write_small

from phi3edge import phi3small
from phi3edge.families import parse_config
from phi3edge.reference import Wanted, load_model, reference_pass


class Plain:
    """The description of Phi-3-small, word by word: config.json and tensors under their own names, float64."""

    def __init__(self, shape: Small, config: dict) -> None:
        self.config = config
        self.weights = {name: tensor.double().numpy() for name, tensor in small_tensors(shape).items()}

    def logits(self, ids: np.ndarray) -> np.ndarray:
        config = self.config
        embedding = self.weights["model.embed_tokens.weight"]
        h = embedding[ids] * config["mup_embedding_multiplier"]
        for layer in range(config["num_hidden_layers"]):
            block = f"model.layers.{layer}"
            x = self.linear(f"{block}.self_attn.query_key_value", self.norm(f"{block}.input_layernorm", h))
            h = h + self.linear(f"{block}.self_attn.dense", self.attention(x, layer))
            x = self.linear(f"{block}.mlp.up_proj", self.norm(f"{block}.post_attention_layernorm", h))
            a, b = x[:, 0::2], x[:, 1::2]
            if config["gegelu_limit"] is not None:
                a = np.minimum(a, config["gegelu_limit"])
                b = np.clip(b, -config["gegelu_limit"], config["gegelu_limit"])
            h = h + self.linear(f"{block}.mlp.down_proj", a / (1 + np.exp(-1.702 * a)) * (b + 1))
        h = self.norm("model.final_layernorm", h)
        out = h @ self.weights.get("lm_head.weight", embedding).T / config["mup_width_multiplier"]
        out[:, config["dummy_token_indices"]] = np.finfo(np.float32).min
        return out

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + self.config["layer_norm_epsilon"])
        return centred / deviation * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def attention(self, x: np.ndarray, layer: int) -> np.ndarray:
        config, tokens = self.config, len(x)
        heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
        size = config["hidden_size"] // heads
        per_group, scale = heads // groups, size**-0.5
        if config["mup_use_scaling"]:
            scale = config["mup_attn_multiplier"] / size
        out = np.zeros((tokens, heads * size))
        for head in range(heads):
            group, place = divmod(head, per_group)
            begin = group * (per_group + 2) * size
            q = self.rotate(x[:, begin + place * size : begin + (place + 1) * size])
            k = self.rotate(x[:, begin + per_group * size : begin + (per_group + 1) * size])
            v = x[:, begin + (per_group + 1) * size : begin + (per_group + 2) * size]
            scores = scale * q @ k.T
            for i in range(tokens):
                seen = [j for j in range(i + 1) if self.sees(layer, head, i, j)]
                weights = np.exp(scores[i, seen] - scores[i, seen].max())
                out[i, head * size : (head + 1) * size] = weights / weights.sum() @ v[seen]
        return out

    def sees(self, layer: int, head: int, query: int, key: int) -> bool:
        config = self.config
        if (layer + 1) % config["dense_attention_every_n_layers"] == 0:
            return True
        block = config["blocksparse_block_size"]
        step = 0
        if not config["blocksparse_homo_head_pattern"]:
            step = max(1, int(config["blocksparse_vert_stride"] / config["num_attention_heads"]))
        near = query // block - key // block < config["blocksparse_num_local_blocks"]
        return near or (key // block + head * step + 1) % config["blocksparse_vert_stride"] == 0

    def rotate(self, x: np.ndarray) -> np.ndarray:
        tokens, size = x.shape
        scaling = self.config.get("rope_scaling") or {}
        side = "long" if scaling and tokens > self.config["original_max_position_embeddings"] else "short"
        out = np.empty_like(x)
        for pair in range(size // 2):
            wave = self.config["rope_embedding_base"] ** (2 * pair / size)
            angle = np.arange(tokens) / wave / (scaling[f"{side}_factor"][pair] if scaling else 1)
            a, b = x[:, pair], x[:, pair + size // 2]
            out[:, pair] = a * np.cos(angle) - b * np.sin(angle)
            out[:, pair + size // 2] = b * np.cos(angle) + a * np.sin(angle)
        return out * (scaling[f"{side}_mscale"] if scaling else 1)


KINDS: dict[str, tuple[Small, dict]] = {
    "8k": (SMALL, {}),
    "128k": (SMALL, longrope()),
    "one pattern, untied": (Small(tied=False), {"blocksparse_homo_head_pattern": True}),
    "shifted by two": (SMALL, {"blocksparse_vert_stride": 13, "dense_attention_every_n_layers": 3}),
    "no muP, no limit": (SMALL, {"mup_use_scaling": False, "gegelu_limit": None}),
}
LENGTH = 300  # beyond the original context of "128k", and 19 blocks


def ids(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, SMALL.vocab, count)


def run(model: phi3small.Phi3Small, tokens: np.ndarray, **options) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.from_numpy(tokens)[None], **options).logits[0].numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_the_description(kind: str, tmp_path: Path) -> None:
    shape, changes = KINDS[kind]
    model, plain = (
        load_model(write_small(tmp_path / "m", shape, **changes)),
        Plain(shape, small_config(shape, **changes)),
    )
    for length in (33, ORIGINAL, LENGTH):
        expected = plain.logits(ids(length))
        found = run(model, ids(length))
        kept = expected > -1e30
        assert (kept.sum(1) == SMALL.vocab - 3).all()
        np.testing.assert_allclose(found[kept], expected[kept], atol=2e-4)
        np.testing.assert_array_equal(found[~kept], np.finfo(np.float32).min)


def test_the_original_pattern_is_dense_up_to_1024_tokens_and_not_beyond() -> None:
    original = {"blocksparse_block_size": 64, "blocksparse_num_local_blocks": 16, "blocksparse_vert_stride": 8}
    sparse = parse_config(small_config(**original), None, "tiny").block_sparse
    positions = torch.arange(1025)
    dense = phi3small.visible(None, 6, positions, positions)
    seen = phi3small.visible(sparse, 6, positions, positions)
    assert (seen[:, :1024] == dense[:, :1024]).all()
    hidden = (dense & ~seen)[:, 1024].nonzero()
    assert set(hidden[:, 0].tolist()) == {0, 1, 2, 3, 4, 5}  # block 0 is a stripe of no head but the eighth
    assert set(hidden[:, 1].tolist()) == set(range(64))


def test_1100_tokens_of_the_original_pattern(tmp_path: Path) -> None:
    shape = Small(layers=1, hidden=32, intermediate=32, heads=2, kv_heads=1)
    original = {"blocksparse_block_size": 64, "blocksparse_num_local_blocks": 16, "blocksparse_vert_stride": 8}
    changes = original | {"max_position_embeddings": 2048}
    model = load_model(write_small(tmp_path / "m", shape, **changes))
    expected = Plain(shape, small_config(shape, **changes)).logits(ids(1100))
    full = Plain(shape, small_config(shape, **changes, dense_attention_every_n_layers=1)).logits(ids(1100))
    found = run(model, ids(1100))
    kept = expected > -1e30
    np.testing.assert_allclose(found[kept], expected[kept], atol=1e-4)
    apart = np.abs(expected - full).max(1)
    assert apart[:1024].max() == 0
    assert apart[1024:].min() > 1e-3


@pytest.fixture(scope="module", params=["8k", "128k"])
def model(request, tmp_path_factory) -> Path:
    return write_small(tmp_path_factory.mktemp("m") / "m", SMALL, **KINDS[request.param][1])


def test_a_cache_changes_nothing_also_where_the_factors_change(model: Path) -> None:
    loaded, tokens = load_model(model), ids(ORIGINAL + 6)
    with torch.inference_mode():
        past = None
        for stop, start in ((240, 0), (ORIGINAL - 1, 240), *((n + 1, n) for n in range(ORIGINAL - 1, len(tokens)))):
            step = loaded(torch.from_numpy(tokens[start:stop])[None], past_key_values=past, use_cache=True)
            past = step.past_key_values
            whole = run(loaded, tokens[:stop])[start:]
            np.testing.assert_allclose(step.logits[0].numpy(), whole, atol=2e-4)
        past.crop(-10)
        step = loaded(torch.from_numpy(tokens[ORIGINAL - 4 :])[None], past_key_values=past, use_cache=True)
        np.testing.assert_allclose(step.logits[0].numpy(), run(loaded, tokens)[ORIGINAL - 4 :], atol=2e-4)


def test_the_wanted_rows_are_kept(model: Path) -> None:
    loaded, tokens = load_model(model), ids(40)
    whole = run(loaded, tokens)
    np.testing.assert_allclose(run(loaded, tokens, logits_to_keep=3), whole[-3:], atol=1e-5)
    np.testing.assert_allclose(run(loaded, tokens, logits_to_keep=torch.tensor([0, 7])), whole[[0, 7]], atol=1e-5)


def test_the_reference_pass_answers_with_it(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHI3EDGE_CACHE", str(tmp_path))
    tokens = ids(64)
    kept = reference_pass(model, Wanted(tokens[None], 31, [tokens[:9].tolist()], 5, [(ids(CONTEXT), [700])]))
    rows = torch.log_softmax(torch.from_numpy(run(load_model(model), tokens)), -1).numpy()
    expected = [rows[n, tokens[n + 1]] for n in range(31, 63)]
    finite = np.array(expected) > -1e30  # the text has dummy ids too
    np.testing.assert_allclose(kept.text_log_probs[0][finite], np.array(expected)[finite], atol=1e-4)
    sequence = tokens[:9].tolist()
    assert kept.greedy[0]
    for token in kept.greedy[0]:
        assert token == run(load_model(model), np.array(sequence))[-1].argmax()
        sequence.append(token)
    assert "phi3edge" in kept.software
