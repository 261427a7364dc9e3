"""Check what this machine offers for fine-tuning, and advise on what is missing.

    python -m lowvram_chat.doctor
    python -m lowvram_chat.doctor --selftest --out selftest.json

The self-test takes some minutes. It tries on this machine's card, or on its processor, what a run relies on: exact losses and
gradients, optimizers, fp16, a run that is killed and resumed, and each recipe's memory and speed against its prediction. What
fails is switched off in later runs here, and plans use the measured rates. It writes one JSON file and one page, without names
or paths, that you can send to others.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram_chat import nvidia_smi
from lowvram_chat.cli import INSTALL_ADVICE, guarded, parser, print_json
from lowvram_chat.cuda_wheels import TORCH, WHEELS, driver_major, install_command, needed_driver, wheel_for
from lowvram_chat.errors import UsageError
from lowvram_chat.files import write_text
from lowvram_chat.hub import endpoint, offline, reachable
from lowvram_chat.terminal import printable

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    name: str
    found: str
    good: bool
    """Whether nothing is missing."""
    advice: str = ""
    """What to do; empty where nothing needs to be done."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, run all checks and print what they find."""
    arguments = parser("doctor", __doc__)
    arguments.add_argument("--json", action="store_true", help="print the findings as JSON, as the last line")
    arguments.add_argument("--selftest", action="store_true", help="try out what a run relies on: some minutes")
    arguments.add_argument(
        "--out", type=Path, metavar="FILE.json", help="file for the self-test's result (default: selftest.json)"
    )
    args = arguments.parse_args(argv)
    if args.out is not None and not args.selftest:
        arguments.error("--out is the file of a self-test: add --selftest")

    def work() -> int:
        if args.selftest:
            return _selftest(args.out or Path("selftest.json"), as_json=args.json)
        findings = [_run_check(check) for check in CHECKS]
        for finding in findings:
            print(f"{'ok ' if finding.good else '-- '} {finding.name:<14}{finding.found}")
            if finding.advice:
                print(f"{'':<18}-> {finding.advice}")
        if args.json:
            print_json({"findings": [asdict(finding) for finding in findings]})
        return 0

    return guarded(work)


def _selftest(out: Path, *, as_json: bool) -> int:
    """Run the self-test, print each result, and write the record and the page."""
    from lowvram_chat.quiet import quiet_transformers
    from lowvram_chat.reporting.output_file import check_output_file

    check_output_file("--out", out)
    if out.suffix.lower() == ".html":
        raise UsageError(
            f"--out: {out} is the name of a page, which is written beside the JSON file. Give a name in .json."
        )
    quiet_transformers()
    from lowvram_chat.reporting.selftest_page import result_line, selftest_page
    from lowvram_chat.selftest.suite import run_selftest

    print("testing this machine; on a graphics card this takes about five minutes ...", file=sys.stderr, flush=True)
    found = run_selftest(lambda result: print(printable(result_line(result)), flush=True))
    text = found.record.model_dump_json(indent=1, exclude_defaults=True)
    write_text(out, text + "\n")
    page = out.with_suffix(".html")
    write_text(page, selftest_page(found.record))
    print(f"\n{'everything that this machine can run works' if found.good else found.record.reason}")
    for switch in found.calibration.failed:
        print(f"later runs on this machine do without {switch.replace('_', ' ')}")
    print(f"plans for this machine use the measured rates from now on. Written: {out}, {page}")
    if as_json:
        print_json(found.record.model_dump(mode="json", exclude_defaults=True))
    return 0 if found.good else 1


def _run_check(check: Callable[[], Finding]) -> Finding:
    """Return what a check finds; a library that is missing or broken is a finding too."""
    try:
        return check()
    except (ImportError, OSError) as error:  # OSError: on Windows, torch lacks a library of the system
        name = check.__name__.replace("_", " ")
        reason = str(error).splitlines()[0].rstrip(".")
        return Finding(name, f"cannot be checked: {reason}", False, f"{INSTALL_ADVICE} to repair it.")


