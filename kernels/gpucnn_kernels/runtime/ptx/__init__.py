"""From PTX, which NVRTC makes of a kernel's text, to C++ for the host runtime: what a GPU is given, run on a CPU.

Compiled from its text, a kernel runs with the host's meaning of everything: inline PTX is replaced by functions,
products and sums are fused only where the text says so, and what stands between ``#if __CUDA_ARCH__`` is that of
one architecture. Here each PTX instruction becomes a C++ statement with the meaning that the PTX ISA manual gives
it (host_include/gpucnn_host_instructions.h), so that the compiler's work, the inline instructions, the layout of
parameters and the code of every architecture are run too. What is not run is what ptxas does after that.

An instruction that is not known raises PtxError: nothing is left out silently. The modules, from the bottom: text
(what is written), operands, collective and instructions (what it means), translation (the whole).
"""

from gpucnn_kernels.runtime.ptx.text import PtxError
from gpucnn_kernels.runtime.ptx.translation import translate

__all__ = ["PtxError", "translate"]
