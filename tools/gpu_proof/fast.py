"""How fast: experts, units against stock layers of equal FLOPs, MFU, and memory as reported.

The chip's own rates come first: a big bf16 product and a big copy, in the same process. Every time
stands beside the floor that follows from them.

    units       a pair of layers of the paper's models (one layer, where every layer is a MoE), as
                on one rank of four: stock top-2, stock top-1 + shared expert, and a unit at every
                position. Without communication the ratio shows what hooks, permutation and side
                stream cost; on the emulated link what hiding gains
    experts     forward + backward of grouped_mm, SequentialMLP, Transformer Engine's grouped GEMM
    memory      weights, gradients, Adam, kept activations and the peak of a training step against
                what memory.py reports for the same model

MFU is over 989 TFLOP/s, dense bf16 of the data sheets. It counts matrix products as Megatron does,
backward twice, and half of the score matrix.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_scmoe.model.builder import ScMoEModelBuilder, ScMoEModelConfig
from megatron_scmoe.planner.memory import MEBIBYTE, Training, memory_of_ranks
from megatron_scmoe.planner.size import model_size
from tools.benchmarks.contenders import Contender, contenders
from tools.benchmarks.emulated_link import Link, emulated_link
from tools.benchmarks.one_device import Bench, expert_kinds
from tools.benchmarks.paper_shapes import SHAPES, Inputs, Shape, configs, host_config, unit_of
from tools.benchmarks.process_groups import one_rank
from tools.gpu_proof.layers import (
    BFLOAT16,
    RANKS,
    TINY,
    describe_layers,
    fastest,
    missing_transformer_engine,
)
from tools.gpu_proof.results import Results
from tools.gpu_proof.timing import (
    BFLOAT16_FLOPS_PER_S,
    PartStep,
    Rates,
    Timing,
    do_steps,
    in_turns,
)

MODELS = ("gpt2-moe-medium", "gpt3-moe-xl", "llama2-moe")
SHARE = 0.3
"""Of communication in the stock top-2 MoE layer's time, on the emulated link."""
VOCABULARY = 8192
MEMORY_TOLERANCE = 0.05
BACKWARD_AND_FORWARD = 3
"""Times the FLOPs of the forward pass."""


def run(results: Results, device: torch.device, seconds: float) -> None:
    """See the module."""
    deadline = time.monotonic() + seconds
    with one_rank():
        rates = Rates.measure(device)
        results.measured(
            "rates of the chip",
            "bf16 product; copy, read and written",
            product_flops_per_s=rates.flops_per_s,
            copy_bytes_per_s=rates.bytes_per_s,
        )
        proof = FastPart(results, device, rates)
        steps = [
            *(PartStep(f"{name}: units", partial(proof.units, name), 12) for name in MODELS),
            *(PartStep(f"{name}: experts", partial(proof.experts, name), 6) for name in MODELS),
            *(
                PartStep(f"{name}: memory, {impl}", partial(proof.memory, name, impl), 8, missing)
                for name in MODELS
                for impl, missing in (
                    ("local", None),
                    ("transformer_engine", missing_transformer_engine(device)),
                )
            ),
        ]
        do_steps(results, steps, deadline)


