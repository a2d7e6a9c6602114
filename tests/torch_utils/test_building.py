"""Building the kernels fails in every way that it fails for people, and ends in one line each time."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from torch_utils import custom_ops
from torch_utils.ops import bias_act, impl
from torch_utils.ops import upfirdn2d as upfirdn2d
from torch_utils.ops.native import cuda, driver
from torch_utils.ops.native.building import NativeUnavailable, cache, compilers, cpu_build, cuda_build
from torch_utils.ops.native.plan import LaunchPlan

ROOT = Path(__file__).parents[2]
SOURCE = 'extern "C" int sg_answer(void) {\n    return 42;\n}\n'
not_root = pytest.mark.skipif(
    hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere"
)


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """A cache of its own for each test, and nothing remembered."""
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    for variable in ("CXX", "CUDACXX", "CUDA_HOME", "CUDA_PATH", "FINETUNE_OPS"):
        monkeypatch.delenv(variable, raising=False)
    forget()
    yield
    forget()


def forget():
    for remembers in (compilers.cxx, compilers.nvcc):
        if hasattr(remembers, "cache_clear"):
            remembers.cache_clear()
    cache._private.clear()
    custom_ops._library = None
    impl.set_default_impl(None)
    impl._warned.clear()


@pytest.fixture
def sources(tmp_path):
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "answer.cpp").write_text(SOURCE)
    return folder


def script(path: Path, text: str) -> str:
    """A program named `path`."""
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


def _raise(error: Exception):
    raise error


def entries() -> list[str]:
    """The libraries in the cache."""
    return sorted(path.parent.name for path in cache.ops_folder().rglob(cpu_build.NAME))


def test_building_cpu_build_caches_library(sources, monkeypatch):
    path = cpu_build.build(sources)
    assert entries() == [path.parent.name]
    monkeypatch.setattr(cpu_build, "_compile", None)  # nobody asks for it again
    monkeypatch.setattr(compilers, "cxx", None)  # nor for the compiler to be tried
    assert cpu_build.build(sources) == path


def test_building_cpu_build_key_covers_sources_flags_compiler_machine(sources, monkeypatch):
    gcc = compilers.Compiler("/usr/bin/c++", "12")
    keys = {cpu_build._key({"a.cpp": b"1"}, gcc), cpu_build._key({"a.cpp": b"2"}, gcc)}
    keys.add(cpu_build._key({"a.cpp": b"1"}, gcc._replace(version="13")))
    keys.add(cpu_build._key({"a.cpp": b"1"}, gcc._replace(path="/opt/c++")))
    monkeypatch.setattr(cpu_build, "machine", lambda: "another")
    keys.add(cpu_build._key({"a.cpp": b"1"}, gcc))
    monkeypatch.setattr(cpu_build, "FLAGS", ("-O0",))
    keys.add(cpu_build._key({"a.cpp": b"1"}, gcc))
    assert len(keys) == 6


def test_building_cpu_build_without_compiler(monkeypatch, caplog):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(
        NativeUnavailable, match=r"no C\+\+ compiler that works \(c\+\+: not found; g\+\+:.*\);"
    ):
        custom_ops.cpu_library()
    caplog.set_level(logging.INFO, "torch_utils.ops")
    x = torch.zeros(2, 3)
    with pytest.warns(
        impl.SlowOpsWarning, match="reference ops on cpu .*: no C.. compiler.*apt install"
    ) as warned:
        assert impl.choose("bias_act", "auto", "cpu") == "ref"
        assert impl.choose("upfirdn2d", "auto", "cpu") == "ref"
    assert len(warned) == 1
    assert [record.getMessage().partition(" (")[0] for record in caplog.records] == [
        "bias_act on cpu: plain torch",
        "upfirdn2d on cpu: plain torch",
    ]
    assert torch.equal(bias_act.bias_act(x, torch.ones(3)), torch.ones(2, 3))
    with pytest.raises(impl.ImplementationUnavailable, match="impl='cpu' cannot run on cpu: no C"):
        bias_act.bias_act(x, torch.ones(3), impl="cpu")


def test_building_cuda_build_without_nvcc(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(compilers.shutil, "which", lambda name: None)
    with pytest.raises(NativeUnavailable, match=r"no nvcc that works.*NVRTC"):
        compilers.nvcc()


def test_building_compilers_nvcc_without_output(tmp_path, monkeypatch):
    """It names its version and compiles nothing: it is not taken, and NVRTC is used where there is one."""
    liar = script(tmp_path / "nvcc", 'echo "Cuda compilation tools, release 13.0"\nexit 0\n')
    monkeypatch.setenv("CUDACXX", liar)
    found = shutil.which
    monkeypatch.setattr(compilers.shutil, "which", lambda name: found(name) if name == liar else None)
    with pytest.raises(
        NativeUnavailable, match=f"{liar} cannot compile three lines: no message and no output"
    ):
        compilers.nvcc()
    monkeypatch.setattr(cuda_build, "nvrtc_many", lambda plans, capability: [])
    assert custom_ops.build_cuda([PLAN], (8, 0)) == "nvrtc"
    with pytest.raises(NativeUnavailable, match="no message and no output file"):
        cuda_build.nvcc([PLAN], (8, 0))


def test_building_compilers_nvcc_error_is_quoted(tmp_path):
    broken = script(tmp_path / "nvcc", 'echo "cuda_runtime.h: fatal error: No such file" >&2\nexit 1\n')
    with pytest.raises(NativeUnavailable, match=r"cuda_runtime\.h: fatal error: No such file"):
        compilers._first((broken,), "nvcc", "trial.cu", "", ["-o", "t.cubin"], "t.cubin", "")


def test_building_cpu_build_quotes_compiler_once(sources, monkeypatch):
    sources = sources.rename(sources.with_name("native"))  # as the folder of our own sources
    (sources / "answer.cpp").write_text("int answer( { return 42; }\n")
    run, builds = cpu_build._run, []
    monkeypatch.setattr(cpu_build, "_run", lambda *args: (builds.append(args), run(*args))[1])
    with pytest.raises(NativeUnavailable, match=r"cannot compile the CPU ops: .*error: .*CXX="):
        cpu_build.build(sources)
    assert entries() == [] and len(builds) == 1


def test_building_cpu_build_passes_over_old_compiler(sources, tmp_path, monkeypatch):
    """The next one is in a folder whose name has a space."""
    real, folder = compilers.cxx().path, tmp_path / "my tools"
    folder.mkdir()
    old = script(tmp_path / "old", f'case "$*" in *c++17*) exit 1;; esac\nexec {real} "$@"\n')
    monkeypatch.setattr(compilers, "CXX_NAMES", (old, script(folder / "new", f'exec {real} "$@"\n')))
    compilers.cxx.cache_clear()
    assert compilers.cxx().path == str(folder / "new") and cpu_build.build(sources).is_file()


def test_building_cpu_build_without_march_native(sources, tmp_path, monkeypatch):
    real = compilers.cxx().path
    refusal = 'echo "error: bad value for -march=native" >&2; exit 1'
    picky = f'case "$*" in *native*) {refusal};; esac\nexec {real} "$@"\n'
    monkeypatch.setenv("CXX", script(tmp_path / "picky", picky))
    compilers.cxx.cache_clear()
    assert cpu_build.build(sources).is_file()


def test_building_cpu_build_without_ninja(sources, monkeypatch):
    monkeypatch.setattr(cpu_build, "find_ninja", lambda: None)
    assert cpu_build.build(sources).is_file()


BUILD = """
    import sys
    from pathlib import Path
    from torch_utils.ops.native.building import cpu_build
    print(cpu_build.build(Path(sys.argv[1])))
