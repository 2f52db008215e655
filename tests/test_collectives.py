"""Collectives in compiled programs, and that jaxconv's move no more than lax's."""

from pathlib import Path

import children
import pytest
from collectives import collectives

PROGRAM = """
ENTRY %main (p: f32[2,4]) -> f32[2,4] {
  %all-gather = f32[16,4]{1,0} all-gather(%p), channel_id=1, dimensions={0}
  %all-reduce.1 = (f32[3,3]{1,0}, /*index=1*/bf16[8]{0}, s8[], pred[2]{0}) all-reduce(%a, %b, %c)
  %collective-permute-start = (f32[2]{0}, f32[2]{0}) collective-permute-start(%x)
  %collective-permute-done = f32[2]{0} collective-permute-done(%collective-permute-start)
  %copy.2 = f32[16,4]{0,1} copy(%all-gather), metadata={op_name="x = f32[2] all-gather(y)"}
  ROOT %reduce-scatter = c64[2,4]{1,0} reduce-scatter(%copy.2), to_apply=%add
}
"""


def test_collectives_are_found_in_a_program() -> None:
    assert collectives(PROGRAM) == (
        ("all-gather", 16 * 4 * 4),
        ("all-reduce", 9 * 4 + 8 * 2 + 1 + 2),
        ("collective-permute", 2 * 4),
        ("reduce-scatter", 8 * 8),
    )


# 3×3 of stride 2 whose rows don't divide by it: 2.06 instead of 1.72 MB.
KNOWN = {("3×3 stride 2, 16×56×56×32→64", "rows", "forward")}


@pytest.mark.exhaustive
def test_no_more_is_moved_than_by_lax() -> None:
    text = children.output(8, Path(__file__).parent / "collectives.py")
    *lines, last = text.splitlines()
    assert last == f"{len(lines)} programs"
    found = [line.split("; ", 3) for line in lines]
    more = {(name, layout, direction): text for name, layout, direction, text in found if text}
    assert more.keys() == KNOWN, more