def python() -> Finding:
    """Return the Python version."""
    good = sys.version_info >= (3, 11)
    advice = "" if good else "Install Python 3.11 or newer."
    return Finding("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}", good, advice)


def libraries() -> Finding:
    """Return the versions of the libraries that the package requires, and which of them it is not tested with."""
    required = _required_versions()
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    versions = {name: metadata.version(name) for name in LIBRARIES if name not in missing}
    untested = [
        f"{name} {version} (needs {required[name]})"
        for name, version in versions.items()
        if name in required and not required[name].contains(version, prereleases=True)
    ]
    found = ", ".join(f"{name} {version}" for name, version in versions.items())
    problems = [
        f"{title}: {', '.join(names)}. " for title, names in (("Missing", missing), ("Untested", untested)) if names
    ]
    advice = f"{''.join(problems)}{INSTALL_ADVICE}." if problems else ""
    return Finding("Libraries", found, not problems, advice)


def _required_versions() -> dict[str, SpecifierSet]:
    """Return the versions of each library that pyproject.toml admits; none where the package was not installed by pip."""
    from packaging.requirements import Requirement  # here, since doctor also runs where libraries are missing

    try:
        lines = metadata.requires("lowvram-chat") or []
    except metadata.PackageNotFoundError:
        return {}
    requirements = [Requirement(line) for line in lines]
    return {requirement.name: requirement.specifier for requirement in requirements if requirement.marker is None}


def torch_build() -> Finding:
    """Return the version of torch and its kind of build; a CPU build cannot use a graphics card."""
    import torch

    cuda, card = torch.version.cuda, nvidia_smi.visible_card()
    if cuda is None and card is not None:
        found = f"{torch.__version__}, without CUDA, although there is a {card.name} with driver {card.driver}"
        return Finding("torch build", found, False, _build_advice(card))
    return Finding("torch build", f"{torch.__version__}, {f'CUDA {cuda}' if cuda else 'CPU only'}", True)


def gpu() -> Finding:
    """Return the graphics card, its driver and its free memory."""
    import torch

    card = nvidia_smi.visible_card()
    if not torch.cuda.is_available():
        return _unusable(card, torch.version.cuda)
    free, total = torch.cuda.mem_get_info()
    major, minor = torch.cuda.get_device_capability()
    found = f"{torch.cuda.get_device_name()}, compute {major}.{minor}, driver {card.driver if card else 'unknown'}, "
    found += f"{free / 2**20:,.0f} of {total / 2**20:,.0f} MiB free"
    built_for = [int(name[3:]) for name in torch.cuda.get_arch_list() if name.startswith("sm_")]
    if built_for and 10 * major + minor < min(built_for):
        found += f", for which torch's CUDA {torch.version.cuda} build has no kernels"
        return Finding("GPU", found, False, _build_advice(card) if card else "Install a build of torch for CUDA 12.6.")
    programs = ", ".join(nvidia_smi.programs()) or "nvidia-smi lists them"
    advice = f"Close programs that use the card ({programs})." if free < 0.8 * total else ""
    return Finding("GPU", found, True, advice)


def _unusable(card: nvidia_smi.SmiCard | None, cuda: str | None) -> Finding:
    """Return why torch, built for this version of CUDA, has no card."""
    if card is None:
        advice = (
            "Training runs on the CPU: use train.precision=fp32 and small models, or a machine with an NVIDIA card. If there is "
            "one, install its driver."
        )
        return Finding("GPU", "none: nvidia-smi finds no card", False, advice)
    found = f"{card.name} with driver {card.driver}, which torch cannot use"
    needed = needed_driver(cuda) if cuda else None
    installed = driver_major(card.driver)
    if cuda is None:
        return Finding("GPU", f"{found}: torch is a CPU build", False, _build_advice(card))
    if needed is not None and installed is not None and installed < needed:
        found += f": torch is built for CUDA {cuda}, which needs driver {needed} or newer"
        return Finding("GPU", found, False, f"Update the driver to {needed} or newer, or: {_build_advice(card)}")
    return Finding(
        "GPU", found, False, "Restart the machine, since a driver may have been updated, and run doctor again."
    )


