"""The pages of docs/kernels: what is read from compiled code, and the arithmetic on it, by hand.

That the pages are those of the tables and of the cost model is tests/test_nvrtc.py's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "scripts"))  # the documents' own parts are imported from there

import document_kernels  # noqa: E402
from kernel_documents import compiled, instructions, predictions  # noqa: E402

from gpucnn_kernels import catalog  # noqa: E402

LISTING = """
	.headerflags	@"EF_CUDA_SM90"
//--------------------- .text.first --------------------------
	.section	.text.first,"ax",@progbits
.text.first:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR6][R2.64] ;
.L_x_1:
        /*0020*/               @P0 FFMA R6, R4, R5, R6 ;
        /*0030*/              @!P1 FFMA.FTZ R7, R4, R5, R7 ;
        /*0040*/                   LDS.128 R8, [R3] ;
        /*0050*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR6][R2.64] ;
        /*0060*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0070*/             @!UP0 UMOV UR4, 0x1 ;
        /*0080*/                   EXIT ;
        /*0090*/                   BRA `(.L_x_1);
        /*00a0*/                   NOP;
        /*00b0*/                   NOP;
//--------------------- .text.second  --------------------------
.text.second:
        /*0000*/                   HMMA.16816.F32 R4, R8, R2, R4 ;
        /*0010*/                   LDSM.16.MT88.4 R8, [R3] ;
        /*0020*/                   STG.E desc[UR6][R2.64], R4 ;
"""


def test_instructions_are_counted_by_what_they_are() -> None:
    found = instructions.read(LISTING)
    assert instructions.CLASSES == ("all", "multiply-add", "tensor core", "shared memory", "memory", "barrier")
    assert found == {"first": [10, 2, 0, 1, 2, 1], "second": [3, 0, 1, 1, 1, 0]}


def test_the_main_loop_is_the_one_with_the_largest_share_of_products() -> None:
    def listing(*parts: str) -> str:
        lines = [part if part.startswith(".L") else f"        /*0000*/    {part} ;" for part in parts]
        return "//--------------------- .text.kernel --------------------------\n" + "\n".join(lines) + "\n"

    products, loads = ["FFMA R6, R4, R5, R6"] * 8, ["LDS R8, [R3]"] * 2
    around = [".L_x_1:", *["IMAD R1, R2, R3, R4"] * 20, ".L_x_2:", *products, *loads, "BRA `(.L_x_2)"]
    found = instructions.read(listing(*around, "@P0 BRA `(.L_x_1)"))
    assert found["kernel main loop"] == [11, 8, 0, 2, 0, 0]
    assert compiled.main_loop(found["kernel main loop"]) == "8 of 11, 73%"
    # Products of tensor cores go before multiply-adds, forward branches are no loops, nor are few products.
    tensor = [".L_x_3:", *["HMMA.16816.F32 R4, R8, R2, R4"] * 8, *loads * 8, "BRA `(.L_x_3)"]
    assert instructions.read(listing(*around, *tensor))["kernel main loop"] == [25, 0, 8, 16, 0, 0]
    assert set(instructions.read(listing("BRA `(.L_x_1)", *products, ".L_x_1:", "EXIT"))) == {"kernel"}
    assert set(instructions.read(listing(".L_x_1:", *products[:7], "BRA `(.L_x_1)"))) == {"kernel"}


def test_the_counts_are_of_the_sources_as_they_are() -> None:
    """Those that were counted: who has no nvdisasm leaves changed ones out."""
    counted = json.loads(document_kernels.INSTRUCTIONS.read_text())
    sources = {made.title: made for made in catalog.variants()}
    assert counted
    for title, source in counted.items():
        assert source["fingerprint"] == sources[title].code_fingerprint, f"{title}: scripts/document_kernels.py"
        assert {name for name in source["kernels"] if " " not in name} == set(sources[title].kernels)
        for kernel, numbers in source["kernels"].items():
            if kernel.endswith(instructions.MAIN_LOOP):
                whole = source["kernels"][kernel.removesuffix(f" {instructions.MAIN_LOOP}")]
                assert all(part <= all_ for part, all_ in zip(numbers, whole, strict=True)), (title, kernel)
                continue
            assert numbers[0] >= sum(numbers[1:]), (title, kernel)
            assert numbers[4] > 0, (title, kernel)  # no kernel leaves memory alone
            # Products on tensor cores are where they are said to be, and nowhere else.
            tensor = (
                title.startswith(("conv2d_tensor", "conv2d_wgmma", "conv2d_first_layer")) and "pack" not in title
            )
            assert (numbers[2] > 0) == tensor, (title, kernel)


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "expected"),
    [
        (256, 32, 0, "warps"),  # 8 blocks fill the 64 warps
        (256, 128, 0, "registers"),  # 2 blocks of 8 warps of 4096
        (256, 32, 100 << 10, "shared memory"),  # 2 blocks
        (32, 16, 0, "blocks"),  # 32 of one warp
    ],
)
def test_what_holds_a_kernel_back(threads: int, registers: int, shared: int, expected: str) -> None:
    limits = document_kernels.LIMITS["sm_90"]
    assert compiled.held_by(limits, threads, registers, shared, document_kernels.REGISTERS) == expected


def test_a_prediction_by_hand() -> None:
    rows = predictions.table()
    entry = rows["vgg 64->64 k3 224 N64 forward, float32, libraries"]
    positions = 64 * 224 * 224
    operations, moved = 2 * positions * 64 * 576, 4 * (2 * positions * 64 + 64 * 576)
    assert entry["limit_datasheet"] == pytest.approx(operations / 67e12, rel=1e-3)
    assert entry["limit_reached"] == pytest.approx(operations / 52e12, rel=1e-3)
    assert entry["memory"] == pytest.approx(moved / 4.32e12, rel=1e-3)
    # Three products of tf32, of 2048 operations a clock of a multiprocessor; 58 % of that are reckoned with.
    blocks = positions // 128
    busiest = -(-blocks // 132)
    arithmetic = busiest * 2 * 64 * 128 * 576 / (0.58 * 2048 / 3 * 1.98e9)
    # Four warps of a block: a thousand instructions before the loop, but for the first two blocks, and four for
    # each of a thread's 64 numbers behind it; nine tenths of the clocks of four schedulers.
    around = 4 * ((busiest - 2) * 1000 + busiest * 4 * 64) / (4 * 0.9 * 1.98e9)
    assert (entry["path"], entry["tile"]) == ("tensor", "conv2d_tensor_large")
    assert entry["seconds"] == pytest.approx(arithmetic + around + 3e-6, rel=1e-3)
    pool = rows["max-pool k2 64x56 N256 forward, bfloat16, libraries"]
    assert pool["limit_datasheet"] == pytest.approx(2 * 256 * 64 * 56 * 56 * 1.25 / 4.8e12, rel=1e-3)
    assert "seconds" not in pool


def test_no_prediction_is_better_than_the_datasheet_allows() -> None:
    """Of float32 by tensor cores, a third of what it allows tf32."""
    for key, entry in predictions.table().items():
        if "seconds" in entry:
            products = 495 / 67 / 3 if "float32" in key and entry["path"] == "tensor" else 1
            assert entry["seconds"] > entry["limit_datasheet"] / products, key


def test_every_page_says_that_it_is_no_measurement() -> None:
    folder = document_kernels.TABLE.parent
    assert "Nothing on this page was measured" in (folder / "predictions.md").read_text().replace("**", "")
    assert "nothing on this page is a\nmeasurement" in (folder / "compiled.md").read_text()
