"""Every launch compiles for every architecture, with no GPU: no spills, wgmma on sm_90, and
nothing costs more than benchmarks/results/compile_report.json says.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fastvit_kernels.aot import ARCHS, LIMITS
from fastvit_kernels.sass import stray_descriptors
from processes import env_compiled, env_here

# Kernels that may use HMMA beside HGMMA on sm_90, since wgmma needs a tile of at least 64 rows:
# attention, in tail tiles of 16 or 32 query rows and of keys in dK and dV.
HMMA_ALLOWED = ("attention",)
# At most 32 keys: no operand has the 64 rows that wgmma needs, but for v^T at head dim 64, which
# forward does not take, since ptxas gives transposed products of tails wrong addresses.
NO_WGMMA = re.compile(r"attention_(\w+_resident D(16|24|32|40|48|56)|fwd_resident D64) keys 32 ")
# ptxas serializes this wgmma: other instructions define its accumulators mid-pipeline (C7515).
SERIAL_ALLOWED = ("patch_embed_dw", "tf32")
KERNELS = {"patch", "gemm", "attention", "reduce", "layernorm"}


def report(*args: str, path: Path, kernels: set[str] = KERNELS) -> list[dict]:
    command = [sys.executable, "-m", "fastvit_kernels.report", "--json", str(path), *args]
    run = subprocess.run(command, env=env_compiled(), capture_output=True, text=True)
    assert path.exists(), run.stdout[-2000:] + run.stderr[-4000:]
    rows = json.loads(path.read_text())["rows"]
    # Otherwise a kernel that is missing from the report would pass unnoticed.
    found = {row["name"].split()[0].split("_")[0] for row in rows}
    assert found - {"swiglu"} == kernels
    return rows


def check_rows(rows: list[dict]) -> None:
    for row in rows:
        label = f"sm_{row['arch']} {row['name']}"
        assert row["spills"] == 0, f"{label}: spills {row['spills']} bytes a thread"
        serial = row["serial"] and not all(word in row["name"] for word in SERIAL_ALLOWED)
        assert not serial, f"{label}: {row['serial']} wgmma, each waited for alone"
        assert row["stray"] == 0, f"{label}: {row['stray']} products read at a parameter"
        # sm_86 and sm_89 run the configs of sm_80, but have only as much shared memory as sm_120.
        limit = LIMITS[120 if row["arch"] == 80 else row["arch"]].shared_block
        assert row["shared"] <= limit, f"{label}: {row['shared']} bytes shared, limit {limit}"
        assert row["ctas_per_sm"] >= 1, f"{label}: no CTA fits an SM"
        kind = row["name"].split()[0]
        products = kind.startswith(("gemm", "attention", "patch_embed")) and "dtokens" not in kind
        products &= not kind.startswith("attention_qk")
        products &= NO_WGMMA.match(row["name"]) is None
        if row["arch"] == 90 and products and "bf16" in row["name"]:
            assert row["hgmma"], f"{label}: no wgmma"
            if not kind.startswith(HMMA_ALLOWED):
                assert not row["hmma"], f"{label}: {row['hmma']} HMMA beside wgmma"


def check_not_worse(rows: list[dict]) -> None:
    from fastvit_kernels.report import COMPILE_TABLE, worse

    lines = worse(rows, json.loads(COMPILE_TABLE.read_text()))
    assert not lines, (
        "costs more than the committed table; where that is meant, "
        "`python -m fastvit_kernels.report --update`\n" + "\n".join(lines)
    )


def test_the_committed_table() -> None:
    from fastvit_kernels.report import COMPILE_TABLE

    check_rows(json.loads(COMPILE_TABLE.read_text())["rows"])


# CI has half an hour; test-all compiles for every architecture.
@pytest.mark.parametrize(
    "arch", [90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (80, 100, 120))]
)
def test_what_ci_compiles(arch: int, tmp_path: Path) -> None:
    rows = report("--ci", "--arch", str(arch), path=tmp_path / "report.json")
    check_rows(rows)
    check_not_worse(rows)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_launch(tmp_path: Path) -> None:
    rows = report(path=tmp_path / "report.json")
    check_rows(rows)
    check_not_worse(rows)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("arch", ARCHS)
def test_attention_at_every_head_dim(arch: int, tmp_path: Path) -> None:
    dims = [word for D in range(16, 129, 8) for word in ("--head-dim", str(D))]
    path = tmp_path / "report.json"
    rows = report("--arch", str(arch), *dims, path=path, kernels={"attention"})
    assert {f"D{D}" for D in range(16, 129, 8)} <= {w for row in rows for w in row["name"].split()}
    check_rows(rows)


def test_what_16_does_not_divide_is_loaded_in_vectors() -> None:
    """Head dim 72 and the distance of two tokens by 16 bytes, patches of 14 by pairs of pixels and
    four weights: of powers of two, Triton itself sees 16 alone."""
    code = """if True:
        import torch
        from fastvit_kernels import aot, attention, patch_embed
        with aot.record(90) as cases:
            q, k, v = torch.empty(64, 257, 3, 9, 72, dtype=torch.bfloat16, device="meta").unbind(2)
            o, lse = attention._fwd(q, k, v, 0.1)
            attention._bwd(o, q, k, v, o, lse, 0.1)
            images, weight = (
                torch.empty(s, dtype=torch.bfloat16, device="meta")
                for s in ((64, 3, 224, 224), (1024, 3, 14, 14))
            )
            patch_embed._fwd(images, weight, None, None, None, torch.bfloat16)
        for case in cases:
            print("KERNEL", aot.build(case, 90).asm["ptx"])
    """
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=env_compiled(), capture_output=True, text=True, check=True)
    *attention, patches = run.stdout.split("KERNEL")[1:]
    for ptx in attention:
        for name in (r"ld\.global\S*", r"st\.global\S*"):
            assert any("v4" in access for access in re.findall(name, ptx))
    assert "cp.async.cg" in attention[0] and "cp.async.ca" in patches  # .cg: 16 bytes; .ca: fewer
    assert not re.findall(r"(?:ld|st)\.global\S*16\b", run.stdout)


def test_a_descriptor_made_of_a_parameter_is_found() -> None:
    code = """
        /*0000*/                   ULDC.64 UR26, c[0x0][0x210] ;
        /*0010*/                   UMOV UR24, 0x400 ;
        /*0020*/                   UMOV UR25, 0x40000040 ;
