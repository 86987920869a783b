// What the kernels need to know of the compiler, and to tell it.
#pragma once

// VEX-encoded VPDPBUSD needs g++ 11 or clang 12.
#if !defined(TORCHQ_HAS_AVX_VNNI)
#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define TORCHQ_HAS_AVX_VNNI 1
#else
#define TORCHQ_HAS_AVX_VNNI 0
#endif
#endif

// AMX instructions are written in assembly. They need binutils 2.34, which is older than g++ 11, or clang 11.
#if !defined(TORCHQ_HAS_AMX)
#define TORCHQ_HAS_AMX TORCHQ_HAS_AVX_VNNI
#endif

// USMMLA needs g++ 10 or clang 16.
#if !defined(TORCHQ_HAS_I8MM)
#if defined(__aarch64__) && (defined(__clang__) ? __clang_major__ >= 16 : __GNUC__ >= 10)
#define TORCHQ_HAS_I8MM 1
#else
#define TORCHQ_HAS_I8MM 0
#endif
#endif

// Unrolls the loop that follows completely. An array of vectors stays in registers only if every index into it is a
// constant; otherwise the compiler puts it on the stack.
#define TORCHQ_UNROLL _Pragma("GCC unroll 64")
#define TORCHQ_UNROLL_TWICE _Pragma("GCC unroll 2")
#define TORCHQ_INLINE inline __attribute__((always_inline))
