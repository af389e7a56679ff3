"""Verification and timing of GGUF files in llama.cpp: logits and token ids, by the C API of the wheel `xllamacpp`.

The engine runs in a separate process (`python -m darwinlm.engines.llama_cpp`), because it aborts on files that it
cannot run. The KV cache is float32 and flash attention is off, so that a float32 file is computed in float32
throughout.
"""

import ctypes
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from darwinlm.config.exports import installed
from darwinlm.errors import EngineError

PACKAGE = "xllamacpp"
_FLOAT32 = 0
_TEXT_ROOM = 64
"""Additional tokens beyond the bytes of a text: beginning and end of text, and some margin."""


class _ModelParameters(ctypes.Structure):
    """Beginning of `llama_model_params`; the library reads as much of it as it needs."""

    _fields_ = (
        ("devices", ctypes.c_void_p),
        ("overrides", ctypes.c_void_p),
        ("n_gpu_layers", ctypes.c_int32),
        ("rest", ctypes.c_uint8 * 492),
    )


class _ContextParameters(ctypes.Structure):
    """Beginning of `llama_context_params`, as in llama.cpp since 2026."""

    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq")),
        *((name, ctypes.c_uint32) for name in ("n_outputs_max", "n_outputs_max_per_seq")),
        *((name, ctypes.c_int32) for name in ("n_threads", "n_threads_batch", "ctx_type", "rope_scaling_type")),
        *((name, ctypes.c_int32) for name in ("pooling_type", "attention_type", "flash_attn_type")),
        ("rope_and_yarn", ctypes.c_float * 8),
        *((name, ctypes.c_void_p) for name in ("cb_eval", "cb_eval_user_data")),
        *((name, ctypes.c_int32) for name in ("type_k", "type_v")),
        ("rest", ctypes.c_uint8 * 400),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


_DEFAULTS = {"n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "flash_attn_type": -1}
_DEFAULTS |= {"type_k": 1, "type_v": 1, "rope_scaling_type": -1, "pooling_type": -1, "attention_type": -1}
"""Values of `llama_context_default_params`; different values mean that the structure has changed."""

_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_model_default_params": (_ModelParameters, ()),
    "llama_context_default_params": (_ContextParameters, ()),
    "llama_model_load_from_file": (ctypes.c_void_p, (ctypes.c_char_p, _ModelParameters)),
    "llama_init_from_model": (ctypes.c_void_p, (ctypes.c_void_p, _ContextParameters)),
    "llama_model_get_vocab": (ctypes.c_void_p, (ctypes.c_void_p,)),
    "llama_vocab_n_tokens": (ctypes.c_int32, (ctypes.c_void_p,)),
    "llama_batch_init": (_Batch, (ctypes.c_int32, ctypes.c_int32, ctypes.c_int32)),
    "llama_decode": (ctypes.c_int32, (ctypes.c_void_p, _Batch)),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), (ctypes.c_void_p,)),
    "llama_batch_free": (None, (_Batch,)),
    "llama_free": (None, (ctypes.c_void_p,)),
    "llama_model_free": (None, (ctypes.c_void_p,)),
    "llama_tokenize": (
        ctypes.c_int32,
        (
            *(ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32),
            *(ctypes.POINTER(ctypes.c_int32), ctypes.c_int32, ctypes.c_bool, ctypes.c_bool),
        ),
    ),
}
_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_LOG_ERROR = 4


@dataclass(frozen=True)
class Answer:
    """Output of llama.cpp for a file."""

    logits_TV: np.ndarray
    """Float32 logits, by position and vocabulary entry."""
    token_ids: list[list[int]]
    """Token ids of each text."""


