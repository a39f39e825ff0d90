"""Copies the files of models/weights from many runs: for each model, from the run with the best validation.

    torchrun --nproc-per-node=2 train.py --model all --seed 2000 --runs 20 --output-dir runs
    python tests/measure/weights.py runs

About an hour on two vCPUs. The lowest seed wins ties; the test set is not used.
"""

import argparse
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from models import MODELS  # noqa: E402
from support import checkpoint  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, help="the runs' output directory")
    folder = parser.parse_args().runs
    for name in MODELS:
        results = []
        for path in folder.glob(f"last_{name}_seed*.pth"):
            history = checkpoint.read(path)["state"]["history"]
            seed = int(re.search(r"\d+$", path.stem)[0])
            results.append((history[checkpoint.epoch_to_keep(history) - 1]["validation_accuracy"], -seed))
        accuracy, seed = max(results)
        shutil.copy(folder / f"best_{name}_seed{-seed}.pth", ROOT / "models" / "weights" / f"{name}.pth")
        print(f"{name}: seed {-seed}, validation accuracy {accuracy:.2%}")


if __name__ == "__main__":
    main()
