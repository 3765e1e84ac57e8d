"""Recipes, targets and plans: data in, numbers out."""

from dataclasses import replace

import pytest
from _models import MHA, TIED, Shape, phi3_config
from _targets import write_target
from test_families import MINI_4K

from phi3edge.codecs import codec, holds, row_bytes
from phi3edge.errors import ConfigError, DoesNotFitError, UnsupportedError, UsageError
from phi3edge.families import parse_config
from phi3edge.metrics import METRICS
from phi3edge.plan import choose_context, estimate_fit, make_plan, require_fit, require_kernels, summarize, warnings
from phi3edge.recipes import Layers, load_recipe, shipped_recipes
from phi3edge.targets import load_target, shipped_targets
from phi3edge.units import parse_size, size

MINI = parse_config(MINI_4K, None, "mini")


def plan_of(recipe, spec=MINI):
    return make_plan(spec, *load_recipe(recipe))


def codecs_of(plan, role):
    return {t.codec for t in plan.tensors if t.tensor.role == role}


def test_row_bytes():
    assert row_bytes("q4_0", 3072) == 3072 // 32 * 18
    assert row_bytes("q4_k", 3072) == 3072 // 256 * 144
    assert row_bytes("bf16", 10) == 20
    assert 8 * row_bytes("q6_k", 256) / 256 == 6.5625
    assert holds("q4_0", 576)
    assert not holds("q4_k", 576)


def test_q4_k_m_is_llama_cpps_mix_for_mini():
    """bench/mix_conformance.py compares every mix with llama-quantize's own choices."""
    plan = plan_of("q4_k_m")
    more = [n for n in range(32) if n < 4 or n >= 28 or (n - 4) % 3 == 2]
    for role in ("attn_qkv", "ffn_down"):
        codecs = [t.codec for t in plan.tensors if t.tensor.role == role]
        assert codecs == ["q6_k" if n in more else "q4_k" for n in range(32)]
    assert codecs_of(plan, "head") == {"q6_k"}
    assert codecs_of(plan, "embedding") == {"q4_k"}
    assert codecs_of(plan, "attn_output") == codecs_of(plan, "ffn_gate_up") == {"q4_k"}


def test_layer_choice_is_integer_division_like_llama_cpps():
    chosen = Layers(first="1/8", last="1/8", every=3)
    for n in range(1, 50):
        expected = [i for i in range(n) if i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2]
        assert [i for i in range(n) if chosen.chosen(i, n)] == expected


def test_a_tied_embedding_gets_the_heads_codec():
    plan = plan_of("q4_k_m", parse_config(phi3_config(TIED), None, "tiny"))
    assert plan.tensors[0].codec == "q6_k"


def test_rows_that_are_no_whole_blocks_get_the_declared_fallback():
    spec = parse_config(phi3_config(Shape(hidden=192, intermediate=576, heads=4, kv_heads=4)), None, "odd")
    plan = plan_of("q4_k_m", spec)
    qkv = next(t for t in plan.tensors if t.tensor.role == "attn_qkv")
    assert (qkv.codec, qkv.wanted) == ("q5_0", "q4_k")
    head = next(t for t in plan.tensors if t.tensor.role == "head")
    assert (head.codec, head.wanted) == ("q8_0", "q6_k")
    _, target = load_target("cpu")
    assert any("q5_0" in line for line in warnings(plan, target, "gguf", 512))


def test_a_row_that_nothing_holds_is_an_error(tmp_path):
    own = tmp_path / "own.toml"
    own.write_text('summary = "x"\nformats = ["gguf"]\n[codecs]\nlinear = "q4_k"\nnorm = "f32"\n')
    spec = parse_config(phi3_config(Shape(hidden=192, intermediate=576)), None, "odd")
    with pytest.raises(ConfigError, match="192"):
        plan_of(str(own), spec)


def test_plan_bytes_are_the_sum_of_rows():
    plan = plan_of("q4_0")
    linears = sum(t.tensor.size for t in plan.tensors if t.codec == "q4_0")
    head = MINI.vocab_size * MINI.hidden_size
    norms = sum(t.tensor.size for t in plan.tensors if t.codec == "f32")
    assert linears + head + norms == MINI.parameters
    assert plan.weight_bytes == linears // 32 * 18 + head // 256 * 210 + 4 * norms
    assert sum(row.bytes for row in summarize(plan)) == plan.weight_bytes


