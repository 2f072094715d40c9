"""Text token by token is what full forward passes give, and so with experts in host memory.

    cached     tokens and log-probabilities with keys and values kept, prompts of several lengths in
               one batch, against a full forward pass for each token
    offloaded  experts in pinned host memory, two of eight on the device, fetched when the gate has
               spoken, on demand, or not kept: bit for bit the text of resident ones, also where
               copies are late
    speed      tokens/s; time and share of the copies that compute did not wait for; memory

At every position, with two gates and with experts at home, in fp32: greedy choices are compared.

Shapes: b prompts, s tokens, v vocabulary
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.nn import Module

from megatron_scmoe.inference.generation import Continuation, Limits, Speed, generate
from megatron_scmoe.inference.offload import layers_of
from megatron_scmoe.inference.sampling import Sampling
from megatron_scmoe.model.builder import ScMoEModelBuilder, ScMoEModelConfig
from megatron_scmoe.model.experts.offload import experts
from megatron_scmoe.model.experts.offload.cache import travelled
from megatron_scmoe.model.experts.offload.experts import Offload
from megatron_scmoe.overlap.schedule import POSITIONS
from megatron_scmoe.overlap.streams import Clock, Flight
from tools.benchmarks.emulated_link import sleep_on_stream
from tools.benchmarks.paper_shapes import Shape, configs
from tools.benchmarks.process_groups import one_rank, seed
from tools.gpu_proof.layers import LayerPair, precision
from tools.gpu_proof.results import Results
from tools.gpu_proof.timing import PartStep, do_steps

SLOTS = 2
"""Experts of a layer on the device, of eight."""
TOLERANCE = 1e-4
"""Of a log-probability: a matrix of one row is multiplied by another kernel than one of many."""
LATE_S = 1e-3

# Models of four layers.
SYSTEMS = (
    *(LayerPair(position, position) for position in POSITIONS),
    LayerPair(
        "two gates",
        scmoe={"scmoe_dual_gating": "separate", "scmoe_combine": "add"},
        host={"moe_router_topk": 1, "moe_shared_expert_intermediate_size": None},
    ),
    LayerPair("experts at home", scmoe={"scmoe_experts_at_home": {"zero": 1, "constant": 1}}),
)
ARMS = {
    "early": Offload("cpu", SLOTS),
    "on demand": Offload("cpu", SLOTS, early=False),
    "nothing kept": Offload("cpu", SLOTS, keeps=False),
}


def run(results: Results, device: torch.device, seconds: float) -> None:
    """See the module."""
    deadline = time.monotonic() + seconds
    with one_rank():
        part = GenerationPart(results, device)
        steps = [
            *(PartStep(one.name, partial(part.compare, one), 4) for one in SYSTEMS),
            PartStep("speed", part.speed, 6),
        ]
        do_steps(results, steps, deadline)


class GenerationPart:
    """Models and prompts, at the sizes of the device."""

    def __init__(self, results: Results, device: torch.device) -> None:
        self._results = results
        self._device = device
        tiny = device.type == "cpu"
        self._shape = (
            Shape(32, 64, 2, 2, 8, False, True) if tiny else Shape(512, 1024, 8, 8, 8, False, True)
        )
        self._lengths: tuple[int, ...] = (5, 2) if tiny else (48, 7, 19)
        self._new = 3 if tiny else 12
        self._vocabulary = 64

    def compare(self, system: LayerPair) -> None:
        """Cached with uncached, offloaded with resident."""
        resident = self._build(system)
        prompts = self._prompts(self._lengths)
        expected, _ = self._write(resident, prompts)
        full = [self._uncached(resident, prompt) for prompt in prompts]
        pairs = list(zip(expected, full, strict=True))
        off = max(
            abs(a - b)
            for mine, theirs in pairs
            for a, b in zip(mine.log_probs, theirs.log_probs, strict=True)
        )
        same = all(mine.tokens == theirs.tokens for mine, theirs in pairs)
        self._results.check(
            f"cached, {system.name}", same and off < TOLERANCE, log_probability_difference=off
        )
        for arm, offload in ARMS.items():
            model = self._build(system, offload)
            model.load_state_dict(resident.state_dict())
            with _late_copies():
                found, _ = self._write(model, prompts)
            fetched = sum(layer.cache.account.fetched for layer in layers_of(model))
            self._results.check(
                f"offloaded, {system.name}, {arm}",
                found == expected and fetched > 0 and self._is_home(model),
                fetched=fetched,
            )

    def speed(self) -> None:
        """Resident experts, and offloaded ones whose copies hide behind the window."""
        system = SYSTEMS[1]
        resident = self._build(system, dtype=torch.bfloat16)
        prompts = self._prompts(self._lengths[:1] * 4)
        for arm, offload in {"resident": None, **ARMS}.items():
            model = resident
            if offload is not None:
                model = self._build(system, offload, torch.bfloat16)
                model.load_state_dict(resident.state_dict())
            self._write(model, prompts)
            for layer in layers_of(model):
                layer.cache.account.keeps_arrivals = True
            _, speed = self._write(model, prompts)
            self._results.measured(
                f"speed, {arm}",
                f"{len(prompts)} prompts of {len(prompts[0])} tokens, {self._new} new ones",
                prefill_tokens_per_s=speed.prefill_tokens / speed.prefill_seconds,
                decode_tokens_per_s=speed.decode_tokens / speed.decode_seconds,
                **self._copies(model),
            )

    def _copies(self, model: Module) -> dict[str, float]:
        """How long experts travelled, and what of it compute waited for."""
        accounts = [layer.cache.account for layer in layers_of(model)]
        if not accounts:
            return {}
        clock = Clock(torch.zeros((), device=self._device))
        copying, waited = travelled(accounts, clock)
        return {
            "copies_s": copying,
            "waited_s": waited,
            "hidden_share": 1 - waited / copying if copying else 1.0,
        }

    def _build(
        self, system: LayerPair, offload: Offload | None = None, dtype: torch.dtype = torch.float32
    ) -> Module:
        seed()
        combine = system.scmoe.get("scmoe_combine", "cg1")
        config, scmoe = configs(
            self._shape,
            system.contender,
            4,
            {**system.scmoe, "scmoe_offload": offload},
            **{
                "moe_layer_freq": [0, 1, 0, 1],
                "moe_router_force_load_balancing": False,
                "moe_shared_expert_gate": combine == "cg1",
                **precision(dtype),
                **system.host,
            },
        )
        model = ScMoEModelConfig(
            transformer=config,
            scmoe=scmoe,
            vocab_size=self._vocabulary,
            seq_length=max(self._lengths) + self._new,
            position_embedding_type="rope",
        )
        groups = ProcessGroupCollection.use_mpu_process_groups()
        return ScMoEModelBuilder(model).build_model(groups).to(self._device).to(dtype).eval()

    def _prompts(self, lengths: tuple[int, ...]) -> list[list[int]]:
        generator = torch.Generator().manual_seed(7)
        return [
            torch.randint(self._vocabulary, (length,), generator=generator).tolist()
            for length in lengths
        ]

    def _write(self, model: Module, prompts: list[list[int]]) -> tuple[list[Continuation], Speed]:
        limits = Limits(self._new, self._vocabulary, end=None)
        return generate(
            model, prompts, Sampling(greedy=True), limits, len(prompts), lambda *_: None
        )

    @torch.no_grad()
    def _uncached(self, model: Module, prompt: list[int]) -> Continuation:
        """The likeliest tokens, from a full forward pass for each of them."""
        found = Continuation()
        while len(found.tokens) < self._new:
            tokens = torch.tensor([prompt + found.tokens], device=self._device)
            length = tokens.shape[1]
            mask = torch.ones(length, length, dtype=torch.bool, device=self._device)
            positions = torch.arange(length, device=self._device)[None]
            logits = model(tokens, positions, mask.triu(1)[None, None], runtime_gather_output=True)
            log_probs = logits[0, -1].float().log_softmax(-1)
            found.tokens.append(int(log_probs.argmax()))
            found.log_probs.append(float(log_probs.max()))
        return found

    def _is_home(self, model: Module) -> bool:
        """Whether experts are in memory of the host, on a GPU pinned."""
        weights = [weight for layer in layers_of(model) for weight in layer.parameters()]
        pinned = self._device.type == "cpu" or all(weight.is_pinned() for weight in weights)
        return pinned and all(weight.device.type == "cpu" for weight in weights)


@contextmanager
def _late_copies() -> Iterator[None]:
    """An expert is NaN until its copy ends, which is late."""
    fetch = experts.fetch

    def late(slots: Any, home: Any) -> Flight:
        if not slots[0].is_cuda:
            return fetch(slots, home)
        for slot in slots:
            slot.fill_(torch.nan)
        copy = torch.Tensor.copy_

        def slow(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
            sleep_on_stream(LATE_S)
            return copy(tensor, *args, **options)

        with mock.patch.object(torch.Tensor, "copy_", slow):
            return fetch(slots, home)

    with mock.patch.object(experts, "fetch", late):
        yield
