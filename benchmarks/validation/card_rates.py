"""Peak rates of the cards that published speeds were measured on, beyond those that a recipe can name.

Dense rates, without sparsity: fp16 (and bf16) with fp32 accumulation, TF32, and fp32 without tensor cores.

Source: NVIDIA's data sheets (L4, L40, L40S, A40, A100, H100, RTX A4000, A4500, A5000, A6000, RTX 2000, 4000 and 6000 Ada)
and the GA102 and AD102 architecture white papers. Data sheets that give only a rate with sparsity were halved. Those of the
RTX Ada workstation cards give only the fp8 rate with sparsity, of which dense fp16 is a quarter and TF32 an eighth. NVIDIA
publishes no matrix rates for the RTX 3080 Ti Laptop: its fp32 rate is 7,424 cores x 2 FLOPs x 1.59 GHz (boost clock at
150 W and above), and fp16 and TF32 are 2 and 1 times that, as on all GeForce cards of its generation. Power limits are those
of the data sheets. Only the rates of the A40, L40, L40S and RTX A4000 were compared with the published pages; check the others
before you rely on one of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lowvram_chat.gpus import GPUS, Gpu
from lowvram_chat.timing.roofline import Rates, sustained_tflops


@dataclass(frozen=True, kw_only=True)
class CardRates:
    """The peak rates of one card."""

    fp16_tflops: float
    """fp16 and bf16 matrix products with fp32 accumulation."""
    tf32_tflops: float
    """fp32 matrix products as TF32; the fp32 rate on cards that do not have TF32."""
    fp32_tflops: float
    gb_per_second: float
    """Memory bandwidth, 10^9 bytes per second."""
    compute_capability: tuple[int, int]
    watts: int
    """Power limit."""
    tensor_cores: bool = True
    in_server: bool = True

    def rates(self, *, tf32: bool) -> Rates:
        """Return the rates for the time model; `tf32`: whether fp32 products run as TF32."""
        runs_tf32 = tf32 and self.compute_capability >= (8, 0)
        return Rates(
            half_tflops=self.fp16_tflops,
            single_tflops=self.tf32_tflops if runs_tf32 else self.fp32_tflops,
            gb_per_second=self.gb_per_second,
            half_on_tensor_cores=self.tensor_cores,
            single_on_tensor_cores=runs_tf32,
            sustained_tflops=sustained_tflops(self.watts, self.compute_capability)
            if self.tensor_cores
            else float("inf"),
            in_server=self.in_server,
        )


def _card(
    fp16: float,
    tf32: float,
    fp32: float,
    bandwidth: float,
    watts: int,
    capability: tuple[int, int],
    host: str = "server",
) -> CardRates:
    return CardRates(
        fp16_tflops=fp16,
        tf32_tflops=tf32,
        fp32_tflops=fp32,
        gb_per_second=bandwidth,
        compute_capability=capability,
        watts=watts,
        in_server=host == "server",
    )


CARDS = {
    "A40": _card(149.7, 74.8, 37.4, 696, 300, (8, 6)),
    "A100 40GB": _card(312.0, 156.0, 19.5, 1555, 400, (8, 0)),
    "A100 PCIe": _card(312.0, 156.0, 19.5, 1935, 300, (8, 0)),
    "A100 SXM": _card(312.0, 156.0, 19.5, 2039, 400, (8, 0)),
    "H100 PCIe": _card(756.0, 378.0, 51.0, 2000, 350, (9, 0)),
    "H100 SXM": _card(989.4, 494.7, 66.9, 3350, 700, (9, 0)),
    "H200 SXM": _card(989.4, 494.7, 66.9, 4800, 700, (9, 0)),
    "L4": _card(121.0, 60.0, 30.3, 300, 72, (8, 9)),
    "L40": _card(181.05, 90.5, 90.5, 864, 300, (8, 9)),
    "L40S": _card(362.05, 183.0, 91.6, 864, 350, (8, 9)),
    "RTX 2000 Ada": _card(47.9, 23.9, 12.0, 224, 70, (8, 9)),
    "RTX 3080 Ti Laptop 16GB": _card(47.2, 23.6, 23.6, 512, 150, (8, 6), "laptop"),
    "RTX 4000 Ada": _card(81.9, 40.9, 26.7, 360, 130, (8, 9)),
    "RTX 4090": _card(165.2, 82.6, 82.6, 1008, 450, (8, 9), "desktop"),
    "RTX 6000 Ada": _card(364.2, 182.1, 91.1, 960, 300, (8, 9)),
    "RTX A4000": _card(76.7, 38.3, 19.2, 448, 140, (8, 6)),
    "RTX A4500": _card(94.6, 47.3, 23.7, 640, 200, (8, 6)),
    "RTX A5000": _card(111.1, 55.6, 27.8, 768, 230, (8, 6)),
    "RTX A6000": _card(154.8, 77.4, 38.7, 768, 300, (8, 6)),
}
"""Name of a card, as files of published speeds state it -> its rates. "A100 PCIe" and "A100 SXM" are the 80 GB cards."""


def find_card(name: str) -> CardRates | None:
    """Return the rates of a card by its name here or in `lowvram_chat.gpus`, whatever its case and spaces; None if unknown."""
    return _BY_NAME.get(_key(name))


def _key(name: str) -> str:
    return "".join(name.split()).casefold()


def _of_recipes() -> Iterator[tuple[str, CardRates]]:
    """Yield the cards that a recipe can name, at their highest power limits."""
    for name, gpu in GPUS.items():
        yield name, _at_full_power(gpu)
        yield gpu.title, _at_full_power(gpu)


def _at_full_power(gpu: Gpu) -> CardRates:
    """Return a card's rates. TF32 is the fp32 rate on GeForce cards, and half of the fp16 rate on the A100."""
    fp16, fp32 = gpu.fp16_tflops[max(gpu.fp16_tflops)], gpu.fp32_tflops[max(gpu.fp32_tflops)]
    return CardRates(
        fp16_tflops=fp16,
        tf32_tflops=fp16 / 2 if gpu.compute_capability >= (8, 0) else fp32,
        fp32_tflops=fp32,
        gb_per_second=gpu.gb_per_second,
        compute_capability=gpu.compute_capability,
        watts=max(gpu.fp16_tflops),
        tensor_cores=gpu.tensor_cores,
        in_server=gpu.in_server,
    )


_BY_NAME = {_key(name): card for name, card in (*_of_recipes(), *CARDS.items())}
