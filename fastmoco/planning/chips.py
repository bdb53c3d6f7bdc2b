"""GPUs by name: rates and memory. The one table of chips of this project, for plans and benchmarks.

Three kinds of rates differ. *Peak* rates are those of a data sheet. A *ceiling* is what one large
product or copy reaches. *Step* rates are what the products and copies of a training step reach,
whose matrices are smaller; bounds and models of a step use these.

Ceilings are measured for H100 and H200. For the other chips they are the peak times the shares that
an H100 reaches, and `measured` is False.
"""

from __future__ import annotations

from dataclasses import dataclass

STEP_SHARE_OF_PRODUCTS = 650 / 989.4
"""Rate of the products of a step relative to the peak: 650 TFLOP/s on H100 and H200, in bf16, with
rows of 384 to 768 channels."""
CEILING_OF_PRODUCTS = 798 / 989.4
"""The same for one product of 8192^3 elements on an H100, measured on random data."""
CEILING_OF_COPIES = 3.0 / 3.35
"""Rate of a large copy, bytes read and written, relative to the peak; measured on an H100."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """Rates and memory of one GPU. A multiply-add counts as two FLOPs; 1 GB is 10^9 bytes."""

    name: str
    peak_flops_per_s: float
    """Dense bf16 products, of the data sheet."""
    peak_tf32_flops_per_s: float
    """Dense TF32 products, of the data sheet."""
    peak_fp32_flops_per_s: float
    """Float32 without tensor cores, of the data sheet."""
    peak_bytes_per_s: float
    """Device memory, of the data sheet."""
    link_bytes_per_s: float
    """NVLink of one GPU in one direction: half of the data sheet's figure, which adds both."""
    memory_bytes: float
    """Device memory that a process can use."""
    ceiling_flops_per_s: float
    """One large bf16 product."""
    ceiling_bytes_per_s: float
    """One large copy, read and written bytes together."""
    step_flops_per_s: float
    """The bf16 products of a training step."""
    step_bytes_per_s: float
    """The copies of a training step, read and written bytes together."""
    measured: bool
    """Whether the ceilings and the memory are measured; else derived, see the module docstring."""
    source: str
    """Where the figures are from."""


def _derived(
    name: str,
    flops: float,
    tf32: float,
    fp32: float,
    bytes_per_s: float,
    link: float,
    memory: float,
    source: str,
) -> Chip:
    """A chip of which only the data sheet is known."""
    return Chip(
        name=name,
        peak_flops_per_s=flops,
        peak_tf32_flops_per_s=tf32,
        peak_fp32_flops_per_s=fp32,
        peak_bytes_per_s=bytes_per_s,
        link_bytes_per_s=link,
        memory_bytes=memory,
        ceiling_flops_per_s=CEILING_OF_PRODUCTS * flops,
        ceiling_bytes_per_s=CEILING_OF_COPIES * bytes_per_s,
        step_flops_per_s=STEP_SHARE_OF_PRODUCTS * flops,
        step_bytes_per_s=CEILING_OF_COPIES * bytes_per_s,
        measured=False,
        source=f"{source}; rates of a step derived from the shares of an H100",
    )


CHIPS = {
    chip.name: chip
    for chip in (
        _derived(
            "A100",
            312e12,
            156e12,
            19.5e12,
            2.039e12,
            300e9,
            80e9,
            "data sheet of the A100 80GB SXM: 312 TFLOP/s, 2,039 GB/s, NVLink 600 GB/s",
        ),
        Chip(
            name="H100",
            peak_flops_per_s=989.4e12,
            peak_tf32_flops_per_s=494e12,
            peak_fp32_flops_per_s=67e12,
            peak_bytes_per_s=3.35e12,
            link_bytes_per_s=450e9,
            memory_bytes=80e9,
            ceiling_flops_per_s=798e12,
            ceiling_bytes_per_s=3.0e12,
            step_flops_per_s=650e12,
            step_bytes_per_s=3.0e12,
            measured=True,
            source="data sheet of the H100 SXM: 989.4 TFLOP/s dense, 3.35 TB/s, NVLink 900 GB/s; "
            "measured: product of 8192^3 798 TFLOP/s, copy 3.0 TB/s",
        ),
        Chip(
            name="H200",
            peak_flops_per_s=989.4e12,
            peak_tf32_flops_per_s=494e12,
            peak_fp32_flops_per_s=67e12,
            peak_bytes_per_s=4.8e12,
            link_bytes_per_s=450e9,
            memory_bytes=139 * 2**30,
            ceiling_flops_per_s=790e12,
            ceiling_bytes_per_s=4.3e12,
            step_flops_per_s=650e12,
            step_bytes_per_s=4.2e12,
            measured=True,
            source="data sheet of the H200 SXM: 989.4 TFLOP/s dense, 4.8 TB/s, NVLink 900 GB/s; "
            "measured: large product 790 TFLOP/s, copy 4.2 to 4.3 TB/s",
        ),
        _derived(
            "B200",
            2250e12,
            1100e12,
            80e12,
            8.0e12,
            900e9,
            180e9,
            "data sheet of the DGX B200, an eighth: 2,250 TFLOP/s dense, 8 TB/s, 180 GB, "
            "NVLink 1,800 GB/s",
        ),
    )
}
"""By name, in the order of their age."""


def chip_named(name: str) -> Chip:
    """The chip of a name, in any case of letters.

    Raises:
        ValueError: naming the chips of the table.
    """
    found = CHIPS.get(name.upper())
    if found is None:
        raise ValueError(f"chip={name!r}: must be one of {', '.join(CHIPS)}")
    return found
