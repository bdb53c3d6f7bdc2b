"""`fastmoco plan`: tables for people, JSON for programs, one line for mistakes."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("tyro", reason="tyro is not installed")

from fastmoco.cli.main import main
from fastmoco.cli.plan import PlanArguments, parse_bytes
from fastmoco.cli.plan_scale import cluster_of, parse_rate, print_scale, print_step
from fastmoco.config import Config, ParallelConfig
from fastmoco.planning import costs
from fastmoco.recipes import quickstart_digits


@pytest.fixture(autouse=True, scope="module")
def counted_once() -> Iterator[None]:
    """Costs of a step, which take seconds to count, are counted once for each step."""
    counted = functools.cache(costs.measure_costs)

    def cached(config: Config, *words: Any, **how: Any) -> costs.StepCosts:
        return counted(replace(config, parallel=ParallelConfig()), *words, **how)

    with mock.patch.object(costs, "measure_costs", cached):
        yield


SMALL = ["--model.hidden-dim", "32", "--model.projection-dim", "8", "--model.compile", "False"]


def test_json_names_everything_and_holds_together(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--gpus", "2", "--memory", "40MiB", "--json", "--data.synthetic", *SMALL]
    options += ["--nodes", "2", "--network", "100Gbit"]
    assert main(["plan", "quickstart_digits", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["gpus"], found["memory_bytes"], found["local_batch_size"]) == (2, 40 * 2**20, 128)
    assert found["flops_per_step"] == found["flops_per_image"] * 256
    settings = [(row["checkpointing"], row["state_over"]) for row in found["settings"]]
    assert settings == [(how, shards) for shards in (1, 2) for how in ("none", "selective", "full")]
    by_setting = dict(zip(settings, found["settings"], strict=True))
    whole_state, shards = (by_setting["none", share]["state_bytes"] for share in (1, 2))
    assert whole_state["optimizer"] == 2 * shards["optimizer"]
    assert whole_state["in_flight"] == 0 < shards["in_flight"]
    assert whole_state["total"] / 2 + shards["in_flight"] < shards["total"] < whole_state["total"]
    for row in found["settings"]:
        whole, in_chunks = row["largest_batch_whole"], row["largest_batch_in_chunks"]
        # chunks of shards hold the trunk's gradients whole, which so small a memory feels
        assert in_chunks >= (whole if row["state_over"] == 1 else 0.9 * whole) > 0
        assert row["fits"]
    whole = [by_setting[how, 1]["largest_batch_whole"] for how in ("none", "selective", "full")]
    assert whole == sorted(whole)
    assert found["chosen"] == by_setting["none", 1]
    _holds_together(found["step"])
    print_step(found["step"])
    shown = capsys.readouterr().out
    assert "one step on 2 x H100 in 2 x 100 Gbit, 128 images each (model, not measured)" in shown
    assert "batch norms" in shown
    assert "nearest limits" in shown


def _holds_together(step: dict[str, Any]) -> None:
    """The model of a step: its parts add up to it."""
    assert (step["gpus"], step["nodes"], step["images_per_gpu"]) == (2, 2, 128)
    assert step["network_bytes_per_s"] == 12.5e9
    assert step["label"] == "model, not measured"
    exposed = sum(part["exposed_s"] for part in step["parts"].values())
    longest = max(exposed, *step["loader_s"].values())
    assert step["step_s"] == pytest.approx(longest + step["checkpoint"]["per_step_s"])
    assert step["images_per_s"] == pytest.approx(256 / step["step_s"])
    assert step["limits"][step["first_limit"]] == max(step["limits"].values())


@pytest.mark.parametrize(
    ("words", "shared_by"),
    [
        (["ddp"], 1),
        (["fsdp"], 4),
        (["hsdp", "--parallel.shard-size", "2"], 2),
        (["auto"], 1),
        (["auto", "--memory", "1MiB"], 4),
        (["auto", "--memory", "1MiB", "--device", "cpu"], 1),
    ],
)
def test_what_is_chosen_is_shared_as_the_run_would_share_it(
    capsys: pytest.CaptureFixture[str], words: list[str], shared_by: int
) -> None:
    assert (
        main(
            [
                "plan",
                "quickstart_digits",
                "--gpus",
                "4",
                "--json",
                *SMALL,
                "--parallel.strategy",
                *words,
            ]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["chosen"]["state_over"] == shared_by
    assert {row["state_over"] for row in found["settings"]} == {1, shared_by, 4}


def test_a_gpu_compiles_takes_levels_and_leaves_the_loader_its_memory(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [
        "plan",
        "quickstart_digits",
        "--memory",
        "2GB",
        "--json",
        *SMALL[:4],
        "--batch.chunk",
        "64",
    ]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["compiled"] is True
    assert found["views"] == "uint8"
    chosen, loader = found["chosen"], found["loader_bytes"]
    assert chosen["parts_bytes"]["views"] == loader["batch_bytes"] == 256 * 2 * 3 * 8 * 8
    assert sum(chosen["parts_bytes"].values()) == pytest.approx(chosen["step_bytes"])
    assert chosen["fits"]
    left = (2e9 - loader["beside_batch_bytes"]) * found["usable_share"] - chosen["state_bytes"][
        "total"
    ]
    assert f"of {left / 2**30:.2f} GiB free" in chosen["plan"]["reason"]


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "plan",
                "quickstart_digits",
                "--memory",
                "24GB",
                *SMALL,
                "--batch.chunk",
                "64",
                "--batch.kept",
                "1",
            ]
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert "quickstart_digits: batch 256 on 1 x 22.35 GiB, bf16" in shown
    for word in ("selective", "full", "4 x 64", "parameters", "GFLOP per image"):
        assert word in shown


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--memory", "lots"], "--memory lots: must be a number with one of MB, GB, MiB, GiB"),
        (["--gpus", "3"], "--gpus 3: must divide --global-batch-size 256"),
    ],
)
def test_mistakes_are_named(
    capsys: pytest.CaptureFixture[str], words: list[str], text: str
) -> None:
    assert main(["plan", "quickstart_digits", *words]) == 2
    assert text in capsys.readouterr().err


def test_a_resnet_is_planned_without_chunks_and_selective_checkpointing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    resnet = ["--model.architecture", "resnet_nano", "--model.patch-size", "16"]
    options = ["--memory", "1GiB", "--json", "--data.synthetic", *resnet, *SMALL]
    assert main(["plan", "quickstart_digits", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["checkpointing"] for row in found["settings"]] == ["none", "full"]
    none, full = found["settings"]
    assert full["activation_bytes_per_image"] < none["activation_bytes_per_image"]
    assert none["plan"]["overhead"] == 0 < full["plan"]["overhead"] < 0.25
    assert none["largest_batch_in_chunks"] == 0 < none["largest_batch_whole"]
    assert "ResNet" in found["coupling_reason"]
    assert not found["compiled"]
    assert main(["plan", "quickstart_digits", *options, "--batch.chunk", "8"]) == 2
    assert "ResNet" in capsys.readouterr().err


def test_units() -> None:
    assert [parse_bytes(text) for text in ("80GiB", "24 GB", "1.5MiB", "7")] == [
        80 * 2**30,
        24 * 10**9,
        3 * 2**19,
        7,
    ]
    with pytest.raises(ValueError, match="memory='0GiB'"):
        parse_bytes("0GiB")


def test_what_breaks_first_is_shown_for_several_batches_and_sets(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["plan", "quickstart_digits", *SMALL, "--data.synthetic", "--scale"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    cases = {(step["batch"], step["gpus"]) for step in found["steps"]}
    assert {(256, 64), (32_768, 4096), (2**20, 8)} < cases
    assert (256, 512) not in cases
    plain = {
        name: next(row["value"] for row in rows if row["what"] == "logits of a plain loss")
        for name, rows in found["limits"].items()
    }
    assert plain["batch 32768 on 8 GPUs"] == 4 * 4 * 32_768 / 8 * 32_768
    assert {"1281167 images, 64 GPUs", "100000000 images, 64 GPUs"} == set(found["sets"])
    print_scale(found)
    shown = capsys.readouterr().out
    assert "| logits of a plain loss |" in shown
    assert "| - | - | - | - |" not in shown

    # A step that does not fit has no time.
    found["steps"][0]["fits"] = False
    print_scale(found)
    assert "| - | - | - | - |" in capsys.readouterr().out


def test_keys_and_a_step_that_does_not_fit_have_no_figures_without_meaning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["plan", "simclr_nano7_e12_b256", *SMALL, "--data.synthetic", "--gpus", "16", "--json"]
    assert main(words) == 0
    step = json.loads(capsys.readouterr().out)["step"]
    assert step["keys"] is None
    assert set(step["loader_s"].values()) == {0.0}
    print_step(step)
    assert "in a ring" not in capsys.readouterr().out
    print_step(step | {"fits": False})
    shown = capsys.readouterr().out
    assert "does not fit" in shown
    assert "images/s" not in shown


def test_gpus_are_in_equal_machines_of_at_most_eight() -> None:
    plans = [PlanArguments(config=quickstart_digits(), gpus=gpus) for gpus in (1, 8, 9, 12, 11, 64)]
    assert [cluster_of(plan, plan.gpus).nodes for plan in plans] == [1, 1, 3, 2, 11, 8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "32", "--nodes", "3"], "--nodes 3: must divide --gpus 32"),
        (["--network", "400"], "--network 400: must be a number with one of Mbit, Gbit"),
        (["--network", "400Gbyte"], "--network 400Gbyte: must be"),
        (["--storage", "0GB/s"], "--storage 0GB/s: must be"),
        (["--chip", "V100"], "--chip V100: must be one of A100, H100, H200, B200"),
        (["--cores", "0"], "--cores 0: must be finite and above 0"),
        (["--network-latency-us", "nan"], "--network-latency-us nan: must be finite"),
        (["--image-kb", "inf"], "--image-kb inf: must be finite"),
        (["--gpus", "9"], "--gpus 9: must divide --global-batch-size 256"),
        (
            ["--gpus", "8", "--parallel.strategy", "hsdp", "--parallel.shard-size", "3"],
            "--parallel.shard-size 3: must divide --gpus 8",
        ),
        (["--link-latency-us", "-1"], "--link-latency-us -1: must be finite, 0 or above"),
    ],
)
def test_a_wrong_cluster_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["plan", "quickstart_digits", *SMALL, *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "rate"),
    [("400Gbit", 50e9), ("400 Gbit/s", 50e9), ("1.5GB/s", 1.5e9), ("800Mbit", 1e8)],
)
def test_a_rate_is_bits_or_bytes(text: str, rate: float) -> None:
    assert parse_rate(text, "network") == rate


def test_each_phase_of_tokens_has_its_row() -> None:
    from fastmoco.cli.plan import count, describe
    from fastmoco.recipes import get_recipe

    config = get_recipe("digits_drop50")
    config = replace(
        config, device="cpu", precision="fp32", data=replace(config.data, synthetic=True)
    )
    half, whole = describe(count(config, configured_only=True), 1, 2**32, 8)["phases"]
    assert (half["keep_tokens"], half["kept_patch_tokens"], half["patch_tokens"]) == (0.5, 8, 16)
    assert (whole["start"], whole["kept_patch_tokens"], whole["flops_share"]) == (0.95, 16, 1.0)
    assert half["flops_share"] < 0.9
    assert half["step_bytes"] < whole["step_bytes"]