class FastPart:
    """What is measured, at the sizes of the device."""

    def __init__(self, results: Results, device: torch.device, rates: Rates) -> None:
        self._results = results
        self._device = device
        self._rates = rates
        self._tiny = device.type == "cpu"
        self._seq_length, self._micro_batch_size = (16, 2) if self._tiny else (2048, 4)
        self._turns, self._steps = (2, 1) if self._tiny else (7, 4)

    # Units. ---------------------------------------------------------------------------------------

    def units(self, name: str) -> None:
        """Units against stock layers, forward + backward, without communication and with it."""
        shape = self._shape(name)
        inputs = self._inputs(shape)
        bench = Bench(shape, inputs, RANKS, steps=self._steps, **fastest(self._device))
        blocks = {contender: bench.build(contender) for contender in contenders(shape)}
        calls = {one.name: partial(inputs.train, block) for one, block in blocks.items()}
        flops = {one.name: self._flops(bench, one) for one in blocks}
        floors = {
            one.name: self._rates.floor_s(flops[one.name], _least_bytes(block, inputs.grad))
            for one, block in blocks.items()
        }
        link = bench.links([SHARE])[SHARE]
        for where, times in (
            ("without communication", self._in_turns(calls)),
            (f"on a link with {SHARE:.0%}", self._on_link(link, blocks, calls, bench)),
        ):
            for contender, timing in times.items():
                self._unit(f"{name}: {contender}, {where}", contender, times, floors)
                if where == "without communication":
                    self._mfu(f"{name}: {contender}, MFU", timing, flops[contender])

    def _unit(
        self, name: str, contender: str, times: dict[str, Timing], floors: dict[str, float]
    ) -> None:
        timing = times[contender]
        values = timing.beside(floors[contender]) | {
            "over_top2_ratio": timing.median_s / times["top2"].median_s,
            "over_shared_ratio": timing.median_s / times["shared"].median_s,
        }
        note = describe_layers(self._device)
        if contender in ("top2", "shared"):
            self._results.measured(name, note, **values)
            return
        # Two decimals, as the goal has.
        worst = max(values["over_top2_ratio"], values["over_shared_ratio"])
        self._results.goal(name, round(worst, 2) <= 1.0, note, **values)

    def _mfu(self, name: str, timing: Timing, flops: int) -> None:
        self._results.measured(
            name,
            f"{describe_layers(self._device)}; layers alone, over 989 TFLOP/s",
            mfu_share=flops / timing.median_s / BFLOAT16_FLOPS_PER_S,
            of_measured_product_share=flops / timing.median_s / self._rates.flops_per_s,
            model_flops=flops,
        )

    def _on_link(
        self,
        link: Link,
        blocks: dict[Contender, Any],
        calls: Mapping[str, Callable[[], object]],
        bench: Bench,
    ) -> dict[str, Timing]:
        for contender, block in blocks.items():
            if contender.position != "none":
                slots, _ = bench.choose(block, link, contender)
                unit_of(block).slots = slots
        with emulated_link(link):
            return self._in_turns(calls)

    def _flops(self, bench: Bench, contender: Contender) -> int:
        """Of a forward and backward pass of the layers on one rank."""
        config, scmoe = configs(bench.shape, contender, bench.num_layers, **bench.host_options)
        model = ScMoEModelConfig(
            transformer=config, scmoe=scmoe, vocab_size=1, seq_length=self._seq_length
        )
        size = model_size(model, self._seq_length, self._micro_batch_size)
        outside = size.embedding.flops + size.output.flops
        tokens = self._seq_length * self._micro_batch_size
        return BACKWARD_AND_FORWARD * tokens * (size.model_flops - outside)

    def _in_turns(self, calls: Mapping[str, Callable[[], object]]) -> dict[str, Timing]:
        return in_turns(calls, self._device, self._turns, self._steps)

    def _shape(self, name: str) -> Shape:
        """The model's, or a tiny one with its layout."""
        shape = SHAPES[name]
        if not self._tiny:
            return shape
        return replace(TINY, moe_every_layer=shape.moe_every_layer, llama=shape.llama)

    def _inputs(self, shape: Shape) -> Inputs:
        return Inputs.draw(shape, self._seq_length, self._micro_batch_size, torch.bfloat16)

    # Experts. -------------------------------------------------------------------------------------

    def experts(self, name: str) -> None:
        """One rank's experts with the rows of top-1, evenly and with one busy expert."""
        shape = replace(self._shape(name), num_experts=self._shape(name).num_experts // RANKS)
        config = host_config(shape, contenders(shape)[0], 2, **BFLOAT16)
        num_rows = self._seq_length * self._micro_batch_size
        even = torch.full((shape.num_experts,), num_rows // shape.num_experts)
        busy = even // 2
        busy[0] += num_rows - int(busy.sum())
        groups = ProcessGroupCollection.use_mpu_process_groups()
        kinds = {
            kind: make(shape.num_experts, config, pg_collection=groups)
            .to(self._device)
            .to(torch.bfloat16)
            for kind, make in expert_kinds().items()
        }
        gradient_and_rows = partial(
            torch.randn, num_rows, shape.hidden_size, dtype=torch.bfloat16, device=self._device
        )
        rows, grad = gradient_and_rows().requires_grad_(), gradient_and_rows()
        probs = torch.rand(num_rows, device=self._device)

        def once(experts: Any, sizes: torch.Tensor) -> None:
            experts(rows, sizes, probs)[0].backward(grad)
            experts.zero_grad(set_to_none=True)

        matrices = (2 if config.gated_linear_unit else 1) + 1
        flops = 3 * 2 * num_rows * matrices * shape.hidden_size * shape.ffn_hidden_size
        for load, sizes in (("even", even), ("one busy expert", busy)):
            times = self._in_turns({one: partial(once, kinds[one], sizes) for one in kinds})
            floor_s = self._rates.floor_s(flops, _least_bytes(kinds["grouped_mm"], grad))
            self._experts(f"{name}: experts, {load}", times, floor_s)

    def _experts(self, name: str, times: dict[str, Timing], floor_s: float) -> None:
        for kind, timing in times.items():
            self._results.measured(f"{name}, {kind}", **timing.beside(floor_s))
        for kind, least in (("SequentialMLP", 1.0), ("Transformer Engine", 0.95)):
            over = f"{name}: grouped_mm over {kind}"
            if kind not in times:
                self._results.skipped(over, f"needs {missing_transformer_engine(self._device)}")
                continue
            speed = times[kind].median_s / times["grouped_mm"].median_s
            self._results.goal(over, speed >= least, speed_ratio=speed)

    # Memory. --------------------------------------------------------------------------------------

    def memory(self, name: str, transformer_impl: str) -> None:
        """Four layers trained for three steps: what the allocator says against the report."""
        shape = self._shape(name)
        if not self._tiny:
            # A quarter where every layer has experts: with Adam's state they fill the device.
            shape = replace(shape, num_experts=2 if shape.moe_every_layer else 8)
        units = {row.position: row for row in contenders(shape)}
        options = {
            **BFLOAT16,
            "transformer_impl": transformer_impl,
            "moe_grouped_gemm": True,
            "moe_layer_freq": [1] * 4 if shape.moe_every_layer else [0, 1] * 2,
        }
        config, scmoe = configs(shape, units.get("pos2", units["pos1"]), 4, **options)
        model = ScMoEModelConfig(
            transformer=config,
            scmoe=scmoe,
            vocab_size=64 if self._tiny else VOCABULARY,
            seq_length=self._seq_length,
            share_embeddings_and_output_weights=True,
            position_embedding_type="rope",
        )
        size = model_size(model, self._seq_length, self._micro_batch_size)
        training = Training(world_size=1, num_microbatches=1)
        (report,) = memory_of_ranks(model, size, training)
        measured = _train(model, self._seq_length, self._micro_batch_size, self._device)
        if measured is None:
            self._results.skipped(
                f"{name}: memory, {transformer_impl}",
                "the step ran; a CPU's allocator is not measured",
            )
            return
        reported = {
            "weights, gradients, optimizer": report.weight_and_optimizer_bytes,
            "kept activations": report.activation_bytes,
            "peak of forward and backward": report.total_bytes,
        }
        for (what, expected), found in zip(reported.items(), measured, strict=True):
            self._results.goal(
                f"{name}: memory, {transformer_impl}: {what}",
                abs(found / expected - 1) <= MEMORY_TOLERANCE,
                measured_mib=found / MEBIBYTE,
                reported_mib=expected / MEBIBYTE,
                over_report_ratio=found / expected,
            )


def _least_bytes(module: Any, hidden_states: Tensor) -> int:
    """That a forward and backward pass reads and writes: weights and their gradients once, the
    input, the output and both of their gradients, each of the size of `hidden_states`."""
    return 2 * sum(weight.nbytes for weight in module.parameters()) + 4 * hidden_states.nbytes


def _train(
    model: ScMoEModelConfig, seq_length: int, micro_batch_size: int, device: torch.device
) -> tuple[int, int, int] | None:
    """Bytes of weights, gradients and optimizer, what a forward pass leaves beside them, and the
    peak of forward and backward, in the last of three steps of Adam; None on a CPU."""

    def allocated() -> int:
        return 0 if device.type == "cpu" else torch.cuda.memory_allocated()

    others = allocated()
    (chunk,) = ScMoEModelBuilder(model).build_distributed_models(
        ProcessGroupCollection.use_mpu_process_groups(),
        DistributedDataParallelConfig(grad_reduce_in_fp32=True),
    )
    precision: Any = {"bf16": True, "params_dtype": model.transformer.params_dtype}
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=1e-4, **precision), [chunk])
    assert model.vocab_size is not None
    size = (micro_batch_size, seq_length)
    tokens = torch.randint(model.vocab_size, size, device=device)
    positions = torch.arange(seq_length, device=device).expand(size)
    mask = torch.ones(seq_length, seq_length, dtype=torch.bool, device=device).triu(1)[None, None]
    for _ in range(3):
        chunk.zero_grad_buffer()
        optimizer.zero_grad()
        state = allocated()
        if device.type != "cpu":
            torch.cuda.reset_peak_memory_stats()
        loss = chunk(tokens, positions, mask, labels=tokens).mean()
        kept = allocated() - state
        loss.backward()
        chunk.finish_grad_sync()
        peak = 0 if device.type == "cpu" else torch.cuda.max_memory_allocated()
        optimizer.step()
    if device.type == "cpu":
        return None
    return state - others, kept, peak - others
