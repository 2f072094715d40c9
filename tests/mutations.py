"""Break one line of the package at a time: `make test` has to see it.

    python -m tests.mutations [--all] [NUMBER ...]

Each mutation is made in a copy of this tree, and the tests that are named beside it run there, the
cheapest that should fail. `--all` runs in their place all that `make test` runs: some minutes for
each mutation. Numbers choose mutations, as `--list` prints them. Exit code 1 if one survives, which
means that a test has lost its power, or if a text is not found once, which means that the code was
changed: write the mutation anew, as bad as it was.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).parents[1]
FAILED = 1  # pytest's exit code; others mean that it could not do its work
DEFAULT = ["-m", "not slow", "-p", "no:cacheprovider"]
ALL = "-n 3 --dist loadfile --no-loadscope-reorder"


class Mutation(NamedTuple):
    """One line that is made wrong."""

    file: str
    old: str
    """Occurs once in the file."""
    new: str
    tests: str
    """Arguments of pytest."""


UNIT, DISTRIBUTED, FUNCTIONAL = (
    f"tests/{kind}_tests/test_" for kind in ("unit", "distributed", "functional")
)

MUTATIONS = (
    # What is computed.
    Mutation(
        "megatron_scmoe/model/combine.py",
        "return SharedOutput(shared_output * shared_weight, routed_weight)",
        "return SharedOutput(shared_output * routed_weight, shared_weight)",
        f"{UNIT}layer.py -k 'oracle and cg2'",
    ),
    Mutation(
        "megatron_scmoe/huggingface/modeling_scmoe.py",
        "tapped = x if self.shares_norm else hidden_states",
        "tapped = x",
        f"{UNIT}huggingface_model.py -k 'equations and pos2'",
    ),
    Mutation(
        "megatron_scmoe/huggingface/modeling_scmoe.py",
        "output = sum(further, first)",
        "output = first",
        f"{UNIT}huggingface_model.py -k 'equations and dual'",
    ),
    Mutation(
        "megatron_scmoe/huggingface/modeling_scmoe.py",
        "latent, key_rope = past_key_values.update(latent, key_rope, self.layer_idx)",
        "latent, key_rope = past_key_values.update(latent, key_rope, 0)",
        f"{UNIT}huggingface_model.py -k 'cached and latent'",
    ),
    Mutation(
        "megatron_scmoe/huggingface/modeling_scmoe.py",
        "names = target_patterns[::-1] if",
        "names = target_patterns if",
        f"{UNIT}huggingface_model.py -k names_of_their_own",
    ),
    Mutation(
        "megatron_scmoe/model/moe.py",
        "first, *others = [chunk.restore(rows) for chunk, rows in returned]",
        "*others, first = [chunk.restore(rows) for chunk, rows in returned]",
        f"{DISTRIBUTED}expert_parallel.py -k 'two and chunks'",
    ),
    Mutation(
        "megatron_scmoe/model/experts/grouped.py",
        "stacked.partition_dim = weight.partition_dim + 1",
        "stacked.partition_dim = weight.partition_dim",
        f"{UNIT}experts.py",
    ),
    Mutation(
        "megatron_scmoe/model/dispatch/alltoall.py",
        "self._sort(rows, self._chunk_sizes.T, self._dispatcher.by_rank)",
        "self._sort(rows, self._chunk_sizes.T, self._dispatcher.by_expert)",
        f"{DISTRIBUTED}expert_parallel.py",
    ),
    Mutation(
        "megatron_scmoe/model/dispatch/once.py",
        "weights.transpose(0, 1).flatten(0, 1)",
        "weights.flatten(0, 1)",
        f"{DISTRIBUTED}dispatch_copies.py",
    ),
    Mutation(
        "megatron_scmoe/model/dispatch/relayed.py",
        "first = self._place * experts",
        "first = 0",
        f"{DISTRIBUTED}dispatch_copies.py",
    ),
    Mutation(
        "megatron_scmoe/overlap/relay.py",
        "return sums.index_add_(0, self._rows, copies.to(precision)).to(copies.dtype)",
        "return sums.index_copy_(0, self._rows, copies.to(precision)).to(copies.dtype)",
        f"{DISTRIBUTED}dispatch_copies.py",
    ),
    Mutation(
        "megatron_scmoe/overlap/relay.py",
        "by_rank = self._wanted(arrived).T.flatten()",
        "by_rank = self._wanted(arrived).flatten()",
        f"{DISTRIBUTED}dispatch_copies.py",
    ),
    Mutation(
        "megatron_scmoe/model/dispatch/once.py",
        "self._here = weights != NOT_HERE",
        "self._here = weights > 0",
        f"{DISTRIBUTED}dispatch_copies.py",
    ),
    Mutation(
        "megatron_scmoe/model/dispatch/passage.py",
        "received = self.received[:, self.tp_group.rank()]",
        "received = self.received[:, 0]",
        f"{DISTRIBUTED}expert_parallel.py",
    ),
    Mutation(
        "megatron_scmoe/model/dispatch/flex.py",
        "manager.token_indices = chosen.masked_fill(~is_routed, -1)",
        "manager.token_indices = chosen",
        f"{DISTRIBUTED}variants_apart.py",
    ),
    # Experts that lie on other ranks.
    Mutation(
        "megatron_scmoe/model/experts/placed.py",
        "offset[axis] = order[offset[axis]]",
        "offset[axis] = order.index(offset[axis])",
        f"{DISTRIBUTED}placement.py -k own_numbers",
    ),
    Mutation(
        "megatron_scmoe/model/experts/placed.py",
        "received = sorted(made, key=lambda place: (order[place] // each, place))",
        "received = list(made)",
        f"{DISTRIBUTED}placement.py -k bits",
    ),
    Mutation(
        "megatron_scmoe/model/routing/choice.py",
        "routing_map=self.routing_map.index_select(1, order),",
        "routing_map=self.routing_map.index_select(1, order.argsort()),",
        f"{DISTRIBUTED}placement.py -k bits",
    ),
    Mutation(
        "megatron_scmoe/c2r/place.py",
        "needed += member.T @ ((per_group == 0) * counts[:, None])",
        "needed += member.T @ ((per_group <= 1) * counts[:, None])",
        f"{UNIT}place.py -k search",
    ),
    Mutation(
        "megatron_scmoe/c2r/place.py",
        "overload = float(_beyond(of_rank, of_rank, max_imbalance).sum())",
        "overload = 0.0",
        f"{UNIT}place.py -k bound",
    ),
    Mutation(
        "megatron_scmoe/model/dispatch/alltoall.py",
        "rows = num_tokens * (chunk.rows_per_token or config.moe_router_topk)",
        "rows = num_tokens",
        f"{UNIT}layer.py -k host_option",
    ),
    Mutation(
        "megatron_scmoe/model/routing/dual.py",
        "others = scores.detach().scatter(1, self.taken, -torch.inf)",
        "others = scores.detach()",
        f"{UNIT}dual_gating.py -k 'oracle and distinct and own'",
    ),
    Mutation(
        "megatron_scmoe/model/routing/dual.py",
        "return scores, chosen & routing_map.any(dim=1, keepdim=True)",
        "return scores, routing_map",
        f"{UNIT}dual_gating.py -k losses",
    ),
    Mutation(
        "megatron_scmoe/host/optimizer.py",
        "padding.append(padding[-1] + bucket.grad_data.numel() - bucket.numel_unpadded)",
        "padding.append(0)",
        f"{UNIT}host.py -k padded",
    ),
    # Names on disk and layers of the block.
    Mutation(
        "megatron_scmoe/model/names.py",
        'MLP_NORM = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}',
        'MLP_NORM = {"pre_mlp_layernorm.": "pre_mlp_layernorm."}',
        f"{UNIT}layer_specs.py",
    ),
    Mutation(
        "megatron_scmoe/model/specs.py",
        "replacements[WrappedTorchNorm] = SequenceParallelTorchNorm",
        "replacements[WrappedTorchNorm] = WrappedTorchNorm",
        f"{DISTRIBUTED}expert_parallel.py",
    ),
    Mutation(
        "megatron_scmoe/model/specs.py",
        "if len(stage) > 0 and stage.start in units",
        "if len(stage) > 1 and stage.start - 1 in units",
        f"{UNIT}layer_specs.py",
    ),
    # Text from a checkpoint.
    Mutation(
        "megatron_scmoe/inference/kept.py",
        ".triu(begin + 1)",
        ".triu(begin)",
        f"{DISTRIBUTED}inference.py -k 'single and pos2'",
    ),
    Mutation(
        "megatron_scmoe/inference/sampling.py",
        "[sampling.seed + number for number in numbers]",
        "[sampling.seed for number in numbers]",
        f"{UNIT}generate.py -k alone",
    ),
    Mutation(
        "megatron_scmoe/model/experts/offload/cache.py",
        "(other for other in self._slots if not self._needed[other])",
        "(other for other in self._slots)",
        f"{UNIT}expert_cache.py",
    ),
    Mutation(
        "megatron_scmoe/model/experts/offload/cache.py",
        "self._slots.move_to_end(expert)",
        "self._slots[expert]",
        f"{UNIT}expert_cache.py",
    ),
    Mutation(
        "megatron_scmoe/model/experts/offload/experts.py",
        "return torch.cat([outputs[expert] for expert in due]), None",
        "return torch.cat(list(outputs.values())), None",
        f"{DISTRIBUTED}offload.py",
    ),
    Mutation(
        "megatron_scmoe/model/experts/offload/tiers.py",
        "offset += size",
        "offset += 0 * size",
        f"{DISTRIBUTED}offload.py",
    ),
    Mutation(
        "megatron_scmoe/inference/offload.py",
        "free -= home  # the same memory",
        "free -= 0  # the same memory",
        f"{UNIT}offload_plan.py",
    ),
    Mutation(
        "megatron_scmoe/inference/kept.py",
        "draws = [self._length >= len(prompt) for prompt in self._prompts]",
        "draws = [self._length > len(prompt) for prompt in self._prompts]",
        f"{DISTRIBUTED}inference.py -k 'single and pos2'",
    ),
    Mutation(
        "megatron_scmoe/inference/generation.py",
        "chosen = sampler.choose(step.logits[:, : limits.vocabulary], step.rows, draws)",
        "chosen = sampler.choose(step.logits, step.rows, draws)",
        f"{DISTRIBUTED}inference.py -k 'single and pos2'",
    ),
    Mutation(
        "megatron_scmoe/inference/generation.py",
        "numbers = order[first : first + batch_size * replicas][rank::replicas]",
        "numbers = order[first : first + batch_size * replicas]",
        f"{DISTRIBUTED}inference.py -k replicas",
    ),
    Mutation(
        "megatron_scmoe/inference/generation.py",
        "if draw and token == limits.end:",
        "if token == limits.end:",
        f"{DISTRIBUTED}inference.py -k document",
    ),
    Mutation(
        "megatron_scmoe/inference/sampling.py",
        "logits = TorchSampling.filter_logits(logits, self.temperature, top_k, 0.0)",
        "logits = TorchSampling.filter_logits(logits, 1.0, top_k, 0.0)",
        f"{UNIT}generate.py -k filters",
    ),
    # When it runs.
    Mutation(
        "megatron_scmoe/overlap/branch.py",
        "self.transfer = Transfer(self.combine.mirrored(), [self.grad], log)",
        "self.transfer = Transfer(self.combine, [self.grad], log)",
        f"{DISTRIBUTED}branch.py",
    ),
    Mutation(
        "megatron_scmoe/overlap/branch.py",
        "if not self._overlap:",
        "if self._overlap:",
        f"{DISTRIBUTED}overlap_order.py",
    ),
    Mutation(
        "megatron_scmoe/overlap/branch.py",
        "whole[: grad.shape[0]] = grad",
        "whole[-grad.shape[0] :] = grad",
        f"{UNIT}layer.py -k 'routing_case and skewed and pos2'",
    ),
    Mutation(
        "megatron_scmoe/overlap/streams.py",
        "tensor.record_stream(compute)",
        "tensor.record_stream(self._side)",
        f"{UNIT}streams.py -k goes_back",
    ),
    Mutation(
        "megatron_scmoe/overlap/streams.py",
        "self._side.wait_event(ready or cuda.current_stream(self._device).record_event())",
        "self._side.wait_event(cuda.current_stream(self._device).record_event())",
        f"{UNIT}streams.py -k mistake",
    ),
    Mutation(
        "megatron_scmoe/overlap/streams.py",
        "self._works.clear()",
        "self._works.copy()",
        f"{UNIT}kept_bytes.py -k nothing_else",
    ),
    Mutation(
        "megatron_scmoe/overlap/collectives.py",
        "return AllToAll(self.group, self.output_splits, self.input_splits)",
        "return AllToAll(self.group, self.input_splits, self.output_splits)",
        f"{DISTRIBUTED}branch.py",
    ),
    Mutation(
        "megatron_scmoe/overlap/collectives.py",
        "return tensor[: sum(self.input_splits)]",
        "return tensor[-sum(self.input_splits) :]",
        f"{UNIT}layer.py -k 'routing_case and skewed and pos2'",
    ),
    Mutation(
        "megatron_scmoe/overlap/schedule.py",
        "launch = tap + (min(operators_ahead, route.slots.forward) if overlap else 0)",
        "launch = tap + (operators_ahead if overlap else 0)",
        f"{UNIT}schedule.py",
    ),
    Mutation(
        "megatron_scmoe/overlap/schedule.py",
        "steps += [(tap, wait), (experts, [*compute, *send, *back])]",
        "steps += [(tap, wait), (experts, [*compute, *back, *send])]",
        f"{UNIT}schedule.py",
    ),
    Mutation(
        "megatron_scmoe/overlap/measure/cost.py",
        "return min(fastest, key=lambda slot: (abs(2 * slot - operators), slot))",
        "return min(fastest, key=lambda slot: slot)",
        f"{UNIT}cost.py",
    ),
    Mutation(
        "megatron_scmoe/overlap/measure/adaptive.py",
        "means = [value / ranks for value in values]",
        "means = [value for value in values]",
        f"{UNIT}adaptive.py",
    ),
    # What is refused, and what is set.
    Mutation(
        "megatron_scmoe/model/norm.py",
        "lambda config: config.persist_layer_norm, _TORCHS",
        "lambda config: False, _TORCHS",
        f"{UNIT}every_refusal.py",
    ),
    Mutation(
        "megatron_scmoe/checks/shortcut.py",
        'and config.moe_router_score_function == "softmax"',
        'and config.moe_router_score_function != "softmax"',
        f"{UNIT}every_refusal.py",
    ),
    Mutation(
        "megatron_scmoe/checks/layout.py",
        "return heads % groups != 0 and",
        "return groups % heads == heads and",
        f"{UNIT}every_refusal.py",
    ),
    Mutation(
        "megatron_scmoe/checks/data.py",
        "if args.padded_vocab_size >= tokens:",
        "if args.padded_vocab_size > tokens:",
        f"{UNIT}every_refusal.py",
    ),
    Mutation(
        "megatron_scmoe/arguments.py",
        "if COMBINES[scmoe.scmoe_combine].host_gate and not args.moe_shared_expert_gate:",
        "if not COMBINES[scmoe.scmoe_combine].host_gate and not args.moe_shared_expert_gate:",
        f"{UNIT}arguments.py",
    ),
    # Checkpoints.
    Mutation(
        "megatron_scmoe/run/checkpoint/contents.py",
        "elif path.stat().st_size < size:",
        "elif path.stat().st_size == 0:",
        f"{FUNCTIONAL}checkpoints.py -k truncated",
    ),
    Mutation(
        "megatron_scmoe/run/checkpoint/record.py",
        'if not other.with_suffix("").is_dir():',
        'if other.with_suffix("").is_dir():',
        f"{FUNCTIONAL}checkpoints.py -k record_says",
    ),
    Mutation(
        "megatron_scmoe/run/checkpoint/aside.py",
        "if aside.is_dir() and whole(folder, iteration):",
        "if aside.is_dir() and iteration_folder(folder, iteration).is_dir():",
        f"{UNIT}aside.py",
    ),
    Mutation(
        "megatron_scmoe/run/checkpoint/resume.py",
        "args.global_batch_size = size",
        "args.global_batch_size = None",
        f"{FUNCTIONAL}checkpoints.py -k other_number_of_ranks",
    ),
    Mutation(
        "megatron_scmoe/run/checkpoint/param_schedule.py",
        "if others or not set(changed) <= by_length:",
        "if others or set(changed) <= by_length:",
        f"{FUNCTIONAL}checkpoints.py -k 'longer_run or lr'",
    ),
    Mutation(
        "megatron_scmoe/run/checkpoint/transfer.py",
        "state_dict[chunk] |= {name: entry.data for name, entry in entries.items()}",
        "state_dict[chunk] |= {name: None for name, entry in entries.items()}",
        f"{FUNCTIONAL}checkpoints.py -k 'baseline and ours'",
    ),
    Mutation(
        "megatron_scmoe/run/checkpoint/writer.py",
        "if writer is not None and writer.exitcode is not None:",
        "if writer is not None and writer.exitcode == 0:",
        f"{FUNCTIONAL}checkpoints.py -k writer_of_async",
    ),
    Mutation(
        "megatron_scmoe/run/checkpoint/writer.py",
        "if received is not None and received.si_pid == rank.pid:",
        "if received is not None:",
        f"{UNIT}writer.py",
    ),
    Mutation(
        "megatron_scmoe/run/checkpoint/writer.py",
        "while rank.is_alive():",
        "while True:",
        f"{UNIT}writer.py",
    ),
    # Lost ranks and unfit machines.
    Mutation(
        "megatron_scmoe/run/watch/verdict.py",
        "other.key == pending.key and other.number >= pending.number > 0",
        "other.key == pending.key and other.number > pending.number > 0",
        f"{UNIT}watch.py",
    ),
    Mutation(
        "megatron_scmoe/run/watch/board.py",
        'self._do(lambda store: store.multi_set(keys, ["alarm"] * len(keys)))',
        'self._do(lambda store: store.multi_set(keys[:1], ["alarm"]))',
        f"{FUNCTIONAL}lost_ranks.py -k 'test_stalled or test_killed'",
    ),
    Mutation(
        "megatron_scmoe/run/watch/watch.py",
        "limit = timeout - min(MARGIN_S, timeout / 10)",
        "limit = 10 * timeout",
        f"{FUNCTIONAL}lost_ranks.py -k 'test_stopped or test_stalled'",
    ),
    Mutation(
        "megatron_scmoe/run/doctor/links.py",
        "own = {rank: statistics.median_low(times) for rank, times in of_rank.items()}",
        "own = {rank: max(times) for rank, times in of_rank.items()}",
        f"{UNIT}doctor.py",
    ),
    Mutation(
        "megatron_scmoe/words.py",
        "if runs and value == runs[-1][-1] + 1:",
        "if runs and value >= runs[-1][-1] + 1:",
        f"{UNIT}doctor.py",
    ),
    # Counting and planning.
    Mutation(
        "megatron_scmoe/planner/size.py",
        "columns = (self.heads + gate + 2 * self.groups) * width",
        "columns = (self.heads + gate + self.groups) * width",
        f"{UNIT}counts.py",
    ),
    Mutation(
        "megatron_scmoe/planner/memory.py",
        "return [0] * min(training.num_microbatches, pp_size - pp_rank)",
        "return [0] * min(training.num_microbatches, pp_size)",
        f"{DISTRIBUTED}memory.py",
    ),
    Mutation(
        "megatron_scmoe/planner/predict.py",
        "hidden_share=1 - exposed / communication if communication else 1.0,",
        "hidden_share=exposed / communication if communication else 1.0,",
        f"{UNIT}plan_overlap.py",
    ),
    # What of Megatron is replaced.
    Mutation(
        "megatron_scmoe/host/cpu.py",
        "return torch.cat([part[:n] for part, n in zip(parts, output_split_sizes, strict=True)])",
        "return torch.cat([part[-n:] for part, n in zip(parts, output_split_sizes, strict=True)])",
        f"{DISTRIBUTED}expert_parallel.py",
    ),
    Mutation(
        "megatron_scmoe/host/cpu.py",
        "torch.set_rng_state(state)",
        "torch.get_rng_state()",
        f"{FUNCTIONAL}reproducibility.py -k twice",
    ),
    Mutation(
        "megatron_scmoe/host/optimizer.py",
        'self.optimizer.state[param]["step"] = torch.tensor(float(group["step"]))',
        'self.optimizer.state[param]["step"] = torch.tensor(0.0)',
        f"{FUNCTIONAL}pretrain.py -k resume",
    ),
    # Data and reports.
    Mutation(
        "megatron_scmoe/commands/preprocess/encoding.py",
        "lengths[-1] += 1",
        "lengths[0] += 1",
        "tests/unit_tests/preprocess_data/test_preprocess_golden.py",
    ),
    Mutation(
        "megatron_scmoe/commands/preprocess/dataset_writer.py",
        "self._parts[(self.documents + number) % len(self._parts)].add(",
        "self._parts[0].add(",
        "tests/unit_tests/preprocess_data/test_preprocess_data.py",
    ),
    Mutation(
        "megatron_scmoe/commands/trace_report/analysis.py",
        "return self.hidden / self.in_flight if self.in_flight else 0.0",
        "return self.exposed / self.in_flight if self.in_flight else 0.0",
        f"{UNIT}overlap_report.py",
    ),
    # MoE++.
    Mutation(
        "megatron_scmoe/model/routing/heterogeneous.py",
        "eta[-self._at_home :].fill_(self._tau)",
        "eta[: self._at_home].fill_(self._tau)",
        f"{UNIT}moepp.py -k loss",
    ),
    Mutation(
        "megatron_scmoe/model/experts/at_home.py",
        "of_input, of_vector = (probs",
        "of_vector, of_input = (probs",
        f"{UNIT}moepp.py -k equations",
    ),
    Mutation(
        "megatron_scmoe/model/routing/__init__.py",
        "return weighted / (weighted + at_home)",
        "return weighted / (routed + at_home)",
        f"{UNIT}moepp.py -k shares",
    ),
    # LongCat-Flash.
    Mutation(
        "megatron_scmoe/model/routing/longcat.py",
        "wanted = self._routed_topk / (self.topk * self._routed)",
        "wanted = 1 / len(counts)",
        f"{UNIT}longcat.py -k missing",
    ),
    Mutation(
        "megatron_scmoe/model/attention.py",
        "(config.hidden_size / rank) ** 0.5",
        "(config.hidden_size / rank) ** 0.25",
        f"{UNIT}longcat.py -k transformers",
    ),
    # C2R.
    Mutation(
        "megatron_scmoe/model/routing/partners.py",
        "own.scatter(1, self.partners[:, : self._top_t], True)",
        "own.scatter(1, self.partners[:, 1 : self._top_t + 1], True)",
        f"{UNIT}c2r_router.py -k rule",
    ),
    Mutation(
        "megatron_scmoe/model/routing/partners.py",
        "return scores, of_rule & routing_map.any(dim=1, keepdim=True)",
        "return scores, routing_map",
        f"{UNIT}c2r_router.py -k balancing",
    ),
    Mutation(
        "megatron_scmoe/overlap/measure/chosen_together.py",
        "chosen = chosen & counts[:, None]",
        "counts = counts | True",
        f"{UNIT}collaboration_counts.py -k padding",
    ),
    Mutation(
        "megatron_scmoe/overlap/measure/chosen_together.py",
        "_of_run = Collector(modules, torch.is_grad_enabled)",
        "_of_run = Collector(modules, lambda: True)",
        f"{UNIT}collaboration_counts.py -k where_gradients",
    ),
    Mutation(
        "megatron_scmoe/overlap/measure/chosen_together.py",
        "layers[number] = _sum(layers[number], layer) if number in layers else layer",
        "layers[number] = layer",
        f"{FUNCTIONAL}c2r.py -k counts_all",
    ),
    Mutation(
        "megatron_scmoe/c2r/collaboration.py",
        "saved = int(self.together[same].sum()) // 2",
        "saved = int(self.together[same].sum())",
        f"{UNIT}c2r.py -k groups_of_a_token",
    ),
    Mutation(
        "megatron_scmoe/c2r/lists.py",
        'layers[number] = np.argsort(-ranked, axis=1, kind="stable")[:, :-1]',
        'layers[number] = np.argsort(ranked, axis=1, kind="stable")[:, 1:]',
        f"{UNIT}c2r.py -k partners",
    ),
    Mutation(
        "megatron_scmoe/model/routing/partners.py",
        "self.partners.copy_(torch.from_numpy(self._given.layers[layer_number]))",
        "self.partners.copy_(torch.from_numpy(min(self._given.layers.items())[1]))",
        f"{UNIT}c2r_router.py",
    ),
    Mutation(
        "megatron_scmoe/huggingface/modeling_scmoe.py",
        'return ranked.masked_fill(~allowed[ranked.argmax(dim=1)], float("-inf"))',
        'return ranked.masked_fill(~allowed[ranked.argmin(dim=1)], float("-inf"))',
        f"{UNIT}huggingface_model.py -k hosts_layers",
    ),
    Mutation(
        "megatron_scmoe/c2r/placement.py",
        "return placed.rank_of(layer) // (placed.ranks // groups)",
        "return placed.rank_of(layer)",
        f"{UNIT}plan_overlap.py -k counted_them",
    ),
    Mutation(
        "megatron_scmoe/planner/copies.py",
        "none = lgamma(rest + 1) - lgamma(rest - chosen + 1)",
        "none = lgamma(rest) - lgamma(rest - chosen)",
        f"{UNIT}plan_overlap.py -k likely",
    ),
    # Quality.
    Mutation(
        "tools/quality/runs.py",
        "return min(results, key=lambda result: result.validation).rate",
        "return max(results, key=lambda result: result.validation).rate",
        f"{UNIT}quality.py -k least_loss",
    ),
    Mutation(
        "tools/quality/runs.py",
        "if result.options != task.contender.command_line(self.scale) or result.rate != task.rate:",
        "if result.rate != task.rate:",
        f"{UNIT}quality.py",
    ),
    Mutation(
        "tools/quality/statistics.py",
        "return student(self.mean / error, count - 1)",
        "return student(self.mean / error * math.sqrt(count), count - 1)",
        f"{UNIT}quality.py -k verdicts",
    ),
    # What is refused, and what is said.
    Mutation(
        "megatron_scmoe/checks/ranges.py",
        "above = value > self.least if self.open_least else value >= self.least",
        "above = value >= self.least",
        f"{UNIT}every_refusal.py -k range",
    ),
    Mutation(
        "megatron_scmoe/checks/refusal.py",
        'raise ValueError(" ".join(lines))',
        "raise ValueError(lines[0])",
        f"{UNIT}every_refusal.py -k all_at_once",
    ),
    Mutation(
        "megatron_scmoe/planner/twin.py",
        "for dest in SHARED_EXPERT & args.scmoe_implied.keys():",
        "for dest in SHARED_EXPERT & set():",
        f"{UNIT}plan_overlap.py -k one_flag",
    ),
    Mutation(
        "megatron_scmoe/host/wheel.py",
        'track_names = [name for name in track_names if name != "load_balancing_loss"]',
        "pass",
        f"{FUNCTIONAL}host_defects.py -k balancing",
    ),
    Mutation(
        "megatron_scmoe/recipe.py",
        "return [*(word for words in found for word in words), *typed]",
        "return [*typed, *(word for words in found for word in words)]",
        f"{UNIT}recipe.py",
    ),
    # To Hugging Face and back.
    Mutation(
        "megatron_scmoe/huggingface/layouts.py",
        "parts = grouped.split([queries * head, head, head], dim=1)",
        "parts = grouped.split([head, head, queries * head], dim=1)[::-1]",
        f"{FUNCTIONAL}convert_checkpoint.py -k megatron_has",
    ),
    Mutation(
        "megatron_scmoe/huggingface/export.py",
        "extra = sorted((reader.stored.keys() | reader.objects) - taken.keys() - set(left))",
        "extra: list[str] = []",
        f"{FUNCTIONAL}convert_checkpoint.py -k less_norms",
    ),
    Mutation(
        "megatron_scmoe/huggingface/torch_dist.py",
        "offsets = torch.Size([*begin, *[0] * values.dim()])",
        "offsets = torch.Size([*begin[:-1], *[0] * (values.dim() + len(begin[-1:]))])",
        f"{FUNCTIONAL}convert_checkpoint.py -k comes_back",
    ),
    Mutation(
        "megatron_scmoe/huggingface/upcycle.py",
        "return Where(theirs, part=slice_, dimension=int(down), scale=0.0 if down else 1.0)",
        "return Where(theirs, part=slice_, dimension=int(down), scale=1.0)",
        f"{FUNCTIONAL}dialects.py -k upcycled",
    ),
    Mutation(
        "megatron_scmoe/run/checkpoint/unpickle.py",
        "if name not in _OF_METADATA.get(module, ()):",
        "if module not in _OF_METADATA:",
        f"{FUNCTIONAL}hostile_checkpoints.py -k module",
    ),
)


def times_found(mutation: Mutation, tree: Path = REPOSITORY) -> int:
    """How often the text that is to be made wrong occurs in its file, 0 without that file."""
    path = tree / mutation.file
    return path.read_text().count(mutation.old) if path.is_file() else 0


@contextmanager
def mutated(mutation: Mutation, tree: Path) -> Iterator[None]:
    """Break a tree inside the block."""
    path = tree / mutation.file
    whole = path.read_text()
    path.write_text(whole.replace(mutation.old, mutation.new))
    try:
        yield
    finally:
        path.write_text(whole)


def copy_tree(folder: Path) -> Path:
    """What git knows of this tree and what it does not ignore, as it is now."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, folder / name)
    return folder


