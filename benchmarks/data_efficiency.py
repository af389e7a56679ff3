"""Compare pruning methods by the training tokens that they need for the same quality.

    python benchmarks/data_efficiency.py run --method ours even masks taylor layers --tokens 131072 \\
        --data FOLDER --evaluation FILE --work WORK
    python benchmarks/data_efficiency.py zero-shot --tasks FOLDER --work WORK
    python benchmarks/data_efficiency.py plot
    python benchmarks/data_efficiency.py table

The model is SmolLM2-135M (`smollm2`, the `demo` extra) or a local folder (`--model`). Every method prunes it to the
target size with the same text. All pruned models are trained alike (`peers/curve_training.py`: distillation, a constant
learning rate) and evaluated before training and after 8,192, 16,384, 32,768 … tokens, on a file and on a split that no
method reads. Tokens that a method trains on before its model has that size (learned masks) count as recovery.

A row is one method, model, size and seed, stored as a JSON file that is updated after each measurement. Run the same
command again to resume from the last checkpoint in WORK; a larger `--tokens` continues the same rows.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent / "peers"))
    from efficiency_rows import main

    main(__doc__ or "")
