"""Checkpoints that are stored quantized: what is loaded is what `load(..., quantize=...)` makes, on every mesh."""

import json
import math
import shutil

import jax
import numpy as np
import pytest

import sharding
import sphinx_jax
from sphinx_jax import allocator, checkpoints
from sphinx_jax.checkpoints.formats import native
from sphinx_jax.cli import common, model_options
from sphinx_jax.cli import convert as program
from sphinx_jax.errors import UserError

TOKENS = np.array([[1, 5, 9, 20, 33, 7]])


def run(*arguments) -> int:
    return common.run(program.main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module", params=["int8", "int4"])
def stored(request, tmp_path_factory):
    """The shipped model in int8 or int4: kind, directory."""
    path = tmp_path_factory.mktemp("quantized") / request.param
    assert run("convert", sphinx_jax.SHIPPED, path, "--quantize", request.param) == 0
    return request.param, path


def params_of(model):
    return jax.tree.leaves(model.engine.params)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [{}, {"data": 2, "expert": 4}])
def test_same_as_quantized_on_loading(stored, shape):
    kind, path = stored
    mesh = sharding.make_mesh(**shape)
    expected, actual = sphinx_jax.load(sphinx_jax.SHIPPED, mesh, quantize=kind), sphinx_jax.load(path, mesh)
    assert jax.tree.structure(actual.engine.params) == jax.tree.structure(expected.engine.params)
    for a, b in zip(params_of(actual), params_of(expected), strict=True):
        assert (a.dtype, a.sharding) == (b.dtype, b.sharding)
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(actual.logits(TOKENS), expected.logits(TOKENS))
    assert actual.settings()["quantize"] == kind


@pytest.mark.slow
def test_programs_compile_while_weights_are_read(stored):
    """As for `infer.py --prompt`: those of the abstract quantized model are the ones that run."""
    kind, path = stored
    mesh, question = sharding.make_mesh(), "what shape is present?"
    model = sphinx_jax.load(
        path,
        mesh,
        max_model_len=256,
        compile_for=lambda model: model.compile_for(question, False, max_new_tokens=8),
    )
    expected = sphinx_jax.load(sphinx_jax.SHIPPED, mesh, max_model_len=256, quantize=kind)
    assert "".join(model.stream(question, max_new_tokens=8)) == expected.generate([question], max_new_tokens=8)[0]


def test_offload(stored):
    """The experts that are copied to the devices are those that were stored."""
    kind, path = stored
    mesh = sharding.make_mesh()
    expected = sphinx_jax.load(sphinx_jax.SHIPPED, mesh, quantize=kind, offload=True)
    actual = sphinx_jax.load(path, mesh, offload=True)
    for a, b in zip(
        jax.tree.leaves(actual.engine.all_params), jax.tree.leaves(expected.engine.all_params), strict=True
    ):
        assert (a.dtype, a.sharding) == (b.dtype, b.sharding)
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("quantize", [False, True])
def test_limit_of_pinned_memory(stored, monkeypatch, quantize):
    """All that is stored can be pinned: --quantize does not make it smaller again."""
    kind, path = stored
    limits = []
    monkeypatch.setattr(allocator, "set_host_limit", limits.append)
    monkeypatch.setattr(common, "enable_compilation_cache", lambda: None)
    options = model_options.AnsweringOptions(checkpoint=path, offload=True, quantize=kind if quantize else None)
    model_options.start_process(options)
    assert limits == [sum(file.stat().st_size for file in path.rglob("*") if file.is_file())]


def test_stored_bytes(stored):
    """Those of the arrays: nothing is stored unquantized as well."""
    _, path = stored
    arrays = sum(leaf.nbytes for leaf in params_of(sphinx_jax.load(path, sharding.make_mesh())))
    (tensors,) = checkpoints.open(path).shards
    assert arrays == sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors.values())