.L_x_0:
        /*0030*/                   HGMMA.64x16x16.F32.BF16 R24, gdesc[UR24].tnspA.tnspB, R24 ;
        /*0040*/              @!P0 BRA `(.L_x_0) ;
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R24, R72, gdesc[UR20], R24, gsb0 ;
        /*0060*/                   EXIT ;
"""
    right = code.replace(
        "UMOV UR24,", "UMOV UR26, 0x800 ;\n /*0011*/ UMOV UR27, URZ ;\n /*0012*/ UMOV UR24,"
    )
    assert stray_descriptors(code, 90) == 1 and stray_descriptors(right, 90) == 0
    # In the next iteration UR26 is a parameter again. With A in registers only UR26, 27 are read.
    late = right.replace("@!P0 BRA", "UIADD3 UR26, UR26, UR28, URZ ;\n /*0041*/ @!P0 BRA")
    late = late.replace("UMOV UR24,", "ULDC UR28, c[0x0][0x218] ;\n /*0013*/ UMOV UR24,")
    assert stray_descriptors(late, 90) == 1
    assert stray_descriptors(code.replace("gdesc[UR20]", "gdesc[UR24]"), 90) == 2
    assert stray_descriptors(code.replace("gdesc[UR20]", "gdesc[UR26]"), 90) == 1
    assert stray_descriptors(code.replace("gdesc[UR24]", "gdesc[UR16]"), 90) == 0


def test_an_address_made_of_a_parameter_is_found_on_sm_100() -> None:
    code = """
        /*0000*/                   LDCU.64 UR20, c[0x0][0x380] ;
        /*0010*/                   LDCU.64 UR30, c[0x0][0x358] ;
        /*0020*/                   UIADD3 UR34, UPT, UPT, UR4, 0x12000, URZ ;
        /*0030*/                   USHF.R.U32.HI UR34, URZ, 0x4, UR34 ;
        /*0040*/                   UMOV UR35, 0x40004040 ;
        /*0050*/                   UTCHMMA gdesc[UR34], gdesc[UR36], tmem[UR17], tmem[UR42], idesc[UR43], !UPT ;
        /*0060*/                   UTCHMMA tmem[UR55], gdesc[UR30], tmem[UR17], tmem[UR42], idesc[UR43], UPT ;
        /*0070*/                   EXIT ;
"""  # noqa: E501
    assert stray_descriptors(code, 100) == 0
    assert stray_descriptors(code.replace("UR4, 0x12000", "UR20, 0x12000"), 100) == 1
    assert stray_descriptors(code.replace("gdesc[UR36]", "gdesc[UR20]"), 100) == 1
    assert stray_descriptors(code.replace("tmem[UR17]", "tmem[UR21]"), 100) == 2
    # A write by the elected thread (P0) replaces a parameter; under another predicate it may not.
    made = code.replace("UR4, 0x12000", "UR20, 0x12000")
    elected = "ELECT P0, URZ, PT ;\n /*0041*/ @P0 R2UR UR34, R8 ;\n /*0042*/ UMOV UR35"
    made = made.replace("UMOV UR35", elected)
    assert stray_descriptors(made, 100) == 0
    assert stray_descriptors(made.replace("@P0 R2UR", "@P1 R2UR"), 100) == 1


def test_worse_names_what_grew_and_what_is_new() -> None:
    import triton
    from fastvit_kernels.report import worse

    row = {"arch": 90, "name": "gemm 64x64", "registers": 128, "spills": 0, "shared": 4096}
    row["serial"] = 0
    table = {"triton": triton.__version__, "rows": [row]}
    assert worse([row, {**row, "arch": 80}], table) == ["sm_80 gemm 64x64: not in the table"]
    assert worse([{**row, "registers": 120, "shared": 0}], table) == []
    assert worse([{**row, "registers": 130, "spills": 8}], table) == [
        "sm_90 gemm 64x64: registers 128 -> 130",
        "sm_90 gemm 64x64: spills 0 -> 8",
    ]
    assert worse([{**row, "serial": 4}], table) == ["sm_90 gemm 64x64: serial 0 -> 4"]
    assert worse([{**row, "registers": 130}], {**table, "triton": "0"}) == []


def test_the_interpreter_is_refused() -> None:
    env = env_here(TRITON_INTERPRET="1")
    command = [sys.executable, "-m", "fastvit_kernels.report", "--ci", "--arch", "90"]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode and "TRITON_INTERPRET is set" in run.stderr


def test_recorded_launches_are_typed_as_triton_types_them() -> None:
    from fastvit_kernels.aot import _type

    assert _type(torch.empty(2, dtype=torch.bfloat16)) == "*bf16"
    assert [_type(v) for v in (2**31, 48, 3, 1, None, 0.5)] == [
        "i64:16",
        "i32:16",
        "i32",
        None,
        None,
        "fp32",
    ]
    assert [_type(v, specialize=False) for v in (48, 1)] == ["i32", "i32"]
