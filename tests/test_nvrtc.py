"""Every kernel in every form compiles for each architecture, without spills, and takes what the table says.

NVRTC needs no GPU: what it reports here is what it would make for one. The table is of all architectures and names
the code that it is of; scripts/document_kernels.py, which writes it, refuses spills. Of what it says four
architectures are compiled again here, one of each generation of code, and all seven with
GPUCNN_TEST_ARCHITECTURES=all. Reports are kept in pytest's cache by the code that they are of, so that only what
has changed compiles again.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gpucnn_kernels import catalog, source
from gpucnn_kernels.errors import CompileError
from gpucnn_kernels.runtime import nvrtc

ROOT = Path(__file__).resolve().parent.parent
_, VERSION = nvrtc.available()
pytestmark = pytest.mark.nvrtc
NAMES = source.names()
COMPILED = {
    "": ("sm_75", "sm_80", "sm_90", "sm_120"),  # sm_86 and sm_89 are as sm_80 but in size, sm_100 as sm_90 here
    "all": nvrtc.ARCHITECTURES,
}[os.environ.get("GPUCNN_TEST_ARCHITECTURES", "")]

Reports = dict[tuple[str, str], dict[str, nvrtc.Resources]]


@pytest.fixture(scope="module")
def document() -> ModuleType:
    """scripts/document_kernels.py."""
    spec = importlib.util.spec_from_file_location("document_kernels", ROOT / "scripts" / "document_kernels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiled_for(form: source.Source, capability: tuple[int, int]) -> list[str]:
    return [name for name in nvrtc.architectures_of(form, capability) if name in COMPILED]


@pytest.fixture(scope="module")
def reports(request: pytest.FixtureRequest) -> Reports:
    """What the compiler says of every form on each architecture of COMPILED."""
    cache = request.config.cache
    assert cache is not None
    kept: dict[str, Any] = cache.get("gpucnn/nvrtc", {})
    keys, fresh = {}, []
    for form, capability in catalog.capabilities().items():
        for architecture in compiled_for(form, capability):
            keys[form.title, architecture] = f"{VERSION} {architecture} {form.code_fingerprint}"
            if keys[form.title, architecture] not in kept:
                fresh.append((form, architecture))
    made = nvrtc.resources_of(fresh) if fresh else {}
    for place, kernels in made.items():
        kept[keys[place]] = {name: dataclasses.astuple(report) for name, report in kernels.items()}
    kept = {key: kept[key] for key in keys.values()}
    cache.set("gpucnn/nvrtc", kept)
    return {
        place: {name: nvrtc.Resources(*numbers) for name, numbers in kept[key].items()}
        for place, key in keys.items()
    }


def of(name: str, reports: Reports) -> list[tuple[str, source.Source, str, str, nvrtc.Resources]]:
    """(what to call it, form, architecture, kernel, report) for every kernel of the source ``name``."""
    found = []
    for form, capability in catalog.capabilities().items():
        if form.name == name:
            for architecture in compiled_for(form, capability):
                for kernel, report in reports[form.title, architecture].items():
                    found.append((f"{form.title}: {kernel} on {architecture}", form, architecture, kernel, report))
    assert found
    return found


@pytest.mark.parametrize("name", NAMES)
def test_kernels_compile_without_spills_and_can_be_started(
    name: str, reports: Reports, document: ModuleType
) -> None:
    dynamic = catalog.shared_bytes()
    for where, form, architecture, kernel, report in of(name, reports):
        assert (report.spill_store_bytes, report.spill_load_bytes) == (0, 0), where
        assert report.stack_bytes == 0, where
        warps = -(-form.kernels[kernel].max_threads // 32)
        taken = -(-report.registers * 32 // 256) * 256 * warps  # registers come in units of 256 a warp
        assert 0 < taken <= 65536, where
        assert report.shared_bytes <= 48 << 10, where
        _, _, most, reserved = document.LIMITS[architecture]
        assert report.shared_bytes + dynamic.get(kernel, 0) + reserved <= most, where


@pytest.mark.parametrize("name", NAMES)
def test_the_table_says_what_the_compiler_says(name: str, reports: Reports, document: ModuleType) -> None:
    table, dynamic = document.read(), catalog.shared_bytes()
    exact = table["nvrtc"] == VERSION
    advice = "run scripts/document_kernels.py"
    for where, form, architecture, kernel, report in of(name, reports):
        assert form.title in table["sources"], f"{where}: not in the table; {advice}"
        assert table["sources"][form.title]["fingerprint"] == form.code_fingerprint, f"{form.title}; {advice}"
        numbers = table["sources"][form.title]["kernels"]
        assert set(numbers) == set(form.kernels), f"{form.title}; {advice}"
        given = [count for count in numbers[kernel]["registers"] if count is not None]
        assert len(given) == len(nvrtc.architectures_of(form, catalog.capabilities()[form])), where
        place = table["architectures"].index(architecture)
        registers, shared = numbers[kernel]["registers"][place], numbers[kernel]["shared_bytes"][place]
        assert numbers[kernel]["threads"] == form.kernels[kernel].max_threads, f"{where}; {advice}"
        assert numbers[kernel].get("dynamic_bytes", 0) == dynamic.get(kernel, 0), f"{where}; {advice}"
        if exact:
            assert (report.registers, report.shared_bytes) == (registers, shared), f"{where}; {advice}"
        else:  # another compiler allots a little differently; a quarter more, or 8, is no accident of that
            assert abs(report.registers - registers) <= max(8, registers / 4), where
            assert report.shared_bytes == shared, where


def test_the_table_has_no_more_than_the_catalog_and_the_page_is_the_tables(document: ModuleType) -> None:
    table = document.read()
    assert table["architectures"] == list(nvrtc.ARCHITECTURES)
    assert list(table["sources"]) == [form.title for form in catalog.variants()]
    assert document.main(["--check"]) == 0
    assert document.written(table) == document.TABLE.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("architecture", "threads", "registers", "shared", "expected"),
    [
        # From NVIDIA's own occupancy calculator.
        ("sm_90", 256, 32, 0, 1.0),
        ("sm_90", 256, 33, 0, 0.75),  # 40 registers are given
        ("sm_90", 256, 64, 0, 0.5),
        ("sm_90", 256, 128, 0, 0.25),
        ("sm_90", 256, 32, 65536, 3 * 8 / 64),  # shared memory for three blocks
        ("sm_90", 32, 16, 0, 0.5),  # 32 blocks of a warp
        ("sm_75", 256, 32, 0, 1.0),
        ("sm_75", 32, 16, 0, 0.5),
        ("sm_86", 1024, 32, 0, 32 / 48),
        ("sm_120", 256, 64, 0, 32 / 48),
    ],
)
def test_occupancy(
    document: ModuleType, architecture: str, threads: int, registers: int, shared: int, expected: float
) -> None:
    assert document.occupancy(architecture, threads, registers, shared) == expected


def test_what_needs_a_newer_gpu_is_compiled_for_those_alone(reports: Reports, document: ModuleType) -> None:
    anywhere, hopper = (
        source.variant("activations", "float32"),
        source.variant("conv2d_wgmma", "float16", {"ARCHITECTURE": "sm_90a"}),
    )
    assert nvrtc.architectures_of(anywhere, (0, 0)) == nvrtc.ARCHITECTURES
    assert nvrtc.architectures_of(anywhere, (8, 6)) == ("sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
    assert nvrtc.architectures_of(hopper, (9, 0)) == ("sm_90",)
    form = source.variant("conv2d_tensor", "float16", {"PRODUCTS": "1"})
    assert (form.title, "sm_80") in reports
    assert (form.title, "sm_75") not in reports
    with pytest.raises(CompileError, match="need sm_80 or newer"):
        nvrtc.compile_source(form, "sm_75")
    numbers = document.read()["sources"][form.title]["kernels"]["conv2d_tensor_small"]
    assert [count is None for count in numbers["registers"]] == [True] + 6 * [False]
    assert "| – |" in document.row("conv2d_tensor_small", "float16", numbers, list(nvrtc.ARCHITECTURES))


# ------------------------------------------------------------ the checker is itself checked


def trial(body: str) -> source.Source:
    return source.source_from_text(f'extern "C" __global__ void trial(float *x, int n) {{ {body} }}', "trial")


def test_spills_and_stack_frames_are_seen() -> None:
    bounded = """
    extern "C" __global__ void __launch_bounds__(1024, 2) trial(float *x, int n) {
        float values[80];
        #pragma unroll
        for (int i = 0; i < 80; i++) values[i] = x[i * n];
        __syncthreads();
        #pragma unroll
        for (int i = 0; i < 80; i++) x[i * n + 1] = values[i] * values[79 - i];
    }
    """
    report = nvrtc.resources(source.source_from_text(bounded, "trial"), "sm_90")["trial"]
    assert report.registers <= 32
    assert report.spill_store_bytes > 0
    assert report.spill_load_bytes > 0
    indexed = trial(
        "int table[200]; for (int i = 0; i < n; i++) table[(int)x[i] % 200] = i * i + table[(int)x[i + 1] % 200];"
        "x[0] = table[n];"
    )
    assert nvrtc.resources(indexed, "sm_90")["trial"].stack_bytes >= 200


def test_shared_memory_is_seen() -> None:
    shared = trial("__shared__ float tile[100]; tile[threadIdx.x] = n; __syncthreads(); x[threadIdx.x] = tile[n];")
    assert nvrtc.resources(shared, "sm_80")["trial"].shared_bytes == 400
    assert nvrtc.resources(trial("x[0] = n;"), "sm_80")["trial"].shared_bytes == 0


def test_a_source_that_does_not_compile() -> None:
    with pytest.raises(CompileError, match=r"(?s)trial does not compile for sm_90.*\"nothing\" is undefined"):
        nvrtc.compile_source(trial("x[0] = nothing;"), "sm_90")
    with pytest.raises(CompileError, match="sm_1"):
        nvrtc.compile_source(trial("x[0] = 1;"), "sm_1")


def test_a_kernel_that_the_compiler_never_saw_is_noticed() -> None:
    text = '#if 0\nextern "C" __global__ void hidden(float *x) { }\n#endif\n' + trial("x[0] = n;").text
    with pytest.raises(
        CompileError, match=r"the compiler reported on \['trial'\], the text has \['hidden', 'trial'\]"
    ):
        nvrtc.resources(source.source_from_text(text, "both"), "sm_90")


def test_a_cubin_is_of_its_architecture() -> None:
    cubins = {name: nvrtc.compile_source(trial("x[0] = n;"), name)[0] for name in ("sm_75", "sm_90")}
    assert all(cubin.startswith(b"\x7fELF") for cubin in cubins.values())
    assert cubins["sm_75"] != cubins["sm_90"]