def _build_advice(card: nvidia_smi.SmiCard) -> str:
    """Return the command that installs the build of torch for a card and its driver."""
    wheel = wheel_for(card.driver, card.compute_capability)
    if wheel is None:
        return f"Driver {card.driver} is too old for every build of torch {TORCH}. Update it to {WHEELS[0].driver} or newer."
    return f"Run {install_command(wheel)}"


def eight_bit() -> Finding:
    """Return whether an 8-bit optimizer step of bitsandbytes changes the weights on this device."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return Finding(
            "bitsandbytes", "not installed", False, "Run pip install bitsandbytes, or use optimizer.name=adamw."
        )
    try:
        import torch

        bitsandbytes = importlib.import_module("bitsandbytes")  # without types
        device = "cuda" if torch.cuda.is_available() else "cpu"
        weight = torch.nn.Parameter(torch.ones(64, 128, device=device))
        weight.grad = torch.ones_like(weight)
        bitsandbytes.optim.AdamW8bit([weight], lr=0.1).step()
        works = bool((weight < 1).all())
    except Exception as error:  # a broken native library can raise anything
        return Finding("bitsandbytes", f"fails: {error}", False, "Reinstall bitsandbytes, or use optimizer.name=adamw.")
    version = metadata.version("bitsandbytes")
    advice = (
        "" if works else "Its step does not change the weights: reinstall bitsandbytes, or use optimizer.name=adamw."
    )
    return Finding(
        "bitsandbytes", f"{version}, an 8-bit AdamW step on the {device} {'works' if works else 'fails'}", works, advice
    )


def triton() -> Finding:
    """Return whether Triton is installed; only torch.compile on a graphics card needs it."""
    if importlib.util.find_spec("triton") is not None:
        return Finding("Triton", metadata.version("triton"), True)
    name = "triton-windows" if platform.system() == "Windows" else "triton"
    return Finding(
        "Triton", "not installed", True, f"Only compiled kernels on a graphics card need it (pip install {name})."
    )


def hub() -> Finding:
    """Return whether models and datasets can be downloaded, and how many are cached."""
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE)
    cached = len(list(cache.glob("models--*"))) + len(list(cache.glob("datasets--*"))) if cache.is_dir() else 0
    cache_note = f"{cached} models and datasets in the cache"
    if offline():
        return Finding(
            "Hub", f"switched off by HF_HUB_OFFLINE; {cache_note}", False, "Unset HF_HUB_OFFLINE to download models."
        )
    if reachable():
        return Finding("Hub", f"{endpoint()} answers; {cache_note}", True)
    advice = (
        "Check the network or set HTTPS_PROXY. Built-in models and data, local files and the cache work without it."
    )
    return Finding("Hub", f"{endpoint()} does not answer; {cache_note}", False, advice)


def disk() -> Finding:
    """Return the free space for runs and caches."""
    free = {str(path): shutil.disk_usage(path).free for path in (Path.cwd(), Path.home()) if path.exists()}
    least = min(free.values())
    advice = ""
    if least <= 10 * 2**30:
        advice = "A run on ultrachat_200k needs about 10 GiB: free some space, or set HF_HOME and output.dir."
    return Finding("Disk", f"{least / 2**30:,.1f} GiB free", not advice, advice)


def processor() -> Finding:
    """Return the number of cores and the free memory."""
    import psutil

    memory = psutil.virtual_memory()
    found = f"{os.cpu_count()} cores, {memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB memory free"
    good = memory.available > 2 * 2**30
    return Finding("CPU", found, good, "" if good else "Close programs: a run needs about 2 GiB of memory.")


CHECKS: Sequence[Callable[[], Finding]] = (python, libraries, torch_build, gpu, eight_bit, triton, hub, disk, processor)


if __name__ == "__main__":
    sys.exit(main())
