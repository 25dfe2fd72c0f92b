"""`--method grpo`: TRL's GRPOTrainer on vlft's rows, towers, pixels, run folder and record.

    rows  --prompts-->  tokens and pixels of a prompt  --trainer (TRL)-->  completions  --rewards-->  numbers

`start` checks everything before a model is loaded; `worker` is the process that computes rewards. TRL is imported by
`trainer` only.
"""
