"""Hugging Face directories: what is read is what was stored, and whatever is wrong with them is named."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub import errors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from ssl_jax import config, files, gpt2_tensors, huggingface, model, tensor_files
from ssl_jax.errors import UserError

ROOT = Path(__file__).parent.parent
SETTINGS = {"model_type": "gpt2", "vocab_size": 50, "n_positions": 16, "n_embd": 16, "n_layer": 3, "n_head": 2}

Tensors = dict[str, Any]


def tensors(dtype: Any = np.float32, *, prefix: str = "transformer.", head: bool = False) -> Tensors:
    """Random weights by GPT-2's names."""
    random = np.random.default_rng(0)
    width, inner = 16, 64
    axes: dict[str, tuple[int, ...]] = {"wte.weight": (50, width), "wpe.weight": (16, width)}
    for layer in range(3):
        block: dict[str, tuple[int, ...]] = {
            "ln_1.weight": (width,), "ln_1.bias": (width,), "ln_2.weight": (width,), "ln_2.bias": (width,),
            "attn.c_attn.weight": (width, 3 * width), "attn.c_attn.bias": (3 * width,),
            "attn.c_proj.weight": (width, width), "attn.c_proj.bias": (width,),
            "mlp.c_fc.weight": (width, inner), "mlp.c_fc.bias": (inner,),
            "mlp.c_proj.weight": (inner, width), "mlp.c_proj.bias": (width,),
        }  # fmt: skip
        axes |= {f"h.{layer}.{name}": shape for name, shape in block.items()}
    axes |= {"ln_f.weight": (width,), "ln_f.bias": (width,)}
    result = {prefix + name: random.standard_normal(shape).astype(dtype) for name, shape in axes.items()}
    if head:
        result["lm_head.weight"] = random.standard_normal((50, width)).astype(dtype)
    return result


