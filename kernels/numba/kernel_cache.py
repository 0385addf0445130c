"""The cache of compiled kernels on disk.

A kernel whose file is missing or damaged is compiled again; where the folder cannot be written, every start compiles.
Of several processes that share the folder, as replicas on one volume do, one compiles and the others wait for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm
import numba
from numba import njit, types
from numba.core import cgutils
from numba.core.caching import NullCache
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps
from numba.core.sigutils import normalize_signature
from numba.extending import intrinsic

from kernels.numba.core.processor import level

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).parent
PATIENCE = 120.0  # seconds that a kernel is waited for which another process compiles
DIGEST_BYTES = hashlib.sha256().digest_size


def cache_directory() -> Path | None:
    """$NUMBA_CACHE_DIR, else kernels/ in $PEREGRINE_CACHE, else peregrine/kernels/ in $XDG_CACHE_HOME or ~/.cache.

    Below it, a folder for what these very sources compile to, in these versions. None: there is no home directory.
    """
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__} {sys.version} {level().name}".encode())
    for source in (*sorted(PACKAGE.rglob("*.py")), PACKAGE.parent / "layout.py"):
        digest.update(source.read_bytes())
    root = _root()
    return None if root is None else root / digest.hexdigest()[:16]


def _root() -> Path | None:
    if given := os.environ.get("NUMBA_CACHE_DIR"):
        return Path(given)
    if given := os.environ.get("PEREGRINE_CACHE"):
        return Path(given) / "kernels"
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peregrine" / "kernels"
    except RuntimeError:  # a user without an entry in /etc/passwd, as some clusters make them
        return None


class KernelFolder:
    """A folder of files that begin with a digest of the rest.

    A damaged file is thereby found before it is unpickled and linked, which could end the process.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._warned: set[str] = set()

    def read(self, name: str) -> bytes | None:
        """The content of a file. None if there is no such file, or it is damaged."""
        if self.path is None:
            return None
        try:
            content = (self.path / name).read_bytes()
        except OSError:
            return None
        digest, payload = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
        if hashlib.sha256(payload).digest() == digest:
            return payload
        self._warn(f"compiled kernels in {self.path} are damaged; they are compiled again")
        return None

    def write(self, name: str, payload: bytes) -> None:
        """Writes a file atomically. Where the folder cannot be written, the next start compiles again."""
        if self.path is None:
            self._warn("compiled kernels stay in memory, since there is no home directory; set XDG_CACHE_HOME")
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.path, prefix=f"{name}.", delete=False) as file:
                try:
                    file.write(hashlib.sha256(payload).digest() + payload)
                    os.fchmod(file.fileno(), 0o644)  # a cache may be made by one user and read by others
                    file.close()
                    os.replace(file.name, self.path / name)
                except OSError:
                    os.unlink(file.name)
                    raise
        except OSError as error:
            reason = f"compiled kernels stay in memory, since {self.path} cannot be written ({error.strerror})"
            self._warn(f"{reason}: every start compiles for some fifteen seconds; set XDG_CACHE_HOME to another folder")

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """A context that one process at a time is in, of all that share the folder: the first compiles, others read.

        Nobody waits for longer than PATIENCE, and nobody where the folder cannot be written or locks nothing.
        """
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                if self.path is not None:
                    self.path.mkdir(parents=True, exist_ok=True)
                    descriptor = os.open(self.path, os.O_RDONLY)
                    stack.callback(os.close, descriptor)
                    _lock(descriptor)
            yield

    def _warn(self, message: str) -> None:
        """Logs a message once, not for each of a dozen kernels."""
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)


