"""The digest of a checkpoint's files: another model has another one, a copy or a run that goes on has not."""

import shutil

import pytest

from sphinx_jax import checkpoints
from sphinx_jax.errors import UserError


@pytest.fixture
def directory(accessory_directory):
    return accessory_directory(shards=2)


def test_a_copy_has_the_digest_of_its_original(directory, tmp_path):
    shutil.copytree(directory, tmp_path / "copy", copy_function=shutil.copyfile)
    assert checkpoints.digest(tmp_path / "copy") == checkpoints.digest(directory)


def test_other_weights_and_other_files_have_another(directory, accessory_directory, weights, tmp_path):
    digests = {checkpoints.digest(directory), checkpoints.digest(accessory_directory(weights(1), 2, name="other"))}
    for name in ("config.json", "tokenizer.model", "consolidated.01-of-02.model.pth"):
        (directory / name).write_bytes((directory / name).read_bytes() + b" ")
        digests.add(checkpoints.digest(directory))
    checkpoints.convert(accessory_directory(name="again"), tmp_path / "native", "native")
    digests.add(checkpoints.digest(tmp_path / "native"))
    assert len(digests) == 6


def test_a_part_of_one_tensor_is_enough(directory, accessory_directory, weights):
    """Merged adapters change the matrices of attention alone, in files of one size."""
    changed = weights()
    for name in changed:
        if ".wo." in name:
            changed[name] = changed[name] * 2
    other = accessory_directory(changed, 2, name="other")
    files = ("consolidated.00-of-02.model.pth", "consolidated.01-of-02.model.pth")
    assert [(other / f).stat().st_size for f in files] == [(directory / f).stat().st_size for f in files]
    assert checkpoints.digest(other) != checkpoints.digest(directory)


def test_logs_and_training_checkpoints_of_a_run_do_not_count(directory):
    before = checkpoints.digest(directory)
    (directory / "metrics.jsonl").write_text("{}")
    (directory / "checkpoints" / "2").mkdir(parents=True)
    (directory / "checkpoints" / "2" / "state.json").write_text("{}")
    assert checkpoints.digest(directory) == before


def test_a_file_that_cannot_be_read(directory):
    (directory / "params").mkdir()
    (directory / "gone").symlink_to("nowhere")
    checkpoints.digest(directory)
    with pytest.raises(UserError, match=r"cannot read .*missing"):
        checkpoints.digest(directory / "missing")