def directory(folder: Path, values: Tensors | None = None, **overrides: Any) -> Path:
    """A Hugging Face directory; a setting that is None is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: value for name, value in {**SETTINGS, **overrides}.items() if value is not None}
    files.write_json(folder / "config.json", stored)
    save_file(tensors() if values is None else values, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def sharded(folder: Path) -> Path:
    """The same in two files with an index."""
    directory(folder)
    (folder / "model.safetensors").unlink()
    values = tensors()
    names = sorted(values)
    places = {}
    for number, part in enumerate((names[:7], names[7:]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: values[name] for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    files.write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    return folder


def resolve(folder: Path, **fields: Any) -> config.Model:
    return huggingface.resolve(config.Model(init_from=str(folder), **fields))


def read(folder: Path, *, tokens: int = 50, known: int = 50, **fields: Any) -> tuple[model.GPT2, model.Params]:
    shape = model.GPT2.from_config(resolve(folder, **fields), tokens)
    return shape, huggingface.read_params(folder, shape, known_tokens=known)


def read_back(shape: model.GPT2, params: model.Params) -> Tensors:
    return {name: value() for name, value in gpt2_tensors.stored_values(params, shape).items()}


def assert_same(found: Tensors, expected: Tensors) -> None:
    expected = {name.removeprefix("transformer."): value for name, value in expected.items()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_values_arrive_in_the_structure_of_fresh_parameters(tmp_path: Path, scan_layers: bool) -> None:
    shape, params = read(directory(tmp_path / "m"), scan_layers=scan_layers)
    fresh = jax.eval_shape(lambda: model.init(shape, jax.random.key(0)))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), fresh
    )
    assert_same(read_back(shape, params), tensors())


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_short_floats_are_cast_to_the_parameters_type(tmp_path: Path, dtype: Any, scan_layers: bool) -> None:
    shape, params = read(directory(tmp_path / "m", tensors(dtype)), scan_layers=scan_layers)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    assert_same(read_back(shape, params), {name: value.astype(np.float32) for name, value in tensors(dtype).items()})


def test_parameters_may_be_stored_shorter_than_the_file(tmp_path: Path) -> None:
    shape, params = read(directory(tmp_path / "m"), param_dtype="bfloat16")
    assert_same(read_back(shape, params), {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors().items()})


def test_files_with_an_index_are_one_model(tmp_path: Path) -> None:
    assert_same(read_back(*read(sharded(tmp_path / "m"))), tensors())


def test_prefix_buffers_and_a_head_that_is_the_embedding_make_no_difference(tmp_path: Path) -> None:
    values = tensors(prefix="")
    values |= {f"h.{layer}.attn.bias": np.ones((1, 1, 16, 16), np.uint8) for layer in range(3)}
    values |= {"h.0.attn.masked_bias": np.array(-1e4, np.float32), "lm_head.weight": values["wte.weight"]}
    assert_same(read_back(*read(directory(tmp_path / "m", values))), tensors())


def test_an_untied_head_is_read_beside_the_embedding(tmp_path: Path) -> None:
    shape, params = read(directory(tmp_path / "m", tensors(head=True), tie_word_embeddings=False))
    assert_same(read_back(shape, params), tensors(head=True))


@pytest.mark.parametrize("tie", [True, False])
def test_added_tokens_get_the_mean_row_and_padding_gets_zeros(tmp_path: Path, tie: bool) -> None:
    values = tensors(head=not tie)
    folder = directory(tmp_path / "m", values, tie_word_embeddings=tie)
    shape, params = read(folder, tokens=53, known=48)
    assert (shape.vocab_size, shape.padded_vocab_size) == (53, 64)
    tables = {"wte": "transformer.wte.weight"} | ({} if tie else {"lm_head": "lm_head.weight"})
    for ours, theirs in tables.items():
        table = np.asarray(params[ours]["embedding"])
        np.testing.assert_array_equal(table[:48], values[theirs][:48])
        mean = values[theirs][:48].astype(np.float64).mean(axis=0).astype(np.float32)
        np.testing.assert_array_equal(table[48:53], np.broadcast_to(mean, (5, 16)))
        np.testing.assert_array_equal(table[53:], np.zeros((11, 16)))


def test_rows_that_no_token_uses_stay_as_they_are(tmp_path: Path) -> None:
    """A table may be larger than its tokenizer; what is not overwritten by an added token goes out as it came in."""
    folder = directory(tmp_path / "m")
    shape = model.GPT2.from_config(resolve(folder), 47)
    params = huggingface.read_params(folder, shape, known_tokens=45, used_tokens=47)
    table, stored = np.asarray(params["wte"]["embedding"]), tensors()["transformer.wte.weight"]
    np.testing.assert_array_equal(table[47:50], stored[47:])
    assert (table[45] == table[46]).all() and not (table[46] == stored[46]).any()


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_part_of_a_table_is_that_part_of_the_whole(data: st.DataObject) -> None:
    """Whatever a device holds of the table is what it would have cut from the whole one."""
    stored = np.random.default_rng(1).standard_normal((20, 6)).astype(np.float32)
    tensor = tensor_files.StoredTensor("wte.weight", Path("file"), "F32", (20, 6), stored)
    known = data.draw(st.integers(1, 20))
    used = data.draw(st.integers(known, 30))
    first = data.draw(st.integers(0, 31))
    rows, columns = slice(first, data.draw(st.integers(first, 32))), slice(2, 5)

    def part(rows: slice, columns: slice) -> np.ndarray:
        return gpt2_tensors._read_tokens(tensor, known, used, (rows, columns), np.float32)

    np.testing.assert_array_equal(part(rows, columns), part(slice(0, 32), slice(0, 6))[rows, columns])


CUT_SCRIPT = """
import sys, jax, numpy as np
from pathlib import Path
from ssl_jax import config, gpt2_tensors, huggingface, model, sharding
folder = Path(sys.argv[1])
for scan_layers in (True, False):
    settings = huggingface.resolve(config.Model(init_from=str(folder), scan_layers=scan_layers))
    shape = model.GPT2.from_config(settings, 53)
    whole = huggingface.read_params(folder, shape, known_tokens=50)
    for sizes in ((1, 2, 2), (4, 1, 1), (2, 1, 2)):
        mesh = sharding.make_mesh(config.Mesh(**dict(zip(sharding.AXES, sizes))))
        cut = huggingface.read_params(folder, shape, known_tokens=50, mesh=mesh)
        for (path, leaf), wanted, place in zip(
            jax.tree.leaves_with_path(cut), jax.tree.leaves(whole), jax.tree.leaves(sharding.shard_params(cut, mesh)),
            strict=True,
        ):
            assert leaf.sharding.is_equivalent_to(place, leaf.ndim), path
            np.testing.assert_array_equal(np.asarray(leaf), np.asarray(wanted))
        on_host = gpt2_tensors.stored_values(whole, shape)
        for name, value in gpt2_tensors.stored_values(cut, shape).items():
            np.testing.assert_array_equal(value(), on_host[name]())
