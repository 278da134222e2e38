from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.core.parallelism import ParallelismError, derive_parallelism

small = st.integers(1, 16)


@given(small, small, small, small, small, small)
def test_world_size_and_batch_are_exact_or_refused(
    nodes: int, procs: int, tp: int, pp: int, micro: int, accumulation: int
) -> None:
    sizes = {
        "num_nodes": nodes,
        "procs_per_node": procs,
        "tp_size": tp,
        "pp_size": pp,
        "micro_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
    }
    if (nodes * procs) % (tp * pp):
        with pytest.raises(ParallelismError):
            derive_parallelism(**sizes)
        return
    made = derive_parallelism(**sizes)
    assert made.world_size == nodes * procs == tp * pp * made.dp_size
    assert made.global_batch_size == micro * accumulation * made.dp_size


def test_a_refusal_has_the_numbers_and_the_fields() -> None:
    with pytest.raises(ParallelismError, match=r"3 nodes with 2 processes each are 6 processes.*4 \* .*2 = 8"):
        derive_parallelism(
            num_nodes=3, procs_per_node=2, tp_size=4, pp_size=2, micro_batch_size=1, gradient_accumulation_steps=1
        )
