"""Count the processes that a command starts, from the options of its launcher, its environment and its script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vlft.config.shell.expand import Text
from vlft.config.shell.walk import Command

#: Options of the launchers that take no value.
SWITCHES = {
    "torchrun": {"standalone", "no_python", "run_path", "m", "module", "use_env"},
    "deepspeed": {"no_local_rank", "no_python", "module", "save_pid", "force_multi", "bind_cores_to_rank"},
    "accelerate": {
        *("multi_gpu", "cpu", "mps", "tpu", "use_deepspeed", "use_fsdp", "use_megatron_lm", "use_xpu", "quiet", "q"),
        *("same_network", "debug", "m", "module", "no_python", "enable_cpu_affinity", "use_parallelism_config"),
    },
}
#: Variables in which scripts keep the number of GPUs, in lower case.
_GPU_COUNTS = frozenset(
    (
        *("num_devices", "num_gpus", "n_gpus", "ngpus", "gpus", "num_gpu", "gpu_num", "gpu_count", "nproc", "n_gpu"),
        *("nproc_per_node", "gpus_per_node", "num_processes"),
    )
)


@dataclass(kw_only=True)
class Start:
    """What was found on the way from the first word to the program."""

    counts: list[tuple[int | None, str, int]] = field(default_factory=list)
    single: bool = False
    notes: list[str] = field(default_factory=list)


def options_of(words: list[Text], switches: set[str]) -> tuple[dict[str, Text], list[Text], bool]:
    """Split the options of a launcher from what it starts. The last value is whether that is a module."""
    found: dict[str, Text] = {}
    at, module = 0, False
    while at < len(words) and words[at].text.startswith("-"):
        name, equals, value = words[at].text.lstrip("-").partition("=")
        name = name.replace("-", "_")
        module |= name in ("m", "module")
        at += 1
        if equals:
            found[name] = Text(text=value, missing=words[at - 1].missing)
        elif name not in switches and at < len(words):
            found[name] = words[at]
            at += 1
    return found, words[at:], module


def count_of(launcher: str, options: Mapping[str, Text]) -> tuple[int | None, str, int]:
    """Return the number of processes that a launcher's options set, which option says so, and the number of nodes."""
    if launcher == "accelerate":
        machines = number_of(options.get("num_machines")) or 1
        return number_of(options.get("num_processes")), "--num_processes", machines
    if launcher == "deepspeed":
        if "include" in options and not options["include"].missing:
            hosts = options["include"].text.split("@")
            slots = [host.partition(":")[2].split(",") for host in hosts if ":" in host]
            return (sum(map(len, slots)) if len(slots) == len(hosts) else None), "--include", len(hosts)
        each = number_of(options.get("num_gpus"))
        nodes = number_of(options["num_nodes"]) if "num_nodes" in options else 1
        return (each * nodes if each and nodes else None), "--num_gpus", nodes or 1
    each = number_of(options.get("nproc_per_node")) if "nproc_per_node" in options else 1
    nodes = number_of(options["nnodes"]) if "nnodes" in options else 1
    return (each * nodes if each and nodes else None), "--nproc_per_node", nodes or 0


def number_of(text: Text | None) -> int | None:
    return int(text.text) if text is not None and text.text.isdigit() and int(text.text) else None


def processes_of(kit: str, command: Command, start: Start, flags: Sequence[Text]) -> tuple[int | None, str, int]:
    """Return the number of processes, what says so, and the number of nodes; or (None, "", 1)."""
    for number, why, nodes in reversed(start.counts):
        if number is not None:
            return number, why, nodes
        if not nodes:  # the number of nodes is not known
            return None, "", 1
    seen = command.environment
    if kit in ("ms-swift", "LLaMA-Factory") and not start.counts:
        each = number_of(seen.get("NPROC_PER_NODE"))
        if each is None and kit == "ms-swift" and "NPROC_PER_NODE" not in seen:
            return 1, "one process without NPROC_PER_NODE", 1
        nodes = number_of(seen["NNODES"]) or 0 if "NNODES" in seen else 1
        if each and nodes:
            return each * nodes, "NPROC_PER_NODE", nodes
    if kit == "TRL":
        at = next((at for at, word in enumerate(flags) if word.text == "--num_processes"), None)
        if at is not None and at + 1 < len(flags) and (number := number_of(flags[at + 1])):
            return number, "--num_processes", 1
    if start.single and not start.counts:
        return 1, "one process without a launcher", 1
    visible = seen.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.text and not visible.missing:
        return len(visible.text.split(",")), "CUDA_VISIBLE_DEVICES", 1
    for name, values in command.variables.items():
        if name.lower() in _GPU_COUNTS and len(values) == 1 and (number := number_of(values[0])):
            each = number_of(command.variables.get("NNODES", (Text(text="1"),))[0])
            each = each if "per_node" in name.lower() else 1
            if each is None:
                return None, "", 1
            return number * each, f"${name} in the script", each
    return None, "", 1
