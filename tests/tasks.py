"""Items of zero-shot tasks, and files of them."""

import json

ITEMS = {
    "choice": {"query": "Two and two are", "choices": ["four", "five"], "gold": 0},
    "question": {"query": "Question: what is two?\n", "choices": ["a number", "a fish", "a tree"], "gold": 0},
    "contexts": {
        "context_options": ["It rains and so Ann", "It rains and so Bob"],
        "continuation": "is wet.",
        "gold": 1,
    },
    "word": {"context": "One, two,", "continuation": "three"},
}


def write(folder, name, *lines):
    folder.mkdir(exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / f"{name}.jsonl").write_text("\n".join(texts) + "\n")