"""


def start_build(sources, **variables):
    # conftest.py of the tests is not wanted here, only the package.
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(BUILD), str(sources)],
        cwd=ROOT,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def slow_compiler(tmp_path) -> str:
    """A compiler that writes down each library it is asked for, and takes its time."""
    real = compilers.cxx().path
    text = f'case " $* " in *" -c "*) echo built >>"{tmp_path}/count"; sleep 0.5;; esac\nexec {real} "$@"\n'
    return script(tmp_path / "slow", text)


def test_building_cpu_build_two_processes_build_once(sources, tmp_path):
    compiler = slow_compiler(tmp_path)
    builds = [start_build(sources, CXX=compiler) for _ in range(2)]
    said = [build.communicate(timeout=60)[0] for build in builds]
    assert said[0] == said[1] and Path(said[0].strip()).is_file()
    assert (tmp_path / "count").read_text().split() == ["built"]


def test_building_cpu_build_after_killed_build(sources, tmp_path):
    build = start_build(sources, CXX=slow_compiler(tmp_path))
    while not (tmp_path / "count").exists():
        time.sleep(0.02)
        assert build.poll() is None
    os.killpg(build.pid, signal.SIGKILL)
    build.communicate()
    assert entries() == []
    started = time.monotonic()
    assert cpu_build.build(sources).is_file()
    assert time.monotonic() - started < cache.TIME_OUT_SEC / 2


def test_building_cpu_build_lock_times_out(tmp_path, caplog):
    caplog.set_level(logging.INFO, "torch_utils.ops")
    with cache.build_lock("a"):
        assert caplog.text == ""
        with cache.build_lock("a", timeout_sec=0.1):
            assert "Waiting for another process" in caplog.text
    path = cache.ops_folder() / "a.lock"
    assert f"Another process has held {path} for 0 s: building without it" in caplog.text
    caplog.clear()
    with cache.build_lock("a"):
        assert caplog.text == ""


def test_building_cache_rebuilds_damaged_file(sources, caplog):
    path = cpu_build.build(sources)
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    again = cpu_build.build(sources)
    assert again.read_bytes() == good
    assert f"{path} has changed since it was built" in caplog.text


def test_building_cpu_library_refuses_other_structs(tmp_path, monkeypatch):
    folder = tmp_path / "other"
    folder.mkdir()
    text = 'extern "C" const char* sg_build_info() { return ""; }\n'
    (folder / "other.cpp").write_text(text + 'extern "C" int sg_struct_bytes(int) { return 8; }\n')
    monkeypatch.setattr(cpu_build.build, "__defaults__", (folder,))
    monkeypatch.setattr(cpu_build, "FLAGS", ("-fPIC",))
    with pytest.raises(NativeUnavailable, match=r"takes structs of \[8, 8, 8\] bytes.*doctor --clean"):
        custom_ops.cpu_library()


@not_root
def test_building_cache_not_writable(sources, tmp_path, caplog):
    (tmp_path / "cache").mkdir(mode=0o555)
    path = cpu_build.build(sources)
    assert path.is_file() and tmp_path not in path.parents
    assert "cannot be used" in caplog.text and "FINETUNE_CACHE" in caplog.text


def test_building_cache_is_a_file(sources, tmp_path, caplog):
    (tmp_path / "cache").write_text("not a folder")
    path = cpu_build.build(sources)
    assert path.is_file() and tmp_path not in path.parents
    assert cache.find(path.parent.name, path.name) == path
    cache.publish("other", "kernel", b"binary")
    assert caplog.text.count("cannot be used") == 1 and "FINETUNE_CACHE" in caplog.text


def test_building_cache_is_readable_by_other_users():
    before = os.umask(0o077)
    try:
        path = cache.publish("key", "kernel", b"binary")
    finally:
        os.umask(before)
    assert [each.stat().st_mode & 0o777 for each in (path, path.parent)] == [0o644, 0o755]


def test_building_cache_with_unreadable_file_of_another_user(tmp_path, monkeypatch, caplog):
    theirs, read = cache.publish("key", "kernel", b"binary"), Path.read_bytes

    def refuse(path):
        if path == theirs:
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    monkeypatch.setattr(cache, "_remove", lambda folder: None)  # it belongs to that user, too
    path = cache.publish("key", "kernel", b"binary")
    assert path.read_bytes() == b"binary" and tmp_path not in path.parents
    assert "cannot be used (Permission denied)" in caplog.text
    assert cache.find("key", "kernel") == path


def test_building_cache_replaces_only_on_request():
    for data, replace, expected in ((b"1", False, b"1"), (b"2", False, b"1"), (b"2", True, b"2")):
        assert cache.publish("key", "kernel", data, replace=replace).read_bytes() == expected


def test_building_without_space_for_temporary_files(monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    monkeypatch.setattr(cuda_build, "nvrtc_version", lambda: _raise(NativeUnavailable("no NVRTC", "x")))
    monkeypatch.setattr(compilers.shutil, "which", lambda name: f"/usr/bin/{name}")
    cause = "the kernels cannot be built: .*No space left on device"
    assert not custom_ops.build_for_next_start()
    with pytest.raises(NativeUnavailable, match=f"{cause}; Free some space, or set TMPDIR"):
        custom_ops.cpu_library()
    with pytest.raises(NativeUnavailable, match=f"no NVRTC; {cause}"):
        custom_ops.have_cuda_kernels()
    assert "No space" in custom_ops.explain()["cxx"]["cause"]
    with pytest.warns(impl.SlowOpsWarning, match="TMPDIR"):
        assert impl.choose("bias_act", "auto", "cpu") == "ref"


def test_building_cache_read_only_is_used(sources):
    path = cpu_build.build(sources)
    folders = [cache.ops_folder(), *(p for p in cache.ops_folder().rglob("*") if p.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        assert cpu_build.build(sources) == path
    finally:
        for folder in folders:
            folder.chmod(0o755)


def test_building_cuda_build_downloads_nothing(sources, monkeypatch):
    """Offline is as good as online: no build opens a connection."""
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("a build opened a connection"))
    assert cpu_build.build(sources).is_file()


KERNEL = 'extern "C" __global__ void sg_k(float* x) { x[threadIdx.x] *= FACTOR; }\n'
PLAN = LaunchPlan("k", "k.cu", "sg_k", (("FACTOR", 3),), (1, 1, 1), (32, 1, 1))


def test_building_cuda_build_nvrtc_and_nvcc_give_cubin(tmp_path):
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "k.cu").write_text(KERNEL)
    assert cuda_build.find(PLAN, (8, 0), folder) is None
    made = []
    for make in (
        lambda: cuda_build.nvrtc(PLAN, (8, 0), folder),
        lambda: cuda_build.nvcc([PLAN], (8, 0), folder)[0],
    ):
        try:
            made.append(make())
        except NativeUnavailable as error:
            assert error.remedy
    if not made:
        pytest.skip("neither NVRTC nor nvcc works here")
    for binary in made:
        assert binary[:4] == b"\x7fELF" and b"sg_k" in binary
    assert cuda_build.find(PLAN, (8, 0), folder) in made
    assert cuda_build.find(PLAN, (9, 0), folder) is None


def test_building_cuda_build_targets_nearest_architecture(monkeypatch):
    bindings = pytest.importorskip("cuda.bindings.nvrtc")
    monkeypatch.setattr(bindings, "nvrtcGetSupportedArchs", lambda: (0, [75, 80, 86, 90, 100, 120]))
    wanted = [(8, 6), (8, 9), (10, 3), (12, 1), (11, 0), (7, 0)]
    assert [cuda_build._nearest(each) for each in wanted] == [
        *((8, 6), (8, 6), (10, 0), (12, 0)),
        *((11, 0), (7, 0)),  # NVRTC reports that it does not support them
    ]


def test_building_cuda_build_without_cuda_core_names_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    monkeypatch.setitem(sys.modules, "cuda.core.experimental", None)
    for version, package in (("13.0", "'cuda-core[cu13]'"), (None, "'cuda-core'")):
        monkeypatch.setattr(torch.version, "cuda", version)
        with pytest.raises(NativeUnavailable) as raised:
            cuda_build._cuda_core.__wrapped__()
        assert raised.value.remedy.endswith(f"pip install {package}")


def test_building_cuda_build_replaces_binary_that_driver_refuses(tmp_path, monkeypatch):
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "k.cu").write_text(KERNEL)
    key = cuda_build.key(PLAN, (8, 0), "nvrtc", folder)
    cache.publish(key, cuda_build.NAME, b"old")
    compiled = SimpleNamespace(code=b"new")
    program = SimpleNamespace(compile=lambda kind: compiled)
    classes = (lambda *args: program), (lambda **options: None)
    monkeypatch.setattr(cuda_build, "_cuda_core", lambda: classes)
    monkeypatch.setattr(cuda_build.find, "__defaults__", (folder,))
    monkeypatch.setattr(cuda_build.nvrtc, "__defaults__", (folder,))
    takes = [b"new"]

    def load_function(context, binary, entry):
        if binary not in takes:
            raise driver.BinaryRefused(f"refused {binary}")
        return 7

    monkeypatch.setattr(driver, "load_function", load_function)
    custom_ops._cubin.cache_clear()
    assert cuda._load(0, PLAN, (8, 0)) == 7
    assert cache.find(key, cuda_build.NAME).read_bytes() == b"new"
    takes.clear()
    with pytest.raises(NativeUnavailable, match="refused b'new'"):
        cuda._load(0, PLAN, (8, 0))
    monkeypatch.setattr(cuda_build, "_cuda_core", lambda: _raise(NativeUnavailable("no cuda-core")))
    with pytest.raises(NativeUnavailable, match="refused b'old'"):
        cuda._load(0, PLAN, (8, 0))
    custom_ops._cubin.cache_clear()


def test_building_cuda_build_uses_prebuilt_kernels(tmp_path, monkeypatch):
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "k.cu").write_text(KERNEL)
    asked = []

    def pretend(plans, capability, compiler, sources):
        asked.append(len(plans))
        return [b"binary"] * len(plans)

    monkeypatch.setattr(compilers, "nvcc", lambda: compilers.Compiler("nvcc", "1"))
    monkeypatch.setattr(cuda_build, "_make_with_nvcc", pretend)
    other = PLAN._replace(defines=(("FACTOR", 4),))
    assert cuda_build.nvcc([PLAN], (8, 0), folder) == [b"binary"]
    assert cuda_build.nvcc([PLAN, other, PLAN], (8, 0), folder) == [b"binary"] * 3
    assert cuda_build.nvcc([other, PLAN], (8, 0), folder) == [b"binary"] * 2
    assert asked == [1, 1]
    monkeypatch.setattr(cuda_build, "nvrtc", None)
    assert cuda_build.nvrtc_many([PLAN, other], (8, 0), folder) == [b"binary"] * 2


def test_building_cuda_build_quotes_nvrtc(tmp_path):
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "k.cu").write_text("int broken( {\n")
    try:
        cuda_build.nvrtc_version()
    except NativeUnavailable as error:
        pytest.skip(error.cause)
    with pytest.raises(NativeUnavailable, match=r"NVRTC cannot compile k\.cu for sm_80: .*error: "):
        cuda_build.nvrtc(PLAN, (8, 0), folder)


def test_doctor_counts_and_cleans(sources, monkeypatch):
    from click.testing import CliRunner

    from finetune.cli import cli

    cpu_build.build(sources)
    monkeypatch.setattr(custom_ops, "cpu_library_info", lambda: "a compiler")
    facts = json.loads(CliRunner().invoke(cli, ["doctor", "--json"]).output)
    assert facts["caches"]["ops"]["files"] > 0 and facts["cxx"]["works"]
    assert {op["op"] for op in facts["ops"]} == set(impl.registered())
    assert facts["packages"]["torch_utils"] == str(ROOT / "torch_utils")
    done = CliRunner().invoke(cli, ["doctor", "--clean"], env={"FINETUNE_OPS": "ref"})
    assert done.exit_code == 0 and "is empty" in done.output and "plain torch: asked for" in done.output


@pytest.fixture
def started(monkeypatch):
    """The commands of processes that would be started."""
    commands = []
    monkeypatch.setattr(custom_ops, "_start_detached", commands.append)
    return commands


def test_building_quick_start_builds_in_background(sources, started, monkeypatch):
    x = torch.randn(2, 3, 4, 4)
    expected = bias_act.bias_act(x, act="lrelu", impl="ref")
    assert custom_ops.build_for_next_start() and len(started) == 1
    with pytest.warns(impl.SlowOpsWarning, match="are being built in the background, for the next start"):
        assert torch.equal(bias_act.bias_act(x, act="lrelu"), expected)
    assert not custom_ops.build_for_next_start() and len(started) == 1, "one implementation a process"
    with pytest.raises(impl.ImplementationUnavailable, match="for the next start"):
        bias_act.bias_act(x, act="lrelu", impl="cpu")

    # What that process runs, on sources that are built at once.
    monkeypatch.setattr(cpu_build.build, "__defaults__", (sources,))
    monkeypatch.setattr(cpu_build.find, "__defaults__", (sources,))
    assert cpu_build.find() is None
    exec(started[0][-1], {})
    assert cpu_build.find() is not None
    custom_ops._library = None
    assert not custom_ops.build_for_next_start() and len(started) == 1, "it is there"


def test_building_quick_start_reports_failed_build(monkeypatch, tmp_path, started):
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    assert not custom_ops.build_for_next_start() and not started
    with pytest.raises(NativeUnavailable, match="no C"):
        custom_ops.cpu_library()


@not_root
def test_building_quick_start_builds_without_cache(monkeypatch, tmp_path, started):
    cache.ops_folder().mkdir(parents=True)
    cache.ops_folder().chmod(0o500)
    assert not custom_ops.build_for_next_start() and not started
