"""Can this machine run what params ask for? Facts, plan, verdict; before any data is touched.

torch is imported only when the machine has changed since the last look: what it said is kept in reports/env.json.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Callable
from typing import Any

from core.errors import PluginError, Problems, UserError
from core.files import write_json, write_text
from core.hardware import TORCH_HELP, read_facts
from core.hookspecs import GIB, Facts, Plan
from core.memory.forecast import CONTEXT_BYTES, Forecaster
from core.memory.outlook import does_not_fit, memory_lines
from core.plan import plan_json, resolve
from core.plugins import Registry
from core.project import Project

ENV_FORMAT = 1


def env_check(project: Project, echo: Callable[[str], None]) -> Plan:
    """Look, decide, print, and write reports/plan.json, inputs.json and env.json.

    Raises UserError or PluginError with every problem and its remedy; plan.json is then not written.
    """
    facts = read_facts()
    known = _last_look(project)
    torch_says = _torch_says(facts, known)
    for line in machine_lines(project, facts, torch_says):
        echo(line)

    problems = Problems()
    plan = params = inputs = None
    hashes = known.get("hashes", {})
    with problems:
        params = project.params
    with problems:
        registry = Registry.load(project)
        if params is None and registry.broken():
            raise PluginError(registry.broken(), title="plugins that do not load")
    if params is not None:
        with problems:
            working = bool(facts.torch_version) and not torch_says["error"]
            forecaster = Forecaster(project.forecasts) if working else None
            plan = resolve(params, facts, registry, forecaster)
            for line in plan_lines(plan):
                echo(line)
            if not plan.fits:
                raise UserError(does_not_fit(plan, params, facts, registry, forecaster))
            if stop := cannot_run(plan, facts, torch_says):
                title = f"this machine cannot run profile {plan.profile.name!r}" if len(stop) > 1 else ""
                raise UserError(stop, title=title)
        with problems:
            from core.sources import describe_inputs

            inputs = describe_inputs(project, hashes)

    write_json(
        project.env,
        {
            "format": ENV_FORMAT,
            "key": _key(facts),
            "torch": torch_says,
            "hashes": hashes,
            "facts": _facts_dict(facts),
        },
    )
    if problems.found:
        raise problems.joined()
    assert plan is not None
    write_json(project.inputs, inputs)
    write_text(project.plan, plan_json(plan, registry))
    echo(
        f"verdict      ready: {plan.profile.name}, {plan['dtype']}, {plan.model.n_params / 1e6:.1f}M parameters"
    )
    return plan


def _last_look(project: Project) -> dict[str, Any]:
    try:
        env = json.loads(project.env.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return env if isinstance(env, dict) and env.get("format") == ENV_FORMAT else {}


def _key(facts: Facts) -> list[Any]:
    """What torch's answers depend on."""
    return [
        sys.executable,
        platform.python_version(),
        facts.torch_version,
        facts.torch_cuda,
        [[g.name, g.vram_bytes] for g in facts.gpus],
        _driver(),
        facts.environ.get("CUDA_VISIBLE_DEVICES"),
    ]


def _torch_says(facts: Facts, known: dict[str, Any]) -> dict[str, Any]:
    """torch's own view: from the last look where nothing has changed, else by importing it."""
    settled = known.get("key") == _key(facts) and not known["torch"]["error"]
    if settled and (known["torch"]["cuda_available"] or not facts.gpus or not facts.torch_cuda):
        return known["torch"]  # a failure is asked about again: a restart can mend it
    if not facts.torch_version:
        return {"cuda_available": False, "arch_list": [], "error": "torch is not installed"}
    return probe_torch()


def probe_torch() -> dict[str, Any]:
    """Import torch and ask what it can do with the cards. Its errors are answers too."""
    try:
        import torch
    except Exception as e:  # a broken install raises anything
        return {"cuda_available": False, "arch_list": [], "error": f"{type(e).__name__}: {e}"}
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    available = torch.cuda.is_available()
    return {
        "cuda_available": available,
        "arch_list": torch.cuda.get_arch_list() if available else [],
        "error": "",
    }


