"""`finetune doctor` tells what a person needs to know, and fails where what was asked for is not done."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from finetune.cli import cli
from torch_utils import custom_ops
from torch_utils.ops import impl
from torch_utils.ops.native.building import NativeUnavailable, cache, compilers, cpu_build, cuda_build

LIBRARY_INFO = custom_ops.cpu_library_info


def doctor(*options):
    return CliRunner().invoke(cli, ["doctor", *options])


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing is built here; the library that other tests have built stands for one."""
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(custom_ops, "cpu_library_info", lambda: "a compiler")
    return tmp_path / "cache"


def unavailable(*args):
    raise NativeUnavailable("the compiler is on holiday", "Wait for it.")


def test_doctor_text_and_json(own_cache):
    facts = json.loads(doctor("--json").output)
    assert facts.keys() >= {
        "torch",
        "cuda_of_torch",
        "driver",
        "gpus",
        "cxx",
        "nvcc",
        "nvrtc",
        "ninja",
        "ops",
    }
    assert facts.keys() >= {"architectures", "caches", "packages", "asked_for", "cpu_library", "done"}
    assert facts["packages"].keys() == {"finetune", "dnnlib", "torch_utils"}
    assert facts["caches"].keys() == {"ops", "checkpoints", "metrics", "scans", "onnxruntime-web", "locks"}
    text = doctor().output
    for said in (
        "driver",
        "C++ compiler",
        "NVRTC compiles for",
        f"{own_cache / 'ops'} (0 files",
        "upfirdn2d on cpu",
    ):
        assert said in text
    assert "cannot be written" not in text


def test_doctor_builds_only_if_asked(own_cache, monkeypatch):
    monkeypatch.setattr(custom_ops, "cpu_library_info", LIBRARY_INFO)
    monkeypatch.setattr(custom_ops, "_library", None)
    monkeypatch.setattr(compilers, "cxx", lambda: compilers.Compiler("/bin/c++", "c++ 1"))
    monkeypatch.setattr(cpu_build, "build", lambda: pytest.fail("the library is built"))
    cache.ops_folder().mkdir(parents=True)
    (cache.ops_folder() / "old").touch()
    text = doctor("--clean").output
    assert "CPU kernels             not built yet. To build now: finetune doctor --build" in text
    assert "upfirdn2d on cpu        native kernels: built at first use" in text
    assert f"{own_cache / 'ops'} (0 files" in text and not list(cache.ops_folder().rglob("*.txt"))
    with pytest.raises(pytest.fail.Exception):  # afterwards it would be built
        custom_ops.cpu_library()


def test_doctor_reports_read_only_folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "file"))
    assert json.loads(doctor("--json").output)["caches"]["ops"]["writable"] is False
    assert "cannot be written: nothing is kept; FINETUNE_CACHE=" in doctor().output


def test_doctor_arch_requires_build():
    done = doctor("--arch", "9.0")
    assert done.exit_code == 2 and "Use --build --arch 9.0" in done.output
    done = doctor("--build", "--arch", "sm_90")
    assert done.exit_code == 2 and "not a compute capability. Use one like 8.6 or 9.0" in done.output


def test_doctor_failed_build_exits_1(monkeypatch):
    monkeypatch.setattr(custom_ops, "cpu_library_info", unavailable)
    monkeypatch.setattr(custom_ops, "build_cuda", unavailable)
    done = doctor("--build", "--arch", "9.0")
    assert done.exit_code == 1
    assert "CPU kernels cannot be built: the compiler is on holiday; Wait for it." in done.output
    assert "CUDA kernels for sm_90 cannot be built: the compiler is on holiday" in done.output


def test_doctor_build_reports_results(monkeypatch):
    asked = []
    monkeypatch.setattr(
        custom_ops, "build_cuda", lambda plans, capability: asked.append(capability) or "nvcc"
    )
    done = doctor("--build", "--arch", "8.6", "--arch", "9.0")
    assert done.exit_code == 0 and asked == [(8, 6), (9, 0)]
    assert "CPU kernels are ready (a compiler" in done.output
    assert "CUDA kernels for sm_86 are ready: " in done.output and " by nvcc in " in done.output
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert "this machine has no GPU" in doctor("--build").output


def test_doctor_unknown_arch_is_quoted():
    with pytest.raises(NativeUnavailable) as caught:
        cuda_build.nvrtc(some_plan(), (1, 1))
    if "cannot be imported" in str(caught.value):  # torch 2.6 does not bring the bindings of cuda-core
        pytest.skip(caught.value.cause)
    assert "sm_11" in str(caught.value)
    assert "NVRTC" in str(caught.value) or "cuda-core" in str(caught.value)


def some_plan():
    from torch_utils.ops.native import prebuild

    return prebuild.specializations((9, 0))[0]


def test_doctor_clean_without_permission(monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    cache.ops_folder().mkdir(parents=True)
    monkeypatch.setattr(cache.shutil, "rmtree", refuse)
    done = doctor("--clean")
    assert (
        done.exit_code == 2 and "Permission denied" in done.output and str(cache.ops_folder()) in done.output
    )


def test_doctor_shows_requested_implementation(monkeypatch):
    monkeypatch.setenv(impl.VARIABLE, "ref")
    assert "plain torch: asked for" in doctor().output
    monkeypatch.setenv(impl.VARIABLE, "bogus")
    done = doctor()
    assert done.exit_code == 2 and "FINETUNE_OPS: impl must be one of" in done.output
