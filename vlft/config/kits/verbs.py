"""Commands of other kits and synonyms, with the command of vlft that is meant."""

from __future__ import annotations

from collections.abc import Mapping

#: Verb -> the command of vlft, with an explanation where it is needed.
MEANT: Mapping[str, str] = {
    **dict.fromkeys(
        ("sft", "finetune", "fine-tune", "finetuning", "tune", "fit", "run", "launch", "lora", "pt", "pretrain"),
        "vlft train",
    ),
    **dict.fromkeys(
        ("infer", "inference", "predict", "generate", "ask", "demo-chat", "cli", "chatbot", "sample"), "vlft chat"
    ),
    **dict.fromkeys(
        ("export", "merge-lora", "merge-weights", "merge-sharded-fsdp-weights", "save", "convert-weights"),
        "vlft merge RUN OUT (weights anyone can load)",
    ),
    **dict.fromkeys(("quantize", "quantise", "quant"), "vlft merge RUN OUT, then quantise OUT with another tool"),
    **dict.fromkeys(
        ("translate", "migrate", "port", "convert-config", "from-yaml"), "vlft plan --translate OLD [--out new.yaml]"
    ),
    **dict.fromkeys(
        ("llamafactory-cli", "llamafactory", "swift", "axolotl", "trl", "torchrun", "deepspeed", "accelerate"),
        "vlft plan --translate OLD, where OLD is a file with the command, or the YAML that it names",
    ),
    **dict.fromkeys(
        ("check", "validate", "verify", "lint", "data", "preprocess", "prepare", "tokenize"), "vlft check-data"
    ),
    **dict.fromkeys(("show", "view", "inspect", "visualize"), "vlft preview"),
    **dict.fromkeys(("estimate", "estimate-memory", "memory", "dry-run", "params", "plan-memory"), "vlft plan"),
    **dict.fromkeys(("benchmark", "profile", "perf"), "vlft bench"),
    **dict.fromkeys(("convert", "download"), "vlft import"),
    **dict.fromkeys(("plot", "logs", "curves"), "vlft report"),
    **dict.fromkeys(("version", "env"), "vlft --version"),
    **dict.fromkeys(("evaluate", "test", "score", "compare", "benchmark-model"), "vlft eval MODEL DATA"),
    **dict.fromkeys(
        ("api", "serve", "server", "deploy", "rollout", "vllm-serve"),
        "vlft merge RUN OUT, and serve OUT with vLLM or transformers",
    ),
    **dict.fromkeys(
        ("webui", "web-ui", "web", "ui", "webchat", "app", "gradio"),
        "vlft chat in the terminal; there are no web pages to start",
    ),
    **{method: f"vlft train --method {method}" for method in ("dpo", "orpo", "simpo", "grpo")},
    **dict.fromkeys(
        ("rlhf", "kto", "cpo", "ppo", "gkd", "rloo", "rm", "reward"),
        "vlft train --method dpo, orpo, simpo or grpo (others are not supported)",
    ),
}