def _ask_driver(question: Callable[[Any], Any], unknown: Any) -> Any:
    """What NVML answers, or `unknown` where there is no driver or it does not tell."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return question(pynvml)
    except pynvml.NVMLError:
        return unknown


def _driver() -> str:
    version = _ask_driver(lambda nvml: nvml.nvmlSystemGetDriverVersion(), "")
    return version if isinstance(version, str) else version.decode()


def _driver_cuda() -> str:
    """ ", CUDA up to 13.0": the newest CUDA that the driver serves."""
    version = _ask_driver(lambda nvml: nvml.nvmlSystemGetCudaDriverVersion(), 0)
    return f", CUDA up to {version // 1000}.{version % 1000 // 10}" if version else ""


def _free_vram(index: int) -> int:
    """Free memory of the card with this NVML index [bytes]; 0 where it is unknown."""
    return int(
        _ask_driver(lambda nvml: nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(index)).free, 0)
    )


def cannot_run(plan: Plan, facts: Facts, torch_says: dict[str, Any]) -> list[str]:
    """Why the plan cannot run here, with remedies; empty where it can."""
    if not facts.torch_version or torch_says["error"]:
        return [f"torch does not work: {torch_says['error']}; install it again (README)"]
    if plan.profile.device == "cpu":
        return []
    name = plan.profile.name
    instead = "set hardware.profile to auto or cpu"
    if not facts.gpus:
        return [f"hardware.profile: {name} needs an NVIDIA GPU, and the driver shows none here; {instead}"]
    if not facts.torch_cuda:
        return [
            f"hardware.profile: {name} needs CUDA, but torch {facts.torch_version} is a CPU-only build: install one "
            f"with CUDA ({TORCH_HELP}), or {instead}"
        ]
    problems = []
    if not torch_says["cuda_available"]:
        problems.append(
            f"torch {facts.torch_version} is built for CUDA {facts.torch_cuda} but cannot use {facts.gpus[0].name}: "
            f"update the driver ({_driver() or 'unknown'}), restart, or {instead}"
        )
    for gpu in facts.gpus[: plan.num_processes]:
        if torch_says["arch_list"] and not supports(torch_says["arch_list"], gpu.compute_capability):
            has = ", ".join(torch_says["arch_list"])
            problems.append(
                f"torch {facts.torch_version} has no kernels for {gpu.name} "
                f"({_capability(gpu.compute_capability)}; it has {has}): install another build ({TORCH_HELP})"
            )
        if gpu.compute_capability < plan.profile.compute_capability:
            problems.append(
                f"hardware.profile: {name} is for compute capability {_capability(plan.profile.compute_capability)}, "
                f"{gpu.name} has {_capability(gpu.compute_capability)}; {instead}"
            )
        # Linux shows some 3 to 6 % less than nominal; more than that missing is another card.
        if gpu.vram_bytes < plan.profile.vram_gib * GIB * 0.9:
            problems.append(
                f"hardware.profile: {name} has {plan.profile.vram_gib:g} GiB, "
                f"{gpu.name} {gpu.vram_bytes / GIB:.1f}; {instead}"
            )
        free = _free_vram(gpu.nvml_index)
        needed = plan.fit.forecast.needed + CONTEXT_BYTES if plan.fit else 0
        if free and free < needed:
            problems.append(
                f"{gpu.name} has {free / GIB:.2f} GiB free at the moment, the step needs {needed / GIB:.2f} with "
                "CUDA's context: close what else uses the card (nvidia-smi lists it), or set hardware.memory_gib to "
                f"{max(0.1, (free - CONTEXT_BYTES) / GIB):.1f}"
            )
    if plan.num_processes > 1 and facts.os == "windows":
        problems.append(
            "hardware.num_processes: torch trains with one card on Windows (no NCCL there); set it to 1"
        )
    if plan.num_processes > len(facts.gpus):
        problems.append(
            f"hardware.num_processes: {plan.num_processes}, but the machine has {len(facts.gpus)} GPUs; set it to that"
        )
    return problems


def supports(arch_list: list[str], capability: tuple[int, int]) -> bool:
    """A build runs on a card if it has a kernel of the same major and no higher minor version, or PTX to compile.

    CUDA C++ Programming Guide, "Binary Compatibility" and "PTX Compatibility".
    """
    for arch in arch_list:
        kind, _, number = arch.partition("_")
        digits = "".join(c for c in number if c.isdigit())
        version = (int(digits[:-1]), int(digits[-1]))
        if kind == "compute" and version <= capability:
            return True
        if kind == "sm" and version[0] == capability[0] and version[1] <= capability[1]:
            return True
    return False


def _capability(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def machine_lines(project: Project, facts: Facts, torch_says: dict[str, Any]) -> list[str]:
    """What this machine is; the three figures every guide prints come first."""
    gpu_names = ", ".join(g.name for g in facts.gpus) or "none"
    build = f" (built for CUDA {facts.torch_cuda})" if facts.torch_cuda else " (CPU-only build)"
    lines = [
        f"torch        {facts.torch_version or 'not installed'}{build if facts.torch_version else ''}",
        f"CUDA         {'available' if torch_says['cuda_available'] else 'not available'}",
        f"GPU          {gpu_names}",
        f"Python       {platform.python_version()} on {platform.system()} {platform.release()}",
    ]
    if facts.gpus:
        lines.append(f"driver       {_driver()}{_driver_cuda()}")
    for i, gpu in enumerate(facts.gpus):
        free = _free_vram(gpu.nvml_index)
        lines.append(
            f"card {i}       capability {_capability(gpu.compute_capability)}, {gpu.vram_bytes / GIB:.2f} GiB"
            + (f", {free / GIB:.2f} free" if free else "")
            + f"; bf16 {_yes(gpu.compute_capability >= (8, 0))}, fp16 {_yes(gpu.compute_capability >= (5, 3))}, "
            f"flash attention {_yes(gpu.compute_capability >= (8, 0))}"
        )
    if torch_says["arch_list"]:
        lines.append(f"kernels for  {', '.join(torch_says['arch_list'])}")
    if facts.gpus:
        expandable = "yes" if facts.os == "linux" else f"no ({facts.os})"
        lines.append(f"Triton       {_yes('triton' in facts.modules)}; expandable segments {expandable}")
    room = shutil.disk_usage(project.root)
    lines += [
        f"CPU          {facts.cores} cores, bf16 instructions {_yes(facts.cpu_bf16)}, "
        f"{facts.ram_bytes / GIB:.1f} GiB RAM",
        f"disk         {room.free / GIB:.1f} of {room.total / GIB:.1f} GiB free",
    ]
    return lines


def plan_lines(plan: Plan) -> list[str]:
    """Which profile and strategies, in order, and why each value is what it is."""
    lines = [f"profile      {plan.profile.name}: {plan.profile_reason}"]
    order = " → ".join(s.name for s in plan.active) or "none"
    lines.append(f"strategies   {order}")
    lines += [f"  skipped    {name}: {why}" for name, why in plan.skipped.items()]
    for key, choice in {**plan.values, **plan.env}.items():
        lines.append(f"  {key} = {choice.value}: {choice.reason} [{choice.by}]")
    lines += [f"  note       {note}" for note in plan.notes]
    if plan.fit is not None:
        lines += memory_lines(plan)
    return lines


def _facts_dict(facts: Facts) -> dict[str, Any]:
    return {
        "os": facts.os,
        "python": platform.python_version(),
        "torch": facts.torch_version,
        "cuda_build": facts.torch_cuda,
        "driver": _driver(),
        "gpus": [
            {
                "name": g.name,
                "vram_gib": round(g.vram_bytes / GIB, 2),
                "capability": list(g.compute_capability),
            }
            for g in facts.gpus
        ],
        "triton": "triton" in facts.modules,
        "cores": facts.cores,
        "ram_gib": round(facts.ram_bytes / GIB, 1),
    }


def _yes(value: bool) -> str:
    return "yes" if value else "no"