def test_kv_cache_of_mini_is_what_the_arithmetic_says():
    """2 x 32 layers x 32 heads x 96 x 2 bytes x 4096 tokens = 1.61 GB."""
    _, target = load_target("cpu")
    fit = estimate_fit(plan_of("q4_k_m"), target, "gguf", 4096)
    assert fit.kv_cache == 1_610_612_736
    assert fit.fits
    assert fit.largest_context == 4096


def test_what_does_not_fit_names_what_would():
    _, target = load_target("iphone")
    plan = plan_of("q8_0")
    fit = estimate_fit(plan, target, "gguf", 2048)
    assert not fit.fits
    with pytest.raises(DoesNotFitError) as error:
        require_fit(plan, fit, "iphone", target, "gguf")
    assert "--recipe q4_k_m" in error.value.hint
    assert "--recipe q6_k" not in error.value.hint


def test_the_largest_context_fits_and_one_more_does_not():
    _, target = load_target("iphone")
    plan = plan_of("q4_k_m")
    largest = estimate_fit(plan, target, "gguf", 2048).largest_context
    assert 0 < largest < 4096
    assert estimate_fit(plan, target, "gguf", largest).fits
    assert not estimate_fit(plan, target, "gguf", largest + 1).fits


def test_the_roofline_leaves_the_embedding_out():
    _, target = load_target("iphone")
    plan = plan_of("q4_k_m")
    fit = estimate_fit(plan, target, "gguf", 2048)
    read = plan.weight_bytes - plan.tensors[0].bytes
    assert fit.roofline_tokens_per_s == pytest.approx(51.2e9 / read)
    assert fit.roofline_full_tokens_per_s < fit.roofline_tokens_per_s


def test_a_context_beyond_the_window_is_noted_for_gguf():
    _, target = load_target("cpu")
    plan = plan_of("q4_k_m")
    assert any("2047" in line for line in warnings(plan, target, "gguf", 4096))
    assert any("2047" in line for line in warnings(plan, target, "gguf", 2048))
    [within] = [line for line in warnings(plan, target, "gguf", 2047) if "2047" in line]
    assert "for contexts up to there" in within
    long = plan_of("q4_k_m", replace(MINI, sliding_window=4096))
    assert not any("window" in line for line in warnings(long, target, "gguf", 4096))


def test_the_default_context_ends_where_a_runtime_forgets_the_window():
    for name, target in shipped_targets().items():
        for format_, runtime in target.formats.items():
            default = runtime.context or target.context
            forgets = format_ == "gguf" or name == "directml"
            assert choose_context(MINI, target, format_, None) == (2047 if forgets else default), (name, format_)
            assert choose_context(replace(MINI, sliding_window=None), target, format_, None) == default
            assert choose_context(MINI, target, format_, 4096) == 4096


def test_a_context_beyond_the_model_is_refused():
    _, target = load_target("cpu")
    assert choose_context(MINI, target, "onnx", None) == 4096
    assert choose_context(replace(MINI, context_length=512), target, "gguf", None) == 512
    with pytest.raises(UnsupportedError, match="4096"):
        choose_context(MINI, target, "gguf", 8192)


def test_a_context_beyond_what_the_runtime_bears_is_refused():
    _, target = load_target("directml")
    long = replace(MINI, context_length=131072)
    assert choose_context(replace(long, sliding_window=None), target, "onnx", None) == 4096
    assert choose_context(long, target, "onnx", 4096) == 4096
    with pytest.raises(UnsupportedError, match=r"ONNX Runtime GenAI \(DirectML\) is known to bear \(4096\)"):
        choose_context(long, target, "onnx", 4097)
    assert estimate_fit(plan_of("int4-gpu", long), target, "onnx", 4096).largest_context == 4096


def test_a_format_may_have_a_context_of_its_own():
    _, target = load_target("android")
    assert choose_context(replace(MINI, sliding_window=None), target, "gguf", None) == 4096
    assert choose_context(MINI, target, "onnx", None) == 2048


