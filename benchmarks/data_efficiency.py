"""How much training text each way of pruning needs for the same quality: curves over recovery tokens.

    python benchmarks/data_efficiency.py run --method ours even masks taylor layers --tokens 131072 \\
        --data FOLDER --evaluation FILE --work WORK
    python benchmarks/data_efficiency.py zero-shot --tasks FOLDER --work WORK
    python benchmarks/data_efficiency.py plot
    python benchmarks/data_efficiency.py table

The model is SmolLM2-135M (`smollm2`, the `demo` extra) or the one in a folder (`--model`). Every method makes a model
of the size asked for from the same text; all are trained alike (`peers/curve_training.py`: distillation, a constant
rate) and measured on the way, before and after 8,192, 16,384, 32,768 … tokens, on a file and on a split that no method
reads. What a method trains on before it has a model of that size (learnt masks) counts as if it were recovery.

A row is one method, model, size and seed: a JSON file, written anew after each measurement. The same command goes on
where it stopped, from the last checkpoint in WORK, and with more `--tokens` it trains the same rows further.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent / "peers"))
    from efficiency_rows import main

    main(__doc__ or "")