def ask(file: Path, tokens: Sequence[int], texts: Sequence[str] = ()) -> Answer:
    """Run `file` in llama.cpp on `tokens`, and tokenize `texts` (special tokens added and parsed).

    Raises:
        EngineError: if llama.cpp rejects the file or crashes, or the engine's API is not supported.
    """
    with tempfile.TemporaryDirectory() as scratch:
        logits_file = Path(scratch) / "logits.npy"
        answer = _in_a_process(
            {"file": str(file), "logits": str(logits_file), "tokens": list(tokens), "texts": list(texts)}
        )
        return Answer(np.load(logits_file, allow_pickle=False), answer)


def time_requests(
    files: Mapping[str, Path], requests: Sequence[tuple[int, int]], repeats: int
) -> list[dict[str, tuple[float, float]]]:
    """Return median seconds for prompt and new tokens of each request, by file; files alternate, after an untimed pass.

    Args:
        files: files by name.
        requests: prompt tokens and new tokens of each request.
        repeats: number of timed passes.

    Raises:
        EngineError: see `ask`.
    """
    paths = {name: str(file) for name, file in files.items()}
    times = _in_a_process({"files": paths, "requests": list(requests), "repeats": repeats})
    return [{name: (prompt, new) for name, (prompt, new) in one.items()} for one in times]


def _in_a_process(question: Mapping[str, Any]) -> Any:
    """Run `_answer` in a separate process and return its output. Raises EngineError."""
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(question).encode(),
        capture_output=True,
        check=False,
        env=os.environ | {"GGML_NO_BACKTRACE": "1"},
    )
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise EngineError(last[0])
    return json.loads(done.stdout)


class Engine:
    """A GGUF file loaded in llama.cpp, in this process.

    Raises:
        EngineError: if it cannot be loaded.
    """

    def __init__(self, file: Path) -> None:
        self._library = _library()
        self._errors: list[str] = []
        self._log = _LOG(self._note)
        self._library.llama_log_set(self._log, None)
        self._library.llama_backend_init()
        parameters = self._library.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self._model = self._library.llama_model_load_from_file(str(file).encode(), parameters)
        if not self._model:
            raise EngineError(self._errors[0] if self._errors else "the file cannot be loaded")
        self._vocabulary = self._library.llama_model_get_vocab(self._model)

    def close(self) -> None:
        """Free the model."""
        self._library.llama_model_free(self._model)

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Return float32 logits by position and vocabulary entry, computed in one batch. Raises EngineError."""
        context = self._context(len(tokens), exact=True)
        try:
            logits_TV: np.ndarray = self._decode(context, tokens, 0, outputs=len(tokens)).copy()
            return logits_TV
        finally:
            self._library.llama_free(context)

    def request_seconds(self, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
        """Return the seconds for a prompt, and for the new tokens one by one (greedy), with llama.cpp's defaults: a
        float16 cache, and flash attention where supported. Raises EngineError."""
        context = self._context(prompt_tokens + new_tokens, exact=False)
        try:
            size = self._library.llama_vocab_n_tokens(self._vocabulary)
            start = time.perf_counter()
            last_1V = self._decode(context, [place * 7919 % size for place in range(prompt_tokens)], 0, outputs=1)
            read = time.perf_counter()
            for place in range(prompt_tokens, prompt_tokens + new_tokens):
                last_1V = self._decode(context, [int(last_1V.argmax())], place, outputs=1)
            return read - start, time.perf_counter() - read
        finally:
            self._library.llama_free(context)

    def _context(self, positions: int, *, exact: bool) -> Any:
        """Create a context for `positions` tokens; `exact`: a float32 cache, no flash attention, all in one batch."""
        parameters = self._library.llama_context_default_params()
        if any(getattr(parameters, name) != value for name, value in _DEFAULTS.items()):
            raise EngineError(f"the API of {installed(PACKAGE)} is not supported")
        parameters.n_ctx = parameters.n_batch = positions
        if exact:
            parameters.n_ubatch = positions
            parameters.type_k = parameters.type_v = _FLOAT32
            parameters.flash_attn_type = 0
        parameters.n_threads = parameters.n_threads_batch = threads()
        context = self._library.llama_init_from_model(self._model, parameters)
        if not context:
            raise EngineError(self._errors[0] if self._errors else "no context can be created")
        return context

    def _decode(self, context: Any, tokens: Sequence[int], first: int, *, outputs: int) -> np.ndarray:
        """Run `tokens` from position `first` on; returns logits of the last `outputs`, in the engine's memory."""
        library, count = self._library, len(tokens)
        batch = library.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place], batch.logits[place] = token, first + place, place >= count - outputs
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        failed = library.llama_decode(context, batch)
        library.llama_batch_free(batch)
        if failed:
            raise EngineError(self._errors[-1] if self._errors else f"llama_decode returned {failed}")
        size = library.llama_vocab_n_tokens(self._vocabulary)
        logits_TV: np.ndarray = np.ctypeslib.as_array(library.llama_get_logits(context), (outputs, size))
        return logits_TV

    def token_ids(self, text: str) -> list[int]:
        """Return the ids of `text`, special tokens added and parsed. Raises EngineError."""
        data = text.encode()
        room = len(data) + _TEXT_ROOM
        ids = (ctypes.c_int32 * room)()
        count = self._library.llama_tokenize(self._vocabulary, data, len(data), ids, room, True, True)
        if count < 0:
            raise EngineError("a text has more tokens than bytes")
        return list(ids[:count])

    def _note(self, level: int, text: bytes, _: object) -> None:
        if level == _LOG_ERROR:
            self._errors.append(text.decode(errors="replace").strip())


