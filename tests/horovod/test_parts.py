"""Parts of the Horovod adapter that need Horovod installed but no job."""

import importlib.util
import inspect
import os
import subprocess
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launch import run

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def installer():
    loader = SourceFileLoader("install_horovod", str(ROOT / "scripts" / "install_horovod"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("version", "fits"), [("0.28.1", True), ("0.28.0+x", True), ("0.27.0", False), ("0.29.0", False)]
)
def test_other_versions_are_refused_by_name(monkeypatch, version, fits):
    import horovod

    from commhooks import SparseState
    from commhooks.horovod import DistributedOptimizer

    monkeypatch.setattr(horovod, "__version__", version)
    parameter = torch.nn.Parameter(torch.zeros(1))
    kind, text = (
        (ValueError, "hvd.init") if fits else (RuntimeError, rf"0\.28\.x, found {version}.*Compression")
    )
    with pytest.raises(kind, match=text):
        DistributedOptimizer(torch.optim.SGD([parameter], lr=0.1), [("p", parameter)], SparseState.topk(0.1))


def test_both_calls_for_an_optimizer_have_the_same_arguments_and_make_the_same_memory(capsys):
    from commhooks import SparseState
    from commhooks.horovod import Compression

    hook, stock = (
        {name: p.default for name, p in inspect.signature(call).parameters.items()}
        for call in (SparseState.for_optimizer, Compression.for_optimizer)
    )
    assert {"transport", "norm_over"} == hook.keys() - stock.keys()
    assert {"named_parameters"} == stock.keys() - hook.keys()
    assert all(stock[name] == hook[name] for name in stock.keys() & hook.keys())
    for given in (
        {"warmup_steps": 0},
        {"warmup_steps": 9},
        {"warmup_steps": 9, "factor_masking": True, "clip_norm": 2.0},
        {"warmup_steps": 0, "factor_masking": False, "rescale_with_lr": True},
    ):
        made, lines = [], []
        for call in (SparseState.for_optimizer, Compression.for_optimizer):
            parameter = torch.nn.Parameter(torch.zeros(3))
            optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9, weight_decay=0.1)
            named = () if call == SparseState.for_optimizer else ([("p", parameter)],)
            result = call(optimizer, *named, **given)
            core = getattr(result, "core", getattr(result, "reducer", None))
            made.append((core.memory.settings(), repr(core.selector)))
            lines.append(capsys.readouterr().err)
            assert core.memory.optimizer is (optimizer if given.get("rescale_with_lr") else None)
        assert made[0] == made[1] and lines[0] == lines[1] and lines[0].count("\n") == 1
    parameter = torch.nn.Parameter(torch.zeros(3))
    Compression.for_optimizer(torch.optim.AdamW([parameter]), [("p", parameter)], warmup_steps=0)
    assert "commhooks.horovod.DistributedOptimizer" in capsys.readouterr().err
    for wrong, kind in (({"scheme": "lowbit"}, ValueError), ({"memory": None}, TypeError)):
        optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
        with pytest.raises(kind, match="lowbit|makes the memory"):
            Compression.for_optimizer(optimizer, [("p", parameter)], warmup_steps=0, **wrong)
        assert optimizer.param_groups[0]["momentum"] == 0.9


@pytest.mark.parametrize(("version", "handlers"), [("0.28.1", 5), ("0.29.0", 3)])
def test_the_elastic_registry_is_left_alone_in_other_versions(version, handlers):
    code = (
        f"import horovod; horovod.__version__ = {version!r}\nimport commhooks.horovod\n"
        "from horovod.torch.elastic.state import get_handler_registry\nprint(len(get_handler_registry()))"
    )
    assert run([os.sys.executable, "-c", code], timeout=60.0).stdout.strip() == str(handlers)


