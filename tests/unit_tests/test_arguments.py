"""From the command line to the model's config, through the host's own parser."""

import argparse
import os
import shlex
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.training.arguments import add_megatron_arguments, parse_args, validate_args

from megatron_scmoe import host, say
from megatron_scmoe.arguments import (
    add_scmoe_args,
    apply_scmoe_defaults,
    explain_grouped_gemm,
    model_config_from_args,
    parse_and_validate_args,
    scmoe_config_from_args,
)
from megatron_scmoe.checks.before_torch import typed_numbers
from megatron_scmoe.checks.ranges import NUMBERS
from megatron_scmoe.checks.refusal import complaints
from megatron_scmoe.config import NO_OPTIONS, ScMoEConfig
from megatron_scmoe.model.builder import ScMoEModelBuilder, ScMoEModelConfig
from megatron_scmoe.planner.plan_arguments import add_planner_args
from megatron_scmoe.run.checkpoint.model_options import (
    ARCHITECTURE,
    SCMOE,
    TIMES,
    WORTH_A_NOTE,
    differences,
    flag,
)

REPOSITORY = Path(__file__).parents[2]
MODEL = (
    "--num-layers 4 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --swiglu "
    "--normalization RMSNorm --disable-bias-linear --position-embedding-type rope "
    "--seq-length 32 --max-position-embeddings 32 --micro-batch-size 2 --lr 1e-2 --train-iters 6 "
    "--eval-interval 3 "
    "--tokenizer-type NullTokenizer --vocab-size 64 --transformer-impl local "
    "--no-masked-softmax-fusion --no-rope-fusion --no-persist-layer-norm "
    "--no-gradient-accumulation-fusion"
)
MOE = (
    "--num-experts 4 --moe-ffn-hidden-size 16 --moe-layer-freq ([0,1]*2) "
    "--moe-token-dispatcher-type alltoall --moe-router-topk 1"
)
POS2 = "--scmoe-shortcut-position pos2"

# A value other than the default for every option, as typed and as stored.
TYPED = {
    "scmoe_preset": ("--scmoe-preset scmoe", "scmoe"),
    "scmoe_shortcut_position": ("--scmoe-shortcut-position pos3", "pos3"),
    "scmoe_combine": ("--scmoe-combine cg2", "cg2"),
    "scmoe_router": ("--scmoe-router heterogeneous", "heterogeneous"),
    "scmoe_tau": ("--scmoe-tau 0.5", 0.5),
    "scmoe_gating_residual": ("--scmoe-gating-residual", True),
    "scmoe_capacity_of": ("--scmoe-capacity-of tokens", "tokens"),
    "scmoe_renormalise": ("--scmoe-renormalise", True),
    "scmoe_gate_layers": ("--scmoe-gate-layers 2", 2),
    "scmoe_input_scale": ("--scmoe-input-scale 2", 2.0),
    "scmoe_routed_topk": ("--scmoe-routed-topk 1.5", 1.5),
    "scmoe_bias_decay": ("--scmoe-bias-decay cosine", "cosine"),
    "scmoe_balance_groups": ("--scmoe-balance-groups 2", 2),
    "scmoe_scaled_experts": ("--scmoe-scaled-experts routed", "routed"),
    "scmoe_c2r_lists": ("--scmoe-c2r-lists lists.json", "lists.json"),
    "scmoe_c2r_top_t": ("--scmoe-c2r-top-t 3", 3),
    "scmoe_mla_scale": ("--scmoe-mla-scale", True),
    "scmoe_dual_gating": ("--scmoe-dual-gating shared", "shared"),
    "scmoe_distinct_experts": ("--no-scmoe-distinct-experts", False),
    "scmoe_shortcut_norm": ("--scmoe-shortcut-norm shared", "shared"),
    "scmoe_post_norm": ("--scmoe-post-norm", True),
    "scmoe_overlap": ("--no-scmoe-overlap", False),
    "scmoe_expert_slot": ("--scmoe-expert-slot 4", "4"),
    "scmoe_remeasure_slot": ("--scmoe-remeasure-slot", True),
    "scmoe_num_chunks": ("--scmoe-num-chunks 2", 2),
    "scmoe_dispatch_copies": ("--scmoe-dispatch-copies rank", "rank"),
    "scmoe_ranks_per_node": ("--scmoe-ranks-per-node 4", 4),
    "scmoe_expert_placement": ("--scmoe-expert-placement placement.json", "placement.json"),
    "scmoe_trace_dir": ("--scmoe-trace-dir traces", "traces"),
    "scmoe_collaboration_dir": ("--scmoe-collaboration-dir counts", "counts"),
}


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch):
    """Parsed and validated by the host, with our options, before apply_scmoe_defaults."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def parse(*options: str) -> Namespace:
        monkeypatch.setattr(sys, "argv", ["train.py", *shlex.split(" ".join(options))])
        args = parse_args(add_scmoe_args)
        validate_args(args)
        args.padded_vocab_size = 128
        return args

    return parse


@pytest.fixture
def model_config(arguments):
    """All the way to the model's config."""

    def build(*options: str) -> ScMoEModelConfig:
        args = arguments(*options)
        apply_scmoe_defaults(args)
        return model_config_from_args(args)

    return build


