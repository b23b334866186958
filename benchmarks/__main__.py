"""Measure speed and memory: python -m benchmarks COMMAND. With --peers, other implementations are measured as well."""

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
    """Measure speed and memory. With --peers, some commands also measure other implementations of the same work."""


if __name__ == "__main__":
    run_command(main, prog_name="python -m benchmarks")
