"""What the doctor examines: this machine, a layout on it, and a job of all ranks together."""

import os
import socket
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import redirect_stdout
from datetime import timedelta
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.datasets.object_storage_utils import is_object_storage_path
from megatron.training import training

from megatron_scmoe import __version__, say
from megatron_scmoe.arguments import (
    add_scmoe_args,
    model_config_from_args,
    parse,
    prepare,
    validate,
)
from megatron_scmoe.planner.iteration import micro_batches_to_win
from megatron_scmoe.planner.memory import training_from_args
from megatron_scmoe.run.doctor import gpu, links, machine, nodes
from megatron_scmoe.run.doctor.findings import Finding, RankOfHost, merge, name_ranks
from megatron_scmoe.run.shared_folder import (
    SharedFolderError,
    check_shared,
    has_several_nodes,
)

TIMEOUT_MINUTES = 2
# Traces of a run, which an examination does not leave.
NOT_OURS = {"tensorboard_dir": None, "wandb_project": "", "enable_one_logger": False}

Found = list[tuple[Finding, str]]  # with where it was found, empty for everywhere


def examine(has_options: bool) -> int:
    """Examine this machine, the layout of a command line that has options, and the job.

    Returns:
        The exit code.
    """
    with say.user_errors():
        args = parse(add_options) if has_options else None
    layout = [] if args is None else judge_layout(args)
    is_sound = all(finding.severity != "error" for finding in layout)
    of_machine = machine.examine(args if is_sound else None)
    if os.environ.get("WORLD_SIZE", "1") == "1":
        here = RankOfHost(0, socket.gethostname())
        return report({"machine": merge([(here, of_machine)]), "layout": merge([(here, layout)])})
    try:
        return examine_job(args, of_machine, layout)
    except RuntimeError as error:  # of this kind are torch.distributed's
        say.leave(say.one_line(error), 1)


def add_options(parser: ArgumentParser) -> ArgumentParser:
    """The options of a run; what hangs is given up sooner."""
    add_scmoe_args(parser).set_defaults(distributed_timeout_minutes=TIMEOUT_MINUTES)
    return parser


def judge_layout(args: Namespace) -> list[Finding]:
    """Everything that the entry script does before its process groups, without its output."""
    try:
        with redirect_stdout(StringIO()):
            validate(args)
            vars(args).update(NOT_OURS)
            prepare(args)
    except say.USER_ERRORS as error:
        return [Finding("error", say.one_line(error))]
    experts = (
        f"; {args.num_experts} experts over {args.expert_model_parallel_size} expert parallel x "
        f"{args.expert_tensor_parallel_size} expert tensor parallel ranks"
        if args.num_experts
        else ""
    )
    micro_batches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    layout = Finding(
        "ok",
        f"tensor {args.tensor_model_parallel_size} x context {args.context_parallel_size} x "
        f"pipeline {args.pipeline_model_parallel_size} x data {args.data_parallel_size}{experts}; "
        f"micro-batches a step: {micro_batches}",
    )
    return [layout, *judge_gradients(args, micro_batches)]


def judge_gradients(args: Namespace, micro_batches: int) -> Iterator[Finding]:
    """Whether the shared experts' gradients cost more than the shortcut can save, on a link so slow
    that bytes decide; on a faster one the planner knows."""
    if args.scmoe_shortcut_position == "none" or args.overlap_grad_reduce:
        return
    try:
        training = training_from_args(args, micro_batches)
        needed = micro_batches_to_win(args, model_config_from_args(args), training)
    except ValueError:
        return  # what the planner does not count, the memory report names
    if micro_batches < needed:
        yield Finding(
            "warning",
            f"micro-batches a step: {micro_batches}; on a slow link the gradients of the shared "
            f"experts cost as much as {needed:.1f} micro-batches of top-"
            f"{args.moe_router_topk + 1}'s further expert",
            "add --overlap-grad-reduce, more micro-batches (--global-batch-size), or take a "
            "smaller --moe-shared-expert-intermediate-size; tools/plan_overlap.py knows your link",
        )


