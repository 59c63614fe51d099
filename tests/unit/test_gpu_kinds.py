"""The catalogue of GPUs: figures that follow from others, and published ones."""

import pytest

from maveriq.domain.gpu_kinds import NumberFormat, gpu_sheet, gpu_sheets, sheet_of_device
from maveriq.errors import UnknownNameError

KINDS = (
    "A6000", "A10", "A100-40GB-PCIE", "A100-40GB-SXM", "A100-80GB-PCIE", "A100-80GB-SXM", "L4", "L40S", "RTX-4090",
    "RTX-PRO-6000", "H100-PCIE", "H100-SXM", "H200-SXM", "B200-SXM", "GB200", "MI300X",
)  # fmt: skip
# Dense 16-bit operations of a multiprocessor a clock, with 32-bit accumulation, by compute capability.
OPERATIONS = {8.0: 2048, 8.6: 1024, 8.9: 1024, 9.0: 4096, 9.4: 2048, 10.0: 8192, 12.0: 1024}
GEFORCE = 0.5  # consumer cards accumulate in 32 bits at half the speed


def test_the_kinds() -> None:
    assert tuple(gpu_sheets()) == KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_speeds_are_dense(kind: str) -> None:
    """A speed with sparsity, twice as high, would need a clock that no GPU has."""
    sheet = gpu_sheet(kind)
    operations = OPERATIONS[sheet.compute_capability] * (GEFORCE if kind == "RTX-4090" else 1)
    assert 1.3 < sheet.clock_ghz < 2.7
    computed = sheet.multiprocessors * operations * sheet.clock_ghz / 1e3
    assert sheet.peak_tflops(NumberFormat.BFLOAT16) == pytest.approx(computed, rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_half_the_bits_are_twice_as_fast(kind: str) -> None:
    tflops = gpu_sheet(kind).tflops
    assert tflops.get(NumberFormat.FP8, 0) in (0, pytest.approx(2 * tflops[NumberFormat.BFLOAT16], rel=0.015))
    if NumberFormat.NVFP4 in tflops:
        assert tflops[NumberFormat.NVFP4] == pytest.approx(2 * tflops[NumberFormat.FP8], rel=0.001)
        assert tflops[NumberFormat.MXFP4] == tflops[NumberFormat.NVFP4]


@pytest.mark.parametrize("kind", KINDS)
def test_programs_get_nearly_all_memory(kind: str) -> None:
    sheet = gpu_sheet(kind)
    assert 0.9 * sheet.memory_gib < sheet.usable_gib <= sheet.memory_gib


def test_published_figures() -> None:
    """From the data sheets: memory GB, GB/s, W."""
    published = {
        "A6000": (48, 768, 300), "A10": (24, 600, 150), "A100-40GB-PCIE": (40, 1555, 250),
        "A100-80GB-SXM": (80, 2039, 400), "L4": (24, 300, 72), "L40S": (48, 864, 350), "RTX-4090": (24, 1008, 450),
        "H100-PCIE": (80, 2000, 350), "H100-SXM": (80, 3350, 700), "H200-SXM": (141, 4800, 700),
        "GB200": (186, 8000, 1200), "MI300X": (192, 5300, 750),
    }  # fmt: skip
    for kind, figures in published.items():
        sheet = gpu_sheet(kind)
        assert (sheet.memory_gib, sheet.bandwidth_gb_s, sheet.power_w) == figures, kind


def test_names_are_forgiving() -> None:
    assert gpu_sheet("h100").name == gpu_sheet("H100 sxm").name == gpu_sheet("h100_SXM").name == "H100-SXM"
    with pytest.raises(UnknownNameError, match="did you mean 'H200-SXM'"):
        gpu_sheet("H200-SMX")


@pytest.mark.parametrize(
    ("device", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "H100-SXM"),
        ("NVIDIA H100 PCIe", "H100-PCIE"),
        ("NVIDIA H200", "H200-SXM"),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA B200", "B200-SXM"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB-SXM"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB-SXM"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB-PCIE"),
        ("NVIDIA RTX A6000", "A6000"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("Tesla T4", None),
    ],
)
def test_a_drivers_name_tells_the_kind(device: str, kind: str | None) -> None:
    sheet = sheet_of_device(device)
    assert (sheet and sheet.name) == kind