def test_without_horovod_the_message_says_what_to_run(monkeypatch):
    from commhooks.horovod import api

    def absent(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(api.importlib, "import_module", absent)
    with pytest.raises(ImportError, match="scripts/install_horovod"):
        api.horovod()


def test_the_parameter_is_found_by_identity_alone():
    from commhooks.horovod.parameters import ParameterTable

    parameters = [torch.nn.Parameter(torch.zeros(4)) for _ in range(20)]
    table = ParameterTable([(f"p{i}", p) for i, p in enumerate(parameters)])
    for p in parameters:
        p.grad = torch.zeros(4)  # equal in value and shape
    for order in (range(20), reversed(range(20)), torch.randperm(20).tolist()):
        for i in order:
            assert table.find(parameters[i].grad).name == f"p{i}"
    with pytest.raises(ValueError, match="named_parameters"):
        table.find(parameters[3].grad.view(4))  # the same memory, another tensor
    with pytest.raises(ValueError, match="named_parameters"):
        table.find(torch.zeros(4))
    with pytest.raises(ValueError, match="op=Adasum"):
        table.find(parameters[0])


def test_a_memory_of_another_type_is_refused_by_name():
    from commhooks.horovod import Compression

    for make in (Compression.topk, Compression.randomk):
        with pytest.raises(TypeError, match="memory must be a Memory such as ErrorFeedback.*got float"):
            make(0.1, [("w", torch.nn.Parameter(torch.zeros(2)))], memory=0.9)


@pytest.mark.parametrize(("given", "waits"), [(None, 7200.0), (5.0, 5.0)])
def test_a_wait_is_as_long_as_the_groups_unless_told(monkeypatch, given, waits):
    """With the group's timeout and Horovod's answers made up."""
    from commhooks import SparseState
    from commhooks.horovod import Compression, gradient_sync
    from commhooks.transports import in_process

    asked = []

    def open_transport(requested, process_set, timeout_s):
        asked.append(timeout_s)
        return in_process.group(1)[0], None

    monkeypatch.setattr("commhooks.transports.distributed.timeout_of", lambda group: 7200.0)
    monkeypatch.setattr(gradient_sync, "open_transport", open_transport)
    monkeypatch.setattr(gradient_sync, "session", object)
    parameter = torch.nn.Parameter(torch.zeros(2))
    gradient_sync.GradientSync(
        SparseState.topk(0.5, timeout_s=given),
        [],
        {parameter: "p"},
        passes=1,
        sums=False,
        process_set=None,
        sparse="refused",
    )
    assert asked == [waits]
    core = Compression.topk(0.5, [("p", parameter)], timeout_s=given).core
    assert core.timeout_s == waits
    with pytest.raises(ValueError, match="timeout_s must be positive, got -1"):
        Compression.topk(0.5, [("p", parameter)], timeout_s=-1)


def test_a_gather_beside_join_is_refused_by_name(monkeypatch):
    """With Horovod's answer made up: in a job its all-gathers beside hvd.join() have crashed a rank (MPI, 4 ranks)."""
    import horovod.torch as hvd

    from commhooks.horovod import api

    def synchronize(handle):
        raise hvd.HorovodInternalError(answers.pop())

    answers = ["Connection reset by peer", "Allgather is not supported with Join at this time."]
    monkeypatch.setattr(hvd, "rank", lambda: 2)
    monkeypatch.setattr(hvd, "poll", lambda handle: True)
    monkeypatch.setattr(hvd, "synchronize", synchronize)
    with pytest.raises(ValueError, match=r"rank 2, agreement: a rank called hvd.join\(\)"):
        api.wait_for(0, 1.0, "agreement")
    with pytest.raises(hvd.HorovodInternalError, match="Connection reset"):
        api.wait_for(0, 1.0, "agreement")


def test_masks_depend_on_the_name_alone():
    from commhooks.horovod.parameters import ParameterTable, mask_key_of

    assert mask_key_of("layer.weight") == 9063835677411732693  # a constant: the same on every machine and day
    a, b = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    one = {e.name: (e.index, e.mask_key) for e in ParameterTable([("a", a), ("b", b)]).entries}
    two = {e.name: (e.index, e.mask_key) for e in ParameterTable([("b", b), ("a", a)]).entries}
    assert one == two and one["a"][1] != one["b"][1]


def test_partition():
    from commhooks.horovod.buckets import partition

    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (300_000, 10, 200_000, 200_000, 50)]
    half = torch.nn.Parameter(torch.zeros(7, dtype=torch.bfloat16))
    sizes = [[p.numel() for p in b.parameters] for b in partition([*parameters, half], 1.5, None)]
    assert sizes == [[7], [50, 200_000], [200_000, 10], [300_000]]
    assert sorted(sum(sizes, [])) == sorted([300_000, 10, 200_000, 200_000, 50, 7])
    for mib, limit in ((0.5, 131_072), (100.0, 10**9)):
        for bucket in partition(parameters, mib, None):
            assert len(bucket.parameters) == 1 or bucket.buffer.numel() <= limit
    assert [len(b.parameters) for b in partition(parameters, 25.0, 2)] == [3, 2]
    listed = partition(parameters, 25.0, [[parameters[4], parameters[0]], [parameters[1]]])
    assert [p.numel() for p in listed[0].parameters] == [50, 300_000]
    assert sum(len(b.parameters) for b in listed) == 5
    with pytest.raises(ValueError, match="groups"):
        partition(parameters, 25.0, [[parameters[0], parameters[0]], [torch.nn.Parameter(torch.zeros(1))]])
    with pytest.raises(ValueError, match="groups"):
        partition([*parameters, half], 25.0, [[parameters[0], half]])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7, 64, 1000])