def examine_job(args: Namespace | None, found: list[Finding], layout: list[Finding]) -> int:
    """Gather what all ranks found, and measure their links where nothing is wrong.

    Raises:
        RuntimeError: a collective failed or did not end in time.
    """
    minutes = TIMEOUT_MINUTES if args is None else args.distributed_timeout_minutes
    timeout = timedelta(minutes=minutes)
    if gpu.here():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, world_size = meet(timeout)
    torch.distributed.init_process_group(
        "nccl" if gpu.here() else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    # What is not measured goes over gloo, which names the ranks that do not come.
    control = torch.distributed.new_group(backend="gloo", timeout=timeout)
    here = RankOfHost(rank, socket.gethostname())
    everyone = gather((here, found, layout), control, timeout)
    parts = {
        "machine": merge([(place, findings) for place, findings, _ in everyone]),
        "layout": merge([(place, findings) for place, _, findings in everyone]),
    }
    # The barrier first, so that all clocks are read at one moment.
    name_missing(control, timeout)
    node = nodes.Node(here, machine.versions(), time.time())
    parts["nodes"] = [(each, "") for each in nodes.judge(gather(node, control, timeout))]
    if not any(each.severity == "error" for part in parts.values() for each, _ in part):
        hosts = {place.rank: place.host for place, _, _ in everyone}
        parts["folders"] = [(finding, "") for finding in examine_folders(args)]
        parts["links"] = [(finding, "") for finding in examine_links(args, control, timeout, hosts)]
    exit_code = report(parts)
    torch.distributed.barrier(control)  # the first rank to leave would end the others
    torch.distributed.destroy_process_group()
    return exit_code


def examine_folders(args: Namespace | None) -> Iterator[Finding]:
    """What one rank writes for all nodes, or all for one; a collective."""
    if args is None or not has_several_nodes():
        return
    folders = {"--save": args.save}
    if not args.mock_data:
        folders["--data-cache-path"] = args.data_cache_path
    for option, folder in folders.items():
        if folder is None or is_object_storage_path(folder):
            continue
        try:
            check_shared(Path(folder), option)
        except SharedFolderError as error:
            yield Finding("error", str(error))
        else:
            yield Finding("ok", f"{option} {folder} is one folder on all nodes")


def meet(timeout: timedelta) -> tuple[torch.distributed.Store, int, int]:
    """Wait for all ranks where they leave word, before the groups that would only time out.

    Returns:
        The job's store, this rank, the number of ranks.

    Raises:
        RuntimeError: who did not come.
    """
    store, rank, world_size = next(torch.distributed.rendezvous("env://", timeout=timeout))
    store.set(f"here/{rank}", socket.gethostname())
    words = {other: f"here/{other}" for other in range(world_size)}
    try:
        store.wait(list(words.values()), timeout)
    except RuntimeError as error:
        missing = [other for other, word in words.items() if not store.check([word])]
        raise RuntimeError(
            f"{name_ranks(missing)} did not come within {timeout}: look at those processes, and at "
            "the network between the nodes"
        ) from error
    return store, rank, world_size


def name_missing(control: links.Group, timeout: timedelta) -> None:
    """Wait for all ranks; without a time of its own this call takes torch's 30 minutes.

    Raises:
        RuntimeError: who did not come.
    """
    torch.distributed.monitored_barrier(control, timeout, wait_all_ranks=True)


def gather(mine: Any, control: links.Group, timeout: timedelta) -> list[Any]:
    """By rank.

    Raises:
        RuntimeError: who did not come.
    """
    name_missing(control, timeout)
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine, control)
    return everyone


def examine_links(
    args: Namespace | None, control: links.Group, timeout: timedelta, hosts: dict[int, str]
) -> list[Finding]:
    """Measure every expert parallel group; without options, all ranks as one group.

    Raises:
        RuntimeError: an exchange failed.
    """
    group = torch.distributed.group.WORLD
    if args is not None:
        with redirect_stdout(StringIO()):
            training.initialize_megatron()
        group = parallel_state.get_expert_model_parallel_group()
    assert group is not None
    if group.size() == 1:
        return [Finding("ok", "--expert-model-parallel-size 1: nothing is exchanged")]
    try:
        collect = partial(gather, control=control, timeout=timeout)
        measured, pairs = links.measure(group, collect, timeout)
    except RuntimeError as error:
        name_missing(control, timeout)
        raise RuntimeError(f"the exchange failed on every rank: {error}") from error
    return links.judge(measured, pairs, hosts)


def report(parts: dict[str, Found]) -> int:
    """Print all findings from rank 0.

    Returns:
        The exit code.
    """
    severities = [finding.severity for found in parts.values() for finding, _ in found]
    errors, warnings = (severities.count(kind) for kind in ("error", "warning"))
    if os.environ.get("RANK", "0") == "0":
        print(f"megatron_scmoe {__version__}, world size {os.environ.get('WORLD_SIZE', '1')}")
        for name, found in parts.items():
            if found:
                print(f"\n{name}")
            for finding, where in found:
                print(f"  {finding.severity:9}{f'[{where}] ' if where else ''}{finding.line}")
        print(f"\n{errors} errors, {warnings} warnings", flush=True)
    return 1 if errors else 0
