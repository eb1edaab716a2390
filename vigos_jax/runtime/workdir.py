"""Which file of a run's folder is what. Every name is here, and nowhere else."""

LOCK = ".lock"  # there while a run writes to the folder
CONFIG = "config.json"  # the run's config; the folder is this config's own
METRICS = "metrics.jsonl"  # a row per optimizer step
QUANTIZATION = "quantization.json"  # what quantising the base cost, on the first prompts
SNAPSHOTS = "report.jsonl"  # rows answered again and again
PAGE = "report.html"
EVALUATIONS = "eval.jsonl"  # a row per evaluation during training
EVALUATION = "eval"  # folder of `config.eval`'s answers, verdicts and report
RESULTS = "results.json"  # the demo's evaluation
DIAGNOSIS = "diagnose"  # folder of `--mode diagnose`
CHECKPOINTS = "checkpoints"
BROKEN_CHECKPOINTS = "checkpoints-broken"
SKIPPED = "nonfinite"  # rows and rollouts of the steps whose loss or gradient was not finite
ADAPTERS = "adapters"  # the student's, while inference servers use them
EXPORTED = "exported.json"  # what lies in the folder of the run's export, wherever that is
EXPORT = "export"  # the Hugging Face folder at the end of a run
TENSORBOARD = "tensorboard"
WANDB_ID = "wandb-id"