def test_a_recipe_that_the_provider_cannot_run_is_refused():
    _, target = load_target("directml")
    with pytest.raises(UnsupportedError, match="codec uint4_b32 for role embedding") as error:
        require_kernels(plan_of("int4"), "directml", target, "onnx")
    assert error.value.hint.startswith("codecs there: f16, f32;")
    assert "int4-gpu" in error.value.hint
    require_kernels(plan_of("int4-gpu"), "directml", target, "onnx")


def test_a_targets_own_list_of_codecs_is_heeded(tmp_path):
    own = write_target(tmp_path / "own.toml")
    own.write_text(own.read_text().replace('kv_cache = "f16"', 'kv_cache = "f16", codecs = ["q8_0"]'))
    _, target = load_target(str(own))
    require_kernels(plan_of("q8_0"), "own", target, "gguf")
    with pytest.raises(UnsupportedError, match="codec q4_0"):
        require_kernels(plan_of("q4_0"), "own", target, "gguf")


def test_a_tied_embedding_needs_kernels_for_both_its_uses():
    spec = parse_config(phi3_config(TIED), None, "tiny")
    _, target = load_target("directml")
    assert plan_of("int4-gpu", spec).tensors[0].codec == "f16"
    require_kernels(plan_of("int4-gpu", spec), "directml", target, "onnx")
    with pytest.raises(UnsupportedError, match="role embedding"):
        require_kernels(plan_of("int8", spec), "directml", target, "onnx")


def test_weights_in_onnx_runtimes_memory():
    """Codes and zero points as packed; scales float32 and a float32 sum a block on the CPU; a GPU takes them as is."""
    plan = plan_of("int4")
    _, cpu = load_target("cpu")
    _, gpu = load_target("webgpu")
    linears = [t for t in plan.tensors if t.tensor.role != "embedding" and t.codec != "f32"]
    more = sum(t.tensor.size // codec(t.codec).BLOCK_SIZE * (4 + 4 - 2) for t in linears)
    assert estimate_fit(plan, cpu, "onnx", 2048).weights == plan.weight_bytes + more
    assert estimate_fit(plan, gpu, "onnx", 2048).weights == plan.weight_bytes


def test_float16_weights_double_on_onnx_runtimes_cpu():
    _, cpu = load_target("cpu")
    plan = plan_of("f16")
    norms = sum(t.bytes for t in plan.tensors if t.codec == "f32")
    embedding = plan.tensors[0].bytes
    weights = estimate_fit(plan, cpu, "onnx", 256).weights
    assert weights == 2 * (plan.weight_bytes - norms - embedding) + norms + embedding


def test_a_prompt_is_computed_at_once_by_onnx_runtime():
    _, target = load_target("cpu")
    plan = plan_of("int4")
    short, long = (estimate_fit(plan, target, "onnx", n) for n in (512, 4096))
    logits = 4 * (4096 - 512) * MINI.vocab_size
    assert long.scratch - short.scratch > logits
    assert (short.prompt, long.prompt) == (512, 4096)
    _, phone = load_target("android")
    largest = estimate_fit(plan, phone, "onnx", 512).largest_context
    assert 2048 <= largest < 4096
    assert estimate_fit(plan, phone, "onnx", largest).fits
    assert not estimate_fit(plan, phone, "onnx", largest + 1).fits


def test_what_ignores_the_window_and_what_is_not_run_here_is_noted():
    def notes(target, recipe):
        return " ".join(warnings(plan_of(recipe), load_target(target)[1], "onnx", 4096))

    assert "2047" not in notes("cpu", "int4")
    assert "2047" not in notes("webgpu", "int4")
    assert "DirectML) ignores that window" in notes("directml", "int4-gpu")
    assert "not run here" in notes("webgpu", "int4")
    assert "not run here" not in notes("cpu", "int4")
    assert "maintenance" in notes("directml", "int4-gpu")
    assert "on the CPU alone" in notes("android", "int4")


def test_mini_fits_every_target_with_its_defaults():
    for name, target in shipped_targets().items():
        for format_, runtime in target.formats.items():
            plan = plan_of(runtime.recipe)
            require_kernels(plan, name, target, format_)
            context = choose_context(MINI, target, format_, None)
            assert context >= 2047, (name, format_)
            assert estimate_fit(plan, target, format_, context).fits, (name, format_)


def test_shipped_files_are_consistent():
    assert {"iphone", "iphone-15-pro", "android", "android-low", "cpu", "cuda", "directml", "webgpu"} <= set(
        shipped_targets()
    )
    names = {"q4_0", "q4_k_s", "q4_k_m", "q5_k_m", "q6_k", "q8_0", "f16", "bf16", "f32", "int4", "int4-mixed", "int8"}
    assert names <= set(shipped_recipes())
    for target in shipped_targets().values():
        assert set(target.gates) <= set(METRICS)
        for format_, runtime in target.formats.items():
            assert format_ in shipped_recipes()[runtime.recipe].formats
    for recipe in shipped_recipes().values():
        for format_ in recipe.formats:
            for name in recipe.codecs.values():
                assert format_ in codec(name).FORMATS


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ('linaer = "q4_0"', "linaer"),
        ('linear = "q4_9"', "q4_9"),
        ('norm = "q4_0"', "norm"),
        ('[[upgrades]]\nroles = ["head"]\nlayers = { first = "1/0" }\ncodec = "q8_0"', "first: expected a number"),
        ('[[upgrades]]\nroles = ["head"]\nlayers = { last = "half" }\ncodec = "q8_0"', "last: expected a number"),
    ],
)
def test_a_wrong_recipe_is_an_error_that_names_the_key(tmp_path, change, says):
    lines = {"linear": 'linear = "q4_0"', "norm": 'norm = "f32"'}
    lines[change.split()[0]] = change
    own = tmp_path / "own.toml"
    own.write_text('summary = "x"\nformats = ["gguf"]\n[codecs]\n' + "\n".join(lines.values()))
    with pytest.raises(ConfigError, match=says):
        load_recipe(str(own))


