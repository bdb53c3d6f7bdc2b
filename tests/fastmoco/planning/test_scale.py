"""The model of a step on many ranks: closed forms, directions, and what is hidden."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from fastmoco.config import Config
from fastmoco.planning.chips import CHIPS
from fastmoco.planning.plan import StepPlan
from fastmoco.planning.scale.key_exchange import key_costs
from fastmoco.planning.scale.layout import Layout, Shape, layout_of
from fastmoco.planning.scale.messages import Message, Ranks, step_messages
from fastmoco.planning.scale.network import Fabric, Line, Link, MeasuredLines, fit_line
from fastmoco.planning.scale.step import Machine, Work, gpu, step_time
from fastmoco.recipes import quickstart_digits
from fastmoco.recipes.supervised import SupervisedConfig, supervised_digits

WHOLE = StepPlan(chunk=0, kept=0, chunks=1, overhead=0.0, peak_bytes=0.0, reason="")
FABRIC = Fabric(
    nodes=4, gpus_per_node=8, link=Link(400e9, 2e-6), network=Link(50e9, 5e-6), call_s=0.0
)
MACHINE = Machine(s_per_flop=1e-9, s_per_activation_byte=1e-9, s_per_parameter=1e-9)
WORK = Work(images=8, flops=1e6, activation_bytes=1e5, again=0.0, forward_share=0.5, parameters=1e5)


@pytest.fixture(scope="module")
def config() -> Config:
    recipe = quickstart_digits()
    model = replace(recipe.model, hidden_dim=48, projection_dim=16)
    return replace(recipe, global_batch_size=4096, model=model)


@pytest.fixture(scope="module")
def layout(config: Config) -> Layout:
    return layout_of(config, "fp32")


def of(kind: str, size: float, group: str = "all") -> Message:
    return Message("weights", kind, size, 1, group, "forward")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["all_gather", "reduce_scatter"])
def test_a_ring_inside_a_node_is_its_closed_form(kind: str) -> None:
    node = Fabric(nodes=1, gpus_per_node=8, link=Link(100e9, 3e-6), network=Link(1, 1), call_s=0.0)
    expected = 7 / 8 * 1e9 / 100e9 + 7 * 3e-6
    assert node.seconds(of(kind, 1e9), Ranks(total=8)) == pytest.approx(expected)


def test_a_ring_over_nodes_crosses_the_network_once_for_each() -> None:
    expected = 31 / 32 * 1e9 / 50e9 + 3 * 5e-6 + 28 * 2e-6
    assert FABRIC.seconds(of("all_gather", 1e9), Ranks(total=32)) == pytest.approx(expected)


def test_a_large_all_reduce_is_a_ring_and_a_small_one_a_tree() -> None:
    ranks = Ranks(total=32)
    ring = 2 * (31 / 32 * 1e9 / 50e9 + 3 * 5e-6 + 28 * 2e-6)
    assert FABRIC.seconds(of("all_reduce", 1e9), ranks) == pytest.approx(ring)
    tree = 2 * 4 / 50e9 + 2 * 5 * 5e-6
    assert FABRIC.seconds(of("all_reduce", 4), ranks) == pytest.approx(tree)


def test_an_exchange_of_all_with_all_leaves_a_node_through_one_network() -> None:
    node = replace(FABRIC, nodes=1)
    inside = 7 / 8 * 1e9 / 400e9 + 2e-6
    assert node.seconds(of("all_to_all", 1e9), Ranks(total=8)) == pytest.approx(inside)
    leaving = 8 * 3 / 4 * 1e9 / 50e9 + 5e-6
    assert FABRIC.seconds(of("all_to_all", 1e9), Ranks(total=32)) == pytest.approx(leaving)
    assert FABRIC.seconds(of("broadcast", 1e9), Ranks(total=32)) == pytest.approx(
        1e9 / 50e9 + 5 * 5e-6
    )
    lines = MeasuredLines({"all_gather": Line(1.0, 2.0)})
    assert lines.seconds(of("all_to_all", 3.0), Ranks(total=2)) == 7


def test_hybrid_shards_stay_in_a_node_and_copies_share_its_network() -> None:
    ranks = Ranks(total=32, shards=8)
    inside = 7 / 8 * 1e9 / 400e9 + 7 * 2e-6
    assert FABRIC.seconds(of("all_gather", 1e9, "shard"), ranks) == pytest.approx(inside)
    across = 3 / 4 * 1e9 / (50e9 / 8) + 3 * 5e-6
    assert FABRIC.seconds(of("reduce_scatter", 1e9, "copies"), ranks) == pytest.approx(across)
    assert FABRIC.seconds(of("all_gather", 1e9, "copies"), Ranks(total=32, shards=32)) == 0


def test_a_line_is_recovered_and_never_negative() -> None:
    assert fit_line({1e3: 2e-5 + 1e-6, 1e6: 2e-5 + 1e-3, 1e4: 3e-5}) == pytest.approx((2e-5, 1e-9))
    assert fit_line({1.0: 2.0, 2.0: 1.0}).s_per_byte == 0
    assert fit_line({1.0: 1.0, 2.0: 3.0}).fixed_s == 0
    with pytest.raises(ValueError, match="needs at least two"):
        fit_line({1.0: 1.0})


def test_parameters_are_padded_to_the_shards() -> None:
    assert Shape(5, 15).padded(2) == 18
    assert Shape(1, 1).padded(4) == 4


@pytest.mark.parametrize("chunk", [0, 4])
def test_ddp_sends_every_gradient_once(config: Config, layout: Layout, chunk: int) -> None:
    plan = replace(WHOLE, chunk=chunk)
    sent = step_messages(config, layout, Ranks(total=4), plan, "fp32")
    gradients = sum(m.bytes * m.number for m in sent if m.part == "gradients")
    assert gradients == 4 * sum(layout.trained)
    assert not [m for m in sent if m.part == "weights"]
    assert step_messages(config, layout, Ranks(total=1), plan, "fp32") == []


def test_hybrid_sharding_reduces_each_shard_between_copies(config: Config, layout: Layout) -> None:
    sent = step_messages(config, layout, Ranks(total=8, shards=2), WHOLE, "fp32")
    within = {m.bytes for m in sent if m.kind == "reduce_scatter"}
    between = {m.bytes for m in sent if m.group == "copies"}
    assert {size / 2 for size in within} == between != set()


def test_a_frozen_trunk_exchanges_no_statistics() -> None:
    config = supervised_digits()
    model = replace(
        config.model, architecture="resnet_nano", patch_size=16, freeze_patch_embed=True
    )
    trains, frozen = (
        replace(config, model=model, objective=SupervisedConfig(classes=3, train_from=part))
        for part in ("everything", "head")
    )
    norms = [
        [
            m
            for m in step_messages(c, layout_of(c, "fp32"), Ranks(total=4), WHOLE, "fp32")
            if m.part == "batch norms"
        ]
        for c in (trains, frozen)
    ]
    assert norms[0]
    assert not norms[1]


def test_chunks_gather_weights_again_but_reduce_gradients_once(
    config: Config, layout: Layout
) -> None:
    def totals(plan: StepPlan) -> tuple[float, float]:
        sent = step_messages(config, layout, Ranks(total=4, shards=4), plan, "fp32")
        return tuple(  # type: ignore[return-value]
            sum(m.bytes * m.number for m in sent if m.part == part)
            for part in ("weights", "gradients")
        )

    whole, gradients = totals(WHOLE)
    kept = totals(replace(WHOLE, chunk=256, kept_images=1024))
    again = totals(replace(WHOLE, chunk=256))
    assert whole < kept[0] < again[0]
    assert gradients == kept[1] == again[1]


def test_a_ring_of_keys_sends_what_a_gather_receives(config: Config, layout: Layout) -> None:
    def keys(ranks: Ranks) -> list[Message]:
        sent = step_messages(config, layout, ranks, WHOLE, "fp32")
        return [m for m in sent if m.part == "keys"]

    (gathered,) = keys(Ranks(total=8))
    (sent,) = keys(Ranks(total=8, ring=True))
    assert sent.bytes * sent.number == gathered.bytes * 7 / 8
    assert len(keys(Ranks(total=8, on_cpu=True))) == 2


def test_without_a_network_a_step_is_its_compute(config: Config, layout: Layout) -> None:
    free = MeasuredLines(dict.fromkeys(("all_gather", "reduce_scatter", "all_reduce"), Line(0, 0)))
    ranks = Ranks(total=4, shards=4)
    time = step_time(
        WORK, MACHINE, step_messages(config, layout, ranks, WHOLE, "fp32"), free, ranks
    )
    images = WORK.images * (1e6 * 1e-9 + 1e5 * 1e-9)
    assert time.seconds == pytest.approx(images + 1e5 * 1e-9)
    assert time.communication_share == pytest.approx(0)


@pytest.mark.parametrize("shards", [1, 4, 16])
def test_hidden_messages_never_add_more_than_they_take(
    config: Config, layout: Layout, shards: int
) -> None:
    ranks = Ranks(total=16, shards=shards)
    fabric = replace(FABRIC, nodes=2)
    sent = step_messages(config, layout, ranks, WHOLE, "fp32")
    hidden = step_time(WORK, MACHINE, sent, fabric, ranks)
    shown = step_time(WORK, replace(MACHINE, overlaps=False), sent, fabric, ranks)
    for name, part in hidden.parts.items():
        assert part.exposed_s > 0 or part.messages == 0
        assert part.exposed_s <= part.seconds == shown.parts[name].exposed_s
    # The only bucket of DDP is complete when the backward ends.
    assert (hidden.seconds < shown.seconds) == (shards > 1)


def test_a_slower_network_never_makes_a_faster_step(config: Config, layout: Layout) -> None:
    ranks = Ranks(total=32, shards=8)
    sent = step_messages(config, layout, ranks, WHOLE, "fp32")
    for field in ("bytes_per_s", "latency_s"):
        steps = [
            step_time(
                WORK,
                MACHINE,
                sent,
                replace(FABRIC, network=FABRIC.network._replace(**{field: value})),
                ranks,
            ).seconds
            for value in (1e-7, 1e-5, 1e-3, 1e3, 1e9, 1e11)
        ]
        steps = steps if field == "latency_s" else steps[::-1]
        assert all(a <= b for a, b in itertools.pairwise(steps))
        assert steps[0] < steps[-1]


def test_ranks_that_share_cores_compute_slower_and_launches_are_a_floor() -> None:
    alone = MACHINE.compute_s(WORK)
    assert replace(MACHINE, slowdown=2.0).compute_s(WORK) == 2 * alone
    busy = replace(MACHINE, launch_s=1.0)
    assert busy.compute_s(WORK._replace(launches=7)) == 7
    assert MACHINE.compute_s(WORK._replace(again=0.5)) > alone


def test_a_gpu_with_twice_the_rates_takes_half_as_long() -> None:
    chip = CHIPS["H100"]
    twice = replace(
        chip,
        step_flops_per_s=2 * chip.step_flops_per_s,
        step_bytes_per_s=2 * chip.step_bytes_per_s,
    )
    assert gpu(twice, 0.1).compute_s(WORK) == pytest.approx(gpu(chip, 0.1).compute_s(WORK) / 2)
    assert gpu(chip, 0.1).compute_s(WORK) > gpu(chip, 0.0).compute_s(WORK)


def test_a_ring_of_keys_takes_less_memory_and_hides_its_messages_in_large_blocks() -> None:
    costs = {
        images: key_costs(
            images,
            256,
            Ranks(total=32),
            FABRIC,
            element=2,
            s_per_flop=1 / 500e12,
            launch_s=5e-6,
            key_bytes=2048,
        )
        for images in (16, 32768)
    }
    for images, cost in costs.items():
        assert cost.ring_bytes == 3 * images * 2048 < cost.gathered_bytes == 62 * images * 2048
    assert not costs[16].ring_is_faster
    assert costs[32768].ring_is_faster
    assert math.isfinite(costs[16].ring_s)
