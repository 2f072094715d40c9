"""Checkpoints that hold what lay on a rank, and not experts by their numbers, meet no placement."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_scmoe.run.checkpoint.contents import TRACKER
from megatron_scmoe.run.checkpoint.resume import _check_optimizer, prepare_load


def test_the_hosts_older_format(tmp_path: Path) -> None:
    (tmp_path / "iter_0000002" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / TRACKER).write_text("2")
    options: dict[str, Any] = {
        "load": str(tmp_path),
        "finetune": False,
        "pretrained_checkpoint": None,
        "ckpt_step": None,
        "rank": 0,
    }
    assert prepare_load(Namespace(**options, scmoe_expert_placement=None)) == []
    with pytest.raises(ValueError, match=r"as they lay there.*: drop --scmoe-expert-placement"):
        prepare_load(Namespace(**options, scmoe_expert_placement="placement.json"))


@pytest.mark.parametrize(
    ("saved", "loaded", "refused"),
    [
        (None, None, False),
        ("a", "a", False),
        ("a", None, True),
        (None, "a", True),
        ("a", "b", True),
        ("unknown", None, False),
        ("unknown", "a", True),
    ],
)
def test_buffers_of_the_optimizer(saved: str | None, loaded: str | None, refused: bool) -> None:
    """By what the files said, not by their names; `unknown`, a run before there were placements."""
    there = Namespace(use_distributed_optimizer=True)
    if saved != "unknown":
        there.scmoe_placement_digest = saved
    here = Namespace(use_distributed_optimizer=True, scmoe_placement_digest=loaded)
    buffers = {"content_metadata": {"distrib_optim_sharding_type": "dp_reshardable"}}
    if not refused:
        _check_optimizer("here", buffers, there, here)
        return
    with pytest.raises(ValueError, match="this run differs: --scmoe-expert-placement"):
        _check_optimizer("here", buffers, there, here)
    by_number = {"content_metadata": {"distrib_optim_sharding_type": "fully_reshardable"}}
    _check_optimizer("here", by_number, there, here)
