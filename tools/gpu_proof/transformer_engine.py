"""Layers of Transformer Engine give what local layers give, and so do grouped experts.

Every block is compared with the same block of the local spec in float32: output and all gradients,
by ||found - expected|| / ||expected||. In bf16 an implementation may be as far from it as the local
spec in bf16 is, twice at most, or 1e-2. Routing is forced to be the same.

    grouped experts      grouped_mm against a loop, forward and both gradients, with experts of 0,
                         1 and 7 rows; whole blocks with it
    Transformer Engine   Pos-1 to Pos-3; with the norm that the shortcut shares, which is then not
                         fused; grouped GEMM; fused permutation; experts without tokens
    FP8                  with padding and without; delayed scaling at two backward slots

Shapes: R rows, e experts
"""

import math
import time
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_scmoe.model.experts.grouped import GroupedMatmul, why_no_grouped_mm
from megatron_scmoe.overlap.schedule import POSITIONS
from tools.benchmarks.contenders import Contender
from tools.benchmarks.paper_shapes import Inputs, Shape, build, host_config
from tools.benchmarks.process_groups import one_rank, seed
from tools.gpu_proof.layers import (
    BFLOAT16,
    LayerPair,
    copy_weights,
    error,
    errors,
    gradients,
    largest,
    linear_error,
    missing_transformer_engine,
    outcome,
)
from tools.gpu_proof.results import Results
from tools.gpu_proof.timing import PartStep, do_steps

BFLOAT16_ERROR = 1e-2
# e4m3 has 3 bits behind the point, e5m2, for gradients, 2; several products follow each other.
FP8_OUTPUT_ERROR, FP8_GRADIENT_ERROR = 0.1, 0.3
ROWS_OF_EXPERTS = ([0, 1, 7, 19], [7, 0, 0, 1], [0, 0, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0])
TRAINING_STEPS = 8

GROUPED = {**BFLOAT16, "moe_grouped_gemm": True}
WITH_TE = {**BFLOAT16, "transformer_impl": "transformer_engine"}
GROUPED_TE = {**WITH_TE, **GROUPED}
FP8 = {**GROUPED_TE, "fp8": "hybrid", "fp8_recipe": "tensorwise"}
DELAYED = {**FP8, "fp8_recipe": "delayed", "fp8_amax_history_len": 4}
SHARED_NORM = {"scmoe_shortcut_norm": "shared"}


LINEAR = "a linear layer of Transformer Engine"
top1 = partial(LayerPair, topk=1)
LOCAL_CASE = top1("grouped experts of the local spec", host=GROUPED)
CASES = (
    *(top1(f"local and Transformer Engine, {at}", at, host=WITH_TE) for at in POSITIONS),
    *(top1(f"shared norm, not fused, {at}", at, SHARED_NORM, WITH_TE) for at in POSITIONS),
    top1("grouped GEMM of Transformer Engine", host=GROUPED_TE),
    LayerPair("fused permutation", host={**GROUPED_TE, "moe_permute_fusion": True}),
)


def run(results: Results, device: torch.device, seconds: float) -> None:
    """See the module."""
    deadline = time.monotonic() + seconds
    missing = missing_transformer_engine(device)
    installed = HAVE_TE and device.type == "cuda"
    with one_rank():
        blocks = Blocks(results, device)
        steps = [
            PartStep("grouped_mm", partial(check_grouped_mm, results, device), 3),
            PartStep(LOCAL_CASE.name, partial(blocks.check, LOCAL_CASE), 5),
            PartStep(
                LINEAR, partial(check_linear, results, device), 5, None if installed else missing
            ),
            *(PartStep(case.name, partial(blocks.check, case), 5, missing) for case in CASES),
            PartStep("FP8", blocks.check_fp8, 8, missing),
            PartStep("FP8, delayed scaling", blocks.check_delayed_scaling, 10, missing),
            # Older versions crash or hang here: last.
            PartStep(
                "experts without tokens", partial(check_empty_experts, results, device), 5, missing
            ),
        ]
        do_steps(results, steps, deadline)


# Whole blocks. ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """What a block of the local spec gives."""

    block: Any
    """In float32, with weights that bf16 can hold."""
    expected: dict[str, Tensor]
    """Its outcome."""
    bfloat16_errors: dict[str, float]
    """Of the same block in bf16."""