print("same")
"""


def test_a_mesh_of_four_devices_gets_the_same_values_cut_by_the_rules(tmp_path: Path) -> None:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-c", CUT_SCRIPT, str(directory(tmp_path / "m"))]
    process = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=False)
    assert process.stdout == "same\n", process.stderr


# Settings


def test_missing_settings_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import GPT2Config

    files.write_json(tmp_path / "config.json", {"model_type": "gpt2"})
    found, expected = huggingface.read_settings(tmp_path), GPT2Config()
    assert found == {name: getattr(expected, name) for name in found}
    assert set(found) >= {"n_inner", "scale_attn_by_inverse_layer_idx", "tie_word_embeddings", "vocab_size"}


def test_all_settings_that_fix_the_arithmetic_are_read(tmp_path: Path) -> None:
    wanted = {
        "n_layer": 2, "n_head": 4, "n_embd": 32, "n_inner": 48, "n_positions": 24, "vocab_size": 99,
        "activation_function": "gelu", "layer_norm_epsilon": 1e-6, "scale_attn_weights": False,
        "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True, "tie_word_embeddings": False,
        "initializer_range": 0.01, "resid_pdrop": 0.0, "embd_pdrop": 0.2, "attn_pdrop": 0.3,
    }  # fmt: skip
    files.write_json(tmp_path / "config.json", {"model_type": "gpt2", **wanted, "summary_type": "cls_index"})
    assert huggingface.read_settings(tmp_path) == wanted


def test_other_names_of_the_same_settings_are_understood(tmp_path: Path) -> None:
    other = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "n_ctx": 24}
    files.write_json(tmp_path / "config.json", {"model_type": "gpt2", **other})
    found = huggingface.read_settings(tmp_path)
    assert [found[name] for name in ("n_embd", "n_layer", "n_head", "n_positions")] == [32, 2, 4, 24]


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', and only 'gpt2'"),
        ({"model_type": None}, "model_type is missing"),
        ({"add_cross_attention": True}, "add_cross_attention means"),
        ({"quantization_config": {"bits": 4}}, "quantization_config means quantized"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads means"),
        ({"activation_function": "swiglu"}, r"activation_function: .*'gelu_new'.*got 'swiglu'"),
        ({"n_layer": "3"}, r"n_layer: .*integer, got '3'"),
        ({"n_layer": 2.5}, r"n_layer: .*integer, got 2.5"),
        ({"n_embd": -16}, r"n_embd: .*got -16"),
        ({"n_embd": True}, r"n_embd: .*got True"),
        ({"n_head": 3}, "n_embd 16 must be a multiple of n_head 3"),
        ({"layer_norm_epsilon": "1e-5"}, r"layer_norm_epsilon: .*number, got '1e-5'"),
        ({"scale_attn_weights": "yes"}, r"scale_attn_weights: .*boolean"),
        ({"resid_pdrop": 1.5}, r"resid_pdrop: .*got 1.5"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(tmp_path: Path, stored: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected) as refused:
        resolve(directory(tmp_path / "m", **stored))
    assert "config.json" in str(refused.value) and str(refused.value).count("\n") == 0


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff", "[" * 100_000])
def test_settings_that_are_no_json_object_are_refused(tmp_path: Path, text: str) -> None:
    (directory(tmp_path / "m") / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"config\.json: (not readable as JSON|expected an object)"):
        resolve(tmp_path / "m")


def test_a_directory_without_settings_is_refused(tmp_path: Path) -> None:
    (directory(tmp_path / "m") / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json: no such file.*not a Hugging Face model"):
        resolve(tmp_path / "m")


def test_settings_that_start_from_nothing_stay_as_they_are() -> None:
    given = config.Model(n_layer=3)
    assert huggingface.resolve(given) is given


def test_the_directory_fills_what_the_user_left_out(tmp_path: Path) -> None:
    folder = directory(tmp_path / "m", resid_pdrop=0.3, attn_pdrop=0.2, activation_function="relu")
    found = resolve(folder, resid_pdrop=0.0, n_layer=3, n_inner=64, scan_layers=False)
    assert (found.n_layer, found.n_positions, found.vocab_size, found.activation_function) == (3, 16, 50, "relu")
    assert (found.resid_pdrop, found.attn_pdrop, found.scan_layers) == (0.0, 0.2, False)


def test_resolved_settings_resolve_to_themselves(tmp_path: Path) -> None:
    """A run that goes on has every field in its configuration."""
    found = resolve(directory(tmp_path / "m"))
    again = config.Model.model_validate(found.model_dump(mode="json"))
    assert huggingface.resolve(again) == found


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"n_layer": 12}, "model.n_layer is 12, but .*config.json says 3"),
        ({"size": "gpt2"}, "model.n_layer is 12, but .*config.json says 3"),
        ({"n_inner": 32}, "model.n_inner is 32, but .* says 64"),
        ({"n_positions": 8}, "model.n_positions is 8"),
        ({"vocab_size": 51}, "model.vocab_size is 51"),
        ({"activation_function": "relu"}, "model.activation_function is relu, but .* says gelu_new"),
        ({"tie_word_embeddings": False}, "model.tie_word_embeddings is False"),
        ({"layer_norm_epsilon": 1e-6}, "model.layer_norm_epsilon is 1e-06"),
    ],
)
def test_a_field_that_contradicts_the_directory_is_refused(
    tmp_path: Path, fields: dict[str, Any], expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        resolve(directory(tmp_path / "m"), **fields)


# Tensors that do not fit


def changed(change: Callable[[Tensors], Any]) -> Tensors:
    values = tensors()
    change(values)
    return values


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop("transformer.h.1.ln_1.bias"), r"lack h\.1\.ln_1\.bias of shape \[16\].*n_layer 3"),
        (lambda t: t.update({"score.weight": np.zeros((2, 16), np.float32)}), "score.weight has no place"),
        (lambda t: t.update({"transformer.h.3.ln_1.bias": np.zeros(16, np.float32)}), r"h\.3\.ln_1\.bias has no place"),
        (
            lambda t: t.update({"transformer.wte.weight": np.zeros((51, 16), np.float32)}),
            r"wte\.weight has shape \[51, 16\], but config.json means \[50, 16\]",
        ),
        (
            lambda t: t.update({"transformer.h.0.attn.c_attn.weight": np.zeros((48, 16), np.float32)}),
            r"c_attn\.weight has shape \[48, 16\], but config.json means \[16, 48\]",
        ),
        (lambda t: t.update({"transformer.wpe.weight": np.zeros((16, 16), np.int32)}), "is of type I32, expected one"),
        (lambda t: t.update({"transformer.wpe.weight": np.zeros((16, 16))}), "is of type F64, expected one"),
        (
            lambda t: t.update({"transformer.wpe.weight": np.zeros((16, 16), ml_dtypes.float8_e4m3fn)}),
            "is of type F8_E4M3, expected one of F32, F16, BF16",
        ),
        (lambda t: t.update({"wte.weight": np.zeros((50, 16), np.float32)}), "with and without the prefix"),
    ],
)
def test_tensors_that_do_not_fit_are_named_before_a_value_is_read(
    tmp_path: Path, change: Callable[[Tensors], Any], expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        resolve(directory(tmp_path / "m", changed(change)))


def test_a_wrong_number_of_layers_or_width_in_the_settings_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lack h\.3\.\S+ of shape.*n_layer 4"):
        resolve(directory(tmp_path / "more", n_layer=4))
    with pytest.raises(UserError, match=r"h\.2\..* has no place in a GPT-2 language model of 2 layers"):
        resolve(directory(tmp_path / "fewer", n_layer=2))
    with pytest.raises(UserError, match=r"wte\.weight has shape \[50, 16\], but config.json means \[50257, 16\]"):
        resolve(directory(tmp_path / "rows", vocab_size=None))


def test_an_untied_model_needs_its_head_and_a_tied_one_no_other(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lack lm_head\.weight .*tie_word_embeddings false"):
        resolve(directory(tmp_path / "untied", tie_word_embeddings=False))
    with pytest.raises(UserError, match=r"lm_head\.weight differs from .*wte\.weight"):
        read(directory(tmp_path / "tied", tensors(head=True)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["transformer.h.1.mlp.c_fc.weight", "transformer.wte.weight", "transformer.ln_f.bias"])
def test_values_that_are_not_finite_are_refused_by_name(tmp_path: Path, name: str, value: float) -> None:
    folder = directory(tmp_path / "m", changed(lambda t: t[name].__setitem__(3, value)))
    with pytest.raises(UserError, match=rf"model\.safetensors: {name} holds values that are infinite or not a number"):
        read(folder)


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 50 rows, but the tokenizer 52 tokens"):
        read(directory(tmp_path / "m"), tokens=52, known=52)


# Damaged files


def header_with(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrites a file's header, its values untouched."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    change(header)
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + size :])


def overlap(header: dict[str, Any]) -> None:
    header["transformer.wpe.weight"]["data_offsets"] = header["transformer.wte.weight"]["data_offsets"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: os.truncate(folder / "model.safetensors", 5000),
        lambda folder: os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 1),
        lambda folder: os.truncate(folder / "model.safetensors", 100),
        lambda folder: os.truncate(folder / "model.safetensors", 0),
        lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 1000),
        lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        lambda folder: header_with(folder, overlap),
        lambda folder: header_with(folder, lambda header: header["transformer.wpe.weight"].update(shape=[17, 16])),
        lambda folder: header_with(folder, lambda header: header["transformer.wpe.weight"].update(dtype="F99")),
    ],
)
def test_a_truncated_or_damaged_file_is_named(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    damage(directory(tmp_path / "m"))
    with pytest.raises(UserError, match=r"model\.safetensors: truncated, damaged or not safetensors \(.+copy it again"):
        resolve(tmp_path / "m")


def index_with(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    path = folder / "model.safetensors.index.json"
    index = files.read_json(path)
    change(index["weight_map"])
    files.write_json(path, index)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda folder: (folder / "model-00002-of-00002.safetensors").unlink(), "00002-of-00002.safetensors: no such"),
        (lambda folder: index_with(folder, lambda m: m.pop("transformer.wpe.weight")), "but it does not list it"),
        (
            lambda folder: index_with(folder, lambda m: m.update({"extra": "model-00001-of-00002.safetensors"})),
            "extra is not in model-00001",
        ),
        (
            lambda folder: index_with(
                folder, lambda m: m.update({"transformer.wpe.weight": "model-00001-of-00002.safetensors"})
            ),
            "it places it in model-00001",
        ),
        (
            lambda folder: index_with(folder, lambda m: m.update({"a": "../other.safetensors"})),
            "not a file of this dir",
        ),
        (lambda folder: index_with(folder, dict.clear), "weight_map must say"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{"), "not an index of safetensors"),
    ],
)
def test_an_index_that_does_not_match_its_files_is_named(
    tmp_path: Path, damage: Callable[[Path], Any], expected: str
) -> None:
    damage(sharded(tmp_path / "m"))
    with pytest.raises(UserError, match=expected):
        resolve(tmp_path / "m")


@pytest.mark.parametrize("leave_pickle", [True, False])
def test_a_pickle_is_refused_with_the_line_that_converts_it(tmp_path: Path, leave_pickle: bool) -> None:
    folder = directory(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    if leave_pickle:
        (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(UserError, match=r"python -c .*from_pretrained.*save_pretrained") as refused:
        resolve(folder)
    compile(str(refused.value).split('"')[1], "the line", "exec")
    assert str(folder) in str(refused.value).split('"')[1]


# Where models are


def test_a_directory_is_itself(tmp_path: Path) -> None:
    assert huggingface.locate(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("no-such-model-anywhere", "the hub cannot be reached and its files are not in the local cache"),
        ("/no/such/directory", "it is not a hub name"),
        ("a//b", "it is not a hub name"),
        ("white space", "it is not a hub name"),
        ("", "it is not a hub name"),
    ],
)
def test_a_name_that_leads_nowhere_says_how_to_name_a_local_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=expected) as refused:
        huggingface.locate(name)
    assert "there is no directory" in str(refused.value) and "name a local directory" in str(refused.value)


def test_private_and_unknown_names_are_told_from_a_failing_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(error: Exception) -> Callable[..., str]:
        def download(*_: Any, **__: Any) -> str:
            raise error

        return download

    unknown = errors.RepositoryNotFoundError.__new__(errors.RepositoryNotFoundError)
    for error, expected in (
        (unknown, "no public model of that name"),
        (errors.XetDownloadError("timed out"), r"did not deliver it \(timed out\)"),
        (OSError(28, "No space left on device"), r"did not deliver it \(.*No space left"),
    ):
        monkeypatch.setattr("huggingface_hub.snapshot_download", refuse(error))
        with pytest.raises(UserError, match=expected):
            huggingface.locate("owner/name")


def test_from_the_hub_come_only_the_files_that_are_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub.utils import filter_repo_objects

    asked: list[str] = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        assert name == "gpt2"
        asked.extend(allow_patterns)
        return str(directory(tmp_path / "snapshot"))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert huggingface.locate("gpt2") == tmp_path / "snapshot"
    wanted = [
        "config.json", "generation_config.json", "model.safetensors", "model-00001-of-00002.safetensors",
        "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
        "vocab.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    ]  # fmt: skip
    others = ["pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "64.tflite", "onnx/model.onnx", "README.md"]
    assert list(filter_repo_objects([*wanted, *others], allow_patterns=asked)) == wanted


def test_a_hub_model_that_has_only_a_pickle_is_refused_by_its_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files.write_json(tmp_path / "config.json", SETTINGS)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(UserError, match=r"python -c .*from_pretrained\('owner/name'\)"):
        huggingface.locate("owner/name")


def test_a_damaged_blob_of_the_hubs_cache_is_noticed(tmp_path: Path) -> None:
    """The cache names large files by their SHA-256."""
    import hashlib

    snapshot = directory(tmp_path / "snapshots" / "revision")
    path = snapshot / "model.safetensors"
    blob = tmp_path / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
    blob.parent.mkdir()
    path.rename(blob)
    path.symlink_to(blob)
    read(snapshot)
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors: damaged or changed"):
        read(snapshot)


# Out


@functools.cache
def loaded() -> tuple[model.GPT2, model.Params]:
    """The model of `directory`, read once."""
    with tempfile.TemporaryDirectory() as folder:
        return read(directory(Path(folder)))


def write(folder: Path, loaded: tuple[model.GPT2, model.Params], **options: Any) -> None:
    options = {"end_ids": (3, 2), "end_of_text_id": 2, "pad_id": 1, **options}
    huggingface.write(folder, *loaded, **options)


@pytest.mark.parametrize("tie", [True, False])
def test_what_is_written_is_read_back_and_has_the_names_of_transformers(tmp_path: Path, tie: bool) -> None:
    values = tensors(head=not tie)
    write(tmp_path / "out", read(directory(tmp_path / "m", values, tie_word_embeddings=tie, n_head=4)))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == values.keys()
    assert_same(read_back(*read(tmp_path / "out")), values)
    settings_of = huggingface.read_settings
    assert settings_of(tmp_path / "out") == settings_of(tmp_path / "m")


def test_written_settings_name_the_tokens_that_end_and_fill(tmp_path: Path) -> None:
    write(tmp_path / "out", loaded(), generation={"top_k": 7}, dtype="bfloat16")
    written = files.read_json(tmp_path / "out" / "config.json")
    assert written["architectures"] == ["GPT2LMHeadModel"] and written["dtype"] == "bfloat16"
    assert [written[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [2, 2, 1]
    generation = files.read_json(tmp_path / "out" / "generation_config.json")
    assert generation == {"bos_token_id": 2, "eos_token_id": [3, 2], "pad_token_id": 1, "top_k": 7}
    assert huggingface.read_generation(tmp_path / "out") == {"top_k": 7}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_short_types_round_every_weight_once(tmp_path: Path, dtype: str) -> None:
    write(tmp_path / "out", loaded(), dtype=dtype)
    expected = {name: value.astype(dtype) for name, value in tensors().items()}
    assert_same(read_back(*read(tmp_path / "out")), {n: v.astype(np.float32) for n, v in expected.items()})
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        assert value.dtype == np.dtype(dtype), name


def test_a_weight_that_a_short_type_cannot_express_is_named(tmp_path: Path) -> None:
    values = changed(lambda t: t["transformer.h.1.ln_1.bias"].__setitem__(0, 7e4))
    with pytest.raises(UserError, match=r"transformer\.h\.1\.ln_1\.bias holds values that float16 cannot express"):
        write(tmp_path / "out", read(directory(tmp_path / "m", values)), dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("limit", [1, 5_000, 20_000, 10**9])
def test_shards_keep_their_limit_and_hold_every_tensor_once(tmp_path: Path, limit: int) -> None:
    write(tmp_path / "out", loaded(), max_shard_bytes=limit)
    shards = {path.name: load_file(path) for path in (tmp_path / "out").glob("*.safetensors")}
    assert sorted(name for shard in shards.values() for name in shard) == sorted(tensors())
    for shard in shards.values():
        assert len(shard) == 1 or sum(value.nbytes for value in shard.values()) <= limit
    if len(shards) > 1:
        index = files.read_json(tmp_path / "out" / "model.safetensors.index.json")
        assert index["weight_map"] == {name: file for file, shard in shards.items() for name in shard}
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors().values())
    assert_same(read_back(*read(tmp_path / "out")), tensors())


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json", "note.txt"])
def test_a_flipped_bit_in_any_written_file_is_noticed(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    write(out, loaded(), add_files=lambda folder: (folder / "note.txt").write_text("a note"))
    content = bytearray((out / name).read_bytes())
    content[-3] ^= 1
    (out / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}: (damaged or changed|not readable)"):
        read(out)


def test_digests_are_those_of_coreutils_and_a_lost_file_is_noticed(tmp_path: Path) -> None:
    write(tmp_path / "out", loaded())
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=tmp_path / "out", check=True)
    (tmp_path / "out" / "generation_config.json").unlink()
    with pytest.raises(UserError, match=r"generation_config\.json: cannot be read"):
        read(tmp_path / "out")


def test_digests_that_are_none_are_refused(tmp_path: Path) -> None:
    (directory(tmp_path / "m") / "SHA256SUMS").write_text("what is this\n")
    with pytest.raises(UserError, match="SHA256SUMS: 'what is this' is not a line of sha256sum"):
        read(tmp_path / "m")


def test_an_interrupted_export_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(_: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", loaded(), add_files=interrupt)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_replacement_leaves_the_earlier_export(tmp_path: Path) -> None:
    def interrupt(_: Path) -> None:
        raise KeyboardInterrupt

    write(tmp_path / "out", loaded())
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", loaded(), add_files=interrupt, overwrite=True)
    assert_same(read_back(*read(tmp_path / "out")), tensors())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_only_an_earlier_export_is_replaced_and_only_if_asked(tmp_path: Path) -> None:
    other, out = directory(tmp_path / "m"), tmp_path / "out"
    write(out, loaded())
    with pytest.raises(UserError, match="holds an earlier export; replace it with --overwrite"):
        write(out, loaded())
    write(out, loaded(), overwrite=True, max_shard_bytes=20_000)
    assert not (out / "model.safetensors").exists()
    for precious in (other, other / "config.json"):
        with pytest.raises(UserError, match="is not an earlier export; name a new directory"):
            write(precious, loaded(), overwrite=True)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", loaded())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "m", "out"]


def test_padding_of_the_vocabulary_is_not_written(tmp_path: Path) -> None:
    shape, params = read(directory(tmp_path / "m"), tokens=53, scan_layers=False)
    huggingface.write(tmp_path / "out", shape, params, end_ids=(2,), end_of_text_id=2, pad_id=1)
    assert load_file(tmp_path / "out" / "model.safetensors")["transformer.wte.weight"].shape == (53, 16)
    assert files.read_json(tmp_path / "out" / "generation_config.json")["eos_token_id"] == 2
    again = dataclasses.replace(shape, padded_vocab_size=53)
    assert_same(
        read_back(again, huggingface.read_params(tmp_path / "out", again, known_tokens=53)), read_back(shape, params)
    )


@pytest.mark.slow
def test_importing_takes_little_more_memory_than_the_parameters(tmp_path: Path) -> None:
    """Neither a copy of the model nor pages of mapped files stand beside it."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import import_memory

    import_memory.write_model(tmp_path, {"n_layer": 5, "n_head": 16, "n_embd": 1024, "vocab_size": 2000})
    measured = import_memory.measure(tmp_path, scan_layers=True)
    taken = measured["peak_bytes"] - measured["baseline_bytes"]
    assert measured["parameter_bytes"] <= taken <= 1.3 * measured["parameter_bytes"] + 100 * 2**20, measured