# Flags. -----------------------------------------------------------------------------------------


def scmoe_actions() -> dict[str, argparse.Action]:
    parser = argparse.ArgumentParser()
    add_scmoe_args(parser)
    return {action.dest: action for action in parser._actions if action.dest.startswith("scmoe")}


@pytest.mark.parametrize("text", ["10% more", "by 10%", "%(unknown)s", "%d of them"])
def test_a_help_text_that_cannot_be_formatted_is_printed_as_it_is(text: str) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sound", default=3, help="three is %(default)s")
    parser.add_argument("--bare", help=text)
    say.printable_help(parser)
    printed = parser.format_help()
    assert text in printed and "three is 3" in printed


@pytest.mark.parametrize(
    "script",
    ["pretrain_gpt_scmoe.py", pytest.param("tools/plan_overlap.py", marks=pytest.mark.slow)],
)
def test_help_is_printed(script: str) -> None:
    """Of all options, the host's with a bare percent sign too."""
    done = subprocess.run(
        [sys.executable, script, "--help"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-1000:]
    assert "--scmoe-shortcut-position" in done.stdout and "1.10 = 10%)" in done.stdout


def test_help_of_ours_alone(capsys: pytest.CaptureFixture[str]) -> None:
    parser = add_scmoe_args(add_megatron_arguments(argparse.ArgumentParser(prog="program")))
    with pytest.raises(SystemExit) as left:
        parser.parse_args(["--help-scmoe"])
    shown = " ".join(capsys.readouterr().out.split())
    assert left.value.code == 0
    assert "--scmoe-num-chunks N " in shown and "--scmoe-trace-dir DIR " in shown
    assert "hide. Default: 1." in shown
    assert "--no-scmoe-overlap, --disable-scmoe-overlap Await every all-to-all" in shown
    assert "--trust-checkpoints" in shown and "--hidden-size" not in shown
    assert (
        "--help-scmoe prints ours alone" in parser.format_help().split("Megatron-LM Arguments")[0]
    )


def test_help_of_the_planner_alone(capsys: pytest.CaptureFixture[str]) -> None:
    parser = add_planner_args(add_megatron_arguments(argparse.ArgumentParser()))
    with pytest.raises(SystemExit):
        parser.parse_args(["--help-scmoe"])
    shown = capsys.readouterr().out
    assert "--scmoe-num-chunks N" in shown and "--hidden-size" not in shown
    assert "--cluster-nodes N" in shown and "--measured FILE" in shown


def test_what_needs_no_torch_is_refused_before_it(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")

    def run(*options: str, program: str = "pretrain_gpt_scmoe.py") -> tuple[int, str]:
        environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"}
        command = [sys.executable, program, *options]
        done = subprocess.run(
            command, cwd=REPOSITORY, env=environment, capture_output=True, text=True
        )
        return done.returncode, done.stderr.strip()

    enough = ["--train-iters", "2", "--lr=1e-3", "--eval-interval", "1"]
    assert run(*enough, "--num-layers", "0") == (
        2,
        "pretrain_gpt_scmoe.py: error: --num-layers 0 is not from 1 to 10000.",
    )
    code, line = run("--hidden-dropout=2", "--lr", "nan")
    assert (
        code == 2
        and "--lr nan is no number to compute with; --hidden-dropout 2 is not from" in line
    )
    assert "How long" in line and "evaluate is missing" in line and "learning rate" not in line
    for rest in (enough, ["--help-scmoe"], ["--use-checkpoint-args"], ["--yaml-cfg", "x"]):
        assert run(*rest) == (1, "torch was imported")

    for program in ("tools/plan_overlap.py", "tools/doctor.py"):
        code, line = run("--num-layers", "0", program=program)
        assert code == 2 and "--num-layers 0 is not from 1 to 10000" in line and "\n" not in line
    sizes = ["--num-experts=8", "--cluster-preset", "a800-nvlink", "--cluster-nodes=1"]
    shares = ["--cluster-flops-efficiency=0.5", "--cluster-bandwidth-efficiency", "0.5"]
    code, line = run(*sizes, "--measured", "nowhere", program="tools/plan_overlap.py")
    assert (code, line) == (
        2,
        "plan_overlap.py: error: --measured nowhere: no such file: name one that is there.",
    )
    wrong = run("--cluster-nodes", "x", program="tools/plan_overlap.py")
    assert wrong == (2, "plan_overlap.py: error: argument --cluster-nodes: invalid int value: 'x'")
    for rest in ([*sizes, *shares], ["--help"]):
        assert run(*rest, program="tools/plan_overlap.py") == (1, "torch was imported")
    for rest in ([], enough):
        assert run(*rest, program="tools/doctor.py") == (1, "torch was imported")

    generate, wanted = "tools/generate.py", ["--load", "a", "--prompt", "b"]
    code, line = run("--top-p", "2", "--max-new-tokens=0", program=generate)
    assert code == 2 and line.startswith("generate.py: error: A checkpoint is missing: name the")
    assert "--max-new-tokens 0 is not" in line and "--top-p 2.0 is not above 0" in line
    assert run(*wanted, "--scmoe-expert-cache-size", "x", program=generate)[0] == 2
    for rest in (wanted, ["--help"]):
        assert run(*rest, program=generate) == (1, "torch was imported")
    counted = ["profile", "--load", "a", "--text", "b", "--output"]
    assert run(*counted, "c.txt", program="tools/c2r.py") == (
        2,
        "c2r.py: error: --output c.txt ends neither in .json nor in .safetensors.",
    )
    assert run(*counted, "c.json", program="tools/c2r.py") == (1, "torch was imported")

    report = "tools/overlap_report.py"
    code, line = run("nowhere", program=report)
    assert (code, line) == (
        2,
        "overlap_report.py: error: nowhere is not a folder; give what --scmoe-trace-dir was",
    )
    assert run("--rank", "x", program=report)[0] == 2
    assert run(str(tmp_path), program=report) == (1, "torch was imported")


@pytest.mark.parametrize("value", ["0", "-3", "7", "1e9", "nan", "text", ""])
@pytest.mark.parametrize("joined", [False, True])
def test_words_are_read_as_the_parser_does(value: str, joined: bool) -> None:
    """Or not at all: what only the parser can read, it refuses."""
    argv = [f"--weight-decay={value}"] if joined else ["--weight-decay", value]
    early = list(complaints(NUMBERS, typed_numbers(argv)))
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--weight-decay", type=float)
    try:
        late = list(complaints(NUMBERS, parser.parse_args(argv)))
    except argparse.ArgumentError:
        late = []
    assert early == late


def test_every_field_is_a_flag_with_help_and_the_fields_default() -> None:
    actions = scmoe_actions()
    actions.pop("scmoe_experts_at_home")  # one for each kind
    options = [field for field in fields(ScMoEConfig) if field.name not in NO_OPTIONS]
    assert list(actions) == [field.name for field in options] == list(TYPED)
    for field in options:
        action = actions[field.name]
        assert field.default is not MISSING
        assert action.default == field.default
        assert action.help and action.help.endswith(".")
        flag = "--" + field.name.replace("_", "-")
        assert flag in action.option_strings or field.default is True


def test_flags_do_not_collide_with_the_hosts(arguments) -> None:
    """The host's parser would refuse to add a flag twice."""
    args = arguments(MODEL)
    assert scmoe_config_from_args(args) == ScMoEConfig()


def test_round_trip(arguments) -> None:
    typed = " ".join(option for option, _ in TYPED.values())
    config = scmoe_config_from_args(arguments(MODEL, typed))
    assert config == ScMoEConfig(**{name: value for name, (_, value) in TYPED.items()})


@pytest.mark.parametrize("name", TYPED)
def test_one_flag_sets_one_field(arguments, name: str) -> None:
    option, value = TYPED[name]
    config = scmoe_config_from_args(arguments(MODEL, option))
    assert config == ScMoEConfig(**{name: value})


@pytest.mark.parametrize(
    "option",
    ["--scmoe-shortcut-position pos4", "--scmoe-combine cg3", "--scmoe-num-chunks one"],
)
def test_wrong_value_is_one_line(arguments, option: str) -> None:
    with pytest.raises(ValueError, match=r"argument --scmoe-.*: invalid") as error:
        arguments(MODEL, option)
    assert "\n" not in str(error.value)


# Defaults that a shortcut implies. --------------------------------------------------------------


def test_shortcut_completes_the_baselines_command_line(arguments) -> None:
    args = arguments(MODEL, MOE, POS2)
    notes = apply_scmoe_defaults(args)
    assert args.moe_shared_expert_intermediate_size == 64
    assert args.moe_router_pre_softmax
    assert args.moe_shared_expert_gate
    starts = [
        "--moe-shared-expert-intermediate-size 64",
        "--moe-router-pre-softmax",
        "--moe-shared-expert-gate",
    ]
    assert [note.split(":")[0].split(" (")[0] for note in notes] == starts
    assert all("\n" not in note for note in notes)
    # Nothing is left to complete, and the result passes.
    assert apply_scmoe_defaults(args) == []
    model_config_from_args(args)


def test_explicit_options_stay(arguments) -> None:
    args = arguments(
        MODEL,
        MOE.replace("--moe-router-topk 1", "--moe-router-topk 2"),
        POS2,
        "--moe-shared-expert-intermediate-size 48 --scmoe-combine add",
    )
    assert apply_scmoe_defaults(args) == []
    assert args.moe_shared_expert_intermediate_size == 48
    assert not args.moe_router_pre_softmax
    assert not args.moe_shared_expert_gate


def test_sigmoid_keeps_its_score(arguments) -> None:
    args = arguments(MODEL, MOE, POS2, "--moe-router-score-function sigmoid")
    apply_scmoe_defaults(args)
    assert not args.moe_router_pre_softmax


@pytest.mark.parametrize("options", [f"{MODEL} {MOE}", f"{MODEL} {POS2}"], ids=["none", "dense"])
def test_nothing_changes_without_shortcut_or_experts(arguments, options: str) -> None:
    args = arguments(options)
    before = dict(vars(args))
    assert apply_scmoe_defaults(args) == []
    assert vars(args) == before


def test_notes_are_printed_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = shlex.split(f"{MODEL} {MOE} {POS2}")
    monkeypatch.setattr(sys, "argv", ["train.py", *command])
    monkeypatch.setenv("WORLD_SIZE", "1")
    for rank, notes in ((0, 3), (1, 0)):
        monkeypatch.setenv("RANK", str(rank))
        parse_and_validate_args()
        lines = capsys.readouterr().out.splitlines()
        assert sum(line.startswith(f"{POS2} sets --moe-") for line in lines) == notes


# The model's config. ----------------------------------------------------------------------------


def test_model_config(model_config) -> None:
    config = model_config(MODEL, MOE, POS2, "--scmoe-expert-slot 2")
    assert config.scmoe == ScMoEConfig(scmoe_shortcut_position="pos2", scmoe_expert_slot="2")
    assert type(config.transformer) is TransformerConfig
    assert config.transformer.num_layers == 4
    assert config.transformer.moe_layer_freq == [0, 1, 0, 1]
    assert config.get_builder_cls() is ScMoEModelBuilder


def test_latent_attention_keeps_our_options(model_config) -> None:
    """The host replaces the config's class then, which would drop options of a derived class."""
    config = model_config(
        MODEL,
        MOE,
        "--multi-latent-attention --q-lora-rank 8 --kv-lora-rank 8 --rope-type rope",
        "--scmoe-shortcut-position pos3 --scmoe-combine cg2 --scmoe-post-norm",
    )
    assert type(config.transformer) is MLATransformerConfig
    assert config.scmoe == ScMoEConfig(
        scmoe_shortcut_position="pos3", scmoe_combine="cg2", scmoe_post_norm=True
    )


def test_no_shortcut_is_the_stock_config(model_config) -> None:
    config = model_config(MODEL, "--num-experts 4 --moe-router-topk 2 --moe-layer-freq 2")
    assert not config.scmoe.enabled
    assert config.transformer.moe_layer_freq == 2
    assert config.transformer.moe_shared_expert_intermediate_size is None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (f"{POS2} --scmoe-expert-slot 6", "--scmoe-expert-slot 6 is outside 0..5"),
        (f"{POS2} --moe-layer-freq 2", "--moe-layer-freq 2 puts the MoE first"),
        (
            "--scmoe-shortcut-position pos3 --moe-layer-freq 1",
            "needs a dense layer in front of every MoE layer",
        ),
        (f"{POS2} --moe-shared-expert-gate --scmoe-combine add", "drop it to use add"),
        (f"{POS2} --spec megatron.core.models.gpt.gpt_layer_specs", "--spec does not work"),
        (f"{POS2} --moe-layer-freq ([0]*4)", "lists no MoE layer"),
    ],
)
def test_refusals_of_the_command_line(model_config, options: str, expected: str) -> None:
    shared = "--moe-shared-expert-intermediate-size 32"
    with pytest.raises(ValueError, match=expected) as error:
        model_config(MODEL, MOE, shared, options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--train-iters", "add --train-iters or --train-samples"),
        ("--lr", "add --lr"),
        ("--eval-interval", "add --eval-interval"),
        ("--vocab-size", "needs --vocab-size"),
    ],
)
def test_missing_option(monkeypatch: pytest.MonkeyPatch, option: str, expected: str) -> None:
    words = shlex.split(MODEL)
    place = words.index(option)
    monkeypatch.setattr(sys, "argv", ["train.py", *words[:place], *words[place + 2 :]])
    with pytest.raises(ValueError, match=expected):
        parse_and_validate_args()


