// Scalar elementary functions for both compilers.
//
// On a GPU (and for double everywhere) they are the standard library's. For float on a CPU they are written out,
// because libm's are calls that no loop vectorises across: branch-free polynomials, within 2 units in the last place,
// which g++ turns into AVX2 or AVX-512 code when they stand in a loop. They need strict NaN and infinity: never compile
// them with -ffast-math.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__CUDACC__)
#  define GK_HOST_DEVICE \
    __host__ __device__ __attribute__((always_inline))  // __forceinline__ would say inline a second time
#else
#  define GK_HOST_DEVICE __attribute__((always_inline))
#endif

namespace genkernels {
namespace math {

template <typename T>
GK_HOST_DEVICE inline T select(bool condition, T a, T b) {
  return condition ? a : b;
}

template <typename T>
GK_HOST_DEVICE inline T abs(T x) {
  return ::fabs(x);
}
template <>
GK_HOST_DEVICE inline float abs<float>(float x) {
  return ::fabsf(x);
}

// a·b rounded by itself: what is added to it does not join it in one operation, though the flags let the compilers do
// that. g++: a fused operation cannot be fused again, and adding −0 changes no number. A CPU without fused operations
// rounds twice anyway.
template <typename T>
GK_HOST_DEVICE inline T product(T a, T b) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 4)
    return ::__fmul_rn(a, b);
  else
    return ::__dmul_rn(a, b);
#elif defined(__FMA__) || defined(__aarch64__)
  if constexpr (sizeof(T) == 4)
    return ::fmaf(a, b, -0.0f);
  else
    return ::fma(a, b, -0.0);
#else
  return a * b;
#endif
}

// min(x, 0) that keeps a NaN.
template <typename T>
GK_HOST_DEVICE inline T min_zero(T x) {
  return x > T(0) ? T(0) : x;
}

GK_HOST_DEVICE inline double exp(double x) {
  return ::exp(x);
}
GK_HOST_DEVICE inline double log(double x) {
  return ::log(x);
}
GK_HOST_DEVICE inline double atan(double x) {
  return ::atan(x);
}
GK_HOST_DEVICE inline double quotient(double a, double d) {
  return a / d;
}
GK_HOST_DEVICE inline double log1p_unit(double e) {
  return ::log1p(e);
}
GK_HOST_DEVICE inline void tanh_sech2(double x, double& tanh_x, double& sech2) {
  tanh_x = ::tanh(x);
  const double e = ::exp(-2.0 * ::fabs(x));
  const double d = 1.0 / (1.0 + e);
  sech2 = 4.0 * e * d * d;
}

#if defined(__CUDA_ARCH__)

GK_HOST_DEVICE inline float exp(float x) {
  return ::expf(x);
}
GK_HOST_DEVICE inline float log(float x) {
  return ::logf(x);
}
GK_HOST_DEVICE inline float atan(float x) {
  return ::atanf(x);
}

// a / d for d in [1, 3], to an ulp: the hardware's reciprocal and one correction. The division operator has a slow path
// for denormals and infinities that cannot arise here, and its branch would keep a thread's lanes from overlapping.
GK_HOST_DEVICE inline float quotient(float a, float d) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(d));
  const float q = a * r;
  return ::fmaf(::fmaf(-d, q, a), r, q);
}

#else

GK_HOST_DEVICE inline float bits_to_float(int32_t i) {
  float f;
  std::memcpy(&f, &i, sizeof f);
  return f;
}
GK_HOST_DEVICE inline int32_t float_to_bits(float f) {
  int32_t i;
  std::memcpy(&i, &f, sizeof i);
  return i;
}

// e^x = 2^n · e^r with n = round(x / ln 2), |r| ≤ ln2/2; e^r by a degree-6 polynomial (Cephes). 2^n is applied as two
// factors, so that results down to the smallest denormal are rounded once and overflow gives inf.
GK_HOST_DEVICE inline float exp(float x) {
  constexpr float kLog2e = 1.44269504088896341f;
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.0f;  // 1.5·2^23: adding and subtracting it rounds to the nearest integer
  float c = x > 89.0f ? 89.0f : x;       // comparisons are false for NaN, which so passes through
  c = c < -104.0f ? -104.0f : c;
  const float shifted = c * kLog2e + kRound;
  const int32_t n = float_to_bits(shifted) - float_to_bits(kRound);
  const float fn = shifted - kRound;
  float r = c - fn * kLn2High;
  r = r - fn * kLn2Low;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const int32_t half = n >> 1;
  return p * bits_to_float((half + 127) << 23) * bits_to_float((n - half + 127) << 23);
}

