"""The table of replaced host symbols."""

import importlib.util
import os
import resource
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.training import global_vars
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

import pretrain_gpt_scmoe
from megatron_scmoe import host, say, start
from megatron_scmoe.host import cpu, optimizer, replace
from megatron_scmoe.say import SECONDS_TO_SPEAK


def restore() -> None:
    """Undo what was replaced."""
    while replace._undo:
        _, (owner, name, original) = replace._undo.popitem()
        if original is replace._MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, original)


@pytest.fixture
def originals():
    """The table taken down for the test; name it before monkeypatch, which then ends first."""
    restore()
    yield
    restore()
    start.replace_host_symbols()


@pytest.mark.parametrize("row", start.all_rows(), ids=lambda row: row.symbol)
def test_row_names_what_exists(row: replace.Replacement) -> None:
    owner, name = replace._locate(row.symbol)
    assert hasattr(owner, name)
    assert row.condition in replace.CONDITIONS
    # Megatron's files are named below `megatron/`, those of others from their package on.
    package = importlib.util.find_spec("megatron").submodule_search_locations[0]
    file = row.host_file.split(":")[0]
    of_others = os.path.join(os.path.dirname(os.path.dirname(torch.__file__)), file)
    assert os.path.exists(os.path.join(package, file)) or os.path.exists(of_others)


def test_symbols_are_named_once() -> None:
    symbols = [row.symbol for row in start.all_rows()]
    assert len(symbols) == len(set(symbols))


