"""How fast and how large: python -m benchmarks COMMAND; with --peers, others in the same run."""

import cloup

from benchmarks.generation import time_generation
from benchmarks.gpu import time_gpu
from benchmarks.memory import count_memory, plan_runs
from benchmarks.scoring import time_scoring
from benchmarks.training import time_training
from benchmarks.true_size import time_loading, write_checkpoint
from runtime.distributed import run_command


@cloup.group(
    commands=[
        time_training,
        time_generation,
        time_scoring,
        count_memory,
        plan_runs,
        write_checkpoint,
        time_loading,
        time_gpu,
    ]
)
def main():
    """Measure on this machine; with --peers also PEFT, LoRA, full tuning, litgpt, and plain code as the authors'."""


if __name__ == "__main__":
    run_command(main, prog_name="python -m benchmarks")
