"""llama.cpp as a judge of a GGUF file: logits and token ids, by the C API inside the wheel `xllamacpp`.

The engine runs in a process of its own (`python -m darwinlm.export.llama_cpp FILE`): it answers a file that it cannot
run by ending the process. The KV cache is float32 and flash attention is off, so that a float32 file is computed in
float32 throughout.
"""

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PACKAGE = "xllamacpp"
_FLOAT32 = 0
_TEXT_ROOM = 64
"""More tokens than a text has bytes: beginning and end of text, and a little room."""


class _ModelParameters(ctypes.Structure):
    """The beginning of `llama_model_params`; the library reads as much of it as it knows."""

    _fields_ = (
        ("devices", ctypes.c_void_p),
        ("overrides", ctypes.c_void_p),
        ("n_gpu_layers", ctypes.c_int32),
        ("rest", ctypes.c_uint8 * 492),
    )


class _ContextParameters(ctypes.Structure):
    """The beginning of `llama_context_params`, as in llama.cpp since 2026."""

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
"""What `llama_context_default_params` gives: where it gives something else, the structure is another one."""

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


class EngineError(Exception):
    """llama.cpp cannot run a file; the message is its own last word."""


@dataclass(frozen=True)
class Answer:
    """What llama.cpp makes of a file."""

    logits_TV: np.ndarray
    """Float32, by position and vocabulary entry."""
    token_ids: list[list[int]]
    """Of each text."""


def engine_version() -> str | None:
    """The name and version of the engine, or None where none is installed."""
    try:
        return f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"
    except importlib.metadata.PackageNotFoundError:
        return None


def ask(file: Path, tokens: Sequence[int], texts: Sequence[str] = ()) -> Answer:
    """Run `file` in llama.cpp on `tokens`, and let it tokenise `texts` (special tokens added and read).

    Raises:
        EngineError: if llama.cpp refuses the file or dies of it, or the engine is none that we can talk to.
    """
    with tempfile.TemporaryDirectory() as scratch:
        logits_file = Path(scratch) / "logits.npy"
        done = subprocess.run(
            [sys.executable, "-m", __name__, str(file), str(logits_file)],
            input=json.dumps({"tokens": list(tokens), "texts": list(texts)}).encode(),
            capture_output=True,
            check=False,
            env=os.environ | {"GGML_NO_BACKTRACE": "1"},
        )
        if done.returncode:
            last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            raise EngineError(last[0])
        return Answer(np.load(logits_file, allow_pickle=False), json.loads(done.stdout))


class Engine:
    """A GGUF file in llama.cpp, in this process.

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
        """Float32 logits by position and vocabulary entry, computed in one batch. Raises EngineError."""
        library, count = self._library, len(tokens)
        parameters = library.llama_context_default_params()
        if any(getattr(parameters, name) != value for name, value in _DEFAULTS.items()):
            raise EngineError(f"{engine_version()} has another programming interface than the one known here")
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = count
        parameters.type_k = parameters.type_v = _FLOAT32
        parameters.flash_attn_type = 0
        parameters.n_threads = parameters.n_threads_batch = threads()
        context = library.llama_init_from_model(self._model, parameters)
        if not context:
            raise EngineError(self._errors[0] if self._errors else "no context can be made")
        batch = library.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for position, token in enumerate(tokens):
            batch.token[position], batch.pos[position], batch.logits[position] = token, position, 1
            batch.n_seq_id[position], batch.seq_id[position][0] = 1, 0
        failed = library.llama_decode(context, batch)
        if not failed:
            size = library.llama_vocab_n_tokens(self._vocabulary)
            logits_TV: np.ndarray = np.ctypeslib.as_array(library.llama_get_logits(context), (count, size)).copy()
        library.llama_batch_free(batch)
        library.llama_free(context)
        if failed:
            raise EngineError(self._errors[-1] if self._errors else f"llama_decode gives {failed}")
        return logits_TV

    def token_ids(self, text: str) -> list[int]:
        """The ids of `text`, special tokens added and read. Raises EngineError."""
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
    """How many llama.cpp may use: `OMP_NUM_THREADS`, or all cores."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    return int(told) if told.isdecimal() and int(told) else os.cpu_count() or 1


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
        raise EngineError(f"{engine_version()} has another programming interface than the one known here") from None
    return library


def _open(file: Path) -> Any:
    try:
        return ctypes.CDLL(str(file))
    except OSError as error:  # a slim system without OpenMP's library; PyTorch brings one
        torch = importlib.util.find_spec("torch")
        openmp = Path(torch.origin).parent / "lib" / "libgomp.so.1" if torch and torch.origin else None
        if openmp is None or not openmp.exists():
            raise EngineError(f"{PACKAGE} cannot be loaded: {error}") from None
        ctypes.CDLL(str(openmp), mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(file))


def _answer(arguments: Sequence[str]) -> int:
    question = json.load(sys.stdin)
    try:
        engine = Engine(Path(arguments[0]))
        np.save(arguments[1], engine.logits(question["tokens"]))
        print(json.dumps([engine.token_ids(text) for text in question["texts"]]))
    except EngineError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_answer(sys.argv[1:]))