// log x for normal x > 0 and for NaN; branch-free (Cephes): x = 2^e·(1 + f) with 1 + f in [√½, √2).
GK_HOST_DEVICE inline float log(float x) {
  const int32_t bits = float_to_bits(x);
  const int32_t e = (bits - 0x3f3504f3) >> 23;
  const float f = bits_to_float(bits - (e << 23)) - 1.0f;
  const float fe = static_cast<float>(e);
  const float f2 = f * f;
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  float y = f * f2 * p + fe * -2.12194440e-4f;
  y = y - 0.5f * f2;
  y = f + y + fe * 0.693359375f;
  return x == x ? y : x;
}

GK_HOST_DEVICE inline float quotient(float a, float d) {
  return a / d;
}

// atan x (Cephes): |x| above tan(3π/8) by π/2 − atan(1/x), above tan(π/8) by π/4 + atan((x − 1)/(x + 1)), else an odd
// polynomial.
GK_HOST_DEVICE inline float atan(float x) {
  const float a = ::fabsf(x);
  const bool far = a > 2.414213562373095f, near = a <= 0.4142135623730950f;
  const float up = far ? -1.0f : near ? a : a - 1.0f;
  const float down = far ? a : near ? 1.0f : a + 1.0f;
  const float r = up / down, z = r * r;
  float p = 8.05374449538e-2f;
  p = p * z - 1.38776856032e-1f;
  p = p * z + 1.99777106478e-1f;
  p = p * z - 3.33329491539e-1f;
  const float base = far ? 1.57079632679489662f : near ? 0.0f : 0.785398163397448310f;
  return ::copysignf(base + (p * z * r + r), x);
}

#endif

// log(1 + e) for e in [0, 1]: 2·atanh(w), w = e / (2 + e) ≤ 1/3, whose series in w² has positive terms and never
// cancels.
GK_HOST_DEVICE inline float log1p_unit(float e) {
  const float w = quotient(e, 2.0f + e);
  const float w2 = w * w;
  float p = 2.0f / 15.0f;
  p = p * w2 + 2.0f / 13.0f;
  p = p * w2 + 2.0f / 11.0f;
  p = p * w2 + 2.0f / 9.0f;
  p = p * w2 + 2.0f / 7.0f;
  p = p * w2 + 2.0f / 5.0f;
  p = p * w2 + 2.0f / 3.0f;
  return 2.0f * w + w * w2 * p;
}

// tanh(x) and 1 − tanh²(x). Below 0.625 an odd polynomial (Cephes) keeps relative accuracy, above it (1 − e)/(1 + e), e
// = e^{−2|x|}.
GK_HOST_DEVICE inline void tanh_sech2(float x, float& tanh_x, float& sech2) {
  const float a = ::fabsf(x);
  const float e = exp(-2.0f * a);
  const float d = quotient(1.0f, 1.0f + e);
  const float large = (1.0f - e) * d;
  const float x2 = a * a;
  float p = -5.70498872745e-3f;
  p = p * x2 + 2.06390887954e-2f;
  p = p * x2 - 5.37397155531e-2f;
  p = p * x2 + 1.33314422036e-1f;
  p = p * x2 - 3.33332819422e-1f;
  const float small = a + a * x2 * p;
  const float magnitude = a < 0.625f ? small : large;
  tanh_x = ::copysignf(magnitude, x);
  sech2 = 4.0f * e * d * d;
}

// log u − log(1 − u) for u in [2^-24, 1 − 2^-24] (fp64: 2^-53) and for NaN. 1 − u is exact from ½ on, and for every u
// that is a multiple of the distance of numbers there, as uniform draws are; what it loses elsewhere, found exactly,
// moves log(1 − u) by its ratio to 1 − u.
template <typename T>
GK_HOST_DEVICE inline T logit(T u) {
  const T rest = T(1) - u;
  const T lost = (T(1) - rest) - u;
  return log(u) - (log(rest) + lost / rest);
}

}  // namespace math
}  // namespace genkernels