@pytest.mark.parametrize(
    ("line", "instead", "says"),
    [
        ("formats = {", "formats = {} # {", "formats"),
        ('kv_cache = "f16"', 'kv_cache = "f16", codecs = ["q4_9"]', "q4_9"),
        ('kv_cache = "f16"', 'kv_cache = "int8"', "kv_cache of gguf"),
        ('kv_cache = "f16"', 'kv_cache = "f16", provider = "dml"', "provider is for onnx"),
        ('summary = "a toaster"', "", "^own.toml: summary is missing$"),
    ],
)
def test_a_wrong_target_is_an_error_that_names_the_key(tmp_path, line, instead, says):
    own = write_target(tmp_path / "own.toml")
    own.write_text(own.read_text().replace(line, instead))
    with pytest.raises(ConfigError, match=says):
        load_target(str(own))


def test_an_unknown_key_names_the_nearest(tmp_path):
    own = tmp_path / "own.toml"
    own.write_text('summary = "x"\nformats = ["gguf"]\n[codecs]\nlinear = "q4_0"\nnorm = "f32"\n[falback]\n')
    with pytest.raises(ConfigError) as error:
        load_recipe(str(own))
    assert "fallback" in error.value.hint


def test_names_and_files_that_do_not_exist():
    with pytest.raises(ConfigError) as error:
        load_recipe("q4_km")
    assert "q4_k_m" in error.value.hint
    with pytest.raises(ConfigError) as error:
        load_target("iphnoe")
    assert "iphone" in error.value.hint
    with pytest.raises(ConfigError, match=r"nowhere\.toml"):
        load_target("nowhere.toml")


def test_a_users_own_target(tmp_path):
    own = write_target(tmp_path / "toaster.toml", app="0.5GiB")
    name, target = load_target(str(own))
    assert (name, target.memory.app) == ("toaster", 2**29)
    write_target(own, app="lots")
    with pytest.raises(ConfigError, match="lots"):
        load_target(str(own))


def test_sizes():
    assert parse_size("1.5GB") == 1_500_000_000
    assert parse_size("1.5 GiB") == 1_610_612_736
    assert parse_size("42") == 42
    for bad in ("", "GB", "1.5 G", "-1GB", "1e9", "0", "0.0GB"):
        with pytest.raises(UsageError):
            parse_size(bad)
    assert size(2_390_000_000) == "2.39 GB"
    assert MHA.vocab == 320