def test_only_bugs_are_replaced_with_a_cuda_device(
    originals: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(replace.CONDITIONS, "cpu", lambda: False)
    conditions = {row.condition for row in start.replace_host_symbols()}
    assert conditions <= {"always", "no Makefile", "no TE", "no TE or Apex"}


def test_sound_installation_is_left_alone(originals: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for condition in replace.CONDITIONS:
        monkeypatch.setitem(replace.CONDITIONS, condition, lambda: False)
    assert start.replace_host_symbols() == []


def test_apply_and_restore(originals: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(replace.CONDITIONS, "cpu", lambda: True)
    before = {row.symbol: _value(row.symbol) for row in start.all_rows()}
    rows = start.replace_host_symbols()
    assert "torch.Tensor.type" in {row.symbol for row in rows}
    assert torch.zeros(2, device="cuda").type() == "torch.cuda.FloatTensor"
    assert torch.ones(1).cuda().device == cpu.CPU
    assert not torch.cuda.is_available() or torch.cuda.device_count() > 0
    assert start.replace_host_symbols() == []
    restore()
    assert {row.symbol: _value(row.symbol) for row in start.all_rows()} == before
    assert "type" not in vars(torch.Tensor)


def _value(symbol: str) -> object:
    owner, name = replace._locate(symbol)
    return getattr(owner, name)


def test_missing_symbol_is_named(originals: None, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = replace.Replacement("megatron.core.utils.gone", "cpu", "", "", lambda original: None)
    monkeypatch.setitem(replace.CONDITIONS, "cpu", lambda: True)
    with pytest.raises(AttributeError, match=r"megatron\.core\.utils\.gone does not exist"):
        host.replace_symbols([gone])


def test_a_device_context_still_holds() -> None:
    """Whoever loads a model from Hugging Face beside the host builds it in one."""
    with torch.device("meta"):
        assert torch.zeros(2).is_meta and torch.arange(2).is_meta


def test_table_is_printed_in_columns() -> None:
    lines = host.format_table(start.all_rows()).splitlines()
    assert len(lines) == len(start.all_rows()) + 1
    column = lines[0].index("condition")
    assert all(line[column - 2 : column] == "  " and line[column] != " " for line in lines)


def test_random_numbers_of_both_kinds_are_one_stream(originals: None) -> None:
    if not cpu.no_cuda_device():
        pytest.skip("needs a machine without CUDA")
    start.replace_host_symbols()
    torch.cuda.manual_seed(7)
    state = torch.cuda.get_rng_state()
    drawn = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), drawn)


def cpu_args() -> Namespace:
    """A command line that the CPU backend takes as it is."""
    options = {option.dest: option.value for option in cpu.CPU_OPTIONS}
    return Namespace(rank=0, **options)


def test_cpu_options_exist_and_are_announced_once(capsys: pytest.CaptureFixture[str]) -> None:
    if not cpu.no_cuda_device():
        pytest.skip("needs a machine without CUDA")
    args = cpu_args()
    args.moe_token_dispatcher_type = "allgather"
    args.transformer_impl = "transformer_engine"
    host.apply_cpu_defaults(args)
    assert (args.transformer_impl, args.moe_token_dispatcher_type) == ("local", "allgather")
    assert capsys.readouterr().out == (
        "No CUDA device: CPU backend. Switched: --transformer-impl local\n"
    )
    args.rank = 1
    host.apply_cpu_defaults(args)
    assert capsys.readouterr().out == ""


class TestUserErrors:
    def test_message(self, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(SystemExit) as exit_info, say.user_errors():
            raise AssertionError("two\n lines")
        assert exit_info.value.code == 2
        assert capsys.readouterr().err.endswith(": error: two lines\n")

    @pytest.mark.parametrize("started", ["a/quality/__main__.py", "a/quality"])
    def test_program_has_its_name(self, started: str, capsys, monkeypatch) -> None:
        """Also one that `python -m` has started as a folder."""
        monkeypatch.setattr(sys, "argv", [started])
        say.say("wrong")
        assert capsys.readouterr().err == "quality: error: wrong\n"

    def test_bare_assert_shows_its_condition(self, capsys, monkeypatch) -> None:
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(SystemExit), say.user_errors():
            assert 1 == 2
        assert "assert 1 == 2" in capsys.readouterr().err

    def test_other_ranks_let_the_first_one_speak(self, capsys, monkeypatch) -> None:
        """The launcher ends them meanwhile, unless the error is theirs alone."""
        slept: list[float] = []
        monkeypatch.setattr("megatron_scmoe.say.time.sleep", slept.append)
        monkeypatch.setenv("RANK", "3")
        monkeypatch.setenv("LOCAL_RANK", "3")
        with pytest.raises(SystemExit), say.user_errors():
            raise ValueError("no")
        assert slept == [SECONDS_TO_SPEAK + 3]
        assert capsys.readouterr().err.endswith(": error: no\n")

    def test_another_node_speaks_for_itself(self, capsys, monkeypatch) -> None:
        """Later than rank 0: the launcher ends it if rank 0 has the same to say."""
        waited: list[float] = []
        monkeypatch.setattr("megatron_scmoe.say.time.sleep", waited.append)
        monkeypatch.setenv("RANK", "8")
        monkeypatch.setenv("LOCAL_RANK", "0")
        with pytest.raises(SystemExit), say.user_errors():
            raise ValueError("no such file on this node")
        assert "error: no such file on this node" in capsys.readouterr().err
        assert len(waited) == 1 and waited[0] >= 10

    def test_bugs_keep_their_traceback(self) -> None:
        with pytest.raises(KeyError), say.user_errors():
            raise KeyError("bug")


@pytest.mark.parametrize("imported", [False, True])
def test_gpu_libraries_are_hidden_unless_imported(
    monkeypatch: pytest.MonkeyPatch, imported: bool
) -> None:
    for name in ("apex", "transformer_engine"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        if imported:
            monkeypatch.setitem(sys.modules, name, sys)
        else:
            monkeypatch.setitem(sys.modules, name, None)
            monkeypatch.delitem(sys.modules, name)
    cpu.hide_gpu_libraries()
    for name in ("apex", "transformer_engine"):
        assert sys.modules[name] is (sys if imported else None)
        assert imported or importlib.util.find_spec(name) is None


def test_curves_end_on_a_full_disk_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The kernel lets no file grow beyond 2 kB; what was written before stays readable."""
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(global_vars, "_GLOBAL_TENSORBOARD_WRITER", None)
    args = Namespace(tensorboard_dir=str(tmp_path), tensorboard_queue_size=1, rank=0, world_size=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    global_vars._set_tensorboard_writer(args)
    writer = global_vars._GLOBAL_TENSORBOARD_WRITER
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        for iteration in range(100):
            writer.add_scalar("loss", 1.0, iteration)
            writer.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr()
    assert said.out.count("WARNING: no more curves in --tensorboard-dir: ") == 1
    assert "Traceback" not in said.err
    curves = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert 10 < len(curves) < 100 and curves[-1].step == len(curves) - 1


def test_the_last_curve_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer's thread is slow and dies with the process: whoever leaves waits for it."""
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(global_vars, "_GLOBAL_TENSORBOARD_WRITER", None)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    write = RecordWriter.write
    monkeypatch.setattr(RecordWriter, "write", lambda *args: (time.sleep(0.3), write(*args)))
    args = Namespace(tensorboard_dir=str(tmp_path), tensorboard_queue_size=9, rank=0, world_size=1)
    global_vars._set_tensorboard_writer(args)
    global_vars._GLOBAL_TENSORBOARD_WRITER.add_scalar("lm loss validation", 1.0, 7)
    pretrain_gpt_scmoe.finish(args, counts=False)
    curves = EventAccumulator(str(tmp_path)).Reload().Scalars("lm loss validation")
    assert [point.step for point in curves] == [7]


def test_state_behind_a_padded_bucket_is_cut_where_it_lies() -> None:
    """The host gathers 3 and 2 elements without padding; buckets are padded to 4."""
    first, second, third = torch.zeros(3), torch.zeros(2), torch.zeros(1)
    padded = {first: (0, 3, 0), second: (4, 6, 1), third: (8, 9, 2)}
    buckets = [SimpleNamespace(grad_data=torch.zeros(4), numel_unpadded=n) for n in (3, 2, 1)]
    buffer = SimpleNamespace(param_index_map=padded, buckets=buckets)
    seen = []

    def sharded_states(self: Any, fails: bool) -> str:
        seen.append([place[:2] for place in self.buffers[0].param_index_map.values()])
        if fails:
            raise ValueError
        return "states"

    save = optimizer.states_behind_padded_buckets(sharded_states)
    assert save(SimpleNamespace(buffers=[buffer]), False) == "states"
    with pytest.raises(ValueError):
        save(SimpleNamespace(buffers=[buffer]), True)
    assert seen == [[(0, 3), (3, 5), (5, 6)]] * 2
    assert buffer.param_index_map is padded
