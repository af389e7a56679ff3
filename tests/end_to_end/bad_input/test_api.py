"""Tests of wrong arguments of the Python API."""

import pytest
from refusals import NEITHER, RANGE, contents

from darwinlm.errors import UserError
from darwinlm.models.pruned import load
from darwinlm.pipeline import prune


def api(**changes):
    return lambda model, text, out: prune(**{"model": model, "target": 0.8, "out": out, **changes})


API = {
    "no target": (api(target=None), f"^recipe: target None {NEITHER}$"),
    "a yes for a target": (api(target=True), f"^recipe: target True {NEITHER}$"),
    "words for a target": (api(target="half"), f"^recipe: target 'half' {NEITHER}$"),
    "a negative target": (api(target=-0.5), f"^recipe: target -0.5 {RANGE}$"),
    "no model": (api(model=""), "^recipe: model = '': string should have at least 1 character$"),
    "a model that is nowhere": (api(model="./nothing"), "^model './nothing': not a local folder"),
    "an unknown recipe": (
        api(recipe="fast"),
        "^recipe 'fast': no such file; the built-in recipes are demo, llama2_7b_2.7b, .*, paper, quick, ",
    ),
    "an unknown setting": (
        api(settings={"search.offsprin": 1}),
        r"^recipe: unknown setting 'search.offsprin'; did you mean 'search.offspring'\?$",
    ),
    "a setting that is a number": (api(settings={3: 1}), "^recipe: 3 is not a setting; write settings as"),
    "a setting without a name": (api(settings={"": 1}), "^recipe: unknown setting ''; did you mean "),
    "half a name": (api(settings={"search.": 1}), r"^recipe: unknown setting 'search.'; did you mean 'search"),
    "a section of words": (
        api(settings={"search": "fast"}),
        "^recipe: search = 'fast': this is a section; set one of its settings, such as search.offspring$",
    ),
    "a list for a number": (
        api(settings={"search.offspring": [1]}),
        r"^recipe: search.offspring = \[1\]: input should be a valid integer$",
    ),
    "an object": (api(settings={"seed": object()}), "^recipe: seed = <object .*: input should be a valid integer$"),
    "a file for a run": (
        lambda model, text, out: prune(model, target=0.8, out=text),
        "^--out .*good.txt is a file; give",
    ),
    "load: nowhere": (lambda model, text, out: load(out), r"^.*out contains no model \(config.json is missing\)$"),
    "load: a dense model": (lambda model, text, out: load(model), "contains no pruned model; load it with"),
    "load: a file": (lambda model, text, out: load(text), "good.txt/config.json cannot be read: .*Not a directory"),
}


@pytest.mark.parametrize("case", API)
def test_invalid_call(case, checkpoint, text, tmp_path):
    call, message = API[case]
    before = contents(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        call(checkpoint("llama"), text, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == before
