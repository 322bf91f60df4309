// Ahead of every source (setup.py includes it): the libraries run on glibc 2.28, wherever they are built. exp, log and
// pow have a later version that differs in how errors are told; portable.cpp has the rest.
#pragma once

#if defined(__linux__) && defined(__x86_64__) && !defined(__CUDA_ARCH__)
__asm__(".symver exp, exp@GLIBC_2.2.5");
__asm__(".symver log, log@GLIBC_2.2.5");
__asm__(".symver pow, pow@GLIBC_2.2.5");
#endif
