"""The steps that run on a GPU run here too, on a machine that has little installed."""

import json
import subprocess
import sys

BARE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("pydantic", "ray", "kafka", "pyarrow", "yaml"):
            raise ImportError(name)

sys.meta_path.insert(0, Absent())
from benchmarks.gpu_steps import main
sys.argv = ["gpu_steps", "--device", "cpu", "--quick"]
sys.exit(main())
"""


def test_both_steps_run_without_ray_kafka_and_pydantic() -> None:
    done = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["tokens_per_s"] > 0
    assert 0 < figures["largest_difference_from_fp32"] < 0.02 < figures["spread_of_probabilities"]