def _lock(descriptor: int) -> None:
    """Takes a lock that ends with the process, or gives up after PATIENCE. Raises OSError where there are no locks."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.02)


FOLDER = KernelFolder(cache_directory())


class KernelCache(NullCache):  # type: ignore[misc]  # numba has no types
    """The cache of one function, in Numba's interface: asked for compiled code before a compilation, given it after.

    Numba's own cache needs an index file, does not detect that it is damaged, and raises where it cannot write.
    """

    def __init__(self, function: Callable[..., object], folder: KernelFolder) -> None:
        self._function = function
        self._folder = folder

    @property
    def cache_path(self) -> str:
        return str(self._folder.path)

    def load_overload(self, sig, target_context):
        target_context.refresh()
        payload = self._folder.read(self._name(sig, target_context.codegen()))
        return None if payload is None else CompileResult._rebuild(target_context, *pickle.loads(payload))

    def save_overload(self, sig, cres):
        assert not cres.lifted
        assert not cres.library.has_dynamic_globals, f"{self._function.__name__} refers to what lives in this process"
        self._folder.write(self._name(sig, cres.codegen), dumps(cres._reduce()))

    def _name(self, sig, codegen) -> str:
        """The file's name: the function, and a digest of all else that its code depends on, beside the sources."""
        arguments, returned = normalize_signature(sig)
        key = repr((self._function.__module__, arguments, returned, codegen.magic_tuple()))
        name = self._function.__name__.strip("_")
        return f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.kernel"


def kernel(*signatures, folder: KernelFolder = FOLDER, **options):
    """`numba.njit` for a function with these signatures only, compiled where it is defined, or read from the cache."""

    def decorate(function):
        dispatcher = njit(**options)(function)
        dispatcher._cache = KernelCache(function, folder)  # as `enable_caching` would set Numba's
        with folder.turn():
            for signature in signatures:
                dispatcher.compile(signature)
        dispatcher.disable_compile()
        return dispatcher

    return decorate


def named(function, name: str):
    """The function under a name of its own, before Numba sees it: one of several that the same source makes.

    Compiled code is found by its function's name and a number that counts from zero in each process. Two from the cache
    that different processes compiled would be one symbol, and the second call the first's code.
    """
    function.__name__ = function.__qualname__ = name.replace(",", "").replace(" ", "_")
    return function


def address_of(compiled) -> int:
    """Where a kernel's code is, for `by_address`, as long as the kernel is kept."""
    (overload,) = compiled.overloads.values()
    return overload.library.get_pointer_to_function(overload.fndesc.llvm_func_name)


def by_address(signature):
    """An intrinsic (address, tuple of arguments) that calls any kernel of this signature from others: one that need not
    be there, or compiled, when its caller is."""
    returned, argument_types = signature.return_type, signature.args

    @intrinsic
    def call(typing_context, address, arguments):
        def generate(context, builder, _, values):
            kind = context.call_conv.get_function_type(returned, argument_types)
            function = builder.inttoptr(values[0], kind.as_pointer())
            return _call(context, builder, function, returned, argument_types, values[1])

        return returned(types.int64, arguments), generate

    return call


def _call(context, builder, function, returned, argument_types, packed):
    """A call with a tuple of arguments in Numba's convention; an exception goes on to the caller's caller."""
    convention = context.call_conv
    unpacked = cgutils.unpack_tuple(builder, packed, len(argument_types))
    status, result = convention.call_function(builder, function, returned, argument_types, unpacked)
    with cgutils.if_unlikely(builder, status.is_error):
        convention.return_status_propagate(builder, status)
    return result


def by_name(compiled):
    """An intrinsic that calls a kernel from others, with a tuple of its arguments: its one copy, found by name when the
    caller is linked. A plain call would compile another copy of all that it contains into each caller.
    """
    (overload,) = compiled.overloads.values()
    signature, name = overload.signature, f"peregrine.{compiled.py_func.__module__}.{compiled.__name__}"
    llvm.add_symbol(name, address_of(compiled))

    @intrinsic
    def call(typing_context, arguments):
        def generate(context, builder, _, values):
            kind = context.call_conv.get_function_type(signature.return_type, signature.args)
            function = cgutils.get_or_insert_function(builder.module, kind, name)
            return _call(context, builder, function, signature.return_type, signature.args, values[0])

        return signature.return_type(arguments), generate

    return call
