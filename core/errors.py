"""Errors that are the user's to fix. The command line prints them without a traceback and exits with their code."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable


class TightfitError(Exception):
    """A message for the user. `problems` are printed all at once, one line each."""

    exit_code = 1

    def __init__(self, problems: str | Iterable[str], title: str = "") -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        self.title = title
        super().__init__(str(self))

    def __str__(self) -> str:
        if not self.title and len(self.problems) == 1:
            return self.problems[0]
        title = self.title or f"{len(self.problems)} problems"
        return "\n".join([f"{title}:", *(f"  - {problem}" for problem in self.problems)])


class UserError(TightfitError):
    """Bad params, missing or broken input, or a machine that cannot run what was asked for."""

    exit_code = 2


class Unsound(UserError):
    """The numbers of a run have gone bad: what it holds now is not worth keeping."""


class PluginError(TightfitError):
    """A plugin that does not load, or strategies that do not work together."""

    exit_code = 3


class MediaError(TightfitError):
    """The disk is full, read-only or failing."""

    exit_code = 4


class Stopped(TightfitError):
    """The run was interrupted or another one holds its lock. Never 0: DVC records what exits 0 as finished."""

    exit_code = 75


class Problems:
    """Collects what goes wrong in several `with` blocks, so that a user hears of all of it at once."""

    def __init__(self) -> None:
        self.found: list[TightfitError] = []

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, TightfitError):
            self.found.append(error)
        return isinstance(error, TightfitError)

    def joined(self) -> TightfitError:
        """All of them as one error, with the exit code of the first."""
        if len(self.found) == 1:
            return self.found[0]
        lines = [str(error).replace("\n", "\n    ") for error in self.found]
        return type(self.found[0])(lines, title="this run cannot start")


# Disk full, quota, file size limit, read-only, I/O error; EDQUOT does not exist on Windows.
MEDIA_ERRNOS = {
    *(errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EIO),
    getattr(errno, "EDQUOT", errno.ENOSPC),
}


def is_media(error: OSError) -> bool:
    """Whether an error is the disk's, or its permissions', and not ours."""
    return error.errno in MEDIA_ERRNOS or isinstance(error, PermissionError)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the nearest known word, or an empty string."""
    near = difflib.get_close_matches(str(word), list(known), 1)
    return f" Did you mean {near[0]!r}?" if near else ""


# What running out of memory is called: torch's allocators on cards and CPUs (Linux and Windows), the driver, cuBLAS,
# cuDNN and C++. Whole phrases, so that an error which only mentions memory is not taken for one.
PHRASES = re.compile(
    r"(CUDA|HIP|XPU|MPS backend) out of memory"
    r"|CUDA (driver )?error: out of memory|cudaErrorMemoryAllocation|Triton Error \[CUDA\]: out of memory"
    r"|CUBLAS_STATUS_NOT_INITIALIZED when calling .?cublasCreate|NVML_SUCCESS == r INTERNAL ASSERT FAILED"
    r"|CU(BLAS|DNN|SOLVER|SPARSE)_STATUS_ALLOC_FAILED"
    r"|DefaultCPUAllocator: (can't allocate memory|not enough memory)"
    r"|std::bad_alloc"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, whatever it is called."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and PHRASES.search(str(error)) is not None
