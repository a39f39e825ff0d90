"""Trains the files in models/weights: of seeds 0 to 9, the one with the highest validation accuracy.

    torchrun --nproc-per-node=2 tests/measure/weights.py

About a quarter of an hour on two cores. The lowest seed wins ties; the test set is not used.
"""

import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from support import device, workers  # noqa: E402


def main():
    with tempfile.TemporaryDirectory() as folder, workers.process_group():
        args = train.parse_args(["--runs", "10", "--output-dir", folder])
        args.device = device.select_device()
        for name in train.RECIPES:
            own = {
                seed: train.train(name, args, seed)[0]
                for seed in range(10)[workers.RANK :: workers.WORLD_SIZE]
            }
            best = max(own, key=own.get)
            accuracy, seed = max(workers.gather((own[best], -best)))
            if seed == -best:
                weights = ROOT / "models" / "weights" / f"{name}.pth"
                shutil.copy(Path(folder) / f"best_{name}_seed{best}.pth", weights)
            print(f"{name}: seed {-seed}, validation accuracy {accuracy:.2%}")


if __name__ == "__main__":
    main()