class Blocks:
    """A dense layer and a MoE layer, in every implementation."""

    def __init__(self, results: Results, device: torch.device) -> None:
        self._results = results
        tiny = device.type == "cpu"
        # Heads of 64 columns, which fused attention has kernels for.
        self._shape = (
            Shape(32, 64, 2, 1, 4, False, True) if tiny else Shape(256, 512, 4, 2, 8, False, True)
        )
        self._inputs = Inputs.draw(self._shape, *((16, 2) if tiny else (128, 2)))
        self.reference = cache(self._reference)

    def check(self, case: LayerPair) -> None:
        """Compare one block with the local spec in float32."""
        reference = self.reference(case.position, case.topk, bool(case.scmoe))
        found = self._errors(case, reference)
        limits = {
            name: max(2 * bfloat16, BFLOAT16_ERROR)
            for name, bfloat16 in reference.bfloat16_errors.items()
        }
        worst = max(found, key=lambda name: (math.isnan(found[name]), found[name] / limits[name]))
        self._results.check(
            case.name,
            all(found[name] <= limits[name] for name in found),
            f"worst: {worst}",
            tensors=len(found),
            output_error=found["output"],
            worst_error=found[worst],
            worst_local_error=reference.bfloat16_errors[worst],
        )

    def check_fp8(self) -> None:
        """With rows padded by the router, and by the experts."""
        reference = self.reference("pos2", 1, False)
        for name, padded in (("padded by the experts", False), ("padded by the router", True)):
            host = {**FP8, "moe_router_padding_for_quantization": padded}
            found = self._errors(top1("", host=host), reference)
            output, gradient = found["output"], found["gradient of the input"]
            finite = all(map(math.isfinite, found.values()))
            self._results.check(
                f"FP8, {name}",
                finite and output <= FP8_OUTPUT_ERROR and gradient <= FP8_GRADIENT_ERROR,
                "against float32",
                output_error=output,
                input_gradient_error=gradient,
                worst_error=largest(found.values()),
            )

    def check_delayed_scaling(self) -> None:
        """At Pos-1, with the experts' backward in front of all other FP8 modules and behind them:
        Transformer Engine takes the maxima of a step where its first module has its backward."""
        losses = {slot: self._losses(slot) for slot in (4, 0)}
        again = self._losses(4)

        def distance(some: list[float], others: list[float]) -> float:
            return max(abs(a - b) / abs(b) for a, b in zip(some, others, strict=True))

        difference, noise = distance(losses[0], losses[4]), distance(again, losses[4])
        self._results.check(
            "FP8, delayed scaling: backward slots 0 and 4",
            difference <= BFLOAT16_ERROR,
            f"losses of {TRAINING_STEPS} steps: {losses[4]} at slot 4, {losses[0]} at slot 0",
            largest_difference_share=difference,
            two_runs_at_slot_4_difference_share=noise,
        )

    def _build(self, case: LayerPair, **scmoe: Any) -> Any:
        # In bf16 and in float32 the same logits are drawn.
        host = {"moe_router_dtype": "fp32", **case.host}
        return build(self._shape, case.contender, 2, {**case.scmoe, **scmoe}, **host)

    def _reference(self, position: str, topk: int, shared_norm: bool) -> Reference:
        scmoe = SHARED_NORM if shared_norm else {}
        in_float32 = LayerPair("", position, scmoe, topk=topk)
        block, exact = self._build(in_float32), self._build(in_float32)
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.copy_(parameter.bfloat16())
        copy_weights(block, exact)
        expected = outcome(exact, self._inputs)
        reference = Reference(block, expected, {})
        rounded = self._errors(replace(in_float32, host=BFLOAT16), reference)
        return Reference(block, expected, rounded)

    def _errors(self, case: LayerPair, reference: Reference) -> dict[str, float]:
        block = self._build(case)
        copy_weights(reference.block, block)
        return errors(outcome(block, self._inputs), reference.expected)

    def _losses(self, backward_slot: int) -> list[float]:
        """Of a few steps of gradient descent towards a random output."""
        slots = f"{POSITIONS['pos1'].default_slot},{backward_slot}"
        block = self._build(top1("", "pos1", host=DELAYED), scmoe_expert_slot=slots)
        copy_weights(self.reference("pos1", 1, False).block, block)
        optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
        hidden_states = self._inputs.hidden_states.detach().bfloat16()
        losses = []
        seed()
        for _ in range(TRAINING_STEPS):
            block.set_is_first_microbatch()  # FP8 copies of the weights are made anew
            output = block(hidden_states=hidden_states, **self._inputs.attention)
            loss = (output.float() - self._inputs.grad).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(round(loss.item(), 6))
        return losses


