"""The C library keeps the memory of freed tensors for the next step, instead of handing it back to the system.

Otherwise each large tensor of each step is mapped anew, and every page of it zeroed by the kernel at its first touch.
"""

from core.hookspecs import Phase, Strategy, hookimpl

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of the GNU C library
NEVER, FROM_HEAP = -1, 1 << 25  # bytes; what is larger is mapped all the same


class Malloc(Strategy):
    name, phase, slot = "malloc", Phase.MODEL, "malloc"

    def available(self, facts, profile):
        import platform

        if profile.device != "cpu":
            return "a card's memory has its own allocator"
        if platform.libc_ver()[0] != "glibc":
            return "only the GNU C library has these settings"
        return None

    @hookimpl
    def prepare_model(self, build):
        import ctypes

        mallopt = None if build.simulated else ctypes.CDLL(None).mallopt
        if mallopt and not (mallopt(M_MMAP_THRESHOLD, FROM_HEAP) and mallopt(M_TRIM_THRESHOLD, NEVER)):
            build.say("note: malloc: this C library refuses the setting; memory is handed back as before")


@hookimpl
def strategies():
    return Malloc()
