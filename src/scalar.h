// Arithmetic that the CPU and the CUDA kernels share, operation for operation.
//
// A selection key that needs arithmetic (a score plus a bias, a sum over a group) must round alike
// on every backend, or two backends would choose different experts. So nothing here is left to the
// compiler: every multiply-add is explicit, both compilers are told not to contract the rest, and
// no result is a denormal, which the CPU may flush.

#ifndef JAX_ROUTER_SCALAR_H_
#define JAX_ROUTER_SCALAR_H_

#include <cstdint>
#include <cstring>

#include "options.h"

#ifdef __CUDACC__
#define JAX_ROUTER_FN JAX_ROUTER_HOST_DEVICE __forceinline__
#else
#define JAX_ROUTER_FN static inline __attribute__((always_inline))
#endif

namespace jax_router {

inline constexpr float kInfinity = __builtin_inff();
inline constexpr float kLargest = 3.402823466e+38f;
inline constexpr float kEpsilon = 1e-20f;

JAX_ROUTER_FN int32_t float_bits(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_int(x);
#else
  int32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
#endif
}

JAX_ROUTER_FN float bits_float(int32_t bits) {
#ifdef __CUDA_ARCH__
  return __int_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
#endif
}

JAX_ROUTER_FN float multiply(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

JAX_ROUTER_FN float add(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

JAX_ROUTER_FN float divide(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

// a / b where b lies in [1, 4] and 0 <= a <= 4, so that nothing over- or underflows: the steps of a
// division without its branch for what does.
JAX_ROUTER_FN float divide_moderate(float a, float b) {
#ifdef __CUDA_ARCH__
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));
  inverse = __fmaf_rn(inverse, __fmaf_rn(-b, inverse, 1.0f), inverse);
  float quotient = __fmul_rn(a, inverse);
  quotient = __fmaf_rn(__fmaf_rn(-b, quotient, a), inverse, quotient);
  return __fmaf_rn(__fmaf_rn(-b, quotient, a), inverse, quotient);
#else
  return a / b;
#endif
}

JAX_ROUTER_FN float multiply_add(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

JAX_ROUTER_FN float square_root(float a) {
#ifdef __CUDA_ARCH__
  return __fsqrt_rn(a);
#else
  return __builtin_sqrtf(a);
#endif
}

// ---- keys ----

// A key is a float mapped to an integer of the same order, that of jax.lax.top_k: +0 above -0.
inline constexpr int32_t kLowestKey = static_cast<int32_t>(0x807fffff);  // -inf, and NaN
inline constexpr int32_t kNoKey = INT32_MIN;                             // padding, below every key

JAX_ROUTER_FN int32_t flip_order(int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

JAX_ROUTER_FN int32_t key_from_bits(int32_t bits) {
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  return nan ? kLowestKey : flip_order(bits);
}

JAX_ROUTER_FN int32_t key_from_float(float x) { return key_from_bits(float_bits(x)); }

// A denormal as the zero of its sign, whatever mode the processor is in.
JAX_ROUTER_FN float flushed(float x) {
  const int32_t bits = float_bits(x);
  return (bits & 0x7f800000) != 0 ? x : bits_float(bits & INT32_MIN);
}

// Sum of two terms of a key: denormals are flushed before and after.
JAX_ROUTER_FN float add_keys(float a, float b) {
#ifdef __CUDA_ARCH__
  float sum;
  asm("add.rn.ftz.f32 %0, %1, %2;" : "=f"(sum) : "f"(a), "f"(b));
  return sum;
#else
  return flushed(add(flushed(a), flushed(b)));
#endif
}

// The logit of a key; NaN has become -inf.
JAX_ROUTER_FN float float_from_key(int32_t key) { return bits_float(flip_order(key)); }

// ---- loads ----

JAX_ROUTER_FN int32_t bits_from_bfloat16(uint16_t h) {
  return static_cast<int32_t>(static_cast<uint32_t>(h) << 16);
}

JAX_ROUTER_FN int32_t bits_from_float16(uint16_t h) {
  const uint32_t magnitude = h & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t normal = (magnitude << 13) + (112u << 23);
  const uint32_t special = normal + (112u << 23);
  // A subnormal half is its mantissa times 2**-24, a normal float.
  const float tiny = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  const uint32_t small = static_cast<uint32_t>(float_bits(tiny));
  const uint32_t large = magnitude >= 0x7c00u ? special : normal;
  return static_cast<int32_t>(sign | (magnitude < 0x0400u ? small : large));
}

// ---- stores, rounding to nearest even ----

JAX_ROUTER_FN uint16_t bfloat16_from_float(float x) {
  const uint32_t bits = static_cast<uint32_t>(float_bits(x));
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return static_cast<uint16_t>(nan ? 0x7fc0u : rounded >> 16);
}

JAX_ROUTER_FN uint16_t float16_from_float(float x) {
  const uint32_t bits = static_cast<uint32_t>(float_bits(x));
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  const uint32_t normal = (rounded >> 13) - (112u << 10);
  // Below 2**-14 the unit is 2**-24: adding 0.5 leaves the rounded count of units in the mantissa.
  const float units = add(bits_float(static_cast<int32_t>(magnitude)), 0.5f);
  const uint32_t small = static_cast<uint32_t>(float_bits(units)) - 0x3f000000u;
  const uint32_t infinite = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? small : normal;
  return static_cast<uint16_t>(sign | (rounded >= 0x47800000u ? infinite : finite));
}

// ---- scores ----

// exp(x) for x <= 0, 0 below -87 (where the result would near the denormals). Relative error 1e-7.
JAX_ROUTER_FN float exp_nonpositive(float x) {
  const float clamped = x > -87.0f ? x : -87.0f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2**23: adding it rounds to an integer
  const float shifted = multiply_add(clamped, 1.44269504f, kRound);
  const float n = add(shifted, -kRound);
  float r = multiply_add(n, -0.693145752f, clamped);
  r = multiply_add(n, -1.42860677e-6f, r);
  float p = 1.0f / 5040.0f;
  p = multiply_add(p, r, 1.0f / 720.0f);
  p = multiply_add(p, r, 1.0f / 120.0f);
  p = multiply_add(p, r, 1.0f / 24.0f);
  p = multiply_add(p, r, 1.0f / 6.0f);
  p = multiply_add(p, r, 0.5f);
  p = multiply_add(p, r, 1.0f);
  p = multiply_add(p, r, 1.0f);
  // The lowest bits of `shifted` are n. Power 0 gives 0, without a branch around the polynomial.
  const uint32_t exponent = (static_cast<uint32_t>(float_bits(shifted)) << 23) + (127u << 23);
  const float power = bits_float(static_cast<int32_t>(x >= -87.0f ? exponent : 0u));
  return multiply(p, power);
}

// exp(x - largest), +inf counting as the largest float.
JAX_ROUTER_FN float softmax_term(float x, float largest) {
  return exp_nonpositive(add(x < kLargest ? x : kLargest, -largest));
}

// log(1 + u) for u = 0 or a normal u <= 1, as 2 atanh(s) with s = u / (2 + u). Made of 2 s, which
// is no denormal.
JAX_ROUTER_FN float log1p_unit(float u) {
  const float twice = divide_moderate(add(u, u), add(2.0f, u));
  const float s = multiply(0.5f, twice);
  const float z = multiply(s, s);
  float p = 1.0f / 15.0f;
  p = multiply_add(p, z, 1.0f / 13.0f);
  p = multiply_add(p, z, 1.0f / 11.0f);
  p = multiply_add(p, z, 1.0f / 9.0f);
  p = multiply_add(p, z, 1.0f / 7.0f);
  p = multiply_add(p, z, 1.0f / 5.0f);
  p = multiply_add(p, z, 1.0f / 3.0f);
  return multiply_add(multiply(twice, z), p, twice);
}

// Score of one logit for every score but softmax; 0 for -inf, +inf counts as the largest float.
JAX_ROUTER_FN float elementwise_score(float x, Score score) {
  const float bounded = x < kLargest ? x : kLargest;
  if (score == Score::kNone) return x > -kInfinity ? bounded : 0.0f;
  const float magnitude = bounded < 0.0f ? -bounded : bounded;
  const float e = exp_nonpositive(-magnitude);
  if (score == Score::kSigmoid) return divide_moderate(x < 0.0f ? e : 1.0f, add(1.0f, e));
  const float positive = bounded > 0.0f ? bounded : 0.0f;
  return square_root(add(positive, log1p_unit(e)));
}

// dy/dx of an elementwise score, from the score alone.
JAX_ROUTER_FN float score_gradient(float y, Score score) {
  if (score == Score::kNone) return 1.0f;
  if (score == Score::kSigmoid) return y * (y < 1.0f ? 1.0f - y : 0.0f);
  // sigmoid(x) / (2 y), with sigmoid(x) = 1 - exp(-softplus(x)) and softplus(x) = y * y. For small
  // y the difference cancels; its series does not.
  const float s = y * y;
  const float inner = 1.0f - s * (1.0f / 4.0f) * (1.0f - s * (1.0f / 5.0f));
  const float series = s * (1.0f - s * 0.5f * (1.0f - s * (1.0f / 3.0f) * inner));
  const float one_minus_exp = s < 0.125f ? series : 1.0f - exp_nonpositive(-s);
  return y > 0.0f ? one_minus_exp / (2.0f * y) : 0.0f;
}

}  // namespace jax_router

#endif  // JAX_ROUTER_SCALAR_H_