# Experts alone. -----------------------------------------------------------------------------------


def check_grouped_mm(results: Results, device: torch.device) -> None:
    """One product of many experts, [R, in] x [e, out, in], against float64 and the loop."""
    columns, features = (16, 24) if device.type == "cpu" else (512, 1024)
    why_not = why_no_grouped_mm(torch.bfloat16, torch.Size((features, columns)), device)
    results.check("grouped_mm has a kernel here", why_not is None, why_not or "")
    found: dict[str, list[float]] = {"grouped_mm": [], "the loop": []}
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    for sizes in (*ROWS_OF_EXPERTS, [3 * columns, 0, columns + 5, 1]):
        rows = torch.randn(sum(sizes), columns, **options)
        weight = torch.randn(len(sizes), features, columns, **options)
        grad = torch.randn(sum(sizes), features, **options)
        parts = list(zip(rows.split(sizes), weight, grad.split(sizes), strict=True))
        expected = (
            torch.cat([x.double() @ w.double().T for x, w, _ in parts]),
            torch.cat([g.double() @ w.double() for _, w, g in parts]),
            torch.stack([g.double().T @ x.double() for x, _, g in parts]),
        )
        for name, its_errors in found.items():
            poison(device)
            leaves = rows.clone().requires_grad_(), weight.clone().requires_grad_()
            output = GroupedMatmul.apply(*leaves, sizes, name == "grouped_mm")
            output.backward(grad)
            tensors = output.detach(), leaves[0].grad, leaves[1].grad
            its_errors += [error(*pair) for pair in zip(tensors, expected, strict=True)]
    results.check(
        "grouped_mm and the loop",
        all(value <= BFLOAT16_ERROR for values in found.values() for value in values),
        f"output and both gradients against float64; rows of experts {ROWS_OF_EXPERTS} and more",
        grouped_mm_error=largest(found["grouped_mm"]),
        loop_error=largest(found["the loop"]),
    )


def check_linear(results: Results, device: torch.device) -> None:
    """The least of Transformer Engine: whether its build has machine code for this GPU."""
    found = linear_error(device)
    results.check(LINEAR, found <= BFLOAT16_ERROR, output_error=found)


def check_empty_experts(results: Results, device: torch.device) -> None:
    """Grouped GEMM of Transformer Engine, whole ranks without tokens included."""
    shape = Shape(256, 512, 4, 4, 4, False, True)
    contender = Contender("", "none", 1, True)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    for sizes in ROWS_OF_EXPERTS:
        exact = LocalSpecProvider().grouped_mlp_modules(False)(
            4, host_config(shape, contender, 2), pg_collection=groups
        )
        grouped = TESpecProvider().grouped_mlp_modules(True)(
            4, host_config(shape, contender, 2, **GROUPED_TE), pg_collection=groups
        )
        copy_weights(grouped.to(device), exact.to(device))
        rows = torch.randn(sum(sizes), shape.hidden_size, device=device, dtype=torch.bfloat16)
        probs = torch.rand(sum(sizes), device=device)
        grad = torch.randn_like(rows)
        found = []
        for module, dtype in ((exact, torch.float32), (grouped, torch.bfloat16)):
            poison(device)
            leaf = rows.to(dtype).requires_grad_()
            output, _ = module(leaf, torch.tensor(sizes), probs)
            output.backward(grad.to(dtype))
            found.append({"output": output.detach(), "rows": leaf.grad, **gradients(module)})
        differences = errors(found[1], found[0])
        results.check(
            f"experts without tokens: rows {sizes}",
            all(value <= BFLOAT16_ERROR for value in differences.values()),
            "against SequentialMLP in float32",
            worst_error=largest(differences.values()),
        )


def poison(device: torch.device) -> None:
    """Leave NaN in the memory that is handed out next, so that what nobody writes is seen."""
    sizes = [2**power for power in range(10, 21)]
    tensors = [torch.full((size,), torch.nan, device=device) for size in sizes]
    del tensors