def run_tests(tree: Path, tests: str) -> subprocess.CompletedProcess:
    """pytest in a tree, whose package comes before an installed one."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    # Compiled code counts as new if time and size of its source do not change: a mutation's would
    # outlive it.
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    command = [sys.executable, "-m", "pytest", "-x", "-q", *DEFAULT, *shlex.split(tests)]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


@cache
def complaint(tree: Path, tests: str) -> str:
    """What tests say of a whole tree; nothing if they pass."""
    done = run_tests(tree, tests)
    return "" if done.returncode == 0 else done.stdout[-2000:]


def judge(mutation: Mutation, tree: Path, tests: str) -> str:
    """What became of a mutation: "caught", or else why not."""
    found = times_found(mutation, tree)
    if found != 1:
        return f"its text is there {found} times, not once: write it anew"
    if text := complaint(tree, tests):
        return f"its tests do not pass without it:\n{text}"
    with mutated(mutation, tree):
        broken = run_tests(tree, tests)
    if broken.returncode == FAILED:
        return "caught"
    if broken.returncode == 0:
        return "SURVIVES"
    return f"its tests could not run:\n{broken.stdout[-2000:]}"


def main() -> int:
    """Run the program.

    Returns:
        the exit code.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--all", action="store_true", help="run all that make test runs")
    parser.add_argument("--list", action="store_true", help="print the mutations and stop")
    parser.add_argument("numbers", nargs="*", type=int, help="of mutations; all if there are none")
    options = parser.parse_args()
    chosen = options.numbers or range(1, len(MUTATIONS) + 1)
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = REPOSITORY if options.list else copy_tree(Path(folder))
        for number in chosen:
            mutation = MUTATIONS[number - 1]
            print(f"{number:3} {mutation.file}: {mutation.old.strip()}", flush=True)
            if not options.list:
                outcome = judge(mutation, tree, ALL if options.all else mutation.tests)
                bad += outcome != "caught"
                print(f"    {outcome}", flush=True)
    print(f"{len(chosen)} mutations" + ("" if options.list else f", {bad} not caught"))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
