// Activations to E4M3: reading them, the scale of a token, the codes.
// HALF: they are float16, else bfloat16.
#pragma once
#include "hardware.cuh"

struct Activations {
  const u16 *values;  // [M, K], rows `stride` apart
  const u16 *offset;  // [K] bfloat16, subtracted first, or null
  long long stride;
  int tokens, columns;  // M, K
};

// As torch: NaN wins.
DEVICE float larger(float a, float b) {
  float out;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
}

DEVICE float widen(u32 half) {
  float out;
  if (HALF)
    asm("{\n.reg .b16 h;\ncvt.u16.u32 h, %1;\ncvt.f32.f16 %0, h;\n}" : "=f"(out) : "r"(half));
  else
    out = __uint_as_float(half << 16);
  return out;
}

// Two values to E4M3 bytes (nearest even, saturating, NaN stays), the first in the low byte.
DEVICE u32 to_codes(float first, float second) {
  u16 out;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(out) : "f"(second), "f"(first));
  return out;
}

// v / scale in IEEE arithmetic, whatever v is. `inverse` is 1 / scale, correctly rounded, so one
// step of correction rounds the quotient correctly (Markstein), as long as nothing leaves float32's
// range.
DEVICE float divide(float v, float scale, float inverse) {
  float quotient = __fmul_rn(v, inverse);
  return __fmaf_rn(-__fmaf_rn(quotient, scale, -v), inverse, quotient);  // keeps the sign of -0
}

// The same for every scale.
__device__ __noinline__ float divide_slowly(float v, float scale) { return __fdiv_rn(v, scale); }

// Of a token: its largest magnitude becomes 448.
struct Scale {
  float value, inverse;
  bool quick;
  DEVICE explicit Scale(float most) {
    value = __fdiv_rn(larger(most, 0x1p-100f), 448.0f);
    inverse = __frcp_rn(value);
    quick = value >= 0x1p-60f && value <= 0x1p+120f;
  }
  // What another lane has.
  DEVICE Scale of_lane(int lane) const {
    Scale out = *this;
    out.value = __shfl_sync(~0u, value, lane), out.inverse = __shfl_sync(~0u, inverse, lane);
    out.quick = __shfl_sync(~0u, quick, lane);
    return out;
  }
};

// 8 neighbouring features of a token.
struct Piece {
  float v[8];

  DEVICE float largest(float so_far) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) so_far = larger(so_far, fabsf(v[i]));
    return so_far;
  }

  // Their E4M3 bytes; k is the first. What lies beyond K is 0 also in a token of NaN: 0 / NaN would
  // not be.
  DEVICE uint2 codes(const Scale &scale, int k, int columns) const {
    u32 pairs[4];
    if (scale.quick) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        pairs[i] = to_codes(divide(v[i * 2], scale.value, scale.inverse),
                            divide(v[i * 2 + 1], scale.value, scale.inverse));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        pairs[i] = to_codes(divide_slowly(v[i * 2], scale.value),
                            divide_slowly(v[i * 2 + 1], scale.value));
    }
    if (k + 8 > columns)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (k + i * 2 >= columns) pairs[i] = 0;
        if (k + i * 2 + 1 >= columns) pairs[i] &= 0xFF;
      }
    return make_uint2(pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16);
  }
};

// The bits of 8 features from k on, 0 beyond K. WHOLE: rows start on 16 bytes, K is a multiple of 8.
template <bool WHOLE>
DEVICE uint4 read(const Activations &x, int token, int k) {
  uint4 out = make_uint4(0, 0, 0, 0);
  if (token >= x.tokens || k >= x.columns) return out;
  const u16 *from = x.values + token * x.stride + k;
  if (WHOLE) {
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out.x), "=r"(out.y), "=r"(out.z), "=r"(out.w)
                 : "l"(from));
  } else {
    u16 one[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      one[i] = 0;
      if (k + i < x.columns) asm volatile("ld.global.u16 %0, [%1];" : "=h"(one[i]) : "l"(from + i));
    }
    out.x = one[0] | (u32)one[1] << 16, out.y = one[2] | (u32)one[3] << 16;
    out.z = one[4] | (u32)one[5] << 16, out.w = one[6] | (u32)one[7] << 16;
  }
  return out;
}

DEVICE Piece values(const Activations &x, uint4 raw, int k) {
  u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
  Piece out;
#pragma unroll
  for (int i = 0; i < 8; ++i) out.v[i] = widen(i % 2 ? words[i / 2] >> 16 : words[i / 2] & 0xFFFF);
  if (x.offset)
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (k + i < x.columns) out.v[i] -= __uint_as_float((u32)x.offset[k + i] << 16);
  return out;
}
