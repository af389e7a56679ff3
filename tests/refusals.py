"""Settings of a tiny run, and messages of refused runs."""

SMALL = [
    "data.sequence_length=16",
    "data.calibration_tokens=64",
    "data.train_tokens=32",
    "data.validation_tokens=32",
    "data.test_tokens=32",
    "database.levels=3",
    "search.generations=1",
    "search.offspring=2",
    "search.trial_tokens=[16, 16]",
    "search.score_tokens=[16, 32]",
    "recovery.tokens=16",
    "workload.prompt_tokens=8",
    "workload.new_tokens=2",
]


def contents(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def one_line(code, stderr):
    assert code == 2, stderr
    assert stderr.startswith("error: ")
    assert stderr.endswith("\n")
    assert len(stderr.splitlines()) == 1, stderr
    return stderr.removeprefix("error: ").strip()


NEITHER = r"is neither a fraction of the parameters \(0.5\) nor a number of them \(2.7B, 500M\)"
RANGE = r"must be above 0 and at most 1 \(a fraction\), or a count such as 2.7B"
