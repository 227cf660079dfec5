"""Bytes of cuDNN's workspaces that programs compiled without the library leave out."""

import pytest

from sphinx_jax.memory_plan.cudnn_workspace import cudnn_workspace_bytes

PROGRAM = """ENTRY %main (q: bf16[2,256,32,128]) -> bf16[2,256,32,128] {{
  %q = bf16[2,256,32,128]{{3,2,1,0}} parameter(0)
  ROOT %call = ({types}) custom-call(%q), custom_call_target="__cudnn$fmhaSoftmax{suffix}", api_version=API_VERSION
}}
"""


def gradients(key_heads, workspace):
    queries, keys = "bf16[2,32,256,128]{3,1,2,0}", f"bf16[2,{key_heads},256,128]{{3,1,2,0}}"
    return PROGRAM.format(types=f"{queries}, {keys}, {keys}, u8[{workspace}]{{0}}", suffix="Backward")


@pytest.mark.parametrize(("key_heads", "numbers_by_query_head"), [(32, 0), (8, 2)])
def test_gradient(key_heads, numbers_by_query_head):
    """float32 gradients of queries and sums of their softmax; and bfloat16 gradients of keys and values."""
    queries = 2 * 32 * 256
    expected = queries * (4 * 128 + 4 + 2 * 128 * numbers_by_query_head)
    assert cudnn_workspace_bytes(gradients(key_heads, 0)) == expected


def test_what_is_counted_already_is_not_added():
    """A workspace that cuDNN itself has sized; the forward pass; other programs."""
    forward = PROGRAM.format(types="bf16[2,32,256,128]{3,1,2,0}, f32[2,32,256]{2,1,0}, u8[0]{0}", suffix="")
    for text in (gradients(8, 4096), forward, "ENTRY %main (x: f32[]) -> f32[] {\n  ROOT %x = f32[] parameter(0)\n}\n"):
        assert cudnn_workspace_bytes(text) == 0