def test_a_cut_unit_is_refused_before_any_rank_builds(
    model_config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="inside the unit of layers 1 and 2"):
        model_config(MODEL, MOE, POS2, "--pipeline-model-parallel-size 4")


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ("", None),
        ("--moe-grouped-gemm", None),
        ("--moe-grouped-gemm --moe-ffn-hidden-size 18", "multiple of 16 bytes"),
        ("--moe-grouped-gemm --add-bias", "experts with biases run one by one"),
    ],
)
def test_grouped_gemm_is_kept_and_explained(arguments, options: str, note: str | None) -> None:
    """On a machine without a CUDA device too."""
    model = MODEL.replace("--disable-bias-linear", "") if "--add-bias" in options else MODEL
    args = arguments(model, MOE, options.replace("--add-bias", ""))
    host.apply_cpu_defaults(args)
    assert args.moe_grouped_gemm == bool(options)
    notes = explain_grouped_gemm(args)
    assert notes == [] if note is None else note in "".join(notes)


def test_options_that_checkpoints_are_compared_by_exist_and_are_named(
    arguments: Callable[..., Namespace],
) -> None:
    """By the host's own parser: a name that it does not know would never differ."""
    parser = add_scmoe_args(add_megatron_arguments(argparse.ArgumentParser()))
    flags = {action.dest: action.option_strings for action in parser._actions}
    here = arguments(
        MODEL, MOE, "--group-query-attention --position-embedding-type learned_absolute"
    )
    for dest in (*ARCHITECTURE, *SCMOE, *WORTH_A_NOTE, *TIMES):
        # Kinds of experts at home are flags of their own.
        assert dest == "scmoe_experts_at_home" or flag(dest).split()[0] in flags[dest]
        saved = Namespace(**vars(here))
        assert differences(saved, here, (dest,)) == []
        setattr(saved, dest, [1, 1, 1, 1] if dest == "moe_layer_freq" else "other")
        (line,) = differences(saved, here, (dest,))
        assert line.startswith(f"{flag(dest)} ")