def threads() -> int:
    """Return the number of threads for llama.cpp: `OMP_NUM_THREADS`, or all cores."""
    value = os.environ.get("OMP_NUM_THREADS", "")
    return int(value) if value.isdecimal() and int(value) else os.cpu_count() or 1


def _library() -> Any:
    spec = importlib.util.find_spec(PACKAGE)
    folder = Path(spec.origin).parent if spec and spec.origin else None
    files = [file for file in sorted(folder.glob(f"{PACKAGE}*")) if file.suffix in (".so", ".pyd")] if folder else []
    if not files:
        raise EngineError(f"{PACKAGE} is not installed")
    library = _open(files[0])
    try:
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        library.llama_log_set.restype = None
        library.llama_log_set.argtypes = (_LOG, ctypes.c_void_p)
    except AttributeError:
        raise EngineError(f"the API of {installed(PACKAGE)} is not supported") from None
    return library


def _open(file: Path) -> Any:
    try:
        return ctypes.CDLL(str(file))
    except OSError as error:  # Minimal systems have no OpenMP library; PyTorch includes one.
        torch = importlib.util.find_spec("torch")
        openmp = Path(torch.origin).parent / "lib" / "libgomp.so.1" if torch and torch.origin else None
        if openmp is None or not openmp.exists():
            raise EngineError(f"{PACKAGE} cannot be loaded: {error}") from None
        ctypes.CDLL(str(openmp), mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(file))


def _answer(question: Mapping[str, Any]) -> Any:
    if "requests" in question:
        return _times(question["files"], question["requests"], question["repeats"])
    engine = Engine(Path(question["file"]))
    np.save(question["logits"], engine.logits(question["tokens"]))
    return [engine.token_ids(text) for text in question["texts"]]


def _times(
    files: Mapping[str, str], requests: Sequence[Sequence[int]], repeats: int
) -> list[dict[str, tuple[float, float]]]:
    engines = {name: Engine(Path(file)) for name, file in files.items()}
    found = []
    for prompt_tokens, new_tokens in requests:
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
        for repeat in range(repeats + 1):
            for name, engine in engines.items():
                timed = engine.request_seconds(prompt_tokens, new_tokens)
                if repeat > 0:
                    times[name].append(timed)
        found.append(
            {
                name: (statistics.median(one[0] for one in timed), statistics.median(one[1] for one in timed))
                for name, timed in times.items()
            }
        )
    return found


def _main() -> int:
    try:
        print(json.dumps(_answer(json.load(sys.stdin))))
    except EngineError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main())