def test_the_marker_tells_op_votes_and_missing_ranks(world_size):
    from commhooks.horovod import Compression
    from commhooks.horovod.compression import _VOTE

    marks = [3.0] + [1.0] * (world_size - 1)
    for averages in (False, True):
        compression = Compression.randomk(0.1, [("p", torch.nn.Parameter(torch.zeros(1)))])
        compression.core = SimpleNamespace(
            process_set=SimpleNamespace(size=lambda: world_size), memory=compression.core.memory
        )

        def reduced(values, averages=averages):
            total = torch.tensor(values, dtype=torch.float32).sum()
            return float(total / world_size if averages else total)

        assert compression._read_marker(reduced(marks)) == (False, True)
        assert compression._read_marker(reduced([marks[0] + _VOTE, *marks[1:]])) == (True, True)
        if world_size > 1:
            assert compression._averages == averages
            joined = [*marks[:-1], 0.0]  # after hvd.join() a rank sends zeros
            assert compression._read_marker(reduced(joined)) == (False, False)
            assert compression._read_marker(reduced([joined[0] + _VOTE, *joined[1:]])) == (True, False)
    if world_size > 1:
        compression._averages = None
        for wrong in (min(marks), max(marks)):  # what Min, Max and Product give
            with pytest.raises(ValueError, match="op must be"):
                compression._read_marker(wrong)


def test_the_compiler_wrapper_changes_two_options(installer, tmp_path):
    env = installer.build_environment(ROOT, None, "echo", tmp_path, "local", 1)

    def through(*arguments):
        return subprocess.run(
            [env["CXX"], *arguments], capture_output=True, text=True, check=True, env=env
        ).stdout.split()

    compiled = through("-O3", "-g", "-std=c++14", "-DA=b c", "-c", "x.cc", "-o", "x.o")
    assert compiled == ["-O3", "-std=c++20", "-DA=b", "c", "-c", "x.cc", "-o", "x.o"]
    linked = through("x.o", "-shared", "-o", "x.so")
    assert linked == ["-Wl,-rpath,$ORIGIN/../../../..", "x.o", "-shared", "-o", "x.so"]


def test_the_launcher_keeps_the_environments_interpreter(installer, monkeypatch, tmp_path):
    """An mpirun that says HYDRA and not MPICH: `horovodrun` becomes ours, its first line stays."""
    (tmp_path / "bin").mkdir()
    launcher, mpirun = tmp_path / "bin" / "horovodrun", tmp_path / "bin" / "mpirun"
    stock = "#!/some/where/python3\nprint('stock')\n"
    for said, replaced in (("HYDRA build details", True), ("MPICH HYDRA", False)):
        launcher.write_text(stock)
        mpirun.write_text(f"#!/bin/sh\necho '{said}'\n")
        mpirun.chmod(0o755)
        installer.write_launcher({"prefix": str(tmp_path)}, (str(tmp_path / "bin"), "mpich5.0.2"))
        lines = launcher.read_text().splitlines()
        assert lines[0] == "#!/some/where/python3"
        assert ("run_commandline()" in lines[-1]) == replaced
        compile(launcher.read_text(), str(launcher), "exec")


def test_the_installer_names_what_is_missing(installer, monkeypatch, tmp_path):
    info = installer.probe(os.sys.executable)
    assert (
        info["torch"]
        and installer.local_version({"torch": "2.13.0+cpu"}, "mpich5.0.2") == "torch2.13.0.cpu.mpich5.0.2"
    )
    with pytest.raises(installer.InstallError, match="torch is not installed"):
        installer.check_prerequisites({**info, "torch": None})
    with pytest.raises(installer.InstallError, match=r"Python\.h is missing"):
        installer.check_prerequisites({**info, "include": str(tmp_path)})
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    headers = tmp_path / "Python.h"
    headers.touch()
    with pytest.raises(installer.InstallError, match=r"no C\+\+ compiler"):
        installer.check_prerequisites({**info, "include": str(tmp_path)})
    with pytest.raises(installer.InstallError, match="no Python interpreter"):
        installer.python_of(str(tmp_path))