def test_dtype_of_the_rest(stored):
    """`dtype` converts what is not quantized; the integers and their scales stay."""
    kind, path = stored
    model = sphinx_jax.load(path, sharding.make_mesh(), "bfloat16", quantize=kind)
    stored_scales = sphinx_jax.load(path, sharding.make_mesh()).engine.params["language"]["layers"][0]["ffn"]["w_in"]
    language = model.engine.params["language"]
    assert language["embedding"]["table"].dtype == "bfloat16"
    for a, b in zip(jax.tree.leaves(language["layers"][0]["ffn"]["w_in"]), jax.tree.leaves(stored_scales), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_save_and_convert_again(stored, tmp_path):
    """A quantized model in memory, sharded, and a quantized checkpoint are written as they are."""
    _, path = stored
    model = sphinx_jax.load(path, sharding.make_mesh(expert=2, data=2))
    model.save(tmp_path / "saved")
    assert run("convert", path, tmp_path / "copied") == 0
    for name in ("saved", "copied"):
        again = sphinx_jax.load(tmp_path / name, model.mesh)
        for a, b in zip(params_of(again), params_of(model), strict=True):
            np.testing.assert_array_equal(a, b)


def test_inspect(stored, capsys):
    """The parameters are counted as those of the unquantized model."""
    kind, path = stored
    assert run("inspect", path) == run("inspect", sphinx_jax.SHIPPED) == 0
    quantized, plain = capsys.readouterr().out.split(str(sphinx_jax.SHIPPED))
    assert f"quantized   {kind}" in quantized
    (count,) = [line for line in plain.splitlines() if line.startswith("parameters")]
    assert count in quantized


def test_plan(stored, monkeypatch):
    """--plan of a quantized checkpoint is that of --quantize."""
    kind, path = stored
    given = []
    monkeypatch.setattr(
        model_options, "plan_inference", lambda *args, **options: given.append(options["quantize"]) or len(given)
    )
    assert model_options.plan(model_options.AnsweringOptions(checkpoint=path), 1) == 1
    assert given == [kind]


def test_what_cannot_be(stored, tmp_path, capsys):
    kind, path = stored
    other = {"int8": "int4", "int4": "int8"}[kind]
    with pytest.raises(UserError, match=f"is quantized to {kind} and cannot be trained"):
        checkpoints.load(path, unstacked=False)
    with pytest.raises(UserError, match=f"is quantized to {kind}; leave --quantize out"):
        sphinx_jax.load(path, quantize=other)
    for arguments in (("--format", "mixtral"), ("--quantize", other)):
        assert run("convert", path, tmp_path / "out", *arguments) == 2
        assert f"quantized to {kind}" in capsys.readouterr().err
    assert run("convert", sphinx_jax.SHIPPED, tmp_path / "out", "--format", "accessory", "--quantize", kind) == 2
    assert "write native" in capsys.readouterr().err
    with pytest.raises(UserError, match="mixtral cannot hold weights quantized"):
        sphinx_jax.load(path, sharding.make_mesh()).save(tmp_path / "out", "mixtral")
    assert not (tmp_path / "out").exists()


def test_another_layout_is_refused(stored, tmp_path):
    _, path = stored
    shutil.copytree(path, tmp_path / "copy")
    config = json.loads((path / "config.json").read_text())

    def refused(**changes) -> str:
        (tmp_path / "copy" / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UserError) as error:
            native.open_directory(tmp_path / "copy")
        return str(error.value)

    assert "a layout that this program does not read" in refused(quantized=config["quantized"] | {"group_size": 99})
    assert "a layout that this program does not read" in refused(quantized={"dtype": "int2"})
    assert "a layout that this program does not read" in refused(quantized={"dtype": ["int4"]})
    assert "contradict each other" in refused(version=1)
    assert "contradict each other" in refused(quantized=None)
    for version in (2, 3, 4):
        assert "convert the unquantized checkpoint again" in refused(version=version)
    assert "reads versions 1 and 5" in refused(version=99)
