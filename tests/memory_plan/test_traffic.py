"""Memory traffic of a handwritten program, whose bytes are known."""

from tests.instruments import traffic

TEXT = """HloModule example, is_scheduled=true

%row (w: f32[8,16], i: s32[]) -> f32[16] {
  %w = f32[8,16]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %wide = f64[8,16]{1,0} convert(%w)
  %one = f64[1,16]{1,0} dynamic-slice(%wide, %i, %zero), dynamic_slice_sizes={1,16}
  %flat = f64[16]{0} bitcast(%one)
  ROOT %narrow = f32[16]{0} convert(%flat)
}

%put (cache: f32[100,16], new: f32[16], i: s32[]) -> f32[100,16] {
  %cache = f32[100,16]{1,0} parameter(0)
  %new = f32[16]{0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  %line = f32[1,16]{1,0} bitcast(%new)
  ROOT %written = f32[100,16]{1,0} dynamic-update-slice(%cache, %line, %i, %zero)
}

%body (c: (s32[], f32[8,16], f32[100,16])) -> (s32[], f32[8,16], f32[100,16]) {
  %c = (s32[], f32[8,16]{1,0}, f32[100,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %w = f32[8,16]{1,0} get-tuple-element(%c), index=1
  %cache = f32[100,16]{1,0} get-tuple-element(%c), index=2
  %chosen = f32[16]{0} fusion(%w, %i), kind=kLoop, calls=%row
  %next = f32[100,16]{1,0} fusion(%cache, %chosen, %i), kind=kLoop, calls=%put
  ROOT %out = (s32[], f32[8,16]{1,0}, f32[100,16]{1,0}) tuple(%i, %w, %next)
}

%condition (c: (s32[], f32[8,16], f32[100,16])) -> pred[] {
  %c.1 = (s32[], f32[8,16]{1,0}, f32[100,16]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

%whole (v: f32[8,16]) -> f32[8,16] {
  %v = f32[8,16]{1,0} parameter(0)
  ROOT %same = f32[8,16]{1,0} fusion(%v), kind=kLoop, calls=%nothing
}

%nothing (v.1: f32[8,16]) -> f32[8,16] {
  ROOT %v.1 = f32[8,16]{1,0} parameter(0)
}

ENTRY %main (weights: f32[8,16], empty: f32[100,16], n: s32[]) -> f32[8,16] {
  %weights = f32[8,16]{1,0} parameter(0)
  %empty = f32[100,16]{1,0} parameter(1)
  %n = s32[] parameter(2)
  %start = (s32[], f32[8,16]{1,0}, f32[100,16]{1,0}) tuple(%n, %weights, %empty)
  %loop = (s32[], f32[8,16]{1,0}, f32[100,16]{1,0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %after = f32[8,16]{1,0} get-tuple-element(%loop), index=1
  %left = f32[100,16]{1,0} get-tuple-element(%loop), index=2
  %copied = f32[100,16]{1,0} copy(%left)
  ROOT %branch = f32[8,16]{1,0} conditional(%n, %after, %after), branch_computations={%nothing, %whole}
}
"""  # noqa: E501


def test_slices_updates_and_loops():
    row, cache, matrix, scalar = 16 * 4, 100 * 16 * 4, 8 * 16 * 4, 4
    moved = traffic(TEXT)
    # One row in each of five iterations; and the whole matrix once, in a branch of the conditional.
    assert moved.arguments[0] == 5 * row + matrix
    # After one iteration the carried cache is not the argument any more.
    assert 1 not in moved.arguments or moved.arguments[1] == 0
    slice_bytes, update_bytes = scalar + row + row, scalar + row + row
    assert moved.total == 5 * (slice_bytes + update_bytes) + 2 * cache + 2 * matrix
